"""Put the page together: what there is to say, in the order of its readers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sparsereg.calibration.findings import Finding
from sparsereg.calibration.measures import error_summary
from sparsereg.calibration.reading.levels import UNITS, plural
from sparsereg.calibration.reporting.page import pictures
from sparsereg.files import write_text
from sparsereg.page import page
from sparsereg.page.page import fixed, known, number, percent, setting, signed, whole
from sparsereg.settings import flat

if TYPE_CHECKING:
    import pandas as pd

_HERE = Path(__file__).parent
_MOST_OWN = 60
"""Totals of own columns that the page shows; pseudo_targets.csv has all."""
_MOST_TARGETS = 1500
_MOST_FINDINGS = 200
_ON_PAPER = 60
"""Rows of long tables that are printed."""
_MOST_CHANGED = 10
MOVED_MUCH = 0.02
"""A figure that nobody targeted and that moved by more is marked."""
_ERRORS = {
    "mean": "mean_are", "median": "median_are", "9 of 10 are below": "p90_are",
    "99 of 100 are below": "p99_are", "largest": "max_are", "share of targets within 1 %": "within_1pct",
    "share of targets within 10 %": "within_10pct",
}  # fmt: skip
_QUANTILES = {
    "smallest": 0.0,
    "1 %": 0.01,
    "25 %": 0.25,
    "median": 0.5,
    "75 %": 0.75,
    "99 %": 0.99,
    "largest": 1.0,
}


@dataclass(frozen=True, eq=False)
class Contents:
    """All that the page is about.

    Args:
        results: As results.json has them.
        settings: Of the run, plain.
        targets: As ``tables.target_frame`` returns it.
        groups: As ``tables.group_frame`` returns it.
        weights: As ``weight_frame`` returns it.
        initial_weights: Of all households, shape (households,).
        findings: Of the checks.
        holdout: As ``holdout.hold_out`` returns it, if something was left out.
        bystanders: name, statistic, initial, estimate and targeted of what was asked for besides targets.
        estimates: A table of estimates with standard errors, if there are any.
        own_columns: What totals of the file's own columns came to, as targets, if they were used.
    """

    results: Mapping[str, Any]
    settings: Mapping[str, Any]
    targets: pd.DataFrame
    groups: pd.DataFrame
    weights: pd.DataFrame
    initial_weights: np.ndarray
    findings: Sequence[Finding] = ()
    holdout: pd.DataFrame | None = None
    bystanders: pd.DataFrame | None = None
    estimates: pd.DataFrame | None = None
    own_columns: pd.DataFrame | None = None


def write_page(path: Path, contents: Contents) -> None:
    """Write the page, whole or not at all.

    Args:
        path: report.html.
        contents: What it is about.
    """
    write_text(path, render(contents))


def render(contents: Contents) -> str:
    """Return the page as HTML that needs no other file.

    Args:
        contents: What it is about.
    """
    return page.render(_HERE / "report.html", _values(contents))


def _values(c: Contents) -> dict[str, Any]:
    """Return what the template names."""
    r = c.results
    required = list(r.get("required") or [])
    targets, left_out = _shown_targets(c.targets)
    findings = [vars(f) for f in c.findings[:_MOST_FINDINGS]]
    holdout = None if c.holdout is None else _held_out(c.holdout)
    bystanders = None if c.bystanders is None else _bystanders(c.bystanders)
    unit, units = _unit(c), plural(_unit(c))
    groups = _records(c.groups.sort_values("mean_are", ascending=False, na_position="last"))
    values = {
        "r": r,
        "kind": "Calibration report",
        "provenance": r["provenance"],
        "title": f"{r['kept']:,} of {r['households']:,} {units}, method {r['method']}",
        "unit": unit,
        "units": units,
        "required": required,
        "missed": sum(not row["met"] for row in required),
        "tiles": _tiles(c),
        "notes": _notes(c),
        "asked": _asked(c),
        "settings": [(key, setting(value)) for key, value in flat(c.settings).items()],
        "pictures": {
            "errors": pictures.errors(c.targets),
            "sizes": pictures.sizes(c.weights, units),
            "ratios": pictures.ratios(c.weights, units),
        },
        "errors": _errors(c),
        "groups": groups,
        "largest_group": max((g["mean_are"] for g in groups if known(g["mean_are"])), default=0.0),
        "targets": targets,
        "left_out": left_out,
        "on_paper": _ON_PAPER,
        "priced": "price" in c.targets.columns,
        "bounds": _bounds(c),
        "quantiles": _quantiles(c),
        "changed": _changed(c.weights),
        "holdout": holdout,
        "bystanders": bystanders,
        "own": None if c.own_columns is None else _own(c.own_columns),
        "moved_much": MOVED_MUCH,
        "estimates": None if c.estimates is None else _estimates(c.estimates),
        "findings": findings,
        "more_findings": len(c.findings) > len(findings),
    }
    return {**values, "sections": _sections(values)}


def _unit(c: Contents) -> str:
    """What one of those that have a weight is called."""
    return str((c.settings.get("problem") or {}).get("unit_names", UNITS)[0])


def _sections(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the sections that are there, in order: anchor and name."""
    optional = {
        "groups": len(values["groups"]) > 1, "heldout": values["holdout"], "bystanders": values["bystanders"],
        "estimates": values["estimates"], "first": values["notes"], "own": values["own"],
    }  # fmt: skip
    names = {
        "first": "Read this first", "asked": "What was asked", "reached": "What was reached",
        "groups": "Groups",
        "targets": "Targets", "weights": "Weights", "heldout": "Held-out families",
        "own": "Own columns",
        "bystanders": "Bystanders", "estimates": "Standard errors", "findings": "Findings",
        "provenance": "Provenance",
    }  # fmt: skip
    return [(anchor, name) for anchor, name in names.items() if optional.get(anchor, True)]


