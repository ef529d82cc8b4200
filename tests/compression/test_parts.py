"""Parts with budgets of their own: modules by their names, families of gates."""

import copy

import pytest
import torch
from torch import nn

import sparsereg
from sparsereg import Sparsifier
from sparsereg.compression import Accountant, count
from sparsereg.compression.budget import Budget, meet_all_
from sparsereg.compression.parts import inside, matched, parts_of
from sparsereg.data.form import Form
from sparsereg.errors import InputError
from sparsereg.model.transformer import Shape
from sparsereg.model.vit import ViT
from sparsereg.penalties import hard_concretes
from sparsereg.target_settings import part_goals
from sparsereg.zoo.networks import build

IMAGES = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
GAINS = 10.0, 0.01


def vit():
    torch.manual_seed(0)
    return ViT(3, (1, 8, 8), 4, Shape(width=24, depth=3, heads=4)).eval()


def gated(seed=0, **settings):
    """With gates that are open or shut by chance, about half of them."""
    net = sparsereg.gate(vit(), IMAGES, jitter=0.0, **settings)
    for i, gates in enumerate(hard_concretes(net).values()):
        draws = torch.Generator().manual_seed(seed + i)
        gates.log_alpha.data.copy_(2 * torch.randn(gates.log_alpha.shape, generator=draws) + 1)
    return net


def mlp_parameters(net):
    return sum(row.kept_parameters for row in count(net, IMAGES).layers if ".mlp" in row.name)


def budget(net, cost=None, kept=1.0, **parts):
    return Budget(
        Accountant(net, IMAGES), cost, kept, *GAINS, part_goals(**{"macs": None, "params": None} | parts)
    )


def test_modules_are_those_of_a_name_and_what_lies_in_them():
    assert inside("blocks.0.mlp", "blocks.*.mlp")
    assert inside("blocks.0.mlp.inner.fc1", "blocks.*.mlp")
    assert not inside("blocks.0.mlps", "blocks.*.mlp")
    assert not inside("", "blocks")


def test_a_pattern_may_know_the_end_of_a_name_where_it_knows_no_whole_one():
    paths = ["decoder.blocks.0.mlp.fc1", "decoder.blocks.1.mlp.fc2", "decoder.blocks.1.attn"]
    assert matched(paths, "blocks.*.mlp") == {*paths[:2]}
    assert matched([*paths, "blocks.0.mlp"], "blocks.*.mlp") == {"blocks.0.mlp"}
    assert not matched(paths, "blocks.*.norm")


def test_the_cost_of_modules_is_that_of_their_weights():
    net = gated()
    part = parts_of(Accountant(net, IMAGES), part_goals("blocks.*.mlp:0.5", None))[0]
    whole = sum(p.numel() for n, p in vit().named_parameters() if ".mlp." in n)
    assert part.selected.full == whole
    assert part.exact() == mlp_parameters(net) / whole
    for gates in hard_concretes(net).values():
        gates.log_alpha.data.copy_(torch.where(gates.log_alpha > 0, 40.0, -40.0))
    assert float(part.expected().detach()) == pytest.approx(part.exact(), abs=1e-9)


@pytest.mark.costly
@pytest.mark.parametrize(("seed", "removed"), [(0, 0.5), (1, 0.7), (2, 0.25)])
def test_parts_are_met_exactly_beside_the_whole(seed, removed):
    net = gated(seed)
    held = budget(net, "parameters", 0.6, params={"blocks.*.mlp": removed})
    held.meet()
    share = mlp_parameters(net) / held.parts[0].part.selected.full
    assert share <= 1 - removed
    most = (
        held.accountant.parameters - removed * held.parts[0].part.selected.full
    ) / held.accountant.parameters
    assert 0.98 * min(0.6, most) <= 1 - count(net, IMAGES).exact_sparsity <= 0.6
    if removed >= 0.5:  # else one level for all is strict enough for the part
        assert share >= 0.97 * (1 - removed)


def test_the_part_alone_leaves_other_gates_as_they_are():
    net = gated()
    before = {n: g.log_alpha.clone() for n, g in hard_concretes(net).items()}
    held = budget(net, params={"heads": 0.5})
    held.meet()
    moved = [n for n, g in hard_concretes(net).items() if not torch.equal(g.log_alpha, before[n])]
    assert moved
    assert all("heads" in name for name in moved)
    open_ = torch.cat([g.median() > 0 for n, g in hard_concretes(net).items() if "heads" in n])
    assert open_.float().mean() == 0.5
    assert held.parts[0].part.exact() == 0.5


def test_a_part_alone_gets_back_what_training_took_of_the_width_it_shares():
    net = gated()
    widths = [g for n, g in hard_concretes(net).items() if g.log_alpha.numel() == 24]
    for gate in widths:
        gate.log_alpha.data[3:] = -10.0
    held = budget(net, params={"blocks.*.mlp": 0.5})
    assert held.parts[0].part.exact() < 0.3
    held.meet()
    assert 0.45 <= held.parts[0].part.exact() <= 0.5  # one of 24 takes 4 %


@pytest.mark.costly
def test_what_the_whole_allows_less_of_is_below_its_own_budget():
    net = gated()
    held = budget(net, "macs", 0.2, params="blocks.*.mlp:0.1", macs="blocks.0:0.9")
    held.meet()
    counted = count(net, IMAGES)
    assert counted.compacted_macs / counted.macs <= 0.2
    assert all(part.part.exact() <= part.kept for part in held.parts)


