"""Expected cost of a network as a differentiable function of its gates.

Every channel gets two chances: that it is *alive* (its own gates and something before it are open) and
that it is *read* (something behind it stays). Both are products and complements of products of P(z > 0),
so that at gates that are surely open or shut they are the booleans of the exact count, and in between
smooth. What the exact count decides by numbers rather than by gates is left out: constants that have to
stay because a later layer pads them, and groups that are kept equally large.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparsereg.compression.ops import (
    Add,
    Attribute,
    Cat,
    Gate,
    Input,
    Mixing,
    Mul,
    Norm,
    Op,
    Output,
    PerChannel,
    Reshape,
    Slopes,
)
from sparsereg.distributions import p_active

if TYPE_CHECKING:
    from sparsereg.compression.graph import Network


@dataclass
class Chance:
    """Probability of an event for each channel: independent of gates, times gates that it needs open.

    A gate is kept by name, so that an event that needs it twice, or two events that both need it, do not
    count it twice.

    Attributes:
        other: probability of the rest, (channels,).
        gates: P(z > 0) of the gates of each channel, (channels,), by the identity of the gate tensor.
    """

    other: Tensor
    gates: dict[int, Tensor] = field(default_factory=dict)

    @property
    def value(self) -> Tensor:
        """The probability."""
        value = self.other
        for p in self.gates.values():
            value = value * p
        return value

    def __and__(self, right: "Chance") -> "Chance":
        return Chance(self.other * right.other, self.gates | right.gates)

    def __or__(self, right: "Chance") -> "Chance":
        common = {key: p for key, p in self.gates.items() if key in right.gates}
        a, b = self._without(common), right._without(common)
        return Chance(1 - (1 - a) * (1 - b), common)

    def _without(self, common: dict[int, Tensor]) -> Tensor:
        return Chance(self.other, {k: p for k, p in self.gates.items() if k not in common}).value

    def map(self, function: Callable[[Tensor], Tensor]) -> "Chance":
        """Rearrange the channels."""
        return Chance(function(self.other), {k: function(p) for k, p in self.gates.items()})


@dataclass
class Wanted:
    """What later layers want of a tensor.

    Attributes:
        alive: chance that a channel is read if it is alive.
        anyway: chance that a channel must be there even if it is constant; None for never.
    """

    alive: Chance | None = None
    anyway: Chance | None = None

    def merge(self, other: "Wanted") -> None:
        """Another reader wants it, too."""
        self.alive = _either(self.alive, other.alive)
        self.anyway = _either(self.anyway, other.anyway)


def _either(a: Chance | None, b: Chance | None) -> Chance | None:
    if a is None or b is None:
        return a if b is None else b
    return a | b


def any_of(p: Tensor, groups: int = 1) -> Tensor:
    """Probability that any of some independent events happens; (groups * n,) to (groups,)."""
    return 1 - (1 - p.reshape(groups, -1)).prod(dim=1)


def expected_costs(network: "Network") -> tuple[Tensor, Tensor]:
    """Expected parameters and MACs that stay, differentiable in every log_alpha.

    Args:
        network: the traced network.

    Returns:
        Two scalars.
    """
    pass_ = _Pass(network)
    total = pass_.none.sum()
    parameters, macs = total, total
    for name, op in network.ops.items():
        if name in pass_.stays:
            more_parameters, more_macs = pass_.cost(op)
            parameters, macs = parameters + more_parameters, macs + more_macs
    return parameters, macs


class _Pass:
    """One pass forward for what is alive and one backward for what is read."""

    def __init__(self, network: "Network") -> None:
        self.network = network
        like = network.gates[0].log_alpha if network.gates else torch.zeros(())
        # Not every accelerator has float64.
        dtype = torch.float32 if like.device.type == "mps" else torch.float64
        self.none = torch.zeros(1, dtype=dtype, device=like.device)
        self.active = self._active()
        self.alive: dict[str, Chance] = {}
        self.stays: dict[str, Chance] = {}
        self.wanted: dict[str, Wanted] = {}
        for name, op in network.ops.items():
            self.alive[name] = _ALIVE[type(op)](self, op, [self.alive[i] for i in op.inputs])
        for name in reversed(network.ops):
            self._ask(network.ops[name])

    def _active(self) -> dict[int, Tensor]:
        groups: dict[tuple[float, float, float], list[Tensor]] = {}
        keys: dict[tuple[float, float, float], list[int]] = {}
        for gate in self.network.gates:
            shape = (gate.temperature, gate.gamma, gate.zeta)
            groups.setdefault(shape, []).append(gate.log_alpha.flatten())
            keys.setdefault(shape, []).append(id(gate))
        active: dict[int, Tensor] = {}
        for shape, members in groups.items():
            p = p_active(torch.cat(members).to(self.none.dtype), *shape)
            active.update(zip(keys[shape], p.split([m.numel() for m in members]), strict=True))
        for gate in self.network.gates:
            if gate.kept is not None:  # those that have left the network are shut
                left = self.none.new_zeros(len(gate.kept) + gate.num_removed)
                active[id(gate)] = left.index_copy(0, gate.kept, active[id(gate)])
        return active

    def ones(self, width: int) -> Tensor:
        """Certainty."""
        return self.none.new_ones(width)

    def gates(self, op: Op) -> Chance:
        """The gates that an operation has absorbed."""
        return Chance(self.ones(op.width), {id(g): self.active[id(g)] for g in op.gates})

    def connections(self, op: Mixing) -> Tensor:
        """Chance that any weight between two channels is open, (out, in)."""
        assert op.weight_gate is not None
        p = self.active[id(op.weight_gate)].reshape(op.width, op.in_group, op.taps)
        return p.squeeze(2) if op.taps == 1 else 1 - (1 - p).prod(dim=2)

    def _ask(self, op: Op) -> None:
        wanted = self.wanted.get(op.name, Wanted())
        stays: Chance | None
        if isinstance(op, Output):
            stays = Chance(self.ones(op.width))
        else:
            alive = None if wanted.alive is None else self.alive[op.name] & wanted.alive
            stays = _either(alive, wanted.anyway)
        if stays is None:
            return
        self.stays[op.name] = stays
        for name, wish in zip(op.inputs, _ASK[type(op)](self, op, stays, wanted), strict=True):
            self.wanted.setdefault(name, Wanted()).merge(wish)

    def cost(self, op: Op) -> tuple[Tensor | float, Tensor | float]:
        """Expected parameters and MACs of one operation."""
        stays = self.stays[op.name].value
        if isinstance(op, Mixing):
            return self._mixing_cost(op, stays)
        if isinstance(op, Norm):
            return (2 * stays.sum() if op.norm.affine else 0.0), 0.0
        if isinstance(op, Slopes):
            return stays.sum(), 0.0
        parameters = op.num_parameters([], torch.ones(op.width).bool().numpy())
        if not parameters and not op.macs:
            return 0.0, 0.0
        any_stays = any_of(stays)[0]
        return parameters * any_stays, op.macs * any_stays

    def _mixing_cost(self, op: Mixing, stays: Tensor) -> tuple[Tensor, Tensor]:
        outs = stays.sum()
        if op.groups == 1:
            ins = self.stays[op.inputs[0]].value.sum()
        else:
            of_groups = any_of(stays, op.groups)
            if op.in_group == 1:
                ins = of_groups.new_ones(())
            else:
                read = self.stays[op.inputs[0]].value.reshape(op.groups, -1).sum(dim=1) * of_groups
                ins = read.sum() / of_groups.sum().clamp(min=1e-12)
        weights = outs * ins
        parameters = weights * op.taps + (outs if op.bias is not None else 0.0)
        return parameters, weights * op.macs_per_weight


def _always(pass_: _Pass, op: Op, inputs: Sequence[Chance]) -> Chance:
    return Chance(pass_.ones(op.width))


def _mixing_alive(pass_: _Pass, op: Op, inputs: Sequence[Chance]) -> Chance:
    assert isinstance(op, Mixing)
    if op.weight_gate is not None:
        through = pass_.connections(op) * inputs[0].value
        return Chance(1 - (1 - through).prod(dim=1)) & pass_.gates(op)
    if op.in_group == 1 and op.out_group == 1:
        return inputs[0] & pass_.gates(op)
    groups = any_of(inputs[0].value, op.groups)
    return Chance(groups.repeat_interleave(op.out_group)) & pass_.gates(op)


def _gated_alive(pass_: _Pass, op: Op, inputs: Sequence[Chance]) -> Chance:
    return inputs[0] & pass_.gates(op)


def _same_alive(pass_: _Pass, op: Op, inputs: Sequence[Chance]) -> Chance:
    return inputs[0]


def _reshape_alive(pass_: _Pass, op: Op, inputs: Sequence[Chance]) -> Chance:
    assert isinstance(op, Reshape)
    spread = op.spread
    return inputs[0] if spread == 1 else inputs[0].map(lambda p: p.repeat_interleave(spread))


def _cat_alive(pass_: _Pass, op: Op, inputs: Sequence[Chance]) -> Chance:
    return Chance(torch.cat([c.value for c in inputs]))


def _add_alive(pass_: _Pass, op: Op, inputs: Sequence[Chance]) -> Chance:
    return inputs[0] | inputs[1]


def _mul_alive(pass_: _Pass, op: Op, inputs: Sequence[Chance]) -> Chance:
    """A map times a vector of excitations lives as the map does."""
    shapes = [pass_.network.ops[i].shape or () for i in op.inputs]
    sizes = [torch.Size(s).numel() for s in shapes]
    if sizes[0] != sizes[1]:
        return inputs[0] if sizes[0] > sizes[1] else inputs[1]
    return inputs[0] & inputs[1]


_ALIVE: dict[type[Op], Callable[[_Pass, Op, Sequence[Chance]], Chance]] = {
    Op: _always,
    Input: _always,
    Attribute: _always,
    Output: _always,
    Mixing: _mixing_alive,
    Norm: _gated_alive,
    Gate: _gated_alive,
    PerChannel: _same_alive,
    Slopes: _same_alive,
    Reshape: _reshape_alive,
    Cat: _cat_alive,
    Add: _add_alive,
    Mul: _mul_alive,
}


def _ask_nothing(pass_: _Pass, op: Op, stays: Chance, wanted: Wanted) -> list[Wanted]:
    return []


def _ask_all(pass_: _Pass, op: Op, stays: Chance, wanted: Wanted) -> list[Wanted]:
    needed = any_of(stays.value)
    return [Wanted(anyway=Chance(needed.expand(width))) for width in op.input_widths]


def _ask_mixing(pass_: _Pass, op: Op, stays: Chance, wanted: Wanted) -> list[Wanted]:
    assert isinstance(op, Mixing)
    if op.weight_gate is not None:
        through = pass_.connections(op) * stays.value.unsqueeze(1)
        return [Wanted(alive=Chance(1 - (1 - through).prod(dim=0)))]
    if op.in_group == 1 and op.out_group == 1:
        return [Wanted(anyway=stays)]
    groups = any_of(stays.value, op.groups)
    return [Wanted(alive=Chance(groups.repeat_interleave(op.in_group)))]


def _ask_gated(pass_: _Pass, op: Op, stays: Chance, wanted: Wanted) -> list[Wanted]:
    alive = None if wanted.alive is None else wanted.alive & pass_.gates(op)
    return [Wanted(alive, wanted.anyway)]


def _ask_same(pass_: _Pass, op: Op, stays: Chance, wanted: Wanted) -> list[Wanted]:
    return [wanted]


def _ask_reshape(pass_: _Pass, op: Op, stays: Chance, wanted: Wanted) -> list[Wanted]:
    assert isinstance(op, Reshape)
    if op.spread == 1:
        return [wanted]

    def joined(chance: Chance | None) -> Chance | None:
        return None if chance is None else Chance(any_of(chance.value, op.input_widths[0]))

    return [Wanted(joined(wanted.alive), joined(wanted.anyway))]


def _ask_cat(pass_: _Pass, op: Op, stays: Chance, wanted: Wanted) -> list[Wanted]:
    wishes: list[Wanted] = []
    first = 0
    for width in op.input_widths:
        part = slice(first, first + width)
        wishes.append(Wanted(_part(wanted.alive, part), _part(wanted.anyway, part)))
        first += width
    return wishes


def _part(chance: Chance | None, part: slice) -> Chance | None:
    return None if chance is None else chance.map(lambda p: p[part])


def _ask_aligned(pass_: _Pass, op: Op, stays: Chance, wanted: Wanted) -> list[Wanted]:
    """An input of which nothing is alive becomes a vector; else it keeps what the sum keeps."""
    wishes = []
    for name in op.inputs:
        there = any_of(pass_.alive[name].value)
        wishes.append(Wanted(anyway=Chance(stays.other * there, stays.gates)))
    return wishes


_ASK: dict[type[Op], Callable[[_Pass, Op, Chance, Wanted], list[Wanted]]] = {
    Op: _ask_all,
    Input: _ask_nothing,
    Attribute: _ask_nothing,
    Output: _ask_all,
    Mixing: _ask_mixing,
    Norm: _ask_gated,
    Gate: _ask_gated,
    PerChannel: _ask_same,
    Slopes: _ask_same,
    Reshape: _ask_reshape,
    Cat: _ask_cat,
    Add: _ask_aligned,
    Mul: _ask_aligned,
}
