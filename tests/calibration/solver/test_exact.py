"""Exact calibration against R's survey, a general solver, its own conditions, and linear programmes."""

import threading
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from scipy.optimize import minimize

from sparsereg.calibration import CalibrationProblem, calibrate
from sparsereg.calibration.solver import exact as exact_module
from sparsereg.calibration.solver.distances import DISTANCES, distance_of
from sparsereg.calibration.solver.dual_newton import _MOST_DENSE

REFERENCE = Path(__file__).parents[1] / "reference"
KINDS = {
    "linear": ("linear", False),
    "raking": ("raking", False),
    "linear_bounded": ("linear", True),
    "raking_bounded": ("raking", True),
    "logit_bounded": ("logit", True),
}


def reference(name):
    table = pd.read_csv(REFERENCE / f"{name}.csv.gz")
    rows = [c for c in table.columns if c.startswith("x")]
    totals, households = table.loc[0, rows].to_numpy(float), table.iloc[1:]
    problem = CalibrationProblem(households[rows].to_numpy().T, totals, households.weight.to_numpy())
    return problem, households


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["apiclus1", "apistrat", "eusilc", "nhanes"])
def test_weights_are_those_of_r_survey(name, kind):
    problem, table = reference(name)
    distance, bounded = KINDS[kind]
    bounds = (table.low.iloc[0], table.high.iloc[0]) if bounded else None
    result = calibrate(
        problem, method="calibrate", distance=distance, bounds=bounds, unit_factor=table.factor.to_numpy()
    )
    np.testing.assert_allclose(result.weights, table[kind], rtol=1e-8)
    assert result.diagnostics["max_abs_scaled_error"] < 1e-12
    if bounded:
        ratio = result.weights / problem.starting_weights
        assert (ratio >= bounds[0] * (1 - 1e-12)).all()
        assert (ratio <= bounds[1] * (1 + 1e-12)).all()


def survey(seed=0, targets=12, households=200, change=0.1, **more):
    rng = np.random.default_rng(seed)
    rows = rng.lognormal(size=(targets, households)) * (rng.random((targets, households)) < 0.4)
    initial = rng.lognormal(sigma=0.5, size=households) * 100
    totals = rows @ (initial * (1 + change * rng.uniform(-1, 1, size=households)))
    return CalibrationProblem(rows, totals, initial, **more)


def exactly(problem, distance="linear", **settings):
    return calibrate(problem, method="calibrate", distance=distance, **settings)


@pytest.mark.parametrize("distance", DISTANCES)
def test_slope_and_value_belong_to_the_ratio(distance):
    low, high = np.full(41, 0.3), np.full(41, 2.5)
    d = distance_of(distance, low, high)
    u = np.linspace(-0.5, 0.5, 41)
    ratio, slope = d.respond(u)
    assert ratio[20] == pytest.approx(1)
    assert d.value(np.ones(41)) == pytest.approx(np.zeros(41))
    step = 1e-6
    np.testing.assert_allclose(
        slope, (d.respond(u + step)[0] - d.respond(u - step)[0]) / (2 * step), rtol=1e-6
    )
    growth = (d.value(ratio + step) - d.value(ratio - step)) / (2 * step)
    np.testing.assert_allclose(growth, u, atol=1e-7)  # F is the inverse of G'
    for end in (-1e6, 1e6):
        assert np.isfinite(d.respond(np.full(41, end))).all()


