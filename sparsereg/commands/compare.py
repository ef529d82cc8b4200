"""The figures of several runs side by side: `sparsereg compare RUN RUN [...] [keys=KEY,KEY]`."""

import json
import sys
from pathlib import Path
from typing import Any

from sparsereg.errors import InputError, nearest

HELP = """The figures of several runs side by side.

usage: sparsereg compare RUN [RUN ...] [keys=KEY,KEY]

RUN is the folder of a run of train, test or calibrate, or its results.json. Without keys all figures are
shown that are single numbers or words; a dash stands for one that a run does not have. Of two runs of
calibrate it also says which targets moved and which households came and went; as tables these are written by
sparsereg calibrate compare=RUN1,RUN2."""


def main(arguments: list[str] | None = None) -> None:
    """Print the table of the runs that the arguments name."""
    given = sys.argv[1:] if arguments is None else arguments
    if not given or {"-h", "--help"} & set(given):
        print(HELP)
        sys.exit(0 if given else 2)
    try:
        print(compare(given))
        for line in calibrations(given):
            print(line)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def compare(arguments: list[str]) -> str:
    """Return the table as text: a row for each figure, a column for each run.

    Raises:
        InputError: a run has no results, or no run has one of the keys.
    """
    chosen = [a.removeprefix("keys=") for a in arguments if a.startswith("keys=")]
    runs = [a for a in arguments if not a.startswith("keys=")]
    results = [_read(Path(run)) for run in runs]
    known = list(dict.fromkeys(key for result in results for key in result))
    keys = [key.strip() for text in chosen for key in text.split(",")] or known
    for key in keys:
        if key not in known:
            raise InputError(f"keys={key}: no run has it{nearest(key, known)}")
    rows = [["", *runs], *([key, *(_shown(result.get(key)) for result in results)] for key in keys)]
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    )


def calibrations(arguments: list[str]) -> list[str]:
    """Return which targets moved and which households came and went, if these are two runs of calibrate."""
    runs = [Path(a) for a in arguments if not a.startswith("keys=")]
    if len(runs) != 2 or not all((run / "targets.csv").is_file() for run in runs):
        return []
    from sparsereg.calibration.reporting.comparison import compare_runs

    return ["", *compare_runs(*runs).lines()]


def _read(run: Path) -> dict[str, Any]:
    file = run / "results.json" if run.is_dir() else run
    try:
        results = json.loads(file.read_text())
    except OSError as error:
        raise InputError(f"{file}: {error.strerror}; give the folder of a run that has finished") from error
    except ValueError as error:
        raise InputError(f"{file}: not the results.json of a run") from error
    if not isinstance(results, dict):
        raise InputError(f"{file}: not the results.json of a run")
    return {key: value for key, value in results.items() if not isinstance(value, dict | list)}


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.6g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
