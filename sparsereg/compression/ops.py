"""How channels pass through the operations of a network.

One class for each kind of operation. Each knows three things: which output channels are constant
when some input channels are (``forward``), which input channels must be there for given output
channels (``needs``), and what it costs with given channels (``num_parameters``, ``num_macs``).

Everything is about the feature dimension of a tensor, dimension 1: the channels of a map, the units
of a layer. A channel is *constant* if it has one value for every input and at every position.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sparsereg.distributions import HardConcrete, gate_median

Mask = NDArray[np.bool_]
Vector = NDArray[np.float64]

SMALLEST_FOLD = 1e-4
"""Smaller open gates are not folded into running statistics, where their inverse square would stand."""


@dataclass(eq=False)
class Channels:
    """What is known about the feature dimension of one tensor.

    Attributes:
        const: the value of a constant channel, NaN for a channel that depends on the input.
        scale: true value / value of the rebuilt network: an open gate that a later layer will absorb.
    """

    const: Vector
    scale: Vector

    @property
    def live(self) -> Mask:
        """Channels that depend on the input."""
        return np.isnan(self.const)


class Values:
    """The numbers of a network at one moment, in float64 on the CPU, each read at most once.

    A gate is zero exactly where the network's own evaluation makes it zero.

    Args:
        gates: every Hard Concrete tensor that the network reads.
        pins: closed channels, by the name of their tensor, that are to stay as if they were open.
    """

    def __init__(self, gates: Sequence[HardConcrete], pins: Mapping[str, Mask] | None = None) -> None:
        self.pins = {} if pins is None else pins
        self._arrays: dict[int, Vector] = {}
        self._gates: dict[int, Vector] = {}
        groups: dict[tuple[Any, ...], list[HardConcrete]] = {}
        for gate in gates:
            key = (gate.temperature, gate.gamma, gate.zeta, gate.log_alpha.dtype, gate.log_alpha.device)
            groups.setdefault(key, []).append(gate)
        for (*shape, _, _), members in groups.items():
            end_to_end = torch.cat([g.log_alpha.detach().flatten() for g in members])
            shut = gate_median(end_to_end, *shape) == 0
            z = gate_median(end_to_end.double(), *shape).masked_fill(shut, 0.0).cpu().numpy()
            first = 0
            for gate in members:
                last = first + gate.log_alpha.numel()
                self._gates[id(gate)] = z[first:last]
                first = last

    def gate(self, gates: Sequence[HardConcrete], size: int) -> Vector:
        """Product of the test-time gates of some tensors of the same size; ones for none."""
        z = np.ones(size)
        for gate in gates:
            z = z * self._gates[id(gate)]
        return z

    def array(self, tensor: Tensor) -> Vector:
        """A weight or statistic as a flat array."""
        found = self._arrays.get(id(tensor))
        if found is None:
            found = tensor.detach().flatten().double().cpu().numpy()
            self._arrays[id(tensor)] = found
        return found


class Op:
    """A tensor of the network and the operation that makes it. The base class keeps everything.

    It stands for every operation that is not understood any better: its inputs are handed over
    complete, as the network itself would, and its output is taken as it comes.

    Args:
        name: name of the tensor, unique.
        inputs: names of the tensors that it reads.
        shape: shape of the tensor for a batch of examples; None if it is a tuple of tensors.
        module: the module that makes it, if one does.
        path: the module's name in the network.
        macs: multiply-accumulate operations for one example.
    """

    kind = "other"

    def __init__(
        self,
        name: str,
        inputs: Sequence[str],
        shape: tuple[int, ...] | None,
        module: nn.Module | None = None,
        path: str = "",
        macs: int = 0,
    ) -> None:
        self.name = name
        self.inputs = list(inputs)
        self.shape = shape
        self.module = module
        self.path = path
        self.macs = macs
        self.width = shape[1] if shape is not None and len(shape) > 1 else 1
        self.input_widths: list[int] = []
        self.gates: list[HardConcrete] = []
        self.owns_parameters = True

    def forward(self, inputs: Sequence[Channels], values: Values) -> Channels:
        """Constant channels and open factors of the output."""
        return _live(self.width)

    def keep(self, need: Mask) -> Mask:
        """The channels to keep so that those in ``need`` are there; at least these."""
        return np.ones(self.width, dtype=bool)

    def needs(self, kept: Mask, inputs: Sequence[Channels], values: Values) -> list[Mask | None]:
        """For each input the channels that must be there; None where the input itself need not."""
        return [np.ones(width, dtype=bool) for width in self.input_widths]

    def reads(
        self, kept: Mask, inputs: Sequence[Channels], values: Values, there: Sequence[Mask]
    ) -> list[Mask | None]:
        """The channels read from each input, of those that are ``there``: those that it needs."""
        return self.needs(kept, inputs, values)

    def num_parameters(self, read: Sequence[Mask | None], kept: Mask) -> int:
        """Parameters that are left with these input and output channels."""
        if self.module is None or not self.owns_parameters:
            return 0
        return sum(p.numel() for p in own_parameters(self.module))

    def num_macs(self, read: Sequence[Mask | None], kept: Mask) -> int:
        """Multiply-accumulate operations for one example with these input and output channels."""
        return self.macs

    def num_constants(self, read: Sequence[Mask | None], kept: Mask, inputs: Sequence[Channels]) -> int:
        """Parameters that come in for constants of inputs that are not read."""
        return 0

    @property
    def all_gates(self) -> list[HardConcrete]:
        """The gates that decide about this operation."""
        return self.gates

    def gate_values(self, values: Values) -> Vector:
        """Product of the gates that are folded into this operation."""
        return values.gate(self.gates, self.width)


def own_parameters(module: nn.Module) -> list[nn.Parameter]:
    """Parameters of a module and its parts without the locations of gates."""
    gates = {id(m.log_alpha) for m in module.modules() if isinstance(m, HardConcrete)}
    return [p for p in module.parameters() if id(p) not in gates]


def _live(width: int) -> Channels:
    return Channels(np.full(width, np.nan), np.ones(width))


def _shut(const: Vector, z: Vector, pinned: Mask | None) -> Vector:
    """Multiply constants by gates; a closed gate makes a constant zero unless it is pinned."""
    closed = z == 0
    const = const * z
    const[closed] = 0.0
    if pinned is not None:
        const[closed & pinned] = np.nan
    return const


class Input(Op):
    """An input of the network: its shape is the user's, unread channels are left out behind it."""

    kind = "input"

    def keep(self, need: Mask) -> Mask:
        """Only what is read."""
        return need


