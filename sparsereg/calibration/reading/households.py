"""Turn a table of households and a table of targets into a calibration problem.

Targets whose conditions test the same columns for equality are built together: the households are sorted once
by those columns, and each target then takes its slice. Other conditions are evaluated on that slice only, or
once for all targets that share them. 30,000 targets over 300,000 households take seconds.
"""

from __future__ import annotations

import difflib
import functools
import logging
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.sparse as sp

from sparsereg.calibration.problem import CalibrationProblem, exact_totals
from sparsereg.calibration.reading.book import LABELS, VALUE_OF_YEAR
from sparsereg.calibration.reading.cells import numbers, row
from sparsereg.calibration.reading.columns import Columns, why_empty
from sparsereg.calibration.reading.conditions import Condition, conjuncts, equality, parse
from sparsereg.calibration.reading.conditions import columns_of as names_in
from sparsereg.calibration.reading.levels import UNITS, Persons, plural
from sparsereg.calibration.reading.missing import REFUSED, Missing
from sparsereg.calibration.reading.tables import unique_ids
from sparsereg.calibration.reading.unknown_column import require_column
from sparsereg.errors import InputError, did_you_mean

if TYPE_CHECKING:
    import pandas as pd

    from sparsereg.calibration.reading.tables import Table

log = logging.getLogger(__name__)

TARGET_TEXTS = (
    "name", "group", "measure", "where", "parent", "tolerance", "hard", "of", "of_where", "unit", "of_unit",
    "active", "source", "url",
)  # fmt: skip
TARGET_COLUMNS = (*TARGET_TEXTS, "value", "weight", "scale", *LABELS, "year")
_FREE = ("active", *LABELS, "year")
"""Columns of books, which other columns may resemble."""
_NEARLY = 0.85
"""Likeness to "active" from which a column was probably meant to be it."""
_YES, _NO = ("true", "yes", "1"), ("false", "no", "0")
_SLIGHT = 1e-6
"""A tolerance of less than this share of the value was probably meant as a share."""
ONE_BY_SIZE = "1/size"
"""As ``unit_factor``: one over the number of persons."""
_MOST_HINTS = 20
"""Of a table that is read in parts, rows without an entry whose reason is looked for."""
_COUNT = "1"
"""As ``of``: the denominator counts households."""


@dataclass(frozen=True)
class TargetTable:
    """A table of targets, read and checked.

    Args:
        names: One name per target, unique, or unique within an area.
        values: What each total should be, float64.
        groups: The family of each target, or None.
        weights: How much each counts, or None.
        measures: The column that each target sums; "" counts households.
        wheres: The condition that each household must fulfil; "" is every household.
        parent: Index of the target that each one is part of, or -1; None without nesting.
        file: Where the table came from, for messages.
        scales: What an error of each is compared with, at least, in its unit, or None.
        tolerances: How far each may be from its value without being wrong, in its unit, or None.
        hard: Which ones must be met, or None for what their weights say.
        of: The column that the denominator of each sums; "" with an empty ``of_where`` is none.
        of_wheres: The condition of the denominator.
        units: What each counts and sums, households or persons in them; "" is households.
        of_units: The same for denominators; "" is as the target itself.
        rows: Where each stands in the table it came from, from 0; None: one after the other.
        labels: Texts that say where each comes from, by column: ``book.LABELS``.
    """

    names: tuple[str, ...]
    values: np.ndarray
    groups: np.ndarray | None
    weights: np.ndarray | None
    measures: tuple[str, ...]
    wheres: tuple[str, ...]
    parent: np.ndarray | None
    file: str
    scales: np.ndarray | None = None
    tolerances: np.ndarray | None = None
    hard: np.ndarray | None = None
    of: tuple[str, ...] = ()
    of_wheres: tuple[str, ...] = ()
    units: tuple[str, ...] = ()
    of_units: tuple[str, ...] = ()
    rows: np.ndarray | None = None
    labels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def is_ratio(self) -> np.ndarray:
        """Which targets have a denominator, shape (targets,)."""
        pairs = zip(self.of or self.of_wheres, self.of_wheres or self.of, strict=True)
        given = [bool(of or where) for of, where in pairs]
        return np.array(given or [False] * len(self.names))

    @property
    def subjects(self) -> list[tuple[str, str]]:
        """What each is about: a column that is summed wherever, or what is counted."""
        return [(m, "" if m else where) for m, where in zip(self.measures, self.wheres, strict=True)]

    def numbers(self) -> dict[str, Any]:
        """The arguments of ``CalibrationProblem`` that are one number or text per target."""
        return {
            "targets": self.values,
            "target_names": self.names,
            "target_groups": self.groups,
            "target_weights": self.weights,
            "target_scales": self.scales,
            "target_tolerances": self.tolerances,
            "target_hard": self.hard,
            "parent": self.parent,
        }

    def place(self, i: int) -> str:
        """Name a target for a message: its file, row and name."""
        return f"{self.file} row {row(self.row(i))} (target {self.names[i]!r})"

    def row(self, i: int) -> int:
        """Where a target stands in its file, from 0."""
        return i if self.rows is None else int(self.rows[i])


