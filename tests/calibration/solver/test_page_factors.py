"""Normal equations solved page by page: what dense linear algebra finds."""

import numpy as np
import pytest
import scipy.sparse as sp

from sparsereg.calibration import CalibrationProblem, calibrate, synthetic_problem
from sparsereg.calibration.config import PruningSchedule
from sparsereg.calibration.solver.page_factors import PageBlocks
from sparsereg.linalg.nesting import find_nesting

QUICK = PruningSchedule(stages=8, sweeps=10, first_sweeps=10, swap_rounds=2)


def nested(seed=0, n=240, districts=12, states=4):
    """Districts in states in a nation, and one target that follows no district."""
    rng = np.random.default_rng(seed)
    district = np.sort(rng.integers(0, districts, n))
    kinds = rng.random((5, n)) < 0.6
    rows = [
        kinds[k] * (district == d) * rng.lognormal(size=n).round(2)
        for d in range(districts)
        for k in range(5)
    ]
    of = lambda some: [sum(rows[5 * d + k] for d in some) for k in range(5)]  # noqa: E731
    for s in range(states):
        rows += of(range(s, districts, states))
    rows += of(range(districts)) + [rng.random(n) * (rng.random(n) < 0.2)]
    return sp.csr_array(np.array(rows, dtype=np.float32))


@pytest.mark.parametrize("seed", [0, 1])
def test_the_solution_is_that_of_dense_equations(seed):
    a = nested(seed)
    by_household = sp.csr_array(a.T.tocsr())
    n = find_nesting(a, by_household)
    assert n is not None
    assert len(n.sums) > 20
    rng = np.random.default_rng(seed + 10)
    weights = rng.lognormal(size=a.shape[0])
    weights[::7] = 0.0
    order = np.argsort(n.page, kind="stable")
    rows = sp.csr_array(sp.csr_array(a[n.stored].T.tocsr())[order].astype(np.float64))
    blocks = PageBlocks(rows, n.page[order], n, weights)
    assert blocks.pays
    assert PageBlocks.may_pay(n.page[order])
    free, diagonal = rng.random(len(order)) < 0.8, rng.lognormal(size=len(order))
    right = rng.normal(size=len(order))
    found = blocks.factors(free, diagonal).solve(right)
    dense = a.toarray().astype(np.float64)[:, order][:, free]
    square = dense.T @ (weights[:, None] * dense) + np.diag(diagonal[free])
    np.testing.assert_allclose(found[free], np.linalg.solve(square, right[free]), rtol=1e-9, atol=1e-11)
    assert not found[~free].any()


def test_pages_that_are_too_large_do_not_pay():
    assert not PageBlocks.may_pay(np.zeros(5_000, dtype=np.int32))
    assert PageBlocks.may_pay(np.repeat(np.arange(100), 50))


@pytest.mark.costly
def test_more_households_than_dense_systems_take_are_fitted_to_optimality():
    p = synthetic_problem(6000, 3200, seed=1)
    result = calibrate(p, 2600, schedule=QUICK)
    assert result.num_kept == 2600
    assert result.kkt_violation <= 1e-9


@pytest.mark.costly
def test_nobody_gains_by_leaving_the_optimum():
    p = synthetic_problem(4000, 2800, seed=2)
    result = calibrate(p, 2550, schedule=QUICK, chi2=1e-4)
    assert isinstance(p, CalibrationProblem)
    rng = np.random.default_rng(0)
    kept = np.flatnonzero(result.selected)
    initial, whole = p.starting_weights, p.starting_weights.sum()
    center = initial[kept] * whole / initial[kept].sum()

    def value(weights):
        missed = (p.matrix[:, kept].astype(np.float64) @ weights - p.targets) / np.maximum(
            np.abs(p.targets), 1
        )
        return np.mean(missed**2) + 1e-4 * ((weights - center) ** 2 / center).sum() / whole

    best = value(result.weights[kept])
    low = 1e-3 * center
    for _ in range(50):
        step = rng.normal(size=len(kept)) * result.weights[kept] * 10.0 ** rng.uniform(-5, -1)
        assert value(np.maximum(result.weights[kept] + step, low)) > best
