"""Exact calibration: the weights closest to the initial ones that meet the targets, by Newton on the dual.

Minimise sum_j d_j / q_j G(w_j / d_j) subject to A w = t within the bounds of w. In the multipliers lambda of
the targets this is a smooth convex problem without constraints, as many unknowns as targets: solve
A w(lambda) = t with w_j = d_j F(q_j a_j' lambda). A price and a tolerance are functions of a
target's own multiplier that are added to its total (``Slack``), so that they cost one diagonal term.

Source: Deville and Sarndal, Calibration estimators in survey sampling, JASA 87 (1992).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import scipy.linalg as sl
import scipy.sparse as sp

from sparsereg.calibration.solver.distances import Distance
from sparsereg.shapes import Bool, Float, Int

TOLERANCE = 1e-13
"""Largest error of a total, over its scale, that is taken for none."""
_MOST_STEPS = 100
_MOST_DENSE = 5000
"""Targets up to which a step is solved by Cholesky's factors, beyond by conjugate gradients."""
_DENSE_SHARE = 0.2
"""Share of entries from which the rows of a domain are multiplied as a dense matrix."""
_LEAST_DAMPING, _MOST_DAMPING = 1e-14, 1e-2
"""Range of what is added to the diagonal, as a share of it."""
_STALLED = 12
"""Steps without progress after which the iteration ends."""
_DEPENDENT = 1e-12
"""Share of its squared length that a row must have beside all others, to be independent of them."""
_LONGEST = 16.0
"""Longest step, in steps of Newton."""
ROUNDED = 1e-7
"""Error that may be the targets' own: sums of others that were rounded. Nothing is gained by more steps."""
_PROVEN = 1e-9
"""Share of what is summed by which a proof must hold, so that it is none of rounding."""
_GROWING = tuple(10.0**-k for k in range(6, -1, -1))
"""Shares of the prices with which they are solved one after the other."""
_DRIFT = 4.0
"""Steps of up to so many times the multipliers are added to what they come to; others are computed anew."""


Response = tuple[Float[np.ndarray, "households"], Float[np.ndarray, "households"]]
"""Ratios and their slopes, see ``Distance.respond``."""


@dataclass(frozen=True, eq=False)
class Slack:
    """What may be missing from each total, as a function of its multiplier; arrays of shape (targets,).

    Args:
        price: Of half of a squared error over its scale; infinity: the target is hard.
        band: Half the width of the tolerance, over the scale.
        stiffness: Slope within the tolerance: so large that the multiplier is next to zero there.
    """

    price: Float[np.ndarray, "targets"]
    band: Float[np.ndarray, "targets"]
    stiffness: Float[np.ndarray, "targets"]

    @property
    def rounded(self) -> float:
        """By how much the bound may be off because lines within tolerances are steep, but not upright."""
        return float((0.5 * np.square(self.band) / self.stiffness)[self.stiffness > 0].sum())

    @cached_property
    def is_nothing(self) -> bool:
        """Whether nothing may be missing from any total."""
        return bool(np.isinf(self.price).all() and not self.band.any())

    def value(self, multipliers: Float[np.ndarray, "targets"]) -> float:
        """Integral of what is added, from 0 to these multipliers."""
        size = np.abs(multipliers)
        edge = np.divide(self.band, self.stiffness, out=np.zeros_like(size), where=self.stiffness > 0)
        banded = np.where(size < edge, 0.5 * self.stiffness * size**2, self.band * (size - 0.5 * edge))
        return float((0.5 * np.square(multipliers) / self.price + banded).sum())

    def respond(
        self, multipliers: Float[np.ndarray, "targets"]
    ) -> tuple[Float[np.ndarray, "targets"], Float[np.ndarray, "targets"]]:
        """What is added to each total, and its slope."""
        if self.is_nothing:
            return np.zeros_like(multipliers), np.zeros_like(multipliers)
        within = self.stiffness * multipliers
        free = (np.abs(within) < self.band).astype(np.float64)
        value = multipliers / self.price + np.clip(within, -self.band, self.band)
        return value, 1.0 / self.price + self.stiffness * free


