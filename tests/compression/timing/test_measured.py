import logging
import math

import pytest
import torch
from torch import nn

from sparsereg.compression import Accountant, compact, gate
from sparsereg.compression.timing.measured import (
    TOLERANCE,
    MeasuredBudget,
    Megabytes,
    Milliseconds,
    _enough,
    peak_megabytes,
)
from sparsereg.compression.timing.runtimes import Loaders
from sparsereg.compression.timing.times import CACHE
from sparsereg.distributions import HardConcrete
from sparsereg.errors import InputError
from sparsereg.model.lenet import LeNet5


@pytest.fixture
def accountant():
    torch.manual_seed(0)
    x = torch.randn(1, 3, 8, 8)
    convs = [nn.Conv2d(3, 80, 3), nn.ReLU(), nn.Conv2d(80, 120, 3), nn.ReLU(), nn.Flatten()]
    network = gate(nn.Sequential(*convs, nn.Linear(1920, 5)), x).eval()
    for module in network.modules():
        if isinstance(module, HardConcrete):
            with torch.no_grad():
                module.log_alpha.normal_(0, 2)
    return Accountant(network, x), x


def test_the_peak_is_what_is_alive_at_once():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.wide, self.narrow = nn.Linear(10, 100), nn.Linear(10, 20)
            self.last = nn.Linear(100, 20)

        def forward(self, x):
            return self.last(self.wide(x)) + self.narrow(x).view(-1, 20)

    x = torch.ones(2, 10)
    # While last(wide(x)) is computed: x, which narrow still reads, wide(x) and the result.
    assert peak_megabytes(compact(Branches(), x), x) == pytest.approx(4e-6 * 2 * (10 + 100 + 20))
    part = torch.ones(500, 10)[:2]  # of a large tensor, which is not what a call holds
    assert peak_megabytes(compact(Branches(), x), part) == pytest.approx(4e-6 * 2 * (10 + 100 + 20))


@pytest.mark.costly
@pytest.mark.parametrize("share", [0.2, 0.35, 0.5, 0.65, 0.8])
def test_megabytes_are_met(accountant, share):
    counted, x = accountant
    cost = Megabytes(counted, x, batch=4)
    with pytest.raises(InputError, match=r"target_memory_mb=1e-09: .* the network still takes"):
        MeasuredBudget(counted, cost, 1e-9, x)
    target = cost.floor + share * (cost.full - cost.floor)
    budget = MeasuredBudget(counted, cost, target, x)
    constraint = budget.measure(0.0)
    assert math.exp(constraint.violation) == pytest.approx(budget.expected_share().item())
    assert constraint.gradients
    assert all((g >= 0).all() for _, g in constraint.gradients)  # an opener gate never costs less
    budget.meet()
    small = compact(counted.model, x)
    weights = sum(p.numel() for p in small.parameters()) * 4e-6
    measured = weights + peak_megabytes(small, x.repeat(4, 1, 1, 1))
    assert budget.reached == pytest.approx(measured)
    assert (1 - TOLERANCE) * target <= measured <= target  # what is counted may be met from below
    assert budget.met


class Crooked(Megabytes):
    """Measures something that its model is wrong about, as clocks do."""

    def measure(self, network, target=math.nan):
        noise = sum(p.numel() for p in network.parameters()) % 3
        return super().measure(network) ** 0.6 * (1 + 0.002 * noise)


@pytest.mark.costly
@pytest.mark.parametrize("share", [0.2, 0.5])
def test_a_model_that_is_wrong_is_corrected_by_what_is_measured(accountant, share):
    counted, x = accountant
    cost = Crooked(counted, x, batch=4)
    with pytest.raises(InputError):
        MeasuredBudget(counted, cost, 1e-9, x)
    target = cost.floor + share * (cost.full - cost.floor)
    budget = MeasuredBudget(counted, cost, target, x)
    budget.meet()
    assert budget.reached == pytest.approx(target, rel=TOLERANCE)
    assert cost.measure(compact(counted.model, x)) == pytest.approx(budget.reached)