@dataclass(frozen=True, eq=False)
class Source:
    """The tables that a problem was built from, to read more from them.

    Args:
        households: One row per household.
        file: Where they came from, for messages.
        used: Columns with a task of their own: ids, initial weights.
        zero: Columns whose missing values add nothing to a total.
        persons: Of two levels, the lower one.
        units: What a row of the households and of the persons is called.
        rest: Where the other columns are read from, part by part, if they are not in memory.
        targeted: What targets are about, see ``TargetTable.subjects``.
    """

    households: pd.DataFrame
    file: str
    used: tuple[str, ...] = ()
    zero: tuple[str, ...] = ()
    persons: Persons | None = None
    units: tuple[str, str] = UNITS
    rest: Table | None = None
    targeted: frozenset[tuple[str, str]] = frozenset()

    @property
    def names(self) -> list[str]:
        """Names of all columns of the households, also of those that are not in memory."""
        return [str(c) for c in self.households.columns] if self.rest is None else self.rest.names

    @property
    def known(self) -> list[str]:
        """Names of all columns, those of persons behind those of households."""
        return list(dict.fromkeys([*self.names, *([] if self.persons is None else self.persons.names)]))

    def frame(self, columns: Collection[str]) -> pd.DataFrame:
        """Return at least these columns of the households, those among them that there are."""
        missing = self.rest is not None and not set(columns) <= set(self.households.columns)
        return self.rest.read(columns) if missing and self.rest is not None else self.households

    def parts(self, columns: Collection[str]) -> Iterator[tuple[int, pd.DataFrame]]:
        """Yield the households with at least these columns, each part with the number of those before."""
        if self.rest is None:
            yield 0, self.households
            return
        start = 0
        for part in self.rest.parts(columns):
            yield start, part
            start += len(part)

    def totals(
        self, targets: TargetTable, only: np.ndarray | None = None, zero: Sequence[str] = ()
    ) -> tuple[sp.csr_array, dict[int, str]]:
        """Return what each household adds to totals, and the likely reason of each row without an entry.

        Args:
            targets: Their ``units``, ``measures`` and ``wheres`` are used.
            only: A mask of the targets whose rows are wanted, the others stay empty; None: all.
            zero: More columns whose missing values add nothing.

        Raises:
            InputError: As ``build``.
        """
        zero, wanted = (*self.zero, *zero), np.ones(len(targets.names), dtype=bool) if only is None else only
        below = self.of_persons(targets)
        matrix = self._of_households(targets, wanted & ~below, zero)
        if self.persons is not None and (wanted & below).any():
            matrix = sp.csr_array(matrix + self._by_persons(self.persons, targets, wanted & below, zero))
        empty = np.flatnonzero(wanted & (np.diff(matrix.indptr) == 0))
        return matrix, self._hints(targets, empty, below, zero)

    def _of_households(self, targets: TargetTable, wanted: np.ndarray, zero: Sequence[str]) -> sp.csr_array:
        """Rows over the households, built part by part."""
        named = names_used(targets, wanted)
        rows = []
        for first, part in self.parts(named):
            columns = self._household_columns(part, zero, first)
            rows.append(_matrix(columns, targets, wanted))
        return rows[0] if len(rows) == 1 else sp.csr_array(sp.hstack(rows, format="csr"))

    def _household_columns(self, table: pd.DataFrame, zero: Sequence[str], first: int = 0) -> Columns:
        columns = Columns(table, self.file, zero, self.units[0], self._of_persons_only(), first)
        columns.known = self.names
        return columns

    def _by_persons(
        self, persons: Persons, targets: TargetTable, wanted: np.ndarray, zero: Sequence[str]
    ) -> sp.csr_array:
        """Rows over the households of what persons add, built part by part."""
        named = names_used(targets, wanted)
        above = self.frame([n for n in named if n in self.names and n not in persons.names])
        total = None
        for first, part in persons.parts(named):
            lower = _matrix(self._person_columns(part, above, named, zero, first), targets, wanted)
            summed = part.by_household(lower)
            total = summed if total is None else sp.csr_array(total + summed)
        return total

    def _hints(
        self, targets: TargetTable, empty: np.ndarray, below: np.ndarray, zero: Sequence[str]
    ) -> dict[int, str]:
        """The likely reason of each row without an entry; of a table in parts only of the first ones."""
        hints: dict[int, str] = {}
        for of_persons in (False, True):
            some = empty[below[empty] == of_persons]
            if self.rest is not None or (self.persons is not None and self.persons.rest is not None):
                some = some[:_MOST_HINTS]
            if len(some) == 0:
                continue
            wanted = np.isin(np.arange(len(targets.names)), some)
            named = names_used(targets, wanted)
            if of_persons and self.persons is not None:
                whole = replace(self.persons, table=self.persons.frame(named), rest=None)
                above = self.frame([n for n in named if n in self.names and n not in whole.names])
                columns = self._person_columns(whole, above, named, zero)
            else:
                columns = self._household_columns(self.frame(named), zero)
            hints |= {
                i: why_empty(_parsed(targets, i, columns), columns, targets.measures[i])
                for i in some.tolist()
            }
        return hints

    def of_persons(self, targets: TargetTable) -> np.ndarray:
        """Which targets count or sum persons, shape (targets,).

        Raises:
            InputError: a unit is unknown, or there are no persons.
        """
        below = np.zeros(len(targets.names), dtype=bool)
        for i, unit in enumerate(targets.units):
            if unit not in ("", *self.units):
                hint = did_you_mean(unit, list(self.units))
                raise InputError(f"{targets.place(i)}: unknown unit {unit!r}{hint}")
            below[i] = unit == self.units[1]
            if below[i] and self.persons is None:
                raise InputError(f"{targets.place(i)}: unit {unit!r} needs problem.persons=P.csv")
        return below

    def _of_persons_only(self) -> dict[str, str]:
        """Columns that only persons have, with what to do about them in a condition on households."""
        if self.persons is None:
            return {}
        said = f": it is a column of {self.persons.file}, for targets with unit={self.units[1]}"
        return {c: said for c in self.persons.names if c not in self.names}

    def _person_columns(
        self,
        persons: Persons,
        above: pd.DataFrame,
        named: Collection[str],
        zero: Sequence[str],
        first: int = 0,
    ) -> Columns:
        """The persons with the columns of their households that targets name."""
        table = persons.joined(above, named)
        file = persons.file if table is persons.table else f"{persons.file} with {self.file}"
        columns = Columns(table, file, zero, self.units[1], first=first)
        columns.known += [c for c in self.known if c not in columns.known]
        return columns


