"""From the choice of a problem in the configuration to the problem: one function per kind."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sparsereg.calibration.config import Targets
from sparsereg.calibration.findings import empty_rows
from sparsereg.calibration.problem import CalibrationProblem
from sparsereg.calibration.reading.book import Book
from sparsereg.calibration.reading.households import (
    TARGET_TEXTS,
    BuiltProblem,
    Source,
    TargetTable,
    build,
    columns_of,
    denominator_table,
    initial_weights,
    names_used,
    target_table,
    united,
)
from sparsereg.calibration.reading.levels import in_households
from sparsereg.calibration.reading.matrix_file import read_matrix
from sparsereg.calibration.reading.missing import REFUSED, Missing
from sparsereg.calibration.reading.synthetic import synthetic_tables
from sparsereg.calibration.reading.tables import Table, open_table, read_table, unique_ids
from sparsereg.errors import InputError, did_you_mean
from sparsereg.table_file import write_table

if TYPE_CHECKING:
    import pandas as pd

ALL_TARGETS = Targets()
"""Every row of the table of targets counts."""


def read_years(
    choice: Mapping[str, Any],
    columns: Sequence[str] = (),
    missing: Missing = REFUSED,
    kept: Sequence[str] | None = (),
    targets: Targets = ALL_TARGETS,
) -> dict[int | None, BuiltProblem]:
    """Read or make the problem that the configuration names, for each of its years, over one matrix.

    Args:
        choice: The keys of one of configs/problem/*.yaml; ``kind`` is a key of ``KINDS``.
        columns: Columns of the household table, or of the table of weights, that settings name.
        missing: What becomes of missing values in measured columns.
        kept: Columns of households that stay in memory where a large table is read in parts; None: all.
        targets: Which rows of the table of targets count.

    Returns:
        By year; without years the key is None.

    Raises:
        InputError: A file is missing or wrong; the message names the place.
    """
    kind = str(choice["kind"])
    if kind not in KINDS:
        raise InputError(
            f"problem.kind={kind}: expected one of {', '.join(KINDS)}{did_you_mean(kind, list(KINDS))}"
        )
    reader = KINDS[kind]
    if reader is None:
        return {None: _synthetic(choice, columns, missing)}
    by_year, num_rows = _read_targets(choice, targets)
    together, places = united(by_year)
    built = reader(choice, _Asked(together, num_rows), columns, missing, kept)
    if len(by_year) == 1:
        return {year: built.labelled(table) for year, table in by_year.items()}
    return {year: built.of(table, places[year]).labelled(table) for year, table in by_year.items()}


@dataclass(frozen=True)
class _Asked:
    """Targets, and the number of rows of the table that they are from."""

    targets: TargetTable
    num_rows: int


def _synthetic(choice: Mapping[str, Any], columns: Sequence[str], missing: Missing) -> BuiltProblem:
    households, targets = synthetic_tables(
        choice["households"], choice["targets"], choice["seed"], choice["disagreement"]
    )
    if choice["tables"] is not None:
        folder = Path(choice["tables"])
        for name, table in (("households.csv", households), ("targets.csv", targets)):
            if (folder / name).exists():
                raise InputError(f"problem.tables: {folder / name} is there already and is not overwritten")
            write_table(folder / name, table)
    checked = target_table(targets, "the synthetic targets")
    return build(households, checked, "weight", "household_id", "the synthetic survey", columns, missing)


def _households(
    choice: Mapping[str, Any],
    asked: _Asked,
    columns: Sequence[str],
    missing: Missing,
    kept: Sequence[str] | None,
) -> BuiltProblem:
    targets = asked.targets
    file, id, key = str(choice["households"]), choice["id"], choice["household_id"] or choice["id"]
    with_persons = choice["persons"] is not None
    texts = [key] if id and key != id else False  # an id of its own beside the one that is given back
    table = open_table(file, texts, id or key, **_written(choice))
    own = [choice["weight"], id, key, *columns, *(kept or ())]
    units = (str(choice["unit_names"][0]), str(choice["unit_names"][1]))
    if with_persons:  # they see the columns of their households
        own += [name for name in _named_of(units[1], targets) if name in table.names]
    households, rest = _in_memory(table, None if kept is None else own)
    persons = None
    if with_persons:
        lower = open_table(choice["persons"], id=key, **_written(choice))
        below, others = _in_memory(lower, None if kept is None else [key, choice["person_id"]])
        files = (file, str(choice["persons"]))
        persons = in_households(below, households, key, id, choice["person_id"], files, units, others)
        id = id or key
    return build(households, targets, choice["weight"], id, file, columns, missing, persons, units, rest)


def _named_of(unit: str, targets: TargetTable) -> set[str]:
    """Return the columns that targets of a unit, and their denominators, name."""
    named: set[str] = set()
    for table in (targets, denominator_table(targets)):
        named |= names_used(table, np.array([of == unit for of in table.units or ("",) * len(table.names)]))
    return named


def _in_memory(table: Table, columns: Sequence[str | None] | None) -> tuple[pd.DataFrame, Table | None]:
    """Return a table, of a large one only some columns and where the others are; None: all of them."""
    wanted = {name for name in columns or () if name}
    if columns is None or not table.is_large or not wanted <= set(table.names):
        return table.read(), None  # a column that is not there is told by its nearest name
    return table.read(wanted), table


def _matrix(
    choice: Mapping[str, Any],
    asked: _Asked,
    columns: Sequence[str],
    missing: Missing,
    kept: Sequence[str] | None,
) -> BuiltProblem:
    targets, num_rows = asked.targets, asked.num_rows
    if any(targets.measures) or any(targets.wheres) or any(targets.units) or targets.is_ratio.any():
        raise InputError(
            f"{targets.file} has measure, where, of or unit, which only problem=households uses;"
            " with a matrix it needs name,value"
        )

    def check_shape(shape: tuple[int, int]) -> None:
        num_targets, num_households = shape
        if num_targets != num_rows:
            hint = ": is it transposed?" if num_households == num_rows else ""
            raise InputError(
                f"{choice['matrix']} has {num_targets:,} rows (targets) and {num_households:,} columns"
                f" (households), but {targets.file} has {num_rows:,} targets{hint}"
            )

    matrix = read_matrix(choice["matrix"], check_shape)
    if targets.rows is not None and len(targets.rows) < num_rows:
        matrix = matrix[targets.rows]
    weights, ids, named, source = _matrix_weights(
        choice["weights"], int(matrix.shape[1]), str(choice["matrix"]), columns, _written(choice)
    )
    problem = CalibrationProblem(matrix=matrix, initial_weights=weights, ids=ids, **targets.numbers())
    hints = {int(i): f"row {int(i) + 1} of the matrix is all zero" for i in empty_rows(problem.matrix)}
    return BuiltProblem(problem, hints, named, source)


_Reader = Callable[[Mapping[str, Any], _Asked, Sequence[str], Missing, "Sequence[str] | None"], BuiltProblem]
KINDS: dict[str, _Reader | None] = {
    "synthetic": None,
    "matrix": _matrix,
    "households": _households,
}
"""What reads each kind of problem with the targets that are asked for; the synthetic one brings its own."""


def _read_targets(choice: Mapping[str, Any], targets: Targets) -> tuple[dict[int | None, TargetTable], int]:
    """Read the targets of each year, and the number of rows of their table."""
    file = str(choice["targets"])
    book = Book(read_table(file, TARGET_TEXTS, **_written(choice)), file, **targets.rules)
    by_year = {}
    for year in targets.years or (None,):
        page = book.page(year)
        by_year[year] = target_table(page.table, file, rows=page.rows, known=page.known)
    return by_year, len(book.table)


def _written(choice: Mapping[str, Any]) -> dict[str, Any]:
    """How numbers and letters are written in CSV files."""
    return {"decimal": choice["decimal"], "encoding": choice["encoding"]}


def _matrix_weights(
    file: str | None, num_households: int, matrix: str, columns: Sequence[str], written: Mapping[str, Any]
) -> tuple[np.ndarray | None, np.ndarray | None, dict[str, np.ndarray], Source | None]:
    if file is None:
        if columns:
            raise InputError(f"the column {columns[0]!r} needs problem.weights=W.csv, a table that has it")
        return None, None, {}, None
    table = read_table(file, id="id", **written)
    if len(table) != num_households:
        raise InputError(
            f"{file} has {len(table):,} weights, but {matrix} has {num_households:,} columns (households)"
        )
    ids = unique_ids(table, "id" if "id" in table.columns else None, file)
    source = Source(table, str(file), ("weight", "id"))
    return initial_weights(table, "weight", file), ids, columns_of(table, columns, file), source


def touchable(built: BuiltProblem, policy: str) -> tuple[CalibrationProblem, dict[int, str], list[str]]:
    """Deal with targets that no household touches.

    Args:
        built: The problem and the likely reasons.
        policy: "error" refuses them (those of 0 are met: they stay), "drop" leaves them out, "keep" does not.

    Returns:
        The problem, the reasons by index in it, and the names of the targets left out.

    Raises:
        InputError: There are some that are not 0, and the policy is "error".
    """
    problem, unit = built.problem, "household" if built.source is None else built.source.units[0]
    empty = empty_rows(problem.matrix)
    if policy == "error":
        wrong = empty[problem.targets[empty] != 0]
        if len(wrong):
            named = "; ".join(
                f"{problem.names[i]} ({built.hints.get(int(i), 'all zero')})" for i in wrong[:3]
            )
            more = f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""
            raise InputError(
                f"no {unit} touches {len(wrong)} of {problem.num_targets} targets: {named}{more};"
                " correct them, or calibrate without them: untouchable=drop"
            )
    if policy != "drop" or len(empty) == 0:
        return problem, dict(built.hints), []
    if len(empty) == problem.num_targets:
        raise InputError(f"no {unit} touches any target")
    kept = np.setdiff1d(np.arange(problem.num_targets), empty)
    return problem.subset(kept), {}, [problem.names[i] for i in empty]
