"""Gates on feature maps and dense units, and how they are folded into the layer before them.

A gate sits behind the normalisation (before it, the normalisation would divide the gate away) and
closes a channel to exactly zero, bias included. Where the activation is positively homogeneous
(ReLU, LeakyReLU), act(z x) = z act(x) for z >= 0, so a gate that is shared over the batch is folded
into the affine of the BatchNorm in front of it and costs no operation of the size of the activations.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsereg.device import several_processes
from sparsereg.distributions import TEMPERATURE, HardConcrete
from sparsereg.model.synchronised_batch_norm import batch_norm_over_processes
from sparsereg.penalties import GatedTensor, gated_tensors

SAMPLING = ("batch", "example")
HOMOGENEOUS = (nn.ReLU, nn.LeakyReLU, nn.Identity)
"""Activations with act(z x) = z act(x) for every z >= 0."""


class L0Gate(nn.Module):
    """Hard Concrete gates on one dimension of a tensor: the channels of a map, the units of a layer.

    Args:
        mask_dim: number of gates, the size of the gated dimension, >= 1.
        droprate_init: initial dropout rate in (0, 1): log_alpha starts at
            log(1 - droprate_init) - log(droprate_init). As in the paper this is the rate of the
            concrete variable before it is stretched; P(z > 0) starts higher (0.83 for 0.5).
        temperature: beta > 0.
        dim: the gated dimension of the input.
        sampling: ``batch`` draws each gate once for a whole batch, ``example`` once for each row of it.
        stretch: the interval is (-stretch, 1 + stretch).
        jitter: standard deviation of the noise on the initial location (0.01 in the paper's code).
        generator: source of that noise; PyTorch's default if None.

    Raises:
        ValueError: an argument is outside its range.

    Source: Louizos, Welling, Kingma 2018, section 4.1.
    """

    selection: Tensor | None = None
    """Positions of the input that still have a gate while others have left; see compression.shrink."""

    def __init__(
        self,
        mask_dim: int,
        droprate_init: float = 0.5,
        temperature: float = TEMPERATURE,
        *,
        dim: int = 1,
        sampling: str = "batch",
        stretch: float = 0.1,
        jitter: float = 0.01,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if not 0 < droprate_init < 1:
            raise ValueError(f"droprate_init must be a rate in (0, 1), got {droprate_init!r}")
        if sampling not in SAMPLING:
            raise ValueError(f"sampling must be one of {', '.join(SAMPLING)}, got {sampling!r}")
        self.dim = dim
        self.sampling = sampling
        self.gates = HardConcrete(
            mask_dim,
            temperature=temperature,
            stretch=stretch,
            log_alpha_init=math.log1p(-droprate_init) - math.log(droprate_init),
            jitter=jitter,
            generator=generator,
        )

    @property
    def per_example(self) -> bool:
        """Whether the next call draws gates for each row of the batch."""
        return self.training and self.sampling == "example"

    def forward(self, x: Tensor) -> Tensor:
        """Multiply the gated dimension by its gates.

        Args:
            x: any shape with size ``mask_dim`` at ``dim``.
        """
        if self.selection is not None:
            x = x.index_select(self.dim, self.selection)
        if self.per_example:
            z = self.gates.sample((x.shape[0],))
            shape = [1] * x.dim()
            shape[0], shape[self.dim] = x.shape[0], -1
        else:
            z = self.gates()
            shape = [1] * x.dim()
            shape[self.dim] = -1
        return x * z.to(x.dtype).view(shape)

    def extra_repr(self) -> str:
        """What print(module) shows."""
        return f"dim={self.dim}, sampling={self.sampling}"


class BatchNorm2d(nn.BatchNorm2d):
    """nn.BatchNorm2d that can take its statistics over the batches of several processes.

    Args:
        num_features: number of channels.
        eps: see nn.BatchNorm2d.
        momentum: see nn.BatchNorm2d.

    Set the attribute ``synchronised`` to True to use the other processes' examples, too.
    """

    def __init__(self, num_features: int, eps: float = 1e-5, momentum: float | None = 0.1) -> None:
        super().__init__(num_features, eps=eps, momentum=momentum)
        self.synchronised = False

    def forward(self, x: Tensor) -> Tensor:
        """Normalise a map of shape (batch, num_features, height, width)."""
        return self._normalise(x, self.weight, self.bias)

    def _normalise(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        self._check_input_dim(x)
        factor = self._count_batch()
        if self.training and self.synchronised and several_processes():
            return batch_norm_over_processes(x, weight, bias, self, factor)
        return F.batch_norm(
            x, self.running_mean, self.running_var, weight, bias, self.training, factor, self.eps
        )

    def _count_batch(self) -> float:
        """Advance num_batches_tracked and return the weight of this batch in the running mean."""
        if not self.training or self.num_batches_tracked is None:
            return 0.0
        self.num_batches_tracked.add_(1)
        # momentum None means a cumulative average, as in nn.BatchNorm2d.
        return 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum


class GatedBatchNorm2d(BatchNorm2d):
    """BatchNorm whose affine carries a gate: batch_norm(x; z weight, z bias).

    Equal to a gate behind the BatchNorm, and behind a positively homogeneous activation that follows
    it, but costs operations on vectors only. Its state dict is that of nn.BatchNorm2d plus ``gate.*``.

    Args:
        num_features: number of channels.
        gate: gates of the same number of channels on dimension 1.
        eps: see nn.BatchNorm2d.
        momentum: see nn.BatchNorm2d.

    Raises:
        ValueError: the gate has another size or dimension.
    """

    def __init__(
        self, num_features: int, gate: L0Gate, eps: float = 1e-5, momentum: float | None = 0.1
    ) -> None:
        super().__init__(num_features, eps=eps, momentum=momentum)
        if gate.gates.gate_size != (num_features,) or gate.dim != 1:
            raise ValueError(
                f"the gate must have {num_features} gates on dimension 1, got {gate.gates.gate_size}"
                f" on dimension {gate.dim}"
            )
        self.gate = gate

    def forward(self, x: Tensor) -> Tensor:
        """Normalise and gate a map of shape (batch, num_features, height, width)."""
        if self.gate.per_example:
            gated: Tensor = self.gate(super().forward(x))
            return gated
        z = self.gate.gates().to(self.weight.dtype)
        return self._normalise(x, self.weight * z, self.bias * z)


class ConvBlock(nn.Module):
    """Convolution, BatchNorm and activation, with a gate on the output channels if one is asked for.

    Args:
        in_channels: channels in.
        out_channels: channels out.
        kernel_size: edge of the kernel; the padding keeps the size of the map.
        act: the activation's class.
        gate: makes the gate for a number of channels; None leaves the block without.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        act: type[nn.Module] = nn.ReLU,
        gate: "GateFactory | None" = None,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2)
        fold = gate is not None and issubclass(act, HOMOGENEOUS)
        self.norm = (
            GatedBatchNorm2d(out_channels, gate(out_channels))
            if gate is not None and fold
            else nn.BatchNorm2d(out_channels)
        )
        self.act = act(inplace=True) if act is nn.ReLU else act()
        self.gate: nn.Module = gate(out_channels) if gate is not None and not fold else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(batch, in_channels, h, w) to (batch, out_channels, h, w)."""
        gated: Tensor = self.gate(self.act(self.norm(self.conv(x))))
        return gated


class GateFactory:
    """Makes equal L0Gates for layers of different sizes: the settings of L0Gate without mask_dim.

    Args:
        **settings: keyword arguments of ``L0Gate``.
    """

    def __init__(self, **settings: object) -> None:
        self.settings = settings

    def __call__(self, mask_dim: int) -> L0Gate:
        """Return a new gate for ``mask_dim`` channels."""
        return L0Gate(mask_dim, **self.settings)  # type: ignore[arg-type]


def synchronise_batch_norm(net: nn.Module) -> nn.Module:
    """Let every BatchNorm2d of a network take its statistics over all processes; keeps gates and names.

    Args:
        net: changed in place, except where it is itself an nn.BatchNorm2d.

    Returns:
        The network.
    """
    for name, child in net.named_children():
        setattr(net, name, synchronise_batch_norm(child))
    if type(net) is nn.BatchNorm2d:
        synchronised = BatchNorm2d(net.num_features, net.eps, net.momentum)
        synchronised.load_state_dict(net.state_dict())
        net = synchronised
    if isinstance(net, BatchNorm2d):
        net.synchronised = True
    return net


@gated_tensors.register
def _(module: GatedBatchNorm2d) -> list[GatedTensor]:
    gate = module.gate.gates
    return [GatedTensor(gate, module, name, 0) for name in ("weight", "bias")]


@gated_tensors.register
def _(module: ConvBlock) -> list[GatedTensor]:
    if not isinstance(module.norm, GatedBatchNorm2d):
        return []
    # Between the convolution and its gate stands the normalisation, which divides any scale away.
    gate = module.norm.gate.gates
    return [GatedTensor(gate, module.conv, name, 0, fold=False) for name in ("weight", "bias")]
