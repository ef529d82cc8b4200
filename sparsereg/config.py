"""Schema of the configurations: types and ranges, so that a misspelt key or a wrong value fails at once."""

import math
from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf

from sparsereg.errors import InputError, nearest


@dataclass
class TemperatureConfig:
    """Temperature schedule, see sparsereg.temperature."""

    schedule: str = MISSING
    initial: float = MISSING
    final: float = MISSING
    anneal_epochs: int = MISSING


@dataclass
class OptimizerConfig:
    """Optimizer and learning-rate schedule, see sparsereg.training.optimizers."""

    name: str = MISSING
    lr: float = MISSING
    weight_decay: float = MISSING
    decay_all: bool = MISSING
    gate_lr_ratio: float = MISSING
    betas: list[float] = MISSING
    momentum: float = MISSING
    schedule: str = MISSING
    schedule_epochs: int = MISSING
    warmup_epochs: float = MISSING
    final_lr_ratio: float = MISSING
    milestones: list[float] = MISSING
    gamma: float = MISSING


@dataclass
class BatchNormConfig:
    """How BatchNorm statistics are re-estimated."""

    num_images: int = MISSING
    batch_size: int = MISSING


@dataclass
class CallbacksConfig:
    """Settings of the callbacks, see sparsereg.training.callbacks."""

    batch_norm: BatchNormConfig = field(default_factory=BatchNormConfig)
    histogram_every_n_epochs: int = MISSING
    penalty_warmup_epochs: float = MISSING
    compact_every_n_epochs: int = 0
    compact_below: float = 0.02


@dataclass
class TargetConfig:
    """How a target is reached, see sparsereg.training.target."""

    ramp: float = MISSING
    proportional_gain: float = MISSING
    integral_gain: float = MISSING
    every_n_steps: int = MISSING


@dataclass
class FinetuneConfig:
    """Training of the compacted network, see sparsereg.training.stages."""

    epochs: int = MISSING
    lr: float = MISSING


@dataclass
class DistillConfig:
    """A teacher, see sparsereg.training.distillation."""

    ckpt_path: str | None = None
    weight: float = MISSING
    temperature: float = MISSING


@dataclass
class LoggerConfig:
    """Which logger."""

    name: str = MISSING


