"""calibrate.py in a group of processes (torchrun): each reads and keeps its own part of the households.

``problem.households`` is a Parquet file, whose row groups are shared out, or a folder of Parquet files, which
are shared out in the order of their names. Weights are written as a part by each process.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch.distributed as dist
from omegaconf import OmegaConf

from sparsereg.calibration.command.provenance import provenance_of
from sparsereg.calibration.command.requirements import judged
from sparsereg.calibration.config import CalibrationRun, HouseholdsProblem
from sparsereg.calibration.measures import error_summary, relative_errors
from sparsereg.calibration.problem import CalibrationProblem
from sparsereg.calibration.reading.book import Book
from sparsereg.calibration.reading.households import TARGET_TEXTS, build, names_used, target_table
from sparsereg.calibration.reading.missing import Missing
from sparsereg.calibration.reading.parquet_file import share_of
from sparsereg.calibration.reading.tables import read_table
from sparsereg.calibration.reporting.tables import weight_frame
from sparsereg.calibration.solver.selection import method_of
from sparsereg.calibration.solver.shared import SharedWeights, calibrate_shared, largest, summed
from sparsereg.calibration.solver.shared_selection import METHODS, select_shared
from sparsereg.errors import FellShort, InputError, wrong_input
from sparsereg.files import new_version, write_json, write_table, write_text
from sparsereg.settings import plain

if TYPE_CHECKING:
    import pandas as pd

T = TypeVar("T")

_OF_SELECTIONS = ("max_weight_ratio", "normalize_groups", "group_multipliers")
"""Settings that are known but for method=calibrate."""


def in_processes() -> bool:
    """Whether this process was started as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def run(cfg: CalibrationRun, outputs: Path) -> Path:
    """Calibrate as one process of a group and return the path of results.json.

    Args:
        cfg: Of calibrate.py.
        outputs: Where the folder of the run is made.

    Raises:
        InputError: Something that the user gave cannot be used; in the first process only, the others leave.
        FellShort: All is written, but it is not what was required; likewise.
    """
    from lightning_fabric import Fabric

    here = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
    fabric = Fabric(
        accelerator="cpu", strategy="ddp", devices=here, num_nodes=int(os.environ["WORLD_SIZE"]) // here
    )
    fabric.launch()
    try:
        return _run(cfg, outputs, fabric.global_rank, fabric.world_size)
    finally:
        dist.destroy_process_group()


def _run(cfg: CalibrationRun, outputs: Path, rank: int, size: int) -> Path:
    start = time.perf_counter()
    together(lambda: _check(cfg), rank)
    part = together(lambda: _read(cfg, rank, size), rank)
    together(lambda: _refuse_empty(part), rank, alone=False)
    read = time.perf_counter()
    found = together(lambda: _solved(part, cfg), rank, alone=False)
    solved = time.perf_counter()
    paths: list[Any] = [new_version(outputs) if rank == 0 else None]
    dist.broadcast_object_list(paths, 0)
    folder = Path(paths[0])
    if rank == 0:
        (folder / "weights").mkdir()
        write_text(folder / "config.yaml", OmegaConf.to_yaml(plain(cfg)))
        write_table(folder / "targets.csv", _targets(part, found))
    dist.barrier()
    write_table(folder / "weights" / f"part-{rank:05d}.parquet", weight_frame(part, found.weights))
    results = _results(part, found)
    results |= {"seconds": solved - read, "processes": size, "method": _method(cfg)}
    results["required"] = judged(cfg.require, results)
    results["total_seconds"] = time.perf_counter() - start
    dist.barrier()
    if rank > 0:
        return folder / "results.json"
    results["provenance"] = provenance_of(cfg).to_dict()
    write_json(folder / "results.json", results)
    print(f"households      {results['households']:,} in {size} processes, in {results['seconds']:.1f} s")
    print(f"error           largest {results['max_abs_scaled_error']:.2e} of its scale;", end=" ")
    print(f"gave way {results['gave_way']:,}\nfiles           {folder}")
    if short := [row["text"] for row in results["required"] if not row["met"]]:
        raise FellShort(folder / "results.json", short)
    return folder / "results.json"


def together(work: Callable[[], T], rank: int, alone: bool = True) -> T:
    """Do something in every process; if it is wrong input in one of them, the first process says so.

    Args:
        work: What is done.
        rank: Of this process.
        alone: Whether one process may fail while others do not.

    Raises:
        InputError: in the first process; the others leave with its exit code.
    """
    error: str | None = None
    try:
        with wrong_input():
            return_value = work()
    except InputError as wrong:
        error = str(wrong)
    said: list[Any] = [error]
    if alone:
        said = [None] * dist.get_world_size()
        dist.all_gather_object(said, error)
    first = next((text for text in said if text is not None), None)
    if first is None:
        return return_value
    if rank == 0:
        raise InputError(first)
    raise SystemExit(2)


def _method(cfg: CalibrationRun) -> str:
    return method_of(cfg.method, cfg.num_households, cfg.lambda_l0)


