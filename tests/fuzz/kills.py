"""Kills at random moments, and full disks: nothing is lost; what goes on ends where it would have ended."""

import csv
import json
import os
import random
import re
import resource
import shlex
import shutil
import signal
import tempfile
import time
import zipfile
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from . import base, process
from .process import Outcome

SIGNALS = {"KILL": (signal.SIGKILL, 137), "TERM": (signal.SIGTERM, 143), "INT": (signal.SIGINT, 130)}
_EPOCHS = [
    "trainer=cpu", "trainer.max_epochs=4", "trainer.limit_train_batches=4",
    "trainer.enable_progress_bar=false",
    "callbacks.batch_norm.num_images=64", "callbacks.batch_norm.batch_size=16", "data.batch_size=16",
    "data.eval_batch_size=64",
]  # fmt: skip
_CALIBRATION = [
    "problem.households=800",
    "problem.targets=80",
    "plots=false",
    "tensorboard=false",
    "checkpoint_seconds=0",
]
SCENARIOS: dict[str, tuple[str, tuple[str, ...]]] = {
    "gates": ("train", (*base.DIGITS, *_EPOCHS)),
    "plain": ("train", (*base.DIGITS, *_EPOCHS, "without_using_gate=true", "test_checkpoint=best")),
    "target": ("train", (*base.DIGITS, *_EPOCHS, "target_sparsity=0.5")),
    "finetune": ("train", (*base.DIGITS, *_EPOCHS, "target_sparsity=0.5", "finetune.epochs=2")),
    "average": ("train", (*base.DIGITS, *_EPOCHS, "ema_decay=0.9")),
    "from a checkpoint": ("train", (*base.DIGITS, *_EPOCHS, f"ckpt_path={base.PLAIN}", "droprate_init=0.05",
    "lambda_l0=5")),
    "sweep": ("train", (*base.DIGITS, *base.FAST, "-m", "lambda_l0=0.5,1,2")),
    "pruning": ("calibrate", (*_CALIBRATION, "num_households=150", "holdout.groups=null")),
    "gates on households": ("calibrate", (*_CALIBRATION, "num_households=150", "method=hard_concrete",
    "epochs=100", "holdout.groups=null")),
    "hold-out": ("calibrate", (*_CALIBRATION, "num_households=150", "holdout.folds=2")),
    "sweep of calibrations": ("calibrate", (*[a for a in base.SURVEY if not a.startswith("num_h")], "-m",
    "num_households=50,60,70")),
}  # fmt: skip


@dataclass
class Reference:
    """An uninterrupted run: how long it took, when it had its first checkpoint, what it gave."""

    seconds: float
    saved: float
    numbers: object


