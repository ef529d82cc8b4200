"""Where a calibration comes from: the files that its settings name."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from sparsereg.calibration.config import CalibrationRun
from sparsereg.calibration.reading.start import start_file
from sparsereg.calibration.reading.tables import in_file
from sparsereg.provenance import Provenance
from sparsereg.settings import flat, plain

_PACKAGES = ("numpy", "scipy", "torch", "pandas", "pyarrow", "numba", "pyreadstat", "openpyxl", "duckdb")
_FILES = (
    "households",
    "persons",
    "targets",
    "matrix",
    "weights",
    "variables",
    "start",
    "ckpt_path",
    "crosswalk",
    "groups",
)
"""Settings that name files."""


def provenance_of(cfg: CalibrationRun) -> Provenance:
    """Look at the files that settings name, and at this process.

    Args:
        cfg: The settings of the run.
    """
    return Provenance.of(_files(cfg), _PACKAGES)


def _files(cfg: CalibrationRun) -> Iterator[tuple[str, Path]]:
    """Return every file that a setting names, with the key of the setting."""
    for key, value in flat(plain(cfg)).items():
        if key.rpartition(".")[2] in _FILES and isinstance(value, str):
            file = in_file(start_file(value) if key == "start" else value)[0]
            if file.is_file():
                yield key, file
