import math

import numpy as np
import pandas as pd
import pytest

from sparsereg.calibration.measures import measure
from sparsereg.calibration.problem import CalibrationProblem
from sparsereg.calibration.reporting import tables as report
from sparsereg.calibration.reporting.plots import plot_all
from sparsereg.calibration.reporting.recorder import Recorder
from sparsereg.calibration.weight_table import weight_frame
from sparsereg.table_file import write_table


def problem():
    matrix = np.array([[1, 1, 0, 0], [0, 1, 2, 0], [0, 0, 0, 5], [1, 0, 0, 0]], dtype=float)
    return CalibrationProblem(
        matrix, [4, -2, 10, 0], [1, 2, 3, 4], target_groups=["a", "a", "b", "b"], ids=["p", "q", "r", "s"]
    )


def test_the_measures_are_their_definitions():
    w = np.array([1.0, 2.0, 0.0, 0.0])
    m = measure(problem(), w)
    errors = [1 / 4, 2.0, 1.0]  # the target of 0 has no relative error
    assert m["mean_are"] == pytest.approx(np.mean(errors))
    assert m["median_are"] == pytest.approx(1.0)
    assert m["max_are"] == pytest.approx(2.0)
    assert (m["within_1pct"], m["within_10pct"], m["zero_targets"]) == (0.0, 0.0, 1)
    assert (m["kept"], m["households"], m["targets"], m["untouched_targets"]) == (2, 4, 4, 1)
    assert m["ess"] == pytest.approx(9 / 5)
    assert m["design_effect"] == pytest.approx(2 / (9 / 5))
    assert (m["max_weight"], m["median_weight"], m["total_weight"], m["initial_total_weight"]) == (
        2,
        1.5,
        3,
        10,
    )
    assert m["max_ratio"] == 1.0
    equal = measure(problem(), np.full(4, 7.0))
    assert equal["ess"] == pytest.approx(4)
    assert equal["design_effect"] == pytest.approx(1)


def test_negative_entries_do_not_hide_a_touched_target():
    p = CalibrationProblem(np.array([[1.0, -1, 0], [0, 0, 1]]), [1, 1])
    assert measure(p, np.array([1.0, 1, 0]))["untouched_targets"] == 1


def test_all_targets_zero_and_no_household_kept_give_no_nan():
    p = CalibrationProblem(np.ones((2, 3)), [0, 0])
    m = measure(p, np.zeros(3))
    assert m["mean_are"] is None
    assert (m["kept"], m["ess"], m["design_effect"], m["max_ratio"]) == (0, 0.0, None, None)


def test_tables_read_back_exactly(tmp_path):
    p, w = problem(), np.array([1 / 3, 0, 1e-9, 12345.678901234567])
    for name in ("w.csv", "w.parquet"):
        write_table(tmp_path / name, weight_frame(p, w))
        read = pd.read_csv if name.endswith("csv") else pd.read_parquet
        back = read(tmp_path / name)
        assert back.columns.tolist() == ["id", "initial_weight", "weight"]
        assert back.id.tolist() == ["p", "r", "s"]
        assert back.weight.tolist() == [1 / 3, 1e-9, 12345.678901234567]
    write_table(tmp_path / "t.csv", report.target_frame(p, w))
    back = pd.read_csv(tmp_path / "t.csv")
    assert back.columns.tolist() == [
        "name", "group", "target", "initial", "estimate", "relative_error", "error", "scale", "scaled_error",
        "households", "ess",
    ]  # fmt: skip
    np.testing.assert_array_equal(back.estimate, p.estimates(w))
    assert math.isnan(back.relative_error[3])  # an empty cell
    assert back.relative_error[1] == pytest.approx((2e-9 + 2) / 2)
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_the_log_has_a_row_per_moment_and_target_and_is_thinned(monkeypatch):
    p = problem()
    moments = [(10 * i, 1 / (i + 1), np.full(4, float(i))) for i in range(9)]
    frame = report.log_frame(p, moments)
    assert frame.columns.tolist() == [
        "epoch", "loss", "target_name", "target", "estimate", "error", "abs_error", "rel_abs_error",
    ]  # fmt: skip
    assert len(frame) == 36
    row = frame[(frame.epoch == 80) & (frame.target_name == "target_1")].iloc[0]
    assert (row.error, row.abs_error, row.rel_abs_error) == (10, 10, 5)
    monkeypatch.setattr(report, "_LOG_ROWS", 12)
    assert report.log_frame(p, moments).epoch.unique().tolist() == [0, 40, 80]


def test_groups_and_worst_targets():
    p = problem()
    frame = report.target_frame(p, np.array([1.0, 2.0, 0.0, 0.0]))
    groups = report.group_frame(frame).set_index("group")
    assert groups.targets.tolist() == [2, 2]
    assert groups.mean_are["a"] == pytest.approx((1 / 4 + 2) / 2)
    assert groups.mean_are["b"] == 1.0
    assert groups.initial_mean_are["a"] == pytest.approx((1 / 4 + 5) / 2)
    worst = report.worst_targets(frame, 3)
    assert [w["name"] for w in worst] == ["target_3", "target_1", "target_2"]
    assert worst[0]["relative_error"] is None  # a target of 0


@pytest.mark.costly
@pytest.mark.parametrize("targets", [[4, -2, 10, 0], [4, 2, 10, 3], [0, 0, 0, 0]])
def test_pictures_are_drawn_for_all_signs(tmp_path, targets):
    p = CalibrationProblem(problem().matrix, targets)
    w = np.array([1.0, 2.0, 0.5, 0.0])
    history = [{"epoch": i, "loss": 1 / (i + 1), "mean_are": 0.1, "kept": 3} for i in range(3)]
    paths = plot_all(tmp_path, report.target_frame(p, w), weight_frame(p, w), history)
    assert [path.name for path in paths] == ["errors.png", "targets.png", "weights.png", "progress.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)


def test_the_recorder_keeps_history_moments_and_events(tmp_path):
    p = problem()
    with Recorder(p, tmp_path, moments=4, bar=False) as recorder:
        for epoch in range(0, 100, 5):
            recorder.record(epoch, 100, 1.0, 3, np.ones(4))
        recorder.finish(0.5, np.array([1.0, 2.0, 0, 0]))
    assert [m[0] for m in recorder.totals] == [0, 25, 50, 75, 96]
    np.testing.assert_array_equal(recorder.totals[-1][2], [3, 2, 0, 1])
    assert len(recorder.history) == 21
    assert recorder.history[-1]["kept"] == 2
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path)).Reload()
    assert set(events.Tags()["scalars"]) == {"fit/loss", "errors/mean_are", "weights/kept"}
    assert [e.value for e in events.Scalars("weights/kept")][-1] == 2