def names_used(targets: TargetTable, wanted: np.ndarray | None = None) -> set[str]:
    """Return the columns that conditions and measures name.

    Args:
        targets: The targets.
        wanted: A mask of those that count; None: all.

    Raises:
        InputError: a condition is none; the message names the target.
    """
    named: set[str] = set()
    for i in range(len(targets.names)) if wanted is None else np.flatnonzero(wanted).tolist():
        named.add(targets.measures[i])
        try:
            named |= set(names_in(_parse_once(targets.wheres[i])))
        except InputError as error:
            raise InputError(f"{targets.place(i)}: where {error}") from None
    return named - {""}


@dataclass(frozen=True)
class BuiltProblem:
    """A problem, and for each target that touches no household the likely reason.

    Args:
        problem: The problem.
        hints: By index of target.
        columns: Columns of the household table that settings name, float64.
        source: The tables; None for a matrix without a table of weights.
        labels: Where targets come from: by column of the book and name.
    """

    problem: CalibrationProblem
    hints: dict[int, str] = field(default_factory=dict)
    columns: dict[str, np.ndarray] = field(default_factory=dict)
    source: Source | None = None
    labels: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    def labelled(self, targets: TargetTable) -> BuiltProblem:
        """The same, with where its targets come from."""
        labels = {c: dict(zip(targets.names, v, strict=True)) for c, v in targets.labels.items()}
        return replace(self, labels=labels)

    def of(self, targets: TargetTable, places: np.ndarray | None) -> BuiltProblem:
        """The same households with other values for some of the targets.

        Args:
            targets: Those of a year.
            places: Where they stand among the targets of this problem; None: they are all, in this order.
        """
        problem, hints = self.problem, self.hints
        if places is not None:
            problem = problem.subset(places)
            hints = {i: hints[at] for i, at in enumerate(places.tolist()) if at in hints}
        return replace(self, problem=problem.with_targets(**targets.numbers()), hints=hints)


