"""Normal equations of households on pages, solved directly: each page by itself, then what links pages.

H = A' diag(q) A + diag(d). Targets that touch one page only stay within its block. Others link pages: states
their districts, the nation its states. These form a tree; what a block comes to for the links above it is
passed up, as in Cholesky's factors of a matrix whose graph is a tree.

Source: nested dissection (George, SIAM Journal on Numerical Analysis 10, 1973).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import scipy.linalg as sl
import scipy.sparse as sp

from sparsereg.linalg.nesting import Nesting
from sparsereg.linalg.threads import in_turns
from sparsereg.shapes import Bool, Float, Int

_MOST_WORK = 4e9
"""Operations that factors may take; beyond that they are not made."""
_PAGES = 16
"""Pages that one thread factors at once."""
_JITTER = 1e-12
"""Share of the diagonal that is added to it, since fewer targets than households leave it singular."""


@dataclass(eq=False)
class _Page:
    """Households of one page.

    Args:
        places: Which they are.
        square: Their block, of the page's own targets.
        links: The links that they touch, ascending.
        rows: Households x these links.
    """

    places: slice
    square: np.ndarray
    links: np.ndarray
    rows: np.ndarray


@dataclass(eq=False)
class _Joint:
    """Pages, or joints of pages, that some links hold together.

    Args:
        pages: Numbers of all pages below.
        below: What it joins: numbers of pages and joints.
        links: The links.
    """

    pages: np.ndarray
    below: list[int | _Joint]
    links: list[int] = field(default_factory=list)


@dataclass(eq=False)
class _Eliminated:
    """Unknowns that are expressed by the links above them.

    Args:
        own: The unknowns: households of a page that are free, or links of a joint.
        above: The links above.
        root: Cholesky's factor L of their block.
        half: L's inverse times what stands between the unknowns and the links above.
    """

    own: np.ndarray
    above: np.ndarray
    root: np.ndarray
    half: np.ndarray

    def forward(self, values: np.ndarray) -> np.ndarray:
        """L's inverse times a vector."""
        return np.asarray(sl.lapack.dtrtrs(self.root, values, lower=1)[0])

    def backward(self, values: np.ndarray) -> np.ndarray:
        """The inverse of L' times a vector."""
        return np.asarray(sl.lapack.dtrtrs(self.root, values, lower=1, trans=1)[0])


