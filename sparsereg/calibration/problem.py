"""A calibration problem: which weighted totals of which households must come out at which values."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import scipy.sparse as sp

from sparsereg.linalg.checked import as_csr, smallest_exact

_INT32_MAX = np.iinfo(np.int32).max


@dataclass(frozen=True, eq=False)
class CalibrationProblem:
    """Find weights w >= 0, one per household, such that ``matrix @ w`` comes out at ``targets``.

    Everything is validated and brought to one form on construction; nothing that was passed in is changed.

    Args:
        matrix: Targets x households. What one unit of a household's weight adds to each total: its income,
            its number of children, 1 when it is counted. Any scipy sparse matrix or array, a torch tensor,
            or a dense array; held as canonical CSR (sorted, entries given twice added up, no explicit zeros),
            in float32 if that holds every entry exactly, else in float64, with int32 indices where they fit.
        targets: The value each total should have, shape (targets,), finite, in the unit of its row.
        initial_weights: The weights the survey came with, shape (households,), finite, >= 0. None: ones.
        target_names: One unique name per target. None: "target_0", "target_1", ...
        target_groups: One label per target (any strings or numbers), the families that are normalised and
            held out together. None: no groups.
        target_weights: How much each target counts, shape (targets,), finite, >= 0, not all zero. None:
            equally.
        ids: One unique id per household. None: 0, 1, ...
        parent: For nested targets (district in state in nation): the index of the target that each one is
            part of, or -1, shape (targets,), without cycles. None: nothing is nested.

    Raises:
        ValueError: A value does not have the shape, type or range above; the message names it.
    """

    matrix: sp.csr_array
    targets: np.ndarray
    initial_weights: np.ndarray | None = None
    target_names: tuple[str, ...] | None = None
    target_groups: np.ndarray | None = None
    target_weights: np.ndarray | None = None
    ids: np.ndarray | None = None
    parent: np.ndarray | None = None

    def __post_init__(self) -> None:
        matrix = _canonical_csr(self.matrix)
        num_targets, num_households = matrix.shape
        self._set("matrix", matrix)
        self._set("targets", _vector("targets", self.targets, num_targets, "rows of the matrix"))
        weights = np.ones(num_households) if self.initial_weights is None else self.initial_weights
        weights = _vector("initial_weights", weights, num_households, "columns of the matrix", smallest=0.0)
        if not weights.any():
            raise ValueError("initial_weights must not all be zero")
        self._set("initial_weights", weights)
        names: Sequence[Any] | None = self.target_names
        if names is None:
            names = [f"target_{i}" for i in range(num_targets)]
        names = _unique("target_names", [str(name) for name in names], num_targets).tolist()
        self._set("target_names", tuple(names))
        if self.target_groups is not None:
            self._set("target_groups", _labels("target_groups", self.target_groups, num_targets))
        if self.target_weights is not None:
            shares = _vector("target_weights", self.target_weights, num_targets, "targets", smallest=0.0)
            if not shares.any():
                raise ValueError("target_weights must not all be zero")
            self._set("target_weights", shares)
        ids = np.arange(num_households) if self.ids is None else _unique("ids", self.ids, num_households)
        self._set("ids", ids)
        if self.parent is not None:
            self._set("parent", _forest(self.parent, num_targets))

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    @property
    def num_targets(self) -> int:
        """Number of targets, the rows of the matrix."""
        return int(self.matrix.shape[0])

    @property
    def num_households(self) -> int:
        """Number of households, the columns of the matrix."""
        return int(self.matrix.shape[1])

    @property
    def starting_weights(self) -> np.ndarray:
        """The initial weights, shape (households,), float64; ones where none were given."""
        assert self.initial_weights is not None
        return self.initial_weights

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the targets, given or numbered."""
        assert self.target_names is not None
        return self.target_names

    @property
    def household_ids(self) -> np.ndarray:
        """The ids of the households, given or numbered."""
        assert self.ids is not None
        return self.ids

    @cached_property
    def matrix_t(self) -> sp.csr_array:
        """Households x targets: the matrix by household, canonical CSR, made on first use."""
        return _with_small_indices(sp.csr_array(self.matrix.T.tocsr()))

    def estimates(self, weights: np.ndarray) -> np.ndarray:
        """Weighted totals ``matrix @ weights`` in float64, shape (targets,).

        Args:
            weights: Shape (households,).
        """
        w = np.asarray(weights, dtype=np.float64)
        if w.shape != (self.num_households,):
            raise ValueError(f"weights must have shape ({self.num_households},), got {w.shape}")
        return exact_totals(self.matrix, w)

    def subset(self, rows: np.ndarray) -> CalibrationProblem:
        """Return the problem with only these targets, in this order; cutting nesting through left-out ones.

        Args:
            rows: Indices of targets, or a boolean mask over them.
        """
        rows = np.asarray(rows)
        rows = np.flatnonzero(rows) if rows.dtype == bool else rows
        parent = None
        if self.parent is not None:
            new_index = np.full(self.num_targets + 1, -1)  # the last entry answers parent = -1
            new_index[rows] = np.arange(len(rows))
            parent = new_index[self.parent[rows]]
        return CalibrationProblem(
            matrix=self.matrix[rows],
            targets=self.targets[rows],
            initial_weights=self.initial_weights,
            target_names=tuple(self.names[i] for i in rows),
            target_groups=None if self.target_groups is None else self.target_groups[rows],
            target_weights=None if self.target_weights is None else self.target_weights[rows],
            ids=self.ids,
            parent=parent,
        )


