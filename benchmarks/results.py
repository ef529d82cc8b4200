"""Rerun the figures of docs/results.md that a CPU can: sweeps of train.py, then a table and a plot of each.

    python -m benchmarks.results                         all studies that a CPU can run
    python -m benchmarks.results mnist_lenet300 ...      some of them; --list names them
    python -m benchmarks.results --mnist F.npz --cifar10 F.npz    data from archives instead of downloads
    python -m benchmarks.results cifar10_small --sweep outputs/train/multirun/STAMP/sweep.csv
                                                         table and plot of a sweep that train.py ran

Each study is one or more multiruns. Jobs that finished before are not repeated, so an interrupted study
goes on where it stopped. Writes outputs/results/STUDY.csv (a row for each run) and STUDY.png.
"""

import argparse
import json
import platform
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from matplotlib.figure import Figure

from sparsereg.errors import InputError
from sparsereg.files import write_atomically
from sparsereg.table_file import write_table

TRAIN = Path(__file__).resolve().parents[1] / "train.py"
OUT = Path("outputs") / "results"
SEEDS = "seed=0,1,2,3,4"


@dataclass(frozen=True)
class Study:
    """A table of docs/results.md.

    Attributes:
        data: mnist, cifar10 or digits.
        sweeps: label of a curve to the overrides of its multirun.
        x: column on the horizontal axis of the plot.
        about: what it shows.
        published: points (x, test accuracy) to draw beside it.
        gpu: it is too large for a CPU, and runs only where it is named.
    """

    data: str
    sweeps: dict[str, tuple[str, ...]]
    x: str
    about: str
    published: tuple[tuple[float, float], ...] = ()
    gpu: bool = False


ALL_IMAGES = "data.val_size=0"
"""Settings were chosen on 10,000 validation images; the runs of the tables train on all training images."""
DIGITS = ("finetune.epochs=6", "seed=0,1,2")

PREDECESSOR = (
    (0.0, 0.8957),
    (0.06, 0.8787),
    (0.10, 0.9000),
    (0.22, 0.8656),
    (0.39, 0.8862),
    (0.55, 0.8279),
    (0.64, 0.8588),
    (0.815, 0.8022),
)
"""The predecessor's GoogleNet on CIFAR-10 (its sparsity leaves out what leaves with a channel)."""

STUDIES = {
    "mnist_lenet300": Study(
        "mnist",
        {
            "augmented": ("experiment=mnist_lenet300", "target_sparsity=0.955,0.964", ALL_IMAGES, SEEDS),
            "not augmented": ("experiment=mnist_lenet300", "data.augment=null", ALL_IMAGES, SEEDS),
        },
        "compacted_parameters",
        "LeNet-300-100 on MNIST, by a target",
    ),
    "mnist_lenet300_paper": Study(
        "mnist",
        {"paper": ("experiment=mnist_lenet300_paper", ALL_IMAGES, "seed=0")},
        "compacted_parameters",
        "LeNet-300-100 on MNIST, the paper's plain recipe",
    ),
    "mnist_lenet5": Study(
        "mnist",
        {
            "augmented": ("experiment=mnist_lenet5", ALL_IMAGES, SEEDS),
            "not augmented": ("experiment=mnist_lenet5", "data.augment=null", ALL_IMAGES, SEEDS),
        },
        "compacted_parameters",
        "LeNet-5 on MNIST, by a target",
    ),
    "mnist_lenet5_paper": Study(
        "mnist",
        {"paper": ("experiment=mnist_lenet5_paper", ALL_IMAGES, "seed=0")},
        "compacted_parameters",
        "LeNet-5 on MNIST, the paper's plain recipe",
    ),
    "cifar10_small": Study(
        "cifar10",
        {"rows": ("experiment=cifar10_small",)},
        "exact_sparsity",
        "GoogleNet on 10,000 images of CIFAR-10, few epochs: the small protocol",
    ),
    "cifar10_table": Study(
        "cifar10",
        {"rows": ("experiment=cifar10_table", "trainer=gpu", "trainer.precision=bf16-mixed")},
        "exact_sparsity",
        "GoogleNet on CIFAR-10: on a GPU",
        PREDECESSOR,
        gpu=True,
    ),
    "digits": Study(
        "digits",
        {
            "lambda_l0": ("experiment=digits_demo", "lambda_l0=5,15,30,60", *DIGITS),
            "target_sparsity": (
                "experiment=digits_demo",
                "lambda_l0=null",
                "target_sparsity=0.4,0.8,0.93,0.975",
                *DIGITS,
            ),
        },
        "exact_sparsity",
        "GoogleNet on scikit-learn's digits, 18 epochs under gates and 6 of fine-tuning",
    ),
    "digits_batch_norm": Study(
        "digits",
        {
            "re-estimated": ("experiment=digits_demo", "seed=0,1,2"),
            "as trained": ("experiment=digits_demo", "callbacks.batch_norm.num_images=0", "seed=0,1,2"),
        },
        "exact_sparsity",
        "GoogleNet on scikit-learn's digits: BatchNorm statistics for the test-time gates",
    ),
    "mnist_ablation": Study(
        "mnist",
        {"recipe": ("experiment=mnist_ablation",)},
        "compacted_parameters",
        "LeNet-300-100 on 20,000 images of MNIST: what each part of the recipe gives",
    ),
}


