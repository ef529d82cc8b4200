"""From the keys of ``data`` to a data module."""

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sparsereg.data.augment import Augmentation
from sparsereg.data.cifar10 import Cifar10
from sparsereg.data.config import CONFIGS, AugmentConfig
from sparsereg.data.digits import Digits
from sparsereg.data.image_folder import ImageFolder
from sparsereg.data.mnist import Mnist
from sparsereg.data.module import ImageDataModule, Source
from sparsereg.data.npz import Npz
from sparsereg.errors import InputError, type_error

SOURCES: dict[str, Callable[..., Source]] = {
    "cifar10": Cifar10,
    "mnist": Mnist,
    "digits": Digits,
    "npz": Npz,
    "image_folder": ImageFolder,
}
"""The class that reads each ``data=NAME``; its arguments are the keys that only this source has."""

_COMMON = ("batch_size", "eval_batch_size", "val_size", "split_seed", "seed", "limit_train_images",
           "channels_last", "device_resident")  # fmt: skip


def build(cfg: Mapping[str, Any] | DictConfig, device: str = "cpu") -> ImageDataModule:
    """Build the data module that the keys of ``data`` describe.

    Args:
        cfg: ``name`` and any keys of ``sparsereg.data.config.CONFIGS[name]``; others keep their defaults.
        device: where batches are made without a Trainer.

    Raises:
        InputError: an unknown source or key, or a value that cannot be.
    """
    settings = _checked(cfg)
    augment = settings.pop("augment")
    name = settings.pop("name")
    common = {key: settings.pop(key) for key in _COMMON}
    return ImageDataModule(
        SOURCES[name](**settings),
        augmentation=None if augment is None else _augmentation(augment),
        device=device,
        **common,
    )


def _checked(cfg: Mapping[str, Any] | DictConfig) -> dict[str, Any]:
    """All keys of a source with their types checked and defaults filled in."""
    given = OmegaConf.to_container(cfg, resolve=True) if isinstance(cfg, DictConfig) else dict(cfg)
    if not isinstance(given, dict) or "name" not in given:
        raise InputError(f"data.name is missing; known: {', '.join(SOURCES)}")
    _check_known("data", "a source", [given["name"]], SOURCES)
    schema = CONFIGS[given["name"]]
    _check_known("data", "a key", given, [f.name for f in fields(schema)])
    augment = given.get("augment")
    if augment is not None:
        if not isinstance(augment, Mapping):
            raise InputError(f"data.augment must hold keys (or be null for no augmentation), got {augment!r}")
        _check_known("data.augment", "a key", augment, [f.name for f in fields(AugmentConfig)])
    try:
        merged = OmegaConf.to_container(OmegaConf.merge(OmegaConf.structured(schema), given))
    except OmegaConfBaseException as error:
        key = f"data.{error.full_key}" if error.full_key else "data"
        said = type_error(str(error), key) or f"{key}: {str(error).splitlines()[0]}"
        raise InputError(said) from error
    assert isinstance(merged, dict)
    return {str(key): value for key, value in merged.items()}


def _check_known(where: str, what: str, names: Iterable[Any], known: Iterable[str]) -> None:
    choices = list(known)
    for name in names:
        if name not in choices:
            near = difflib.get_close_matches(str(name), choices, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise InputError(f"{where}: {name!r} is not {what}{hint} (known: {', '.join(choices)})")


def _augmentation(settings: Mapping[str, Any]) -> Augmentation:
    values = dict(settings)
    for key in ("crop_scale", "crop_ratio"):
        if values[key] is not None:
            values[key] = tuple(values[key])
    return Augmentation(**values)
