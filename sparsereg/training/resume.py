"""What a run that is resumed takes from its checkpoint, and what it may change.

The configuration in a checkpoint is data. A resumed run takes from it what makes the numbers (``NUMBERS``
of the Trainer's keys, everything else but what belongs to a command), never where and how the process runs.
What the user names on the command line wins where ``CHANGES`` says that it may: a change that would
make it another run is refused, any other one is honoured from the next epoch on and said.
"""

import fnmatch
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from sparsereg.errors import InputError
from sparsereg.training.averaging import WeightAverage
from sparsereg.training.checkpoint import Checkpoint
from sparsereg.training.config import Optimizer
from sparsereg.training.optimizers import build_optimizer

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
DATA = Rule(False, "the data would be others")
NETWORK = Rule(False, "the checkpoint holds another network")
GATES = Rule(False, "the gates are in the checkpoint")
STATE = Rule(False, "the optimizer's state is in the checkpoint")
MODE = Rule(unless_null=True, why="the checkpoint has no state for this, or one that would be lost")

CHANGES: dict[str, Rule] = {
    "ckpt_path": COMMAND,
    "resume_training": COMMAND,
    "without_using_gate": COMMAND,
    "rerun": COMMAND,
    "objective": COMMAND,
    "droprate_init": GATES,
    "shape": GATES,
    "target_sparsity": MODE,
    "target_macs": MODE,
    "target_latency_ms": MODE,
    "target_memory_mb": MODE,
    "target.params": MODE,
    "target.macs": MODE,
    "front": Rule(False, "its run trains without gates, or with a target"),
    "pick": FREE,
    "ema_decay": MODE,
    "model.dropout": TOLD,
    "model.droprate_init": GATES,
    "model.sampling": GATES,
    "model._target_": TOLD,
    "model.*": NETWORK,
    "data.name": DATA,
    "data._target_": TOLD,
    "data.path": TOLD,
    "data.root": TOLD,
    "data.image_size": DATA,
    "data.channels": DATA,
    "data.val_size": SPLIT,
    "data.split_seed": SPLIT,
    "data.limit_train_images": SPLIT,
    "data.test_size": SPLIT,
    "data.eval_windows": TOLD,
    "data.train_windows": DATA,
    "data.batch_size": TOLD,
    "data.eval_batch_size": FREE,
    "data.device_resident": FREE,
    "data.max_memory_gb": FREE,
    "data.num_workers": FREE,
    "data.augment": TOLD,
    "data.augment.*": TOLD,
    "data.*": DATA,
    "task.name": Rule(False, "another task is another run"),
    "task.*": TOLD,
    "optimizer.name": STATE,
    "optimizer._target_": STATE,
    "optimizer.decay_all": STATE,
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
}
"""Exceptions: any other key is honoured and said. Of several patterns that fit, the first counts."""

