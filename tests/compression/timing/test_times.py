import itertools
import json

import numpy as np
import pytest
import torch

from sparsereg.compression import Accountant, compact, gate
from sparsereg.compression.timing import times
from sparsereg.compression.timing.runtimes import RUNTIMES, Loaded
from sparsereg.compression.timing.times import Clock, Grid, Layer, _points
from sparsereg.compression.timing.widths import Widths
from sparsereg.distributions import HardConcrete
from tests.compression.networks import make, set_gates

CONV = Layer("conv", 20, 12, (6, 6), (3, 3), (1, 1), (1, 1))


def test_a_grid_is_linear_between_its_points_and_has_that_gradient():
    seconds = np.array([[0.0, 0.0, 0.0], [0.0, 1.0, 2.0], [0.0, 3.0, 8.0]])
    grid = Grid((0, 2, 4), (0, 1, 3), seconds)
    for i, n in enumerate(grid.inputs):
        for j, m in enumerate(grid.outputs):
            assert float(grid.at(torch.tensor(float(n)), torch.tensor(float(m)))) == seconds[i, j]
    inputs, outputs = torch.tensor(3.0, requires_grad=True), torch.tensor(2.0, requires_grad=True)
    found = grid.at(inputs, outputs)
    assert found.item() == pytest.approx((1 + 2 + 3 + 8) / 4)
    found.backward()
    assert float(inputs.grad) == pytest.approx(((3 + 8) / 2 - (1 + 2) / 2) / 2)
    assert float(outputs.grad) == pytest.approx(((2 + 8) / 2 - (1 + 3) / 2) / 2)


def test_calls_that_were_interrupted_do_not_count(monkeypatch):
    switches = iter([0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1])
    taken = iter([1.0, 1.0, 2.0, 9.0, 5.0, 1.0, 2.0, 2.0, 1.0, 1.0])
    monkeypatch.setattr(times, "_interruptions", lambda: next(switches))
    monkeypatch.setattr(times, "seconds_of", lambda *_: next(taken))
    loaded = Loaded(lambda x: x, lambda x: x, lambda x: (x,))
    # The fourth call was interrupted, and the fifth found what others had left: neither counts.
    # The first has nothing before it that is known.
    assert times.seconds_in_a_row(loaded, None, 1, seconds=25.0) == 1.0
    with pytest.raises(StopIteration):
        next(taken)


def test_where_all_calls_were_interrupted_all_count(monkeypatch):
    switches = itertools.count()
    monkeypatch.setattr(times, "_interruptions", lambda: next(switches))
    monkeypatch.setattr(times, "seconds_of", lambda *_: 3.0)
    loaded = Loaded(lambda x: x, lambda x: x, lambda x: (x,))
    assert times.seconds_in_a_row(loaded, None, 1, seconds=1.0) == 3.0


@pytest.mark.parametrize("width", [1, 2, 7, 10, 64, 100, 1000])
def test_points_reach_from_one_to_the_whole_on_multiples_of_eight(width):
    points = _points(width)
    assert points == sorted(set(points))
    assert points[0] == 1
    assert points[-1] == width
    assert all(n % 8 == 0 for n in points if 16 <= n < width)


@pytest.mark.parametrize("runtime", ["eager", "onnxruntime", "openvino"])
@pytest.mark.parametrize(
    "layer",
    [
        CONV,
        Layer("linear", 20, 12, (3,)),
        Layer("conv", 8, 8, (5,), (3,), (2,), (1,), groups=8),
        Layer("conv", 8, 12, (4, 4), (3, 3), (1, 1), (2, 2), groups=4),
    ],
)
def test_layers_are_timed_once_and_never_faster_when_wider(layer, runtime, tmp_path, monkeypatch):
    for package in RUNTIMES[runtime]:
        pytest.importorskip(package)
    clock = Clock(runtime, 1, 2, tmp_path)
    grid = clock.grid(layer)
    assert (np.diff(grid.seconds, axis=0) >= 0).all()
    assert (np.diff(grid.seconds, axis=1) >= 0).all()
    assert grid.seconds[0].max() == 0  # nothing is read: nothing is computed
    clock.save()
    monkeypatch.setattr(Clock, "_seconds", lambda *a: pytest.fail("timed again"))
    again = Clock(runtime, 1, 2, tmp_path).grid(layer)
    assert np.array_equal(again.seconds, grid.seconds)


def test_what_a_cache_does_not_say_plainly_is_measured_again(tmp_path, monkeypatch):
    monkeypatch.setattr(Clock, "_seconds", lambda self, layer, i, o: 1e-3 * i * o)
    clock = Clock("eager", 1, 1, tmp_path)
    wanted = clock.grid(CONV).seconds
    clock.save()
    good = json.loads(clock.file.read_text())
    for spoilt in (
        "{",
        json.dumps({**good, "machine": "another"}),
        json.dumps({**good, "seconds": dict.fromkeys(good["seconds"], [[float("nan")]])}),
        json.dumps({**good, "seconds": dict.fromkeys(good["seconds"], "fast")}),
        json.dumps({**good, "seconds": {"[": [[1.0]]}}),
    ):
        clock.file.write_text(spoilt)
        assert np.array_equal(Clock("eager", 1, 1, tmp_path).grid(CONV).seconds, wanted)


@pytest.mark.costly
@pytest.mark.parametrize("name", ["googlenet", "resnet18", "mobilenet_v2", "lenet300", "mlp", "gated by us"])
def test_widths_are_those_of_the_compacted_network(name):
    if name == "gated by us":
        x = torch.randn(1, 3, 8, 8)
        convs = [torch.nn.Conv2d(3, 16, 3), torch.nn.ReLU(), torch.nn.Conv2d(16, 8, 3), torch.nn.Flatten()]
        network = gate(torch.nn.Sequential(*convs, torch.nn.Linear(128, 5)), x)
    else:
        network, x = make(name)
    set_gates(network, "mixed")
    widths = Widths(Accountant(network, x))
    inputs, outputs = widths.exact()
    small = compact(network, x, check=False)
    kinds = (torch.nn.Conv2d, torch.nn.Linear)
    left = sorted(
        tuple(m.weight.shape[:2]) for m in small.modules() if isinstance(m, kinds) and not grouped(m)
    )
    found = [
        (int(o), int(i))
        for layer, i, o in zip(widths.layers, inputs, outputs, strict=True)
        if layer.groups == 1 and i > 0 and o > 0
    ]
    assert sorted(found) == left
    for g in network.modules():
        if isinstance(g, HardConcrete):
            with torch.no_grad():
                g.log_alpha.copy_(torch.where(g.median() > 0, 50.0, -50.0))
    for sure, expected in zip(widths.exact(), widths.expected(), strict=True):
        assert torch.allclose(sure.double(), expected.double(), atol=1e-6)


def grouped(module):
    return getattr(module, "groups", 1) > 1
