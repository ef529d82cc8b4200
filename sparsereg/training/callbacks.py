"""Callbacks: seeds, temperature, BatchNorm, sparsity, time, checkpoints, a loss that is not a number."""

import contextlib
import random
import shutil
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, ModelCheckpoint
from pytorch_lightning.loggers import TensorBoardLogger
from torch import Tensor, nn

from sparsereg.compression import Accountant
from sparsereg.device import several_processes
from sparsereg.errors import InputError
from sparsereg.files import write_atomically
from sparsereg.model.batch_norm_statistics import estimate_batch_norm_, has_statistics
from sparsereg.penalties import hard_concretes
from sparsereg.temperature import TemperatureScheduler, update_temperatures
from sparsereg.training.averaging import WeightAverage
from sparsereg.training.batch_norm_data import estimation_batches
from sparsereg.training.lightning import logs_now
from sparsereg.training.tensorboard import show_gates


class TrainingError(InputError):
    """Training cannot go on with these settings; the message says why and what is left."""


class ReproducibleEpochs(Callback):
    """Seed the generators of PyTorch, NumPy and Python at the start of every epoch, by (seed, epoch).

    The noise of the gates and of dropout is then a function of the epoch, so that a resumed run draws what
    an uninterrupted one would have drawn, and every process draws the same gates.

    Args:
        seed: of the run.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Seed all generators of this process."""
        seed = (self.seed * 1_000_003 + trainer.current_epoch + 1) % 2**63
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)


class TemperatureSchedule(Callback):
    """Set the temperature of every gate at the start of every epoch and log it.

    Args:
        scheduler: temperature as a function of the epoch.
    """

    def __init__(self, scheduler: TemperatureScheduler) -> None:
        self.scheduler = scheduler

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Apply the temperature of this epoch."""
        temperature = self.scheduler.get_temperature(trainer.current_epoch)
        update_temperatures(pl_module, temperature)
        pl_module.log("temperature", temperature, sync_dist=several_processes())


@runtime_checkable
class ScalesPenalty(Protocol):
    """A LightningModule that multiplies the penalty of its gates by ``self.penalty_scale``."""

    penalty_scale: float


class PenaltyWarmUp(Callback):
    """Let the penalty grow linearly over the first epochs, so that the weights learn before gates close.

    Needs a module whose loss multiplies its penalty by ``penalty_scale`` (`ScalesPenalty`).

    Args:
        epochs: > 0; from this epoch on the penalty has its full weight.
    """

    def __init__(self, epochs: float) -> None:
        self.epochs = epochs

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Set the share of lambda_l0 that this epoch uses."""
        if not isinstance(pl_module, ScalesPenalty):
            raise TypeError(
                f"PenaltyWarmUp sets penalty_scale, a number that {type(pl_module).__name__} has not: set "
                "self.penalty_scale = 1.0 in its constructor and multiply the penalty by it in training_step"
            )
        pl_module.penalty_scale = min(trainer.current_epoch / self.epochs, 1.0)


class BatchNormEstimation(Callback):
    """Take the BatchNorm statistics anew whenever the network is about to be measured or saved.

    The one rule for every network, with gates or without, compacted or not: what is measured has the
    statistics of exactly its weights. Those that training gathers lag behind the weights (by a hundred steps
    and more in networks with a small momentum) and know sampled gates only. Statistics that fit, since
    nothing was trained after they were taken, are kept: the network that is tested is the one measured.

    Works in any LightningModule that answers to ``forward(inputs)``, with any data. The images are those of
    the data module's ``estimation_batches`` if it has that (ours do), else of its training batches.

    Args:
        num_images: training images to use; 0 leaves the statistics that training gathered.
        batch_size: images per batch, where the data module can choose it.
        average: holds the averaged weights that are measured and saved, if there are any.
        read: what the network takes of a batch of a foreign data module, and is called with by ``called``.
        called: the network that takes it, if it is not the module itself.
        each_epoch: also at the end of epochs without validation, when checkpoints are written; else only of
            the last one.
    """

    def __init__(
        self,
        num_images: int,
        batch_size: int = 256,
        average: WeightAverage | None = None,
        read: Callable[[Any], Any] | None = None,
        called: Callable[[], nn.Module] | None = None,
        each_epoch: bool = True,
    ) -> None:
        self.num_images = num_images
        self.batch_size = batch_size
        self.average = average
        self.read = read
        self.called = called
        self.each_epoch = each_epoch
        self._current = False

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """A step changes the weights, and the statistics with them."""
        self._note(pl_module, False)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Before validation; averaged weights are in place already."""
        self._estimate(trainer, pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Before the checkpoint is written, where there was no validation."""
        later = trainer.max_epochs is not None and trainer.current_epoch + 1 < trainer.max_epochs
        if self._is_current(pl_module) or (later and not self.each_epoch):
            return
        with contextlib.nullcontext() if self.average is None else self.average.in_place(pl_module):
            self._estimate(trainer, pl_module)

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Before test."""
        self._estimate(trainer, pl_module)

    def _is_current(self, module: pl.LightningModule) -> bool:
        return module.batch_norm_is_current if isinstance(module, KnowsStatistics) else self._current

    def _note(self, module: pl.LightningModule, current: bool) -> None:
        self._current = current
        if isinstance(module, KnowsStatistics):
            module.batch_norm_is_current = current

    def _estimate(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if not self.num_images or self._is_current(module) or trainer.sanity_checking:
            return
        network = module if self.called is None else self.called()
        if not has_statistics(network):
            return
        images = estimation_batches(trainer, module, self.num_images, self.batch_size, self.read)
        if images is None:
            return
        batches = map(trainer.precision_plugin.convert_input, images)
        eager = torch.compiler.set_stance("force_eager")
        with eager, trainer.precision_plugin.forward_context():
            estimate_batch_norm_(network, batches)
        self._note(module, True)


@runtime_checkable
class KnowsStatistics(Protocol):
    """A LightningModule that stores with its weights whether the BatchNorm statistics are theirs."""

    batch_norm_is_current: bool


class SparsityMonitor(Callback):
    """Log expected and exact sparsity and the open gates of each layer after every validation.

    Args:
        accountant: counts the parameters of the network as it would be compacted now.
        histogram_every_n_epochs: how often TensorBoard gets histograms and maps of the gates; 0 for never.
    """

    def __init__(self, accountant: Accountant, histogram_every_n_epochs: int = 1) -> None:
        self.accountant = accountant
        self.every = histogram_every_n_epochs

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Count, and show the gates."""
        gates = hard_concretes(self.accountant.model)
        if not gates:
            return
        with torch.no_grad():
            active = {name: gate.p_active().flatten() for name, gate in gates.items()}
            open_gates = {name: float((gate.median() > 0).sum()) for name, gate in gates.items()}
            expected = 1 - torch.cat(list(active.values())).double().mean().item()
        scalars = {"expected_sparsity": expected, "exact_sparsity": self.accountant.exact_sparsity()}
        pl_module.log_dict(scalars, prog_bar=True, sync_dist=several_processes())
        layers = {f"open_gates/{_short(name)}": n for name, n in open_gates.items()}
        layers["open_gates"] = sum(open_gates.values())
        pl_module.log_dict(layers, sync_dist=several_processes())
        if not self.every or trainer.current_epoch % self.every:
            return
        step = trainer.global_step
        for logger in (one for one in trainer.loggers if isinstance(one, TensorBoardLogger)):
            show_gates(logger.experiment, {_short(name): gate for name, gate in gates.items()}, step)


