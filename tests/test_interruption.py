"""Every command that is asked to end says in one line how to continue, and leaves the signal's exit code."""

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

ROOT = Path(__file__).resolve().parents[1]
CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}
TRAIN = ["train.py", "trainer=cpu", "data=digits", "model=lenet300", "trainer.enable_progress_bar=false",
         "logger=none", "data.batch_size=256"]  # fmt: skip
CALIBRATE = ["calibrate.py", "plots=false", "tensorboard=false", "holdout.groups=null",
             "problem.households=300", "problem.targets=60"]  # fmt: skip


def start(folder: Path, *arguments: str) -> "subprocess.Popen[str]":
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / arguments[0]), *arguments[1:]]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=pipe, stderr=pipe, text=True)


def end(
    process: "subprocess.Popen[str]", number: signal.Signals, when: Callable[[], bool]
) -> tuple[str, str]:
    """Send a signal as soon as something is there; return stdout and the one line after "interrupted"."""
    while not when() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(number)
    out, err = process.communicate()
    assert process.returncode == CODES[number], err
    lines = err.splitlines()
    assert lines[-1].startswith("interrupted; to continue: "), err
    assert err.count("interrupted") == 1
    assert "Traceback" not in err
    return out, lines[-1].removeprefix("interrupted; to continue: ")


def go_on(folder: Path, command: str) -> Path:
    """Run the command that continues; return the folder with its results."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(shlex.split(command), cwd=folder, env=environment, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    return folder / Path(done.stdout.splitlines()[-1].removeprefix("results: ")).parent


def exists(folder: Path, pattern: str) -> Callable[[], bool]:
    return lambda: any(folder.glob(pattern))


@pytest.mark.slow
@pytest.mark.parametrize("number", list(CODES), ids=lambda n: n.name)
def test_training_goes_on_from_the_last_finished_epoch(tmp_path, number):
    process = start(tmp_path, *TRAIN, "trainer.max_epochs=15")
    _, command = end(process, number, exists(tmp_path, "outputs/train/**/last.ckpt"))
    assert command.endswith("version_0/checkpoints/last.ckpt resume_training=true")
    if number is signal.SIGTERM:
        assert (go_on(tmp_path, command) / "results.json").is_file()


@pytest.mark.slow
def test_a_start_that_is_interrupted_is_started_again(tmp_path):
    process = start(tmp_path, *TRAIN, "trainer.max_epochs=1")
    time.sleep(0.3)
    _, command = end(process, signal.SIGTERM, lambda: True)
    assert shlex.split(command)[-len(TRAIN) :] == [*TRAIN[1:], "trainer.max_epochs=1"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda n: n.name)
def test_a_calibration_ends_where_it_would_have_ended(tmp_path, number):
    settings = [*CALIBRATE, "method=hard_concrete", "num_households=60", "epochs=300", "checkpoint_seconds=0"]
    process = start(tmp_path, *settings)
    _, command = end(process, number, exists(tmp_path, "outputs/calibrate/version_0/checkpoint.pt"))
    assert command.endswith("ckpt_path=outputs/calibrate/version_0/checkpoint.pt")
    resumed = go_on(tmp_path, command)
    whole = go_on(tmp_path, shlex.join([sys.executable, str(ROOT / settings[0]), *settings[1:]]))
    assert (resumed / "weights.csv").read_bytes() == (whole / "weights.csv").read_bytes()


@pytest.mark.slow
def test_what_a_sweep_has_finished_is_in_its_table(tmp_path):
    sweep = [*CALIBRATE, "-m", "num_households=50,60,70,80,90,100"]
    process = start(tmp_path, *sweep)
    _, command = end(process, signal.SIGTERM, exists(tmp_path, "outputs/calibrate/multirun/*/sweep.png"))
    (folder,) = tmp_path.glob("outputs/calibrate/multirun/*")
    before = pd.read_csv(folder / "sweep.csv")
    assert before["status"].tolist()[0] == "finished"
    assert len(before) < 6
    again = pd.read_csv(go_on(tmp_path, command) / "sweep.csv")
    assert again["status"].tolist()[0] == "skipped"
    assert again["kept"].tolist() == [50, 60, 70, 80, 90, 100]


@pytest.mark.slow
def test_processes_of_one_run_end_together(tmp_path):
    alone = [a for a in TRAIN if not a.startswith(("trainer=", "trainer.max_epochs="))]
    process = start(tmp_path, *alone, "trainer=ddp", "trainer.accelerator=cpu", "trainer.max_epochs=200")
    _, command = end(process, signal.SIGTERM, exists(tmp_path, "outputs/train/**/last.ckpt"))
    assert command.endswith("last.ckpt resume_training=true")


def test_a_destructor_that_is_interrupted_is_quiet_and_the_process_ends(tmp_path):
    (tmp_path / "slow.py").write_text(
        """
import time
from pathlib import Path
from sparsereg.interruption import guard

class Slow:
    def __del__(self):
        Path("begun").touch()
        time.sleep(30)

with guard():
    thing = Slow()
    del thing
    time.sleep(60)
"""
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "slow.py"]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=pipe, stderr=pipe, text=True)
    _, said = end(process, signal.SIGTERM, exists(tmp_path, "begun"))
    assert said.endswith("slow.py")


SLOW_TO_END = """
import time
from sparsereg.interruption import Interrupted, guard
with guard():
    try:
        print("ready", flush=True); time.sleep(60)
    except Interrupted:
        print("ending", flush=True); time.sleep(60)
"""
SWALLOWS = """
import time
from sparsereg import interruption
interruption._AGAIN_S = 0.1
with interruption.guard():
    try:
        print("ready", flush=True); time.sleep(60)
    except BaseException:
        pass
    time.sleep(60)
"""


@pytest.mark.parametrize("program", [SLOW_TO_END, SWALLOWS], ids=["a second Ctrl-C", "a library swallows it"])
def test_nothing_holds_an_end_up(program):
    pipe, environment = subprocess.PIPE, {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        if program is SLOW_TO_END:
            assert process.stdout.readline() == "ending\n"
            process.send_signal(signal.SIGINT)
        _, err = process.communicate()
    assert process.returncode == 130
    assert err.startswith("interrupted; to continue: ")
    assert "Traceback" not in err
