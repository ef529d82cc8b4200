"""The raking distance: weights are products of factors."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from sparsereg.calibration.solver.distances import LARGEST_EXPONENT
from sparsereg.shapes import Float


@dataclass(frozen=True, eq=False)
class Raking:
    """G(g) = g log g - g + 1: weights are products of factors, as iterative proportional fitting finds them.

    Args:
        low: Smallest ratios, >= 0, shape (households,).
        high: Largest ratios.
    """

    low: Float[np.ndarray, "households"]
    high: Float[np.ndarray, "households"]

    @cached_property
    def _is_open(self) -> bool:
        """Whether there is no bound that a ratio could hold at."""
        return not self.low.any() and bool(np.isinf(self.high).all())

    def respond(
        self, u: Float[np.ndarray, "households"]
    ) -> tuple[Float[np.ndarray, "households"], Float[np.ndarray, "households"]]:
        """See ``Distance``."""
        ratio = np.exp(np.clip(u, -LARGEST_EXPONENT, LARGEST_EXPONENT))
        if self._is_open:
            return ratio, ratio
        inside = (ratio > self.low) & (ratio < self.high)
        return np.clip(ratio, self.low, self.high), np.where(inside, ratio, 0.0)

    def invert(self, ratio: Float[np.ndarray, "households"]) -> Float[np.ndarray, "households"]:
        """See ``Distance``."""
        return np.asarray(np.log(ratio))

    def value(self, ratio: Float[np.ndarray, "households"]) -> Float[np.ndarray, "households"]:
        """See ``Distance``."""
        positive = np.maximum(ratio, np.finfo(np.float64).tiny)
        value: np.ndarray = ratio * np.log(positive) - ratio + 1.0
        return value


DISTANCE = Raking
