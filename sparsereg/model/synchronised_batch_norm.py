"""BatchNorm over the batches of all processes, on any device.

PyTorch's SyncBatchNorm runs on GPUs only, and its conversion would drop the gates of GatedBatchNorm2d.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class _SumOverProcesses(torch.autograd.Function):
    """All-reduce whose gradient is the sum of the gradients of all processes."""

    @staticmethod
    def forward(ctx: Any, local: Tensor) -> Tensor:
        total = local.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].contiguous().clone()
        dist.all_reduce(total)
        return total


def sum_over_processes(local: Tensor) -> Tensor:
    """Sum a tensor over all processes; differentiable in every process's part."""
    total: Tensor = _SumOverProcesses.apply(local)
    return total


def batch_norm_over_processes(
    x: Tensor, weight: Tensor, bias: Tensor, norm: nn.BatchNorm2d, factor: float
) -> Tensor:
    """Normalise by mean and variance over the examples of every process; differentiable in all of them.

    Args:
        x: (batch, channels, height, width); the batch may differ between processes.
        weight: affine weight (channels,).
        bias: affine bias (channels,).
        norm: holds the running statistics and eps.
        factor: weight of this batch in the running statistics.
    """
    wide = x if x.dtype == torch.float64 else x.float()
    count = wide.new_full((1,), x.numel() / x.shape[1])
    # The squares are taken about the running mean, so that the difference of squares keeps its digits.
    pivot = norm.running_mean if norm.running_mean is not None else x.new_zeros(x.shape[1])
    centred = wide - pivot.view(1, -1, 1, 1)
    local = torch.cat([centred.sum((0, 2, 3)), centred.square().sum((0, 2, 3)), count])
    total = sum_over_processes(local)
    channels = x.shape[1]
    n = total[-1]
    offset = total[:channels] / n
    variance = (total[channels:-1] / n - offset.square()).clamp_min(0)
    mean = offset + pivot
    if norm.running_mean is not None and norm.running_var is not None:
        with torch.no_grad():
            norm.running_mean.lerp_(mean.to(norm.running_mean), factor)
            norm.running_var.lerp_((variance * n / (n - 1)).to(norm.running_var), factor)
    scale = weight * torch.rsqrt(variance + norm.eps)
    shift = bias - mean * scale
    return torch.addcmul(shift.view(1, -1, 1, 1), wide, scale.view(1, -1, 1, 1)).to(x.dtype)
