"""What calibrate.py does with areas: weights of every area, and how they add up to the nation."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from omegaconf import OmegaConf

from sparsereg.calibration.areas import AreaProblem
from sparsereg.calibration.command.provenance import provenance_of
from sparsereg.calibration.command.requirements import judged
from sparsereg.calibration.config import CalibrationRun
from sparsereg.calibration.measures import error_summary, relative_errors
from sparsereg.calibration.problem import exact_totals
from sparsereg.calibration.reading.areas import read_areas
from sparsereg.calibration.reading.missing import Missing
from sparsereg.calibration.solver.areas import AreaWeights, calibrate_areas
from sparsereg.cli import wrong_input
from sparsereg.errors import FellShort, InputError
from sparsereg.files import new_version, write_atomically, write_json, write_table, write_text
from sparsereg.settings import plain

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger(__name__)


def run(cfg: CalibrationRun, outputs: Path) -> Path:
    """Calibrate every area as the settings say and return the path of results.json.

    Args:
        cfg: Of calibrate.py, with ``area``.
        outputs: Where the folder of the run is made.

    Raises:
        InputError: Something that the user gave cannot be used; nothing has been written then.
        FellShort: All is written, but it is not what was required.
    """
    start = time.perf_counter()
    with wrong_input():
        problem = read_areas(
            plain(cfg.problem), cfg.area, Missing(cfg.missing, dict(cfg.missing_in)), cfg.seed, cfg.targets
        )
        _announce(problem, cfg)
        if cfg.area.reconcile == "proportional":
            problem = problem.reconciled()
        provenance = provenance_of(cfg)
        made = calibrate_areas(problem, cfg.distance, _numbers(cfg.bounds))
        folder = new_version(outputs)
    write_text(folder / "config.yaml", OmegaConf.to_yaml(plain(cfg)))
    books = _Books(problem)
    with wrong_input():
        _write_weights(folder, problem, books.entered(made), cfg)
    for name, table in books.tables().items():
        write_table(folder / f"{name}.csv", table)
    results = books.results() | {
        "seconds": time.perf_counter() - start,
        "method": "calibrate",
        "seed": cfg.seed,
    }
    results["required"] = required = judged(cfg.require, results)
    results["provenance"] = provenance.to_dict()
    write_json(folder / "results.json", results)
    for line in _told(results, folder):
        print(line)
    if short := [row["text"] for row in required if not row["met"]]:
        raise FellShort(folder / "results.json", short)
    return folder / "results.json"


def _numbers(
    bounds: tuple[float | str | None, float | str | None] | None,
) -> tuple[float | None, float | None] | None:
    """Bounds that hold for all households; a column of them has no place for each area."""
    if bounds is None:
        return None
    low, high = bounds
    if isinstance(low, str) or isinstance(high, str):
        raise InputError("bounds: with areas they are two numbers, such as [0.3,3], and no columns")
    return low, high


def _announce(problem: AreaProblem, cfg: CalibrationRun) -> None:
    """Say what will be done, and which targets of areas and nation do not add up."""
    log.info(
        "%s targets of %s areas, %s households",
        *(
            f"{n:,}"
            for n in (int((problem.area >= 0).sum()), len(problem.placement.areas), problem.num_households)
        ),
    )
    found = problem.disagreements()
    for measure, nation, total in found[:5]:
        log.warning(
            "the areas' targets for %s add up to %.9g, the nation's is %.9g (%+.3g %%)%s",
            *(
                problem.measure_names[measure],
                total,
                nation,
                100 * (total / nation - 1) if nation else np.nan,
            ),
            "" if cfg.area.reconcile == "none" else ": multiplied to it",
        )
    if len(found) > 5:
        log.warning("and %d more such totals: nation.csv", len(found) - 5)


class _Books:
    """What is noted of every area while its weights are written."""

    def __init__(self, problem: AreaProblem) -> None:
        self._problem = problem
        self._areas: list[dict[str, Any]] = []
        self._targets: list[dict[str, np.ndarray]] = []
        self._sum = np.zeros(problem.num_households)
        self._places = np.zeros(problem.num_households, dtype=np.int64)

    def entered(self, made: Iterator[AreaWeights]) -> Iterator[AreaWeights]:
        """Note each area and pass it on."""
        for area in made:
            self._sum[area.households] += area.weights
            self._places[area.households] += area.weights > 0
            self._note(area)
            yield area

    def _note(self, a: AreaWeights) -> None:
        p = self._problem
        wanted = p.targets[a.targets]
        initial = np.zeros(p.num_households)
        initial[a.households] = a.initial
        relative = relative_errors(a.estimates, wanted)
        self._targets.append({
            "area": np.full(len(wanted), p.placement.areas[a.area]),
            "name": np.array([p.names[i] for i in a.targets]),
            "target": wanted,
            "initial": p.measures[p.measure[a.targets]] @ initial,
            "estimate": a.estimates,
            "relative_error": relative,
            "scaled_error": a.errors,
            "multiplier": a.multipliers,
        })  # fmt: skip
        w, total = a.weights, float(a.weights.sum())
        self._areas.append({
            "area": p.placement.areas[a.area],
            "targets": len(wanted),
            "households": len(w),
            "unique_sources": int((w > 0).sum()),
            "ess": total**2 / float(w @ w) if total > 0 else 0.0,
            "largest_share": float(w.max()) / total if total > 0 else np.nan,
            "initial_weight": float(a.initial.sum()),
            "weight": total,
            "mean_are": float(np.nanmean(np.abs(relative))) if np.isfinite(relative).any() else np.nan,
            "max_scaled_error": float(a.errors.max(initial=0.0)),
            "gave_way": len(a.gave_way),
            "bounds_hit": a.bounds_hit,
            "steps": a.steps,
        })  # fmt: skip

    def tables(self) -> dict[str, pd.DataFrame]:
        """The tables of areas, of their targets, of households and of the nation."""
        import pandas as pd

        p = self._problem
        households = {"id": p.ids, "weight": p.initial_weights, "sum_of_areas": self._sum}
        households |= {"exhaustion": self._sum / p.initial_weights, "areas": self._places}
        nation = np.full(len(p.measure_names), np.nan)
        national = np.flatnonzero(p.area == -1)
        nation[p.measure[national]] = p.targets[national]
        asked = np.bincount(
            p.measure[p.area >= 0], weights=p.targets[p.area >= 0], minlength=len(p.measure_names)
        )
        totals = exact_totals(p.measures, self._sum)
        before = exact_totals(p.measures, p.initial_weights)
        rows = {"measure": p.measure_names, "target": nation, "targets_of_areas": asked, "initial": before}
        return {
            "areas": pd.DataFrame(self._areas),
            "targets": pd.concat([pd.DataFrame(t) for t in self._targets], ignore_index=True),
            "exhaustion": pd.DataFrame(households),
            "nation": pd.DataFrame({
                **rows, "sum_of_areas": totals, "relative_error": relative_errors(totals, nation),
            }),
        }  # fmt: skip

    def results(self) -> dict[str, Any]:
        """Figures of results.json."""
        tables = self.tables()
        areas, errors = tables["areas"], tables["targets"].relative_error.abs().to_numpy()
        exhaustion = tables["exhaustion"].exhaustion.to_numpy()
        against = tables["nation"].relative_error.abs()
        return {
            "areas": len(areas),
            "households": self._problem.num_households,
            "kept": int((self._sum > 0).sum()),
            "targets": len(errors),
            **error_summary(errors),
            "max_abs_scaled_error": float(areas.max_scaled_error.max()),
            "gave_way": int(areas.gave_way.sum()),
            "bounds_hit": int(areas.bounds_hit.sum()),
            "ess": float(areas.ess.min()),
            "largest_share": float(areas.largest_share.max()),
            "unique_sources": int(areas.unique_sources.min()),
            "total_weight": float(self._sum.sum()),
            "initial_total_weight": float(self._problem.initial_weights.sum()),
            "exhaustion": {f"p{q}": float(np.percentile(exhaustion, q)) for q in (1, 50, 99)},
            "nation_max_are": float(against.max()) if against.notna().any() else None,
        }


def _write_weights(
    folder: Path, problem: AreaProblem, made: Iterator[AreaWeights], cfg: CalibrationRun
) -> None:
    """Write the long table, area by area as they come; and each area's own, if asked for."""
    files = _names(problem.placement.areas) if cfg.area.files else ()
    if files:
        (folder / "areas").mkdir()

    def tables() -> Iterator[pd.DataFrame]:
        for area in made:
            table = _long(problem, area)
            if files:
                write_table(folder / "areas" / f"{files[area.area]}.{cfg.weights_format}", table)
            yield table

    streams: dict[str, Callable[[Path, Iterator[pd.DataFrame]], None]] = {
        "csv": _to_csv,
        "parquet": _to_parquet,
    }
    write_atomically(
        folder / f"weights.{cfg.weights_format}", lambda path: streams[cfg.weights_format](path, tables())
    )