@dataclass(frozen=True, eq=False)
class Rows:
    """A matrix of targets x households in the forms that products need, each made once, on first use.

    Args:
        given: As they were given, canonical.
        scales: What each row is over, > 0.
        turned: As they were given, by household, where that is known.
    """

    given: sp.csr_array
    scales: Float[np.ndarray, "targets"]
    turned: sp.csr_array | None = None

    @cached_property
    def by_target(self) -> sp.csr_array:
        """The rows over their scales, canonical, float64."""
        return with_data(self.given, self.given.data / np.repeat(self.scales, np.diff(self.given.indptr)))

    @cached_property
    def by_household(self) -> sp.csr_array:
        """The same by household, canonical."""
        if self.turned is None:
            return sp.csr_array(self.by_target.T.tocsr())
        return with_data(self.turned, self.turned.data / self.scales[self.turned.indices])

    @cached_property
    def dense(self) -> np.ndarray | None:
        """All entries over their scales, where ``are_full``; else None."""
        return self.given.toarray() / self.scales[:, None] if self.are_full else None

    @property
    def are_full(self) -> bool:
        """Whether so many entries are there, of not too many targets, that a dense matrix is quicker."""
        num_targets, num_households = self.given.shape
        most = _DENSE_SHARE * num_targets * num_households
        return bool(self.given.nnz > most and num_targets <= _MOST_DENSE)

    def take(self, targets: Int[np.ndarray, "some"]) -> Rows:
        """The rows of some targets only."""
        return Rows(sp.csr_array(self.given[targets]), self.scales[targets])

    def totals(self, weights: Float[np.ndarray, "households"]) -> Float[np.ndarray, "targets"]:
        """Weighted totals, shape (targets,)."""
        return np.asarray((self.by_target if self.dense is None else self.dense) @ weights)

    def reach(self, multipliers: Float[np.ndarray, "targets"]) -> Float[np.ndarray, "households"]:
        """What the multipliers come to for each household, shape (households,)."""
        if self.dense is not None:
            return np.asarray(multipliers @ self.dense)
        return np.asarray(self.by_household @ multipliers)

    def lengths(self) -> Int[np.ndarray, "targets"]:
        """How many households each target touches."""
        return np.diff(self.given.indptr)

    def negative(self) -> Bool[np.ndarray, "targets"]:
        """Which targets have an entry below zero."""
        rows = self.given
        target = np.repeat(np.arange(rows.shape[0]), np.diff(rows.indptr))
        return np.asarray(np.bincount(target, rows.data < 0, minlength=rows.shape[0]) > 0)

    def dot(self, one: Float[np.ndarray, "households"], other: Float[np.ndarray, "households"]) -> float:
        """Sum of products over all households."""
        return float(one @ other)

    def squares(self, weights: Float[np.ndarray, "households"]) -> Float[np.ndarray, "targets"]:
        """Sum of the squared entries of each target, households weighted."""
        rows = self.by_target
        return np.asarray(with_data(rows, np.square(rows.data)) @ weights)

    def gram(self, weights: Float[np.ndarray, "households"]) -> Float[np.ndarray, "targets targets"]:
        """Products of the rows with each other, households weighted; at least the lower triangle."""
        if self.dense is None:
            return gram(self.by_household, weights)
        free = np.flatnonzero(weights)
        if len(free) > 0.7 * len(weights):
            return np.asarray((self.dense * weights) @ self.dense.T)
        part = self.dense[:, free]
        return np.asarray((part * weights[free]) @ part.T)


