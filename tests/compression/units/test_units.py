"""What an explanation says can go, can go: the smaller network equals the masked one."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from sparsereg.compression.units.cut import Cut
from sparsereg.compression.units.labels import FIRST, Unions
from sparsereg.compression.units.rules.table import Labeller
from sparsereg.compression.units.solve import solve
from sparsereg.compression.units.tracing import trace
from tests.compression.units.networks import NETWORKS, build


def solved(network, *example):
    return solve(Labeller(trace(network, *example)))


def random_half(units, seed):
    """Half of all choices, but never all of those along one axis of a weight."""
    generator = np.random.default_rng(seed)
    choices = units.removable
    gone = set(generator.permutation(choices)[: len(choices) // 2].tolist())
    axes = units.labeller.axes
    lines = [line for along in axes.weight_axes.values() for line in along if line is not None]
    lines += [labels.numpy() for labels in axes.of.values() if isinstance(labels, torch.Tensor)]
    lines = [np.unique(line[line >= FIRST]) for line in lines]
    while empty := [line for line in lines if len(line) and not units.alive(gone)[line].any()]:
        for line in empty:
            gone -= units.of(int(line[0]))
    return gone


@pytest.mark.costly
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_a_cut_network_equals_the_masked_one(name, seed):
    example = NETWORKS[name][1]
    example = example.double() if example.is_floating_point() else example
    units = solved(build(name).double(), example)
    gone = random_half(units, seed)
    assert gone
    cut = Cut(units, gone)
    full = sum(cut.program.weights[n].numel() for n in cut.program.parameters)
    assert cut.num_parameters < 0.8 * full
    for smaller, masked in zip(tree_leaves(cut.run(example)), tree_leaves(cut.masked(example)), strict=True):
        assert (smaller - masked).abs().max() <= 1e-12 * masked.std()


@torch.no_grad()
def test_nothing_gone_changes_nothing():
    for name in ("decoder", "mixed"):
        network, example = build(name), NETWORKS[name][1]
        cut = Cut(solved(network, example), ())
        wanted = tree_leaves(network(example))
        assert all(torch.equal(a, b) for a, b in zip(tree_leaves(cut.run(example)), wanted, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(tree_leaves(cut.masked(example)), wanted, strict=True))


def test_unions_of_many_pairs():
    generator = np.random.default_rng(0)
    sets = Unions()
    units = sets.new(300)
    a, b = generator.integers(units[0], units[-1] + 1, (2, 150))
    sets.unite(a, b)
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    edges = coo_array((np.ones(150), (a - units[0], b - units[0])), (300, 300))
    _, wanted = connected_components(edges, directed=False)
    found = sets.find(units)
    assert np.array_equal(found[:, None] == found[None], wanted[:, None] == wanted[None])


def test_an_operation_without_a_rule_keeps_what_it_touches():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 8), nn.Linear(8, 2)

        def forward(self, x):
            return self.c(torch.relu(self.b(torch.special.bessel_j1(self.a(x)))))

    units = solved(Odd(), torch.randn(3, 4))
    assert "special_bessel_j1" in units.labeller.unknown
    assert len(units.removable) == 8  # the units of the second layer
