"""A run that is stopped and resumed is the run that was not."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from .conftest import ROOT


def assert_same_weights(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    for key, value in one.items():
        assert torch.equal(value, other[key]), key


@pytest.mark.parametrize("gated", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_two_and_two_epochs_are_four(run, tiny, gated):
    gates = ["temperature=exponential", "model.gate=all"] if gated else ["without_using_gate=true"]
    four = run("train", *tiny, *gates, "trainer.max_epochs=4")
    two = run("train", *tiny, *gates, "trainer.max_epochs=2")
    os.environ.pop("SPARSEREG_RUN_FOLDER", None)
    resume = [f"ckpt_path={two.last}", "resume_training=true", "trainer.max_epochs=4"]
    resumed = run("train", *resume, f"without_using_gate={str(not gated).lower()}")
    assert resumed.code == 0, resumed.err
    assert resumed.folder != two.folder
    assert_same_weights(four.weights(), resumed.weights())
    assert resumed.results["test_acc"] == four.results["test_acc"]
    assert resumed.results["epochs"] == 4
    optimizer = torch.load(four.last, weights_only=True)["optimizer_states"][0]["state"]
    for i, state in torch.load(resumed.last, weights_only=True)["optimizer_states"][0]["state"].items():
        assert all(torch.equal(v, optimizer[i][k]) for k, v in state.items())


@pytest.mark.costly
def test_the_same_seed_gives_the_same_run(run, tiny):
    one = run("train", *tiny, "trainer.max_epochs=1", "seed=3")
    two = run("train", *tiny, "trainer.max_epochs=1", "seed=3")
    other = run("train", *tiny, "trainer.max_epochs=1", "seed=4")
    assert one.folder != two.folder
    assert_same_weights(one.weights(), two.weights())
    assert not torch.equal(one.weights()["net.classifier.weight"], other.weights()["net.classifier.weight"])


@pytest.mark.slow
def test_resume_after_kill_in_the_middle_of_an_epoch(run, tiny, tmp_path):
    whole = run("train", *tiny, "trainer.max_epochs=4")
    assert whole.code == 0, whole.err
    folder = whole.folder.parent / "version_1"
    command = [sys.executable, str(ROOT / "train.py"), *tiny, "trainer.max_epochs=400"]
    environment = {k: v for k, v in os.environ.items() if k != "SPARSEREG_RUN_FOLDER"}
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.DEVNULL)
    last = folder / "checkpoints" / "last.ckpt"
    wait_for(lambda: last.is_file(), 120)
    time.sleep(0.5)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = torch.load(last, weights_only=True)["epoch"] + 1
    until = done + 1
    straight = run("train", *tiny, f"trainer.max_epochs={until}")
    resumed = run("train", f"ckpt_path={last}", "resume_training=true", f"trainer.max_epochs={until}")
    assert resumed.code == 0, resumed.err
    assert_same_weights(straight.weights(), resumed.weights())


def wait_for(condition, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def test_nothing_left_to_train_is_said(run, tiny):
    done = run("train", *tiny, "trainer.max_epochs=1")
    again = run("train", f"ckpt_path={done.last}", "resume_training=true")
    assert again.code == 2
    assert "larger trainer.max_epochs" in again.err


@pytest.mark.costly
def test_best_checkpoint_survives_a_resume(run, tiny):
    two = run("train", *tiny, "trainer.max_epochs=2")
    resumed = run("train", f"ckpt_path={two.last}", "resume_training=true", "trainer.max_epochs=3")
    best = Path(resumed.folder) / "checkpoints" / "best.ckpt"
    assert best.is_file()
    assert resumed.results["val_acc"] is not None


@pytest.mark.costly
def test_the_best_checkpoint_is_tested_when_asked_for(run, tiny):
    outcome = run("train", *tiny, "trainer.max_epochs=3", "test_checkpoint=best")
    assert outcome.code == 0, outcome.err
    assert outcome.results["checkpoint"].endswith("best.ckpt")
    tested = run("test", f"ckpt_path={outcome.results['checkpoint']}")
    assert tested.results["val_acc"] == outcome.results["val_acc"]
    assert tested.results["test_acc"] == outcome.results["test_acc"]


def test_training_without_validation_images(run, tiny):
    outcome = run(
        "train", *[a for a in tiny if "val_size" not in a], "data.val_size=0", "trainer.max_epochs=1"
    )
    assert outcome.code == 0, outcome.err
    assert outcome.results["val_acc"] is None
    assert outcome.results["test_acc"] is not None
