"""The division of the training images into a training and a validation part."""

import hashlib
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsereg.archives import load_npz, save_npz
from sparsereg.errors import DamagedFile, InputError


@dataclass(frozen=True, eq=False)
class Split:
    """Which training images of a source are trained on, and which validate.

    The images are drawn at random without regard to their classes (no stratification). The order
    within each part is that of the draw, so the first n of a part are a random subset of it.

    Args:
        train: int64 positions in the source's training images.
        val: int64 positions, disjoint from ``train``; may be empty.
        seed: what the draw was seeded with.
    """

    train: Tensor
    val: Tensor
    seed: int

    @classmethod
    def draw(cls, num_images: int, val_size: int | float, seed: int) -> "Split":
        """Draw a split from a generator of its own: the same arguments give the same split.

        Args:
            num_images: number of training images of the source.
            val_size: how many validate: an integer is a count >= 0, a fraction lies in (0, 1).
            seed: seed of the draw, >= 0.

        Raises:
            InputError: ``val_size`` leaves nothing to train on, or is neither a count nor a fraction.
        """
        num_val = _num_val(num_images, val_size)
        order = torch.randperm(num_images, generator=torch.Generator().manual_seed(seed))
        return cls(train=order[: num_images - num_val], val=order[num_images - num_val :], seed=seed)

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hexadecimal) over the positions, as little-endian int64, ``train`` before ``val``."""
        digest = hashlib.sha256(f"{len(self.train)} {len(self.val)}\n".encode())
        for part in (self.train, self.val):
            digest.update(part.numpy().astype("<i8").tobytes())
        return digest.hexdigest()

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the arrays ``train``, ``val``, ``seed`` and ``sha256`` as an .npz archive."""
        arrays: dict[str, Any] = {
            "train": self.train.numpy(),
            "val": self.val.numpy(),
            "seed": np.int64(self.seed),
            "sha256": np.array(self.digest),
        }
        save_npz(Path(path), arrays)
        return Path(path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Split":
        """Read what ``save`` wrote.

        Raises:
            InputError: the file is damaged, or its positions do not fit the digest written with them.
        """
        try:
            arrays = load_npz(path)
            train, val = torch.from_numpy(arrays["train"]), torch.from_numpy(arrays["val"])
            split, digest = cls(train, val, int(arrays["seed"])), str(arrays["sha256"])
        except (DamagedFile, OSError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path} cannot be read as a split: {error}") from error
        if digest != split.digest:
            raise InputError(f"{path}: the split was changed after it was written (sha256 differs)")
        return split


def _num_val(num_images: int, val_size: int | float) -> int:
    if isinstance(val_size, bool) or not isinstance(val_size, int | float):
        raise InputError(f"val_size must be a count >= 0 or a fraction in (0, 1), got {val_size!r}")
    if isinstance(val_size, float) and not 0 < val_size < 1:
        raise InputError(f"val_size as a fraction must lie in (0, 1), got {val_size!r}; a count has no point")
    num_val = max(1, round(num_images * val_size)) if isinstance(val_size, float) else val_size
    if not 0 <= num_val < num_images:
        raise InputError(
            f"val_size={val_size!r} must leave some of the {num_images} training images to train on"
        )
    return num_val
