"""Bounded least squares by an interior-point method: exact where households outnumber what targets determine.

Minimise 1/2 |B'u - t|^2 + 1/2 sum_j p_j (u_j - c_j)^2 over lower <= u <= upper, optionally with a'u = total.
The number of steps hardly depends on the problem, and each one solves a dense system with as many rows as
there are households or targets, whichever are fewer.

Source: Mehrotra's predictor-corrector (Wright, Primal-Dual Interior-Point Methods, 1997).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.linalg as sl
import scipy.sparse as sp

from sparsereg.calibration.solver.page_factors import PageBlocks
from sparsereg.shapes import Float

_DENSE = 0.05
"""Share of the households from which a target's row is multiplied as a dense one."""
_TO_BOUNDARY = 0.995
"""Share of the way to the nearest bound that a step may go."""
_INSIDE = 0.1
"""Distance of the start from the bounds, in mean contributions."""


@dataclass(frozen=True, eq=False)
class BoxQuadratic:
    """The problem; arrays are float64.

    Args:
        rows: B, households x targets, columns of unit norm make it well scaled.
        targets: t.
        lower: Lower bounds.
        upper: Upper bounds, > lower; infinity for none.
        pull: p, >= 0.
        center: c.
        sum_of: a, for the sum that is held, or None.
        total: What a'u must be.
        blocks: B B' by pages, where it is made of such.
    """

    rows: sp.csr_array
    targets: Float[np.ndarray, "targets"]
    lower: Float[np.ndarray, "households"]
    upper: Float[np.ndarray, "households"]
    pull: Float[np.ndarray, "households"]
    center: Float[np.ndarray, "households"]
    sum_of: Float[np.ndarray, "households"] | None = None
    total: float = 0.0
    blocks: PageBlocks | None = None

    def slope(self, u: Float[np.ndarray, "households"]) -> Float[np.ndarray, "households"]:
        """Gradient of the objective."""
        return np.asarray(self.rows @ (self.rows.T @ u - self.targets) + self.pull * (u - self.center))


class _Newton:
    """Solves (B B' + diag) x = r for changing diagonals."""

    def __init__(self, problem: BoxQuadratic) -> None:
        rows, self._blocks = problem.rows, problem.blocks
        self._rows, self._columns = rows, sp.csr_array(rows.T)
        is_wide = self._blocks is None and rows.shape[0] <= rows.shape[1]
        self._gram = self._products() if is_wide else None

    def _products(self) -> Float[np.ndarray, "households households"]:
        dense = np.diff(self._columns.indptr) > _DENSE * self._rows.shape[0]
        often, rest = self._rows[:, dense].toarray(), sp.csr_array(self._rows[:, ~dense])
        products: np.ndarray = often @ often.T + (rest @ rest.T).toarray()
        return products

    def factor(self, diagonal: Float[np.ndarray, "households"]) -> None:
        """Prepare for a diagonal > 0."""
        self._diagonal = diagonal
        if self._blocks is not None:
            self._pages = self._blocks.factors(np.ones(len(diagonal), dtype=bool), diagonal)
            return
        if self._gram is not None:
            square = self._gram.copy()
            square[np.diag_indices(len(square))] += diagonal
        else:
            square = (self._columns @ sp.diags_array(1.0 / diagonal) @ self._rows).toarray()
            square[np.diag_indices(len(square))] += 1.0
        self._factor = sl.cho_factor(square, lower=True, overwrite_a=True, check_finite=False)

    def solve(self, right: Float[np.ndarray, "households"]) -> Float[np.ndarray, "households"]:
        """Solve, and once more for what rounding has left."""
        x = self._once(right)
        return np.asarray(x + self._once(right - self._rows @ (self._columns @ x) - self._diagonal * x))

    def _once(self, right: Float[np.ndarray, "households"]) -> Float[np.ndarray, "households"]:
        if self._blocks is not None:
            return self._pages.solve(right)
        if self._gram is not None:
            return np.asarray(sl.cho_solve(self._factor, right, check_finite=False))
        scaled = right / self._diagonal  # the formula of Woodbury
        inner = sl.cho_solve(self._factor, self._columns @ scaled, check_finite=False)
        return np.asarray(scaled - (self._rows @ inner) / self._diagonal)


