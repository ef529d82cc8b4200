"""The door through which the tables that users bring come in, whatever their format; what is none is refused.

``F.csv``, ``F.parquet``, ``F.dta``, ``F.sav``, ``F.xlsx::SHEET``, ``F.duckdb::TABLE``: the name of the file
chooses how it is read, and what stands behind ``::`` which of its tables.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from sparsereg.calibration.reading.cells import row
from sparsereg.calibration.reading.csv_file import CsvFile
from sparsereg.calibration.reading.database import Database
from sparsereg.calibration.reading.parquet_file import ParquetFile
from sparsereg.calibration.reading.spreadsheet import Spreadsheet
from sparsereg.calibration.reading.statistics_file import StatisticsFile
from sparsereg.calibration.reading.unknown_column import require_column
from sparsereg.errors import InputError, did_you_mean

if TYPE_CHECKING:
    import pandas as pd

WITHIN = "::"
"""Between a file and the name of one of its tables."""
ROWS_AT_ONCE = 2**19
"""Rows of a part of a table, where it is not read whole."""


@dataclass(frozen=True)
class Cells:
    """How the cells of a table are read.

    Args:
        as_text: Columns that are left the text they are, where all cells are texts; True: all.
        id: A column that identifies rows: it is given back as it is written.
        decimal: The sign in numbers of a CSV, "point" or "comma".
        encoding: Of a CSV; None: UTF-8, or what its first bytes say.
    """

    as_text: bool | Collection[str] = False
    id: str | None = None
    decimal: str = "point"
    encoding: str | None = None


class Rows(Protocol):
    """A table in a file of some format."""

    @property
    def names(self) -> list[str]:
        """The columns, as they are written."""

    def parts(self, columns: list[str] | None, rows: int | None) -> Iterator[pd.DataFrame]:
        """Yield some columns (None: all), about so many rows at a time (None: all at once)."""

    def is_longer(self, rows: int) -> bool:
        """Whether there are more rows, or so many bytes that it is better read in parts."""


@dataclass(frozen=True, eq=False)
class Table:
    """A table that somebody brought, to be read whole or part by part.

    Args:
        place: The file, with the name of the table in it, for messages.
        rows: Reads it.
    """

    place: str
    rows: Rows

    @property
    def names(self) -> list[str]:
        """The names of its columns, without blanks around them."""
        return [str(name).strip() for name in self.rows.names]

    @property
    def is_large(self) -> bool:
        """Whether it is better read in parts."""
        return self.rows.is_longer(ROWS_AT_ONCE)

    def read(self, columns: Collection[str] | None = None) -> pd.DataFrame:
        """Return the rows.

        Args:
            columns: Only these, as far as they are there; None: all.

        Raises:
            InputError: as ``read_table``.
        """
        (table,) = self.parts(columns, None)
        return table

    def parts(
        self, columns: Collection[str] | None = None, rows: int | None = ROWS_AT_ONCE
    ) -> Iterator[pd.DataFrame]:
        """Yield the rows, so many at a time; columns mean the same in every part.

        Args:
            columns: Only these, as far as they are there; None: all.
            rows: About how many at a time; None: all at once.
        """
        _refuse_twice(self.names, self.place)
        raw = self.rows.names
        chosen = None if columns is None else [n for n in raw if str(n).strip() in columns]
        empty = True
        for part in self.rows.parts(chosen or raw[:1] if chosen is not None else None, rows):
            part.columns = [str(c).strip() for c in part.columns]
            empty = empty and len(part) == 0
            yield part
        if empty:
            raise InputError(f"{self.place} has a header but no rows")


_Opener = Callable[[Path, "str | None", Cells], Rows]


def _one_table(kind: Callable[[Path, Cells], Rows]) -> _Opener:
    def opened(file: Path, table: str | None, cells: Cells) -> Rows:
        if table is not None:
            raise InputError(
                f"{file}{WITHIN}{table}: a file of this format holds one table: leave {WITHIN}{table} out"
            )
        return kind(file, cells)

    return opened


_csv = _one_table(lambda file, c: CsvFile(file, c.as_text, c.id, c.decimal, c.encoding))
_parquet = _one_table(lambda file, c: ParquetFile(file, c.id))
_statistics = _one_table(lambda file, c: StatisticsFile(file, c.id))
FORMATS: dict[str, _Opener] = {
    **dict.fromkeys((".csv", ".csv.gz", ".tsv", ".tsv.gz", ".txt"), _csv),
    **dict.fromkeys((".parquet", ".pq"), _parquet),
    **dict.fromkeys((".dta", ".sav", ".zsav", ".por", ".sas7bdat", ".xpt"), _statistics),
    **dict.fromkeys((".xlsx", ".xlsm"), lambda file, table, c: Spreadsheet(file, table, c.as_text)),
    **dict.fromkeys(
        (".duckdb", ".ddb", ".sqlite", ".sqlite3", ".db"), lambda file, table, c: Database(file, table, c.id)
    ),
}
"""By the end of a file's name."""
_OTHERS = {
    ".xls": "save it as .xlsx or CSV", ".ods": "save it as .xlsx or CSV", ".rds": "save it as Parquet or CSV",
    ".rdata": "save it as Parquet or CSV", ".feather": "save it as Parquet", ".json": "save it as CSV",
    ".zip": "unpack it", ".gz": "only .csv.gz is read packed: unpack it",
}  # fmt: skip


