"""The data module: a source, its split, normalisation, augmentation and loaders, for a Trainer."""

import logging
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import pytorch_lightning as pl
import torch
from torch import Tensor

from sparsereg.data.arrays import ImageArrays
from sparsereg.data.augment import Augmentation
from sparsereg.data.form import Form
from sparsereg.data.image_folder import FileStore, ImageFiles
from sparsereg.data.loader import DeviceLoader, ImageStore, Normalise, Share, TensorStore
from sparsereg.data.split import Split
from sparsereg.errors import InputError

log = logging.getLogger(__name__)

_CHUNK = 4096
"""Images per piece of a pass over the whole training part."""
_FREE_SHARE = 0.5
"""Share of a GPU's free memory that the images may take under ``device_resident="auto"``."""


class Source(Protocol):
    """Something that reads a data set, e.g. ``sparsereg.data.digits.Digits``."""

    @property
    def name(self) -> str:
        """The name on the command line."""
        ...

    def load(self) -> ImageArrays | ImageFiles:
        """Fetch the data set if need be, and read it."""
        ...


class ImageDataModule(pl.LightningDataModule):
    """Training, validation and test images, normalised and augmented on the device that trains.

    The source is read once, by ``prepare_data`` or ``setup``; both may be called before a Trainer
    is there, and again by it. Mean and standard deviation are those of the training part.

    Args:
        source: reads the data set.
        batch_size: training images per batch and process, >= 1.
        eval_batch_size: validation and test images per batch and process, >= 1.
        val_size: training images of the source that validate: a count >= 0, or a fraction in (0, 1).
        split_seed: seed of the draw of those images, >= 0.
        augmentation: random changes of the training images; None for none.
        seed: seed of the order and the augmentation of the training images, >= 0.
        channels_last: memory format of the images.
        device_resident: whether the uint8 images are held on the training device (otherwise in the
            host's memory); "auto": if they take at most half of what is free there.
        device: where batches are made without a Trainer; with one, its root device.
        limit_train_images: train on the first so many images of the training part only; None: all.

    Raises:
        InputError: an argument is outside its range.
    """

    def __init__(
        self,
        source: Source,
        *,
        batch_size: int = 128,
        eval_batch_size: int = 250,
        val_size: int | float = 5000,
        split_seed: int = 42,
        augmentation: Augmentation | None = None,
        seed: int = 0,
        channels_last: bool = True,
        device_resident: bool | str = "auto",
        device: torch.device | str = "cpu",
        limit_train_images: int | None = None,
    ) -> None:
        super().__init__()
        _check_integer("batch_size", batch_size, 1)
        _check_integer("eval_batch_size", eval_batch_size, 1)
        _check_integer("split_seed", split_seed, 0)
        _check_integer("seed", seed, 0)
        if limit_train_images is not None:
            _check_integer("limit_train_images", limit_train_images, 1)
        if device_resident not in (True, False, "auto"):
            raise InputError(f"device_resident must be true, false or auto, got {device_resident!r}")
        self.source = source
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.val_size = val_size
        self.split_seed = split_seed
        self.augmentation = augmentation
        self.seed = seed
        self.channels_last = channels_last
        self.device_resident = device_resident
        self.limit_train_images = limit_train_images
        self._device = torch.device(device)
        self._data: ImageArrays | ImageFiles | None = None
        self._ready = False
        self._stores: dict[tuple[str, torch.device], ImageStore] = {}

    def prepare_data(self) -> None:
        """Fetch and read the data set; a Trainer calls this in one process per machine only."""
        self._load()

    def setup(self, stage: str | None = None) -> None:
        """Read the data set if that was not done, split it, and take its mean and standard deviation.

        Sets ``num_classes``, ``class_names``, ``image_shape`` (channels, height, width), ``mean`` and
        ``std`` (per channel, of images scaled to [0, 1]), ``split``, ``num_train``, ``num_val`` and
        ``num_test``. A second call does nothing.
        """
        if self._ready:
            return
        data = self._load()
        self.class_names = data.class_names
        self.num_classes = len(data.class_names)
        self.image_shape = data.image_shape
        self.split = Split.draw(len(data.train_labels), self.val_size, self.split_seed)
        self.train_positions = self.split.train[: self.limit_train_images]
        if self.limit_train_images is not None and self.limit_train_images > len(self.split.train):
            raise InputError(
                f"limit_train_images={self.limit_train_images} is more than the {len(self.split.train)} "
                f"training images that {data.name} has beside {len(self.split.val)} validation images"
            )
        self.num_train = len(self.train_positions)
        self.num_val = len(self.split.val)
        self.num_test = len(data.test_labels)
        self.mean, self.std = channel_statistics(self._host_store("train"), self.train_positions)
        self._ready = True
        log.info("%s: %d training, %d validation, %d test images of %d classes, shape %s; mean %s, std %s",
                 data.name, self.num_train, self.num_val, self.num_test, self.num_classes, self.image_shape,
                 _rounded(self.mean), _rounded(self.std))  # fmt: skip

    @property
    def form(self) -> Form:
        """What a network for these images is built for."""
        data = self._load()
        masked = isinstance(data, ImageArrays) and data.masked
        return Form(self.num_classes, self.image_shape, "segmentation" if masked else "classification")

    @property
    def device(self) -> torch.device:
        """Where batches are made: the Trainer's root device, or the argument ``device``."""
        return self._device if self.trainer is None else self.trainer.strategy.root_device

    def train_dataloader(self) -> DeviceLoader:
        """Shuffled and augmented training images; the Trainer sets the epoch.

        Under a Trainer's ``overfit_batches`` the order is fixed, so that each epoch has the same images.
        """
        return self._loader(
            "train",
            self.train_positions,
            self.batch_size,
            augmentation=self.augmentation,
            shuffle=self.trainer is None or not self.trainer.overfit_batches,  # type: ignore[attr-defined]
            seed=self.seed,
        )

    def val_dataloader(self) -> DeviceLoader | list[DeviceLoader]:
        """Validation images in a fixed order, without augmentation; no loader if there are none."""
        if self.num_val == 0:
            return []
        return self._loader("train", self.split.val, self.eval_batch_size)

    def test_dataloader(self) -> DeviceLoader:
        """Test images in a fixed order, without augmentation."""
        return self._loader("test", torch.arange(self.num_test), self.eval_batch_size)

    def estimation_batches(self, num_images: int, batch_size: int | None = None) -> Iterator[Tensor]:
        """Yield training images, normalised and without augmentation, to estimate BatchNorm's statistics.

        Always the same images in the same order, and the same ones in every process: processes that
        estimate from them agree without speaking to each other.

        Args:
            num_images: how many; at most all training images are given.
            batch_size: images per batch; None: that of evaluation.
        """
        _check_integer("num_images", num_images, 1)
        size = self.eval_batch_size if batch_size is None else batch_size
        _check_integer("batch_size", size, 1)
        loader = self._loader("train", self.train_positions[:num_images], size, share=Share())
        return (images for images, _ in loader)

    def save_split(self, path: str | os.PathLike[str]) -> Path:
        """Write which images train and which validate, as ``Split.save`` does."""
        return self.split.save(path)

    def describe(self) -> dict[str, Any]:
        """What the data are, in plain numbers, strings and lists."""
        return {
            "source": self.source.name,
            "name": self._load().name,
            "num_train": self.num_train,
            "num_val": self.num_val,
            "num_test": self.num_test,
            "num_classes": self.num_classes,
            "image_shape": list(self.image_shape),
            "mean": list(self.mean),
            "std": list(self.std),
            "split_seed": self.split_seed,
            "split_sha256": self.split.digest,
            "batch_size": self.batch_size,
            "seed": self.seed,
        }

    def _load(self) -> ImageArrays | ImageFiles:
        if self._data is None:
            self._data = self.source.load()
        return self._data

    def _loader(
        self, part: str, positions: Tensor, batch_size: int, share: Share | None = None, **options: Any
    ) -> DeviceLoader:
        data = self._load()
        labels = data.train_labels if part == "train" else data.test_labels
        if share is None and self.trainer is not None:
            share = Share(self.trainer.global_rank, self.trainer.world_size)
        return DeviceLoader(
            self._store(part, self.device),
            labels,
            positions,
            Normalise(self.mean, self.std, self.channels_last),
            batch_size=batch_size,
            share=share,
            device=self.device,
            **options,
        )

    def _host_store(self, part: str) -> ImageStore:
        data = self._load()
        if isinstance(data, ImageFiles):
            paths = data.train_paths if part == "train" else data.test_paths
            return FileStore(paths, data.image_shape, data.num_workers)
        return TensorStore(data.train_images if part == "train" else data.test_images)

    def _store(self, part: str, device: torch.device) -> ImageStore:
        """The images of a part for batches on a device; moved there once."""
        if (part, device) not in self._stores:
            store = self._host_store(part)
            if isinstance(store, TensorStore) and self._resident(store.images, device):
                store = TensorStore(store.images.to(device))
            self._stores[part, device] = store
        return self._stores[part, device]

    def _resident(self, images: Tensor, device: torch.device) -> bool:
        if self.device_resident == "auto" and device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(device)
            return images.numel() <= _FREE_SHARE * free
        return self.device_resident is not False


def channel_statistics(store: ImageStore, positions: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel over images scaled to [0, 1], from exact integer sums.

    A channel that is constant gets the standard deviation 1, so that normalising it gives zeros.

    Args:
        store: the images.
        positions: which of them count.
    """
    num_channels = store.image_shape[0]
    levels = torch.zeros(num_channels, 256, dtype=torch.int64)
    for images in store.batches(positions.split(_CHUNK), torch.device("cpu")):
        for channel in range(num_channels):
            levels[channel] += torch.bincount(images[:, channel].reshape(-1), minlength=256)
    mean, std = [], []
    for counts in levels.tolist():
        num = sum(counts)
        total = sum(count * level for level, count in enumerate(counts))
        squares = sum(count * level**2 for level, count in enumerate(counts))
        mean.append(total / (255 * num))
        # num^2 times the variance, a whole number without rounding.
        spread = num * squares - total**2
        std.append(math.sqrt(spread) / (255 * num) if spread else 1.0)
    return tuple(mean), tuple(std)


def _rounded(values: tuple[float, ...]) -> str:
    return " ".join(f"{value:.4f}" for value in values)


def _check_integer(name: str, value: Any, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise InputError(f"{name} must be an integer >= {low}, got {value!r}")
