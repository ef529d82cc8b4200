"""Batches of normalised images on the training device, in an order that only the epoch decides."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from sparsereg.data.augment import Augmentation, resample, resample_masks
from sparsereg.errors import InputError

_ORDER, _AUGMENT, _WARP, _WINDOWS = 0, 1, 2, 3
"""Streams of random numbers of an epoch: adding another changes none of them."""


class ImageStore(Protocol):
    """Where uint8 images come from: memory, or files."""

    image_shape: tuple[int, int, int]

    def batches(self, positions: Sequence[Tensor], device: torch.device) -> Iterator[Tensor]:
        """Yield uint8 images (images, channels, height, width) on ``device``, batch by batch."""
        ...


class TensorStore:
    """Images in one uint8 tensor, on the training device or in the host's memory.

    Args:
        images: uint8, (images, channels, height, width).
    """

    def __init__(self, images: Tensor) -> None:
        self.images = images
        self.image_shape = (images.shape[1], images.shape[2], images.shape[3])

    def batches(self, positions: Sequence[Tensor], device: torch.device) -> Iterator[Tensor]:
        """Yield the images at each batch's positions."""
        if not positions:
            return
        # The whole order goes to the device once, not a small piece for every batch.
        together = torch.cat(list(positions)).to(self.images.device)
        for part in together.split([len(p) for p in positions]):
            yield self.images.index_select(0, part).to(device, non_blocking=True)


class Normalise:
    """uint8 images to float32: divided by 255, minus the mean, divided by the standard deviation.

    Args:
        mean: per channel, of images scaled to [0, 1].
        std: per channel, > 0.
        channels_last: whether the results lie in memory channel by channel (False) or pixel by pixel.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], channels_last: bool = False) -> None:
        factor = [1 / (255 * s) for s in std]
        offset = [-m / s for m, s in zip(mean, std, strict=True)]
        self.factor = torch.tensor(factor, dtype=torch.float32).view(-1, 1, 1)
        self.offset = torch.tensor(offset, dtype=torch.float32).view(-1, 1, 1)
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format

    def to(self, device: torch.device) -> "Normalise":
        """Move the constants; returns itself."""
        self.factor, self.offset = self.factor.to(device), self.offset.to(device)
        return self

    def __call__(self, images: Tensor) -> Tensor:
        """Normalise images on the scale 0..255, (images, channels, height, width)."""
        scaled = torch.addcmul(self.offset, images.to(torch.float32), self.factor)
        return scaled.contiguous(memory_format=self.memory_format)


class EpochOrder:
    """The order of the images and the augmentation's random numbers, as functions of (seed, epoch).

    Lightning calls ``set_epoch`` of a loader's ``sampler`` at the start of each epoch. Nothing else
    is remembered, so a resumed run goes on exactly where the interrupted one would have.

    Args:
        num_images: how many there are.
        seed: >= 0.
        shuffle: whether the order is random; otherwise it is 0, 1, 2, ...
    """

    def __init__(self, num_images: int, seed: int = 0, shuffle: bool = False) -> None:
        self.num_images = num_images
        self.seed = seed
        self.shuffle = shuffle
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, counted from 0, of the next pass."""
        self.epoch = epoch

    def order(self) -> Tensor:
        """The positions of all images in this epoch's order: a permutation, int64."""
        if not self.shuffle:
            return torch.arange(self.num_images)
        return torch.randperm(self.num_images, generator=self._generator(_ORDER))

    def augmentation_generator(self) -> torch.Generator:
        """A fresh generator on the CPU for this epoch's augmentation."""
        return self._generator(_AUGMENT)

    def warp_generator(self) -> torch.Generator:
        """A fresh generator on the CPU for this epoch's elastic displacements."""
        return self._generator(_WARP)

    def window_generator(self) -> np.random.Generator:
        """A fresh generator for this epoch's windows of a text."""
        return np.random.default_rng(np.random.SeedSequence([self.seed, self.epoch, _WINDOWS]))

    def _generator(self, stream: int) -> torch.Generator:
        # SeedSequence mixes, so neighbouring seeds, epochs and streams have nothing in common; the CPU's
        # Mersenne twister uses 32 bits of a seed.
        mixed = np.random.SeedSequence([self.seed, self.epoch, stream]).generate_state(1, np.uint32)
        return torch.Generator().manual_seed(int(mixed[0]))


@dataclass(frozen=True)
class Share:
    """Which part of every batch is this process's.

    Args:
        rank: this process, in 0 .. num_processes - 1.
        num_processes: how many train together.
    """

    rank: int = 0
    num_processes: int = 1

    def of(self, start: int, stop: int) -> tuple[int, int]:
        """Cut this process's contiguous part out of start..stop; the first ones get the odd images."""
        each, rest = divmod(stop - start, self.num_processes)
        first = start + self.rank * each + min(self.rank, rest)
        return first, first + each + (self.rank < rest)


