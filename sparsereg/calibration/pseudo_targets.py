"""Targets that the file sets itself: totals of its own columns, so that a small file stands for a large one.

A small selection that meets its targets may be worse than the initial weights on everything else. So the
whole file is calibrated first, with a real pull towards the initial weights, and what it then says of itself
becomes soft targets of the selection: how many households have each pair of values of two columns with few
different values, and the sums of every column of numbers by each value of those. Columns of numbers have few
values, too: negative, zero, and the thirds of the positive ones. What the columns span is kept; what has
nothing to do with any column is not. How strong the pull is, is cross-validated.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.sparse as sp

from sparsereg.calibration.cross_validation import CrossValidation, Solve, cross_validate
from sparsereg.calibration.problem import CalibrationProblem, exact_totals

if TYPE_CHECKING:
    import pandas as pd

MOST_VALUES = 60
"""Different values up to which a column says to which group a household belongs."""
CLASSES = 3
"""Classes of equal size that the positive values of a column of numbers are cut into."""
SMALLEST_CELL = 3
"""Households below which a total is of single ones."""
FULL_CELL = 30
"""Households from which a total counts in full."""
SHARE = 0.3
"""What all of them count together, as a share of the user's own targets."""
PULL = 0.001
"""``chi2`` of the selection and its refit; of the full calibration where that is not cross-validated."""
PULLS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Among which that of the full calibration is cross-validated."""
MOST_VALIDATED = 3_000_000
"""Entries of the targets' rows up to which it is."""
AIM = 0.5
"""Share of a tolerance within which a target is fitted beside them, so that it ends within the whole."""
ROOM = 4.0
"""Largest weight, as a multiple of the initial weight over the share of households that is kept."""
MOST_ENTRIES = 200_000_000
"""Entries of the totals' rows, 12 bytes each, beyond which a table has too many columns."""
GROUP = "own columns"


@dataclass(frozen=True, eq=False)
class OwnColumns:
    """Totals of a household table's own columns.

    Args:
        names: Of the totals.
        rows: Totals x households.
    """

    names: tuple[str, ...]
    rows: sp.csr_array

    @property
    def cells(self) -> np.ndarray:
        """How many households each total is about, shape (totals,)."""
        return np.diff(self.rows.indptr)

    def values(self, weights: np.ndarray) -> np.ndarray:
        """The totals with some weights, float64, shape (totals,)."""
        return exact_totals(self.rows, weights)


def own_columns(table: pd.DataFrame, leave_out: Collection[str] = ()) -> OwnColumns:
    """Find the totals of a table's own columns.

    Args:
        table: One row per household. Columns of texts, of true and false, and of whole numbers with at most
            ``MOST_VALUES`` different values are groups; other columns of numbers are summed, and their
            classes are groups as long as all of it fits into memory. Columns of texts with more different
            values, of one value, and of whole numbers that are all different, as ids, are left alone. Missing
            values are a value of their own in groups and add nothing to sums.
        leave_out: Columns that are weights or ids.

    Returns:
        Totals of cells of at least ``SMALLEST_CELL`` households.

    Raises:
        ValueError: The totals would not fit into memory.
    """
    groups, numbers = _kinds(table.drop(columns=[c for c in leave_out if c in table.columns]))
    classes = {name: _classes(values) for name, values in numbers.items()}
    if _combined(len(groups) + len(classes), len(numbers)) * len(table) <= MOST_ENTRIES:
        groups |= {name: found for name, found in classes.items() if len(found.labels) > 1}
    combined = _combined(len(groups), len(numbers))
    if combined * len(table) > MOST_ENTRIES:
        raise ValueError(
            f"pseudo_targets=own_columns: {combined:,} combinations of {len(groups) + len(numbers)} columns"
            f" for {len(table):,} households are more than fit into memory: leave columns out of the table"
        )
    names: list[str] = []
    parts: list[sp.csr_array] = []

    def add(rows: sp.csr_array, labels: list[str]) -> None:
        rows.eliminate_zeros()
        large = np.flatnonzero(np.diff(rows.indptr) >= SMALLEST_CELL)
        names.extend(labels[i] for i in large)
        parts.append(rows[large])

    for (a, one), (b, two) in itertools.combinations(groups.items(), 2):
        cells, inverse = np.unique(np.stack([one.codes, two.codes]), axis=1, return_inverse=True)
        labels = [f"{a} {one.labels[i]}, {b} {two.labels[j]}" for i, j in cells.T]
        add(_sums_by(np.ravel(inverse), np.ones(len(table)), len(labels)), labels)
    for a, one in groups.items():
        for b, values in numbers.items():
            labels = [f"{b} of {a} {label}" for label in one.labels]
            add(_sums_by(one.codes, values, len(labels)), labels)
    if not parts:
        return OwnColumns((), sp.csr_array((0, len(table))))
    return OwnColumns(tuple(names), sp.csr_array(sp.vstack(parts)))


@dataclass(frozen=True, eq=False)
class _Groups:
    """Which value of a column each household has, as numbers from 0, and the values as texts."""

    codes: np.ndarray
    labels: list[str]


