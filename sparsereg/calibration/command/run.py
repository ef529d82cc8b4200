"""The work of calibrate.py: read, check, calibrate, hold out, report."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from omegaconf import OmegaConf

from sparsereg import interruption
from sparsereg.calibration import holdout
from sparsereg.calibration.command import estimates, pseudo
from sparsereg.calibration.command.checkpoint import Moments, Saver, fingerprint
from sparsereg.calibration.command.provenance import provenance_of
from sparsereg.calibration.command.requirements import judged
from sparsereg.calibration.config import CalibrationRun, Settings
from sparsereg.calibration.findings import KINDS, Finding, check, gave_way, in_order, set_aside, summary
from sparsereg.calibration.measures import measure, relative_errors
from sparsereg.calibration.problem import CalibrationProblem
from sparsereg.calibration.pseudo_targets import OwnColumns
from sparsereg.calibration.reading.design import Variable, read_design, read_variables
from sparsereg.calibration.reading.households import BuiltProblem, Source
from sparsereg.calibration.reading.levels import plural
from sparsereg.calibration.reading.missing import Missing
from sparsereg.calibration.reading.sources import read_years, touchable
from sparsereg.calibration.reading.start import read_start
from sparsereg.calibration.reporting import tables as report
from sparsereg.calibration.reporting.page.page import Contents, write_page
from sparsereg.calibration.reporting.recorder import Recorder
from sparsereg.calibration.solver.calibration import Calibration, CalibrationResult, calibrate
from sparsereg.calibration.solver.refit import TOLERANCE
from sparsereg.calibration.solver.selection import method_of
from sparsereg.calibration.variance import Design
from sparsereg.errors import FellShort, InputError, wrong_input
from sparsereg.files import new_version, write_json, write_text
from sparsereg.provenance import Provenance
from sparsereg.settings import plain
from sparsereg.table_file import write_table

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Task:
    """What is to be calibrated, and what is known about it before.

    Args:
        problem: The problem, without what ``untouchable=drop`` leaves out.
        findings: Of the checks.
        dropped: Names of the targets that are left out.
        columns: Columns of the households that settings name.
        variables: What is estimated besides the targets.
        design: How the sample was drawn; None: no standard errors are asked for.
        own: Totals of the household table's own columns, which a selection should keep, too.
        labels: Where targets come from, by column and name.
        began: Time at which reading began.
    """

    problem: CalibrationProblem
    findings: list[Finding]
    dropped: list[str]
    columns: dict[str, np.ndarray]
    variables: list[Variable]
    design: Design | None
    own: OwnColumns | None = None
    labels: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    began: float = 0.0


def run(cfg: CalibrationRun, outputs: Path) -> Path:
    """Calibrate one year, everywhere at once, and return the path of results.json.

    Args:
        cfg: of calibrate.py.
        outputs: Where the folder of the run is made.

    Raises:
        InputError: Something that the user gave cannot be used; nothing has been written then.
        FellShort: All is written, but it is not what was required.
    """
    with wrong_input():
        cfg = with_method(cfg)
        (task,) = read_tasks(cfg).values()
        provenance = provenance_of(cfg)
        ready = prepared(task, cfg, provenance)
        folder = new_version(outputs)
    results = carry_out(ready, folder).results
    if short := [row["text"] for row in results["required"] if not row["met"]]:
        raise FellShort(folder / "results.json", short)
    return folder / "results.json"


@dataclass(frozen=True, eq=False)
class Prepared:
    """A calibration that can begin.

    Args:
        task: What is to be calibrated, with all that was found.
        cfg: The settings.
        solver: Those of the solver, columns in the place of their names.
        fitted: What is calibrated, with totals of own columns.
        ahead: Weights to start from, if there are any.
        calibration: About to begin, or where a checkpoint left it.
        saver: Of its checkpoints.
        moments: Totals at moments so far.
        folds: Groups that are left out together.
        provenance: Where the results come from.
        began: Time at which the run began, and at which all had been read.
    """

    task: Task
    cfg: CalibrationRun
    solver: Settings
    fitted: pseudo.Fitted
    ahead: np.ndarray | None
    calibration: Calibration
    saver: Saver
    moments: Moments
    folds: list[tuple[str, ...]]
    provenance: Provenance
    began: tuple[float, float]


def prepared(
    task: Task,
    cfg: CalibrationRun,
    provenance: Provenance,
    ahead: np.ndarray | None = None,
) -> Prepared:
    """Check all that can be checked before anything is written.

    Args:
        task: What is to be calibrated.
        cfg: The settings.
        provenance: Where the results come from.
        ahead: Weights to start from, instead of those that ``start`` names.
    """
    asked = cfg.holdout
    folds = holdout.folds_of(task.problem, asked.groups, asked.folds, cfg.seed)
    now = time.perf_counter()
    solver = with_columns(replace(cfg.solver(), device=device_of(cfg.device)), task.columns)
    fitted = pseudo.with_own_columns(task.problem, task.own, solver, cfg.num_households)
    if ahead is None and cfg.start is not None:
        ahead = read_start(cfg.start, fitted.problem)
    calibration = Calibration(fitted.problem, cfg.num_households, fitted.solver, start=ahead)
    aside = calibration.set_aside
    more = set_aside(task.problem, aside[aside < task.problem.num_targets])
    if calibration.is_exact:
        more += gave_way(task.problem, calibration.exact())
    task = replace(task, findings=in_order([*task.findings, *more]))
    saver = Saver(calibration, fingerprint(task.problem, cfg), cfg.checkpoint_seconds)
    moments = saver.load(Path(cfg.ckpt_path)) if cfg.ckpt_path else []
    began = (task.began, now)
    return Prepared(task, cfg, solver, fitted, ahead, calibration, saver, moments, folds, provenance, began)


@dataclass(frozen=True, eq=False)
class Ended:
    """A calibration whose files are written.

    Args:
        result: The weights.
        results: What results.json holds.
        targets: What targets.csv holds.
    """

    result: CalibrationResult
    results: dict[str, Any]
    targets: pd.DataFrame


def carry_out(ready: Prepared, folder: Path) -> Ended:
    """Calibrate and write all files; return the weights, what results.json holds, and the targets.

    Args:
        ready: The calibration.
        folder: Where the files are written; it is there.
    """
    task, cfg, calibration = ready.task, ready.cfg, ready.calibration
    _announce(task, cfg, folder)
    write_text(folder / "config.yaml", OmegaConf.to_yaml(plain(cfg)))
    if task.findings:
        write_table(folder / "findings.csv", report.finding_frame(task.findings))
    events = folder if cfg.tensorboard else None
    with Recorder(task.problem, events, cfg.log_moments, calibration.history, ready.moments) as recorder:
        _drive(calibration, recorder, ready.saver, folder / "checkpoint.pt")
        with wrong_input():  # the penalty shut every household, or the bounds cannot hold the total
            result = calibration.result().of(task.problem)
            if task.own is not None and cfg.pseudo_targets == "auto":
                result, ready = _within_tolerance(ready, result)
                task = ready.task
        if not calibration.is_exact and result.kkt_violation is not None and result.kkt_violation > TOLERANCE:
            log.info(
                "refit: violates the optimality conditions by %.1e (%g is exact); more rounds gained little",
                result.kkt_violation,
                TOLERANCE,
            )
        solved = time.perf_counter()
        with wrong_input():  # a replicate may contradict hard targets
            estimated = estimates.estimate(result, task.variables, task.design)
        recorder.finish(result.loss, result.weights)
    results = _figures(ready, result, solved)
    own = None
    if task.own is not None:
        results["pseudo_targets"], own = pseudo.written(ready.fitted, task.problem, result.weights, folder)
    elif cfg.pseudo_targets == "auto":
        results["pseudo_targets"] = {"used": False}
    left_out = _hold_out(task, ready.folds, cfg, folder) if ready.folds else None
    results["holdout"] = held_out = None if left_out is None else holdout.summarise(left_out)
    results["held_out_mean"] = None if held_out is None else held_out["mean_are"]
    results["held_out_median"] = None if held_out is None else held_out["median_are"]
    results["held_out_large_mean"] = None if held_out is None else held_out["large_mean_are"]
    targets, groups = _write_files(folder, result, recorder, cfg, task.labels)
    results["worst_targets"] = report.worst_targets(targets)
    results |= estimated.write(folder, cfg)
    results["required"] = judged(cfg.require, results)
    results["provenance"] = ready.provenance.to_dict()
    results["total_seconds"] = time.perf_counter() - ready.began[0]
    contents = Contents(
        results, plain(cfg), _with_prices(targets), groups, result.to_frame(),
        task.problem.starting_weights, task.findings, left_out,
        estimated.variables, estimated.standard_errors, own,
    )  # fmt: skip
    write_page(folder / "report.html", contents)
    write_json(folder / "results.json", results)
    (folder / "checkpoint.pt").unlink(missing_ok=True)  # there is nothing left to continue
    for line in _told(results, folder, cfg.problem.unit):
        print(line)
    return Ended(result, results, targets)


def _within_tolerance(ready: Prepared, result: CalibrationResult) -> tuple[CalibrationResult, Prepared]:
    """Give up own columns, which nobody asked for, where they cost more than the user's tolerance."""
    task, cfg = ready.task, ready.cfg

    def without() -> CalibrationResult:
        return calibrate(task.problem, cfg.num_households, start=ready.ahead, **vars(ready.solver))

    result, used = pseudo.accepted(result, cfg.require, without)
    if used:
        return result, ready
    plainly = pseudo.Fitted(task.problem, ready.solver)
    return result, replace(ready, task=replace(task, own=None), fitted=plainly)