class PageBlocks:
    """Blocks of the normal equations of some households, from which those of free ones are factored.

    Args:
        rows: Households x stored targets, canonical CSR, float64; households of a page next to each other.
        page: Page of each.
        nesting: How the other targets follow.
        weights: q of all targets, >= 0.
    """

    def __init__(
        self,
        rows: sp.csr_array,
        page: Int[np.ndarray, "households"],
        nesting: Nesting,
        weights: Float[np.ndarray, "targets"],
    ) -> None:
        turns = np.concatenate([[0], np.flatnonzero(np.diff(page)) + 1, [len(page)]])
        pages = sp.csr_array(
            (np.ones(len(page)), np.arange(len(page)), turns), shape=(len(turns) - 1, len(page))
        )
        touched = sp.csr_array(pages @ (rows != 0).astype(np.float64))
        far = np.bincount(touched.indices, minlength=rows.shape[1]) > 1
        own, links, self._weights = _linked(touched, far, nesting, weights)
        by_link = sp.csr_array(rows @ links.T)
        own_rows = sp.csr_array(rows @ sp.diags_array(np.sqrt(own)))
        own_rows.eliminate_zeros()
        self._pages = [_page(slice(a, b), own_rows, by_link) for a, b in itertools.pairwise(turns)]
        self._joints = list(_in_order(_joints(self._pages, len(self._weights))))

    @staticmethod
    def may_pay(page: Int[np.ndarray, "households"]) -> bool:
        """Whether factors may take few enough operations, as far as pages tell."""
        sizes = np.diff(np.flatnonzero(np.diff(page, prepend=-1, append=-1)))
        return bool((sizes.astype(np.float64) ** 3).sum() <= _MOST_WORK)

    @property
    def pays(self) -> bool:
        """Whether factors take few enough operations."""
        sizes = np.array([(len(p.square), len(p.links)) for p in self._pages], dtype=np.float64)
        of_pages = (sizes[:, 0] * sizes.sum(axis=1) ** 2).sum()
        return bool(of_pages + sum(8.0 * len(joint.links) ** 3 for joint in self._joints) <= _MOST_WORK)

    def factors(
        self, free: Bool[np.ndarray, "households"], diagonal: Float[np.ndarray, "households"]
    ) -> PageFactors:
        """Factor the equations of the free households.

        Args:
            free: Which they are.
            diagonal: d of every household.

        Raises:
            LinAlgError: a block is not positive definite.
        """
        chunks = [range(a, min(a + _PAGES, len(self._pages))) for a in range(0, len(self._pages), _PAGES)]
        found = in_turns(self._eliminated, [(chunk, free, diagonal) for chunk in chunks])
        pages = [page for some in found for page, _ in some]
        left: dict[int, Left] = dict(enumerate(passed for some in found for _, passed in some))
        joints = []
        for joint in self._joints:
            links, square = _added([left.pop(_key(part)) for part in joint.below])
            mine = np.isin(links, joint.links)
            own, above = np.flatnonzero(mine), np.flatnonzero(~mine)
            block = square[np.ix_(own, own)]
            block[np.diag_indices(len(own))] += 1.0 / self._weights[links[own]]
            done, (_, taken) = _eliminate(block, square[np.ix_(own, above)], links[own], links[above])
            left[_key(joint)] = done.above, square[np.ix_(above, above)] - taken
            joints.append(done)
        return PageFactors(len(free), len(self._weights), pages, joints)

    def _eliminated(
        self, numbers: range, free: np.ndarray, diagonal: np.ndarray
    ) -> list[tuple[_Eliminated, Left]]:
        """Some pages."""
        out = []
        for page in self._pages[numbers.start : numbers.stop]:
            some = np.flatnonzero(free[page.places])
            square, rows = page.square.copy(), page.rows
            if len(some) < len(square):
                square, rows = square[np.ix_(some, some)], rows[some]
            square[np.diag_indices(len(some))] += diagonal[page.places][some] + _JITTER * square.diagonal()
            out.append(_eliminate(square, rows, page.places.start + some, page.links))
        return out


class PageFactors:
    """Factors of the normal equations of the free households.

    Args:
        num_households: Of all, free or not.
        num_links: Of targets that link pages.
        pages: Eliminated first.
        joints: Eliminated then, each after those below it.
    """

    def __init__(
        self, num_households: int, num_links: int, pages: list[_Eliminated], joints: list[_Eliminated]
    ) -> None:
        self._num_households, self._num_links = num_households, num_links
        self._pages, self._joints = pages, joints

    def solve(self, values: Float[np.ndarray, "households"]) -> Float[np.ndarray, "households"]:
        """The unknowns for a right-hand side; 0 for households that are not free."""
        solution, links = np.zeros(self._num_households), np.zeros(self._num_links)
        for page in self._pages:
            solution[page.own] = page.forward(values[page.own])
            links[page.above] += solution[page.own] @ page.half
        for joint in self._joints:
            links[joint.own] = joint.forward(links[joint.own])
            links[joint.above] -= links[joint.own] @ joint.half
        for joint in reversed(self._joints):
            links[joint.own] = joint.backward(links[joint.own] - joint.half @ links[joint.above])
        for page in self._pages:
            solution[page.own] = page.backward(solution[page.own] - page.half @ links[page.above])
        return solution


Left = tuple[np.ndarray, np.ndarray]
"""Links, ascending, and their block of what is passed up to them."""


def _eliminate(
    block: np.ndarray, across: np.ndarray, own: np.ndarray, above: np.ndarray
) -> tuple[_Eliminated, Left]:
    """Eliminate unknowns; what that comes to for the links above."""
    root, failed = sl.lapack.dpotrf(block, lower=1)
    if failed:
        raise np.linalg.LinAlgError("a block is not positive definite")
    half = sl.lapack.dtrtrs(root, across, lower=1)[0]
    return _Eliminated(own, above, root, half), (above, half.T @ half)


