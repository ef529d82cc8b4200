"""kill -9 while the problem is built, and while it is solved: what goes on ends with the same bits."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
GIVEN = (
    "problem.households=6000", "problem.targets=600", "num_households=700", "plots=false",
    "tensorboard=false", "checkpoint_seconds=0", "holdout.groups=null",
)  # fmt: skip


def started(folder, *more):
    folder.mkdir(exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, str(ROOT / "calibrate.py"), *GIVEN, *more], cwd=folder, env=environment,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def weights(folder, *more):
    process = started(folder, *more)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return (folder / out.rsplit("results: ")[1].strip()).parent.joinpath("weights.csv").read_bytes()


def kill(process):
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL


@pytest.mark.slow
@pytest.mark.parametrize("method", ["pruning", "hard_concrete"])
def test_a_killed_run_goes_on_to_the_same_bits(tmp_path, method):
    more = (f"method={method}", "epochs=300")
    whole = weights(tmp_path / "whole", *more)
    building = started(tmp_path / "killed", *more)
    time.sleep(2.0)  # nothing is there to continue: the same command begins anew
    kill(building)
    solving = started(tmp_path / "killed", *more)
    deadline = time.monotonic() + 200
    while not (found := list((tmp_path / "killed").glob("outputs/calibrate/version_*/checkpoint.pt"))):
        assert time.monotonic() < deadline, "no checkpoint was written"
        assert solving.poll() is None, "it ended without a checkpoint"
        time.sleep(0.01)
    time.sleep(0.3)
    if solving.poll() is None:
        kill(solving)
    assert found[0].exists(), "it ended before it could be killed"
    assert weights(tmp_path / "killed", *more, f"ckpt_path={found[0]}") == whole
