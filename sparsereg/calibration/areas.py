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


@dataclass(frozen=True, eq=False)
class AreaProblem:
    """Totals that areas ask for, of measures that all areas share.

    Args:
        measures: Measures x households, float32 or float64: what one unit of weight adds, wherever it stands.
        initial_weights: Of the nation, > 0, shape (households,).
        placement: Which households may stand for which area.
        targets: Value of each target, shape (targets,).
        measure: Index of the measure that each target sums, shape (targets,).
        area: Index of the area that each target is of, -1 for the nation, shape (targets,).
        names: One name per target.
        measure_names: One name per measure.
        ids: One unique id per household.

    Raises:
        ValueError: shapes do not fit, an area has a target twice for the same measure, or has targets and no
            household.
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

    @property
    def num_households(self) -> int:
        """How many households the nation has."""
        return int(self.measures.shape[1])

    @cached_property
    def by_area(self) -> list[np.ndarray]:
        """Indices of the targets of each area."""
        order = np.argsort(self.area, kind="stable")
        starts = np.searchsorted(self.area[order], np.arange(len(self.placement.areas) + 1))
        return [order[a:b] for a, b in itertools.pairwise(starts)]

    def disagreements(self, tolerance: float = 1e-6) -> list[tuple[int, float, float]]:
        """Measures of which areas and nation ask for different totals: measure, nation, sum of the areas.

        Args:
            tolerance: Largest relative difference that is none.
        """
        found = []
        for target in np.flatnonzero(self.area == -1):
            of_areas = (self.area >= 0) & (self.measure == self.measure[target])
            if int(of_areas.sum()) == len(self.placement.areas):
                total, nation = float(self.targets[of_areas].sum()), float(self.targets[target])
                if abs(total - nation) > tolerance * max(abs(nation), abs(total)):
                    found.append((int(self.measure[target]), nation, total))
        return found

    def reconciled(self) -> AreaProblem:
        """The same with the targets of areas multiplied so that they add up to the nation's.

        Raises:
            ValueError: areas that add up to 0 cannot be brought to another total that way.
        """
        targets = self.targets.copy()
        for measure, nation, total in self.disagreements():
            if total == 0:
                raise ValueError(
                    f"targets of areas for {self.measure_names[measure]!r} add up to 0, the nation asks for"
                    f" {nation:g}: they cannot be multiplied to it"
                )
            targets[(self.area >= 0) & (self.measure == measure)] *= nation / total
        return replace(self, targets=targets)
