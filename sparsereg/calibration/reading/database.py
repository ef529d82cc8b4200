"""Read tables of DuckDB and SQLite files: their rows only; no view is evaluated, no code is run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from sparsereg.calibration.reading.parquet_file import from_arrow
from sparsereg.errors import InputError, did_you_mean
from sparsereg.extras import needed_to_read

if TYPE_CHECKING:
    import pandas as pd

_SQLITE, _DUCKDB = b"SQLite format 3\0", b"DUCK"
_LONGEST_LIST = 12


class Database:
    """A table of a database file as ``tables.Rows``.

    Args:
        file: A file of SQLite or DuckDB; which one, it says itself.
        table: The name of the table, or schema.table; None: the only one.
        id: A column of which no value is changed.

    Raises:
        InputError: duckdb is not installed, it is no such file, or has no such table.
    """

    def __init__(self, file: Path, table: str | None, id: str | None = None) -> None:
        self.file = file
        with file.open("rb") as f:
            start = f.read(16)
        if start == _SQLITE:
            self._engine: _Sqlite | _DuckDB = _Sqlite(file)
        elif start[8:12] == _DUCKDB:
            needed_to_read(file, "duckdb")
            self._engine = _DuckDB(file, id)
        else:
            raise InputError(f"{file} is neither a DuckDB nor an SQLite database, though its name says so")
        with self._reported():
            self.table = self._chosen(table)

    def _chosen(self, table: str | None) -> str:
        known, views = self._engine.tables()
        if table is None:
            if len(known) != 1:
                listed = ", ".join(known[:_LONGEST_LIST]) + (", ..." if len(known) > _LONGEST_LIST else "")
                example = f"::{known[0]}" if known else ""
                what = f" ({listed}): say which one, {self.file}{example}" if known else ""
                raise InputError(f"{self.file} has {len(known)} tables{what}")
            return known[0]
        if table in views:
            raise InputError(
                f"{self.file}::{table} is a view, and no code from a file is run: make a table of it"
                f" (CREATE TABLE t AS SELECT * FROM {table})"
            )
        if table not in known:
            raise InputError(f"{self.file} has no table {table!r}{did_you_mean(table, known)}")
        return table

    @cached_property
    def names(self) -> list[str]:
        """See ``tables.Rows``."""
        with self._reported():
            return self._engine.columns(self.table)

    def parts(self, columns: list[str] | None, rows: int | None) -> Iterator[pd.DataFrame]:
        """See ``tables.Rows``."""
        chosen = self.names if columns is None else columns
        with self._reported():
            yield from self._engine.parts(self.table, chosen, rows)

    def is_longer(self, rows: int) -> bool:
        """See ``tables.Rows``."""
        with self._reported():
            return self._engine.count(self.table) > rows

    @contextlib.contextmanager
    def _reported(self) -> Iterator[None]:
        try:
            yield
        except (InputError, GeneratorExit):
            raise
        except Exception as error:
            raise InputError(f"{self.file} cannot be read: {' '.join(str(error).split())}") from error


class _Sqlite:
    def __init__(self, file: Path) -> None:
        self.file = file

    @contextlib.contextmanager
    def _connected(self) -> Iterator[Any]:
        import sqlite3

        connection = sqlite3.connect(f"file:{quote(str(self.file.absolute()))}?mode=ro", uri=True)
        try:
            connection.execute("PRAGMA trusted_schema = OFF")
            yield connection
        finally:
            connection.close()

    def tables(self) -> tuple[list[str], list[str]]:
        """Names of tables, and of what has to be evaluated."""
        query = "SELECT name, type, sql FROM sqlite_master WHERE type IN ('table', 'view') ORDER BY rowid"
        with self._connected() as connection:
            found = [r for r in connection.execute(query) if not r[0].startswith("sqlite_")]
        views = [
            n for n, kind, sql in found if kind == "view" or "virtual" in (sql or "").lower().split()[:2]
        ]
        return [n for n, *_ in found if n not in views], views

    def count(self, table: str) -> int:
        with self._connected() as connection:
            return int(connection.execute(f"SELECT count(*) FROM {_quoted(table)}").fetchone()[0])

    def columns(self, table: str) -> list[str]:
        with self._connected() as connection:
            return [r[1] for r in connection.execute(f"PRAGMA table_info({_quoted(table)})")]

    def parts(self, table: str, columns: list[str], rows: int | None) -> Iterator[pd.DataFrame]:
        import pandas as pd

        with self._connected() as connection:
            mixed = self._mixed(connection, table, columns)
            cursor = connection.execute(f"SELECT {', '.join(map(_quoted, columns))} FROM {_quoted(table)}")
            while some := cursor.fetchall() if rows is None else cursor.fetchmany(rows):
                cells = dict(zip(columns, zip(*some, strict=True), strict=True))
                yield pd.DataFrame(
                    {n: [_text(v) for v in c] if n in mixed else list(c) for n, c in cells.items()}
                )
                if rows is None:
                    break

    def _mixed(self, connection: Any, table: str, columns: list[str]) -> set[str]:
        """Columns with texts beside numbers: they are texts in every part."""
        kinds = ", ".join(f"group_concat(DISTINCT typeof({_quoted(c)}))" for c in columns)
        found = connection.execute(f"SELECT {kinds} FROM {_quoted(table)}").fetchone()
        sets = [set((kind or "").split(",")) - {"null"} for kind in found]
        return {c for c, kinds in zip(columns, sets, strict=True) if "text" in kinds and len(kinds) > 1}


class _DuckDB:
    def __init__(self, file: Path, id: str | None) -> None:
        self.file, self.id = file, id

    @contextlib.contextmanager
    def _connected(self) -> Iterator[Any]:
        import duckdb

        closed: dict[str, str | bool | int | float | list[str]] = {
            "enable_external_access": "false",
            "autoload_known_extensions": "false",
        }
        connection = duckdb.connect(str(self.file), read_only=True, config=closed)
        try:
            yield connection
        finally:
            connection.close()

    def tables(self) -> tuple[list[str], list[str]]:
        """Names of tables, and of what has to be evaluated; with their schema unless that is main."""
        query = "SELECT table_schema, table_name, table_type FROM information_schema.tables ORDER BY 1, 2"
        with self._connected() as connection:
            found = connection.execute(query).fetchall()
        named = [(name if schema == "main" else f"{schema}.{name}", kind) for schema, name, kind in found]
        tables = [name for name, kind in named if kind == "BASE TABLE"]
        return tables, [name for name, kind in named if kind != "BASE TABLE"]

    def _place(self, table: str) -> str:
        """The table as SQL names it; of a point in its name, the schema stands before it if there is one."""
        query = "SELECT table_schema, table_name FROM information_schema.tables"
        with self._connected() as connection:
            found = connection.execute(query).fetchall()
        schema, name = next((s, n) for s, n in found if table == (n if s == "main" else f"{s}.{n}"))
        return f"{_quoted(schema)}.{_quoted(name)}"

    def count(self, table: str) -> int:
        place = self._place(table)
        with self._connected() as connection:
            return int(connection.execute(f"SELECT count(*) FROM {place}").fetchone()[0])

    def columns(self, table: str) -> list[str]:
        with self._connected() as connection:
            return [r[0] for r in connection.execute(f"DESCRIBE {self._place(table)}").fetchall()]

    def parts(self, table: str, columns: list[str], rows: int | None) -> Iterator[pd.DataFrame]:
        import pyarrow as pa

        place = self._place(table)
        with self._connected() as connection:
            asked = connection.sql(f"SELECT {', '.join(map(_quoted, columns))} FROM {place}")
            if rows is None:
                yield from_arrow(asked.to_arrow_table(), self.id)
                return
            for batch in asked.to_arrow_reader(rows):
                yield from_arrow(pa.Table.from_batches([batch]), self.id)


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _text(value: Any) -> str | None:
    return None if value is None else str(value)
