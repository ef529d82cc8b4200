"""A LightningDataModule of the user's, as what a training run asks of its data."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from sparsereg import targets
from sparsereg.data.config import OwnData
from sparsereg.data.module import ImageDataModule
from sparsereg.errors import InputError

SEED = 0
"""Of the order of shuffled images that BatchNorm statistics are taken from."""


class OwnDataModule(pl.LightningDataModule):
    """Passes on what a data module of the user's does, and finds out its classes, shape and sizes.

    Batches are pairs of images (batch, ...) and integer labels (batch,). ``num_classes`` and ``image_shape``
    are attributes of the module, or of its training set (``classes``), or else found by looking at the
    labels and at the first batch.

    Args:
        inner: the user's.
        said: setting that names it, for messages.

    Raises:
        InputError: it is no such module.
    """

    def __init__(self, inner: pl.LightningDataModule, said: str) -> None:
        if not isinstance(inner, pl.LightningDataModule):
            raise InputError(f"{said}: expected a LightningDataModule, it makes a {type(inner).__name__}")
        self.inner = inner
        super().__init__()
        self.said = said
        self._ready = False

    @property
    def trainer(self) -> pl.Trainer | None:
        """The Trainer, which the user's module knows, too."""
        return self.inner.trainer

    @trainer.setter
    def trainer(self, trainer: pl.Trainer | None) -> None:
        self.inner.trainer = trainer

    def prepare_data(self) -> None:
        """As the user's."""
        self.inner.prepare_data()

    def setup(self, stage: str | None = None) -> None:
        """Set up training and test, once, and look at the data."""
        if self._ready:
            return
        for one in ("fit", "test"):
            self.inner.setup(one)
        loaders = {part: self._loader(part) for part in ("train", "val", "test")}
        if loaders["train"] is None or loaders["test"] is None:
            missing = "train" if loaders["train"] is None else "test"
            raise InputError(f"{self.said}: has no {missing}_dataloader, which train.py and test.py need")
        self.num_train, self.num_val, self.num_test = (_size(loaders[p]) for p in ("train", "val", "test"))
        images, _ = self._pair(next(iter(self.train_dataloader()), None))
        shape = getattr(self.inner, "image_shape", None)
        self.image_shape = tuple(int(n) for n in (images.shape[1:] if shape is None else shape))
        if not 1 <= len(self.image_shape) <= 3:
            raise InputError(f"{self.said}: expected images of at most 3 dimensions, got {self.image_shape}")
        self.num_classes = self._count_classes()
        self._ready = True

    def _count_classes(self) -> int:
        dataset = getattr(self._loader("train"), "dataset", None)
        for known in (self.inner, dataset):
            if isinstance(number := getattr(known, "num_classes", None), int):
                return number
            if isinstance(classes := getattr(known, "classes", None), list | tuple):
                return len(classes)
        largest = -1
        for part in ("train", "val", "test"):
            for batch in self._loader(part) or ():
                largest = max(largest, int(self._pair(batch)[1].max()))
        return largest + 1

    def _pair(self, batch: Any) -> tuple[Tensor, Tensor]:
        if not (isinstance(batch, list | tuple) and len(batch) == 2):
            found = "no batch" if batch is None else f"a {type(batch).__name__}"
            raise InputError(f"{self.said}: expected batches (images, labels), got {found}")
        images, labels = batch
        if not isinstance(images, Tensor) or not images.is_floating_point():
            kind = images.dtype if isinstance(images, Tensor) else type(images).__name__
            raise InputError(f"{self.said}: expected images of floating-point numbers, got {kind}")
        if not isinstance(labels, Tensor) or labels.dim() != 1 or labels.dtype != torch.int64:
            kind = f"{labels.dtype} of shape {tuple(labels.shape)}" if isinstance(labels, Tensor) else labels
            raise InputError(f"{self.said}: expected int64 labels of shape (batch,), got {kind}")
        return images, labels

    def _loader(self, part: str) -> Any:
        """Return a loader; None where the user's module has none."""
        try:
            return getattr(self.inner, f"{part}_dataloader")() or None
        except MisconfigurationException:  # of Lightning's own method
            return None

    def train_dataloader(self) -> Any:
        """As the user's."""
        return self.inner.train_dataloader()

    def val_dataloader(self) -> Any:
        """As the user's; no loader if there is none."""
        return self._loader("val") or []

    def test_dataloader(self) -> Any:
        """As the user's."""
        return self.inner.test_dataloader()

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """As the user's."""
        return self.inner.on_before_batch_transfer(batch, dataloader_idx)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """As the user's."""
        return self.inner.transfer_batch_to_device(batch, device, dataloader_idx)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """As the user's."""
        return self.inner.on_after_batch_transfer(batch, dataloader_idx)

    def state_dict(self) -> dict[str, Any]:
        """As the user's."""
        return self.inner.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As the user's."""
        self.inner.load_state_dict(state_dict)

    def teardown(self, stage: str) -> None:
        """As the user's."""
        self.inner.teardown(stage)

    def estimation_batches(self, num_images: int, batch_size: int | None = None) -> Iterator[Tensor]:
        """Yield training images for BatchNorm's statistics, the same ones each time.

        Args:
            num_images: how many, rounded up to whole batches.
            batch_size: not used: the user's loader has its own.
        """
        if callable(own := getattr(self.inner, "estimation_batches", None)):
            yield from own(num_images, batch_size)
            return
        device = torch.device("cpu") if self.trainer is None else self.trainer.strategy.root_device
        yield from first_images(self.inner.train_dataloader(), num_images, device)

    def save_split(self, path: Path) -> None:
        """Which images train is the user's affair."""

    def describe(self) -> dict[str, Any]:
        """What the data are, in plain numbers, strings and lists."""
        return {
            "source": type(self.inner).__name__,
            "name": type(self.inner).__name__,
            "num_train": self.num_train,
            "num_val": self.num_val,
            "num_test": self.num_test,
            "num_classes": self.num_classes,
            "image_shape": list(self.image_shape),
        }


