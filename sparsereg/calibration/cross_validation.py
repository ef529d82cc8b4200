"""How strong the pull towards the initial weights should be: as it does best on targets that were left out.

Every pull is tried on the whole file, without each family of targets in turn, and judged by the errors of
that family. A full calibration with a pull is solved exactly in a fraction of a second, so that this costs
less than one selection.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from sparsereg.calibration.holdout import LARGE_CELL, random_folds
from sparsereg.calibration.problem import CalibrationProblem
from sparsereg.shapes import Float

log = logging.getLogger(__name__)

_FOLDS = 5
_WORST = 1.0
"""An error over its scale counts at most so much: a few targets that nothing reaches decide nothing."""

Solve = Callable[[CalibrationProblem, float], np.ndarray]
"""From a problem and a pull to weights of shape (households,)."""


@dataclass(frozen=True)
class CrossValidation:
    """What each pull did on targets that were left out.

    Args:
        pulls: That were tried, ascending.
        errors: Mean error of each over the targets that were left out, over their scales.
        fitted: The same over the targets that were fitted.
        best: The pull with the least error.
    """

    pulls: tuple[float, ...]
    errors: tuple[float, ...]
    fitted: tuple[float, ...]
    best: float

    def told(self) -> list[dict[str, float]]:
        """One row per pull, for results.json."""
        rows = zip(self.pulls, self.fitted, self.errors, strict=True)
        return [
            {"chi2": pull, "fitted_error": fitted, "held_out_error": error} for pull, fitted, error in rows
        ]


def cross_validate(
    problem: CalibrationProblem, pulls: Sequence[float], solve: Solve, seed: int
) -> CrossValidation | None:
    """Try pulls without each fifth of the groups of targets in turn.

    Args:
        problem: With target groups; with fewer than two of them there is nothing to leave out.
        pulls: To try.
        solve: Calibrates everybody.
        seed: Of the folds.

    Returns:
        None where the targets have no two groups.
    """
    if problem.target_groups is None or (count := len(np.unique(problem.target_groups))) < 2:
        return None
    labels = problem.target_groups.astype(str)
    out = [np.isin(labels, fold) for fold in random_folds(problem, min(_FOLDS, count), seed)]
    sizes = np.diff(problem.linear.matrix.indptr)
    counts = sizes >= LARGE_CELL if (sizes >= LARGE_CELL).any() else sizes > 0
    parts = [problem.subset(~fold) for fold in out]  # what a problem derives is derived once for all pulls
    errors, fitted = np.zeros((2, len(pulls)))
    for k, pull in enumerate(pulls):
        left, met = [np.empty(0)], [np.empty(0)]
        for fold, part in zip(out, parts, strict=True):
            found = _errors(problem, solve(part, pull))
            left.append(found[fold & counts])
            met.append(found[~fold & counts])
        errors[k], fitted[k] = (float(np.concatenate(e).mean()) for e in (left, met))
    best = float(pulls[int(np.argmin(errors))])
    log.info("pull cross-validated over %d folds: chi2=%g", len(out), best)
    return CrossValidation(tuple(pulls), tuple(errors.tolist()), tuple(fitted.tolist()), best)


def _errors(
    problem: CalibrationProblem, weights: np.ndarray
) -> Float[np.ndarray, "targets={problem.num_targets}"]:
    """Errors over the scales, at most ``_WORST``; a ratio without an estimate counts as much."""
    found = np.abs(problem.scaled_errors(problem.estimates(weights)))
    return np.asarray(np.minimum(np.nan_to_num(found, nan=_WORST), _WORST))
