"""What lies along one axis of a tensor: for each position, the choices on which it depends.

A position stays iff all of its choices do. All tensors of a network have few different lines between them,
and all lines few different sets of choices, so that sizes are counted in one pass over short arrays.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from sparsereg.compression.units.branches import Ways
from sparsereg.compression.units.labels import FIRST, Ints, Labels, varying
from sparsereg.compression.units.solve import Choices, Units

Bools = NDArray[np.bool_]
ALWAYS: Choices = frozenset()
"""The choices of a position that never goes."""


@dataclass
class Lines:
    """The different lines of a network.

    Attributes:
        units: of the network.
        sets: different sets of choices; the first is empty.
        lines: different lines, each an array of positions in ``sets``.
    """

    units: Units
    sets: list[Choices] = field(default_factory=lambda: [ALWAYS])
    lines: list[Ints] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._set_ids: dict[Choices, int] = {ALWAYS: 0}
        self._of_root: dict[int, int] = {}
        self._line_ids: dict[bytes, int] = {}

    def set_id(self, choices: Iterable[int]) -> int:
        """Position of a set of choices in ``sets``; choices that never go are left out."""
        own = frozenset(c for c in choices if c not in self.units.fixed)
        if own not in self._set_ids:
            self._set_ids[own] = len(self.sets)
            self.sets.append(own)
        return self._set_ids[own]

    def line(self, ids: Ints) -> int:
        """Position of a line in ``lines``."""
        key = ids.astype(np.int64).tobytes()
        if key not in self._line_ids:
            self._line_ids[key] = len(self.lines)
            self.lines.append(ids.astype(np.int64))
        return self._line_ids[key]

    def of_units(self, units: Ints) -> Ints:
        """Sets of an array of units, of its shape."""
        roots = self.units.roots[units]
        found, inverse = np.unique(roots, return_inverse=True)
        return np.array([self._root(int(root)) for root in found])[inverse].reshape(units.shape)

    def _root(self, root: int) -> int:
        if root < FIRST:
            return 0
        if root not in self._of_root:
            self._of_root[root] = self.set_id(self.units.of(root))
        return self._of_root[root]

    def of_labels(self, labels: Labels) -> list[Ints]:
        """The line along each axis of a tensor."""
        axes = sorted(varying(labels))
        found = [np.zeros(n, dtype=np.int64) for n in labels.shape]
        others = [d for d in range(labels.dim()) if d not in axes]
        corner = self.of_units((labels.amax(others) if others else labels).numpy().astype(np.int64))
        for place, axis in enumerate(axes):
            slabs = np.moveaxis(corner, place, 0).reshape(corner.shape[place], -1)
            found[axis] = np.array([self._common(slab) for slab in slabs])
        return found

    def _common(self, ids: Ints) -> int:
        different = np.unique(ids)
        if len(different) == 1:
            return int(different[0])
        return self.set_id(frozenset.intersection(*(self.sets[i] for i in different)))

    def of_weight(self, node: fx.Node) -> list[Ints]:
        """The line along each axis of a weight."""
        axes = self.units.labeller.axes
        value = self.units.labeller.program.weights[node]
        raw = axes.of.get(node)
        if isinstance(raw, Tensor):
            return self.of_labels(raw)
        along = axes.weight_axes.get(node, [None] * value.dim())
        return [
            np.zeros(n, dtype=np.int64) if line is None else self.of_units(line)
            for n, line in zip(value.shape, along, strict=True)
        ]

    def alive(self, gone: Iterable[int]) -> Bools:
        """Which sets stay when choices are gone, (sets,)."""
        lost = set(gone)
        return np.array([not (choices & lost) for choices in self.sets])


class Sizes:
    """Counts the positions that stay along all lines at once.

    Args:
        lines: of a network; none may be added afterwards.
        others: choices that lie along no line.
    """

    def __init__(self, lines: Lines, others: Iterable[int] = ()) -> None:
        self.lines = lines
        numbers = sorted(frozenset(others).union(*lines.sets))
        self.place = {choice: i for i, choice in enumerate(numbers)}
        longest = max((len(s) for s in lines.sets), default=0) or 1
        self.table = np.full((len(lines.sets), longest), len(numbers))
        for i, choices in enumerate(lines.sets):
            self.table[i, : len(choices)] = [self.place[c] for c in sorted(choices)]
        self.flat = np.concatenate([*lines.lines, np.zeros(0, dtype=np.int64)])
        self.starts = np.cumsum([0, *(len(line) for line in lines.lines)])
        self._owner = torch.from_numpy(np.repeat(np.arange(len(lines.lines)), np.diff(self.starts)))
        self._flat, self._table = torch.from_numpy(self.flat), torch.from_numpy(self.table)

    @property
    def choices(self) -> list[int]:
        """The choices, in the order in which ``counts`` and ``expected`` take them."""
        return list(self.place)

    def counts(self, stays: Bools) -> Ints:
        """Positions that stay along each line, (lines,).

        Args:
            stays: whether each choice stays, (choices,).
        """
        alive = np.append(stays, True)[self.table].all(1)
        sums = np.concatenate([[0], np.cumsum(alive[self.flat])])
        return np.asarray(np.diff(sums[self.starts]))

    def expected(self, p: Tensor) -> tuple[Tensor, Tensor]:
        """Probability that each set stays, (sets,), and expected positions along each line, (lines,).

        Args:
            p: probability that each choice stays, independent of the others, (choices,).
        """
        padded = torch.cat([p, p.new_ones(1)])
        probability = padded[self._table.to(p.device)].prod(1)
        sums = p.new_zeros(len(self.lines.lines))
        return probability, sums.index_add(0, self._owner.to(p.device), probability[self._flat.to(p.device)])


class Alternatives:
    """Which of several sets of ways have one left, all of whose choices stay.

    Args:
        ways: different ones.
        place: position of each choice in what ``any`` and ``expected`` take.
    """

    def __init__(self, ways: Sequence[Ways], place: Mapping[int, int]) -> None:
        most = max((len(w) for w in ways), default=0) or 1
        longest = max((len(way) for w in ways for way in w), default=0) or 1
        always, self._never = len(place), len(place) + 1
        self._table = np.full((len(ways), most, longest), self._never)
        self._common = np.full((len(ways), longest), always)
        for i, own in enumerate(ways):
            common = frozenset.intersection(*own) if own else frozenset()
            self._common[i, : len(common)] = [place[c] for c in sorted(common)]
            for k, way in enumerate(own):
                rest = [place[c] for c in sorted(way - common)]
                self._table[i, k] = [*rest, *[always] * (longest - len(rest))]

    def any(self, stays: Bools) -> Bools:
        """Whether a way is left, (ways,).

        Args:
            stays: whether each choice stays, (choices,).
        """
        padded = np.append(stays, [True, False])
        return np.asarray(padded[self._table].all(2).any(1) & padded[self._common].all(1))

    def expected(self, p: Tensor) -> Tensor:
        """Probability that a way is left, (ways,); what all ways share counts once.

        Args:
            p: probability that each choice stays, independent of the others, (choices,).
        """
        padded = torch.cat([p, p.new_tensor([1.0, 0.0])])
        table, common = (torch.from_numpy(t).to(p.device) for t in (self._table, self._common))
        none = (1 - padded[table].prod(2)).prod(1)
        return (1 - none) * padded[common].prod(1)
