"""Pictures of a page, as SVG within it."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
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


def drawn(draw: Draw) -> str:
    """Return a picture as the address of an image that holds itself.

    Args:
        draw: puts something on axes.
    """
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
