"""Images in folders, one folder per class: in memory when they fit, else read while training."""

import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from sparsereg.data.arrays import ImageArrays
from sparsereg.data.image_file import MODES, check_file, read_image
from sparsereg.errors import InputError
from sparsereg.files import is_folder

log = logging.getLogger(__name__)

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
    """``root/train/CLASS/*`` and ``root/test/CLASS/*``, in the formats of ``image_file.FORMATS``.

    Every file below a class folder is an image, except hidden ones. A symbolic link is followed to a file
    that lies below ``root``, too. Whatever is no such file or link is refused, and never opened. An image is
    turned as its EXIF entry says, its shorter side is scaled to ``image_size`` (bilinear, antialiased) and
    the middle is cut out.

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
        real = root.resolve()
        classes = {part: _class_names(root / part, real) for part in ("train", "test")}
        for part, other in (("train", "test"), ("test", "train")):
            alone = sorted(set(classes[part]) - set(classes[other]))
            if alone:
                raise InputError(f"data.root={root}: class {alone[0]!r} is in {part}/ but not in {other}/")
        train_paths, train_labels = _images(root / "train", classes["train"], real)
        test_paths, test_labels = _images(root / "test", classes["train"], real)
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


def _class_names(part: Path, root: Path) -> tuple[str, ...]:
    if not part.is_dir():
        raise InputError(f"data.root: there is no folder {part}; expected {_LAYOUT} in data.root")
    _refuse_link(part)
    names = []
    for entry in _entries(part):
        if is_folder(entry):
            _refuse_link(Path(entry))
            names.append(entry.name)
        else:
            check_file(Path(entry), root)
            log.warning("%s lies beside the class folders and is not read", entry.path)
    if not names:
        raise InputError(f"data.root: there are no class folders in {part}; expected {_LAYOUT} in data.root")
    return tuple(names)


def _images(part: Path, class_names: Sequence[str], root: Path) -> tuple[tuple[Path, ...], Tensor]:
    paths: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(class_names):
        found = sorted(_files_below(part / name, root), key=lambda path: path.parts)
        if not found:
            raise InputError(f"data.root: there are no images in {part / name}")
        paths += found
        labels += [label] * len(found)
    return tuple(paths), torch.tensor(labels, dtype=torch.int64)


def _files_below(folder: Path, root: Path) -> Iterator[Path]:
    """Yield every file below a folder that is not hidden, checked."""
    for entry in _entries(folder):
        path = Path(entry)
        if is_folder(entry):
            _refuse_link(path)
            yield from _files_below(path, root)
        else:
            check_file(path, root)
            yield path


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    """What lies in a folder, by name, without what is hidden."""
    try:
        with os.scandir(folder) as entries:
            return sorted((e for e in entries if not e.name.startswith(".")), key=lambda e: e.name)
    except OSError as error:
        raise InputError(f"{folder}: this folder cannot be read ({error.strerror})") from error


def _refuse_link(folder: Path) -> None:
    """Refuse a link to a folder: it may lead in circles, or count images twice."""
    if folder.is_symlink():
        raise InputError(f"{folder}: this is a link to a folder; put the folder itself there")


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
