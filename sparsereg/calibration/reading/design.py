"""From columns of the household table to the sampling design, and to what is estimated."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import scipy.sparse as sp

from sparsereg.calibration.config import CalibrationRun
from sparsereg.calibration.problem import exact_totals
from sparsereg.calibration.reading.cells import numbers, row
from sparsereg.calibration.reading.households import Source, TargetTable, denominator_table, target_table
from sparsereg.calibration.reading.tables import is_table, read_table
from sparsereg.calibration.reading.unknown_column import no_column, require_column
from sparsereg.calibration.variance import MOST_CELLS, Design
from sparsereg.errors import InputError, did_you_mean

_MOST_BY_DEFAULT = 50
"""Columns that are estimated where nobody says which."""
_FACTORS = (0.5, 2.0)
"""Replicate weights that add up to less or more of the weights are not weights."""


def read_design(cfg: CalibrationRun, source: Source, initial: np.ndarray) -> Design:
    """Return the sampling design that the settings name.

    Args:
        cfg: Settings with a ``variance``.
        source: The household table.
        initial: Initial weights, shape (households,).

    Raises:
        InputError: a column is not there or does not fit; the message names it.
    """
    method, num = str(cfg.variance_method), len(initial)
    if method == "replicates":
        names = _replicate_columns(cfg, source)
        given = _replicates(names, source, initial)
        return Design(method, replicates=given, scale=cfg.replicates.factor(len(names)))
    design = Design(
        method,
        strata=_labels(cfg.strata, "strata", source),
        psu=_labels(cfg.psu, "psu", source),
        fpc=None if cfg.fpc is None else _numbers(cfg.fpc, "fpc", source),
        num_replicates=cfg.num_replicates,
        seed=cfg.seed,
    )
    try:
        units = design.units(initial)
    except ValueError as error:
        raise InputError(f"{source.file}: {error}") from None
    made = {"jackknife": len(units.stratum_of_unit), "bootstrap": cfg.num_replicates}.get(method, 0)
    if made * num > MOST_CELLS:
        raise InputError(
            f"variance={method} would make {made:,} replicates of {num:,} households, more than fit into"
            " memory: take variance=linearized, fewer replicates of the bootstrap, or larger units (psu)"
        )
    return design


def _labels(column: str | None, key: str, source: Source) -> np.ndarray | None:
    """Return a column of labels; refuse missing ones by row."""
    if column is None:
        return None
    require_column(source.households, column, source.file, f"{key} names it")
    series = source.households[column]
    absent = series.isna().to_numpy(dtype=bool)
    if absent.any():
        at = int(absent.argmax())
        raise InputError(f"{source.file}: {key}={column} is missing in row {row(at)}")
    return np.asarray(series.astype(object).to_numpy() if series.dtype == "category" else series.to_numpy())


def _numbers(column: str, key: str, source: Source) -> np.ndarray:
    require_column(source.households, column, source.file, f"{key} names it")
    return numbers(source.households, column, source.file)


def _replicate_columns(cfg: CalibrationRun, source: Source) -> list[str]:
    """Return the names of the columns of replicate weights, in the order of the table or as listed."""
    known = [c for c in source.households.columns if c not in source.used]
    if cfg.replicates.columns is not None:
        names = list(cfg.replicates.columns)
        for name in names:
            require_column(source.households, name, source.file, "replicates.columns names it")
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise InputError(f"replicates.columns has {twice[0]!r} twice")
        where = "replicates.columns"
    else:
        pattern = str(cfg.replicate_pattern)
        if any(sign in pattern for sign in "*?["):
            names = [c for c in known if fnmatch.fnmatchcase(c, pattern)]
        else:
            names = [c for c in known if re.fullmatch(re.escape(pattern) + r"[_.]?\d+", c)]
            if pattern in known and names:
                raise InputError(
                    f"variance=replicates:{pattern}: {pattern} is a column of {source.file} and the beginning"
                    f" of {names[0]}: give a pattern such as {pattern.rstrip('0123456789')}*, or"
                    " replicates.columns=[...]"
                )
        where = f"variance=replicates:{pattern}"
    if len(names) < 2:
        found = f"only {names[0]!r}" if names else "no column"
        hint = "" if names else did_you_mean(where.partition(":")[2], known)
        raise InputError(
            f"{where}: {found} of {source.file} fits, but replicates need at least 2: give a pattern such as"
            f" wt*, a prefix that numbers follow, or replicates.columns=[...]{hint}"
        )
    return names


def _replicates(names: Sequence[str], source: Source, initial: np.ndarray) -> np.ndarray:
    """Return the replicate weights, shape (households, replicates), checked against the weights."""
    given = np.stack([numbers(source.households, name, source.file) for name in names], axis=1)
    negative = np.argwhere(given < 0)
    if len(negative):
        at, column = negative[0]
        raise InputError(
            f"{source.file}: the replicate weight {names[column]} must be >= 0, but it is"
            f" {given[at, column]:g} in row {row(int(at))}"
        )
    given = np.where(initial[:, None] > 0, given, 0.0)  # of initial weight 0: not in the survey
    sums, whole = given.sum(axis=0), float(initial.sum())
    if (sums == 0).any():
        raise InputError(f"{source.file}: {names[int(sums.argmin())]} is zero for every household")
    share = float(sums.mean()) / whole
    if not _FACTORS[0] <= share <= _FACTORS[1]:
        raise InputError(
            f"{source.file}: the replicate weights {names[0]} to {names[-1]} add up to {sums.mean():,.6g}"
            f" each, the initial weights to {whole:,.6g}: they do not fit; factors are to be multiplied by"
            " the weight"
        )
    return np.asarray(given)


@dataclass(frozen=True, eq=False)
class Variable:
    """Something to estimate: a weighted total of ``values``, or over that of ``below``.

    ``targeted``: whether targets sum the same column, or count the same.
    """

    name: str
    statistic: str
    values: np.ndarray
    below: np.ndarray | None = None
    targeted: bool = False


def read_variables(cfg: CalibrationRun, source: Source, initial: np.ndarray) -> list[Variable]:
    """Return what ``report.variables`` names: the total and the mean of each, or its ratio.

    Args:
        cfg: The settings; without ``report.variables`` all columns of numbers are taken.
        source: The tables.
        initial: Initial weights, shape (households,).

    Raises:
        InputError: there is no such column, or it is not numeric; the message names it.
    """
    table = _variable_table(cfg, source)
    filled = [m for m in (*table.measures, *table.of) if m and cfg.missing_in.get(m, cfg.missing) == "zero"]
    values = _dense(source.totals(table, zero=filled)[0])
    ratio = table.is_ratio
    below = denominator_table(table)
    wheres = zip(below.wheres, table.wheres, table.measures, ratio, strict=True)
    below = replace(below, wheres=tuple(of if r else w if m else "" for of, w, m, r in wheres))
    denominators = _dense(source.totals(below, zero=filled)[0])
    zero = exact_totals(sp.csr_array(denominators), initial) == 0
    if zero.any():
        name = table.names[int(zero.argmax())]
        raise InputError(f"{table.file}: the denominator of {name!r} is zero with the initial weights")
    found, targeted = [], [subject in source.targeted for subject in table.subjects]
    for i, name in enumerate(table.names):
        if not ratio[i]:
            found.append(Variable(name, "total", values[i], None, targeted[i]))
        if ratio[i] or table.measures[i] or table.wheres[i]:  # the mean of a count is a share
            kind = "ratio" if ratio[i] else "mean"
            found.append(Variable(name, kind, values[i], denominators[i], targeted[i]))
    return found


def _dense(matrix: sp.csr_array) -> np.ndarray:
    return np.asarray(matrix.toarray(), dtype=np.float64)


def _variable_table(cfg: CalibrationRun, source: Source) -> TargetTable:
    given = cfg.report.variables
    if isinstance(given, str) and is_table(given) and given not in source.names:
        table = read_table(given, as_text=True)
        return target_table(table, given, with_values=False)
    names = _numeric_columns(cfg, source) if given is None else [given] if isinstance(given, str) else given
    rows = [_entry(name, source) for name in dict.fromkeys(names)]
    return target_table(pd.DataFrame(rows), "report.variables", with_values=False)


def _entry(text: str, source: Source) -> dict[str, str]:
    """Return an entry of the list: a column, or two for a ratio."""
    above, slash, below = (part.strip() for part in text.partition("/"))
    if text in source.known or not slash:
        above, below = text.strip(), ""
    elif not (above and below):
        raise InputError(f"report.variables: a ratio is of two columns, as in income/rent, got {text!r}")
    for name in (above, below):
        if name and name not in source.known:
            raise no_column(f"report.variables: {source.file}", name, source.known)
    units = {"unit": _unit(above, source), "of_unit": _unit(below, source) if below else ""}
    return {"name": text.strip(), "measure": above, "of": below, **units}


def _unit(column: str, source: Source) -> str:
    """Return whose column it is; of two of the same name that of the households."""
    return source.units[0 if column in source.names else 1]


def _numeric_columns(cfg: CalibrationRun, source: Source) -> list[str]:
    """Return the columns of numbers without a task of their own and without missing values."""
    used = {*source.used, cfg.strata, cfg.psu, cfg.fpc, cfg.unit_factor}
    if cfg.variance_method == "replicates":
        used |= set(_replicate_columns(cfg, source))
    tables = [source.households, *([] if source.persons is None else [source.persons.table])]
    used |= set(() if source.persons is None else source.persons.used)
    names = [
        name
        for table in tables
        for name, series in table.items()
        if name not in used and pd.api.types.is_numeric_dtype(series) and not series.isna().any()
    ]
    if not names:
        raise InputError(
            f"{source.file} has no column of numbers to estimate: name some by report.variables=[...]"
        )
    return [str(name) for name in dict.fromkeys(names)][:_MOST_BY_DEFAULT]
