"""Two processes on the CPU give what one process gives at the same global batch."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from .conftest import ROOT


def train(folder: Path, *arguments: str) -> Path:
    """Call train.py in a process of its own and return its run folder."""
    folder.mkdir()
    environment = {k: v for k, v in os.environ.items() if k != "SPARSEREG_RUN_FOLDER"} | {
        "OMP_NUM_THREADS": "1"
    }
    command = [sys.executable, str(ROOT / "train.py"), *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return (folder / done.stdout.strip().splitlines()[-1].removeprefix("results: ")).parent


def scalars(folder: Path, name: str) -> list[float]:
    """The values of a scalar in a run's event files."""
    logging.getLogger("tensorboard").setLevel(logging.WARNING)
    events = EventAccumulator(str(folder))
    events.Reload()
    (tag,) = [tag for tag in events.Tags()["scalars"] if tag.endswith(f"/{name}") and "final" not in tag]
    return [s.value for s in events.Scalars(tag)]


@pytest.mark.slow
def test_two_processes_are_one_with_twice_the_batch(tmp_path, images, tiny):
    # 71 training images in global batches of 32, the last of 39 - 32 = 7 shared with the one before it, so
    # the two processes have unequal parts. Double precision and SGD: in float32
    # the order of a sum decides which side of a ReLU a value is on, and Adam makes a step of any gradient.
    common = [a for a in tiny if "batch_size" not in a and a != "trainer=cpu"]
    common += ["callbacks.batch_norm.batch_size=16", "trainer.max_epochs=2", "model.gate=all"]
    common += [
        "data.limit_train_images=71",
        "trainer.precision=64-true",
        "trainer.log_every_n_steps=1",
        "optimizer=sgd_cosine",
        "optimizer.lr=0.01",
    ]
    one = train(tmp_path / "one", *common, "trainer=cpu", "data.batch_size=32")
    two = train(tmp_path / "two", *common, "trainer=ddp", "trainer.accelerator=cpu", "data.batch_size=16")
    assert [p.name for p in two.parent.iterdir()] == ["version_0"]
    for name in ("L_C0", "val_acc", "val_loss", "train_acc"):
        assert scalars(two, name) == pytest.approx(scalars(one, name), rel=1e-6), name
    # A logged loss is the mean over processes, not over images: equal where the parts are.
    assert scalars(two, "train_loss")[0] == pytest.approx(scalars(one, "train_loss")[0], rel=1e-6)
    weights = [torch.load(f / "checkpoints/last.ckpt", weights_only=True)["state_dict"] for f in (one, two)]
    assert weights[0].keys() == weights[1].keys()
    for key, value in weights[0].items():
        if value.is_floating_point():
            torch.testing.assert_close(weights[1][key], value, rtol=1e-6, atol=1e-8, msg=key)
    results = [json.loads((folder / "results.json").read_text()) for folder in (one, two)]
    assert results[0]["test_acc"] == results[1]["test_acc"]


@pytest.mark.slow
@pytest.mark.parametrize("parts", [[], ["target.params=fc2:0.7", "target.round_to=4"]])
def test_target_and_finetuning_of_two_processes_are_those_of_one(tmp_path, images, tiny, parts):
    common = [a for a in tiny if "batch_size" not in a and a != "trainer=cpu"]
    common += ["callbacks.batch_norm.batch_size=16", "trainer.max_epochs=2", "finetune.epochs=1"]
    common += ["model=lenet300", "target_sparsity=0.5", "optimizer=sgd_cosine", "optimizer.lr=0.01"]
    common += ["data.limit_train_images=71", "trainer.precision=64-true", *parts]
    one = train(tmp_path / "one", *common, "trainer=cpu", "data.batch_size=32")
    two = train(tmp_path / "two", *common, "trainer=ddp", "trainer.accelerator=cpu", "data.batch_size=16")
    results = [json.loads((folder / "results.json").read_text()) for folder in (one, two)]
    for key in ("open_gates_of", "compacted_parameters", "exact_sparsity", "test_acc"):
        assert results[0][key] == results[1][key], key
    assert results[0]["lambda_target"] == pytest.approx(results[1]["lambda_target"], rel=1e-6)
    paths = [f / "checkpoints/last.ckpt" for f in (one, two)]
    weights = [torch.load(path, weights_only=True)["state_dict"] for path in paths]
    assert weights[0].keys() == weights[1].keys()
    for key, value in weights[0].items():
        if value.is_floating_point():
            torch.testing.assert_close(weights[1][key], value, rtol=1e-6, atol=1e-8, msg=key)
