"""What every end of a script must look like."""

import csv
import json
import re
from pathlib import Path

from .process import SECRET, Outcome

INFORMATIVE = (
    "--help",
    "-h",
    "--hydra-help",
    "--version",
    "--cfg",
    "-c",
    "--info",
    "-i",
    "-sc",
    "--shell-completion",
)
_NUMBER = re.compile(r"[-+]?(\d[\d_]*\.?\d*|\.\d+)([eE][-+]?\d+)?")


def violations(outcome: Outcome, arguments: list[str], folder: Path, expected: str = "any") -> list[str]:
    """Return what is wrong with an end, each in a few words; nothing if it is as it must be.

    Args:
        outcome: of the process.
        arguments: what the user typed.
        folder: where the user stood.
        expected: ``accept`` (must end with 0), ``refuse`` (with 2) or ``any`` of the two.
    """
    if outcome.timed_out:
        found = ["hangs" if outcome.code != 143 else "runs on (ended by SIGTERM)"]
    elif outcome.code == 0:
        found = _done(outcome, arguments, folder)
    elif outcome.code == 2:
        found = _refused(outcome, arguments)
    elif outcome.code == 3 and any(a.startswith("require.") for a in arguments):
        short = any(line.startswith("short: ") for line in outcome.err.splitlines())
        found = _done(outcome, arguments, folder) + ([] if short else ["exit code 3 without a word"])
    else:
        found = [f"exit code {outcome.code}"]
    if outcome.code in (0, 2) and expected != "any" and (outcome.code == 0) != (expected == "accept"):
        found.append("refused, should pass" if expected == "accept" else "passed, should be refused")
    if "Traceback" in outcome.err:
        found.append("traceback")
    if outcome.left:
        found.append("processes are left running")
    asked_for = any("SECRET" in a for a in arguments)  # on the command line, variables are the user's to name
    if SECRET in outcome.out + outcome.err and not asked_for:
        found.append("prints a secret of the environment")
    return found + _files(folder, asked_for)


def _done(outcome: Outcome, arguments: list[str], folder: Path) -> list[str]:
    if any(a.partition("=")[0] in INFORMATIVE for a in arguments):
        return [] if outcome.out.strip() else ["says nothing"]
    if outcome.results is None:
        return ["no `results:` line at the end"]
    path = folder / outcome.results
    if not path.is_file():
        return ["the results are not there"]
    if path.suffix == ".json":
        try:
            json.loads(path.read_text(), parse_constant=lambda name: 1 / 0)
        except (ValueError, ZeroDivisionError):
            return ["results.json is not JSON"]
    return []


def _refused(outcome: Outcome, arguments: list[str]) -> list[str]:
    lines = outcome.err.splitlines()
    errors = [line for line in lines if line.startswith("error:")]
    found = []
    # A sweep tells of each job when it ends; a run that has begun has told what it trains.
    told = any(a in ("-m", "--multirun") for a in arguments) or any("; files in " in line for line in lines)
    if len(errors) != 1:
        found.append(f"{len(errors)} lines start with error:")
    elif not lines[0].startswith("error:") and not told:
        found.append("something stands before error:")
    if any(len(line) > 4000 for line in errors):
        found.append("the error is too long to read")
    if errors and len(errors[0].removeprefix("error:").strip()) < 8:
        found.append("the error says nothing")
    return found


def _files(folder: Path, asked_for: bool) -> list[str]:
    """Return what is wrong with the files of a folder, whatever happened."""
    found = []
    if (folder / "CANARY").exists():
        found.append("RUNS CODE FROM A FILE")
    outputs = folder / "outputs"
    for path in outputs.rglob("*") if outputs.is_dir() else ():
        if path.is_file() and path.suffix in (".csv", ".json", ".yaml", ".html", ".log"):
            text = path.read_bytes().decode(errors="replace")
            if SECRET in text and not asked_for:
                found.append(f"writes a secret of the environment: {path.name}")
            if path.suffix == ".csv" and path.name != "hparams.csv" and (cell := formula(text)):
                found.append(f"a spreadsheet runs a cell of {path.name}: {cell[:40]!r}")
        if (
            path.is_file()
            and path.name.startswith(".")
            and path.suffix in (".ckpt", ".pt", ".json", ".csv", ".npz")
        ):
            found.append(f"leaves a temporary file: {path.suffix}")
    return found


def formula(text: str) -> str | None:
    """Return the first cell of a table that a spreadsheet would run."""
    csv.field_size_limit(1 << 30)
    for row in csv.reader(text.splitlines()):
        for cell in row:
            if (
                cell[:1] in ("=", "+", "-", "@", "\t")
                and not _NUMBER.fullmatch(cell)
                and cell not in ("-inf", "-")
            ):
                return cell
    return None


def changed(before: dict[str, bytes], folder: Path) -> list[str]:
    """Return which files of an earlier run are no longer what they were."""
    found = []
    for name, content in before.items():
        path = folder / name
        if not path.is_file():
            found.append(f"an earlier file is gone: {Path(name).name}")
        elif path.read_bytes() != content:
            found.append(f"an earlier file has changed: {Path(name).name}")
    return found
