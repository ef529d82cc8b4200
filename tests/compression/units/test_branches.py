"""Whole branches: one gate shuts all of f(x) in x + f(x), and compaction takes it out."""

import itertools
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_leaves

import sparsereg
from sparsereg.compression import compact, count, gate, load_compacted, save_compacted
from sparsereg.compression.units.cut import Cut
from sparsereg.compression.units.rules.table import Labeller
from sparsereg.compression.units.solve import solve
from sparsereg.compression.units.tracing import trace
from sparsereg.compression.verify import difference
from sparsereg.model.gpt import GPT
from sparsereg.model.transformer import Shape
from sparsereg.penalties import hard_concretes
from tests.compression.units.networks import NETWORKS, Attention, build


def mlp(width, hidden):
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))


class Parallel(nn.Module):
    """Attention and MLP read the same norm and are added at once, as in GPT-NeoX."""

    def __init__(self):
        super().__init__()
        self.into, self.out = nn.Linear(5, 12), nn.Linear(12, 3)
        self.norm, self.attention = nn.LayerNorm(12), Attention(12, 3, True)
        self.up, self.down = nn.Linear(12, 20), nn.Linear(20, 12)

    def forward(self, x):
        x = self.into(x)
        h = self.norm(x)
        return self.out(self.attention(h) + self.down(F.gelu(self.up(h))) + x)


class Nested(nn.Module):
    """A branch of a branch, and a difference."""

    def __init__(self):
        super().__init__()
        self.into, self.out = nn.Linear(5, 8), nn.Linear(8, 3)
        self.outer, self.inner, self.last, self.less = (mlp(8, n) for n in (10, 11, 8, 9))

    def forward(self, x):
        x = self.into(x)
        y = self.outer(x)
        y = y + self.inner(y)
        x = x + self.last(y)
        return self.out(x - self.less(x))


class Shared(nn.Module):
    """The same block three times, with a number of its own for each branch, as in ALBERT and ReZero."""

    def __init__(self):
        super().__init__()
        self.into, self.out, self.block = nn.Linear(5, 8), nn.Linear(8, 3), mlp(8, 10)
        self.numbers = nn.ParameterList([nn.Parameter(torch.tensor(0.5 + i)) for i in range(2)])
        self.others = nn.ModuleList([mlp(8, 6), mlp(8, 7)])

    def forward(self, x):
        x = self.into(x)
        for number, other in zip(self.numbers, self.others, strict=True):
            x = x + self.block(x)
            x = x + number * other(x)
        return self.out(x)


class NoSkip(nn.Module):
    """Four layers alike, of which one has to stay, and a projection that is the smaller of two."""

    def __init__(self):
        super().__init__()
        self.alike = nn.ModuleList([nn.Conv2d(3, 6, 3, padding=1) for _ in range(4)])
        self.long = nn.Sequential(
            nn.Conv2d(6, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 7, 1)
        )
        self.projection, self.out = nn.Conv2d(6, 7, 1), nn.Conv2d(7, 2, 1)

    def forward(self, x):
        x = torch.relu(sum((layer(x) for layer in self.alike), start=torch.zeros(())))
        x = torch.relu(self.long(x) + self.projection(x))
        return self.out(x)


class Experts(nn.Module):
    """A mixture whose experts are all computed and weighed by a router."""

    def __init__(self):
        super().__init__()
        self.into, self.out, self.router = nn.Linear(5, 8), nn.Linear(8, 3), nn.Linear(8, 4)
        self.experts = nn.ModuleList([mlp(8, 10) for _ in range(4)])

    def forward(self, x):
        x = self.into(x)
        weights = self.router(x).softmax(-1)
        mixed = sum(weights[..., i, None] * expert(x) for i, expert in enumerate(self.experts))
        return self.out(torch.tanh(mixed))


OWN = {
    "experts": (Experts, torch.randn(3, 5), 4),
    "parallel": (Parallel, torch.randn(2, 4, 5), 2),
    "nested": (Nested, torch.randn(3, 5), 3),
    "shared": (Shared, torch.randn(3, 5), 3),
    "no skip": (NoSkip, torch.randn(2, 3, 6, 6), 5),
}
"""Network, example, and how many branches it has."""
FOUND = {"vision transformer": 4, "decoder": 2, "convnext": 1, "mixed": 0, "encoder": 4, "resnet18": 8}


