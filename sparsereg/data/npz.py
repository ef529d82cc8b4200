"""Images from one NumPy archive."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsereg import archives
from sparsereg.data.arrays import IGNORED, ImageArrays
from sparsereg.errors import InputError

ARRAYS = ("train_images", "train_labels", "test_images", "test_labels")
MASKS = ("train_images", "train_masks", "test_images", "test_masks")
"""Of an archive for segmentation."""


@dataclass(frozen=True)
class Npz:
    """An archive written by ``numpy.savez`` or ``savez_compressed``. Nothing in it is unpickled.

    It holds ``train_images`` and ``test_images`` (uint8; images x height x width for grey images, or
    images x height x width x channels with 1 to 4 channels), ``train_labels`` and ``test_labels``
    (integers from 0, one per image), and optionally ``class_names`` (strings, one per class). Without
    class names every class from 0 to the largest label must occur in the training images. For segmentation
    ``train_masks`` and ``test_masks`` take the place of labels: uint8, images x height x width, 255 where a
    pixel has no class.

    Args:
        path: the file.
    """

    path: str | None = None
    name: str = "npz"

    def load(self) -> ImageArrays:
        """Read and check the arrays.

        Raises:
            InputError: no path, no such file, not an archive, damaged, or an array is missing or wrong.
        """
        if not self.path:
            raise InputError("data=npz needs a file: data.path=FILE.npz")
        path = Path(self.path).expanduser()
        arrays = _read(path)
        images = {part: _images(path, f"{part}_images", arrays) for part in ("train", "test")}
        if "train_masks" in arrays:
            labels = {part: _masks(path, f"{part}_masks", arrays) for part in ("train", "test")}
        else:
            labels = {part: _labels(path, f"{part}_labels", arrays) for part in ("train", "test")}
        return ImageArrays(
            str(path),
            images["train"],
            labels["train"],
            images["test"],
            labels["test"],
            _class_names(path, arrays.get("class_names"), labels["train"]),
        )


def _read(path: Path) -> dict[str, np.ndarray]:
    if not path.exists():
        raise InputError(f"data.path={path}: there is no such file")
    if not path.is_file():
        raise InputError(f"data.path={path}: this is not a file")
    try:
        with path.open("rb") as file:
            archive = np.load(file, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise InputError(f"data.path={path}: a single array, not an .npz archive of {_listed()}")
            archives.check(path)
            wanted = MASKS if "train_masks" in archive.files else ARRAYS
            missing = [key for key in wanted if key not in archive.files]
            if missing:
                found = ", ".join(archive.files) or "nothing"
                raise InputError(
                    f"data.path={path}: no array named {missing[0]}; needed: {_listed()}; found: {found}"
                )
            arrays = {key: archive[key] for key in (*wanted, "class_names") if key in archive.files}
    except InputError:
        raise
    except (*archives.BROKEN, MemoryError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"data.path={path}: not a readable .npz archive ({reason[:200]})") from error
    # NumPy hands out a member that is not in its format as bytes.
    for key, array in arrays.items():
        if not isinstance(array, np.ndarray):
            raise InputError(f"data.path={path}: {key} is not a NumPy array")
    return arrays


def _listed() -> str:
    return ", ".join(ARRAYS)


def _images(path: Path, key: str, arrays: dict[str, np.ndarray]) -> Tensor:
    array = arrays[key]
    where = f"data.path={path}: {key}"
    if array.dtype != np.uint8:
        raise InputError(f"{where} must be uint8 (0..255), got {array.dtype}")
    layout = "images x height x width, or images x height x width x channels with 1 to 4 channels"
    if array.ndim == 3:
        array = array[..., None]
    if array.ndim != 4 or not 1 <= array.shape[-1] <= 4:
        raise InputError(f"{where} must be {layout}, got {_shape(arrays[key])}")
    return torch.from_numpy(np.ascontiguousarray(array.transpose(0, 3, 1, 2)))


def _labels(path: Path, key: str, arrays: dict[str, np.ndarray]) -> Tensor:
    array = arrays[key]
    where = f"data.path={path}: {key}"
    if array.dtype.kind not in "iu":
        raise InputError(f"{where} must be integers, got {array.dtype}")
    if array.ndim != 1:
        raise InputError(f"{where} must be one integer per image, got shape {_shape(array)}")
    if array.size and (array.min() < 0 or array.max() >= 2**31):
        raise InputError(f"{where} must count from 0, got {array.min()}..{array.max()}")
    return torch.from_numpy(array.astype(np.int64))


def _masks(path: Path, key: str, arrays: dict[str, np.ndarray]) -> Tensor:
    array = arrays[key]
    where = f"data.path={path}: {key}"
    if array.dtype != np.uint8:
        raise InputError(f"{where} must be uint8 (a class for each pixel, 255 for none), got {array.dtype}")
    if array.ndim != 3:
        raise InputError(f"{where} must be images x height x width, got {_shape(array)}")
    return torch.from_numpy(np.ascontiguousarray(array))


def _class_names(path: Path, names: Any, train_labels: Tensor) -> tuple[str, ...]:
    if names is not None:
        if names.dtype.kind != "U" or names.ndim != 1:
            raise InputError(f"data.path={path}: class_names must be one string per class, got {names.dtype} "
                             f"of shape {_shape(names)}")  # fmt: skip
        return tuple(str(name) for name in names)
    if train_labels.numel() == 0:
        return ()
    present = torch.unique(train_labels)
    if train_labels.dim() > 1:
        present = present[present != IGNORED]
        return tuple(str(k) for k in range(int(present[-1]) + 1)) if len(present) else ()
    num_classes = int(present[-1]) + 1
    if len(present) < num_classes:
        gaps = set(range(min(num_classes, len(present) + 1))) - set(present.tolist())
        raise InputError(
            f"data.path={path}: train_labels go up to {num_classes - 1} but class {min(gaps)} has no image; "
            "number the classes from 0 without gaps, or add an array class_names"
        )
    return tuple(str(k) for k in range(num_classes))


def _shape(array: np.ndarray) -> str:
    return " x ".join(str(n) for n in array.shape) or "a single number"
