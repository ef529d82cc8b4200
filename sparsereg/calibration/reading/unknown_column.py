"""What is said where a column is named that a table does not have."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparsereg.calibration.reading.cells import shown
from sparsereg.errors import InputError, did_you_mean

if TYPE_CHECKING:
    import pandas as pd


def require_column(table: pd.DataFrame, column: str, file: object, what: str) -> None:
    """Raise an InputError that names the nearest column unless the table has this one.

    Args:
        table: The table.
        column: The column that should be there.
        file: Where the table came from, for the message.
        what: What the column is needed for.
    """
    if column not in table.columns:
        raise no_column(file, column, [str(c) for c in table.columns], f" ({what})")


def no_column(file: object, column: str, known: list[str], what: str = "") -> InputError:
    """An error that says that a file has no such column, with the nearest one.

    Args:
        file: Where the table came from.
        column: The column that is not there.
        known: Those that are.
        what: What it is needed for, in brackets.
    """
    return InputError(f"{file} has no column {column!r}{what}{did_you_mean(column, known)}")


def unknown_in(column: str, role: str, known: list[str], elsewhere: str | None) -> str:
    """Words for a column that is named in a row of targets, and that the file does not have.

    Args:
        column: The column that is not there.
        role: What it is named as, behind its name.
        known: Those that are there.
        elsewhere: Where else it is, in place of the nearest one.
    """
    return f"unknown column {shown(column)}{role}{elsewhere or did_you_mean(column, known)}"