class Kills:
    """Kills of runs, one after the other.

    Args:
        out: where the summary goes.
        made: the base.
        seed: of the moments.
        limit: seconds for each process.
        real: new interpreters, not forks.
    """

    def __init__(self, out: Path, made: Path, seed: int, limit: float, real: bool):
        self.out, self.made, self.seed, self.limit, self.real = out, made, seed, limit, real
        self.references: dict[str, Reference] = {}
        self.codes: Counter[str] = Counter()
        self.counts: Counter[str] = Counter()
        self.done = self.bad = self.resumed = self.equal = self.anew = 0
        others = [Path(p) for p in ("/dev/shm", "/tmp", "/var/tmp") if os.access(p, os.W_OK)]
        self.elsewhere = next((p for p in others if p.stat().st_dev != out.stat().st_dev), None)

    def run(self, kind: str, numbers: range, seconds: float | None) -> int:
        """Run kills (``kills``) or full disks (``disk``); return how many had violations."""
        started = told = time.monotonic()
        for number in numbers:
            if seconds is not None and time.monotonic() - started > seconds:
                break
            name = f"{kind}-{self.seed}-{number}"
            rng = random.Random(name)
            found = self._kill(name, number, rng) if kind == "kills" else self._fill(name, number, rng)
            self.done += 1
            self.bad += bool(found)
            self.counts.update(found)
            self._write(name, found)
            if time.monotonic() - told > 30:
                told = time.monotonic()
                print(f"{self.done} {kind}, {self.bad} with violations, {told - started:.0f} s", flush=True)
        return self.bad

    def told(self) -> str:
        """Return the summary."""
        codes = ", ".join(f"{c}: {n}" for c, n in sorted(self.codes.items()))
        lines = [
            f"{self.done} kills or full disks, {self.bad} with violations; ends {codes}; "
            f"{self.resumed} continued ({self.anew} from the start), {self.equal} of them bitwise equal"
        ]
        lines += [f"  {n:5d}  {violation}" for violation, n in self.counts.most_common()]
        return "\n".join(lines)

    def _write(self, name: str, found: list[str]) -> None:
        path = self.out / "violations.csv"
        new = not path.exists()
        with path.open("a", newline="") as file:
            writer = csv.writer(file)
            if new:
                writer.writerow(("case", "violation", "code", "seconds", "about", "command", "error"))
            for violation in found:
                script, arguments = self.scenario[1:]
                writer.writerow(
                    (
                        name,
                        violation,
                        "",
                        "",
                        self.about,
                        process.command(script, list(arguments)),
                        self.said[-600:].replace("\n", " | "),
                    )
                )

    def _reference(self, name: str) -> Reference:
        if name not in self.references:
            script, arguments = SCENARIOS[name]
            folder = self._folder(f"reference-{name.replace(' ', '-')}")
            running = process.start(script, list(arguments), folder, limit=self.limit, real=self.real)
            saved = until_saved(running, folder)
            outcome = running.wait()
            if outcome.code:
                raise RuntimeError(f"{process.command(script, list(arguments))}: {outcome.err}")
            self.references[name] = Reference(outcome.seconds, saved, final(folder, outcome))
            base.remove(folder)
        return self.references[name]

    def _folder(self, name: str) -> Path:
        folder = self.out / "cases" / name
        base.remove(folder)
        return process.copy_tree(self.made, folder)

    def _choose(self, number: int) -> tuple[str, tuple[str, ...], Reference]:
        name = list(SCENARIOS)[number % len(SCENARIOS)]
        script, arguments = SCENARIOS[name]
        self.scenario = name, script, arguments
        return script, arguments, self._reference(name)

    def _kill(self, name: str, number: int, rng: random.Random) -> list[str]:
        script, arguments, reference = self._choose(number)
        folder = self._folder(name)
        before = base.snapshot(folder / "outputs")
        sent = rng.choice(list(SIGNALS))
        elsewhere = self.elsewhere if rng.random() < 0.5 else None
        scratch = tempfile.mkdtemp(dir=elsewhere) if elsewhere else None
        early = rng.random() < 0.25  # most of them where something can be lost
        moment = rng.uniform(0, reference.saved if early else 1.02 * (reference.seconds - reference.saved))
        self.about = (
            f"{self.scenario[0]}, SIG{sent} {moment:.2f} s "
            f"after {'the start' if early else 'the first checkpoint'}, "
            f"TMPDIR {'elsewhere' if scratch else 'here'}"
        )
        environment = {"TMPDIR": scratch} if scratch else {}
        running = process.start(
            script, list(arguments), folder, limit=self.limit, real=self.real, environment=environment
        )
        if not early:
            until_saved(running, folder)
        time.sleep(moment)
        outcome = running.poll()
        if outcome is None:
            running.signal(SIGNALS[sent][0])
            outcome = running.wait()
        if scratch:
            shutil.rmtree(scratch, ignore_errors=True)
        self.said = outcome.err
        self.codes[f"{sent} {outcome.code}"] += 1
        found = end_of_kill(outcome, sent)
        found += broken(folder / "outputs", before) + changed(before, folder)
        if outcome.code or outcome.results is None:
            found += self._continue(folder, script, arguments, outcome, reference)
        elif final(folder, outcome) != reference.numbers:
            found.append("ended with other numbers")
        if not found:
            base.remove(folder)
        return found

    def _continue(
        self, folder: Path, script: str, arguments: tuple[str, ...], outcome: Outcome, reference: Reference
    ) -> list[str]:
        """Continue as a user would and compare the end with that of the uninterrupted run."""
        given = said_to_continue(outcome.err, script)
        if given is None:
            given = to_continue(folder / "outputs", script, arguments)
        if given is None:
            given = list(arguments)
        self.anew += not any("ckpt_path=" in a and str(base.PLAIN) not in a for a in given)
        before = base.snapshot(folder / "outputs")
        again = process.run(script, given, folder, limit=self.limit, real=self.real)
        self.said = f"{outcome.err} || {process.command(script, given)} || {again.err}"
        self.resumed += 1
        if again.code == 2 and "nothing is left to train" in again.err:
            again = replace(again, out=f"results: {ended(folder)}")  # killed when it had written everything
        elif again.code:
            return [f"cannot be continued: exit code {again.code}"]
        found = broken(folder / "outputs", before)
        numbers = final(folder, again)
        if numbers == reference.numbers:
            self.equal += 1
            return found
        return [*found, f"continued, ends elsewhere: {difference(numbers, reference.numbers)}"]

    def _fill(self, name: str, number: int, rng: random.Random) -> list[str]:
        """Let no file become larger than a random size: the disk is full."""
        script, arguments, reference = self._choose(number)
        folder = self._folder(name)
        before = base.snapshot(folder / "outputs")
        size = int(10 ** rng.uniform(1.5, 6.2))
        self.about = f"{self.scenario[0]}, files up to {size} bytes"

        def limit() -> None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # writing then fails as on a full disk
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

        outcome = process.run(
            script, list(arguments), folder, limit=self.limit, real=self.real, prepare=limit, piped=True
        )
        self.said = outcome.err
        self.codes[f"full {outcome.code}"] += 1
        found = broken(folder / "outputs", before) + changed(before, folder)
        if outcome.code not in (0, 2):
            found.append(f"full disk: exit code {outcome.code}")
        if (
            outcome.code == 2
            and not re.search(r"^error: .*(space|too small|written|disk|quota)", outcome.err, re.M | re.I)
            and size > 2000
        ):
            found.append("full disk: the error does not say so")
        if "Traceback" in outcome.err:
            found.append("full disk: traceback")
        if not found:
            base.remove(folder)
        return found


