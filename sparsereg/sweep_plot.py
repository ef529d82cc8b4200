"""The picture of a sweep: what each setting reached, seeds as mean and range."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sparsereg.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Row = dict[str, Any]

PERCENT = {
    "test_acc": "test accuracy (%)",
    "val_acc": "validation accuracy (%)",
    "test_mean_iou": "test mean intersection over union (%)",
    "val_mean_iou": "validation mean intersection over union (%)",
    "exact_sparsity": "parameters removed (%)",
    "expected_sparsity": "gates expected shut (%)",
    "mean_are": "mean absolute relative error (%)",
    "held_out_mean": "mean absolute relative error, targets left out (%)",
}
"""Shares of results.json, shown in per cent."""
PLAIN = {
    "kept": "households kept",
    "ess": "effective sample size (households)",
    "test_bits_per_byte": "test bits per byte",
    "val_bits_per_byte": "validation bits per byte",
}
SHORT = {"mean_are": "calibrated targets", "held_out_mean": "targets left out"}
"""What tells lines of one panel apart."""
SAME = {"kept": "num_households"}
"""Results that are what was asked for: no number need stand at the points."""
_FLAT = 0.02
"""An axis spans at least this share of its values: rounding is no result."""
_LOG = 5.0
"""Of values that differ by this factor the axis is logarithmic."""


@dataclass(frozen=True)
class Point:
    """What the jobs of one setting reached, which differ by their seed only.

    Attributes:
        setting: the swept keys and their values.
        rows: their results.
    """

    setting: dict[str, str]
    rows: list[Row]

    def mean(self, key: str) -> float:
        """Return the mean over the seeds, in the unit of the axis; NaN without a value."""
        values = self._values(key)
        return sum(values) / len(values) if values else math.nan

    def reach(self, key: str) -> tuple[float, float]:
        """Return how far below and above the mean the seeds reach."""
        values, mean = self._values(key), self.mean(key)
        return (mean - min(values), max(values) - mean) if values else (0.0, 0.0)

    def _values(self, key: str) -> list[float]:
        return [in_unit(key, row[key]) for row in self.rows if is_number(row.get(key))]


def draw(path: Path, rows: Sequence[Row], x: str, panels: Sequence[Sequence[str]]) -> bool:
    """Write the picture; return whether there was something to show.

    Where the jobs do not differ in ``x``, what was swept takes its place on the horizontal axis.

    Args:
        path: where to.
        rows: one per job: ``overrides`` (text) and results.
        x: the horizontal axis.
        panels: the keys that each panel shows on its vertical axis; a panel without values is left out.
    """
    rows = [row for row in rows if any(is_number(row.get(key)) for key in panels[0])]
    if not rows:
        return False
    points, along = grouped(rows)
    shown = [[k for k in keys if any(is_number(row.get(k)) for row in rows)] for keys in panels]
    shown = [keys for keys in shown if keys]
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4 * len(shown), 4.4), layout="constrained")
    for axes, keys in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        _panel(axes, points, along, x, keys)
    write_atomically(path, lambda p: figure.savefig(p, dpi=130))
    return True


def grouped(rows: Iterable[Row]) -> tuple[list[Point], str | None]:
    """Return a point for each setting, and the swept number along which points are joined."""
    settings = [_setting(row.get("overrides") or "") for row in rows]
    keys = dict.fromkeys(key for setting in settings for key in setting if key != "seed")
    values = {key: {setting.get(key, "") for setting in settings} for key in keys}
    swept = [key for key in keys if len(values[key]) > 1]
    points: dict[tuple[str, ...], Point] = {}
    for row, setting in zip(rows, settings, strict=True):
        own = {key: setting.get(key, "") for key in swept}
        points.setdefault(tuple(own.values()), Point(own, [])).rows.append(row)
    numbers = [key for key in swept if all(_number(value) is not None for value in values[key])]
    along = max(numbers, key=lambda key: len(values[key]), default=None)
    return list(points.values()), along


def _setting(overrides: str) -> dict[str, str]:
    pairs = (text.lstrip("+").partition("=") for text in overrides.split() if "=" in text)
    return {key: value for key, _, value in pairs}


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def is_number(value: Any) -> bool:
    """Whether a result can stand on an axis."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def in_unit(key: str, value: float) -> float:
    """Return a result in the unit of its axis."""
    return 100 * value if key in PERCENT else float(value)


