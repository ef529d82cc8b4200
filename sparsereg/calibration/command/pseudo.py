"""What calibrate.py does with totals of the file's own columns: whether, how, and what they came to."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sparsereg.calibration.command.requirements import judged
from sparsereg.calibration.config import CalibrationRun, HouseholdsProblem, Require, Settings
from sparsereg.calibration.cross_validation import CrossValidation
from sparsereg.calibration.measures import measure
from sparsereg.calibration.problem import CalibrationProblem
from sparsereg.calibration.pseudo_targets import (
    OwnColumns,
    extended,
    full_calibration,
    own_columns,
    selecting,
)
from sparsereg.calibration.reading.households import Source
from sparsereg.calibration.reading.tables import open_table
from sparsereg.calibration.reporting import tables as report
from sparsereg.calibration.solver.calibration import CalibrationResult, calibrate
from sparsereg.calibration.solver.exact import GAVE_WAY
from sparsereg.table_file import write_table

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger(__name__)

_MEASURED = ("max_error", "mean_error", "median_error", "within_1pct", "within_10pct", "ess", "max_ratio")
"""What may be required of weights and is known without anything else."""


@dataclass(frozen=True)
class Fitted:
    """What is fitted in the place of the user's problem.

    Args:
        problem: With the totals of own columns behind the user's targets, if they are used.
        solver: The settings that go with it.
        validation: How the pull of the full calibration was found.
    """

    problem: CalibrationProblem
    solver: Settings
    validation: CrossValidation | None = None


def resolved(cfg: CalibrationRun) -> CalibrationRun:
    """Say what pseudo_targets=auto means: own columns only where every target may be off, none elsewhere.

    What they cost is room in the targets. A user who gave no tolerance has none to give.
    """
    if cfg.pseudo_targets != "auto":
        return cfg
    wanted = (
        isinstance(cfg.problem, HouseholdsProblem)
        and cfg.num_households is not None
        and (cfg.method, cfg.loss) == ("pruning", "relative")
        and cfg.problem.targets is not None
        and "tolerance" in open_table(cfg.problem.targets, encoding=cfg.problem.encoding).names
    )
    return cfg if wanted else replace(cfg, pseudo_targets="none")


def found(cfg: CalibrationRun, source: Source | None, problem: CalibrationProblem) -> OwnColumns | None:
    """Return the totals of own columns, if they are to be used.

    Raises:
        ValueError: They were asked for and would not fit into memory.
    """
    if cfg.pseudo_targets == "none" or source is None:
        return None
    if cfg.pseudo_targets == "own_columns":
        return own_columns(source.households, source.used)
    counts = problem.target_shares > 0
    if not (problem.tolerance[counts] > 0).all():
        log.info(
            "own columns are not used: not every target has a tolerance (pseudo_targets=own_columns does)"
        )
        return None
    try:
        return own_columns(source.households, source.used)
    except ValueError as error:
        log.info("own columns are not used: %s", error)
        return None


def with_own_columns(
    problem: CalibrationProblem, own: OwnColumns | None, solver: Settings, num_households: int | None
) -> Fitted:
    """Add what the whole file says of its own columns to what is fitted."""
    if own is None or num_households is None:
        return Fitted(problem, solver)

    def solve(part: CalibrationProblem, pull: float) -> np.ndarray:
        groups = set() if part.target_groups is None else set(part.target_groups.astype(str))
        factors = {k: v for k, v in (solver.group_multipliers or {}).items() if str(k) in groups}
        full = replace(solver, method="all", chi2=pull, weights="real", group_multipliers=factors)
        return calibrate(part, **vars(full)).weights

    full, validation = full_calibration(problem, solve, solver.seed)
    share = num_households / problem.num_households
    fitted = extended(problem, own, full)
    return Fitted(fitted, replace(solver, **selecting(vars(solver), share)), validation)


def accepted(
    result: CalibrationResult, require: Require, without: Callable[[], CalibrationResult]
) -> tuple[CalibrationResult, bool]:
    """Keep weights of pseudo_targets=auto unless they cost more than the user's tolerance.

    Args:
        result: With own columns.
        require: What the user asks of a run.
        without: Calibrates without them; called only where a target lies beyond its tolerance, or
            something that is required is not reached.

    Returns:
        The result, and whether it is the one with own columns.
    """
    cost = _cost(result, require)
    if not any(cost):
        return result, True
    other = without()
    if all(a <= b for a, b in zip(cost, _cost(other, require), strict=True)):
        return result, True
    log.info(
        "own columns are not used: with them %d targets are beyond their tolerance, %d requirements missed",
        *cost,
    )
    return other, False


def _cost(result: CalibrationResult, require: Require) -> tuple[int, int]:
    """How many targets lie beyond their tolerance, and how many requirements are missed."""
    problem, weights = result.problem, result.weights
    beyond = np.abs(problem.scaled_errors(result.estimates)) > GAVE_WAY
    limits = {key: getattr(require, key) for key in _MEASURED}
    missed = judged(replace(Require(), **limits), measure(problem, weights))
    return int((beyond & (problem.target_shares > 0)).sum()), sum(not row["met"] for row in missed)


def written(
    fitted: Fitted, problem: CalibrationProblem, weights: np.ndarray, folder: Path
) -> tuple[dict[str, Any], pd.DataFrame]:
    """Write what the totals of own columns came to; return their figures and their table."""
    table = report.target_frame(fitted.problem, weights).iloc[problem.num_targets :]
    write_table(folder / "pseudo_targets.csv", table)
    errors = table.relative_error.abs()
    told: dict[str, Any] = {"used": True, "targets": len(table), "mean_are": float(errors.mean())}
    told |= {"median_are": float(errors.median()), "chi2": fitted.solver.chi2}
    told |= {"max_weight_ratio": fitted.solver.max_weight_ratio} | _validated(fitted.validation)
    return told, table


def _validated(validation: CrossValidation | None) -> dict[str, Any]:
    if validation is None:
        return {"full_chi2": None, "cross_validation": None}
    return {"full_chi2": validation.best, "cross_validation": validation.told()}
