"""Images in folders, one folder per class: in memory when they fit, else read while training."""

import logging
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from sparsereg.data.arrays import ImageArrays
from sparsereg.errors import InputError

log = logging.getLogger(__name__)

MODES = {1: "L", 3: "RGB"}
"""Pillow's pixel format for a number of channels."""
_LAYOUT = "train/CLASS/* and test/CLASS/*"
_READ_AT_ONCE = 256
"""Images per piece when a data set is read as a whole."""


@dataclass(frozen=True, eq=False)
class ImageFiles:
    """A classification data set that stays in its files.

    Args:
        name: what messages call the data set.
        train_paths: the training images.
        train_labels: int64, the class of each.
        test_paths: the test images.
        test_labels: as ``train_labels``.
        class_names: one name per class.
        image_shape: (channels, height, width) that files are decoded to.
        num_workers: processes that decode; 0: the training process.
    """

    name: str
    train_paths: tuple[Path, ...]
    train_labels: Tensor
    test_paths: tuple[Path, ...]
    test_labels: Tensor
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]
    num_workers: int


@dataclass(frozen=True)
class ImageFolder:
    """``root/train/CLASS/*`` and ``root/test/CLASS/*``, in the formats that Pillow reads.

    Every file below a class folder is an image, except hidden ones. An image is turned as its EXIF entry
    says, its shorter side is scaled to ``image_size`` (bilinear, antialiased) and the middle is cut out.

    Args:
        root: the folder.
        image_size: height and width, in pixels, >= 1.
        channels: 3 for colour, 1 for grey.
        max_memory_gb: the decoded images are held in memory up to this size (GiB, >= 0); a larger data
            set is decoded while training.
        num_workers: processes that decode; 0: the training process.

    Raises:
        InputError: an argument is outside its range.
    """

    root: str | None = None
    image_size: int = 32
    channels: int = 3
    max_memory_gb: float = 4.0
    num_workers: int = 2
    name: str = "image_folder"

    def __post_init__(self) -> None:
        if self.image_size < 1:
            raise InputError(f"image_size must be >= 1 pixel, got {self.image_size!r}")
        if self.channels not in MODES:
            raise InputError(f"channels must be 1 (grey) or 3 (colour), got {self.channels!r}")
        if not self.max_memory_gb >= 0:
            raise InputError(f"max_memory_gb must be >= 0, got {self.max_memory_gb!r}")
        if self.num_workers < 0:
            raise InputError(f"num_workers must be >= 0, got {self.num_workers!r}")

    def load(self) -> ImageArrays | ImageFiles:
        """List the files, and decode them if they fit in memory.

        Raises:
            InputError: no such folder, no images, other classes in test than in train, or an image that
                cannot be read (named).
        """
        files = self._list()
        num_bytes = (len(files.train_paths) + len(files.test_paths)) * int(np.prod(files.image_shape))
        if num_bytes > self.max_memory_gb * 2**30:
            log.info("%s: %.1f GiB decoded, more than max_memory_gb=%g: files are read while training",
                     files.name, num_bytes / 2**30, self.max_memory_gb)  # fmt: skip
            return files
        return ImageArrays(
            files.name,
            _read_all(FileStore(files.train_paths, files.image_shape, self.num_workers)),
            files.train_labels,
            _read_all(FileStore(files.test_paths, files.image_shape, self.num_workers)),
            files.test_labels,
            files.class_names,
        )

    def _list(self) -> ImageFiles:
        if not self.root:
            raise InputError(f"data=image_folder needs data.root=FOLDER with {_LAYOUT}")
        root = Path(self.root).expanduser()
        classes = {part: _class_names(root / part) for part in ("train", "test")}
        for part, other in (("train", "test"), ("test", "train")):
            alone = sorted(set(classes[part]) - set(classes[other]))
            if alone:
                raise InputError(f"data.root={root}: class {alone[0]!r} is in {part}/ but not in {other}/")
        train_paths, train_labels = _images(root / "train", classes["train"])
        test_paths, test_labels = _images(root / "test", classes["train"])
        return ImageFiles(
            str(root),
            train_paths,
            train_labels,
            test_paths,
            test_labels,
            classes["train"],
            (self.channels, self.image_size, self.image_size),
            self.num_workers,
        )


