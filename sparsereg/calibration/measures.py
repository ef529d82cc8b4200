"""What weights reach, in numbers: errors of the totals, counts, the effective sample size."""

from __future__ import annotations

from typing import Any

import numpy as np

from sparsereg.calibration.problem import CalibrationProblem, exact_totals
from sparsereg.shapes import Bool, Float


def relative_errors(
    estimates: Float[np.ndarray, "targets"], targets: Float[np.ndarray, "targets"]
) -> Float[np.ndarray, "targets"]:
    """Return (estimate - target) / |target|, NaN where the target is 0 and no relative error exists.

    Args:
        estimates: Weighted totals, float64, shape (targets,).
        targets: What they should be, shape (targets,).
    """
    size = np.abs(targets)
    return np.asarray(np.divide(estimates - targets, size, out=np.full(len(targets), np.nan), where=size > 0))


def measure(problem: CalibrationProblem, weights: np.ndarray) -> dict[str, Any]:
    """Measure weights in float64: errors over the targets that are not 0, counts, sizes.

    Args:
        problem: The problem.
        weights: Shape (households,), >= 0; households with a positive weight are kept.

    Returns:
        The keys of results.json that follow from the weights; absolute relative errors are called ``are``,
        ``within_10pct`` is a share in [0, 1], ``ess`` is Kish's effective sample size (sum w)^2 / sum w^2,
        ``weighting_effect`` is kept / ess, Kish's factor by which unequal weights raise a variance (also
        under its old name ``design_effect``), ``untouched_targets`` counts those that no kept
        household touches.
        ``max_abs_scaled_error`` is the largest error beyond the tolerance over its scale, targets of 0
        included; None where the weights give a target no estimate, a ratio whose denominator they make zero.
    """
    w = np.asarray(weights, dtype=np.float64)
    kept = w > 0
    estimates = problem.estimates(w)
    errors = np.abs(relative_errors(estimates, problem.targets))
    touched = exact_totals(problem.matrix, kept.astype(float)) if (problem.matrix.data >= 0).all() else None
    initial = problem.starting_weights
    ratio = w[kept & (initial > 0)] / initial[kept & (initial > 0)]
    ess = float(w.sum() ** 2 / (w @ w)) if kept.any() else 0.0
    weighting_effect = int(kept.sum()) / ess if ess else None
    return {
        "households": problem.num_households,
        "kept": int(kept.sum()),
        "targets": problem.num_targets,
        **error_summary(errors),
        "max_abs_scaled_error": _largest(np.abs(problem.scaled_errors(estimates))),
        "zero_targets": int((problem.targets == 0).sum()),
        "untouched_targets": int((touched == 0).sum()) if touched is not None else _untouched(problem, kept),
        "ess": ess,
        "weighting_effect": weighting_effect,
        "design_effect": weighting_effect,
        "total_weight": float(w.sum()),
        "initial_total_weight": float(initial.sum()),
        "max_weight": float(w.max()),
        "median_weight": float(np.median(w[kept])) if kept.any() else 0.0,
        "max_ratio": float(ratio.max()) if len(ratio) else None,
    }


def error_summary(errors: Float[np.ndarray, "targets"]) -> dict[str, float | None]:
    """Summarise absolute relative errors, leaving out NaN (targets of 0); None where nothing is left.

    Args:
        errors: Shape (targets,).
    """
    known = errors[~np.isnan(errors)]
    if len(known) == 0:
        names = ("mean_are", "median_are", "p90_are", "p99_are", "max_are", "within_1pct", "within_10pct")
        return dict.fromkeys(names)
    p90, p99 = np.quantile(known, [0.9, 0.99])
    return {
        "mean_are": float(known.mean()),
        "median_are": float(np.median(known)),
        "p90_are": float(p90),
        "p99_are": float(p99),
        "max_are": float(known.max()),
        "within_1pct": float((known <= 0.01).mean()),
        "within_10pct": float((known <= 0.10).mean()),
    }


def _largest(values: Float[np.ndarray, "values"]) -> float | None:
    return None if np.isnan(values).any() else float(values.max(initial=0.0))


def _untouched(
    problem: CalibrationProblem, kept: Bool[np.ndarray, "households={problem.num_households}"]
) -> int:
    return int((np.diff(problem.matrix[:, np.flatnonzero(kept)].tocsr().indptr) == 0).sum())