def _added(parts: list[Left]) -> Left:
    """The sum of blocks over the links of all of them."""
    links = np.unique(np.concatenate([part[0] for part in parts]))
    square = np.zeros((len(links), len(links)))
    for some, block in parts:
        at = np.searchsorted(links, some)
        square[np.ix_(at, at)] += block
    return links, square


def _linked(
    touched: sp.csr_array, far: np.ndarray, nesting: Nesting, weights: np.ndarray
) -> tuple[np.ndarray, sp.csr_array, np.ndarray]:
    """Weights of stored targets within their page; targets that link pages, by stored ones; their weights.

    A sum of which one part alone is touched is as good as that part.
    """
    own = np.where(far, 0.0, weights[nesting.stored])
    spread = np.flatnonzero(far & (weights[nesting.stored] > 0))
    units = sp.csr_array(
        (np.ones(len(spread)), (np.arange(len(spread)), spread)), shape=(len(spread), len(own))
    )
    links = sp.csr_array(sp.vstack([nesting.parts, units], format="csr"))
    all_weights = np.concatenate([weights[nesting.sums], weights[nesting.stored][spread]])
    on_pages = sp.csr_array(((touched != 0).astype(np.float64) @ links.T) != 0)
    number = np.bincount(on_pages.indices, minlength=links.shape[0])
    there = np.bincount(touched.indices, minlength=len(own)) > 0
    single = np.flatnonzero((number == 1) & (all_weights > 0))
    own += np.where(there, all_weights[single] @ links[single], 0.0)
    kept = np.flatnonzero((number > 1) & (all_weights > 0))
    return own, sp.csr_array(links[kept]), all_weights[kept]


def _page(places: slice, own: sp.csr_array, by_link: sp.csr_array) -> _Page:
    _, dense = _dense(own, places)
    links, rows = _dense(by_link, places)
    return _Page(places, dense @ dense.T, links, rows)


def _dense(rows: sp.csr_array, places: slice) -> tuple[np.ndarray, np.ndarray]:
    """Columns that some rows touch, and their entries."""
    pointers = rows.indptr[places.start : places.stop + 1]
    entries = slice(pointers[0], pointers[-1])
    columns, at = np.unique(rows.indices[entries], return_inverse=True)
    out = np.zeros((places.stop - places.start, len(columns)))
    out[np.repeat(np.arange(len(out)), np.diff(pointers)), at] = rows.data[entries]
    return columns.astype(np.int64), out


def _key(part: int | _Joint) -> int:
    return part if isinstance(part, int) else -1 - id(part)


def _joints(pages: list[_Page], num_links: int) -> list[_Joint]:
    """Join pages by the links, those of few pages first.

    A link that more than doubles the pages of a joint makes one of its own; others go with that joint.
    """
    touching: list[list[int]] = [[] for _ in range(num_links)]
    for number, page in enumerate(pages):
        for link in page.links:
            touching[link].append(number)
    top: list[int | _Joint] = list(range(len(pages)))
    for link in np.argsort([len(numbers) for numbers in touching], kind="stable"):
        roots = list({_key(top[number]): top[number] for number in touching[link]}.values())
        sizes = [1 if isinstance(root, int) else len(root.pages) for root in roots]
        first = roots[int(np.argmax(sizes))]
        if isinstance(first, _Joint) and 2 * len(first.pages) >= sum(sizes):
            joint, others = first, [root for root in roots if root is not first]
        else:
            joint, others = _Joint(np.empty(0, dtype=np.int64), []), roots
        joint.below += others
        joint.links.append(int(link))
        for other in others:
            joint.pages = np.append(joint.pages, other if isinstance(other, int) else other.pages)
        for number in joint.pages if others else ():
            top[number] = joint
    return list({id(joint): joint for joint in top if isinstance(joint, _Joint)}.values())


def _in_order(joints: list[_Joint]) -> Iterator[_Joint]:
    """Joints with those below them first."""
    for joint in joints:
        yield from _in_order([part for part in joint.below if isinstance(part, _Joint)])
        yield joint
