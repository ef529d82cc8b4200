"""What counts as a violation."""

import pytest

from . import oracle
from .process import Outcome

GOOD = Outcome(2, "", "error: lambda_l0=-1: expected a number >= 0\n", 0.1)


@pytest.mark.parametrize(
    ("outcome", "said"),
    [
        (GOOD, None),
        (Outcome(2, "", "digits: 5 images\n" + GOOD.err, 0.1), "something stands before"),
        (Outcome(2, "", "10 images\nnetwork; files in outputs/x\n" + GOOD.err, 0.1), None),
        (Outcome(2, "", GOOD.err * 2, 0.1), "2 lines"),
        (Outcome(2, "", "usage: train.py\n", 0.1), "0 lines"),
        (Outcome(1, "", "failed: TypeError", 0.1), "exit code 1"),
        (Outcome(139, "", "", 0.1), "exit code 139"),
        (Outcome(0, "done\n", "", 0.1), "no `results:` line"),
        (Outcome(0, "results: nowhere.json\n", "", 0.1), "not there"),
        (Outcome(2, "", GOOD.err + "Traceback (most recent call last):\n", 0.1), "traceback"),
        (Outcome(137, "", "", 90, timed_out=True), "hangs"),
        (Outcome(2, "", GOOD.err, 0.1, left=True), "left running"),
    ],
)
def test_the_oracle_sees_every_wrong_end(outcome, said, tmp_path):
    found = oracle.violations(outcome, ["lambda_l0=-1"], tmp_path)
    assert (said is None and not found) or any(said in f for f in found)


def test_the_oracle_knows_what_was_required(tmp_path):
    (tmp_path / "results.json").write_text("{}")
    missed = Outcome(3, "results: results.json\n", "short: ess is 3\n", 0.1)
    assert oracle.violations(missed, ["require.ess=4"], tmp_path) == []
    assert oracle.violations(missed, [], tmp_path) == ["exit code 3"]
    silent = Outcome(3, "results: results.json\n", "", 0.1)
    assert oracle.violations(silent, ["require.ess=4"], tmp_path) == ["exit code 3 without a word"]


def test_the_oracle_sees_files(tmp_path):
    outputs = tmp_path / "outputs"
    outputs.mkdir()
    (outputs / "weights.csv").write_text("id,weight\nh1,-0.5\n=1+1,2\n")
    (outputs / ".last-x1.ckpt").write_text("")
    (tmp_path / "CANARY").write_text("")
    found = oracle.violations(GOOD, [], tmp_path)
    assert len(found) == 3
    assert oracle.changed({"weights.csv": b"id\n", "gone.json": b""}, outputs) == [
        "an earlier file has changed: weights.csv",
        "an earlier file is gone: gone.json",
    ]


@pytest.mark.parametrize(
    ("cell", "runs"),
    [
        ("-0.5", False),
        ("+1e3", False),
        ("=1", True),
        ("@x", True),
        ("-a", True),
        ("'=1", False),
        ("1,000", False),
    ],
)
def test_cells_that_a_spreadsheet_runs(cell, runs):
    assert (oracle.formula(f'a,b\n1,"{cell}"\n') is not None) == runs
