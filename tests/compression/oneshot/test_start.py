"""A start in one shot leaves, in place, the network that shrink returns."""

import pytest
import torch
from torch import nn

import sparsereg
from sparsereg.compression.oneshot.inputs import BATCH, read_inputs
from sparsereg.compression.oneshot.start import start_in_one_shot_
from sparsereg.model.gpt import GPT
from sparsereg.model.transformer import Shape
from sparsereg.model.vit import ViT
from sparsereg.penalties import hard_concretes


def convolutions():
    return nn.Sequential(
        nn.Conv2d(1, 12, 3, bias=False), nn.BatchNorm2d(12), nn.ReLU(),
        nn.Conv2d(12, 12, 3, groups=2), nn.ReLU(),
        nn.Conv2d(12, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 5),
    )  # fmt: skip


def sigmoids():
    return nn.Sequential(
        nn.Linear(6, 24), nn.Sigmoid(), nn.Linear(24, 16), nn.Softplus(), nn.Linear(16, 3, bias=False)
    )


NETWORKS = {
    "vit": (lambda: ViT(4, (1, 10, 10), 5, Shape(width=16, depth=2, heads=2)), (1, 10, 10)),
    "gpt": (lambda: GPT(32, 12, Shape(width=16, depth=2, heads=2, mlp="swiglu", norm="rms")), None),
    "convolutions": (convolutions, (1, 10, 10)),
    "sigmoids": (sigmoids, (6,)),
}


def made(name):
    torch.manual_seed(0)
    make, shape = NETWORKS[name]
    network = make().double()
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.2 * torch.randn_like(p))
    x = torch.randint(32, (256, 12)) if shape is None else torch.randn(256, *shape, dtype=torch.float64)
    network.train()(x)  # statistics of BatchNorm
    return network.eval(), x


@pytest.mark.costly
@pytest.mark.parametrize("name", NETWORKS)
def test_it_is_what_shrink_returns(name):
    network, x = made(name)
    small = sparsereg.shrink(network, x, target_sparsity=0.5, progress=False)
    gated = sparsereg.gate(network, x[:1]).train()
    identities = [id(p) for p in gated.parameters()]
    start_in_one_shot_(gated, x[:1], "parameters", 0.5, read_inputs(network, x, 2048, BATCH))
    assert gated.training
    assert identities == [id(p) for p in gated.parameters()]
    assert all(bool((g.log_alpha.abs() == 20).all()) for g in hard_concretes(gated).values())
    expected = small(x)
    expected = expected.detach()
    spread = float(expected.std())
    torch.testing.assert_close(gated.eval()(x).detach(), expected, rtol=0, atol=1e-9 * spread)
    cut = sparsereg.compact(gated, x[:1])
    shapes = [{name: p.shape for name, p in net.named_parameters()} for net in (cut, small)]
    assert shapes[0] == shapes[1]
    plain = network(x).detach()
    assert float((expected - plain).abs().max()) > 1e-3 * spread
