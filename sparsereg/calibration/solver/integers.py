"""``weights="integer"``: whole weights whose totals are those of the real ones, as far as whole numbers can.

Systematic rounding first: households that are alike stand beside each other, and each one is rounded so that
their running sum is off by less than one. Then swaps: one household goes up, another one down, if that brings
totals nearer to those of the real weights. Every weight stays next to the real one, within its bounds.

Source: systematic rounding is the controlled rounding of Cox (JASA 82, 1987) along one margin.
"""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp

from sparsereg.calibration.problem import CalibrationProblem
from sparsereg.errors import InputError

_WHOLE = 1e-9
"""A weight this near to a whole number is that number."""
_MOST_ROUNDS = 60
_MOST_SWAPS = 4000
"""Most pairs that are tried in a round."""
_STALLED = 6
"""Rounds without a gain of a thousandth after which the swaps end."""


def whole_weights(
    problem: CalibrationProblem,
    weights: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
    seed: int = 0,
) -> np.ndarray:
    """Round weights so that the totals of the targets are kept as well as possible.

    Args:
        problem: Its targets' totals are kept, each judged by its scale, and the sum of the weights.
        weights: Real weights, shape (households,); those of 0 stay 0.
        low: Smallest weights allowed, shape (households,).
        high: Largest weights allowed.
        seed: Of the order in which pairs are tried.

    Returns:
        Whole numbers as float64, shape (households,), less than one from the weights.

    Raises:
        InputError: no whole number lies within the bounds of a household.
    """
    check_whole(problem, low, high, weights != 0)
    down, up = _choices(weights, low, high)
    free = np.flatnonzero(up > down)
    rounded = down.copy()
    rows = _rows(problem)
    columns = sp.csr_array(rows.T.tocsr())
    order = free[_likeness(columns[free])]
    fixed = float((down - weights)[np.setdiff1d(np.flatnonzero(weights != 0), free)].sum())
    rounded[order] += _systematic((weights - down)[order], fixed)
    swaps = _Swaps(columns, weights, rounded, down, free, seed)
    swaps.run()
    return swaps.rounded


def check_whole(problem: CalibrationProblem, low: np.ndarray, high: np.ndarray, there: np.ndarray) -> None:
    """Check that whole numbers lie within the bounds.

    Args:
        problem: Whose households they are.
        low: Smallest weights allowed, shape (households,).
        high: Largest weights allowed.
        there: A mask of the households that have a weight.

    Raises:
        InputError: there is none for some; the message names the first.
    """
    none = np.flatnonzero(there & (np.floor(high * (1 + _WHOLE)) < np.ceil(low * (1 - _WHOLE))))
    if len(none):
        j = int(none[0])
        raise InputError(
            f"weights=integer: no whole number lies within the bounds of {len(none):,} households: those of"
            f" {problem.household_ids[j]} are {low[j]:.6g} and {high[j]:.6g}; widen the bounds, or keep real"
            " weights"
        )


