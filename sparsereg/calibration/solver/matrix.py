"""The matrix of a calibration problem, stored by household, and the products a solver needs.

Two homes of the same three products: compiled loops over float32 entries on the CPU, and torch's sparse
products on any device. Both accumulate in float64, and both give the same bits for the same input
whatever the number of threads.
"""

from __future__ import annotations

import importlib.util
import itertools
import warnings
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from sparsereg.linalg.threads import in_turns
from sparsereg.shapes import Float, Int, Shaped

_ENTRIES_PER_LANE = 250_000
"""Fewer entries than this are not worth handing to a second thread (about 0.2 ms of work)."""
_NEAR = 16
"""From one household of a target to the next, on average: so many weights are in a line of the cache."""
_FEW_ENTRIES = 8
"""Entries of a household with which a loop ends more often than the processor foresees."""
_MAX_LANES = 8
"""Private totals cost num_targets x 8 bytes per lane."""


class HouseholdMatrix(Protocol):
    """What solvers ask of a matrix. Vectors are torch tensors on ``device``."""

    num_households: int
    num_targets: int
    num_entries: int
    device: torch.device
    is_compiled: bool
    """Whether loops of numba are used, here and beside it."""

    def totals(
        self, weights: Float[Tensor, "households={self.num_households}"]
    ) -> Float[Tensor, "targets={self.num_targets}"]:
        """Sum of weights times entries for every target, float64; households of weight zero cost nothing."""

    def gradient(
        self,
        by_totals: Float[Tensor, "targets={self.num_targets}"],
        where: Shaped[Tensor, "households={self.num_households}"] | None = None,
    ) -> Float[Tensor, "households={self.num_households}"]:
        """Sum of by_totals times entries for every household, float64; zero where ``where`` is zero."""

    def squared_norms(
        self, row_weights: Float[Tensor, "targets={self.num_targets}"]
    ) -> Float[Tensor, "households={self.num_households}"]:
        """Sum of row_weights times squared entries for every household, float64."""

    def noise(self, seed: int, epoch: int) -> Float[Tensor, "households={self.num_households}"]:
        """Uniform numbers in [0, 1), float32, one per household: the same for the same seed and epoch.

        Compiled, they follow the households' keys, in whatever order and process they are.
        """

    def take(self, households: Int[Tensor, "selected"]) -> HouseholdMatrix:
        """Return the matrix of these households only, in this order (a copy)."""

    def arranged(self, often: Int[Tensor, "often"] | None) -> HouseholdMatrix:
        """Return the same matrix for many products: hardly others have a weight, or most have (None)."""


class Descent(NamedTuple):
    """Where coordinate descent stands, float64; see ``kernels.descend``.

    Attributes:
        row_weights: What each target's squared error counts, (targets,).
        by_totals: Half of the gradient with respect to each total, (targets,); changed in place.
        weights: Of the households, (households,); changed in place.
        lower: The least that they may be.
        upper: The most.
        curvature: Half of the second derivative with respect to each.
        pull: Of each towards its ``center``.
        center: Where it is pulled to.
        held: The sum of weights, what it is to be, what its error costs, and its multiplier, (4,).
    """

    row_weights: Tensor
    by_totals: Tensor
    weights: Tensor
    lower: Tensor
    upper: Tensor
    curvature: Tensor
    pull: Tensor
    center: Tensor
    held: Tensor


@runtime_checkable
class Descending(Protocol):
    """A matrix along whose households coordinate descent goes."""

    def descend(self, at: Descent, sweeps: int) -> None:
        """Change weights and by_totals in place by so many rounds over the households."""


