"""The keys of ``data=...``: one dataclass per source, so that a misspelt key or a wrong type fails.

Nothing here imports PyTorch: the command line is checked before anything slow is loaded.
"""

from dataclasses import dataclass, field


@dataclass
class AugmentConfig:
    """Random changes of training images; see :class:`sparsereg.data.augment.Augmentation`."""

    flip: bool = False
    crop_scale: list[float] | None = None
    crop_ratio: list[float] = field(default_factory=lambda: [0.9, 1.1])
    degrees: float = 0.0
    translate: float = 0.0
    whole_pixels: bool = False
    zoom: float = 0.0
    elastic: float = 0.0
    elastic_smoothness: float = 4.0


@dataclass
class DataConfig:
    """What every source has; see :class:`sparsereg.data.module.ImageDataModule`."""

    name: str
    batch_size: int = 128
    eval_batch_size: int = 250
    val_size: int | float = 0.1
    split_seed: int = 42
    seed: int = 0
    limit_train_images: int | None = None
    channels_last: bool = True
    device_resident: bool | str = "auto"
    augment: AugmentConfig | None = None


def _colour_photographs() -> AugmentConfig:
    return AugmentConfig(flip=True, crop_scale=[0.8, 1.0])


@dataclass
class Cifar10Config(DataConfig):
    """``data=cifar10``."""

    name: str = "cifar10"
    root: str = "data"
    val_size: int | float = 5000
    augment: AugmentConfig | None = field(default_factory=_colour_photographs)


@dataclass
class MnistConfig(DataConfig):
    """``data=mnist``."""

    name: str = "mnist"
    root: str = "data"
    val_size: int | float = 5000
    augment: AugmentConfig | None = field(default_factory=AugmentConfig)


@dataclass
class DigitsConfig(DataConfig):
    """``data=digits``."""

    name: str = "digits"
    image_size: int = 32
    augment: AugmentConfig | None = field(default_factory=AugmentConfig)


@dataclass
class NpzConfig(DataConfig):
    """``data=npz``."""

    name: str = "npz"
    path: str | None = None
    augment: AugmentConfig | None = field(default_factory=AugmentConfig)


@dataclass
class ImageFolderConfig(DataConfig):
    """``data=image_folder``."""

    name: str = "image_folder"
    root: str | None = None
    image_size: int = 32
    channels: int = 3
    max_memory_gb: float = 4.0
    num_workers: int = 2
    augment: AugmentConfig | None = field(default_factory=_colour_photographs)


CONFIGS: dict[str, type[DataConfig]] = {
    "cifar10": Cifar10Config,
    "mnist": MnistConfig,
    "digits": DigitsConfig,
    "npz": NpzConfig,
    "image_folder": ImageFolderConfig,
}
"""Schema of each ``data=NAME``."""
