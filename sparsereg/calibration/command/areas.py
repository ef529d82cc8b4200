"""What calibrate.py does with areas: weights of every area, and how they add up to the nation."""

from __future__ import annotations

import logging
import re
import time
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch.distributed as dist
from omegaconf import OmegaConf

from sparsereg.calibration.areas import AreaProblem, Sum
from sparsereg.calibration.command.processes import new_folder, place, together
from sparsereg.calibration.command.provenance import provenance_of
from sparsereg.calibration.command.requirements import judged
from sparsereg.calibration.config import CalibrationRun
from sparsereg.calibration.measures import error_summary, relative_errors
from sparsereg.calibration.problem import exact_totals
from sparsereg.calibration.reading.areas import read_areas
from sparsereg.calibration.reading.missing import Missing
from sparsereg.calibration.solver.areas import AreaWeights, calibrate_areas, of_all
from sparsereg.calibration.solver.clones import prune_clones
from sparsereg.calibration.solver.joint import calibrate_together
from sparsereg.calibration.solver.shared import summed
from sparsereg.device import several_processes
from sparsereg.errors import FellShort, InputError
from sparsereg.files import write_atomically, write_json, write_text
from sparsereg.settings import plain
from sparsereg.table_file import write_table

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
    start, (rank, size) = time.perf_counter(), place()
    problem, found = together(lambda: _read(cfg))
    own = problem.placement.shared_out(size)[rank]
    made = together(lambda: _made(problem, cfg, own))
    folder = new_folder(outputs)
    if rank == 0:
        if found:
            write_table(folder / "disagreements.csv", _disagreements(problem, found))
        write_text(folder / "config.yaml", OmegaConf.to_yaml(plain(cfg)))
    books = _Books(problem, cfg.area.mode == "independent")
    together(lambda: _write_weights(folder, problem, books.entered(made), cfg))
    books.gather()
    if rank > 0:
        return folder / "results.json"
    tables = books.tables()
    for name, table in tables.items():
        write_table(folder / f"{name}.csv", table)
    results = books.results(tables) | {
        "seconds": time.perf_counter() - start,
        "method": "calibrate",
        "mode": cfg.area.mode,
        "seed": cfg.seed,
        "processes": size,
    }
    results["required"] = required = judged(cfg.require, results)
    results["provenance"] = provenance_of(cfg).to_dict()
    write_json(folder / "results.json", results)
    for line in _told(results, folder):
        print(line)
    if short := [row["text"] for row in required if not row["met"]]:
        raise FellShort(folder / "results.json", short)
    return folder / "results.json"


def _read(cfg: CalibrationRun) -> tuple[AreaProblem, list[Sum]]:
    """What is calibrated, reconciled, and which targets did not add up before."""
    if cfg.area.mode == "prune" and place()[1] > 1:
        raise InputError("area.mode=prune is not known with several processes: start one process")
    missing = Missing(cfg.missing, dict(cfg.missing_in))
    problem = read_areas(plain(cfg.problem), cfg.area, missing, cfg.seed, cfg.targets)
    found = problem.disagreements()
    if place()[0] == 0:
        _announce(problem, found, cfg)
    if cfg.area.reconcile != "none":
        problem = problem.reconciled(cfg.area.reconcile)
    return problem, found


def _made(problem: AreaProblem, cfg: CalibrationRun, own: range) -> Iterator[AreaWeights]:
    """The weights of one area of this process after the other, in the way that is asked for."""
    area = cfg.area
    if area.keep is not None:
        return prune_clones(problem, area.keep, area.most, cfg.distance, area.price, cfg.seed)
    if area.mode == "joint":
        return calibrate_together(problem, cfg.distance, _numbers(cfg.bounds), area.price, own)
    return calibrate_areas(problem, cfg.distance, _numbers(cfg.bounds), own)


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


def _announce(problem: AreaProblem, found: list[Sum], cfg: CalibrationRun) -> None:
    """Say what will be done, and which targets of areas and nation do not add up."""
    log.info(
        "%s targets of %s areas, %s of %s groups and the nation, %s households",
        *(
            f"{n:,}"
            for n in (
                int(problem.is_of_area.sum()),
                problem.num_areas,
                int((~problem.is_of_area).sum()),
                len(problem.groups),
                problem.num_households,
            )
        ),
    )
    asked = set(problem.area.tolist())
    idle = [name for i, name in enumerate(problem.groups, problem.num_areas) if i not in asked]
    if idle:
        log.warning("%s of area.groups has no target: %s", f"{len(idle):,}", ", ".join(idle[:8]))
    how = {"none": "", "proportional": ": multiplied to it", "standard_errors": ": moved by standard errors"}
    for sum_ in found[:5]:
        log.warning(
            "the targets for %s of the parts of %s add up to %.9g, its own is %.9g (%+.3g %%)%s",
            *(
                problem.measure_names[problem.measure[sum_.whole]],
                problem.place_name(sum_.whole) or "the nation",
            ),
            *(sum_.total, sum_.asked, 100 * (sum_.total / sum_.asked - 1) if sum_.asked else np.nan),
            how[cfg.area.reconcile],
        )
    if len(found) > 5:
        log.warning("and %d more such totals: disagreements.csv", len(found) - 5)


