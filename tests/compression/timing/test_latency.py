import time

import pytest
import torch
from torch import nn

from sparsereg.compression import benchmark, export
from sparsereg.compression.timing.latency import Timing
from sparsereg.compression.timing.rounding import fastest_rounding
from sparsereg.compression.timing.runtimes import RUNTIMES, Loaders, batch_of, default_runtime
from sparsereg.compression.verify import difference
from sparsereg.errors import InputError
from tests.compression.networks import make, set_gates


class Works(nn.Module):
    """Computes for a known time for every example."""

    def __init__(self, seconds):
        super().__init__()
        self.seconds = seconds

    def forward(self, x):
        end = time.process_time() + self.seconds * len(x)
        while time.process_time() < end:
            pass
        return x


def test_medians_speedups_and_order():
    models = {"slow": Works(0.004), "fast": Works(0.002)}
    found = benchmark(models, torch.zeros(1, 2), batch_sizes=(1, 3), runtimes=["eager"], repeats=5)
    assert [(r.model, r.batch) for r in found.rows] == [("slow", 1), ("fast", 1), ("slow", 3), ("fast", 3)]
    for row in found.rows:
        wanted = models[row.model].seconds * row.batch
        assert wanted <= row.low <= row.seconds <= row.high
    assert found.rows[0].speedup == 1
    assert found.rows[3].speedup == pytest.approx(2, rel=0.5)
    assert "torch" in found.table()
    assert len(found.table().splitlines()) == 6
    assert list(found.to_frame()["runtime"]) == ["eager"] * 4


def test_small_networks_are_told_apart():
    rows = [Timing("n", "eager", 1, s, s, s, runs=3, speedup=1.0).text for s in (1.2e-5, 1.4e-5, 0.0123)]
    assert [row.split()[3] for row in rows] == ["0.0120", "0.0140", "12.30"]


def test_modes_come_back_and_the_plot_is_a_file(tmp_path):
    network, x = make("residual")
    network.train()
    network.norm.eval()
    found = benchmark({"n": network}, x, batch_sizes=(2,), runtimes=["eager"], repeats=1, channels_last=True)
    assert network.training
    assert not network.norm.training
    path = found.plot(tmp_path / "latency.png")
    assert path.read_bytes()[:4] == b"\x89PNG"
    assert found.rows[0].low == found.rows[0].high


@pytest.mark.costly
@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_networks_and_files_in_other_runtimes(runtime, tmp_path):
    for package in RUNTIMES[runtime]:
        pytest.importorskip(package)
    network, x = make("mlp")
    files = {suffix: export(network, x, tmp_path / f"n{suffix}") for suffix in (".onnx", ".pt2")}
    steps = []
    found = benchmark(
        {"gated": network, **files}, x, batch_sizes=(1, 5), runtimes=[runtime], repeats=2, threads=1,
        on_step=steps.append,
    )  # fmt: skip
    assert [(r.model, r.batch) for r in found.rows] == [(n, b) for b in (1, 5) for n in ("gated", ".onnx")]
    assert steps == [f"gated for {runtime}", f".onnx for {runtime}"]
    assert "1 thread," in found.settings


@pytest.mark.costly
@pytest.mark.parametrize(
    "runtime", ["eager", pytest.param("compiled", marks=pytest.mark.slow), "onnxruntime", "openvino"]
)
def test_every_runtime_gives_the_answers_of_the_network(runtime):
    for package in RUNTIMES[runtime]:
        pytest.importorskip(package)
    network, x = make("mlp")
    network.eval()
    loaders = Loaders(x, threads=1)
    loaded = loaders.load(network, runtime)
    with torch.inference_mode():
        (found,) = loaded.tensors(loaded.run(loaded.prepare(batch_of(x, 3))))
    assert difference(network(batch_of(x, 3)).detach(), found) < 1e-4


