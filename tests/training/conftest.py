"""A small data set that a network can learn, and a way to call the scripts as a user does."""

import importlib
import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from sparsereg.compression.units import flow

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Outcome:
    """What a script did: exit code, output, and the results it wrote."""

    code: int
    out: str
    err: str

    @property
    def path(self) -> Path:
        last = self.out.strip().splitlines()[-1]
        assert last.startswith("results: "), last
        return Path(last.removeprefix("results: "))

    @property
    def folder(self) -> Path:
        return self.path.parent

    @property
    def last(self) -> Path:
        return self.folder / "checkpoints" / "last.ckpt"

    @property
    def results(self) -> dict[str, Any]:
        return json.loads(self.path.read_text())

    def weights(self) -> dict[str, torch.Tensor]:
        return torch.load(self.last, weights_only=True)["state_dict"]


def write_images(path: Path, num: int = 96, channels: int = 3, size: int = 8) -> Path:
    """Images whose class is the brighter half: left, right, top."""
    rng = np.random.default_rng(0)
    arrays = {}
    for part, n in (("train", num), ("test", 30)):
        labels = (np.arange(n) % 3).astype(np.uint8)
        images = rng.integers(0, 100, (n, size, size, channels), dtype=np.uint8)
        half = size // 2
        images[labels == 0, :, :half] += 120
        images[labels == 1, :, half:] += 120
        images[labels == 2, :half] += 120
        arrays[f"{part}_images"], arrays[f"{part}_labels"] = images, labels
    np.savez(path, **arrays)
    return path


def last_of_each(arguments: tuple[str, ...]) -> list[str]:
    """Leave out values that a later one replaces, which the scripts refuse."""
    last = {a.partition("=")[0]: i for i, a in enumerate(arguments)}
    return [a for i, a in enumerate(arguments) if i == last[a.partition("=")[0]]]


_place, _placed = flow.place, {}


def traced_once(model: nn.Module, args: Any, kwargs: Any) -> Any:
    """Trace a network of the zoo once in all these tests, which take the trace of one that looks the same.

    A network keeps its trace for as long as it looks the same; here that holds from run to run. What networks
    of the users' own look like is not known well enough.
    """
    if any(type(m).__module__.partition(".")[0] not in ("sparsereg", "torch") for m in model.modules()):
        return _place(model, args, kwargs)
    looks = flow._looks(model, args, kwargs)
    if looks not in _placed:
        _placed[looks] = _place(model, args, kwargs)
    return _placed[looks]


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file that tests only read."""
    return write_images(tmp_path_factory.mktemp("images") / "images.npz")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    """Call a script in this process: run("train", "lambda_l0=1", ...); the last value of a key counts."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SPARSEREG_RUN_FOLDER", raising=False)
    monkeypatch.setattr(flow, "place", traced_once)

    def call(name: str, *arguments: str) -> Outcome:
        command = importlib.import_module(f"sparsereg.commands.{name}")
        monkeypatch.setattr(sys, "argv", [str(ROOT / f"{name}.py"), *last_of_each(arguments)])
        capfd.readouterr()
        code = 0
        try:
            command.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capfd.readouterr()
        return Outcome(code, captured.out, captured.err)

    return call


_trained: dict[tuple[str, ...], tuple[Outcome, Path]] = {}


@pytest.fixture
def trained_once(run, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory):
    """Train a network that several tests start from: the first time it is asked for, then it is a copy."""

    def call(*arguments: str) -> Outcome:
        if arguments not in _trained:
            outcome, kept = run("train", *arguments), tmp_path_factory.mktemp("trained")
            assert outcome.code == 0, outcome.err
            _trained[arguments] = outcome, shutil.copytree("outputs", kept / "outputs")
            return outcome
        outcome, kept = _trained[arguments]
        shutil.copytree(kept, tmp_path / "outputs")
        return outcome

    return call


@pytest.fixture
def tiny(images: Path) -> list[str]:
    """Arguments of a training run of seconds."""
    return [
        "data=npz",
        f"data.path={images}",
        "data.batch_size=16",
        "data.val_size=24",
        "data.augment.flip=false",
        "data.augment.crop_scale=[0.8,1.0]",
        "trainer=cpu",
        "trainer.enable_progress_bar=false",
        "callbacks.batch_norm.num_images=32",
        "callbacks.batch_norm.batch_size=16",
    ]