@pytest.mark.parametrize("distance", DISTANCES)
def test_no_other_weights_are_closer(distance):
    problem = survey(targets=4, households=15)
    bounds = (0.5, 2.0) if distance == "logit" else None
    factor = np.random.default_rng(1).uniform(0.5, 2, size=15)
    result = exactly(problem, distance, bounds=bounds, unit_factor=factor)
    initial, rows = problem.starting_weights, problem.matrix.toarray()
    low, high = bounds or (0.0, 10.0)
    d = distance_of(distance, np.full(15, low), np.full(15, high))

    def far(ratio):
        return (initial / factor * d.value(np.clip(ratio, low, high))).sum() / initial.sum()

    general = minimize(
        far, np.ones(15), bounds=[(low + 1e-9, high - 1e-9)] * 15, method="SLSQP",
        constraints={"type": "eq", "fun": lambda g: (rows @ (initial * g) - problem.targets) / problem.scale},
        options={"ftol": 1e-15, "maxiter": 500},
    )  # fmt: skip
    assert far(result.weights / initial) <= general.fun * (1 + 1e-6)
    # The weights are what the multipliers say.
    ratio, _ = d.respond(factor * (result.multipliers @ rows))
    np.testing.assert_allclose(result.weights, initial * ratio, rtol=1e-9)


@pytest.mark.parametrize("distance", DISTANCES)
def test_redundant_targets_do_not_matter(distance):
    plain = survey(2)
    rows = sp.vstack(
        [plain.matrix, sp.csr_array(plain.matrix[:5].sum(axis=0)[None]), plain.matrix[[3]] * 7.0]
    )
    totals = [*plain.targets, plain.targets[:5].sum(), 7 * plain.targets[3]]
    more = CalibrationProblem(rows, totals, plain.initial_weights)
    bounds = (0.2, 4.0) if distance == "logit" else None
    one, two = (exactly(p, distance, bounds=bounds) for p in (plain, more))
    np.testing.assert_allclose(two.weights, one.weights, rtol=1e-8)
    assert two.diagnostics["max_abs_scaled_error"] < 1e-12


def test_parts_that_share_nothing_are_solved_apart_and_together_alike():
    parts = [survey(seed, targets=5, households=60) for seed in range(4)]
    rows = sp.csr_array(sp.block_diag([p.matrix for p in parts]))
    order = np.random.default_rng(0).permutation(20)
    shuffle = np.random.default_rng(1).permutation(240)
    whole = CalibrationProblem(
        rows[order][:, shuffle],
        np.concatenate([p.targets for p in parts])[order],
        np.concatenate([p.starting_weights for p in parts])[shuffle],
    )
    apart = np.concatenate([exactly(p, "raking").weights for p in parts])
    np.testing.assert_allclose(exactly(whole, "raking").weights, apart[shuffle], rtol=1e-9)


def test_bounds_and_factors_may_differ_between_households():
    problem = survey(3)
    rng = np.random.default_rng(3)
    low, high = rng.uniform(0.6, 1, size=200), rng.uniform(1, 1.5, size=200)
    for distance in DISTANCES:
        weights = exactly(problem, distance, bounds=(low, high)).weights
        ratio = weights / problem.starting_weights
        assert (ratio >= low - 1e-12).all()
        assert (ratio <= high + 1e-12).all()
        np.testing.assert_allclose(problem.estimates(weights), problem.targets, rtol=1e-11)
    bounded = exactly(problem, "raking", weight_bounds=(40.0, 300.0))
    assert bounded.weights.min() >= 40 * (1 - 1e-12)
    assert bounded.weights.max() <= 300 * (1 + 1e-12)
    assert bounded.exact.bounds_hit > 0
    held = np.where(np.arange(200) < 100, 1e-9, 1.0)
    still = exactly(problem, unit_factor=held).weights[:100]
    np.testing.assert_allclose(still, problem.starting_weights[:100], rtol=1e-6)


