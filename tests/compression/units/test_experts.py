"""Experts whose weights lie in one tensor: units of all of them go together, and experts one by one."""

import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from sparsereg.compression import (
    Accountant,
    compact,
    count,
    explain,
    export,
    gate,
    load_compacted,
    restore_class,
    save_compacted,
)
from sparsereg.compression.oneshot.pruning import shrink
from sparsereg.errors import InputError
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


@pytest.mark.costly
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


class Picked(nn.Module):
    """A mixture by hand whose experts are picked from tables; ``way`` says how it is written."""

    def __init__(self, way, width=6, units=10, experts=8, best=2):
        super().__init__()
        self.way, self.width, self.units, self.best = way, width, units, best
        self.into, self.router, self.out = nn.Linear(7, width), nn.Linear(width, experts), nn.Linear(width, 3)
        sizes = {"w1": (2 * units, width), "b1": (2 * units,), "w2": (width, units), "b2": (width,), "s": ()}
        for name, size in sizes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(experts, *size) / 2))
        self.e1, self.e2 = nn.Embedding(experts, 2 * units * width), nn.Embedding(experts, width * units)
        self.norm = nn.LayerNorm(width)

    def forward(self, x):
        x = self.into(x)
        return self.out(x + getattr(self, self.way)(x, self.router(x)))

    def act(self, made):
        one, two = made.chunk(2, -1)
        return F.silu(one) * two

    def inside(self, x, index):
        return self.act(torch.einsum("tkoi,ti->tko", self.w1[index], x) + self.b1[index])

    def pairs(self, x, logits):
        return logits.topk(self.best, -1)[1].flatten(), x.repeat_interleave(self.best, 0)

    def summed(self, made, logits):
        shares = logits.topk(self.best, -1)[0].softmax(-1)
        return (made * shares.reshape(-1, 1)).view(-1, self.best, self.width).sum(1)

    def index(self, x, logits):
        shares, index = logits.topk(self.best, -1)
        made = torch.einsum("tkoi,tki->tko", self.w2[index], self.inside(x, index)) + self.b2[index]
        return (made * shares.softmax(-1).unsqueeze(-1)).sum(1)

    def index_select(self, x, logits):
        index, x = self.pairs(x, logits)
        w1, b1, w2 = (w.index_select(0, index) for w in (self.w1, self.b1, self.w2))
        made = self.act(torch.bmm(w1, x.unsqueeze(-1)).squeeze(-1) + b1)
        made = torch.bmm(w2, made.unsqueeze(-1)).squeeze(-1) + F.embedding(index, self.b2)
        return self.summed(made, logits)

    def embedding(self, x, logits):
        shares, index = logits.topk(self.best, -1)
        w1 = self.e1(index).view(*index.shape, 2 * self.units, self.width)
        w2 = self.e2(index).view(*index.shape, self.width, self.units)
        made = w2 @ self.act((w1 @ x[:, None, :, None]).squeeze(-1)).unsqueeze(-1)
        return torch.einsum("tk,tko->to", shares.softmax(-1), made.squeeze(-1))

    def gather(self, x, logits):
        index, x = self.pairs(x, logits)
        w1, w2 = (w.gather(0, index.view(-1, 1, 1).expand(-1, *w.shape[1:])) for w in (self.w1, self.w2))
        b1, b2 = (b.gather(0, index[:, None].expand(-1, b.shape[1])) for b in (self.b1, self.b2))
        made = self.act(torch.bmm(w1, x.unsqueeze(-1)).squeeze(-1) + b1)
        return self.summed(torch.bmm(w2, made.unsqueeze(-1)).squeeze(-1) + b2, logits)

    def one_after_the_other(self, x, logits):
        shares, index = logits.softmax(-1).topk(self.best, -1)
        total = 0
        for k in range(self.best):
            i = index[:, k]
            made = self.act(torch.einsum("toi,ti->to", self.w1[i], x) + self.b1[i])
            made = (self.w2[i] @ made.unsqueeze(-1)).squeeze(-1) + self.b2[i]
            total = total + shares[:, k : k + 1] * made
        return total

    def best_one(self, x, logits):
        share, i = logits.softmax(-1).max(-1)
        made = self.act(torch.einsum("toi,ti->to", self.w1[i], x) + self.b1[i])
        return share.unsqueeze(-1) * ((self.w2[i] @ made.unsqueeze(-1)).squeeze(-1) + self.b2[i])

    def two_rankings(self, x, logits):
        one, first = logits.softmax(-1).max(-1, keepdim=True)
        two, second = logits.scatter(-1, first, -100.0).softmax(-1).max(-1, keepdim=True)
        shares, index = torch.cat([one, two], -1), torch.cat([first, second], -1)
        made = torch.einsum("tkoi,tki->tko", self.w2[index], self.inside(x, index)) + self.b2[index]
        return torch.einsum("tk,tko->to", shares, made)

    def corrected(self, x, logits):
        scores = logits.sigmoid()
        index = (scores + torch.linspace(0.5, 0, 8).to(scores)).topk(self.best, -1)[1]
        shares = scores.gather(-1, index)
        made = torch.einsum("tkoi,tki->tko", self.w2[index], self.inside(x, index)) + self.b2[index]
        return (made * (shares / shares.sum(-1, keepdim=True)).unsqueeze(-1)).sum(1)

    def scaled(self, x, logits):
        shares, index = logits.topk(self.best, -1)
        made = torch.einsum("tkoi,tki->tko", self.w2[index], self.inside(x, index)) + self.b2[index]
        return torch.einsum("tk,tko->to", shares.softmax(-1) * self.s[index], made)

    def weighed_before(self, x, logits):
        shares, index = logits.topk(self.best, -1)
        made = torch.einsum("tkoi,tki->tko", self.w1[index], x[:, None] * shares.sigmoid().unsqueeze(-1))
        return torch.einsum("tkoi,tki->tko", self.w2[index], self.act(made)).sum(1)

    # --- what stays ---------------------------------------------------------------------------------------

    def rest_inside(self, x, logits):
        shares, index = logits.topk(self.best, -1)
        made = torch.einsum("tkoi,tki->tko", self.w2[index], self.inside(x, index)) + x[:, None]
        return (made * shares.softmax(-1).unsqueeze(-1)).sum(1)

    def cast_to_them(self, x, logits):
        shares, index = logits.topk(self.best, -1)
        made = torch.einsum("tkoi,tki->tko", self.w2[index], self.inside(x, index))
        return (x[:, None].expand_as(made).type_as(made) * shares.softmax(-1).unsqueeze(-1) + made).sum(1)

    def summed_first(self, x, logits):
        shares, index = logits.topk(self.best, -1)
        made = torch.einsum("tkoi,tki->tko", self.w2[index], self.inside(x, index)).sum(1)
        return made * shares.sum(-1, keepdim=True)

    def read_elsewhere(self, x, logits):
        return self.index(x, logits) + x @ self.w2.sum(-1).mean(0).diag()

    def counted_on(self, x, logits):
        shares, index = logits.topk(self.best, -1)
        index = index - 1
        made = torch.einsum("tkoi,tki->tko", self.w2[index], self.inside(x, index)) + self.b2[index]
        return (made * shares.softmax(-1).unsqueeze(-1)).sum(1)

    def other_places(self, x, logits):
        shares, index = logits.topk(self.best, -1)
        made = self.inside(x, index).flip(1)
        made = torch.einsum("tkoi,tki->tko", self.w2[index], made) + self.b2[index]
        return (made * shares.softmax(-1).unsqueeze(-1)).sum(1)

    def read_inside(self, x, logits):
        shares, index = logits.topk(self.best, -1)
        made = self.inside(x, index)
        out = torch.einsum("tkoi,tki->tko", self.w2[index], made) + self.b2[index]
        return (out * shares.softmax(-1).unsqueeze(-1)).sum(1) + made[..., : self.width].mean(1)

    def normed(self, x, logits):
        shares, index = logits.topk(self.best, -1)
        made = self.norm(torch.einsum("tkoi,tki->tko", self.w2[index], self.inside(x, index)))
        return (made * shares.softmax(-1).unsqueeze(-1)).sum(1)

    def looked_up(self, x, logits):
        shares, index = logits.topk(self.best, -1)
        return (self.b2[index] * shares.softmax(-1).unsqueeze(-1)).sum(1)


