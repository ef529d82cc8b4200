"""The columns of a household table, converted on first use, and which of its rows fulfil a condition."""

from __future__ import annotations

import datetime
import decimal
from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np

from sparsereg.calibration.reading.cells import advice, exact_numbers, numbers, reader_of, shown
from sparsereg.calibration.reading.conditions import (
    COMPARISONS,
    OPPOSITE,
    And,
    Column,
    Compare,
    Condition,
    Constant,
    In,
    Missing,
    Not,
    Or,
    columns_of,
    conjuncts,
    equality,
)
from sparsereg.calibration.reading.labels import in_codes, labels_of
from sparsereg.calibration.reading.unknown_column import unknown_in
from sparsereg.errors import InputError, did_you_mean
from sparsereg.linalg.checked import smallest_exact

if TYPE_CHECKING:
    import pandas as pd

_CACHED_MASK_BYTES = 256 * 2**20
_NUMERIC = ("integer", "floating", "mixed-integer-float", "decimal", "empty")
_PLAIN = (*_NUMERIC, "string", "boolean")
_TIMES = (datetime.date, datetime.time, datetime.timedelta)
_NAMED = (str, bool, int, float, np.generic, decimal.Decimal, *_TIMES)
"""What a condition can name; dates and times as the texts that they print as."""


@dataclass
class _Values:
    """A column of kind "number", "boolean" (``data``: 0 and 1) or "text" (``data``: codes of ``texts``).

    What ``data`` holds where a value is missing means nothing.
    """

    kind: str
    data: np.ndarray
    missing: np.ndarray | None = None  # a mask; None: nothing is missing
    texts: np.ndarray | None = None

    def known(self, at: np.ndarray | slice) -> np.ndarray | bool:
        """Return which of these rows have a value."""
        return True if self.missing is None else ~self.missing[at]


