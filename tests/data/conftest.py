from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sparsereg.data import ImageArrays


def random_arrays(num_train=50, num_test=20, shape=(3, 8, 8), num_classes=5, seed=0) -> ImageArrays:
    rng = torch.Generator().manual_seed(seed)

    def part(num):
        images = torch.randint(0, 256, (num, *shape), dtype=torch.uint8, generator=rng)
        return images, torch.arange(num) % num_classes

    return ImageArrays("random", *part(num_train), *part(num_test), tuple("abcdefghij"[:num_classes]))


@dataclass(frozen=True)
class Fixed:
    """A source that hands out arrays that are there already."""

    arrays: ImageArrays
    name: str = "fixed"

    def load(self):
        return self.arrays


@pytest.fixture
def arrays():
    return random_arrays


@pytest.fixture
def fixed():
    return lambda *args, **kwargs: Fixed(random_arrays(*args, **kwargs))


@pytest.fixture
def folder(tmp_path) -> Path:
    """root/{train,test}/{cat,dog}/k.png, 12 + 6 images of 10 x 6 pixels."""
    rng = np.random.default_rng(0)
    for part, num in (("train", 6), ("test", 3)):
        for name in ("cat", "dog"):
            place = tmp_path / "images" / part / name
            place.mkdir(parents=True)
            for k in range(num):
                pixels = rng.integers(0, 256, (6, 10, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(place / f"{k}.png")
    return tmp_path / "images"