def picked(way):
    torch.manual_seed(1)
    network = Picked(way).double().eval()
    for table in (network.e1, network.e2):
        nn.init.normal_(table.weight, std=0.5)
    return network


WIDE = TOKENS.double()
GONE = torch.tensor([0.4, -10, 10, -10, 0.1, -10, 10, -10])
TABLES = ("w1", "b1", "w2", "b2", "s", "e1.weight", "e2.weight")
WAYS = """
    index index_select embedding gather one_after_the_other best_one two_rankings corrected scaled
    weighed_before
""".split()  # noqa: SIM905


@pytest.mark.costly
@pytest.mark.parametrize("way", WAYS)
def test_experts_that_a_router_picks_go(way):
    network = picked(way)
    gated = gate(network, WIDE, families=["experts"], jitter=0.0)
    (gates,) = hard_concretes(gated).values()
    with torch.no_grad():
        gates.log_alpha.copy_(GONE)
    counted, small = count(gated, WIDE), compact(gated, WIDE)
    others = torch.randn(50, 7, dtype=torch.float64)  # for which the router picks others
    assert float((gated(others) - network(others)).detach().abs().max()) > 0.1
    torch.testing.assert_close(small(others), gated(others), rtol=1e-12, atol=1e-12)
    left = {n: len(p) for n, p in small.named_parameters() if n.replace("_", ".", 1) in TABLES or n in TABLES}
    assert len(left) >= 2
    assert set(left.values()) == {4}
    assert counted.compacted_parameters == sum(p.numel() for p in small.parameters())
    with FlopCounterMode(display=False) as counter:
        small(WIDE)
    assert counted.compacted_macs == counter.get_total_flops() / 2 / len(WIDE)