class InteriorPoint:
    """A point strictly between the bounds, with multipliers of the bounds and of the held sum.

    Args:
        problem: What is minimised.
        start: A guess, shape (households,).
    """

    def __init__(self, problem: BoxQuadratic, start: Float[np.ndarray, "households"]) -> None:
        self.problem, self._newton = problem, _Newton(problem)
        self._bounded = np.isfinite(problem.upper)
        typical = max(float(np.mean(start - problem.lower)), 1e-300)
        width = np.where(self._bounded, problem.upper - problem.lower, np.inf)
        margin = _INSIDE * np.minimum(typical, width)
        self.u = np.minimum(np.maximum(start, problem.lower + margin), problem.upper - margin)
        force = _INSIDE * max(float(np.abs(problem.slope(self.u)).mean()) * typical, 1e-300)
        below, above = self._room()
        self._low, self._high = force / below, np.where(self._bounded, force / above, 0.0)
        self.multiplier = 0.0

    def _room(self) -> tuple[Float[np.ndarray, "households"], Float[np.ndarray, "households"]]:
        """Distances from the lower and the upper bounds; 1 where there is no upper bound."""
        above = np.where(self._bounded, self.problem.upper - self.u, 1.0)
        return self.u - self.problem.lower, above

    def _gap(self) -> float:
        """Sum of distances times multipliers: bounds the distance from the minimum."""
        below, above = self._room()
        return float(below @ self._low + (above * self._high)[self._bounded].sum())

    def step(self) -> None:
        """One step: predict without centring, see how far that leads, correct."""
        p = self.problem
        below, above = self._room()
        self._newton.factor(p.pull + self._low / below + np.where(self._bounded, self._high / above, 0.0))
        self._response = None if p.sum_of is None else self._newton.solve(p.sum_of)
        zero = np.zeros_like(self.u)
        move = self._direction(zero, zero)
        length = self._longest(move, 1.0)
        count = len(self.u) + int(self._bounded.sum())
        du, dlow, dhigh, _ = move
        after = (below + length * du) @ (self._low + length * dlow)
        after += ((above - length * du) * (self._high + length * dhigh))[self._bounded].sum()
        center = (after / self._gap()) ** 3 * self._gap() / count
        move = self._direction(center - du * dlow, center + du * dhigh)
        length = self._longest(move, _TO_BOUNDARY)
        du, dlow, dhigh, dmultiplier = move
        self.u = self.u + length * du
        self._low, self._high = self._low + length * dlow, self._high + length * dhigh
        self.multiplier += length * dmultiplier

    def _direction(
        self, low_goal: Float[np.ndarray, "households"], high_goal: Float[np.ndarray, "households"]
    ) -> tuple[
        Float[np.ndarray, "households"],
        Float[np.ndarray, "households"],
        Float[np.ndarray, "households"],
        float,
    ]:
        """Newton's direction towards distances times multipliers equal to these numbers."""
        p = self.problem
        below, above = self._room()
        held = 0.0 if p.sum_of is None else self.multiplier * p.sum_of
        right = -p.slope(self.u) - held + low_goal / below - np.where(self._bounded, high_goal / above, 0.0)
        du, dmultiplier = self._newton.solve(right), 0.0
        if p.sum_of is not None:
            assert self._response is not None
            missing = p.total - float(p.sum_of @ self.u)
            dmultiplier = float(p.sum_of @ du - missing) / float(p.sum_of @ self._response)
            du = du - dmultiplier * self._response
        dlow = (low_goal - self._low * du) / below - self._low
        dhigh = np.where(self._bounded, (high_goal + self._high * du) / above - self._high, 0.0)
        return du, dlow, dhigh, dmultiplier

    def _longest(self, move: tuple[np.ndarray, np.ndarray, np.ndarray, float], share: float) -> float:
        """Length, at most 1, that keeps distances and multipliers positive."""
        below, above = self._room()
        du, dlow, dhigh, _ = move
        pairs = [(below, du), (self._low, dlow), (above[self._bounded], -du[self._bounded])]
        pairs.append((self._high[self._bounded], dhigh[self._bounded]))
        longest = 1.0 / share
        for value, change in pairs:
            shrinks = change < 0
            if shrinks.any():
                longest = min(longest, float((value[shrinks] / -change[shrinks]).min()))
        return share * longest
