import itertools
from dataclasses import replace

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from scipy.optimize import lsq_linear, nnls

from sparsereg.calibration.measures import measure
from sparsereg.calibration.problem import CalibrationProblem
from sparsereg.calibration.reading.synthetic import synthetic_problem
from sparsereg.calibration.solver.calibration import Calibration, Settings, calibrate, polish
from sparsereg.calibration.solver.selection import NAMES

CHOOSING = [name for name in NAMES if name not in ("all", "calibrate")]


def survey(seed=0, targets=30, households=300, noise=0.02, **more):
    rng = np.random.default_rng(seed)
    matrix = rng.lognormal(size=(targets, households)) * (rng.random((targets, households)) < 0.2)
    initial = rng.lognormal(sigma=0.5, size=households) * 100
    totals = matrix @ (initial * rng.lognormal(sigma=0.2, size=households))
    return CalibrationProblem(
        sp.csr_array(matrix), totals * rng.lognormal(sigma=noise, size=targets), initial, **more
    )


@pytest.mark.parametrize("seed", range(6))
def test_selection_against_all_subsets(seed):
    """Tiny problems: the best of all subsets is found, or one that is nearly as good."""
    problem = survey(seed, targets=6, households=11, noise=0.1)
    scale = problem.scale
    dense, wanted = problem.matrix.toarray().astype(np.float64) / scale[:, None], problem.targets / scale
    values = sorted(
        nnls(dense[:, list(subset)], wanted)[1] ** 2 / 6 for subset in itertools.combinations(range(11), 4)
    )
    result = calibrate(problem, 4)
    assert result.num_kept == 4
    assert result.loss >= values[0] * (1 - 1e-9)
    assert np.searchsorted(values, result.loss * (1 - 1e-6)) < 0.05 * len(values)


@pytest.mark.costly
@pytest.mark.parametrize("method", CHOOSING)
@pytest.mark.parametrize("number", [1, 7, 29, 150, 300])
def test_exactly_the_wanted_number(method, number):
    problem = survey()
    result = calibrate(problem, number, method=method, epochs=60)
    assert result.num_kept == number
    assert (result.weights > 0).sum() == number
    assert (result.weights >= 0).all()
    np.testing.assert_allclose(result.estimates, problem.estimates(result.weights), rtol=1e-12)
    assert len(result.to_frame()) == number


@pytest.mark.costly
@pytest.mark.parametrize("method", CHOOSING)
def test_same_seed_same_weights(method):
    problem = survey()
    one, two = (calibrate(problem, 40, method=method, epochs=40, seed=5) for _ in range(2))
    assert np.array_equal(one.weights, two.weights)


@pytest.mark.parametrize(
    ("targets", "households", "noise"), [(120, 40, 0.02), (60, 400, 0.02), (60, 200, 2.0)]
)
def test_all_is_the_nnls_of_everybody(targets, households, noise):
    problem = survey(targets=targets, households=households, noise=noise)
    result = calibrate(problem, method="all", chi2=0.0)
    scale = problem.scale
    rows = problem.matrix.toarray() / scale[:, None]
    _, rest = nnls(rows, problem.targets / scale)
    assert result.loss == pytest.approx(rest**2 / targets, rel=1e-7, abs=1e-15)
    assert result.kkt_violation <= 1e-9


def test_the_refit_of_more_households_than_targets_is_exact_and_even():
    problem = synthetic_problem(1000, 150)
    pulled, free = (calibrate(problem, 400, method="random", chi2=chi2) for chi2 in (None, 0.0))
    assert max(pulled.kkt_violation, free.kkt_violation) <= 1e-9
    assert pulled.loss == pytest.approx(free.loss, rel=0.01)
    assert pulled.diagnostics["ess"] > 1.2 * free.diagnostics["ess"]


@pytest.mark.parametrize("chi2", [1e-7, 1e-5, 1e-2])
def test_all_is_the_minimum_of_loss_and_pull_whatever_the_pull_and_the_seed(chi2):
    problem = survey(18, targets=40, households=250, noise=0.3)
    initial = problem.starting_weights
    results = [calibrate(problem, method="all", chi2=chi2, seed=seed) for seed in (0, 1)]
    np.testing.assert_allclose(results[1].weights, results[0].weights, rtol=1e-6, atol=1e-6 * initial.max())
    assert all(0 <= r.kkt_violation < 1e-9 for r in results)
    share = initial / initial.sum()
    rows = problem.matrix.toarray() * initial / problem.scale[:, None] / np.sqrt(40)
    both = np.vstack([rows, np.diag(np.sqrt(chi2 * share))])
    right = np.append(problem.targets / problem.scale / np.sqrt(40), np.sqrt(chi2 * share))
    best = lsq_linear(both, right, (1e-6, np.inf), method="bvls", tol=1e-15, max_iter=10_000)

    def minimised(weights):
        return ((both @ (weights / initial) - right) ** 2).sum()

    assert minimised(results[0].weights) == pytest.approx(minimised(initial * best.x), rel=1e-8)


