"""Totals of the file's own columns as soft targets: what they are, and that a small file keeps them."""

import numpy as np
import pandas as pd
import pytest

from sparsereg.calibration import CalibrationProblem, calibrate
from sparsereg.calibration.cross_validation import cross_validate
from sparsereg.calibration.pseudo_targets import (
    GROUP,
    PULL,
    PULLS,
    SHARE,
    SMALLEST_CELL,
    extended,
    full_calibration,
    own_columns,
    selecting,
)


def survey(n=600, seed=0):
    generator = np.random.default_rng(seed)
    return pd.DataFrame(
        {
            "id": np.arange(n),
            "region": generator.choice(["north", "south", "west"], n),
            "owner": generator.random(n) < 0.4,
            "size": generator.integers(1, 5, n),
            "income": generator.gamma(2.0, 10.0, n),
            "note": [f"text {i}" for i in range(n)],
            "same": 1,
        }
    )


def test_totals_are_those_of_a_group_by():
    table = survey()
    own = own_columns(table, ["id"])
    w = np.random.default_rng(1).random(len(table))
    found = dict(zip(own.names, own.values(w), strict=True))
    counts = table.assign(w=w).groupby(["region", "owner"]).w.sum()
    assert found["region north, owner True"] == pytest.approx(counts["north", True], rel=1e-12)
    sums = (table.income * w).groupby(table["size"]).sum()
    assert found["income of size 3"] == pytest.approx(sums[3], rel=1e-12)
    assert not any(word in name for name in own.names for word in ("id", "note", "same"))
    assert (own.cells >= SMALLEST_CELL).all()
    thirds = np.quantile(table.income, [1 / 3, 2 / 3])
    middle = (table.income > thirds[0]) & (table.income <= thirds[1])
    label = f"size 2, income above {thirds[0]:.6g}"
    assert found[label] == pytest.approx(w[middle & (table["size"] == 2)].sum(), rel=1e-12)
    pairs = 3 * 2 + 3 * 4 + 2 * 4 + 3 * (3 + 2 + 4)  # of region, owner, size and three classes of income
    assert len(own.names) == pairs + (3 + 2 + 4 + 3)


def test_numbers_are_cut_at_zero_and_into_thirds_of_the_positive_ones():
    values = np.concatenate([np.full(10, -5.5), np.zeros(20), np.arange(1, 31) + 0.5])
    table = pd.DataFrame({"x": values, "half": ["a", "b"] * 30})
    names = own_columns(table).names
    found = {name.partition("x ")[2] for name in names if ", x " in name}
    assert found == {"negative", "zero", "above 0", "above 11.1667", "above 20.8333"}


def test_classes_are_left_out_where_they_would_fill_the_memory(monkeypatch):
    monkeypatch.setattr("sparsereg.calibration.pseudo_targets.MOST_ENTRIES", 6 * 600)
    assert not any("above" in name for name in own_columns(survey(), ["id"]).names)


def test_small_cells_missing_values_and_ids_are_left_alone():
    table = survey(80)
    table.loc[0, "region"] = "island"
    table.loc[1:30, "income"] = np.nan
    table["owner"] = table.owner.astype(object).where(~table.index.isin(range(31, 61)), None)
    own = own_columns(table)
    assert not any("island" in name for name in own.names)
    assert np.isfinite(own.rows.data).all()
    assert any("owner missing" in name for name in own.names)
    assert own_columns(pd.DataFrame({"a": [1, 2, 3]})).names == ()


def problem_of(table, weights):
    rows = np.stack([np.ones(len(table)), table.region == "north", table.income]).astype(float)
    names = ["all", "north", "income"]
    return CalibrationProblem(rows, rows @ weights * [1, 1.1, 0.95], np.ones(len(table)), names)


def test_the_users_targets_stay_first_and_the_others_count_a_share():
    table = survey()
    problem = problem_of(table, np.ones(len(table)))
    full = calibrate(problem, method="all", chi2=PULL).weights
    longer = extended(problem, own_columns(table, ["id"]), full)
    assert longer.names[:3] == problem.names
    assert np.array_equal(longer.targets[:3], problem.targets)
    assert all(name.startswith(GROUP) for name in longer.names[3:])
    assert longer.target_shares[3:].sum() == pytest.approx(SHARE * longer.target_shares[:3].sum())
    assert longer.estimates(full)[3:] == pytest.approx(longer.targets[3:], rel=1e-6)
    result = calibrate(longer, num_households=100).of(problem)
    assert result.problem is problem
    assert result.estimates == pytest.approx(problem.estimates(result.weights))