def test_rows_are_told_as_they_are_measured_and_the_time_is_kept():
    told = []
    models = {"a": Works(0.01), "b": Works(0.01)}
    found = benchmark(
        models, torch.zeros(1, 2), batch_sizes=(1, 2), runtimes=["eager"], seconds=0.2, on_row=told.append
    )
    assert tuple(told) == found.rows
    assert all(1 <= row.runs <= 5 for row in found.rows)  # 0.1 s for rounds of 0.02 s and 0.04 s


class FakeClock:
    """A clock that stands still unless it is told to go on."""

    now = 0.0

    def perf_counter(self):
        return self.now

    process_time = perf_counter


class Cold(nn.Module):
    """Takes ten times as long behind another network, which has emptied its caches."""

    last = None

    def __init__(self, clock, seconds):
        super().__init__()
        self.clock, self.seconds = clock, seconds

    def forward(self, x):
        self.clock.now += self.seconds * (1 if Cold.last is self else 10)
        Cold.last = self
        return x


@pytest.mark.parametrize(("seconds", "times"), [(0.001, 1), (0.1, 10)])
def test_what_another_network_left_in_the_caches_does_not_count(monkeypatch, seconds, times):
    clock = FakeClock()
    for module in ("latency", "times"):
        monkeypatch.setattr(f"sparsereg.compression.timing.{module}.time", clock)
    models = {"large": Cold(clock, 2 * seconds), "small": Cold(clock, seconds)}
    found = benchmark(models, torch.zeros(1, 2), batch_sizes=(1,), runtimes=["eager"], repeats=3, seconds=99)
    # Of a network that takes long there is one call in a turn, and it counts.
    assert [r.seconds for r in found.rows] == pytest.approx([2 * seconds * times, seconds * times])
    assert [r.runs for r in found.rows] == [3, 3]


class Interrupted(nn.Module):
    """Stands still, as where another program has the processor."""

    def forward(self, x):
        time.sleep(0.02)
        return x


@pytest.mark.parametrize(("threads", "counts"), [(1, False), (2, True)])
def test_what_other_programs_take_counts_not_where_one_thread_computes(threads, counts):
    found = benchmark(
        {"a": Interrupted()},
        torch.zeros(1, 2),
        batch_sizes=(1,),
        runtimes=["eager"],
        threads=threads,
        repeats=3,
    )
    assert (found.rows[0].seconds > 0.01) == counts
    assert ("processor time" in found.settings) != counts


def test_one_run_counts_however_short_the_time():
    found = benchmark({"a": Works(0.001)}, torch.zeros(1, 2), runtimes=["eager"], seconds=1e-9)
    assert [row.runs for row in found.rows] == [1, 1]


def test_wrong_arguments(monkeypatch):
    with pytest.raises(ValueError, match="eager, compiled, onnxruntime, openvino, got 'jit'"):
        benchmark({"a": nn.Identity()}, torch.zeros(1), runtimes=("jit",))
    with pytest.raises(ValueError, match="at least one network"):
        benchmark({}, torch.zeros(1))
    monkeypatch.setattr("sparsereg.compression.timing.runtimes.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"runtime=openvino needs the package onnx: pip install .* openvino"):
        benchmark({"a": nn.Identity()}, torch.zeros(1), runtimes=("openvino",))
    assert default_runtime() == "eager"


def test_the_fastest_rounding_is_found_by_the_clock():
    network, x = make("residual")
    set_gates(network, "mixed")
    made = {}

    def slow_unless_four(small, multiple):
        made[multiple] = sum(p.numel() for p in small.parameters())
        return Works(0.001 if multiple == 4 else 0.004)

    best, rows = fastest_rounding(
        network, x, runtimes=["eager"], batch_sizes=(1,), seconds=0.2, make=slow_unless_four
    )
    assert best == 4
    assert {int(row.model) for row in rows} == set(made)
    assert made[4] > made[1]  # channels were kept