def test_a_weight_is_a_price_and_a_tolerance_a_band():
    base = survey(4, change=0.3)
    prices = np.full(12, np.nan)
    prices[:3] = 0.5
    soft = CalibrationProblem(base.matrix, base.targets, base.initial_weights, target_weights=prices)
    result = exactly(soft)
    errors = np.abs(soft.scaled_errors(result.estimates))
    assert (errors[:3] > 1e-4).all()
    assert errors[3:].max() < 1e-12
    # Half the price times the squared error over the scale: the multiplier is its slope.
    expected = -0.5 * base.starting_weights.sum() * soft.scaled_errors(result.estimates) / soft.scale
    np.testing.assert_allclose(result.multipliers[:3], expected[:3], rtol=1e-6)
    band = CalibrationProblem(
        base.matrix, base.targets, base.initial_weights, target_tolerances=0.02 * base.targets
    )
    wide = exactly(band)
    assert wide.diagnostics["max_are"] <= 0.02 * (1 + 1e-9)
    assert wide.diagnostics["max_abs_scaled_error"] < 1e-12
    inside = np.abs(wide.estimates / base.targets - 1) < 0.02 * (1 - 1e-6)
    assert inside.any()
    rows, initial = base.matrix.toarray(), base.starting_weights
    np.testing.assert_allclose(wide.multipliers[inside] * (rows[inside] @ initial), 0, atol=1e-3)

    def distance(weights):
        return (initial * (weights / initial - 1) ** 2).sum()

    assert distance(wide.weights) < distance(exactly(base).weights)


@pytest.mark.parametrize("distance", DISTANCES)
def test_what_cannot_be_met_gives_way_and_is_named(distance):
    base = survey(5, targets=6, households=300)
    rows = sp.vstack([base.matrix, sp.csr_array(base.matrix[:4].sum(axis=0)[None])])
    totals = [*base.targets, 2 * base.targets[:4].sum()]
    problem = CalibrationProblem(rows, totals, base.initial_weights)
    bounds = (0.1, 5.0) if distance == "logit" else None
    result = exactly(problem, distance, bounds=bounds)
    assert result.exact.gave_way.tolist() == [6] or len(result.exact.gave_way) < 5
    (certificate,) = result.exact.certificate
    assert certificate["feasible"] is False
    assert set(certificate["targets"]) == {0, 1, 2, 3, 6}
    met = np.setdiff1d(np.arange(7), result.exact.gave_way)
    np.testing.assert_allclose(result.estimates[met], problem.targets[met], rtol=1e-7)
    assert (result.multipliers[result.exact.gave_way] != 0).all()
    asked = np.array([True] * 7)
    with pytest.raises(ValueError, match=r"hard targets contradict each other.*target_6 together"):
        exactly(
            CalibrationProblem(rows, totals, base.initial_weights, target_hard=asked), distance, bounds=bounds
        )


def test_bounds_that_are_too_narrow_are_told_from_failure():
    problem = survey(6, change=0.8)
    result = exactly(problem, bounds=(0.95, 1.05))
    assert result.exact.certificate[0]["feasible"] is False
    assert len(result.exact.gave_way) > 0
    ratio = result.weights / problem.starting_weights
    assert ratio.min() >= 0.95 - 1e-12
    assert ratio.max() <= 1.05 + 1e-12


def test_a_zero_that_contradicts_a_region_gives_way_alone():
    base = survey(7, targets=8, households=400)
    rows = sp.vstack([base.matrix, sp.csr_array(base.matrix.sum(axis=0)[None])])
    problem = CalibrationProblem(rows, [*base.targets, 0.0], base.initial_weights)
    result = exactly(problem)
    assert result.exact.gave_way.tolist() == [8]
    np.testing.assert_allclose(result.estimates[:8], base.targets, rtol=1e-7)


def torn(seed, share=1.3):
    """Four regions in waves; one asks for more poor than it has people, and losses for none at all."""
    rng = np.random.default_rng(seed)
    region, wave = np.repeat(np.arange(4), [250, 200, 130, 20]), rng.integers(0, 3, 600)
    income = np.where(rng.random(600) < 0.12, -rng.gamma(1, 1500, 600), rng.gamma(2, 800, 600))
    weights, poor = rng.uniform(5, 60, 600), rng.random(600) < 0.3
    true = weights * np.exp(rng.normal(0, 0.15, 600))
    cells = [((region == r) & (wave == k)).astype(float) for r in range(4) for k in range(3)]
    rows = np.array([*cells, *(income * (region == r) for r in range(4))])
    last = (region == 3).astype(float)
    asked = [*(rows @ true), share * (last @ true), -1.0]
    matrix = np.vstack([rows, last * poor, np.minimum(income, 0)])
    prices = np.array([np.nan] * 17 + [0.5])
    return CalibrationProblem(matrix, asked, weights, target_weights=prices)


