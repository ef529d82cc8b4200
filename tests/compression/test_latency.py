import pytest
import torch
from torch import nn

from sparsereg.compression import benchmark
from tests.compression.networks import make


class Waits(nn.Module):
    """Takes a known time for every example."""

    def __init__(self, seconds):
        super().__init__()
        self.seconds = seconds

    def forward(self, x):
        import time

        time.sleep(self.seconds * len(x))
        return x


def test_medians_speedups_and_order():
    models = {"slow": Waits(0.004), "fast": Waits(0.002)}
    found = benchmark(models, torch.zeros(1, 2), batch_sizes=(1, 3), repeats=5)
    assert [(r.model, r.batch) for r in found.rows] == [("slow", 1), ("fast", 1), ("slow", 3), ("fast", 3)]
    for row in found.rows:
        wanted = models[row.model].seconds * row.batch
        assert wanted <= row.low <= row.seconds <= row.high
    assert found.rows[0].speedup == 1
    assert found.rows[3].speedup == pytest.approx(2, rel=0.5)
    assert "torch" in found.table()
    assert len(found.table().splitlines()) == 6
    assert list(found.to_frame()["runtime"]) == ["eager"] * 4


def test_modes_come_back_and_the_plot_is_a_file(tmp_path):
    network, x = make("residual")
    network.train()
    network.norm.eval()
    found = benchmark({"n": network}, x, batch_sizes=(2,), repeats=1, channels_last=True)
    assert network.training
    assert not network.norm.training
    path = found.plot(tmp_path / "latency.png")
    assert path.read_bytes()[:4] == b"\x89PNG"
    assert found.rows[0].low == found.rows[0].high


def test_onnxruntime():
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    network, x = make("mlp")
    found = benchmark({"gated": network}, x, batch_sizes=(1, 5), runtimes=("onnxruntime",), repeats=2)
    assert [r.batch for r in found.rows] == [1, 5]


def test_wrong_arguments():
    with pytest.raises(ValueError, match="eager, compiled, onnxruntime, got 'jit'"):
        benchmark({"a": nn.Identity()}, torch.zeros(1), runtimes=("jit",))
    with pytest.raises(ValueError, match="at least one network"):
        benchmark({}, torch.zeros(1))
