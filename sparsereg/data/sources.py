"""From the keys of ``data`` to a data module."""

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

from sparsereg.data.augment import Augmentation
from sparsereg.data.cifar10 import Cifar10
from sparsereg.data.config import Data, ImageData, OwnData
from sparsereg.data.corpus import TextSource
from sparsereg.data.digits import Digits
from sparsereg.data.image_folder import ImageFolder
from sparsereg.data.labelled_text import LabelledTextModule, TextClasses
from sparsereg.data.mnist import Mnist
from sparsereg.data.module import ImageDataModule, Source
from sparsereg.data.npz import Npz
from sparsereg.data.own import RunData
from sparsereg.data.own import build as build_own
from sparsereg.data.text import TextDataModule
from sparsereg.errors import InputError
from sparsereg.settings import keys, read

SOURCES: dict[str, Callable[..., Source]] = {
    "cifar10": Cifar10,
    "mnist": Mnist,
    "digits": Digits,
    "npz": Npz,
    "image_folder": ImageFolder,
}
"""The class that reads each ``data=NAME``; its arguments are the keys that only this source has."""

TEXTS: dict[str, tuple[Callable[..., Any], Callable[..., RunData], tuple[str, ...]]] = {
    "text": (TextSource, TextDataModule, ("path", "pattern", "max_memory_gb")),
    "labelled_text": (TextClasses, LabelledTextModule, ("path", "text", "label", "max_memory_gb")),
}
"""The class that reads each source of texts, its data module, and the keys that the first one gets."""

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
    if isinstance(settings, OwnData):
        if settings is not given:
            raise InputError(f"data._target_={settings._target_} comes from a file, which is data")
        return build_own(settings, seed, channels_last)
    values = {name: getattr(settings, name) for name in keys(type(settings))}
    if settings.name in TEXTS:
        source, module, own = TEXTS[values.pop("name")]
        return module(source(**{key: values.pop(key) for key in own}), seed=seed, **values)
    augment, name = values.pop("augment"), values.pop("name")
    common = {key: values.pop(key) for key in _COMMON}
    return ImageDataModule(
        SOURCES[name](**values),
        augmentation=None if augment is None else Augmentation(**vars(augment)),
        device=device,
        seed=seed,
        channels_last=channels_last,
        **common,
    )
