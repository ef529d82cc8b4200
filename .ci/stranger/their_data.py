"""Data that sparsereg does not know: stripes in three directions, in colour, under noise."""

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset


def stripes(count: int, seed: int) -> TensorDataset:
    """Draw images (count, 3, 20, 20) and the direction of their stripes."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (count,), generator=generator)
    place = torch.arange(20.0)
    across = torch.stack([place.expand(20, 20), place[:, None].expand(20, 20), place + place[:, None]])
    phase = 6.28 * torch.rand(count, 1, 1, generator=generator)
    pattern = torch.sin(across[labels] * 1.2 + phase)[:, None]
    colour = 0.5 + torch.rand(count, 3, 1, 1, generator=generator)
    return TensorDataset(colour * pattern + 0.5 * torch.randn(count, 3, 20, 20, generator=generator), labels)


class Stripes(pl.LightningDataModule):
    """The three parts, each with a seed of its own."""

    def __init__(self, count: int = 600, batch_size: int = 50) -> None:
        super().__init__()
        self.count, self.batch_size = count, batch_size

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """In another order in each epoch."""
        return DataLoader(stripes(self.count, 0), self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """In a fixed order."""
        return DataLoader(stripes(200, 1), 100)

    def test_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """In a fixed order."""
        return DataLoader(stripes(200, 2), 100)