def target_table(
    table: pd.DataFrame,
    file: str = "the target table",
    with_values: bool = True,
    rows: np.ndarray | None = None,
    known: Collection[str] = (),
    areas: Sequence[str] | None = None,
) -> TargetTable:
    """Check a table of targets.

    Args:
        table: Columns name and value; optionally group, weight, measure, where, parent (the name of the
            target that this one is part of), scale, tolerance, hard, of, of_where, unit, of_unit. Other
            columns are left alone, unless their name looks like a misspelling.
        file: Where it came from, for messages.
        with_values: False for a table of totals that are only estimated: they need no value.
        rows: Where each target stands in the file, from 0; None: one after the other.
        known: Names of targets that are not in the table and may be parents all the same.
        areas: What each is of, where a name may be there once for each area.

    Raises:
        InputError: A column is missing or misspelt, a cell is wrong, or a name is there twice.

    Example:
        >>> import pandas as pd
        >>> target_table(pd.DataFrame({"name": ["people"], "value": [5.0], "measure": ["size"]})).measures
        ('size',)
    """
    if not with_values:
        table = table.assign(value=0.0)
    for column in ("name", "value"):
        require_column(table, column, file, "every target needs a name and a value")
    _tell_others(table, file)
    at = np.arange(len(table)) if rows is None else rows
    names = _texts(table, "name")
    _refuse_bad_names(names, file, at, areas)
    groups = np.array(_texts(table, "group")) if "group" in table.columns else None
    if groups is not None and not groups.astype(bool).any():
        groups = None
    weights = None
    if "weight" in table.columns:
        weights = _not_negative(table, "weight", file, at)
    values = numbers(table, "value", file, rows=at)
    scales = None
    if "scale" in table.columns:
        scales = np.nan_to_num(_not_negative(table, "scale", file, at))
    parents = _texts(table, "parent")
    return TargetTable(
        names=names,
        values=values,
        groups=None if groups is None else np.where(groups == "", "(no group)", groups),
        weights=weights,
        measures=_texts(table, "measure"),
        wheres=_texts(table, "where"),
        parent=_parents(parents, names, file, at, known) if "parent" in table.columns else None,
        file=file,
        scales=scales,
        tolerances=_tolerances(table, values, file, at) if "tolerance" in table.columns else None,
        hard=_hard(table, weights, file, at) if "hard" in table.columns else None,
        of=_texts(table, "of"),
        of_wheres=_texts(table, "of_where"),
        units=_texts(table, "unit"),
        of_units=_texts(table, "of_unit"),
        rows=rows,
        labels={c: texts for c in LABELS if any(texts := _texts(table, c))},
    )


def _tell_others(table: pd.DataFrame, file: str) -> None:
    """Refuse columns that look misspelt, and name those that are not used."""
    others = [c for c in table.columns if c not in TARGET_COLUMNS and not VALUE_OF_YEAR.fullmatch(str(c))]
    known = [c for c in TARGET_COLUMNS if c not in table.columns and c not in _FREE]
    for column in others:
        hint = did_you_mean(column, known)
        if "active" not in table.columns and difflib.get_close_matches(column, ["active"], 1, _NEARLY):
            hint = "; did you mean 'active'?"
        if "did you mean" in hint:
            raise InputError(f"{file} has a column {column!r}{hint} If not, name it differently.")
    if others:
        log.info("%s: the columns %s are not used", file, ", ".join(map(repr, others)))


_SUMMED = ("measures", "wheres", "units", "of", "of_wheres", "of_units")
"""What says which total a target is."""


