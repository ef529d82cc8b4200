import numpy as np
import pytest
import scipy.sparse as sp
import torch

from sparsereg.calibration.solver.matrix import household_matrix

BACKENDS = ["compiled", "torch"]


def random_by_household(seed=0, households=300, targets=40, density=0.2):
    rng = np.random.default_rng(seed)
    dense = rng.normal(size=(households, targets)) * (rng.random((households, targets)) < density)
    return sp.csr_array(dense.astype(np.float32))


@pytest.mark.parametrize("backend", BACKENDS)
def test_products_equal_dense_products(backend):
    by_household = random_by_household()
    dense = by_household.toarray().astype(np.float64)
    matrix = household_matrix(by_household, backend=backend)
    rng = np.random.default_rng(1)
    weights, residual, rows = rng.normal(size=300), rng.normal(size=40), rng.random(40)
    weights[::3] = 0
    totals = matrix.totals(torch.from_numpy(weights))
    assert totals.dtype == torch.float64
    np.testing.assert_allclose(totals, dense.T @ weights, rtol=1e-12)
    np.testing.assert_allclose(matrix.gradient(torch.from_numpy(residual)), dense @ residual, rtol=1e-11)
    np.testing.assert_allclose(matrix.squared_norms(torch.from_numpy(rows)), dense**2 @ rows, rtol=1e-12)
    where = torch.from_numpy(weights)
    expected = (dense @ residual) * (weights != 0)
    np.testing.assert_allclose(matrix.gradient(torch.from_numpy(residual), where), expected, rtol=1e-11)


@pytest.mark.parametrize("backend", BACKENDS)
def test_take_is_a_selection_of_rows(backend):
    by_household = random_by_household()
    chosen = torch.tensor([7, 2, 250, 31])
    part = household_matrix(by_household, backend=backend).take(chosen)
    weights = torch.tensor([1.0, -2.0, 3.0, 0.5], dtype=torch.float64)
    expected = by_household.toarray()[chosen.numpy()].astype(np.float64).T @ weights.numpy()
    np.testing.assert_allclose(part.totals(weights), expected, rtol=1e-12, atol=1e-14)
    residual = torch.ones(40, dtype=torch.float64)
    sums = by_household.toarray()[chosen.numpy()].astype(np.float64).sum(1)
    np.testing.assert_allclose(part.gradient(residual), sums, rtol=1e-11, atol=1e-14)


def test_the_number_of_threads_changes_no_bit():
    by_household = random_by_household(households=30_000, targets=60, density=0.6)
    assert by_household.nnz > 1_000_000
    matrix = household_matrix(by_household, backend="compiled")
    weights = torch.rand(30_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    threads = torch.get_num_threads()
    results = []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            totals = matrix.totals(weights)
            results.append((totals, matrix.gradient(totals)))
    finally:
        torch.set_num_threads(threads)
    for totals, gradient in results[1:]:
        assert torch.equal(totals, results[0][0])
        assert torch.equal(gradient, results[0][1])


def test_unknown_backend_is_refused():
    with pytest.raises(ValueError, match=r"backend must be one of auto, compiled, torch, got 'fortran'"):
        household_matrix(random_by_household(), backend="fortran")
    with pytest.raises(ValueError, match="device='meta'"):
        household_matrix(random_by_household(), device="meta", backend="compiled")