def title_of(key: str) -> str:
    """Return what stands at an axis: the words for a key, with the unit."""
    return PERCENT.get(key) or PLAIN.get(key) or key


def _panel(axes: "Axes", points: list[Point], along: str | None, x: str, keys: Sequence[str]) -> None:
    differ = len({round(p.mean(x), 9) for p in points if not math.isnan(p.mean(x))}) > 1
    if not differ and along is not None:
        x = along
    series: dict[str, list[Point]] = {}
    for point in points:
        others = [f"{k}={_short(v)}" for k, v in point.setting.items() if k != along]
        series.setdefault(", ".join(others) if along is not None else "", []).append(point)
    for i, (name, some) in enumerate(series.items()):
        for j, key in enumerate(keys):
            label = ", ".join(t for t in (name, SHORT.get(key, key) if len(keys) > 1 else "") if t)
            _series(axes, some, along, x, key, f"C{(i * len(keys) + j) % 10}", label)
    if along is not None and along not in (x, SAME.get(x)):
        axes.set_title(f"numbers at the points: {along}", fontsize=9)
    most = max(len(point.rows) for point in points)
    if most > 1:
        axes.set_title(f"{axes.get_title()}; mean and range of {most} runs".lstrip("; "), fontsize=9)
    axes.set_xlabel(title_of(x))
    axes.set_ylabel(title_of(keys[0]))
    if len(series) > 1 or len(keys) > 1:
        axes.legend(frameon=False, fontsize=8)
    axes.margins(0.12)
    for axis in ("x", "y"):
        _scale(axes, axis)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _series(
    axes: "Axes", points: list[Point], along: str | None, x: str, key: str, colour: str, label: str
) -> None:
    def at(point: Point) -> float:
        return float(point.setting[x]) if x in point.setting else point.mean(x)

    points = sorted((p for p in points if not math.isnan(p.mean(key))), key=at)
    if not points:
        return
    horizontal = [(0.0, 0.0) if x in p.setting else p.reach(x) for p in points]
    several = any(len(p.rows) > 1 for p in points)
    axes.errorbar(
        [at(p) for p in points],
        [p.mean(key) for p in points],
        yerr=list(zip(*(p.reach(key) for p in points), strict=True)) if several else None,
        xerr=list(zip(*horizontal, strict=True)) if several else None,
        fmt="o-" if along is not None else "o",
        color=colour,
        capsize=3,
        lw=1.5,
        elinewidth=1,
        ms=5,
        label=label or None,
    )
    for point in points:
        text = ", ".join(_short(v) for v in point.setting.values()) if along is None else point.setting[along]
        if text and (along is None or along not in (x, SAME.get(x))):
            place = (at(point), point.mean(key))
            axes.annotate(text, place, textcoords="offset points", xytext=(5, 5), fontsize=8, color=colour)


def _short(value: str) -> str:
    """Shorten a path to what tells it apart: the folder of the run, or its name."""
    if "/" not in value:
        return value
    parts = [part for part in Path(value).parts if part not in ("checkpoints", "last.ckpt", "best.ckpt")]
    return parts[-1] if parts else value


def _places(axes: "Axes", axis: str) -> list[float]:
    """Return where the points of a panel stand on an axis."""
    return [float(place["xy".index(axis)]) for line in axes.lines for place in np.asarray(line.get_xydata())]


def _scale(axes: "Axes", axis: str) -> None:
    """Logarithmic where values differ by factors; never so narrow that rounding looks like a result."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, ScalarFormatter

    low, high = getattr(axes.dataLim, f"interval{axis}")
    on = axes.xaxis if axis == "x" else axes.yaxis
    set_limits = axes.set_xlim if axis == "x" else axes.set_ylim
    if low > 0 and high / low >= _LOG:
        (axes.set_xscale if axis == "x" else axes.set_yscale)("log")
        if high / low < 1e3:
            on.set_major_locator(LogLocator(subs=(1, 2, 5)))
        on.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
        on.set_minor_formatter(NullFormatter())
        return
    positive = sorted({value for value in _places(axes, axis) if value > 0})
    if low == 0 and positive and positive[-1] / positive[0] >= _LOG**2:
        (axes.set_xscale if axis == "x" else axes.set_yscale)("symlog", linthresh=positive[0])
        return
    middle, least = (low + high) / 2, _FLAT * max(abs(low), abs(high), 1e-12)
    if high - low < least:
        set_limits(middle - least, middle + least)
    if isinstance(on.get_major_formatter(), ScalarFormatter):
        on.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
