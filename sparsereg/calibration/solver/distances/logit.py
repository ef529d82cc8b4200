"""The logit distance: weights stay between two bounds, on a smooth curve."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sparsereg.calibration.solver.distances import LARGEST_EXPONENT
from sparsereg.shapes import Float


@dataclass(frozen=True, eq=False)
class Logit:
    """Ratios on a logistic curve that never reaches its bounds; it needs 0 <= low < 1 < high, both finite.

    Args:
        low: Infima of the ratios, shape (households,).
        high: Suprema of the ratios.
    """

    low: Float[np.ndarray, "households"]
    high: Float[np.ndarray, "households"]

    def __post_init__(self) -> None:
        if not (np.isfinite(self.high).all() and (self.low < 1).all() and (self.high > 1).all()):
            raise ValueError(
                "distance='logit' needs finite bounds with low < 1 < high for every household:"
                f" bounds run from {self.low.min():g} to {self.high.max():g}"
            )

    @property
    def _steepness(self) -> Float[np.ndarray, "households"]:
        steepness: np.ndarray = (self.high - self.low) / ((1.0 - self.low) * (self.high - 1.0))
        return steepness

    def respond(
        self, u: Float[np.ndarray, "households"]
    ) -> tuple[Float[np.ndarray, "households"], Float[np.ndarray, "households"]]:
        """See ``Distance``."""
        a, width = self._steepness, self.high - self.low
        odds = (1.0 - self.low) / (self.high - 1.0)
        growth = odds * np.exp(np.clip(a * u, -LARGEST_EXPONENT, LARGEST_EXPONENT))
        share = growth / (1.0 + growth)
        return self.low + width * share, a * width * share / (1.0 + growth)

    def invert(self, ratio: Float[np.ndarray, "households"]) -> Float[np.ndarray, "households"]:
        """See ``Distance``."""
        odds = (ratio - self.low) / (self.high - ratio) * (self.high - 1.0) / (1.0 - self.low)
        return np.asarray(np.log(odds) / self._steepness)

    def value(self, ratio: Float[np.ndarray, "households"]) -> Float[np.ndarray, "households"]:
        """See ``Distance``."""
        tiny = np.finfo(np.float64).tiny
        below, above = np.maximum(ratio - self.low, tiny), np.maximum(self.high - ratio, tiny)
        value = below * np.log(below / (1.0 - self.low)) + above * np.log(above / (self.high - 1.0))
        return np.asarray(value / self._steepness)


DISTANCE = Logit
