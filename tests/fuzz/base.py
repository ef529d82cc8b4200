"""What a user has before the attack: data, finished runs, an interrupted calibration."""

import json
import shutil
import signal
import time
from pathlib import Path

import numpy as np

from . import process

FAST = [
    "trainer=cpu", "trainer.max_epochs=1", "trainer.limit_train_batches=1", "trainer.limit_val_batches=1",
    "trainer.limit_test_batches=1", "trainer.enable_progress_bar=false", "callbacks.batch_norm.num_images=32",
    "callbacks.batch_norm.batch_size=16", "data.batch_size=16",
]  # fmt: skip
"""One batch of everything."""
DIGITS = ["model=lenet300", "data=digits", "data.image_size=8"]
TRAIN = [*DIGITS, *FAST]
TEST = [
    "trainer=cpu",
    "trainer.limit_val_batches=1",
    "trainer.limit_test_batches=1",
    "trainer.enable_progress_bar=false",
]
SURVEY = [
    "problem.households=300", "problem.targets=60", "num_households=60", "plots=false", "tensorboard=false",
    "epochs=30", "holdout.groups=null",
]  # fmt: skip
QUIET = ["plots=false", "tensorboard=false", "holdout.groups=null", "epochs=30"]
HOUSEHOLDS = [
    "problem=households", "problem.households=H.csv", "problem.targets=T.csv", "problem.weight=w",
    "problem.id=id", "num_households=40", *QUIET,
]  # fmt: skip
MATRIX = [
    "problem=matrix", "problem.matrix=M.npz", "problem.targets=TM.csv", "problem.weights=W.csv",
    "num_households=40", *QUIET,
]  # fmt: skip
RUNS = Path("outputs/train/tblog/lightning_logs")
GATED, PLAIN, TUNED = (RUNS / f"version_{n}" / "checkpoints" / "last.ckpt" for n in range(3))
INTERRUPTED = Path("outputs/calibrate/version_1/checkpoint.pt")
CALIBRATION = ["problem.households=2000", "problem.targets=200", "num_households=200", "plots=false",
               "tensorboard=false", "holdout.groups=null", "checkpoint_seconds=0"]  # fmt: skip
"""The calibration that was interrupted."""


def make(folder: Path) -> Path:
    """Fill a folder with everything that the cases start from."""
    folder.mkdir(parents=True)
    arrays(folder / "images.npz")
    image_folder(folder / "pictures")
    households(folder)
    matrix(folder)
    experiment(folder / "mine")
    for script, arguments in (
        ("train", TRAIN),
        ("train", [*TRAIN, "without_using_gate=true"]),
        ("train", [*TRAIN, "finetune.epochs=1", "target_sparsity=0.5"]),
        ("test", [f"ckpt_path={GATED}", "compact=true", *TEST]),
        ("calibrate", SURVEY),
    ):
        outcome = process.run(script, arguments, folder, limit=900)  # compiled code is made now
        if outcome.code:
            raise RuntimeError(f"{process.command(script, arguments)}: {outcome.err}")
    _interrupt(folder)
    for leftover in (".stdout", ".stderr"):
        (folder / leftover).unlink()
    return folder


def compacted(folder: Path) -> Path:
    """Return the compacted network that test.py wrote."""
    return next((folder / GATED).parents[1].rglob("compacted*.pt")).relative_to(folder)


def _interrupt(folder: Path) -> None:
    """Leave the checkpoint of a calibration under way."""
    running = process.start("calibrate", CALIBRATION, folder)
    while not (folder / INTERRUPTED).is_file():
        time.sleep(0.002)
        if (outcome := running.poll()) is not None:
            raise RuntimeError(f"the calibration ended before it was interrupted: {outcome.err}")
    running.signal(signal.SIGKILL)
    running.wait()