@dataclass(frozen=True, eq=False)
class Dual:
    """A calibration in the multipliers of its targets; rows and targets are over the targets' scales.

    Args:
        rows: Targets x households.
        targets: Shape (targets,).
        weights: d, the initial weights, shape (households,), > 0; 0 for those who are not in a replicate.
        factors: q, > 0: households of a large one are changed first.
        distance: How weights answer, with the bounds of w / d.
        slack: Prices and tolerances.
    """

    rows: Rows
    targets: Float[np.ndarray, "targets"]
    weights: Float[np.ndarray, "households"]
    factors: Float[np.ndarray, "households"]
    distance: Distance
    slack: Slack

    def take(self, targets: Int[np.ndarray, "some"]) -> Dual:
        """Return the problem of some targets only."""
        slack = Slack(self.slack.price[targets], self.slack.band[targets], self.slack.stiffness[targets])
        some = replace(self, rows=self.rows.take(targets), targets=self.targets[targets], slack=slack)
        if "square" in self.__dict__ and self.square is not None:
            some.__dict__["square"] = self.square[np.ix_(targets, targets)]
        return some

    @cached_property
    def mobility(self) -> Float[np.ndarray, "households"]:
        """Slope of each weight by what the multipliers come to, at the initial weights."""
        return np.asarray(self.weights * self.factors)

    @cached_property
    def square(self) -> Float[np.ndarray, "targets targets"] | None:
        """Slopes of the totals by the multipliers there, see ``Rows.gram``; None of too many targets."""
        return self.rows.gram(self.mobility) if len(self.targets) <= _MOST_DENSE else None

    def primal(self, weights: Float[np.ndarray, "households"]) -> float:
        """Distance of weights from the initial ones, and the price of what they miss of soft targets."""
        far = self.rows.dot(self.weights / self.factors, self.distance.value(weights / self.weights))
        soft = np.isfinite(self.slack.price)
        missed = (self.rows.totals(weights) - self.targets)[soft]
        missed = np.maximum(np.abs(missed) - self.slack.band[soft], 0.0)
        return float(far + 0.5 * (self.slack.price[soft] * missed**2).sum())

    def value(self, multipliers: Float[np.ndarray, "targets"]) -> float:
        """The largest lower bound of `primal` that these multipliers prove."""
        return -_State(self, multipliers, self.rows.reach(multipliers)).value

    def violation(self, weights: Float[np.ndarray, "households"]) -> float:
        """Largest error of a hard target beyond its tolerance."""
        hard = np.isinf(self.slack.price)
        missed = np.abs(self.rows.totals(weights) - self.targets) - self.slack.band
        return float(missed[hard].max(initial=0.0))

    @cached_property
    def diagonal(self) -> Float[np.ndarray, "targets"]:
        """Slope of each total by its own multiplier where no bound holds, > 0."""
        known = self.__dict__.get("square")
        diagonal = self.rows.squares(self.mobility) if known is None else known.diagonal()
        return np.where(diagonal > 0, diagonal, 1.0)

    @cached_property
    def hard(self) -> Bool[np.ndarray, "targets"]:
        """Which targets have no price."""
        return np.asarray(np.isinf(self.slack.price))

    @cached_property
    def extremes(self) -> tuple[Float[np.ndarray, "households"], Float[np.ndarray, "households"]]:
        """Smallest and largest weights that bounds allow, and hard totals of entries >= 0 leave room for."""
        there = self.weights > 0
        with np.errstate(invalid="ignore"):
            ends = (self.distance.low, self.distance.high)
            low, high = (np.where(there, ratio * self.weights, 0.0) for ratio in ends)
        closed = np.isfinite(low)
        least = np.where(closed, low, 0.0)
        room = self.targets + self.slack.band - self.rows.totals(least)
        useful = self.hard & ~self.rows.negative() & (self.rows.totals((~closed).astype(np.float64)) == 0)
        room = np.where(useful, np.maximum(room, 0.0), np.inf)
        columns = self.rows.by_household
        filled = np.flatnonzero(np.diff(columns.indptr))
        if len(filled):
            left = np.abs(room[columns.indices] / columns.data)
            left = np.minimum.reduceat(left, columns.indptr[filled])
            high[filled] = np.minimum(high[filled], least[filled] + left)
        return low, high

    def excludes(self, multipliers: Float[np.ndarray, "targets"]) -> float:
        """How far apart the hard targets are for sure, as seen by these multipliers.

        Summed with them, no weights within bounds reach more than all hard targets need (Farkas' lemma), nor
        would they if each of these were off by what rounding may do.

        Returns:
            What is missing, as a share of the largest multiplier; 0 where they prove nothing.
        """
        own = np.where(self.hard, multipliers, 0.0)
        reach, (low, high) = self.rows.reach(own), self.extremes
        largest = float(np.abs(own).max(initial=0.0))
        if largest == 0:
            return 0.0
        own, reach = own / largest, reach / largest
        most = np.where(reach == 0, 0.0, np.where(reach > 0, high, low))
        if self.rows.dot((~np.isfinite(most)).astype(np.float64), np.ones_like(most)) > 0:
            return 0.0
        needed = float(self.targets @ own) - float((self.slack.band + ROUNDED) @ np.abs(own))
        reached, size = self.rows.dot(most, reach), self.rows.dot(np.abs(most), np.abs(reach))
        size += float(np.abs(self.targets) @ np.abs(own))
        missing = needed - reached
        return missing if missing > _PROVEN * size else 0.0


