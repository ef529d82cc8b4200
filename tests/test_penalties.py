"""Penalties and counts against sums by hand, on nested, shared, frozen and pruned networks."""

import csv
import logging
import math

import pytest
import torch
from torch import nn

from sparsereg.distributions import HardConcrete
from sparsereg.gates import L0Gate, SampleGate
from sparsereg.layers import L0Conv2d, L0Linear, SparseMLP
from sparsereg.model.basic_l0_blocks import ConvBlock, GateFactory
from sparsereg.model.lenet import LeNet5, LeNet300
from sparsereg.penalties import (
    PenaltyTracker,
    TemperatureScheduler,
    compute_l0_penalty,
    compute_l0l2_penalty,
    compute_l2_penalty,
    expected_l2,
    get_active_parameter_count,
    get_sparsity_stats,
    hard_concretes,
    l_c0,
    update_temperatures,
)
from tests.nets import NETS, inputs, make


@pytest.mark.parametrize("name", NETS)
def test_l0_penalty_is_the_sum_over_every_gate(name):
    net = make(name)
    p = torch.cat([g.p_active().flatten() for g in hard_concretes(net).values()]).double()
    assert compute_l0_penalty(net).item() == pytest.approx(p.sum().item(), rel=1e-5)
    assert l_c0(net).item() == pytest.approx(p.mean().item(), rel=1e-5)
    compute_l0_penalty(net).backward()
    assert all(g.log_alpha.grad.abs().sum() > 0 for g in hard_concretes(net).values())


def test_gates_of_different_temperatures_and_intervals_are_summed_right():
    net = nn.ModuleList([HardConcrete(3), HardConcrete(4, temperature=1.0), HardConcrete(2, 2, stretch=0.3)])
    assert compute_l0_penalty(net).item() == pytest.approx(sum(g.get_penalty().item() for g in net), rel=1e-6)


def test_penalties_are_built_where_the_model_is():
    """On a device without data (meta) a tensor made on the CPU would show."""
    net = make("nested").to("meta")
    for penalty in (compute_l0_penalty, compute_l2_penalty, compute_l0l2_penalty, expected_l2):
        assert penalty(net).device.type == "meta"
    assert net[4].get_l2_penalty().device.type == "meta"
    plain = nn.Conv2d(2, 2, 1, device="meta")
    assert compute_l0_penalty(plain).device.type == "meta"
    assert compute_l2_penalty(nn.ReLU()).item() == 0
    mlp = SparseMLP(4, 3, 2, use_l2=True).to("meta")
    assert mlp.get_l0_loss().device.type == mlp.get_l2_loss().device.type == "meta"


def test_l2_penalty_is_of_weights_only():
    net = nn.Sequential(L0Linear(3, 2), nn.BatchNorm1d(2), nn.Linear(2, 2))
    want = sum(w.square().sum().item() for w in (net[0].weight, net[1].weight, net[2].weight))
    assert compute_l2_penalty(net).item() == pytest.approx(want)
    both = compute_l0l2_penalty(net, 0.3, 0.2).item()
    assert both == pytest.approx(0.3 * compute_l0_penalty(net).item() + 0.2 * want, rel=1e-5)


def test_shared_modules_and_parameters_count_once():
    layer = make("linear")
    net = nn.Sequential(layer, nn.ReLU(), nn.ModuleDict({"again": layer}), L0Linear(12, 5))
    net[3].weight = layer.weight
    assert compute_l0_penalty(net).item() == pytest.approx(
        layer.get_l0_penalty().item() + net[3].get_l0_penalty().item(), rel=1e-5
    )
    assert compute_l2_penalty(net).item() == pytest.approx(layer.weight.square().sum().item())
    assert list(get_sparsity_stats(net)) == ["0", "3"]
    dead = (layer.weight_gates.median() == 0) | (net[3].weight_gates.median() == 0)
    assert get_active_parameter_count(net) == 60 - int(dead.sum()) + 5 + 5


def test_frozen_modules_count_but_get_no_gradient():
    net = make("linear")
    count = get_active_parameter_count(net)
    stats = get_sparsity_stats(net)
    net.requires_grad_(False)
    assert get_active_parameter_count(net) == count
    assert get_sparsity_stats(net) == stats
    assert compute_l0_penalty(net).item() > 0
    assert not compute_l0_penalty(net).requires_grad
    assert compute_l2_penalty(net).item() == 0