def arrays(path: Path, num: int = 96, size: int = 8) -> None:
    """Images whose class is the brighter half: left, right, top."""
    rng = np.random.default_rng(0)
    content = {}
    for part, n in (("train", num), ("test", 30)):
        labels = (np.arange(n) % 3).astype(np.uint8)
        images = rng.integers(0, 100, (n, size, size, 1), dtype=np.uint8)
        images[labels == 0, :, : size // 2] += 120
        images[labels == 1, :, size // 2 :] += 120
        images[labels == 2, : size // 2] += 120
        content[f"{part}_images"], content[f"{part}_labels"] = images, labels
    np.savez(path, **content)


def image_folder(root: Path) -> None:
    """The same images as PNG and one JPEG."""
    from PIL import Image

    rng = np.random.default_rng(1)
    for part, n in (("train", 12), ("test", 4)):
        for label in ("cat", "dog"):
            folder = root / part / label
            folder.mkdir(parents=True)
            for i in range(n):
                pixels = rng.integers(0, 120, (9, 8, 3), dtype=np.uint8) + (100 if label == "cat" else 0)
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.{'jpg' if i == 1 else 'png'}")


def households(folder: Path, n: int = 120) -> None:
    """A survey of households as CSV and parquet, and targets."""
    import pandas as pd

    rng = np.random.default_rng(0)
    table = pd.DataFrame(
        {
            "id": [f"h{i}" for i in range(n)],
            "w": (rng.random(n) + 1).round(3),
            "age": rng.integers(18, 90, n),
            "area": rng.choice(["A", "B"], n),
            "x": rng.random(n).round(3),
        }
    )
    table.to_csv(folder / "H.csv", index=False)
    table.to_parquet(folder / "H.parquet", index=False)
    total = float(table.w.sum())
    share = float((table.w * (table.area == "A")).sum())
    pd.DataFrame(
        {
            "name": ["all", "a", "b", "old", "x"],
            "value": [total * 1.1, share * 1.05, (total - share) * 1.15, 60.0, 100.0],
            "group": ["t", "area", "area", "t", "t"],
            "measure": ["", "", "", "", "x"],
            "where": ["", "area == 'A'", "area == 'B'", "age > 50 and x > 0.2", ""],
        }
    ).to_csv(folder / "T.csv", index=False)


def matrix(folder: Path, targets: int = 6, households: int = 120) -> None:
    """A matrix with targets and weights."""
    import pandas as pd
    import scipy.sparse as sp

    rng = np.random.default_rng(2)
    dense = rng.random((targets, households)) * (rng.random((targets, households)) < 0.5)
    sp.save_npz(folder / "M.npz", sp.csr_matrix(dense))
    weights = (rng.random(households) + 1).round(3)
    names = [f"t{i}" for i in range(targets)]
    pd.DataFrame({"name": names, "value": (dense @ weights * 1.1).round(4)}).to_csv(
        folder / "TM.csv", index=False
    )
    ids = [f"h{i}" for i in range(households)]
    pd.DataFrame({"id": ids, "weight": weights}).to_csv(folder / "W.csv", index=False)


def experiment(folder: Path) -> None:
    """An experiment of the user's own, found through --config-dir."""
    (folder / "experiment").mkdir(parents=True)
    text = "# @package _global_\ndefaults:\n  - override /model: lenet300\n  - override /data: digits\n"
    text += "lambda_l0: 2.0\ntrainer: {max_epochs: 1}\noptimizer: {lr: 0.01}\n"
    (folder / "experiment" / "own.yaml").write_text(text)


def snapshot(folder: Path) -> dict[str, bytes]:
    """Return the content of every file below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def numbers(results: Path) -> dict[str, object]:
    """Return a results.json without what differs between equal runs: times, paths, where it went on."""

    def kept(node: object) -> object:
        if isinstance(node, dict):
            left_out = ("second", "time", "resumed", "provenance")
            return {k: kept(v) for k, v in node.items() if not any(word in k for word in left_out)}
        if isinstance(node, list):
            return [kept(v) for v in node]
        return None if isinstance(node, str) and "/" in node else node

    content = kept(json.loads(results.read_text()))
    assert isinstance(content, dict)
    return content


def remove(folder: Path) -> None:
    """Remove a case's folder, also if it has been made unreadable."""
    shutil.rmtree(folder, ignore_errors=True)