def _figures(ready: Prepared, result: CalibrationResult, solved: float) -> dict[str, Any]:
    """What results.json says of the weights and of how they were found."""
    task, cfg = ready.task, ready.cfg
    results = measure(task.problem, result.weights)
    results |= {
        "loss": result.loss,
        "kkt_violation": result.kkt_violation,
        "optimality": result.kkt_violation,
    }
    results |= {"seconds": solved - ready.began[1], "steps": result.steps}
    results |= _bounds_told(result, ready.fitted.solver)
    results |= _settings_told(cfg)
    results["integer_weights"] = _rounding_told(result)
    results["missing_households"] = max(0, (cfg.num_households or 0) - results["kept"])
    results["zero_initial_weights"] = int((task.problem.starting_weights == 0).sum())
    return results | _measure_findings(task)


def read_tasks(cfg: CalibrationRun) -> dict[int | None, Task]:
    """Read the problem of each year, over one matrix, and refuse what cannot be calibrated."""
    began = time.perf_counter()
    missing = Missing(cfg.missing, dict(cfg.missing_in))
    choice = plain(cfg.problem)
    found = read_years(choice, columns_named(cfg), missing, _columns_kept(cfg), cfg.targets)
    return {year: _task(built, cfg, began) for year, built in found.items()}


