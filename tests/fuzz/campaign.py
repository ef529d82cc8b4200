"""Running many cases: some at a time, each in a copy of the base, with a line for every violation."""

import csv
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from . import base, oracle, process
from .commands import Case, Commands
from .process import Outcome, Running

FIELDS = ("case", "violation", "code", "seconds", "about", "command", "error")


@dataclass
class Attack:
    """A case that can be run.

    Attributes:
        name: by which it is run again.
        case: the command line.
        prepare: changes the copy of the base before.
        extra: further checks, from the folder and the outcome.
    """

    name: str
    case: Case
    prepare: Callable[[Path], object] = lambda folder: None
    extra: Callable[[Path, Outcome], list[str]] = lambda folder, outcome: []


class Campaign:
    """Attacks, run ``jobs`` at a time below a folder.

    Args:
        out: where the summary and the folders of violations go.
        jobs: how many at a time.
        limit: seconds for each.
        real: new interpreters, not forks.
        keep: keep the folders of all cases.
    """

    def __init__(self, out: Path, jobs: int = 1, limit: float = 90, real: bool = False, keep: bool = False):
        self.out, self.jobs, self.limit, self.real, self.keep = out, jobs, limit, real, keep
        self.base = out / "base"
        if not self.base.exists():
            base.make(self.base)
        self.before = base.snapshot(self.base)
        self.counts: Counter[str] = Counter()
        self.codes: Counter[int] = Counter()
        self.done = self.bad = 0
        self.slowest: list[tuple[float, str]] = []

    def run(self, attacks: Iterator[Attack], seconds: float | None = None) -> int:
        """Run attacks until there are no more or the time is over; return how many had violations."""
        started = told = time.monotonic()
        running: list[tuple[Attack, Path, dict[str, bytes], Running]] = []
        summary = self.out / "violations.csv"
        new = not summary.exists()
        with summary.open("a", newline="", encoding="utf-8", errors="backslashreplace") as file:
            writer = csv.DictWriter(file, FIELDS)
            if new:
                writer.writeheader()
            exhausted = False
            while running or not exhausted:
                over = seconds is not None and time.monotonic() - started > seconds
                while not exhausted and not over and len(running) < self.jobs:
                    attack = next(attacks, None)
                    if attack is None:
                        exhausted = True
                    else:
                        running.append(self._start(attack))
                exhausted |= over
                ended = [(r, outcome) for r in running if (outcome := r[3].poll()) is not None]
                for r, outcome in ended:
                    running.remove(r)
                    self._judge(*r[:3], outcome, writer)
                    file.flush()
                if not ended:
                    time.sleep(0.003)
                if time.monotonic() - told > 30:
                    told = time.monotonic()
                    print(
                        f"{self.done} cases, {self.bad} with violations, {told - started:.0f} s", flush=True
                    )
        return self.bad

    def _start(self, attack: Attack) -> tuple[Attack, Path, dict[str, bytes], Running]:
        folder = self.out / "cases" / attack.name
        base.remove(folder)
        process.copy_tree(self.base, folder)
        attack.prepare(folder)
        before = base.snapshot(folder / "outputs")
        started = process.start(
            attack.case.script, list(attack.case.arguments), folder, limit=self.limit, real=self.real
        )
        return attack, folder, before, started

    def _judge(
        self,
        attack: Attack,
        folder: Path,
        before: dict[str, bytes],
        outcome: Outcome,
        writer: "csv.DictWriter[str]",
    ) -> None:
        case = attack.case
        found = oracle.violations(outcome, list(case.arguments), folder, case.expected)
        found += oracle.changed(before, folder / "outputs")
        if not outcome.timed_out:
            found += attack.extra(folder, outcome)
        self.done += 1
        self.codes[outcome.code] += 1
        self.slowest = sorted([*self.slowest, (outcome.seconds, attack.name)], reverse=True)[:5]
        self.bad += bool(found)
        for violation in found:
            self.counts[violation] += 1
            writer.writerow(
                {
                    "case": attack.name,
                    "violation": violation,
                    "code": outcome.code,
                    "seconds": f"{outcome.seconds:.1f}",
                    "about": case.about,
                    "command": process.command(case.script, list(case.arguments))[:2000],
                    "error": outcome.err[-600:].replace("\n", " | "),
                }
            )
        if not found and not self.keep:
            base.remove(folder)

    def compare(self, attacks: Iterator[Attack]) -> int:
        """Run attacks as forks and as new interpreters; return how many end otherwise, and say which."""
        different = 0
        for attack in attacks:
            ends = []
            for self.real in (False, True):
                _, folder, _, running = self._start(attack)
                outcome = running.wait()
                ends.append((outcome.code, _without_moments(outcome.err), _without_moments(outcome.out)))
                base.remove(folder)
            self.done += 1
            if ends[0] != ends[1]:
                different += 1
                print(f"{attack.name}: {attack.case.about}\n  fork {ends[0]}\n  real {ends[1]}", flush=True)
        print(f"{self.done} cases compared, {different} end otherwise")
        return different

    def told(self) -> str:
        """Return the summary."""
        lines = [
            f"{self.done} cases, {self.bad} with violations;"
            f" exit codes {', '.join(f'{c}: {n}' for c, n in sorted(self.codes.items()))};"
            f" slowest {', '.join(f'{s:.1f} s {n}' for s, n in self.slowest)}"
        ]
        lines += [f"  {n:5d}  {violation}" for violation, n in self.counts.most_common()]
        return "\n".join(lines)


def _without_moments(text: str) -> str:
    """Leave out times, process numbers, and what a fork has already warned of."""
    lines = [line for line in text.splitlines() if "Warning" not in line and not line.startswith("  ")]
    return re.sub(r"\d{4,}|\d+\.\d+ ?m?s\b", "#", "\n".join(lines))


def command_attacks(seed: int, numbers: "range | list[int]") -> Iterator[Attack]:
    """Return attacks by command lines."""
    cases = Commands(seed)
    for number in numbers:
        yield Attack(f"commands-{seed}-{number}", cases[number])
