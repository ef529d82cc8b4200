"""The small transformers and the U-Net: shapes, sizes, causality, export with dynamic sizes, wrong input."""

import doctest

import pytest
import torch
from torch.export import Dim, export

from sparsereg.model import gpt, transformer, unet, vit
from sparsereg.model.gpt import GPT, TextClassifier
from sparsereg.model.transformer import Attention, Rotary, Shape
from sparsereg.model.unet import UNet
from sparsereg.model.vit import ViT

SMALL = Shape(width=16, depth=2, heads=2)


@pytest.mark.parametrize("module", [gpt, transformer, unet, vit], ids=lambda m: m.__name__)
def test_examples_are_true(module):
    found = doctest.testmod(module)
    assert found.attempted
    assert not found.failed


@pytest.mark.parametrize("positions", ["rotary", "learned"])
@pytest.mark.parametrize("parts", [{}, {"mlp": "swiglu", "norm": "rms", "dropout": 0.1}])
def test_language_model_sees_nothing_that_comes_later(positions, parts):
    torch.manual_seed(0)
    net = GPT(50, 12, Shape(width=16, depth=2, heads=2, **parts), positions).eval()
    tokens = torch.randint(50, (3, 12))
    changed = tokens.clone()
    changed[:, 7:] = (changed[:, 7:] + 1) % 50
    with torch.no_grad():
        first, second = net(tokens), net(changed)
    assert torch.equal(first[:, :7], second[:, :7])
    assert not torch.allclose(first[:, 7:], second[:, 7:])


def test_sizes_of_the_defaults():
    assert sum(p.numel() for p in GPT().parameters()) == 256 * 128 + 4 * (12 * 128**2 + 13 * 128) + 256
    width, depth = 64, 6
    per_block = 12 * width**2 + 13 * width
    head, patches = width * 10 + 10, 3 * 16 * width + width
    expected = patches + 64 * width + depth * per_block + 2 * width + head
    assert sum(p.numel() for p in ViT().parameters()) == expected


def test_tied_weights_are_one_tensor():
    net = GPT(50, 8, SMALL)
    assert net.head.weight is net.decoder.tokens.weight
    apart = GPT(50, 8, SMALL, tied=False)
    assert apart.head.weight is not apart.decoder.tokens.weight


def test_rotary_scores_depend_on_the_distance_only():
    rotary = Rotary(8, 20)
    query, key = torch.randn(8), torch.randn(8)
    turned_q, turned_k = (rotary(x.expand(1, 1, 20, 8))[0, 0] for x in (query, key))
    scores = turned_q @ turned_k.T
    for distance in (0, 3, 11):
        diagonal = scores.diagonal(-distance)
        assert torch.allclose(diagonal, diagonal[:1].expand_as(diagonal), atol=1e-5)


def test_attention_is_softmax_of_scaled_products():
    torch.manual_seed(0)
    attention = Attention(Shape(width=8, heads=2)).double()
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    q, k, v = (part.reshape(2, 5, 2, 4).transpose(1, 2) for part in attention.qkv(x).split(8, dim=2))
    weights = (q @ k.transpose(2, 3) / 4**0.5).softmax(-1)
    expected = attention.out((weights @ v).transpose(1, 2).reshape(2, 5, 8))
    assert torch.allclose(attention(x), expected, atol=1e-12)


def test_padding_changes_no_class():
    torch.manual_seed(0)
    net = TextClassifier(3, 50, 20, SMALL).double().eval()
    tokens = torch.randint(50, (2, 9))
    padded = torch.cat([tokens, torch.zeros(2, 6, dtype=torch.int64)], 1)
    mask = torch.cat([torch.ones(2, 9), torch.zeros(2, 6)], 1).long()
    assert torch.allclose(net(tokens), net(padded, mask), atol=1e-12)


@pytest.mark.costly
def test_exported_for_any_batch_and_length():
    batch, length = Dim("batch", max=64), Dim("length", min=2, max=12)
    net = GPT(50, 12, SMALL).eval()
    program = export(net, (torch.zeros(2, 6, dtype=torch.int64),), dynamic_shapes=({0: batch, 1: length},))
    tokens = torch.randint(50, (5, 11))
    assert torch.allclose(program.module()(tokens), net(tokens), atol=1e-6)
    for made, shape in ((ViT(4, (1, 8, 8), 4, SMALL), (1, 8, 8)), (UNet(3, 1, 4, 2), (1, 8, 8))):
        images = torch.randn(5, *shape)
        program = export(made.eval(), (torch.randn(2, *shape),), dynamic_shapes=({0: batch},))
        assert torch.allclose(program.module()(images), made(images), atol=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Shape(width=10, heads=3), "multiple of heads=3"),
        (lambda: Shape(mlp="relu"), "mlp must be one of gelu, swiglu"),
        (lambda: Shape(norm="batch"), "norm must be one of layer, rms"),
        (lambda: Shape(mlp_ratio=0), "mlp_ratio must be a number > 0"),
        (lambda: Shape(depth=0), "depth must be an integer >= 1"),
        (lambda: GPT(256, 8, Shape(width=6, heads=2)), "a head has 3"),
        (lambda: GPT(positions="none"), "positions must be one of"),
        (lambda: GPT(context=0), "context must be"),
        (lambda: ViT(10, (3, 30, 30)), "not made of patches of 4 x 4"),
        (lambda: ViT(1), "num_classes must be >= 2"),
        (lambda: ViT(3, (8, 8)), "image_shape must be"),
        (lambda: TextClassifier(1), "num_classes must be >= 2"),
        (lambda: UNet(1), "num_classes must be >= 2"),
        (lambda: UNet(2, depth=0), "depth must be"),
    ],
)
def test_wrong_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()