def _task(built: BuiltProblem, cfg: CalibrationRun, began: float) -> Task:
    problem, hints, dropped = touchable(built, cfg.untouchable)
    _check_budget(problem, cfg.num_households)
    found = check(problem, cfg.num_households, cfg.max_weight_ratio, cfg.hold_total, hints)
    variables, design = _asked(cfg, built.source, problem.starting_weights)
    own = pseudo.found(cfg, built.source, problem)
    return Task(problem, found, dropped, built.columns, variables, design, own, built.labels, began)


def _asked(
    cfg: CalibrationRun, source: Source | None, initial: np.ndarray
) -> tuple[list[Variable], Design | None]:
    """Read what is to be estimated besides the targets, and how the sample was drawn."""
    if cfg.report.variables is None and cfg.variance is None:
        return [], None
    if source is None:
        key = "variance" if cfg.variance else "report.variables"
        raise InputError(f"{key} needs problem.weights=W.csv, a table with its columns")
    design = None if cfg.variance is None else read_design(cfg, source, initial)
    return read_variables(cfg, source, initial), design


def _columns_kept(cfg: CalibrationRun) -> list[str] | None:
    """Return the columns of households that are used beside the targets; None: it may be any."""
    any_column = cfg.variance is not None and cfg.report.variables is None
    if any_column or cfg.variance_method == "replicates" or cfg.pseudo_targets != "none":
        return None
    return [name for name in (cfg.strata, cfg.psu, cfg.fpc) if name is not None]


def columns_named(cfg: CalibrationRun) -> list[str]:
    """Return the columns of the household table that settings name."""
    named: list[Any] = [cfg.unit_factor]
    for bounds in (cfg.bounds, cfg.weight_bounds):
        named += list(bounds) if isinstance(bounds, list | tuple) else []
    return list(dict.fromkeys(name for name in named if isinstance(name, str)))


def with_columns(solver: Settings, columns: dict[str, np.ndarray]) -> Settings:
    """Put the columns themselves in the place of their names."""

    def values(given: Any) -> Any:
        if isinstance(given, list | tuple):
            return tuple(values(side) for side in given)
        return columns[given] if isinstance(given, str) and given in columns else given

    names = ("bounds", "weight_bounds", "unit_factor")
    return replace(solver, **{name: values(getattr(solver, name)) for name in names})


def _check_budget(problem: CalibrationProblem, num_households: int | None) -> None:
    if num_households is not None and num_households > problem.num_households:
        raise InputError(
            f"num_households={num_households}: there are only {problem.num_households:,} households"
        )


