"""calibrate.py in a group of processes (torchrun): each reads and keeps its own part of the households.

``problem.households`` is a Parquet file, whose row groups are shared out, or a folder of Parquet files, which
are shared out in the order of their names. Weights are written as a part by each process.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from omegaconf import OmegaConf

from sparsereg.calibration.command.processes import new_folder, place, together, wait
from sparsereg.calibration.command.provenance import provenance_of
from sparsereg.calibration.command.requirements import judged
from sparsereg.calibration.command.run import columns_named, with_columns
from sparsereg.calibration.config import CalibrationRun, HouseholdsProblem
from sparsereg.calibration.measures import error_summary, relative_errors
from sparsereg.calibration.problem import CalibrationProblem, exact_totals
from sparsereg.calibration.reading.book import Book
from sparsereg.calibration.reading.households import (
    TARGET_TEXTS,
    BuiltProblem,
    TargetTable,
    build,
    denominator_table,
    names_used,
    target_table,
)
from sparsereg.calibration.reading.levels import in_households, members, plural
from sparsereg.calibration.reading.missing import Missing
from sparsereg.calibration.reading.parquet_file import share_of
from sparsereg.calibration.reading.tables import open_table, read_table
from sparsereg.calibration.solver.selection import method_of
from sparsereg.calibration.solver.shared import (
    SharedRatios,
    SharedWeights,
    calibrate_shared,
    largest,
    summed,
)
from sparsereg.calibration.solver.shared_selection import METHODS, select_shared
from sparsereg.calibration.weight_table import weight_frame
from sparsereg.errors import FellShort, InputError
from sparsereg.files import write_json, write_text
from sparsereg.settings import plain
from sparsereg.table_file import write_table

if TYPE_CHECKING:
    import pandas as pd

_KNOWN = ("problem.persons", "unit_factor")
"""What only runs of all households know elsewhere, and these do, too."""
_OF_SELECTIONS = ("max_weight_ratio", "normalize_groups", "group_multipliers")
"""Settings that are known but for method=calibrate."""


@dataclass(frozen=True, eq=False)
class _Part:
    """The households of this process.

    Args:
        problem: Totals only: of a ratio what is above the line less target times what is below, at 0.
        columns: Those that settings name.
        ratios: How to come back from these to ratios; None: there are none.
    """

    problem: CalibrationProblem
    columns: dict[str, np.ndarray]
    ratios: SharedRatios | None = None

    def told(self, found: SharedWeights) -> tuple[CalibrationProblem, SharedWeights]:
        """The targets as they were given, and what the weights come to in their units."""
        return (self.problem, found) if self.ratios is None else (self.ratios.given, self.ratios.of(found))


def run(cfg: CalibrationRun, outputs: Path) -> Path:
    """Calibrate as one process of a group and return the path of results.json.

    Args:
        cfg: Of calibrate.py.
        outputs: Where the folder of the run is made.

    Raises:
        InputError: Something that the user gave cannot be used; in the first process only, the others leave.
        FellShort: All is written, but it is not what was required; likewise.
    """
    start, (rank, size) = time.perf_counter(), place()
    together(lambda: _check(cfg))
    read = together(lambda: _read(cfg, rank, size))
    part = together(lambda: _whole(read), alone=False)
    began = time.perf_counter()
    given, found = part.told(together(lambda: _solved(part, cfg), alone=False))
    solved = time.perf_counter()
    folder = new_folder(outputs)
    if rank == 0:
        (folder / "weights").mkdir()
        write_text(folder / "config.yaml", OmegaConf.to_yaml(plain(cfg)))
        write_table(folder / "targets.csv", _targets(given, found))
    wait()
    write_table(folder / "weights" / f"part-{rank:05d}.parquet", weight_frame(given, found.weights))
    results = _results(given, found)
    results |= {"seconds": solved - began, "processes": size, "method": _method(cfg)}
    results["required"] = judged(cfg.require, results)
    results["total_seconds"] = time.perf_counter() - start
    wait()
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


def _method(cfg: CalibrationRun) -> str:
    return method_of(cfg.method, cfg.num_households, cfg.lambda_l0)


def _solved(part: _Part, cfg: CalibrationRun) -> SharedWeights:
    """The weights of this process's households."""
    solver = with_columns(replace(cfg.solver(), device="cpu"), part.columns)
    if _method(cfg) == "calibrate":
        return calibrate_shared(
            part.problem, solver.distance, solver.bounds, solver.weight_bounds, solver.unit_factor
        )
    return select_shared(part.problem, solver, _method(cfg), cfg.num_households)


