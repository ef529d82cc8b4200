"""Read the files of Stata, SPSS and SAS by pyreadstat, with labels of codes and codes of missing values."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sparsereg.calibration.reading.labels import Labels, grouped, with_labels
from sparsereg.errors import InputError
from sparsereg.extras import needed_to_read

if TYPE_CHECKING:
    import pandas as pd

_READERS = {
    ".dta": ("read_dta", "Stata"), ".sav": ("read_sav", "SPSS"), ".zsav": ("read_sav", "SPSS"),
    ".por": ("read_por", "SPSS"), ".sas7bdat": ("read_sas7bdat", "SAS"), ".xpt": ("read_xport", "SAS"),
}  # fmt: skip
_WHOLE = ("read_por", "read_xport")
"""These do not know how many rows there are before they have read them."""


class StatisticsFile:
    """A file of a statistics program as ``tables.Rows``.

    Values that were declared to be missing, and Stata's and SAS's .a to .z, are missing. Labels of a SAS file
    stand in a catalogue, FILE.sas7bcat beside it.

    Args:
        file: The file.
        id: A column that identifies rows: whole numbers become integers.

    Raises:
        InputError: pyreadstat is not installed, or it is not such a file.
    """

    def __init__(self, file: Path, id: str | None = None) -> None:
        needed_to_read(file, "pyreadstat")
        self.file, self.id = file, id
        self._reader, self._program = _READERS[file.suffix.lower()]

    @cached_property
    def _about(self) -> Any:
        return self._read(metadataonly=True, **self._as_declared())[1]

    @property
    def names(self) -> list[str]:
        """See ``tables.Rows``."""
        return list(self._about.column_names)

    def parts(self, columns: list[str] | None, rows: int | None) -> Iterator[pd.DataFrame]:
        """See ``tables.Rows``."""
        total = self._about.number_rows
        if rows is None or self._reader in _WHOLE or total is None or total <= rows:
            yield self._part(columns)
            return
        for start in range(0, total, rows):
            yield self._part(columns, row_offset=start, row_limit=rows)

    def is_longer(self, rows: int) -> bool:
        """See ``tables.Rows``."""
        return self._reader not in _WHOLE and (self._about.number_rows or 0) > rows

    def _part(self, columns: list[str] | None, **which: int) -> pd.DataFrame:
        table, _ = self._read(usecols=columns, **which)
        for position, name in enumerate(table.columns):
            series = table.iloc[:, position]
            if series.dtype.kind not in "fiub":
                table.isetitem(position, series.where(series.notna() & (series != ""), None))
            elif name == self.id and series.dtype.kind == "f" and _is_whole(series.to_numpy()):
                table.isetitem(position, series.astype(np.int64))
        return with_labels(table, {n: v for n, v in self._labels.items() if n in table.columns})

    @cached_property
    def _labels(self) -> dict[str, Labels]:
        about = self._about
        return {
            name: grouped(by_code, [c for c in by_code if _stands_for_missing(c, name, about)])
            for name, by_code in about.variable_value_labels.items()
        }

    def _as_declared(self) -> dict[str, Any]:
        """Ask for what was declared to be missing, where a format has that."""
        return {"user_missing": True} if self._reader in ("read_sav", "read_dta", "read_sas7bdat") else {}

    def _read(self, **how: Any) -> Any:
        import pyreadstat

        catalogue = self.file.with_suffix(".sas7bcat")
        if self._reader == "read_sas7bdat" and catalogue.is_file():
            how["catalog_file"] = str(catalogue)
        try:
            return getattr(pyreadstat, self._reader)(str(self.file), **how)
        except Exception as error:
            said = " ".join(str(error).split())
            raise InputError(f"{self.file} cannot be read as a file of {self._program}: {said}") from error


def _is_whole(values: np.ndarray) -> bool:
    return bool(
        np.isfinite(values).all() and (values == np.floor(values)).all() and (np.abs(values) < 2**53).all()
    )


def _stands_for_missing(code: Any, name: str, about: Any) -> bool:
    """Whether a code is one of Stata's or SAS's missing values, or was declared to be one in SPSS."""
    if isinstance(code, str) and about.readstat_variable_types.get(name) != "string":
        return True
    ranges = about.missing_ranges.get(name, [])
    return any(r["lo"] <= code <= r["hi"] for r in ranges if isinstance(code, type(r["lo"])))