@pytest.mark.parametrize("name", ["linear", "conv", "structured", "depthwise"])
def test_count_by_hand(name):
    layer = make(name)
    z = layer.gate.median()
    bias = 0 if layer._plain_bias is None else layer._plain_bias.numel()
    if layer.per_weight:
        assert get_active_parameter_count(layer) == int((z > 0).sum()) + bias
    else:
        each = layer.gated_weight[0].numel() + 1
        assert get_active_parameter_count(layer) == int((z > 0).sum()) * each


def test_count_of_a_lenet_by_hand():
    net = make("lenet300")
    a, b, c = (int((g.median() > 0).sum()) for g in hard_concretes(net).values())
    assert get_active_parameter_count(net) == a * 300 + 300 + b * 100 + 100 + c * 10 + 10


def test_count_with_an_example_follows_the_consequences():
    net = make("lenet300").eval()
    a, b, c = (int((g.median() > 0).sum()) for g in hard_concretes(net).values())
    want = a * b + b + b * c + c + c * 10 + 10
    assert get_active_parameter_count(net, inputs("lenet300")) == want


@pytest.mark.parametrize("name", ["mlp", "nested", "lenet5"])
def test_count_with_an_example_is_no_larger(name):
    net = make(name).eval()
    assert 0 < get_active_parameter_count(net, inputs(name)) <= get_active_parameter_count(net)


def test_ungated_parameters_are_all_in_use():
    assert get_active_parameter_count(nn.Linear(3, 4)) == 16
    with pytest.raises(ValueError, match="no gates"):
        l_c0(nn.Linear(3, 4))


@pytest.mark.parametrize("name", ["nested", "googlenet", "lenet5"])
def test_statistics_by_name(name):
    net = make(name)
    stats = get_sparsity_stats(net)
    assert len(stats) == len(hard_concretes(net))
    assert sum(s["num_gates"] for s in stats.values()) == sum(
        g.log_alpha.numel() for g in hard_concretes(net).values()
    )
    for key, value in stats.items():
        module = net.get_submodule(key)
        gate = next(iter(hard_concretes(module).values()))
        assert value["sparsity"] == value["expected_sparsity"]
        assert value["sparsity"] == pytest.approx(1 - gate.p_active().mean().item(), abs=1e-6)
        assert value["exact_sparsity"] == pytest.approx(1 - gate.get_num_active() / value["num_gates"])
        assert value["active_params"] == pytest.approx((1 - value["sparsity"]) * value["total_params"])
        assert all(isinstance(v, (int, float)) for v in value.values())


def test_statistics_of_free_gates_and_of_several_in_one_module():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = HardConcrete(3), HardConcrete(4)
            self.rows = SampleGate(10, 3)

    assert set(get_sparsity_stats(Net())) == {"left", "right", "rows"}
    assert get_sparsity_stats(L0Gate(4))["gates"]["num_gates"] == 4


def test_expected_l2_is_the_mean_over_draws():
    net = nn.Sequential(make("linear"), nn.Linear(5, 2))
    weight, gate = net[0].weight.detach(), net[0].weight_gates
    with torch.no_grad():
        sampled = torch.stack([(weight * (gate.sample() > 0)).square().sum() for _ in range(4000)]).mean()
    want = sampled.item() + net[1].weight.square().sum().item()
    assert expected_l2(net).item() == pytest.approx(want, rel=0.02)


@pytest.mark.parametrize("cls", [LeNet300, LeNet5])
def test_expected_l2_of_groups_of_weights(cls):
    net = cls()
    with torch.no_grad():
        for gate in hard_concretes(net).values():
            gate.log_alpha.fill_(40.0)
    assert expected_l2(net).item() == pytest.approx(compute_l2_penalty(net).item(), rel=1e-5)
    with torch.no_grad():
        for gate in hard_concretes(net).values():
            gate.log_alpha.fill_(-40.0)
    assert expected_l2(net).item() == pytest.approx(0.0, abs=1e-9)
    expected_l2(make("lenet5")).backward()


