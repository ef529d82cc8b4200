import json
from pathlib import Path

import pandas as pd
import pytest

from sparsereg.calibration.command.compare import compare
from sparsereg.commands.calibrate import spelt_out
from sparsereg.commands.compare import calibrations
from sparsereg.errors import InputError


def a_run(folder, values, weights):
    folder.mkdir()
    targets = pd.DataFrame({"name": list(values), "target": values.values(), "estimate": values.values()})
    targets.to_csv(folder / "targets.csv", index=False)
    kept = pd.DataFrame({"id": list(weights), "initial_weight": 1.0, "weight": weights.values()})
    kept.to_csv(folder / "weights.csv", index=False)
    return folder


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one = a_run(tmp_path / "one", {"a": 100.0, "b": 5.0, "old": 1.0}, {"007": 1.0, "x": 2.0})
    two = a_run(tmp_path / "two", {"a": 110.0, "b": 5.0, "new": 1.0}, {"007": 3.0, "y": 2.0})
    return one, two


def test_who_moved_came_and_went(runs, capsys):
    path = compare(*runs)
    assert json.loads(path.read_text()) == {
        "runs": [str(run) for run in runs],
        "targets_stayed": 1, "targets_moved": 1, "targets_came": 1, "targets_went": 1,
        "households_stayed": 1, "households_came": 1, "households_went": 1,
    }  # fmt: skip
    targets = pd.read_csv(path.parent / "targets.csv").set_index("name")
    assert targets.fate.to_dict() == {"a": "moved", "b": "stayed", "new": "came", "old": "went"}
    assert targets.change["a"] == pytest.approx(0.1)
    households = pd.read_csv(path.parent / "households.csv", dtype={"id": str}).set_index("id")
    assert households.fate.to_dict() == {"007": "stayed", "x": "went", "y": "came"}
    assert "moved most   a (+10.00%)" in capsys.readouterr().out
    assert "targets      1 moved, 1 stayed, 1 came, 1 went" in calibrations([str(run) for run in runs])


def test_what_is_no_run_is_refused_and_nothing_is_written(runs):
    with pytest.raises(InputError, match=r"nowhere has no targets.csv: give the folders of two runs"):
        compare(runs[0], Path("nowhere"))
    assert not Path("outputs").exists()


def test_two_runs_are_a_list_to_hydra():
    assert spelt_out("compare=a/b,c d") == "compare=['a/b','c d']"
    assert spelt_out("compare=[a,b]") == "compare=[a,b]"
    assert spelt_out("compare=null") == "compare=null"