def test_the_smallest_network_still_reads_its_input():
    x = torch.ones(1, 1, 28, 28)
    network = LeNet5(10, (1, 28, 28), gate="units").eval()
    counted = Accountant(network, x)
    cost = Megabytes(counted, x, batch=1)
    with pytest.raises(InputError, match="with one unit left in each place the network still takes"):
        MeasuredBudget(counted, cost, 1e-9, x)
    for g in counted.gates:
        with torch.no_grad():
            g.log_alpha.fill_(-20.0)
    constant = compact(network, x)
    assert torch.equal(constant(x), constant(torch.randn_like(x)))
    assert cost.measure(constant) < cost.floor
    for g in counted.gates:
        with torch.no_grad():
            g.log_alpha.view(-1)[0] = 20.0
    assert cost.measure(compact(network, x)) == pytest.approx(cost.floor)


def test_branches_that_may_all_go_leave_the_smallest_network():
    class Skip(nn.Module):
        def __init__(self):
            super().__init__()
            self.branch, self.last = nn.Linear(6, 30), nn.Linear(30, 6)

        def forward(self, x):
            return x + self.last(self.branch(x).relu())

    x = torch.ones(1, 6)
    counted = Accountant(gate(Skip().eval(), x, families=["units"]), x)
    with pytest.raises(InputError, match="with all gates shut the network still takes"):
        MeasuredBudget(counted, Megabytes(counted, x, batch=1), 1e-9, x)


@pytest.mark.costly
def test_what_cannot_be_met_is_said(accountant, caplog):
    counted, x = accountant
    cost = Megabytes(counted, x, batch=1)
    with pytest.raises(InputError, match=r"the whole network takes .* MB \(batch 1\): ask for less"):
        MeasuredBudget(counted, cost, 1e9, x)
    before = [g.log_alpha.clone() for g in counted.gates]
    with pytest.raises(InputError, match="ask for more"):
        MeasuredBudget(counted, cost, cost.floor, x)
    assert all(torch.equal(a, g.log_alpha) for a, g in zip(before, counted.gates, strict=True))

    small, x = two_layers()

    class Steps(Megabytes):
        def measure(self, network, target=math.nan):
            return 1.0 if sum(p.numel() for p in network.parameters()) < 600 else 3.0

    coarse = Steps(small, x, batch=1)
    with caplog.at_level(logging.WARNING):
        MeasuredBudget(small, coarse, 2.0, x).meet()
    assert "the nearest that was found is" in caplog.text


def two_layers():
    """A network whose two layers lose units in turns."""
    torch.manual_seed(0)
    x = torch.ones(1, 6)
    layers = nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 2)
    counted = Accountant(gate(nn.Sequential(*layers), x), x)
    with torch.no_grad():
        for g in counted.gates:
            g.log_alpha.copy_(torch.linspace(-3, 3, 32))
    return counted, x


