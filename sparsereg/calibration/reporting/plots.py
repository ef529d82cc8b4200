"""Pictures of a calibration: errors, totals, weights, the course of the run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from sparsereg.calibration.reporting.tables import group_frame
from sparsereg.files import write_atomically

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

Draw: TypeAlias = "Callable[[Axes], None]"
BEFORE, AFTER = "#9a9a9a", "#1f5fa8"
_GROUPS_NAMED = 9
_GROUPS_SHOWN = 24


def plot_all(
    folder: Path, targets: pd.DataFrame, weights: pd.DataFrame, history: Sequence[dict[str, float]]
) -> list[Path]:
    """Write every picture that the data allow as PNG and return their paths.

    Args:
        folder: Where to write.
        targets: As ``report.target_frame`` returns it.
        weights: As ``weight_frame`` returns it.
        history: As ``write_history_plot`` takes it; without rows there is no picture of the course.
    """
    pictures: dict[str, tuple[Draw, Draw]] = {
        "errors.png": (partial(_within, targets), partial(_signed, targets)),
        "targets.png": (partial(_scatter, targets), partial(_groups, targets)),
        "weights.png": (partial(_weight_pairs, weights), partial(_weight_sizes, weights)),
    }
    if len(history) > 1:
        pictures["progress.png"] = (partial(_errors_over, history), partial(_kept, history))
    for name, (left, right) in pictures.items():
        _save(folder / name, left, right)
    return [folder / name for name in pictures]


def _save(path: Path, left: Draw, right: Draw) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.4), layout="constrained")
    for axes, draw in zip(figure.subplots(1, 2), (left, right), strict=True):
        draw(axes)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    write_atomically(path, lambda p: figure.savefig(p, dpi=120))


def _before_after(targets: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Return the relative errors, in per cent, at the initial and at the final weights."""
    some = targets[targets.target != 0]
    before = (some.initial - some.target) / some.target.abs()
    return 100 * before.to_numpy(), 100 * some.relative_error.to_numpy()


def _within(targets: pd.DataFrame, axes: Axes) -> None:
    for errors, colour, label in zip(
        _before_after(targets), (BEFORE, AFTER), ("initial", "calibrated"), strict=True
    ):
        size = np.sort(np.maximum(np.abs(errors), 1e-6))
        axes.plot(
            size, 100 * np.arange(1, len(size) + 1) / max(len(size), 1), color=colour, label=label, lw=2
        )
    for mark in (1, 10):
        axes.axvline(mark, color="black", lw=0.8, ls=":")
    axes.set(xscale="log", xlabel="absolute relative error (%)", ylabel="targets (%)", ylim=(0, 101))
    axes.set_title("How many targets are within an error")
    axes.legend(frameon=False)


def _signed(targets: pd.DataFrame, axes: Axes) -> None:
    before, after = _before_after(targets)
    if len(before) == 0:
        return
    limit = float(np.clip(np.quantile(np.abs(before), 0.98), 0.1, 100))
    bins = np.linspace(-limit, limit, 61).tolist()
    for errors, colour, label in ((before, BEFORE, "initial"), (after, AFTER, "calibrated")):
        outside = float((np.abs(errors) > limit).mean())
        axes.hist(
            np.clip(errors, -limit, limit),
            bins,
            color=colour,
            alpha=0.7,
            label=f"{label}, {outside:.1%} beyond",
        )
    axes.set(xlabel="relative error (%), outermost bars: all beyond", ylabel="targets", yscale="log")
    axes.set_title("Distribution of the errors")
    axes.legend(frameon=False)


def _scatter(targets: pd.DataFrame, axes: Axes) -> None:
    from matplotlib import colormaps

    common = targets.group.value_counts().index[:_GROUPS_NAMED].tolist()
    colours = colormaps["tab10"].colors  # type: ignore[attr-defined]
    shown = targets.group.where(targets.group.isin(common), "other groups")
    for i, name in enumerate([*common, "other groups"]):
        some = targets[shown == name]
        if len(some):
            label = str(name) or "all targets"
            axes.plot(some.target, some.estimate, ".", ms=4, alpha=0.6, color=colours[i % 10], label=label)
    positive = bool((targets.target > 0).all() and (targets.estimate > 0).all())
    values = targets[["target", "estimate"]].to_numpy()
    ends = [values.min(), values.max()]
    axes.plot(ends, ends, color="black", lw=0.8)
    if positive:
        axes.set(xscale="log", yscale="log")
    else:
        scale = max(float(np.median(np.abs(values))) * 1e-3, 1e-9)
        axes.set_xscale("symlog", linthresh=scale)
        axes.set_yscale("symlog", linthresh=scale)
    axes.set(xlabel="target", ylabel="estimate with the calibrated weights")
    axes.set_title("Target against estimate")
    axes.legend(frameon=False, fontsize=8, markerscale=2)


