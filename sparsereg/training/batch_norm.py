"""BatchNorm statistics for the network that is used at test time.

Running statistics follow the weights with a delay and are gathered under sampled gates and augmented images;
the network at test time (last weights, medians of the gates) gives other activations. They are taken anew.
"""

import copy
from collections.abc import Iterable, Iterator
from typing import Protocol, runtime_checkable

import pytorch_lightning as pl
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader

from sparsereg.data.batches import call
from sparsereg.data.form import Inputs
from sparsereg.data.own import first_inputs
from sparsereg.model.basic_l0_blocks import BatchNorm2d
from sparsereg.training.lightning import with_own_workers


@runtime_checkable
class EstimationData(Protocol):
    """A data module that says which images BatchNorm statistics are taken from."""

    def estimation_batches(self, num_images: int, batch_size: int | None = None) -> Iterator[Inputs]:
        """Yield images (or other inputs) on the device that trains, always the same ones."""
        ...


def estimation_batches(
    trainer: pl.Trainer, module: pl.LightningModule, num_images: int, batch_size: int
) -> Iterable[Inputs] | None:
    """Return training images for `estimate_batch_norm_`; None where there is no training data.

    Args:
        trainer: with the data.
        module: that trains.
        num_images: how many, rounded up to whole batches of a foreign data module.
        batch_size: images per batch, where the data module lets it be chosen.
    """
    data = trainer.datamodule  # type: ignore[attr-defined]
    if isinstance(data, EstimationData):
        return data.estimation_batches(num_images, batch_size)
    if trainer.state.fn != "fit":  # a foreign data module is set up for the stage at hand only
        return None
    loader = trainer.train_dataloader if data is None else data.train_dataloader()
    if isinstance(loader, DataLoader):
        loader = with_own_workers(loader)
    return None if loader is None else first_inputs(loader, num_images, module.device)


@torch.no_grad()
def estimate_batch_norm_(net: nn.Module, batches: Iterable[Inputs]) -> int:
    """Replace running means and variances by their averages over batches, with test-time gates.

    Everything but the BatchNorm layers runs in eval mode. Modes and momenta are as before afterwards, and so
    are the statistics of layers that the network does not use.

    Args:
        net: changed in place.
        batches: images (batch, channels, height, width), or inputs by name, on the device of the network, of
            equal sizes.

    Returns:
        The number of batches used; 0 if the network has no BatchNorm.
    """
    norms = [m for m in net.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    if not norms:
        return 0
    modes = {m: m.training for m in net.modules()}
    momenta = {m: m.momentum for m in norms}
    before = {m: copy.deepcopy(dict(m.named_buffers(recurse=False))) for m in norms}
    synchronised = [m for m in norms if isinstance(m, BatchNorm2d) and m.synchronised]
    count = 0
    try:
        net.eval()
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # a cumulative average
            norm.training = True  # not .train(): the gates below stay in eval mode
        for norm in synchronised:
            norm.synchronised = False  # every process sees the same batches
        for inputs in batches:
            call(net, inputs)
            count += 1
    finally:
        for module, mode in modes.items():
            module.training = mode
        for norm in norms:
            norm.momentum = momenta[norm]
            if not norm.num_batches_tracked:
                norm.load_state_dict(before[norm], strict=False)
        for norm in synchronised:
            norm.synchronised = True
    if count == 0:
        raise ValueError("BatchNorm statistics cannot be estimated from no batches")
    return count
