"""Smaller networks while training: channels whose gates are shut for good leave, and come back afterwards.

Unlike ``sparsereg.compression.compact``, which builds another network, this works on the live one in
place: parameters, buffers, gates and the optimizer's moments are cut down to the channels that are left,
so that each step costs less, and ``Shrunk.expand_`` puts them back into tensors of the original size.
Whoever looks at the network then (validation, checkpoints, counting) sees the original one, in which the
channels that had left are shut. Removing them changes neither outputs nor gradients of the others: only
channels that are zero whatever the weights are, and what serves only them, leave.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sparsereg.compression.graph import Network
from sparsereg.compression.ops import (
    Add,
    Cat,
    Gate,
    Input,
    Mask,
    Mixing,
    Mul,
    Norm,
    Op,
    PerChannel,
    Reshape,
    Slopes,
)
from sparsereg.distributions import HardConcrete
from sparsereg.model.basic_l0_blocks import L0Gate

SHUT = -20.0
"""Location of a gate that is shut for good: P(z > 0) < 1e-6 at every temperature up to 2."""


@torch.no_grad()
def shut_for_good_(gates: Iterable[HardConcrete], threshold: float) -> int:
    """Move gates that hardly ever open to where they never will, all but the last one of each tensor.

    Args:
        gates: changed in place.
        threshold: gates with P(z > 0) below this are shut; in (0, 0.5).

    Returns:
        The number of gates that are shut for good now.
    """
    total = 0
    for gate in gates:
        shut = gate.p_active() < threshold
        if shut.all():
            shut.view(-1)[gate.log_alpha.argmax()] = False
        gate.log_alpha.masked_fill_(shut, SHUT)
        total += int(is_shut(gate).sum())
    return total


def is_shut(gate: HardConcrete) -> Tensor:
    """Which gates are shut for good. One whose channel cannot leave is trained on and may drift a little."""
    return gate.log_alpha.detach() < SHUT + 1


def plan(network: Network) -> dict[str, Mask]:
    """Find the channels of each tensor that stay while gates at ``SHUT`` are taken out.

    Every tensor keeps at least one channel, also behind gates that are all shut. Open gates of channels
    that serve nobody any more leave as well; ``shut_useless_`` shuts them.

    Args:
        network: the traced network, at its original size.

    Returns:
        Channels that stay, by the name of the tensor.
    """
    ops = list(network.ops.values())
    zero = _zeros(network)
    stay = {name: need & ~zero[name] for name, need in _needed(network, zero).items()}
    _tie(ops, stay)
    for op in ops:
        if not stay[op.name].any():
            stay[op.name][_last_to_shut(op)] = True
            _tie(ops, stay)
    return stay


@torch.no_grad()
def shut_useless_(network: Network, stay: dict[str, Mask]) -> None:
    """Shut the gates of the channels that leave with those in front of them or behind them.

    Args:
        network: the traced network, whose gates are changed in place.
        stay: what ``plan`` returned.
    """
    for op in network.ops.values():
        for gate in op.gates if not _fixed(op) else ():
            leaves = torch.from_numpy(~stay[op.name]).to(gate.log_alpha.device)
            gate.log_alpha.masked_fill_(leaves.view_as(gate.log_alpha), SHUT)


def removable_gates(network: Network) -> list[HardConcrete]:
    """The gates of a network that can leave it: those on channels of layers that can be cut."""
    return list({id(g): g for op in network.ops.values() if not _fixed(op) for g in op.gates}.values())


def _last_to_shut(op: Op) -> int:
    """The channel that stays of a tensor that would have none."""
    return int(op.gates[0].log_alpha.detach().argmax()) if op.gates else 0


def _closed(op: Op) -> Mask:
    """Channels behind a gate of this operation that is shut for good."""
    closed = np.zeros(op.width, dtype=bool)
    for gate in op.gates:
        closed |= is_shut(gate).flatten().cpu().numpy()
    return closed


def _zeros(network: Network) -> dict[str, Mask]:
    """Channels that are zero whatever the input, the weights and the biases are."""
    zero: dict[str, Mask] = {}
    for name, op in network.ops.items():
        zero[name] = _zero(op, [zero[i] for i in op.inputs])
    return zero


def _zero(op: Op, inputs: Sequence[Mask]) -> Mask:
    if _fixed(op):
        return np.zeros(op.width, dtype=bool)
    if isinstance(op, Mixing):
        closed = _closed(op)
        if op.bias is None:
            closed |= inputs[0].reshape(op.groups, -1).all(axis=1).repeat(op.out_group)
        return closed
    if isinstance(op, Norm):  # its bias is trained
        return _closed(op)
    if isinstance(op, Gate):
        return inputs[0] | _closed(op)
    if isinstance(op, PerChannel):
        passes = isinstance(op, Slopes) or op.of_zero == 0
        return inputs[0] if passes else np.zeros(op.width, dtype=bool)
    if isinstance(op, Reshape):
        return inputs[0].repeat(op.spread)
    if isinstance(op, Cat):
        return np.concatenate(inputs)
    return inputs[0] & inputs[1] if isinstance(op, Add) else inputs[0] | inputs[1]


def _needed(network: Network, zero: dict[str, Mask]) -> dict[str, Mask]:
    """Channels that something reads whose own output is read and not always zero."""
    need = {name: np.zeros(op.width, dtype=bool) for name, op in network.ops.items()}
    for name in reversed(network.ops):
        op = network.ops[name]
        stays = need[name] & ~zero[name]
        if not stays.any() and not _fixed(op):
            continue
        if _fixed(op):
            parts = [np.ones(width, dtype=bool) for width in op.input_widths]
        elif isinstance(op, Mixing) and not _depthwise(op):
            parts = [np.ones(op.input_widths[0], dtype=bool)]
        elif isinstance(op, Reshape):
            parts = [np.asarray(stays.reshape(-1, op.spread).any(axis=1))]
        elif isinstance(op, Cat):
            parts = np.split(stays, np.cumsum(op.input_widths)[:-1])
        else:
            parts = [stays] * len(op.inputs)
        for source, part in zip(op.inputs, parts, strict=True):
            need[source] |= part
    return need


def _fixed(op: Op) -> bool:
    """Whether an operation needs its inputs, and gives its output, with all their channels."""
    if isinstance(op, Mixing):
        plain = op.layer is op.module and op.weight_gate is None
        return not plain or (op.groups > 1 and not _depthwise(op))
    if isinstance(op, Reshape):
        return op.sized
    if isinstance(op, Norm):
        return not op.norm.affine or not op.tracks
    return not isinstance(op, PerChannel | Gate | Cat | Add | Mul)


def _depthwise(op: Op) -> bool:
    return isinstance(op, Mixing) and op.groups > 1 and op.in_group == 1 and op.out_group == 1


def _tie(ops: Sequence[Op], stay: dict[str, Mask]) -> None:
    """Enlarge masks until every operation fits the tensors around it."""
    of_gates: dict[int, list[str]] = {}
    for op in ops:
        for gate in op.gates:
            of_gates.setdefault(id(gate), []).append(op.name)
    shared = [names for names in of_gates.values() if len(names) > 1]
    before = -1
    while before != (now := sum(int(mask.sum()) for mask in stay.values())):
        before = now
        for op in ops:
            _tie_one(op, stay)
        for names in shared:
            _unite(names, stay)


def _unite(names: Sequence[str], stay: dict[str, Mask]) -> None:
    united = np.logical_or.reduce([stay[name] for name in names])
    for name in names:
        stay[name] = united.copy()


def _tie_one(op: Op, stay: dict[str, Mask]) -> None:
    if _fixed(op):
        for name in op.inputs if isinstance(op, Input) else (op.name, *op.inputs):
            stay[name] = np.ones_like(stay[name])
        if isinstance(op, Input):
            stay[op.name] = np.ones_like(stay[op.name])
    elif isinstance(op, Mixing) and not _depthwise(op):
        pass
    elif isinstance(op, Reshape):
        (source,) = op.inputs
        stay[source] = stay[source] | stay[op.name].reshape(-1, op.spread).any(axis=1)
        stay[op.name] = stay[source].repeat(op.spread)
    elif isinstance(op, Cat):
        parts = np.split(stay[op.name], np.cumsum(op.input_widths)[:-1])
        for source, part in zip(op.inputs, parts, strict=True):
            stay[source] = stay[source] | part
        stay[op.name] = np.concatenate([stay[source] for source in op.inputs])
    elif isinstance(op, Gate):  # it can select
        (source,) = op.inputs
        stay[source] = stay[source] | stay[op.name]
    else:
        _unite((op.name, *op.inputs), stay)


Index = tuple[Tensor | None, ...]
"""For the first dimensions of a tensor: the positions that stay, None for all."""


@dataclass
class Cut:
    """One tensor that has been cut down.

    Attributes:
        full: the tensor at its original size.
        index: what of it stays.
    """

    full: Tensor
    index: Index

    def take(self, full: Tensor | None = None) -> Tensor:
        """What stays of the tensor, or of another one of its size, in its memory format."""
        small = self.full if full is None else full
        for dim, positions in enumerate(self.index):
            if positions is not None:
                small = small.index_select(dim, positions)
        # Written into new memory: contiguous() keeps the strides of a tensor with one channel or a kernel of
        # one position, and a network in channels_last would go on in the other, slow, format.
        memory_format = _memory_format(self.full if full is None else full)
        return torch.empty_like(small, memory_format=memory_format).copy_(small)

    def put_back(self, small: Tensor, full: Tensor | None = None) -> Tensor:
        """Write the small tensor into the full one and return that."""
        full = self.full if full is None else full
        rows, columns = (*self.index, None, None)[:2]
        if rows is None:
            rows = torch.arange(full.shape[0], device=full.device)
        if columns is None:
            full[rows] = small
        else:
            full[rows[:, None], columns[None, :]] = small
        return full


def _memory_format(x: Tensor) -> torch.memory_format:
    last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


@dataclass
class Shrunk:
    """What has been cut off a network, until ``expand_`` puts it back.

    Attributes:
        optimizers: whose moments were cut, too.
        parameters: each parameter that was cut.
        moments: the moments of the optimizers at their original size, by parameter, and their names.
        buffers: each buffer that was cut, with its module and name.
        attributes: what modules say about their sizes, with the original values.
    """

    optimizers: Sequence[torch.optim.Optimizer]
    parameters: list[tuple[nn.Parameter, Cut]] = field(default_factory=list)
    moments: list[tuple[dict[str, Any], str, Tensor, Cut]] = field(default_factory=list)
    buffers: list[tuple[nn.Module, str, Cut]] = field(default_factory=list)
    attributes: list[tuple[nn.Module, str, Any]] = field(default_factory=list)

    def cut_parameter(self, module: nn.Module, name: str, index: Index) -> None:
        """Cut a parameter, its gradient and its moments."""
        parameter = module._parameters.get(name)
        if parameter is None or any(parameter is p for p, _ in self.parameters):
            return
        cut = Cut(parameter.data, index)
        gradient, parameter.grad = parameter.grad, None
        parameter.data = cut.take()
        parameter.grad = None if gradient is None else cut.take(gradient)
        self.parameters.append((parameter, cut))
        for optimizer in self.optimizers:
            state = optimizer.state.get(parameter, {})
            for key, value in state.items():
                if isinstance(value, Tensor) and value.shape == cut.full.shape:
                    self.moments.append((state, key, value, cut))
                    state[key] = cut.take(value)

    def cut_buffer(self, module: nn.Module, name: str, index: Index) -> None:
        """Cut a buffer."""
        buffer = module._buffers.get(name)
        if buffer is not None:
            cut = Cut(buffer, index)
            module._buffers[name] = cut.take()
            self.buffers.append((module, name, cut))

    def set(self, module: nn.Module, name: str, value: Any) -> None:
        """Change what a module says about itself."""
        self.attributes.append((module, name, getattr(module, name)))
        setattr(module, name, value)

    @torch.no_grad()
    def expand_(self) -> None:
        """Bring the network back to its original size; what was cut off is as it was."""
        for parameter, cut in self.parameters:
            small = parameter.grad
            parameter.grad = None
            parameter.data = cut.put_back(parameter.data)
            if small is not None:
                parameter.grad = cut.put_back(small, torch.zeros_like(parameter))
        for state, key, full, cut in self.moments:
            state[key] = cut.put_back(state[key], full)
        for module, name, cut in self.buffers:
            small = module._buffers[name]
            assert small is not None
            module._buffers[name] = cut.put_back(small)
        for module, name, value in reversed(self.attributes):
            setattr(module, name, value)


@torch.no_grad()
def shrink_(
    network: Network, stay: dict[str, Mask], optimizers: Sequence[torch.optim.Optimizer] = ()
) -> Shrunk:
    """Cut the live network down to the channels that stay.

    Parameters and modules remain the same objects; their tensors are exchanged. The traced network
    describes the original size throughout and must not count or compact until it is expanded again.

    Args:
        network: the traced network, whose model is changed in place.
        stay: what ``plan`` returned.
        optimizers: cut their moments, too.
    """
    shrunk = Shrunk(optimizers)
    for op in network.ops.values():
        if _fixed(op):
            continue
        out = _positions(stay[op.name], op)
        into = _positions(stay[op.inputs[0]], op)
        if isinstance(op, Mixing):
            _cut_mixing(shrunk, op, out, into)
        elif isinstance(op, Norm) and out is not None:
            for name in ("weight", "bias"):
                shrunk.cut_parameter(op.norm, name, (out,))
            for name in ("running_mean", "running_var"):
                shrunk.cut_buffer(op.norm, name, (out,))
            shrunk.set(op.norm, "num_features", len(out))
        elif isinstance(op, Slopes) and out is not None:
            assert op.module is not None
            shrunk.cut_parameter(op.module, "weight", (out,))
            shrunk.set(op.module, "num_parameters", len(out))
        elif isinstance(op, Gate) and not np.array_equal(stay[op.name], stay[op.inputs[0]]):
            chosen = stay[op.name][stay[op.inputs[0]]]
            assert isinstance(op.module, L0Gate)
            positions = torch.from_numpy(np.flatnonzero(chosen)).to(op.module.gates.log_alpha.device)
            shrunk.set(op.module, "selection", positions)
        if out is not None:
            for gate in op.gates:
                _cut_gate(shrunk, gate, out)
    return shrunk


def _positions(mask: Mask, op: Op) -> Tensor | None:
    """Positions of the channels that stay, on the device of the operation's weights; None for all."""
    if mask.all():
        return None
    holder: Any = op.gates[0] if op.gates else op.module
    like = next(holder.parameters(), None) if holder is not None else None
    positions = torch.from_numpy(np.flatnonzero(mask))
    return positions if like is None else positions.to(like.device)


def _cut_mixing(shrunk: Shrunk, op: Mixing, out: Tensor | None, into: Tensor | None) -> None:
    layer: Any = op.layer
    if _depthwise(op):
        if out is None:
            return
        index: Index = (out,)
        shrunk.set(layer, "groups", len(out))
    else:
        index = (into, out) if op.transposed else (out, into)
    if any(positions is not None for positions in index):
        shrunk.cut_parameter(layer, "weight", index)
    if out is not None:
        shrunk.cut_parameter(layer, "bias", (out,))
    linear = isinstance(layer, nn.Linear)
    if out is not None:
        shrunk.set(layer, "out_features" if linear else "out_channels", len(out))
    if into is not None:
        shrunk.set(layer, "in_features" if linear else "in_channels", len(into))


def _cut_gate(shrunk: Shrunk, gate: HardConcrete, out: Tensor) -> None:
    if gate.kept is not None:  # shared, and cut already
        return
    num_removed = gate.log_alpha.numel() - len(out)
    shrunk.cut_parameter(gate, "log_alpha", (out,))
    shrunk.set(gate, "gate_size", (len(out),))
    shrunk.set(gate, "kept", out)
    shrunk.set(gate, "num_removed", num_removed)
    shrunk.set(gate, "_drawn", None)
