"""Long work of the library says on a terminal what it does, and nothing elsewhere."""

import io
import sys

import pytest
import torch
import tqdm
from torch import nn

import sparsereg
from sparsereg.compression.timing.measured import Milliseconds
from sparsereg.compression.timing.times import CACHE
from sparsereg.progress import bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def at_once(monkeypatch):
    """Bars do not wait for the first second."""
    real = tqdm.tqdm
    monkeypatch.setattr(
        tqdm, "tqdm", lambda **given: real(**{**given, "delay": 0, "mininterval": 0, "miniters": 1})
    )


@pytest.mark.parametrize(
    ("stream", "shown", "said"),
    [(Terminal, True, True), (Terminal, False, False), (io.StringIO, True, False)],
)
def test_bars_are_for_terminals(monkeypatch, at_once, stream, shown, said):
    monkeypatch.setattr(sys, "stderr", stream())
    with bar("work", "step", None, shown) as steps:
        steps.set_postfix_str("1 ms")
        steps.update(1)
    assert ("work" in sys.stderr.getvalue()) == said


@pytest.mark.costly
@pytest.mark.parametrize("progress", [True, False])
def test_one_shot_to_milliseconds_says_what_it_does(monkeypatch, at_once, tmp_path, progress):
    monkeypatch.setenv(CACHE, str(tmp_path))
    monkeypatch.setattr(sys, "stderr", Terminal())
    # The same each time: a number counts as a microsecond.
    net = nn.Sequential(nn.Linear(8, 100), nn.ReLU(), nn.Linear(100, 4)).eval()
    monkeypatch.setattr(Milliseconds, "measure", lambda self, network, target=0.0: microseconds(network))
    monkeypatch.setattr(Milliseconds, "_of_all", lambda self: microseconds(net))
    how = {"runtime": "eager", "progress": progress}
    sparsereg.shrink(net, torch.randn(64, 8), target_latency_ms=0.5 * microseconds(net), **how)
    said = sys.stderr.getvalue()
    for what in ("timing layers", "measuring networks", "repair"):
        assert (what in said) == progress


def microseconds(net: nn.Module) -> float:
    return 1e-3 * sum(p.numel() for p in net.parameters())