def until_saved(running: process.Running, folder: Path) -> float:
    """Wait for the first checkpoint, or job of a sweep, beyond those of the base; return the seconds."""
    marks = (
        "calibrate/version_*/checkpoint.pt",
        "train/tblog/lightning_logs/version_*/checkpoints/last.ckpt",
        "*/multirun/*/0/job.json",
    )
    outputs = folder / "outputs"
    known = {path for mark in marks for path in outputs.glob(mark)}
    while not running.ended() and time.monotonic() - running.started < running.limit:
        if any(path not in known for mark in marks for path in outputs.glob(mark)):
            return time.monotonic() - running.started
        time.sleep(0.004)
    return time.monotonic() - running.started


def end_of_kill(outcome: Outcome, sent: str) -> list[str]:
    """Return what is wrong with the end of a process that got a signal."""
    found = []
    wanted = SIGNALS[sent][1]
    if outcome.timed_out:
        return [f"SIG{sent}: hangs"]
    if outcome.code not in (0, wanted) or (outcome.code == 0 and outcome.results is None):
        found.append(f"SIG{sent}: exit code {outcome.code}, not {wanted}")
    if "Traceback" in outcome.err:
        found.append(f"SIG{sent}: traceback")
    lines = [line for line in outcome.err.splitlines() if line.startswith("interrupted")]
    if sent != "KILL" and outcome.code == wanted and len(lines) != 1:
        found.append(f"SIG{sent}: {len(lines)} lines `interrupted`")
    if outcome.left:
        found.append(f"SIG{sent}: processes are left running")
    return found


def said_to_continue(err: str, script: str) -> list[str] | None:
    """Return the arguments of the command that the process named for going on, if it named one."""
    for line in err.splitlines():
        if line.startswith("interrupted; to continue: "):
            words = shlex.split(line.removeprefix("interrupted; to continue: "))
            for i, word in enumerate(words):
                if word.endswith((f"{script}.py", script)):
                    return words[i + 1 :]
    return None


