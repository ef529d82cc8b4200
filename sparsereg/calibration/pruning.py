"""Selection of exactly K households by gradual pruning, swaps and filling up.

Pruning starts from weights for everybody and drops, little by little, the households that contribute
least, while the weights of the others are improved. Swaps then exchange the least useful of the kept for
the most useful of the dropped, as long as that pays.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsereg.calibration.least_squares import LeastSquares, System

Report = Callable[[str, int, int, LeastSquares], None]
"""Called with (phase, step, number of steps, current fit)."""


@dataclass(frozen=True)
class PruningSchedule:
    """How much work the selection does.

    Args:
        stages: Times that households are dropped, >= 1.
        sweeps: Sweeps over the households before each of them, >= 1.
        first_sweeps: Sweeps over everybody before the first.
        power: Shape of the descent from N to K: log(kept / K) falls as (1 - stage / stages)^power.
        swap_rounds: Most rounds of swaps; 0 for none.
        swap_share: Share of the households exchanged in the first round, in (0, 1].
        swap_shrink: Factor on that share after a round that failed, in (0, 1).
        swap_sweeps: Sweeps after each exchange.
    """

    stages: int = 60
    sweeps: int = 60
    first_sweeps: int = 60
    power: float = 3.0
    swap_rounds: int = 40
    swap_share: float = 0.1
    swap_shrink: float = 0.7
    swap_sweeps: int = 40


def kept_at(stage: int, stages: int, num_households: int, num_kept: int, power: float) -> int:
    """Number of households to keep after a stage: N at stage 0, K at the last, falling log-polynomially."""
    share = (1.0 - stage / stages) ** power
    return max(num_kept, round(num_kept * (num_households / num_kept) ** share))


def largest(values: Tensor, count: int) -> Tensor:
    """Indices of the ``count`` largest values in ascending order; ties go to the lower index."""
    order = torch.argsort(values, descending=True, stable=True)
    return order[:count].sort().values


def prune(
    system: System, weights: Tensor, num_kept: int, schedule: PruningSchedule, report: Report
) -> tuple[Tensor, LeastSquares]:
    """Drop households until ``num_kept`` are left.

    Args:
        system: All households.
        weights: Where to start, shape (households,).
        num_kept: How many to keep.
        schedule: How much work to do.
        report: Called after each stage.

    Returns:
        The indices of the kept, ascending, and their fit (not yet optimal).
    """
    num_households = len(weights)
    kept = torch.arange(num_households, device=weights.device)
    fit = system.of(kept, weights)
    fit.sweep(schedule.first_sweeps)
    for stage in range(1, schedule.stages + 1):
        count = kept_at(stage, schedule.stages, num_households, num_kept, schedule.power)
        if count < len(kept):
            best = largest(fit.contributions(), count)
            kept = kept[best]
            fit = system.of(kept, fit.weights[best])
        fit.sweep(schedule.sweeps)
        report("prune", stage, schedule.stages, fit)
    return kept, fit


def swap(
    system: System, kept: Tensor, fit: LeastSquares, schedule: PruningSchedule, report: Report
) -> tuple[Tensor, LeastSquares]:
    """Exchange the least useful of the kept for the most useful of the others while that pays.

    Args:
        system: All households.
        kept: Indices of the selection, ascending.
        fit: Its fit.
        schedule: How much work to do.
        report: Called after each round.

    Returns:
        A selection of the same size and its fit, never worse.
    """
    share, value, num_kept = schedule.swap_share, fit.value(), len(kept)
    for step in range(1, schedule.swap_rounds + 1):
        count = min(int(share * num_kept), system.matrix.num_households - num_kept)
        if count < 1:
            break
        new_kept, new_fit = _exchange(system, kept, fit, count, schedule.swap_sweeps)
        new_value = new_fit.value()
        if new_value < value:
            kept, fit, value = new_kept, new_fit, new_value
        else:
            share *= schedule.swap_shrink
        report("swap", step, schedule.swap_rounds, fit)
    return kept, fit


def _exchange(
    system: System, kept: Tensor, fit: LeastSquares, count: int, sweeps: int
) -> tuple[Tensor, LeastSquares]:
    """Drop the ``count`` least useful, improve the rest a little, add the ``count`` most useful, improve."""
    stay = largest(fit.contributions(), len(kept) - count)
    rest = system.of(kept[stay], fit.weights[stay])
    rest.sweep(max(1, sweeps // 8))
    return add(system, kept[stay], rest, count, sweeps)


def add(
    system: System, kept: Tensor, fit: LeastSquares, count: int, sweeps: int
) -> tuple[Tensor, LeastSquares]:
    """Add the ``count`` households that would help most one at a time, then improve everybody's weights."""
    gains = system.gains(fit.residual)
    gains[kept] = -1.0
    weights = torch.zeros_like(gains)
    weights[kept] = fit.weights
    kept = torch.cat([kept, largest(gains, count)]).sort().values
    fit = system.of(kept, weights[kept])
    fit.sweep(sweeps)
    return kept, fit


def fill(
    system: System, kept: Tensor, fit: LeastSquares, tolerance: float, rounds: int = 8
) -> tuple[Tensor, LeastSquares]:
    """Solve to optimality, replacing households whose weight becomes zero by others that help.

    Args:
        system: All households.
        kept: Indices of the selection, ascending.
        fit: Its fit.
        tolerance: Optimality to reach.
        rounds: Most times to replace.

    Returns:
        A selection of the same size and its optimal fit; a few weights may still be zero.
    """
    fit.solve(tolerance)
    for _ in range(rounds):
        used = torch.nonzero(fit.weights > 0).flatten()
        missing = len(kept) - len(used)
        if missing == 0:
            break
        value = fit.value()
        smaller = system.of(kept[used], fit.weights[used])
        new_kept, new_fit = add(system, kept[used], smaller, missing, 1)
        new_fit.solve(tolerance)
        if new_fit.value() > value:
            break
        kept, fit = new_kept, new_fit
    return kept, fit