LIKE_THE_DOWNLOAD = {
    "mnist": (),
    "cifar10": ("data.augment.flip=true", "data.augment.crop_scale=[0.8,1.0]"),
}
"""What ``data=npz`` needs to train as the download does, where a study does not say it."""


def run(study: Study, archives: dict[str, Path]) -> pd.DataFrame:
    """Run the multiruns of a study and return a row for each job.

    Args:
        study: what to run.
        archives: data set to an archive that ``data=npz`` reads, instead of a download.

    Raises:
        RuntimeError: a job failed.
    """
    data = []
    if study.data in archives:
        data = ["data=npz", f"data.path={archives[study.data].resolve()}", *LIKE_THE_DOWNLOAD[study.data]]
    tables = []
    for label, overrides in study.sweeps.items():
        command = [sys.executable, str(TRAIN), "-m", *overrides, *data]
        print(" ".join(["$ python train.py", *command[2:]]), flush=True)
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        lines = done.stdout.strip().splitlines()
        if done.returncode or not lines or not lines[-1].startswith("results: "):
            raise RuntimeError(f"a job of {label!r} failed, see above; the others are kept")
        tables.append(read_sweep(Path(lines[-1].removeprefix("results: ")), label))
    return pd.concat(tables, ignore_index=True)


def read_sweeps(study: Study, paths: list[Path]) -> pd.DataFrame:
    """Return the rows of multiruns that were run before, as ``run`` does.

    Args:
        study: that they belong to.
        paths: their sweep.csv; of all multiruns of the study, in its order, or of some, which are then named
            by their folders.

    Raises:
        InputError: see ``read_sweep``.
    """
    labels = list(study.sweeps) if len(paths) == len(study.sweeps) else [p.parent.name for p in paths]
    tables = [read_sweep(path, label) for path, label in zip(paths, labels, strict=True)]
    return pd.concat(tables, ignore_index=True)


def read_sweep(path: Path, label: str) -> pd.DataFrame:
    """Return the rows of a sweep.csv with the curve that each belongs to and the open gates of its layers.

    Args:
        path: what ``train.py -m`` wrote.
        label: name of the curve; rows of a table (``row=``) are curves of their own.

    Raises:
        InputError: it is no such table, or results.json of a run is missing.
    """
    try:
        table = pd.read_csv(path)
    except ValueError as error:  # pandas' errors of reading are ValueErrors
        raise InputError(f"{path} is no table: {error}") from error
    if not {"overrides", "results"} <= set(table.columns):
        raise InputError(f"{path} is not what train.py -m writes: it has no columns overrides and results")
    row = table["overrides"].str.extract(r"\brow=([a-z_]+?)(?:_\d+)?(?:\s|$)", expand=False)
    table.insert(0, "curve", row.fillna(label))
    runs = [Path(p) for p in table["results"]]
    for run_file in runs:
        if not run_file.is_file():
            raise InputError(f"{path} names {run_file}, which is not there: stand where train.py was started")
    table["open_gates_of"] = [json.loads(p.read_text())["open_gates_of"] for p in runs]
    return table


