"""What a user sees at the terminal: a line at the start, a bar of three figures, the path at the end."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios

import pytest
import torch

from sparsereg.training.progress_bar import figures

from .conftest import ROOT, last_of_each


def at_a_terminal(command, folder, columns=80):
    """Run a script at a pseudo-terminal and return all that was on a line of it."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    told_otherwise = ("COLUMNS", "LINES")  # what workers of the tests are told of their own terminal
    environment = {name: value for name, value in os.environ.items() if name not in told_otherwise}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    script, *arguments = command
    process = subprocess.Popen(
        [sys.executable, str(ROOT / script), *arguments],
        cwd=folder, env=environment, stdout=theirs, stderr=subprocess.PIPE, stdin=theirs,
    )  # fmt: skip
    os.close(theirs)
    said = b""
    while True:
        try:
            part = os.read(ours, 4096)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        said += part
    os.close(ours)
    told = process.stderr.read().decode()
    process.stderr.close()
    assert process.wait() == 0, told
    return [line for line in re.split(r"[\r\n]+", said.decode()) if line.strip()], told


@pytest.mark.costly
def test_a_run_at_a_terminal_shows_three_figures_in_its_width(tmp_path, images, tiny):
    given = [*tiny, "model=lenet300", "trainer.max_epochs=2", "trainer.enable_progress_bar=true"]
    lines, told = at_a_terminal(["train.py", *last_of_each(tuple(given))], tmp_path, 60)
    bars = [line for line in lines if "%|" in line]
    assert max(map(len, bars)) <= 60
    epoch = r"^epoch 2/2 .* loss [\d.]+, acc [\d.]+%, sparsity [\d.]+%$"
    assert re.search(epoch, "\n".join(bars), re.M), bars
    assert bars[0].startswith("epoch 1/2")
    assert any(line.startswith("test") for line in bars)
    assert not any(line.startswith("error:") for line in lines + told.splitlines())
    assert [line for line in lines if line.startswith("results: ")]


def test_the_first_line_says_what_runs_where(run, tiny):
    given = [*tiny, "model=lenet300", "trainer.max_epochs=1", "trainer.enable_progress_bar=true"]
    trained = run("train", *given)
    assert trained.code == 0, trained.err
    assert "%|" not in trained.out + trained.err
    assert len(trained.out.splitlines()) < 14
    line = next(line for line in trained.err.splitlines() if "parameters," in line)
    assert re.fullmatch(
        r"lenet300: [\d,]+ parameters, [\d,]+ gates; data npz; on cpu \(\d+ threads\); files in \S+version_0",
        line,
    ), line
    parameters = int(line.split()[1].replace(",", ""))
    assert parameters == trained.results["parameters"]
    tested = run("test", f"ckpt_path={trained.last}", "trainer=cpu")
    assert re.search(r"lenet300: .* gates; data npz; on cpu .* outputs/test/version_0", tested.err)


@pytest.mark.parametrize(
    ("metrics", "text"),
    [
        ({}, ""),
        ({"train_loss": torch.tensor(2.5), "train_acc": torch.tensor(0.5)}, "loss 2.500, acc 50.0%"),
        (
            {"train_loss": 12345.0, "val_acc": 1.0, "train_acc": 0.5, "exact_sparsity": 0.9996},
            "loss 1.234e+04, acc 100.0%, sparsity 100.0%",
        ),
    ],
)
def test_figures(metrics, text):
    assert figures(metrics) == text


@pytest.mark.costly
def test_a_calibration_at_a_terminal(tmp_path):
    settings = ["problem.households=300", "problem.targets=60", "plots=false", "tensorboard=false",
                "holdout.groups=null", "num_households=40", "epochs=20", "method=pruning"]  # fmt: skip
    lines, told = at_a_terminal(["calibrate.py", *settings], tmp_path)
    bars = [line for line in lines if "%|" in line]
    assert max(map(len, bars)) <= 80
    assert re.search(r"loss \S+, error [\d.]+%, kept [\d,]+$", "\n".join(bars), re.M)
    assert re.search(r"60 targets, 300 households, .*; keep 40 by pruning; on cpu; files in \S+", told)
