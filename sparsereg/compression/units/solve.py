"""From constraints on units to the choices that are left: which sets of units can go, and with what.

A *choice* is what one gate decides. A unit stays iff all of its choices stay: a hidden unit has one, the
number of an attention head's vector two, its head and its place in the head. Equal units have equal choices;
where units have to form a grid, each is made to depend on the choice of its row and that of its column.
Uniting or splitting choices later keeps every grid a grid.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from torch import fx

from sparsereg.compression.units.branches import Branches
from sparsereg.compression.units.labels import FIRST, Axes, Ints, Labels, Nested, Unions, varying
from sparsereg.compression.units.rules.table import Labeller

Choices = frozenset[int]


class Solver:
    """Finds the choices of every unit.

    Args:
        axes: labels and constraints of a network.
    """

    def __init__(self, axes: Axes) -> None:
        self.axes = axes
        self.choices = Unions(axes.sets.parent.copy())
        self.split: dict[int, Choices] = {}
        for first, one, two in axes.products:
            self._pair(np.arange(first, first + len(one)), one, two)
        for nested in axes.nested:
            self.grid(nested.within)
        for nested in axes.nested:
            self._nest(nested)
        for _, labels in axes.shapes:
            if len(varying(labels)) > 1:
                self.grid(_corner(labels))
        for grid in axes.grids:
            self.grid(grid.units)
            if grid.rows is not None:
                self._rows(grid.units, grid.rows)

    def _pair(self, units: Ints, one: Ints, two: Ints) -> None:
        """Units that stay while both of two others do."""
        roots = [self.choices.find(u).tolist() for u in (units, one, two)]
        for unit, a, b in zip(*roots, strict=True):
            if unit not in (a, b):
                self.split.setdefault(unit, frozenset(p for p in (a, b) if p >= FIRST))

    def of(self, unit: int) -> Choices:
        """The choices on which a unit depends."""
        root = self.choices.root(unit)
        if root not in self.split:
            return frozenset([root])
        return frozenset().union(*(self.of(part) for part in self.split[root]))

    def unite(self, parts: Choices) -> None:
        """Make several choices one."""
        first, *others = sorted(parts)
        for other in others:
            self.choices.unite(np.array([first]), np.array([other]))

    def equal(self, a: Choices, b: Choices) -> None:
        """Two units stay together."""
        if a == b:
            return
        for one, many in ((a, b), (b, a)):
            if len(one) == 1 and not one <= many and len(many) > 1:
                self.split[next(iter(one))] = many
                return
        if a - b and b - a:
            self.unite((a - b) | (b - a))
        else:  # one needs what the other does not: that must go with what they share
            self.unite(((a - b) | (b - a)) | {min(a & b)})

    def _nest(self, nested: Nested) -> None:
        """Let units depend on those that they lie within, and on their row's own."""
        units, within = self.choices.find(nested.units), self.choices.find(nested.within)
        own = np.broadcast_to(nested.own[:, None], within.shape)
        for unit, outer, row in zip(*(part.ravel().tolist() for part in (units, within, own)), strict=True):
            self.split.setdefault(unit, frozenset([outer, row]))

    def grid(self, units: Ints) -> None:
        """Let the units that stay form a grid along the axes of an array of them."""
        roots = self.choices.find(units)
        if (roots < FIRST).any():
            self._keep(roots)
            return
        for axis in range(roots.ndim):  # equal rows stand for each other
            roots = np.unique(roots, axis=axis) if roots.shape[axis] > 1 else roots
        roots = roots.reshape([n for n in roots.shape if n > 1])
        if roots.ndim < 2:
            return
        roots = self._linked(roots)
        if roots.ndim < 2:
            return
        sets = np.empty(roots.shape, dtype=object)
        for place in np.ndindex(roots.shape):
            sets[place] = self.of(int(roots[place]))
        if _is_product(sets):
            return
        own = sets - frozenset.intersection(*sets.ravel())
        if all(len(s) == 1 for s in own.ravel()) and len(frozenset().union(*own.ravel())) == own.size:
            self._factor(own)
        else:
            self._tie(sets)

    def _linked(self, roots: Ints) -> Ints:
        """Tie whole slabs where single units are tied, if different units are left then; else leave them.

        Where queries and keys are turned by pairs and values beside them are not, values go by pairs, too.
        """
        stand = [_first_alike(np.moveaxis(roots, axis, -1)) for axis in range(roots.ndim)]
        left = [np.unique(s) for s in stand]
        rest = roots[np.ix_(*left)]
        if rest.size == roots.size or len(np.unique(rest)) < rest.size:
            return roots
        partner = roots[np.ix_(*stand)]
        known = dict(zip(rest.ravel().tolist(), rest.ravel().tolist(), strict=True))
        if any(known.setdefault(int(a), int(b)) != b for a, b in zip(roots.flat, partner.flat, strict=True)):
            return roots
        if any((self.of(int(a)) != {int(a)}) for a in np.unique(roots)):
            return roots
        self.choices.unite(roots, partner)
        merged = self.choices.find(rest)
        return merged.reshape([n for n in merged.shape if n > 1])

    def _factor(self, sets: np.ndarray) -> None:
        """Give each unit a choice for its place along each axis."""
        per_axis = [self.choices.new(n) for n in sets.shape]
        for place in np.ndindex(sets.shape):
            own = next(iter(sets[place]))
            self.split[own] = frozenset(int(per_axis[i][j]) for i, j in enumerate(place))

    def _tie(self, sets: np.ndarray) -> None:
        """Along all axes but the longest, what differs goes together."""
        free = int(np.argmax(sets.shape))
        for k in range(sets.shape[free]):
            slab = sets.take(k, axis=free).ravel()
            for other in slab[1:]:
                self.equal(self._again(slab[0]), self._again(other))

    def _again(self, choices: Choices) -> Choices:
        return frozenset().union(*(self.of(c) for c in choices))

    def _keep(self, roots: Ints) -> None:
        for unit in np.unique(roots[roots >= FIRST]).tolist():
            self.axes.fixed.setdefault(unit, ("it lies in one shape with what cannot go", None))

    def _rows(self, units: Ints, rows: Ints) -> None:
        """Each row's own unit stays iff its row does."""
        roots = self.choices.find(np.column_stack([units, rows]))
        _, first = np.unique(roots, axis=0, return_index=True)
        known: dict[int, Choices] = {}
        for i in np.sort(first).tolist():  # rows that are alike say the same
            line, row = sorted(set(units[i].tolist())), int(rows[i])
            inside = [self._known(u, known) for u in line if u >= FIRST]
            if not inside:
                continue
            common = frozenset.intersection(*inside)
            if not common:
                self.unite(frozenset().union(*inside))
                known.clear()
                common = self.of(int(units[i][0]))
            own = self._known(row, known)
            if own != common:
                self.equal(own, common)
                known.clear()

    def _known(self, unit: int, known: dict[int, Choices]) -> Choices:
        """The choices of a unit, kept for as long as none change."""
        if unit not in known:
            known[unit] = self.of(unit)
        return known[unit]


