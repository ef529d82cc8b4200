"""Best weights for a selection of households, to optimality, for every loss."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsereg.calibration.solver.least_squares import System
from sparsereg.calibration.solver.losses import TargetLoss

TOLERANCE = 1e-9
"""Optimality of a refit, see ``LeastSquares.optimality``."""
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
SMALLEST_OF_ALL = 1e-6
"""Where everybody stays: so little that a total of zero is met, too."""


@dataclass(frozen=True)
class Refit:
    """Weights of a selection, and how close to optimal they are.

    Args:
        weights: One weight per selected household, float64.
        optimality: Largest violation of the optimality conditions, dimensionless.
    """

    weights: Tensor
    optimality: float


def refit(
    system: System,
    loss: TargetLoss,
    kept: Tensor,
    weights: Tensor,
    *,
    smallest: float = 0.0,
    tolerance: float = TOLERANCE,
) -> Refit:
    """Minimise the loss over the weights of these households, within the bounds of the system.

    Args:
        system: All households, with the bounds, the pull and the held sum.
        loss: What to minimise.
        kept: Indices of the selection.
        weights: Where to start, one for each of them.
        smallest: Each keeps at least this share of its initial weight, scaled so that the initial weights of
            the selection add up to those of all, >= 0.
        tolerance: Optimality to reach.
    """
    lower = _smallest_weights(system, kept, smallest) if smallest else None
    fit = system.of(kept, weights, lower)
    optimality = fit.solve(tolerance, _FIRST_ROUNDS)
    if optimality > tolerance:
        if fit.is_small:
            optimality = fit.solve_densely(tolerance)
        else:
            optimality = fit.solve(tolerance, _MOST_ROUNDS, enough=_ENOUGH)
    if loss.is_quadratic:
        return Refit(fit.weights, optimality)
    best, best_value = fit.weights, float(loss.value(fit.totals()))
    for step in range(_OUTER_ROUNDS):
        floor = _FIRST_FLOOR * (_LAST_FLOOR / _FIRST_FLOOR) ** (step / (_OUTER_ROUNDS - 1))
        bound = loss.bound(fit.totals(), floor)
        fit = system.with_quadratic(bound).of(kept, fit.weights, lower)
        optimality = fit.solve(tolerance, max_rounds=4)
        value = float(loss.value(fit.totals()))
        if value < best_value:
            best, best_value = fit.weights, value
    return Refit(best, optimality)


def _smallest_weights(system: System, kept: Tensor, smallest: float) -> Tensor:
    """A small positive weight for everybody, below the upper bound."""
    initial = system.initial_weights[kept]
    positive = initial[initial > 0]
    typical = positive.mean() if len(positive) else torch.ones((), dtype=initial.dtype)
    share = system.initial_weights.sum() / initial.sum().clamp(min=1e-300) if len(positive) else 1.0
    lower = smallest * share * torch.where(initial > 0, initial, typical)
    return torch.minimum(lower, smallest * system.upper[kept].clamp(max=1e300))
