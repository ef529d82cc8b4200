"""Read CSV as spreadsheets and statistics programs write it; every row must have a cell for every column.

Files without a quotation mark are read by pyarrow, in parallel; the others, and those that it refuses, by
Python's ``csv``, which knows the place of what is wrong.
"""

from __future__ import annotations

import csv
import gzip
import io
import logging
import zlib
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsereg.calibration.reading.cells import SIGNS, same_text, to_series, typed
from sparsereg.errors import InputError
from sparsereg.files import texts_as_they_were

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

log = logging.getLogger(__name__)

_SEPARATORS = {",": "a comma", ";": "a semicolon", "\t": "a tab", "|": "a vertical bar"}
_MOST_CHARACTERS = 131_072
"""Of one cell, as Python's csv module has it: what is longer is a quotation mark that nobody closed."""
_ROWS_AT_ONCE = 16_384
_START = 1_000_000
_MAGIC = {
    b"PAR1": "is a Parquet file, though its name says CSV",
    b"PK\x03\x04": "is a zip or Excel file, though its name says CSV",
    b"\xff\xfe": "is UTF-16 text: save it as CSV UTF-8",
    b"\xfe\xff": "is UTF-16 text: save it as CSV UTF-8",
}


def read_csv(
    file: Path, as_text: bool | Collection[str] = False, id: str | None = None, decimal: str = "point"
) -> pd.DataFrame:
    """Read a CSV file; only an empty cell is missing.

    Args:
        file: The file, also compressed by gzip. The separator is the one of the header: a comma, a semicolon,
            a tab or a vertical bar.
        as_text: Columns that are left the text they are; True: all.
        id: A column that is left the text it is, unless whole numbers print as just that text.
        decimal: "point" or "comma": the sign in numbers.

    Raises:
        InputError: It is not such a file; the message names the row.
    """
    import pandas as pd

    raw = _content(file)
    header, columns = (_quoted if b'"' in raw else _plain)(file, raw)
    header = [name.strip() for name in header]
    twice = {name for name in header if name and header.count(name) > 1}
    if twice:
        raise InputError(f"{file}: the column {min(twice, key=header.index)!r} is there twice")

    def converted(name: str, texts: pa.ChunkedArray) -> Any:
        if name == id:
            return same_text(texts)
        whole = as_text if isinstance(as_text, bool) else name in as_text
        return texts if whole else typed(texts, SIGNS[decimal])

    named = list(_named(file, header, columns))
    table = pd.DataFrame({name: to_series(converted(name, texts)) for name, texts in named})
    return texts_as_they_were(table) if b"'" in raw else table


def _named(file: Path, header: list[str], columns: list[Any]) -> Iterator[tuple[str, Any]]:
    """Leave out columns without a name: row numbers in front, and empty ones."""
    for at, (name, texts) in enumerate(zip(header, columns, strict=True)):
        if name:
            yield name, texts
        elif at == 0 or texts.null_count == len(texts):
            log.info("%s: column %d has no name and is not used", file, at + 1)
        else:
            raise InputError(f"{file}: column {at + 1} has cells, but no name in the header")


def _content(file: Path) -> bytes:
    """Return the bytes of the text, without byte order mark and empty lines at the end."""
    try:
        with gzip.open(file) if file.name.lower().endswith(".gz") else file.open("rb") as f:
            raw = f.read()
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{file} cannot be read: {error}") from error
    for magic, said in _MAGIC.items():
        if raw.startswith(magic):
            raise InputError(f"{file} {said}")
    raw = raw.removeprefix(b"\xef\xbb\xbf").rstrip(b"\r\n")
    if not raw.strip():
        raise InputError(f"{file} is empty")
    at = raw.find(b"\0")
    if at >= 0:
        raise InputError(f"{file} is not text, though its name says CSV: a NUL byte in line {_line(raw, at)}")
    return raw


def _line(raw: bytes, at: int) -> int:
    return raw.count(b"\n", 0, at) + 1