def test_bounds_beyond_all_numbers_are_none():
    problem = survey(8)
    wide, open_ended = exactly(problem, bounds=(-1e308, 1e308)), exactly(problem, bounds=(-np.inf, np.inf))
    np.testing.assert_array_equal(wide.weights, open_ended.weights)


@pytest.mark.parametrize("seed", range(6))
def test_a_soft_target_that_asks_too_much_leaves_others_alone(seed):
    result = exactly(torn(seed), bounds=(0.3, 3.0))
    assert result.exact.gave_way.tolist() == [16]
    errors = result.problem.linear.scaled_errors(result.exact.totals)
    assert np.abs(errors[:16]).max() < 1e-12


def test_many_targets_go_by_conjugate_gradients(monkeypatch):
    from sparsereg.calibration.solver import dual_newton

    problem = survey(8, targets=60, households=2000)
    direct = exactly(problem, "raking").weights
    monkeypatch.setattr(dual_newton, "_MOST_DENSE", 10)
    result = exactly(problem, "raking")
    np.testing.assert_allclose(result.weights, direct, rtol=1e-8)
    assert result.diagnostics["max_abs_scaled_error"] < 1e-12


@pytest.mark.parametrize("distance", ["linear", "raking"])
def test_six_thousand_targets_are_met_by_weights_that_their_multipliers_explain(distance):
    """Areas, and states that are not their sums: one domain, beyond what is factorised."""
    rng = np.random.default_rng(11)
    n, areas = 30_000, 2_000
    area, age = rng.integers(0, areas, n), rng.integers(0, 9, n)
    income, j = rng.lognormal(10, 1, n), np.arange(n)
    parts = [
        (area, np.ones(n), areas),
        (area, income, areas),
        (area, 1.0 * (age < 3), areas),
        (age, income, 9),
    ]
    rows = sp.vstack([sp.csr_array((v, (c, j)), shape=(k, n)) for c, v, k in parts])
    initial = rng.lognormal(sigma=0.5, size=n)
    totals = rows @ (initial * (1 + 0.3 * rng.uniform(-1, 1, n)))
    problem = CalibrationProblem(rows, totals, initial)
    assert problem.num_targets > _MOST_DENSE
    result = exactly(problem, distance, bounds=(0.3, 3.0))
    assert result.diagnostics["max_abs_scaled_error"] < 1e-11
    reach = result.multipliers @ problem.matrix.astype(np.float64)
    ratio, _ = distance_of(distance, np.full(n, 0.3), np.full(n, 3.0)).respond(reach)
    np.testing.assert_allclose(result.weights, initial * ratio, rtol=1e-9)


def areas_and_ages(disagree: float, seed: int = 0) -> CalibrationProblem:
    """Counts and incomes by area, counts by state and age: their sums agree, or by so much do not."""
    rng = np.random.default_rng(seed)
    n, areas = 2_000, 40
    area, age, j = rng.integers(0, areas, n), rng.integers(0, 5, n), np.arange(n)
    parts = [
        (area, np.ones(n), areas),
        (area, rng.lognormal(10, 1, n), areas),
        (area % 4 * 5 + age, np.ones(n), 20),
        (age, rng.lognormal(10, 1, n), 5),
    ]
    rows = sp.vstack([sp.csr_array((v, (c, j)), shape=(k, n)) for c, v, k in parts])
    initial = 100 * rng.lognormal(sigma=0.5, size=n)
    totals = rows @ (initial * (1 + 0.3 * rng.uniform(-1, 1, n)))
    return CalibrationProblem(rows, totals * (1 + disagree * rng.normal(size=len(totals))), initial)