@pytest.mark.costly
def test_hard_targets_are_met_by_a_selection():
    problem = survey(19, targets=30, households=400, noise=0.3)
    hard = np.arange(30) < 5
    marked = CalibrationProblem(problem.matrix, problem.targets, problem.initial_weights, target_hard=hard)
    for arguments in ({"num_households": 60}, {"num_households": 20}, {"method": "all"}):
        plain, result = (calibrate(p, **arguments) for p in (problem, marked))
        errors = np.abs(marked.scaled_errors(result.estimates))
        assert errors[:5].max() < 1e-9
        assert np.abs(problem.scaled_errors(plain.estimates))[:5].max() > 1e-9
        assert result.num_kept == plain.num_kept


def test_hard_targets_that_a_selection_cannot_meet_are_named(caplog):
    problem = survey(19, targets=30, households=400, noise=0.3)
    marked = CalibrationProblem(
        problem.matrix, problem.targets, problem.initial_weights, target_hard=np.ones(30, dtype=bool)
    )
    result = calibrate(marked, 10)
    assert result.num_kept == 10
    assert "hard targets that the 10 kept households do not meet: target_0" in caplog.text


def test_pruning_beats_the_others():
    problem = survey(1, targets=60, households=1500)
    losses = {name: calibrate(problem, 40, method=name, epochs=200).loss for name in CHOOSING}
    assert min(losses, key=losses.get) == "pruning"
    assert losses["pruning"] < 0.5 * losses["random"]


def test_polish_never_worsens_a_support():
    problem = survey(2)
    start = calibrate(problem, 20, method="random")
    better = polish(problem, start.selected)
    assert better.num_kept == 20
    assert better.loss < start.loss
    by_index = polish(problem, np.flatnonzero(start.selected))
    assert np.array_equal(by_index.weights, better.weights)


@pytest.mark.parametrize("method", ["pruning", "hard_concrete", "all"])
def test_bounds_and_total_hold(method):
    problem = survey(3)
    number = None if method == "all" else 150
    result = calibrate(problem, number, method=method, max_weight_ratio=4.0, hold_total=True, epochs=50)
    initial = problem.starting_weights
    assert (result.weights <= 4 * initial).all()
    assert result.weights.sum() == pytest.approx(initial.sum(), rel=1e-8)


@pytest.mark.costly
@pytest.mark.parametrize(("number", "ratio"), [(300, 12.0), (150, 30.0)])
def test_a_bound_alone_is_no_worse_than_with_the_total_held(number, ratio):
    """Whoever must not grow beyond a bound has to be large enough: the selection foresees that."""
    problem = synthetic_problem(3000, 300)
    free, held = (
        calibrate(problem, number, max_weight_ratio=ratio, hold_total=hold) for hold in (False, True)
    )
    drawn = calibrate(problem, number, max_weight_ratio=ratio, method="random")
    assert free.loss <= held.loss
    assert free.loss < 0.1 * drawn.loss


def test_a_total_that_bounds_cannot_hold_is_refused():
    with pytest.raises(ValueError, match="max_weight_ratio=1.5 lets the 50 kept households weigh"):
        calibrate(survey(), 50, max_weight_ratio=1.5, hold_total=True)


@pytest.mark.parametrize("loss", ["relative", "mse", "mape", "capped"])
@pytest.mark.parametrize("method", ["pruning", "hard_concrete"])
def test_zero_and_negative_targets_are_never_nan(loss, method):
    problem = survey(4, targets=10)
    targets = problem.targets.copy()
    targets[:4] = [-1.0, 0.0, -1000.0, 1e-9]
    changed = CalibrationProblem(problem.matrix, targets, problem.initial_weights)
    result = calibrate(changed, 30, loss=loss, method=method, epochs=30)
    assert np.isfinite(result.weights).all()
    assert np.isfinite(result.loss)
    assert result.num_kept == 30


