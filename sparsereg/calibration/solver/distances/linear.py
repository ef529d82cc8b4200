"""The linear distance: the generalised regression estimator."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sparsereg.shapes import Float


@dataclass(frozen=True, eq=False)
class Linear:
    """G(g) = (g - 1)^2 / 2: the generalised regression estimator.

    Args:
        low: Smallest ratios, shape (households,).
        high: Largest ratios.
    """

    low: Float[np.ndarray, "households"]
    high: Float[np.ndarray, "households"]

    def respond(
        self, u: Float[np.ndarray, "households"]
    ) -> tuple[Float[np.ndarray, "households"], Float[np.ndarray, "households"]]:
        """See ``Distance``."""
        ratio = 1.0 + u
        inside = (ratio > self.low) & (ratio < self.high)
        return np.clip(ratio, self.low, self.high), inside.astype(np.float64)

    def invert(self, ratio: Float[np.ndarray, "households"]) -> Float[np.ndarray, "households"]:
        """See ``Distance``."""
        return np.asarray(ratio - 1.0)

    def value(self, ratio: Float[np.ndarray, "households"]) -> Float[np.ndarray, "households"]:
        """See ``Distance``."""
        return 0.5 * np.square(ratio - 1.0)


DISTANCE = Linear
