"""What is estimated besides the targets: before and after the calibration, and how sure it is."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from sparsereg.calibration.config import CalibrationRun
from sparsereg.calibration.problem import CalibrationProblem
from sparsereg.calibration.reading.design import Variable
from sparsereg.calibration.solver.calibration import CalibrationResult
from sparsereg.calibration.variance import Design, Replicates
from sparsereg.files import write_text
from sparsereg.table_file import write_table

log = logging.getLogger(__name__)

_GAVE_WAY = 1e-6
"""A replicate that misses a target by this share of its scale, while the sample meets it, is named."""


@dataclass(frozen=True, eq=False)
class Estimates:
    """Tables of what was estimated, ready to be written.

    Args:
        problem: What was calibrated.
        variables: One row per statistic before and after; None: nothing was asked for.
        standard_errors: The same with their standard errors; None: they were not asked for.
        replicates: Calibrated replicate weights; None: the method has none.
        gave_way: How many replicates miss targets that the sample meets.
    """

    problem: CalibrationProblem
    variables: pd.DataFrame | None = None
    standard_errors: pd.DataFrame | None = None
    replicates: Replicates | None = None
    gave_way: int = 0

    def write(self, folder: Path, cfg: CalibrationRun) -> dict[str, Any]:
        """Write the files and return what results.json says about them."""
        if self.variables is not None:
            write_table(folder / "variables.csv", self.variables)
        if self.standard_errors is None:
            return {}
        write_table(folder / "standard_errors.csv", self.standard_errors)
        told: dict[str, Any] = {"variance": cfg.variance_method, "replicates": None}
        told["max_cv"] = _largest_cv(self.standard_errors)
        if self.replicates is not None:
            file = f"replicate_weights.{cfg.replicates.format}"
            write_table(folder / file, replicate_frame(self.problem, self.replicates))
            script = r_script(self.replicates, f"weights.{cfg.weights_format}", file)
            write_text(folder / "replicates.R", script)
            told |= {"replicates": self.replicates.weights.shape[1], "replicates_missed": self.gave_way}
        return told


def estimate(result: CalibrationResult, variables: list[Variable], design: Design | None) -> Estimates:
    """Estimate variables before and after a calibration.

    Args:
        result: Of the calibration; with a design, of ``method="calibrate"``.
        variables: What is estimated.
        design: How the sample was drawn; None: no standard errors.

    Raises:
        ValueError: a replicate contradicts targets that must be met.
    """
    if not variables:
        return Estimates(result.problem)
    told = pd.DataFrame([_before_and_after(v, result) for v in variables])
    if design is None:
        return Estimates(result.problem, told)
    replicates, drawn = None, None
    if design.method != "linearized":
        replicates, drawn = result.replicates(design), result.replicates(design, calibrated=False)
    sure = _errors(result, variables, replicates or design)
    before = _errors(result, variables, drawn or design, calibrated=False)
    sure.insert(2, "initial", before.estimate)
    sure.insert(3, "initial_se", before.se)
    gave_way = 0 if replicates is None else _count_misses(result, replicates)
    if gave_way and replicates is not None:
        log.warning(
            "%d of %d replicates cannot meet all targets within the bounds and come as close as they can",
            *(gave_way, replicates.weights.shape[1]),
        )
    return Estimates(result.problem, told, sure, replicates, gave_way)


def _before_and_after(variable: Variable, result: CalibrationResult) -> dict[str, Any]:
    before, after = (_value(variable, w) for w in (result.problem.starting_weights, result.weights))
    change = after / before - 1 if before else float("nan")
    return {
        "name": variable.name,
        "statistic": variable.statistic,
        "initial": before,
        "estimate": after,
        "relative_change": change,
        "targeted": variable.targeted,
    }


def _value(variable: Variable, weights: np.ndarray) -> float:
    total = float(variable.values @ weights)
    if variable.below is None:
        return total
    below = float(variable.below @ weights)
    return total / below if below else float("nan")


def _errors(
    result: CalibrationResult, variables: list[Variable], design: Design | Replicates, calibrated: bool = True
) -> pd.DataFrame:
    """Return one row per variable, in their order."""
    parts = []
    for with_below in (False, True):
        at = [i for i, v in enumerate(variables) if (v.below is not None) == with_below]
        if not at:
            continue
        found = result.standard_errors(
            np.stack([variables[i].values for i in at], axis=1),
            design,
            "ratio" if with_below else "total",
            of=np.stack([_below(variables[i]) for i in at], axis=1) if with_below else None,
            calibrated=calibrated,
        )
        names = {"name": [variables[i].name for i in at], "statistic": [variables[i].statistic for i in at]}
        parts.append(found.assign(**names).set_index(pd.Index(at)))
    return pd.concat(parts).sort_index()


def _below(variable: Variable) -> np.ndarray:
    assert variable.below is not None
    return variable.below


def _largest_cv(table: pd.DataFrame) -> float | None:
    """The largest standard error over its estimate; None: one is not known. A certain zero does not count."""
    sure = (table.estimate == 0) & (table.se == 0)
    largest = float(table.cv[~sure].abs().max(skipna=False)) if not sure.all() else 0.0
    return largest if math.isfinite(largest) else None


def _count_misses(result: CalibrationResult, replicates: Replicates) -> int:
    """How many replicates miss a target that the sample itself meets."""
    linear = result.problem.linear
    met = np.abs(linear.scaled_errors(linear.estimates(result.weights))) <= _GAVE_WAY
    return sum(
        bool((np.abs(linear.scaled_errors(linear.estimates(w)))[met] > _GAVE_WAY).any())
        for w in replicates.weights.T
    )


def replicate_frame(problem: CalibrationProblem, replicates: Replicates) -> pd.DataFrame:
    """Return one row per household of the survey: id, replicate_1, replicate_2, ...

    Args:
        problem: What was calibrated.
        replicates: Its replicates.
    """
    there = problem.starting_weights > 0
    names = [f"replicate_{i + 1}" for i in range(replicates.weights.shape[1])]
    frame = pd.DataFrame(replicates.weights[there], columns=names)
    frame.insert(0, "id", problem.household_ids[there])
    return frame


def r_script(replicates: Replicates, weights: str, file: str) -> str:
    """Return a script for R that makes a design of R's survey of the weights and their replicates.

    Args:
        replicates: The calibrated replicates.
        weights: Name of the file of the weights, in the folder of the script.
        file: Name of the file of the replicates.
    """
    factors = replicates.factors
    same = bool(np.all(factors == factors[0]))
    rscales = f"rep(1, {len(factors)})" if same else "c({})".format(", ".join(map(repr, factors.tolist())))
    scale = repr(float(factors[0])) if same else "1"
    mse = "FALSE" if replicates.center else "TRUE"
    degrees = replicates.degrees_of_freedom
    return _SCRIPT.format(weights=weights, file=file, scale=scale, rscales=rscales, mse=mse, degrees=degrees)


_SCRIPT = """# The calibrated weights and their replicates as a design of R's package survey. In this folder:
#   source("replicates.R"); d <- replicate_design(households, id = "id"); svymean(~income, d)
# where households is the table that was calibrated. Parquet files need the package arrow or
# nanoparquet, those of Stata haven.
library(survey)