@pytest.mark.costly
def test_the_absolute_loss_is_lower_for_its_own_fit():
    problem = survey(5, targets=80, noise=0.3)
    kept = calibrate(problem, 40).selected
    scale = problem.scale
    errors = {
        loss: np.abs((polish_without_swaps(problem, kept, loss) - problem.targets) / scale).mean()
        for loss in ("relative", "mape")
    }
    assert errors["mape"] < errors["relative"]


def polish_without_swaps(problem, kept, loss):
    from sparsereg.calibration.solver.pruning import PruningSchedule

    return polish(problem, kept, loss=loss, schedule=PruningSchedule(swap_rounds=0)).estimates


@pytest.mark.costly
def test_consistency_draws_parts_towards_the_whole():
    parent = np.full(30, -1)
    parent[1:6] = 0
    problem = survey(6, targets=30, households=60, noise=0.3, parent=parent)
    gaps = []
    for factor in (0.0, 100.0):
        estimates = calibrate(problem, 15, consistency=factor).estimates
        gaps.append(abs(estimates[1:6].sum() / problem.targets[0] - 1))
    assert gaps[1] < 0.1 * gaps[0]


def test_group_weights_matter():
    groups = np.array(["few"] * 3 + ["many"] * 27)
    problem = survey(7, noise=0.5, households=40, target_groups=groups)
    plain = calibrate(problem, 10)
    favoured = calibrate(problem, 10, group_multipliers={"few": 1000.0})
    few = slice(0, 3)
    error = [np.abs(r.estimates / problem.targets - 1)[few].mean() for r in (plain, favoured)]
    assert error[1] < error[0]


@pytest.mark.parametrize("method", ["pruning", "hard_concrete", "hybrid"])
def test_interrupted_and_resumed_gives_the_same(method):
    problem, settings = survey(8), Settings(method=method, epochs=60)
    whole = Calibration(problem, 25, settings)
    while not whole.done:
        whole.step()
    first = Calibration(problem, 25, settings)
    for _ in range(3):
        first.step()
    second = Calibration(problem, 25, settings)
    second.load_state_dict(first.state_dict())
    while not second.done:
        second.step()
    assert np.array_equal(whole.result().weights, second.result().weights)


@pytest.mark.costly
@pytest.mark.parametrize("method", ["pruning", "hard_concrete"])
@pytest.mark.parametrize("households", [60, 400])
def test_every_step_is_the_same_after_an_interruption_before_it(method, households):
    """Not only where it ends: also on the way, where the number to keep has been reached and sweeps go on."""
    problem = survey(8, noise=0.3, households=households)
    settings = Settings(method=method, epochs=60)
    whole = Calibration(problem, 25, settings)
    while not whole.done:
        other = Calibration(problem, 25, settings)
        other.load_state_dict(whole.state_dict())
        for run in (whole, other):
            run.step()
        assert torch.equal(other.selection.weights(), whole.selection.weights()), whole.selection.epoch
        assert other.report() == whole.report()


@pytest.mark.costly
def test_compiled_and_torch_agree():
    problem = survey(9)
    random = calibrate(problem, 25, method="random").loss
    for backend in ("compiled", "torch"):  # other steps, other selections, both good
        assert calibrate(problem, 25, backend=backend).loss < 0.01 * random
    everyone = [calibrate(problem, method="all", backend=b).loss for b in ("compiled", "torch")]
    assert everyone[1] == pytest.approx(everyone[0], rel=1e-6, abs=1e-12)


def test_callback_and_history():
    seen = []
    result = calibrate(survey(), 25, callback=lambda *a: seen.append(a))
    assert len(seen) == len(result.history) == len(result.loss_history)
    assert [s[0] for s in seen] == sorted(s[0] for s in seen)
    assert seen[-1][3] <= 25 + 1
    assert seen[-1][4].shape == (30,)


def test_who_asks_for_no_selection_loses_nobody():
    problem = survey(households=300)
    result = calibrate(problem)
    assert result.method == "all"
    assert result.selected.all()
    assert result.diagnostics["kept"] == 300
    assert calibrate(problem, method="hard_concrete", epochs=20).method == "hard_concrete"
    assert calibrate(problem, lambda_l0=0.01, epochs=20).method == "hard_concrete"
    assert calibrate(problem, 20).method == "pruning"