def _first_alike(lines: Ints) -> Ints:
    """For each position along the last axis the first one that holds a unit of it anywhere, (size,)."""
    size = lines.shape[-1]
    stand = np.arange(size)
    for line in np.unique(lines.reshape(-1, size), axis=0):
        _, first, inverse = np.unique(line, return_index=True, return_inverse=True)
        for here, there in enumerate(first[inverse].tolist()):
            a, b = int(stand[here]), int(stand[there])
            if a != b:
                stand[stand == max(a, b)] = min(a, b)
    return stand


def _corner(labels: Labels) -> Ints:
    """Labels along the axes that vary; along the others they are the same."""
    others = [d for d in range(labels.dim()) if d not in varying(labels)]
    return (labels.amax(others) if others else labels).numpy().astype(np.int64)


def _is_product(sets: np.ndarray) -> bool:
    """Whether each element depends on exactly what its rows along all axes share."""
    shared = []
    for axis in range(sets.ndim):
        slabs = [frozenset.intersection(*sets.take(j, axis=axis).ravel()) for j in range(sets.shape[axis])]
        shared.append(slabs)
    return all(
        frozenset().union(*(shared[i][j] for i, j in enumerate(place))) == sets[place]
        for place in np.ndindex(sets.shape)
    )


@dataclass(frozen=True)
class Units:
    """The solved structure of a network.

    Attributes:
        labeller: labels of all tensors.
        roots: representative of each unit, (units,).
        split: choices of the representatives that have more than one, or another one than themselves.
        fixed: choices that never go, with the reason: operation and node.
        branches: what can go as a whole; their choices are numbered behind those of the units.
    """

    labeller: Labeller
    roots: Ints
    split: dict[int, Choices]
    fixed: dict[int, tuple[str, object]]
    branches: Branches

    def of(self, unit: int) -> Choices:
        """The choices of a unit."""
        root = int(self.roots[unit])
        return self.split.get(root, frozenset([root]))

    @property
    def features(self) -> set[int]:
        """The choices that features of inputs are."""
        own = [self.of(int(u)) for _, _, units in self.labeller.axes.inputs for u in units]
        return set().union(*own)

    @property
    def experts(self) -> set[int]:
        """The choices that experts are which a router picks."""
        return set().union(*(self.of(int(u)) for one in self.labeller.axes.experts for u in one.units))

    def alive(self, gone: set[int]) -> np.ndarray:
        """Which units stay when some choices are gone, (units,); ``BLANK`` and ``LIVE`` do."""
        stays = np.ones(len(self.roots), dtype=bool)
        stays[[choice for choice in gone if choice < len(stays)]] = False
        splits, own, parts = self._parts
        lost = np.zeros(len(self.roots), dtype=bool)
        lost[own[~stays[parts]]] = True
        stays[splits] = ~lost[splits]
        return stays[self.roots]

    @cached_property
    def _parts(self) -> tuple[Ints, Ints, Ints]:
        """Units that are split, and in pairs such a unit and each of its choices."""
        pairs = [(root, choice) for root, choices in self.split.items() for choice in choices]
        own, parts = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
        return np.array(list(self.split), dtype=np.int64), own, parts

    @property
    def removable(self) -> list[int]:
        """All choices that can go, in the order in which they were made."""
        used: set[int] = set()
        for first, node, axis in self.labeller.axes.owner:
            size = _size_of_owner(self.labeller, node, axis)
            for unit in range(first, first + size):
                used |= self.of(unit)
        return [*sorted(c for c in used if c not in self.fixed), *(b.choice for b in self.branches.found)]


