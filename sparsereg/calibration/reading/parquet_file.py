"""Read Parquet files; what pandas would round or cannot hold stays exact or is refused where it is used."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsereg.calibration.reading.cells import to_series
from sparsereg.checks import check_memory
from sparsereg.errors import InputError

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

_UNNAMED_INDEX = re.compile(r"__index_level_\d+__")


class ParquetFile:
    """A Parquet file as ``tables.Rows``.

    Args:
        file: The file.
        id: A column of which no value is changed; decimal numbers of others become floating-point numbers.

    Raises:
        InputError: It is not such a file.
    """

    def __init__(self, file: Path, id: str | None = None) -> None:
        self.file, self.id = file, id
        with file.open("rb") as f:
            if f.read(4) != b"PAR1":
                raise InputError(f"{file} is not a Parquet file, though its name says so")

    @cached_property
    def _content(self) -> Any:
        import pyarrow.parquet as pq

        try:  # Of the file itself: the names of folders are no columns.
            return pq.ParquetFile(self.file, page_checksum_verification=True)
        except Exception as error:
            raise self._unreadable(error) from error

    @property
    def names(self) -> list[str]:
        """See ``tables.Rows``."""
        return [n for n in self._content.schema_arrow.names if not _UNNAMED_INDEX.fullmatch(n)]

    def parts(self, columns: list[str] | None, rows: int | None) -> Iterator[pd.DataFrame]:
        """See ``tables.Rows``: row group by row group, a large one in pieces."""
        content = self._content
        chosen = self.names if columns is None else columns
        try:
            count = content.metadata.num_rows  # a few kilobytes may announce billions
            if rows is None or count <= rows:
                check_memory(8 * count * len(chosen), f"{self.file}: {count:,} rows of {len(chosen)} columns")
                yield from_arrow(content.read(columns=chosen), self.id)
                return
            for batch in content.iter_batches(batch_size=rows, columns=chosen):
                yield from_arrow(_table([batch]), self.id)
        except InputError:
            raise
        except Exception as error:
            raise self._unreadable(error) from error

    def is_longer(self, rows: int) -> bool:
        """See ``tables.Rows``."""
        return bool(self._content.metadata.num_rows > rows)

    def _unreadable(self, error: Exception) -> InputError:
        return InputError(f"{self.file} cannot be read as Parquet: {' '.join(str(error).split())}")


def _table(batches: list[pa.RecordBatch]) -> pa.Table:
    import pyarrow as pa

    return pa.Table.from_batches(batches)


def from_arrow(content: pa.Table, id: str | None = None) -> pd.DataFrame:
    """Turn an Arrow table into a pandas one: whole numbers stay exact, decimal ones become floating-point.

    Args:
        content: The table.
        id: A column of which no value is changed.
    """
    import pyarrow as pa

    table = content.to_pandas(ignore_metadata=True)
    for name in table.columns.intersection(content.column_names):
        column = content.column(name)
        if pa.types.is_integer(column.type) and column.null_count:
            table[name] = to_series(column)
        elif pa.types.is_decimal(column.type) and name != id:
            table[name] = to_series(column.cast(pa.float64()))
    return table
