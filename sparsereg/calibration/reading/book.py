"""A book of targets: sources, years and levels in one table, and rules that say which of its rows count.

A year is a column of its own (``value_2026``) or a cell (``year``, empty: any year). Rows with ``active`` =
false, those that no rule of ``include`` names and those that a rule of ``exclude`` names are left out; every
rule is a condition over the columns of the book, and costs one pass over it.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from sparsereg.calibration.reading.cells import numbers, row, shown
from sparsereg.calibration.reading.columns import Columns
from sparsereg.calibration.reading.conditions import parse
from sparsereg.errors import InputError

if TYPE_CHECKING:
    import pandas as pd

_log = logging.getLogger(__name__)

LABELS = ("level", "source", "vintage", "url")
"""Columns that say where a target comes from; they go with it to the tables of results."""
VALUE_OF_YEAR = re.compile(r"value_(\d{1,6})")
_TRUE, _FALSE = ("true", "yes", "1", "1.0", ""), ("false", "no", "0", "0.0")


@dataclass(frozen=True, eq=False)
class Page:
    """The rows of a book that count for a year, ready for ``target_table``.

    Args:
        table: Those rows, their value in the column ``value``.
        rows: Where each stands in the book, from 0.
        known: Names of all targets of the book: a parent may be one that does not count.
    """

    table: pd.DataFrame
    rows: np.ndarray
    known: frozenset[str]


@dataclass(frozen=True)
class Book:
    """A table of targets and what is taken from it.

    Args:
        table: As it was read.
        file: Where it came from, for messages.
        include: Conditions of which a row must fulfil one; none: every row does.
        exclude: Conditions of which it must fulfil none.
    """

    table: pd.DataFrame = field(repr=False)
    file: str
    include: Sequence[str] = ()
    exclude: Sequence[str] = ()

    def page(self, year: int | None) -> Page:
        """Return the rows that count for a year.

        Args:
            year: Which one; None: the column ``value`` of all rows.

        Raises:
            InputError: a rule is no condition over the book's columns, no row is left, or one that is left
                has no value for the year.
        """
        kept = self._kept()
        if year is None:
            self._refuse_unnamed_years(kept)
            chosen, column = kept, "value"
        else:
            chosen, column = self._of_year(kept, year)
        table = self.table.iloc[chosen]
        if column != "value":
            table = table.assign(value=numbers(table, column, self.file, rows=chosen))
        known = frozenset(_texts(self.table, "name")) if "name" in self.table.columns else frozenset()
        return Page(table, chosen, known)

    def _kept(self) -> np.ndarray:
        """Positions of rows that are active and that the rules leave."""
        mask = self._active()
        if self.include or self.exclude:
            columns = Columns(self.table, self.file, unit="target")
            if self.include:
                named = np.zeros(len(mask), dtype=bool)
                for rule in self.include:
                    named |= self._holds("targets.include", rule, columns)
                mask &= named
            for rule in self.exclude:
                mask &= ~self._holds("targets.exclude", rule, columns)
        if not mask.any():
            rules = [*(f"include {r}" for r in self.include), *(f"exclude {r}" for r in self.exclude)]
            said = f" ({'; '.join(rules)})" if rules else ""
            raise InputError(f"{self.file}: none of its {len(mask):,} targets is active and left{said}")
        if not mask.all():
            _log.info("%s: %s of %s targets count", self.file, f"{mask.sum():,}", f"{len(mask):,}")
        return np.flatnonzero(mask)

    def _active(self) -> np.ndarray:
        texts = [text.lower() for text in _texts(self.table, "active")]
        for i, text in enumerate(texts):
            if text not in (*_TRUE, *_FALSE):
                raise InputError(
                    f"{self.file} row {row(i)}: active must be true, false or empty, got {shown(text)}"
                )
        return np.array([text in _TRUE for text in texts], dtype=bool)

    def _holds(self, key: str, rule: str, columns: Columns) -> np.ndarray:
        """Which rows fulfil a rule."""
        if not rule.strip():
            raise InputError(f"{key}: a rule is empty")
        try:
            condition = columns.in_codes(parse(rule))
            columns.check(condition)
        except InputError as error:
            raise InputError(f"{key}, over the columns of {self.file}: {error}") from None
        holds = columns.mask(condition, np.arange(columns.num_rows))
        if not holds.any():
            _log.warning("%s: no target of %s fulfils %s", key, self.file, shown(rule))
        return holds

    @property
    def _years(self) -> list[int]:
        """Years that have a column."""
        found = (VALUE_OF_YEAR.fullmatch(str(c)) for c in self.table.columns)
        return sorted(int(match[1]) for match in found if match)

    def _refuse_unnamed_years(self, kept: np.ndarray) -> None:
        """Without a year there is one value for each name."""
        if "value" not in self.table.columns and self._years:
            have = ", ".join(f"value_{y}" for y in self._years[:8])
            raise InputError(
                f"{self.file} has {have} and no column value: say which, targets.year={self._years[-1]}"
            )
        if "year" not in self.table.columns or "name" not in self.table.columns:
            return
        some = self.table.iloc[kept]
        twice = some["name"].duplicated(keep=False) & ~some.duplicated(["name", "year"], keep=False)
        if twice.any():
            name = some["name"][twice].iloc[0]
            years = some["year"][some["name"] == name].astype(str).unique().tolist()
            raise InputError(
                f"{self.file}: the target {name!r} is there for {', '.join(years[:8])}: say which year,"
                f" targets.year={_plain(years[-1])}"
            )

    def _of_year(self, kept: np.ndarray, year: int) -> tuple[np.ndarray, str]:
        """Positions of the rows of a year, and the column of its values."""
        column = f"value_{year}"
        if column in self.table.columns:
            empty = kept[[not text for text in _texts(self.table.iloc[kept], column)]]
            self._refuse_lacking(empty, year, f"{column} is empty")
            return kept, column
        if "year" not in self.table.columns:
            there = ", ".join(f"value_{y}" for y in self._years[:8])
            raise InputError(
                f"targets.year={year}: {self.file} has no column {column}"
                + (f"; there are {there}" if there else " and no column year")
            )
        years = numbers(self.table, "year", self.file, allow_missing=True)
        here = np.isnan(years) | (years == year)
        names = np.array(_texts(self.table, "name"), dtype=object)
        known = set(names[here])  # also those that a rule leaves out for this year
        lacking = np.array([i for i in kept if names[i] not in known], dtype=np.int64)
        said = sorted({f"{y:g}" for y in years[lacking]})
        self._refuse_lacking(lacking, year, f"it has {', '.join(said[:8])} only")
        chosen = kept[here[kept]]
        if len(chosen) == 0:
            raise InputError(f"{self.file}: the rules leave no target of {year}")
        return chosen, "value"

    def _refuse_lacking(self, lacking: np.ndarray, year: int, said: str) -> None:
        if len(lacking) == 0:
            return
        names = np.array(_texts(self.table, "name"), dtype=object)[lacking]
        number = len(set(names))
        more = f" ({number:,} such targets)" if number > 1 else ""
        raise InputError(
            f"{self.file} row {row(int(lacking[0]))} (target {names[0]!r}): there is no value for {year},"
            f" {said}{more}: give one, or leave it out by targets.exclude"
        )


def _texts(table: pd.DataFrame, column: str) -> list[str]:
    """Return a column as texts, "" where it is missing or not there."""
    if column not in table.columns:
        return [""] * len(table)
    series = table[column]
    return list(series.astype(object).where(series.notna(), "").astype(str).str.strip())


def _plain(year: str) -> str:
    return year.removesuffix(".0")