def open_table(
    path: str | Path,
    as_text: bool | Collection[str] = False,
    id: str | None = None,
    decimal: str = "point",
    encoding: str | None = None,
) -> Table:
    """Find a table, to read it later.

    Args:
        path: The file, its format chosen by its name; ``F.xlsx::SHEET`` says which table of several.
        as_text: Columns that are left the text they are; True: all.
        id: A column that identifies rows: it is given back as it is written.
        decimal: The sign in numbers of a CSV, "point" or "comma".
        encoding: Of a CSV; None: UTF-8, or what its first bytes say.

    Raises:
        InputError: No such file, empty, not what its name says, or what reads it is not installed.
    """
    file, table = in_file(path)
    opener = FORMATS.get(_suffix(file))
    existing(file)
    if opener is None:
        advice = next((said for end, said in _OTHERS.items() if file.name.lower().endswith(end)), None)
        known = f"expected one of {', '.join(FORMATS)}"
        raise InputError(f"{file}: a table is not read from such a file: {advice or known}")
    cells = Cells(as_text, id, decimal, encoding)
    return Table(str(path), opener(file, table, cells))


def read_table(
    path: str | Path,
    as_text: bool | Collection[str] = False,
    id: str | None = None,
    decimal: str = "point",
    encoding: str | None = None,
) -> pd.DataFrame:
    """Read a table whole, see ``open_table``.

    Only an empty cell is missing: the text NA stays a text (it is also a country and a name).

    Raises:
        InputError: As ``open_table``; no rows, a row with more or fewer cells than the header, or a column
            name twice.
    """
    return open_table(path, as_text, id, decimal, encoding).read()


def is_table(name: str) -> bool:
    """Whether a text is the name of a file that a table is read from."""
    return _suffix(in_file(name)[0]) in FORMATS


def in_file(path: str | Path) -> tuple[Path, str | None]:
    """Split ``FILE::TABLE`` into both; a file that is there under the whole name is that file."""
    text = str(path)
    file, sign, table = text.rpartition(WITHIN)
    if not sign or Path(text).exists():
        return Path(text), None
    return Path(file), table


def _suffix(file: Path) -> str:
    """The longest known end of a file's name, or what stands behind its last point."""
    name = file.name.lower()
    return max((end for end in FORMATS if name.endswith(end)), key=len, default=file.suffix.lower())


def _refuse_twice(names: Sequence[str], place: str) -> None:
    twice = next((name for name, times in Counter(names).items() if times > 1), None)
    if twice is not None:
        raise InputError(f"{place}: the column {twice!r} is there twice")


def existing(path: str | Path) -> Path:
    """Return the path of a file that is there and not empty, or raise an InputError with the nearest name."""
    file = Path(path)
    if file.is_dir():
        raise InputError(f"{file} is a folder, expected a file")
    if not file.is_file():
        near = [p.name for p in file.parent.iterdir()] if file.parent.is_dir() else []
        hint = did_you_mean(file.name, near) if near and file.parent.is_dir() else ""
        raise InputError(f"{file} does not exist{hint if 'did you mean' in hint else ''}")
    if file.stat().st_size == 0:
        raise InputError(f"{file} is empty")
    return file


def unique_ids(households: pd.DataFrame, column: str | None, file: str) -> np.ndarray | None:
    """Return a column as ids, None for None; refuse missing and repeated ones."""
    if column is None:
        return None
    require_column(households, column, file, "the ids of its rows")
    series = households[column]
    if series.isna().any():
        raise InputError(f"{file}: {column} is missing in row {row(int(np.flatnonzero(series.isna())[0]))}")
    twice = series.duplicated()
    if twice.any():
        at = int(np.flatnonzero(twice)[0])
        before = int(np.flatnonzero(series == series.iloc[at])[0])
        raise InputError(
            f"{file}: the id {series.iloc[at]} is there twice, in rows {row(before)} and {row(at)}"
            f" ({int(twice.sum())} repeated)"
        )
    return np.asarray(series.to_numpy())
