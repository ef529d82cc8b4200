"""What a run that is resumed takes from its checkpoint, and what it may change.

The configuration in a checkpoint is data. A resumed run takes from it what makes the numbers (:data:`NUMBERS`
of the Trainer's keys, everything else but what belongs to a command), never where and how the process runs.
What the user names on the command line wins where :data:`CHANGES` says that it may: a change that would
make it another run is refused, any other one is honoured from the next epoch on and said.
"""

import fnmatch
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from sparsereg.errors import InputError

log = logging.getLogger(__name__)

NUMBERS = (
    "max_epochs",
    "min_epochs",
    "max_steps",
    "min_steps",
    "precision",
    "limit_train_batches",
    "limit_val_batches",
    "limit_test_batches",
    "overfit_batches",
    "val_check_interval",
    "check_val_every_n_epoch",
    "accumulate_grad_batches",
    "gradient_clip_val",
    "gradient_clip_algorithm",
    "deterministic",
    "compile",
    "channels_last",
)
"""Keys of ``trainer`` that a resumed run takes from its checkpoint, for the same numbers; no others."""


@dataclass(frozen=True)
class Rule:
    """What happens when a key of a resumed run differs from that of the run.

    Attributes:
        honoured: it is used from here on, and said; else it is refused.
        why: it is refused.
        unless_null: it may not change between null and a value.
        silent: it changes no number, and nothing is said.
    """

    honoured: bool = True
    why: str = ""
    unless_null: bool = False
    silent: bool = False


TOLD = Rule()
FREE = Rule(silent=True)
COMMAND = Rule(silent=True)
"""Of the command, not of the run; start_from has checked it."""
SPLIT = Rule(False, "other images would train and validate")
DATA = Rule(False, "the images would be others")
NETWORK = Rule(False, "the checkpoint holds another network")
GATES = Rule(False, "the gates are in the checkpoint")
STATE = Rule(False, "the optimizer's state is in the checkpoint")
MODE = Rule(unless_null=True, why="the checkpoint has no state for this, or one that would be lost")

CHANGES: dict[str, Rule] = {
    "ckpt_path": COMMAND,
    "resume_training": COMMAND,
    "without_using_gate": COMMAND,
    "rerun": COMMAND,
    "lambda_l0": TOLD,
    "lambda_l2": TOLD,
    "droprate_init": GATES,
    "target_sparsity": MODE,
    "target_macs": MODE,
    "penalty": TOLD,
    "label_smoothing": TOLD,
    "ema_decay": MODE,
    "seed": TOLD,
    "test_checkpoint": TOLD,
    "target.*": TOLD,
    "finetune.*": TOLD,
    "distill.*": TOLD,
    "temperature.*": TOLD,
    "model.dropout": TOLD,
    "model.droprate_init": GATES,
    "model.sampling": GATES,
    "model.*": NETWORK,
    "data.name": DATA,
    "data.path": TOLD,
    "data.root": TOLD,
    "data.image_size": DATA,
    "data.channels": DATA,
    "data.val_size": SPLIT,
    "data.split_seed": SPLIT,
    "data.limit_train_images": SPLIT,
    "data.batch_size": TOLD,
    "data.eval_batch_size": FREE,
    "data.device_resident": FREE,
    "data.max_memory_gb": FREE,
    "data.num_workers": FREE,
    "data.augment": TOLD,
    "data.augment.*": TOLD,
    "data.*": DATA,
    "optimizer.name": STATE,
    "optimizer.decay_all": STATE,
    "optimizer.*": TOLD,
    **{f"trainer.{key}": TOLD for key in NUMBERS},
    "trainer.accelerator": TOLD,
    "trainer.strategy": TOLD,
    "trainer.devices": TOLD,
    "trainer.num_nodes": TOLD,
    "trainer.sync_batchnorm": TOLD,
    "trainer.max_time": TOLD,
    "trainer.fast_dev_run": TOLD,
    "trainer.benchmark": TOLD,
    "trainer.enable_checkpointing": FREE,
    "trainer.enable_progress_bar": FREE,
    "trainer.enable_model_summary": FREE,
    "trainer.num_sanity_val_steps": FREE,
    "trainer.log_every_n_steps": FREE,
    "trainer.inference_mode": FREE,
    "trainer.profiler": FREE,
    "trainer.detect_anomaly": FREE,
    "logger.*": FREE,
    "callbacks.histogram_every_n_epochs": FREE,
    "callbacks.batch_norm.*": TOLD,
    "callbacks.penalty_warmup_epochs": TOLD,
    "callbacks.compact_every_n_epochs": TOLD,
    "callbacks.compact_below": TOLD,
}
"""Every key of the configuration; of several patterns that fit, the first counts."""