def test_the_width_goes_where_a_router_ranks_other_scores_than_it_weighs_by():
    plain, corrected = (explain(picked(way), WIDE) for way in ("index", "corrected"))
    assert corrected.share == plain.share
    assert {row.family for row in corrected.rows} == {row.family for row in plain.rows}


def test_expected_experts_are_those_of_all_draws():
    gated = gate(picked("index"), WIDE, families=["experts"])
    (gates,) = hard_concretes(gated).values()
    with torch.no_grad():
        gates.log_alpha.copy_(GONE)
    accountant = Accountant(gated, WIDE)
    per_expert = sum(
        w[0].numel() for w in (p for n, p in gated.named_parameters() if n in ("w1", "b1", "w2", "b2"))
    )
    whole = count(gated, WIDE).parameters
    expected = whole - per_expert * float((1 - gates.p_active().detach().double()).sum())
    assert float(accountant.expected_parameters().detach()) == pytest.approx(expected, rel=1e-6)
    assert count(gated, WIDE).compacted_parameters == whole - 4 * per_expert


@pytest.mark.costly
@pytest.mark.parametrize("way", ["index", "scaled", "one_after_the_other"])
def test_experts_go_with_all_else(way):
    gated = gate(picked(way), WIDE, jitter=0.0)
    half_shut_(gated)
    for name, gates in hard_concretes(gated).items():
        if "blocks" in name:
            gates.log_alpha.data.fill_(10.0)
    counted, small = count(gated, WIDE), compact(gated, WIDE)
    others = torch.randn(50, 7, dtype=torch.float64)
    torch.testing.assert_close(small(others), gated(others), rtol=1e-10, atol=1e-12)
    assert counted.compacted_parameters == sum(p.numel() for p in small.parameters()) > 60