def _announce(task: Task, cfg: CalibrationRun, folder: Path) -> None:
    """Say what will be done, and what is known not to work before it is done."""
    p = task.problem
    left = "all" if cfg.method in ("all", "calibrate") else "as many as lambda_l0 leaves"
    kept = left if cfg.num_households is None else f"{cfg.num_households:,}"
    log.info(
        "%s targets, %s %s, %s non-zeros; keep %s by %s; on %s; files in %s",
        f"{p.num_targets:,}",
        f"{p.num_households:,}",
        plural(cfg.problem.unit),
        f"{p.matrix.nnz:,}",
        kept,
        cfg.method,
        device_of(cfg.device),
        folder,
    )
    if task.dropped:
        log.warning(
            "left out, because no %s touches them: %s", cfg.problem.unit, ", ".join(task.dropped[:10])
        )
    for line in summary(task.findings, most=3):
        log.warning("%s", line)


def _settings_told(cfg: CalibrationRun) -> dict[str, Any]:
    keys = ("method", "num_households", "lambda_l0", "lambda_l2", "max_weight_ratio", "epochs", "seed")
    return {("requested" if key == "num_households" else key): getattr(cfg, key) for key in keys}


def _measure_findings(task: Task) -> dict[str, Any]:
    counts = {kind: sum(f.kind == kind for f in task.findings) for kind in KINDS}
    return {"findings": {kind: n for kind, n in counts.items() if n}, "dropped_targets": len(task.dropped)}


def _bounds_told(result: CalibrationResult, solver: Settings) -> dict[str, Any]:
    """Return how many weights are at a bound, and what an exact calibration could not meet."""
    exact = result.exact
    if exact is None:
        if solver.max_weight_ratio is None:
            return {"bounds_hit": 0}
        at = result.weights >= solver.max_weight_ratio * result.problem.starting_weights * (1 - 1e-9)
        return {"bounds_hit": int((at & result.selected).sum())}
    names = result.problem.names
    proofs = [{**c, "targets": [names[i] for i in c["targets"]]} for c in exact.certificate]
    return {"bounds_hit": exact.bounds_hit, "gave_way": len(exact.gave_way), "certificate": proofs or None}


def _rounding_told(result: CalibrationResult) -> dict[str, Any] | None:
    """Return what whole weights cost: errors before, the largest change of a weight, who fell to zero."""
    real, problem = result.real_weights, result.problem
    if real is None:
        return None
    errors = np.abs(relative_errors(problem.estimates(real), problem.targets))
    scaled = np.abs(problem.scaled_errors(problem.estimates(real)))
    return {
        "max_abs_scaled_error_real": float(scaled.max()),
        "mean_are_real": float(np.nanmean(errors)) if not np.isnan(errors).all() else None,
        "largest_change": float(np.abs(result.weights - real).max()),
        "left_with_zero": int(((real > 0) & (result.weights == 0)).sum()),
    }


def _hold_out(task: Task, folds: list[tuple[str, ...]], cfg: CalibrationRun, folder: Path) -> pd.DataFrame:
    def settings(part: CalibrationProblem) -> Settings:
        groups = None if part.target_groups is None else set(part.target_groups)
        return with_columns(replace(cfg.solver(groups), device=device_of(cfg.device)), task.columns)

    def solve(part: CalibrationProblem) -> np.ndarray:
        fitted = pseudo.with_own_columns(part, task.own, settings(part), cfg.num_households)
        return calibrate(fitted.problem, cfg.num_households, **vars(fitted.solver)).weights

    table = holdout.hold_out(task.problem, folds, solve)
    write_table(folder / "holdout.csv", table)
    return table