def _long(problem: AreaProblem, a: AreaWeights) -> pd.DataFrame:
    import pandas as pd

    kept = a.weights != 0
    return pd.DataFrame({
        "area": problem.placement.areas[a.area],
        "id": problem.ids[a.households[kept]],
        "initial_weight": a.initial[kept],
        "weight": a.weights[kept],
    })  # fmt: skip


def _to_csv(path: Path, tables: Iterator[pd.DataFrame]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        for place, table in enumerate(tables):
            table.to_csv(file, index=False, header=place == 0, lineterminator="\n")


def _to_parquet(path: Path, tables: Iterator[pd.DataFrame]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    writer = None
    try:
        for table in tables:
            rows = pa.Table.from_pandas(table, preserve_index=False)
            writer = writer or pq.ParquetWriter(path, rows.schema)
            writer.write_table(rows)
    finally:
        if writer is not None:
            writer.close()


def _names(areas: tuple[str, ...]) -> list[str]:
    """Names of files: the areas' own where those serve and differ, else with a number."""
    safe = [re.sub(r"[^A-Za-z0-9_-]", "_", area)[:80] for area in areas]
    lower = [name.lower() for name in safe]
    return [name if lower.count(name.lower()) == 1 else f"{name}_{i}" for i, name in enumerate(safe)]


def _told(r: dict[str, Any], folder: Path) -> list[str]:
    """Return what the user reads at the end of a run."""
    spread = r["exhaustion"]
    lines = [
        f"areas           {r['areas']:,}, {r['targets']:,} targets, in {r['seconds']:.1f} s",
        f"error           largest {r['max_abs_scaled_error']:.2e} of its scale; gave way {r['gave_way']:,}",
        f"support         at least {r['unique_sources']:,} households, effective {r['ess']:,.0f}; one weight"
        f" is at most {r['largest_share']:.2%} of its area",
        f"exhaustion      sum over areas / national weight: {spread['p1']:.3g} (1 %), {spread['p50']:.3g}"
        f" (median), {spread['p99']:.3g} (99 %)",
    ]
    if r["nation_max_are"] is not None:
        lines.append(f"nation          sum of areas within {r['nation_max_are']:.2%} of its targets")
    return [*lines, f"files           {folder}"]
