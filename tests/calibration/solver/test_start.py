"""Calibrations that start from the weights of an earlier one."""

from dataclasses import replace

import numpy as np
import pytest
import scipy.sparse as sp

from sparsereg.calibration import CalibrationProblem, calibrate
from sparsereg.calibration.reading.synthetic import synthetic_problem
from sparsereg.calibration.solver.distances import distance_of
from sparsereg.calibration.solver.dual_newton import Dual, Rows, Slack, multipliers_of


def earlier_and_now(households=2000, targets=120):
    """Two problems that differ by a little in their targets; both can be met."""
    problem = synthetic_problem(households, targets, 0, 0.0)
    rng = np.random.default_rng(1)
    far = problem.starting_weights * np.exp(0.6 * rng.normal(size=households))
    near = far * np.exp(0.02 * rng.normal(size=households))
    return [replace(problem, targets=problem.estimates(w)) for w in (far, near)]


EXACT = {
    "linear": {"distance": "linear"},
    "raking": {"distance": "raking"},
    "bounded raking": {"distance": "raking", "bounds": (0.4, 2.5)},
    "logit": {"distance": "logit", "bounds": (0.2, 5.0)},
}


@pytest.mark.parametrize("how", EXACT.values(), ids=EXACT)
def test_exact_weights_are_the_same_in_fewer_steps(how):
    earlier, now = earlier_and_now()
    before = calibrate(earlier, method="calibrate", **how).weights
    cold = calibrate(now, method="calibrate", **how)
    warm = calibrate(now, method="calibrate", start=before, **how)
    assert warm.steps < cold.steps
    np.testing.assert_allclose(warm.weights, cold.weights, rtol=1e-8, atol=1e-8 * cold.weights.mean())


def test_everybody_s_weights_are_the_same_as_without_a_start():
    earlier, now = earlier_and_now()
    how = {"method": "all", "chi2": 1e-3}
    cold = calibrate(now, **how)
    warm = calibrate(now, start=calibrate(earlier, **how).weights, **how)
    assert warm.steps <= cold.steps
    np.testing.assert_allclose(warm.weights, cold.weights, rtol=1e-8, atol=1e-8 * cold.weights.mean())


def test_without_a_pull_the_refit_starts_at_the_weights():
    earlier, now = earlier_and_now(600, 40)
    before = calibrate(earlier, method="all", chi2=0.0).weights
    warm = calibrate(now, method="all", chi2=0.0, start=before)
    assert warm.diagnostics["max_are"] < 1e-6


@pytest.mark.parametrize("name", ["linear", "raking", "logit"])
def test_multipliers_are_found_again_from_their_weights(name):
    rng = np.random.default_rng(2)
    rows = sp.csr_array(rng.random((4, 60)) * (rng.random((4, 60)) < 0.6))
    distance = distance_of(name, np.full(60, 0.3), np.full(60, 3.0))
    dual = Dual(
        Rows(rows, np.ones(4)),
        np.ones(4),
        rng.random(60) + 1,
        rng.random(60) + 0.5,
        distance,
        Slack(*np.full((3, 4), 1.0)),
    )
    multipliers = 0.3 * rng.normal(size=4)
    weights = dual.weights * distance.respond(dual.factors * (rows.T @ multipliers))[0]
    weights[:5] = 0  # of households that were not there
    np.testing.assert_allclose(multipliers_of(dual, weights), multipliers, atol=1e-9)


def test_a_start_that_is_worse_than_none_is_not_taken():
    _, now = earlier_and_now(500, 30)
    cold = calibrate(now, method="calibrate", distance="raking")
    far = calibrate(now, method="calibrate", distance="raking", start=now.starting_weights * 1e6)
    np.testing.assert_allclose(far.weights, cold.weights, rtol=1e-8)
    assert far.steps == cold.steps


@pytest.mark.costly
@pytest.mark.parametrize("num_households", [150, 100, 220])
def test_a_selection_goes_on_from_the_households_that_are_there(num_households):
    earlier, now = earlier_and_now(1200, 60)
    before = calibrate(earlier, 150)
    cold = calibrate(now, num_households)
    warm = calibrate(now, num_households, start=before.weights)
    assert warm.num_kept == num_households
    both = [(result.selected & before.selected).sum() for result in (cold, warm)]
    assert both[1] > both[0]
    assert warm.diagnostics["mean_are"] < cold.diagnostics["mean_are"] + 0.002
    assert len(warm.history) < len(cold.history) or num_households < 150


def test_gates_start_at_the_weights():
    earlier, now = earlier_and_now(300, 20)
    before = calibrate(earlier, method="all").weights
    how = {"method": "hard_concrete", "lambda_l0": 1e-4, "epochs": 1, "lr": 1e-9, "refit": False}
    how |= {"log_weight_jitter": 0.0, "log_alpha_jitter": 0.0}
    errors = [calibrate(now, start=start, **how).history[0]["mean_are"] for start in (None, before)]
    assert errors[1] < errors[0] / 4


def test_what_cannot_be_started_from_is_refused():
    problem = CalibrationProblem(sp.csr_array(np.eye(3)), np.ones(3), np.array([1.0, 1.0, 0.0]))
    with pytest.raises(ValueError, match="can start from weights"):
        calibrate(problem, 2, method="random", start=np.ones(3))
    with pytest.raises(ValueError, match="3 finite weights"):
        calibrate(problem, method="calibrate", start=np.ones(4))
    with pytest.raises(ValueError, match="3 finite weights"):
        calibrate(problem, method="calibrate", start=np.array([1.0, np.nan, 1.0]))
    with pytest.raises(ValueError, match="household of the survey"):
        calibrate(problem, method="calibrate", start=np.array([0.0, 0.0, 5.0]))