def _tiles(c: Contents) -> list[dict[str, str]]:
    r = c.results
    tiles = [
        (f"{plural(_unit(c)).capitalize()} kept", number(r["kept"]), f"of {number(r['households'])}"),
        ("Mean error", percent(r["mean_are"]), f"median {percent(r['median_are'])}"),
        ("Largest error", percent(r["max_abs_scaled_error"]), "over its scale"),
        ("Within 10 %", percent(r["within_10pct"]), f"{percent(r['within_1pct'])} within 1 %"),
        ("Effective sample", whole(r["ess"]), f"weighting effect {fixed(r['weighting_effect'])}"),
    ]
    if r.get("holdout"):
        before = percent(r["holdout"]["initial_mean_are"])
        tiles.append(("Held-out error", percent(r["holdout"]["mean_are"]), f"initially {before}"))
    return [{"label": label, "figure": figure, "note": note} for label, figure, note in tiles]


def _notes(c: Contents) -> list[str]:
    """Return what a reader must not miss."""
    r, notes = c.results, [row["text"] for row in c.results.get("required") or [] if not row["met"]]
    if r.get("gave_way"):
        notes.append(
            f"{number(r['gave_way'])} targets cannot be met with the others and gave way: see Findings."
        )
    if r.get("untouched_targets"):
        notes.append(f"{number(r['untouched_targets'])} targets are touched by no kept {_unit(c)}.")
    if r.get("dropped_targets"):
        notes.append(
            f"{number(r['dropped_targets'])} targets were left out because no {_unit(c)} touches them."
        )
    if r.get("missing_households"):
        fewer = f"{number(r['missing_households'])} fewer {plural(_unit(c))}"
        notes.append(f"{fewer} are kept than were asked for.")
    if whole := r.get("integer_weights"):
        zero = f"; {number(whole['left_with_zero'])} became 0" if whole["left_with_zero"] else ""
        notes.append(
            "Weights are whole numbers: the largest error over its scale is"
            f" {percent(r['max_abs_scaled_error'])} with them and was"
            f" {percent(whole['max_abs_scaled_error_real'])} before; every weight is a neighbour of the real"
            f" one{zero}."
        )
    held = r.get("holdout")
    if held and held["mean_are"] > held["initial_mean_are"]:
        notes.append(
            "On families that were held out the weights are worse than the initial ones"
            f" ({percent(held['mean_are'])} against {percent(held['initial_mean_are'])}): use the file for"
            " what was targeted, and for other figures with care."
        )
    if c.bystanders is not None:
        much = [row for row in _bystanders(c.bystanders) if row["much"]]
        if much:
            names = ", ".join(f"{row['name']} ({signed(row['moved'])})" for row in much[:5])
            notes.append(f"{len(much)} figures that nobody targeted moved by more than 2 %: {names}.")
    aside = [f for f in c.findings if f.kind == "set aside"]
    if aside:
        notes.append(f"{len(aside)} targets were set aside because all others rule them out: see Findings.")
    return notes


def _asked(c: Contents) -> str:
    r, s, units = c.results, c.settings, plural(_unit(c))
    wanted = s.get("num_households")
    kept = f"all {units} stay" if r["method"] in ("all", "calibrate") else "as many stay as lambda_l0 leaves"
    if wanted:
        kept = f"keep {number(wanted)} of them"
    how = f"method {r['method']}"
    if r["method"] == "calibrate":
        how += f", distance {s.get('distance')}"
    text = f"{number(r['targets'])} targets over {number(r['households'])} {units}; {kept}, by {how}"
    for key in ("bounds", "weight_bounds", "max_weight_ratio", "unit_factor"):
        if s.get(key) is not None:
            text += f", {key} {setting(s[key])}"
    return text + (", total weight held." if s.get("hold_total") else ".")


