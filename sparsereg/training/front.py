"""The front from one run: on its way to the target a copy is met, repaired and fine-tuned at each size.

While the target falls, the gates of the network pass through every size. At the end of the epoch in which
a size is due, a copy is brought to it exactly, compacted, repaired in closed form
(``sparsereg.compression.oneshot.repair``) and trained further for a short while; the run itself goes on as
if nothing had happened. Each size is a folder with its network and its figures, so that a run that was cut
off goes on with those that are missing.
"""

import copy
import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.apply_func import move_data_to_device
from pytorch_lightning.callbacks import Callback
from torch import fx

from sparsereg.compression import Accountant, benchmark, fuse, save_compacted
from sparsereg.compression.budget import meet_
from sparsereg.compression.oneshot.origins import Origins
from sparsereg.compression.oneshot.repair import repaired
from sparsereg.data.batches import call, only
from sparsereg.data.own import RunData
from sparsereg.files import write_atomically, write_json, write_text
from sparsereg.training.accounting import PlainAccountant
from sparsereg.training.averaging import WeightAverage
from sparsereg.training.pick import Pick
from sparsereg.training.target import TargetSettings
from sparsereg.training.tasks.measure import measure
from sparsereg.training.tasks.task import Task

log = logging.getLogger(__name__)

FOLDER = "front"
NUM_INPUTS, BATCH = 2048, 64
"""Training inputs, without augmentation and labels, that a repair looks at."""
TIMING = 1.0
"""Seconds for which each network is timed."""


@dataclass(eq=False)
class Front(Callback):
    """Makes the networks of the front while a run trains.

    Attributes:
        accountant: of the network that is trained.
        settings: how its target falls.
        sizes: shares of the cost to remove, rising; the last one is the target.
        epochs: of fine-tuning at each size.
        lr: of that, at its peak.
        data: of the run.
        example: one example.
        task: what is learnt.
        folder: of the run.
        notes: kept with the networks.
        average: holds the averaged weights that are measured, if there are any.
    """

    accountant: Accountant
    settings: TargetSettings
    sizes: Sequence[float]
    epochs: int
    lr: float
    data: RunData
    example: Any
    task: Task
    folder: Path
    notes: Mapping[str, Any]
    average: WeightAverage | None = None
    _origins: Origins | None = field(default=None, init=False)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Make the networks of all sizes that are due."""
        done = trainer.current_epoch + 1
        allowed = self.settings.share_at(done)
        due = [s for s in self.sizes if 1 - s >= allowed - 1e-9 or done == trainer.max_epochs]
        due = [s for s in due if not (place_of(self.folder, s) / "figures.json").is_file()]
        if not due or not trainer.is_global_zero:
            return
        devices = list(range(torch.cuda.device_count()))
        with torch.random.fork_rng(devices):
            for size in due:
                torch.manual_seed(0)
                if self.average is None:
                    self._make(size, pl_module)
                else:
                    with self.average.in_place(pl_module):
                        self._make(size, pl_module)

    def _make(self, size: float, module: pl.LightningModule) -> None:
        net = self.accountant.model
        before = copy.deepcopy(net).eval()
        after = copy.deepcopy(before)
        assert self.settings.cost is not None  # a front has the target of the whole network
        meet_(Accountant(after, self.example), self.settings.cost, 1 - size, self.settings.round_to)
        batches = [only(x, self.example) for x in self.data.estimation_batches(NUM_INPUTS, BATCH)]
        if self._origins is None:
            self._origins = Origins(before, self.example)
        small = repaired(before, after, self.example, batches, progress=False, origins=self._origins)
        self._tune(small, module.device)
        place = place_of(self.folder, size)
        place.mkdir(parents=True, exist_ok=True)
        notes = {**self.notes, "size": size}
        small.cpu().eval()
        write_atomically(place / "compacted.pt", lambda p: save_compacted(small, p, notes))
        row = {"size": size, **self._figures(small, module.device)}
        write_json(place / "figures.json", row)  # last: a size without it is made again
        log.info("front: %s", ", ".join(f"{k} {v:.4g}" for k, v in row.items() if v is not None))

    def _tune(self, small: fx.GraphModule, device: torch.device) -> None:
        """Train a network further, as fine-tuning at the end of a run does."""
        loader = self.data.train_dataloader()
        if not self.epochs:
            return
        small.to(device).train()
        optimizer = torch.optim.AdamW(small.parameters(), self.lr, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.epochs * len(loader))
        for _ in range(self.epochs):
            for batch in loader:
                inputs, labels = self.task.split(move_data_to_device(batch, device))
                predictions, labels = self.task.predictions(call(small, only(inputs, self.example)), labels)
                optimizer.zero_grad()
                self.task.loss(predictions, labels).backward()
                optimizer.step()
                schedule.step()

    def _figures(self, small: fx.GraphModule, device: torch.device) -> dict[str, Any]:
        costs = PlainAccountant(small, self.example)
        timed = benchmark({"small": fuse(small)}, self.example, batch_sizes=(1,), seconds=TIMING)
        found: dict[str, Any] = {
            "sparsity": 1 - costs.parameters / self.accountant.parameters,
            "parameters": costs.parameters,
            "macs": costs.macs,
            "latency_ms": 1e3 * min(row.seconds for row in timed.rows),
        }
        small.to(device)
        for part in ("val", "test"):
            loader = getattr(self.data, f"{part}_dataloader")() if part == "test" or self.data.num_val else ()
            figures = measure(lambda x: call(small, only(x, self.example)), self.task, loader, device)
            found |= {f"{part}_{name}": figures.get(name) for name in self.task.figures}
        return found


def place_of(folder: Path, size: float) -> Path:
    """The folder of one size of a run's front."""
    return folder / FOLDER / f"{size:.6g}"


