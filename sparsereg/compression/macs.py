"""Multiply-accumulate operations, also those that torch.utils.flop_counter does not see."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from sparsereg.compression.running import without_fused_attention

aten = torch.ops.aten


def _size(shape: Any) -> int:
    return int(math.prod(shape))


def _matrix_times_vector(matrix: Any, vector: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * _size(matrix)


def _added_matrix_times_vector(add: Any, matrix: Any, vector: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * _size(matrix)


def _dot(a: Any, b: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * _size(a)


def _added_batch_of_products(add: Any, a: Any, b: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * _size(a) * int(b[2])


def _bilinear(x: Any, weight: Any, y: Any, *args: Any, **kwargs: Any) -> int:
    """Shapes as F.bilinear hands them on: (examples, in1), (out, in1, in2), (examples, in2)."""
    return 2 * int(x[0]) * _size(weight)


def _attention(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    """Shapes (batch, heads, length, size); a causal mask is not taken off."""
    return 2 * _size(query[:-1]) * int(key[-2]) * int(query[-1] + value[-1])


def _deformable(x: Any, weight: Any, *args: Any, out_shape: Any, **kwargs: Any) -> int:
    """As a convolution of the same kernel: reading between the places of a map is counted nowhere."""
    return 2 * _size(out_shape) * _size(weight[1:])


FORMULAS: dict[Any, Callable[..., int]] = {
    aten.mv: _matrix_times_vector,
    aten.addmv: _added_matrix_times_vector,
    aten.dot: _dot,
    aten.vdot: _dot,
    aten.addbmm: _added_batch_of_products,
    aten._trilinear: _bilinear,
    # Until 2.12 at least, torch counts attention on other devices than the CPU only.
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
}
"""Floating-point operations from the shapes of the arguments, two for each multiply-accumulate operation."""


@contextmanager
def counting() -> Iterator[FlopCounterMode]:
    """Count floating-point operations; attention does not take its fused paths, of which nothing is seen."""
    formulas = dict(FORMULAS)
    if hasattr(torch.ops.torchvision, "deform_conv2d"):  # only once torchvision is imported
        formulas[torch.ops.torchvision.deform_conv2d] = _deformable
    with without_fused_attention(), FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        yield counter