def to_continue(outputs: Path, script: str, arguments: tuple[str, ...]) -> list[str] | None:
    """Return what a user would type to go on after a kill without a word; None to start anew."""
    if "-m" in arguments:
        return None
    if script == "calibrate":
        folders = sorted((outputs / "calibrate").glob("version_*"), key=_number)
        checkpoint = folders[-1] / "checkpoint.pt"
        if _number(folders[-1]) < 2 or not checkpoint.is_file():
            return None
        return [*arguments, f"ckpt_path={checkpoint.relative_to(outputs.parent)}"]
    folders = sorted((outputs / "train/tblog/lightning_logs").glob("version_*"), key=_number)
    checkpoint = folders[-1] / "checkpoints/last.ckpt"
    if _number(folders[-1]) < 3 or not checkpoint.is_file():
        return None
    kept = [a for a in arguments if not a.startswith("ckpt_path=")]
    return [*kept, f"ckpt_path={checkpoint.relative_to(outputs.parent)}", "resume_training=true"]


def ended(folder: Path) -> Path:
    """Return the results of the newest training run, which has come to its end."""
    logs = folder / "outputs/train/tblog/lightning_logs"
    return (max(logs.glob("version_*"), key=_number) / "results.json").relative_to(folder)


def _number(folder: Path) -> int:
    return int(folder.name.rpartition("_")[2])


def broken(outputs: Path, before: dict[str, bytes]) -> list[str]:
    """Return which new files under their final names cannot be read."""
    import torch

    found = []
    for path in sorted(outputs.rglob("*")):
        if (
            not path.is_file()
            or path.name.startswith((".", "events.out"))
            or str(path.relative_to(outputs)) in before
        ):
            continue
        try:
            if path.suffix in (".ckpt", ".pt"):
                with zipfile.ZipFile(path) as archive:
                    assert archive.testzip() is None
                torch.load(path, map_location="cpu", weights_only=True)
            elif path.suffix == ".npz":
                with zipfile.ZipFile(path) as archive:
                    assert archive.testzip() is None
            elif path.suffix == ".json":
                json.loads(path.read_text())
            elif path.suffix == ".csv":
                with path.open(newline="") as file:
                    assert len({len(row) for row in csv.reader(file)}) == 1
                assert path.read_bytes().endswith(b"\n")
            elif path.suffix == ".yaml" and path.name != "hparams.yaml":
                from omegaconf import OmegaConf

                assert len(OmegaConf.load(path))
            elif path.suffix == ".png":
                from PIL import Image

                Image.open(path).load()
            elif path.suffix == ".html":
                assert path.read_text().rstrip().endswith("</html>")
        except Exception as error:
            found.append(f"broken under its final name: {path.name} ({type(error).__name__})")
    return found


def changed(before: dict[str, bytes], folder: Path) -> list[str]:
    """Return which earlier files are not what they were."""
    from .oracle import changed as earlier

    return earlier(before, folder / "outputs")


def final(folder: Path, outcome: Outcome) -> object:
    """Return everything that must be equal after an interruption: results and weights."""
    import torch

    if outcome.results is None:
        return "no results"
    path = folder / outcome.results
    if path.suffix == ".csv":  # of a sweep
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        left_out = ("second", "time", "results", "checkpoint", "status", "rss", "memory")
        return [{k: v for k, v in row.items() if not any(word in k for word in left_out)} for row in rows]
    found: dict[str, Any] = {"results": base.numbers(path)}
    for name in ("checkpoints/last.ckpt", "finetune/checkpoints/last.ckpt"):
        if (path.parent / name).is_file():
            state = torch.load(path.parent / name, weights_only=True)["state_dict"]
            found[name] = {k: v.numpy().tobytes() for k, v in state.items() if isinstance(v, torch.Tensor)}
    for name in ("weights.csv", "targets.csv", "holdout.csv", "calibration_log.csv"):
        if (path.parent / name).is_file():
            found[name] = (path.parent / name).read_bytes()
    return found


def difference(one: Any, two: Any, where: str = "") -> str:
    """Return where two nested contents differ first."""
    if isinstance(one, dict) and isinstance(two, dict):
        for key in {**one, **two}:
            if one.get(key) != two.get(key):
                return difference(one.get(key), two.get(key), f"{where}/{key}")
    if isinstance(one, list) and isinstance(two, list) and len(one) == len(two):
        for i, (a, b) in enumerate(zip(one, two, strict=True)):
            if a != b:
                return difference(a, b, f"{where}/{i}")
    if isinstance(one, bytes) or isinstance(two, bytes):
        return where
    return f"{where} {str(one)[:40]} instead of {str(two)[:40]}"
