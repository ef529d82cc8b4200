import numpy as np
import pytest

from sparsereg.calibration import CalibrationProblem, calibrate, polish, synthetic_problem


def test_who_is_kept_does_not_hang_on_the_place_in_the_file():
    rng = np.random.default_rng(0)
    matrix = rng.random((10, 4000)) * (rng.random((10, 4000)) < 0.5)
    problem = CalibrationProblem(matrix, matrix.sum(1) * rng.uniform(0.9, 1.1, 10))
    kept = calibrate(problem, 200).selected
    first = int(kept[:2000].sum())
    assert abs(first - 100) < 4 * np.sqrt(
        50
    )  # by chance; sweeps in the order of the file kept nearly all there


@pytest.mark.costly
@pytest.mark.parametrize("method", ["pruning", "hard_concrete"])
def test_weights_belong_to_their_households(method):
    problem = synthetic_problem(300, 60)
    result = calibrate(problem, 60, method=method, epochs=50)
    np.testing.assert_allclose(result.estimates, problem.estimates(result.weights))
    assert result.diagnostics["mean_are"] < 0.05
    capped = calibrate(problem, 60, method=method, epochs=50, max_weight_ratio=15.0)
    assert (capped.weights <= 15 * problem.starting_weights * (1 + 1e-12)).all()


def test_polish_starts_from_the_households_that_were_given():
    problem = synthetic_problem(300, 60)
    best = calibrate(problem, 60)
    again = polish(problem, best.selected)
    assert (again.selected & best.selected).sum() > 45
    assert again.loss <= 1.01 * best.loss  # swaps lower the loss and the pull together
