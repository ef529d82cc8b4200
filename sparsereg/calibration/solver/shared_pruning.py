"""A wanted number of households, chosen from those of a group of processes.

First every process drops households of its own: all sweep beside each other from the same totals, each
expects the others to move these as far as it does itself, and who is dropped is found by comparing all of
them. When few enough are left, all processes get the rest, go on as one process does, and find the same
weights.

Source: CoCoA+ (Ma et al., Adding vs. averaging in distributed primal-dual optimization, ICML 2015).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import scipy.sparse as sp
import torch
import torch.distributed as dist

from sparsereg.calibration.config import Settings
from sparsereg.calibration.problem import CalibrationProblem
from sparsereg.calibration.solver.calibration import Calibration, CalibrationResult
from sparsereg.calibration.solver.least_squares import LeastSquares
from sparsereg.calibration.solver.pruning import kept_at
from sparsereg.calibration.solver.selection import Goal
from sparsereg.calibration.solver.shared import summed
from sparsereg.device import several_processes
from sparsereg.linalg.threads import quiet_threads
from sparsereg.shapes import Float, Int

_GATHERED = 3.5
"""Households, in those that are wanted, that all processes get."""


def prune_shared(
    part: CalibrationProblem,
    goal: Goal,
    order: Int[np.ndarray, "there"],
    num_kept: int,
    settings: Settings,
) -> tuple[Float[np.ndarray, "households"], CalibrationResult]:
    """Choose households and fit their weights; every process of the group calls it at the same time.

    Args:
        part: All targets, with the scales of the whole, and the households of this process.
        goal: Of its households in this order; products with its matrix are sums over the group.
        order: Places of the households of this process that are in the survey.
        num_kept: How many households are kept, in all processes.
        settings: How.

    Returns:
        Weights of the households of this process, and the calibration of those that were left.

    Raises:
        ValueError: there are fewer households than are wanted.
    """
    with quiet_threads():
        some, weights = _left(goal, num_kept)
    places = order[some.numpy()]
    initial = part.starting_weights[places]
    rows = gathered_rows(part.matrix_t[places])
    all_initial, start = gathered(initial), gathered(weights.numpy())
    whole = float(summed(part.starting_weights.sum()))
    factor = whole / all_initial.sum()
    few = CalibrationProblem(
        sp.csr_array(rows.T.tocsr()), part.targets, all_initial * factor, target_names=part.target_names,
        target_groups=part.target_groups, target_weights=part.target_weights,
        target_scales=part.target_scales, target_tolerances=part.target_tolerances,
        target_hard=part.target_hard,
    )  # fmt: skip
    if settings.max_weight_ratio is not None:
        settings = replace(settings, max_weight_ratio=settings.max_weight_ratio / factor)
    run = Calibration(few, num_kept, settings, start=start, alone=True)
    while not run.done:
        run.step()
    result = run.result()
    before = int(summed_before(len(places)))
    final = np.zeros(part.num_households)
    final[places] = from_first(result.weights)[before : before + len(places)]
    return final, result


def _left(goal: Goal, num_kept: int) -> tuple[Int[torch.Tensor, "some"], Float[torch.Tensor, "some"]]:
    """Households of this process, and their weights, when few are left in all of them."""
    system, schedule = goal.system, goal.schedule
    weights = goal.starting_weights()
    kept = torch.arange(len(weights))
    number = int(summed(float(len(kept))))
    if num_kept > number:
        raise ValueError(f"num_households must be at most {number}, those with an initial weight > 0")
    few = min(number, round(_GATHERED * num_kept))
    if few == number:
        return kept, weights
    fit = system.of(kept, weights)
    fit.sweep(schedule.first_sweeps)
    for stage in range(1, schedule.stages + 1):
        count = max(few, kept_at(stage, schedule.stages, number, num_kept, schedule.power))
        best = largest_of_all(_contributions(fit), count)
        kept = kept[best]
        fit = system.of(kept, fit.weights[best])
        fit.sweep(schedule.sweeps)
        if count == few:
            break
    # Those of weight zero are the first to go; they would not be there to start from.
    return kept, fit.weights.clamp(min=float(np.finfo(np.float64).tiny))


def _contributions(fit: LeastSquares) -> Float[np.ndarray, "households"]:
    """See ``LeastSquares``, with the weights of all processes."""
    return fit.contributions(float(summed(float(fit.weights.sum())))).numpy()


def largest_of_all(values: Float[np.ndarray, "own"], count: int) -> Int[np.ndarray, "chosen"]:
    """Indices of the values of this process that are among the ``count`` largest in all processes.

    Args:
        values: At least 0. Numbers of this sign are in the order of their bits, in which the smallest that is
            in is found by halving. Ties go to the first process, and there to the lower index.
        count: How many, at most as many as there are.
    """
    bits = np.ascontiguousarray(values, dtype=np.float64).view(np.int64)
    low, high = 0, int(np.float64(np.inf).view(np.int64)) + 1
    while high - low > 1:  # at least ``count`` are not below ``low``, fewer not below ``high``
        middle = (low + high) // 2
        if summed(float((bits >= middle).sum())) >= count:
            low = middle
        else:
            high = middle
    chosen, ties = bits > low, np.flatnonzero(bits == low)
    room = count - int(summed(float(chosen.sum()))) - int(summed_before(len(ties)))
    chosen[ties[: max(0, room)]] = True
    return np.flatnonzero(chosen)


def summed_before(own: int) -> float:
    """The sum over the processes before this one."""
    if not several_processes():
        return 0.0
    counts = np.zeros(dist.get_world_size())
    counts[dist.get_rank()] = own
    return float(summed(counts)[: dist.get_rank()].sum())


def gathered(values: np.ndarray) -> np.ndarray:
    """The vectors of all processes, one after the other."""
    if not several_processes():
        return values
    lengths = np.zeros(dist.get_world_size())
    lengths[dist.get_rank()] = len(values)
    sizes = summed(lengths).astype(int)
    own = torch.zeros(int(sizes.max()), dtype=torch.from_numpy(values).dtype)
    own[: len(values)] = torch.from_numpy(values)
    parts = [torch.empty_like(own) for _ in sizes]
    dist.all_gather(parts, own)
    return np.concatenate([part[:size].numpy() for part, size in zip(parts, sizes, strict=True)])


def gathered_rows(rows: sp.csr_array) -> sp.csr_array:
    """The rows of all processes, one below the other."""
    lengths = gathered(np.diff(rows.indptr).astype(np.int64))
    data = gathered(rows.data.astype(np.float64))
    indices = gathered(rows.indices.astype(np.int64))
    return sp.csr_array(
        (data, indices, np.concatenate([[0], lengths.cumsum()])), shape=(len(lengths), rows.shape[1])
    )


def from_first(values: np.ndarray) -> np.ndarray:
    """What the first process has, so that nobody goes on with other roundings."""
    if not several_processes():
        return values
    sent = torch.from_numpy(np.array(values))
    dist.broadcast(sent, 0)
    return sent.numpy()
