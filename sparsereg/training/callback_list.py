"""Which callbacks a run has, in their order, and what they found."""

from dataclasses import replace
from pathlib import Path

import pytorch_lightning as pl
from pytorch_lightning.callbacks import LearningRateMonitor

from sparsereg import own_code
from sparsereg.compression import Accountant
from sparsereg.data.own import RunData
from sparsereg.errors import InputError
from sparsereg.training import callbacks as ours
from sparsereg.training.accounting import PlainAccountant
from sparsereg.training.averaging import WeightAverage
from sparsereg.training.build import example_input
from sparsereg.training.compaction import Compaction
from sparsereg.training.config import Callbacks, Training
from sparsereg.training.results import measured, names
from sparsereg.training.target import SparsityTarget, TargetSettings, asked_for, measured_budget
from sparsereg.training.tasks.task import Task


def build_callbacks(
    cfg: Training,
    data: RunData,
    task: Task,
    accountant: Accountant | PlainAccountant,
    folder: Path,
    logging_on: bool,
    resumed: Path | None = None,
) -> "tuple[list[pl.Callback], ours.EpochTimer]":
    """Build the callbacks of a training run; the order matters.

    Averaged weights are put in place before gates are brought to a target, then BatchNorm statistics are
    taken, then everything is counted and logged; checkpoints come last.

    Args:
        cfg: the configuration.
        data: for the number of validation examples.
        task: whose main figure tells which epoch is the best.
        accountant: counts the network.
        folder: of the run.
        logging_on: whether there is a logger.
        resumed: the checkpoint that is resumed, if one is.
    """
    timer = ours.EpochTimer()
    callbacks: list[pl.Callback] = [
        timer,
        ours.ReproducibleEpochs(cfg.seed),
        ours.FiniteLoss(),
    ]
    traced = accountant if isinstance(accountant, Accountant) else None  # as every network with gates is
    if cfg.compacts:  # in front of all that looks at the network: it then has its original size
        every = cfg.callbacks.compact_every_n_epochs
        assert traced is not None
        callbacks.append(Compaction(traced, every, cfg.callbacks.compact_below))
    average = WeightAverage(cfg.ema_decay) if cfg.ema_decay is not None else None
    if average is not None:
        callbacks.append(average)
    if cfg.has_target:
        assert traced is not None
        callbacks.append(_target(cfg, traced, data, average))
    callbacks.append(batch_norm_estimation(cfg, average))
    if cfg.gated:
        assert traced is not None
        callbacks += [
            ours.TemperatureSchedule(cfg.temperature.scheduler()),
            ours.SparsityMonitor(traced, cfg.callbacks.histogram_every_n_epochs),
        ]
        if cfg.callbacks.penalty_warmup_epochs > 0:
            callbacks.append(ours.PenaltyWarmUp(cfg.callbacks.penalty_warmup_epochs))
    callbacks += own(cfg.callbacks)
    if logging_on:
        callbacks.append(LearningRateMonitor(logging_interval="step"))
    if cfg.trainer.enable_checkpointing:
        if data.num_val and keeps_best(cfg):
            best = ours.BestCheckpoint(
                folder / "checkpoints", resumed, f"val_{task.figure}", task.larger_is_better
            )
            callbacks.append(best)
        callbacks.append(ours.LastCheckpoint(folder / "checkpoints"))
    return callbacks, timer


def _target(
    cfg: Training, accountant: Accountant, data: RunData, average: WeightAverage | None
) -> SparsityTarget:
    asked = asked_for(cfg)
    if asked is not None or cfg.target_key is None:
        return SparsityTarget(accountant, target_settings(cfg, *(asked or (None, None))), average)
    budget = measured_budget(cfg, accountant, example_input(data, accountant.model))
    assert budget is not None
    return SparsityTarget(accountant, target_settings(cfg, budget.cost, budget.kept), average, budget)


def own(settings: Callbacks) -> list[pl.Callback]:
    """Make the callbacks that the user added.

    Raises:
        InputError: one of them is none.
    """
    made = {name: own_code.call(spec, f"callbacks.{name}") for name, spec in settings.others.items()}
    for name, callback in made.items():
        if not isinstance(callback, pl.Callback):
            raise InputError(
                f"callbacks.{name}._target_={settings.others[name][own_code.TARGET]}: expected a Lightning "
                f"Callback, it makes a {type(callback).__name__}"
            )
    return list(made.values())


def target_settings(cfg: Training, cost: str | None, kept: float | None) -> TargetSettings:
    """Return how a target is reached in the epochs that the run has."""
    epochs = cfg.trainer.max_epochs
    assert epochs is not None  # checked with the target
    start = min(cfg.callbacks.penalty_warmup_epochs, epochs - 1)
    ramp_epochs = cfg.target.ramp * (epochs - start)
    proportional, integral = cfg.gains
    how = replace(cfg.target, proportional_gain=proportional, integral_gain=integral)
    return TargetSettings(**vars(how), cost=cost, kept=kept, start_epoch=start, ramp_epochs=ramp_epochs)


def keeps_best(cfg: Training) -> bool:
    """Whether validation runs at all, so that there is a best checkpoint."""
    return cfg.trainer.limit_val_batches != 0


def batch_norm_estimation(cfg: Training, average: WeightAverage | None = None) -> ours.BatchNormEstimation:
    """Build the callback that re-estimates BatchNorm statistics, of averaged weights if there are any."""
    b = cfg.callbacks.batch_norm
    each_epoch = cfg.trainer.enable_checkpointing or bool(cfg.callbacks.others)  # somebody looks at it then
    return ours.BatchNormEstimation(b.num_images, b.batch_size, average, each_epoch=each_epoch)


def tested_checkpoint(
    cfg: Training, trainer: pl.Trainer, folder: Path, task: Task
) -> tuple[dict[str, float | None], str | None]:
    """Return what validation measured of the checkpoint to test, and its path if one was written."""
    written = folder / "checkpoints"
    best = [c for c in trainer.checkpoint_callbacks if isinstance(c, ours.BestCheckpoint)]
    if cfg.test_checkpoint == "best" and best and best[0].best_model_score is not None:
        score = float(f"{float(best[0].best_model_score):.7g}")
        known: dict[str, float | None] = dict.fromkeys(names("val", task))
        path = str(written / Path(best[0].best_model_path).name)
        return {**known, f"val_{task.figure}": score}, path
    last = written / "last.ckpt"
    return measured(trainer, "val", task), str(last) if last.is_file() else None
