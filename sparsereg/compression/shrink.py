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
from torch import Tensor, fx, nn

from sparsereg.compression.units.flow import Flow
from sparsereg.compression.units.program import name_of
from sparsereg.compression.units.rules.moves import COPIES
from sparsereg.compression.units.steps.mixing import Mixing
from sparsereg.compression.units.steps.norms import Norm
from sparsereg.compression.units.steps.pairs import Add, Mul
from sparsereg.compression.units.steps.single import Gate, Single, Slopes, Take
from sparsereg.compression.units.steps.table import Mask, Step
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


class Live:
    """A network whose channels can leave while it trains.

    Args:
        flow: its operations on channels, at its original size.
        model: the network.

    Attributes:
        gates: of each operation, the tensors of gates that shut its units, unit by unit.
        fixed: operations that need what they read, and give what they make, with all units.
        whole: units that never leave, since the network's code may say how many there are.
    """

    def __init__(self, flow: Flow, model: nn.Module) -> None:
        self.flow = flow
        self.model = model
        self.steps = flow.steps
        self.gates = {step.number: self._gates(step) for step in flow.steps}
        self.fixed = {step.number for step in flow.steps if self._is_fixed(step)}
        self.whole = np.zeros(flow.size, dtype=bool)
        for node in flow.placed.program.calls:
            if (
                node in flow.follower.axes.of
                and node not in flow.follower.maker
                and not _for_any_number(node)
            ):
                for tensor in (node, *node.all_input_nodes):
                    self.whole[flow.follower._all(tensor)] = True

    def _gates(self, step: Step) -> list[HardConcrete]:
        first = self.flow.placed.first
        found = []
        for places in step.closes:
            number = int(np.searchsorted(first, places[0], side="right")) - 1
            gate = self.flow.placed.gate(self.model, number)
            size = first[number + 1] - first[number]
            if size == step.size and (places == first[number] + np.arange(size)).all():
                found.append(gate)
        return found

    def _is_fixed(self, step: Step) -> bool:
        if len(self.gates[step.number]) < len(step.closes):
            return True
        if isinstance(step, Mixing):
            plain = isinstance(self.layer(step), nn.Linear | nn.modules.conv._ConvNd)
            several = bool(step.single or step.columns) or (step.shape.groups > 1 and not _depthwise(step))
            return not plain or several
        if isinstance(step, Norm):
            known = isinstance(self.layer(step), nn.modules.batchnorm._BatchNorm)
            return not known or not step.affine or not step.tracks
        if isinstance(step, Slopes):
            return not isinstance(self.layer(step), nn.PReLU)
        if isinstance(step, Gate):
            return not isinstance(self.holder(step), L0Gate)
        return not isinstance(step, Single | Take | Add | Mul)

    def layer(self, step: Step) -> nn.Module:
        """The module that holds an operation's weight."""
        return self.model.get_submodule(self.flow.placed.program.names[step.weights[0]].rpartition(".")[0])

    def holder(self, step: Gate) -> nn.Module:
        """The module that applies gates to a tensor."""
        first = self.flow.placed.first
        number = int(np.searchsorted(first, step.scales[0][0], side="right")) - 1
        return self.model.get_submodule(self.flow.placed.gates[number].rpartition(".")[0])


_SIZELESS = (
    *COPIES,
    *(
        "cat",
        "concat",
        "flatten",
        "unsqueeze",
        "transpose",
        "permute",
        "movedim",
        "mul",
        "multiply",
        "getitem",
    ),
)


def _for_any_number(node: fx.Node) -> bool:
    """Whether a move works for any number of channels: flattening, or a last size that is left open."""
    name = name_of(node)
    sizes = node.args[1] if len(node.args) > 1 else None
    last = sizes[-1] if isinstance(sizes, list | tuple) and sizes else None
    return name in _SIZELESS or (name in ("view", "reshape") and len(sizes or ()) == 2 and last == -1)  # type: ignore[arg-type]


def _depthwise(step: Step) -> bool:
    return isinstance(step, Mixing) and step.shape.groups > 1 and step.shape.ins == step.shape.outs == 1


def plan(live: Live) -> Mask:
    """Find the units that stay while gates at ``SHUT`` are taken out.

    Every tensor keeps at least one unit, also behind gates that are all shut. Open gates of units that serve
    nobody any more leave as well; ``shut_useless_`` shuts them.

    Args:
        live: the network, at its original size.

    Returns:
        Which units stay, (units,).
    """
    zero = _zeros(live)
    stay = (_needed(live, zero) & ~zero) | live.whole
    _tie(live, stay)
    for step in live.steps:
        if not stay[step.out].any():
            stay[step.first + _last_to_shut(live, step)] = True
            _tie(live, stay)
    return stay


@torch.no_grad()
def shut_useless_(live: Live, stay: Mask) -> None:
    """Shut the gates of the units that leave with those in front of them or behind them.

    Args:
        live: the network, whose gates are changed in place.
        stay: what ``plan`` returned.
    """
    for step in live.steps:
        for gate in live.gates[step.number] if step.number not in live.fixed else ():
            leaves = torch.from_numpy(~stay[step.out]).to(gate.log_alpha.device)
            gate.log_alpha.masked_fill_(leaves.view_as(gate.log_alpha), SHUT)


def removable_gates(live: Live) -> list[HardConcrete]:
    """The gates of a network that can leave it: those on units of layers that can be cut."""
    able = (step for step in live.steps if step.number not in live.fixed)
    return list({id(gate): gate for step in able for gate in live.gates[step.number]}.values())


def _last_to_shut(live: Live, step: Step) -> int:
    """The unit that stays of a tensor that would have none."""
    gates = live.gates[step.number]
    return int(gates[0].log_alpha.detach().argmax()) if gates else 0


