import numpy as np
import pytest
import scipy.sparse as sp
import torch
from scipy.optimize import lsq_linear, minimize, nnls

from sparsereg.calibration.solver.least_squares import System
from sparsereg.calibration.solver.losses import Quadratic, TargetLoss
from sparsereg.calibration.solver.matrix import household_matrix
from sparsereg.calibration.solver.refit import refit

BACKENDS = ["compiled", "torch"]


def problem(seed, targets, households, density=0.4, signs=False):
    rng = np.random.default_rng(seed)
    a = rng.lognormal(size=(targets, households)) * (rng.random((targets, households)) < density)
    if signs:
        a *= rng.choice([-1, 1], size=a.shape)
    a = a.astype(np.float32).astype(np.float64)
    return (
        a,
        a @ rng.lognormal(size=households) * rng.lognormal(sigma=0.3, size=targets),
        rng.lognormal(size=households),
    )


def system(a, t, q, w0, backend="compiled", upper=None, chi2=0.0, total=None):
    matrix = household_matrix(sp.csr_array(a.T.astype(np.float32)), backend=backend)
    quadratic = Quadratic(torch.from_numpy(t), torch.from_numpy(q))
    bound = np.full(len(w0), np.inf) if upper is None else upper
    return System(matrix, quadratic, torch.from_numpy(w0), torch.from_numpy(bound), chi2, total)