def _solved(part: CalibrationProblem, cfg: CalibrationRun) -> SharedWeights:
    """The weights of this process's households."""
    if _method(cfg) == "calibrate":
        bounds = {name: getattr(cfg, name) for name in ("bounds", "weight_bounds")}
        return calibrate_shared(part, cfg.distance, **bounds)
    return select_shared(part, replace(cfg.solver(), device="cpu"), _method(cfg), cfg.num_households)


def _check(cfg: CalibrationRun) -> None:
    """Refuse what a group of processes does not know."""
    method = _method(cfg)
    if method not in ("calibrate", *METHODS) or not isinstance(cfg.problem, HouseholdsProblem):
        raise InputError(
            "several processes need problem=households and method=calibrate, all, pruning with"
            " num_households, or hard_concrete with lambda_l0: give these, or start one"
        )
    strange = [*cfg.of_whole_runs, *(["areas"] if cfg.area.is_given else [])]
    if method != "calibrate":
        strange = [name for name in strange if name not in _OF_SELECTIONS]
        strange += [name for name in ("hold_total", "consistency") if getattr(cfg, name)]
        strange += [f"loss={cfg.loss}"] if cfg.loss not in ("relative", "mse") else []
    with_number = method != "pruning" and cfg.num_households is not None
    strange += [f"num_households with method={method}"] if with_number else []
    strange += ["weights_format=dta"] if cfg.weights_format == "dta" else []
    strange += ["weights=integer"] if cfg.weights != "real" else []
    strange += ["missing=drop"] if "drop" in (cfg.missing, *cfg.missing_in.values()) else []
    if strange:
        raise InputError(f"{strange[0]} is not known with several processes: start one process")
    for name in ("bounds", "weight_bounds"):
        if any(isinstance(side, str) for side in getattr(cfg, name) or ()):
            raise InputError(f"{name}: with several processes they are numbers, such as [0.3,3]")


def _read(cfg: CalibrationRun, rank: int, size: int) -> CalibrationProblem:
    """All targets, and the households of this process."""
    choice = plain(cfg.problem)
    file = str(choice["targets"])
    written = {"decimal": choice["decimal"], "encoding": choice["encoding"]}
    page = Book(read_table(file, TARGET_TEXTS, **written), file, **cfg.targets.rules).page(
        next(iter(cfg.targets.years), None)
    )
    targets = target_table(page.table, file, rows=page.rows, known=page.known)
    if targets.is_ratio.any():
        at = int(np.flatnonzero(targets.is_ratio)[0])
        raise InputError(f"{targets.place(at)}: ratios (of, of_where) are not known with several processes")
    wanted = {*names_used(targets), choice["weight"], choice["id"]} - {None}
    households, first = share_of(Path(choice["households"]), wanted, choice["id"], rank, size)
    missing = Missing(cfg.missing, dict(cfg.missing_in))
    if choice["id"] is None:
        households = households.assign(id=np.arange(first, first + len(households)))
    return build(
        households, targets, choice["weight"], choice["id"] or "id", str(choice["households"]),
        missing=missing,
    ).problem  # fmt: skip


def _refuse_empty(part: CalibrationProblem) -> None:
    """Refuse a target that is not 0 and that no household of any process touches."""
    entries = summed(np.diff(part.matrix.indptr).astype(np.float64))
    empty = np.flatnonzero((entries == 0) & (part.targets != 0))
    if len(empty):
        raise InputError(f"no household touches {len(empty)} targets, {part.names[empty[0]]!r} for one")


def _targets(part: CalibrationProblem, found: SharedWeights) -> pd.DataFrame:
    import pandas as pd

    return pd.DataFrame({
        "name": part.names,
        "group": "" if part.target_groups is None else part.target_groups,
        "target": part.targets,
        "initial": found.initial,
        "estimate": found.estimates,
        "relative_error": relative_errors(found.estimates, part.targets),
        "error": found.estimates - part.targets,
        "scale": found.scale,
        "scaled_error": found.scaled_errors,
        **({} if found.multipliers is None else {"multiplier": found.multipliers}),
    })  # fmt: skip


def _results(part: CalibrationProblem, found: SharedWeights) -> dict[str, Any]:
    """Figures over all processes; every process calls this."""
    w, initial = found.weights, part.starting_weights
    sums = summed([len(w), (w != 0).sum(), w.sum(), w @ w, initial.sum()])
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = float(np.nanmax(np.where(initial > 0, w / initial, np.nan), initial=0.0))
    return {
        "households": int(sums[0]),
        "kept": int(sums[1]),
        "targets": part.num_targets,
        **error_summary(np.abs(relative_errors(found.estimates, part.targets))),
        "max_abs_scaled_error": float(np.abs(found.scaled_errors).max()),
        "gave_way": len(found.gave_way),
        "bounds_hit": found.bounds_hit,
        "steps": found.steps,
        "ess": float(sums[2] ** 2 / sums[3]) if sums[3] > 0 else 0.0,
        "max_weight": largest(float(w.max(initial=0.0))),
        "max_ratio": largest(ratio),
        "total_weight": float(sums[2]),
        "initial_total_weight": float(sums[4]),
    }