def _write_files(
    folder: Path,
    result: CalibrationResult,
    recorder: Recorder,
    cfg: CalibrationRun,
    labels: Mapping[str, Mapping[str, str]],
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Write the tables and pictures and return those of the targets and of their groups."""
    problem, weights = result.problem, result.weights
    multipliers = None if result.exact is None else result.exact.multipliers
    targets = report.target_frame(problem, weights, multipliers)
    targets = targets.assign(**{column: targets.name.map(dict(by)) for column, by in labels.items()})
    kept = result.to_frame()
    write_table(folder / f"weights.{cfg.weights_format}", kept)
    write_table(folder / "targets.csv", targets)
    groups = report.group_frame(targets, problem, weights)
    write_table(folder / "groups.csv", groups)
    if "level" in targets:
        by_level = report.group_frame(targets.assign(group=targets.level), problem, weights)
        write_table(folder / "levels.csv", by_level.rename(columns={"group": "level"}))
    write_table(folder / "calibration_log.csv", report.log_frame(problem, recorder.totals))
    if cfg.plots:
        from sparsereg.calibration.reporting.plots import plot_all

        plot_all(folder / "plots", targets, kept, recorder.history)
    return targets, groups


def _with_prices(targets: pd.DataFrame) -> pd.DataFrame:
    """What a percent of each target costs, where that is known."""
    if "multiplier" not in targets:
        return targets
    return targets.assign(price=targets.multiplier * targets.scale / 100)


def _told(r: dict[str, Any], folder: Path, unit: str) -> list[str]:
    """Return what the user reads at the end of a run."""

    def share(value: float | None) -> str:
        return "-" if value is None else f"{value:.4%}" if value < 0.01 else f"{value:.2%}"

    lines = [
        f"kept            {r['kept']:,} of {r['households']:,} {plural(unit)}, in {r['seconds']:.1f} s",
        f"error           mean {share(r['mean_are'])}, median {share(r['median_are'])},"
        f" largest {share(r['max_are'])}",
        f"targets         {share(r['within_1pct'])} within 1 %, {share(r['within_10pct'])} within 10 %",
        f"sample size     effective {r['ess']:,.0f}, weighting effect {r['weighting_effect']:.3f}",
        f"weights         median {r['median_weight']:,.6g}, largest {r['max_weight']:,.6g},"
        f" sum {r['total_weight']:,.6g} (initially {r['initial_total_weight']:,.6g})",
    ]
    if r["untouched_targets"]:
        lines.append(f"untouched       {r['untouched_targets']} targets that no kept {unit} touches")
    if r.get("gave_way"):
        lines.append(
            f"gave way        {r['gave_way']} targets that cannot be met with the others: findings.csv"
        )
    worst = ", ".join(f"{w['name']} ({_size_of_error(w)})" for w in r["worst_targets"][:3])
    lines.append(f"worst targets   {worst}")
    if r["holdout"]:
        h = r["holdout"]
        lines.append(
            f"left out        {h['targets']:,} targets of {len(h['groups'])} groups: {share(h['mean_are'])}"
            f" with weights made without them, {share(h['initial_mean_are'])} with the initial weights"
        )
    return [*lines, f"files           {folder}"]


def _size_of_error(target: dict[str, Any]) -> str:
    if target["relative_error"] is not None:
        return f"{target['relative_error']:+.2%}"
    error = target["scaled_error"]
    return "no estimate" if error is None else f"{error:+.3g} of its scale"


def with_method(cfg: CalibrationRun) -> CalibrationRun:
    """Say what method=auto means, and refuse a method without what decides how many are kept."""
    cfg = replace(cfg, method=method_of(cfg.method, cfg.num_households, cfg.lambda_l0))
    if cfg.num_households is None and cfg.method == "hard_concrete" and cfg.lambda_l0 == 0:
        raise InputError(
            "nothing decides how many households to keep: give num_households=K or lambda_l0 > 0"
        )
    return pseudo.resolved(cfg)


def device_of(name: str) -> str:
    """Return where to compute; "auto" is a GPU if there is one.

    Raises:
        InputError: This machine does not have that device.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda"):
        index = name.partition(":")[2] or "0"
        if not index.isdigit() or int(index) >= torch.cuda.device_count():
            raise InputError(f"device={name}: this machine has {torch.cuda.device_count()} CUDA devices")
    return name


def _drive(calibration: Calibration, recorder: Recorder, saver: Saver, checkpoint: Path) -> None:
    """Run the selection to its end; leave a checkpoint now and then, and when asked to end."""
    interruption.continue_with(lambda given: _going_on(given, checkpoint))
    with interruption.held():
        try:
            if not calibration.history:
                calibration.report(recorder.record)
            while not calibration.done:
                calibration.step()
                calibration.report(recorder.record)
                saver.save_if_due(checkpoint, recorder.totals)
                interruption.check()
        except (interruption.Interrupted, KeyboardInterrupt):
            saver.save(checkpoint, recorder.totals)
            raise


def _going_on(given: list[str], checkpoint: Path) -> list[str] | None:
    """Return the arguments that continue from a checkpoint, if there is one."""
    if not checkpoint.is_file():
        return None
    return [*(a for a in given if not a.startswith("ckpt_path=")), f"ckpt_path={checkpoint}"]
