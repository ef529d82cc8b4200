"""Read Parquet files; what pandas would round or cannot hold stays exact or is refused where it is used."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

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

    @property
    def num_groups(self) -> int:
        """How many row groups it has."""
        return int(self._content.metadata.num_row_groups)

    def group_rows(self, group: int) -> int:
        """How many rows a row group has."""
        return int(self._content.metadata.row_group(group).num_rows)

    def group(self, group: int, columns: Collection[str]) -> pd.DataFrame:
        """Return a row group, some columns as far as they are there."""
        chosen = [name for name in self.names if name.strip() in columns]
        try:
            table = from_arrow(self._content.read_row_group(group, columns=chosen), self.id)
        except Exception as error:
            raise self._unreadable(error) from error
        table.columns = [str(name).strip() for name in table.columns]
        return table

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


def share_of(
    place: Path, columns: Collection[str], id: str | None, rank: int, size: int
) -> tuple[pd.DataFrame, int]:
    """Read one process's share of the rows: whole row groups of a file, or whole files of a folder.

    Args:
        place: A Parquet file, or a folder of them.
        columns: Only these, as far as they are there.
        id: A column of which no value is changed.
        rank: Of the process, from 0.
        size: How many there are.

    Returns:
        The rows, and how many stand before them.

    Raises:
        InputError: there are fewer parts than processes, or something is no Parquet.
    """
    import pandas as pd

    files = (
        sorted(p for p in place.iterdir() if p.suffix in (".parquet", ".pq")) if place.is_dir() else [place]
    )
    if not place.exists() or (not place.is_dir() and place.suffix not in (".parquet", ".pq")):
        raise InputError(f"{place}: several processes read a Parquet file or a folder of them")
    contents = [ParquetFile(file, id) for file in files]
    parts = [(c, group) for c in contents for group in range(c.num_groups)]
    if len(parts) < size:
        raise InputError(
            f"{place} has {len(parts)} row groups for {size} processes: write it with more"
            " (row_group_size=...), or start fewer"
        )
    counts = [c.group_rows(group) for c, group in parts]
    ends = np.cumsum(counts)
    # Each process takes the parts whose middle lies in its share of the rows, at least one.
    owner = np.minimum(((ends - np.array(counts) / 2) * size / max(int(ends[-1]), 1)).astype(int), size - 1)
    owner = _at_least_one(owner, size)
    own = np.flatnonzero(owner == rank)
    frames = [parts[k][0].group(parts[k][1], columns) for k in own.tolist()]
    return pd.concat(frames, ignore_index=True), int(ends[own[0]] - counts[own[0]])


def _at_least_one(owner: np.ndarray, size: int) -> np.ndarray:
    """Owners in ascending order, changed so that every process has a part."""
    starts = np.searchsorted(owner, np.arange(size))
    for rank in range(1, size):
        starts[rank] = max(starts[rank], starts[rank - 1] + 1)
    for rank in range(size - 1, 0, -1):
        starts[rank] = min(starts[rank], len(owner) - size + rank)
    return np.searchsorted(starts, np.arange(len(owner)), side="right") - 1