def take_over(folder: Path, before: Path) -> None:
    """Take the sizes that a run that was cut off has made."""
    for place in sorted((before / FOLDER).glob("*/figures.json")):
        target = folder / FOLDER / place.parent.name
        shutil.copytree(place.parent, target, dirs_exist_ok=True)


def finished(folder: Path, task: Task, pick: Pick | None) -> dict[str, Any]:
    """Write front.csv and front.png, and hand over the network that was asked for.

    Args:
        folder: of the run.
        task: what was learnt.
        pick: what the network has to keep to; None hands none over.

    Returns:
        What to add to results.json.
    """
    files = sorted((folder / FOLDER).glob("*/figures.json"), key=lambda p: float(p.parent.name))
    rows = [json.loads(path.read_text()) for path in files]
    columns = list(rows[0])
    lines = [
        ",".join(columns),
        *(",".join("" if r[c] is None else repr(r[c]) for c in columns) for r in rows),
    ]
    write_text(folder / "front.csv", "\n".join(lines) + "\n")
    figure = f"test_{task.figure}"
    _draw(folder / "front.png", rows, figure)
    found: dict[str, Any] = {"front": rows}
    if pick is None:
        return found
    fitting = [row for row in rows if pick.fits(row)]
    if not fitting:
        near = min(rows, key=pick.miss)
        said = (
            f"pick={pick.column}{pick.sign}{pick.bound:g}: no network of the front fits, the nearest has "
            f"{near[pick.column]:.4g} at size {near['size']:g}; all are in {folder / FOLDER}"
        )
        return {**found, "picked": None, "pick_short": said}
    key = f"val_{task.figure}" if fitting[0][f"val_{task.figure}"] is not None else figure
    best = max(fitting, key=lambda row: row[key] if task.larger_is_better else -row[key])
    target = folder / "checkpoints" / "compacted.pt"
    write_atomically(target, lambda p: shutil.copyfile(place_of(folder, best["size"]) / "compacted.pt", p))
    return {**found, "picked": {**best, "file": str(target)}}


def _draw(path: Path, rows: Sequence[Mapping[str, Any]], figure: str) -> None:
    from matplotlib.figure import Figure

    picture = Figure(figsize=(12, 3.6), layout="constrained")
    for axes, column in zip(
        picture.subplots(1, 3, sharey=True), ("parameters", "macs", "latency_ms"), strict=True
    ):
        axes.plot([row[column] for row in rows], [row[figure] for row in rows], "o-")
        axes.set_xlabel(column)
        axes.set_xscale("log")
        axes.grid(alpha=0.3)
    picture.axes[0].set_ylabel(figure)
    write_atomically(path, lambda p: picture.savefig(p, format="png", dpi=150))
