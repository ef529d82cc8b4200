"""Chances: the expected cost of a network as a differentiable function of its gates.

Every unit gets two chances: that it is *alive* (its own gates and something before it are open) and that it
is *read* (something behind it stays). Both are products and complements of products of P(z > 0), so that at
gates that are surely open or shut they are the booleans of the exact count, and in between smooth. What the
exact count decides by numbers rather than by gates is left out: constants that have to stay because a later
layer pads them, and groups that are kept equally large.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from sparsereg.compression.units.labels import FIRST, Ints
from sparsereg.distributions import HardConcrete, p_active

if TYPE_CHECKING:
    from sparsereg.compression.units.steps.table import Step


@dataclass
class Chance:
    """Probability of an event for each unit: independent of gates, times gates that it needs open.

    A gate is kept by name, so that an event that needs it twice, or two events that both need it, do not
    count it twice.

    Attributes:
        other: probability of the rest, (units,).
        gates: P(z > 0) of the gates of each unit, (units,), by the identity of their places.
    """

    other: Tensor
    gates: dict[Any, Tensor] = field(default_factory=dict)

    @property
    def value(self) -> Tensor:
        """The probability."""
        value = self.other
        for p in self.gates.values():
            value = value * p
        return value

    def __and__(self, right: Chance) -> Chance:
        return Chance(self.other * right.other, self.gates | right.gates)

    def __or__(self, right: Chance) -> Chance:
        common = {key: p for key, p in self.gates.items() if key in right.gates}
        a, b = self._without(common), right._without(common)
        return Chance(1 - (1 - a) * (1 - b), common)

    def _without(self, common: dict[Any, Tensor]) -> Tensor:
        return Chance(self.other, {k: p for k, p in self.gates.items() if k not in common}).value

    def map(self, function: Callable[[Tensor], Tensor]) -> Chance:
        """Rearrange the units."""
        return Chance(function(self.other), {k: function(p) for k, p in self.gates.items()})


@dataclass
class Wanted:
    """What later operations want of some units.

    Attributes:
        alive: chance that a unit is read if it is alive.
        anyway: chance that a unit must be there even if it is constant; None for never.
    """

    alive: Chance | None = None
    anyway: Chance | None = None

    def merge(self, other: Wanted) -> None:
        """Another reader wants it, too."""
        self.alive = either(self.alive, other.alive)
        self.anyway = either(self.anyway, other.anyway)

    def at(self, positions: Tensor) -> Wanted:
        """The same of some of the units."""
        return self.map(lambda chance: chance.map(lambda p: p[positions]))

    def map(self, function: Callable[[Chance], Chance]) -> Wanted:
        """The same of other units."""
        return Wanted(*(None if c is None else function(c) for c in (self.alive, self.anyway)))


def either(a: Chance | None, b: Chance | None) -> Chance | None:
    """One of two events, either of which may be impossible."""
    if a is None or b is None:
        return a if b is None else b
    return a | b


def any_of(p: Tensor, groups: int = 1) -> Tensor:
    """Probability that any of some independent events happens; (groups * n,) to (groups,)."""
    return 1 - (1 - p.reshape(groups, -1)).prod(dim=1)


class Part:
    """The positions that an operation reads from one other operation.

    Args:
        step: number of the operation that makes them.
        size: of the units that it makes.
        places: which of these they are.
        positions: where they lie among all that are read.
    """

    def __init__(self, step: int, size: int, places: Ints, positions: Ints, device: torch.device) -> None:
        self.step = step
        self.whole = len(places) == size and bool((places == np.arange(size)).all())
        self.places = torch.from_numpy(places).to(device)
        self.positions = torch.from_numpy(positions).to(device)
        self.single = len(np.unique(places)) == len(places)
        counts = np.bincount(places, minlength=size)
        table = np.full((size, max(int(counts.max(initial=0)), 1)), len(places))
        order = np.argsort(places, kind="stable")
        starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
        table[places[order], np.arange(len(places)) - starts[places[order]]] = order
        self.table = torch.from_numpy(table).to(device)

    def back(self, chance: Chance) -> Chance:
        """From the positions that are read to the units: each is read if any of its positions is."""
        if self.whole:
            return chance
        if self.single:
            other = chance.other.new_zeros(len(self.table)).index_copy(0, self.places, chance.other)
            ones = other.new_ones(len(self.table))
            return Chance(other, {k: ones.index_copy(0, self.places, p) for k, p in chance.gates.items()})
        padded = torch.cat([chance.value, chance.other.new_zeros(1)])
        return Chance(1 - (1 - padded[self.table]).prod(1))


class Pass:
    """One pass forward for what is alive and one backward for what is read.

    Args:
        steps: all operations, in order.
        gates: all gates.
        parts: for each operation, and each tensor that it reads, where its positions come from.
    """

    def __init__(
        self, steps: Sequence[Step], gates: Sequence[HardConcrete], parts: Sequence[Sequence[Sequence[Part]]]
    ) -> None:
        self.parts = parts
        like = gates[0].log_alpha if gates else torch.zeros(())
        # Not every accelerator has float64.
        dtype = torch.float32 if like.device.type == "mps" else torch.float64
        self.none = torch.zeros(1, dtype=dtype, device=like.device)
        self.p = _active(gates, self.none)
        self.life: list[Chance] = []
        for number, step in enumerate(steps):
            self.life.append(step.alive(self, [self._gathered(p) for p in parts[number]]))
        self.stays: dict[int, Chance] = {}
        self.wanted: list[Wanted] = [Wanted() for _ in steps]
        for number in reversed(range(len(steps))):
            self._ask(number, steps[number])

    def ones(self, size: int) -> Tensor:
        """Certainty."""
        return self.none.new_ones(size)

    def chances(self, places: Ints) -> Tensor:
        """P(z > 0) of gates."""
        return self.p[torch.from_numpy(np.array(places)).to(self.p.device)]

    def gates(self, step: Step) -> Chance:
        """The gates that shut an operation's units."""
        return Chance(self.ones(step.size), {p.tobytes(): self.chances(p) for p in step.closes})

    def living(self, step: Step, i: int) -> Chance:
        """Chance that each position of a tensor that an operation reads is alive."""
        return self._gathered(self.parts[step.number][i])

    def staying(self, step: Step, i: int) -> Tensor:
        """Probability that each position of a tensor that an operation reads is there, in any order."""
        none = Chance(self.none)
        found = []
        for part in self.parts[step.number][i]:
            value = self.stays.get(part.step, none).value
            found.append(
                value[part.places]
                if len(value) > 1 or part.step in self.stays
                else value.expand(len(part.places))
            )
        order = torch.cat([part.positions for part in self.parts[step.number][i]])
        values = torch.cat(found)
        return torch.empty_like(values).index_copy(0, order, values)

    def _gathered(self, parts: Sequence[Part]) -> Chance:
        if len(parts) == 1:
            (part,) = parts
            known = self.life[part.step]
            return known if part.whole else known.map(lambda p: p[part.places])
        values = torch.cat([self.life[part.step].value[part.places] for part in parts])
        order = torch.cat([part.positions for part in parts])
        return Chance(torch.empty_like(values).index_copy(0, order, values))

    def _ask(self, number: int, step: Step) -> None:
        wanted = self.wanted[number]
        stays: Chance | None
        if not step.node.users and step.node.op == "output":
            stays = Chance(self.ones(step.size))
        else:
            alive = None if wanted.alive is None else self.life[number] & wanted.alive
            stays = either(alive, wanted.anyway)
        if stays is None:
            return
        self.stays[number] = stays
        for parts, wish in zip(self.parts[number], step.ask(self, stays, wanted), strict=True):
            for part in parts:
                own = wish if len(parts) == 1 else wish.at(part.positions)
                self.wanted[part.step].merge(own.map(part.back))


