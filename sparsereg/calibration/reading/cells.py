"""What the cells of a table mean: which are numbers, and which number each one is."""

from __future__ import annotations

import decimal
import numbers as abstract
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from sparsereg.checks import LARGEST
from sparsereg.errors import InputError

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

SIGNS = {"point": ".", "comma": ","}
_MOST_CHARACTERS = 400
_NUMBER = re.compile(r"[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
_COMMA = re.compile(r"[+-]?[0-9][0-9.']*,[0-9]+")
_THOUSANDS = r"^\s*[+-]?[0-9]{1,3}(\.[0-9]{3})+(,|\s*$)"
"""What means thousands where the comma is the decimal sign, and thousandths where the point is."""
_ABSENT = (".", "-", "na", "n/a", "nan", "null", "none", "#n/a")
"""What programs write for a missing value; here it is a text."""
_TRUTHS = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_LAST_EXACT = 2**53


_SIGN = "sparsereg decimal sign"


def with_sign(table: pd.DataFrame, decimal: str) -> pd.DataFrame:
    """Let a table know that its texts have a decimal comma; return it."""
    if decimal == "comma":
        table.attrs[_SIGN] = decimal
    return table


def reader_of(table: pd.DataFrame) -> Callable[[object], float]:
    """Return ``number``, or what reads decimal commas and refuses points that may be of thousands."""
    return _number_with_comma if _SIGN in table.attrs else number


def _number_with_comma(cell: object) -> float:
    if not isinstance(cell, str):
        return number(cell)
    return np.nan if re.match(_THOUSANDS, cell) else number(cell.replace(",", "."))


def number(cell: object) -> float:
    """Return what a cell says as a number; NaN if it is none, infinity if it is beyond all numbers.

    Numbers are plain ones, also in quotes: ``-1``, ``2.50``, ``1e6``. None are dates, times, true and false,
    ``1,234``, ``1_000``, ``0x1F``, ``nan``, ``inf``.
    """
    if isinstance(cell, str):
        text = cell.strip()
        return float(text) if len(text) <= _MOST_CHARACTERS and _NUMBER.fullmatch(text) else np.nan
    if isinstance(cell, bool | np.bool_) or not isinstance(cell, abstract.Real | decimal.Decimal):
        return np.nan
    try:
        return float(cell)
    except OverflowError:
        return np.inf


def numbers(
    table: pd.DataFrame,
    column: str,
    file: object,
    allow_missing: bool = False,
    first: int = 0,
    rows: np.ndarray | None = None,
) -> np.ndarray:
    """Return a column as float64; name the first cell that is not a finite number, or far too large.

    Args:
        table: The table.
        column: One of its columns.
        file: Where the table came from, for the message.
        allow_missing: Give NaN for a missing cell instead of refusing it.
        first: How many rows stand before the table in its file.
        rows: Instead: where each row stands in its file, from 0.
    """
    series, read = table[column], reader_of(table)
    values = _as_float64(series, read)
    if (np.abs(values) <= LARGEST).all():
        return values
    missing = (series.isna() | series.astype(str).str.strip().eq("")).to_numpy(dtype=bool)
    wrong = ~(np.abs(values) <= LARGEST)
    if allow_missing:
        wrong &= ~missing
    if wrong.any():
        at = int(np.flatnonzero(wrong)[0])
        cell = "is missing" if missing[at] else f"is {shown(series.iloc[at])}"
        more = f" ({int(wrong.sum())} such rows)" if wrong.sum() > 1 else ""
        place = row(first + at if rows is None else int(rows[at]))
        limit = f" of at most {LARGEST:g} in size" if np.isfinite(values[at]) else ""
        raise InputError(
            f"{file}: {column} must be a finite number{limit}, but it {cell} in row {place}{more}"
            f"{advice(series.iloc[at], read)}"
        )
    return values


def exact_numbers(series: pd.Series, missing: np.ndarray) -> np.ndarray:
    """Return a column of numbers as int64 or uint64 where those hold it exactly, else as float64.

    Args:
        series: Numbers of any kind.
        missing: Where there is none; what is returned there means nothing.
    """
    import pandas as pd

    if pd.api.types.is_integer_dtype(series.dtype):
        whole = np.uint64 if pd.api.types.is_unsigned_integer_dtype(series.dtype) else np.int64
        if not missing.any():
            return np.asarray(series.to_numpy(whole))
        return np.asarray(series.to_numpy(whole, na_value=0))
    if series.dtype == object and all(isinstance(v, abstract.Integral) for v in series[~missing]):
        filled = [0 if absent else int(v) for v, absent in zip(series, missing, strict=True)]
        if all(-(2**63) <= v < 2**63 for v in filled):
            return np.array(filled, dtype=np.int64)
    return _as_float64(series)


def _as_float64(series: pd.Series, read: Callable[[object], float] = number) -> np.ndarray:
    """NaN where a cell is missing or no number, infinity where it is beyond all numbers."""
    import pandas as pd

    kind = series.dtype
    plain = pd.api.types.is_numeric_dtype(kind) and not isinstance(kind, pd.CategoricalDtype)
    if plain and not pd.api.types.is_bool_dtype(kind) and not pd.api.types.is_complex_dtype(kind):
        return np.asarray(series.to_numpy(dtype=np.float64, na_value=np.nan))
    return np.fromiter(map(read, series.astype(object)), dtype=np.float64, count=len(series))


def row(position: int) -> int:
    """Return the spreadsheet row of the data row at ``position`` (from 0): the header is row 1."""
    return position + 2


def shown(cell: object) -> str:
    """Return a cell as a message shows it."""
    text = repr(cell) if isinstance(cell, str) else str(cell)
    return text if len(text) <= 60 else text[:57] + "..."


def advice(cell: object, read: Callable[[object], float] = number) -> str:
    """Return what to do about a cell that is a number in another country, or nothing.

    Args:
        cell: The cell.
        read: What it could not be read by, see ``reader_of``.
    """
    if read is not number and isinstance(cell, str) and np.isfinite(read(cell.replace(".", ""))):
        return "; with problem.decimal=comma this point may be one of thousands, which are not separated"
    if isinstance(cell, str) and len(cell) <= _MOST_CHARACTERS and _COMMA.fullmatch(cell.strip()):
        return "; if the comma is the decimal sign, say problem.decimal=comma; thousands are not separated"
    if isinstance(cell, str) and cell.strip().lower() in _ABSENT:
        return "; a missing value is an empty cell"
    return ""


def typed(texts: pa.ChunkedArray, decimal_sign: str = ".") -> Any:
    """Convert the texts of a column to whole numbers, numbers, or true and false, if all of them are such.

    Args:
        texts: Texts without blanks around them; null is missing.
        decimal_sign: "." or ",".

    Returns:
        A pyarrow array: int64, float64, bool, or the texts as they were. Numbers are rounded correctly.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    if texts.null_count == len(texts):
        return texts.cast(pa.float64())
    trimmed = _with_point(texts, decimal_sign)
    try:
        whole = trimmed.cast(pa.int64())
        hexadecimal = pc.any(pc.match_substring(trimmed, "x", ignore_case=True))  # pyarrow reads them
        if not hexadecimal.as_py():
            return whole
    except pa.ArrowInvalid:
        pass
    try:
        values = trimmed.cast(pa.float64())
        if pc.all(pc.is_finite(values)).as_py():
            return values
    except pa.ArrowInvalid:
        pass
    truths = pc.index_in(trimmed, pa.array(list(_TRUTHS)))
    if truths.null_count == texts.null_count:
        return pc.take(pa.array(list(_TRUTHS.values())), truths)
    return texts


def _with_point(texts: pa.ChunkedArray, decimal_sign: str) -> pa.ChunkedArray:
    """Return texts of numbers as they are written with a decimal point, without blanks around them."""
    import pyarrow.compute as pc

    trimmed = pc.utf8_trim(texts, " ")
    if decimal_sign == ",":
        thousands = pc.match_substring_regex(trimmed, _THOUSANDS)
        trimmed = pc.if_else(thousands, pc.replace_substring(trimmed, ".", "_"), trimmed)
        trimmed = pc.replace_substring(trimmed, ",", ".")
    return trimmed


def kind_of(values: Any, texts: pa.ChunkedArray) -> str:
    """Return what ``typed`` or ``same_text`` found a part of a column to be.

    Args:
        values: What it returned.
        texts: What it was given.
    """
    import pyarrow as pa

    if texts.null_count == len(texts):
        return "none"
    names = {pa.int64(): "whole", pa.float64(): "number", pa.bool_(): "truth"}
    return names.get(values.type, "text")


def wider(one: str, other: str) -> str:
    """Return what a column is whose parts are of these kinds: none, whole, number, truth or text."""
    if "none" in (one, other):
        return other if one == "none" else one
    return one if one == other else "number" if {one, other} == {"whole", "number"} else "text"


def as_kind(kind: str, texts: pa.ChunkedArray, decimal_sign: str = ".") -> Any:
    """Convert the texts of a part of a column to what the whole column is.

    Args:
        kind: As ``wider`` returns it.
        texts: Texts without blanks in front of them; null is missing.
        decimal_sign: "." or ",".
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    if kind == "text":
        return texts
    if kind == "truth":
        truths = pc.index_in(_with_point(texts, decimal_sign), pa.array(list(_TRUTHS)))
        return pc.take(pa.array(list(_TRUTHS.values())), truths)
    return _with_point(texts, decimal_sign).cast(pa.int64() if kind == "whole" else pa.float64())


def same_text(texts: pa.ChunkedArray) -> Any:
    """Convert texts to whole numbers if these print as just those texts: not ``007``, not ``1.0``."""
    import pyarrow as pa
    import pyarrow.compute as pc

    try:
        whole = texts.cast(pa.int64())
    except pa.ArrowInvalid:
        return texts
    return whole if pc.all(pc.equal(whole.cast(pa.string()), texts)).as_py() else texts


def to_series(values: Any) -> pd.Series:
    """Turn a pyarrow column into a pandas one; whole numbers stay exact beside missing ones."""
    import pandas as pd
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_integer(values.type) and values.null_count:
        low, high = (int(v.as_py() or 0) for v in pc.min_max(values).values())
        if max(-low, high) > _LAST_EXACT:
            kinds = {pa.int64(): pd.Int64Dtype(), pa.uint64(): pd.UInt64Dtype()}
            return values.to_pandas(types_mapper=kinds.get)
    return values.to_pandas()
