"""Long work of the library says on a terminal what it does, and nothing elsewhere."""

import io
import logging
import sys

import pytest
import pytorch_lightning as pl
import torch
import tqdm
from pytorch_lightning.callbacks import TQDMProgressBar
from torch import nn
from torch.utils.data import DataLoader

import sparsereg
from sparsereg.compression import export
from sparsereg.compression.timing.measured import Milliseconds
from sparsereg.compression.timing.times import CACHE
from sparsereg.progress import bar, doing, showing


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch):
    """A terminal in place of stderr, on which each step shows."""
    real, stderr = tqdm.tqdm, Terminal()
    at_once = {"file": stderr, "mininterval": 0, "miniters": 1}
    monkeypatch.setattr(tqdm, "tqdm", lambda **given: real(**given, **at_once))
    return stderr


@pytest.fixture
def microseconds(monkeypatch, tmp_path):
    """The same time in each run: a number of a network counts as a microsecond."""
    monkeypatch.setenv(CACHE, str(tmp_path))
    monkeypatch.setattr(Milliseconds, "measure", lambda self, network, target=0.0: in_ms(network))
    monkeypatch.setattr(Milliseconds, "_of_all", lambda self: in_ms(net()))


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 100), nn.ReLU(), nn.Linear(100, 4)).eval()


def in_ms(network: nn.Module) -> float:
    return 1e-3 * sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize(("shown", "said"), [(True, True), (False, False)])
def test_bars_are_for_those_who_want_them(terminal, shown, said):
    with showing(shown), bar("work", "step", None) as steps:
        steps.set_postfix_str("1 ms")
        steps.update(1)
    assert ("work" in terminal.getvalue()) == said


def test_bars_are_for_terminals(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with bar("work", "step", None) as steps, doing("more"):
        steps.update(1)
    assert sys.stderr.getvalue() == ""


def test_other_processes_of_a_machine_show_none(terminal, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    with doing("work"):
        assert terminal.getvalue() == ""


def test_a_line_stands_until_it_is_done_and_none_within_it(terminal):
    with doing("outer"):
        assert "outer ..." in terminal.getvalue()
        with doing("inner"), showing(True), bar("innermost", "step", 3):
            assert "inner" not in terminal.getvalue()
    with doing("next"):
        assert "next" in terminal.getvalue()


def test_messages_stand_above_a_bar(terminal, monkeypatch):
    monkeypatch.setattr(sys, "stderr", terminal)
    handler = logging.StreamHandler(terminal)
    logging.getLogger().addHandler(handler)
    try:
        with bar("work", "step", 3):
            logging.getLogger("sparsereg").warning("a message")
    finally:
        logging.getLogger().removeHandler(handler)
    assert "a message" in terminal.getvalue().replace("\r", "\n").split("\n")


def test_gates_compaction_and_files_say_what_they_do(terminal, tmp_path):
    x = torch.ones(2, 8)
    gated = sparsereg.gate(net(), x)
    small = sparsereg.compact(gated, x)
    export(small, x, tmp_path / "net.pt2")
    for what in ("looking for what can go of Sequential", "compacting Sequential", "writing net.pt2"):
        assert what in terminal.getvalue()


ASKED = {"target_latency_ms": 0.5 * in_ms(net()), "runtime": "eager"}
SAID = ("timing layers", "measuring the whole network", "measuring networks")


@pytest.mark.costly
@pytest.mark.parametrize("progress", [True, False])
def test_one_shot_to_milliseconds_says_what_it_does(terminal, microseconds, progress):
    sparsereg.shrink(net(), torch.randn(64, 8), **ASKED, progress=progress)
    for what in (*SAID, "what layers read", "order of units", "repair", "compacting"):
        assert (what in terminal.getvalue()) == progress


@pytest.mark.parametrize("progress", [True, False])
def test_a_loop_of_ones_own_says_what_it_does(terminal, microseconds, progress):
    sparsifier = sparsereg.Sparsifier(net(), torch.ones(2, 8), steps=1, **ASKED, progress=progress)
    sparsifier.finish()
    for what in (*SAID, "looking for what can go", "compacting"):
        assert (what in terminal.getvalue()) == progress


class Module(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = net().train()

    def training_step(self, batch):
        return self.net(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3)


@pytest.mark.costly
@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, True),
        ({"enable_progress_bar": False}, False),
        ({"callbacks": [TQDMProgressBar(refresh_rate=0)]}, False),
    ],
)
def test_under_lightning_bars_are_there_where_its_own_are(terminal, microseconds, tmp_path, given, said):
    sparsify = sparsereg.Sparsify(**ASKED, save=False)
    callbacks = [sparsify, *given.get("callbacks", [])]
    trainer = pl.Trainer(
        **{
            **{"max_epochs": 1, "accelerator": "cpu", "logger": False, "enable_checkpointing": False},
            **{"enable_model_summary": False, "default_root_dir": tmp_path},
            **given,
            "callbacks": callbacks,
        }
    )
    trainer.fit(Module(), DataLoader(torch.randn(8, 8), batch_size=4, num_workers=0))
    assert sparsify.compacted is not None
    for what in (*SAID, "compacting"):
        assert (what in terminal.getvalue()) == said