@dataclass
class TrainConfig:
    """configs/train.yaml. The groups model, data and trainer are checked by whoever builds them."""

    lambda_l0: float | None = None
    lambda_l2: float = MISSING
    droprate_init: float = MISSING
    target_sparsity: float | None = None
    target_macs: float | None = None
    penalty: str = MISSING
    label_smoothing: float = MISSING
    ema_decay: float | None = None
    target: TargetConfig = field(default_factory=TargetConfig)
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    ckpt_path: str | None = None
    resume_training: bool = MISSING
    without_using_gate: bool = MISSING
    seed: int = MISSING
    test_checkpoint: str = MISSING
    rerun: bool = MISSING
    model: Any = MISSING
    data: Any = MISSING
    temperature: TemperatureConfig = field(default_factory=TemperatureConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    trainer: Any = MISSING
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    callbacks: CallbacksConfig = field(default_factory=CallbacksConfig)


TRAINER_INTEGERS = (
    "max_epochs",
    "min_epochs",
    "max_steps",
    "min_steps",
    "accumulate_grad_batches",
    "check_val_every_n_epoch",
    "log_every_n_steps",
    "num_nodes",
    "num_sanity_val_steps",
)
TRAINER_NUMBERS = (
    "limit_train_batches",
    "limit_val_batches",
    "limit_test_batches",
    "overfit_batches",
    "gradient_clip_val",
)
"""Keys of Lightning's Trainer that it takes without a look at their type, and fails on later."""


def checked(cfg: DictConfig) -> DictConfig:
    """Return the training configuration with types checked and ranges checked.

    Raises:
        InputError: a value is of the wrong type or outside its range.
        OmegaConfBaseException: a key is unknown or a value has the wrong type.
    """
    merged = OmegaConf.merge(OmegaConf.structured(TrainConfig), cfg)
    assert isinstance(merged, DictConfig)
    _check_trainer_numbers(merged.trainer)
    if merged.lambda_l0 is not None:
        require(merged.lambda_l0 >= 0, "lambda_l0", "a number >= 0", merged.lambda_l0)
    require(merged.lambda_l2 >= 0, "lambda_l2", "a number >= 0", merged.lambda_l2)
    require(0 < merged.droprate_init < 1, "droprate_init", "a rate in (0, 1)", merged.droprate_init)
    require(0 <= merged.seed < 2**32, "seed", "an integer in [0, 2**32)", merged.seed)
    t = merged.temperature
    require(t.initial > 0, "temperature.initial", "a number > 0", t.initial)
    require(t.final > 0, "temperature.final", "a number > 0", t.final)
    require(t.anneal_epochs >= 1, "temperature.anneal_epochs", "an integer >= 1", t.anneal_epochs)
    one_of(merged.test_checkpoint, "test_checkpoint", ("last", "best"))
    b = merged.callbacks.batch_norm
    enough = b.num_images == 0 or b.num_images >= 2
    require(enough, "callbacks.batch_norm.num_images", "an integer >= 2, or 0 for never", b.num_images)
    require(b.batch_size >= 2, "callbacks.batch_norm.batch_size", "an integer >= 2", b.batch_size)
    warmup = merged.callbacks.penalty_warmup_epochs
    require(warmup >= 0, "callbacks.penalty_warmup_epochs", "a number >= 0", warmup)
    if merged.resume_training and merged.ckpt_path is None:
        raise InputError("resume_training=true needs a checkpoint: give ckpt_path=RUN/checkpoints/last.ckpt")
    _check_recipe(merged)
    if merged.callbacks.compact_every_n_epochs and not merged.without_using_gate:
        _check_compaction(merged)
    return merged


def _check_trainer_numbers(trainer: Any) -> None:
    """Raise an InputError for text where Lightning's Trainer expects a number."""
    for keys, kinds, expected in (
        (TRAINER_INTEGERS, int, "an integer"),
        (TRAINER_NUMBERS, int | float, "a number"),
    ):
        for key in keys:
            value = trainer.get(key)
            fits = value is None or (isinstance(value, kinds) and not isinstance(value, bool))
            require(fits, f"trainer.{key}", expected, value)


def _check_compaction(cfg: DictConfig) -> None:
    """Check what compaction during training needs.

    Raises:
        InputError: a value is outside its range, or something needs the network at its original size.
    """
    key, every = "callbacks.compact_every_n_epochs", cfg.callbacks.compact_every_n_epochs
    require(every >= 0, key, "an integer >= 0", every)
    below = cfg.callbacks.compact_below
    require(0 < below < 0.5, "callbacks.compact_below", "a probability in (0, 0.5)", below)
    devices = cfg.trainer.devices
    for excluded, given in (
        ("penalty=weights", cfg.penalty == "weights"),
        (f"ema_decay={cfg.ema_decay}", cfg.ema_decay is not None),
        ("trainer.compile=true", bool(cfg.trainer.compile)),
        (f"trainer.strategy={cfg.trainer.strategy}", str(cfg.trainer.strategy) != "auto"),
        (f"trainer.devices={devices}", devices not in (1, "1", "auto")),
    ):
        if given:
            raise InputError(f"{key}={every} and {excluded} do not go together: leave one of them out")


PENALTIES = ("gates", "weights")
"""What lambda_l0 is the price of: L_C0, or the share of the weights with an open gate."""
LAMBDA_L0 = 1.0
"""lambda_l0 of configs/train.yaml."""


def _check_recipe(cfg: DictConfig) -> None:
    """Check targets, fine-tuning, distillation and averaging.

    Raises:
        InputError: a value is outside its range, or two settings contradict each other.
    """
    one_of(cfg.penalty, "penalty", PENALTIES)
    if cfg.penalty == "weights" and cfg.model.get("source") == "torchvision":
        raise InputError(
            "penalty=weights does not know which weights the gates of a torchvision network stand for: give "
            "penalty=gates, or a target"
        )
    targets = [key for key in ("target_sparsity", "target_macs") if cfg[key] is not None]
    for key in targets:
        require(0 < cfg[key] < 1, key, "a share in (0, 1)", cfg[key])
    if len(targets) > 1:
        raise InputError("target_sparsity and target_macs exclude each other: give one of them")
    if targets:
        _check_target(cfg, targets[0])
    elif cfg.lambda_l0 is None:
        raise InputError("lambda_l0=null leaves open how many gates close: give target_sparsity, or a number")
    t = cfg.target
    require(0 < t.ramp <= 1, "target.ramp", "a share in (0, 1]", t.ramp)
    require(t.proportional_gain >= 0, "target.proportional_gain", "a number >= 0", t.proportional_gain)
    require(t.integral_gain >= 0, "target.integral_gain", "a number >= 0", t.integral_gain)
    require(t.every_n_steps >= 1, "target.every_n_steps", "an integer >= 1", t.every_n_steps)
    require(cfg.finetune.epochs >= 0, "finetune.epochs", "an integer >= 0", cfg.finetune.epochs)
    require(cfg.finetune.lr > 0, "finetune.lr", "a number > 0", cfg.finetune.lr)
    require(0 <= cfg.distill.weight <= 1, "distill.weight", "a number in [0, 1]", cfg.distill.weight)
    require(cfg.distill.temperature > 0, "distill.temperature", "a number > 0", cfg.distill.temperature)
    require(0 <= cfg.label_smoothing < 1, "label_smoothing", "a share in [0, 1)", cfg.label_smoothing)
    if cfg.ema_decay is not None:
        require(0 < cfg.ema_decay < 1, "ema_decay", "a number in (0, 1)", cfg.ema_decay)
    if cfg.finetune.epochs and cfg.without_using_gate:
        raise InputError(
            "finetune.epochs trains what gates have left, but without_using_gate=true: leave one of them out"
        )


def target_key(cfg: DictConfig) -> str | None:
    """Return which of target_sparsity and target_macs is given, if any."""
    return next((key for key in ("target_sparsity", "target_macs") if cfg.get(key) is not None), None)


def two_ways(cfg: DictConfig, key: str) -> InputError:
    """Return the error that says that a target and lambda_l0 are both given."""
    return InputError(
        f"{key}={cfg[key]} and lambda_l0={cfg.lambda_l0:g} exclude each other: with a target, lambda is "
        "found while training; give one of them, or lambda_l0=null"
    )


def _check_target(cfg: DictConfig, key: str) -> None:
    if cfg.without_using_gate:
        raise InputError(f"{key}={cfg[key]} needs gates, but without_using_gate=true: leave one of them out")
    if cfg.lambda_l0 not in (None, LAMBDA_L0):
        raise two_ways(cfg, key)
    if cfg.trainer.max_epochs is None or cfg.trainer.max_epochs < 1:
        raise InputError(f"{key}={cfg[key]} needs to know when training ends: give trainer.max_epochs")
    if cfg.test_checkpoint == "best":
        raise InputError(
            f"{key} is met at the end of the run, but test_checkpoint=best: give test_checkpoint=last"
        )


EXPORTS = ("onnx", "pt2")


def check_test(cfg: DictConfig) -> None:
    """Check the keys that only test.py has.

    Raises:
        InputError: a value is of the wrong type or unknown, or there is no checkpoint.
    """
    if cfg.ckpt_path is None:
        raise InputError("give the checkpoint to test: ckpt_path=RUN/checkpoints/last.ckpt")
    for key in ("compact", "benchmark"):
        if not isinstance(cfg[key], bool):
            raise InputError(f"{key}={cfg[key]}: expected true or false")
    if cfg.export is not None:
        one_of(str(cfg.export), "export", EXPORTS)


def require(holds: bool, key: str, expected: str, value: object) -> None:
    """Raise an InputError that names the key unless the condition holds (NaN never does)."""
    if not holds or (isinstance(value, float) and not math.isfinite(value)):
        raise InputError(f"{key}={value}: expected {expected}")


def one_of(value: str, key: str, known: "tuple[str, ...] | list[str]") -> None:
    """Raise an InputError that names the key and the nearest known choice unless the value is known."""
    if value not in known:
        raise InputError(f"{key}={value}: expected one of {', '.join(known)}{nearest(value, list(known))}")


def plain(cfg: Any) -> Any:
    """Return a configuration as plain dicts, lists and numbers, interpolations resolved."""
    if not OmegaConf.is_config(cfg):
        return cfg
    return OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