def _active(gates: Sequence[HardConcrete], none: Tensor) -> Tensor:
    """P(z > 0) of all gates end to end; those that have left the network are shut."""
    groups: dict[tuple[float, float, float], list[int]] = {}
    for i, gate in enumerate(gates):
        groups.setdefault((gate.temperature, gate.gamma, gate.zeta), []).append(i)
    found: dict[int, Tensor] = {}
    for shape, members in groups.items():
        locations = [gates[i].log_alpha.flatten() for i in members]
        p = p_active(torch.cat(locations).to(none.dtype), *shape)
        found.update(zip(members, p.split([m.numel() for m in locations]), strict=True))
    for i, gate in enumerate(gates):
        if gate.kept is not None:
            left = none.new_zeros(len(gate.kept) + gate.num_removed)
            found[i] = left.index_copy(0, gate.kept, found[i])
    return torch.cat([found[i] for i in range(len(gates))]) if gates else none[:0]


def parts_of(
    ins: Sequence[Ints], owner: Ints, steps: Sequence[Step], device: torch.device
) -> list[list[Part]]:
    """For each tensor that an operation reads: where its positions come from."""
    found = []
    for units in ins:
        assert (units >= FIRST).all()
        makers = owner[units]
        own = []
        for number in np.unique(makers).tolist():
            positions = np.flatnonzero(makers == number)
            own.append(
                Part(number, steps[number].size, units[positions] - steps[number].first, positions, device)
            )
        found.append(own)
    return found