def _kinds(table: pd.DataFrame) -> tuple[dict[str, _Groups], dict[str, np.ndarray]]:
    """The columns that say to which group a household belongs, and those that are summed."""
    import pandas as pd

    groups: dict[str, _Groups] = {}
    numbers: dict[str, np.ndarray] = {}
    for name in table.columns:
        column = table[name]
        codes, values = pd.factorize(column, sort=False, use_na_sentinel=False)
        if 1 < len(values) <= MOST_VALUES and not _has_fractions(column):
            labels = ["missing" if pd.isna(v) else str(v) for v in values]
            groups[str(name)] = _Groups(np.asarray(codes), labels)
        elif len(values) > 1 and pd.api.types.is_numeric_dtype(column) and not _is_id(column, len(values)):
            found = np.nan_to_num(column.to_numpy(dtype=np.float64, na_value=np.nan))
            if np.isfinite(found).all():
                numbers[str(name)] = found
    return groups, numbers


def _combined(num_groups: int, num_numbers: int) -> int:
    """How many pairs of groups there are, and of a group with a column of numbers."""
    return num_groups * (num_groups - 1) // 2 + num_groups * num_numbers


def _classes(values: np.ndarray) -> _Groups:
    """Negative, zero, and classes of equal size of the positive values."""
    positive = values[values > 0]
    edges = np.unique(np.quantile(positive, np.arange(1, CLASSES) / CLASSES)) if len(positive) else positive
    codes = np.where(values > 0, 2 + np.searchsorted(edges, values), np.where(values < 0, 0, 1))
    above = [f"above {edge:.6g}" for edge in (0.0, *edges)]
    found, codes = np.unique(codes, return_inverse=True)
    return _Groups(np.ravel(codes), [("negative", "zero", *above)[i] for i in found])


def _has_fractions(column: pd.Series) -> bool:
    import pandas as pd

    if not pd.api.types.is_float_dtype(column):
        return False
    found = column.to_numpy(dtype=np.float64, na_value=np.nan)
    found = found[np.isfinite(found)]
    return bool((found != np.round(found)).any())


def _is_id(column: pd.Series, num_values: int) -> bool:
    import pandas as pd

    return num_values == len(column) and pd.api.types.is_integer_dtype(column)


def _sums_by(codes: np.ndarray, values: np.ndarray, size: int) -> sp.csr_array:
    columns = np.arange(len(codes))
    return sp.csr_array((values, (codes, columns)), shape=(size, len(codes)))


def full_calibration(
    problem: CalibrationProblem, solve: Solve, seed: int
) -> tuple[np.ndarray, CrossValidation | None]:
    """Calibrate everybody, with the pull that does best on families of targets that were left out.

    Args:
        problem: The user's.
        solve: Calibrates everybody with some pull.
        seed: Of the folds.

    Returns:
        Weights of shape (households,), and how the pull was found; None: there are no groups to leave out, or
        too many entries to try, and it is ``PULL``.
    """
    small = problem.matrix.nnz <= MOST_VALIDATED
    validation = cross_validate(problem, PULLS, solve, seed) if small else None
    return solve(problem, PULL if validation is None else validation.best), validation


def extended(problem: CalibrationProblem, own: OwnColumns, full: np.ndarray) -> CalibrationProblem:
    """Add what a full calibration says of the file's own columns to its targets.

    Args:
        problem: The user's.
        own: Totals of the household table's columns.
        full: Weights of the full calibration, shape (households,).

    Returns:
        The problem with the user's targets first, then those of the group ``GROUP``.
    """
    values = own.values(full)
    useful = np.flatnonzero(values != 0)
    rows, values = own.rows[useful], values[useful]
    if not len(values):
        return problem
    shares = np.minimum(1.0, np.diff(rows.indptr) / FULL_CELL)
    shares *= SHARE * problem.target_shares.sum() / shares.sum()
    given = np.ones(problem.num_targets) if problem.target_weights is None else problem.target_weights
    more = len(values)
    parts = {
        "matrix": _stacked(problem.matrix, rows),
        "targets": np.concatenate([problem.targets, values]),
        "target_weights": np.concatenate([given, shares]),
        "target_names": (*problem.names, *(f"{GROUP}: {own.names[i]}" for i in useful)),
        "target_scales": _longer(problem.target_scales, more, 0.0),
        "target_tolerances": _longer(_smaller(problem.target_tolerances), more, 0.0),
        "target_hard": _longer(problem.target_hard, more, False),
        "parent": _longer(problem.parent, more, -1),
    }
    if problem.target_groups is not None:
        parts["target_groups"] = np.concatenate([problem.target_groups.astype(str), [GROUP] * more])
    if problem.denominators is not None:
        empty = sp.csr_array((more, problem.num_households))
        parts["denominators"] = _stacked(problem.denominators, empty)
    return replace(problem, **parts)


def _stacked(first: sp.csr_array, second: sp.csr_array) -> sp.csr_array:
    return sp.csr_array(sp.vstack([first.astype(np.float64), second]))


def _smaller(tolerances: np.ndarray | None) -> np.ndarray | None:
    return None if tolerances is None else AIM * tolerances


def _longer(values: np.ndarray | None, more: int, with_: Any) -> np.ndarray | None:
    return None if values is None else np.concatenate([values, np.full(more, with_)])


def selecting(settings: Mapping[str, Any], share: float) -> dict[str, Any]:
    """Settings of a selection with such targets: a pull, also in the refit, and room for the weights.

    Args:
        settings: ``chi2`` and ``max_weight_ratio`` as the user gave them.
        share: Of the households that is kept.
    """
    ratio = settings["max_weight_ratio"]
    return {
        "chi2": PULL if settings["chi2"] is None else settings["chi2"],
        "max_weight_ratio": ROOM / share if ratio is None else ratio,
    }
