"""``method="calibrate"`` with the households shared out to a group of processes, on one machine or on many.

Each process holds all targets' entries of its own households and nothing of others. The multipliers are the
same everywhere; per step of Newton's method the group sums up totals, the products of the targets' rows with
each other, and a few single numbers. Everything that follows from these sums is computed in every process.

The group is that of ``torch.distributed``: of Lightning's Fabric or Trainer, or one's own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
import torch.distributed as dist
from numpy.typing import ArrayLike

from sparsereg.calibration.problem import CalibrationProblem, as_totals, gross_totals
from sparsereg.calibration.solver.bounds import Bounds, at_bounds, bounded_weights, ratio_bounds
from sparsereg.calibration.solver.distances import distance_of
from sparsereg.calibration.solver.dual_newton import Dual, Rows, Slack, Solution
from sparsereg.calibration.solver.exact import (
    BAND_STIFFNESS,
    GAVE_WAY,
    SMALL_BESIDE_GROSS,
    Certificate,
    Domain,
    certify,
    is_hard,
    proven,
    refuse_contradiction,
    solve_domain,
    unit_factors,
)
from sparsereg.calibration.target_scale import target_scale
from sparsereg.device import several_processes
from sparsereg.shapes import Bool, Float, Int

_MOST_GATHERED = 50_000_000
"""Entries up to which one process looks for contradictions among the targets of all: 0.6 GB."""


def summed(values: ArrayLike) -> np.ndarray:
    """The sum over the group, float64; what it is itself without a group. All processes get the same bits."""
    own = torch.from_numpy(np.array(values, dtype=np.float64))
    if several_processes():
        dist.all_reduce(own)
    return own.numpy()


def largest(value: float) -> float:
    """The largest value in the group."""
    own = torch.tensor(value, dtype=torch.float64)
    if several_processes():
        dist.all_reduce(own, op=dist.ReduceOp.MAX)
    return float(own)


@dataclass(frozen=True, eq=False)
class SharedRows(Rows):
    """Rows over the households of this process; sums over households are those of the whole group."""

    def take(self, targets: Int[np.ndarray, "some"]) -> SharedRows:
        """See ``Rows``."""
        return SharedRows(sp.csr_array(self.given[targets]), self.scales[targets])

    def totals(self, weights: Float[np.ndarray, "households"]) -> Float[np.ndarray, "targets"]:
        """See ``Rows``."""
        return summed(super().totals(weights))

    def lengths(self) -> Int[np.ndarray, "targets"]:
        """See ``Rows``."""
        return summed(super().lengths()).astype(np.int64)

    def dot(self, one: Float[np.ndarray, "households"], other: Float[np.ndarray, "households"]) -> float:
        """See ``Rows``."""
        return float(summed(super().dot(one, other)))

    def negative(self) -> Bool[np.ndarray, "targets"]:
        """See ``Rows``."""
        return summed(super().negative().astype(np.float64)) > 0

    def squares(self, weights: Float[np.ndarray, "households"]) -> Float[np.ndarray, "targets"]:
        """See ``Rows``."""
        return summed(super().squares(weights))

    def gram(self, weights: Float[np.ndarray, "households"]) -> Float[np.ndarray, "targets targets"]:
        """See ``Rows``: the lower triangle is sent, packed."""
        square = super().gram(weights)
        below = np.tril_indices(len(square))
        square[below] = summed(square[below])
        return square


@dataclass(frozen=True, eq=False)
class SharedWeights:
    """What one process knows at the end: its own weights, and what they reach together with the others'.

    Args:
        weights: Of its own households.
        estimates: Totals over all processes, shape (targets,).
        initial: The same with the initial weights.
        scale: What errors are compared with.
        scaled_errors: How far estimates lie outside their targets' tolerance, signed, over the scale.
        multipliers: What each target costs; None: it was not calibrated exactly.
        gave_way: Indices of hard targets that are not met.
        bounds_hit: How many weights are at a bound, over all processes.
        steps: Steps of Newton's method.
    """

    weights: Float[np.ndarray, "households"]
    estimates: Float[np.ndarray, "targets"]
    initial: Float[np.ndarray, "targets"]
    scale: Float[np.ndarray, "targets"]
    scaled_errors: Float[np.ndarray, "targets"]
    multipliers: Float[np.ndarray, "targets"] | None
    gave_way: Int[np.ndarray, "gave_way"]
    bounds_hit: int
    steps: int


@dataclass(frozen=True, eq=False)
class SharedRatios:
    """Targets that are ratios of totals, where each process has some of the households.

    Args:
        given: The targets as they are, the rows of ratios what is above the line; no denominators.
        denominators: What is below, targets x households of this process.
        is_ratio: Which targets are ratios.
        initial: Denominators with the initial weights, over all processes, without sign, > 0 for ratios.
    """

    given: CalibrationProblem
    denominators: sp.csr_array
    is_ratio: Bool[np.ndarray, "targets"]
    initial: Float[np.ndarray, "targets"]

    @property
    def unit(self) -> Float[np.ndarray, "targets"]:
        """One unit of each target in units of its row in ``linear``."""
        return np.where(self.is_ratio, self.initial, 1.0)

    @cached_property
    def linear(self) -> CalibrationProblem:
        """The problem with totals only, for ``calibrate_shared`` and ``select_shared``."""
        return as_totals(self.given, self.denominators, self.is_ratio, self.unit)

    def of(self, found: SharedWeights) -> SharedWeights:
        """What was found with ``linear``, in the targets' own units; every process calls it."""
        scale = found.scale / self.unit
        initial, estimates = (self._estimates(w) for w in (self.given.starting_weights, found.weights))
        missed = replace(self.given, target_scales=scale).scaled_errors(estimates)
        return replace(found, initial=initial, estimates=estimates, scale=scale, scaled_errors=missed)

    def _estimates(self, weights: Float[np.ndarray, "households"]) -> Float[np.ndarray, "targets"]:
        above, below = (
            summed(rows.astype(np.float64) @ weights) for rows in (self.given.matrix, self.denominators)
        )
        below = np.where(self.is_ratio, below, 1.0)
        return np.asarray(np.divide(above, below, out=np.full(len(above), np.nan), where=below != 0))


