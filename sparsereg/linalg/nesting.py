"""Rows of a matrix that are exact sums of others: a state of its districts, the nation of all of them.

Such rows need not be stored: every product is one with the other rows, followed or preceded by a small sum.
A row is a sum here if others hold exactly its entries, each once and with the same bits. A *page* is a set of
columns that touch at most one part of any sum: within a page, a part and its sums move together.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import scipy.sparse as sp

_MOST_CONTAINERS = 32
"""Rows of which one row may be a part; more are not looked at."""
_LOOKS = 24
"""Columns by which rows that may be parts of others are found; then all are compared."""
_LEAST_SAVED = 0.2
"""Share of the entries that must be saved for it to pay."""


@dataclass(frozen=True, eq=False)
class Nesting:
    """Which rows are stored, and how the others follow from them.

    Args:
        num_rows: Number of all rows.
        stored: Indices of the rows that are stored, ascending.
        sums: Indices of the other rows.
        parts: Sums x stored rows, ones; the parts of one sum have no column in common.
        num_entries: Number of entries of all rows.
        page: Page of each column; shape (columns,).
    """

    num_rows: int
    stored: np.ndarray
    sums: np.ndarray
    parts: sp.csr_array
    num_entries: int
    page: np.ndarray

    def expand(self, totals: np.ndarray) -> np.ndarray:
        """Totals of all rows from those of the stored ones."""
        from sparsereg.linalg import kernels

        out = np.empty(self.num_rows)
        kernels.expand(self.stored, self.sums, self.parts.indptr, self.parts.indices, totals, out)
        return out

    def collapse(self, values: np.ndarray) -> np.ndarray:
        """Return for each stored row the sum of a value of its own and those of the sums it is part of."""
        from sparsereg.linalg import kernels

        out = np.empty(len(self.stored))
        wholes = self.wholes
        kernels.collapse(self.stored, self.sums, wholes.indptr, wholes.indices, values, out)
        return out

    @cached_property
    def wholes(self) -> sp.csr_array:
        """Stored rows x sums: the transpose of ``parts``."""
        return sp.csr_array(self.parts.T.tocsr())


def find_nesting(
    rows: sp.csr_array, columns: sp.csr_array, parent: np.ndarray | None = None
) -> Nesting | None:
    """Find rows that are sums of others; None where storing all of them is as good.

    Args:
        rows: Canonical CSR.
        columns: Its transpose, canonical CSR.
        parent: For rows known to be part of another one its index, else -1; None: nothing is known.
    """
    if rows.nnz == 0 or importlib.util.find_spec("numba") is None:
        return None
    sums, pointers, members = _sums(rows, columns, parent)
    lengths = np.diff(rows.indptr)
    if lengths[sums].sum() < _LEAST_SAVED * rows.nnz:
        return None
    stored = np.setdiff1d(np.arange(rows.shape[0]), sums)
    parts = sp.csr_array(
        (np.ones(len(members)), np.searchsorted(stored, members), pointers), shape=(len(sums), len(stored))
    )
    parts.sort_indices()
    page = _pages(rows, columns, lengths[sums], pointers, members)
    return Nesting(int(rows.shape[0]), stored, sums, parts, int(rows.nnz), page)


def _sums(
    rows: sp.csr_array, columns: sp.csr_array, parent: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows that are sums, and the parts of each, as indices of rows, with pointers into them."""
    from sparsereg.linalg import kernels

    num_rows, num_columns = (int(n) for n in rows.shape)
    found = np.empty((num_rows, _MOST_CONTAINERS), dtype=np.int32)
    count = np.zeros(num_rows, dtype=np.int64)
    kernels.containers(
        rows.indptr, rows.indices, rows.data, columns.indptr, columns.indices, columns.data,
        _LOOKS, found, count,
    )  # fmt: skip
    part = np.repeat(np.arange(num_rows), count)
    whole = found[np.arange(_MOST_CONTAINERS) < count[:, None]].astype(np.int64)
    lengths = np.diff(rows.indptr)
    long_first = np.lexsort((part, -lengths[part], whole))
    starts = np.searchsorted(whole[long_first], np.arange(num_rows + 1))
    pointers, members = np.zeros(num_rows + 1, np.int64), np.empty(2 * len(part) + 1, np.int64)
    sums = kernels.nest(
        rows.indptr, rows.indices, rows.data, np.lexsort((-np.arange(num_rows), lengths)), starts,
        part[long_first],
        np.full(num_rows, -1) if parent is None else parent, (count > 0).astype(np.int8),
        np.arange(num_columns), pointers, members,
    )  # fmt: skip
    pointers = pointers[: len(sums) + 1]
    return sums, pointers, members[: pointers[-1]]


def _pages(
    rows: sp.csr_array, columns: sp.csr_array, lengths: np.ndarray, pointers: np.ndarray, members: np.ndarray
) -> np.ndarray:
    """Pages of the columns: those with the same part of the longest sum, split where others differ."""
    from sparsereg.linalg import kernels

    key = np.full(rows.shape[1], -1)
    kernels.page_keys(rows.indptr, rows.indices, pointers, members, np.argsort(lengths, kind="stable"), key)
    shape = (len(lengths), rows.shape[0])
    up = sp.csr_array(
        sp.csr_array((np.ones(len(members), np.int8), members, pointers), shape=shape).T.tocsr()
    )
    page = np.empty(rows.shape[1], dtype=np.int32)
    order = np.argsort(key, kind="stable")
    kernels.split_pages(
        columns.indptr, columns.indices, order, key, up.indptr, up.indices, len(lengths), page
    )
    return page
