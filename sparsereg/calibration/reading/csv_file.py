"""Read CSV as spreadsheets and statistics programs write it; every row must have a cell for every column.

Files without a quotation mark below their header are read by pyarrow, in parallel; the others, and those
that it refuses, by Python's ``csv``, which knows the place of what is wrong. Large files are read in parts,
twice: first to learn what the cells of each column are, then the cells.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import itertools
import logging
import zlib
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from sparsereg.calibration.reading.cells import (
    SIGNS,
    as_kind,
    kind_of,
    same_text,
    to_series,
    typed,
    wider,
    with_sign,
)
from sparsereg.errors import InputError
from sparsereg.table_file import texts_as_they_were

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

log = logging.getLogger(__name__)

_SEPARATORS = {",": "a comma", ";": "a semicolon", "\t": "a tab", "|": "a vertical bar"}
_MOST_CHARACTERS = 131_072
"""Of one cell, as Python's csv module has it: what is longer is a quotation mark that nobody closed."""
_ROWS_AT_ONCE = 16_384
_START = 1_000_000
_ROWS_IN_PARTS = 1 << 17
_BLOCK = 1 << 24
LARGE = 1 << 27
"""Bytes of a file from which it is read in parts; packed ones count eightfold."""
_EXPANSION, _UNPACKED = 200, 1 << 28
"""A packed file may unpack to so many times its size, and to so many bytes in any case: tables of households
shrink to a tenth or a twentieth."""
_MAGIC = {
    b"PAR1": "is a Parquet file, though its name says CSV",
    b"PK\x03\x04": "is a zip or Excel file, though its name says CSV",
}
_MARKS = {codecs.BOM_UTF8: "utf-8", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
"""First bytes that say how a text is encoded."""
_ADVICE = "say problem.encoding=cp1252 (Western Europe; cp1250, ... elsewhere), or save it as CSV UTF-8"


class CsvFile:
    """A CSV file as ``tables.Rows``; only an empty cell is missing.

    Args:
        file: The file, also compressed by gzip. The separator is the one of the header: a comma, a semicolon,
            a tab or a vertical bar.
        as_text: Columns that are left the text they are; True: all.
        id: A column that is left the text it is, unless whole numbers print as just that text.
        decimal: "point" or "comma": the sign in numbers.
        encoding: Of the text; None: UTF-8, or UTF-16 if its first bytes say so.

    Raises:
        InputError: It is not such a file; the message names the row.
    """

    def __init__(
        self,
        file: Path,
        as_text: bool | Collection[str] = False,
        id: str | None = None,
        decimal: str = "point",
        encoding: str | None = None,
    ) -> None:
        self.file, self.as_text, self.id, self.decimal = file, as_text, id, decimal
        self.encoding = None if encoding is None else _known(encoding)
        packed = file.name.lower().endswith(".gz")
        self._large = file.stat().st_size * (8 if packed else 1) >= LARGE

    @cached_property
    def _whole(self) -> pd.DataFrame:
        import pandas as pd

        raw, separator = _content(self.file, self.encoding)
        quoted = raw.count(b'"') > _first_line(raw).count(b'"')
        header, columns = (_quoted if quoted else _plain)(self.file, raw, separator)
        names = _checked_header(self.file, header)
        named = list(_named(self.file, names, columns))
        table = pd.DataFrame({name: to_series(self._converted(name, texts)) for name, texts in named})
        return with_sign(texts_as_they_were(table) if b"'" in raw else table, self.decimal)

    def _converted(self, name: str, texts: pa.ChunkedArray) -> Any:
        if name == self.id:
            return same_text(texts)
        whole = self.as_text if isinstance(self.as_text, bool) else name in self.as_text
        return texts if whole else typed(texts, SIGNS[self.decimal])

    @cached_property
    def _in_parts(self) -> _Parts:
        return _Parts.of(self.file, self.encoding)

    @property
    def names(self) -> list[str]:
        """See ``tables.Rows``."""
        if self._large:
            return [name for name in self._in_parts.header if name]
        return [str(name) for name in self._whole.columns]

    def parts(self, columns: list[str] | None, rows: int | None) -> Iterator[pd.DataFrame]:
        """See ``tables.Rows``."""
        import pandas as pd

        if not self._large:
            table = self._whole
            yield table.copy(deep=False) if columns is None else table[columns]
            return
        if rows is None:
            yield pd.concat(self.parts(columns, _ROWS_IN_PARTS), ignore_index=True)
            return
        chosen = self.names if columns is None else columns
        kinds = dict.fromkeys(chosen, "none")
        for some in self._in_parts.texts(chosen, _BLOCK):
            kinds = {name: wider(kinds[name], self._kind(name, cells)) for name, cells in some.items()}
        for some in self._in_parts.texts(chosen, rows):
            cells = {name: as_kind(kinds[name], c, SIGNS[self.decimal]) for name, c in some.items()}
            table = pd.DataFrame({name: to_series(values) for name, values in cells.items()})
            table = texts_as_they_were(table) if self._in_parts.apostrophes else table
            yield with_sign(table, self.decimal)

    def is_longer(self, rows: int) -> bool:
        """See ``tables.Rows``."""
        return self._large

    def _kind(self, name: str, texts: pa.ChunkedArray) -> str:
        return kind_of(self._converted(name, texts), texts)


def _known(encoding: str) -> str:
    """Return the name of an encoding of texts, or raise an InputError."""
    try:
        found = codecs.lookup(encoding)
        "".encode(encoding)
    except (LookupError, ValueError):
        raise InputError(
            f"problem.encoding={encoding}: no such encoding; there are utf-8, cp1252, latin-1, utf-16, ..."
        ) from None
    return "utf-8" if found.name == "utf-8-sig" else found.name


def _checked_header(file: Path, header: list[str]) -> list[str]:
    """Return the names without blanks around them; refuse one that is there twice."""
    names = [name.strip() for name in header]
    twice = next((name for name, times in Counter(names).items() if name and times > 1), None)
    if twice is not None:
        raise InputError(f"{file}: the column {twice!r} is there twice")
    return names


@dataclass(frozen=True)
class _Parts:
    """A large file that was looked through once, byte by byte, without holding it.

    Args:
        file: The file.
        encoding: Of its text.
        separator: Between cells.
        header: The names of all columns; "" for one without.
        plain: Whether it has neither quotation marks below a header of one line nor empty rows.
        apostrophes: Whether a text may be one that ``files.inert`` marked.
        skipped: Lines in front of the header.
    """

    file: Path
    encoding: str
    separator: str
    header: list[str]
    plain: bool
    apostrophes: bool
    skipped: int

    @classmethod
    def of(cls, file: Path, encoding: str | None) -> _Parts:
        """Look a file through.

        Raises:
            InputError: it is no text, or its header is none.
        """
        with _opened(file) as stream:
            start = stream.read(_START)
        found = encoding or next((name for mark, name in _MARKS.items() if start.startswith(mark)), "utf-8")
        _refuse_magic(file, start)
        quotes, apostrophes, gap = _looked_through(file, found)
        with _text(file, found) as text:
            first, separator = _without_hint(text.read(_START).encode())
        skipped = int(separator is not None)
        separator = separator or _separator(file, first)
        rows = csv.reader(
            io.StringIO(first.decode(), newline=""), delimiter=separator, strict=True, skipinitialspace=True
        )
        try:
            header = _checked_header(file, next(rows, []))
        except csv.Error as error:
            raise InputError(f"{file} cannot be read as CSV: {error} in row 1") from error
        plain = rows.line_num == 1 and quotes == _first_line(first).count(b'"') and not gap
        return cls(file, found, separator, header, plain, apostrophes, skipped)

    def texts(self, columns: list[str], rows: int) -> Iterator[dict[str, pa.ChunkedArray]]:
        """Yield the cells of some columns as texts, about so many rows at a time."""
        import pyarrow as pa

        if self.plain:
            try:
                yield from self._by_arrow(columns, rows)
                return
            except pa.ArrowInvalid:
                for _ in self._by_csv(columns[:1], _ROWS_AT_ONCE):  # it says what is wrong, and where
                    pass
                raise
        yield from self._by_csv(columns, rows)

    def _by_arrow(self, columns: list[str], rows: int) -> Iterator[dict[str, pa.ChunkedArray]]:
        import pyarrow as pa
        from pyarrow import csv as arrow

        keys = [str(i) for i in range(len(self.header))]
        wanted = [str(self.header.index(name)) for name in columns]
        with _opened(self.file) as stream, arrow.open_csv(
            pa.PythonFile(stream, mode="r"),
            read_options=arrow.ReadOptions(
                column_names=keys, skip_rows=1 + self.skipped, block_size=_BLOCK, encoding=self.encoding
            ),
            parse_options=arrow.ParseOptions(
                delimiter=self.separator, quote_char=False, ignore_empty_lines=False
            ),
            convert_options=arrow.ConvertOptions(
                column_types=dict.fromkeys(keys, pa.string()), include_columns=wanted,
                strings_can_be_null=True, null_values=[""],
            ),
        ) as reader:  # fmt: skip
            for table in _gathered(reader, rows):
                yield {n: _without_blanks(c) for n, c in zip(columns, table.columns, strict=True)}

    def _by_csv(self, columns: list[str], rows: int) -> Iterator[dict[str, pa.ChunkedArray]]:
        import pyarrow as pa

        named = [(name, self.header.index(name)) for name in columns]
        with _text(self.file, self.encoding) as text:
            for _ in range(self.skipped):
                text.readline()
            lines = _rows(self.file, text, self.separator)
            next(lines)
            try:
                while some := list(itertools.islice(lines, min(rows, _ROWS_AT_ONCE))):
                    cells = {name: [row[at] or None for row in some] for name, at in named}
                    yield {name: pa.chunked_array([pa.array(cs, pa.string())]) for name, cs in cells.items()}
            except UnicodeDecodeError as error:
                raise InputError(f"{self.file} is not {self.encoding.upper()} text: {_ADVICE}") from error


def _gathered(batches: Iterator[pa.RecordBatch], rows: int) -> Iterator[pa.Table]:
    """Yield tables of about so many rows."""
    import pyarrow as pa

    some, count = [], 0
    for batch in batches:
        some.append(batch)
        count += batch.num_rows
        if count >= rows:
            yield pa.Table.from_batches(some)
            some, count = [], 0
    if some:
        yield pa.Table.from_batches(some)


def _opened(file: Path) -> IO[bytes]:
    return _Packed(file) if file.name.lower().endswith(".gz") else file.open("rb")  # type: ignore[return-value]


class _Packed(gzip.GzipFile):
    """A file packed by gzip that does not fill the memory from a few kilobytes.

    Raises:
        InputError: when more comes out of it than a table can have shrunk to so little.
    """

    def __init__(self, file: Path) -> None:
        super().__init__(file, "rb")
        self.file, self.most = file, max(_UNPACKED, _EXPANSION * file.stat().st_size)

    def read(self, size: int | None = -1) -> bytes:
        """See ``io.BufferedIOBase``."""
        if size is None or size < 0:
            return b"".join(iter(lambda: self.read(_BLOCK), b""))
        return self._counted(super().read(size))

    def read1(self, size: int = -1) -> bytes:
        """See ``io.BufferedIOBase``."""
        return self._counted(super().read1(size))

    def _counted(self, part: bytes) -> bytes:
        if self.tell() > self.most:
            raise InputError(
                f"{self.file} unpacks to more than {self.most / 2**20:,.0f} MiB, over {_EXPANSION} times its"
                " size, which no table of households does: unpack it, and give the .csv, if it is meant so"
            )
        return part


def _text(file: Path, encoding: str) -> io.TextIOWrapper:
    """Open a file as text without its byte order mark."""
    return io.TextIOWrapper(
        _opened(file), encoding="utf-8-sig" if encoding == "utf-8" else encoding, newline=""
    )


def _looked_through(file: Path, encoding: str) -> tuple[int, bool, bool]:
    """Return how many quotation marks there are, and whether there are apostrophes and empty rows.

    Raises:
        InputError: it is not text; the message names the line.
    """
    quotes, apostrophes, gap, tail, line = 0, False, False, "", 1
    text = _text(file, encoding)
    with text:
        while True:
            try:
                block = text.read(_BLOCK)
            except UnicodeDecodeError as error:
                raise InputError(
                    f"{file} is not {encoding.upper()} text (after line {line}): {_ADVICE}"
                ) from error
            except (OSError, EOFError, zlib.error) as error:
                raise InputError(f"{file} cannot be read: {error}") from error
            if not block:
                return quotes, apostrophes, gap or len(tail.replace("\r\n", "\n")) > 1
            if "\0" in block:
                line += block[: block.index("\0")].count("\n")
                raise InputError(f"{file} is not text, though its name says CSV: a NUL byte in line {line}")
            quotes, apostrophes = quotes + block.count('"'), apostrophes or "'" in block
            content = tail + block
            inside = content.rstrip("\r\n")
            gap = gap or any(two in inside for two in ("\n\n", "\n\r", "\r\r"))
            tail, line = content[len(inside) :], line + block.count("\n")


def _named(file: Path, header: list[str], columns: list[Any]) -> Iterator[tuple[str, Any]]:
    """Leave out columns without a name: row numbers in front, and empty ones."""
    for at, (name, texts) in enumerate(zip(header, columns, strict=True)):
        if name:
            yield name, texts
        elif at == 0 or texts.null_count == len(texts):
            log.info("%s: column %d has no name and is not used", file, at + 1)
        else:
            raise InputError(f"{file}: column {at + 1} has cells, but no name in the header")


def _content(file: Path, encoding: str | None) -> tuple[bytes, str | None]:
    """Return the text as UTF-8, without mark and empty lines at the end, and a separator that it names."""
    try:
        with _opened(file) as f:
            raw = f.read()
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{file} cannot be read: {error}") from error
    _refuse_magic(file, raw)
    raw = _as_utf8(file, raw, encoding).rstrip(b"\r\n")
    if not raw.strip():
        raise InputError(f"{file} is empty")
    at = raw.find(b"\0")
    if at >= 0:
        raise InputError(f"{file} is not text, though its name says CSV: a NUL byte in line {_line(raw, at)}")
    return _without_hint(raw)


def _refuse_magic(file: Path, raw: bytes) -> None:
    for magic, said in _MAGIC.items():
        if raw.startswith(magic):
            raise InputError(f"{file} {said}")


def _as_utf8(file: Path, raw: bytes, encoding: str | None) -> bytes:
    """Return a text in another encoding as UTF-8, one in UTF-8 as it is; without its byte order mark."""
    found = encoding or next((name for mark, name in _MARKS.items() if raw.startswith(mark)), "utf-8")
    if found != "utf-8":
        try:
            raw = raw.decode(found).encode()
        except UnicodeDecodeError as error:
            raise InputError(f"{file} is not {found} text (byte {error.start:,}): {_ADVICE}") from error
    return raw.removeprefix(codecs.BOM_UTF8)


def _without_hint(raw: bytes) -> tuple[bytes, str | None]:
    """Take a first line such as ``sep=;`` away, and return what separates cells."""
    first, _, others = raw.partition(b"\n")
    said = first.rstrip(b"\r").decode("utf-8", "replace")
    if len(said) == 5 and said.lower().startswith("sep=") and others:
        return others, said[4]
    return raw, None


def _first_line(raw: bytes) -> bytes:
    return raw.partition(b"\n")[0].partition(b"\r")[0]


def _line(raw: bytes, at: int) -> int:
    return raw.count(b"\n", 0, at) + 1


def _plain(file: Path, raw: bytes, separator: str | None) -> tuple[list[str], list[Any]]:
    """Read a file without quotation marks below its header; None: find the separator."""
    import pyarrow as pa
    import pyarrow.compute as pc
    from pyarrow import csv as arrow

    if b"\n\n" in raw or b"\n\r" in raw or b"\r\r" in raw:
        return _quoted(file, raw, separator)  # an empty row, whose place it knows
    separator = separator or _separator(file, raw)
    try:
        header = _split(_first_line(raw).decode("utf-8"), separator)
        keys = [str(i) for i in range(len(header))]
        table = arrow.read_csv(
            pa.BufferReader(raw),
            read_options=arrow.ReadOptions(column_names=keys, skip_rows=1),
            parse_options=arrow.ParseOptions(delimiter=separator, quote_char=False, ignore_empty_lines=False),
            convert_options=arrow.ConvertOptions(
                column_types=dict.fromkeys(keys, pa.string()), strings_can_be_null=True, null_values=[""]
            ),
        )
    except (pa.ArrowInvalid, UnicodeDecodeError, csv.Error):
        return _quoted(file, raw, separator)
    columns = table.columns
    if any((pc.max(pc.binary_length(c)).as_py() or 0) > _MOST_CHARACTERS for c in columns):
        return _quoted(file, raw, separator)
    return header, [_without_blanks(c) for c in columns]


def _split(line: str, separator: str) -> list[str]:
    if '"' not in line:
        return line.split(separator)
    return next(csv.reader([line], delimiter=separator, strict=True, skipinitialspace=True))


def _without_blanks(texts: Any) -> Any:
    """Cut blanks after a separator, as the other way of reading does."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if not pc.any(pc.starts_with(texts, " ")).as_py():
        return texts
    cut = pc.utf8_ltrim(texts, " ")
    return pc.if_else(pc.equal(cut, ""), pa.scalar(None, pa.string()), cut)


def _quoted(file: Path, raw: bytes, separator: str | None) -> tuple[list[str], list[Any]]:
    """Read a file with quotation marks, or find out what is wrong with it."""
    import pyarrow as pa

    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{file} is not UTF-8 text (line {_line(raw, error.start)}): {_ADVICE}") from None
    rows = _rows(file, io.StringIO(text, newline=""), separator or _separator(file, raw))
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


def _rows(file: Path, lines: Iterator[str], separator: str) -> Iterator[list[str]]:
    """Yield the cells of the header and of every row; refuse rows that are longer or shorter than it."""
    reader = csv.reader(lines, delimiter=separator, strict=True, skipinitialspace=True)
    number, width, ends = 1, 0, False
    try:
        for cells in reader:
            width = width or len(cells)
            if not cells and width and not ends:  # empty rows at the end are none
                number, ends, empty = number + 1, True, reader.line_num
                continue
            if ends:
                if cells:
                    raise InputError(f"{file} row {number - 1}{_at_line(empty, number - 1)} is empty")
                continue
            if len(cells) != width or not cells:
                place = f"row {number}{_at_line(reader.line_num, number)}"
                raise InputError(f"{file} {place} {_misfit(cells, width)}")
            yield cells
            number += 1
    except csv.Error as error:
        said = str(error)
        if "field larger" in said:
            said = (
                f"a cell of more than {_MOST_CHARACTERS:,} characters, or a quotation mark without another,"
            )
        raise InputError(f"{file} cannot be read as CSV: {said} in row {number}") from error


def _at_line(line: int, row: int) -> str:
    return f" (line {line})" if line != row else ""


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