class Attribute(Op):
    """A parameter or buffer that the network reads directly."""

    kind = "attribute"

    def __init__(self, name: str, tensor: Tensor, path: str) -> None:
        super().__init__(name, (), tuple(tensor.shape), path=path)
        self.tensor = tensor

    def num_parameters(self, read: Sequence[Mask | None], kept: Mask) -> int:
        """All of it."""
        return self.tensor.numel() if isinstance(self.tensor, nn.Parameter) else 0


class Output(Op):
    """What the network returns: complete, in the user's order."""

    kind = "output"


class Mixing(Op):
    """Convolution (also grouped, depthwise, transposed) or linear layer: mixes the channels of a group.

    Gates that follow it with only positively homogeneous operations in between are its ``gates``: they
    multiply its rows and bias.

    Args:
        layer: a layer of PyTorch with the same settings, if the module is not one itself.
        holder: the module that holds weight and bias, if that is another one.
        weight_gate: gates of the weights, one for each.
    """

    kind = "mixing"

    def __init__(
        self,
        *args: Any,
        layer: nn.Module | None = None,
        holder: nn.Module | None = None,
        weight_gate: HardConcrete | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        assert self.module is not None
        self.layer = self.module if layer is None else layer
        self.holder = self.module if holder is None else holder
        self.weight_gate = weight_gate
        self.groups: int = getattr(self.layer, "groups", 1)
        self.transposed: bool = getattr(self.layer, "transposed", False)
        self.taps = math.prod(self.weight.shape[2:])
        self.in_group = self.weight.shape[0 if self.transposed else 1]
        if self.transposed:
            self.in_group //= self.groups
        self.out_group = self.width // self.groups
        self.steady = self._steady(self.layer)
        self.absorber: str | None = None
        self.macs_per_weight = self.macs / (self.width * self.in_group)

    @property
    def weight(self) -> Tensor:
        """The weights as they are now."""
        return self.holder.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        """The bias as it is now."""
        return self.holder.bias  # type: ignore[return-value]

    @property
    def all_gates(self) -> list[HardConcrete]:
        """Gates of its channels and of its weights."""
        return self.gates if self.weight_gate is None else [*self.gates, self.weight_gate]

    def _steady(self, layer: nn.Module) -> bool:
        """Whether a constant that is not zero gives a constant output at every position."""
        if isinstance(layer, nn.Linear):
            return True
        if not self.transposed and getattr(layer, "padding_mode", "zeros") != "zeros":
            return True
        padding = layer.padding
        padded = padding == "same" if isinstance(padding, str) else any(padding)  # type: ignore[arg-type]
        if self.transposed:
            return self.taps == 1 and not padded and all(s == 1 for s in layer.stride)  # type: ignore[union-attr]
        return not padded or (self.taps == 1 and padding == "same")

    def folds(self, channels: Channels) -> Mask:
        """Input channels that need not be read: what they contribute is a constant."""
        live = channels.live
        return ~live if self.steady else ~live & (channels.const == 0)

    def connected(self, values: Values) -> Mask:
        """Which weights are not behind a closed gate of their own, (out, in); without groups."""
        assert self.weight_gate is not None
        z = values.gate([self.weight_gate], self.weight.numel())
        return np.asarray((z != 0).reshape(self.width, self.in_group, self.taps).any(axis=-1))

    def forward(self, inputs: Sequence[Channels], values: Values) -> Channels:
        """Constant where all the inputs of a group are; a closed gate makes its row constant zero."""
        const = np.full(self.width, np.nan)
        rows = self._dead_rows(inputs[0], values)
        if rows.any():
            folded = self.folds(inputs[0])
            total = self.contribution(np.where(folded, inputs[0].const, 0.0), values)
            if self.bias is not None:
                total = total + values.array(self.bias)
            const[rows] = total[rows]
        if self.gates:
            const = _shut(const, self.gate_values(values), values.pins.get(self.name))
        return Channels(const, np.ones(self.width))

    def _dead_rows(self, channels: Channels, values: Values) -> Mask:
        """Output channels that read nothing but constants."""
        folded = self.folds(channels)
        if self.weight_gate is not None:
            return np.asarray(~self.connected(values)[:, ~folded].any(axis=1))
        if not folded.any():
            return np.zeros(self.width, dtype=bool)
        dead = folded.reshape(self.groups, self.in_group).all(axis=1)
        return np.asarray(dead).repeat(self.out_group)

    def contribution(self, const: Vector, values: Values) -> Vector:
        """What constant input channels add to every output channel; (in,) to (out,)."""
        if not const.any():
            return np.zeros(self.width)
        weight = self.oriented(values).sum(axis=-1)
        grouped = const.reshape(self.groups, 1, self.in_group)
        return np.asarray((weight * grouped).sum(axis=-1).reshape(-1))

    def oriented(self, values: Values) -> NDArray[np.float64]:
        """The weights as (groups, out of a group, in of a group, taps)."""
        w = values.array(self.weight)
        if self.weight_gate is not None:
            w = w * values.gate([self.weight_gate], len(w))
        if self.transposed:
            return w.reshape(self.groups, self.in_group, self.out_group, self.taps).swapaxes(1, 2)
        return w.reshape(self.groups, self.out_group, self.in_group, self.taps)

    def keep(self, need: Mask) -> Mask:
        """The needed channels; groups stay equally large."""
        return need if self.groups == 1 else _even(need, self.groups)

    def needs(self, kept: Mask, inputs: Sequence[Channels], values: Values) -> list[Mask | None]:
        """Every input that is not a constant to fold, of the groups that are left."""
        need = ~self.folds(inputs[0])
        if self.weight_gate is not None:
            need &= self.connected(values)[kept].any(axis=0)
        if self.groups == 1:
            return [need]
        alive = kept.reshape(self.groups, -1).any(axis=1)
        need = need.reshape(self.groups, -1)
        need[~alive] = False
        # A group that is left keeps one input, even if that is a constant: a convolution has no empty group.
        need[alive & ~need.any(axis=1), 0] = True
        return [_even(need.reshape(-1), self.groups)]

    def reads(
        self, kept: Mask, inputs: Sequence[Channels], values: Values, there: Sequence[Mask]
    ) -> list[Mask | None]:
        """Everything that is there, so that no selection has to be copied; of groups, what is needed."""
        return [there[0]] if self.groups == 1 else self.needs(kept, inputs, values)

    def folded(self, read: Mask, channels: Channels) -> Vector:
        """The constants that are added to the bias, for the input channels that are not read."""
        return np.where(self.folds(channels) & ~read, channels.const, 0.0)

    def num_parameters(self, read: Sequence[Mask | None], kept: Mask) -> int:
        """Weights and the bias, if it has one."""
        weights = self._weights(read, kept) * self.taps
        return weights + (int(kept.sum()) if self.bias is not None else 0)

    def num_constants(self, read: Sequence[Mask | None], kept: Mask, inputs: Sequence[Channels]) -> int:
        """A bias where there was none, unless the BatchNorm behind takes it."""
        assert read[0] is not None
        if self.bias is not None or self.absorber is not None:
            return 0
        return int(kept.sum()) if self.folded(read[0], inputs[0]).any() else 0

    def num_macs(self, read: Sequence[Mask | None], kept: Mask) -> int:
        """Weights times the positions at which they are applied."""
        return round(self._weights(read, kept) * self.macs_per_weight)

    def _weights(self, read: Sequence[Mask | None], kept: Mask) -> int:
        assert read[0] is not None
        if self.groups == 1:
            return int(read[0].sum()) * int(kept.sum())
        alive = int(kept.reshape(self.groups, -1).any(axis=1).sum())
        return int(kept.sum()) * int(read[0].sum()) // max(alive, 1)


def _even(need: Mask, groups: int) -> Mask:
    """Enlarge a mask so that every group that has any channel has the same number."""
    grouped = need.reshape(groups, -1).copy()
    counts = grouped.sum(axis=1)
    most = counts.max()
    for g in np.flatnonzero((counts > 0) & (counts < most)):
        spare = np.flatnonzero(~grouped[g])[: most - counts[g]]
        grouped[g, spare] = True
    return grouped.reshape(-1)


class Norm(Op):
    """BatchNorm in eval mode: an affine map of every channel, with gates folded into weight and bias."""

    kind = "norm"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        assert isinstance(self.module, nn.modules.batchnorm._BatchNorm)
        self.norm = self.module
        self.tracks = self.norm.running_mean is not None

    def affine(self, values: Values) -> tuple[Vector, Vector]:
        """Slope and intercept of every channel, without gates."""
        norm = self.norm
        weight = values.array(norm.weight) if norm.affine else np.ones(self.width)
        bias = values.array(norm.bias) if norm.affine else np.zeros(self.width)
        if norm.running_mean is None or norm.running_var is None:
            return weight, bias
        slope = weight / np.sqrt(values.array(norm.running_var) + norm.eps)
        return slope, bias - slope * values.array(norm.running_mean)

    def forward(self, inputs: Sequence[Channels], values: Values) -> Channels:
        """A constant stays one, usually another; a closed gate makes it zero."""
        const = inputs[0].const
        if not np.isnan(const).all():
            slope, intercept = self.affine(values)
            # Without running statistics a constant is its own mean.
            const = slope * const + intercept if self.tracks else np.where(np.isnan(const), const, intercept)
        if self.gates:
            const = _shut(const, self.gate_values(values), values.pins.get(self.name))
        return Channels(const, np.ones(self.width))

    def keep(self, need: Mask) -> Mask:
        """The needed channels."""
        return need

    def needs(self, kept: Mask, inputs: Sequence[Channels], values: Values) -> list[Mask | None]:
        """Channel by channel."""
        return [kept]

    def num_parameters(self, read: Sequence[Mask | None], kept: Mask) -> int:
        """Weight and bias of the channels that are left."""
        return 2 * int(kept.sum()) if self.norm.affine else 0


class Gate(Op):
    """A gate that no earlier layer could absorb: a factor that a later layer absorbs."""

    kind = "gate"

    def forward(self, inputs: Sequence[Channels], values: Values) -> Channels:
        """A closed gate makes zero, an open one a factor."""
        z = self.gate_values(values)
        return Channels(_shut(inputs[0].const, z, values.pins.get(self.name)), inputs[0].scale * z)

    def keep(self, need: Mask) -> Mask:
        """The needed channels."""
        return need

    def needs(self, kept: Mask, inputs: Sequence[Channels], values: Values) -> list[Mask | None]:
        """Channel by channel."""
        return [kept]

    def num_parameters(self, read: Sequence[Mask | None], kept: Mask) -> int:
        """None: locations of gates are not counted."""
        return 0


class PerChannel(Op):
    """An operation that treats every channel by itself and alike: activation, pooling, dropout.

    Args:
        apply: the operation on a float64 tensor of shape (1, channels, ...).
        homogeneous: whether f(z x) = z f(x) for every z >= 0.
        input_shape: shape of its input.
        any_size: whether its input may get other positions than those.
        passing: whether nothing of it is left in the compacted network.
        drops: for a dropout function, the module that does the same in training.
    """

    kind = "per channel"

    def __init__(
        self,
        *args: Any,
        apply: Callable[[Tensor], Tensor],
        homogeneous: bool,
        input_shape: tuple[int, ...],
        any_size: bool = False,
        passing: bool = False,
        drops: type[nn.Module] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.passing = passing
        self.drops = drops
        self.apply = apply
        self.homogeneous = homogeneous
        self.positions = input_shape[2:]
        self.any_size = any_size and not passing
        self.of_zero = self._constant(np.zeros(1))[0]

    def _constant(self, const: Vector) -> Vector:
        """What it makes of constant channels; NaN where that is not the same at every position and size."""
        made = self._applied(const, self.positions)
        if self.any_size and self.positions:
            # Large enough that a border cannot be all there is; a sum over positions differs, too.
            made = np.concatenate([made, self._applied(const, [n + 8 for n in self.positions])], axis=1)
        same = np.ptp(made, axis=1) <= 1e-12 * np.abs(made).max(axis=1)
        return np.where(same, made[:, 0], np.nan)

    def _applied(self, const: Vector, positions: Sequence[int]) -> Vector:
        x = torch.from_numpy(const).view(1, -1, *(1,) * len(positions))
        with torch.no_grad():
            y = self.apply(x.expand(1, -1, *positions).clone())
        return np.asarray(y.reshape(len(const), -1).numpy())

    def forward(self, inputs: Sequence[Channels], values: Values) -> Channels:
        """A constant stays one unless padding makes it differ at the border."""
        const = inputs[0].const.copy()
        const[const == 0] = self.of_zero
        nonzero = np.flatnonzero(~np.isnan(inputs[0].const) & (inputs[0].const != 0))
        if len(nonzero):
            const[nonzero] = self._constant(inputs[0].const[nonzero])
        scale = inputs[0].scale if self.homogeneous else np.ones(self.width)
        return Channels(const, scale)

    def keep(self, need: Mask) -> Mask:
        """The needed channels."""
        return need

    def needs(self, kept: Mask, inputs: Sequence[Channels], values: Values) -> list[Mask | None]:
        """Channel by channel."""
        return [kept]


class Slopes(PerChannel):
    """PReLU with one slope for each channel."""

    kind = "slopes"

    def _constant(self, const: Vector) -> Vector:
        return np.full(len(const), np.nan)

    def forward(self, inputs: Sequence[Channels], values: Values) -> Channels:
        """A constant is multiplied by its slope if negative."""
        assert isinstance(self.module, nn.PReLU)
        const, slopes = inputs[0].const, values.array(self.module.weight)
        return Channels(np.where(const < 0, slopes * const, const), inputs[0].scale)

    def num_parameters(self, read: Sequence[Mask | None], kept: Mask) -> int:
        """One slope for each channel that is left."""
        return int(kept.sum())


class Reshape(Op):
    """A change of shape that keeps channels apart; flattening puts their positions side by side.

    Args:
        input_shape: shape of its input.
        sized: whether the number of channels may be written into the network's code.
    """

    kind = "reshape"

    def __init__(self, *args: Any, input_shape: tuple[int, ...], sized: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.sized = sized
        self.spread = self.width // input_shape[1]

    def forward(self, inputs: Sequence[Channels], values: Values) -> Channels:
        """Every channel becomes as many features as it had positions."""
        return Channels(inputs[0].const.repeat(self.spread), inputs[0].scale.repeat(self.spread))

    def keep(self, need: Mask) -> Mask:
        """The needed features."""
        return need

    def needs(self, kept: Mask, inputs: Sequence[Channels], values: Values) -> list[Mask | None]:
        """A channel if any of its features is needed."""
        return [np.asarray(kept.reshape(-1, self.spread).any(axis=1))]


class Cat(Op):
    """Concatenation of channels."""

    kind = "cat"

    def forward(self, inputs: Sequence[Channels], values: Values) -> Channels:
        """Side by side."""
        return Channels(np.concatenate([c.const for c in inputs]), np.concatenate([c.scale for c in inputs]))

    def keep(self, need: Mask) -> Mask:
        """The needed channels."""
        return need

    def needs(self, kept: Mask, inputs: Sequence[Channels], values: Values) -> list[Mask | None]:
        """Each input its part; an input of which nothing is needed can go."""
        parts = np.split(kept, np.cumsum(self.input_widths)[:-1])
        return [part if part.any() else None for part in parts]


class Add(Op):
    """Sum or difference of two tensors with the same channels: both must keep the same ones.

    Args:
        sign: -1 for a difference.
    """

    kind = "add"

    def __init__(self, *args: Any, sign: float = 1.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.sign = sign

    def forward(self, inputs: Sequence[Channels], values: Values) -> Channels:
        """Constant where both are."""
        a, b = inputs
        return Channels(a.const + self.sign * b.const, np.ones(self.width))

    def keep(self, need: Mask) -> Mask:
        """The needed channels."""
        return need

    def needs(self, kept: Mask, inputs: Sequence[Channels], values: Values) -> list[Mask | None]:
        """Both inputs, channel by channel; an input that is constant throughout becomes a vector."""
        return [kept if c.live[kept].any() else None for c in inputs]

    def num_constants(self, read: Sequence[Mask | None], kept: Mask, inputs: Sequence[Channels]) -> int:
        """A vector for an input that is constant throughout, unless it is zero."""
        vectors = [c.const[kept] for c, mask in zip(inputs, read, strict=True) if mask is None]
        return sum(int(kept.sum()) for v in vectors if v.any())


class Mul(Op):
    """Product of two tensors with the same channels, such as squeeze and excitation."""

    kind = "mul"

    def forward(self, inputs: Sequence[Channels], values: Values) -> Channels:
        """Zero where one is zero, constant where both are."""
        a, b = inputs
        const = a.const * b.const
        const[(a.const == 0) | (b.const == 0)] = 0.0
        return Channels(const, np.ones(self.width))

    def keep(self, need: Mask) -> Mask:
        """The needed channels."""
        return need

    def needs(self, kept: Mask, inputs: Sequence[Channels], values: Values) -> list[Mask | None]:
        """Both inputs, channel by channel; an input that is constant throughout becomes a vector."""
        return [kept if c.live[kept].any() else None for c in inputs]

    def num_constants(self, read: Sequence[Mask | None], kept: Mask, inputs: Sequence[Channels]) -> int:
        """A vector for an input that is constant throughout."""
        return sum(int(kept.sum()) for mask in read if mask is None)
