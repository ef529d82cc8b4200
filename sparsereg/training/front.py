"""What a front leaves behind: a folder for each size, front.csv, front.png, the network that is handed over.

A run with a front trains the network without gates and then makes one size after the other, each from the one
before in one shot (``sparsereg.compression.oneshot.ranked``), repaired and fine-tuned; that is done in
``sparsereg.training.stages``.
A size is there when its figures are, so that a run that was cut off goes on with those that are missing.
"""

import json
import logging
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import fx

from sparsereg.compression import benchmark, fuse, load_compacted, save_compacted
from sparsereg.compression.timing.runtimes import default_runtime
from sparsereg.files import write_atomically, write_json, write_text
from sparsereg.training.config import Training
from sparsereg.training.pick import COLUMNS, Pick
from sparsereg.training.tasks.task import Task

log = logging.getLogger(__name__)

FOLDER = "front"
TIMING = 0.2
"""Seconds for which each network is timed, with the others in turn."""


def place_of(folder: Path, size: float) -> Path:
    """The folder of one size of a run's front."""
    return folder / FOLDER / f"{size:.6g}"


def missing(folder: Path, sizes: Sequence[float]) -> list[float]:
    """The sizes that have not been made yet."""
    return [size for size in sizes if not (place_of(folder, size) / "figures.json").is_file()]


def keep(
    folder: Path,
    size: float,
    network: fx.GraphModule,
    figures: Mapping[str, Any],
    notes: Mapping[str, Any],
) -> None:
    """Write the network of a size and its figures.

    Args:
        folder: of the run.
        size: share of the cost that is gone.
        network: in eval mode, on the CPU.
        figures: of the network, the latency not among them yet.
        notes: kept with it.
    """
    row = {"size": size, **figures}
    place = place_of(folder, size)
    place.mkdir(parents=True, exist_ok=True)
    write_atomically(place / "compacted.pt", lambda p: save_compacted(network, p, {**notes, "size": size}))
    write_json(place / "figures.json", row)  # last: a size without it is made again
    log.info("front: %s", ", ".join(f"{k} {v:.4g}" for k, v in row.items() if v is not None))


def time_(folder: Path, networks: Mapping[float, fx.GraphModule], example: Any, cfg: Training) -> None:
    """Time the sizes that have not been timed yet, against each other, and add that to their figures.

    Args:
        folder: of the run.
        networks: by size, those that are in memory, in eval mode, on the CPU.
        example: one example as they take it.
        cfg: of the run; its runtime, threads and batch say what a call is.
    """
    # The largest first: what an exporter leaves out of the file of a small one, others may need.
    left = {place: row for place, row in _rows(folder).items() if row.get("latency_ms") is None}
    small = {
        str(place): fuse(networks.get(row["size"]) or load_compacted(place.with_name("compacted.pt")))
        for place, row in left.items()
    }
    if not small:
        return
    runtime = cfg.runtime or default_runtime()
    log.info("front: timing %d networks in %s", len(small), runtime)
    timed = benchmark(
        small,
        example,
        batch_sizes=(cfg.batch,),
        runtimes=[runtime],
        threads=cfg.threads,
        seconds=TIMING * len(small),
    )
    taken = {line.model: line.seconds for line in timed.rows}
    for place, row in left.items():
        write_json(place, {**row, "latency_ms": 1e3 * taken[str(place)]})


def _rows(folder: Path) -> dict[Path, dict[str, Any]]:
    """The figures of all sizes by their files, the largest network first."""
    files = sorted((folder / FOLDER).glob("*/figures.json"), key=lambda p: float(p.parent.name))
    return {path: json.loads(path.read_text()) for path in files}


def take_over(folder: Path, before: Path) -> None:
    """Take the sizes that a run that was cut off has made."""
    for place in sorted((before / FOLDER).glob("*/figures.json")):
        target = folder / FOLDER / place.parent.name
        shutil.copytree(place.parent, target, dirs_exist_ok=True)


def finished(folder: Path, task: Task, pick: Pick | None, dense: Mapping[str, Any]) -> dict[str, Any]:
    """Write front.csv and front.png, and hand over the network that was asked for.

    Args:
        folder: of the run.
        task: what was learnt.
        pick: what the network has to keep to; None hands none over.
        dense: results of the network that was trained.

    Returns:
        What to change in results.json: a network that is handed over is the run's, with its figures.
    """
    rows = list(_rows(folder).values())
    columns = [*COLUMNS, *(column for column in rows[0] if column not in COLUMNS)]
    lines = [
        ",".join(columns),
        *(",".join("" if r[c] is None else repr(r[c]) for c in columns) for r in rows),
    ]
    write_text(folder / "front.csv", "\n".join(lines) + "\n")
    figure = f"test_{task.figure}"
    _draw(folder / "front.png", rows, figure)
    shown = [{**row, "file": str(place_of(folder, row["size"]) / "compacted.pt")} for row in rows]
    found: dict[str, Any] = {"front": shown}
    if pick is None:
        return found
    fitting = [row for row in rows if pick.fits(row)]
    if not fitting:
        near = min(rows, key=pick.miss)
        said = (
            f"pick={pick.column}{pick.sign}{pick.bound:g}: no network of the front fits, the nearest has "
            f"{near[pick.column]:.4g} at size {near['size']:g}; all are in {folder / FOLDER}"
        )
        return {**found, "picked": None, "pick_short": said}
    key = f"val_{task.figure}" if fitting[0][f"val_{task.figure}"] is not None else figure
    sign = -1 if task.larger_is_better else 1
    best = min(fitting, key=lambda row: (math.isnan(row[key]), sign * row[key]))
    target = folder / "checkpoints" / "compacted.pt"
    write_atomically(target, lambda p: shutil.copyfile(place_of(folder, best["size"]) / "compacted.pt", p))
    own = {key: best[key] for key in best if key.startswith(("val_", "test_"))}
    return {
        **found,
        "dense": {key: dense.get(key) for key in (*own, "checkpoint")},
        "picked": {**best, "file": str(target)},
        **own,
        "checkpoint": str(target),
        "exact_sparsity": best["sparsity"],
        "compacted_parameters": best["parameters"],
        "compacted_macs": best["macs"],
    }


def _draw(path: Path, rows: Sequence[Mapping[str, Any]], figure: str) -> None:
    from matplotlib.figure import Figure

    picture = Figure(figsize=(12, 3.6), layout="constrained")
    for axes, column in zip(
        picture.subplots(1, 3, sharey=True), ("parameters", "macs", "latency_ms"), strict=True
    ):
        axes.plot([row[column] for row in rows], [row[figure] for row in rows], "o-")
        axes.set_xlabel(column)
        axes.set_xscale("log")
        axes.grid(alpha=0.3)
    picture.axes[0].set_ylabel(figure)
    write_atomically(path, lambda p: picture.savefig(p, format="png", dpi=150))
