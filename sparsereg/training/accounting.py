"""What a network costs, also where it cannot be traced: one without gates loses nothing."""

import logging
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from sparsereg.compression import Accountant, Count
from sparsereg.data.batches import call
from sparsereg.data.form import Inputs
from sparsereg.penalties import hard_concretes

log = logging.getLogger(__name__)


class PlainAccountant:
    """Counts a network without gates by running it: parameters, and MACs as torch.utils.flop_counter does.

    Args:
        model: without gates.
        example: one example.
    """

    def __init__(self, model: nn.Module, example: Inputs) -> None:
        self.parameters = sum(p.numel() for p in model.parameters())
        self.macs = _macs(model, example)

    def count(self) -> Count:
        """Count: nothing can go."""
        return Count(
            parameters=self.parameters,
            compacted_parameters=self.parameters,
            expected_parameters=float(self.parameters),
            macs=self.macs,
            compacted_macs=self.macs,
            expected_macs=float(self.macs),
            exact_sparsity=0.0,
            gates=0,
            open_gates=0,
            layers=(),
        )


@torch.no_grad()
def _macs(model: nn.Module, example: Inputs) -> int:
    modes = {m: m.training for m in model.modules()}
    counter: Any = FlopCounterMode(display=False)
    try:
        with sdpa_kernel(SDPBackend.MATH), counter:  # whose products are counted on any device
            call(model.eval(), example)
    finally:
        for module, mode in modes.items():
            module.training = mode
    return int(counter.get_total_flops()) // 2


def accountant_of(net: nn.Module, example: Inputs) -> Accountant | PlainAccountant:
    """Return what counts a network: without gates it need not be one that can be traced.

    Args:
        net: the network.
        example: one example.

    Raises:
        InputError: it has gates and cannot be traced.
    """
    if hard_concretes(net):
        return Accountant(net, example)
    try:
        return Accountant(net, example)
    except (ValueError, TypeError, RuntimeError, AttributeError, LookupError) as error:
        log.debug("counted without a trace, which fails: %s", error)
        return PlainAccountant(net, example)
