"""Totals of the file's own columns by the command: by request, and by default within tolerances."""

import json

import numpy as np
import pandas as pd
import pytest

from sparsereg.calibration import cross_validation
from sparsereg.errors import InputError

from .test_run import _own_folder, run  # noqa: F401

BASE = (
    "problem=households", "problem.households=H.csv", "problem.targets=T.csv", "problem.weight=w",
    "problem.id=hid", "num_households=120", "plots=false", "tensorboard=false", "holdout.groups=null",
)  # fmt: skip
REGIONS = ("north", "south", "west")


def write(n=1200, **columns):
    """A survey, and totals by region of three families, which may lie so far from the truth."""
    generator = np.random.default_rng(7)
    table = pd.DataFrame(
        {
            "hid": np.arange(n),
            "w": np.round(generator.random(n) + 1, 3),
            "region": generator.choice(REGIONS, n),
            "size": generator.integers(1, 6, n),
            "owner": generator.random(n) < 0.4,
            "income": np.round(generator.gamma(2.0, 10.0, n), 2),
            "rent": np.where(generator.random(n) < 0.5, 0, np.round(generator.gamma(3.0, 2.0, n), 2)),
        }
    )
    rows = [
        (f"{group} {r}", group, measure, f"region == '{r}'" + more)
        for group, measure, more in (
            ("people", "size", ""),
            ("money", "income", ""),
            ("own", "", " and owner"),
        )
        for r in REGIONS
    ]
    targets = pd.DataFrame(rows, columns=["name", "group", "measure", "where"])
    inside = [
        table.eval(w.replace(" and owner", "")) & (table.owner | ("owner" not in w)) for w in targets["where"]
    ]
    sums = [table[m] if m else 1.0 for m in targets.measure]
    targets["value"] = [1.08 * (table.w * s * i).sum() for s, i in zip(sums, inside, strict=True)]
    table.to_csv("H.csv", index=False)
    targets.assign(**columns).to_csv("T.csv", index=False)
    return table


def bystanders(table, folder):
    """Mean error of totals that nobody asked for, as the whole file has them, 8 % up as all targets are."""
    kept = table.merge(pd.read_csv(folder / "weights.csv")[["id", "weight"]], left_on="hid", right_on="id")
    errors = []
    for r in REGIONS:
        for size in range(1, 6):
            whole, part = (t[(t.region == r) & (t["size"] == size)] for t in (table, kept))
            errors += [part.weight.sum() / (1.08 * whole.w.sum()) - 1]
            errors += [(part.weight * part.rent).sum() / (1.08 * (whole.w * whole.rent).sum()) - 1]
    return np.abs(errors).mean()


@pytest.mark.costly
def test_by_default_they_are_used_where_every_target_has_a_tolerance_and_cost_nothing_then():
    table = write(tolerance="2%")
    folder, results = run(*BASE)
    told = results["pseudo_targets"]
    assert told["used"]
    assert told["full_chi2"] in [row["chi2"] for row in told["cross_validation"]]
    assert results["max_abs_scaled_error"] == 0
    assert results["max_are"] <= 0.02
    own = pd.read_csv(folder / "pseudo_targets.csv")
    assert len(own) == told["targets"] > 50
    page = (folder / "report.html").read_text()
    assert own.name[own.scaled_error.abs().idxmax()] in page
    assert "How strongly the whole file was held" in page
    assert "Bounds: max_weight_ratio 40" in page
    without, _ = run(*BASE, "pseudo_targets=none")
    assert not (without / "pseudo_targets.csv").exists()
    assert "Own columns" not in (without / "report.html").read_text()
    assert bystanders(table, folder) < 0.6 * bystanders(table, without)


@pytest.mark.costly
@pytest.mark.parametrize("tolerance", [None, ["2%"] * 8 + [""]])
def test_by_default_they_are_not_used_where_a_target_has_none(tolerance):
    write(**({} if tolerance is None else {"tolerance": tolerance}))
    with_, results = run(*BASE)
    without, _ = run(*BASE, "pseudo_targets=none")
    assert results.get("pseudo_targets") in (None, {"used": False})
    assert (with_ / "weights.csv").read_text() == (without / "weights.csv").read_text()
    asked, results = run(*BASE, "pseudo_targets=own_columns")
    assert results["pseudo_targets"]["used"]
    assert (asked / "weights.csv").read_text() != (without / "weights.csv").read_text()


@pytest.mark.costly
def test_what_costs_more_than_the_tolerance_is_not_kept():
    """The largest weight that is allowed is met without own columns, and not with them."""
    write(tolerance="2%")
    _, free = run(*BASE)
    without, plain = run(*BASE, "pseudo_targets=none")
    assert plain["ess"] != free["ess"]
    more = plain["ess"] > free["ess"]
    limit = f"require.ess={plain['ess'] - 1e-9}" if more else f"require.max_ratio={plain['max_ratio'] + 1e-9}"
    held, results = run(*BASE, limit)
    met = free["ess"] >= plain["ess"] - 1e-9 if more else free["max_ratio"] <= plain["max_ratio"] + 1e-9
    assert results["pseudo_targets"]["used"] is met
    assert all(row["met"] for row in results["required"])
    if not met:
        assert (held / "weights.csv").read_text() == (without / "weights.csv").read_text()


@pytest.mark.costly
def test_the_sweep_and_the_hold_out_tell_all_that_is_needed_at_every_number():
    write(tolerance="2%")
    folder, results = run(*BASE[:-1], "holdout.folds=3")
    for key in ("mean_are", "median_are", "large_mean_are"):
        assert results["holdout"][key] >= 0
        assert results["holdout"][f"fitted_{key}"] >= 0
    assert results["held_out_large_mean"] == results["holdout"]["large_mean_are"]
    assert {"large_mean_are", "fitted_median_are"} <= set(pd.read_csv(folder / "holdout.csv").columns)
    json.dumps(results)


def test_they_need_columns_and_a_number_where_they_are_asked_for():
    write()
    with pytest.raises(InputError, match="pseudo_targets needs num_households=K"):
        run(
            *(b for b in BASE if "num_households" not in b),
            "pseudo_targets=own_columns",
            "num_households=null",
        )


@pytest.mark.costly
def test_a_pull_is_not_tried_on_problems_that_are_too_large(monkeypatch):
    write(tolerance="2%")
    monkeypatch.setattr("sparsereg.calibration.pseudo_targets.MOST_VALIDATED", 10)
    monkeypatch.setattr(cross_validation, "random_folds", None)
    _, results = run(*BASE)
    assert results["pseudo_targets"]["cross_validation"] is None
