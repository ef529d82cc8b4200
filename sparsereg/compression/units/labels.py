"""Labels: which unit an element of a tensor belongs to, and what is known about the units.

A *unit* is one position along one axis of a tensor: a channel, a hidden unit, one of the numbers of an
embedding. Its elements are zero (or constant) together when whatever makes them is zero. Every element
of every tensor has one label: the number of its unit, or ``LIVE`` if it depends on the input whatever
units are taken away, or ``BLANK`` where nothing is, as in padding.

While operations are visited in order, units are found equal (both go or none), fixed (never go), and
arranged in *grids*: where an axis is split in two, the units that stay must form a rectangle.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

BLANK, LIVE, FIRST = 0, 1, 2
Labels = Tensor
"""int32, the shape of the tensor that it describes."""
Ints = NDArray[np.int64]


@dataclass
class Grid:
    """Units that stay must form a grid: units[i, j] stays iff row i and column j stay.

    Attributes:
        units: labels, (rows, columns, ...).
        rows: labels that stay iff their row does, (rows,); None if nobody asks.
    """

    units: Ints
    rows: Ints | None = None


@dataclass
class Nested:
    """Units that lie within others: units[i, j] stays iff within[i, j] and row i's own unit stay.

    Attributes:
        units: labels, (rows, columns).
        within: labels, (rows, columns), the same in rows that share them.
        own: labels, (rows,).
    """

    units: Ints
    within: Ints
    own: Ints


@dataclass(frozen=True)
class Experts:
    """Experts that a router picks: rows of several tables.

    Attributes:
        units: one for each expert, (experts,).
        tables: weights whose rows they are.
        makers: those whose rows are zero where an expert is gone.
        picks: operations that look rows up, with the indices by which they do.
        hidden: tensors that are zero where an expert is gone, with the same indices, along their first axes.
    """

    units: Ints
    tables: tuple[fx.Node, ...]
    makers: tuple[fx.Node, ...]
    picks: dict[fx.Node, fx.Node]
    hidden: dict[fx.Node, fx.Node]


@dataclass
class Unions:
    """Disjoint sets of units, as an array of representatives that is brought up to date in bulk."""

    parent: Ints = field(default_factory=lambda: np.arange(FIRST))

    def new(self, size: int) -> Ints:
        """Make so many new units; return their numbers."""
        first = len(self.parent)
        added = np.arange(first, first + size)
        self.parent = np.concatenate([self.parent, added])
        return added

    def find(self, units: Ints) -> Ints:
        """Representatives of units, of any shape."""
        found = self.parent[units]
        while True:
            above = self.parent[found]
            if np.array_equal(above, found):
                return found
            found = above

    def root(self, unit: int) -> int:
        """Representative of one unit."""
        while (above := int(self.parent[unit])) != unit:
            unit = above
        return unit

    def unite(self, a: Ints, b: Ints) -> None:
        """Put a[i] and b[i] into one set, for all i."""
        a, b = np.ravel(a), np.ravel(b)
        while True:
            a, b = self.find(a), self.find(b)
            differs = a != b
            if not differs.any():
                return
            low, high = np.minimum(a, b)[differs], np.maximum(a, b)[differs]
            # Of several partners of one unit the last is written; the others follow in the next round.
            self.parent[high] = low
            a, b = low, high


class Axes:
    """The labels of all tensors of a graph, and what follows for the units.

    Attributes:
        of: labels of each node's tensor; a tuple of them for a node that returns several tensors.
        weight_axes: for weights of linear layers, convolutions, ...: the labels along each axis.
        fixed: for a unit that never goes, the reason and the operation that keeps it.
        owner: for each run of new units its first one, the weight or input that makes them, and the axis;
            -1 for every element of a weight that is read as it is.
        whole: for a weight of which nothing has units, the reason and the operation that keeps it.
        means_of_all: means over units that are zeros where these are gone, not over those that stay.
        averaged: units over which a normalisation takes means: these are over the units that stay.
        averaged_by_groups: likewise channels, over which it takes means group by group.
        grids: units that have to stay as grids.
        nested: units that lie within others.
        heads: units that stand for attention heads, and whether some of them share their keys.
        inputs: for inputs whose features are units: the tensor, the axis and the units.
        vectors: likewise computed vectors whose places are units.
        shapes: results of operations that give a tensor another shape, which has to stay rectangular.
        experts: rows of tables that routers pick.
        products: runs of units that stay while both of two others do: the first, and the two of each.
    """

    def __init__(self) -> None:
        self.sets = Unions()
        self.of: dict[fx.Node, Labels | tuple[Labels, ...] | None] = {}
        self.weight_axes: dict[fx.Node, list[Ints | None]] = {}
        self.owner: list[tuple[int, fx.Node, int]] = []
        self.fixed: dict[int, tuple[str, fx.Node | None]] = {}
        self.whole: dict[fx.Node, tuple[str, fx.Node]] = {}
        self.averaged: list[Ints] = []
        self.averaged_by_groups: list[Ints] = []
        self.means_of_all: set[fx.Node] = set()
        self.grids: list[Grid] = []
        self.nested: list[Nested] = []
        self.heads: list[tuple[Ints, bool]] = []
        self.inputs: list[tuple[fx.Node, int, Ints]] = []
        self.vectors: list[tuple[fx.Node, int, Ints]] = []
        self.shapes: list[tuple[fx.Node, Labels]] = []
        self.products: list[tuple[int, Ints, Ints]] = []
        self.experts: list[Experts] = []

    def fresh(self, size: int, node: fx.Node, axis: int) -> Ints:
        """New units made by a weight (or input) along one of its axes."""
        units = self.sets.new(size)
        self.owner.append((int(units[0]) if size else -1, node, axis))
        return units

    def picks_experts(self, node: fx.Node) -> bool:
        """Whether an operation looks up experts that a router has picked."""
        return any(node in one.picks for one in self.experts)

    def both(self, a: Ints, b: Ints) -> Ints:
        """New units of which each stays while a[i] and b[i] do; ``LIVE`` where one of these is."""
        units = self.sets.new(len(a))
        self.products.append((int(units[0]) if len(units) else -1, a, b))
        return np.where((a < FIRST) | (b < FIRST), LIVE, units)

    def parts_of(self, units: Ints) -> tuple[Ints, Ints] | None:
        """The two units of which each of some units is made; None if one is not made of two."""
        starts = np.array([first for first, _, _ in self.products], dtype=np.int64)
        run = np.searchsorted(starts, units.ravel(), "right") - 1
        if not len(starts) or (run < 0).any() or len(np.unique(run)) > 1:
            return None
        first, a, b = self.products[run[0]]
        place = units - first
        return (a[place], b[place]) if (place < len(a)).all() else None

    def equal(self, a: Ints, b: Ints, why: str, node: fx.Node) -> None:
        """Units a[i] and b[i] go together; what meets ``LIVE`` stays."""
        a, b = np.broadcast_arrays(a, b)
        a, b = np.ravel(a).astype(np.int64), np.ravel(b).astype(np.int64)
        a, b = np.divmod(np.unique(a << 32 | b), 1 << 32)
        both = (a >= FIRST) & (b >= FIRST)
        self.sets.unite(a[both], b[both])
        self.fix(a[(b == LIVE) & (a >= FIRST)], why, node)
        self.fix(b[(a == LIVE) & (b >= FIRST)], why, node)

    def fix(self, units: Ints | Labels | None, why: str, node: fx.Node) -> None:
        """These units never go, because of one operation."""
        if units is None:
            return
        numbers = np.unique(stored(units).numpy() if isinstance(units, Tensor) else units)
        for unit in numbers[numbers >= FIRST].tolist():
            self.fixed.setdefault(unit, (why, node))

    def reduce(self, labels: Labels, keep: tuple[int, ...], why: str, node: fx.Node) -> Ints:
        """Labels as a function of some axes; units that differ along the others are tied.

        Args:
            labels: of a tensor.
            keep: axes, in the order of the result.
            why: what asks, for units that meet ``LIVE``.
            node: the operation that asks.
        """
        moved = labels.movedim(keep, tuple(range(len(keep))))
        shape = moved.shape[: len(keep)]
        if moved.numel() == 0:
            return np.zeros(shape, dtype=np.int64)
        for axis in range(len(keep), moved.dim()):
            if moved.stride(axis) == 0:
                moved = moved.narrow(axis, 0, 1)
        flat = moved.reshape(int(np.prod(shape)), -1).numpy().astype(np.int64)
        most = flat.max(1)
        least = np.where(flat == BLANK, np.iinfo(np.int64).max, flat).min(1)
        uneven = (most != least) & (most != BLANK)
        if uneven.any():
            rows = flat[uneven]
            self._keep_parts(rows, why, node)
            tied = np.where(rows == BLANK, most[uneven][:, None], rows)
            self.equal(tied, np.broadcast_to(most[uneven][:, None], tied.shape), why, node)
        return np.asarray(most.reshape(tuple(shape)))

    def _keep_parts(self, rows: Ints, why: str, node: fx.Node) -> None:
        """Of units made of two, which differ along a row that is tied, the part that differs stays.

        What comes of them has the places along that axis, and no label that tells which of them are left.
        """
        for first, *parts in self.products:
            own = (rows >= first) & (rows < first + len(parts[0]))
            for part in parts if own.any() else ():
                made = np.where(own, part[np.where(own, rows - first, 0)], -1)
                differs = np.where(own, made, made.max(1, keepdims=True)).min(1) != made.max(1)
                self.fix(made[differs], why, node)


def compacted(labels: Labels) -> Labels:
    """The same labels, stored once along each axis along which they do not differ.

    What comes of them is then as fast as there are units, however many positions an image has.
    """
    small = stored(labels)
    for axis in range(small.dim()):
        if small.shape[axis] > 1 and torch.equal(small.select(axis, 1), small.select(axis, 0)):
            first = small.narrow(axis, 0, 1)
            if bool((small == first).all()):
                small = first
    return small.contiguous().clone().expand(labels.shape)


def stored(labels: Labels) -> Labels:
    """One position along each axis that repeats it."""
    return stored_together(labels)[0]


def stored_together(*labels: Labels) -> list[Labels]:
    """Labels that are broadcast to each other, with one position along axes along which all repeat it."""
    parts = list(torch.broadcast_tensors(*labels))
    for axis in range(parts[0].dim()):
        if parts[0].shape[axis] > 1 and all(part.stride(axis) == 0 for part in parts):
            parts = [part.narrow(axis, 0, 1) for part in parts]
    return parts


def varying(labels: Labels) -> set[int]:
    """Axes along which labels differ, ``BLANK`` aside."""
    axes = set()
    labels = stored(labels)
    blank = bool((labels == BLANK).any())
    for axis in range(labels.dim()):
        if labels.shape[axis] < 2 or labels.stride(axis) == 0:
            continue
        if blank:
            most = labels.amax(axis)
            least = labels.masked_fill(labels == BLANK, torch.iinfo(labels.dtype).max).amin(axis)
            differs = bool(((most != least) & (most != BLANK)).any())
        else:
            differs = not bool((labels == labels.narrow(axis, 0, 1)).all())
        if differs:
            axes.add(axis)
    return axes


def live(shape: tuple[int, ...] | torch.Size) -> Labels:
    """Labels of a tensor of which nothing goes, without memory of its own."""
    return torch.full((), LIVE, dtype=torch.int32).expand(tuple(shape))


def along(units: Ints, axis: int, shape: tuple[int, ...] | torch.Size) -> Labels:
    """Labels of a tensor whose units lie along one axis."""
    view = [1] * len(shape)
    view[axis] = -1
    return torch.from_numpy(np.ascontiguousarray(units)).int().view(view).expand(tuple(shape))
