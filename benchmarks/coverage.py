"""Which of the world's networks can be cut, by how much, and is what is left equal to the masked network.

    pip install 'sparsereg[timm,huggingface]' torch-pruning==1.6.1
    python -m benchmarks.coverage [--only torchvision timm huggingface] [--names NAME ...] [--out FILE.csv]

Every classification and segmentation network of torchvision, one or more variants of each family of timm,
and tiny configurations of Hugging Face's model types. Each with random weights in float64: it is gated, a
random half of its gates is shut, and what the compacted network gives, and costs, is compared with the gated
one and its count. Torch-Pruning halves the same networks, compared with the masking of what
it removed. Each network has a process of its own with a limit on time and memory; a run that was stopped
goes on where it was. ``docs/coverage.md`` is written from the table.
"""

from __future__ import annotations

import argparse
import csv
import json
import multiprocessing
import resource
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.coverage_cases import CASES, Case, cases
from benchmarks.coverage_checks import examined, halved_by_torch_pruning
from benchmarks.coverage_page import write_page

COLUMNS = """
    library name family input gated_seconds compacted_seconds parameters families share removed difference
    why kept
    torch_pruning_runs torch_pruning_removed torch_pruning_difference torch_pruning_why
""".split()  # noqa: SIM905
"""Of the table; seconds are those of one core."""
EXAMINERS = {"sparsereg": examined, "torch-pruning": halved_by_torch_pruning}


def main() -> None:
    """Examine the networks that are not in the table yet, then write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--only", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--names", nargs="+", help="of networks, as their libraries name them")
    parser.add_argument("--again", nargs="*", help="examine anew: these, or without names all that failed")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/coverage.csv"), help="the table")
    parser.add_argument("--page", type=Path, help="write the page there, as docs/coverage.md")
    parser.add_argument("--seconds", type=float, default=900, help="of one core each process may take")
    parser.add_argument("--gigabytes", type=float, default=12, help="each process may take")
    parser.add_argument("--processes", type=int, default=1, help="at a time")
    parser.add_argument("--by", nargs="+", choices=list(EXAMINERS), default=list(EXAMINERS))
    options = parser.parse_args()
    table = Table(options.out)
    wanted = [case for library in options.only for case in cases(library, options.names)]
    if options.again is not None:
        table.forget(options.again)
    examiners = [EXAMINERS[name] for name in options.by]
    jobs = [
        (case, examiner)
        for case in wanted
        for examiner in examiners
        if not table.has(case, examiner.__name__)
    ]
    warm()
    for case, found in run_all(jobs, options.processes, options.seconds, options.gigabytes):
        table.add(case, found)
        shown = {k: v for k, v in found.items() if v not in ("", None)}
        print(f"{case.origin:12s}{case.name:40s}{json.dumps(shown)[:200]}", flush=True)
    if options.page:
        write_page(options.page, table.rows)


class Table:
    """The results so far, a file of comma-separated values.

    Args:
        path: of the file, which need not be there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[dict[str, str]] = []
        if path.is_file():
            with path.open(newline="") as file:
                self.rows = list(csv.DictReader(file))

    def row(self, case: Case) -> dict[str, str] | None:
        """What is known of a network."""
        known = (r for r in self.rows if (r["library"], r["name"]) == (case.origin, case.name))
        return next(known, None)

    def has(self, case: Case, examiner: str) -> bool:
        """Whether a network was examined already."""
        row = self.row(case) or {}
        column = "parameters" if examiner == "examined" else "torch_pruning_runs"
        why = "why" if examiner == "examined" else "torch_pruning_why"
        return bool(row.get(column) or row.get(why))

    def forget(self, names: Iterable[str]) -> None:
        """Forget some networks; if none is named, those that failed."""
        names = set(names)
        for row in self.rows:
            if row["name"] in names if names else row["why"]:
                row.update({c: "" for c in COLUMNS[3:] if names or not c.startswith("torch_pruning")})

    def add(self, case: Case, found: dict[str, Any]) -> None:
        """Note what was found and write the file."""
        row = self.row(case)
        if row is None:
            row = dict.fromkeys(COLUMNS, "")
            row.update(library=case.origin, name=case.name, family=case.family)
            self.rows.append(row)
        row.update({key: str(value) for key, value in found.items()})
        made = self.path.with_suffix(".part")
        with made.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(self.rows)
        made.replace(self.path)


def warm() -> None:
    """Load what each process needs, so that those that start from this one have it."""
    torch.set_num_threads(1)
    torch.export.export(nn.Linear(2, 2), (torch.ones(1, 2),), strict=False)


Job = tuple[Case, Callable[[Case], dict[str, Any]]]


def run_all(
    jobs: list[Job], processes: int, seconds: float, gigabytes: float
) -> Iterable[tuple[Case, dict[str, Any]]]:
    """Run jobs in processes of their own, some at a time; yield what each found as it ends."""
    waiting, running = list(reversed(jobs)), []
    while waiting or running:
        while waiting and len(running) < processes:
            running.append(Running(*waiting.pop(), seconds, gigabytes))
        for one in running[:]:
            found = one.result()
            if found is not None:
                running.remove(one)
                yield one.case, found
        time.sleep(0.05)


class Running:
    """One network in a process of its own.

    Args:
        case: the network.
        examiner: what is done with it.
        seconds: the process may take.
        gigabytes: of memory it may take.
    """

    def __init__(
        self, case: Case, examiner: Callable[[Case], dict[str, Any]], seconds: float, gigabytes: float
    ) -> None:
        self.case = case
        self.prefix = "" if examiner is examined else "torch_pruning_"
        context = multiprocessing.get_context("fork")
        self.receives, sends = context.Pipe(duplex=False)
        self.process = context.Process(target=_child, args=(sends, case, examiner, seconds, gigabytes))
        self.process.start()
        sends.close()
        self.seconds = seconds

    def result(self) -> dict[str, Any] | None:
        """What was found, or why nothing was; None while it runs."""
        if self.receives.poll():
            try:
                found: dict[str, Any] = self.receives.recv()
            except EOFError:
                self.process.join()
                found = {"why": self._ended(self.process.exitcode)}
        else:
            return None
        self.process.join()
        return {(k if k.startswith(self.prefix) else self.prefix + k): v for k, v in found.items()}

    def _ended(self, code: int | None) -> str:
        if code == -signal.SIGXCPU:
            return f"it took more than {self.seconds:.0f} s"
        return f"the process ended with code {code}"


def _child(
    sends: Any, case: Case, examiner: Callable[[Case], dict[str, Any]], seconds: float, gigabytes: float
) -> None:
    warnings.simplefilter("ignore")
    for limit, most in ((resource.RLIMIT_CPU, seconds), (resource.RLIMIT_DATA, gigabytes * 2**30)):
        resource.setrlimit(limit, (int(most), int(most) + 1))
    try:
        found = examiner(case)
    except MemoryError:
        found = {"why": f"it took more than {gigabytes:g} GB"}
    except Exception as error:
        text = f"{type(error).__name__}: {error}".partition("\n")[0][:300]
        if "allocate memory" in text:
            text = f"it took more than {gigabytes:g} GB"
        found = {"why": text}
        traceback.print_exc(file=sys.stderr)
    sends.send(found)


if __name__ == "__main__":
    main()