def united(
    tables: Mapping[int | None, TargetTable],
) -> tuple[TargetTable, dict[int | None, np.ndarray | None]]:
    """Return all targets of some years, each once, and where those of each year stand; None: all, in order.

    Raises:
        InputError: a target is not the same total in all years.
    """
    one, *others = tables.values()
    index = {name: i for i, name in enumerate(one.names)}
    first: list[tuple[TargetTable, int]] = [(one, i) for i in range(len(one.names))]
    for table in others:
        for i, name in enumerate(table.names):
            at = index.setdefault(name, len(index))
            if at == len(first):
                first.append((table, i))
            before, place = first[at]
            if any(getattr(before, c)[place] != getattr(table, c)[i] for c in _SUMMED):
                raise InputError(
                    f"{table.place(i)}: it is not the total of {before.place(place)}: give it another name"
                )
    together = one if len(first) == len(one.names) else _appended(one, first[len(one.names) :])
    whole = np.arange(len(index))
    places = {y: np.array([index[n] for n in t.names], dtype=np.int64) for y, t in tables.items()}
    return together, {y: None if np.array_equal(p, whole) else p for y, p in places.items()}


def _appended(one: TargetTable, more: Sequence[tuple[TargetTable, int]]) -> TargetTable:
    """Targets of one year with further ones of others behind them, as totals only."""

    def texts(column: str) -> tuple[str, ...]:
        return (*getattr(one, column), *(getattr(t, column)[i] for t, i in more))

    rows = [*(one.row(i) for i in range(len(one.names))), *(t.row(i) for t, i in more)]
    return TargetTable(
        texts("names"), np.append(one.values, [t.values[i] for t, i in more]), None, None, texts("measures"),
        texts("wheres"), None, one.file, of=texts("of"), of_wheres=texts("of_wheres"), units=texts("units"),
        of_units=texts("of_units"), rows=np.array(rows),
    )  # fmt: skip


def build(
    households: pd.DataFrame,
    targets: TargetTable,
    weight: str | None = None,
    id: str | None = None,
    file: str = "the household table",
    columns: Sequence[str] = (),
    missing: Missing = REFUSED,
    persons: Persons | None = None,
    units: tuple[str, str] = UNITS,
    rest: Table | None = None,
    with_denominators: bool = True,
) -> BuiltProblem:
    """Build the problem: one row per target, one column per household, never dense.

    Args:
        households: One row per household.
        targets: What must come out.
        weight: Column of the initial weights; None: all ones.
        id: Column that names the households; None: their position, from 0.
        file: Where the households came from, for messages.
        columns: Columns of numbers that are wanted besides.
        missing: What becomes of missing values in measures.
        persons: Those in the households, of whom targets with a ``unit`` speak; see ``in_households``.
        units: What a row of the households and of the persons is called.
        rest: Where columns of the households are read from, part by part, that are not in memory.
        with_denominators: False leaves ratios as the totals above the line.

    Raises:
        InputError: An unknown column, a condition that is none, a measure that is not numeric, a missing
            value in a measure, a weight or an id, an id twice; the message names the place.

    Example:
        >>> import pandas as pd
        >>> households = pd.DataFrame({"state": ["CA", "TX", "CA"], "weight": [2.0, 1.0, 1.0]})
        >>> targets = pd.DataFrame({"name": ["all", "CA"], "value": [5.0, 3.0]})
        >>> targets["where"] = ["", "state == 'CA'"]
        >>> build(households, target_table(targets), weight="weight").problem.names
        ('all', 'CA')
    """
    measures = [m for m in (*targets.measures, *targets.of) if m and m != _COUNT]
    missing.check(measures)
    filled = [*missing.columns("zero", measures), *missing.columns("drop", measures)]
    used = tuple(c for c in (weight, id) if c is not None)
    about = frozenset(targets.subjects)
    source = Source(households, file, used, tuple(filled), persons, units, rest, about)
    stay = _staying(source, targets, missing)
    matrix, hints = source.totals(targets)
    weights = initial_weights(households, weight, file)
    weights = np.where(stay, 1.0 if weights is None else weights, 0.0)  # of weight 0: not in the survey
    problem = CalibrationProblem(
        matrix=matrix,
        initial_weights=weights,
        ids=unique_ids(households, id, file),
        denominators=_denominators(source, targets, weights) if with_denominators else None,
        **targets.numbers(),
    )
    return BuiltProblem(problem, hints, _columns_and_factors(source, columns), source)