def test_expected_l2_of_a_gated_batch_norm():
    block = ConvBlock(2, 3, 3, gate=GateFactory())
    p = block.norm.gate.gates.p_active()
    want = (p * block.norm.weight.square()).sum() + (p.view(-1, 1, 1, 1) * block.conv.weight.square()).sum()
    assert expected_l2(block).item() == pytest.approx(want.item(), rel=1e-5)


def test_temperature_reaches_every_gate():
    net = nn.ModuleList([make("googlenet"), make("nested"), SampleGate(5, 2), nn.Sequential(HardConcrete(3))])
    update_temperatures(net, 0.123)
    assert {g.temperature for g in hard_concretes(net).values()} == {0.123}
    with pytest.raises(ValueError, match="temperature"):
        update_temperatures(net, 0.0)


@pytest.mark.parametrize("schedule", ["constant", "linear", "exponential", "cosine"])
def test_schedules(schedule):
    scheduler = TemperatureScheduler(2.0, 0.5, total_epochs=10, schedule=schedule)
    values = [scheduler.get_temperature(e) for e in range(-1, 13)]
    assert values[0] == values[1] == 2.0
    assert values[11:] == [values[11]] * 3
    if schedule != "constant":
        assert values[11] == pytest.approx(0.5)
        assert all(a > b for a, b in zip(values[1:11], values[2:12], strict=True))
    middle = {"constant": 2.0, "linear": 1.25, "exponential": 1.0, "cosine": 1.25}
    assert values[6] == pytest.approx(middle[schedule])


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"initial_temp": 0.0}, "initial_temp"),
        ({"final_temp": -1.0}, "final_temp"),
        ({"final_temp": math.nan}, "final_temp"),
        ({"anneal_epochs": 0}, "anneal_epochs"),
        ({"anneal_epochs": 5, "total_epochs": 5}, "total_epochs"),
        ({"schedule": "linaer"}, "schedule must be one of"),
    ],
)
def test_wrong_schedules(arguments, name):
    with pytest.raises(ValueError, match=name):
        TemperatureScheduler(**arguments)


@pytest.mark.parametrize("name", ["l0_lambda", "l2_lambda"])
@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
def test_wrong_prices(name, value):
    with pytest.raises(ValueError, match=name):
        compute_l0l2_penalty(L0Linear(2, 2), **{name: value})


def test_tracker(tmp_path):
    tracker = PenaltyTracker()
    for value in (1.0, 2.0, 6.0):
        tracker.log("loss", value)
    tracker.log("once", torch.tensor(4.0))
    stats = tracker.get_stats("loss")
    want = {"mean": 3.0, "std": math.sqrt(14 / 3), "min": 1.0, "max": 6.0, "last": 6.0}
    assert stats == pytest.approx(want)
    assert tracker.get_history("loss") == [1.0, 2.0, 6.0]
    assert tracker.get_history("never") == []
    assert tracker.get_stats("never") == {}
    assert "never" not in tracker.history
    tracker.save_to_csv(tmp_path / "h.csv")
    rows = list(csv.reader((tmp_path / "h.csv").read_text().splitlines()))
    assert rows == [["loss", "once"], ["1.0", "4.0"], ["2.0", ""], ["6.0", ""]]
    tracker.plot_history(save_path=str(tmp_path / "h.png"))
    assert (tmp_path / "h.png").stat().st_size > 1000
    with pytest.raises(ValueError, match="metrics must be among loss, once"):
        tracker.plot_history(["los"])
    tracker.clear()
    assert tracker.history == {}


def test_tracker_counts_models_as_the_statistics_do():
    tracker, net = PenaltyTracker(), make("nested")
    tracker.log_model(net)
    assert tracker.get_history("active_parameters") == [get_active_parameter_count(net)]
    assert tracker.get_history("l0_penalty")[0] == pytest.approx(compute_l0_penalty(net).item(), rel=1e-5)
    assert tracker.get_history("expected_sparsity")[0] == pytest.approx(1 - l_c0(net).item(), abs=1e-6)


def test_the_library_does_not_print(capsys, caplog):
    net = L0Conv2d(1, 2, 3)
    with caplog.at_level(logging.DEBUG):
        compute_l0l2_penalty(net)
        get_sparsity_stats(net)
    assert capsys.readouterr() == ("", "")
