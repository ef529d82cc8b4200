"""What training uses of Lightning and of PyTorch's trainers beyond their public interfaces.

Nowhere else: ``tests/training/test_lightning.py`` says which name has gone when a new version breaks one.
"""

import copy
import signal
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import EMAWeightAveraging
from torch import nn
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader


def logs_now(trainer: pl.Trainer) -> bool:
    """Whether what is logged in this step is written; asking costs less than ``self.log``."""
    return bool(trainer._logger_connector.should_update_logs)


def steps_per_epoch(trainer: pl.Trainer) -> float:
    """Optimizer steps in an epoch, known before the first one."""
    trainer.fit_loop.setup_data()
    return trainer.num_training_batches / trainer.accumulate_grad_batches


def show_learning_rates_(schedule: LRScheduler, rates: list[Any]) -> None:
    """Make ``schedule.get_last_lr()`` tell rates that were set by hand."""
    schedule._last_lr = rates


def with_own_workers(loader: DataLoader[Any]) -> DataLoader[Any]:
    """Return a copy that starts anew: workers that persist may be in the middle of an epoch."""
    loader = copy.copy(loader)
    loader._iterator = None
    return loader


def kill_other_processes(trainer: pl.Trainer) -> None:
    """End the other processes of a run at once; a milder signal would not reach them."""
    launcher = trainer.strategy.launcher
    if launcher is None:
        return
    launcher.kill(signal.SIGKILL if hasattr(signal, "SIGKILL") else signal.SIGTERM)
    procs = getattr(launcher, "procs", None)
    if isinstance(procs, list):
        procs.clear()  # else a thread of Lightning's kills this process because they have ended


class Averaging(EMAWeightAveraging):
    """Lightning's moving average of the weights, with a way to put it in place at any time."""

    def averaged(self) -> nn.Module | None:
        """Return the averaged LightningModule, None before training."""
        return None if self._average_model is None else self._average_model.module

    def exchange_(self, pl_module: pl.LightningModule) -> None:
        """Exchange the weights of the network for their average, or back."""
        self._swap_models(pl_module)