def _choices(weights: np.ndarray, low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The whole numbers next to each weight that its bounds allow: smaller and larger, perhaps the same."""
    near = np.round(weights)
    exact = np.abs(weights - near) <= _WHOLE * np.maximum(np.abs(weights), 1.0)
    down = np.where(exact, near, np.floor(weights))
    up = np.where(exact, near, np.ceil(weights))
    slack = 1 + _WHOLE
    down_fits = (down * slack >= low) | (down >= low)
    up_fits = (up <= high * slack) | (up <= high)
    return np.where(down_fits, down, up), np.where(up_fits, up, down)


def _rows(problem: CalibrationProblem) -> sp.csr_array:
    """What each household adds to each target over its scale, and to the sum of the weights over itself."""
    linear = problem.linear
    rows = sp.diags_array(np.sqrt(problem.target_shares) / linear.scale) @ linear.matrix.astype(np.float64)
    everybody = sp.csr_array(np.full((1, problem.num_households), 1.0 / problem.starting_weights.sum()))
    return sp.csr_array(sp.vstack([rows, everybody]))


def _likeness(columns: sp.csr_array) -> np.ndarray:
    """An order in which households that count in the same targets stand beside each other, by size."""
    pattern = sp.csr_array((np.ones(columns.nnz), columns.indices, columns.indptr), shape=columns.shape)
    marks = np.random.default_rng(0).random(columns.shape[1])
    return np.asarray(np.lexsort((columns @ np.ones(columns.shape[1]), pattern @ marks)))


def _systematic(shares: np.ndarray, carried: float) -> np.ndarray:
    """0 or 1 for each share, so that sums of neighbours are those of the shares, to less than one.

    Args:
        shares: In (0, 1).
        carried: What was rounded elsewhere, to be made up for.
    """
    total = float(shares.sum())
    wanted = np.clip(np.round(total - carried), 0, len(shares))
    sums = np.cumsum(shares) * (wanted / total if total > 0 else 0.0)
    steps = np.floor(sums + 0.5)
    if len(steps):
        steps[-1] = wanted
    return np.minimum(np.diff(steps, prepend=0.0), 1.0)


class _Swaps:
    """Exchanges of a household that was rounded up and one that was rounded down."""

    def __init__(
        self,
        columns: sp.csr_array,
        weights: np.ndarray,
        rounded: np.ndarray,
        down: np.ndarray,
        free: np.ndarray,
        seed: int,
    ) -> None:
        self.columns, self.rounded, self.free, self._down = columns, rounded, free, down
        self.missed = columns.T @ (rounded - weights)
        self.sizes = np.asarray(columns.multiply(columns).sum(axis=1)).ravel()
        self.generator = np.random.default_rng(seed)

    def run(self) -> None:
        """Swap until that gains little."""
        stalled, value = 0, float(self.missed @ self.missed)
        for number in range(_MOST_ROUNDS):
            if stalled == _STALLED or value == 0 or not self._round(number):
                break
            now = float(self.missed @ self.missed)
            stalled = stalled + 1 if now > 0.999 * value else 0
            value = now

    def _round(self, number: int) -> bool:
        """Try pairs, those first that promise most; return whether there are any."""
        above = self.rounded[self.free] > self._down[self.free]
        highs, lows = self.free[above], self.free[~above]
        count = min(len(highs), len(lows))
        if count == 0:
            return False
        slope = self.columns @ self.missed
        if number % 2 == 0:  # those that pull most
            highs = highs[np.argsort(-slope[highs], kind="stable")][:count]
            lows = lows[np.argsort(slope[lows], kind="stable")][:count]
        else:  # like and like, for small differences
            highs, lows = (self._shuffled(side)[:count] for side in (highs, lows))
        pairs = self.columns[lows].multiply(self.columns[highs]).sum(axis=1)
        gains = (
            2 * (slope[lows] - slope[highs])
            + self.sizes[lows]
            + self.sizes[highs]
            - 2 * np.asarray(pairs).ravel()
        )
        best = np.argsort(gains, kind="stable")[:_MOST_SWAPS]
        for i in best[gains[best] < 0]:
            self._swap(int(lows[i]), int(highs[i]))
        return True

    def _shuffled(self, households: np.ndarray) -> np.ndarray:
        """In the order of what pulls, with noise: neighbours differ by a little."""
        slope = self.columns[households] @ self.missed
        noise = self.generator.normal(scale=float(slope.std()) + 1e-300, size=len(slope))
        return np.asarray(households[np.argsort(slope + noise, kind="stable")])

    def _swap(self, low: int, high: int) -> None:
        """Raise one and lower the other if the totals come nearer, all earlier swaps considered."""
        change: dict[int, float] = {}
        for household, sign in ((low, 1.0), (high, -1.0)):
            entries = slice(self.columns.indptr[household], self.columns.indptr[household + 1])
            for target, value in zip(
                self.columns.indices[entries].tolist(), self.columns.data[entries].tolist(), strict=True
            ):
                change[target] = change.get(target, 0.0) + sign * value
        at, by = np.fromiter(change, dtype=np.int64), np.fromiter(change.values(), dtype=np.float64)
        if float(by @ (2 * self.missed[at] + by)) < 0:
            self.missed[at] += by
            self.rounded[low] += 1
            self.rounded[high] -= 1
