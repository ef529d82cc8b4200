"""Adam for vectors next to compiled loops: the steps of torch.optim.Adam, without its overhead."""

import math

import torch
from torch import Tensor

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8
"""Constants of Adam (Kingma and Ba, 2015)."""


@torch.no_grad()
def adam_step(
    value: Tensor,
    gradient: Tensor,
    first: Tensor,
    second: Tensor,
    step: int,
    lr: float,
    buffer: Tensor | None = None,
) -> None:
    """Move a vector by its gradient, in place.

    Source: Kingma, Ba, "Adam: A Method for Stochastic Optimization", ICLR 2015, algorithm 1.

    Args:
        value: What is moved.
        gradient: Of what is minimised, in the shape of ``value``.
        first: Moving average of the gradients; 0 before the first step.
        second: Moving average of their squares; 0 before the first step.
        step: Number of this step, from 1.
        lr: Learning rate > 0.
        buffer: Memory for one intermediate result in the shape of ``value``; None takes some.
    """
    first.lerp_(gradient, 1.0 - BETA1)
    second.mul_(BETA2).addcmul_(gradient, gradient, value=1.0 - BETA2)
    root = torch.sqrt(second, out=buffer)
    root.div_(math.sqrt(1.0 - BETA2**step)).add_(EPSILON)
    value.addcdiv_(first, root, value=-lr / (1.0 - BETA1**step))
