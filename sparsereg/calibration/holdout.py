"""How well the weights do on targets that they were not made for.

Whole groups are left out, because targets of one group (the same total in many areas) tell on each other.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from sparsereg.calibration.measures import relative_errors
from sparsereg.calibration.problem import CalibrationProblem
from sparsereg.errors import did_you_mean

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger(__name__)

LARGE_CELL = 100
"""Households from which the error of a target tells more about the weights than about chance."""

_AUTO_SHARE = 5
"""One of so many folds is left out where nothing is said."""
_AUTO_NONZEROS = 3_000_000
"""Entries of a problem above which nothing is left out then."""

Solve = Callable[[CalibrationProblem], np.ndarray]
"""From a problem to weights of shape (households,)."""


def folds_of(
    problem: CalibrationProblem, groups: str | Sequence[str] | None, folds: int | None, seed: int
) -> list[tuple[str, ...]]:
    """Return which groups are left out together, one calibration each; nothing for no hold-out.

    Args:
        problem: The problem.
        groups: Labels; "auto": a fifth of them at random, where the problem is not large; None: none.
        folds: All groups in so many parts, in place of ``groups``.
        seed: Of the shares.

    Raises:
        ValueError: See `named_fold` and `random_folds`.
    """
    if folds is not None:
        return random_folds(problem, folds, seed)
    if groups is None:
        return []
    if groups != "auto":
        return named_fold(problem, [groups] if isinstance(groups, str) else list(groups))
    if problem.target_groups is None or len(np.unique(problem.target_groups)) < 2:
        log.info("no hold-out: the targets have no groups")
        return []
    if problem.matrix.nnz > _AUTO_NONZEROS:
        log.info(
            "no hold-out on a problem of this size unless asked for: holdout.folds=5 or holdout.groups=[...]"
        )
        return []
    return random_folds(problem, min(_AUTO_SHARE, len(np.unique(problem.target_groups))), seed)[:1]


def named_fold(problem: CalibrationProblem, groups: Sequence[str]) -> list[tuple[str, ...]]:
    """Return one fold with these groups.

    Args:
        problem: With target groups.
        groups: Labels as they are written in the table of targets.

    Raises:
        ValueError: The problem has no groups, not this one, or no others.
    """
    known = _labels(problem)
    for group in groups:
        if group not in known:
            raise ValueError(f"holdout.groups: no target has the group {group!r}{did_you_mean(group, known)}")
    if len(set(groups)) == len(known):
        raise ValueError("holdout.groups: all groups are left out, there is nothing to calibrate to")
    return [tuple(groups)]


def random_folds(problem: CalibrationProblem, folds: int, seed: int) -> list[tuple[str, ...]]:
    """Share the groups out to so many folds at random, of about equal numbers of groups.

    Args:
        problem: With target groups.
        folds: From 2 to the number of groups.
        seed: Of the shares.

    Raises:
        ValueError: The problem has no groups, or fewer than folds.
    """
    known = _labels(problem)
    if not 2 <= folds <= len(known):
        raise ValueError(f"holdout.folds must lie in [2, {len(known)}], the number of groups, got {folds}")
    order = np.random.default_rng(seed).permutation(len(known))
    return [tuple(known[i] for i in np.sort(part)) for part in np.array_split(order, folds)]


def hold_out(problem: CalibrationProblem, folds: Sequence[Sequence[str]], solve: Solve) -> pd.DataFrame:
    """Calibrate without each fold in turn and measure its targets with those weights.

    Args:
        problem: With target groups.
        folds: Groups to leave out together.
        solve: Calibrates what is left.

    Returns:
        One row per fold and group: fold, group, targets, initial_mean_are, mean_are, median_are,
        large_mean_are (of the left-out targets; of those that at least ``LARGE_CELL`` households touch),
        fitted_mean_are and fitted_median_are (of those that were calibrated to). Targets of 0 do not count.
        ``attrs`` has the absolute relative errors, a list per fold: ``"errors"`` of the left-out targets,
        ``"large"`` of the large ones of them, ``"fitted"`` and ``"fitted_large"`` of those calibrated to.
    """
    import pandas as pd

    labels = _label_of_each(problem)
    initial = np.abs(relative_errors(problem.estimates(problem.starting_weights), problem.targets))
    rows: list[dict[str, Any]] = []
    told: dict[str, list[list[float]]] = {"errors": [], "large": [], "fitted": [], "fitted_large": []}
    large = np.diff(problem.linear.matrix.indptr) >= LARGE_CELL
    for number, groups in enumerate(folds):
        out = np.isin(labels, list(groups))
        errors = np.abs(relative_errors(problem.estimates(solve(problem.subset(~out))), problem.targets))
        parts = {"errors": out, "large": out & large, "fitted": ~out, "fitted_large": ~out & large}
        for key, which in parts.items():
            told[key].append(errors[which].tolist())
        for group in groups:
            member = labels == group
            rows.append(
                {
                    "fold": number,
                    "group": group,
                    "targets": int(member.sum()),
                    "initial_mean_are": _mean(initial[member]),
                    "mean_are": _mean(errors[member]),
                    "median_are": _median(errors[member]),
                    "large_mean_are": _mean(errors[member & large]),
                    "fitted_mean_are": _mean(errors[~out]),
                    "fitted_median_are": _median(errors[~out]),
                }
            )
        log.info("hold-out %d of %d: %s", number + 1, len(folds), ", ".join(groups))
    table = pd.DataFrame(rows)
    table.attrs |= told
    return table


def summarise(table: pd.DataFrame) -> dict[str, Any]:
    """Return the means over all left-out targets, for results.json.

    Args:
        table: As ``hold_out`` returns it.
    """
    known = table.dropna(subset=["mean_are"])
    share = known.targets / known.targets.sum()
    errors, large, fitted, fitted_large = (
        _known(table.attrs[k]) for k in ("errors", "large", "fitted", "fitted_large")
    )
    return {
        "groups": table.group.tolist(),
        "folds": int(table.fold.nunique()),
        "targets": int(table.targets.sum()),
        "initial_mean_are": float((share * known.initial_mean_are).sum()),
        "mean_are": float((share * known.mean_are).sum()),
        "median_are": float(np.median(errors)) if len(errors) else None,
        "fitted_mean_are": float(table.groupby("fold").fitted_mean_are.first().mean()),
        "fitted_median_are": float(np.median(fitted)) if len(fitted) else None,
        "large_targets": len(large),
        "large_mean_are": float(large.mean()) if len(large) else None,
        "fitted_large_mean_are": float(fitted_large.mean()) if len(fitted_large) else None,
    }


def _known(parts: list[list[float]]) -> np.ndarray:
    errors = np.concatenate([np.empty(0), *parts])
    return np.asarray(errors[~np.isnan(errors)])


def _label_of_each(problem: CalibrationProblem) -> np.ndarray:
    if problem.target_groups is None:
        raise ValueError("holdout needs target groups: give the table of targets a column group")
    return problem.target_groups.astype(str)


def _labels(problem: CalibrationProblem) -> list[str]:
    return [str(label) for label in np.unique(_label_of_each(problem))]


def _empty(errors: np.ndarray) -> bool:
    return bool(np.isnan(errors).all())


def _mean(errors: np.ndarray) -> float | None:
    return None if _empty(errors) else float(np.nanmean(errors))


def _median(errors: np.ndarray) -> float | None:
    return None if _empty(errors) else float(np.nanmedian(errors))
