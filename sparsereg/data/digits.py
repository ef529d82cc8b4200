"""The 1,797 handwritten digits that ship with scikit-learn: data without a network."""

from dataclasses import dataclass

import torch
from torch.nn import functional

from sparsereg.data.arrays import ImageArrays
from sparsereg.errors import InputError

TEST_SEED = 0
"""Seed of the train/test split; part of the data set's definition here, so not configurable."""


@dataclass(frozen=True)
class Digits:
    """scikit-learn's 8 x 8 digits as grey images, enlarged: 1,437 for training, 360 for testing.

    Grey levels 0..16 become 0..255. The images are enlarged bilinearly. scikit-learn has no test set of
    its own, so every fifth image of a shuffled list that is sorted by class is one: the classes have the
    same shares in both parts, to one image.

    Args:
        image_size: height and width of the images, in 8 .. 224.
        name: of the data set.

    Raises:
        InputError: the size is outside its range.

    Source: https://archive.ics.uci.edu/dataset/80 (its test part); ``sklearn.datasets.load_digits``.
    """

    image_size: int = 32
    name: str = "digits"

    def __post_init__(self) -> None:
        if not 8 <= self.image_size <= 224:
            raise InputError(f"data.image_size={self.image_size}: expected an integer in 8 .. 224")

    def load(self) -> ImageArrays:
        """Read the images and split them."""
        from sklearn.datasets import load_digits  # half a second that only this source needs

        raw = load_digits()
        grey = torch.from_numpy(raw.images).float()[:, None] * (255 / 16)
        size = (self.image_size, self.image_size)
        images = functional.interpolate(grey, size=size, mode="bilinear").round().to(torch.uint8)
        labels = torch.from_numpy(raw.target).long()
        shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(TEST_SEED))
        by_class = shuffled[torch.argsort(labels[shuffled], stable=True)]
        is_test = torch.zeros(len(labels), dtype=torch.bool)
        is_test[by_class[::5]] = True
        return ImageArrays(
            self.name,
            images[~is_test],
            labels[~is_test],
            images[is_test],
            labels[is_test],
            tuple(str(name) for name in raw.target_names),
        )
