"""Queries, keys and values that one layer makes, of one head or of several, at any axis."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sparsereg
from sparsereg.compression.count import Accountant
from sparsereg.compression.macs import counting
from sparsereg.penalties import hard_concretes


def fused(q, k, v):
    return F.scaled_dot_product_attention(q, k, v)


def by_hand(q, k, v):
    return (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1) @ v


def unbound(z, attend, heads):
    q, k, v = z.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    return attend(q, k, v).transpose(1, 2).flatten(2)


def values_first(z, attend, heads):
    z = z.unflatten(-1, (3, heads, -1)).transpose(1, 3)
    return attend(z[:, :, 2], z[:, :, -2], z[:, :, 0]).transpose(1, 2).flatten(2)


def squeezed(z, attend, heads):
    parts = (part.squeeze(0) for part in z.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4).chunk(3))
    return attend(*parts).transpose(1, 2).flatten(2)


def viewed_again(z, attend, heads):
    q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in z.unflatten(-1, (3, -1)).unbind(2))
    return attend(q, k, v).transpose(1, 2).flatten(2)


def in_chunks(z, attend, heads):
    q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in z.chunk(3, -1))
    return attend(q, k, v).transpose(1, 2).flatten(2)


def heads_before_blocks(z, attend, heads):
    """As timm's NesT: (batch, heads, blocks, tokens, size)."""
    z = z.unflatten(1, (-1, 3)).unflatten(-1, (3, heads, -1))
    return attend(*z.permute(3, 0, 4, 1, 2, 5).unbind(0)).permute(0, 2, 3, 4, 1).flatten(3).flatten(1, 2)


def one_block(z, attend, heads):
    z = z.unflatten(1, (1, -1)).unflatten(-1, (3, heads, -1))
    return attend(*z.permute(3, 0, 4, 1, 2, 5).unbind(0)).permute(0, 2, 3, 4, 1).flatten(3).flatten(1, 2)


def by_sums(z, attend, heads):
    """Additive attention of one head: no product of queries and keys."""
    q, k, v = z.unflatten(-1, (3, -1)).unbind(2)
    return (q[:, :, None] + k[:, None]).tanh().sum(-1).softmax(-1) @ v


WAYS = [
    unbound, values_first, squeezed, viewed_again, in_chunks, heads_before_blocks, one_block, by_sums
]  # fmt: skip


class Network(nn.Module):
    """Attention in a residual stream; queries, keys and values come from one layer."""

    def __init__(self, way, attend, heads):
        super().__init__()
        self.way, self.attend, self.heads = way, attend, heads
        self.into, self.qkv, self.o, self.out = (
            nn.Linear(5, 8), nn.Linear(8, 24), nn.Linear(8, 8), nn.Linear(8, 3)
        )  # fmt: skip

    def forward(self, x):
        x = self.into(x)
        return self.out(x + self.o(self.way(self.qkv(x), self.attend, self.heads))).mean(1)


X = torch.randn(3, 6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def network(way, attend=fused, heads=1):
    torch.manual_seed(0)
    return Network(way, attend, heads).double().eval()


def shut(network, gate, places):
    for other in hard_concretes(network).values():
        other.log_alpha.data.fill_(9.0)
    gate.log_alpha.data.reshape(-1)[places] = -9.0


def holds(network):
    """The smaller network gives the same, and costs what the count says."""
    expected = network(X)
    small = sparsereg.compact(network, (X,), check=False)
    assert (small(X) - expected).abs().max() < 1e-12
    count = Accountant(network, (X,)).count()
    assert sum(p.numel() for p in small.parameters()) == count.compacted_parameters
    with counting() as counter:
        small(X[:1])
    assert counter.get_total_flops() / 2 == count.compacted_macs


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("attend", [fused, by_hand])
@pytest.mark.parametrize("way", WAYS)
def test_what_one_layer_makes_goes_gate_by_gate(way, attend, heads):
    gated = sparsereg.gate(network(way, attend, heads), (X,)).eval()
    for gate in hard_concretes(gated).values():
        size = gate.log_alpha.numel()
        for places in ([0], [size - 1], range(size), range(1, size), range(size - 1)):
            shut(gated, gate, list(places))
            holds(gated)


@pytest.mark.parametrize("way", [unbound, viewed_again, one_block])
def test_queries_and_keys_go_place_by_place_and_not_without_the_values(way):
    gated = sparsereg.gate(network(way, by_hand), (X,), families=["units"], layers="qkv")
    sizes = sorted(gate.log_alpha.numel() for gate in hard_concretes(gated).values())
    assert sizes == [1, 8]  # the values, and the places of all three


def test_of_queries_and_keys_alone_one_place_stays():
    gated = sparsereg.gate(network(in_chunks), (X,), families=["units"], layers="qkv").eval()
    (gate,) = hard_concretes(gated).values()
    shut(gated, gate, list(range(16)))
    left = sparsereg.compact(gated, (X,)).qkv.out_features
    assert left in (3, 9, 10)


@pytest.mark.parametrize("way", [heads_before_blocks, one_block])
def test_heads_go_wherever_their_axis_is(way):
    gated = sparsereg.gate(network(way, fused, 4), (X,), families=["heads"]).eval()
    (gate,) = hard_concretes(gated).values()
    assert gate.log_alpha.numel() == 4
    shut(gated, gate, [1, 2])
    holds(gated)
    assert sparsereg.compact(gated, (X,)).qkv.out_features == 12


def linear_attention(z, attend, heads):
    q, k, v = z.unflatten(-1, (3, -1)).unbind(2)
    return q.softmax(-1) @ (k.softmax(1).transpose(1, 2) @ v)


def of_shares(z, attend, heads):
    q, k, v = z.chunk(3, -1)
    return q @ (k.softmax(1).transpose(1, 2) @ v)


@pytest.mark.parametrize("way", [linear_attention, of_shares])
def test_shares_that_are_not_zero_when_units_are_gone_keep_them(way):
    """softmax over the tokens gives 1 / tokens for keys that are gone."""
    gated = sparsereg.gate(network(way), (X,)).eval()
    for gate in hard_concretes(gated).values():
        shut(gated, gate, [0])
        holds(gated)


def test_a_part_of_one_place_that_is_gone_is_zero():
    def apart(z, attend, heads):
        first, _, last = z[..., :3].unflatten(-1, (3, 1)).unbind(2)
        return (first.abs() + last.tanh()).expand(-1, -1, 8)

    gated = sparsereg.gate(network(apart), (X,), layers="qkv").eval()
    (gate,) = hard_concretes(gated).values()
    for place in range(gate.log_alpha.numel()):
        shut(gated, gate, [place])
        small = sparsereg.compact(gated, (X,), check=False)
        assert (small(X) - gated(X)).abs().max() < 1e-12