def calibrate_shared(
    part: CalibrationProblem,
    distance: str = "linear",
    bounds: Bounds | None = None,
    weight_bounds: Bounds | None = None,
    unit_factor: np.ndarray | None = None,
) -> SharedWeights:
    """Find the weights of this process's households; every process of the group calls it at the same time.

    Args:
        part: All targets, and the households of this process. Totals only; of ratios ``SharedRatios.linear``.
        distance: As for ``calibrate_exactly``, as what follows.
        bounds: Smallest and largest weight over initial weight.
        weight_bounds: Smallest and largest weight.
        unit_factor: q per household of this process.

    Raises:
        ValueError: an argument is wrong, a target is a ratio, or targets marked hard contradict each other.
    """
    if part.denominators is not None:
        raise ValueError(
            "a group of processes calibrates totals only: make ratios totals, SharedRatios.linear"
        )
    initial = part.starting_weights
    low, high = ratio_bounds(initial, distance, bounds, weight_bounds)
    factors = unit_factors(unit_factor, part.num_households)
    there = np.flatnonzero(initial > 0)
    domain, scale = _domain(part, there, (low[there], high[there]), factors[there], distance)
    part = replace(part, target_scales=scale)
    found, _, certificate = solve_domain(domain, _certified)
    weights, multipliers = np.zeros(part.num_households), np.zeros(part.num_targets)
    weights[there] = found.weights
    least, most = bounded_weights(initial, (low, high))
    weights = np.clip(weights, least, most)
    multipliers[domain.targets] = found.multipliers / scale[domain.targets]
    before, after = (summed(part.matrix.astype(np.float64) @ w) for w in (initial, weights))
    missed = part.scaled_errors(after)
    gave_way = np.flatnonzero(is_hard(part) & (np.abs(missed) > GAVE_WAY))
    refuse_contradiction(part, gave_way, [] if certificate is None else [certificate])
    at = at_bounds(weights, least, most) & (initial > 0)
    return SharedWeights(
        weights, after, before, scale, missed, multipliers, gave_way,
        int(summed(float(at.sum()))), found.steps,
    )  # fmt: skip