@dataclass(frozen=True, eq=False)
class Solution:
    """Where the iteration ended.

    Args:
        weights: Shape (households,).
        multipliers: Of the rows over their scales, shape (targets,).
        error: Largest difference of what a total and its slack add up to from the target, over the scale.
        steps: How many steps were taken.
        proof: Multipliers that exclude the hard targets, see ``Dual.excludes``; None: none were met.
    """

    weights: Float[np.ndarray, "households"]
    multipliers: Float[np.ndarray, "targets"]
    error: float
    steps: int
    proof: Float[np.ndarray, "targets"] | None = None

    @property
    def converged(self) -> bool:
        """Whether the weights are what was asked for, as far as targets that depend on each other agree."""
        return self.error <= ROUNDED


class _State:
    """Weights, slopes and errors at some multipliers.

    Args:
        dual: The problem.
        multipliers: Shape (targets,).
        reach: What they come to for each household.
        response: How the distance answers to that, where it is known.
    """

    def __init__(
        self,
        dual: Dual,
        multipliers: Float[np.ndarray, "targets"],
        reach: Float[np.ndarray, "households"],
        response: Response | None = None,
    ) -> None:
        ratio, slope = dual.distance.respond(dual.factors * reach) if response is None else response
        self._dual, self._ratio = dual, ratio
        self.multipliers, self.reach = multipliers, reach
        self.weights = dual.weights * ratio
        self.slope = dual.mobility * slope
        slack, self.slack_slope = dual.slack.respond(multipliers)
        self.gradient = dual.rows.totals(self.weights) + slack - dual.targets
        self.error = float(np.abs(self.gradient).max())

    @cached_property
    def value(self) -> float:
        """The dual, which the multipliers minimise; minus the bound that they prove."""
        dual, ratio = self._dual, self._ratio
        bent = ratio * dual.factors * self.reach - dual.distance.value(ratio)
        value = dual.rows.dot(dual.weights / dual.factors, bent)
        return value + dual.slack.value(self.multipliers) - float(dual.targets @ self.multipliers)


@dataclass(frozen=True, eq=False)
class _Equations:
    """What ``_Newton`` solves: (A diag(slope) A' + diag(slack_slope)) p = -gradient, to about ``error``."""

    slope: Float[np.ndarray, "households"]
    slack_slope: Float[np.ndarray, "targets"]
    gradient: Float[np.ndarray, "targets"]
    error: float = 1e-6