def _short(name: str) -> str:
    """Leave out the parts of a gate's name that all of them share."""
    return name.removesuffix(".gates").removesuffix(".gate").removesuffix(".norm")


class FiniteLoss(Callback):
    """Stop as soon as the loss is not a number, before anything is saved.

    The check is kept on the device and read when the logs are, and before each validation, so that a GPU
    does not wait for it at every step.
    """

    def __init__(self) -> None:
        self._finite: Tensor | None = None

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Remember whether this loss is finite."""
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if not isinstance(loss, Tensor):
            return  # of a module that steps by itself
        now = torch.isfinite(loss.detach()).all()
        self._finite = now if self._finite is None else self._finite & now
        if logs_now(trainer):
            self._check(trainer)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check before anything is measured or saved."""
        self._check(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check where there was no validation."""
        self._check(trainer)

    def _check(self, trainer: pl.Trainer) -> None:
        if self._finite is None or bool(self._finite):
            return
        kept = [c.best_model_path for c in trainer.checkpoint_callbacks if getattr(c, "best_model_path", "")]  # type: ignore[attr-defined]
        left = f"the last good checkpoint is {kept[-1]}" if kept else "no checkpoint had been written yet"
        raise TrainingError(
            f"the loss is not a finite number in epoch {trainer.current_epoch}; {left}; "
            "try a smaller optimizer.lr or trainer.gradient_clip_val=1"
        )


class EpochTimer(Callback):
    """Take the time of each training epoch: data, augmentation, steps and logging, without validation."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._start = 0.0

    @property
    def seconds_per_epoch(self) -> float | None:
        """Median over the epochs; None if there was none."""
        return statistics.median(self.seconds) if self.seconds else None

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock."""
        self._start = time.perf_counter()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop the clock at the last batch, before validation."""
        if trainer.is_last_batch:
            if pl_module.device.type == "cuda":
                torch.cuda.synchronize()
            self.seconds.append(time.perf_counter() - self._start)
            pl_module.log("seconds_per_epoch", self.seconds[-1], sync_dist=several_processes())


class LastCheckpoint(ModelCheckpoint):
    """Write ``last.ckpt`` at the end of every epoch, after validation.

    Args:
        folder: where to.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(
            dirpath=folder, filename="last", save_on_train_epoch_end=True, enable_version_counter=False
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Leave the file of the run that is resumed alone."""


class BestCheckpoint(ModelCheckpoint):
    """Write ``best.ckpt`` whenever a figure of validation is better than ever.

    Args:
        folder: where to.
        resumed: the checkpoint that is resumed, if one is.
        figure: name of the figure.
        larger_is_better: or smaller.
    """

    def __init__(
        self,
        folder: Path,
        resumed: Path | None = None,
        figure: str = "val_acc",
        larger_is_better: bool = True,
    ) -> None:
        self.resumed = resumed
        super().__init__(
            dirpath=folder,
            filename="best",
            monitor=figure,
            mode="max" if larger_is_better else "min",
            save_on_train_epoch_end=True,
            enable_version_counter=False,
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Bring the best checkpoint, which lies beside the one that is resumed, into this folder."""
        score = state_dict.get("best_model_score")
        if score is None or self.resumed is None or self.dirpath is None:
            return
        before = self.resumed.with_name(Path(str(state_dict.get("best_model_path"))).name)
        self.resumed = None  # a test afterwards restores this callback, too
        if not before.is_file():
            return
        here = Path(self.dirpath) / "best.ckpt"
        write_atomically(here, lambda p: shutil.copyfile(before, p))
        self.best_model_path = str(here)
        self.best_model_score = self.current_score = self.kth_value = score
        self.kth_best_model_path = str(here)
        self.best_k_models = {str(here): score}