def _class_names(part: Path) -> tuple[str, ...]:
    if not part.is_dir():
        raise InputError(f"data.root: there is no folder {part}; expected {_LAYOUT} in data.root")
    names = sorted(p.name for p in part.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not names:
        raise InputError(f"data.root: there are no class folders in {part}; expected {_LAYOUT} in data.root")
    return tuple(names)


def _images(part: Path, class_names: Sequence[str]) -> tuple[tuple[Path, ...], Tensor]:
    paths: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(class_names):
        found = [p for p in sorted((part / name).rglob("*")) if p.is_file() and not p.name.startswith(".")]
        if not found:
            raise InputError(f"data.root: there are no images in {part / name}")
        paths += found
        labels += [label] * len(found)
    return tuple(paths), torch.tensor(labels, dtype=torch.int64)


def read_image(path: Path, shape: tuple[int, int, int]) -> Tensor:
    """Decode one file to uint8 (channels, height, width): see :class:`ImageFolder`.

    Raises:
        InputError: the file is not an image that can be read; names it.
    """
    channels, height, width = shape
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's hints about odd files; what counts is that they decode
            with Image.open(path) as opened:
                if opened.mode.startswith(("I", "F")):
                    raise InputError(f"{path}: this image has more than 8 bits per channel; convert it first")
                upright = ImageOps.exif_transpose(opened)
                # Through RGBA, since Pillow drops a palette's transparency otherwise with made-up colours.
                if "transparency" in upright.info:
                    upright = upright.convert("RGBA")
                colours = upright.convert(MODES[channels])
                exact = ImageOps.fit(colours, (width, height), Image.Resampling.BILINEAR)
    except InputError:
        raise
    except Exception as error:  # Pillow's decoders raise whatever their format's parser does
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{path}: this image cannot be read ({reason[:200]})") from error
    pixels = np.array(exact, dtype=np.uint8).reshape(height, width, channels)
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


class _FileBatches(Dataset[Tensor | InputError]):
    """Item k is the k-th batch.

    A file that cannot be read comes back as the error, since a raise in a worker would reach the user
    wrapped in the worker's traceback.
    """

    def __init__(self, batches: list[list[Path]], shape: tuple[int, int, int]) -> None:
        self.batches = batches
        self.shape = shape

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> Tensor | InputError:
        try:
            return torch.stack([read_image(path, self.shape) for path in self.batches[index]])
        except InputError as error:
            return error


class FileStore:
    """Images that are decoded when they are asked for, by worker processes.

    Args:
        paths: the files.
        image_shape: (channels, height, width) to decode to.
        num_workers: processes that decode; 0: the calling process.
    """

    def __init__(self, paths: Sequence[Path], image_shape: tuple[int, int, int], num_workers: int) -> None:
        self.paths = paths
        self.image_shape = image_shape
        self.num_workers = num_workers

    def batches(self, positions: Sequence[Tensor], device: torch.device) -> Iterator[Tensor]:
        """Yield the images at each batch's positions, uint8, on ``device``.

        Raises:
            InputError: an image cannot be read; names it.
        """
        batches = [[self.paths[k] for k in part.tolist()] for part in positions]
        reader = DataLoader(
            _FileBatches(batches, self.image_shape),
            batch_size=None,
            num_workers=min(self.num_workers, len(batches)),
            pin_memory=device.type == "cuda",
            collate_fn=_as_it_is,
        )
        for images in reader:
            if isinstance(images, InputError):
                raise images
            yield images.to(device, non_blocking=True)


def _as_it_is(images: Any) -> Any:
    return images


def _read_all(store: FileStore) -> Tensor:
    pieces = torch.arange(len(store.paths)).split(_READ_AT_ONCE)
    images = torch.empty((len(store.paths), *store.image_shape), dtype=torch.uint8)
    for piece, decoded in zip(pieces, store.batches(pieces, torch.device("cpu")), strict=True):
        images[piece] = decoded
    return images