def solve(
    dual: Dual,
    start: Float[np.ndarray, "targets"] | None = None,
    *,
    weights: Float[np.ndarray, "households"] | None = None,
    chosen: Int[np.ndarray, "chosen"] | None = None,
    tolerance: float = TOLERANCE,
    most_steps: int = _MOST_STEPS,
) -> Solution:
    """Find multipliers at which totals and slacks add up to the targets.

    Targets that are sums of others are left out meanwhile: they are met if they agree with those.

    Args:
        dual: The problem.
        start: Multipliers to start from; None: 0.
        chosen: Targets of which none is a sum of others, where they are known.
        tolerance: Largest error of a total, over its scale, with which it ends.
        most_steps: Give up after so many steps; the best point is returned.
        weights: Instead of multipliers: weights of an earlier calibration, shape (households,), 0 where they
            are not known.
    """
    chosen = independent(dual) if chosen is None else chosen
    if len(chosen) == len(dual.targets):
        return _surely(dual, _first(dual, start, weights), tolerance, most_steps)
    some = dual.take(chosen)
    first = _first(some, None if start is None else start[chosen], weights)
    part = _surely(some, first, tolerance, most_steps)
    multipliers = np.zeros(len(dual.targets))
    multipliers[chosen] = part.multipliers
    slack, _ = dual.slack.respond(multipliers)
    error = np.abs(dual.rows.totals(part.weights) + slack - dual.targets)
    proof = None
    if part.proof is not None:
        proof = np.zeros(len(dual.targets))
        proof[chosen] = part.proof
    return Solution(part.weights, multipliers, float(error.max(initial=0.0)), part.steps, proof)


def _first(
    dual: Dual, start: Float[np.ndarray, "targets"] | None, weights: Float[np.ndarray, "households"] | None
) -> Float[np.ndarray, "targets"] | None:
    """Multipliers to start from: those given, or those of weights where they are better than none."""
    if start is not None or weights is None:
        return start
    found = multipliers_of(dual, weights)
    none = np.zeros_like(found)
    ahead, cold = (_State(dual, at, dual.rows.reach(at)).value for at in (found, none))
    return found if ahead < cold else none


def multipliers_of(dual: Dual, weights: Float[np.ndarray, "households"]) -> Float[np.ndarray, "targets"]:
    """Multipliers whose weights come closest to these; exactly theirs if they are calibrated weights.

    A regression of what the distance answers to on the rows, over households within their bounds.

    Args:
        dual: The problem.
        weights: Shape (households,); those of 0 are left out.
    """
    ratio, distance = weights / dual.weights, dual.distance
    free = (weights != 0) & (ratio > distance.low) & (ratio < distance.high)
    reach = np.where(free, distance.invert(np.where(free, ratio, 1.0)), 0.0)
    gradient = -dual.rows.totals(dual.weights * reach)
    none = np.zeros(len(dual.targets))
    equations = _Equations(dual.mobility * free, none, gradient)
    return _Newton(dual).direction(equations, _LEAST_DAMPING)[0]


def independent(dual: Dual) -> Int[np.ndarray, "some"]:
    """Indices of targets of which no hard one is a sum of others, ascending.

    Of rows that depend on each other the shorter ones are taken: districts, and not the states that are their
    sums, which leaves the fewest entries to multiply.
    """
    num_targets = len(dual.targets)
    hard = np.flatnonzero(dual.hard & (dual.slack.band == 0))
    if dual.square is None or len(hard) < 2:
        return np.arange(num_targets)
    square = dual.square if len(hard) == num_targets else dual.square[np.ix_(hard, hard)]
    root = np.sqrt(np.maximum(square.diagonal(), np.finfo(np.float64).tiny))
    place = np.empty(len(hard))
    place[np.argsort(dual.rows.lengths()[hard], kind="stable")] = np.arange(len(hard))
    root *= 1.0 + place / len(hard)  # what is long comes later, unless it is needed
    tolerance = _DEPENDENT / 4  # of lengths that are halved at most
    scaled = square / root[:, None] / root
    _, order, rank, _ = sl.lapack.dpstrf(
        scaled.T, tol=tolerance, lower=0, overwrite_a=1
    )  # the lower triangle
    if rank == len(hard):
        return np.arange(num_targets)
    left_out = hard[order[rank:] - 1]
    return np.setdiff1d(np.arange(num_targets), left_out)


def _surely(
    dual: Dual, start: Float[np.ndarray, "targets"] | None, tolerance: float, most_steps: int
) -> Solution:
    """Newton's iteration; where it gets lost, once more with prices that grow to what they are.

    A soft target that asks for far more than can be had drives households to their bounds at the first step,
    and a target that no household moves any more leaves no way back. With prices that grow tenfold each end
    is near the one before.
    """
    found = _iterate(dual, start, tolerance, most_steps)
    if found.converged or found.proof is not None or dual.hard.all():
        return found
    at, steps, grown = None, found.steps, found
    for share in _GROWING:
        price = dual.slack.price * share
        cheaper = replace(dual, slack=replace(dual.slack, price=price))
        grown = _iterate(cheaper, at, tolerance, most_steps)
        at, steps = grown.multipliers, steps + grown.steps
    return replace(grown if grown.error < found.error else found, steps=steps)