def household_matrix(
    by_household: sp.csr_array,
    device: str | torch.device = "cpu",
    backend: str = "auto",
    *,
    local: bool = False,
    keys: np.ndarray | None = None,
) -> HouseholdMatrix:
    """Prepare a matrix for a solver; in a group of processes, each one's share of the targets.

    Args:
        by_household: Households x targets, canonical CSR, float32.
        device: Where to compute.
        backend: "compiled" (numba; CPU only), "torch", or "auto": compiled where it can be.
        local: Keep the whole matrix in this process, whether or not there is a group.
        keys: What the noise of each household depends on, >= 0; None: its place.

    Raises:
        ValueError: the backend is unknown or does not run on the device.
    """
    device = torch.device(device)
    can_compile = _can_compile(device)
    if backend not in ("auto", "compiled", "torch"):
        raise ValueError(f"backend must be one of auto, compiled, torch, got {backend!r}")
    if backend == "compiled" and not can_compile:
        raise ValueError(f"backend='compiled' needs numba and device='cpu', got device={str(device)!r}")
    if not local and _num_processes() > 1:
        return ShardedMatrix.of_this_process(by_household, device, backend, keys)
    if backend == "torch" or not can_compile:
        return TorchMatrix.from_scipy(by_household, device)
    return CompiledMatrix(by_household, keys)


def compiles(device: str | torch.device, backend: str, *, local: bool = False) -> bool:
    """Whether ``household_matrix`` would use compiled loops, in this process alone."""
    return backend != "torch" and _can_compile(torch.device(device)) and (local or _num_processes() == 1)


def _can_compile(device: torch.device) -> bool:
    return device.type == "cpu" and importlib.util.find_spec("numba") is not None