RunData = ImageDataModule | OwnDataModule
"""The data of a run."""


def first_images(loader: Iterable[Any], num_images: int, device: torch.device) -> Iterator[Tensor]:
    """Yield the first training images of a loader, the same each time; training's own noise stays as it is.

    Args:
        loader: of batches (images, labels), or of images.
        num_images: how many, rounded up to whole batches.
        device: where they go.

    Raises:
        TypeError: batches are something else.
    """
    left = num_images
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        for batch in loader:
            images = batch[0] if isinstance(batch, list | tuple) else batch
            if not isinstance(images, Tensor):
                raise TypeError(
                    "BatchNorm statistics are taken from batches (images, labels) or images, got "
                    f"{type(batch).__name__}: give the data module a method estimation_batches(num_images, "
                    "batch_size) that yields images"
                )
            if left < num_images and len(images) < 2:
                return
            yield images.to(device)
            left -= len(images)
            if left <= 0:
                return


def build(settings: OwnData, seed: int, channels_last: bool) -> RunData:
    """Make the data module that the user named; one of ours is taken as it is.

    Args:
        settings: made from what the user gave.
        seed: offered as an argument.
        channels_last: the same.
    """
    made = targets.call(settings.spec, "data", seed=seed, channels_last=channels_last)
    said = f"data._target_={settings._target_}"
    return made if isinstance(made, ImageDataModule) else OwnDataModule(made, said)


def _size(loader: Any) -> int:
    """Return the number of examples of a loader, or of its batches where it does not know."""
    if loader is None:
        return 0
    try:
        return len(loader.dataset)
    except (AttributeError, TypeError):
        try:
            return len(loader)
        except TypeError:
            return sum(1 for _ in loader)
