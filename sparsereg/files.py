"""Files that appear whole or not at all, and run folders that are never shared or overwritten."""

import json
import math
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a file beside ``path``, then rename it.

    Args:
        path: the file to make.
        write: gets the temporary path, which has the same suffix.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    beside = Path(name)
    try:
        write(beside)
        umask = os.umask(0)
        os.umask(umask)
        beside.chmod(0o666 & ~umask)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON object whole or not at all; NaN and infinity, which JSON does not have, become null."""
    text = json.dumps(_plain(content), indent=2) + "\n"
    write_atomically(path, lambda p: p.write_text(text))


def write_table(path: Path, table: "pd.DataFrame") -> None:
    """Write a table whole or not at all, as CSV or Parquet by the name of the file.

    Args:
        path: Ends in .csv or .parquet.
        table: What to write; missing values become empty cells.
    """
    if path.suffix == ".parquet":
        write_atomically(path, lambda p: table.to_parquet(p, index=False))
    else:
        write_atomically(path, lambda p: table.to_csv(p, index=False))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def new_version(parent: Path) -> Path:
    """Make and return the next free folder ``parent/version_N``; safe beside other processes."""
    parent.mkdir(parents=True, exist_ok=True)
    taken = [p.name.removeprefix("version_") for p in parent.glob("version_*")]
    number = max((int(t) for t in taken if t.isdigit()), default=-1) + 1
    while True:
        folder = parent / f"version_{number}"
        try:
            folder.mkdir()
        except FileExistsError:
            number += 1
        else:
            return folder


def free_path(path: Path) -> Path:
    """Return ``path``, or the first of ``stem-1.suffix``, ``stem-2.suffix`` ... that does not exist."""
    number = 0
    candidate = path
    while candidate.exists():
        number += 1
        candidate = path.with_name(f"{path.stem}-{number}{path.suffix}")
    return candidate
