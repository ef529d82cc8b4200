"""``targets.year=[2025,2026]``: weights for several years from one matrix, each begun at the year before."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from omegaconf import OmegaConf

from sparsereg.calibration.command import run as one
from sparsereg.calibration.command.checkpoint import fingerprint, is_of
from sparsereg.calibration.command.provenance import provenance_of
from sparsereg.calibration.config import CalibrationRun
from sparsereg.calibration.solver.calibration import CalibrationResult
from sparsereg.calibration.solver.selection import STARTED
from sparsereg.errors import FellShort, InputError, wrong_input
from sparsereg.files import new_version, write_json, write_text
from sparsereg.settings import plain
from sparsereg.table_file import write_table

if TYPE_CHECKING:
    import pandas as pd

_WORST = ("mean_are", "median_are", "max_are", "max_abs_scaled_error", "bounds_hit", "max_weight", "loss")
_LEAST = ("kept", "ess", "within_1pct", "within_10pct")
_SUMMED = ("targets", "seconds")


def run(cfg: CalibrationRun, outputs: Path) -> Path:
    """Calibrate every year and return the path of results.json.

    Args:
        cfg: Of calibrate.py, with more than one year.
        outputs: Where the folder of the run is made, and in it one for each year.

    Raises:
        InputError: Something that the user gave cannot be used.
        FellShort: All is written, but a year is not what was required.
    """
    start = time.perf_counter()
    with wrong_input():
        cfg = one.with_method(cfg)
        tasks = one.read_tasks(cfg)
        provenance = provenance_of(cfg)
        settings = _with_checkpoint(tasks, cfg)
        first = next(iter(tasks))
        ready = one.prepared(tasks[first], settings[first], provenance)
        folder = new_version(outputs)
    write_text(folder / "config.yaml", OmegaConf.to_yaml(plain(cfg)))
    found: dict[str, one.Ended] = {}
    ahead = None
    for year, task in tasks.items():
        if year != first:
            task.problem.adopt(ready.task.problem)
            with wrong_input():
                ready = one.prepared(task, settings[year], provenance, ahead)
        place = folder / str(year)
        place.mkdir()
        print(f"year            {year}")
        found[str(year)] = one.carry_out(ready, place)
        ahead = found[str(year)].result.weights if cfg.method in STARTED else None
    weights = weights_by_year({year: ended.result for year, ended in found.items()})
    write_table(folder / f"weights.{cfg.weights_format}", weights)
    write_table(folder / "targets.csv", _targets(found))
    results = _together({year: ended.results for year, ended in found.items()})
    results |= {"total_seconds": time.perf_counter() - start, "provenance": provenance.to_dict()}
    write_json(folder / "results.json", results)
    if short := [f"{year}: {row['text']}" for year, row in _missed(found)]:
        raise FellShort(folder / "results.json", short)
    return folder / "results.json"


def _with_checkpoint(
    tasks: dict[int | None, one.Task], cfg: CalibrationRun
) -> dict[int | None, CalibrationRun]:
    """Give the checkpoint to the year that it is of; those before it are calibrated again."""
    without = replace(cfg, ckpt_path=None)
    if cfg.ckpt_path is None:
        return dict.fromkeys(tasks, without)
    path = Path(cfg.ckpt_path)
    of = [year for year, task in tasks.items() if is_of(path, fingerprint(task.problem, cfg))]
    if path.is_file() and not of:
        raise InputError(
            f"ckpt_path={path} is of no year of this problem, or of other settings: repeat the command that"
            " was interrupted, with ckpt_path added"
        )
    chosen = of[0] if of else next(iter(tasks))
    return {year: cfg if year == chosen else without for year in tasks}


def weights_by_year(results: dict[str, CalibrationResult]) -> pd.DataFrame:
    """Return one row per household that a year keeps: id, initial_weight and a column of weights a year.

    Args:
        results: By year; of the same households.
    """
    import pandas as pd

    weights = np.column_stack([r.weights for r in results.values()])
    kept = np.flatnonzero((weights != 0).any(axis=1))
    problem = next(iter(results.values())).problem
    columns = {"id": problem.household_ids[kept], "initial_weight": problem.starting_weights[kept]}
    return pd.DataFrame(columns | {f"weight_{y}": weights[kept, i] for i, y in enumerate(results)})


def _targets(found: dict[str, one.Ended]) -> pd.DataFrame:
    """The targets of all years, one under the other."""
    import pandas as pd

    return pd.concat([e.targets.assign(year=int(y)) for y, e in found.items()], ignore_index=True)


def _missed(found: dict[str, one.Ended]) -> list[tuple[str, dict[str, Any]]]:
    return [(year, row) for year, e in found.items() for row in e.results["required"] if not row["met"]]


def _together(years: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Figures of each year; above them the worst of each, so that a run can be judged by them."""
    told = list(years.values())
    results: dict[str, Any] = {"households": told[0]["households"], "method": told[0]["method"]}
    for names, pick in ((_WORST, max), (_LEAST, min), (_SUMMED, sum)):
        for name in names:
            known = [r[name] for r in told if r[name] is not None]
            results[name] = pick(known) if known else None
    required = [{**row, "year": year} for year, r in years.items() for row in r["required"]]
    return results | {"years": years, "required": required}
