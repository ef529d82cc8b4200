"""Areas that each have weights of their own: what they ask for, and which households may stand for them.

Measures of households are stored once. An area adds only its targets and the shares of the weights that it
starts from; the areas' shares of a household add up to one, so that the areas start as the nation.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import scipy.sparse as sp

_SHARES_ADD_UP = 1e-6
"""By how much the shares of a household may miss one: files hold rounded numbers."""
_DRAWN_AT_ONCE = 2_000_000


@dataclass(frozen=True, eq=False)
class Placement:
    """Which households may stand for which area, and with what share of their weight.

    Args:
        areas: One unique name per area.
        shares: Areas x households, CSR, entries in (0, 1]; or shape (areas,): each area has this share of
            every household.
    """

    areas: tuple[str, ...]
    shares: sp.csr_array | np.ndarray

    @classmethod
    def by_home(cls, home: np.ndarray) -> Placement:
        """Every household stands for the area that it lives in.

        Args:
            home: Name of the area of each household, shape (households,).
        """
        areas, place = np.unique(np.asarray(home).astype(str), return_inverse=True)
        ones = (np.ones(len(place)), (place, np.arange(len(place))))
        return cls(tuple(areas.tolist()), sp.csr_array(ones, shape=(len(areas), len(place))))

    @classmethod
    def by_clones(
        cls, areas: tuple[str, ...], sizes: np.ndarray, num_households: int, num_clones: int, seed: int = 0
    ) -> Placement:
        """Every household stands for some different areas, drawn in proportion to their size, in equal parts.

        Args:
            areas: Names.
            sizes: Chance of each area to be drawn first, up to a factor, > 0.
            num_households: How many there are.
            num_clones: For how many areas each stands, from 1 to their number.
            seed: Of the draw.

        Raises:
            ValueError: there are not so many areas.
        """
        if not 1 <= num_clones <= len(areas):
            raise ValueError(f"clones must be from 1 to the number of areas, {len(areas)}, got {num_clones}")
        rng, chosen = np.random.default_rng(seed), []
        rows = max(1, _DRAWN_AT_ONCE // len(areas))
        for first in range(0, num_households, rows):
            count = min(rows, num_households - first)
            # The areas with the earliest of independent exponential arrivals are a draw without replacement.
            arrival = rng.exponential(size=(count, len(areas))) / sizes
            chosen.append(np.argpartition(arrival, num_clones - 1, axis=1)[:, :num_clones])
        area = np.concatenate(chosen).ravel()
        household = np.repeat(np.arange(num_households), num_clones)
        parts = (np.full(len(area), 1.0 / num_clones), (area, household))
        return cls(areas, sp.csr_array(parts, shape=(len(areas), num_households)))

    def __post_init__(self) -> None:
        if len(set(self.areas)) != len(self.areas):
            raise ValueError("areas must have different names")
        if self.shares.shape[0] != len(self.areas):
            raise ValueError(
                f"shares must have a row for each of {len(self.areas)} areas: {self.shares.shape}"
            )
        values = self.shares if isinstance(self.shares, np.ndarray) else self.shares.data
        if not ((values > 0) & (values <= 1 + _SHARES_ADD_UP)).all():
            raise ValueError("shares must lie in (0, 1]")
        sums = np.atleast_1d(self.shares.sum(axis=0))
        wrong = np.flatnonzero(np.abs(sums - 1.0) > _SHARES_ADD_UP)
        if len(wrong):
            whose = f"of household {wrong[0]} " if isinstance(self.shares, sp.csr_array) else ""
            raise ValueError(f"shares {whose}must add up to 1 over the areas, got {sums[wrong[0]]:.9g}")

    @property
    def is_uniform(self) -> bool:
        """Whether each area has the same share of every household."""
        return isinstance(self.shares, np.ndarray)

    def of(self, area: int, num_households: int) -> tuple[np.ndarray, np.ndarray]:
        """Households that may stand for an area, ascending, and the shares of their weights."""
        if isinstance(self.shares, np.ndarray):
            return np.arange(num_households), np.full(num_households, self.shares[area])
        row = slice(*self.shares.indptr[area : area + 2])
        order = np.argsort(self.shares.indices[row], kind="stable")
        return self.shares.indices[row][order], self.shares.data[row][order]

    def shared_out(self, number: int) -> list[range]:
        """So many runs of neighbouring areas for which about equally many households may stand.

        Args:
            number: How many; some are empty where there are fewer areas.
        """
        shares = self.shares
        places = np.ones(len(shares)) if isinstance(shares, np.ndarray) else np.diff(shares.indptr)
        ends = np.cumsum(places)
        owner = np.minimum(((ends - places / 2) * number / ends[-1]).astype(int), number - 1)
        starts = [*np.searchsorted(owner, np.arange(number)).tolist(), len(places)]
        return [range(first, last) for first, last in itertools.pairwise(starts)]


@dataclass(frozen=True)
class Sum:
    """A target, and targets of areas or groups that add up to the same total.

    Args:
        whole: Index of the target of the nation or of a group.
        parts: Indices of those of what it is made of, shape (parts,).
        asked: The whole's value.
        total: The sum of the parts' values.
    """

    whole: int
    parts: np.ndarray
    asked: float
    total: float

    def differs(self, tolerance: float) -> bool:
        """Whether both differ by more than this share."""
        return abs(self.total - self.asked) > tolerance * max(abs(self.asked), abs(self.total))


@dataclass(frozen=True, eq=False)
class AreaProblem:
    """Totals that areas, groups of them and the nation ask for, of measures that all share.

    Args:
        measures: Measures x households, float32 or float64: what one unit of weight adds, wherever it stands.
        initial_weights: Of the nation, > 0, shape (households,).
        placement: Which households may stand for which area.
        targets: Value of each target, shape (targets,).
        measure: Index of the measure that each target sums, shape (targets,).
        area: What each target is of, shape (targets,): index of an area, number of areas + index of a group,
            or -1 for the nation.
        names: One name per target.
        measure_names: One name per measure.
        ids: One unique id per household.
        groups: Names of groups of areas, such as states.
        parent: The group that each area, then each group, is part of, numbered as in ``area``, shape (areas +
            groups,); None: all are directly parts of the nation.
        prices: How much each target counts where they are soft, >= 0, shape (targets,); None: 1.
        standard_errors: Of the targets, in their units, 0 for those known exactly; None: not known.
        levels: What each target is a target of, in words; None: nation, group or area.

    Raises:
        ValueError: shapes do not fit, an area has a target twice for the same measure, or groups are parts
            of themselves.
    """

    measures: sp.csr_array
    initial_weights: np.ndarray
    placement: Placement
    targets: np.ndarray
    measure: np.ndarray
    area: np.ndarray
    names: tuple[str, ...]
    measure_names: tuple[str, ...]
    ids: np.ndarray
    groups: tuple[str, ...] = ()
    parent: np.ndarray | None = None
    prices: np.ndarray | None = None
    standard_errors: np.ndarray | None = None
    levels: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        num = len(self.targets)
        if not len(self.measure) == len(self.area) == len(self.names) == num:
            raise ValueError("targets, measure, area and names must have one value per target")
        if self.initial_weights.shape != (self.measures.shape[1],) or not (self.initial_weights > 0).all():
            raise ValueError("initial_weights must be > 0, one per household")
        pair = self.area * np.int64(len(self.measure_names)) + self.measure
        pairs, count = np.unique(pair, return_counts=True)
        if (count > 1).any():
            first, second = np.flatnonzero(pair == pairs[count > 1][0])[:2]
            raise ValueError(
                f"targets {self.names[first]!r} and {self.names[second]!r} ask for the same total of one area"
            )
        if self.parent is not None and len(self.parent) != len(self.places):
            raise ValueError(f"parent must have a value for each of {len(self.places)} areas and groups")
        _ = self.depth

    @property
    def num_households(self) -> int:
        """How many households the nation has."""
        return int(self.measures.shape[1])

    @property
    def num_areas(self) -> int:
        """How many areas there are."""
        return len(self.placement.areas)

    @cached_property
    def places(self) -> tuple[str, ...]:
        """Names of areas, then of groups."""
        return (*self.placement.areas, *self.groups)

    @cached_property
    def is_of_area(self) -> np.ndarray:
        """Which targets are of an area, not of a group or the nation."""
        return (self.area >= 0) & (self.area < self.num_areas)

    @cached_property
    def above(self) -> np.ndarray:
        """What each area and group is directly part of; -1 is the nation."""
        return np.full(len(self.places), -1) if self.parent is None else self.parent

    @cached_property
    def depth(self) -> np.ndarray:
        """How many groups each area and group is in, counting itself; the nation, last, has 0."""
        depth = np.zeros(len(self.places) + 1, dtype=np.int64)
        at = np.arange(len(self.places))
        while (at >= 0).any():
            depth[:-1] += at >= 0
            if depth.max(initial=0) > len(self.places):
                around = self.groups[int(depth[self.num_areas : -1].argmax())]
                raise ValueError(f"groups go round in a circle: {around!r} is a part of itself")
            at = np.append(self.above, -1)[at]
        return depth

    @cached_property
    def by_area(self) -> list[np.ndarray]:
        """Indices of the targets of each area."""
        return self.by_place[: self.num_areas]

    @cached_property
    def by_place(self) -> list[np.ndarray]:
        """Indices of the targets of each area, of each group, and last of the nation."""
        place = np.where(self.area < 0, len(self.places), self.area)
        order = np.argsort(place, kind="stable")
        starts = np.searchsorted(place[order], np.arange(len(self.places) + 2))
        return [order[a:b] for a, b in itertools.pairwise(starts)]

    @cached_property
    def children(self) -> list[np.ndarray]:
        """What each area, each group, and last the nation is directly made of."""
        place = np.where(self.above < 0, len(self.places), self.above)
        order = np.argsort(place, kind="stable")
        starts = np.searchsorted(place[order], np.arange(len(self.places) + 2))
        return [order[a:b] for a, b in itertools.pairwise(starts)]

    def chain(self, area: int) -> list[int]:
        """An area and all that it is in, the nation last, as places (``by_place``)."""
        found = []
        while area >= 0:
            found.append(area)
            area = int(self.above[area])
        return [*found, len(self.places)]

    def leaves(self, place: int) -> list[int]:
        """The areas that a place is made of; an area is made of itself."""
        if place < self.num_areas:
            return [place]
        return [area for child in self.children[place].tolist() for area in self.leaves(child)]

    def sums(self) -> list[Sum]:
        """Targets of the nation and of groups whose parts all have one, too; from the nation down."""
        index = {(int(a), int(m)): i for i, (a, m) in enumerate(zip(self.area, self.measure, strict=True))}

        def parts(place: int, measure: int) -> list[int] | None:
            """Targets of what a place is made of; None where one has none and is made of nothing."""
            found: list[int] = []
            for child in self.children[place].tolist():
                own = index.get((child, measure))
                below = (
                    [own] if own is not None else parts(child, measure) if child >= self.num_areas else None
                )
                if below is None:
                    return None
                found += below
            return found

        wholes = np.flatnonzero(~self.is_of_area)
        made = []
        for i in wholes[np.argsort(self.depth[self.area[wholes]], kind="stable")].tolist():
            below = parts(int(self.area[i]) if self.area[i] >= 0 else len(self.places), int(self.measure[i]))
            if below:
                at = np.array(below)
                made.append(Sum(i, at, float(self.targets[i]), float(self.targets[at].sum())))
        return made

    def disagreements(self, tolerance: float = 1e-6) -> list[Sum]:
        """Sums of which whole and parts ask for different totals.

        Args:
            tolerance: Largest relative difference that is none.
        """
        return [found for found in self.sums() if found.differs(tolerance)]

    def place_name(self, target: int) -> str:
        """What a target is of: an area, a group, or "" for the nation."""
        return str((*self.places, "")[self.area[target]])

    def level(self, target: int) -> str:
        """What a target is a target of, in words."""
        if self.levels is not None and self.levels[target]:
            return self.levels[target]
        return "nation" if self.area[target] < 0 else "area" if self.is_of_area[target] else "group"

    def reconciled(self, how: str = "proportional") -> AreaProblem:
        """The same with targets that add up.

        Args:
            how: "proportional" multiplies parts to their whole, from the nation down; "standard_errors" moves
                wholes and parts by as little as possible, each over its standard error.

        Raises:
            ValueError: parts that add up to 0 cannot be multiplied, or nothing has a standard error.
        """
        if how == "proportional":
            targets = self.targets.copy()
            for found in self.sums():
                whole, total = float(targets[found.whole]), float(targets[found.parts].sum())
                if whole == total:
                    continue
                if total == 0:
                    raise ValueError(
                        f"the parts of target {self.names[found.whole]!r} add up to 0, it asks for {whole:g}:"
                        " they cannot be multiplied to it"
                    )
                targets[found.parts] *= whole / total
            return replace(self, targets=targets)
        return replace(self, targets=self._moved())

    def _moved(self) -> np.ndarray:
        """Targets after generalised least squares over all sums of a measure at once.

        Source: Stone, Champernowne and Meade, The precision of national income estimates, Review of Economic
        Studies 9 (1942).
        """
        if self.standard_errors is None:
            raise ValueError("targets have no standard errors to reconcile them by: fill standard_error")
        targets, sums = self.targets.astype(np.float64), self.sums()
        of = np.array([self.measure[found.whole] for found in sums], dtype=np.int64)
        for measure in np.unique(of):
            own = [found for found, m in zip(sums, of, strict=True) if m == measure]
            some = np.unique(np.concatenate([np.append(found.parts, found.whole) for found in own]))
            signs = np.zeros((len(own), len(some)))
            for k, found in enumerate(own):
                signs[k, np.searchsorted(some, found.parts)] = 1.0
                signs[k, np.searchsorted(some, found.whole)] = -1.0
            size = max(float(np.abs(targets[some]).max()), np.finfo(np.float64).tiny)
            spread = signs * (self.standard_errors[some] / size)
            # The rows are scaled, so that the smallest moves are found by a stable factorisation.
            moves = np.linalg.lstsq(spread, -(signs @ targets[some]) / size, rcond=None)[0]
            targets[some] += self.standard_errors[some] * moves
            left = np.abs(signs @ targets[some])
            if (left > 1e-9 * size).any():
                name = self.names[own[int(left.argmax())].whole]
                raise ValueError(
                    f"target {name!r} and its parts do not add up and have no standard error by which they"
                    " could give way"
                )
        return targets