def _iterate(
    dual: Dual, start: Float[np.ndarray, "targets"] | None, tolerance: float, most_steps: int
) -> Solution:
    """Newton's iteration from some multipliers."""
    newton = _Newton(dual)
    multipliers = np.zeros(len(dual.targets)) if start is None else start
    state = best = _State(dual, multipliers, dual.rows.reach(multipliers))
    damping, stalled, steps = _LEAST_DAMPING, 0, 0
    while best.error > tolerance and stalled < _STALLED and steps < most_steps:
        direction, damping = newton.direction(state, damping)
        before, (state, length) = state, _along(dual, state, direction)
        damping = min(damping * 100, _MOST_DAMPING) if length < 0.1 else max(damping / 10, _LEAST_DAMPING)
        steps += 1
        if state.error < 0.9 * best.error:
            stalled = 0
        elif best.error <= ROUNDED:  # there, three steps in vain are enough
            stalled += 5
        elif dual.excludes(state.multipliers) > 0:
            return Solution(best.weights, best.multipliers, best.error, steps, state.multipliers)
        else:
            falls = state.value < before.value - 1e-9 * abs(before.value)
            stalled = 0 if falls else stalled + 1
        best = state if state.error < best.error else best
    return Solution(best.weights, best.multipliers, best.error, steps)


def _along(dual: Dual, state: _State, direction: Float[np.ndarray, "targets"]) -> tuple[_State, float]:
    """The state where the dual is about smallest along a direction, and how far away that is.

    Most steps are whole ones. Beyond, the slope along the line costs no product with the matrix. It is used
    instead of the value, which rounding makes useless near the minimum.
    """
    line = _Line(dual, state, direction)
    whole = _State(dual, state.multipliers + direction, *line.at(1.0))
    length = _length(line.slope, float(state.gradient @ direction), float(whole.gradient @ direction))
    moved = state.multipliers + length * direction
    step, size = (float(np.abs(v).max()) for v in (length * direction, moved))
    if step > _DRIFT * size:  # what they come to would keep the rounding of far larger ones
        return _State(dual, moved, dual.rows.reach(moved)), length
    return (whole if length == 1.0 else _State(dual, moved, *line.at(length))), length


class _Line:
    """The dual along a direction from a state; what was asked last is kept."""

    def __init__(self, dual: Dual, state: _State, direction: Float[np.ndarray, "targets"]) -> None:
        self._dual, self._state, self._direction = dual, state, direction
        self._along = dual.rows.reach(direction)
        self._last: tuple[float, Float[np.ndarray, "households"], Response] | None = None

    def at(self, length: float) -> tuple[Float[np.ndarray, "households"], Response]:
        """What the multipliers come to there, and how the distance answers."""
        if self._last is None or self._last[0] != length:
            reach = self._state.reach + length * self._along
            self._last = (length, reach, self._dual.distance.respond(self._dual.factors * reach))
        return self._last[1], self._last[2]

    def slope(self, length: float) -> float:
        """By how much the dual grows per length there."""
        dual, direction = self._dual, self._direction
        slack, _ = dual.slack.respond(self._state.multipliers + length * direction)
        totals = dual.rows.dot(dual.weights * self.at(length)[1][0], self._along)
        return totals + float((slack - dual.targets) @ direction)


