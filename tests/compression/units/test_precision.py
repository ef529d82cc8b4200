"""Smaller networks change their type as any module does, also where operations of the network say types."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sparsereg
from sparsereg.compression import load_compacted, save_compacted
from sparsereg.compression.units import precision
from sparsereg.compression.verify import difference
from sparsereg.model.gpt import GPT
from sparsereg.model.transformer import Shape
from sparsereg.penalties import hard_concretes
from tests.compression.units.test_nonzero import gated, x


class Norm(nn.RMSNorm):
    """A mean of squares in float32, back in the type of the input, or of the weight if that is a half."""

    def forward(self, x):
        wide = x.to(torch.float32)
        y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)
        if self.weight.dtype in (torch.float16, torch.bfloat16):
            y = y.to(self.weight.dtype)
        return self.weight * y


class Decoder(nn.Module):
    """Attention with places in float32, a mask in the type of the input, and a router read in float32."""

    def __init__(self):
        super().__init__()
        self.enter, self.norm, self.qkv = nn.Linear(6, 16), Norm(16), nn.Linear(16, 48)
        self.leave, self.router, self.out = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, x):
        x = self.enter(x)
        length, kind = x.shape[1], {"dtype": x.dtype, "device": x.device}
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        angles = torch.arange(length, dtype=torch.float32, device=x.device)[:, None] / 7 + 300
        q, k = (t * angles.cos().to(t.dtype) for t in (q, k))
        mask = torch.full((length, length), torch.finfo(torch.float16).min, **kind).triu(1)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
        x = x + self.leave(y)
        shares = F.linear(x.float(), self.router.weight.float()).sigmoid()
        return self.out(x * shares.to(x.dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_compacted_network_changes_its_type(dtype, tmp_path):
    example = x(2, 5, 6).float()
    network = gated(Decoder(), example.double()).float()
    with torch.no_grad():
        smaller = sparsereg.compact(network, example)
        path = tmp_path / "compacted.pt"
        save_compacted(smaller, path)
        for one in (copy.deepcopy(smaller), load_compacted(path)):
            answer = one.to(dtype)(example.to(dtype))
            assert answer.dtype == dtype
            assert difference(answer.double(), network(example).double()) < 8 * torch.finfo(dtype).eps + 1e-6
            assert difference(one.float()(example), network(example)) < 8 * torch.finfo(dtype).eps + 1e-6
    smaller.to(dtype).train()(example.to(dtype)).sum().backward()


def test_types_that_a_network_says_stay():
    example = x(2, 5, 6).float()
    smaller = sparsereg.compact(sparsereg.gate(Decoder(), example), example).bfloat16()
    kinds = []

    class Watch(torch.fx.Interpreter):
        def run_node(self, node):
            found = super().run_node(node)
            if node.target in (torch.ops.aten.rsqrt.default, torch.ops.aten.cos.default):
                kinds.append(found.dtype)
            return found

    Watch(smaller).run(example.bfloat16())
    assert set(kinds) == {torch.float32}


def shut(network, example, seed):
    """Gates of a network, a third of them shut."""
    network = sparsereg.gate(network, example)
    generator = torch.Generator().manual_seed(seed)
    for gate in hard_concretes(network).values():
        drawn = torch.rand(gate.log_alpha.shape, generator=generator)
        gate.log_alpha.data.copy_(torch.where(drawn < 1 / 3, -5.0, 5.0))
    return network


@pytest.mark.parametrize("seed", range(4))
def test_a_network_that_is_compacted_again_changes_its_type(seed):
    example = x(2, 5, 6).float()
    smaller = sparsereg.compact(gated(Decoder(), example.double()).float(), example)
    for again in range(3):
        smaller = sparsereg.compact(shut(smaller, example, 10 * seed + again), example)
        wide = smaller(example)
        half = copy.deepcopy(smaller).bfloat16()(example.bfloat16())
        assert half.dtype == torch.bfloat16
        assert difference(half.float(), wide) < 0.05


class Both(nn.Module):
    """Returns what it also reads in float32."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        y = self.head(self.body(x).relu())
        return y, y.float().square()


def test_results_that_are_read_in_another_type_stay_in_their_own():
    example = x(2, 6).float()
    smaller = sparsereg.compact(sparsereg.gate(Both(), example), example).bfloat16()
    assert [y.dtype for y in smaller(example.bfloat16())] == [torch.bfloat16, torch.float32]


def test_types_of_a_compacted_network_are_read_off_its_code(monkeypatch):
    example = torch.arange(10).view(2, 5)
    smaller = sparsereg.compact(shut(GPT(12, 8, Shape(width=16, depth=2, heads=2)), example, 0), example)
    codes = []
    for written in (precision._written, lambda *_: None):
        with monkeypatch.context() as patch:
            patch.setattr(precision, "_written", written)
            codes.append(sparsereg.compact(shut(smaller, example, 1), example).code)
    assert codes[0] == codes[1]
    assert "dtype" in codes[0]

    def refuse(*_):
        raise AssertionError("traced once more")

    monkeypatch.setattr(precision, "exported_anew", refuse)
    sparsereg.compact(shut(smaller, example, 2), example).bfloat16()(example)