def _errors(c: Contents) -> list[tuple[str, Any, Any]]:
    size = c.targets.target.abs().where(c.targets.target != 0)
    before = error_summary(((c.targets.initial - c.targets.target).abs() / size).to_numpy(dtype=np.float64))
    return [(label, before[key], c.results[key]) for label, key in _ERRORS.items()]


def _shown_targets(targets: pd.DataFrame) -> tuple[list[dict[str, Any]], bool]:
    """Return the targets of the table, those with the largest errors first, and whether some are left out."""
    worst = targets.loc[targets.scaled_error.abs().sort_values(ascending=False, na_position="first").index]
    if len(worst) <= _MOST_TARGETS:
        return _records(worst), False
    shown = worst.iloc[:_MOST_TARGETS]
    if "price" in targets.columns:
        half = _MOST_TARGETS // 2
        dear = worst.iloc[half:]
        dear = dear.loc[dear.price.abs().sort_values(ascending=False).index].iloc[:half]
        shown = worst.loc[worst.index.isin([*worst.index[:half], *dear.index])]
    return _records(shown), True


def _bounds(c: Contents) -> str:
    r, s = c.results, c.settings
    hit = int(r.get("bounds_hit") or 0)
    given = {key: s[key] for key in ("bounds", "weight_bounds", "max_weight_ratio") if s.get(key) is not None}
    if (own := r.get("pseudo_targets")) and own["used"]:
        given["max_weight_ratio"] = own["max_weight_ratio"]
    total = (
        f"The weights add up to {number(r['total_weight'])}, initially {number(r['initial_total_weight'])}."
    )
    if not given:
        return f"{total} No bounds were set; {number(hit)} weights are at zero's edge." if hit else total
    named = ", ".join(f"{key} {setting(value)}" for key, value in given.items())
    return f"{total} Bounds: {named}; {number(hit)} of {number(r['kept'])} weights are at one."


def _quantiles(c: Contents) -> dict[str, Any]:
    w = c.weights
    ratio = (w.weight / w.initial_weight.where(w.initial_weight > 0)).dropna()
    some = {
        "all, before": c.initial_weights, "kept, before": w.initial_weight, "kept, after": w.weight,
        "after over before": ratio,
    }  # fmt: skip
    if len(w) == len(c.initial_weights):
        del some["all, before"]
    shares = list(_QUANTILES.values())
    rows = [(label, np.quantile(values, shares).tolist()) for label, values in some.items() if len(values)]
    return {"labels": list(_QUANTILES), "rows": rows}


def _changed(weights: pd.DataFrame) -> dict[str, list[dict[str, Any]]]:
    """Return the households whose weights were raised and lowered most."""
    some = weights[weights.initial_weight > 0]
    some = some.assign(ratio=some.weight / some.initial_weight).sort_values("ratio", kind="stable")
    return {"raised": _records(some.iloc[::-1][:_MOST_CHANGED]), "lowered": _records(some[:_MOST_CHANGED])}


def _held_out(table: pd.DataFrame) -> list[dict[str, Any]]:
    return _records(table.assign(worse=table.mean_are > table.initial_mean_are))


def _own(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Return the totals of own columns that are furthest off, the largest cells among equals first."""
    worst = table.scaled_error.abs().sort_values(ascending=False, na_position="first")
    return _records(table.loc[worst.index[:_MOST_OWN]])


def _bystanders(table: pd.DataFrame) -> list[dict[str, Any]]:
    size = table.initial.abs()
    moved = (table.estimate - table.initial) / size.where(size > 0)
    table = table.assign(moved=moved, much=(moved.abs() > MOVED_MUCH) & ~table.targeted)
    return _records(table.loc[moved.abs().sort_values(ascending=False).index])


def _estimates(table: pd.DataFrame) -> dict[str, Any]:
    kinds = {name: "n" if table[name].dtype.kind in "fiu" else "" for name in table.columns}
    rows = [[{"value": row[k], "kind": kind} for k, kind in kinds.items()] for row in _records(table)]
    return {"columns": [{"name": name, "kind": kind} for name, kind in kinds.items()], "rows": rows}


def _records(table: pd.DataFrame) -> list[dict[str, Any]]:
    return [{str(k): v for k, v in row.items()} for row in table.to_dict("records")]
