"""BatchNorm statistics for the network that is used at test time.

Running statistics follow the weights with a delay and are gathered under sampled gates and augmented images;
the network at test time (last weights, medians of the gates) gives other activations. They are taken anew.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sparsereg.model.basic_l0_blocks import BatchNorm2d


@torch.no_grad()
def estimate_batch_norm_(net: nn.Module, batches: Iterable[Tensor]) -> int:
    """Replace running means and variances by their averages over batches, with test-time gates.

    Everything but the BatchNorm layers runs in eval mode. Modes and momenta are as before afterwards.

    Args:
        net: changed in place.
        batches: images (batch, channels, height, width), on the device of the network, of equal sizes.

    Returns:
        The number of batches used; 0 if the network has no BatchNorm.
    """
    norms = [m for m in net.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    if not norms:
        return 0
    modes = {m: m.training for m in net.modules()}
    momenta = {m: m.momentum for m in norms}
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
        for images in batches:
            net(images)
            count += 1
    finally:
        for module, mode in modes.items():
            module.training = mode
        for norm in norms:
            norm.momentum = momenta[norm]
        for norm in synchronised:
            norm.synchronised = True
    if count == 0:
        raise ValueError("BatchNorm statistics cannot be estimated from no batches")
    return count
