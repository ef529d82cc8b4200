"""Schema of configs/calibrate.yaml: types and ranges, so that a wrong value fails at once and by name."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import ValidationError

from sparsereg.calibration.reporting.tables import WEIGHT_FORMATS
from sparsereg.calibration.solver.calibration import LAMBDA_SCALES
from sparsereg.calibration.solver.losses import LOSSES
from sparsereg.calibration.solver.selection import METHODS, method_of
from sparsereg.config import TemperatureConfig, one_of, require
from sparsereg.errors import InputError, type_error

UNTOUCHABLE = ("error", "drop", "keep")
DEVICES = ("auto", "cpu", "cuda")
NEEDED = {"matrix": ("matrix", "targets"), "households": ("households", "targets"), "synthetic": ()}


@dataclass
class HoldoutConfig:
    """Which targets are left out to see how the weights do on targets that they were not made for."""

    groups: Any = MISSING
    folds: int | None = None


@dataclass
class CalibrateConfig:
    """configs/calibrate.yaml. The group problem is checked when it is read."""

    num_households: int | None = None
    lambda_l0: float = MISSING
    lambda_l2: float = MISSING
    lambda_scale: str = MISSING
    loss: str = MISSING
    cap: float = MISSING
    method: str = MISSING
    max_weight_ratio: float | None = None
    hold_total: bool = MISSING
    refit: bool = MISSING
    chi2: float = MISSING
    consistency: float = MISSING
    normalize_groups: bool = MISSING
    group_multipliers: Any = None
    gate_share: float = MISSING
    epochs: int = MISSING
    lr: float = MISSING
    temperature: TemperatureConfig = field(default_factory=TemperatureConfig)
    droprate_init: float = MISSING
    seed: int = MISSING
    device: str = MISSING
    untouchable: str = MISSING
    ckpt_path: str | None = None
    checkpoint_seconds: float = MISSING
    weights_format: str = MISSING
    plots: bool = MISSING
    tensorboard: bool = MISSING
    log_moments: int = MISSING
    rerun: bool = MISSING
    holdout: HoldoutConfig = field(default_factory=HoldoutConfig)
    problem: Any = MISSING


def checked(cfg: DictConfig) -> DictConfig:
    """Return the configuration with types and ranges checked.

    Raises:
        InputError: A value is of the wrong type or outside its range, or two of them contradict each other.
        OmegaConfBaseException: A key is unknown.
    """
    try:
        c = OmegaConf.merge(OmegaConf.structured(CalibrateConfig), cfg)
    except ValidationError as error:
        key, said = str(error.full_key), str(error).partition("\n")[0]
        raise InputError(type_error(str(error)) or f"{key}={OmegaConf.select(cfg, key)}: {said}") from error
    assert isinstance(c, DictConfig)
    if c.num_households is not None:
        require(c.num_households >= 1, "num_households", "an integer >= 1, or null", c.num_households)
    for key in ("lambda_l0", "lambda_l2", "chi2", "consistency", "checkpoint_seconds"):
        require(c[key] >= 0, key, "a number >= 0", c[key])
    if c.max_weight_ratio is not None:
        require(c.max_weight_ratio > 0, "max_weight_ratio", "a number > 0, or null", c.max_weight_ratio)
    require(c.epochs >= 1, "epochs", "an integer >= 1", c.epochs)
    require(c.lr > 0, "lr", "a number > 0", c.lr)
    require(c.cap > 0, "cap", "a relative error > 0", c.cap)
    require(0 <= c.gate_share <= 1, "gate_share", "a share in [0, 1]", c.gate_share)
    require(0 < c.droprate_init < 1, "droprate_init", "a rate in (0, 1)", c.droprate_init)
    require(0 <= c.seed < 2**32, "seed", "an integer in [0, 2**32)", c.seed)
    require(c.log_moments >= 2, "log_moments", "an integer >= 2", c.log_moments)
    _check_temperature(c.temperature)
    one_of(c.loss, "loss", LOSSES)
    one_of(c.lambda_scale, "lambda_scale", LAMBDA_SCALES)
    one_of(c.method, "method", ("auto", *METHODS))
    one_of(c.untouchable, "untouchable", UNTOUCHABLE)
    one_of(c.weights_format, "weights_format", WEIGHT_FORMATS)
    one_of(c.device.partition(":")[0], "device", DEVICES)
    _check_method(c)
    _check_problem(c.problem)
    return c


def _check_temperature(t: DictConfig) -> None:
    require(t.initial > 0, "temperature", "a number > 0", t.initial)
    require(t.final > 0, "temperature.final", "a number > 0", t.final)
    require(t.anneal_epochs >= 1, "temperature.anneal_epochs", "an integer >= 1", t.anneal_epochs)


def _check_method(c: DictConfig) -> None:
    """Set the method that auto means, and refuse a method without what decides how many are kept."""
    try:
        c.method = method_of(c.method, c.num_households)
    except ValueError as error:
        raise InputError(str(error)) from None
    if c.num_households is None and c.method == "hard_concrete" and c.lambda_l0 == 0:
        raise InputError(
            "nothing decides how many households to keep: give num_households=K or lambda_l0 > 0"
        )


def _check_problem(problem: DictConfig) -> None:
    one_of(problem.kind, "problem.kind", tuple(NEEDED))
    for key in NEEDED[problem.kind]:
        if problem[key] is None:
            raise InputError(f"problem={problem.kind} needs problem.{key}=FILE")
