"""A matrix without the rows that are sums of others: the same products, sweeps to the same minimum."""

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from sparsereg.calibration import CalibrationProblem, calibrate, synthetic_problem
from sparsereg.calibration.solver import nested
from sparsereg.calibration.solver.calibration import Calibration, Settings
from sparsereg.calibration.solver.matrix import CompiledMatrix, household_matrix
from sparsereg.calibration.solver.nested import NestedMatrix

pytest.importorskip("numba")


@pytest.fixture(scope="module")
def problem():
    return synthetic_problem(3_000, 900, seed=3)


def plain(problem):
    """The same problem, told that nothing nests."""
    other = CalibrationProblem(problem.matrix, problem.targets, problem.initial_weights)
    other.__dict__["nesting"] = None
    return other


def system_of(problem, **settings):
    run = Calibration(problem, settings=Settings(**settings))
    return run.goal.system, run._order


@pytest.mark.parametrize("share", [1.0, 0.1])
def test_products_are_those_of_all_rows(problem, share):
    nest, order = system_of(problem)
    assert isinstance(nest.matrix, NestedMatrix)
    assert nest.matrix.num_entries < 0.6 * problem.matrix.nnz
    whole = CompiledMatrix(problem.matrix_t[order])
    generator = torch.Generator().manual_seed(0)
    households = torch.nonzero(torch.rand(3_000, generator=generator) <= share).flatten()
    ours, theirs = nest.matrix.take(households), whole.take(households)
    weights = torch.rand(len(households), generator=generator, dtype=torch.float64)
    residual = torch.randn(900, generator=generator, dtype=torch.float64)
    where = (weights > 0.5).to(torch.uint8)
    for name, argument in (("totals", (weights,)), ("gradient", (residual,)), ("gradient", (residual, where)),
                           ("squared_norms", (residual.abs(),))):  # fmt: skip
        ours_is, theirs_is = (getattr(m, name)(*argument) for m in (ours, theirs))
        torch.testing.assert_close(ours_is, theirs_is, rtol=1e-12, atol=1e-9 * float(theirs_is.abs().max()))
    np.testing.assert_array_equal(ours.by_household().toarray(), theirs.by_household().toarray())


@pytest.mark.costly
@pytest.mark.parametrize("lanes", [1, 2])
@pytest.mark.parametrize("hold_total", [False, True])
def test_sweeps_reach_the_minimum_of_the_plain_matrix(problem, lanes, hold_total, monkeypatch):
    monkeypatch.setattr(nested, "_ENTRIES_FOR_LANES", 10**9 if lanes == 1 else 0)
    values = []
    for p in (problem, plain(problem)):
        system, _ = system_of(p, hold_total=hold_total, chi2=1e-2)
        fit = system.of(torch.arange(3_000), system.initial_weights)
        before = fit.penalized_value()
        for _ in range(6):
            fit.sweep(100)
            by_totals = fit.by_totals.clone()
            fit.refresh()
            torch.testing.assert_close(
                by_totals, fit.by_totals, rtol=1e-6, atol=1e-9 * float(by_totals.abs().max())
            )
            assert fit.penalized_value() <= before * (1 + 1e-9)
            before = fit.penalized_value()
        values.append(before)
    assert isinstance(system.matrix, CompiledMatrix)
    assert values[0] == pytest.approx(values[1], rel=1e-3)


def test_lanes_share_pages_out_and_do_not_depend_on_threads(problem, monkeypatch):
    monkeypatch.setattr(nested, "_ENTRIES_FOR_LANES", 0)
    before, weights = torch.get_num_threads(), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            system, _ = system_of(problem)
            fit = system.of(torch.arange(3_000), system.initial_weights)
            fit.sweep(5)
        finally:
            torch.set_num_threads(before)
        weights.append(fit.weights)
    assert torch.equal(*weights)
    first, second = fit.matrix._lanes
    assert not set(fit.matrix._page[first]) & set(fit.matrix._page[second])


@pytest.mark.costly
@pytest.mark.parametrize("method", ["pruning", "hard_concrete", "all"])
def test_calibrations_are_as_good(problem, method):
    number = None if method == "all" else 400
    ours, theirs = (calibrate(p, number, method=method, epochs=200) for p in (problem, plain(problem)))
    assert ours.num_kept == theirs.num_kept
    assert ours.loss <= 1.3 * theirs.loss + 1e-12


@pytest.mark.costly
def test_targets_of_weight_zero_and_bounds_are_as_before(problem):
    weights = np.ones(900)
    weights[::7] = 0
    some = CalibrationProblem(
        problem.matrix,
        problem.targets,
        problem.initial_weights,
        target_weights=weights,
        parent=problem.parent,
    )
    result = calibrate(some, 500, max_weight_ratio=8.0)
    assert result.num_kept == 500
    assert (result.weights <= 8.0 * problem.starting_weights * (1 + 1e-9)).all()


@pytest.mark.costly
def test_nested_shares_with_consistency_and_ratios(problem):
    """Rows of sums of parts, and targets that are shares of other totals."""
    result = calibrate(problem, 600, consistency=0.5)
    assert result.num_kept == 600
    below = sp.lil_array(problem.matrix.shape)
    below[0] = np.ones(3_000)
    ratio = CalibrationProblem(
        problem.matrix, np.append(0.9, problem.targets[1:]), problem.initial_weights,
        denominators=sp.csr_array(below), parent=problem.parent,
    )  # fmt: skip
    assert calibrate(ratio, 600).num_kept == 600


def test_torch_stores_all_rows(problem):
    system, _ = system_of(problem, backend="torch")
    assert not isinstance(system.matrix, NestedMatrix)
    assert type(system.matrix) is type(household_matrix(problem.matrix_t, backend="torch"))