def _check(cfg: CalibrationRun) -> None:
    """Refuse what a group of processes does not know."""
    method = _method(cfg)
    if method not in ("calibrate", *METHODS) or not isinstance(cfg.problem, HouseholdsProblem):
        raise InputError(
            "several processes need problem=households and method=calibrate, all, pruning with"
            " num_households, or hard_concrete with lambda_l0: give these, or start one"
        )
    strange = [name for name in cfg.of_whole_runs if name not in _KNOWN]
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


@dataclass(frozen=True, eq=False)
class _Read:
    """What this process has read.

    Args:
        targets: All of them.
        built: Totals, of ratios those above the line, of its own households.
        persons: Of those in its households, how many, and of how many in the file.
    """

    targets: TargetTable
    built: BuiltProblem
    persons: tuple[int, int] = (0, 0)


def _read(cfg: CalibrationRun, rank: int, size: int) -> _Read:
    """All targets, the households of this process, and the persons in them."""
    choice = plain(cfg.problem)
    file, id, key = str(choice["targets"]), choice["id"], choice["household_id"] or choice["id"]
    written = {"decimal": choice["decimal"], "encoding": choice["encoding"]}
    page = Book(read_table(file, TARGET_TEXTS, **written), file, **cfg.targets.rules).page(
        next(iter(cfg.targets.years), None)
    )
    targets = target_table(page.table, file, rows=page.rows, known=page.known)
    columns = columns_named(cfg)
    named = names_used(targets) | names_used(denominator_table(targets))
    upper, wanted = Path(choice["households"]), {*named, *columns, choice["weight"], id, key} - {None}
    households, first = share_of(upper, wanted, id or key, rank, size)
    persons, counts, units = None, (0, 0), (str(choice["unit_names"][0]), str(choice["unit_names"][1]))
    if choice["persons"] is not None:
        lower = open_table(choice["persons"], id=key, **written)
        below, whole = members(lower, {*named, choice["person_id"]} - {None}, key, households, id)
        counts, files = (len(below), whole), (str(upper), str(choice["persons"]))
        persons = in_households(below, households, key, id, choice["person_id"], files, units)
        id = id or key
    if id is None:
        id, households = "id", households.assign(id=np.arange(first, first + len(households)))
    missing = Missing(cfg.missing, dict(cfg.missing_in))
    built = build(
        households, targets, choice["weight"], id, str(upper), columns, missing, persons, units,
        with_denominators=False,
    )  # fmt: skip
    return _Read(targets, built, counts)


def _whole(read: _Read) -> _Part:
    """What all processes have read together: refuse what fits nowhere, and turn ratios into totals."""
    part, targets, source = read.built.problem, read.targets, read.built.source
    assert source is not None
    found, there = summed([read.persons[0], read.persons[1] / place()[1]]).round().astype(int).tolist()
    if found < there:
        assert source.persons is not None
        raise InputError(
            f"{source.persons.file}: {there - found:,} of {there:,} {plural(source.units[1])} are in no"
            f" {source.units[0]} of {source.file}"
        )
    entries = summed(np.diff(part.matrix.indptr).astype(np.float64))
    empty = np.flatnonzero((entries == 0) & (part.targets != 0))
    if len(empty):
        raise InputError(
            f"no {source.units[0]} touches {len(empty)} targets, {part.names[empty[0]]!r} for one"
        )
    if not targets.is_ratio.any():
        return _Part(part, read.built.columns)
    below, _ = source.totals(denominator_table(targets), targets.is_ratio)
    totals = summed(exact_totals(below, part.starting_weights))
    zero = np.flatnonzero(targets.is_ratio & (totals == 0))
    if len(zero):
        raise InputError(
            f"{targets.place(int(zero[0]))}: its denominator (of, of_where) adds up to 0 with the initial"
            " weights"
        )
    ratios = SharedRatios(part, below, targets.is_ratio, np.abs(totals))
    return _Part(ratios.linear, read.built.columns, ratios)


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
