"""Where results come from: the files that were read, the versions that were at work, the command."""

from __future__ import annotations

import hashlib
import platform
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import sparsereg
from sparsereg.calibration.config import CalibrationRun
from sparsereg.calibration.reading.start import start_file
from sparsereg.calibration.reading.tables import in_file
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
)
"""Settings that name files."""
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Provenance:
    """Where the results of a run come from.

    Args:
        started: When, in universal time.
        command: As it was typed.
        inputs: Per file that was read: key, path, bytes, sha256.
        versions: By name: sparsereg, python, the packages at work.
        machine: System and processor.
    """

    started: str
    command: str
    inputs: list[dict[str, Any]]
    versions: dict[str, str]
    machine: str

    @classmethod
    def of(cls, cfg: CalibrationRun) -> Provenance:
        """Look at the files that settings name, and at this process.

        Args:
            cfg: The settings of the run.
        """
        name = Path(sys.argv[0]).name if sys.argv and sys.argv[0] else "python"
        return cls(
            started=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            command=shlex.join([name, *sys.argv[1:]]),
            inputs=[_described(key, file) for key, file in _files(cfg)],
            versions={"sparsereg": sparsereg.__version__, "python": platform.python_version(), **_packages()},
            machine=f"{platform.system()} {platform.machine()}",
        )

    def to_dict(self) -> dict[str, Any]:
        """Return it as results.json has it."""
        return dict(vars(self))


def _files(cfg: CalibrationRun) -> Iterator[tuple[str, Path]]:
    """Return every file that a setting names, with the key of the setting."""
    for key, value in flat(plain(cfg)).items():
        if key.rpartition(".")[2] in _FILES and isinstance(value, str):
            file = in_file(start_file(value) if key == "start" else value)[0]
            if file.is_file():
                yield key, file


def _described(key: str, file: Path) -> dict[str, Any]:
    return {"key": key, "path": str(file), "bytes": file.stat().st_size, "sha256": sha256(file)}


def sha256(file: Path) -> str:
    """Return the SHA-256 of a file, as ``sha256sum`` prints it."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _packages() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