def _zeros(live: Live) -> Mask:
    """Units that are zero whatever the input, the weights and the biases are."""
    zero = np.zeros(live.flow.size, dtype=bool)
    for step in live.steps:
        if step.number not in live.fixed:
            zero[step.out] = _zero(step, [zero[units] for units in step.ins], _closed(live, step))
    return zero


def _closed(live: Live, step: Step) -> Mask:
    """Units behind a gate of this operation that is shut for good."""
    closed = np.zeros(step.size, dtype=bool)
    for gate in live.gates[step.number]:
        closed |= is_shut(gate).flatten().cpu().numpy()
    return closed


def _zero(step: Step, ins: Sequence[Mask], closed: Mask) -> Mask:
    if isinstance(step, Mixing):
        if step.bias is None:
            closed |= ins[0].reshape(step.shape.groups, -1).all(axis=1).repeat(step.shape.outs)
        return closed
    if isinstance(step, Norm):  # its bias is trained
        return closed
    if isinstance(step, Gate):
        return ins[0] | closed
    if isinstance(step, Single):
        return ins[0] if step.of_zero == 0 else closed
    if isinstance(step, Slopes | Take):
        return ins[0]
    return ins[0] & ins[1] if isinstance(step, Add) else ins[0] | ins[1]


def _needed(live: Live, zero: Mask) -> Mask:
    """Units that something reads whose own output is read and not always zero."""
    need = np.zeros(live.flow.size, dtype=bool)
    for step in reversed(live.steps):
        stays = need[step.out] & ~zero[step.out]
        all_of_it = step.number in live.fixed or (isinstance(step, Mixing) and not _depthwise(step))
        if not stays.any() and step.number not in live.fixed:
            continue
        for units in step.ins:
            need[units if all_of_it else units[stays]] = True
    return need


def _tie(live: Live, stay: Mask) -> None:
    """Enlarge masks until every operation fits the tensors around it."""
    of_gates: dict[int, list[Step]] = {}
    for step in live.steps:
        for gate in live.gates[step.number]:
            of_gates.setdefault(id(gate), []).append(step)
    shared = [steps for steps in of_gates.values() if len(steps) > 1]
    before = -1
    while before != (now := int(stay.sum())):
        before = now
        for step in live.steps:
            _tie_one(live, step, stay)
        for steps in shared:
            united = np.logical_or.reduce([stay[step.out] for step in steps])
            for step in steps:
                stay[step.out] = united


def _tie_one(live: Live, step: Step, stay: Mask) -> None:
    if step.number in live.fixed:
        stay[step.out] = True
        for units in step.ins:
            stay[units] = True
    elif isinstance(step, Mixing) and not _depthwise(step):
        pass
    elif isinstance(step, Gate):  # it can select
        stay[step.ins[0][stay[step.out]]] = True
    else:
        mask = np.logical_or.reduce([stay[step.out], *(stay[units] for units in step.ins)])
        for units in step.ins:
            stay[units[mask]] = True
        stay[step.out] = np.logical_or.reduce([stay[units] for units in step.ins])


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
def shrink_(live: Live, stay: Mask, optimizers: Sequence[torch.optim.Optimizer] = ()) -> Shrunk:
    """Cut the live network down to the units that stay.

    Parameters and modules remain the same objects; their tensors are exchanged. The traced network
    describes the original size throughout and must not count or compact until it is expanded again.

    Args:
        live: the network, which is changed in place.
        stay: what ``plan`` returned.
        optimizers: cut their moments, too.
    """
    shrunk = Shrunk(optimizers)
    for step in live.steps:
        if step.number in live.fixed:
            continue
        out = _positions(stay[step.out], live, step)
        into = _positions(stay[step.ins[0]], live, step)
        if isinstance(step, Mixing):
            _cut_mixing(shrunk, live.layer(step), step, out, into)
        elif isinstance(step, Norm) and out is not None:
            norm = live.layer(step)
            for name in ("weight", "bias"):
                shrunk.cut_parameter(norm, name, (out,))
            for name in ("running_mean", "running_var"):
                shrunk.cut_buffer(norm, name, (out,))
            shrunk.set(norm, "num_features", len(out))
        elif isinstance(step, Slopes) and out is not None:
            shrunk.cut_parameter(live.layer(step), "weight", (out,))
            shrunk.set(live.layer(step), "num_parameters", len(out))
        elif isinstance(step, Gate) and not np.array_equal(stay[step.out], stay[step.ins[0]]):
            holder = live.holder(step)
            assert isinstance(holder, L0Gate)
            chosen = np.flatnonzero(stay[step.out][stay[step.ins[0]]])
            shrunk.set(holder, "selection", torch.from_numpy(chosen).to(holder.gates.log_alpha.device))
        if out is not None:
            for gate in live.gates[step.number]:
                _cut_gate(shrunk, gate, out)
    return shrunk


def _positions(mask: Mask, live: Live, step: Step) -> Tensor | None:
    """Positions of the units that stay, on the device of the operation's weights; None for all."""
    if mask.all():
        return None
    gates = live.gates[step.number]
    holder: Any = gates[0] if gates else live.layer(step) if step.weights else None
    like = next(holder.parameters(), None) if holder is not None else None
    positions = torch.from_numpy(np.flatnonzero(mask))
    return positions if like is None else positions.to(like.device)


def _cut_mixing(
    shrunk: Shrunk, layer: nn.Module, step: Mixing, out: Tensor | None, into: Tensor | None
) -> None:
    if _depthwise(step):
        if out is None:
            return
        index: Index = (out,)
        shrunk.set(layer, "groups", len(out))
    else:
        index = (into, out) if step.shape.transposed else (out, into)
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
