import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import scipy
import torch

import sparsereg
from sparsereg.calibration.command.requirements import REQUIREMENTS, judged
from sparsereg.calibration.config import CalibrationRun, Require
from sparsereg.errors import FellShort, InputError
from sparsereg.settings import declared, read, value_at
from tests.calibration.command.test_run import SMALL, run, tables

SCRIPT = Path(__file__).parents[3] / "calibrate.py"


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.costly
def test_every_requirement_is_a_setting_and_a_figure_of_the_results():
    assert set(REQUIREMENTS) == set(declared(Require))
    _, results = run(*SMALL)
    _, exact = run(
        *tables(), "num_households=null", "method=calibrate", "variance=linearized", "report.variables=[x]"
    )
    for wanted in REQUIREMENTS.values():
        assert value_at(results | exact, wanted.figure) is not None, wanted


def test_a_figure_at_its_limit_is_enough():
    results = {"max_abs_scaled_error": 0.01, "ess": 500.0, "holdout": {"mean_are": 0.2}}
    rows = judged(Require(max_error=0.01, ess=500, held_out_error=0.2), results)
    assert [row["met"] for row in rows] == [True] * 3


def test_a_figure_that_there_is_not_was_not_reached():
    (row,) = judged(Require(held_out_error=0.2), {"holdout": None})
    assert not row["met"]
    assert row["text"] == "holdout.mean_are is not known; require.held_out_error=0.2 asks for at most that"


@pytest.mark.costly
def test_a_run_that_falls_short_has_its_files_and_says_what_is_missing():
    with pytest.raises(FellShort) as short:
        run(*SMALL, "require.ess=1e6", "require.within_10pct=0.01", "require.max_ratio=1")
    results = json.loads(short.value.results.read_text())
    assert (short.value.results.parent / "weights.csv").is_file()
    assert {row["key"]: row["met"] for row in results["required"]} == {
        "within_10pct": True, "ess": False, "max_ratio": False,
    }  # fmt: skip
    assert len(short.value.shortfalls) == 2
    assert "require.ess=1000000 asks for at least that" in short.value.shortfalls[0]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"require": {"eses": 3}}, "unknown key 'require.eses': did you mean 'require.ess'?"),
        ({"require": {"ess": -1}}, "require.ess=-1: expected a number >= 0"),
        ({"require": {"within_10pct": 90}}, "require.within_10pct=90: expected a share in [0, 1]"),
        (
            {"require": {"max_cv": 0.1}},
            "require.max_cv needs variance=linearized and report.variables=[...]",
        ),
        (
            {"require": {"held_out_error": 0.1}, "holdout": {"groups": None}},
            "require.held_out_error needs a hold-out: holdout.folds=5, for example",
        ),
    ],
)
def test_requirements_that_cannot_be_meant_are_refused(given, said):
    with pytest.raises(InputError, match="require") as error:
        read(CalibrationRun, given)
    assert str(error.value).startswith(said)


@pytest.mark.costly
def test_a_command_that_falls_short_ends_with_exit_code_3(tmp_path):
    arguments = [*SMALL, "method=random", "holdout.groups=null", "require.ess=1e6", "require.max_error=0"]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 3
    assert done.stdout.splitlines()[-1] == "results: outputs/calibrate/version_0/results.json"
    short = [line for line in done.stderr.splitlines() if line.startswith("short: ")]
    assert "error:" not in done.stderr
    assert [line.partition(" is ")[0] for line in short] == [
        "short: max_abs_scaled_error", "short: ess",
    ]  # fmt: skip


@pytest.mark.slow
def test_a_sweep_with_a_job_that_falls_short_ends_with_exit_code_3(tmp_path):
    arguments = ["-m", *SMALL, "method=random", "holdout.groups=null", "require.ess=0,1e6"]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 3, done.stderr
    table = next(tmp_path.glob("outputs/calibrate/multirun/*/sweep.csv")).read_text().splitlines()
    assert [line.split(",")[1] for line in table[1:]] == ["finished", "short"]
    said = [line for line in done.stderr.splitlines() if line.startswith("short: ")]
    assert len(said) == 1
    assert said[0].startswith("short: 1 of 2 jobs fell short of what was required: job 1 (")
    assert "error:" not in done.stderr
    assert all(line.endswith("results.json") for line in table[1:])


def test_results_say_where_they_come_from(monkeypatch):
    arguments = [*tables(), "holdout.groups=null"]
    monkeypatch.setattr(sys, "argv", ["/some/where/calibrate.py", *arguments, "a b"])
    _, results = run(*arguments)
    told = results["provenance"]
    assert [(row["key"], row["path"], row["sha256"]) for row in told["inputs"]] == [
        (f"problem.{key}", file, hashlib.sha256(Path(file).read_bytes()).hexdigest())
        for key, file in (("households", "H.csv"), ("targets", "T.csv"))
    ]
    assert told["command"].startswith("calibrate.py problem=households problem.households=H.csv")
    assert told["command"].endswith("'a b'")
    ours = {m.__name__: m.__version__.partition("+")[0] for m in (sparsereg, numpy, scipy, torch)}
    assert ours.items() <= told["versions"].items()
    assert told["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
