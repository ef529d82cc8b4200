"""What a run leaves behind, each from the network in training to the file that is shipped: one table for all.

Every figure is measured on the same examples in the same way, of the file itself where there is one.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from sparsereg.compression.timing.latency import Timing, in_words
from sparsereg.training.tasks.task import SHARES, Task

NAMES = {
    "dense": "the network without gates, at its full size",
    "gated": "the network with its gates, as it was trained",
    "compacted": "what the gates leave, without gates",
    "shrunk": "made smaller in one shot, without training",
    "tuned": "what the gates leave, trained further",
    "size": "a size of the front: made smaller in one shot, repaired and trained further",
    "exported": "the same for other runtimes, BatchNorm folded",
    "int8": "the same in 8-bit integers",
}
"""Kinds of artefacts in the order in which they are made, and what they are."""


@dataclass(frozen=True)
class Artefact:
    """One form of a network.

    Attributes:
        name: one of ``NAMES``.
        file: where it is; None if it is in no file.
        figures: of the test, by name, ``test_acc`` say; {} if it was not measured.
        parameters: weights that it has.
        macs: multiply-accumulate operations for one example.
        megabytes: of the file in 10^6 bytes; of a checkpoint, which also holds the optimizer, and of what
            is in no file, of its parameters.
        milliseconds: for a batch, by runtime and batch size (as text, as in JSON); {} if it was not timed.

    Example:
        >>> Artefact("dense", None, {}, 10, 20, 0.1).milliseconds
        {}
    """

    name: str
    file: str | None
    figures: Mapping[str, float | None]
    parameters: int | None
    macs: int | None
    megabytes: float | None
    milliseconds: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def timed(self, rows: Sequence[Timing]) -> "Artefact":
        """Return it with its own rows of a benchmark."""
        found: dict[str, dict[str, float]] = {}
        for row in rows:
            if row.model == self.name:
                found.setdefault(row.runtime, {})[str(row.batch)] = row.seconds * 1e3
        return replace(self, milliseconds=found)

    def to_dict(self) -> dict[str, Any]:
        """Return it as results.json has it."""
        return asdict(self)


def megabytes(parameters: int) -> float:
    """Return the size of parameters in float32, in 10^6 bytes."""
    return 4e-6 * parameters


def file_megabytes(*files: Path) -> float:
    """Return the size of files, in 10^6 bytes."""
    return sum(file.stat().st_size for file in files) / 1e6


LOSS = 0.005
"""What a file in 8-bit integers may lose and still be shipped; of what is no share, as a share of it."""


def to_ship(
    artefacts: Sequence[Artefact], task: Task, results: Mapping[str, Any] | None = None
) -> str | None:
    """Return the one file to ship: the last, but in 8-bit integers only if that is faster and as good.

    Args:
        artefacts: in order.
        task: by whose main figure files are compared.
        results: of a training run; a front needs a pick.
    """
    if results is not None and results.get("front") and not results.get("picked"):
        return None
    files = [a for a in artefacts if a.file is not None]
    if not files:
        return None
    return (files[-1] if against_int8(artefacts, task) is None else files[-2]).file


def why_none(results: Mapping[str, Any]) -> str:
    """Say why there is no file to ship.

    Args:
        results: of a run.
    """
    if results.get("front"):
        return (
            "no size was picked, and ckpt_path of this run is the whole network: take"
            " front/SIZE/compacted.pt, or give pick='parameters<=NUMBER'"
        )
    return "this run wrote no checkpoint"


def against_int8(artefacts: Sequence[Artefact], task: Task) -> str | None:
    """Say why the file in 8-bit integers is not shipped; None if it is, or there is none."""
    rows = {a.name: a for a in artefacts}
    if not {"exported", "int8"} <= rows.keys():
        return None
    plain, small = rows["exported"], rows["int8"]
    first, second = (a.figures.get(f"test_{task.figure}") for a in (plain, small))
    if first is not None and second is not None:
        allowed = LOSS * (1 if task.figure in SHARES else abs(first))
        if (first - second if task.larger_is_better else second - first) > allowed:
            return f"in 8-bit integers it is less good: {second:.4f} instead of {first:.4f}"
    if small.milliseconds and time_of(small) >= time_of(plain):
        return "in 8-bit integers it is not faster"
    return None


def time_of(artefact: Artefact) -> float:
    """The product over batch sizes of the milliseconds in the fastest runtime."""
    times: dict[str, float] = {}
    for by_batch in artefact.milliseconds.values():
        for batch, ms in by_batch.items():
            times[batch] = min(ms, times.get(batch, ms))
    return math.prod(times.values())


def of_run(results: Mapping[str, Any], task: Task) -> list[Artefact]:
    """Return what a training run leaves behind.

    Args:
        results: as results.json has them.
        task: whose figures they have.
    """
    names = [f"test_{figure}" for figure in task.figures]
    whole = (
        results.get("original_parameters", results["parameters"]),
        results.get("original_macs", results["macs"]),
    )
    left = results["compacted_parameters"], results["compacted_macs"]
    gates, tuned = results["gates"] > 0, results.get("before_finetuning")

    def row(name: str, sizes: tuple[int, int], source: Mapping[str, Any] | None = None) -> Artefact:
        given = {} if source is None else source
        figures = {key: given[key] for key in names if key in given}
        return Artefact(name, given.get("checkpoint"), figures, *sizes, megabytes(sizes[0]))

    if not gates:
        if results.get("front"):
            return [row("dense", whole, results.get("dense", results)), *of_front(results, names)]
        first = [row("dense", whole)] if "original_parameters" in results else []
        return [*first, row("compacted" if first else "dense", left, results)]
    under_gates = row("gated", whole, results if tuned is None else tuned)
    last = row("compacted", left) if tuned is None else row("tuned", left, results)
    return [row("dense", whole), under_gates, last]


def of_front(results: Mapping[str, Any], figures: Sequence[str]) -> list[Artefact]:
    """Return the sizes of a front, the one that was picked last.

    Args:
        results: as results.json has them.
        figures: names of the test's.
    """
    rows, picked = results.get("front", ()), results.get("picked")
    last = [] if picked is None else [picked]
    return [
        Artefact(
            f"size {row['size']:g}",
            row["file"],
            {name: row[name] for name in figures},
            row["parameters"],
            row["macs"],
            megabytes(row["parameters"]),
        )
        for row in [*(r for r in rows if picked is None or r["size"] != picked["size"]), *last]
    ]


def columns(artefacts: Sequence[Artefact]) -> list[tuple[str, str]]:
    """Return the runtimes and batch sizes that anything was timed with, in order."""
    found = [(runtime, batch) for a in artefacts for runtime, of in a.milliseconds.items() for batch in of]
    return list(dict.fromkeys(found))


def table(artefacts: Sequence[Artefact], task: Task, results: Mapping[str, Any]) -> str:
    """Return the artefacts as text, for people.

    Args:
        artefacts: in order.
        task: whose main figure is shown.
        results: with the examples in words, ``measured_on``, and the file to ship.
    """
    measured_on, ship = results["measured_on"], results["ship"]
    timed = columns(artefacts)
    word = SHARES.get(task.figure, task.figure)
    head = f"{'network':10s}{'test ' + word:>16s}{'parameters':>13s}{'MACs':>15s}{'MB':>9s}"
    head += "".join(f"{f'{runtime} {batch}':>16s}" for runtime, batch in timed)
    lines = [head]
    for a in artefacts:
        figure = a.figures.get(f"test_{task.figure}")
        cells = [_text(figure, ".4f", 16), _text(a.parameters, ",", 13), _text(a.macs, ",", 15)]
        cells.append(_text(a.megabytes, ".3f", 9))
        times = (a.milliseconds.get(runtime, {}).get(batch) for runtime, batch in timed)
        cells += [f"{'-' if ms is None else in_words(ms):>16s}" for ms in times]
        lines.append(f"{a.name:10s}{''.join(cells)}")
    lines.append(
        f"{word} on {measured_on}" + ("; ms for a batch of the size in the heading" if timed else "")
    )
    why = against_int8(artefacts, task)
    lines += [] if why is None else [f"not int8: {why}"]
    return "\n".join([*lines, f"ship: {ship}" if ship else f"ship: none, {why_none(results)}"])


def _text(value: float | None, form: str, width: int) -> str:
    return f"{'-' if value is None else format(value, form):>{width}s}"


def examples_in_words(described: Mapping[str, Any], limit: int | float | None = None) -> str:
    """Say on which examples something was measured.

    Args:
        described: what the data said of themselves.
        limit: of ``trainer.limit_test_batches``.
    """
    number = described.get("num_test")
    whole = limit is None or (isinstance(limit, float) and limit == 1)
    some = "" if whole else f", of which trainer.limit_test_batches={limit} were taken"
    count = "" if number is None else f"{number:,} "
    return f"the {count}test examples of {described.get('source', 'the data')}{some}"