def exact_totals(matrix: sp.csr_array, weights: np.ndarray, entries_at_once: int = 1_000_000) -> np.ndarray:
    """Multiply a CSR matrix by float64 weights, summing in float64, without a float64 copy of it.

    Args:
        matrix: Targets x households, float32 or float64.
        weights: Shape (households,), float64.
        entries_at_once: About how many entries are widened to float64 at a time; never less than a row.
    """
    if matrix.dtype == np.float64:
        return matrix @ weights
    indptr = np.asarray(matrix.indptr, dtype=np.int64)
    cuts = np.searchsorted(indptr, np.arange(entries_at_once, indptr[-1], entries_at_once))
    bounds = np.unique(np.concatenate([[0], cuts, [matrix.shape[0]]]))
    parts = [
        matrix[start:stop].astype(np.float64) @ weights for start, stop in itertools.pairwise(bounds.tolist())
    ]
    return np.concatenate(parts)


def _canonical_csr(matrix: Any) -> sp.csr_array:
    """Bring anything two-dimensional to canonical CSR, checked whole; copy only what must change."""
    csr = as_csr(matrix)
    if not _is_canonical(csr):
        wide = csr.data.astype(np.float64)  # a copy; entries given twice add up without loss
        csr = sp.csr_array((wide, csr.indices.copy(), csr.indptr.copy()), shape=csr.shape)
        csr.sum_duplicates()
        csr.eliminate_zeros()
    return _with_small_indices(sp.csr_array((_exact_data(csr), csr.indices, csr.indptr), shape=csr.shape))


def _exact_data(csr: sp.csr_array) -> np.ndarray:
    """Return the entries, checked, as float32 if that holds every one of them exactly, else as float64."""
    with np.errstate(over="ignore"):  # what overflows float32 is refused below, with its place
        bad = np.flatnonzero(~np.isfinite(csr.data.astype(np.float32)))
    if bad.size:
        row = int(np.searchsorted(csr.indptr, bad[0], side="right")) - 1
        raise ValueError(
            f"matrix must be finite in float32: {csr.data[bad[0]]} in row {row}, column {csr.indices[bad[0]]}"
        )
    return csr.data if csr.dtype == np.float32 else smallest_exact(csr.data.astype(np.float64))


