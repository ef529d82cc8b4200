"""The linear distance: the generalised regression estimator."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


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


DISTANCE = Linear