BEFORE_FINETUNING = (
    "lambda_l0",
    "lambda_l2",
    "target_sparsity",
    "target_macs",
    "penalty",
    "target.*",
    "temperature.*",
    "trainer.max_epochs",
    "trainer.min_epochs",
    "trainer.max_steps",
    "trainer.min_steps",
    "optimizer.lr",
    "optimizer.gate_lr_ratio",
    "optimizer.schedule",
    "optimizer.schedule_epochs",
    "optimizer.warmup_epochs",
    "optimizer.final_lr_ratio",
    "optimizer.milestones",
    "optimizer.gamma",
    "callbacks.penalty_warmup_epochs",
    "callbacks.compact_every_n_epochs",
    "callbacks.compact_below",
)
"""What the network that is fine-tuned was made with: once that has begun, it cannot change any more."""
AFTER_TRAINING = (
    "test_checkpoint",
    "data.path",
    "data.root",
    "callbacks.batch_norm.*",
    "trainer.accelerator",
    "trainer.strategy",
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.limit_val_batches",
    "trainer.limit_test_batches",
)
"""What still has an effect where no epoch is left."""


def rule(key: str) -> Rule | None:
    """Return what holds for a key such as ``data.batch_size``; None for one that nobody knows."""
    return next((r for pattern, r in CHANGES.items() if fnmatch.fnmatchcase(key, pattern)), None)


def differences(was: dict[str, Any], now: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the keys that both configurations have with different values, and these.

    Args:
        was: plain configuration of the run.
        now: plain configuration of the command.
    """
    one, other = dict(_leaves(was)), dict(_leaves(now))
    keys = [k for k in other if k in one or _above(k, one)]
    pairs = {k: (one.get(k), other[k]) for k in keys}
    pairs |= {k: (one[k], None) for k in one if k not in other and _above(k, other)}
    return {k: (a, b) for k, (a, b) in pairs.items() if a != b}


def _above(key: str, leaves: dict[str, Any]) -> bool:
    """Whether a group of the key is null there, as in ``data.augment=null``."""
    parts = key.split(".")
    return any(".".join(parts[:i]) in leaves for i in range(1, len(parts)))


def _leaves(node: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", list(value) if isinstance(value, tuple) else value


def check_changes(
    was: dict[str, Any], now: dict[str, Any], named: str, first_over: bool, epochs_left: bool
) -> dict[str, tuple[Any, Any]]:
    """Refuse what would make it another run, say what else is new, and return that.

    Args:
        was: plain configuration of the run.
        now: plain configuration of the command.
        named: the checkpoint, for messages.
        first_over: whether the epochs before fine-tuning are over.
        epochs_left: whether anything is left to train.

    Raises:
        InputError: one of the changes is refused.
    """
    refused, told = [], {}
    for key, (before, after) in differences(was, now).items():
        why = _refusal(key, before, after, first_over, epochs_left)
        if why:
            refused.append(f"{key} was {_said(before)}, is {_said(after)} ({why})")
        elif not (rule(key) or FREE).silent:
            told[key] = (before, after)
    if refused:
        raise InputError(
            f"{named} cannot be resumed with other settings: {'; '.join(refused)}; leave that out, or "
            "start a new run with resume_training=false"
        )
    for key, (before, after) in told.items():
        log.warning("%s was %s, is %s from here on", key, _said(before), _said(after))
    return told


def _refusal(key: str, before: Any, after: Any, first_over: bool, epochs_left: bool) -> str:
    """Say why a change is refused; empty if it is not."""
    found = rule(key)
    if found is None or found.silent:
        return ""
    if not found.honoured or (found.unless_null and (before is None) != (after is None)):
        return found.why
    if not epochs_left and not any(fnmatch.fnmatchcase(key, p) for p in AFTER_TRAINING):
        return "nothing is left to train with it"
    if first_over and any(fnmatch.fnmatchcase(key, p) for p in BEFORE_FINETUNING):
        return "only fine-tuning is left; checkpoints/gated.ckpt can be trained on with a larger max_epochs"
    return ""


def _said(value: Any) -> str:
    """A value as it is written on the command line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


DATA_IDENTITY = (
    "source",
    "num_train",
    "num_val",
    "num_classes",
    "image_shape",
    "mean",
    "std",
    "split_sha256",
)
"""What of the description of the data tells that they are the same images, divided in the same way."""


def check_same_data(was: dict[str, Any], now: dict[str, Any], named: str) -> None:
    """Raise an InputError unless the images are those that the run was trained on.

    Args:
        was: description of the data in the checkpoint.
        now: of those that were read.
        named: the checkpoint, for messages.
    """
    for key in DATA_IDENTITY:
        if key in was and was[key] != now[key]:
            raise InputError(
                f"{named} cannot be resumed with other images: {key} was {was[key]}, is {now[key]}"
            )
