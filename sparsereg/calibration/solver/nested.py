"""A matrix of which rows that are sums of others are not stored: fewer operations in every product."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from sparsereg.calibration.solver.matrix import CompiledMatrix, Descent, HouseholdMatrix
from sparsereg.calibration.solver.page_factors import PageBlocks
from sparsereg.linalg.nesting import Nesting
from sparsereg.linalg.threads import in_turns
from sparsereg.shapes import Float, Int, Shaped

_ENTRIES_FOR_LANES = 1_000_000
"""Stored entries from which two lanes descend beside each other (a sweep of four milliseconds): each step is
shorter with two, and between sweeps they wait for each other and add up."""


class NestedProducts:
    """Products with all rows of a matrix of which only those are stored that are no sums of others.

    Args:
        inner: The stored targets.
        nesting: How the other targets follow.
    """

    device = torch.device("cpu")
    is_compiled = True

    def __init__(self, inner: HouseholdMatrix, nesting: Nesting) -> None:
        self._inner, self._nesting = inner, nesting
        self.num_households, self.num_targets = inner.num_households, nesting.num_rows
        self.num_entries = inner.num_entries

    def totals(
        self, weights: Float[Tensor, "households={self.num_households}"]
    ) -> Float[Tensor, "targets={self.num_targets}"]:
        """See ``HouseholdMatrix``."""
        return torch.from_numpy(self._nesting.expand(self._inner.totals(weights).numpy()))

    def gradient(
        self,
        by_totals: Float[Tensor, "targets={self.num_targets}"],
        where: Shaped[Tensor, "households={self.num_households}"] | None = None,
    ) -> Float[Tensor, "households={self.num_households}"]:
        """See ``HouseholdMatrix``."""
        return self._inner.gradient(torch.from_numpy(self._nesting.collapse(by_totals.numpy())), where)

    def squared_norms(
        self, row_weights: Float[Tensor, "targets={self.num_targets}"]
    ) -> Float[Tensor, "households={self.num_households}"]:
        """See ``HouseholdMatrix``: a household is in one part of a sum at most, so squares add up as well."""
        return self._inner.squared_norms(torch.from_numpy(self._nesting.collapse(row_weights.numpy())))

    def noise(self, seed: int, epoch: int) -> Float[Tensor, "households={self.num_households}"]:
        """See ``HouseholdMatrix``."""
        return self._inner.noise(seed, epoch)

    def take(self, households: Int[Tensor, "selected"]) -> NestedProducts:
        """See ``HouseholdMatrix``."""
        return NestedProducts(self._inner.take(households), self._nesting)

    def arranged(self, often: Int[Tensor, "often"] | None) -> NestedProducts:
        """See ``HouseholdMatrix``."""
        return NestedProducts(self._inner.arranged(often), self._nesting)


class NestedMatrix(NestedProducts):
    """A matrix on the CPU with the rows that nest in each other stored once; see ``HouseholdMatrix``.

    Sweeps go page by page: on a page of households, a stored target is seen together with its sums. Large
    matrices are swept in two lanes of pages that do not race: each works on its own copy of what both touch
    and expects the other to move it as far as it does itself, which makes their sum a step down (adding, with
    the safe factor, of CoCoA+: Ma et al., ICML 2015). How many there are depends on the matrix alone.

    Args:
        by_household: Households x stored targets, canonical CSR; households of a page next to each other.
        nesting: How the other targets follow.
        page: Page of each household.
        keys: What the noise of each household depends on, >= 0; None: its place.
    """

    _inner: CompiledMatrix

    def __init__(
        self, by_household: sp.csr_array, nesting: Nesting, page: np.ndarray, keys: np.ndarray | None = None
    ) -> None:
        layout = _Layout.of(by_household, nesting, page)
        self._set(
            CompiledMatrix(by_household, keys), nesting, np.ascontiguousarray(page, dtype=np.int32), layout
        )

    def _set(self, inner: CompiledMatrix, nesting: Nesting, page: np.ndarray, layout: _Layout) -> None:
        NestedProducts.__init__(self, inner, nesting)
        self._page, self._layout = page, layout
        self._lanes: list[slice] | None = None

    def by_household(self) -> sp.csr_array:
        """The entries, households x targets, float64."""
        stored, n = self._inner.by_household(), self._nesting
        both = sp.hstack([stored, stored @ n.wholes], format="csr")
        place = np.empty(n.num_rows, dtype=np.int64)
        place[np.concatenate([n.stored, n.sums])] = np.arange(n.num_rows)
        return sp.csr_array(both[:, place])

    def take(self, households: Int[Tensor, "selected"]) -> NestedMatrix:
        """See ``HouseholdMatrix``."""
        part = NestedMatrix.__new__(NestedMatrix)
        inner = self._inner.take(households)
        part._set(inner, self._nesting, self._page[households.numpy()], self._layout)
        return part

    def descend(self, at: Descent, sweeps: int) -> None:
        """See ``Descending``: page after page, large matrices in lanes."""
        lanes, curvature = self._lanes or self._cut(), at.curvature
        moves = self._moves(at.row_weights, len(lanes))
        if len(lanes) > 1:
            more = torch.from_numpy(moves.whole - self._nesting.collapse(at.row_weights.numpy()))
            curvature = curvature + self._inner.squared_norms(more) + (len(lanes) - 1) * float(at.held[2])
        stretch = torch.where(curvature > 0, 1.0 / curvature, torch.zeros_like(curvature))
        per_household = [v.numpy() for v in (at.weights, at.lower, at.upper, stretch, at.pull, at.center)]
        rounds, each = (1, sweeps) if len(lanes) == 1 else (sweeps, 1)
        for _ in range(rounds):
            state = at.row_weights.numpy(), at.by_totals.numpy(), at.held.numpy()
            self._round(lanes, moves, state, per_household, each)

    def blocks(
        self,
        households: Int[Tensor, "some"],
        norm: Float[Tensor, "some"],
        row_weights: Float[Tensor, "targets={self.num_targets}"],
    ) -> PageBlocks | None:
        """Blocks of the normal equations of some households in contributions w_j norm_j.

        Returns:
            None where factors of them take too long.
        """
        chosen = households.numpy()
        if not PageBlocks.may_pay(self._page[chosen]):
            return None
        rows = sp.csr_array(sp.diags_array(1.0 / norm.numpy()) @ self._inner.by_household()[chosen])
        blocks = PageBlocks(rows, self._page[chosen], self._nesting, row_weights.numpy())
        return blocks if blocks.pays else None

    def _moves(self, given: Tensor, num_lanes: int) -> _Moves:
        """How targets answer to steps, where so many lanes work beside each other.

        Matrices of some of the households share what is known for the weights of targets that came last.
        """
        known = self._layout.moves
        if num_lanes == 1 and known and known[0] is given and known[1] == given._version:
            return known[2]
        n, row_weights = self._nesting, given.numpy()
        own = row_weights[n.stored]
        if num_lanes > 1:
            own = own * np.where(self._is_shared, float(num_lanes), 1.0)
        above = num_lanes * row_weights[n.sums]
        whole = own + n.wholes @ above
        per_whole = np.divide(1.0, whole, out=np.zeros_like(whole), where=whole > 0)
        moves = _Moves(own, np.append(above, 0.0), whole, per_whole)
        if num_lanes == 1:
            self._layout.moves = (given, given._version, moves)
        return moves

    def _round(
        self,
        lanes: list[slice],
        moves: _Moves,
        state: tuple[np.ndarray, np.ndarray, np.ndarray],
        per_household: list[np.ndarray],
        sweeps: int,
    ) -> None:
        """Sweep every lane from the same state, then add up what they did."""
        from sparsereg.calibration.solver import kernels

        n, layout, (row_weights, by_totals, held) = self._nesting, self._layout, state
        base, calls, sums = by_totals[n.stored], [], [held.copy() for _ in lanes]
        nows, changes = np.array([base] * len(lanes)), np.zeros((len(lanes), len(base)))
        for lane, now, change, own_held in zip(lanes, nows, changes, sums, strict=True):
            memory = base, np.append(by_totals[n.sums], 0.0), now, base.copy(), change
            calls.append((
                *self._inner.entries_of(lane), self._page[lane], *layout.lists, moves.own, moves.above,
                moves.whole, moves.per_whole, *memory, *(v[lane] for v in per_household), own_held,
                len(lanes), sweeps,
            ))  # fmt: skip
        in_turns(kernels.descend_pages, calls)
        alone = layout.alone
        changes[:, alone] = (nows[:, alone] - base[alone]) * moves.per_whole[alone]
        by_totals += row_weights * n.expand(changes.sum(axis=0))
        held[0] += sum(own[0] - held[0] for own in sums) / len(lanes)

    def _cut(self) -> list[slice]:
        """Share pages out to lanes, and note which stored targets both lanes touch."""
        from sparsereg.calibration.solver import kernels

        middle = 0
        indptr, indices, _ = self._inner.entries_of(slice(0, self.num_households))
        if self.num_entries >= _ENTRIES_FOR_LANES:
            turns = np.flatnonzero(np.diff(self._page)) + 1
            far = np.abs(indptr[turns] - self.num_entries / 2)
            middle = int(turns[far.argmin()]) if len(turns) else 0
        lanes = (
            [slice(0, middle), slice(middle, self.num_households)]
            if middle
            else [slice(0, self.num_households)]
        )
        seen = np.zeros((2, len(self._nesting.stored)), dtype=np.uint8)
        for lane, mine in zip(lanes, seen, strict=True) if middle else ():
            kernels.touched(indices, indptr[lane.start], indptr[lane.stop], mine)
        self._is_shared, self._lanes = seen.all(axis=0), lanes
        return lanes


@dataclass(frozen=True, eq=False)
class _Moves:
    """How targets answer to a step of a household.

    Args:
        own: What a stored target's gradient changes by, per change of its total.
        above: What that of a sum changes by, and a 0 for the sum that is none.
        whole: What a household sees change of a stored target: its own and those of its sums.
        per_whole: One over it, or 0.
    """

    own: np.ndarray
    above: np.ndarray
    whole: np.ndarray
    per_whole: np.ndarray


@dataclass(eq=False)
class _Layout:
    """Which stored targets lie on which page, and in which sums.

    Args:
        lists: Pointers by page into rows, the parts of sums that households of the page touch; these rows;
            their sums, equally many for each, filled up with the number of sums; how many these are.
        alone: Stored targets that are part of no sum.
        moves: Weights of targets, their version, and how targets answer with them, in one lane.
    """

    lists: tuple[np.ndarray, np.ndarray, np.ndarray, int]
    alone: np.ndarray
    moves: tuple[Tensor, int, _Moves] | None = None

    @classmethod
    def of(cls, by_household: sp.csr_array, nesting: Nesting, page: np.ndarray) -> _Layout:
        """The layout of a matrix, households x stored targets."""
        from sparsereg.calibration.solver import kernels

        wholes = nesting.wholes
        count = np.diff(wholes.indptr)
        seen = np.full(len(count), -1, dtype=np.int32)
        rows, row_page = np.empty((2, by_household.nnz), dtype=np.int32)
        number = kernels.page_rows(
            by_household.indptr, by_household.indices, page, count > 0, seen, rows, row_page
        )
        pairs = np.unique(row_page[:number].astype(np.int64) * len(count) + rows[:number])
        pages, rows = pairs // len(count), (pairs % len(count)).astype(np.int32)
        width = int(count.max(initial=0))
        ups = np.full((len(count), width), len(nesting.sums), dtype=np.int32)
        ups[np.arange(width) < count[:, None]] = wholes.indices
        pointers = np.searchsorted(pages, np.arange(int(nesting.page.max()) + 2))
        return cls((pointers, rows, ups[rows].ravel(), width), np.flatnonzero(count == 0))
