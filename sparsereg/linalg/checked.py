"""Any matrix as CSR, with every index checked before compiled code trusts it."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import scipy.sparse as sp

_CHECKED = ("csr", "csc", "bsr", "coo", "dia")


def smallest_exact(values: np.ndarray) -> np.ndarray:
    """Return finite float64 values as float32 if that holds every one of them exactly, else as they are."""
    with np.errstate(over="ignore", under="ignore"):
        narrow = values.astype(np.float32)
    return narrow if np.array_equal(narrow, values) else values


def as_csr(matrix: Any) -> sp.csr_array:
    """Return a matrix as CSR, targets x households, with every index checked.

    Entries given twice are added up in float64, or still there twice.

    Args:
        matrix: A scipy sparse matrix or array of any format, a torch tensor (dense or sparse), or anything
            that NumPy takes for a two-dimensional array of real numbers.

    Raises:
        ValueError: It is not two-dimensional, empty, holds other than real numbers, has masked entries, or
            indices that point beyond it.
    """
    if "torch" in sys.modules:
        matrix = _from_torch(matrix)
    if not sp.issparse(matrix):
        if np.ma.is_masked(matrix):
            raise ValueError("matrix must have no masked entries: fill them")
        matrix = np.asarray(matrix)
    if matrix.ndim != 2 or 0 in matrix.shape:
        raise ValueError(
            f"matrix must be targets x households, at least one of each, got shape {matrix.shape}"
        )
    if matrix.dtype.kind not in "biuf":
        raise ValueError(f"matrix must hold real numbers, got {matrix.dtype}")
    if not sp.issparse(matrix):
        return sp.csr_array(widened(matrix))
    check_indices(matrix)
    if matrix.format == "coo":  # entries given twice are added up on the way: without loss or overflow
        matrix = matrix.astype(np.float64)
    csr = sp.csr_array(matrix)
    if matrix.format not in _CHECKED:
        check_indices(csr)
    if csr.nnz != len(csr.data) or csr.nnz != len(csr.indices):  # room for more entries behind the last one
        csr = sp.csr_array((csr.data[: csr.nnz], csr.indices[: csr.nnz], csr.indptr), shape=csr.shape)
    return csr


def widened(values: np.ndarray) -> np.ndarray:
    """Return values that SciPy's sparse matrices can hold: they know no half precision."""
    return values.astype(np.float32) if values.dtype == np.float16 else values


def _from_torch(matrix: Any) -> Any:
    """Turn a torch tensor into what SciPy or NumPy knows; leave anything else alone."""
    import torch

    if not isinstance(matrix, torch.Tensor):
        return matrix
    tensor = matrix.detach().cpu()
    if tensor.dtype in (torch.bfloat16, torch.float16):
        tensor = tensor.float()
    if tensor.layout == torch.strided:
        return tensor.numpy()
    if tensor.ndim != 2:
        return np.empty(tuple(tensor.shape))  # refused for its shape
    shape = tuple(tensor.shape)
    if tensor.layout == torch.sparse_csr:
        parts = (tensor.values(), tensor.col_indices(), tensor.crow_indices())
        return sp.csr_array(tuple(part.numpy() for part in parts), shape=shape)
    if tensor.layout == torch.sparse_csc:
        parts = (tensor.values(), tensor.row_indices(), tensor.ccol_indices())
        return sp.csc_array(tuple(part.numpy() for part in parts), shape=shape)
    if tensor.layout != torch.sparse_coo:
        tensor = tensor.to_sparse_coo()
    rows, columns = tensor._indices().numpy()
    return sp.coo_array((tensor._values().numpy(), (rows, columns)), shape=shape)


def check_indices(matrix: Any) -> None:
    """Check that the parts of a scipy sparse matrix fit together: compiled code trusts them blindly.

    Raises:
        ValueError: An index points outside the matrix, row pointers go back, or lengths do not fit.
    """
    rows, columns = (int(n) for n in matrix.shape)
    if matrix.format in ("csr", "csc", "bsr"):
        height, width = matrix.blocksize if matrix.format == "bsr" else (1, 1)
        if rows % height or columns % width:
            raise ValueError(f"matrix {rows} x {columns} does not consist of blocks of {height} x {width}")
        major, minor = rows // height, columns // width
        if matrix.format == "csc":
            major, minor = columns, rows
        _check_pointers(matrix.indptr, major, min(len(matrix.indices), len(matrix.data)))
        _check_range("indices", matrix.indices[: int(matrix.indptr[-1])], minor)
    elif matrix.format == "coo":
        if not len(matrix.row) == len(matrix.col) == len(matrix.data):
            raise ValueError(
                f"matrix has {len(matrix.data):,} entries, {len(matrix.row):,} rows and"
                f" {len(matrix.col):,} columns for them"
            )
        _check_range("row indices", matrix.row, rows)
        _check_range("column indices", matrix.col, columns)
    elif matrix.format == "dia":
        _check_diagonals(matrix.offsets, matrix.data, rows, columns)


def _check_pointers(pointers: np.ndarray, major: int, entries: int) -> None:
    if pointers.ndim != 1 or len(pointers) != major + 1 or pointers.dtype.kind not in "iu":
        raise ValueError(f"matrix needs {major + 1:,} whole indptr, got {pointers.dtype} {pointers.shape}")
    if pointers[0] != 0:
        raise ValueError(f"matrix has indptr that begin at {pointers[0]}, not at 0")
    if (pointers[1:] < pointers[:-1]).any():
        at = int(np.flatnonzero(pointers[1:] < pointers[:-1])[0])
        raise ValueError(f"matrix has indptr that go back, from {pointers[at]} to {pointers[at + 1]}")
    if int(pointers[-1]) > entries:
        raise ValueError(f"matrix has indptr up to {pointers[-1]}, but {entries} entries")


def _check_range(what: str, indices: np.ndarray, size: int) -> None:
    if indices.ndim != 1 or indices.dtype.kind not in "iu":
        raise ValueError(f"matrix needs whole {what}, got {indices.dtype} of shape {indices.shape}")
    if len(indices) and (int(indices.min()) < 0 or int(indices.max()) >= size):
        wrong = indices.min() if indices.min() < 0 else indices.max()
        raise ValueError(f"matrix has {what} outside [0, {size}): {wrong}")


def _check_diagonals(offsets: np.ndarray, data: np.ndarray, rows: int, columns: int) -> None:
    if offsets.ndim != 1 or offsets.dtype.kind not in "iu" or data.ndim != 2 or len(data) != len(offsets):
        raise ValueError(f"matrix has {data.shape} values for {offsets.dtype} offsets of {offsets.shape}")
    if len(offsets) and not -rows < int(offsets.min()) <= int(offsets.max()) < columns:
        wrong = offsets.min() if int(offsets.min()) <= -rows else offsets.max()
        raise ValueError(f"matrix has a diagonal outside it: {wrong}")
    if len(np.unique(offsets)) != len(offsets):
        raise ValueError("matrix has a diagonal twice")
