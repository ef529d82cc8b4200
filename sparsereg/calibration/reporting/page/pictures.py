"""The pictures of the page, as SVG within the page: errors, weights before and after, ratios."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

Draw: TypeAlias = "Callable[[Axes], None]"
BEFORE, AFTER, INK = "#b9bec6", "#1f5fa8", "#39424e"
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "report",
    "font.family": "sans-serif",
    "font.sans-serif": ["Helvetica", "Arial", "DejaVu Sans"],
    "font.size": 9,
    "text.parse_math": False,
    "axes.edgecolor": "#8a93a0",
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}
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

    return _drawn(draw)


def sizes(weights: pd.DataFrame) -> str:
    """Return the picture of the weights of the kept households, before and after.

    Args:
        weights: As ``tables.weight_frame`` returns it.
    """
    pairs = ((weights.initial_weight, BEFORE, "before"), (weights.weight, AFTER, "after"))
    return _drawn(lambda axes: _histogram(axes, pairs, "weight"))


def ratios(weights: pd.DataFrame) -> str:
    """Return the picture of weights over initial weights.

    Args:
        weights: As ``tables.weight_frame`` returns it.
    """
    ratio = weights.weight / weights.initial_weight.where(weights.initial_weight > 0)

    def draw(axes: Axes) -> None:
        _histogram(axes, ((ratio, AFTER, "after over before"),), "weight over initial weight")
        axes.axvline(1, color=INK, lw=0.8, ls=":")

    return _drawn(draw)


def _histogram(axes: Axes, parts: tuple[tuple[pd.Series, str, str], ...], label: str) -> None:
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
    axes.set(xscale="log" if logarithmic else "linear", xlabel=label, ylabel="kept households")
    if len(known) > 1:
        axes.legend(frameon=False, loc="upper right")


def _label_plainly(axes: Axes) -> None:
    """Write the numbers of a logarithmic axis as people do, not as powers of ten, and not too many."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axes.get_xlim()
    if axes.get_xscale() == "log":
        decades = math.log10(high / low)
        subs = (1.0, 2.0, 5.0) if decades < 2 else (1.0, 3.0) if decades < 3 else (1.0,)
        axes.xaxis.set_major_locator(LogLocator(subs=subs, numticks=9))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))


def _drawn(draw: Draw) -> str:
    """Return a picture as the address of an image that holds itself."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(5.2, 3.1), layout="constrained")
        axes = figure.subplots()
        draw(axes)
        _label_plainly(axes)
        axes.grid(alpha=0.2)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        file = io.BytesIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(file.getvalue()).decode()
