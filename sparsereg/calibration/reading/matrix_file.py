"""Read sparse matrices as ``scipy.sparse.save_npz`` writes them; every size and index is checked before use.

SciPy's own reader trusts the file: indices that point outside the matrix make compiled code read and write
beyond its arrays.
"""

from __future__ import annotations

import logging
import math
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp

from sparsereg import archives
from sparsereg.calibration.reading.tables import existing
from sparsereg.checks import check_memory
from sparsereg.errors import DamagedFile, InputError
from sparsereg.linalg.checked import as_csr, check_indices, widened

log = logging.getLogger(__name__)

_PARTS = {
    "csr": ("indices", "indptr"),
    "csc": ("indices", "indptr"),
    "bsr": ("indices", "indptr"),
    "coo": ("row", "col"),
    "dia": ("offsets",),
}
_LARGEST_SIDE = np.iinfo(np.int32).max


def read_matrix(
    path: str | Path, check_shape: Callable[[tuple[int, int]], None] | None = None
) -> sp.csr_array:
    """Read a sparse matrix, targets x households, as written by ``scipy.sparse.save_npz``.

    Args:
        path: The file.
        check_shape: Called with the shape before memory is taken for it; raises if it does not fit.

    Raises:
        InputError: No such file, not such a file, or its parts do not make a matrix.
    """
    file = existing(path)
    try:
        archives.check(file)
        return _read(file, check_shape)
    except InputError:
        raise
    except DamagedFile as error:
        raise InputError(
            f"{file} is not an .npz file, or is damaged: {error}; write the matrix with scipy.sparse.save_npz"
        ) from error
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{file} cannot be read as a sparse matrix: {reason}") from error


def _read(file: Path, check_shape: Callable[[tuple[int, int]], None] | None) -> sp.csr_array:
    with zipfile.ZipFile(file) as archive:
        members = {m.filename.removesuffix(".npy"): m for m in archive.infolist()}
        if "format" not in members:
            raise InputError(
                f"{file} holds the arrays {', '.join(list(members)[:8]) or '(none)'}, not a sparse matrix:"
                " write it with scipy.sparse.save_npz"
            )
        kind = _text(_array(archive, members, "format"))
        if kind not in _PARTS:
            raise ValueError(f"its format is {kind!r}, expected one of {', '.join(_PARTS)}")
        shape = _shape(_array(archive, members, "shape"))
        if check_shape is not None:
            check_shape(shape)
        needed = ("data", *_PARTS[kind])
        if kind == "coo" and "coords" in members:
            needed = ("data", "coords")
        absent = [name for name in needed if name not in members]
        if absent:
            raise ValueError(f"the array {absent[0]} is missing")
        _check_memory(shape, [members[name] for name in needed])
        parts = {name: _array(archive, members, name) for name in needed}
    matrix = _assembled(kind, shape, parts)
    check_indices(matrix)
    csr = as_csr(matrix)
    wrong = np.flatnonzero(~np.isfinite(csr.data))
    if len(wrong):
        row = int(np.searchsorted(csr.indptr, wrong[0], side="right"))
        raise ValueError(f"{csr.data[wrong[0]]} in row {row}, column {csr.indices[wrong[0]] + 1}")
    twice = matrix.nnz - csr.nnz if kind == "coo" else _num_repeated(csr)
    if twice:
        log.warning("%s: %s entries are there more than once: they are added up", file, f"{twice:,}")
    return csr


def _array(archive: zipfile.ZipFile, members: dict[str, zipfile.ZipInfo], name: str) -> np.ndarray:
    """Read one array; what its header announces must be what is there, before memory is taken for it."""
    if name not in members:
        raise ValueError(f"the array {name} is missing")
    member = members[name]
    with archive.open(member) as f:
        version = np.lib.format.read_magic(f)
        read_header = {(1, 0): np.lib.format.read_array_header_1_0}.get(
            version, np.lib.format.read_array_header_2_0
        )
        shape, _, dtype = read_header(f)
        if dtype.hasobject:
            raise ValueError(f"the array {name} holds Python objects, which are not read")
        announced, there = math.prod(shape) * dtype.itemsize, member.file_size - f.tell()
    if announced != there:
        raise ValueError(f"the array {name} announces {announced:,} bytes, but {there:,} follow")
    with archive.open(member) as f:
        return np.lib.format.read_array(f, allow_pickle=False)


def _text(array: np.ndarray) -> str:
    value = array.item() if array.size == 1 else None
    return value.decode("ascii", "replace") if isinstance(value, bytes) else str(value)


def _shape(array: np.ndarray) -> tuple[int, int]:
    if array.shape != (2,) or array.dtype.kind not in "iu":
        raise ValueError(f"its shape must be two whole numbers, got {array.tolist()!r:.60}")
    rows, columns = (int(n) for n in array)
    if not (1 <= rows <= _LARGEST_SIDE and 1 <= columns <= _LARGEST_SIDE):
        raise ValueError(f"its shape is {rows} x {columns}, expected sides of 1 to {_LARGEST_SIDE:,}")
    return rows, columns


def _check_memory(shape: tuple[int, int], members: list[zipfile.ZipInfo]) -> None:
    """Refuse what cannot fit: a few kilobytes of zip may announce terabytes."""
    needed = sum(member.file_size for member in members) + 8 * sum(shape)
    check_memory(needed, f"{shape[0]:,} x {shape[1]:,}")


def _assembled(kind: str, shape: tuple[int, int], parts: dict[str, np.ndarray]) -> Any:
    """Put the arrays together without SciPy's looking into them."""
    data = parts["data"]
    dimensions = {"dia": 2, "bsr": 3}.get(kind, 1)
    if data.ndim != dimensions or data.dtype.kind not in "biuf" or 0 in data.shape[1:]:
        raise ValueError(f"its data are {data.dtype} of shape {data.shape}, expected real numbers")
    data = widened(data)
    for name, part in parts.items():
        if name != "data" and part.dtype.kind not in "iu":
            raise ValueError(f"its {name} must be whole numbers, got {part.dtype}")
        if name != "data" and part.size and int(part.max()) > np.iinfo(np.int64).max:
            raise ValueError(f"its {name} reach {int(part.max())}")
    if kind == "coo":
        rows, columns = parts["coords"] if "coords" in parts else (parts["row"], parts["col"])
        return sp.coo_array((data, (rows, columns)), shape=shape)
    if kind == "dia":
        return sp.dia_array((data, parts["offsets"]), shape=shape)
    form = {"csr": sp.csr_array, "csc": sp.csc_array, "bsr": sp.bsr_array}[kind]
    return form((data, parts["indices"], parts["indptr"]), shape=shape)


def _num_repeated(csr: sp.csr_array) -> int:
    """Count entries at a place that has one already."""
    if csr.has_canonical_format:
        return 0
    ordered = csr.sorted_indices()
    starts = np.zeros(csr.nnz + 1, dtype=bool)
    starts[ordered.indptr] = True
    return int((~starts[1:-1] & (ordered.indices[1:] == ordered.indices[:-1])).sum())
