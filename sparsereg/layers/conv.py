"""Convolutions with a gate on every weight or on every channel."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsereg.checks import check_count
from sparsereg.distributions import HardConcrete
from sparsereg.layers.gated import GatedLayer, gate_mean, reset_


class L0Conv2d(GatedLayer):
    """Convolution with a gate on every weight, or with ``structured`` on every output channel.

    A closed channel emits exactly zero, its bias included, so that it can be cut out.

    Args:
        in_channels: channels in, >= 1.
        out_channels: channels out, >= 1.
        kernel_size: edge of the kernel, or (height, width), >= 1.
        stride: as in nn.Conv2d, >= 1.
        padding: as in nn.Conv2d, >= 0, or ``same`` or ``valid``.
        bias: whether there is a bias.
        temperature: beta > 0.
        init_sparsity: share of the gates that start closed, 1 - P(z > 0), in (0, 1).
        structured: gates on channels (``channel_gates``) instead of weights (``weight_gates``).
        use_l2: whether ``get_l2_penalty`` counts the weights.
        generator: source of the initial weights; PyTorch's default if None.

    Raises:
        ValueError: an argument is outside its range.

    Example:
        >>> L0Conv2d(3, 8, kernel_size=3, padding=1)(torch.ones(2, 3, 6, 6)).shape
        torch.Size([2, 8, 6, 6])
    """

    weight_gates: HardConcrete
    channel_gates: HardConcrete

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        bias: bool = True,
        temperature: float = 0.5,
        init_sparsity: float = 0.5,
        structured: bool = False,
        use_l2: bool = False,
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        height, width = _pair("kernel_size", kernel_size)
        _pair("stride", stride)
        _check_padding(padding)
        in_channels = check_count("in_channels", in_channels)
        out_channels = check_count("out_channels", out_channels)
        size = (out_channels,) if structured else (out_channels, in_channels * height * width)
        gate = HardConcrete(*size, temperature=temperature, init_mean=gate_mean(init_sparsity))
        super().__init__("channel_gates" if structured else "weight_gates", gate, use_l2)
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = (height, width)
        self.stride = stride
        self.padding = padding
        self.structured = structured
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, height, width))
        self.bias = nn.Parameter(torch.empty(out_channels)) if bias else None
        self.reset_parameters(generator)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw new weights and biases; the gates stay."""
        reset_(self.weight, self.bias, generator)

    def forward(self, input: Tensor) -> Tensor:
        """(batch, in_channels, h, w) to (batch, out_channels, h', w')."""
        weight, bias = self.gated()
        return F.conv2d(input, weight, bias, self.stride, self.padding)

    def plain(self) -> nn.Conv2d:
        """An nn.Conv2d with the same output in eval mode."""
        sizes = (self.in_channels, self.out_channels, self.kernel_size, self.stride, self.padding)
        layer = nn.Conv2d(*sizes, bias=self.bias is not None)
        self._fill(layer)
        return layer

    def extra_repr(self) -> str:
        """What print(module) shows."""
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}, padding={self.padding}, structured={self.structured}"
        )


class L0DepthwiseConv2d(GatedLayer):
    """Depthwise convolution (one kernel for each channel) with a gate on every channel.

    A closed channel emits exactly zero, its bias included.

    Args:
        in_channels: channels in and out, >= 1.
        kernel_size: edge of the kernel, or (height, width), >= 1.
        stride: as in nn.Conv2d, >= 1.
        padding: as in nn.Conv2d, >= 0, or ``same`` or ``valid``.
        bias: whether there is a bias.
        temperature: beta > 0.
        init_sparsity: share of the gates that start closed, 1 - P(z > 0), in (0, 1).
        use_l2: whether ``get_l2_penalty`` counts the weights.

    Raises:
        ValueError: an argument is outside its range.

    Example:
        >>> L0DepthwiseConv2d(3, kernel_size=3, padding=1)(torch.ones(2, 3, 6, 6)).shape
        torch.Size([2, 3, 6, 6])
    """

    channel_gates: HardConcrete

    def __init__(
        self,
        in_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        bias: bool = True,
        temperature: float = 0.5,
        init_sparsity: float = 0.5,
        use_l2: bool = False,
    ) -> None:
        height, width = _pair("kernel_size", kernel_size)
        _pair("stride", stride)
        _check_padding(padding)
        in_channels = check_count("in_channels", in_channels)
        gate = HardConcrete(in_channels, temperature=temperature, init_mean=gate_mean(init_sparsity))
        super().__init__("channel_gates", gate, use_l2)
        self.in_channels = in_channels
        self.kernel_size = (height, width)
        self.stride = stride
        self.padding = padding
        self.depthwise_conv = nn.Conv2d(
            in_channels, in_channels, (height, width), stride, padding, groups=in_channels, bias=bias
        )

    @property
    def gated_weight(self) -> nn.Parameter:
        """The kernels, of shape (in_channels, 1, height, width)."""
        return self.depthwise_conv.weight  # type: ignore[return-value]

    @property
    def _plain_bias(self) -> nn.Parameter | None:
        return self.depthwise_conv.bias  # type: ignore[return-value]

    def forward(self, input: Tensor) -> Tensor:
        """(batch, in_channels, h, w) to (batch, in_channels, h', w')."""
        weight, bias = self.gated()
        return F.conv2d(input, weight, bias, self.stride, self.padding, groups=self.in_channels)

    def plain(self) -> nn.Conv2d:
        """A grouped nn.Conv2d with the same output in eval mode."""
        n = self.in_channels
        bias = self._plain_bias is not None
        layer = nn.Conv2d(n, n, self.kernel_size, self.stride, self.padding, groups=n, bias=bias)
        self._fill(layer)
        return layer


def _pair(name: str, value: Any) -> tuple[int, int]:
    """One number >= 1 for both dimensions, or two."""
    numbers = value if isinstance(value, (tuple, list)) else (value, value)
    if len(numbers) != 2:
        raise ValueError(f"{name} must be one or two integers, got {value!r}")
    return check_count(name, numbers[0]), check_count(name, numbers[1])


def _check_padding(padding: Any) -> None:
    """Check that nn.Conv2d would take it; that one finds out in the first forward pass."""
    numbers = padding if isinstance(padding, (tuple, list)) else (padding,)
    if padding in ("same", "valid") or (len(numbers) <= 2 and all(_is_size(n) for n in numbers)):
        return
    raise ValueError(f"padding must be one or two integers >= 0, 'same' or 'valid', got {padding!r}")


def _is_size(n: Any) -> bool:
    return isinstance(n, int) and not isinstance(n, bool) and n >= 0
