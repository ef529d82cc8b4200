"""All areas, their groups and the nation at once: soft targets, one weight per area and household.

A weight is d F(x' q) with the household's measures x and the sum q of the multipliers of its area, of the
groups that the area is in, and of the nation. So each area's part of Newton's equations is made from the one
table of measures, and what areas have to do with each other goes through the levels: an area is eliminated
into its group, groups into theirs and the nation, and solved on the way back. Nothing of the size of areas x
households, or of all targets squared, is ever held. Measures that are exact sums of others are not stored:
products of rows, which cost most, are made of the others and added up.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import scipy.linalg as sl
import scipy.sparse as sp

from sparsereg.calibration.areas import AreaProblem
from sparsereg.calibration.solver.areas import AreaWeights
from sparsereg.calibration.solver.bounds import Bounds, at_bounds, ratio_bounds
from sparsereg.calibration.solver.distances import distance_of
from sparsereg.calibration.solver.dual_newton import Rows, gram
from sparsereg.calibration.solver.shared import largest, summed
from sparsereg.calibration.target_scale import target_scale
from sparsereg.device import several_processes
from sparsereg.linalg.nesting import Nesting, find_nesting
from sparsereg.linalg.threads import in_turn_by_turn, quiet_threads
from sparsereg.shapes import Float, Int

_log = logging.getLogger(__name__)

TOLERANCE = 1e-9
"""Largest difference of a total and its slack from the target, over its scale, with which it ends."""
_MOST_STEPS = 200
_SHORTEST = 2.0**-20
_ENOUGH = 1e-4
"""Share of the promised fall that a step has to bring."""
_DAMPING = 1e-13


@dataclass(frozen=True, eq=False)
class _Some:
    """Measures of some households for the products of ``Rows``, made when they are needed and not kept."""

    by_household: sp.csr_array

    def totals(self, weights: Float[np.ndarray, "households"]) -> Float[np.ndarray, "measures"]:
        """See ``Rows``."""
        return np.asarray(self.by_household.T @ weights)

    def reach(self, multipliers: Float[np.ndarray, "measures"]) -> Float[np.ndarray, "households"]:
        """See ``Rows``."""
        return np.asarray(self.by_household @ multipliers)

    def gram(self, weights: Float[np.ndarray, "households"]) -> Float[np.ndarray, "measures measures"]:
        """See ``Rows``."""
        return gram(self.by_household, weights)


@dataclass(frozen=True, eq=False)
class _Level:
    """What a place asks for: rows of all measures, each over its size in the nation.

    Args:
        rows: Indices of its measures, shape (own,).
        targets: Over the sizes.
        softness: Slope of what may be missing from a total by its multiplier, > 0.
        scale: What an error is compared with, over the sizes.
    """

    rows: Int[np.ndarray, "own"]
    targets: Float[np.ndarray, "own"]
    softness: Float[np.ndarray, "own"]
    scale: Float[np.ndarray, "own"]


@dataclass(frozen=True, eq=False)
class _Response:
    """Answer of what stands below to multipliers p from above: total change = ``square`` p + ``fixed``."""

    square: Float[np.ndarray, "measures measures"]
    fixed: Float[np.ndarray, "measures"]


@dataclass(frozen=True, eq=False)
class _Solved:
    """The step of a place's own multipliers: ``fixed`` - ``by_above`` p."""

    fixed: Float[np.ndarray, "own"]
    by_above: Float[np.ndarray, "own measures"]


@dataclass(frozen=True, eq=False)
class _Pass:
    """What one look at all households gives at some multipliers: value, errors, and the step from there.

    Args:
        value: Of the dual, to be minimised.
        error: Largest, over the scales.
        slope: Of the value along the step.
        step: By place.
    """

    value: float
    error: float
    slope: float
    step: list[Float[np.ndarray, "own"]]


