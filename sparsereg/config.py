"""Schema of the configurations: types and ranges, so that a misspelt key or a wrong value fails at once."""

import math
from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf

from sparsereg.cli import nearest
from sparsereg.errors import InputError


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


@dataclass
class LoggerConfig:
    """Which logger."""

    name: str = MISSING


@dataclass
class TrainConfig:
    """configs/train.yaml. The groups model, data and trainer are checked by whoever builds them."""

    lambda_l0: float = MISSING
    lambda_l2: float = MISSING
    droprate_init: float = MISSING
    target_sparsity: float | None = None
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


def checked(cfg: DictConfig) -> DictConfig:
    """Return the training configuration with types checked and ranges checked.

    Raises:
        InputError: a value is of the wrong type or outside its range.
        OmegaConfBaseException: a key is unknown or a value has the wrong type.
    """
    merged = OmegaConf.merge(OmegaConf.structured(TrainConfig), cfg)
    assert isinstance(merged, DictConfig)
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
    require(b.num_images >= 2, "callbacks.batch_norm.num_images", "an integer >= 2", b.num_images)
    require(b.batch_size >= 2, "callbacks.batch_norm.batch_size", "an integer >= 2", b.batch_size)
    warmup = merged.callbacks.penalty_warmup_epochs
    require(warmup >= 0, "callbacks.penalty_warmup_epochs", "a number >= 0", warmup)
    if merged.resume_training and merged.ckpt_path is None:
        raise InputError("resume_training=true needs a checkpoint: give ckpt_path=RUN/checkpoints/last.ckpt")
    if merged.target_sparsity is not None:
        raise InputError(
            "target_sparsity is not supported by this version: choose lambda_l0 instead, larger is sparser"
        )
    return merged


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