def _length(slope: Callable[[float], float], first: float, whole: float) -> float:
    """Where a slope that grows, and is the first, < 0, at 0, is near 0: at 1, if it is small enough there."""
    short, long = 0.0, 1.0
    at_short, at_long = first, whole
    while at_long < 0.5 * first and long < _LONGEST:
        short, at_short, long = long, at_long, 4.0 * long
        at_long = slope(long)
    if at_long <= 0.5 * abs(first):
        return long
    for _ in range(60):
        middle = short + (long - short) * min(max(at_short / (at_short - at_long), 0.1), 0.9)
        at = slope(middle)
        if abs(at) <= 0.2 * abs(first):
            return middle
        if at < 0:
            short, at_short = middle, at
        else:
            long, at_long = middle, at
    return short if short > 0 else long


class _Newton:
    """Solves (A D A' + diag) p = -gradient for the changing diagonals of one problem."""

    def __init__(self, dual: Dual) -> None:
        self._dual, self._rows = dual, dual.rows
        self._diagonal = dual.diagonal

    def direction(
        self, state: _State | _Equations, damping: float
    ) -> tuple[Float[np.ndarray, "targets"], float]:
        """The step, and the damping it took to find one."""
        if len(self._diagonal) > _MOST_DENSE:
            return self._by_gradients(state, damping), damping
        square = self._first_square(state)
        if square is None:
            square = self._rows.gram(state.slope)
        on_diagonal = np.einsum("ii->i", square)
        on_diagonal += state.slack_slope
        while True:
            # Rows that no free household touches have nothing on the diagonal: they get a share of old.
            root = 1.0 / np.sqrt(on_diagonal + damping * self._diagonal)
            scaled = square * root[:, None] * root
            np.einsum("ii->i", scaled)[:] = 1.0 + damping
            factor, failed = sl.lapack.dpotrf(scaled.T, lower=0, clean=0, overwrite_a=1)  # the lower triangle
            if failed:
                damping = max(damping, 1e-16) * 100
                continue
            return -root * sl.lapack.dpotrs(factor, root * state.gradient, lower=0)[0], damping

    def _first_square(self, state: _State | _Equations) -> np.ndarray | None:
        """The products at the initial weights, if they are known and the state is there."""
        known = self._dual.__dict__.get("square")
        if known is None or isinstance(state, _Equations) or state.multipliers.any():
            return None
        moved = (state.slope != self._dual.mobility).astype(np.float64)
        return np.array(known) if self._rows.dot(moved, moved) == 0 else None

    def _by_gradients(self, state: _State | _Equations, damping: float) -> Float[np.ndarray, "targets"]:
        """Conjugate gradients, preconditioned by the diagonal, to a share of the error."""
        extra = state.slack_slope + damping * self._diagonal
        diagonal = self._rows.squares(state.slope) + extra
        solution, residual = np.zeros(len(diagonal)), -state.gradient
        conditioned = residual / diagonal
        direction, old = conditioned, float(residual @ conditioned)
        stop = old * min(1e-4, state.error) ** 2
        for _ in range(20 * _MOST_STEPS):
            if old <= stop:
                break
            curved = self._rows.totals(state.slope * self._rows.reach(direction)) + extra * direction
            length = old / float(direction @ curved)
            solution += length * direction
            residual = residual - length * curved
            conditioned = residual / diagonal
            new = float(residual @ conditioned)
            direction, old = conditioned + (new / old) * direction, new
        return solution


def with_data(rows: sp.csr_array, data: Float[np.ndarray, "entries"]) -> sp.csr_array:
    """Return a canonical matrix with other entries at the same places."""
    return sp.csr_array((data, rows.indices, rows.indptr), shape=rows.shape)


def gram(
    columns: sp.csr_array, weights: Float[np.ndarray, "households"]
) -> Float[np.ndarray, "targets targets"]:
    """Products of targets' rows with each other, households weighted; at least the lower triangle.

    Args:
        columns: Households x targets, canonical CSR, float64.
        weights: One per household; those of weight zero cost nothing.
    """
    if importlib.util.find_spec("numba") is not None:
        from sparsereg.calibration.solver import kernels

        out = np.zeros((columns.shape[1], columns.shape[1]))
        kernels.gram(columns.indptr, columns.indices, columns.data, weights, out)
        return out
    weighted = columns.data * np.repeat(weights, np.diff(columns.indptr))
    return np.asarray((columns.T @ with_data(columns, weighted)).toarray())