@pytest.mark.parametrize("distance", ["linear", "raking"])
def test_multipliers_prove_a_contradiction_where_a_linear_programme_would_take_too_long(
    monkeypatch, distance
):
    from sparsereg.calibration.solver import dual_newton

    problem = areas_and_ages(0.01)
    (programmed,) = exactly(problem, distance).exact.certificate
    monkeypatch.setattr(dual_newton, "_MOST_DENSE", 10)
    monkeypatch.setattr(exact_module, "_MOST_PROGRAMMED", 10)
    monkeypatch.setattr(exact_module, "linprog", None)
    exact = exactly(problem, distance).exact
    (proven,) = exact.certificate
    assert proven["feasible"] is programmed["feasible"] is False
    assert 0 < proven["violation"] <= programmed["violation"] * (1 + 1e-9)  # a lower bound of the least
    assert set(programmed["targets"]) <= set(proven["targets"])
    assert len(exact.gave_way) > 20


def test_a_linear_programme_without_an_answer_leaves_the_proof_to_multipliers(monkeypatch):
    class TimedOut:
        status = 1

    monkeypatch.setattr(exact_module, "linprog", lambda *args, **kwargs: TimedOut())
    (certificate,) = exactly(areas_and_ages(0.01)).exact.certificate
    assert certificate["feasible"] is False
    assert certificate["violation"] > 0


def test_targets_that_disagree_by_rounding_are_no_contradiction_beyond_what_is_factorised(monkeypatch):
    from sparsereg.calibration.solver import dual_newton

    monkeypatch.setattr(dual_newton, "_MOST_DENSE", 10)
    result = exactly(areas_and_ages(1e-8))
    assert not result.exact.certificate
    assert result.exact.error < dual_newton.ROUNDED


@pytest.mark.parametrize("seed", range(12))
def test_what_multipliers_prove_is_true_and_what_can_be_met_is_never_excluded(seed):
    """Entries and bounds of either sign, one sided or not; half of the problems can be met."""
    from scipy.optimize import linprog

    rng = np.random.default_rng(seed)
    n, m = 60, 6
    rows = sp.csr_array(rng.normal(size=(m, n)) if seed % 3 == 0 else rng.uniform(size=(m, n)))
    low, high = [(0.5, 2.0), (0.0, np.inf), (-np.inf, 3.0), (0.2, np.inf)][seed % 4]
    inside = rng.uniform(max(low, -1.0), min(high, 4.0), n)
    totals = np.asarray(rows @ inside) + (0.0 if seed % 2 else rng.normal(scale=15.0, size=m))
    problem = CalibrationProblem(rows, totals, np.ones(n))
    bounds = [(None if low == -np.inf else low, None if high == np.inf else high)] * n
    feasible = linprog(np.zeros(n), A_eq=rows, b_eq=totals, bounds=bounds).status == 0
    ends = (np.full(n, low), np.full(n, high))
    prices = np.full(m, np.inf)
    (domain,) = exact_module.domains(problem.linear, "linear", *ends, np.ones(n), prices)
    end = exact_module.solve(domain.dual)
    assert end.converged == feasible
    if feasible:
        assert end.proof is None
        for multipliers in rng.normal(size=(200, m)) * 10.0 ** rng.integers(-3, 6, (200, 1)):
            assert domain.dual.excludes(multipliers) == 0
    if end.proof is not None:
        assert domain.dual.excludes(end.proof) > 0


def test_domains_are_solved_at_the_same_time(monkeypatch):
    """The first two wait for each other: one after the other, they would wait in vain."""
    both, solve, num_threads = threading.Barrier(2), exact_module.solve_domain, torch.get_num_threads()
    started = []

    def together(domain):
        started.append(domain)
        if len(started) <= 2:
            both.wait(timeout=60)
        return solve(domain)

    monkeypatch.setattr(exact_module, "solve_domain", together)
    parts = [survey(seed, targets=3, households=40) for seed in range(6)]
    rows = sp.block_diag([p.matrix for p in parts])
    whole = CalibrationProblem(
        rows, np.concatenate([p.targets for p in parts]), np.concatenate([p.starting_weights for p in parts])
    )
    torch.set_num_threads(2)
    try:
        result = exactly(whole)
    finally:
        torch.set_num_threads(num_threads)
    assert len(started) == 6
    assert result.diagnostics["max_abs_scaled_error"] < 1e-12