def summary(frame: pd.DataFrame) -> pd.DataFrame:
    """Return mean and standard deviation over the seeds, a row for each setting."""
    rows = []
    for key, runs in settings(frame):
        error = 100 * (1 - runs["test_acc"])
        rows.append(
            {
                **key,
                "runs": len(runs),
                "validation error %": _spread(100 * (1 - runs["val_acc"]), 2),
                "test error %": _spread(error, 2),
                "parameters": _spread(runs["compacted_parameters"], 0),
                "exact sparsity": _spread(runs["exact_sparsity"], 4),
                "MACs": _spread(runs["compacted_macs"], 0),
                "open gates (first seed)": _units(runs["open_gates_of"].iloc[0]),
            }
        )
    return pd.DataFrame(rows)


def _units(open_gates: dict[str, int]) -> str:
    """As papers write them, 20-25-45-462; the sum where a network has many layers."""
    return "-".join(map(str, open_gates.values())) if len(open_gates) < 6 else str(sum(open_gates.values()))


def _spread(values: pd.Series, digits: int) -> str:
    if values.isna().all():
        return "-"
    mean = f"{values.mean():,.{digits}f}"
    return mean if len(values) < 2 else f"{mean} +- {values.std():,.{digits}f}"


def settings(frame: pd.DataFrame) -> Iterator[tuple[dict[str, Any], pd.DataFrame]]:
    """Yield each setting of a study, and its runs with all seeds, in the order in which they ran."""
    by = [c for c in ("curve", "target_sparsity", "lambda_l0") if c in frame and frame[c].notna().any()]
    for key, runs in frame.groupby(by, dropna=False, sort=False):
        yield dict(zip(by, key, strict=True)), runs


def plot(frame: pd.DataFrame, study: Study, path: Path) -> None:
    """Draw test accuracy against size: a point for each run, a line through the means over the seeds."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for i, (label, curve) in enumerate(frame.groupby("curve", sort=False)):
        x, y = curve[study.x], 100 * curve["test_acc"]
        axes.plot(x, y, ".", color=f"C{i % 10}", alpha=0.5)
        means = sorted((runs[study.x].mean(), 100 * runs["test_acc"].mean()) for _, runs in settings(curve))
        axes.plot(*zip(*means, strict=True), "o-", color=f"C{i % 10}", label=label)
    if study.published:
        x, y = zip(*study.published, strict=True)
        axes.plot(x, [100 * v for v in y], "kx", label="published by the predecessor")
    axes.set(xlabel=study.x.replace("_", " "), ylabel="test accuracy, %", title=study.about)
    axes.title.set_size(10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    write_atomically(path, lambda beside: figure.savefig(beside, dpi=150))


def main() -> None:
    """Run the studies that the command line names."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("studies", nargs="*", metavar="STUDY", help="which to run; by default all for a CPU")
    parser.add_argument("--list", action="store_true", help="name the studies and stop")
    parser.add_argument("--mnist", type=Path, help="archive with train_images, train_labels, test_...")
    parser.add_argument("--cifar10", type=Path, help="the same of CIFAR-10")
    files = "sweep.csv of the multiruns of one study, in its order, instead of running it"
    parser.add_argument("--sweep", type=Path, nargs="+", help=files)
    arguments = parser.parse_args()
    if arguments.list:
        print("\n".join(f"{name:22s} {study.about}" for name, study in STUDIES.items()))
        return
    unknown = [name for name in arguments.studies if name not in STUDIES]
    if unknown:
        parser.error(f"unknown study {unknown[0]!r}; expected {', '.join(STUDIES)}")
    if arguments.sweep and len(arguments.studies) != 1:
        parser.error("--sweep: name the one study that the sweeps belong to")
    archives = {n: p for n in ("mnist", "cifar10") if (p := getattr(arguments, n)) is not None}
    for path in [*archives.values(), *(arguments.sweep or ())]:
        if not path.is_file():
            parser.error(f"there is no file {path}")
    print(f"torch {torch.__version__}, Python {platform.python_version()}, {platform.machine()}")
    OUT.mkdir(parents=True, exist_ok=True)
    for name in arguments.studies or [name for name, study in STUDIES.items() if not study.gpu]:
        study = STUDIES[name]
        frame = read_sweeps(study, arguments.sweep) if arguments.sweep else run(study, archives)
        csv, png = OUT / f"{name}.csv", OUT / f"{name}.png"
        write_table(csv, frame)
        plot(frame, study, png)
        print(f"\n{study.about}\n{summary(frame).to_string(index=False)}\n{csv}\n{png}\n", flush=True)


if __name__ == "__main__":
    try:
        main()
    except (InputError, RuntimeError) as error:
        sys.exit(f"error: {error}")
