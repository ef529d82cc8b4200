"""Data of your own, from the command line.

    python train.py data._target_=examples.own_data.Digits data.batch_size=100 model=lenet300

Any LightningDataModule whose batches are (images, labels). The number of classes and the shape of the images
are attributes ``num_classes`` and ``image_shape``, or are found by looking at the data.
"""

import pytorch_lightning as pl
import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

Loader = DataLoader[tuple[Tensor, ...]]


class Digits(pl.LightningDataModule):
    """scikit-learn's digits, 8 x 8: 1,200 images train, 237 validate, 360 test.

    Args:
        batch_size: training images per batch.
    """

    def __init__(self, batch_size: int = 64) -> None:
        super().__init__()
        self.batch_size = batch_size

    def setup(self, stage: str | None = None) -> None:
        """Read the images."""
        digits = load_digits()
        images = torch.tensor(digits.images[:, None] / 16, dtype=torch.float32)
        labels = torch.tensor(digits.target, dtype=torch.int64)
        parts = (slice(0, 1200), slice(1200, 1437), slice(1437, None))
        self.train, self.val, self.test = (TensorDataset(images[part], labels[part]) for part in parts)

    def train_dataloader(self) -> Loader:
        """Shuffled."""
        return DataLoader(self.train, self.batch_size, shuffle=True)

    def val_dataloader(self) -> Loader:
        """In a fixed order."""
        return DataLoader(self.val, 237)

    def test_dataloader(self) -> Loader:
        """In a fixed order."""
        return DataLoader(self.test, 360)
