"""Which data BatchNorm statistics are taken from, see ``sparsereg.model.batch_norm_statistics``."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol, runtime_checkable

import pytorch_lightning as pl
from torch.utils.data import DataLoader

from sparsereg.data.form import Inputs
from sparsereg.data.own import first_inputs
from sparsereg.training.lightning import with_own_workers


@runtime_checkable
class EstimationData(Protocol):
    """A data module that says which images BatchNorm statistics are taken from."""

    def estimation_batches(self, num_images: int, batch_size: int | None = None) -> Iterator[Inputs]:
        """Yield images (or other inputs) on the device that trains, always the same ones."""
        ...


def estimation_batches(
    trainer: pl.Trainer,
    module: pl.LightningModule,
    num_images: int,
    batch_size: int,
    read: Callable[[Any], Any] | None = None,
) -> Iterable[Inputs] | None:
    """Return training images for ``estimate_batch_norm_``; None where there is no training data.

    Args:
        trainer: with the data.
        module: that trains.
        num_images: how many, rounded up to whole batches of a foreign data module.
        batch_size: images per batch, where the data module lets it be chosen.
        read: what the network takes of a batch of a foreign data module.
    """
    data = trainer.datamodule  # type: ignore[attr-defined]
    if isinstance(data, EstimationData):
        return data.estimation_batches(num_images, batch_size)
    if trainer.state.fn != "fit":  # a foreign data module is set up for the stage at hand only
        return None
    loader = trainer.train_dataloader if data is None else data.train_dataloader()
    if isinstance(loader, DataLoader):
        loader = with_own_workers(loader)
    return None if loader is None else first_inputs(loader, num_images, module.device, read)