def test_ratios_are_met_exactly():
    rng = np.random.default_rng(9)
    income = rng.lognormal(size=300)
    problem = CalibrationProblem(
        np.array([np.ones(300), income]), [330.0, 1.5], denominators=np.array([np.zeros(300), np.ones(300)])
    )
    w = exactly(problem, "raking").weights
    assert w.sum() == pytest.approx(330, rel=1e-12)
    assert w @ income / w.sum() == pytest.approx(1.5, rel=1e-12)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bounds": (2.0, 0.5)}, r"bounds must have low < high, got \[2, 0.5\]"),
        ({"bounds": (1.2, 3.0)}, r"either side of 1: got \[1.2, 3\]"),
        ({"bounds": (0.1, 0.9)}, r"either side of 1: got \[0.1, 0.9\]"),
        ({"bounds": (0.1,)}, r"bounds must be \[low, high\]"),
        ({"bounds": ("a", 2)}, "bounds must be two numbers"),
        ({"bounds": (float("nan"), 2)}, "bounds must be numbers, got NaN"),
        ({"distance": "raking", "bounds": (-1, 2)}, "distance='raking' needs bounds >= 0"),
        ({"distance": "logit"}, "distance=logit needs bounds"),
        ({"distance": "logit", "bounds": (0.2, None)}, "distance='logit' needs finite bounds"),
        ({"distance": "logit", "bounds": (1.0, 2.0)}, "distance='logit' needs finite bounds with low < 1"),
        ({"distance": "rakin"}, "did you mean 'raking'"),
        ({"unit_factor": np.zeros(200)}, "unit_factor must be > 0, got 0 for household 0"),
        ({"unit_factor": np.ones(3)}, r"unit_factor must have shape \(200,\)"),
        ({"weight_bounds": (1e6, 2e6), "bounds": (0.5, 2)}, "bounds and weight_bounds exclude each other"),
        ({"num_households": 5}, "method='calibrate' keeps everybody"),
        ({"loss": "mape"}, "method=calibrate does not know loss"),
        ({"method": "pruning", "num_households": 5, "bounds": (0.5, 2)}, "bounds needs method=calibrate"),
        ({"method": "all", "distance": "raking"}, "distance needs method=calibrate"),
    ],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        calibrate(survey(), **{"method": "calibrate", **settings})


def test_sums_that_were_rounded_are_no_contradiction():
    base = survey(12, targets=20, households=300)
    rows = sp.vstack([base.matrix, sp.csr_array(base.matrix.sum(axis=0)[None])])
    problem = CalibrationProblem(rows, [*base.targets, base.targets.sum() * (1 + 3e-9)], base.initial_weights)
    result = exactly(problem, "raking")
    assert result.diagnostics["max_abs_scaled_error"] < 1e-8
    assert result.exact.certificate == []
    np.testing.assert_allclose(result.weights, exactly(base, "raking").weights, rtol=1e-6)


def test_of_targets_that_are_sums_of_others_the_parts_are_kept():
    from sparsereg.calibration.solver.distances import distance_of
    from sparsereg.calibration.solver.dual_newton import Dual, Rows, Slack, independent

    rng = np.random.default_rng(3)
    district = rng.integers(0, 8, 400)
    parts = np.array([(district == k) * rng.lognormal(size=400) for k in range(8)])
    states = np.array([parts[:4].sum(axis=0), parts[4:].sum(axis=0)])
    rows = np.vstack([parts.sum(axis=0), states, parts])[rng.permutation(11)]
    none = np.zeros(11)
    slack = Slack(np.full(11, np.inf), none, none)
    ones = np.ones(400)
    dual = Dual(
        Rows(sp.csr_array(rows), np.ones(11)),
        none,
        ones,
        ones,
        distance_of("linear", 0 * ones, 9 * ones),
        slack,
    )
    chosen = independent(dual)
    assert len(chosen) == 8
    assert ((rows[chosen] > 0).sum(axis=1) < 100).all()
