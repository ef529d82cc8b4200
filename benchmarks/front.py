"""What a front of five sizes costs beside one run, and whether it lies below single runs.

    python -m benchmarks.front --networks lenet300 lenet5 googlenet vit gpt --seeds 0 1 2 --mnist FILE.npz

For each network and seed: a run with ``front=[0.5,0.7,0.8,0.9,0.95]``, and single runs to these sizes in both
ways, each of as many epochs in all as the run under gates: ``gates`` trains under gates and fine-tunes for
three epochs, ``one_shot`` starts in one shot (``target.one_shot=true``) from a network that was trained for
two thirds of the epochs without gates, and trains for the rest. Costs are seconds of the processor of the
whole command, start and test included. The table grows row by row; a call that is repeated goes on where it
stopped.
"""

import argparse
import itertools
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.rows import append, done

SIZES = (0.5, 0.7, 0.8, 0.9, 0.95)
TUNING = 3
"""Epochs of fine-tuning of a single run under gates."""
EPOCHS = {"lenet300": 20, "lenet5": 20, "googlenet": 18, "vit": 40, "gpt": 12}
"""Of a run, before fine-tuning."""
FIGURE = {"gpt": "test_bits_per_byte"}
"""What is compared, if not the test accuracy."""
COMMON = ("trainer=cpu", "logger=none", "trainer.enable_progress_bar=false")


def settings(name: str, mnist: Path, epochs: int) -> list[str]:
    """What ``train.py`` is told about a network, its data and its epochs."""
    handwritten = ["data=npz", f"data.path={mnist}", "data.val_size=0", "data.batch_size=128"]
    length = [f"trainer.max_epochs={epochs}", f"optimizer.schedule_epochs={epochs}"]
    own = {
        "lenet300": ["model=lenet300", *handwritten],
        "lenet5": ["model=lenet5", *handwritten],
        "googlenet": ["experiment=digits_demo", "data.image_size=8", "data.augment.translate=0.5"],
        "vit": [
            *("model=vit", "model.patch_size=4", "model.width=64", "model.depth=3", "model.heads=4"),
            *("data=digits", "data.image_size=16", "data.batch_size=64", "droprate_init=0.05"),
        ],
        "gpt": [
            *("model=gpt", "model.width=96", "model.depth=3", "model.heads=4", "droprate_init=0.05"),
            *("data=text", "data.batch_size=8", "data.train_windows=512"),
        ],
    }
    return [*own[name], *length, "callbacks.penalty_warmup_epochs=4"]


def run(arguments: list[str], folder: Path) -> tuple[dict[str, object], float]:
    """Train in a folder; return results.json and the processor's seconds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    root = Path(__file__).resolve().parents[1]
    command = [sys.executable, str(root / "train.py"), *arguments, *COMMON]
    env = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    said = subprocess.run(command, cwd=folder, env=env, check=True, capture_output=True, text=True).stdout
    path = said.strip().splitlines()[-1].removeprefix("results: ")
    seconds = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before
    results: dict[str, object] = json.loads((folder / path).read_text())
    return results, seconds


def single(way: str, size: float, name: str, seed: int, mnist: Path) -> tuple[dict[str, object], float]:
    """A run to one size, by gates or from a start in one shot."""
    target = [f"seed={seed}", f"target_sparsity={size}", "lambda_l0=null"]
    with tempfile.TemporaryDirectory() as folder:
        if way == "gates":
            told = [*settings(name, mnist, EPOCHS[name]), *target, f"finetune.epochs={TUNING}"]
            return run(told, Path(folder))
        whole = EPOCHS[name] + TUNING
        first, second = 2 * whole // 3, whole - 2 * whole // 3
        plain = [*settings(name, mnist, first), f"seed={seed}", "without_using_gate=true"]
        results, seconds = run(plain, Path(folder))
        told = [*settings(name, mnist, second), *target, f"ckpt_path={results['checkpoint']}"]
        results, more = run([*told, "target.one_shot=true"], Path(folder))
        return results, seconds + more


def rows(name: str, seed: int, kind: str, mnist: Path) -> list[dict[str, object]]:
    """One run: the front, or to one size in one way."""
    if kind == "front":
        front = f"front=[{','.join(map(str, SIZES))}]"
        told = [*settings(name, mnist, EPOCHS[name]), f"seed={seed}", "lambda_l0=null", front]
        with tempfile.TemporaryDirectory() as folder:
            results, seconds = run(told, Path(folder))
        made = results["front"]
    else:
        way, _, size = kind.partition(" ")
        results, seconds = single(way, float(size), name, seed, mnist)
        made = [{"size": float(size), **results}]
    assert isinstance(made, list)
    return [
        {
            "network": name,
            "seed": seed,
            "kind": kind,
            "size": one["size"],
            "test": round(one[FIGURE.get(name, "test_acc")], 4),
            "cpu_seconds": round(seconds, 1),
        }
        for one in made
    ]


def main() -> None:
    """Make what is not in the table yet."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", nargs="+", choices=list(EPOCHS), default=list(EPOCHS))
    ways = ["front", "gates", "one_shot"]
    parser.add_argument("--kinds", nargs="+", choices=ways, default=ways)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--mnist", type=Path, default=Path("mnist.npz"))
    parser.add_argument("--out", type=Path, default=Path("front.csv"))
    given = parser.parse_args()
    have = {(r["network"], r["seed"], r["kind"]) for r in done(given.out)}
    # The two that are compared in cost come first.
    kinds = ["front", *(f"{way} {size}" for way in ("gates", "one_shot") for size in reversed(SIZES))]
    chosen = [kind for kind in kinds if kind.partition(" ")[0] in given.kinds]
    for name, seed, kind in itertools.product(given.networks, given.seeds, chosen):
        if (name, str(seed), kind) in have:
            continue
        made = rows(name, seed, kind, given.mnist.resolve())
        append(given.out, made)
        for row in made:
            print(*row.values(), flush=True)


if __name__ == "__main__":
    main()