@pytest.mark.costly
def test_a_layer_that_costs_by_blocks_is_held_and_others_fill_what_is_left(caplog):
    counted, x = two_layers()
    measured = []

    class Blocks(Megabytes):
        def measure(self, network, target=math.nan):
            measured.append(network)
            first, second = [m.out_features for m in network.modules() if isinstance(m, nn.Linear)][:2]
            return 10.0 * -(-first // 8) + 0.2 * second

    cost = Blocks(counted, x, batch=1)
    budget = MeasuredBudget(counted, cost, 24.5, x)  # two blocks, and 22 of the second layer
    with caplog.at_level(logging.WARNING):
        budget.meet()
    assert budget.reached == pytest.approx(24.5, rel=0.02)
    widths = [int((g.median() > 0).sum()) for g in counted.gates]
    assert 8 < widths[0] <= 16
    sizes = [tuple(m.out_features for m in n.modules() if isinstance(m, nn.Linear)) for n in measured]
    assert len(set(sizes)) == len(sizes)  # none is measured twice
    assert "the nearest that was found" not in caplog.text


@pytest.mark.parametrize("target", [21.0, 25.0])
def test_widths_between_those_that_a_model_tells_apart_are_tried(target, caplog):
    torch.manual_seed(0)
    x = torch.ones(1, 6)
    network = gate(nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 2)), x)
    counted = Accountant(network, x)
    counted.gates[0].log_alpha.data = torch.linspace(-3, 3, 32)
    measured = []

    class Flat(Megabytes):
        counted = False

        def measure(self, network, target=math.nan):
            width = next(m.out_features for m in network.modules() if isinstance(m, nn.Linear))
            measured.append(width)
            return float(width)

        def exact(self):
            return 16.0 * -(-int((counted.gates[0].median() > 0).sum()) // 16)

    with caplog.at_level(logging.WARNING):
        budget = MeasuredBudget(counted, Flat(counted, x, batch=1), target, x)
        budget.meet()
    assert budget.reached == target == int((counted.gates[0].median() > 0).sum())
    assert bool((counted.gates[0].median()[-int(target) :] > 0).all())  # the likeliest ones
    assert len(measured) < 12
    assert "the nearest that was found" not in caplog.text


@pytest.mark.costly
@pytest.mark.parametrize("runtime", ["eager", "onnxruntime"])
def test_milliseconds(accountant, runtime, tmp_path, monkeypatch):
    if runtime == "onnxruntime":
        for package in ("onnx", "onnxscript", "onnxruntime"):
            pytest.importorskip(package)
    monkeypatch.setenv(CACHE, str(tmp_path))
    monkeypatch.setattr("sparsereg.compression.timing.measured._SECONDS", 0.01)
    monkeypatch.setattr("sparsereg.compression.timing.measured._SESSIONS", (2, 4))
    counted, x = accountant
    cost = Milliseconds(counted, x, runtime, threads=1, batch=8)
    assert len(list(tmp_path.rglob("*.json"))) == 1
    with pytest.raises(InputError, match=rf"target_latency_ms=1e-09: .* \({runtime}, 1 thread, batch 8\)"):
        MeasuredBudget(counted, cost, 1e-9, x)
    assert cost.full > 0
    # The model agrees with what was measured of the whole network.
    for gate_ in counted.gates:
        with torch.no_grad():
            gate_.log_alpha.fill_(50)
    if cost.full > cost.floor:
        assert cost.exact() == pytest.approx(cost.full)
        assert cost.expected().item() == pytest.approx(cost.full, rel=1e-6)
    small = compact(counted.model, x)
    assert cost.measure(small) > 0


def test_sessions_go_on_until_the_median_is_known_or_off():
    steady = [1.0, 1.001, 0.999, 1.0]
    wild = [1.0, 1.1, 0.9, 1.05]
    assert not _enough(steady[:3], math.nan)  # too few to know how far they scatter
    assert _enough(steady, math.nan)
    assert not _enough(wild, math.nan)
    assert not _enough(wild, 1.1)  # may be what is wanted
    assert _enough(wild, 2.0)  # cannot be
    assert _enough(wild * 6, math.nan)  # enough is enough


def test_a_network_is_timed_in_memory_of_its_own():
    network = nn.Linear(4, 2)
    loaders = Loaders(torch.ones(1, 4), 1)
    seen = []
    network.register_forward_hook(lambda module, *_: seen.append(module.weight.data_ptr()))
    with torch.inference_mode():
        for _ in range(2):
            loaded = loaders.anew(network, "eager")
            loaded.run(loaded.prepare(torch.ones(1, 4)))
    assert network.weight.data_ptr() not in seen
    assert len(seen) == 2


def test_a_runtime_that_is_not_there_is_named(accountant, monkeypatch):
    counted, x = accountant
    monkeypatch.setattr("sparsereg.compression.timing.runtimes.find_spec", lambda name: None)
    with pytest.raises(InputError, match="runtime=openvino needs the package onnx: pip install"):
        Milliseconds(counted, x, "openvino", 1, 1)
