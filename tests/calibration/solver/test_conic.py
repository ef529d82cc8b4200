"""Exact calibration beside Clarabel, a general conic solver: the same least distance, found in another way.

The ratios of the weights are its unknowns. Squares are a quadratic objective; raking's g log g is the
exponential cone; what a soft target misses is an unknown of its own; a tolerance is a pair of inequalities.
"""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from sparsereg.calibration import CalibrationProblem, calibrate
from sparsereg.calibration.solver.distances import distance_of

clarabel = pytest.importorskip("clarabel")

REFERENCE = Path(__file__).parents[1] / "reference"


def survey(seed=0, targets=12, households=200, change=0.15, **more):
    rng = np.random.default_rng(seed)
    rows = rng.lognormal(size=(targets, households)) * (rng.random((targets, households)) < 0.4)
    initial = rng.lognormal(sigma=0.5, size=households) * 100
    totals = rows @ (initial * (1 + change * rng.uniform(-1, 1, size=households)))
    return CalibrationProblem(rows, totals, initial, **more)


def schools():
    table = pd.read_csv(REFERENCE / "apiclus1.csv.gz")
    rows = [c for c in table.columns if c.startswith("x")]
    totals, t = table.loc[0, rows].to_numpy(float), table.iloc[1:]
    return CalibrationProblem(t[rows].to_numpy().T, totals, t.weight.to_numpy())


def least_distance(problem, distance, bounds, prices, tolerance):
    """The minimum by Clarabel of what our documents say is minimised, over the sum of the initial weights.

    Unknowns: ratios g (households), what each soft target misses, over its scale, and for raking one bound of
    g log g per household.
    """
    n, m, low, high = problem.num_households, problem.num_targets, *bounds
    share = problem.starting_weights / problem.starting_weights.sum()
    rows = problem.matrix.toarray() * problem.starting_weights / problem.scale[:, None]
    wanted, soft = problem.targets / problem.scale, np.flatnonzero(np.isfinite(prices))
    k, r = len(soft), n if distance == "raking" else 0
    width = n + k + r
    blocks, right, cones = [], [], []

    def add(block, values, cone):
        blocks.append(sp.csc_matrix(block))
        right.append(np.asarray(values, dtype=float))
        cones.append(cone)

    def with_slack(rows_, sign):
        missed = np.zeros((m, k))
        missed[soft, np.arange(k)] = -1.0
        return sign * np.hstack([rows_, missed, np.zeros((m, r))])

    exact = tolerance == 0
    both = with_slack(rows, 1.0)
    if exact.any():
        add(both[exact], wanted[exact], clarabel.ZeroConeT(int(exact.sum())))
    if (~exact).any():
        for sign in (1.0, -1.0):
            side = sign * wanted[~exact] + tolerance[~exact]
            add(sign * both[~exact], side, clarabel.NonnegativeConeT(int((~exact).sum())))
    ratios = np.hstack([np.eye(n), np.zeros((n, k + r))])
    add(-ratios, np.full(n, -low), clarabel.NonnegativeConeT(n))
    if np.isfinite(high):
        add(ratios, np.full(n, high), clarabel.NonnegativeConeT(n))
    linear, quadratic, constant = np.zeros(width), np.zeros(width), 0.0
    quadratic[n : n + k] = prices[soft]
    if distance == "linear":
        linear[:n], quadratic[:n], constant = -share, share, 0.5
    else:  # -t <= -g log g: (-t, g, 1) in the exponential cone {(x, y, z): y exp(x / y) <= z}
        linear[:n], linear[n + k :], constant = -share, share, 1.0
        for j in range(n):
            cone = np.zeros((3, width))
            cone[0, n + k + j], cone[1, j] = 1.0, -1.0
            add(cone, [0.0, 0.0, 1.0], clarabel.ExponentialConeT())
    settings = clarabel.DefaultSettings()
    settings.verbose = False
    for name in ("tol_gap_abs", "tol_gap_rel", "tol_feas"):
        setattr(settings, name, 1e-11)
    found = clarabel.DefaultSolver(
        sp.csc_matrix(sp.diags(quadratic)), linear, sp.vstack(blocks, format="csc"), np.concatenate(right),
        cones, settings,
    ).solve()  # fmt: skip
    assert str(found.status) in ("Solved", "AlmostSolved")
    x = np.array(found.x)
    return float(linear @ x + 0.5 * x @ (quadratic * x) + constant), x[:n]


def ours(problem, result, distance, bounds, prices, tolerance):
    """The same objective at our weights."""
    initial = problem.starting_weights
    ratio = result.weights / initial
    far = distance_of(distance, *(np.full(len(initial), b) for b in bounds)).value(ratio)
    missed = np.abs(problem.estimates(result.weights) - problem.targets) / problem.scale - tolerance
    soft = np.isfinite(prices)
    price = 0.5 * prices[soft] * np.maximum(missed[soft], 0.0) ** 2
    return float(initial @ far / initial.sum() + price.sum())


CASES = {
    "bounds": {"bounds": (0.9, 1.12)},
    "no bounds": {"bounds": (0.0, np.inf)},
    "soft": {"bounds": (0.0, np.inf), "soft": slice(0, 4)},
    "bands": {"bounds": (0.0, np.inf), "band": 0.02},
    "soft with bands and bounds": {"bounds": (0.85, 1.2), "soft": slice(3, 9), "band": 0.01},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("distance", ["linear", "raking"])
def test_no_general_solver_finds_closer_weights(distance, case):
    given = CASES[case]
    base = survey(3, change=0.3)
    prices, tolerance = np.full(12, np.inf), np.full(12, given.get("band", 0.0))
    prices[given.get("soft", slice(0))] = 0.7
    problem = CalibrationProblem(
        base.matrix, base.targets, base.initial_weights,
        target_weights=np.where(np.isinf(prices), np.nan, prices), target_tolerances=tolerance * base.scale,
    )  # fmt: skip
    result = calibrate(problem, method="calibrate", distance=distance, bounds=given["bounds"])
    assert len(result.exact.gave_way) == 0
    least, ratio = least_distance(problem, distance, given["bounds"], prices, tolerance)
    reached = ours(problem, result, distance, given["bounds"], prices, tolerance)
    assert reached == pytest.approx(least, rel=1e-6)
    np.testing.assert_allclose(result.weights / problem.starting_weights, ratio, atol=1e-3)


@pytest.mark.parametrize("distance", ["linear", "raking"])
def test_real_schools(distance):
    problem, none = schools(), np.zeros(4)
    result = calibrate(problem, method="calibrate", distance=distance, bounds=(0.7, 1.7))
    least, _ = least_distance(problem, distance, (0.7, 1.7), np.full(4, np.inf), none)
    reached = ours(problem, result, distance, (0.7, 1.7), np.full(4, np.inf), none)
    assert reached == pytest.approx(least, rel=1e-6)
