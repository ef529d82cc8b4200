"""Images for training: one file per source, the split, the augmentation, the loader.

The names are imported on first use, so that the configuration schemas can be read without PyTorch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparsereg.data.arrays import ImageArrays
    from sparsereg.data.augment import Augmentation
    from sparsereg.data.config import CONFIGS
    from sparsereg.data.image_folder import ImageFiles
    from sparsereg.data.loader import DeviceLoader
    from sparsereg.data.module import ImageDataModule
    from sparsereg.data.sources import build
    from sparsereg.data.split import Split

__all__ = [
    "CONFIGS",
    "Augmentation",
    "DeviceLoader",
    "ImageArrays",
    "ImageDataModule",
    "ImageFiles",
    "Split",
    "build",
]

_HOMES = {
    "CONFIGS": "config",
    "Augmentation": "augment",
    "DeviceLoader": "loader",
    "ImageArrays": "arrays",
    "ImageDataModule": "module",
    "ImageFiles": "image_folder",
    "Split": "split",
    "build": "sources",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