@pytest.mark.parametrize("way", ["index", "two_rankings"])
def test_experts_go_where_terms_of_what_they_make_go(way):
    gated = gate(picked(way), WIDE, families=["experts", "blocks"], jitter=0.0)
    found = hard_concretes(gated)
    blocks = [name for name in found if "blocks" in name]
    assert len(blocks) > 1
    for shut in blocks:
        with torch.no_grad():
            for name, gates in found.items():
                gates.log_alpha.copy_(
                    GONE if "experts" in name else torch.tensor(-10.0 if name == shut else 10.0)
                )
        small = compact(gated, WIDE)
        others = torch.randn(50, 7, dtype=torch.float64)
        torch.testing.assert_close(small(others), gated(others), rtol=1e-12, atol=1e-12)
        assert count(gated, WIDE).compacted_parameters == sum(p.numel() for p in small.parameters())


def test_of_experts_one_stays():
    gated = gate(picked("index"), WIDE, families=["experts"])
    (gates,) = hard_concretes(gated).values()
    with torch.no_grad():
        gates.log_alpha.fill_(-10.0)
    small = compact(gated, WIDE)
    assert len(small.w1) == 1
    torch.testing.assert_close(small(WIDE), gated(WIDE), rtol=0, atol=1e-12)


STAYING = {
    "rest_inside": "would not be zero",
    "cast_to_them": "before what picks it weighs it|would not be zero",
    "summed_first": "meets sum before what picks it weighs it",
    "read_elsewhere": "read otherwise than by what a router picks",
    "counted_on": "read otherwise than by what a router picks",
    "other_places": "meets flip before",
    "read_inside": "before what picks it weighs it|would not be zero",
    "normed": "meets layer_norm before",
}


@pytest.mark.costly
@pytest.mark.parametrize("way", STAYING)
def test_experts_stay_that_would_not_be_zero_and_say_why(way):
    table = explain(picked(way), WIDE).to_frame()
    rows = table[(table.parameter == "w2") & (table.axis == 0) & (table.family == "experts")]
    assert list(rows.state) == ["kept"]
    assert re.search(STAYING[way], rows.reason.item())


def test_numbers_that_are_looked_up_are_no_experts():
    assert "experts" not in set(explain(picked("looked_up"), WIDE).to_frame().family)
    tokens = nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 2))
    assert "experts" not in set(explain(tokens, torch.randint(9, (3, 4))).to_frame().family)


def test_smaller_experts_train_on_and_are_saved(tmp_path):
    gated = gate(picked("index"), WIDE, jitter=0.0)
    half_shut_(gated)
    small = compact(gated, WIDE)
    save_compacted(small, tmp_path / "compacted.pt")
    loaded = load_compacted(tmp_path / "compacted.pt")
    torch.testing.assert_close(loaded(WIDE), small(WIDE), rtol=0, atol=0)
    optimizer = torch.optim.SGD(loaded.parameters(), 0.01)
    losses = []
    for _ in range(20):
        loss = loaded.train()(WIDE).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.costly
@pytest.mark.parametrize("suffix", ["pt2", "onnx"])
def test_smaller_experts_are_exported(suffix, tmp_path):
    if suffix == "onnx":
        pytest.importorskip("onnxscript")
        runtime = pytest.importorskip("onnxruntime")
    gated = gate(picked("index").float(), TOKENS, families=["experts"], jitter=0.0)
    half_shut_(gated)
    path = export(gated, TOKENS, tmp_path / f"small.{suffix}")
    if suffix == "pt2":
        found = torch.export.load(path).module()(TOKENS)
    else:
        session = runtime.InferenceSession(path)
        (found,) = session.run(None, {session.get_inputs()[0].name: TOKENS.numpy()})
    torch.testing.assert_close(torch.as_tensor(found), gated(TOKENS), rtol=1e-4, atol=1e-5)


def test_experts_go_in_one_shot():
    network = picked("index")
    data = torch.randn(64, 7, dtype=torch.float64)
    small = shrink(network, data, target_sparsity=0.5, families=["experts"], progress=False)
    whole = sum(p.numel() for p in network.parameters()) - sum(
        e.weight.numel() for e in (network.e1, network.e2)
    )
    assert sum(p.numel() for p in small.parameters()) <= 0.5 * whole
    assert 1 <= len(small.w1) < 8


