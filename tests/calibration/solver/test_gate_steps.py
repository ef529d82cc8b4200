import numpy as np
import pytest
import torch

from sparsereg.calibration.solver import gate_kernels
from sparsereg.calibration.solver.gate_steps import CompiledSteps, Pace, Shape, TorchSteps
from sparsereg.calibration.solver.matrix import ByTarget, household_matrix
from sparsereg.distributions import p_active

SHAPE = Shape(0.65, -0.1, 1.1)


def households(count=70_000, seed=0):
    generator = torch.Generator().manual_seed(seed)
    log_weight, log_alpha = torch.randn(2, count, generator=generator)
    levels = torch.rand(count, generator=generator)
    levels[:3] = torch.tensor([0.0, 2.0**-24, 1.0 - 2.0**-24])
    return log_weight, 6.0 * log_alpha, levels


@pytest.mark.parametrize("without", [False, True])
def test_compiled_loops_and_torch_agree(without):
    log_weight, log_alpha, levels = households()
    gradient = torch.randn(len(levels), dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ends = []
    for steps in (CompiledSteps(log_weight), TorchSteps(log_weight)):
        weight, alpha, moments = log_weight.clone(), log_alpha.clone(), torch.zeros(4, len(levels))
        drawn = []
        for step in (1, 2, 3):
            drawn.append(steps.draw(weight, alpha, None if without else levels.clone(), SHAPE).clone())
            pace = Pace(step, 0.1, 0.01 * step, 0.5)
            steps.move(gradient, weight, alpha, moments, None if without else SHAPE, pace)
        ends.append((*drawn, weight, alpha, moments, torch.tensor(steps.expected(alpha, SHAPE))))
    for ours, theirs in zip(*ends, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=3e-4, atol=3e-6)


def test_expected_number_is_that_of_the_distribution():
    _, log_alpha, _ = households()
    exact = p_active(log_alpha.double(), SHAPE.beta, SHAPE.gamma, SHAPE.zeta).sum()
    assert CompiledSteps(log_alpha).expected(log_alpha, SHAPE) == pytest.approx(float(exact), rel=1e-6)


def test_polynomials_are_good_to_two_units():
    x = np.linspace(-86.9, 87.9, 5001, dtype=np.float32)
    found = np.array([gate_kernels.exponential(v) for v in x], dtype=np.float64)
    assert np.abs(found / np.exp(x.astype(np.float64)) - 1).max() < 2.5e-7
    y = np.exp(np.linspace(-40, 40, 5001)).astype(np.float32)
    exact = np.log(y.astype(np.float64))
    found = np.array([gate_kernels.logarithm(v) for v in y], dtype=np.float64)
    assert (np.abs(found - exact) / np.maximum(np.abs(exact), 0.1)).max() < 2.5e-7
    assert gate_kernels.logarithm(np.float32(0.0)) < -87


def test_noise_follows_the_keys_not_the_order():
    import scipy.sparse as sp

    rows = sp.csr_array((1000, 3), dtype=np.float32)
    keys = np.random.default_rng(0).permutation(5000)[:1000]
    whole = household_matrix(sp.csr_array((5000, 3), dtype=np.float32)).noise(7, 2)
    assert torch.equal(household_matrix(rows, keys=keys).noise(7, 2), whole[keys])
    some = torch.tensor([3, 900, 17])
    assert torch.equal(household_matrix(rows, keys=keys).take(some).noise(7, 2), whole[keys[some]])


@pytest.mark.costly
@pytest.mark.parametrize("targets", [12, 70_000])
def test_households_stored_apart_change_no_product(targets):
    import scipy.sparse as sp

    rng = np.random.default_rng(3)
    a = sp.random_array((40_000, targets), density=400_000 / 40_000 / targets, rng=rng, dtype=np.float32)
    matrix = household_matrix(sp.csr_array(a))
    often = torch.from_numpy(np.sort(rng.permutation(40_000)[:30_000]))
    weights = torch.rand(40_000) * (torch.rand(40_000) < 0.3)
    apart, by_totals = matrix.arranged(often), torch.randn(targets, dtype=torch.float64)
    torch.testing.assert_close(apart.totals(weights), matrix.totals(weights), rtol=1e-12, atol=1e-12)
    for where in (weights, None):
        ours, theirs = apart.gradient(by_totals, where), matrix.gradient(by_totals, where)
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("households", "targets"), [(40, 12), (150_000, 9), (60_000, 70_000)])
def test_households_stored_by_target_change_no_product(households, targets):
    import scipy.sparse as sp

    rng = np.random.default_rng(4)
    a = sp.random_array((households, targets), density=min(0.5, 3e5 / households / targets), rng=rng)
    a = sp.csr_array(a.astype(np.float32))
    a.data[a.indices % 3 == 0] = 1.0
    a.data[a.indices % 7 == 1] *= -1e4
    matrix = household_matrix(sp.csr_array(a))
    weights = torch.rand(households) * (torch.rand(households) < 0.8)
    by_target = matrix.arranged(None)
    assert isinstance(by_target, ByTarget)
    exact = torch.from_numpy(a.T.astype(np.float64) @ weights.double().numpy())
    torch.testing.assert_close(by_target.totals(weights), exact, rtol=1e-12, atol=1e-9)
    torch.testing.assert_close(by_target.totals(weights.double()), exact, rtol=1e-12, atol=1e-9)
    by_totals = torch.randn(targets, dtype=torch.float64)
    assert torch.equal(by_target.gradient(by_totals, weights), matrix.gradient(by_totals, weights))


def test_households_far_from_each_other_are_stored_once():
    import scipy.sparse as sp

    a = sp.random_array((20_000, 2_000), density=0.01, rng=np.random.default_rng(6), dtype=np.float32)
    matrix = household_matrix(sp.csr_array(a))
    assert matrix.arranged(None) is matrix


def test_totals_by_target_do_not_depend_on_threads():
    import scipy.sparse as sp

    rng = np.random.default_rng(5)
    a = sp.csr_array(sp.random_array((90_000, 300), density=0.02, rng=rng, dtype=np.float32))
    matrix, weights, number = household_matrix(a).arranged(None), torch.rand(90_000), torch.get_num_threads()
    try:
        totals = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            totals.append(matrix.totals(weights))
    finally:
        torch.set_num_threads(number)
    assert torch.equal(totals[0], totals[1])
    assert torch.equal(totals[0], totals[2])