def _groups(targets: pd.DataFrame, axes: Axes) -> None:
    groups = group_frame(targets).sort_values("mean_are", ascending=False)
    left_out = max(len(groups) - _GROUPS_SHOWN, 0)
    groups = groups.head(_GROUPS_SHOWN).iloc[::-1]
    at = np.arange(len(groups))
    axes.barh(at + 0.2, 100 * groups.initial_mean_are, 0.4, color=BEFORE, label="initial")
    axes.barh(at - 0.2, 100 * groups.mean_are, 0.4, color=AFTER, label="calibrated")
    axes.set_yticks(
        at, [f"{g or 'all targets'} ({n})" for g, n in zip(groups.group, groups.targets, strict=True)]
    )
    axes.tick_params(axis="y", labelsize=7)
    axes.set_xlabel("mean absolute relative error (%)")
    axes.set_title("By group" + (f", without the {left_out} best" if left_out else ""))
    axes.legend(framealpha=0.9, edgecolor="none", loc="lower right")


def _weight_pairs(weights: pd.DataFrame, axes: Axes) -> None:
    some = weights[weights.initial_weight > 0]
    axes.plot(some.initial_weight, some.weight, ".", ms=3, alpha=0.4, color=AFTER)
    if len(some):
        ends = [some.initial_weight.min(), some.initial_weight.max()]
        factor = weights.weight.sum() / some.initial_weight.sum()
        axes.plot(ends, ends, color="black", lw=0.8, label="as before")
        label = f"times {factor:.3g}, the average of the kept"
        axes.plot(ends, [factor * e for e in ends], color="black", lw=0.8, ls="--", label=label)
        axes.legend(frameon=False)
    axes.set(xscale="log", yscale="log", xlabel="initial weight", ylabel="calibrated weight")
    _label_1_2_5(axes)
    axes.set_title(f"Weights of the {len(weights):,} kept households")


def _label_1_2_5(axes: Axes) -> None:
    """Label a logarithmic axis of few decades at 1, 2, 5 and 10; all the minor ticks would overlap."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axes.get_xlim()
    if high / low < 1e3:
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())


def _weight_sizes(weights: pd.DataFrame, axes: Axes) -> None:
    sizes = [weights.initial_weight[weights.initial_weight > 0].to_numpy(), weights.weight.to_numpy()]
    everything = np.concatenate(sizes)
    if len(everything) == 0:
        return
    bins = np.geomspace(everything.min() * 0.99, everything.max() * 1.01, 61).tolist()
    for size, colour, label in zip(sizes, (BEFORE, AFTER), ("initial", "calibrated"), strict=True):
        axes.hist(size, bins, color=colour, alpha=0.7, label=label)
    axes.set(xscale="log", xlabel="weight", ylabel="kept households")
    axes.set_title("Sizes of the weights")
    axes.legend(frameon=False)


def _errors_over(history: Sequence[dict[str, float]], axes: Axes) -> None:
    epochs = [row["epoch"] for row in history]
    for key, colour, label in (
        ("loss", "black", "loss"),
        ("mean_are", AFTER, "mean absolute relative error"),
    ):
        values = [row.get(key, np.nan) for row in history]
        if np.isfinite(values).any() and np.nanmax(values) > 0:
            axes.plot(epochs, values, color=colour, label=label)
    axes.set(yscale="log", xlabel="epoch")
    axes.set_title("Loss and error over the run")
    axes.legend(frameon=False)


def _kept(history: Sequence[dict[str, float]], axes: Axes) -> None:
    axes.plot([row["epoch"] for row in history], [row.get("kept", np.nan) for row in history], color=AFTER)
    axes.set(xlabel="epoch", ylabel="households", ylim=(0, None))
    axes.set_title("Kept households over the run")