@pytest.mark.costly
def test_a_small_file_is_better_on_what_it_was_not_fitted_to():
    """Over seeds: totals that only the file's columns know, with and without pseudo-targets."""
    with_, without = [], []
    for seed in range(4):
        table = survey(1200, seed)
        problem = problem_of(table, np.ones(len(table)))
        own = own_columns(table, ["id"])
        full = calibrate(problem, method="all", chi2=PULL).weights
        held_out = np.stack([(table.region == "south") & table.owner, table.income * (table["size"] == 2)])
        wanted = held_out.astype(float) @ full
        settings = selecting({"chi2": None, "max_weight_ratio": None}, 0.1)
        for errors, weights in (
            (with_, calibrate(extended(problem, own, full), num_households=120, **settings).weights),
            (without, calibrate(problem, num_households=120).weights),
        ):
            errors.append(np.abs(held_out.astype(float) @ weights / wanted - 1).mean())
    assert np.mean(with_) < 0.5 * np.mean(without)


def sources(noise, seed=0, n=2000):
    """A survey, and totals of three families by region, each of them off by about so much."""
    table = survey(n, seed)
    generator = np.random.default_rng(100 + seed)
    true = np.exp(0.4 * (table.region == "north") + 0.3 * table.owner)
    one = [
        (table.region == r) & (table["size"] == s) for r in ("north", "south", "west") for s in range(1, 5)
    ]
    rows = np.stack([*one, *(table.income * o for o in one), *(table.owner & o for o in one)]).astype(float)
    targets = rows @ true * np.exp(noise * generator.normal(size=len(rows)))
    groups = np.repeat(["households", "income", "owners"], 12)
    return CalibrationProblem(rows, targets, np.ones(n), target_groups=groups), true


@pytest.mark.costly
@pytest.mark.parametrize(("noise", "low", "high"), [(0.0, 1e-4, 1e-2), (0.4, 1e-1, 1.0)])
def test_the_pull_is_that_with_which_families_are_predicted_best(noise, low, high):
    """Sources that agree are to be believed, those that do not are not: so it must come out."""
    problem, true = sources(noise)
    weights, validation = full_calibration(problem, everybody, 0)
    assert low <= validation.best <= high
    assert validation.errors[validation.pulls.index(validation.best)] == min(validation.errors)
    assert np.array_equal(weights, everybody(problem, validation.best))
    far = [np.abs(np.log(everybody(problem, pull) / true)).mean() for pull in PULLS]
    assert np.abs(np.log(weights / true)).mean() <= 1.25 * min(far)


def everybody(problem, pull):
    return calibrate(problem, method="all", chi2=pull).weights


def test_what_is_left_out_is_not_seen_by_the_pull_that_it_judges():
    problem, _ = sources(0.0)
    seen = []

    def solve(part, pull):
        seen.append((pull, tuple(np.unique(part.target_groups))))
        return np.ones(part.num_households)

    found = cross_validate(problem, (0.1, 0.2), solve, 0)
    assert sorted(seen[:3]) == [
        (0.1, ("households", "income")),
        (0.1, ("households", "owners")),
        (0.1, ("income", "owners")),
    ]
    assert len(seen) == 6
    errors = np.minimum(np.abs(problem.scaled_errors(problem.estimates(np.ones(2000)))), 1.0)
    counts = np.diff(problem.matrix.indptr) >= 100
    assert found.errors == pytest.approx((errors[counts].mean(),) * 2)
    assert found.told()[1]["chi2"] == 0.2


def test_without_groups_there_is_nothing_to_leave_out():
    problem = problem_of(survey(), np.ones(600))
    weights, validation = full_calibration(problem, everybody, 0)
    assert validation is None
    assert np.array_equal(weights, everybody(problem, PULL))


def test_a_table_of_too_many_columns_is_refused_before_it_fills_the_memory(monkeypatch):
    monkeypatch.setattr("sparsereg.calibration.pseudo_targets.MOST_ENTRIES", 1000)
    with pytest.raises(ValueError, match="leave columns out of the table"):
        own_columns(survey())
