"""The process of a training run and its Trainer: what both are told, and what cannot work there."""

import ctypes
import inspect
import logging
import os
import platform
import warnings
from collections.abc import Sequence
from pathlib import Path

import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning.loggers import Logger
from torch import nn

from sparsereg.data.own import RunData
from sparsereg.errors import InputError, nearest
from sparsereg.files import new_version
from sparsereg.model.basic_l0_blocks import synchronise_batch_norm
from sparsereg.settings import plain
from sparsereg.training.checkpoint_io import WholeCheckpoints
from sparsereg.training.config import Training
from sparsereg.training.ending import EndsTogether
from sparsereg.training.progress_bar import ProgressBar

RUN_FOLDER = "SPARSEREG_RUN_FOLDER"
"""Environment variable by which the first process tells the others of a DDP run its folder."""
OWN_TRAINER_KEYS = ("compile", "channels_last", "sync_batchnorm")


def tune_process() -> None:
    """Set what makes training on a CPU faster and changes no result beyond denormal numbers.

    Denormals are flushed to zero. glibc is told to keep freed memory: it otherwise returns each
    activation to the system and faults it in again, a third of the time of a small network's step.
    """
    torch.set_flush_denormal(True)
    if platform.system() == "Linux" and platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of malloc.h
        libc.mallopt(mmap_threshold, 1 << 30)
        libc.mallopt(trim_threshold, (1 << 31) - 1)


def quieten_lightning() -> None:
    """Leave out what Lightning says about hardware and products, and a deprecation inside of it.

    Fine-tuning writes into the folder of the gated stage's checkpoints on purpose, and a resumed run that
    does not validate any more has no use for the state of the best checkpoint.
    """
    logging.getLogger("pytorch_lightning.utilities.rank_zero").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*LeafSpec.*", module="pytorch_lightning")
    for said in (
        "Checkpoint directory .* exists and is not empty",
        "Be aware that when using `ckpt_path`",
        "You requested to overfit but enabled .* dataloader shuffling",  # ours have a fixed order then
    ):
        warnings.filterwarnings("ignore", message=said)


def claim_run_folder(outputs: Path) -> Path:
    """Make the run's folder; the other processes of a DDP run take the first one's."""
    folder = os.environ.get(RUN_FOLDER) if int(os.environ.get("LOCAL_RANK", "0")) else None
    if folder is None:
        folder = str(new_version(outputs / "train" / "tblog" / "lightning_logs"))
        os.environ[RUN_FOLDER] = folder
    return Path(folder)


def check_trainer(cfg: Training, multirun: bool) -> None:
    """Refuse what cannot work before anything is loaded.

    Raises:
        InputError: a GPU where there is none; DDP by subprocesses below a sweep; what Lightning refuses.
    """
    trainer = cfg.trainer
    if trainer.accelerator in ("gpu", "cuda") and not torch.cuda.is_available():
        raise InputError(
            f"trainer.accelerator={trainer.accelerator}: this machine has no GPU; use trainer=cpu"
        )
    strategy = trainer.strategy
    if multirun and strategy.startswith("ddp") and strategy not in ("ddp_fork", "ddp_spawn", "ddp_notebook"):
        raise InputError(
            "-m and trainer=ddp do not work together: every process would start the whole sweep again; "
            "give trainer.strategy=ddp_fork, or one run at a time"
        )
    known = [f"trainer.{name}" for name in (*inspect.signature(pl.Trainer).parameters, *OWN_TRAINER_KEYS)]
    for key in (f"trainer.{name}" for name in trainer.others):
        if key not in known:
            raise InputError(f"unknown key {key!r}{nearest(key, known)}")
    build_trainer(cfg, [])


def build_trainer(
    cfg: Training,
    callbacks: list[pl.Callback],
    loggers: Sequence[Logger] = (),
    folder: Path | None = None,
    num_batches: int | None = None,
    without_validation: bool = False,
) -> pl.Trainer:
    """Build Lightning's Trainer from the keys that are not null.

    Args:
        cfg: the configuration.
        callbacks: besides the progress bar.
        loggers: none switch logging off.
        folder: the run's.
        num_batches: training batches of an epoch; logs are written at least once in each.
        without_validation: there are no validation images.
    """
    keys = {k: v for k, v in plain(cfg.trainer).items() if v is not None and k not in OWN_TRAINER_KEYS}
    if without_validation:
        keys["limit_val_batches"] = 0
    if num_batches is not None:
        keys["log_every_n_steps"] = max(1, min(keys.get("log_every_n_steps", 50), num_batches))
    bar = [ProgressBar()] if keys.get("enable_progress_bar", True) else []
    plugins = [*(keys.pop("plugins", None) or []), WholeCheckpoints()]
    try:
        return pl.Trainer(
            **keys,
            logger=list(loggers) or False,
            callbacks=[*callbacks, *bar, EndsTogether()],
            plugins=plugins,
            default_root_dir=None if folder is None else str(folder),
        )
    except (MisconfigurationException, TypeError, RuntimeError, ValueError, ImportError) as error:
        raise InputError(f"trainer: {error}") from error


def check_shares(cfg: Training, data: RunData) -> None:
    """Refuse shares of the batches that are less than one batch, and a validation that never comes.

    Raises:
        InputError: naming the key.
    """
    train = len(data.train_dataloader())
    batches = {"overfit_batches": train, "limit_train_batches": train, "val_check_interval": train}
    batches["limit_val_batches"] = len(data.val_dataloader()) if data.num_val else 0
    batches["limit_test_batches"] = len(data.test_dataloader())
    for key, number in batches.items():
        share = getattr(cfg.trainer, key)
        if number and isinstance(share, float) and 0 < share * number < 1:
            raise InputError(
                f"trainer.{key}={share:g}: less than one of the {number} batches; give {1 / number:.3g} or"
                " more"
            )
    within, each = cfg.trainer.val_check_interval, batches_per_epoch(cfg, data)
    if isinstance(within, int) and within > each and cfg.trainer.check_val_every_n_epoch is not None:
        raise InputError(
            f"trainer.val_check_interval={within}: expected {each} at most, the batches of an epoch"
        )


def batches_per_epoch(cfg: Training, data: RunData) -> int:
    """Return the number of training batches of an epoch, at most ``trainer.limit_train_batches``."""
    batches = len(data.train_dataloader())
    limit = cfg.trainer.limit_train_batches
    if limit is None:
        return batches
    return min(batches, limit if isinstance(limit, int) else int(batches * limit))


def synchronise(cfg: Training, net: nn.Module) -> nn.Module:
    """Let BatchNorm see all processes if ``trainer.sync_batchnorm`` asks for it."""
    return synchronise_batch_norm(net) if cfg.trainer.sync_batchnorm else net