def _certified(domain: Domain, end: Solution) -> Certificate:
    """What ``certify`` finds with the households of all processes, which the first one gets for it.

    Where these are too many for one, multipliers alone can prove that there are no weights.
    """
    dual, nobody = domain.dual, np.zeros(len(domain.targets), dtype=bool)
    if not several_processes():
        return certify(domain, end)
    said: list[Any] = [({"feasible": None, "targets": [], "violation": None}, nobody)]
    if summed(float(dual.rows.given.nnz)) <= _MOST_GATHERED:
        own = dual.rows.given, dual.weights, dual.factors, dual.distance
        parts: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
        dist.gather_object(own, parts, 0)
        if parts is not None:
            everybody = np.arange(sum(len(weights) for _, weights, _, _ in parts))
            said = [certify(replace(domain, households=everybody, dual=_joined(dual, parts)), end)]
    elif end.proof is not None:
        said = [(proven(domain, end.proof), nobody)]
    dist.broadcast_object_list(said, 0)
    found: Certificate = said[0]
    return found


def _joined(dual: Dual, parts: list[Any]) -> Dual:
    """The dual of all households, whose parts follow each other."""
    rows, weights, factors, distances = zip(*parts, strict=True)
    low, high = (np.concatenate([getattr(d, side) for d in distances]) for side in ("low", "high"))
    kind: Any = type(dual.distance)
    return Dual(
        Rows(sp.csr_array(sp.hstack(rows, format="csr")), dual.rows.scales), dual.targets,
        np.concatenate(weights), np.concatenate(factors), kind(low, high), dual.slack,
    )  # fmt: skip


def shared_scale(
    part: CalibrationProblem,
) -> tuple[Float[np.ndarray, "targets"], Float[np.ndarray, "targets"]]:
    """What errors of each target are compared with, and what goes into it, in all processes."""
    initial = part.starting_weights
    total, number = summed([initial.sum(), float(len(initial))])
    gross = summed(gross_totals(part.matrix, initial))
    alike = summed(gross_totals(part.matrix, np.full(len(initial), total / number)))
    gross = np.where(gross > 0, gross, alike)
    return target_scale(part.targets, part.target_scales, gross), gross


def _domain(
    part: CalibrationProblem,
    there: Int[np.ndarray, "some"],
    bounds: tuple[np.ndarray, np.ndarray],
    factors: Float[np.ndarray, "some"],
    distance: str,
) -> tuple[Domain, Float[np.ndarray, "targets"]]:
    """All targets that any household touches, over their scales in the whole group."""
    initial = part.starting_weights
    total = float(summed(initial.sum()))
    scale, gross = shared_scale(part)
    targets = np.flatnonzero(summed(np.diff(part.matrix.indptr).astype(np.float64)))
    rows = sp.csr_array(part.matrix[targets][:, there].astype(np.float64))
    none = np.zeros(len(targets))
    dual = Dual(
        SharedRows(rows, scale[targets]), part.targets[targets] / scale[targets], initial[there],
        factors, distance_of(distance, *bounds), Slack(none, none, none),
    )  # fmt: skip
    prices = np.where(is_hard(part), np.inf, part.target_shares)[targets] * total
    slack = Slack(
        np.maximum(prices, np.finfo(np.float64).tiny),
        part.tolerance[targets] / scale[targets],
        BAND_STIFFNESS * dual.diagonal,
    )
    small = scale <= SMALL_BESIDE_GROSS * gross
    natural = np.where(small, scale / np.maximum(scale, gross), 1.0)[targets]
    return Domain(targets, there, replace(dual, slack=slack), natural, total), scale