def made(name):
    torch.manual_seed(0)
    return OWN[name][0]().eval() if name in OWN else build(name)


def example_of(name):
    return OWN[name][1] if name in OWN else NETWORKS[name][1]


@pytest.mark.costly
@pytest.mark.parametrize("name", [*OWN, *FOUND])
@torch.no_grad()
def test_any_of_the_branches_can_go(name):
    example = example_of(name)
    example = example.double() if example.is_floating_point() else example
    units = solve(Labeller(trace(made(name).double(), example)))
    branches = units.branches
    assert len(branches.found) == (OWN[name][2] if name in OWN else FOUND[name])
    choices = [branch.choice for branch in branches.found][:5]
    full = sum(p.numel() for p in made(name).parameters())
    for n in range(1, len(choices) + 1):
        for gone in itertools.combinations(choices, n):
            if any(set(one) <= set(gone) for one in branches.alternatives):
                continue
            cut = Cut(units, gone)
            assert cut.num_parameters < full
            pairs = zip(tree_leaves(cut.run(example)), tree_leaves(cut.masked(example)), strict=True)
            assert all((a - b).abs().max() <= 1e-12 * b.std() for a, b in pairs)


@torch.no_grad()
def shut_some_(network, seed):
    """Gates of branches shut, open or in between; all others as they fall."""
    generator = torch.Generator().manual_seed(seed)
    for gates in hard_concretes(network).values():
        gates.log_alpha.copy_(3 * torch.randn(gates.log_alpha.shape, generator=generator))


@pytest.mark.costly
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("name", [*OWN, "vision transformer", "encoder"])
def test_gated_networks_are_compacted_to_the_counted_size(name, seed, tmp_path):
    example = example_of(name)
    network = gate(made(name), example, jitter=0.0)
    shut_some_(network, seed)
    sizes = count(network, example)
    smaller = compact(network, example)  # compares in float64, too
    assert sizes.compacted_parameters == sum(p.numel() for p in smaller.parameters())
    again = load_compacted(save_compacted(smaller, tmp_path / "compacted.pt"))
    with torch.no_grad():
        for a, b in zip(tree_leaves(network(example)), tree_leaves(again(example)), strict=True):
            assert difference(a, b) < 1e-5


@pytest.mark.costly
@pytest.mark.parametrize("name", ["nested", "parallel", "experts"])
@torch.no_grad()
def test_branches_go_in_all_combinations(name):
    network = gate(made(name), example_of(name), families=["blocks", "experts"], jitter=0.0)
    own = branch_gates(network)
    assert own
    for open_ones in itertools.product([True, False], repeat=len(own)):
        for gates, here in zip(own, open_ones, strict=True):
            gates.log_alpha.fill_(10.0 if here else -10.0)
        smaller = compact(network, example_of(name))  # compares
        found = sum(p.numel() for p in smaller.parameters())
        assert found == count(network, example_of(name)).compacted_parameters


@pytest.mark.costly
@torch.no_grad()
def test_tables_that_nobody_learns_make_no_branch():
    x = torch.arange(24).view(2, 12)
    network = gate(GPT(256, 16, Shape(width=16, depth=2, heads=2)).double().eval(), x)
    assert len(branch_gates(network)) == 4  # attention and MLP of two blocks, and none of the rotations
    for gates in hard_concretes(network).values():
        gates.log_alpha.fill_(0.3)
    assert difference(network(x), compact(network, x, check=False)(x)) < 1e-6  # medians are float32


def branch_gates(network):
    found = hard_concretes(network).items()
    return [gates for name, gates in found if re.search("gate_(blocks|experts)", name)]


def test_one_layer_of_those_alike_stays():
    network = gate(made("no skip"), example_of("no skip"), families="blocks")
    with torch.no_grad():
        for gates in branch_gates(network):
            gates.log_alpha.fill_(-10.0)
    smaller = compact(network, example_of("no skip"))
    assert (
        sum(name.startswith("alike") for name, m in smaller.named_modules() if isinstance(m, nn.Conv2d)) == 1
    )
    assert not any(name.startswith("long") for name, _ in smaller.named_parameters())


