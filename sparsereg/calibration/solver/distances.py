"""Distances of calibration: how a weight answers to the multipliers of the targets, within its bounds.

Calibrated weights are w_j = d_j F(q_j a_j' lambda): d the initial weights, a_j what household j adds to the
targets, F the inverse of the distance's derivative, clipped to the bounds of the ratio w_j / d_j.

Source: Deville and Sarndal, Calibration estimators in survey sampling, JASA 87 (1992).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from sparsereg.settings import one_of

_LARGEST_EXPONENT = 300.0
"""Ratios beyond exp of this are no weights; kept finite so that a step too long can be shortened."""


class Distance(Protocol):
    """A convex distance G of the ratio g = w / d from 1, with G(1) = G'(1) = 0."""

    @property
    def low(self) -> np.ndarray:
        """Smallest ratios, shape (households,)."""

    @property
    def high(self) -> np.ndarray:
        """Largest ratios, shape (households,)."""

    def respond(self, u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """F(u) within the bounds, and its slope, 0 where a bound holds."""

    def invert(self, ratio: np.ndarray) -> np.ndarray:
        """The u with F(u) = ratio, for ratios strictly within the bounds."""

    def value(self, ratio: np.ndarray) -> np.ndarray:
        """G of each ratio."""


@dataclass(frozen=True, eq=False)
class Linear:
    """G(g) = (g - 1)^2 / 2: the generalised regression estimator.

    Args:
        low: Smallest ratios, shape (households,).
        high: Largest ratios.
    """

    low: np.ndarray
    high: np.ndarray

    def respond(self, u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See ``Distance``."""
        ratio = 1.0 + u
        inside = (ratio > self.low) & (ratio < self.high)
        return np.clip(ratio, self.low, self.high), inside.astype(np.float64)

    def invert(self, ratio: np.ndarray) -> np.ndarray:
        """See ``Distance``."""
        return np.asarray(ratio - 1.0)

    def value(self, ratio: np.ndarray) -> np.ndarray:
        """See ``Distance``."""
        return 0.5 * np.square(ratio - 1.0)


@dataclass(frozen=True, eq=False)
class Raking:
    """G(g) = g log g - g + 1: weights are products of factors, as iterative proportional fitting finds them.

    Args:
        low: Smallest ratios, >= 0, shape (households,).
        high: Largest ratios.
    """

    low: np.ndarray
    high: np.ndarray

    def respond(self, u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See ``Distance``."""
        ratio = np.exp(np.clip(u, -_LARGEST_EXPONENT, _LARGEST_EXPONENT))
        inside = (ratio > self.low) & (ratio < self.high)
        return np.clip(ratio, self.low, self.high), np.where(inside, ratio, 0.0)

    def invert(self, ratio: np.ndarray) -> np.ndarray:
        """See ``Distance``."""
        return np.asarray(np.log(ratio))

    def value(self, ratio: np.ndarray) -> np.ndarray:
        """See ``Distance``."""
        positive = np.maximum(ratio, np.finfo(np.float64).tiny)
        value: np.ndarray = ratio * np.log(positive) - ratio + 1.0
        return value


@dataclass(frozen=True, eq=False)
class Logit:
    """Ratios on a logistic curve that never reaches its bounds; it needs 0 <= low < 1 < high, both finite.

    Args:
        low: Infima of the ratios, shape (households,).
        high: Suprema of the ratios.
    """

    low: np.ndarray
    high: np.ndarray

    @property
    def _steepness(self) -> np.ndarray:
        steepness: np.ndarray = (self.high - self.low) / ((1.0 - self.low) * (self.high - 1.0))
        return steepness

    def respond(self, u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See ``Distance``."""
        a, width = self._steepness, self.high - self.low
        odds = (1.0 - self.low) / (self.high - 1.0)
        growth = odds * np.exp(np.clip(a * u, -_LARGEST_EXPONENT, _LARGEST_EXPONENT))
        share = growth / (1.0 + growth)
        return self.low + width * share, a * width * share / (1.0 + growth)

    def invert(self, ratio: np.ndarray) -> np.ndarray:
        """See ``Distance``."""
        odds = (ratio - self.low) / (self.high - ratio) * (self.high - 1.0) / (1.0 - self.low)
        return np.asarray(np.log(odds) / self._steepness)

    def value(self, ratio: np.ndarray) -> np.ndarray:
        """See ``Distance``."""
        tiny = np.finfo(np.float64).tiny
        below, above = np.maximum(ratio - self.low, tiny), np.maximum(self.high - ratio, tiny)
        value = below * np.log(below / (1.0 - self.low)) + above * np.log(above / (self.high - 1.0))
        return np.asarray(value / self._steepness)


DISTANCES: dict[str, type[Linear] | type[Raking] | type[Logit]] = {
    "linear": Linear,
    "raking": Raking,
    "logit": Logit,
}


def distance_of(name: str, low: np.ndarray, high: np.ndarray) -> Distance:
    """Return a distance by its name, with bounds of the ratio per household.

    Args:
        name: A key of ``DISTANCES``.
        low: Smallest ratios.
        high: Largest ratios, > low.

    Raises:
        ValueError: the name is unknown, or the bounds do not suit the distance.
    """
    one_of(name, "distance", list(DISTANCES))
    if name == "logit" and not (np.isfinite(high).all() and (low < 1).all() and (high > 1).all()):
        raise ValueError(
            "distance='logit' needs finite bounds with low < 1 < high for every household:"
            f" bounds run from {low.min():g} to {high.max():g}"
        )
    return DISTANCES[name](low, high)