def everyone(s, lower=None):
    return s.of(torch.arange(s.matrix.num_households), s.initial_weights, lower)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("targets", "households", "signs"), [(60, 20, False), (25, 80, False), (40, 40, True)]
)
def test_solve_equals_scipy_nnls(backend, targets, households, signs):
    a, t, w0 = problem(1, targets, households, signs=signs)
    q = 1.0 / (np.abs(t) + 1) ** 2
    fit = everyone(system(a, t, q, w0, backend))
    assert fit.solve(1e-10, max_rounds=300) <= 1e-10
    _, rest = nnls(a * np.sqrt(q)[:, None], t * np.sqrt(q))
    assert fit.value() == pytest.approx(rest**2, rel=1e-7, abs=1e-16)
    if targets > households:  # the minimum is unique
        exact = nnls(a * np.sqrt(q)[:, None], t * np.sqrt(q))[0]
        np.testing.assert_allclose(fit.weights, exact, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("total_held", [False, True])
@pytest.mark.parametrize(("targets", "households"), [(80, 30), (30, 80), (40, 40)])
@pytest.mark.parametrize("bounded", [False, True])
def test_dense_solve_equals_general_solvers(total_held, targets, households, bounded):
    a, t, w0 = problem(8, targets, households)
    q = np.random.default_rng(0).random(targets) / (np.abs(t) + 1) ** 2
    lower, upper = 0.2 * w0, 1.5 * w0 if bounded else np.full(households, np.inf)
    if bounded:
        upper[3] = lower[3]
    total = w0.sum() if total_held else None
    fit = everyone(system(a, t, q, w0, upper=upper, total=total), torch.from_numpy(lower))
    assert fit.solve_densely(1e-10) <= 1e-10
    weights = fit.weights.numpy()
    assert (weights >= lower).all()
    assert (weights <= upper).all()
    # A row of large weight holds the sum for a solver that knows bounds only.
    rows, wanted = a * np.sqrt(q)[:, None], t * np.sqrt(q)
    if total_held:
        assert weights.sum() == pytest.approx(total, rel=1e-9)
        rows, wanted = np.vstack([rows, np.full(households, 1e3)]), np.append(wanted, 1e3 * total)
    upper[3] += 1e-12
    exact = lsq_linear(rows, wanted, (lower, upper), method="bvls", tol=1e-15, max_iter=10_000)
    value = ((rows @ exact.x - wanted) ** 2).sum()
    assert fit.value() == pytest.approx(value, rel=1e-5, abs=1e-9 * fit.size**2)
    if targets > households and not total_held:
        np.testing.assert_allclose(weights, exact.x, rtol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_solve_within_bounds_equals_lsq_linear(backend):
    a, t, w0 = problem(2, 80, 30)
    q = np.random.default_rng(0).random(80) / (np.abs(t) + 1) ** 2
    lower, upper = 0.2 * w0, 1.5 * w0
    fit = everyone(system(a, t, q, w0, backend, upper=upper), torch.from_numpy(lower))
    assert fit.solve(1e-10, max_rounds=300) <= 1e-10
    exact = lsq_linear(a * np.sqrt(q)[:, None], t * np.sqrt(q), (lower, upper), method="bvls", tol=1e-14)
    np.testing.assert_allclose(fit.weights, exact.x, rtol=1e-6)
    assert (fit.weights.numpy() <= upper).all()
    assert (fit.weights.numpy() >= lower).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_held_total_equals_a_general_solver(backend):
    a, t, w0 = problem(3, 40, 12)
    q = 1.0 / (np.abs(t) + 1) ** 2
    total = w0.sum()
    fit = everyone(system(a, t, q, w0, backend, total=total))
    assert fit.solve(1e-10, max_rounds=400) <= 1e-10
    assert float(fit.weights.sum()) == pytest.approx(total, rel=1e-9)
    exact = minimize(
        lambda w: (q * (a @ w - t) ** 2).sum(),
        w0,
        jac=lambda w: 2 * a.T @ (q * (a @ w - t)),
        bounds=[(0, None)] * 12,
        constraints={"type": "eq", "fun": lambda w: w.sum() - total, "jac": lambda w: np.ones(12)},
        method="SLSQP",
        options={"ftol": 1e-15, "maxiter": 1000},
    )
    assert fit.value() == pytest.approx(exact.fun, rel=1e-5)


def test_pull_is_the_stated_penalty():
    a, t, w0 = problem(4, 10, 25)
    q = 1.0 / (np.abs(t) + 1) ** 2
    chi2 = 0.3
    s = system(a, t, q, w0, chi2=chi2)
    chosen = torch.arange(0, 25, 2)
    fit = s.of(chosen, s.initial_weights[chosen])
    fit.solve(1e-12, max_rounds=200)
    initial = w0[::2]
    center = initial * w0.sum() / initial.sum()

    def penalty(w):
        return chi2 * np.average((w / center - 1) ** 2, weights=center)

    w = fit.weights.numpy()
    assert fit.value() == pytest.approx((q * (a[:, ::2] @ w - t) ** 2).sum() + penalty(w), rel=1e-10)
    exact = minimize(
        lambda w: (q * (a[:, ::2] @ w - t) ** 2).sum() + penalty(w), w, bounds=[(0, None)] * 13, tol=1e-14
    )
    assert fit.value() <= exact.fun * (1 + 1e-9)


def test_gains_are_what_one_step_gains():
    a, t, w0 = problem(5, 12, 30)
    q = 1.0 / (np.abs(t) + 1) ** 2
    s = system(a, t, q, w0, upper=np.full(30, 0.7))
    kept = torch.tensor([0, 3, 4])
    fit = s.of(kept, torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64))
    gains = s.gains(fit.by_totals).numpy()
    totals = fit.totals().numpy()
    steps = np.linspace(0, 0.7, 20_001)
    for j in range(5, 30):
        values = (q[:, None] * (totals[:, None] + a[:, [j]] * steps - t[:, None]) ** 2).sum(0)
        assert gains[j] == pytest.approx(values[0] - values.min(), rel=1e-4, abs=1e-9)


def test_absolute_loss_equals_linear_programming():
    from scipy.optimize import linprog

    a, t, w0 = problem(6, 30, 8)
    scale = np.abs(t) + 1
    loss = TargetLoss(torch.from_numpy(t), torch.full((30,), 1 / 30, dtype=torch.float64), "mape")
    s = system(a, t, 1 / (30 * scale**2), w0)
    found = refit(s, loss, torch.arange(8), torch.from_numpy(w0))
    b = a / scale[:, None]
    eye = np.eye(30)
    upper = np.block([[b, -eye], [-b, -eye]])
    exact = linprog(np.r_[np.zeros(8), np.full(30, 1 / 30)], upper, np.r_[t / scale, -t / scale])
    value = float(loss.value(torch.from_numpy(a @ found.weights.numpy())))
    assert exact.fun <= value * (1 + 1e-12)
    assert value == pytest.approx(exact.fun, rel=2e-4)


def test_households_without_entries_stay_where_they_are():
    a, t, w0 = problem(7, 10, 5)
    a[:, 2] = 0
    fit = everyone(system(a, t, np.ones(10), w0))
    fit.solve(1e-9)
    assert np.isfinite(fit.weights.numpy()).all()
    assert float(fit.weights[2]) == w0[2]
