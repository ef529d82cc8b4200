"""Exponential moving average of the weights and gates, which is what is measured and saved."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytorch_lightning as pl

from sparsereg.penalties import hard_concretes
from sparsereg.training.lightning import Averaging


class WeightAverage(Averaging):
    """Lightning's average of the weights, put in place before anything else of a validation happens.

    BatchNorm statistics and exact counts, which other callbacks take when a validation starts, are then
    those of the averaged network; and its gates have the temperature of the epoch.

    Args:
        decay: weight of the past in each step, in (0, 1).
    """

    def __init__(self, decay: float) -> None:
        super().__init__(decay=decay)

    @contextmanager
    def in_place(self, pl_module: pl.LightningModule) -> Iterator[None]:
        """Exchange the weights of the network for their average for a while."""
        self.exchange_(pl_module)
        yield
        self.exchange_(pl_module)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Give the averaged gates the temperature of the epoch."""
        average = self.averaged()
        assert average is not None
        averaged = hard_concretes(average)
        for name, gate in hard_concretes(pl_module).items():
            averaged[name].temperature = gate.temperature

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put the average in place."""
        if self.averaged() is not None and trainer.state.fn == "fit":
            self.exchange_(pl_module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put the current weights back."""
        if self.averaged() is not None and trainer.state.fn == "fit":
            self.exchange_(pl_module)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Go on from the current weights; a test afterwards keeps the average, which is loaded already."""
        if trainer.state.fn == "fit":
            super().on_load_checkpoint(trainer, pl_module, checkpoint)

    def on_validation_epoch_start(self, *args: Any) -> None:
        """Lightning would exchange the weights here, too late for the callbacks that measure."""

    def on_validation_epoch_end(self, *args: Any) -> None:
        """Nor is this the end."""