class Joint:
    """Soft targets at all levels.

    Args:
        problem: Measures, targets at every level, who may stand for which area.
        distance: "linear", "raking" or "logit".
        bounds: Smallest and largest weight over initial weight; None: 0 and infinity.
        price: Of a target: missing it by 1 % of its scale costs as much as changing by 1 % as many times the
            weights of its place. Times the target's own.
        areas: Those that this process computes; in a group each area is one process's. None: all.

    Raises:
        ValueError: bounds or distance are wrong.
    """

    def __init__(
        self,
        problem: AreaProblem,
        distance: str = "linear",
        bounds: Bounds | None = None,
        price: float = 100.0,
        areas: range | None = None,
    ) -> None:
        self.problem, self.price = problem, price
        self.areas = range(problem.num_areas) if areas is None else areas
        self._low, self._high = ratio_bounds(problem.initial_weights, distance, bounds, None)
        self._distance = distance
        rows = sp.csr_array(problem.measures.astype(np.float64))
        sizes = np.asarray(abs(rows) @ problem.initial_weights)
        self.sizes = np.where(sizes > 0, sizes, 1.0)
        self._num = rows.shape[0]
        nesting = find_nesting(rows, sp.csr_array(rows.T.tocsr()))
        stored = np.arange(self._num) if nesting is None else nesting.stored
        self._made_of = None if nesting is None else _made_of(nesting, self.sizes)
        self._rows = Rows(rows if nesting is None else sp.csr_array(rows[stored]), self.sizes[stored])
        _ = self._rows.by_household  # threads share it
        self._levels = [self._level(place) for place in range(len(problem.places) + 1)]
        self.multipliers = [np.zeros(len(level.rows)) for level in self._levels]
        self.steps = 0

    @cached_property
    def _gross(self) -> tuple[np.ndarray, np.ndarray]:
        """Per place: what goes into each measure, signs left aside, over its size; and the weight."""
        p = self.problem
        gross = np.zeros((len(p.places) + 1, p.measures.shape[0]))
        weight, absolute = np.zeros(len(p.places) + 1), abs(self._rows.by_target)
        if p.placement.is_uniform:
            whole = self._expanded(absolute @ p.initial_weights)
        for area in range(p.num_areas):
            households, shares = p.placement.of(area, p.num_households)
            if p.placement.is_uniform:
                own, total = whole * shares[0], float(p.initial_weights.sum() * shares[0])
            else:
                initial = np.zeros(p.num_households)
                initial[households] = p.initial_weights[households] * shares
                own, total = self._expanded(absolute @ initial), float(initial.sum())
            for place in p.chain(area):
                gross[place] += own
                weight[place] += total
        return gross, weight

    def _level(self, place: int) -> _Level:
        p, own = self.problem, self.problem.by_place[place]
        rows, sizes = p.measure[own], self.sizes[p.measure[own]]
        gross, weight = self._gross
        targets = p.targets[own] / sizes
        scale = target_scale(targets, None, gross[place, rows])
        prices = self.price * (np.ones(len(own)) if p.prices is None else p.prices[own])
        prices = np.maximum(prices * weight[place], np.finfo(np.float64).tiny)
        return _Level(rows, targets, np.minimum(scale**2 / prices, 1e200), scale)

    def solve(self) -> None:
        """Find the multipliers."""
        with quiet_threads():
            at = self._descended()
        if at.error > 1e-6:
            _log.warning("the areas together are %.1e away from where the weights are the best", at.error)

    def _descended(self) -> _Pass:
        """Take Newton's steps; where they end."""
        at, step = self._look(self.multipliers), 1.0
        while at.error > TOLERANCE and self.steps < _MOST_STEPS:
            ahead, step = None, 1.0
            while step > _SHORTEST:
                moved = [m + step * s for m, s in zip(self.multipliers, at.step, strict=True)]
                ahead = self._look(moved)
                if self._is_better(at, ahead, step):
                    break
                step /= 4.0 if step == 1.0 else 2.0
            else:
                break
            assert ahead is not None
            self.multipliers, at = moved, ahead
            self.steps += 1
            _log.debug("step %d: error %.2e, length %g", self.steps, at.error, step)
        return at

    @staticmethod
    def _is_better(at: _Pass, ahead: _Pass, step: float) -> bool:
        """Whether the value has fallen as promised, or, where it is lost in rounding, the error."""
        if ahead.value <= at.value + _ENOUGH * step * at.slope:
            return True
        return ahead.error < at.error and ahead.value <= at.value + 1e-12 * abs(at.value)

    def _look(self, multipliers: list[np.ndarray]) -> _Pass:
        """Look at every area once, eliminate from the areas up to the nation, and solve on the way back."""
        p, num = self.problem, self._num
        together = self._summed(multipliers)
        square: dict[int, np.ndarray] = {}
        fixed: dict[int, np.ndarray] = {}
        totals = {place: np.zeros(num) for place in range(p.num_areas, len(p.places) + 1)}
        solved: list[_Solved | None] = [None] * (len(p.places) + 1)
        value = error = slope = 0.0
        errors: list[np.ndarray] = [np.zeros(0)] * (len(p.places) + 1)

        def place_done(place: int, at: np.ndarray, response: _Response) -> None:
            nonlocal value, error
            level, own = self._levels[place], multipliers[place]
            errors[place] = at[level.rows] + level.softness * own - level.targets
            value += float(0.5 * (level.softness * own) @ own - level.targets @ own)
            error = max(error, float((np.abs(errors[place]) / level.scale).max(initial=0.0)))
            solved[place], up = _eliminated(level, response, errors[place])
            if place < len(p.places):
                above = int(p.above[place]) if p.above[place] >= 0 else len(p.places)
                if above in square:
                    square[above] += up.square
                    fixed[above] += up.fixed
                else:
                    square[above], fixed[above] = up.square, up.fixed
                totals[above] += at

        of_areas = in_turn_by_turn(self._area, ((area, together[area]) for area in self.areas))
        for area, (own, at, products) in zip(self.areas, of_areas, strict=True):
            value += own
            place_done(area, at, _Response(products, np.zeros(num)))
        value, error = self._of_all_processes(value, error, square, fixed, totals)
        inner = np.arange(p.num_areas, len(p.places))
        for place in [*inner[np.argsort(-p.depth[inner], kind="stable")].tolist(), len(p.places)]:
            if place in square:
                place_done(place, totals[place], _Response(square.pop(place), fixed.pop(place)))
        step = self._downwards(solved)
        slopes = [float(e @ s) if len(e) == len(s) else 0.0 for e, s in zip(errors, step, strict=True)]
        slope = float(summed(sum(slopes[: p.num_areas]))) + sum(slopes[p.num_areas :])
        return _Pass(value, error, slope, step)

    def _of_all_processes(
        self,
        value: float,
        error: float,
        square: dict[int, np.ndarray],
        fixed: dict[int, np.ndarray],
        totals: dict[int, np.ndarray],
    ) -> tuple[float, float]:
        """Add up what the areas of all processes bring to what they are in; return value and error of all."""
        if not several_processes():
            return value, error
        num = self._num
        for place in sorted({_above(self.problem, area) for area in range(self.problem.num_areas)}):
            square[place] = summed(square.get(place, np.zeros((num, num))))
            fixed[place], totals[place] = summed([fixed.get(place, np.zeros(num)), totals[place]])
        return float(summed(value)), largest(error)

    def _downwards(self, solved: list[_Solved | None]) -> list[np.ndarray]:
        """Steps of all places, from the nation down."""
        p, num = self.problem, self._num
        steps: list[np.ndarray] = [np.zeros(len(level.rows)) for level in self._levels]
        from_above = {len(p.places): np.zeros(num)}
        order = np.argsort(p.depth, kind="stable")  # the nation, last of the places, has depth 0
        for place in order.tolist():
            above = from_above[place] if place == len(p.places) else from_above[_above(p, place)]
            found, here = solved[place], above.copy()
            if found is not None and len(found.fixed):
                steps[place] = found.fixed - found.by_above @ above
                here[self._levels[place].rows] += steps[place]
            from_above[place] = here
        return steps

    def _summed(self, multipliers: list[np.ndarray]) -> list[np.ndarray]:
        """Multipliers of all measures that each area's households feel."""
        p, num = self.problem, self._num
        felt: list[np.ndarray] = [np.zeros(num)] * (len(p.places) + 1)
        for place in np.argsort(p.depth, kind="stable").tolist():
            own = np.zeros(num) if place == len(p.places) else felt[_above(p, place)].copy()
            own[self._levels[place].rows] += multipliers[place]
            felt[place] = own
        return felt

    def _part(self, area: int) -> tuple[Rows | _Some, np.ndarray, np.ndarray]:
        """Measures of an area's households, who they are, and their initial weights in it."""
        p = self.problem
        households, shares = p.placement.of(area, p.num_households)
        rows: Rows | _Some = self._rows
        if len(households) < p.num_households:
            rows = _Some(sp.csr_array(self._rows.by_household[households]))
        return rows, households, p.initial_weights[households] * shares

    def _expanded(self, totals: np.ndarray) -> np.ndarray:
        """Totals of all measures from those of the stored ones."""
        return np.asarray(totals if self._made_of is None else self._made_of @ totals)

    def _reach(self, rows: Rows | _Some, felt: np.ndarray) -> np.ndarray:
        """What multipliers of all measures come to for each household."""
        return rows.reach(felt if self._made_of is None else self._made_of.T @ felt)

    def _square(self, rows: Rows | _Some, weights: np.ndarray) -> np.ndarray:
        """Products of all measures with each other."""
        square = rows.gram(weights)
        square = np.tril(square) + np.tril(square, -1).T
        return square if self._made_of is None else np.asarray(self._made_of @ (self._made_of @ square).T)

    def _area(self, area: int, felt: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
        """Value, totals and products of the measures of one area."""
        rows, households, initial = self._part(area)
        distance = distance_of(self._distance, self._low[households], self._high[households])
        reach = self._reach(rows, felt)
        ratio, slope = distance.respond(reach)
        value = float(initial @ (ratio * reach - distance.value(ratio)))
        totals = self._expanded(rows.totals(initial * ratio))
        return value, totals, self._square(rows, initial * slope)

    def weights(self) -> Iterator[AreaWeights]:
        """The weights of one area after the other, as they are made."""
        together = self._summed(self.multipliers)
        yield from in_turn_by_turn(self._weighed, ((area, together[area]) for area in self.areas))

    def _weighed(self, area: int, felt: np.ndarray) -> AreaWeights:
        begin, p = time.perf_counter(), self.problem
        rows, households, initial = self._part(area)
        low, high = self._low[households], self._high[households]
        ratio, _ = distance_of(self._distance, low, high).respond(self._reach(rows, felt))
        weights, level = initial * ratio, self._levels[area]
        at = at_bounds(ratio, low, high)
        totals, sizes = self._expanded(rows.totals(weights))[level.rows], self.sizes[level.rows]
        return AreaWeights(
            area, households, initial, weights, p.by_place[area], totals * sizes,
            np.abs(totals - level.targets) / level.scale, self.multipliers[area] / sizes,
            np.empty(0, dtype=np.int64), int(at.sum()), self.steps, time.perf_counter() - begin,
        )  # fmt: skip


def _made_of(nesting: Nesting, sizes: Float[np.ndarray, "measures"]) -> sp.csr_array:
    """What measures over their sizes are in stored measures over theirs, shape (measures, stored)."""
    own = sp.eye_array(len(nesting.stored), format="csr")
    both = sp.vstack([own, nesting.parts], format="csr")
    place = np.argsort(np.concatenate([nesting.stored, nesting.sums]))
    scaled = sp.diags_array(1.0 / sizes) @ both[place] @ sp.diags_array(sizes[nesting.stored])
    return sp.csr_array(scaled)


def _above(problem: AreaProblem, place: int) -> int:
    above = int(problem.above[place])
    return above if above >= 0 else len(problem.places)


def _eliminated(
    level: _Level, below: _Response, error: Float[np.ndarray, "own"]
) -> tuple[_Solved, _Response]:
    """Solve a place's own multipliers for those of what it is part of, and put them in.

    With p from above and own step s: square (p + s) + fixed is what totals change by, and the own equations
    are that, at the own rows, + softness s = - error.
    """
    if len(level.rows) == 0:
        empty = np.zeros((0, len(below.fixed)))
        return _Solved(np.zeros(0), empty), below
    columns = below.square[:, level.rows]
    matrix = columns[level.rows].copy()
    diagonal = np.diag_indices(len(matrix))
    matrix[diagonal] = matrix[diagonal] * (1.0 + _DAMPING) + level.softness
    root = 1.0 / np.sqrt(np.maximum(matrix[diagonal], np.finfo(np.float64).tiny))
    factor = sl.cho_factor(matrix * root[:, None] * root + 1e-15 * np.eye(len(root)), lower=True)
    right = np.column_stack([-error - below.fixed[level.rows], columns.T])
    answer = root[:, None] * sl.cho_solve(factor, root[:, None] * right)
    own, by_above = answer[:, 0], answer[:, 1:]
    return _Solved(own, by_above), _Response(below.square - columns @ by_above, below.fixed + columns @ own)


def calibrate_together(
    problem: AreaProblem,
    distance: str = "linear",
    bounds: Bounds | None = None,
    price: float = 100.0,
    areas: range | None = None,
) -> Iterator[AreaWeights]:
    """Find weights of all areas at once, near their initial ones and near the targets of every level.

    Args:
        problem: Measures, targets and who may stand for which area.
        distance: "linear", "raking" or "logit".
        bounds: Smallest and largest weight over initial weight; None: 0 and infinity.
        price: See ``Joint``.
        areas: Those whose weights this process finds, in a group of processes; None: all.

    Raises:
        ValueError: bounds or distance are wrong.
    """
    joint = Joint(problem, distance, bounds, price, areas)

    def made() -> Iterator[AreaWeights]:
        joint.solve()
        yield from joint.weights()

    return made()
