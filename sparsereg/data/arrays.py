"""A whole data set of images in memory."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsereg.errors import InputError

IGNORED = 255
"""Label of a pixel that has no class."""


@dataclass(frozen=True, eq=False)
class ImageArrays:
    """A classification data set that is held in memory, checked when it is made.

    Labels are a class for each image, or for each pixel.

    Args:
        name: what messages call the data set.
        train_images: uint8, (images, channels, height, width), contiguous.
        train_labels: int64, (images,), the class of each image, in [0, number of classes); or masks, uint8,
            (images, height, width), the class of each pixel, ``IGNORED`` where it has none.
        test_images: as ``train_images``, with the same channels, height and width.
        test_labels: as ``train_labels``.
        class_names: one name per class.

    Raises:
        InputError: an array has another type, shape or length, is empty, or a label is out of range.
    """

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    class_names: tuple[str, ...]

    def __post_init__(self) -> None:
        for part in ("train", "test"):
            images, labels = getattr(self, f"{part}_images"), getattr(self, f"{part}_labels")
            _check_images(f"{self.name}: {part}_images", images)
            if self.masked:
                _check_masks(f"{self.name}: {part}_masks", labels, images, len(self.class_names))
            else:
                _check_labels(f"{self.name}: {part}_labels", labels, len(images), len(self.class_names))
        if self.train_images.shape[1:] != self.test_images.shape[1:]:
            raise InputError(
                f"{self.name}: train_images and test_images must agree in channels, height and width, got "
                f"{tuple(self.train_images.shape[1:])} and {tuple(self.test_images.shape[1:])}"
            )

    @property
    def masked(self) -> bool:
        """Whether the labels are a class for each pixel."""
        return self.train_labels.dim() > 1

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        channels, height, width = self.train_images.shape[1:]
        return channels, height, width


def _check_masks(what: str, masks: Tensor, images: Tensor, num_classes: int) -> None:
    if masks.dtype != torch.uint8:
        raise InputError(f"{what} must be uint8, got {masks.dtype}")
    expected = (len(images), *images.shape[2:])
    if tuple(masks.shape) != expected:
        raise InputError(f"{what} must be as large as the images, {expected}, got {tuple(masks.shape)}")
    counted = masks[masks != IGNORED]
    if counted.numel() and int(counted.max()) >= num_classes:
        raise InputError(
            f"{what} must lie in 0..{num_classes - 1}, or be {IGNORED} where there is no class, got "
            f"{int(counted.max())}"
        )


def _check_images(what: str, images: Tensor) -> None:
    if images.dtype != torch.uint8:
        raise InputError(f"{what} must be uint8, got {images.dtype}")
    if images.dim() != 4:
        raise InputError(f"{what} must be images x channels x height x width, got {tuple(images.shape)}")
    if 0 in images.shape:
        raise InputError(f"{what} must not be empty, got shape {tuple(images.shape)}")
    if not images.is_contiguous():
        raise InputError(f"{what} must be contiguous")


def _check_labels(what: str, labels: Tensor, num_images: int, num_classes: int) -> None:
    if labels.dtype != torch.int64:
        raise InputError(f"{what} must be int64, got {labels.dtype}")
    if tuple(labels.shape) != (num_images,):
        raise InputError(
            f"{what} must be one label for each of {num_images} images, got {tuple(labels.shape)}"
        )
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= num_classes:
        raise InputError(f"{what} must lie in 0..{num_classes - 1}, got {low}..{high}")