def test_what_is_in_a_branch_costs_the_product_of_both_probabilities():
    network = gate(made("nested"), example_of("nested"), families=["blocks", "units"])
    gates = hard_concretes(network)
    with torch.no_grad():
        for own in gates.values():
            own.log_alpha.fill_(30.0)
        inner = next(g for n, g in gates.items() if n.startswith("inner.1"))
        shut = next(g for n, g in gates.items() if n.startswith("inner.3") and "blocks" in n)
        last = next(g for n, g in gates.items() if n.startswith("last.3") and "blocks" in n)
        full = count(network, example_of("nested")).expected_parameters
        for own in (inner, shut, last):
            own.log_alpha.fill_(0.4)
    p = float(inner.p_active()[0].detach())
    sizes = {n: q.numel() for n, q in made("nested").named_parameters()}
    found = count(network, example_of("nested"))
    expected = full
    for name, numel in sizes.items():
        if name.startswith(("outer", "inner", "last")):
            expected -= numel
            keeps = p  # that of the branch `last`, in which the others lie
            keeps *= p if name.startswith("inner") else 1
            keeps *= p if name.startswith("inner.1") or name == "inner.3.weight" else 1
            expected += numel * keeps
    assert found.expected_parameters == pytest.approx(expected, rel=1e-9)


def test_what_two_branches_share_stays_with_either():
    network = gate(made("parallel"), example_of("parallel"), families="blocks")
    one, two = branch_gates(network)
    with torch.no_grad():
        one.log_alpha.fill_(0.2)
        two.log_alpha.fill_(-0.3)
    p, q = float(one.p_active().detach()), float(two.p_active().detach())
    sizes = {n: v.numel() for n, v in made("parallel").named_parameters()}
    parts = {"attention": p, "up": q, "down": q, "norm": 1 - (1 - p) * (1 - q), "into": 1, "out": 1}
    wanted = sum(numel * parts[name.split(".")[0]] for name, numel in sizes.items())
    assert count(network, example_of("parallel")).expected_parameters == pytest.approx(wanted, rel=1e-9)


def test_explanation_names_branches_and_counts_what_goes_with_them():
    explanation = sparsereg.explain(made("nested"), example_of("nested"))
    table = explanation.to_frame().query("family == 'blocks' and state == 'can go'")
    assert set(table.parameter) == {"inner.3.bias", "last.3.bias", "less.3.bias"}
    whole = dict(made("nested").named_parameters())
    assert all(explanation.staying[name] == 0 for name in whole if name.startswith(("outer", "last", "less")))


@pytest.mark.costly
def test_gates_of_branches_are_found_again_and_learn():
    network = gate(made("nested"), example_of("nested"), jitter=0.0)
    shut_some_(network, 4)
    again = gate(made("nested"), example_of("nested"), jitter=0.0)
    again.load_state_dict(network.state_dict())
    again.__dict__["_units"] = None
    assert count(again, example_of("nested")) == count(network, example_of("nested"))
    network.train()(example_of("nested")).square().sum().backward()
    assert all(g.log_alpha.grad.isfinite().all() for g in branch_gates(network))


@pytest.mark.costly
def test_fused_kernels_of_encoders_read_gated_weights():
    """PyTorch's fast path reads the weights of its layers in place of calling them."""
    network = gate(made("encoder"), example_of("encoder"), families="units", jitter=0.0)
    with torch.no_grad():
        before = network(example_of("encoder"))
        for gates in hard_concretes(network).values():
            gates.log_alpha[::2] = -10.0
        assert difference(before, network(example_of("encoder"))) > 1e-3
        compact(network, example_of("encoder"))


@pytest.mark.costly
@torch.no_grad()
def test_experts_are_a_family_of_their_own():
    mixture, x = made("experts"), example_of("experts")
    gated = gate(mixture, x, families=["experts"]).eval()
    gates = hard_concretes(gated)
    assert [h.log_alpha.numel() for h in gates.values()] == [1, 1, 1, 1]
    for shut, h in zip((True, True, False, False), gates.values(), strict=True):
        h.log_alpha.fill_(-10.0 if shut else 10.0)
    torch.testing.assert_close(compact(gated, x)(x), gated(x))
    two = sum(p.numel() for expert in mixture.experts[:2] for p in expert.parameters())
    size = count(gated, x)
    assert size.parameters - size.compacted_parameters >= two
    with pytest.raises(ValueError, match="nothing of blocks that can go"):
        gate(mixture, x, families="blocks")
    with pytest.raises(ValueError, match="nothing of experts that can go"):
        gate(made("nested"), example_of("nested"), families=["experts"])
