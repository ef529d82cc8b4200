"""Best weights for a selection of households, to optimality, for every loss."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from sparsereg.calibration.solver.distances.linear import Linear
from sparsereg.calibration.solver.dual_newton import Dual, Rows, Slack, solve
from sparsereg.calibration.solver.exact import BAND_STIFFNESS, blocks
from sparsereg.calibration.solver.least_squares import LeastSquares, System
from sparsereg.calibration.solver.losses import TargetLoss
from sparsereg.shapes import Bool, Float, Int

TOLERANCE = 1e-9
"""Violation of the optimality conditions by a refit, see ``LeastSquares.kkt_violation``."""
_FIRST_ROUNDS = 10
"""Rounds before a small problem is handed to dense linear algebra."""
_MOST_ROUNDS = 150
"""Rounds after which a refit gives up; what it has reached is reported."""
_ENOUGH = 3e-4
"""A refit that is too large for dense linear algebra gives up when ten rounds gain less than this share."""
_OUTER_ROUNDS = 30
"""Reweighted least-squares problems solved for a loss of absolute values."""
_FIRST_FLOOR, _LAST_FLOOR = 1e-2, 1e-7
"""Relative error below which an absolute value is rounded off, in the first and the last of them."""
SMALLEST_RATIO = 1e-3
"""A household of a wanted number has at least this share of its initial weight (scaled to the selection)."""
_MOST_WORK = 4e9
"""Sum of cubes of the numbers of targets of the parts of a selection that the dual is solved for."""
_GAP = 1e-9
"""Relative gap between primal and dual with which the dual counts as solved."""
SMALLEST_OF_ALL = 1e-6
"""Where everybody stays: so little that a total of zero is met, too."""


@dataclass(frozen=True)
class Refit:
    """Weights of a selection, and how close to optimal they are.

    Args:
        weights: One weight per selected household, float64.
        kkt_violation: By how much the weights may be from the minimum: with rows, by the dual, a share
            of what is minimised, pull included; else the largest violation of the optimality conditions.
        steps: Steps of Newton's method, where the weights were found by the dual.
    """

    weights: Float[Tensor, "selected"]
    kkt_violation: float
    steps: int | None = None


def refit(
    system: System,
    loss: TargetLoss,
    kept: Int[Tensor, "selected"],
    weights: Float[Tensor, "selected"],
    *,
    smallest: float = 0.0,
    tolerance: float = TOLERANCE,
    rows: sp.csr_array | None = None,
    hard: Bool[np.ndarray, "targets"] | None = None,
    thorough: bool = False,
    warm: bool = False,
) -> Refit:
    """Minimise the loss over the weights of these households, within the bounds of the system.

    Args:
        system: All households, with the bounds, the pull and the held sum.
        loss: What to minimise.
        kept: Indices of the selection.
        weights: Where to start, one for each of them.
        smallest: Each keeps at least this share of its initial weight, scaled so that the initial weights of
            the selection add up to those of all, >= 0.
        tolerance: Violation of the optimality conditions to reach.
        rows: Entries of these households as they were read, households x targets. With them, and a pull, a
            squared loss, beyond tolerances, of no more targets than households is solved by its dual.
        hard: Which targets must be met, shape (targets,): then by the dual, whatever it costs.
        thorough: By the dual, whatever it costs.
        warm: The weights are those of an earlier calibration: the dual starts from them, too.
    """
    lower = _smallest_weights(system, kept, smallest) if smallest else None
    fit = system.of(kept, weights, lower)
    if rows is not None and loss.loss in ("relative", "mse"):
        band = None if loss.tolerance is None else loss.tolerance.cpu().numpy()
        exact = by_dual(system, fit, rows, hard, thorough, warm, band)
        if exact is not None:
            return exact
    violation = fit.solve(tolerance, 0 if fit.has_pages else _FIRST_ROUNDS)
    if violation > tolerance:
        if fit.is_small:
            violation = fit.solve_densely(tolerance)
        else:
            violation = fit.solve(tolerance, _MOST_ROUNDS, enough=_ENOUGH)
    if loss.is_quadratic:
        return Refit(fit.weights, violation)
    best, best_value = fit.weights, float(loss.value(fit.totals()))
    for step in range(_OUTER_ROUNDS):
        floor = _FIRST_FLOOR * (_LAST_FLOOR / _FIRST_FLOOR) ** (step / (_OUTER_ROUNDS - 1))
        bound = loss.bound(fit.totals(), floor)
        fit = system.with_quadratic(bound).of(kept, fit.weights, lower)
        violation = fit.solve(tolerance, max_rounds=4)
        value = float(loss.value(fit.totals()))
        if value < best_value:
            best, best_value = fit.weights, value
    return Refit(best, violation)


def by_dual(
    system: System,
    fit: LeastSquares,
    rows: sp.csr_array,
    hard: Bool[np.ndarray, "targets"] | None,
    thorough: bool,
    warm: bool = False,
    tolerance: Float[np.ndarray, "targets"] | None = None,
) -> Refit | None:
    """Solve a least-squares problem with a pull as a calibration with prices; None if that does not pay.

    Args:
        system: All households.
        fit: The problem of some of them.
        rows: Their entries, households x targets.
        hard: Which targets must be met.
        thorough: Whatever it costs.
        warm: Start from the weights of the fit.
        tolerance: How far each total may be from its target without being wrong; None: 0.
    """
    pull, center = fit.pull.cpu().numpy(), fit.center.cpu().numpy()
    if system.chi2 == 0 or not (pull > 0).all() or not (center > 0).all():
        return None
    matrix, targets, scales, price, band = _priced(system, rows, hard, tolerance)
    parts = list(blocks(matrix, np.ones(len(center), dtype=bool)))
    work = sum(float(len(part[0])) ** 3 for part in parts)
    asked = hard is not None and bool(hard.any())
    if not asked and not thorough and (work > _MOST_WORK or len(center) < len(targets)):
        return None
    low, high = (bound.cpu().numpy() / center for bound in (fit.lower, fit.upper))
    weights, primal, dual_value, error = np.clip(center, low * center, high * center), 0.0, 0.0, 0.0
    rounded = 0.0
    given, steps = fit.weights.cpu().numpy(), 0
    for members, households, part in parts:
        own = Dual(
            Rows(part, scales[members]),
            targets[members] / scales[members],
            center[households],
            np.ones(len(households)),
            Linear(low[households], high[households]),
            Slack(price[members], band[members], np.zeros(len(members))),
        )
        if band[members].any():
            slack = replace(own.slack, stiffness=BAND_STIFFNESS * own.diagonal)
            own, rounded = replace(own, slack=slack), rounded + slack.rounded
        found = solve(own, weights=given[households] if warm else None)
        steps = max(steps, found.steps)
        weights[households] = found.weights
        primal, dual_value = primal + own.primal(found.weights), dual_value + own.value(found.multipliers)
        error = max(error, own.violation(found.weights))
    least = np.finfo(np.float64).tiny if rounded == 0 else _GAP * float(center.sum())
    gap = max(0.0, abs(primal - dual_value) - rounded) / max(primal, least)
    if error > 1e-9 or gap > _GAP:
        return None
    return Refit(torch.from_numpy(weights).to(fit.weights), max(error, gap), steps)


def _priced(
    system: System,
    rows: sp.csr_array,
    hard: Bool[np.ndarray, "given"] | None,
    tolerance: Float[np.ndarray, "all"] | None,
) -> tuple[
    sp.csr_array,
    Float[np.ndarray, "targets"],
    Float[np.ndarray, "targets"],
    Float[np.ndarray, "targets"],
    Float[np.ndarray, "targets"],
]:
    """Rows, targets, scales, prices and tolerances of the targets that count, and of a sum that is held."""
    weight = system.quadratic.weight.cpu().numpy()
    targets = system.quadratic.targets.cpu().numpy()
    given = system.quadratic.scales
    scales = np.maximum(np.abs(targets), 1.0) if given is None else given.cpu().numpy()
    price = weight * scales**2 * float(system.initial_weights.sum()) / system.chi2
    if hard is not None:
        price[: len(hard)][hard] = np.inf
    band = np.zeros(len(targets)) if tolerance is None else tolerance / scales
    counts = np.flatnonzero(price > 0)
    matrix = sp.csr_array(rows.T.tocsr()[counts])
    targets, scales, price, band = targets[counts], scales[counts], price[counts], band[counts]
    if system.total is not None:
        everybody = sp.csr_array(np.ones((1, matrix.shape[1])))
        matrix = sp.csr_array(sp.vstack([matrix, everybody]))
        targets, scales = np.append(targets, system.total), np.append(scales, system.total)
        price, band = np.append(price, np.inf), np.append(band, 0.0)
    return matrix, targets, scales, price, band


def _smallest_weights(
    system: System, kept: Int[Tensor, "selected"], smallest: float
) -> Float[Tensor, "selected"]:
    """A small positive weight for everybody, below the upper bound."""
    initial = system.initial_weights[kept]
    positive = initial[initial > 0]
    typical = positive.mean() if len(positive) else torch.ones((), dtype=initial.dtype)
    share = system.initial_weights.sum() / initial.sum().clamp(min=1e-300) if len(positive) else 1.0
    lower = smallest * share * torch.where(initial > 0, initial, typical)
    return torch.minimum(lower, smallest * system.upper[kept].clamp(max=1e300))
