"""Bounds of weights, of method="calibrate": on the weight itself, and on weight over initial weight."""

from __future__ import annotations

from typing import Any

import numpy as np

Bound = float | np.ndarray | None
Bounds = tuple[Bound, Bound]


def ratio_bounds(
    initial: np.ndarray, distance: str, bounds: Bounds | None, weight_bounds: Bounds | None
) -> tuple[np.ndarray, np.ndarray]:
    """Bounds of weight over initial weight, shape (households,) each.

    Raises:
        ValueError: they cross, exclude 1, or do not suit the distance.
    """
    low: np.ndarray = np.zeros(())
    high: np.ndarray = np.full((), np.inf)
    if bounds is not None:
        low, high = _pair("bounds", bounds, len(initial))
        wrong = np.flatnonzero(~((low <= 1) & (high >= 1)))
        if len(wrong):
            raise ValueError(
                "bounds are of weight over initial weight and must lie on either side of 1:"
                f" got {_told(wrong[0], low, high)}"
            )
    if weight_bounds is not None:
        least, most = _pair("weight_bounds", weight_bounds, len(initial))
        with np.errstate(divide="ignore", invalid="ignore"):
            per = np.where(initial > 0, 1.0 / initial, 0.0)
            low, high = (
                np.maximum(low, least * per),
                np.minimum(high, np.where(initial > 0, most * per, high)),
            )
        wrong = np.flatnonzero(low > high)
        if len(wrong):
            raise ValueError(
                f"bounds and weight_bounds exclude each other for household {wrong[0]}, whose initial"
                f" weight is {initial[wrong[0]]:g}"
            )
    if distance != "linear" and (low < 0).any():
        raise ValueError(f"distance={distance!r} needs bounds >= 0, got {low.min():g}")
    low, high = (side if side.ndim else np.full(len(initial), side) for side in (low, high))
    return low, high


def _pair(name: str, bounds: Any, length: int) -> tuple[np.ndarray, np.ndarray]:
    if isinstance(bounds, str) or not hasattr(bounds, "__len__") or len(bounds) != 2:
        raise ValueError(f"{name} must be [low, high], got {bounds!r}")
    sides = []
    for side, open_end in zip(bounds, (0.0, np.inf), strict=True):
        try:
            values = np.asarray(open_end if side is None else side, dtype=np.float64)
            sides.append(np.broadcast_to(values, (length,)) if values.ndim else values)
        except (TypeError, ValueError):
            raise ValueError(
                f"{name} must be two numbers, or two arrays of one number per household, got {side!r}"
            ) from None
    low, high = sides
    if np.isnan(low).any() or np.isnan(high).any():
        raise ValueError(f"{name} must be numbers, got NaN")
    crossed = np.flatnonzero(low >= high)
    if len(crossed):
        raise ValueError(f"{name} must have low < high, got {_told(crossed[0], low, high)}")
    return low, high


def _told(household: int, low: np.ndarray, high: np.ndarray) -> str:
    one, other = (side[household] if side.ndim else side for side in (low, high))
    return f"[{one:g}, {other:g}]" + (f" for household {household}" if low.ndim or high.ndim else "")


def bounded_weights(initial: np.ndarray, ratios: tuple[np.ndarray, np.ndarray]) -> list[np.ndarray]:
    """Smallest and largest weights from bounds on the ratio; a weight of zero stays that, bounded or not."""
    with np.errstate(invalid="ignore", over="ignore"):
        return [np.where(initial == 0, 0.0, ratio * initial) for ratio in ratios]


def at_bounds(values: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Which values are at one of their bounds, but for rounding."""
    return np.asarray((values <= low * (1 + 1e-12)) | (values >= high * (1 - 1e-12)))