def test_fewer_than_the_wanted_number_are_told(caplog):
    matrix = np.kron(np.eye(2), np.ones(50))
    kept = calibrate(CalibrationProblem(matrix, [0, 80]), 70, refit=False).num_kept
    assert kept < 70
    assert f"{kept} households are kept, fewer than num_households=70" in caplog.text


def test_lambda_decides_without_a_number():
    counts = [calibrate(survey(), lambda_l0=price, epochs=150).num_kept for price in (1e-6, 1e-3, 1e-1)]
    assert counts[0] > counts[1] > counts[2] > 0
    with pytest.raises(ValueError, match="shut every household"):
        calibrate(survey(), lambda_l0=1e9, epochs=150)


def with_zero_total(asked=0.0, **more):
    """A survey whose amounts of one region are asked for, and beside them that they should add up to zero."""
    problem = survey(11, targets=12, households=400, noise=0.0)
    matrix = sp.vstack([problem.matrix, sp.csr_array(problem.matrix[:6].sum(axis=0)[None])])
    return CalibrationProblem(matrix, [*problem.targets, asked], problem.initial_weights, **more)


@pytest.mark.costly
@pytest.mark.parametrize("loss", ["relative", "mape", "mse"])
@pytest.mark.parametrize("arguments", [{"method": "all"}, {"num_households": 60}, {"lambda_l0": 1e-4}])
def test_a_zero_that_all_others_rule_out_does_not_destroy_them(loss, arguments, caplog):
    problem = with_zero_total()
    result = calibrate(problem, loss=loss, epochs=300, **arguments)
    np.testing.assert_allclose(result.estimates[:12], problem.targets[:12], rtol=0.03)
    assert result.set_aside.tolist() == [12]
    assert "set aside" in caplog.text
    assert "target_12" in caplog.text
    assert result.diagnostics["max_abs_scaled_error"] > 100


def test_a_zero_that_can_be_met_is_met_on_the_scale_of_what_goes_into_it():
    """A net total: large amounts of either sign that should cancel."""
    problem = survey(12, targets=12, households=400, noise=0.0)
    net = problem.matrix.toarray()
    net[3, ::2] *= -1
    targets = problem.targets.copy()
    targets[3] = 0.0
    changed = CalibrationProblem(net, targets, problem.initial_weights)
    gross = np.abs(net[3]) @ problem.starting_weights
    assert changed.scale[3] == pytest.approx(1e-3 * gross)
    for arguments in ({"method": "all"}, {"num_households": 60}):
        result = calibrate(changed, **arguments)
        assert len(result.set_aside) == 0
        assert result.diagnostics["max_abs_scaled_error"] < 0.01
        assert abs(result.estimates[3]) < 1e-5 * gross


@pytest.mark.costly
@pytest.mark.parametrize("unit", [1e-6, 1e-4, 1.0, 1e9])
def test_the_unit_of_a_target_does_not_matter(unit):
    problem = survey(13)
    plain = calibrate(problem, 40)
    other = CalibrationProblem(problem.matrix * unit, problem.targets * unit, problem.initial_weights)
    result = calibrate(other, 40)
    assert result.diagnostics["mean_are"] == pytest.approx(plain.diagnostics["mean_are"], rel=0.2)
    assert result.diagnostics["mean_are"] < 0.03


def test_all_targets_zero_end_with_finite_numbers():
    problem = survey(14, targets=5, households=60)
    net = problem.matrix.toarray() * np.where(np.arange(60) % 2, 1.0, -1.0)
    result = calibrate(CalibrationProblem(net, np.zeros(5), problem.initial_weights), method="all")
    assert 0 <= result.kkt_violation < 1e-6
    assert result.diagnostics["max_abs_scaled_error"] < 1e-2


def test_what_lies_within_the_tolerance_is_right():
    problem = survey(15, targets=8, households=300, noise=0.0)
    initial = problem.estimates(problem.starting_weights)
    near = CalibrationProblem(
        problem.matrix, initial * 1.02, problem.initial_weights, target_tolerances=0.03 * initial
    )
    result = calibrate(near, method="all")
    assert result.loss == 0
    assert result.diagnostics["max_abs_scaled_error"] == 0
    assert result.diagnostics["mean_are"] <= 0.03


