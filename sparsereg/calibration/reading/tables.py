"""Read the tables that users bring, in CSV or Parquet; refuse clearly what is not that."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from sparsereg.calibration.reading.csv_file import read_csv
from sparsereg.calibration.reading.parquet_file import read_parquet
from sparsereg.errors import InputError, did_you_mean

if TYPE_CHECKING:
    import pandas as pd

_CSV = (".csv", ".csv.gz", ".tsv", ".txt")
_PARQUET = (".parquet", ".pq")


def read_table(
    path: str | Path,
    as_text: bool | Collection[str] = False,
    id: str | None = None,
    decimal: str = "point",
) -> pd.DataFrame:
    """Read a table from a CSV or Parquet file, chosen by the name of the file.

    Only an empty cell is missing: the text NA stays a text (it is also a country and a name).

    Args:
        path: The file, ending in .csv, .csv.gz, .tsv, .txt or .parquet.
        as_text: Columns of a CSV that are left the text they are; True: all.
        id: A column that identifies rows: it is given back as it is written.
        decimal: The sign in numbers of a CSV, "point" or "comma".

    Raises:
        InputError: No such file, empty, not what its name says, no rows, a row with more or fewer cells than
            the header, or a column name twice.
    """
    file = existing(path)
    name = file.name.lower()
    if name.endswith(_PARQUET):
        table = read_parquet(file, id)
    elif name.endswith(_CSV):
        table = read_csv(file, as_text, id, decimal)
    else:
        raise InputError(f"{file}: expected a table named .csv or .parquet")
    table.columns = [str(c).strip() for c in table.columns]
    twice = table.columns[table.columns.duplicated()]
    if len(twice):
        raise InputError(f"{file}: the column {twice[0]!r} is there twice")
    if len(table) == 0:
        raise InputError(f"{file} has a header but no rows")
    return table


def require_column(table: pd.DataFrame, column: str, file: object, what: str) -> None:
    """Raise an InputError that names the nearest column unless the table has this one.

    Args:
        table: The table.
        column: The column that should be there.
        file: Where the table came from, for the message.
        what: What the column is needed for.
    """
    if column not in table.columns:
        known = [str(c) for c in table.columns]
        raise InputError(f"{file} has no column {column!r} ({what}){did_you_mean(column, known)}")


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
