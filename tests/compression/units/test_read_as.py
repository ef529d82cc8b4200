"""Weights that are read in another type, in another shape or in part, in place of calling their layer."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sparsereg
from tests.compression.units.test_nonzero import exact, x


class Reads(nn.Module):
    """Reads the weight of a layer in place of calling it."""

    def __init__(self, layer, way):
        super().__init__()
        self.enter, self.layer, self.way, self.out = nn.Linear(6, 16), layer, way, nn.Linear(12, 3)

    def forward(self, x):
        return self.out(self.way(self.layer, self.enter(x).relu()).flatten(1).relu())


WAYS = {
    "another type": (
        nn.Linear(16, 12),
        lambda m, x: F.linear(x.double(), m.weight.double(), m.bias.double()),
    ),
    "two types": (nn.Linear(16, 12), lambda m, x: F.linear(x, m.weight.float().double(), m.bias)),
    "its own type": (nn.Linear(16, 12), lambda m, x: F.linear(x, m.weight.to(x.dtype), m.bias.to(x.dtype))),
    "as a matrix": (nn.Conv2d(16, 12, 1), lambda m, x: F.linear(x, m.weight.view(12, 16), m.bias)),
    "as a kernel": (
        nn.Linear(16, 12),
        lambda m, x: F.conv2d(x[..., None, None], m.weight[..., None, None], m.bias),
    ),
    "some columns": (nn.Linear(20, 12), lambda m, x: F.linear(x, m.weight[:, 2:18], m.bias)),
    "a part": (nn.Linear(20, 24), lambda m, x: F.linear(x, m.weight[:12, :16], m.bias[:12])),
}


@pytest.mark.parametrize("way", WAYS)
def test_units_of_weights_go_however_they_are_read(way):
    layer, read = WAYS[way]
    assert sorted(exact(Reads(copy.deepcopy(layer), read), x(5, 6))) == [12, 16]


def test_a_compacted_network_reads_in_the_type_that_the_network_reads_in():
    example = x(5, 6).float()
    network = Reads(nn.Linear(16, 12), lambda m, x: F.linear(x.double(), m.weight.double()).float()).float()
    gated = sparsereg.gate(network, example)
    smaller = sparsereg.compact(gated, example)
    assert {p.dtype for p in smaller.parameters()} == {torch.float32}
    assert torch.ops.aten.to.dtype in {node.target for node in smaller.graph.nodes}