def test_tolerances_are_met_exactly_with_the_least_change_of_weights():
    """Within its tolerance a target pulls at nothing: the dual with a band, against the long way round."""
    problem = survey(15, targets=8, households=300, noise=0.0)
    initial = problem.estimates(problem.starting_weights)
    off = initial * np.linspace(0.9, 1.1, 8)
    banded = CalibrationProblem(
        problem.matrix, off, problem.initial_weights, target_tolerances=0.04 * initial
    )
    result = calibrate(banded, method="all", chi2=1e-3)
    assert result.steps > 0
    assert result.kkt_violation < 1e-9

    def objective(w):
        ratio = w / problem.starting_weights * problem.starting_weights.sum() / w.sum()
        assert ratio.min() > 0
        loss = np.square(banded.scaled_errors(banded.estimates(w))).mean()
        far = np.square(w / problem.starting_weights - 1)
        return loss + 1e-3 * (problem.starting_weights @ far) / problem.starting_weights.sum()

    best = objective(result.weights)
    generator = np.random.default_rng(0)
    for size in (1e-1, 1e-2, 1e-3):
        for _ in range(20):
            near = result.weights * np.exp(size * generator.normal(size=300))
            assert objective(near) > best
    middle = calibrate(replace(banded, target_tolerances=None), method="all", chi2=1e-3)
    assert objective(middle.weights) > best


def test_a_target_without_an_estimate_leaves_the_largest_error_unknown():
    problem = CalibrationProblem(
        np.array([np.ones(4), [1.0, 1, 0, 0]]),
        [4.0, 0.5],
        denominators=np.array([np.zeros(4), [1.0, 1, 0, 0]]),
    )
    assert measure(problem, np.ones(4))["max_abs_scaled_error"] == 1.0
    assert measure(problem, np.array([0.0, 0, 2, 2]))["max_abs_scaled_error"] is None


def test_shares_and_means_are_targets():
    rng = np.random.default_rng(16)
    income, owner = rng.lognormal(size=500), rng.random(500) < 0.3
    rows = np.array([np.ones(500), income, owner])
    below = np.array([np.zeros(500), np.ones(500), np.ones(500)])
    problem = CalibrationProblem(rows, [1000.0, 2.2, 0.4], np.full(500, 2.0), denominators=below)
    for arguments in ({"method": "all"}, {"num_households": 100}):
        result = calibrate(problem, **arguments)
        w = result.weights
        reached = [w.sum(), w @ income / w.sum(), w @ owner / w.sum()]
        np.testing.assert_allclose(result.estimates, reached, rtol=1e-12)
        np.testing.assert_allclose(reached, problem.targets, rtol=1e-3)
    with pytest.raises(ValueError, match="denominator of target 'target_1' is zero"):
        CalibrationProblem(
            rows, [1000.0, 2.2, 0.4], np.where(owner, 0.0, 1.0), denominators=[below[0], owner, below[2]]
        )


@pytest.mark.parametrize("method", NAMES)
def test_an_initial_weight_of_zero_is_no_weight(method):
    problem = survey(17)
    initial = problem.starting_weights.copy()
    initial[::3] = 0.0
    changed = CalibrationProblem(problem.matrix, problem.targets, initial)
    number = 50 if method in CHOOSING else None
    result = calibrate(changed, number, method=method, epochs=40)
    assert not result.selected[::3].any()
    assert result.num_kept == (200 if number is None else 50)
    if number:
        with pytest.raises(ValueError, match=r"1 to 200 \(of 300, these have an initial weight > 0\)"):
            calibrate(changed, 201, method=method)


@pytest.mark.parametrize(
    ("number", "settings", "message"),
    [
        (0, {}, "num_households must be an integer from 1 to 300, got 0"),
        (301, {}, "from 1 to 300, got 301"),
        (2.5, {}, "got 2.5"),
        (10, {"method": "prunning"}, r"did you mean 'pruning'"),
        (None, {"method": "pruning"}, "needs num_households"),
        (10, {"method": "all"}, "keeps everybody"),
        (10, {"loss": "rmse"}, "loss=rmse: expected one of relative, mse, mape, capped"),
        (10, {"lambda_l0": -1}, "lambda_l0=-1: expected a number >= 0"),
        (10, {"max_weight_ratio": 0}, "max_weight_ratio=0: expected a number > 0 or null"),
        (10, {"hold_total": True, "refit": False}, "hold_total is kept by the refit"),
        (10, {"lambda_scale": "max"}, "lambda_scale=max: expected one of sum, mean"),
    ],
)
def test_wrong_settings_are_named(number, settings, message):
    with pytest.raises(ValueError, match=message):
        calibrate(survey(), number, **settings)
