"""Distances of calibration: how a weight answers to the multipliers of the targets, within its bounds.

Calibrated weights are w_j = d_j F(q_j a_j' lambda): d the initial weights, a_j what household j adds to the
targets, F the inverse of the distance's derivative, clipped to the bounds of the ratio w_j / d_j.

Each distance is a file of its own here, which gives ``distance=`` its name and names its class ``DISTANCE``.
Nothing is imported until it is used: the command line is checked against the names alone.

Source: Deville and Sarndal, Calibration estimators in survey sampling, JASA 87 (1992).
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import TYPE_CHECKING, Protocol

from sparsereg.settings import one_of
from sparsereg.shapes import Float

if TYPE_CHECKING:
    import numpy as np

DISTANCES = tuple(module.name for module in pkgutil.iter_modules(__path__))
"""Their names."""
LARGEST_EXPONENT = 300.0
"""Ratios beyond exp of this are no weights; kept finite so that a step too long can be shortened."""


class Distance(Protocol):
    """A convex distance G of the ratio g = w / d from 1, with G(1) = G'(1) = 0."""

    @property
    def low(self) -> Float[np.ndarray, "households"]:
        """Smallest ratios, shape (households,)."""

    @property
    def high(self) -> Float[np.ndarray, "households"]:
        """Largest ratios, shape (households,)."""

    def respond(
        self, u: Float[np.ndarray, "households"]
    ) -> tuple[Float[np.ndarray, "households"], Float[np.ndarray, "households"]]:
        """F(u) within the bounds, and its slope, 0 where a bound holds."""

    def invert(self, ratio: Float[np.ndarray, "households"]) -> Float[np.ndarray, "households"]:
        """The u with F(u) = ratio, for ratios strictly within the bounds."""

    def value(self, ratio: Float[np.ndarray, "households"]) -> Float[np.ndarray, "households"]:
        """G of each ratio."""


def distance_of(
    name: str, low: Float[np.ndarray, "households"], high: Float[np.ndarray, "households"]
) -> Distance:
    """Return a distance by its name, with bounds of the ratio per household.

    Args:
        name: One of ``DISTANCES``.
        low: Smallest ratios.
        high: Largest ratios, > low.

    Raises:
        ValueError: the name is unknown, or the bounds do not suit the distance.
    """
    one_of(name, "distance", DISTANCES)
    distance: Distance = importlib.import_module(f"{__name__}.{name}").DISTANCE(low, high)
    return distance
