"""Tables in files: as CSV, Parquet or for Stata, with texts that no spreadsheet takes for formulas."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsereg.files import write_atomically

if TYPE_CHECKING:
    import pandas as pd

_LAST_WHOLE = 2**53
_FORMULA = re.compile(r"'*[=+\-@\t\r\n\uff1d\uff0b\uff0d\uff20]")  # the last four are their wide forms
_NUMBER = re.compile(r"'*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


def inert(text: str) -> str:
    """Return a text for a cell of a CSV file that no spreadsheet takes for a formula.

    A text that starts with = + - @, a tab or the end of a line gets an apostrophe in front, which is how
    spreadsheets mark a text; so does one that starts so behind apostrophes, so that ``as_it_was`` finds
    every text again. Plain numbers such as -5 stay.
    """
    return f"'{text}" if _FORMULA.match(text) and not _NUMBER.fullmatch(text) else text


def as_it_was(cell: str) -> str:
    """Return the text that ``inert`` made a cell of; a cell that it did not change stays."""
    return cell[1:] if cell.startswith("'") and inert(cell) != cell else cell


def write_table(path: Path, table: "pd.DataFrame") -> None:
    """Write a table whole or not at all, as CSV, Parquet or for Stata by the name of the file.

    Args:
        path: Ends in .csv, .parquet or .dta.
        table: What to write, without its index; missing values become empty cells. Texts in a CSV file are
            ``inert``.
    """
    if path.suffix == ".parquet":
        write_atomically(path, lambda p: table.to_parquet(p, index=False))
    elif path.suffix == ".dta":
        plain = _for_stata(table)
        write_atomically(path, lambda p: plain.to_stata(p, write_index=False, version=118))
    else:
        safe = _each_text(table, inert)
        write_atomically(path, lambda p: safe.to_csv(p, index=False))


def _for_stata(table: "pd.DataFrame") -> "pd.DataFrame":
    """Return a table of what Stata has: whole numbers that its own would round become texts."""
    import pandas as pd

    changed = table.copy(deep=False)
    for name, kind in table.dtypes.items():
        large = False
        if pd.api.types.is_integer_dtype(kind) and len(table):
            large = bool(table[name].abs().max() > _LAST_WHOLE)
        if large or not pd.api.types.is_numeric_dtype(kind):
            changed[name] = table[name].astype(str).astype(object)
    return changed


def texts_as_they_were(table: "pd.DataFrame") -> "pd.DataFrame":
    """Return a table that was read from a CSV file with its texts as they were before ``write_table``."""
    return _each_text(table, as_it_was)


def _each_text(table: "pd.DataFrame", change: Callable[[str], str]) -> "pd.DataFrame":
    """Change every text in a table and in the names of its columns."""
    import pandas as pd

    def cell(value: Any) -> Any:
        return change(value) if isinstance(value, str) else value

    changed = table.copy(deep=False)
    for position, kind in enumerate(table.dtypes):
        if not (pd.api.types.is_numeric_dtype(kind) or pd.api.types.is_datetime64_any_dtype(kind)):
            before = table.iloc[:, position]
            after = before.astype(object).map(cell)
            if not after.equals(before.astype(object)):
                changed.isetitem(position, after)
    changed.columns = pd.Index([cell(name) for name in table.columns])
    return changed
