"""Compaction during training: what has been shut for good is not computed any more."""

import logging
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback

from sparsereg.compression import Accountant
from sparsereg.compression.shrink import (
    Live,
    Shrunk,
    plan,
    removable_gates,
    shrink_,
    shut_for_good_,
    shut_useless_,
)
from sparsereg.compression.units.steps.table import Mask

log = logging.getLogger(__name__)


class Compaction(Callback):
    """Train on the channels that are left: the others leave network, gates and optimizer for each epoch.

    At the start of every n-th epoch, gates that hardly ever open are shut for good. Their channels are
    cut off while an epoch trains and put back before anything is measured, counted or saved: outside of
    the epoch the network has its original size, so that checkpoints, L_C0 and all counts mean what they mean
    without this callback, and which gates are shut for good is in their locations.

    Args:
        accountant: of the network, at its original size.
        every_n_epochs: how often gates are looked at, >= 1.
        threshold: gates with P(z > 0) below this are shut for good; in (0, 0.5).

    Raises:
        ValueError: an argument is outside its range, or no gate of the network is on a channel that can
            leave.
    """

    def __init__(self, accountant: Accountant, every_n_epochs: int, threshold: float) -> None:
        if every_n_epochs < 1 or not 0 < threshold < 0.5:
            raise ValueError(
                "every_n_epochs must be >= 1 and threshold in (0, 0.5), "
                f"got {every_n_epochs!r} and {threshold!r}"
            )
        self.live = Live(accountant.flow, accountant.model)
        self.gates = accountant.gates
        if not removable_gates(self.live):
            raise ValueError(
                "callbacks.compact_every_n_epochs: no gate of this network is on a channel that can leave it"
            )
        self.every_n_epochs = every_n_epochs
        self.threshold = threshold
        self._stay: Mask | None = None
        self._shrunk: Shrunk | None = None

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look at the gates anew."""
        self._stay = None

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Shrink, when all settings of the epoch are made; again after a validation amid an epoch."""
        if self._shrunk is not None:
            return
        if self._stay is None:
            if trainer.current_epoch and trainer.current_epoch % self.every_n_epochs == 0:
                shut_for_good_(removable_gates(self.live), self.threshold)
            self._stay = plan(self.live)
            shut_useless_(self.live, self._stay)
        self._shrunk = shrink_(self.live, self._stay, trainer.optimizers)
        left = sum(gate.num_removed for gate in self.gates)
        log.debug("epoch %d trains without %d gates that are shut for good", trainer.current_epoch, left)
        if batch_idx == 0:
            pl_module.log("gates_removed", float(left), on_step=False, on_epoch=True, batch_size=1)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Before anything is measured."""
        self._expand()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Before anything is saved, where there was no validation."""
        self._expand()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """However training ends."""
        self._expand()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """However training ends."""
        self._expand()

    def _expand(self) -> None:
        if self._shrunk is not None:
            self._shrunk.expand_()
            self._shrunk = None
