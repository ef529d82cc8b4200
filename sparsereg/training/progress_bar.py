"""The bar that a user sees while a network trains, and its three figures."""

import math
import shutil
import sys
from typing import Any, Protocol, runtime_checkable

import pytorch_lightning as pl
from pytorch_lightning.callbacks import ProgressBar as LightningBar
from tqdm import tqdm

from sparsereg.training.tasks.task import SHARES, Task

WIDTH = 80
SPARSITY = ("exact_sparsity", "expected_sparsity")
"""Where the sparsity that the bar shows is taken from: the first that was logged."""


@runtime_checkable
class HasTask(Protocol):
    """A LightningModule whose main figure the bar shows."""

    task: Task


def figures(metrics: dict[str, Any], figure: str = "acc") -> str:
    """Return the figures of the bar as text; those that are not known yet are left out.

    Args:
        metrics: by name, as Lightning collects them.
        figure: the main one of the task.
    """
    shown = {
        "loss": ("train_loss",),
        figure: tuple(f"{stage}_{figure}" for stage in ("val", "test", "train")),
        "sparsity": SPARSITY,
    }
    known = {
        short: float(metrics[found])
        for short, names in shown.items()
        if (found := next((name for name in names if name in metrics), None)) is not None
    }
    shares = {*SHARES, "sparsity"}
    return ", ".join(f"{k} {100 * v:.1f}%" if k in shares else f"{k} {v:#.4g}" for k, v in known.items())


class ProgressBar(LightningBar):
    """A line of three figures (loss, accuracy, sparsity) that fits a narrow terminal.

    There is none where stdout is no terminal, and none but that of the first of several processes. The
    figures are read as often as metrics are logged: at every step would make a GPU wait.
    """

    def __init__(self) -> None:
        super().__init__()
        self._enabled = sys.stdout.isatty()
        self._bar: Any = None
        self._figure = "acc"

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Ask the module what its main figure is."""
        super().setup(trainer, pl_module, stage)
        if isinstance(pl_module, HasTask):
            self._figure = pl_module.task.figure

    def disable(self) -> None:
        """Show nothing from now on."""
        self._enabled = False

    def enable(self) -> None:
        """Show the bar, if stdout is a terminal."""
        self._enabled = sys.stdout.isatty()

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the line of an epoch; validation at its end is part of it."""
        epochs = "" if trainer.max_epochs in (None, -1) else f"/{trainer.max_epochs}"
        self._open(f"epoch {trainer.current_epoch + 1}{epochs}", trainer.num_training_batches)
        self._show(trainer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move on."""
        if self._bar is None:
            return
        if (batch_idx + 1) % max(1, trainer.log_every_n_steps) == 0 or trainer.is_last_batch:  # type: ignore[attr-defined]
            self._show(trainer)
        self._bar.update(1)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Show what was measured."""
        self._show(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Clear the line."""
        self._close()

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the line of a test."""
        self._open("test", sum(trainer.num_test_batches))

    def on_test_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Move on."""
        if self._bar is not None:
            self._bar.update(1)

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Clear the line."""
        self._close()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Clear the line, so that the message stands on its own."""
        self._close()

    def _open(self, what: str, batches: float) -> None:
        self._close()
        if self._enabled:
            self._bar = tqdm(
                total=int(batches) if math.isfinite(batches) else None,
                desc=what,
                ncols=min(WIDTH, shutil.get_terminal_size((WIDTH, 24)).columns) - 1,
                bar_format="{desc} {percentage:3.0f}%|{bar}| {remaining}{postfix}",
                file=sys.stdout,
                leave=False,
            )

    def _show(self, trainer: pl.Trainer) -> None:
        if self._bar is not None:
            self._bar.set_postfix_str(figures(dict(trainer.callback_metrics), self._figure))

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
