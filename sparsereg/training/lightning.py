"""What training uses of Lightning and of PyTorch's trainers beyond their public interfaces.

Nowhere else: ``tests/training/test_lightning.py`` says which name has gone when a new version breaks one.
"""

import copy
import signal
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EMAWeightAveraging
from torch import nn
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader

from sparsereg.errors import InputError


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


def first_batch(trainer: pl.Trainer, module: pl.LightningModule) -> Any:
    """Return the first batch of what a Trainer is about to run on, where the module is and as it gets it.

    Raises:
        InputError: there is none.
    """
    evaluation = {"validate": trainer.validate_loop, "test": trainer.test_loop}
    loop: Any = evaluation.get(str(trainer.state.fn.value if trainer.state.fn else ""), trainer.fit_loop)
    if trainer.state.fn == "predict":
        loop = trainer.predict_loop
    loaders = loop._data_source.dataloader()
    while isinstance(loaders, list | tuple) and loaders:
        loaders = loaders[0]
    batch = next(iter(loaders), None)
    if batch is None:
        raise InputError("there is no batch to take an example from: give example=...")
    return transferred(module, batch)


def transferred(module: pl.LightningModule, batch: Any) -> Any:
    """Return a batch as a module gets it, by the hooks that bring it where the module is."""
    device = next((p.device for p in module.parameters()), module.device)
    batch = module._on_before_batch_transfer(batch, 0)
    return module._apply_batch_transfer_handler(batch, device=device, dataloader_idx=0)


def batches_anew(trainer: pl.Trainer) -> None:
    """Let the batches of this epoch begin anew, so that their order comes from the generators as they are."""
    fetcher = trainer.fit_loop._data_fetcher
    if fetcher is not None:
        iter(fetcher)


def gradient_scale(trainer: pl.Trainer, optimizer: torch.optim.Optimizer) -> float:
    """By how much gradients are enlarged when an optimizer steps: fused ones undo a scaler by themselves."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is None or not getattr(optimizer, "_step_supports_amp_scaling", False):
        return 1.0
    return float(scaler.get_scale())


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
