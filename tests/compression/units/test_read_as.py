"""Weights that are read in another type, plus a number, in another shape or in part, as they are kept in."""

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


class Weight(nn.Module):
    """A weight of any shape, and a bias for twelve units."""

    def __init__(self, *shape):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(shape) / 4), nn.Parameter(torch.randn(12))


def thirds(weights, x):
    """Three linear layers, side by side."""
    return torch.cat([F.linear(x, weights[i]) for i in range(3)], -1)


def split(x, parts):
    """Units as a grid of so many rows."""
    return x.unflatten(1, (parts, -1))


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
    "a product": (nn.Conv2d(16, 12, 1), lambda m, x: x @ m.weight.flatten(1).T + m.bias),
    "a product from the left": (nn.Conv2d(16, 12, 1), lambda m, x: (m.weight.flatten(1) @ x.T).T + m.bias),
    "two axes as one": (Weight(3, 4, 16), lambda m, x: F.linear(x, m.weight.flatten(0, 1), m.bias)),
    "axes apart as one": (Weight(3, 16, 4), lambda m, x: x @ m.weight.transpose(0, 1).flatten(1) + m.bias),
    "three parts": (Weight(12, 16), lambda m, x: thirds(m.weight.view(3, 4, 16), x) + m.bias),
    "parts one by one": (Weight(12, 16), lambda m, x: thirds(m.weight.unflatten(0, (3, 4)).unbind(), x)),
    "over two axes": (Weight(12, 2, 8), lambda m, x: torch.einsum("bik,oik->bo", split(x, 2), m.weight)),
    "over axes by number": (
        Weight(2, 8, 12),
        lambda m, x: torch.tensordot(split(x, 2), m.weight, ([1, 2], [0, 1])) + m.bias,
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_units_of_weights_go_however_they_are_read(way):
    layer, read = WAYS[way]
    assert sorted(exact(Reads(copy.deepcopy(layer), read), x(5, 6))) in ([12, 16], [2, 8, 12])


class Heads(nn.Module):
    """Attention whose weights have an axis for heads and one for the places in their vectors."""

    def __init__(self):
        super().__init__()
        self.enter, self.out = nn.Linear(6, 16), nn.Linear(16, 3)
        self.qkv = nn.ParameterList(torch.randn(16, 3, 4) / 4 for _ in range(3))
        self.leave = nn.Parameter(torch.randn(3, 4, 16) / 4)

    def forward(self, x):
        x = self.enter(x)
        q, k, v = (torch.einsum("bnc,chd->bhnd", x, weight) for weight in self.qkv)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.out((x + torch.einsum("bhnd,hdc->bnc", y, self.leave)).relu())


def test_heads_go_whose_weights_have_an_axis_for_them():
    assert exact(Heads(), x(2, 5, 6)) == [1, 3, 4, 4, 16]


def test_a_compacted_network_reads_in_the_type_that_the_network_reads_in():
    example = x(5, 6).float()
    network = Reads(nn.Linear(16, 12), lambda m, x: F.linear(x.double(), m.weight.double()).float()).float()
    gated = sparsereg.gate(network, example)
    smaller = sparsereg.compact(gated, example)
    assert {p.dtype for p in smaller.parameters()} == {torch.float32}
    assert torch.ops.aten.to.dtype in {node.target for node in smaller.graph.nodes}


class OnePlus(nn.LayerNorm):
    """A layer norm whose weight is kept as the difference from one; or its mean of squares written out."""

    def __init__(self, size, written_out=False):
        super().__init__(size)
        self.written_out = written_out

    def forward(self, x):
        if self.written_out:
            return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * (1 + self.weight)
        return F.layer_norm(x, self.normalized_shape, self.weight + 1, self.bias)


class Residual(nn.Module):
    """A residual stream of 12, with norms before its layer and behind the sum."""

    def __init__(self, norm):
        super().__init__()
        self.enter, self.first, self.last = nn.Linear(6, 12), norm(), norm()
        self.layer, self.out = nn.Linear(12, 12), nn.Linear(12, 3)

    def forward(self, x):
        x = self.enter(x)
        return self.out(self.last(x + self.layer(self.first(x)).relu()))


@pytest.mark.parametrize("norm", [lambda: OnePlus(12), lambda: OnePlus(12, written_out=True)])
def test_width_goes_past_norms_that_keep_their_weight_as_a_difference(norm):
    network = Residual(norm)
    assert sorted(exact(network, x(5, 6))) == [1, 12]


def test_open_gates_leave_weights_as_they_are_to_which_a_number_is_added():
    network = Residual(lambda: OnePlus(12)).bfloat16()
    for norm in (network.first, network.last):
        nn.init.normal_(norm.weight, std=1e-3)  # lost in bfloat16 where 1 is added to it
    gated = sparsereg.gate(network, x(5, 6).bfloat16(), droprate_init=1e-9)
    assert torch.equal(gated.first.weight, network.first.weight)
    gated.train()
    assert torch.equal(gated.first.weight, network.first.weight)


COMPUTED = {
    "type": (nn.Linear(16, 12), lambda m, x: F.linear(x.double(), m.weight.double() * m.weight.double())),
    "number": (nn.Linear(16, 12), lambda m, x: F.linear(x, (m.weight + 1) * (m.weight + 1), m.bias)),
}


@pytest.mark.parametrize("way", COMPUTED)
def test_weights_are_computed_from_others_as_these_are_read(way):
    layer, read = COMPUTED[way]
    exact(Reads(copy.deepcopy(layer), read), x(5, 6))
