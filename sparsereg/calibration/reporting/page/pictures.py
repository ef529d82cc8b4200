"""The pictures of the page, as SVG within the page: errors, weights before and after, ratios."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from sparsereg.page.pictures import AFTER, BEFORE, INK, drawn

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

_MOST_POINTS = 400
_BINS = 48
_SMALLEST = 1e-6


def errors(targets: pd.DataFrame) -> str:
    """Return the picture of how many targets are within an error, before and after.

    Args:
        targets: As ``tables.target_frame`` returns it.
    """
    some = targets[targets.target != 0]
    before = (some.initial - some.target).abs() / some.target.abs()

    def draw(axes: Axes) -> None:
        for values, colour, label in (
            (before, BEFORE, "before"),
            (some.relative_error.abs(), AFTER, "after"),
        ):
            size = np.sort(np.maximum(100 * values.dropna().to_numpy(), 100 * _SMALLEST))
            if len(size):
                at = np.unique(np.linspace(0, len(size) - 1, _MOST_POINTS).astype(int))
                axes.plot(size[at], 100 * (at + 1) / len(size), color=colour, lw=2.2, label=label)
        for mark in (1, 10):
            axes.axvline(mark, color=INK, lw=0.7, ls=":")
        axes.set(
            xscale="log", ylim=(0, 103), xlabel="absolute relative error (%)", ylabel="targets within (%)"
        )
        axes.legend(frameon=False, loc="lower right")

    return drawn(draw)


def sizes(weights: pd.DataFrame, units: str) -> str:
    """Return the picture of the weights of the kept households, before and after.

    Args:
        weights: As ``weight_frame`` returns it.
        units: What households are called.
    """
    pairs = ((weights.initial_weight, BEFORE, "before"), (weights.weight, AFTER, "after"))
    return drawn(lambda axes: _histogram(axes, pairs, "weight", units))


def ratios(weights: pd.DataFrame, units: str) -> str:
    """Return the picture of weights over initial weights.

    Args:
        weights: As ``weight_frame`` returns it.
        units: What households are called.
    """
    ratio = weights.weight / weights.initial_weight.where(weights.initial_weight > 0)

    def draw(axes: Axes) -> None:
        _histogram(axes, ((ratio, AFTER, "after over before"),), "weight over initial weight", units)
        axes.axvline(1, color=INK, lw=0.8, ls=":")

    return drawn(draw)


def _histogram(axes: Axes, parts: tuple[tuple[pd.Series, str, str], ...], label: str, units: str) -> None:
    known = [(part.dropna().to_numpy(dtype=np.float64), colour, name) for part, colour, name in parts]
    everything = np.concatenate([values for values, _, _ in known])
    if len(everything) == 0:
        return
    low, high = float(everything.min()), float(everything.max())
    logarithmic = low > 0 and high > 20 * low
    if low == high:
        low, high = low - 0.5, high + 0.5
    bins = np.geomspace(low, high, _BINS + 1) if logarithmic else np.linspace(low, high, _BINS + 1)
    for values, colour, name in known:
        axes.hist(values, bins.tolist(), color=colour, alpha=0.75, label=name)
    axes.set(
        xscale="log" if logarithmic else "linear", xlabel=label, ylabel="kept " + units.replace("$", r"\$")
    )
    if len(known) > 1:
        axes.legend(frameon=False, loc="upper right")