def _staying(source: Source, targets: TargetTable, missing: Missing) -> np.ndarray:
    """Return a mask of the households that stay: with a missing value of a person its household leaves."""
    measures: dict[bool, list[str]] = {False: [], True: []}
    for table in (targets, denominator_table(targets)):
        for name, of_person in zip(table.measures, source.of_persons(table), strict=True):
            persons = source.persons if of_person else None
            measures[persons is not None and name in persons.names].append(name)
    own = source.frame(missing.columns("drop", measures[False]))
    stay = missing.staying(own, measures[False], source.file, source.units[0])
    if source.persons is not None:
        p = source.persons
        below = p.frame(missing.columns("drop", measures[True]))
        gone = ~missing.staying(below, measures[True], p.file, source.units[1])
        stay &= np.bincount(p.household[gone], minlength=p.num_households) == 0
    return stay


def _columns_and_factors(source: Source, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Return columns of numbers that settings name; 1/size is made from the number of persons."""
    made = {}
    if ONE_BY_SIZE in names and ONE_BY_SIZE not in source.names:
        if source.persons is None:
            raise InputError(f"unit_factor={ONE_BY_SIZE} needs problem.persons=P.csv: whose number is it?")
        made[ONE_BY_SIZE] = 1.0 / source.persons.sizes
    return columns_of(source.households, [n for n in names if n not in made], source.file) | made


def columns_of(households: pd.DataFrame, names: Sequence[str], file: str) -> dict[str, np.ndarray]:
    """Return columns of finite numbers by name.

    Raises:
        InputError: there is no such column, or a cell is no number.
    """
    for name in names:
        require_column(households, name, file, "a setting names it")
    return {name: numbers(households, name, file) for name in names}


def denominator_table(targets: TargetTable) -> TargetTable:
    """Return denominators as if they were targets."""
    none = ("",) * len(targets.names)
    own = targets.units or none
    units = tuple(of or unit for of, unit in zip(targets.of_units or none, own, strict=True))
    measures = tuple("" if of == _COUNT else of for of in targets.of or none)
    return replace(targets, measures=measures, wheres=targets.of_wheres or none, units=units)


def _refuse_silent_levels(source: Source, targets: TargetTable) -> None:
    """Refuse a denominator that sums a column of the other level and does not say how often."""
    if source.persons is None:
        return
    below = source.of_persons(targets)
    own, none, (upper, lower) = set(source.persons.names), ("",) * len(targets.names), source.units
    for i, (of, unit) in enumerate(zip(targets.of or none, targets.of_units or none, strict=True)):
        if unit or of in ("", _COUNT):
            continue
        if not below[i] and of in own and of not in source.names:
            raise InputError(
                f"{targets.place(i)}: of={of} is a column of {source.persons.file}, and the target is of"
                f" {plural(upper)}: say of_unit={lower}"
            )
        if below[i] and of not in own and of in source.names:
            raise InputError(
                f"{targets.place(i)}: of={of} is a column of {source.file}, and the target is of"
                f" {plural(lower)}: say of_unit={upper} to add it once for each {upper}, or of_unit={lower}"
                f" for each {lower}"
            )


def _denominators(source: Source, targets: TargetTable, weights: np.ndarray) -> sp.csr_array | None:
    """Build the denominators of the ratios, targets x households; None without ratios."""
    ratio = targets.is_ratio
    if not ratio.any():
        return None
    _refuse_silent_levels(source, targets)
    matrix, hints = source.totals(denominator_table(targets), ratio)
    totals = exact_totals(matrix, weights)
    for i in np.flatnonzero(ratio & (totals == 0)):
        reason = hints.get(int(i), "it adds up to 0 with the initial weights")
        raise InputError(f"{targets.place(int(i))}: its denominator (of, of_where) is zero: {reason}")
    return matrix


def target_matrix(households: pd.DataFrame, targets: TargetTable) -> tuple[sp.csr_array, dict[int, str]]:
    """Build the matrix, targets x households, and the likely reason of each row without an entry.

    Args:
        households: One row per household.
        targets: Their ``measures`` and ``wheres`` are used, the values are not.

    Raises:
        InputError: As ``build``.
    """
    source = Source(households, "the household table")
    return source.totals(targets, np.ones(len(targets.names), dtype=bool))


def _matrix(columns: Columns, targets: TargetTable, only: np.ndarray) -> sp.csr_array:
    """Build rows over the units of some columns."""
    wanted = np.flatnonzero(only).tolist()
    conditions = {i: _parsed(targets, i, columns) for i in wanted}
    plans = {i: _plan(c, columns) for i, c in conditions.items()}
    columns.count_uses(rest for plan in plans.values() for rest in plan.rest)
    by_columns: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for i, plan in plans.items():
        by_columns[plan.columns].append(i)
    rows: list[tuple[np.ndarray, np.ndarray]] = [(np.empty(0), np.empty(0, np.float32))] * len(targets.names)
    for names, members in by_columns.items():
        index = _EqualityIndex(names, columns)
        for i in members:
            rows[i] = _row(index, plans[i], targets, i, columns)
    return _stack(rows, columns.num_rows)


# Parsing and planning


@dataclass(frozen=True)
class _Plan:
    """A condition, split: these columns equal these codes, and the rest holds."""

    columns: tuple[str, ...]
    codes: tuple[int, ...]  # -1: the value does not occur in the column
    rest: tuple[Condition, ...]


def _parsed(targets: TargetTable, i: int, columns: Columns) -> Condition:
    try:
        condition = columns.in_codes(_parse_once(targets.wheres[i]))
        columns.check(condition)
    except InputError as error:
        raise InputError(f"{targets.place(i)}: where {error}") from None
    return condition


@functools.lru_cache(maxsize=100_000)
def _parse_once(text: str) -> Condition:
    return parse(text)


def _plan(condition: Condition, columns: Columns) -> _Plan:
    equal: dict[str, int] = {}
    rest: list[Condition] = []
    for part in conjuncts(condition):
        found = equality(part)
        if found is None or found[0] in equal:
            rest.append(part)
        else:
            equal[found[0]] = columns.code(*found)
    names = tuple(sorted(equal))
    return _Plan(names, tuple(equal[name] for name in names), tuple(rest))


def _row(
    index: _EqualityIndex, plan: _Plan, targets: TargetTable, i: int, columns: Columns
) -> tuple[np.ndarray, np.ndarray]:
    """Return which households a target sums, ascending, and how much of each."""
    members = index.members(plan.codes)
    for part in plan.rest:
        if len(members) == 0:
            break
        members = members[columns.mask(part, members)]
    if not targets.measures[i]:
        return members, np.ones(len(members), dtype=np.float32)
    values = _measure(targets, i, columns)[members]
    touched = values != 0
    if not touched.all():
        members, values = members[touched], values[touched]
    return members, values


def _measure(targets: TargetTable, i: int, columns: Columns) -> np.ndarray:
    try:
        return columns.measure(targets.measures[i])
    except InputError as error:
        raise InputError(f"{targets.place(i)}: {error}") from None


def _stack(rows: Sequence[tuple[np.ndarray, np.ndarray]], num_households: int) -> sp.csr_array:
    indptr = np.zeros(len(rows) + 1, dtype=np.int64)
    np.cumsum([len(members) for members, _ in rows], out=indptr[1:])
    indices = np.empty(indptr[-1], dtype=np.int32)
    wide = any(values.dtype == np.float64 for _, values in rows)
    data = np.empty(indptr[-1], dtype=np.float64 if wide else np.float32)
    for start, end, (members, values) in zip(indptr[:-1], indptr[1:], rows, strict=True):
        indices[start:end] = members
        data[start:end] = values
    if indptr[-1] <= np.iinfo(np.int32).max:
        indptr = indptr.astype(np.int32)
    return sp.csr_array((data, indices, indptr), shape=(len(rows), num_households))


class _EqualityIndex:
    """Households sorted by the values of a few columns, so that "all of these values" is a slice."""

    def __init__(self, names: tuple[str, ...], columns: Columns):
        self.sizes = [columns.num_codes(name) for name in names]
        if not names:
            self.order = np.arange(columns.num_rows, dtype=np.int32)
            return
        key = np.zeros(columns.num_rows, dtype=np.int64)
        for name, size in zip(names, self.sizes, strict=True):
            key = key * (size + 1) + columns.codes(name) + 1  # a missing value has code -1
        if np.prod([float(size + 1) for size in self.sizes]) >= 2**63:
            raise InputError(f"too many different values in the columns {', '.join(names)} together")
        self.order = np.argsort(key, kind="stable").astype(np.int32)
        self.keys = key[self.order]

    def members(self, codes: tuple[int, ...]) -> np.ndarray:
        """Return the households with these codes, ascending; none if a value does not occur."""
        if not codes:
            return self.order
        if -1 in codes:
            return self.order[:0]
        key = 0
        for code, size in zip(codes, self.sizes, strict=True):
            key = key * (size + 1) + code + 1
        start, end = np.searchsorted(self.keys, [key, key + 1])
        return self.order[start:end]


# Cells of the tables


def _texts(table: pd.DataFrame, column: str) -> tuple[str, ...]:
    if column not in table.columns:
        return ("",) * len(table)
    series = table[column]
    return tuple(series.astype(object).where(series.notna(), "").astype(str).str.strip())


def _not_negative(table: pd.DataFrame, column: str, file: str, rows: np.ndarray) -> np.ndarray:
    """Return a column of numbers >= 0, NaN where a cell is empty."""
    values = numbers(table, column, file, allow_missing=True, rows=rows)
    if (values < 0).any():
        at = int(np.flatnonzero(values < 0)[0])
        raise InputError(
            f"{file}: {column} must be >= 0, but it is {values[at]:g} in row {row(int(rows[at]))}"
        )
    return values


def _tolerances(table: pd.DataFrame, values: np.ndarray, file: str, rows: np.ndarray) -> np.ndarray:
    """Return tolerances in the unit of their targets: a number as it is, "2%" as a share of |value|."""
    texts = _texts(table, "tolerance")
    share = np.array([text.endswith("%") for text in texts])
    bare = table[["name"]].assign(tolerance=[text.removesuffix("%").strip() for text in texts])
    given = np.nan_to_num(_not_negative(bare, "tolerance", file, rows))
    without_size = np.flatnonzero(share & (values == 0))
    if len(without_size):
        at = int(without_size[0])
        raise InputError(
            f"{file} row {row(int(rows[at]))}: tolerance is {texts[at]} of a value of 0: give it in its unit"
        )
    slight = (given > 0) & ~share & (given < _SLIGHT * np.abs(values))
    if slight.any():
        at = int(np.flatnonzero(slight)[0])
        log.warning(
            "%s row %d: a tolerance of %s of %g is next to nothing; tolerances are in the unit of the value,"
            " a share is written as 1%%",
            *(file, row(int(rows[at])), texts[at], values[at]),
        )
    return np.asarray(np.where(share, given / 100 * np.abs(values), given))


def _hard(table: pd.DataFrame, weights: np.ndarray | None, file: str, rows: np.ndarray) -> np.ndarray:
    """Return which targets must be met: where the cell is empty, those without a weight."""
    texts = [text.lower() for text in _texts(table, "hard")]
    for i, text in enumerate(texts):
        if text and text not in (*_YES, *_NO):
            place = f"{file} row {row(int(rows[i]))}"
            raise InputError(f"{place}: hard must be true, false or empty, got {text!r}")
    free = np.ones(len(texts), dtype=bool) if weights is None else np.isnan(weights)
    return np.array([text in _YES if text else bool(free[i]) for i, text in enumerate(texts)])


def _refuse_bad_names(
    names: tuple[str, ...], file: str, rows: np.ndarray, areas: Sequence[str] | None
) -> None:
    first: dict[tuple[str, str], int] = {}
    whole = [""] * len(names) if areas is None else areas
    for i, name, area in zip(rows.tolist(), names, whole, strict=True):
        if not name:
            raise InputError(f"{file} row {row(i)}: the name is empty")
        if (area, name) in first:
            of = f" of the area {area!r}" if area else ""
            both = f"{row(first[area, name])} and {row(i)}"
            raise InputError(f"{file}: the target name {name!r}{of} is in rows {both}")
        first[area, name] = i


def _parents(
    parents: tuple[str, ...], names: tuple[str, ...], file: str, rows: np.ndarray, known: Collection[str]
) -> np.ndarray:
    """Index of each parent; -1 also where it is known and not among these targets."""
    index = {name: i for i, name in enumerate(names)}
    for i, parent in enumerate(parents):
        if parent and parent not in index and parent not in known:
            hint = did_you_mean(parent, list(names))
            place = f"{file} row {row(int(rows[i]))}"
            raise InputError(f"{place}: its parent {parent!r} is not the name of a target{hint}")
    return np.array([index.get(parent, -1) if parent else -1 for parent in parents], dtype=np.int64)


def initial_weights(households: pd.DataFrame, column: str | None, file: str) -> np.ndarray | None:
    """Return a column as initial weights, None for None; refuse missing and negative ones."""
    if column is None:
        return None
    require_column(households, column, file, "the initial weights")
    weights = numbers(households, column, file)
    if (weights < 0).any():
        at = int(np.flatnonzero(weights < 0)[0])
        raise InputError(f"{file}: {column} must be >= 0, but it is {weights[at]:g} in row {row(at)}")
    if not weights.any():
        raise InputError(f"{file}: {column} is zero for every household")
    return weights
