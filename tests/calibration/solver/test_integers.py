"""Whole weights: totals kept as well as whole numbers can, bounds kept exactly."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from sparsereg.calibration import CalibrationProblem, calibrate
from sparsereg.calibration.reading.synthetic import synthetic_problem
from sparsereg.calibration.solver.integers import whole_weights
from sparsereg.errors import InputError

ANY = (0.0, np.inf)


def whole(problem, weights, low=0.0, high=np.inf):
    n = problem.num_households
    return whole_weights(problem, weights, np.full(n, low), np.full(n, high))


def test_by_hand_every_total_of_a_table_is_kept():
    """Four cells of two households each, 1.5 or 2.5 a household: sums by row and column are whole."""
    cells = np.repeat(np.eye(4), 2, axis=1)
    rows = np.array([[1, 1, 0, 0], [0, 0, 1, 1], [1, 0, 1, 0], [0, 1, 0, 1.0]]) @ cells
    weights = np.array([1.5, 1.5, 2.5, 2.5, 0.5, 1.5, 2.5, 3.5])
    problem = CalibrationProblem(sp.csr_array(rows), rows @ weights, np.ones(8))
    found = whole(problem, weights)
    assert (found == np.round(found)).all()
    assert (np.abs(found - weights) < 1).all()
    assert (rows @ found).tolist() == (rows @ weights).tolist() == [8.0, 8.0, 5.0, 11.0]


def test_weights_that_are_whole_stay():
    problem = CalibrationProblem(sp.csr_array(np.ones((1, 4))), np.array([10.0]), np.ones(4))
    assert whole(problem, np.array([1.0, 2.0, 3.0 + 1e-12, 4.0])).tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize("total", [3.0, 3.4, 3.6])
def test_the_sum_of_the_weights_is_rounded(total):
    problem = CalibrationProblem(sp.csr_array(np.ones((1, 7))), np.array([3.0]), np.ones(7))
    assert whole(problem, np.full(7, total / 7)).sum() == round(total)


def test_swaps_keep_totals_far_better_than_rounding_each():
    problem = synthetic_problem(4000, 150, 0, 0.0)
    problem = replace(problem, initial_weights=problem.starting_weights / 50)
    weights = calibrate(replace(problem, targets=problem.targets / 50), method="calibrate").weights
    found = whole(problem, weights)

    def missed(w):
        return np.abs(problem.matrix @ (w - weights) / problem.scale).max()

    assert missed(found) < 0.5 * missed(np.round(weights))
    assert found.sum() == round(weights.sum())
    assert (np.abs(found - weights) < 1).all()
    assert np.array_equal(found, whole(problem, weights))


@pytest.mark.parametrize("distance", ["linear", "raking", "logit"])
def test_hard_bounds_stay(distance):
    rng = np.random.default_rng(0)
    initial = 2 + 20 * rng.random(400)
    matrix = sp.csr_array((rng.random((6, 400)) < 0.4) * 1.0)
    problem = CalibrationProblem(matrix, matrix @ (initial * (0.8 + 0.5 * rng.random(400))), initial)
    how = {"method": "calibrate", "distance": distance, "bounds": (0.6, 1.5), "weights": "integer"}
    result = calibrate(problem, **how)
    ratio = result.weights / initial
    assert (result.weights == np.round(result.weights)).all()
    assert ratio.min() >= 0.6
    assert ratio.max() <= 1.5
    assert np.abs(result.estimates - problem.targets).max() < 3
    assert np.abs(problem.estimates(result.real_weights) - problem.targets).max() < 1e-6
    assert result.to_frame().weight.dtype == np.int64


def test_bounds_without_a_whole_number_are_named():
    problem = CalibrationProblem(
        sp.csr_array(np.ones((1, 2))), np.array([2.7]), np.array([1.3, 1.4]), ids=["a", "b"]
    )
    with pytest.raises(
        InputError, match="no whole number lies within the bounds of 2 households: those of a "
    ):
        calibrate(problem, method="calibrate", bounds=(0.9, 1.1), weights="integer")


def test_of_a_number_to_keep_nobody_leaves():
    problem = synthetic_problem(600, 40, 0, 0.0)
    scaled = replace(problem, initial_weights=problem.starting_weights / 6000, targets=problem.targets / 6000)
    result = calibrate(scaled, 80, weights="integer")
    assert result.num_kept == 80
    assert result.weights[result.selected].min() >= 1
    assert (result.weights == np.round(result.weights)).all()


def test_a_cap_on_the_ratio_stays():
    problem = synthetic_problem(600, 40, 0, 0.0)
    result = calibrate(problem, 200, max_weight_ratio=6.0, weights="integer")
    assert (result.weights <= 6.0 * problem.starting_weights).all()


def test_persons_of_a_real_survey_are_kept_to_a_few():
    """eusilc: 6,000 households, persons counted by region, age and sex, weights near 1,400."""
    table = pd.read_csv(Path(__file__).parents[1] / "reference" / "eusilc.csv.gz")
    counts = [c for c in table.columns if re.fullmatch(r"x\d+", c)]
    asked, table = table.iloc[0], table.iloc[1:]
    matrix = sp.csr_array(table[counts].to_numpy(dtype=np.float64).T)
    problem = CalibrationProblem(
        matrix, np.round(asked[counts].to_numpy(dtype=np.float64)), table.weight.to_numpy()
    )
    real = calibrate(problem, method="calibrate", distance="raking")
    result = calibrate(problem, method="calibrate", distance="raking", weights="integer")
    each, swapped = (problem.estimates(w) - problem.targets for w in (np.round(real.weights), result.weights))
    assert np.abs(swapped).max() <= 8 < 10 < np.abs(each).max()  # 1, 4 or 5, as the last digits fall
    assert (np.abs(result.weights - real.weights) < 1).all()