def _disagreements(problem: AreaProblem, found: list[Sum]) -> pd.DataFrame:
    """One row per target whose parts ask for another total: what both were, and are after reconciling."""
    import pandas as pd

    return pd.DataFrame({
        "area": [problem.place_name(s.whole) for s in found],
        "name": [problem.names[s.whole] for s in found],
        "target": [s.asked for s in found],
        "sum_of_parts": [s.total for s in found],
        "parts": [len(s.parts) for s in found],
        "reconciled_target": [float(problem.targets[s.whole]) for s in found],
        "reconciled_sum": [float(problem.targets[s.parts].sum()) for s in found],
    })  # fmt: skip


class _Books:
    """What is noted of every area while its weights are written."""

    def __init__(self, problem: AreaProblem, exact: bool) -> None:
        self._problem, self._exact = problem, exact
        self._areas: list[dict[str, Any]] = []
        self._targets: list[dict[str, np.ndarray]] = []
        self._sum = np.zeros(problem.num_households)
        self._group_sums = np.zeros((2, len(problem.places) + 1, len(problem.measure_names)))
        self._places = np.zeros(problem.num_households, dtype=np.int64)

    def entered(self, made: Iterator[AreaWeights]) -> Iterator[AreaWeights]:
        """Note each area and pass it on."""
        for area in made:
            self._sum[area.households] += area.weights
            self._places[area.households] += area.weights > 0
            self._note(area)
            yield area

    def gather(self) -> None:
        """Bring what all processes have noted to the first one."""
        if not several_processes():
            return
        self._sum, self._group_sums = summed(self._sum), summed(self._group_sums)
        self._places = summed(self._places).astype(np.int64)
        noted: list[Any] | None = [None] * place()[1] if place()[0] == 0 else None
        dist.gather_object((self._areas, self._targets), noted, 0)
        for own, targets in (noted or [])[1:]:
            self._areas += own
            self._targets += targets

    def _note(self, a: AreaWeights) -> None:
        p = self._problem
        wanted = p.targets[a.targets]
        initial = of_all(p, a.households, a.initial)
        if p.groups:  # what the area adds to its groups
            both = [p.measures @ initial, p.measures @ of_all(p, a.households, a.weights)]
            for place in p.chain(a.area)[1:]:
                self._group_sums[:, place] += both
        relative = relative_errors(a.estimates, wanted)
        self._targets.append({
            "area": np.full(len(wanted), p.placement.areas[a.area]),
            "level": np.array([p.level(int(i)) for i in a.targets]),
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

    def _above(self) -> dict[str, Any]:
        """Targets of groups and of the nation, and what the areas come to together."""
        p = self._problem
        own = np.flatnonzero(~p.is_of_area)
        place, measure = np.where(p.area[own] < 0, len(p.places), p.area[own]), p.measure[own]
        initial, estimate = self._group_sums[:, place, measure]
        nation = place == len(p.places)
        for values, weights in ((initial, p.initial_weights), (estimate, self._sum)):
            values[nation] = exact_totals(p.measures, weights)[measure[nation]]
        relative = relative_errors(estimate, p.targets[own])
        return {
            "area": [p.place_name(int(i)) for i in own],
            "level": [p.level(int(i)) for i in own],
            "name": [p.names[i] for i in own],
            "target": p.targets[own],
            "initial": initial,
            "estimate": estimate,
            "relative_error": relative,
            "scaled_error": np.abs(relative),
            "multiplier": np.nan,
        }  # fmt: skip

    def tables(self) -> dict[str, pd.DataFrame]:
        """The tables of areas, of targets, of levels, of households and of the nation."""
        import pandas as pd

        p = self._problem
        households = {"id": p.ids, "weight": p.initial_weights, "sum_of_areas": self._sum}
        households |= {"exhaustion": self._sum / p.initial_weights, "areas": self._places}
        nation = np.full(len(p.measure_names), np.nan)
        national = np.flatnonzero(p.area == -1)
        nation[p.measure[national]] = p.targets[national]
        mine = p.is_of_area
        asked = np.bincount(p.measure[mine], weights=p.targets[mine], minlength=len(p.measure_names))
        asked[np.setdiff1d(np.arange(len(asked)), p.measure[mine])] = np.nan
        totals = exact_totals(p.measures, self._sum)
        before = exact_totals(p.measures, p.initial_weights)
        rows = {"measure": p.measure_names, "target": nation, "targets_of_areas": asked, "initial": before}
        frames = [pd.DataFrame(t) for t in (*self._targets, self._above()) if len(t["name"])]
        targets = pd.concat(frames, ignore_index=True)
        return {
            "areas": pd.DataFrame(self._areas),
            "targets": targets,
            "levels": _levels(targets),
            "exhaustion": pd.DataFrame(households),
            "nation": pd.DataFrame({
                **rows, "sum_of_areas": totals, "relative_error": relative_errors(totals, nation),
            }),
        }  # fmt: skip

    def results(self, tables: Mapping[str, pd.DataFrame]) -> dict[str, Any]:
        """Figures of results.json.

        Args:
            tables: As ``tables`` returns them.
        """
        areas, targets = tables["areas"], tables["targets"]
        if self._exact:  # what was not asked to be met
            targets = targets[targets.area.isin(self._problem.placement.areas)]
        errors = targets.relative_error.abs().to_numpy()
        exhaustion = tables["exhaustion"].exhaustion.to_numpy()
        against = tables["nation"].relative_error.abs()
        return {
            "areas": len(areas),
            "households": self._problem.num_households,
            "kept": int((self._sum > 0).sum()),
            "targets": len(errors),
            **error_summary(errors),
            "max_abs_scaled_error": float(targets.scaled_error.max()),
            "levels": tables["levels"].to_dict("records"),
            "pairs": int(self._places.sum()),
            "most_areas": int(self._places.max()),
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


def _levels(targets: pd.DataFrame) -> pd.DataFrame:
    """Errors of the targets of each level."""
    import pandas as pd

    size = targets.target.abs().where(targets.target != 0)
    frame = pd.DataFrame({
        "level": targets.level,
        "before": (targets.initial - targets.target).abs() / size,
        "after": targets.relative_error.abs(),
    })  # fmt: skip
    by = frame.groupby("level", sort=False)
    found = {"targets": by.size(), "initial_mean_are": by.before.mean(), "mean_are": by.after.mean()}
    found |= {"median_are": by.after.median(), "max_are": by.after.max()}
    return pd.DataFrame(found).reset_index()


def _write_weights(
    folder: Path, problem: AreaProblem, made: Iterator[AreaWeights], cfg: CalibrationRun
) -> None:
    """Write the long table, area by area as they come; and each area's own, if asked for.

    Each of several processes writes its part of the table.
    """
    rank, size = place()
    files = _names(problem.placement.areas) if cfg.area.files else ()
    if files:
        (folder / "areas").mkdir(exist_ok=True)
    name = "weights"
    if size > 1:
        (folder / "weights").mkdir(exist_ok=True)
        name = f"weights/part-{rank:05d}"

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
        folder / f"{name}.{cfg.weights_format}", lambda path: streams[cfg.weights_format](path, tables())
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
    """Names of files: the areas' own where those serve and differ, else with a number; 60 letters at most."""
    safe = [re.sub(r"[^\w-]", "_", unicodedata.normalize("NFC", area))[:60] for area in areas]
    lower = [name.lower() for name in safe]
    return [name if lower.count(name.lower()) == 1 else f"{name}_{i}" for i, name in enumerate(safe)]


def _told(r: dict[str, Any], folder: Path) -> list[str]:
    """Return what the user reads at the end of a run."""
    spread = r["exhaustion"]
    levels = "; ".join(
        f"{level['level']} {level['mean_are']:.2%} (largest {level['max_are']:.2%})" for level in r["levels"]
    )
    lines = [
        f"areas           {r['areas']:,}, {r['targets']:,} targets, in {r['seconds']:.1f} s",
        f"error           largest {r['max_abs_scaled_error']:.2e} of its scale; gave way {r['gave_way']:,}",
        f"levels          mean error {levels}",
        f"pairs           {r['pairs']:,} of area and household, one household in {r['most_areas']:,} at most",
        f"support         at least {r['unique_sources']:,} households, effective {r['ess']:,.0f}; one weight"
        f" is at most {r['largest_share']:.2%} of its area",
        f"exhaustion      sum over areas / national weight: {spread['p1']:.3g} (1 %), {spread['p50']:.3g}"
        f" (median), {spread['p99']:.3g} (99 %)",
    ]
    if r["nation_max_are"] is not None:
        lines.append(f"nation          sum of areas within {r['nation_max_are']:.2%} of its targets")
    return [*lines, f"files           {folder}"]