def _size_of_owner(labeller: Labeller, node: object, axis: int) -> int:
    program = labeller.program
    value = program.values[node]  # type: ignore[index]
    if axis == -1:
        return int(value.numel())
    return int(value.shape[axis])


def solve(labeller: Labeller) -> Units:
    """Find the choices of every unit of a labelled network."""
    axes = labeller.axes
    solver = Solver(axes)
    roots = solver.choices.find(np.arange(len(solver.choices.parent)))
    split: dict[int, Choices] = {}
    for root in solver.split:
        own = int(roots[root])
        split[own] = solver.of(own)
    fixed: dict[int, tuple[str, object]] = {}
    for unit, why in axes.fixed.items():
        for choice in split.get(int(roots[unit]), frozenset([int(roots[unit])])):
            fixed.setdefault(choice, why)
    units = Units(labeller, roots, split, fixed, Branches(labeller.program, len(roots)))
    _keep_all_of_products(units)
    return units


def _keep_all_of_products(units: Units) -> None:
    """No choice takes all that a product sums over, such as queries and keys, and nothing else."""
    labeller = units.labeller
    found: dict[int, tuple[set[int], fx.Node]] = {}
    for pair in (pair for pair in labeller.reads if len(pair) == 2):
        own = [set(units.roots[np.unique(_corner(labeller.labels(source)))].tolist()) for source in pair]
        for summed in own:
            sets = [units.of(unit) for unit in summed if unit >= FIRST]
            for choice in frozenset.intersection(*sets) if len(sets) > 1 else ():
                found.setdefault(choice, (own[0] | own[1], pair[0]))
    for first, node, axis in labeller.axes.owner if found else ():
        for unit in range(first, first + _size_of_owner(labeller, node, axis)):
            for choice in units.of(unit) & found.keys():
                if int(units.roots[unit]) not in found[choice][0]:
                    del found[choice]  # it takes something else, too
    for choice, (_, node) in found.items():
        units.fixed.setdefault(choice, ("a product would sum over nothing without it", node))
