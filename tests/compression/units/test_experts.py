"""Experts whose weights lie in one tensor: units of all of them go together, whatever the router picks."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from sparsereg.compression import compact, count, gate
from sparsereg.penalties import hard_concretes

TOKENS = torch.randn(6, 7, generator=torch.Generator().manual_seed(0))


class Mixture(nn.Module):
    """A layer of gated experts between two others; the two best of a router answer."""

    def __init__(self, way, width=12, units=20, experts=4, best=2):
        super().__init__()
        self.way, self.best = way, best
        self.into, self.norm, self.out = nn.Linear(7, width), nn.LayerNorm(width), nn.Linear(width, 3)
        self.router = nn.Linear(width, experts)
        self.w1 = nn.Parameter(torch.randn(experts, width, 2 * units) / 4)
        self.b1 = nn.Parameter(torch.randn(experts, 2 * units))
        self.w2 = nn.Parameter(torch.randn(experts, units, width) / 4)

    def forward(self, x):
        x = self.into(x).relu()
        y = self.norm(x)
        logits = self.router(y)
        top, index = logits.topk(self.best, -1)
        return self.out(x + getattr(self, self.way)(y, logits, top.softmax(-1), index))

    def shares(self, logits, top, index):
        return torch.zeros_like(logits).scatter(-1, index, top)

    def einsum(self, y, logits, top, index):
        a, b = (torch.einsum("td,edh->teh", y, self.w1) + self.b1).chunk(2, -1)
        made = torch.einsum("teh,ehd->ted", F.silu(a) * b, self.w2)
        return (made * self.shares(logits, top, index).unsqueeze(-1)).sum(1)

    def bmm(self, y, logits, top, index):
        copies = y.unsqueeze(0).expand(len(self.w1), -1, -1)
        a, b = (torch.bmm(copies, self.w1) + self.b1[:, None]).chunk(2, -1)
        return (torch.bmm(F.silu(a) * b, self.w2) * self.shares(logits, top, index).T.unsqueeze(-1)).sum(0)

    def one_by_one(self, y, logits, top, index):
        shares = self.shares(logits, top, index)
        made = torch.zeros_like(y)
        for e in range(len(self.w1)):
            a, b = F.linear(y, self.w1[e].T, self.b1[e]).chunk(2, -1)
            made = made + (F.silu(a) * b) @ self.w2[e] * shares[:, e : e + 1]
        return made


@torch.no_grad()
def half_shut_(network):
    for i, gates in enumerate(hard_concretes(network).values()):
        draws = torch.rand(gates.log_alpha.shape, generator=torch.Generator().manual_seed(i))
        gates.log_alpha.copy_(torch.where(draws > 0.5, 3 * draws, -10.0))


@pytest.mark.parametrize("way", ["einsum", "bmm", "one_by_one"])
def test_experts_in_one_tensor_lose_units_and_width(way):
    torch.manual_seed(0)
    gated = gate(Mixture(way).eval(), TOKENS, families=["units", "width"], jitter=0.0)
    half_shut_(gated)
    counted, small = count(gated, TOKENS), compact(gated, TOKENS)
    torch.testing.assert_close(small(TOKENS), gated(TOKENS), rtol=1e-4, atol=1e-5)
    left = {n: tuple(p.shape) for n, p in small.named_parameters()}
    assert left["w1"][0] == 4
    assert left["w2"][1] * 2 == left["w1"][2] == left["b1"][1] < 40
    assert left["w1"][1] == left["w2"][2] < 12
    assert counted.compacted_parameters == sum(p.numel() for p in small.parameters())
    with FlopCounterMode(display=False) as counter:
        small(TOKENS)
    assert counted.compacted_macs == counter.get_total_flops() / 2 / len(TOKENS)
    others = torch.randn(9, 7)  # for which the router picks others
    torch.testing.assert_close(small(others), gated(others), rtol=1e-4, atol=1e-5)


def tiny(implementation):
    transformers = pytest.importorskip("transformers")
    config = transformers.MixtralConfig(
        vocab_size=40, hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, use_cache=False, num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    torch.manual_seed(0)
    network = transformers.MixtralForCausalLM(config).eval()
    network.config._experts_implementation = implementation
    for name, parameter in network.named_parameters():
        if "experts" in name or name.endswith("gate.weight"):
            nn.init.normal_(parameter, std=0.3)
    return network


def test_experts_of_transformers():
    network = tiny("batched_mm")
    example = {"input_ids": torch.randint(0, 40, (2, 6), generator=torch.Generator().manual_seed(0))}
    gated = gate(network, example, jitter=0.0)
    half_shut_(gated)
    small = compact(gated, example)
    shapes = {tuple(p.shape) for n, p in small.named_parameters() if "down_proj" in n}
    assert all(experts == 4 and width < 32 and units < 24 for experts, width, units in shapes)
    assert count(gated, example).compacted_parameters == sum(p.numel() for p in small.parameters())


def test_experts_that_the_data_dispatch_are_named_with_what_to_do():
    example = {"input_ids": torch.randint(0, 40, (2, 6))}
    with pytest.raises(
        ValueError, match=r"modeling_mixtral.py:\d+ .*depends on the data.*batched_mm"
    ) as refused:
        gate(tiny("eager"), example)
    assert "\n" not in str(refused.value)
