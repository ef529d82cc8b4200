"""Read sheets of Excel files by openpyxl: the values that were last computed, never formulas."""

from __future__ import annotations

import io
import warnings
from collections.abc import Collection, Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsereg import archives
from sparsereg.calibration.reading.cells import row
from sparsereg.errors import DamagedFile, InputError, did_you_mean
from sparsereg.extras import needed_to_read

if TYPE_CHECKING:
    import pandas as pd

_LONGEST_LIST = 12


class Spreadsheet:
    """A sheet of an Excel file as ``tables.Rows``; its first row has the names of the columns.

    Args:
        file: The file.
        sheet: Its name; None: the only one that is not hidden.
        as_text: Columns whose cells are texts: a number shown in per cent is one, too (``2%``). True: all.

    Raises:
        InputError: openpyxl is not installed, it is not such a file, or there is no such sheet.
    """

    def __init__(self, file: Path, sheet: str | None, as_text: bool | Collection[str] = False) -> None:
        needed_to_read(file, "openpyxl")
        self.file, self.as_text = file, as_text
        self.sheet = self._chosen(sheet)
        self.place = f"{file}::{self.sheet}"

    def _book(self, values: bool = True) -> Any:
        import openpyxl

        try:
            archives.check(self.file)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of decorations that it does not know
                content = io.BytesIO(self.file.read_bytes())  # nothing stays open behind a row that is wrong
                return openpyxl.load_workbook(content, read_only=True, data_only=values)
        except DamagedFile as error:
            raise InputError(f"{self.file} is not an Excel file, or is damaged: {error}") from error
        except Exception as error:
            said = " ".join(str(error).split()) or type(error).__name__
            raise InputError(f"{self.file} cannot be read as an Excel file: {said}") from error

    def _chosen(self, sheet: str | None) -> str:
        book = self._book()
        names = [s.title for s in book.worksheets]
        seen: list[str] = [s.title for s in book.worksheets if s.sheet_state == "visible"]
        book.close()
        if sheet is not None:
            if sheet not in names:
                raise InputError(f"{self.file} has no sheet {sheet!r}{did_you_mean(sheet, names)}")
            return sheet
        if len(seen) != 1:
            listed = ", ".join(seen[:_LONGEST_LIST])
            raise InputError(
                f"{self.file} has {len(seen)} sheets ({listed}): say which one, {self.file}::{names[0]}"
            )
        return seen[0]

    @property
    def names(self) -> list[str]:
        """See ``tables.Rows``."""
        return [str(name) for name in self._table.columns]

    def parts(self, columns: list[str] | None, rows: int | None) -> Iterator[pd.DataFrame]:
        """See ``tables.Rows``: all at once, a sheet has at most a million rows."""
        yield self._table.copy(deep=False) if columns is None else self._table[columns]

    def is_longer(self, rows: int) -> bool:
        """See ``tables.Rows``."""
        return False

    @cached_property
    def _table(self) -> pd.DataFrame:
        import pandas as pd

        header, *rows = self._rows()
        width = len(header)
        columns = {}
        for at, name in enumerate(header):
            cells = [r[at] for r in rows]
            if name:
                columns[name] = pd.Series(cells, dtype=None if cells else object)
            elif any(cell is not None for cell in cells):
                raise InputError(f"{self.place}: column {at + 1} has cells, but no name in the first row")
        twice = [name for name in header if name and header.count(name) > 1]
        if twice:
            raise InputError(f"{self.place}: the column {twice[0]!r} is there twice")
        if any(cell is None for r in rows for cell in r[:width]):
            self._refuse_uncomputed()
        return pd.DataFrame(columns)

    def _rows(self) -> list[list[Any]]:
        """Return the header as texts and all rows, of equal length, without empty ones at the end."""
        book = self._book()
        try:
            sheet = book[self.sheet]
            sheet.reset_dimensions()  # what the file says of its size may be wrong
            cells = [list(r) for r in sheet.iter_rows()]
        finally:
            book.close()
        while cells and all(cell.value is None for cell in cells[-1]):
            cells.pop()
        if not cells:
            raise InputError(f"{self.place} is empty")
        width = max(
            1 + max(i for i, c in enumerate(r) if c.value is not None) if _any(r) else 0 for r in cells
        )
        header = [_name(cells[0][i].value) if i < len(cells[0]) else "" for i in range(width)]
        rows: list[list[Any]] = [list(header)]
        for number, line in enumerate(cells[1:]):
            if not _any(line):
                raise InputError(f"{self.place} row {row(number)} is empty")
            values = [self._value(cell, name) for cell, name in zip(line, header, strict=False)]
            rows.append(values + [None] * (width - len(values)))
        return rows

    def _value(self, cell: Any, column: str) -> Any:
        value = cell.value
        if isinstance(value, str):
            return value.strip() or None
        whole = self.as_text if isinstance(self.as_text, bool) else column in self.as_text
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if whole and number and "%" in (cell.number_format or ""):
            return f"{value * 100:.12g}%"
        return value

    def _refuse_uncomputed(self) -> None:
        """Refuse formulas whose results were never saved: such cells look empty."""
        values, formulas = self._book(), self._book(values=False)
        try:
            pairs = zip(values[self.sheet].iter_rows(), formulas[self.sheet].iter_rows(), strict=False)
            for line, written in pairs:
                for cell, formula in zip(line, written, strict=False):
                    if cell.value is None and formula.value is not None:
                        raise InputError(
                            f"{self.place}: {formula.coordinate} holds a formula whose result was never"
                            " saved: open the file in a spreadsheet program and save it"
                        )
        finally:
            values.close()
            formulas.close()


def _any(line: list[Any]) -> bool:
    return any(cell.value is not None for cell in line)


def _name(value: Any) -> str:
    return "" if value is None else str(value).strip()
