"""Read Parquet files; what pandas would round or cannot hold stays exact or is refused where it is used."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sparsereg.calibration.reading.cells import to_series
from sparsereg.errors import InputError

if TYPE_CHECKING:
    import pandas as pd


def read_parquet(file: Path, id: str | None = None) -> pd.DataFrame:
    """Read a Parquet file.

    Args:
        file: The file.
        id: A column of which no value is changed; decimal numbers of others become floating-point numbers.

    Raises:
        InputError: It is not such a file.
    """
    with file.open("rb") as f:
        if f.read(4) != b"PAR1":
            raise InputError(f"{file} is not a Parquet file, though its name says so")
    try:
        return _table(file, id)
    except Exception as error:
        raise InputError(f"{file} cannot be read as Parquet: {' '.join(str(error).split())}") from error


def _table(file: Path, id: str | None) -> pd.DataFrame:
    import pyarrow as pa
    import pyarrow.parquet as pq

    # Of the file itself: the names of folders are no columns.
    content = pq.ParquetFile(file, page_checksum_verification=True).read()
    table = content.to_pandas()
    if table.index.name is not None and table.index.name not in table.columns:
        table = table.reset_index()
    else:
        table = table.reset_index(drop=True)
    for name in table.columns.intersection(content.column_names):
        if content.column_names.count(name) > 1:
            continue  # refused for its name
        column = content.column(name)
        if pa.types.is_integer(column.type) and column.null_count:
            table[name] = to_series(column)
        elif pa.types.is_decimal(column.type) and name != id:
            table[name] = to_series(column.cast(pa.float64()))
    return table
