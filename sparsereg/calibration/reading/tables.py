"""Read what users bring: tables in CSV or Parquet, matrices in .npz; refuse clearly what is not that."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import scipy.sparse as sp

from sparsereg import archives
from sparsereg.errors import DamagedFile, InputError, did_you_mean
from sparsereg.files import texts_as_they_were

if TYPE_CHECKING:
    import pandas as pd

_CSV = (".csv", ".csv.gz", ".tsv", ".txt")
_PARQUET = (".parquet", ".pq")


def read_table(path: str | Path, as_text: bool = False) -> pd.DataFrame:
    """Read a table from a CSV or Parquet file, chosen by the name of the file.

    Only an empty cell is missing: the text NA stays a text (it is also a country and a name).

    Args:
        path: The file, ending in .csv, .csv.gz, .tsv, .txt or .parquet.
        as_text: Leave every cell of a CSV the text it is.

    Raises:
        InputError: No such file, empty, not what its name says, no rows, or a column name twice.
    """
    file = _existing(path)
    name = file.name.lower()
    if name.endswith(_PARQUET):
        table = _read_parquet(file)
    elif name.endswith(_CSV):
        table = texts_as_they_were(_read_csv(file, as_text))
    else:
        raise InputError(f"{file}: expected a table named .csv or .parquet")
    table.columns = [str(c).strip() for c in table.columns]
    twice = table.columns[table.columns.duplicated()]
    if len(twice):
        raise InputError(f"{file}: the column {twice[0]!r} is there twice")
    if len(table) == 0:
        raise InputError(f"{file} has a header but no rows")
    return table


def read_matrix(path: str | Path) -> sp.csr_array:
    """Read a sparse matrix, targets x households, as written by ``scipy.sparse.save_npz``.

    Raises:
        InputError: No such file, or not such a file.
    """
    file = _existing(path)
    try:
        archives.check(file)
        with np.load(file, allow_pickle=False) as arrays:
            known = list(arrays.files)
        if "format" not in known:
            raise InputError(
                f"{file} holds the arrays {', '.join(known[:8]) or '(none)'}, not a sparse matrix:"
                " write it with scipy.sparse.save_npz"
            )
        return sp.csr_array(sp.load_npz(file))
    except InputError:
        raise
    except DamagedFile as error:
        raise InputError(
            f"{file} is not an .npz file, or is damaged: {error}; write the matrix with scipy.sparse.save_npz"
        ) from error
    except Exception as error:
        raise InputError(f"{file} cannot be read as a sparse matrix: {error}") from error


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


def _existing(path: str | Path) -> Path:
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


def _read_parquet(file: Path) -> pd.DataFrame:
    import pandas as pd

    with file.open("rb") as f:
        if f.read(4) != b"PAR1":
            raise InputError(f"{file} is not a Parquet file, though its name says so")
    try:
        table = pd.read_parquet(file)
    except Exception as error:
        raise InputError(f"{file} cannot be read as Parquet: {error}") from error
    if table.index.name is not None and table.index.name not in table.columns:
        table = table.reset_index()
    return table


def _read_csv(file: Path, as_text: bool) -> pd.DataFrame:
    import pandas as pd

    compressed = file.name.lower().endswith(".gz")
    if not compressed:
        _refuse_binary(file)
    how: dict[str, Any] = {
        "sep": "\t" if file.name.lower().endswith(".tsv") else ",",
        "keep_default_na": False,
        "na_values": [""],
        "encoding": "utf-8-sig",
        "skipinitialspace": True,
    }
    if pd.__version__.startswith("2."):  # which would lose the last bit of some numbers
        how["float_precision"] = "round_trip"
    try:
        header = pd.read_csv(file, header=None, nrows=1, dtype=str, **how).iloc[0].astype(str).str.strip()
        if header.duplicated().any():  # pandas would number them without a word
            raise InputError(f"{file}: the column {header[header.duplicated()].iloc[0]!r} is there twice")
        return pd.read_csv(file, low_memory=False, dtype=str if as_text else None, **how)
    except InputError:
        raise
    except UnicodeDecodeError:
        raise InputError(f"{file} is not UTF-8 text: save it as CSV UTF-8") from None
    except pd.errors.EmptyDataError:
        raise InputError(f"{file} is empty") from None
    except (pd.errors.ParserError, csv.Error, ValueError, OSError, EOFError) as error:
        _refuse_csv(file, error)


def _refuse_binary(file: Path) -> None:
    with file.open("rb") as f:
        start = f.read(4096)
    for magic, kind in ((b"PAR1", "a Parquet file"), (b"PK\x03\x04", "a zip or Excel file")):
        if start.startswith(magic):
            raise InputError(f"{file} is {kind}, though its name says CSV")
    if b"\0" in start:
        raise InputError(f"{file} is not text, though its name says CSV")


def _refuse_csv(file: Path, error: Exception) -> NoReturn:
    text = str(error).replace("Error tokenizing data. C error: ", "").strip()
    raise InputError(f"{file} cannot be read as CSV: {text}") from error