def batch_bounds(num_images: int, size: int) -> list[tuple[int, int]]:
    """Cut 0..num_images into batches of ``size``; the last may be smaller, but not by more than half.

    A rest of less than half a batch is shared evenly with the batch before it: so no process is left
    without images, a BatchNorm never sees a single image (from a batch size of 4 per process on), and no
    gradient comes from a handful of images. The number of batches is num_images / size, rounded up.

    Args:
        num_images: >= 0.
        size: images in a batch over all processes, >= 1.

    Returns:
        (start, stop) of each batch, in order.
    """
    num_full, rest = divmod(num_images, size)
    sizes = [size] * num_full + [rest] * (rest > 0)
    if num_full and 0 < 2 * rest < size:
        sizes[-2:] = [(size + rest + 1) // 2, (size + rest) // 2]
    stops = np.cumsum(sizes).tolist()
    return [(stop - n, stop) for n, stop in zip(sizes, stops, strict=True)]


class DeviceLoader:
    """Iterates (images, labels) on the training device; goes where a DataLoader goes in a Trainer.

    Each image comes once per pass. With several processes each takes its contiguous part of every
    batch, augmented as in a single process, and all of them have the same number of batches.

    Args:
        store: the images.
        labels: int64 labels of all images of the store, on the device; or their masks, uint8.
        positions: int64 positions in the store of the images to iterate.
        normalise: from uint8 to float32.
        batch_size: images per batch and process, >= 1.
        augmentation: random changes; None for none.
        shuffle: whether the order is random.
        seed: of the order and the augmentation, >= 0.
        share: this process's part.
        device: where batches are made.

    Raises:
        InputError: there are too few images for the processes.
    """

    def __init__(
        self,
        store: ImageStore,
        labels: Tensor,
        positions: Tensor,
        normalise: Normalise,
        *,
        batch_size: int,
        augmentation: Augmentation | None = None,
        shuffle: bool = False,
        seed: int = 0,
        share: Share | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.store = store
        self.device = device or torch.device("cpu")
        self.labels = labels.to(self.device)
        self.positions = positions
        self.normalise = normalise.to(self.device)
        self.batch_size = batch_size
        self.augmentation = None if augmentation is None or augmentation.identity else augmentation
        self.sampler = EpochOrder(len(positions), seed, shuffle)
        self.batch_sampler = None  # Lightning looks for it wherever there is a sampler
        self.share = share or Share()
        self.bounds = batch_bounds(len(positions), batch_size * self.share.num_processes)
        self._check_processes()

    def _check_processes(self) -> None:
        num_processes, num_images = self.share.num_processes, len(self.positions)
        if num_images == 0:
            raise InputError("there are no images to make batches of")
        if min(stop - start for start, stop in self.bounds) < num_processes:
            raise InputError(
                f"{num_images} images in batches of {self.batch_size} leave one of {num_processes} processes "
                "without an image; take fewer processes or a batch_size of at least 2"
            )

    def __len__(self) -> int:
        """Number of batches in a pass; the same on every process."""
        return len(self.bounds)

    @property
    def num_images(self) -> int:
        """Number of images in a pass, over all processes."""
        return len(self.positions)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next pass (a Trainer does it through ``sampler``)."""
        self.sampler.set_epoch(epoch)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = self.positions[self.sampler.order()]
        generator, warping = self.sampler.augmentation_generator(), self.sampler.warp_generator()
        parts = [self.share.of(*bounds) for bounds in self.bounds]
        own = [order[first:last] for first, last in parts]
        # The labels of an epoch are picked together; masks, which are as large as the images, batch by batch.
        own_labels: Iterable[Tensor]
        if self.labels.dim() == 1:
            picked = self.labels.index_select(0, torch.cat(own).to(self.device))
            own_labels = picked.split([len(p) for p in own])
        else:
            own_labels = (self.labels.index_select(0, p.to(self.device)) for p in own)
        for (start, stop), (first, last), images, labels in zip(
            self.bounds, parts, self.store.batches(own, self.device), own_labels, strict=True
        ):
            if self.augmentation is None:
                yield self.normalise(images), labels
                continue
            size = (stop - start, *self.store.image_shape[1:])
            rows = self._own(self.augmentation.draw(*size, generator), first - start, last - start)
            warp = self.augmentation.warp(*size, warping)
            if warp is not None:
                warp = self._own(warp, first - start, last - start)
            how = (rows, self.augmentation.affine, warp, self.augmentation.cropped)
            if labels.dim() > 1:
                labels = resample_masks(labels, *how)
            yield self.normalise(resample(images, *how)), labels

    def _own(self, drawn: Tensor, first: int, last: int) -> Tensor:
        return drawn[first:last].to(self.device, non_blocking=True)
