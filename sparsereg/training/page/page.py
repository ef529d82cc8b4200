"""Put the page of a training run or a test together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsereg.compression.timing.latency import in_words
from sparsereg.files import write_text
from sparsereg.page import page
from sparsereg.page.page import known, number, percent, setting
from sparsereg.page.pictures import AFTER, drawn
from sparsereg.settings import flat
from sparsereg.training.artefacts import NAMES, Artefact, columns, why_none
from sparsereg.training.tasks.task import SHARES, Task

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_HERE = Path(__file__).parent
PACKAGES = (
    *("torch", "pytorch-lightning", "torchvision", "torchmetrics", "numpy", "timm", "transformers"),
    *("onnx", "onnxruntime", "openvino"),
)
"""Whose versions a page names."""


def write_page(
    path: Path,
    kind: str,
    results: Mapping[str, Any],
    artefacts: Sequence[Artefact],
    settings: Mapping[str, Any],
    task: Task,
    blocks: str = "",
) -> None:
    """Write report.html, whole or not at all.

    Args:
        path: of the file.
        kind: "Training report" or "Test report".
        results: as results.json has them, with ``provenance`` and ``measured_on``.
        artefacts: in order.
        settings: of the run, plain.
        task: whose main figure comes first.
        blocks: the table of blocks, as text.
    """
    values = _values(results, artefacts, task)
    shown = [(key, setting(value)) for key, value in flat(settings).items()]
    write_text(
        path,
        page.render(_HERE / "report.html", {**values, "kind": kind, "settings": shown, "blocks": blocks}),
    )


def _values(results: Mapping[str, Any], artefacts: Sequence[Artefact], task: Task) -> dict[str, Any]:
    timed = columns(artefacts)
    kinds = {a.name.partition(" ")[0] for a in artefacts}
    figures = [
        (key, value)
        for key, value in results.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    ]
    sections = [("artefacts", "The file to ship"), ("speed", "Speed"), ("results", "Results")]
    sections += [("asked", "What was asked"), ("provenance", "Provenance")]
    return {
        "title": f"{results['measured_on']}",
        "provenance": results["provenance"],
        "word": SHARES.get(task.figure, task.figure),
        "measured_on": results["measured_on"],
        "ship": results["ship"],
        "why_none": why_none(results),
        "timed": timed,
        "timed_how": results.get("latency_settings", ""),
        "artefacts": [_row(a, task, timed) for a in artefacts],
        "meanings": [(name, what) for name, what in NAMES.items() if name in kinds],
        "picture": _picture(artefacts, timed) if timed else "",
        "figures": figures,
        "sections": [s for s in sections if timed or s[0] != "speed"],
        "tiles": _tiles(artefacts, task, results["ship"]),
        "notes": [],
        "on_paper": 60,
    }


def _figure(value: Any, task: Task) -> str:
    return percent(value) if task.figure in SHARES else number(value)


def _row(a: Artefact, task: Task, timed: Iterable[tuple[str, str]]) -> dict[str, Any]:
    times = [a.milliseconds.get(runtime, {}).get(batch) for runtime, batch in timed]
    figure = a.figures.get(f"test_{task.figure}")
    shown = [{"value": ms, "shown": in_words(ms) if ms is not None and known(ms) else ""} for ms in times]
    return {**vars(a), "figure": figure, "shown": _figure(figure, task), "times": shown}


def _tiles(artefacts: Sequence[Artefact], task: Task, ship: str | None) -> list[dict[str, str]]:
    """Return what the file to ship is worth, and what the whole network was."""
    files = [a for a in artefacts if a.file is not None] or [artefacts[-1]]
    last = next((a for a in files if a.file == ship), files[-1])
    first = artefacts[0]
    figure = last.figures.get(f"test_{task.figure}")
    pairs = [
        (
            f"Test {SHARES.get(task.figure, task.figure)}",
            _figure(figure, task),
            f"of the {last.name} network",
        ),
        ("Parameters", number(last.parameters), f"of {number(first.parameters)}"),
        ("MACs", number(last.macs), f"of {number(first.macs)}"),
        ("MB", number(last.megabytes), f"of {number(first.megabytes)}"),
    ]
    return [{"label": label, "figure": shown, "note": note} for label, shown, note in pairs]


def _picture(artefacts: Sequence[Artefact], timed: Sequence[tuple[str, str]]) -> str:
    bars = [
        (f"{a.name}, {runtime} {batch}", a.milliseconds[runtime][batch])
        for runtime, batch in timed
        for a in artefacts
        if batch in a.milliseconds.get(runtime, {})
    ]

    def draw(axes: Axes) -> None:
        axes.barh([name for name, _ in bars], [ms for _, ms in bars], color=AFTER)
        axes.invert_yaxis()
        axes.set(xscale="log", xlabel="milliseconds for a batch")

    return drawn(draw)
