"""From the keys of ``data`` to a data module."""

import importlib
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from sparsereg.data import kinds
from sparsereg.data.augment import Augmentation
from sparsereg.data.kind import Data, ImageData
from sparsereg.data.module import ImageDataModule
from sparsereg.data.own import RunData
from sparsereg.errors import InputError
from sparsereg.settings import keys, read

_COMMON = {f.name for f in fields(ImageData)} - {"name", "augment"}


def build(
    given: Data | Mapping[str, Any], device: str = "cpu", *, seed: int = 0, channels_last: bool = True
) -> RunData:
    """Build the data module that the keys of ``data`` describe.

    Args:
        given: the settings, or ``name`` and any keys of ``sparsereg.data.config.CONFIGS[name]``.
        device: where batches are made without a Trainer.
        seed: of the order and the augmentation of the training images.
        channels_last: memory format of the images.

    Raises:
        InputError: an unknown source or key, or a value that cannot be.
    """
    settings = given if isinstance(given, Data) else read(Data, given, "data")
    file: Any = importlib.import_module(f"{kinds.__name__}.{settings.name}")
    if settings.name == "own":
        if settings is not given:
            raise InputError("data._target_ comes from a file, which is data")
        own: RunData = file.module(seed, channels_last, settings=settings)
        return own
    values = {name: getattr(settings, name) for name in keys(type(settings)) if name != "name"}
    if not isinstance(settings, ImageData):
        other: RunData = file.module(seed, channels_last, **values)
        return other
    augment = values.pop("augment")
    common = {key: values.pop(key) for key in _COMMON}
    return ImageDataModule(
        file.source(**values),
        augmentation=None if augment is None else Augmentation(**vars(augment)),
        device=device,
        seed=seed,
        channels_last=channels_last,
        **common,
    )