SETTINGS = {
    "mixtral": {"num_local_experts": 4},
    "qwen2_moe": {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 24},
    "qwen3_moe": {"num_experts": 6, "moe_intermediate_size": 16},
    "gpt_oss": {"num_local_experts": 4, "layer_types": ["full_attention", "full_attention"]},
}


def tiny(implementation, kind="mixtral"):
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(
        kind, vocab_size=40, hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, use_cache=False, num_experts_per_tok=2, **SETTINGS[kind],
    )  # fmt: skip
    torch.manual_seed(0)
    config._experts_implementation = implementation
    network = transformers.AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in network.named_parameters():
        if "experts" in name or name.endswith(("gate.weight", "router.weight")):
            nn.init.normal_(parameter, std=0.3)
    return network


def ids(batch, length):
    return {"input_ids": torch.randint(0, 40, (batch, length), generator=torch.Generator().manual_seed(0))}


@pytest.mark.costly
@pytest.mark.parametrize("kind", SETTINGS)
def test_experts_of_transformers_go(kind):
    network = tiny("batched_mm", kind).double()
    gated = gate(network, ids(2, 6), families=["experts"], jitter=0.0)
    half_shut_(gated)
    small = compact(gated, ids(2, 6))
    rows = {len(p) for n, p in small.named_parameters() if "down_proj" in n and p.dim() == 3}
    assert min(rows) < len(next(p for n, p in network.named_parameters() if n.endswith("down_proj")))
    assert count(gated, ids(2, 6)).compacted_parameters == sum(p.numel() for p in small.parameters())
    one, two, whole = (n(**ids(3, 9))["logits"] for n in (small, gated, network))
    torch.testing.assert_close(one, two, rtol=0, atol=1e-12)
    assert float((two - whole).detach().abs().max()) > 1e-3


def test_experts_of_transformers():
    network = tiny("batched_mm")
    example = ids(2, 6)
    gated = gate(network, example, jitter=0.0)
    half_shut_(gated)
    small = compact(gated, example)
    shapes = {tuple(p.shape) for n, p in small.named_parameters() if "down_proj" in n}
    assert all(experts < 4 and width < 32 and units < 24 for experts, width, units in shapes)
    assert count(gated, example).compacted_parameters == sum(p.numel() for p in small.parameters())


def test_experts_that_the_data_dispatch_are_named_with_what_to_do():
    example = {"input_ids": torch.randint(0, 40, (2, 6))}
    with pytest.raises(
        ValueError, match=r"modeling_mixtral.py:\d+ .*depends on the data.*batched_mm"
    ) as refused:
        gate(tiny("eager"), example)
    assert "\n" not in str(refused.value)


@torch.no_grad()
def test_a_mixture_with_fewer_hidden_units_goes_back_to_its_class():
    network = tiny("batched_mm")
    gated = gate(network, ids(2, 6), families=["units"], jitter=0.0).eval()
    for gates in hard_concretes(gated).values():
        gates.log_alpha.fill_(10.0)[::2] = -10.0
    restored = restore_class(gated, network, ids(2, 6))
    assert restored.config.intermediate_size == network.config.intermediate_size // 2
    assert restored.config._experts_implementation == "batched_mm"
    torch.testing.assert_close(restored(**ids(3, 9))["logits"], gated(**ids(3, 9))["logits"])


class Sorted(nn.Module):
    """Experts that are layers, each of which gets its tokens of all, in order."""

    def __init__(self):
        super().__init__()
        self.into, self.out = nn.Linear(7, 12), nn.Linear(12, 3)
        self.weight = nn.Parameter(torch.randn(3, 12, 12))

    def forward(self, x, expert):
        sizes = F.one_hot(expert, 3).sum(0).tolist()
        parts = self.into(x).relu()[expert.argsort()].split(sizes)
        return self.out(torch.cat([F.linear(part, w) for part, w in zip(parts, self.weight, strict=True)]))


def test_an_expert_that_gets_nothing_of_the_example_is_named():
    with pytest.raises(
        InputError, match=r"linear in test_experts.py:\d+: nothing of the example comes so far"
    ):
        gate(Sorted(), (TOKENS, torch.tensor([0, 2, 2, 0, 2, 2])))
