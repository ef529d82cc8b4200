"""Exact calibration of every area by itself: one matrix, one warm start, many right-hand sides.

With weights over the area's share of the nation, areas with the same households have the same dual problem
but for the targets: its rows, what depends on what, and the multipliers of their mean are found once.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import scipy.sparse as sp

from sparsereg.calibration.areas import AreaProblem
from sparsereg.calibration.solver.bounds import Bounds, at_bounds, ratio_bounds
from sparsereg.calibration.solver.distances import distance_of
from sparsereg.calibration.solver.dual_newton import Dual, Rows, Slack, Solution, independent, solve
from sparsereg.calibration.solver.exact import (
    GAVE_WAY,
    Certificate,
    Domain,
    certify,
    give_way,
)
from sparsereg.calibration.target_scale import target_scale
from sparsereg.linalg.threads import in_turn_by_turn
from sparsereg.shapes import Float, Int

_MOST_PROGRAMMED = 300_000
"""Entries of an area up to which a linear programme says which targets give way, in seconds for each."""


@dataclass(frozen=True, eq=False)
class AreaWeights:
    """The weights of one area.

    Args:
        area: Its index.
        households: Indices of those that may stand for it, ascending.
        initial: Their weights before, times their share in the area.
        weights: Their weights.
        targets: Indices of the area's targets.
        estimates: What the weights make of them.
        errors: Absolute errors over the scales of the targets.
        multipliers: What each target costs: w = d F(measures' multipliers).
        gave_way: Indices of targets that cannot be met together with the others.
        bounds_hit: How many weights are at a bound.
        steps: Steps of Newton's method.
        seconds: Wall clock time.
    """

    area: int
    households: np.ndarray
    initial: np.ndarray
    weights: np.ndarray
    targets: np.ndarray
    estimates: np.ndarray
    errors: np.ndarray
    multipliers: np.ndarray
    gave_way: np.ndarray
    bounds_hit: int
    steps: int
    seconds: float


def calibrate_areas(
    problem: AreaProblem,
    distance: str = "linear",
    bounds: Bounds | None = None,
    areas: range | None = None,
) -> Iterator[AreaWeights]:
    """Find for every area the weights closest to its initial ones that meet its targets, one after the other.

    Results come as they are made, so that they need not all be in memory.

    Args:
        problem: Measures, targets, and who may stand for which area. Targets of the nation are not used.
        distance: "linear", "raking" or "logit".
        bounds: Smallest and largest weight over initial weight; None: 0 and infinity.
        areas: Which ones; None: all.

    Raises:
        ValueError: bounds or distance are wrong, or an area has targets and no household.
    """
    low, high = ratio_bounds(problem.initial_weights, distance, bounds, None)
    chosen = range(problem.num_areas) if areas is None else areas
    return in_turn_by_turn(_solve, _prepared(problem, distance, (low, high), chosen))


def _prepared(
    problem: AreaProblem, distance: str, bounds: tuple[np.ndarray, np.ndarray], areas: range
) -> Iterator[tuple[AreaProblem, _Template, int]]:
    """What each area is solved with."""
    template: _Template | None = None
    for area in areas:
        targets = problem.by_area[area]
        households, shares = problem.placement.of(area, problem.num_households)
        if len(households) == 0:
            raise ValueError(f"area {problem.placement.areas[area]!r} has targets and no household")
        measures = problem.measure[targets]
        if template is None or not template.serves(measures, problem.placement.is_uniform):
            template = _Template.of(problem, measures, households, shares, distance, bounds)
        yield problem, template, area


@dataclass(frozen=True, eq=False)
class _Template:
    """What areas with the same households and measures have in common.

    Args:
        measures: Indices of the measures.
        households: Indices of the households.
        shares: Of the households' weights in the area; all the same where other areas are served, too.
        sizes: What goes into each measure, signs left aside: what rows and targets are divided by.
        dual: The problem, with targets of 0.
        chosen: Indices of rows of which none is a sum of others.
        start: Multipliers to start from, of the chosen rows.
    """

    measures: np.ndarray
    households: np.ndarray
    shares: np.ndarray
    sizes: np.ndarray
    dual: Dual
    chosen: np.ndarray
    start: np.ndarray

    @classmethod
    def of(
        cls,
        problem: AreaProblem,
        measures: np.ndarray,
        households: np.ndarray,
        shares: np.ndarray,
        distance: str,
        bounds: tuple[np.ndarray, np.ndarray],
    ) -> _Template:
        """Prepare what the areas have in common."""
        uniform = problem.placement.is_uniform
        weights = problem.initial_weights[households] * (1.0 if uniform else shares)
        rows = sp.csr_array(problem.measures[measures].astype(np.float64))
        rows = rows if len(households) == problem.num_households else sp.csr_array(rows[:, households])
        sizes = np.asarray(abs(rows) @ weights)
        sizes = np.where(sizes > 0, sizes, 1.0)
        none = np.zeros(len(measures))
        own = distance_of(distance, *(bound[households] for bound in bounds))
        slack = Slack(np.full(len(measures), np.inf), none, none)
        dual = Dual(Rows(rows, sizes), none, weights, np.ones(len(weights)), own, slack)
        chosen = independent(dual)
        part = dual if len(chosen) == len(measures) else dual.take(chosen)
        start = np.zeros(len(chosen))
        if uniform and len(measures):
            mean = (_mean_targets(problem, measures) / sizes)[chosen]
            found = solve(replace(part, targets=mean), chosen=np.arange(len(chosen)))
            start = found.multipliers if found.converged else start
        return cls(measures, households, shares, sizes, part, chosen, start)

    def serves(self, measures: np.ndarray, uniform: bool) -> bool:
        """Whether an area with these measures can use it."""
        return uniform and np.array_equal(measures, self.measures)

    def solve(self, targets: np.ndarray) -> Solution:
        """Solve for some targets, over the share; multipliers of all rows."""
        dual = replace(self.dual, targets=(targets / self.sizes)[self.chosen])
        found = solve(dual, self.start, chosen=np.arange(len(self.chosen)))
        if not found.converged:
            natural = np.ones(len(self.chosen))
            domain = Domain(self.chosen, self.households, dual, natural, float(dual.weights.sum()))
            found, _, _ = give_way(domain, found, _certified)
        multipliers = np.zeros(len(targets))
        multipliers[self.chosen] = found.multipliers
        return replace(found, multipliers=multipliers)


def _certified(domain: Domain, end: Solution) -> Certificate:
    """Which targets of an area give way: of one with few entries as few as possible, else all."""
    if domain.dual.rows.given.nnz <= _MOST_PROGRAMMED:
        return certify(domain, end)
    return {"feasible": None, "targets": [], "violation": None}, np.zeros(len(domain.targets), dtype=bool)


def _mean_targets(problem: AreaProblem, measures: np.ndarray) -> np.ndarray:
    """Targets of the areas together, over their share: those of an area like the nation."""
    assert isinstance(problem.placement.shares, np.ndarray)
    mean = np.empty(len(measures))
    for place, measure in enumerate(measures):
        own = np.flatnonzero((problem.measure == measure) & problem.is_of_area)
        mean[place] = problem.targets[own].sum() / problem.placement.shares[problem.area[own]].sum()
    return mean


def _solve(problem: AreaProblem, template: _Template, area: int) -> AreaWeights:
    """Calibrate one area."""
    begin = time.perf_counter()
    targets, share = problem.by_area[area], 1.0
    _, shares = problem.placement.of(area, problem.num_households)
    if problem.placement.is_uniform:
        share = float(shares[0])
    found = template.solve(problem.targets[targets] / share) if len(targets) else None
    initial = problem.initial_weights[template.households] * shares
    weights = initial.copy() if found is None else found.weights * share
    gross = template.sizes * share
    estimates, errors = reached(problem, area, template.households, weights, gross)
    low, high = template.dual.distance.low * initial, template.dual.distance.high * initial
    weights = np.clip(weights, low, high)
    at_bound = at_bounds(weights, low, high)
    multipliers = np.zeros(0) if found is None else found.multipliers / template.sizes
    return AreaWeights(
        area, template.households, initial, weights, targets, estimates, errors, multipliers,
        targets[errors > GAVE_WAY], int(at_bound.sum()), 0 if found is None else found.steps,
        time.perf_counter() - begin,
    )  # fmt: skip


def reached(
    problem: AreaProblem,
    area: int,
    households: Int[np.ndarray, "some"],
    weights: Float[np.ndarray, "some"],
    gross: Float[np.ndarray, "targets"],
) -> tuple[Float[np.ndarray, "targets"], Float[np.ndarray, "targets"]]:
    """What weights of an area's households make of its targets, and the errors over the targets' scales.

    Args:
        problem: Measures and targets.
        area: Its index.
        households: Indices of those that may stand for it.
        weights: Theirs.
        gross: What goes into each target with the initial weights, signs left aside.
    """
    targets = problem.by_area[area]
    estimates = problem.measures[problem.measure[targets]] @ of_all(problem, households, weights)
    wanted = problem.targets[targets]
    return estimates, np.abs(estimates - wanted) / target_scale(wanted, None, gross)


def of_all(
    problem: AreaProblem, households: Int[np.ndarray, "some"], weights: Float[np.ndarray, "some"]
) -> Float[np.ndarray, "households"]:
    """Weights of all households, zero for those that are not among these."""
    if len(weights) == problem.num_households:
        return weights
    full = np.zeros(problem.num_households)
    full[households] = weights
    return full
