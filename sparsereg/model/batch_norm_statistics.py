"""BatchNorm statistics for the network that is used at test time.

Running statistics follow the weights with a delay and are gathered under sampled gates and augmented images;
the network at test time (last weights, medians of the gates) gives other activations. They are taken anew.
"""

import copy
from collections.abc import Iterable

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from sparsereg.data.batches import call
from sparsereg.data.form import Inputs
from sparsereg.model.basic_l0_blocks import BatchNorm2d


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
    norms = _tracking(net)
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


def has_statistics(net: nn.Module) -> bool:
    """Whether a network has BatchNorm layers that keep statistics."""
    return bool(_tracking(net))


def _tracking(net: nn.Module) -> list[_BatchNorm]:
    return [m for m in net.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
