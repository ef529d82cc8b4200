"""Query heads that share keys and values: each goes alone, or with its group."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sparsereg
from sparsereg.compression.count import Accountant
from sparsereg.compression.macs import counting
from sparsereg.penalties import hard_concretes


class Grouped(nn.Module):
    """Attention of eight heads of four numbers that share keys and values, in a residual stream."""

    def __init__(self, way, groups=2, heads=8, size=4, width=12):
        super().__init__()
        self.way, self.groups, self.heads, self.size = way, groups, heads, size
        self.into, self.norm = nn.Linear(5, width), nn.LayerNorm(width)
        self.q = nn.Linear(width, heads * size)
        self.k, self.v = (nn.Linear(width, groups * size) for _ in range(2))
        self.o, self.out = nn.Linear(heads * size, width), nn.Linear(width, 3)

    def forward(self, x):
        x = self.into(x)
        y = self.norm(x)
        q, k, v = (
            part(y).unflatten(-1, (-1, self.size)).transpose(1, 2) for part in (self.q, self.k, self.v)
        )
        made = getattr(self, self.way)(q, k, v)
        return self.out(x + self.o(made.transpose(1, 2).flatten(2))).mean(1)

    def gqa(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    def repeated(self, q, k, v):
        k, v = (part.repeat_interleave(self.heads // self.groups, 1) for part in (k, v))
        return F.scaled_dot_product_attention(q, k, v)

    def by_hand(self, q, k, v):
        times = self.heads // self.groups
        k, v = (part[:, :, None].expand(-1, -1, times, -1, -1).flatten(1, 2) for part in (k, v))
        scores = q @ k.transpose(-1, -2) / self.size**0.5
        mask = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).tril()
        return scores.masked_fill(~mask, -1e9).softmax(-1) @ v


def network(way, groups=2):
    torch.manual_seed(0)
    return Grouped(way, groups).double().eval()


X = torch.randn(3, 6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
WAYS = ["gqa", "repeated", "by_hand"]


def by_size(network):
    return {gate.log_alpha.numel(): gate.log_alpha.data for gate in hard_concretes(network).values()}


@pytest.mark.costly
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("way", WAYS)
@torch.no_grad()
def test_any_heads_of_any_groups_go_exactly(way, groups):
    plain = network(way, groups)
    gated = sparsereg.gate(plain, X).double()
    for seed in range(3):
        torch.manual_seed(seed)
        for gate in hard_concretes(gated).values():
            places = gate.log_alpha.numel()
            gate.log_alpha.data.uniform_(-0.5, 3.0)
            gate.log_alpha.data[torch.randperm(places)[: places // 2]] = -10
        small, sizes = sparsereg.compact(gated, X), sparsereg.count(gated, X)
        longer = torch.randn(2, 9, 5, dtype=torch.float64)
        for x in (X, longer):
            before, after = gated(x), small(x)
            assert (before - after).abs().max() < 1e-12 * before.abs().max()
        with counting() as counter:
            small(X)
        assert sum(p.numel() for p in small.parameters()) == sizes.compacted_parameters
        assert counter.get_total_flops() / 2 / len(X) == sizes.compacted_macs


@pytest.mark.parametrize("way", WAYS)
@torch.no_grad()
def test_one_head_leaves_its_group_to_the_others(way):
    """Weights of the head alone go: its queries, and what reads it."""
    gated = sparsereg.gate(network(way), X, families="heads")
    ((_, heads),) = by_size(gated).items()
    assert len(heads) == 8
    heads.fill_(8.0)
    heads[2] = -10
    small = dict(sparsereg.compact(gated, X).named_parameters())
    shapes = {name: tuple(small[f"{name}.weight"].shape) for name in "qkvo"}
    assert shapes == {"q": (28, 12), "k": (8, 12), "v": (8, 12), "o": (12, 28)}
    heads[:4] = -10
    small = dict(sparsereg.compact(gated, X).named_parameters())
    assert small["q.weight"].shape == (16, 12)


@pytest.mark.parametrize("way", WAYS)
@torch.no_grad()
def test_a_group_takes_its_heads_along(way):
    gated = sparsereg.gate(network(way), X, families=["heads", "kv_groups"])
    sizes = by_size(gated)
    assert set(sizes) == {2, 8}
    sizes[8].fill_(8.0)
    sizes[2].copy_(torch.tensor([8.0, -10.0]))
    small = dict(sparsereg.compact(gated, X).named_parameters())
    shapes = {name: tuple(small[f"{name}.weight"].shape) for name in "qkvo"}
    assert shapes == {"q": (16, 12), "k": (4, 12), "v": (4, 12), "o": (12, 16)}


@torch.no_grad()
def test_a_head_stays_with_the_probability_of_its_group_times_its_own():
    """Weights of the queries, by hand: rows of a head stay with P(group) P(head)."""
    plain = network("gqa")
    gated = sparsereg.gate(plain, X, families=["heads", "kv_groups"])
    sizes = by_size(gated)
    sizes[8].copy_(torch.linspace(-1, 1, 8))
    sizes[2].copy_(torch.tensor([0.5, -0.7]))
    gates = {g.log_alpha.numel(): g for g in hard_concretes(gated).values()}
    head, group = (gates[n].p_active().double() for n in (8, 2))
    rows = 4 * (head * group.repeat_interleave(4)).sum()
    ends = sum(
        p.numel()
        for n, p in plain.named_parameters()
        if n[0] not in "qkvo" or n in ("o.bias", "out.weight", "out.bias")
    )
    kept = rows * (12 + 1) + 12 * rows + 2 * 4 * group.sum() * (12 + 1) + ends
    accountant = Accountant(gated, X)
    assert abs(float(accountant.expected_parameters()) - float(kept)) < 1e-6 * float(kept)


@pytest.mark.parametrize("way", WAYS)
def test_training_moves_every_gate(way):
    gated = sparsereg.gate(network(way), X).train()
    for _ in range(8):  # a draw of 0 or 1 has no slope
        gated(X).square().sum().backward()
    for gate in hard_concretes(gated).values():
        assert gate.log_alpha.grad is not None
        assert gate.log_alpha.grad.isfinite().all()
        assert gate.log_alpha.grad.abs().max() > 0