@pytest.mark.costly
def test_half_of_the_heads_is_half_of_them_whatever_the_width_is():
    net = gated()
    held = budget(
        net, params={"heads": 0.5, "width": 0.25, "blocks.*.mlp": 0.6}, macs={"blocks.1.attention": 0.5}
    )
    held.meet()
    for part in held.parts:
        assert part.part.exact() <= part.kept, part.name
    assert held.parts[0].part.exact() == 0.5


def trained(steps, **target):
    sparsifier = Sparsifier(vit(), IMAGES, steps=steps, **target)
    optimizer = torch.optim.AdamW(sparsifier.parameter_groups(3e-3))
    draws = torch.Generator().manual_seed(0)
    for _ in range(steps):
        x = torch.randn(16, 1, 8, 8, generator=draws)
        y = (x[:, 0, :4].sum((1, 2)) > 0).long() + (x[:, 0, 4:].sum((1, 2)) > 0).long()
        loss = sparsifier.loss(nn.functional.cross_entropy(sparsifier.model(x), y))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        sparsifier.step()
    return sparsifier


@pytest.mark.costly
def test_each_part_has_a_multiplier_of_its_own_while_it_trains():
    sparsifier = trained(60, target_macs=0.5, target_params={"blocks.*.mlp": 0.7, "heads": 0.5})
    scalars = sparsifier.budget.constraint.scalars
    assert {"lambda_target", "expected_kept/heads", "lambda_target/blocks._.mlp"} <= set(scalars)
    assert scalars["expected_kept/blocks._.mlp"] < 0.5
    small = sparsifier.finish()
    counted = count(sparsifier.model, IMAGES)
    assert counted.compacted_macs / counted.macs <= 0.5
    assert all(part.part.exact() <= part.kept for part in sparsifier.budget.parts)
    x = torch.randn(3, 1, 8, 8)
    torch.testing.assert_close(small(x), sparsifier.model.eval()(x), rtol=1e-4, atol=1e-5)


@pytest.mark.costly
def test_a_state_holds_the_parts_and_knows_others():
    one = trained(7, target_params={"heads": 0.5})
    other = Sparsifier(vit(), IMAGES, steps=7, target_params={"heads": 0.5})
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    assert other.budget.integrals() == one.budget.integrals()
    assert other.budget.constraint.penalty() == one.budget.constraint.penalty()
    with pytest.raises(ValueError, match="this state is of other parts: heads"):
        Sparsifier(vit(), IMAGES, steps=7, target_macs=0.5).load_state_dict(one.state_dict())


@pytest.mark.costly
@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"params": "blocks.*.mlq:0.5"}, r"params=blocks.\*.mlq:0.5: no module .* there are blocks.\d.mlp"),
        ({"params": "kv_groups:0.5"}, "no gates of the family kv_groups are there"),
        ({"params": ["blocks.*:0.5", "blocks.*.mlp:0.6"]}, r"blocks.\*:0.5 and .* overlap in blocks.0.mlp"),
        ({"params": "heads:0.5,heads:0.6"}, "overlap in heads"),
        ({"params": "head:0.5"}, "none of its parameters can go"),
        ({"macs": "blocks.*.mlp:0.001"}, r"every gate shut \d.\d+% of these macs stay; give more"),
    ],
)  # fmt: skip
def test_wrong_parts_are_said_in_one_line(parts, said):
    net = sparsereg.gate(vit(), IMAGES, families=["heads", "units"])
    with pytest.raises(InputError, match=said):
        budget(net, **parts)


@pytest.mark.parametrize("wrong", ["mlp", "mlp:", "mlp:1.5", ":0.5", "mlp:0", "mlp:half", {"mlp": 1}])
def test_what_is_no_share_is_refused(wrong):
    with pytest.raises(ValueError, match="target_params=.*expected a name and a share"):
        part_goals(wrong, None)


@pytest.mark.costly
def test_gates_of_an_author_have_parts_by_name_but_no_families():
    net = build({"name": "lenet5", "sampling": "batch"}, Form(10, (1, 28, 28)), gated=True)
    for i, gates in enumerate(hard_concretes(net).values()):
        draws = torch.Generator().manual_seed(i)
        gates.log_alpha.data.copy_(2 * torch.randn(gates.log_alpha.shape, generator=draws) + 1)
    accountant = Accountant(net, torch.zeros(1, 1, 28, 28))
    names = [row.name for row in accountant.count().layers if row.parameters]
    held = Budget(accountant, "parameters", 0.5, *GAINS, part_goals({names[0]: 0.5}, None))
    held.meet()
    assert held.parts[0].part.exact() <= 0.5
    assert 0.49 <= 1 - accountant.exact_sparsity() <= 0.5
    with pytest.raises(InputError, match="no gates of the family heads"):
        Budget(accountant, None, 1.0, *GAINS, part_goals("heads:0.5", None))


@pytest.mark.costly
def test_in_one_shot():
    torch.manual_seed(1)
    net, x = vit(), torch.randn(64, 1, 8, 8)
    small = sparsereg.shrink(net, x, target_macs=0.6, target_params={"blocks.*.mlp": 0.5}, progress=False)
    left = sum(p.numel() for n, p in small.named_parameters() if ".mlp." in n)
    whole = sum(p.numel() for n, p in net.named_parameters() if ".mlp." in n)
    assert left <= 0.5 * whole
    only = sparsereg.shrink(net, x, target_params="heads:0.5", repair=False, progress=False)
    assert sum(p.numel() for p in only.parameters()) < sum(p.numel() for p in net.parameters())


def test_parts_of_no_gates_leave_the_rest_alone():
    net = gated()
    assert meet_all_(Accountant(net, IMAGES), None, 1.0, []) == 1.0
