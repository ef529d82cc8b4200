"""The columns of a household table, converted on first use, and which of its rows fulfil a condition."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from sparsereg.calibration.reading.conditions import (
    COMPARISONS,
    And,
    Column,
    Compare,
    Condition,
    Constant,
    In,
    Not,
    Or,
    columns_of,
    conjuncts,
    equality,
)
from sparsereg.calibration.reading.tables import numbers
from sparsereg.errors import InputError, did_you_mean

if TYPE_CHECKING:
    import pandas as pd

_CACHED_MASK_BYTES = 256 * 2**20


@dataclass
class _Values:
    """A column of kind "number", "boolean" (``data`` as it is) or "text" (``data``: codes of ``texts``)."""

    kind: str
    data: np.ndarray
    texts: np.ndarray | None = None


class Columns:
    """The columns of the household table, converted on first use, and masks over its rows."""

    def __init__(self, table: pd.DataFrame, file: str):
        self.table, self.file = table, file
        self.num_rows = len(table)
        self.known = [str(c) for c in table.columns]
        self._values: dict[str, _Values] = {}
        self._codes: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        self._measures: dict[str, np.ndarray] = {}
        self._masks: OrderedDict[Condition, np.ndarray] = OrderedDict()
        self._uses: Counter[Condition] = Counter()
        self._checked: set[Condition] = set()

    def values(self, name: str) -> _Values:
        """Return a column in its kind."""
        if name not in self._values:
            self._values[name] = _converted(self.table[name])
        return self._values[name]

    def check(self, condition: Condition) -> None:
        """Raise an InputError for an unknown column or a comparison of unlike things."""
        if condition in self._checked:
            return
        for name in columns_of(condition):
            if name not in self.known:
                raise InputError(f"has the unknown column {name!r}{did_you_mean(name, self.known)}")
        self._check_kinds(condition)
        self._checked.add(condition)

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
            else f"{side.value!r} is a {side.kind}"
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
                self._codes[name] = (codes.astype(np.int32), unique)
        return self._codes[name]

    def code(self, name: str, value: Constant) -> int:
        """Return the code of a value in a column, -1 if it does not occur."""
        known = self._coded(name)[1]
        at = int(np.searchsorted(known, value.value))  # type: ignore[call-overload]
        return at if at < len(known) and known[at] == value.value else -1

    def measure(self, name: str) -> np.ndarray:
        """Return a column to sum, as float32 without missing values."""
        if name not in self._measures:
            if name not in self.known:
                raise InputError(f"unknown column {name!r} as measure{did_you_mean(name, self.known)}")
            if self.values(name).kind == "text":
                text = _first_text(self.table[name])
                raise InputError(f"the measure {name!r} is not numeric: {self.file} holds {text!r} there")
            exact = numbers(self.table, name, self.file)
            if np.abs(exact).max() > np.finfo(np.float32).max:
                raise InputError(f"{self.file}: {name} has values beyond {np.finfo(np.float32).max:.3g}")
            self._measures[name] = exact.astype(np.float32)
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
        return self._masks[condition][at]

    def _evaluate(self, condition: Condition, at: np.ndarray | slice) -> np.ndarray:
        size = self.num_rows if isinstance(at, slice) else len(at)
        match condition:
            case Constant(value):
                return np.full(size, bool(value))
            case Column(name):
                return self.values(name).data[at] == 1
            case Compare():
                return self._compare(condition, at)
            case In(Column(name), values):
                return self._membership(name, values, at)
            case Not(item):
                return self._negate(item, at)
            case And(items):
                return np.logical_and.reduce([self._evaluate(i, at) for i in items]) | np.zeros(size, bool)
            case Or(items):
                return np.logical_or.reduce([self._evaluate(i, at) for i in items])
        raise AssertionError(condition)

    def _negate(self, item: Condition, at: np.ndarray | slice) -> np.ndarray:
        if isinstance(item, Column):
            return self.values(item.name).data[at] == 0  # a missing boolean is neither
        return ~self._evaluate(item, at)

    def _compare(self, condition: Compare, at: np.ndarray | slice) -> np.ndarray:
        left, right = condition.left, condition.right
        if isinstance(left, Column) and isinstance(right, Constant):
            values = self.values(left.name)
            if values.texts is not None:
                same = values.data[at] == self.code(left.name, right)
                same &= values.data[at] >= 0
                return same if condition.op == "==" else ~same
            return COMPARISONS[condition.op](values.data[at], right.value)
        sides = [self._plain(side, at) for side in (left, right)]
        size = self.num_rows if isinstance(at, slice) else len(at)
        return np.broadcast_to(COMPARISONS[condition.op](*sides), (size,))

    def _plain(self, side: Column | Constant, at: np.ndarray | slice) -> np.ndarray:
        if isinstance(side, Constant):
            return np.asarray(side.value)
        values = self.values(side.name)
        if values.texts is None:
            return values.data[at]
        codes = values.data[at]
        texts = values.texts[codes].astype(object)
        texts[codes < 0] = np.nan  # equal to nothing, itself included
        return texts

    def _membership(self, name: str, values: tuple[Constant, ...], at: np.ndarray | slice) -> np.ndarray:
        wanted = [code for value in values if (code := self.code(name, value)) >= 0]
        table = np.zeros(self.num_codes(name) + 1, dtype=bool)  # the last entry answers code -1, missing
        table[wanted] = True
        return table[self.codes(name)[at]]


def _converted(series: pd.Series) -> _Values:
    """Bring a column of a table to one of the three kinds."""
    import pandas as pd

    if isinstance(series.dtype, pd.CategoricalDtype):
        series = series.astype(series.cat.categories.dtype)
    kind = pd.api.types.infer_dtype(series, skipna=True)
    if kind == "boolean":
        return _Values("boolean", series.astype(object).map({True: 1.0, False: 0.0}).to_numpy(np.float64))
    if pd.api.types.is_integer_dtype(series.dtype) and not series.hasnans:
        return _Values("number", series.to_numpy(np.int64))
    if pd.api.types.is_numeric_dtype(series.dtype) or kind in ("floating", "integer", "mixed-integer-float"):
        return _Values("number", pd.to_numeric(series).to_numpy(np.float64, na_value=np.nan))
    codes, texts = pd.factorize(series.astype(str).where(series.notna()), sort=True)
    return _Values("text", codes.astype(np.int32), np.asarray(texts, dtype=str))


def _first_text(series: pd.Series) -> str:
    import pandas as pd

    texts = series[series.notna() & pd.to_numeric(series, errors="coerce").isna()]
    return str(texts.iloc[0]) if len(texts) else str(series.iloc[0])


def why_empty(condition: Condition, columns: Columns, measure: str) -> str:
    """Guess why a target touches no household: an unknown value, or a measure that is zero there."""
    for part in conjuncts(condition):
        found = equality(part)
        if found is not None and columns.code(*found) < 0:
            name, value = found
            known = [str(v) for v in columns._coded(name)[1][:1000]]
            hint = did_you_mean(str(value.value), known) if value.kind == "text" else ""
            return f"no household has {name} == {value.value!r}{hint}"
    members = np.arange(columns.num_rows)
    for part in conjuncts(condition):
        members = members[columns._evaluate(part, members)]
    if len(members) == 0:
        return "no household fulfils its condition"
    return f"{measure} is 0 for all {len(members)} households that fulfil its condition"
