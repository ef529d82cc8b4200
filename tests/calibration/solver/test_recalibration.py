"""Replicates: what a calibration from scratch finds, without asking a linear programme again."""

from dataclasses import replace

import numpy as np
import pytest

from sparsereg.calibration import CalibrationProblem, Design, calibrate
from sparsereg.calibration.solver import exact as exact_module
from sparsereg.calibration.solver.recalibration import Recalibration


def survey(seed=0, households=400, change=0.1, **more):
    rng = np.random.default_rng(seed)
    kind = rng.integers(0, 6, households)
    sizes = [rng.lognormal(size=households), rng.normal(size=households)]
    rows = np.stack([np.ones(households), *(kind == k for k in range(6)), *sizes]).astype(float)
    initial = rng.lognormal(sigma=0.3, size=households) * 10
    totals = rows @ (initial * (1 + change * rng.uniform(-1, 1, households)))
    return CalibrationProblem(rows, totals, initial, **more)


def times(seed, households):
    return np.random.default_rng(seed).multinomial(households, np.full(households, 1 / households))


@pytest.mark.parametrize("distance", ["linear", "raking", "logit"])
def test_weights_are_those_of_a_calibration_from_scratch(distance):
    prices = np.array([np.nan, np.nan, 3.0, *([np.nan] * 6)])
    problem = survey(target_weights=prices)
    settings = {"bounds": (0.4, 3.0), "unit_factor": np.random.default_rng(2).uniform(0.5, 2, 400)}
    result = calibrate(problem, method="calibrate", distance=distance, **settings)
    again = Recalibration(problem, result.exact, distance, **settings)
    for seed in range(3):
        initial = problem.starting_weights * times(seed, 400)
        there = initial > 0
        fresh = CalibrationProblem(
            problem.matrix[:, there], problem.targets, initial[there], target_weights=prices,
            target_scales=problem.scale,
        )  # fmt: skip
        factor = settings["unit_factor"][there]
        wanted = calibrate(
            fresh, method="calibrate", distance=distance, bounds=(0.4, 3.0), unit_factor=factor
        )
        found = again(initial)
        np.testing.assert_allclose(found[there], wanted.weights, rtol=1e-7)
        assert (found[~there] == 0).all()


def contradictory():
    base = survey(1)
    rows = np.vstack([base.matrix.toarray(), base.matrix.toarray()[1:7].sum(axis=0)])
    return CalibrationProblem(rows, [*base.targets, 2 * base.targets[0]], base.starting_weights)


def test_what_gave_way_in_the_sample_does_so_in_replicates_and_no_programme_is_asked(monkeypatch):
    problem = contradictory()
    result = calibrate(problem, method="calibrate")
    assert len(result.exact.gave_way) > 0
    assert np.isfinite(result.exact.prices[result.exact.gave_way]).all()
    monkeypatch.setattr(exact_module, "certify", lambda *_: pytest.fail("asked again"))
    same = Recalibration(problem, result.exact)(problem.starting_weights)
    np.testing.assert_allclose(same, result.weights, rtol=1e-9)
    replicates = result.replicates(Design("bootstrap", num_replicates=20))
    met = np.setdiff1d(np.arange(problem.num_targets), result.exact.gave_way)
    errors = problem.matrix.toarray()[met] @ replicates.weights / problem.targets[met, None] - 1
    assert np.abs(errors).max() < 1e-9


def test_a_target_that_nobody_is_left_for_does_not_spoil_the_others():
    base = survey(2)
    alone = np.zeros(400)
    alone[7] = 1.0
    rows = np.vstack([base.matrix.toarray(), alone])
    problem = CalibrationProblem(rows, [*base.targets, 12.0], base.starting_weights)
    result = calibrate(problem, method="calibrate")
    initial = problem.starting_weights.copy()
    initial[7] = 0.0
    found = Recalibration(problem, result.exact)(initial)
    np.testing.assert_allclose(rows[:-1] @ found, base.targets, rtol=1e-9)


def test_a_replicate_that_cannot_meet_all_comes_close():
    """Of two targets one household alone tells the difference: without it they contradict each other."""
    base = survey(3)
    first = base.matrix.toarray()[1]
    second = first.copy()
    second[np.flatnonzero(first)[0]] = 0.0
    rows = np.vstack([base.matrix.toarray(), second])
    totals = [*base.targets, base.targets[1] - 9.0]
    problem = CalibrationProblem(rows, totals, base.starting_weights)
    result = calibrate(problem, method="calibrate")
    assert result.diagnostics["max_abs_scaled_error"] < 1e-9
    initial = problem.starting_weights.copy()
    initial[np.flatnonzero(first)[0]] = 0.0
    found = Recalibration(problem, result.exact)(initial)
    error = np.abs(rows @ found / totals - 1)
    assert error.max() < 0.05
    assert np.abs(error[[1, -1]]).max() > 1e-3


def test_bounds_of_weights_are_bounds_of_the_ratio_in_replicates():
    problem = survey(4)
    result = calibrate(problem, method="calibrate", weight_bounds=(0.0, 20.0))
    initial = 3.0 * problem.starting_weights
    found = Recalibration(
        replace(problem, targets=3 * problem.targets), result.exact, weight_bounds=(0.0, 20.0)
    )(initial)
    np.testing.assert_allclose(found, 3 * result.weights, rtol=1e-9)