def _is_canonical(csr: sp.csr_array) -> bool:
    """Whether every row has its columns once and ascending and no zeros; scipy's own flag may be wrong."""
    if (csr.data == 0).any():
        return False
    starts = np.zeros(len(csr.data) + 1, dtype=bool)
    starts[csr.indptr] = True
    return bool((starts[1:-1] | (csr.indices[1:] > csr.indices[:-1])).all())


def _with_small_indices(csr: sp.csr_array) -> sp.csr_array:
    """Hold indices as int32 where they fit: half the memory to read in every pass."""
    if csr.indices.dtype != np.int32 and max(csr.nnz, *csr.shape) <= _INT32_MAX:
        indices, indptr = csr.indices.astype(np.int32), csr.indptr.astype(np.int32)
        csr = sp.csr_array((csr.data, indices, indptr), shape=csr.shape)
    csr.has_sorted_indices = True
    csr.has_canonical_format = True
    return csr


def _vector(name: str, values: Any, length: int, of: str, smallest: float | None = None) -> np.ndarray:
    """Return ``values`` as a float64 vector of this length, finite and not below ``smallest``."""
    try:
        vector = np.array(values, dtype=np.float64)  # our own copy: nobody changes it behind our back
    except (TypeError, ValueError) as e:
        raise ValueError(f"{name} must be numbers: {e}") from None
    if vector.shape != (length,):
        raise ValueError(f"{name} must have shape ({length},), as many as the {of}, got {vector.shape}")
    bad = np.flatnonzero(~np.isfinite(vector))
    if bad.size:
        raise ValueError(f"{name} must be finite, got {vector[bad[0]]} at position {bad[0]}")
    if smallest is not None and (vector < smallest).any():
        first = int(np.flatnonzero(vector < smallest)[0])
        raise ValueError(f"{name} must be >= {smallest:g}, got {vector[first]:g} at position {first}")
    return vector


def _labels(name: str, values: Any, length: int) -> np.ndarray:
    """Return ``values`` as a vector of labels of this length, none of them missing."""
    labels = np.asarray(values)
    if labels.shape != (length,):
        raise ValueError(f"{name} must have shape ({length},), got {labels.shape}")
    if labels.dtype.kind == "O":
        missing = [i for i, label in enumerate(labels) if label is None or label != label]
        if missing:
            raise ValueError(f"{name} must not be missing, got {labels[missing[0]]} at position {missing[0]}")
        labels = labels.astype(str)
    return labels


def _unique(name: str, values: Any, length: int) -> np.ndarray:
    """Return ``values`` as a vector of labels of this length without repetition."""
    labels = _labels(name, values, length)
    unique, counts = np.unique(labels, return_counts=True)
    if len(unique) != length:
        twice = unique[counts > 1][0]
        places = np.flatnonzero(labels == twice)[:2]
        raise ValueError(
            f"{name} must be unique: {twice!s} is at positions {places[0]} and {places[1]}"
            f" ({int((counts > 1).sum())} repeated)"
        )
    return labels


def _forest(values: Any, length: int) -> np.ndarray:
    """Return ``values`` as parents of a forest: each -1 or another index, and no cycle."""
    parent = np.asarray(values)
    if parent.shape != (length,) or parent.dtype.kind not in "iu":
        raise ValueError(f"parent must be {length} whole numbers, got {parent.dtype} of shape {parent.shape}")
    parent = parent.astype(np.int64)
    if ((parent < -1) | (parent >= length)).any():
        first = int(np.flatnonzero((parent < -1) | (parent >= length))[0])
        raise ValueError(f"parent must lie in [-1, {length}), got {parent[first]} at position {first}")
    ancestor = np.append(parent, -1)  # the last entry is the parent of "no parent"
    for _ in range(length.bit_length() + 1):  # after k doublings: the 2^k-th ancestor
        ancestor = ancestor[ancestor]
    if (ancestor >= 0).any():
        first = int(np.flatnonzero(ancestor >= 0)[0])
        raise ValueError(f"parent must have no cycle: target {first} leads to itself")
    return parent