BEFORE_FINETUNING = (
    "lambda_l0",
    "lambda_l2",
    "target_sparsity",
    "target_macs",
    "target_latency_ms",
    "target_memory_mb",
    "runtime",
    "threads",
    "batch",
    "front_epochs",
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
    "optimizer.schedule.*",
    "optimizer.schedule_epochs",
    "optimizer.schedule_interval",
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


def rule(key: str) -> Rule:
    """Return what holds for a key such as ``data.batch_size``."""
    return next((r for pattern, r in CHANGES.items() if fnmatch.fnmatchcase(key, pattern)), TOLD)


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
        elif not rule(key).silent:
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
    if found.silent:
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
    "sha256",
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
        if key in was and was[key] != now.get(key):
            raise InputError(
                f"{named} cannot be resumed with other data: {key} was {was[key]}, is {now.get(key)}"
            )


def check_state(
    checkpoint: Checkpoint,
    net: nn.Module,
    settings: Optimizer,
    trainer: pl.Trainer,
    callbacks: Sequence[pl.Callback],
) -> None:
    """Check that what Lightning would bring back has the form of what it is brought back into.

    Args:
        checkpoint: to resume.
        net: with its weights loaded.
        settings: of the optimizer.
        trainer: any; it tells the form of the state of its loops.
        callbacks: of the run.

    Raises:
        InputError: a part is missing or something else.
    """
    content, named = checkpoint.content, checkpoint.named
    optimizer = build_optimizer(net, settings)
    schedule = LambdaLR(optimizer, [lambda step: 1.0] * len(optimizer.param_groups))
    loops = {name: getattr(trainer, name).state_dict() for name in LOOPS}
    done = {"fit_loop": {"epoch_progress": {"current": {"processed": checkpoint.epoch}}}}
    problem = (
        _misfit(content["loops"], loops, "loops")
        or _other(content["loops"], done, "loops")
        or _optimizer_misfit(content["optimizer_states"], optimizer)
        or _schedule_misfit(content["lr_schedulers"], schedule)
        or _callbacks_misfit(content["callbacks"], callbacks)
        or _average_misfit(content, any(isinstance(c, WeightAverage) for c in callbacks))
    )
    if problem:
        raise InputError(f"{named} cannot be resumed: {problem}")


LOOPS = ("fit_loop", "validate_loop", "test_loop", "predict_loop")


def _misfit(found: Any, expected: Any, where: str) -> str:
    """Say where nested states have not the form of others; empty if they have."""
    if isinstance(expected, dict):
        if not isinstance(found, dict):
            return f"{where} in it is not a state"
        lacking = [key for key in expected if key not in found]
        if lacking:
            return f"{where}.{lacking[0]} is missing from it"
        return next((m for k, e in expected.items() if (m := _misfit(found[k], e, f"{where}.{k}"))), "")
    if isinstance(expected, bool):
        return "" if isinstance(found, bool) else f"{where} in it is not true or false"
    counts = isinstance(found, int) and not isinstance(found, bool) and found >= 0
    return "" if counts or not isinstance(expected, int) else f"{where} in it is not an integer >= 0"


def _other(found: Any, expected: Any, where: str) -> str:
    """Say where nested values are not those that are expected; empty if they are."""
    if isinstance(expected, dict):
        return next((o for k, e in expected.items() if (o := _other(found[k], e, f"{where}.{k}"))), "")
    return "" if found == expected else f"{where} in it is {found}, which is not its epoch {expected}"


OURS = (torch.optim.AdamW, torch.optim.SGD)
"""Optimizers whose state is known: tensors of the parameters' shapes."""


def _optimizer_misfit(states: list[dict[str, Any]], optimizer: torch.optim.Optimizer) -> str:
    where = "optimizer_states"
    if len(states) != 1 or not {"state", "param_groups"} <= states[0].keys():
        return f"{where} in it is not the state of one optimizer"
    groups, state, own = states[0]["param_groups"], states[0]["state"], optimizer.param_groups
    if not isinstance(groups, list) or not isinstance(state, dict) or len(groups) != len(own):
        return f"{where} in it has other groups of parameters"
    numbers: list[Any] = []
    for found, group in zip(groups, own, strict=True):
        lacking = [k for k in group if not isinstance(found, dict) or k not in found]
        if lacking or not isinstance(found["params"], list) or len(found["params"]) != len(group["params"]):
            return f"{where}.param_groups in it are not those of this network"
        if not isinstance(found.get("name", ""), str):
            return f"{where}.param_groups in it has a name that is no text"
        numbers += found["params"]
    parameters = [p for group in own for p in group["params"]]
    if numbers != list(range(len(parameters))) or not set(state) <= set(numbers):
        return f"{where} in it is of other parameters"
    forms = {tuple(sorted(s)) if isinstance(s, dict) else None for s in state.values()}
    if len(forms) > 1 or None in forms:
        return f"{where}.state in it lacks a part"
    for number, parts in state.items():
        for key, value in parts.items():
            if value is None and key == "momentum_buffer":
                continue  # of SGD without momentum
            if type(optimizer) not in OURS and not isinstance(value, Tensor):
                continue  # of the user's, which knows what its state is
            shaped = isinstance(value, Tensor) and value.shape in ((), parameters[number].shape)
            shaped = shaped and value.layout == torch.strided and not value.is_meta
            if not shaped or not bool(torch.isfinite(value).all()):
                return f"{where}.state.{number}.{key} in it does not fit its parameter, or is not finite"
    return ""


def _schedule_misfit(states: list[dict[str, Any]], schedule: LambdaLR) -> str:
    expected, where = schedule.state_dict(), "lr_schedulers"
    if len(states) != 1 or states[0].keys() != expected.keys():
        return f"{where} in it is not the state of one schedule"
    state, num = states[0], len(schedule.base_lrs)
    if state["lr_lambdas"] != [None] * num:
        return f"{where}.lr_lambdas in it is not empty"
    for key in ("base_lrs", "_last_lr"):
        rates = state[key]
        numbers = isinstance(rates, list) and all(
            isinstance(r, float | int) and math.isfinite(r) for r in rates
        )
        if not numbers or len(rates) != num:
            return f"{where}.{key} in it is not a number for each group"
    return next((m for k, e in expected.items() if (m := _misfit(state[k], e, f"{where}.{k}"))), "")


def _callbacks_misfit(states: dict[str, Any], callbacks: Sequence[pl.Callback]) -> str:
    for callback in callbacks:
        expected, where = callback.state_dict(), f"callbacks.{type(callback).__name__}"
        found = states.get(callback.state_key)
        if not type(callback).__module__.startswith(("sparsereg.", "pytorch_lightning.")):
            continue  # of the user's, who knows what its state is
        if not expected or (found is None and isinstance(callback, ModelCheckpoint)):
            continue
        problem = _misfit(found, dict.fromkeys(expected), where)
        if problem:
            return problem
        assert found is not None
        for key, value in found.items():
            if isinstance(callback, ModelCheckpoint) and key != "best_model_score":
                continue
            unset = value is None and expected.get(key) is None
            if not (unset or _is_finite(value)):
                return f"{where}.{key} in it is not a finite number"
    return ""


def _is_finite(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.numel() == 1 and bool(value.isfinite())
    return isinstance(value, int | float) and math.isfinite(value)


def _average_misfit(content: dict[str, Any], averaged: bool) -> str:
    if not averaged:
        return ""
    for key in ("current_model_state", "averaging_state"):
        if content.get(key) is None:
            return f"{key} is missing from it"
    now, average = content["current_model_state"], content["state_dict"]
    if {k: v.shape for k, v in now.items()} != {k: v.shape for k, v in average.items()}:
        return "current_model_state in it has not the tensors of state_dict"
    if list(content["averaging_state"]) != ["n_averaged"] or content["averaging_state"]["n_averaged"].dim():
        return "averaging_state in it is not a number of steps"
    return ""
