"""Two processes on the CPU give what one process gives at the same global batch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from .conftest import ROOT


def train(folder: Path, *arguments: str) -> Path:
    """Call train.py in a process of its own and return its run folder."""
    folder.mkdir()
    environment = {k: v for k, v in os.environ.items() if k != "SPARSEREG_RUN_FOLDER"} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "train.py"), *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return (folder / done.stdout.strip().splitlines()[-1].removeprefix("results: ")).parent


@pytest.mark.slow
def test_two_processes_are_one_with_twice_the_batch(tmp_path, images, tiny):
    # 72 training images in batches of 32: the last batch is shared unevenly between the two.
    common = [a for a in tiny if "batch_size" not in a and a != "trainer=cpu"]
    common += ["callbacks.batch_norm.batch_size=16", "trainer.max_epochs=2", "model.gate=all"]
    common += ["trainer.accelerator=cpu", "data.limit_train_images=71"]
    one = train(tmp_path / "one", *common, "data.batch_size=32")
    two = train(tmp_path / "two", *common, "data.batch_size=16", "trainer=ddp", "trainer.accelerator=cpu")
    assert [p.name for p in two.parent.iterdir()] == ["version_0"]
    results = [json.loads((folder / "results.json").read_text()) for folder in (one, two)]
    assert results[0]["test_acc"] == pytest.approx(results[1]["test_acc"], abs=0.04)
    assert results[0]["L_C0"] == pytest.approx(results[1]["L_C0"], abs=1e-4)
    weights = [torch.load(f / "checkpoints/last.ckpt", weights_only=True)["state_dict"] for f in (one, two)]
    assert weights[0].keys() == weights[1].keys()
    for key, value in weights[0].items():
        if value.is_floating_point():
            torch.testing.assert_close(weights[1][key], value, rtol=2e-2, atol=2e-3, msg=key)