def _plain(file: Path, raw: bytes) -> tuple[list[str], list[Any]]:
    """Read a file without quotation marks."""
    import pyarrow as pa
    import pyarrow.compute as pc
    from pyarrow import csv as arrow

    if b"\n\n" in raw or b"\n\r" in raw or b"\r\r" in raw:
        return _quoted(file, raw)  # an empty row, whose place it knows
    separator = _separator(file, raw)
    try:
        first = raw.partition(b"\n")[0].partition(b"\r")[0]
        header = first.decode("utf-8").split(separator)
        keys = [str(i) for i in range(len(header))]
        table = arrow.read_csv(
            pa.BufferReader(raw),
            read_options=arrow.ReadOptions(column_names=keys, skip_rows=1),
            parse_options=arrow.ParseOptions(delimiter=separator, quote_char=False, ignore_empty_lines=False),
            convert_options=arrow.ConvertOptions(
                column_types=dict.fromkeys(keys, pa.string()), strings_can_be_null=True, null_values=[""]
            ),
        )
    except (pa.ArrowInvalid, UnicodeDecodeError):
        return _quoted(file, raw)
    columns = table.columns
    if any((pc.max(pc.binary_length(c)).as_py() or 0) > _MOST_CHARACTERS for c in columns):
        return _quoted(file, raw)
    return header, [_without_blanks(c) for c in columns]


def _without_blanks(texts: Any) -> Any:
    """Cut blanks after a separator, as the other way of reading does."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if not pc.any(pc.starts_with(texts, " ")).as_py():
        return texts
    cut = pc.utf8_ltrim(texts, " ")
    return pc.if_else(pc.equal(cut, ""), pa.scalar(None, pa.string()), cut)


def _quoted(file: Path, raw: bytes) -> tuple[list[str], list[Any]]:
    """Read a file with quotation marks, or find out what is wrong with it."""
    import pyarrow as pa

    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{file} is not UTF-8 text (line {_line(raw, error.start)}): save it as CSV UTF-8"
        ) from None
    rows = _rows(file, text, _separator(file, raw))
    header = next(rows)
    parts: list[list[pa.Array]] = [[] for _ in header]

    def put(some: list[list[str]]) -> None:
        for part, cells in zip(parts, zip(*some, strict=True), strict=True):
            part.append(pa.array([cell or None for cell in cells], pa.string()))

    some: list[list[str]] = []
    for cells in rows:
        some.append(cells)
        if len(some) == _ROWS_AT_ONCE:
            put(some)
            some = []
    if some:
        put(some)
    return header, [pa.chunked_array(part, pa.string()) for part in parts]


def _rows(file: Path, text: str, separator: str) -> Iterator[list[str]]:
    """Yield the cells of the header and of every row; refuse rows that are longer or shorter than it."""
    reader = csv.reader(
        io.StringIO(text, newline=""), delimiter=separator, strict=True, skipinitialspace=True
    )
    number, width = 1, 0
    try:
        for cells in reader:
            width = width or len(cells)
            if len(cells) != width or not cells:
                place = f"row {number}" + (f" (line {reader.line_num})" if reader.line_num != number else "")
                raise InputError(f"{file} {place} {_misfit(cells, width)}")
            yield cells
            number += 1
    except csv.Error as error:
        raise InputError(f"{file} cannot be read as CSV: {error} in row {number}") from error


def _misfit(cells: list[str], width: int) -> str:
    if not cells:
        return "is empty"
    said = f"has {len(cells)} cells, but the header names {width} columns"
    if len(cells) > width and not any(cells[width:]):
        return f"{said}: it ends with a separator too many"
    return said


def _separator(file: Path, raw: bytes) -> str:
    """Return what separates the cells of the header; where several may, what splits the next row alike."""
    if file.name.lower().endswith((".tsv", ".tsv.gz")):
        return "\t"
    start = raw[:_START].decode("utf-8", "replace")
    fits = {}
    for separator in _SEPARATORS:
        lines = csv.reader(io.StringIO(start, newline=""), delimiter=separator, skipinitialspace=True)
        try:
            header = next(lines)
            if len(header) > 1:
                fits[separator] = len(next(lines, header)) == len(header)
        except csv.Error:
            continue
    if len(fits) > 1:
        fits = {separator: fit for separator, fit in fits.items() if fit}
    if len(fits) > 1:
        named = " and ".join(_SEPARATORS[separator] for separator in fits)
        raise InputError(
            f"{file}: {named} separate cells in the header: write one of them, or put names in quotes"
        )
    return next(iter(fits), ",")
