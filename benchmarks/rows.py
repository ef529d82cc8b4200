"""Tables that grow row by row, so that a benchmark which was stopped goes on where it was."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def done(path: Path) -> list[dict[str, str]]:
    """The rows that earlier calls have written; none if there is no such file."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def append(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows, all of one set of columns, behind those that are there; a new file gets a header."""
    is_new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        if is_new:
            writer.writeheader()
        writer.writerows(rows)