class Columns:
    """The columns of the household table, converted on first use, and masks over its rows.

    Args:
        table: One row per household.
        file: Where it came from, for messages.
        zero: Columns whose missing values add nothing where they are measured.
        unit: What a row is called.
        elsewhere: Columns that the table does not have, and what to say about each.
        first: How many rows stand before it, where it is a part of a table.
    """

    def __init__(
        self,
        table: pd.DataFrame,
        file: str,
        zero: Sequence[str] = (),
        unit: str = "household",
        elsewhere: Mapping[str, str] = MappingProxyType({}),
        first: int = 0,
    ):
        self.first = first
        self.unit, self.elsewhere = unit, elsewhere
        self.table, self.file, self.zero = table, file, frozenset(zero)
        self.num_rows = len(table)
        self.known = [str(c) for c in table.columns]
        self.labels = labels_of(table)
        self._values: dict[str, _Values] = {}
        self._codes: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        self._measures: dict[str, np.ndarray] = {}
        self._masks: OrderedDict[Condition, np.ndarray] = OrderedDict()
        self._uses: Counter[Condition] = Counter()
        self._checked: set[Condition] = set()

    def values(self, name: str) -> _Values:
        """Return a column in its kind."""
        if name not in self._values:
            try:
                self._values[name] = _converted(self.table[name])
            except InputError as error:
                raise InputError(f"uses {name!r}, which {error}") from None
        return self._values[name]

    def in_codes(self, condition: Condition) -> Condition:
        """Return a condition with codes where it names their labels, or raise an InputError."""
        return in_codes(condition, self.labels) if self.labels else condition

    def check(self, condition: Condition) -> None:
        """Raise an InputError for an unknown column or a comparison of unlike things."""
        if condition in self._checked:
            return
        for name in columns_of(condition):
            if name not in self.known:
                raise InputError(f"has the {self._unknown(name)}")
        self._check_kinds(condition)
        self._checked.add(condition)

    def _unknown(self, name: str, role: str = "") -> str:
        return unknown_in(name, role, self.known, self.elsewhere.get(name))

    def _check_kinds(self, condition: Condition) -> None:
        match condition:
            case Column(name) if self.values(name).kind != "boolean":
                raise InputError(f"uses {name!r} alone, but it holds {self.values(name).kind}s: compare it")
            case Compare(left, op, right):
                kinds = (self._kind(left), self._kind(right))
                if ("text" in kinds and kinds != ("text", "text")) or (
                    "text" in kinds and op not in ("==", "!=")
                ):
                    raise InputError(self._unlike(left, op, right))
            case In(column, values):
                for value in values:
                    if ("text" in (self._kind(column), value.kind)) and self._kind(column) != value.kind:
                        raise InputError(self._unlike(column, "in", value))
            case Not(item):
                self._check_kinds(item)
            case And(items) | Or(items):
                for item in items:
                    self._check_kinds(item)

    def _kind(self, side: Column | Constant) -> str:
        return side.kind if isinstance(side, Constant) else self.values(side.name).kind

    def _unlike(self, left: Column | Constant, op: str, right: Column | Constant) -> str:
        if self._kind(left) == self._kind(right) == "text":
            return f"compares text with {op}: only == and != and in are defined for text"
        text, other = (left, right) if self._kind(left) == "text" else (right, left)
        said = [
            f"the column {side.name!r} holds {self._kind(side)}s"
            if isinstance(side, Column)
            else f"{shown(side.value)} is a {side.kind}"
            for side in (text, other)
        ]
        advice = (
            "write the number without quotes" if isinstance(text, Constant) else "put the value in quotes"
        )
        return f"compares unlike things: {said[0]}, {said[1]}: {advice}"

    def codes(self, name: str) -> np.ndarray:
        """Return the column as whole numbers from 0, one per different value; -1 where it is missing."""
        return self._coded(name)[0]

    def num_codes(self, name: str) -> int:
        """Return how many different values a column has, not counting missing."""
        return len(self._coded(name)[1])

    def _coded(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        if name not in self._codes:
            values = self.values(name)
            if values.texts is not None:
                self._codes[name] = (values.data, values.texts)
            else:
                unique, codes = np.unique(values.data, return_inverse=True)
                codes = codes.astype(np.int32)
                if values.missing is not None:
                    codes[values.missing] = -1
                self._codes[name] = (codes, unique)
        return self._codes[name]

    def code(self, name: str, value: Constant) -> int:
        """Return the code of a value in a column, -1 if it does not occur."""
        known = self._coded(name)[1]
        at = int(np.searchsorted(known, value.value))
        return at if at < len(known) and known[at] == value.value else -1

    def measure(self, name: str) -> np.ndarray:
        """Return a column to sum, without missing values; as float32 where that holds every one exactly."""
        if name not in self._measures:
            if name not in self.known:
                raise InputError(self._unknown(name, " as measure"))
            table = self.table[[name]]
            if self.values(name).kind == "text":
                read = reader_of(self.table)
                cells = table[name].dropna()
                wrong = next((v for v in cells if not np.isfinite(read(v))), None)
                told = "texts" if wrong is None else f"{shown(wrong)} there{advice(wrong, read)}"
                said = f"{self.file} holds {told}" + (
                    f" such as {shown(cells.iloc[0])}" if wrong is None else ""
                )
                raise InputError(f"the measure {name!r} is not numeric: {said}")
            if self.values(name).kind == "boolean":  # its sum is a count
                table = table[name].map({True: 1, False: 0}).to_frame()
            values = numbers(table, name, self.file, name in self.zero, self.first)
            values = np.nan_to_num(values)
            if np.abs(values).max() > np.finfo(np.float32).max:
                raise InputError(f"{self.file}: {name} has values beyond {np.finfo(np.float32).max:.3g}")
            self._measures[name] = smallest_exact(values)
        return self._measures[name]

    def count_uses(self, conditions: Iterable[Condition]) -> None:
        """Learn which conditions are asked for more than once: only their masks are kept."""
        self._uses.update(conditions)

    def mask(self, condition: Condition, at: np.ndarray) -> np.ndarray:
        """Return which of the rows ``at`` fulfil the condition."""
        if self._uses[condition] < 2:
            return self._evaluate(condition, at)
        if condition not in self._masks:
            self._masks[condition] = self._evaluate(condition, slice(None))
            while len(self._masks) * self.num_rows > _CACHED_MASK_BYTES and len(self._masks) > 1:
                self._masks.popitem(last=False)
        self._masks.move_to_end(condition)
        return np.asarray(self._masks[condition][at])

    def _evaluate(self, condition: Condition, at: np.ndarray | slice, wanted: bool = True) -> np.ndarray:
        """Return which of the rows ``at`` make the condition true, or with ``wanted=False`` false.

        Where it is neither, something is missing. ``not`` only turns ``wanted`` round, and De Morgan's rules
        do the rest: the strong three-valued logic of Kleene, which SQL and R have, without a third array.
        """
        match condition:
            case Constant(value):
                return np.full(self._size(at), bool(value) == wanted)
            case Column(name):
                values = self.values(name)
                return np.asarray(((values.data[at] == 1) == wanted) & values.known(at))
            case Missing(Column(name)):
                return np.asarray(np.broadcast_to(self.values(name).known(at), (self._size(at),)) != wanted)
            case Compare(left, op, right):
                return self._compare(left, op if wanted else OPPOSITE[op], right, at)
            case In(Column(name), values):
                return self._membership(name, values, at, wanted)
            case Not(item):
                return self._evaluate(item, at, not wanted)
            case And(items) | Or(items):
                both = isinstance(condition, And) == wanted
                return self._joined(items, at, wanted, both)
        raise AssertionError(condition)

    def _size(self, at: np.ndarray | slice) -> int:
        return self.num_rows if isinstance(at, slice) else len(at)

    def _joined(
        self, items: tuple[Condition, ...], at: np.ndarray | slice, wanted: bool, both: bool
    ) -> np.ndarray:
        """Evaluate items one after the other, so that only two masks are held however many there are."""
        join = np.logical_and if both else np.logical_or
        result = np.full(self._size(at), both)
        for item in items:
            join(result, self._evaluate(item, at, wanted), out=result)
        return result

    def _compare(
        self, left: Column | Constant, op: str, right: Column | Constant, at: np.ndarray | slice
    ) -> np.ndarray:
        known: np.ndarray | bool = True
        for side in (left, right):
            if isinstance(side, Column):
                known = known & self.values(side.name).known(at)
        if isinstance(left, Column) and isinstance(right, Constant):
            values = self.values(left.name)
            if values.texts is not None:
                return np.asarray(((values.data[at] == self.code(left.name, right)) == (op == "==")) & known)
            return np.asarray(COMPARISONS[op](values.data[at], right.value) & known)
        sides = [self._plain(side, at) for side in (left, right)]
        return np.broadcast_to(COMPARISONS[op](*sides) & known, (self._size(at),))

    def _plain(self, side: Column | Constant, at: np.ndarray | slice) -> np.ndarray:
        if isinstance(side, Constant):
            return np.asarray(side.value)
        values = self.values(side.name)
        return values.data[at] if values.texts is None else np.append(values.texts, "")[values.data[at]]

    def _membership(
        self, name: str, values: tuple[Constant, ...], at: np.ndarray | slice, wanted: bool
    ) -> np.ndarray:
        table = np.full(self.num_codes(name) + 1, not wanted)
        table[[code for value in values if (code := self.code(name, value)) >= 0]] = wanted
        table[-1] = False  # answers code -1: missing
        return np.asarray(table[self.codes(name)[at]])


def _converted(series: pd.Series) -> _Values:
    """Bring a column of a table to one of the three kinds.

    Raises:
        InputError: It holds something else; the message goes on from "the column".
    """
    import pandas as pd

    if isinstance(series.dtype, pd.CategoricalDtype):
        series = series.astype(object)
    missing = series.isna().to_numpy(dtype=bool)
    mask = missing if missing.any() else None
    kind = pd.api.types.infer_dtype(series, skipna=True)
    if kind == "complex" or (kind not in _PLAIN and not all(isinstance(v, _NAMED) for v in series.dropna())):
        raise InputError("holds neither numbers nor texts nor true and false")
    if kind == "boolean":
        filled = series.astype(object).where(~missing, False)
        return _Values("boolean", filled.to_numpy(dtype=bool).astype(np.int8), mask)
    if kind in _NUMERIC:
        return _Values("number", exact_numbers(series, missing), mask)
    texts = series if kind == "string" else series.astype(object).map(str, na_action="ignore")
    codes, known = pd.factorize(texts, sort=True)
    return _Values("text", codes.astype(np.int32), mask, np.asarray(known, dtype=str))


def why_empty(condition: Condition, columns: Columns, measure: str) -> str:
    """Guess why a target touches no household: an unknown value, or a measure that is zero there."""
    for part in conjuncts(condition):
        found = equality(part)
        if found is not None and columns.code(*found) < 0:
            name, value = found
            known = [str(v) for v in columns._coded(name)[1][:1000]]
            hint = did_you_mean(str(value.value), known) if value.kind == "text" else ""
            return f"no {columns.unit} has {name} == {shown(value.value)}{hint}"
    members = np.arange(columns.num_rows)
    for part in conjuncts(condition):
        members = members[columns._evaluate(part, members)]
    if len(members) == 0:
        return f"no {columns.unit} fulfils its condition"
    return f"{measure} is 0 for all {len(members)} {columns.unit}s that fulfil its condition"
