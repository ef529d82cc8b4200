import numpy as np
import pytest

from sparsereg.calibration.holdout import hold_out, named_fold, random_folds, summarise
from sparsereg.calibration.problem import CalibrationProblem


def problem():
    rng = np.random.default_rng(0)
    groups = np.repeat(["a", "b", "c", "d"], [3, 1, 2, 4])
    return CalibrationProblem(rng.random((10, 30)), rng.random(10) * 20 + 5, target_groups=groups)


def test_folds_share_all_groups_out():
    p = problem()
    for folds in (2, 3, 4):
        parts = random_folds(p, folds, seed=0)
        assert len(parts) == folds
        assert sorted(g for part in parts for g in part) == ["a", "b", "c", "d"]
    assert random_folds(p, 2, seed=1) == random_folds(p, 2, seed=1)
    assert named_fold(p, ["b", "d"]) == [("b", "d")]


def test_left_out_targets_are_not_seen_and_are_measured():
    p = problem()
    seen = []

    def solve(part):
        seen.append(part)
        return np.full(part.num_households, 2.0)

    table = hold_out(p, [("a",), ("b", "d")], solve)
    assert [part.num_targets for part in seen] == [7, 5]
    assert set(seen[1].target_groups) == {"a", "c"}
    exact = p.matrix.toarray().astype(float)
    error = np.abs(exact @ np.full(30, 2.0) / p.targets - 1)
    first = np.abs(exact @ np.ones(30) / p.targets - 1)
    row = table[table.group == "d"].iloc[0]
    assert row.mean_are == pytest.approx(error[6:].mean())
    assert row.initial_mean_are == pytest.approx(first[6:].mean())
    assert row.fitted_mean_are == pytest.approx(error[[0, 1, 2, 4, 5]].mean())
    total = summarise(table)
    assert total["targets"] == 8
    assert total["mean_are"] == pytest.approx(error[[0, 1, 2, 3, 6, 7, 8, 9]].mean())


def test_cells_of_a_hundred_households_are_told_apart():
    rows = np.zeros((4, 300))
    for row, size in zip(rows, (300, 100, 99, 5), strict=True):
        row[:size] = 1.0
    p = CalibrationProblem(rows, [600.0, 400.0, 99.0, 50.0], target_groups=["a", "b", "a", "b"])
    total = summarise(hold_out(p, [("b",)], lambda part: np.ones(300)))
    assert total["large_targets"] == 1
    assert total["large_mean_are"] == pytest.approx(0.75)
    assert total["fitted_large_mean_are"] == pytest.approx(0.5)
    assert total["fitted_median_are"] == pytest.approx(0.25)
    assert total["mean_are"] == pytest.approx((0.75 + 0.9) / 2)


def test_a_group_of_zero_targets_has_no_relative_error():
    p = CalibrationProblem(np.ones((3, 4)), [0.0, 5.0, 5.0], target_groups=["z", "a", "b"])
    table = hold_out(p, [("z", "a")], lambda part: np.ones(4))
    assert table.mean_are.isna().tolist() == [True, False]
    assert summarise(table)["mean_are"] == pytest.approx(0.2)


def test_what_cannot_be_left_out_is_refused():
    p = problem()
    with pytest.raises(ValueError, match="no target has the group 'e'; there are a, b, c, d"):
        named_fold(p, ["e"])
    with pytest.raises(ValueError, match="all groups are left out"):
        named_fold(p, ["a", "b", "c", "d"])
    with pytest.raises(ValueError, match=r"holdout.folds must lie in \[2, 4\]"):
        random_folds(p, 5, seed=0)
    with pytest.raises(ValueError, match="holdout needs target groups"):
        random_folds(CalibrationProblem(np.ones((1, 2)), [1.0]), 2, seed=0)