read_any <- function(file) {{
  if (grepl("dta$", file)) return(as.data.frame(haven::read_dta(file)))
  if (!grepl("parquet$", file)) return(read.csv(file, colClasses = c(id = "character"), check.names = FALSE))
  reader <- Filter(function(p) requireNamespace(p, quietly = TRUE), c("arrow", "nanoparquet"))
  if (length(reader) == 0) stop("to read ", file, " install.packages('nanoparquet')")
  as.data.frame(getExportedValue(reader[1], "read_parquet")(file))
}}

replicate_design <- function(households, id = "id", folder = ".") {{
  weights <- read_any(file.path(folder, "{weights}"))
  replicates <- read_any(file.path(folder, "{file}"))
  key <- function(x) trimws(format(x, scientific = FALSE, trim = TRUE, digits = 17))
  at <- match(key(households[[id]]), key(replicates$id))
  households <- households[!is.na(at), , drop = FALSE]
  at <- at[!is.na(at)]
  weight <- weights$weight[match(key(replicates$id[at]), key(weights$id))]
  weight[is.na(weight)] <- 0
  svrepdesign(
    data = households, weights = weight, repweights = as.matrix(replicates[at, -1, drop = FALSE]),
    type = "other", combined.weights = TRUE, scale = {scale}, rscales = {rscales}, mse = {mse},
    degf = {degrees}
  )
}}
"""
