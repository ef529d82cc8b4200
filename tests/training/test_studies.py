"""Tables of results: a study runs its sweeps, averages over seeds, and says which job failed."""

import sys
from pathlib import Path

import pandas as pd
import pytest

from .conftest import ROOT

sys.path.insert(0, str(ROOT))

from benchmarks import results
from sparsereg.errors import InputError

QUICK = ("model=lenet300", "data=digits", "data.image_size=8", "trainer=cpu", "trainer.max_epochs=1")


def test_summary_is_mean_and_standard_deviation_over_seeds():
    frame = pd.DataFrame(
        {
            "curve": ["a", "a", "b"],
            "target_sparsity": [0.5, 0.5, None],
            "lambda_l0": [None, None, 1.0],
            "val_acc": [None, None, 0.92],
            "test_acc": [0.98, 0.96, 0.9],
            "compacted_parameters": [10, 20, 30],
            "exact_sparsity": [0.5, 0.5, 0.1],
            "compacted_macs": [5, 5, 9],
            "open_gates_of": [{"x": 3, "y": 4}, {"x": 1, "y": 1}, {f"blocks.{i}": 2 for i in range(21)}],
        }
    )
    table = results.summary(frame)
    assert table["runs"].tolist() == [2, 1]
    assert table["test error %"].tolist() == ["3.00 +- 1.41", "10.00"]
    assert table["validation error %"].tolist() == ["-", "8.00"]
    assert table["parameters"].tolist() == ["15 +- 7", "30"]
    assert table["open gates (first seed)"].tolist() == ["3-4", "42"]


@pytest.mark.slow
def test_study_runs_its_sweeps_and_draws_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sweeps = {"some": (*QUICK, "target_sparsity=0.5", "seed=0,1")}
    study = results.Study("digits", sweeps, "exact_sparsity", "digits")
    frame = results.run(study, {})
    (sweep,) = Path("outputs").glob("train/multirun/*/sweep.csv")
    pd.testing.assert_frame_equal(results.read_sweep(sweep, "some"), frame)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="stand where train.py was started"):
        results.read_sweep(tmp_path / sweep, "some")
    assert frame["exact_sparsity"].between(0.5, 0.51).all()
    assert frame["open_gates_of"].iloc[0].keys() == {"input_gate", "hidden_gate1", "hidden_gate2"}
    results.plot(frame, study, Path("study.png"))
    assert Path("study.png").stat().st_size > 1000


@pytest.mark.slow
def test_failed_job_is_said(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    wrong = results.Study("digits", {"some": (*QUICK, "target_sparsity=2", "seed=0")}, "exact_sparsity", "")
    with pytest.raises(RuntimeError, match="'some' failed"):
        results.run(wrong, {})


def test_every_study_names_experiments_that_there_are():
    names = {p.stem for p in (ROOT / "configs" / "experiment").glob("*.yaml")}
    for study in results.STUDIES.values():
        for overrides in study.sweeps.values():
            named = [o.partition("=")[2] for o in overrides if o.startswith("experiment=")]
            assert set(named) <= names


def test_plot_of_a_table_has_a_line_for_each_kind_of_row(tmp_path, monkeypatch):
    drawn = []

    def draw(figure, path, **settings):
        drawn.append(figure)
        path.touch()

    monkeypatch.setattr(results.Figure, "savefig", draw)
    frame = pd.DataFrame(
        {
            "curve": ["target", "target", "baseline"],
            "target_sparsity": [0.8, 0.4, None],
            "exact_sparsity": [0.8, 0.4, 0.0],
            "test_acc": [0.7, 0.9, 0.8],
        }
    )
    study = results.Study("digits", {}, "exact_sparsity", "t", published=((0.5, 0.85),))
    results.plot(frame, study, tmp_path / "t.png")
    lines = {line.get_label(): line.get_xydata().tolist() for line in drawn[0].axes[0].lines}
    assert lines["target"] == [[0.4, 90.0], [0.8, 70.0]]
    assert lines["baseline"] == [[0.0, 80.0]]
    assert lines["published by the predecessor"] == [[0.5, 85.0]]
