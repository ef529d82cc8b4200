"""A calibration problem: which weighted totals of which households must come out at which values."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import scipy.sparse as sp

from sparsereg.calibration.target_scale import target_scale
from sparsereg.checks import LARGEST
from sparsereg.linalg.checked import as_csr, smallest_exact
from sparsereg.linalg.nesting import Nesting, find_nesting
from sparsereg.shapes import Bool, Float
from sparsereg.summary import in_html, in_lines

_INT32_MAX = np.iinfo(np.int32).max


@dataclass(frozen=True, eq=False, repr=False)
class CalibrationProblem:
    """Find weights w >= 0, one per household, such that ``matrix @ w`` comes out at ``targets``.

    Everything is validated and brought to one form on construction; nothing that was passed in is changed.

    Args:
        matrix: Targets x households. What one unit of a household's weight adds to each total: its income,
            its number of children, 1 when it is counted. Any scipy sparse matrix or array, a torch tensor,
            or a dense array; held as canonical CSR (sorted, entries given twice added up, no explicit zeros),
            in float32 if that holds every entry exactly, else in float64, with int32 indices where they fit.
        targets: The value each total should have, shape (targets,), finite, in the unit of its row; where
            ``denominators`` has entries, the value of the ratio.
        initial_weights: The weights the survey came with, shape (households,), finite, >= 0. None: ones.
        target_names: One unique name per target. None: "target_0", "target_1", ...
        target_groups: One label per target (any strings or numbers), the families that are normalised and
            held out together. None: no groups.
        target_weights: How much each target counts, shape (targets,), finite, >= 0, not all zero. None:
            equally. NaN for one of them: 1, and hard for ``method="calibrate"``.
        target_scales: What an error of each target is compared with, at least, shape (targets,), in the
            target's unit, >= 0. None: see ``scale``.
        target_tolerances: How far each total may be from its target without being wrong, shape (targets,),
            in the target's unit, >= 0. None: 0.
        target_hard: Which targets must be met exactly by ``method="calibrate"``, shape (targets,). None:
            those without a weight. A target with a tolerance must be met within it.
        denominators: Targets x households, as ``matrix``. A target with entries here is a ratio of two
            totals: a share, a mean. None: all targets are totals.
        ids: One unique id per household. None: 0, 1, ...
        parent: For nested targets (district in state in nation): the index of the target that each one is
            part of, or -1, shape (targets,), without cycles. None: nothing is nested.

    Raises:
        ValueError: A value does not have the shape, type or range above; the message names it.

    Example:
        >>> problem = CalibrationProblem(sp.csr_array([[1.0, 1.0], [1.0, 0.0]]), np.array([8.0, 3.0]))
        >>> problem.num_households, problem.num_targets
        (2, 2)
    """

    matrix: sp.csr_array
    targets: np.ndarray
    initial_weights: np.ndarray | None = None
    target_names: tuple[str, ...] | None = None
    target_groups: np.ndarray | None = None
    target_weights: np.ndarray | None = None
    ids: np.ndarray | None = None
    parent: np.ndarray | None = None
    target_scales: np.ndarray | None = None
    target_tolerances: np.ndarray | None = None
    target_hard: np.ndarray | None = None
    denominators: sp.csr_array | None = None

    def __repr__(self) -> str:
        return in_lines(*self._shown())

    def _repr_html_(self) -> str:
        return in_html(*self._shown())

    def _shown(self) -> tuple[str, dict[str, str]]:
        groups = "none" if self.target_groups is None else f"{len(np.unique(self.target_groups)):,}"
        weights = "ones" if self.initial_weights is None else f"sum {self.starting_weights.sum():,.6g}"
        cells = self.num_targets * self.num_households
        return "CalibrationProblem", {
            "targets": f"{self.num_targets:,}, groups: {groups}",
            "households": f"{self.num_households:,}",
            "non-zeros": f"{self.matrix.nnz:,} ({self.matrix.nnz / max(cells, 1):.2%})",
            "initial weights": weights,
        }

    def __post_init__(self) -> None:
        matrix = _canonical_csr("matrix", self.matrix)
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
            given = np.array(self.target_weights, dtype=np.float64)
            shares = _vector("target_weights", np.nan_to_num(given, nan=1.0), num_targets, "targets", 0.0)
            if not shares.any():
                raise ValueError("target_weights must not all be zero")
            self._set("target_weights", np.where(np.isnan(given), np.nan, shares))
        for name in ("target_scales", "target_tolerances"):
            if getattr(self, name) is not None:
                self._set(name, _vector(name, getattr(self, name), num_targets, "targets", smallest=0.0))
        if self.target_hard is not None:
            hard = np.array(self.target_hard)
            if hard.shape != (num_targets,) or hard.dtype != bool:
                raise ValueError(f"target_hard must be a mask of shape ({num_targets},), got {hard.shape}")
            self._set("target_hard", hard)
        if self.denominators is not None:
            self._set_denominators(_canonical_csr("denominators", self.denominators))
        ids = np.arange(num_households) if self.ids is None else _unique("ids", self.ids, num_households)
        self._set("ids", ids)
        if self.parent is not None:
            self._set("parent", _forest(self.parent, num_targets))

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _set_denominators(self, denominators: sp.csr_array) -> None:
        if denominators.shape != self.matrix.shape:
            raise ValueError(
                f"denominators must have the matrix's shape {self.matrix.shape}, got {denominators.shape}"
            )
        if denominators.nnz == 0:
            self._set("denominators", None)
            return
        self._set("denominators", denominators)
        totals = exact_totals(denominators, self.starting_weights)
        zero = np.flatnonzero(self.is_ratio & (totals == 0))
        if len(zero):
            raise ValueError(
                f"the denominator of target {self.names[zero[0]]!r} is zero with the initial weights"
            )

    @property
    def num_targets(self) -> int:
        """Number of targets, the rows of the matrix."""
        return int(self.matrix.shape[0])

    @property
    def num_households(self) -> int:
        """Number of households, the columns of the matrix."""
        return int(self.matrix.shape[1])

    @property
    def starting_weights(self) -> Float[np.ndarray, "households={self.num_households}"]:
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
    def is_ratio(self) -> Bool[np.ndarray, "targets={self.num_targets}"]:
        """Which targets are ratios of two totals, shape (targets,)."""
        if self.denominators is None:
            return np.zeros(self.num_targets, dtype=bool)
        return np.asarray(np.diff(self.denominators.indptr) > 0)

    @cached_property
    def target_shares(self) -> Float[np.ndarray, "targets={self.num_targets}"]:
        """How much each target counts, shape (targets,), float64, >= 0; 1 where nothing was given."""
        if self.target_weights is None:
            return np.ones(self.num_targets)
        return np.asarray(np.nan_to_num(self.target_weights, nan=1.0))

    @cached_property
    def tolerance(self) -> Float[np.ndarray, "targets={self.num_targets}"]:
        """How far each total may be from its target without being wrong, shape (targets,), >= 0."""
        return np.zeros(self.num_targets) if self.target_tolerances is None else self.target_tolerances

    @cached_property
    def gross(self) -> Float[np.ndarray, "targets={self.num_targets}"]:
        """What goes into each target with the initial weights, signs left aside, in the target's unit.

        For a total the sum of |entry| x weight; for a ratio with target t that of |numerator -
        t x denominator|, over the denominator.
        """
        linear = self.linear
        signed = bool((linear.matrix.data < 0).any())
        size = gross_totals(linear.matrix, self.starting_weights) if signed else linear.initial_totals
        if (size > 0).all():
            return np.asarray(size / self._unit)
        everybody = gross_totals(linear.matrix, np.full(self.num_households, self.starting_weights.mean()))
        return np.asarray(np.where(size > 0, size, everybody) / self._unit)

    @cached_property
    def initial_totals(self) -> Float[np.ndarray, "targets={self.num_targets}"]:
        """What the initial weights add up to, float64, shape (targets,); of a ratio its numerator."""
        return exact_totals(self.matrix, self.starting_weights)

    @cached_property
    def scale(self) -> Float[np.ndarray, "targets={self.num_targets}"]:
        """What errors are compared with, shape (targets,), > 0, in the unit of each target."""
        return target_scale(self.targets, self.target_scales, self.gross)

    @cached_property
    def _unit(self) -> Float[np.ndarray, "targets={self.num_targets}"]:
        """One unit of each target in units of its linear row: the initial denominator of a ratio, else 1."""
        unit = np.ones(self.num_targets)
        if self.denominators is not None:
            totals = np.abs(exact_totals(self.denominators, self.starting_weights))
            unit[self.is_ratio] = totals[self.is_ratio]
        return unit

    @cached_property
    def linear(self) -> CalibrationProblem:
        """The same problem with totals only: a ratio a / b = t becomes the total a - t b with target 0."""
        if self.denominators is None:
            return self
        return as_totals(self, self.denominators, self.is_ratio, self._unit)

    @cached_property
    def matrix_t(self) -> sp.csr_array:
        """Households x targets: the matrix by household, canonical CSR, made on first use."""
        return _with_small_indices(sp.csr_array(self.matrix.T.tocsr()))

    @cached_property
    def nesting(self) -> Nesting | None:
        """Which targets are exact sums of others, found on first use; None where too few are to pay."""
        return find_nesting(self.matrix, self.matrix_t, self.parent)

    def estimates(self, weights: np.ndarray) -> Float[np.ndarray, "targets={self.num_targets}"]:
        """Weighted totals ``matrix @ weights`` and ratios of them in float64, shape (targets,).

        Args:
            weights: Shape (households,). A ratio whose denominator they make zero is NaN.
        """
        w = np.asarray(weights, dtype=np.float64)
        if w.shape != (self.num_households,):
            raise ValueError(f"weights must have shape ({self.num_households},), got {w.shape}")
        totals = exact_totals(self.matrix, w)
        if self.denominators is None:
            return totals
        below = np.where(self.is_ratio, exact_totals(self.denominators, w), 1.0)
        return np.asarray(np.divide(totals, below, out=np.full(len(totals), np.nan), where=below != 0))

    def scaled_errors(
        self, estimates: Float[np.ndarray, "targets={self.num_targets}"]
    ) -> Float[np.ndarray, "targets={self.num_targets}"]:
        """How far estimates lie outside their targets' tolerance, signed, over ``scale``.

        Args:
            estimates: As ``estimates`` returns them, shape (targets,).
        """
        error = estimates - self.targets
        beyond: np.ndarray = np.sign(error) * np.maximum(np.abs(error) - self.tolerance, 0.0) / self.scale
        return beyond

    def with_targets(self, **numbers: Any) -> CalibrationProblem:
        """Return the same matrix with other numbers of its targets.

        Args:
            **numbers: Arguments of ``CalibrationProblem`` with one value per target.
        """
        other = replace(self, **numbers)
        other.adopt(self)
        return other

    def adopt(self, other: CalibrationProblem) -> None:
        """Take over what has been found about the matrix of another problem, if it is the same.

        Args:
            other: Of other years, for example.
        """
        mine, theirs = self.matrix, other.matrix
        same = mine.shape == theirs.shape and mine.nnz == theirs.nnz
        if same and np.may_share_memory(mine.data, theirs.data):
            for name in ("matrix_t", "nesting"):
                if name in other.__dict__:
                    self.__dict__.setdefault(name, other.__dict__[name])

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
        per_target = ("target_groups", "target_weights", "target_scales", "target_tolerances", "target_hard")
        some = {name: getattr(self, name) for name in (*per_target, "denominators")}
        return CalibrationProblem(
            matrix=self.matrix[rows],
            targets=self.targets[rows],
            initial_weights=self.initial_weights,
            target_names=tuple(self.names[i] for i in rows),
            ids=self.ids,
            parent=parent,
            **{name: None if values is None else values[rows] for name, values in some.items()},
        )


def as_totals(
    problem: CalibrationProblem,
    denominators: sp.csr_array,
    ratio: Bool[np.ndarray, "targets={problem.num_targets}"],
    unit: Float[np.ndarray, "targets={problem.num_targets}"],
) -> CalibrationProblem:
    """A problem in which each ratio a / b = t is the total a - t b with target 0.

    Args:
        problem: Its matrix holds what is above the line.
        denominators: What is below, of the same shape.
        ratio: Which targets are ratios.
        unit: One unit of each target in units of its row there: the initial denominator of a ratio, else 1.
    """
    factor = sp.diags_array(np.where(ratio, problem.targets, 0.0))
    rows = sp.csr_array(problem.matrix.astype(np.float64) - factor @ denominators.astype(np.float64))
    own = np.zeros(problem.num_targets) if problem.target_scales is None else problem.target_scales
    own = np.where(ratio, np.maximum(np.abs(problem.targets), own), own)
    return replace(
        problem,
        matrix=rows,
        targets=np.where(ratio, 0.0, problem.targets),
        target_tolerances=problem.tolerance * unit,
        target_scales=own * unit,
        denominators=None,
    )


def exact_totals(
    matrix: sp.csr_array,
    weights: Float[np.ndarray, "households={matrix.shape[1]}"],
    entries_at_once: int = 1_000_000,
) -> Float[np.ndarray, "targets={matrix.shape[0]}"]:
    """Multiply a CSR matrix by float64 weights, summing in float64, without a float64 copy of it.

    Args:
        matrix: Targets x households, float32 or float64.
        weights: Shape (households,), float64.
        entries_at_once: About how many entries are widened to float64 at a time; never less than a row.
    """
    if matrix.dtype == np.float64 or matrix.nnz <= entries_at_once:
        return np.asarray(matrix @ weights)  # SciPy widens the entries to the type of the weights
    indptr = np.asarray(matrix.indptr, dtype=np.int64)
    cuts = np.searchsorted(indptr, np.arange(entries_at_once, indptr[-1], entries_at_once))
    bounds = np.unique(np.concatenate([[0], cuts, [matrix.shape[0]]]))
    parts = [
        matrix[start:stop].astype(np.float64) @ weights for start, stop in itertools.pairwise(bounds.tolist())
    ]
    return np.concatenate(parts)


def gross_totals(
    matrix: sp.csr_array, weights: Float[np.ndarray, "households"]
) -> Float[np.ndarray, "targets"]:
    """Weighted totals of the entries without their signs."""
    if (matrix.data < 0).any():
        matrix = sp.csr_array((np.abs(matrix.data), matrix.indices, matrix.indptr), shape=matrix.shape)
    return exact_totals(matrix, weights)


def _canonical_csr(name: str, matrix: Any) -> sp.csr_array:
    """Bring anything two-dimensional to canonical CSR, checked whole; copy only what must change."""
    csr = as_csr(matrix)
    if not _is_canonical(csr):
        wide = csr.data.astype(np.float64)  # a copy; entries given twice add up without loss
        csr = sp.csr_array((wide, csr.indices.copy(), csr.indptr.copy()), shape=csr.shape)
        csr.sum_duplicates()
        csr.eliminate_zeros()
    return _with_small_indices(
        sp.csr_array((_exact_data(name, csr), csr.indices, csr.indptr), shape=csr.shape)
    )


def _exact_data(name: str, csr: sp.csr_array) -> np.ndarray:
    """Return the entries, checked, as float32 if that holds every one of them exactly, else as float64."""
    with np.errstate(over="ignore"):  # what overflows float32 is refused below, with its place
        bad = np.flatnonzero(~np.isfinite(csr.data.astype(np.float32)))
    if bad.size:
        row = int(np.searchsorted(csr.indptr, bad[0], side="right")) - 1
        raise ValueError(
            f"{name} must be finite in float32: {csr.data[bad[0]]} in row {row}, column {csr.indices[bad[0]]}"
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
    bad = np.flatnonzero(np.abs(vector) > LARGEST)
    if bad.size:
        raise ValueError(
            f"{name} must be at most {LARGEST:g} in size, got {vector[bad[0]]:g} at position {bad[0]}"
        )
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
