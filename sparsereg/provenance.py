"""Where results come from: the files that were read, the versions that were at work, the command."""

from __future__ import annotations

import hashlib
import platform
import shlex
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import sparsereg

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
    def of(cls, files: Iterable[tuple[str, Path]], packages: Sequence[str]) -> Provenance:
        """Look at files and at this process.

        Args:
            files: That were read, each with the key of the setting that names it.
            packages: Whose versions count, where they are installed.
        """
        name = Path(sys.argv[0]).name if sys.argv and sys.argv[0] else "python"
        return cls(
            started=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            command=shlex.join([name, *sys.argv[1:]]),
            inputs=[_described(key, file) for key, file in files],
            versions={
                "sparsereg": sparsereg.__version__,
                "python": platform.python_version(),
                **_versions(packages),
            },
            machine=f"{platform.system()} {platform.machine()}",
        )

    def to_dict(self) -> dict[str, Any]:
        """Return it as results.json has it."""
        return dict(vars(self))


def _described(key: str, file: Path) -> dict[str, Any]:
    return {"key": key, "path": str(file), "bytes": file.stat().st_size, "sha256": sha256(file)}


def sha256(file: Path) -> str:
    """Return the SHA-256 of a file, as ``sha256sum`` prints it."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _versions(packages: Sequence[str]) -> dict[str, str]:
    found = {}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