class CompiledMatrix:
    """The matrix on the CPU, with numba's loops.

    The households are cut into lanes of about equally many entries. Each lane sums into totals of its own
    and these are added in order, so the result does not depend on how many threads share the lanes.

    Args:
        by_household: Households x targets, canonical CSR, float32.
        keys: What the noise of each household depends on, >= 0; None: its place.
    """

    device = torch.device("cpu")
    is_compiled = True

    def __init__(self, by_household: sp.csr_array, keys: np.ndarray | None = None) -> None:
        num_targets = int(by_household.shape[1])
        small = num_targets <= np.iinfo(np.uint16).max
        self._set(
            np.ascontiguousarray(by_household.indptr),
            np.ascontiguousarray(by_household.indices, dtype=np.uint16 if small else np.int32),
            np.ascontiguousarray(by_household.data, dtype=np.float32),
            _narrow(np.arange(by_household.shape[0]) if keys is None else keys),
            num_targets,
        )

    def _set(
        self, indptr: np.ndarray, indices: np.ndarray, data: np.ndarray, keys: np.ndarray, num_targets: int
    ) -> None:
        self._indptr, self._indices, self._data, self._keys = indptr, indices, data, keys
        self.num_households, self.num_targets = len(indptr) - 1, num_targets
        self.num_entries = int(indptr[-1] - indptr[0])
        num_lanes = max(1, min(_MAX_LANES, self.num_entries // _ENTRIES_PER_LANE))
        cuts = indptr[0] + np.arange(num_lanes + 1) * (self.num_entries / num_lanes)
        bounds = np.searchsorted(indptr, cuts)
        bounds[0], bounds[-1] = 0, self.num_households
        self._lanes = [slice(int(a), int(b)) for a, b in itertools.pairwise(bounds)]

    def _run(self, name: str, per_lane: list[tuple[Any, ...]]) -> None:
        """Call a kernel for every lane, in threads if torch may use several."""
        from sparsereg.calibration.solver import kernels

        calls = [
            (*self.entries_of(lane), *arguments)
            for lane, arguments in zip(self._lanes, per_lane, strict=True)
        ]
        in_turns(getattr(kernels, name), calls)

    def totals(
        self, weights: Float[Tensor, "households={self.num_households}"]
    ) -> Float[Tensor, "targets={self.num_targets}"]:
        """See ``HouseholdMatrix``."""
        values = weights.numpy()
        return self._scattered("scatter", [(values[lane],) for lane in self._lanes])

    def _scattered(self, name: str, per_lane: list[tuple[Any, ...]]) -> Float[Tensor, "targets"]:
        """Call a kernel that adds to totals, each lane to its own, and add those up in order."""
        private = np.zeros((len(self._lanes), self.num_targets))
        self._run(name, [(*arguments, own) for arguments, own in zip(per_lane, private, strict=True)])
        return torch.from_numpy(private[0] if len(private) == 1 else private.sum(axis=0))

    def gradient(
        self,
        by_totals: Float[Tensor, "targets={self.num_targets}"],
        where: Shaped[Tensor, "households={self.num_households}"] | None = None,
    ) -> Float[Tensor, "households={self.num_households}"]:
        """See ``HouseholdMatrix``."""
        values, out = by_totals.numpy(), np.empty(self.num_households)
        if where is None:
            self._run("gather", [(values, out[lane]) for lane in self._lanes])
        else:
            mask = where.numpy()
            self._run("gather_where", [(values, mask[lane], out[lane]) for lane in self._lanes])
        return torch.from_numpy(out)

    def squared_norms(
        self, row_weights: Float[Tensor, "targets={self.num_targets}"]
    ) -> Float[Tensor, "households={self.num_households}"]:
        """See ``HouseholdMatrix``."""
        out = np.empty(self.num_households)
        self._run("squared_norms", [(row_weights.numpy(), out[lane]) for lane in self._lanes])
        return torch.from_numpy(out)

    def noise(self, seed: int, epoch: int) -> Float[Tensor, "households={self.num_households}"]:
        """See ``HouseholdMatrix``."""
        from sparsereg.calibration.solver import kernels

        out = np.empty(self.num_households, dtype=np.float32)
        kernels.uniform(np.uint64(seed), np.uint64(epoch), self._keys, out)
        return torch.from_numpy(out)

    def entries_of(self, households: slice) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Pointers of some households, and the indices and values of all entries."""
        return self._indptr[households.start : households.stop + 1], self._indices, self._data

    def by_household(self) -> sp.csr_array:
        """The entries, households x targets, float64."""
        parts = (self._data.astype(np.float64), self._indices.astype(np.int32), self._indptr)
        return sp.csr_array(parts, shape=(self.num_households, self.num_targets))

    def descend(self, at: Descent, sweeps: int) -> None:
        """See ``Descending``: one household after the other."""
        from sparsereg.calibration.solver import kernels

        entries = self._indptr, self._indices, self._data
        arguments: list[Any] = [*entries, *(vector.numpy() for vector in at), sweeps]
        kernels.descend(*arguments)

    def take(self, households: Int[Tensor, "selected"]) -> CompiledMatrix:
        """See ``HouseholdMatrix``."""
        from sparsereg.calibration.solver import kernels

        chosen = households.numpy()
        indptr = np.zeros(len(chosen) + 1, dtype=np.int64)
        np.cumsum(self._indptr[chosen + 1] - self._indptr[chosen], out=indptr[1:])
        indices, data = np.empty(indptr[-1], self._indices.dtype), np.empty(indptr[-1], np.float32)
        kernels.copy_households(self._indptr, self._indices, self._data, chosen, indptr, indices, data)
        part = CompiledMatrix.__new__(CompiledMatrix)
        part._set(indptr.astype(self._indptr.dtype), indices, data, self._keys[chosen], self.num_targets)
        return part

    def arranged(self, often: Int[Tensor, "often"] | None) -> CompiledMatrix:
        """See ``HouseholdMatrix``."""
        return Apart(self, often) if often is not None else ByTarget.where_it_pays(self)


class Apart(CompiledMatrix):
    """A matrix with a copy of some households beside it: those that are often of a weight other than zero.

    Reading every tenth household from main memory costs nearly as much as reading all of them.

    Args:
        matrix: All households; the others are read from it, where they are.
        often: Indices of those to store together, ascending.
    """

    def __init__(self, matrix: CompiledMatrix, often: Int[Tensor, "often"]) -> None:
        self._set(matrix._indptr, matrix._indices, matrix._data, matrix._keys, matrix.num_targets)
        part, place = matrix.take(often), often.numpy()
        is_rare = np.ones(matrix.num_households, dtype=np.uint8)
        is_rare[place] = 0
        cuts = [0, *(int(place[lane.start]) for lane in part._lanes[1:]), matrix.num_households]
        self._lanes = [slice(a, b) for a, b in itertools.pairwise(cuts)]
        self._near = [
            ((place[rows] - lane.start).astype(np.int32), is_rare[lane], *part.entries_of(rows))
            for lane, rows in zip(self._lanes, part._lanes, strict=True)
        ]

    def totals(
        self, weights: Float[Tensor, "households={self.num_households}"]
    ) -> Float[Tensor, "targets={self.num_targets}"]:
        """See ``HouseholdMatrix``."""
        values, lanes = weights.numpy(), zip(self._lanes, self._near, strict=True)
        return self._scattered("scatter_apart", [(*near, values[lane]) for lane, near in lanes])

    def gradient(
        self,
        by_totals: Float[Tensor, "targets={self.num_targets}"],
        where: Shaped[Tensor, "households={self.num_households}"] | None = None,
    ) -> Float[Tensor, "households={self.num_households}"]:
        """See ``HouseholdMatrix``."""
        if where is None:
            return super().gradient(by_totals)
        values, mask, out = by_totals.numpy(), where.numpy(), np.empty(self.num_households)
        lanes = zip(self._lanes, self._near, strict=True)
        self._run("gather_apart", [(*near, values, mask[lane], out[lane]) for lane, near in lanes])
        return torch.from_numpy(out)


class ByTarget(CompiledMatrix):
    """A matrix with a copy by target beside it, for totals where most households have a weight.

    The sum of a target stays in a register, where totals that are added to from household to household are
    read and written each time. Targets of which all entries are 1 have no values to read.

    Args:
        matrix: All households; gradients are read from it.
        pieces: How many pieces the row of each target has.
        length: How many entries.
        is_ones: Whether all of these are 1, uint8.
    """

    def __init__(
        self, matrix: CompiledMatrix, pieces: np.ndarray, length: np.ndarray, is_ones: np.ndarray
    ) -> None:
        from sparsereg.calibration.solver import kernels

        self._set(matrix._indptr, matrix._indices, matrix._data, matrix._keys, matrix.num_targets)
        entries = self.entries_of(slice(0, self.num_households))
        piece_ptr, entry_ptr = (np.append(0, np.cumsum(n)) for n in (pieces, length))
        value_ptr = np.append(0, np.cumsum(np.where(is_ones, 0, length)))
        store = (
            np.empty(piece_ptr[-1], np.int64), np.append(np.empty(piece_ptr[-1], np.int64), entry_ptr[-1]),
            np.empty(entry_ptr[-1], np.uint16), np.empty(value_ptr[-1], np.float32),
        )  # fmt: skip
        shift = value_ptr[:-1] - entry_ptr[:-1]
        kernels.store_by_target(
            *entries, piece_ptr, piece_ptr[:-1] - 1, entry_ptr[:-1].copy(), is_ones, shift, *store
        )
        self._rows = piece_ptr, is_ones, shift, *store
        cuts = np.searchsorted(entry_ptr, np.linspace(0, entry_ptr[-1], len(self._lanes) + 1)[1:-1])
        self._ranges = list(itertools.pairwise([0, *(int(cut) for cut in cuts), self.num_targets]))

    @classmethod
    def where_it_pays(cls, matrix: CompiledMatrix) -> CompiledMatrix:
        """With the copy, if a target's households lie near each other or have few entries; else as it is."""
        from sparsereg.calibration.solver import kernels

        start, last, length, pieces = np.zeros((4, matrix.num_targets), dtype=np.int64)
        is_ones = np.ones(matrix.num_targets, dtype=np.uint8)
        entries = matrix.entries_of(slice(0, matrix.num_households))
        far = kernels.count_by_target(*entries, start, last, length, pieces, is_ones)
        near = far <= _NEAR * matrix.num_entries
        few = matrix.num_entries <= _FEW_ENTRIES * matrix.num_households
        return cls(matrix, pieces, length, is_ones) if near or few else matrix

    def totals(
        self, weights: Float[Tensor, "households={self.num_households}"]
    ) -> Float[Tensor, "targets={self.num_targets}"]:
        """See ``HouseholdMatrix``."""
        from sparsereg.calibration.solver import kernels

        values, out = weights.numpy(), np.empty(self.num_targets)
        in_turns(kernels.totals_by_target, [(*self._rows, values, *ends, out) for ends in self._ranges])
        return torch.from_numpy(out)


class TorchMatrix:
    """The matrix on any device, with torch's sparse products, stored both ways to never transpose.

    Args:
        by_household: Households x targets, sparse CSR tensor, float64.
        by_target: Its transpose, sparse CSR.
    """

    is_compiled = False

    def __init__(self, by_household: Tensor, by_target: Tensor) -> None:
        self._by_household, self._by_target = by_household, by_target
        self.num_households, self.num_targets = (int(n) for n in by_household.shape)
        self.num_entries = int(by_household.values().numel())
        self.device = by_household.device

    @classmethod
    def from_scipy(cls, by_household: sp.csr_array, device: torch.device) -> TorchMatrix:
        """Copy a scipy matrix, households x targets, and its transpose to the device."""
        by_target = sp.csr_array(by_household.T.tocsr())
        return cls(_to_torch(by_household, device), _to_torch(by_target, device))

    def totals(
        self, weights: Float[Tensor, "households={self.num_households}"]
    ) -> Float[Tensor, "targets={self.num_targets}"]:
        """See ``HouseholdMatrix``."""
        return self._by_target @ weights.double()

    def gradient(
        self,
        by_totals: Float[Tensor, "targets={self.num_targets}"],
        where: Shaped[Tensor, "households={self.num_households}"] | None = None,
    ) -> Float[Tensor, "households={self.num_households}"]:
        """See ``HouseholdMatrix``."""
        gradient = self._by_household @ by_totals
        return gradient if where is None else gradient * (where != 0)

    def squared_norms(
        self, row_weights: Float[Tensor, "targets={self.num_targets}"]
    ) -> Float[Tensor, "households={self.num_households}"]:
        """See ``HouseholdMatrix``."""
        squares = _csr_tensor(
            self._by_household.crow_indices(),
            self._by_household.col_indices(),
            self._by_household.values().square(),
            self._by_household.shape,
        )
        return squares @ row_weights

    def noise(self, seed: int, epoch: int) -> Float[Tensor, "households={self.num_households}"]:
        """See ``HouseholdMatrix``."""
        mixed = (seed * 0x9E3779B97F4A7C15 + epoch * 0xD1342543DE82EF95) % 2**63
        generator = torch.Generator(device=self.device).manual_seed(mixed)
        return torch.rand(self.num_households, generator=generator, device=self.device)

    def take(self, households: Int[Tensor, "selected"]) -> TorchMatrix:
        """See ``HouseholdMatrix``."""
        crow = self._by_household.crow_indices()
        columns, values = self._by_household.col_indices(), self._by_household.values()
        counts = (crow[1:] - crow[:-1])[households]
        new_crow = torch.zeros(len(households) + 1, dtype=crow.dtype, device=self.device)
        new_crow[1:] = counts.cumsum(0)
        entries = torch.repeat_interleave(crow[households] - new_crow[:-1], counts)
        entries = entries + torch.arange(len(entries), device=self.device)
        shape = (len(households), self.num_targets)
        chosen = _csr_tensor(new_crow, columns[entries], values[entries], shape)
        return TorchMatrix(chosen, _transposed(chosen))

    def arranged(self, often: Int[Tensor, "often"] | None) -> TorchMatrix:
        """See ``HouseholdMatrix``: its products read everything in any case."""
        return self


class ShardedMatrix:
    """Some rows (targets) of a matrix in each process of a group, which sums over processes.

    Vectors are whole in every process; with the same input all processes see the same output.

    Args:
        local: Households x the targets of this process.
        first: Index of the first of these targets.
        num_targets: Number of all targets.
    """

    def __init__(self, local: HouseholdMatrix, first: int, num_targets: int) -> None:
        self._local, self._rows = local, slice(first, first + local.num_targets)
        self.num_households, self.num_targets = local.num_households, num_targets
        self.num_entries, self.device = local.num_entries, local.device
        self.is_compiled = local.is_compiled

    @classmethod
    def of_this_process(
        cls,
        by_household: sp.csr_array,
        device: torch.device,
        backend: str,
        keys: np.ndarray | None = None,
    ) -> ShardedMatrix:
        """Take this process's share of the targets, about equally many entries each."""
        rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
        num_targets = int(by_household.shape[1])
        entries = np.bincount(by_household.indices, minlength=num_targets).cumsum()
        cuts = np.searchsorted(entries, np.arange(1, world) * (entries[-1] / world)) + 1
        bounds = np.concatenate([[0], np.minimum(cuts, num_targets), [num_targets]])
        first, last = int(bounds[rank]), int(bounds[rank + 1])
        mine = sp.csr_array(by_household[:, first:last])
        local = household_matrix(mine, device, backend, local=True, keys=keys)
        return cls(local, first, num_targets)

    def totals(
        self, weights: Float[Tensor, "households={self.num_households}"]
    ) -> Float[Tensor, "targets={self.num_targets}"]:
        """See ``HouseholdMatrix``."""
        totals = torch.zeros(self.num_targets, dtype=torch.float64, device=self.device)
        totals[self._rows] = self._local.totals(weights)
        return _sum_over_processes(totals)

    def gradient(
        self,
        by_totals: Float[Tensor, "targets={self.num_targets}"],
        where: Shaped[Tensor, "households={self.num_households}"] | None = None,
    ) -> Float[Tensor, "households={self.num_households}"]:
        """See ``HouseholdMatrix``."""
        return _sum_over_processes(self._local.gradient(by_totals[self._rows], where))

    def squared_norms(
        self, row_weights: Float[Tensor, "targets={self.num_targets}"]
    ) -> Float[Tensor, "households={self.num_households}"]:
        """See ``HouseholdMatrix``."""
        return _sum_over_processes(self._local.squared_norms(row_weights[self._rows]))

    def noise(self, seed: int, epoch: int) -> Float[Tensor, "households={self.num_households}"]:
        """See ``HouseholdMatrix``."""
        return self._local.noise(seed, epoch)

    def take(self, households: Int[Tensor, "selected"]) -> ShardedMatrix:
        """See ``HouseholdMatrix``."""
        return ShardedMatrix(self._local.take(households), self._rows.start, self.num_targets)

    def arranged(self, often: Int[Tensor, "often"] | None) -> ShardedMatrix:
        """See ``HouseholdMatrix``."""
        return ShardedMatrix(self._local.arranged(often), self._rows.start, self.num_targets)


def _narrow(keys: np.ndarray) -> np.ndarray:
    """The same numbers >= 0 in 32 bits, if they fit."""
    fits = keys.max(initial=0) <= np.iinfo(np.int32).max
    return np.ascontiguousarray(keys, dtype=np.int32 if fits else np.int64)


def _num_processes() -> int:
    group = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if group else 1


def _sum_over_processes(values: Tensor) -> Tensor:
    torch.distributed.all_reduce(values)
    return values


def _to_torch(matrix: sp.csr_array, device: torch.device) -> Tensor:
    """Scipy CSR to a torch CSR tensor in float64, so that sums are exact enough to report."""
    parts = (matrix.indptr, matrix.indices, matrix.data.astype(np.float64))
    crow, columns, values = (torch.from_numpy(part).to(device) for part in parts)
    return _csr_tensor(crow, columns, values, matrix.shape)


def _csr_tensor(crow: Tensor, columns: Tensor, values: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Build a sparse CSR tensor without torch's warnings that CSR is in beta and goes unchecked."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse (CSR|invariant)")
        return torch.sparse_csr_tensor(crow, columns, values, shape)


def _transposed(matrix: Tensor) -> Tensor:
    """Transpose a CSR tensor by one stable sort of its column indices."""
    num_rows, num_columns = matrix.shape
    crow, columns = matrix.crow_indices(), matrix.col_indices()
    rows = torch.repeat_interleave(torch.arange(num_rows, device=matrix.device), crow[1:] - crow[:-1])
    order = torch.argsort(columns, stable=True)
    new_crow = torch.zeros(num_columns + 1, dtype=crow.dtype, device=matrix.device)
    new_crow[1:] = torch.bincount(columns, minlength=num_columns).cumsum(0)
    return _csr_tensor(new_crow, rows[order].to(crow.dtype), matrix.values()[order], (num_columns, num_rows))
