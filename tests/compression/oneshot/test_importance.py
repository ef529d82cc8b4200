"""What gates are worth is read off the weights that they multiply where the network's are those."""

import math

import pytest
import torch
from torch import nn

import sparsereg
from sparsereg.compression import compact
from sparsereg.compression.oneshot import importance, ranked
from sparsereg.compression.oneshot.importance import ThroughWeights
from sparsereg.compression.oneshot.ranked import NEARLY_OPEN, Ranked, opened_
from sparsereg.compression.units.structure import structure_of
from sparsereg.model.gpt import GPT
from sparsereg.model.transformer import Shape
from sparsereg.model.vit import ViT
from sparsereg.penalties import hard_concretes


class Tied(nn.Module):
    """A table of embeddings that is that of the last layer, too."""

    def __init__(self):
        super().__init__()
        self.table, self.hidden = nn.Embedding(11, 8), nn.Linear(8, 8)
        self.last = nn.Linear(8, 11, bias=False)
        self.last.weight = self.table.weight

    def forward(self, x):
        h = self.table(x)
        return self.last(h + self.hidden(h).relu())


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.inner = nn.Conv2d(1, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1, bias=False)
        self.norm, self.last = nn.BatchNorm2d(6), nn.Linear(6, 3)

    def forward(self, x):
        x = self.first(x)
        return self.last((x + self.norm(self.inner(x)).relu()).mean((2, 3)))


NETWORKS = {
    "vit": (lambda: ViT(3, (1, 8, 8), 4, Shape(width=12, depth=2, heads=2)), torch.randn(8, 1, 8, 8)),
    "gpt": (lambda: GPT(11, 6, Shape(width=12, depth=2, heads=2)), torch.randint(11, (8, 6))),
    "tied": (Tied, torch.randint(11, (8, 5))),
    "residual": (Residual, torch.randn(8, 1, 6, 6)),
}


def nearly_open_(network):
    for g in hard_concretes(network).values():
        inside = (NEARLY_OPEN - g.gamma) / (g.zeta - g.gamma)
        nn.init.constant_(g.log_alpha, g.temperature * math.log(inside / (1 - inside)))
    return network


@pytest.mark.parametrize("name", NETWORKS)
def test_derivatives_by_gates_are_those_by_the_weights_that_they_multiply(name):
    torch.manual_seed(0)
    make, x = NETWORKS[name]
    network = opened_(sparsereg.gate(make(), x[:1]).eval())
    small = compact(network, x[:1]).double()
    structure = structure_of(network, (x[:1],), {})
    gates = hard_concretes(nearly_open_(network).double())
    x = x.double() if x.is_floating_point() else x
    answer = network(x)
    signs = torch.randn(answer.shape, dtype=torch.float64)
    locations = [gates[path].log_alpha for path in structure.paths]
    slopes = torch.autograd.grad((answer * signs).sum(), locations)
    each = torch.autograd.grad(sum(gates[path].median().sum() for path in structure.paths), locations)
    wanted = torch.cat([s / e for s, e in zip(slopes, each, strict=True)])
    through = ThroughWeights.of(
        small, structure, network, {p: len(gates[p].log_alpha) for p in structure.paths}
    )
    found = through.by_gates(torch.autograd.grad((small(x) * signs).sum(), through.weights))
    torch.testing.assert_close(found, wanted, rtol=0.02, atol=0.02 * float(wanted.abs().max()))


def test_a_network_whose_weights_are_others_is_not_taken_for_it():
    torch.manual_seed(0)
    make, x = NETWORKS["vit"]
    network = opened_(sparsereg.gate(make(), x[:1]).eval())
    small, structure = compact(network, x[:1]), structure_of(network, (x[:1],), {})
    sizes = {p: len(g.log_alpha) for p, g in hard_concretes(network).items()}
    assert ThroughWeights.of(small, structure, network, sizes) is not None
    with torch.no_grad():
        next(p for p in small.parameters() if p.dim() == 2).mul_(1.1)
    assert ThroughWeights.of(small, structure, network, sizes) is None
    small.register_parameter("another", nn.Parameter(torch.ones(1)))
    assert ThroughWeights.of(small, structure, network, sizes) is None


@pytest.mark.parametrize("name", ["vit", "residual"])
def test_no_further_derivatives_are_taken_for_what_blocks_are_worth(monkeypatch, name):
    make, x = NETWORKS[name]
    taken = []

    def gradient(*args):
        taken.append(args)
        return importance.gradient(*args)

    monkeypatch.setitem(ranked.IMPORTANCE, "gradient", gradient)
    network = opened_(sparsereg.gate(make(), x[:1]).eval())
    Ranked(network, x[:1], "parameters", [x] * 4)
    assert not taken
    monkeypatch.setattr(ThroughWeights, "of", lambda *args: None)
    Ranked(network, x[:1], "parameters", [x] * 4)
    assert len(taken) == 1  # no layer sums over what a block gives
