"""Flipped bits in everything that a run can be continued from: each one is refused."""

import random
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from .campaign import Attack
from .commands import Case
from .files import flip, targets


def attacks(seed: int, numbers: "range | list[int]", made: Path) -> Iterator[Attack]:
    """Return attacks by one flipped bit; the checkpoints take turns."""
    all_targets = {t.path: t for t in targets(made) if t.path.endswith((".ckpt", ".pt"))}
    paths = sorted(all_targets)
    for number in numbers:
        rng = random.Random(f"flips-{seed}-{number}")
        path = paths[number % len(paths)]
        script, arguments = rng.choice(all_targets[path].commands)
        case = Case(script, arguments, "refuse", f"flip in {'/'.join(Path(path).parts[-3:])}")
        yield Attack(f"flips-{seed}-{number}", case, partial(_flip, path, rng))


def _flip(path: str, rng: random.Random, folder: Path) -> None:
    flip(folder / path, rng)
