"""Compiled loops over compressed sparse rows. Imported only when used; the first call compiles.

Every function releases the interpreter's lock and works on one range of rows, so that several ranges
run in threads. The compiled code is kept beside this file (or in the user's cache folder).
"""

import numpy as np

from sparsereg.extras import missing

try:
    import numba
except ModuleNotFoundError as error:
    raise missing(error) from error

# Sums may be reordered, which lets them use vector registers; NaN and infinity keep their meaning.
_compile = numba.njit(nogil=True, cache=True, fastmath={"reassoc", "contract", "nsz"})


@_compile
def product(indptr, indices, data, w, first, last, out):  # type: ignore[no-untyped-def]
    """out[i] = X[i] . w for the rows from ``first`` to ``last``."""
    for i in range(first, last):
        total = w.dtype.type(0)
        # Unsigned bounds and indices spare the check for negative ones.
        for p in range(np.uint64(indptr[i]), np.uint64(indptr[i + 1])):
            total += data[p] * w[np.uint32(indices[p])]
        out[i] = total


@_compile
def transposed_product(indptr, indices, data, r, first, last, out):  # type: ignore[no-untyped-def]
    """out += X[first:last]^T r[first:last]."""
    for i in range(first, last):
        for p in range(np.uint64(indptr[i]), np.uint64(indptr[i + 1])):
            out[np.uint32(indices[p])] += data[p] * r[i]


@_compile
def squared_error(indptr, indices, data, w, bias, y, first, last, gradient):  # type: ignore[no-untyped-def]
    """Sum of squared residuals of some rows, sum of the residuals, and gradient += X^T residuals.

    One pass over the matrix: a row is still in the cache when its residual is known.
    """
    squares = 0.0
    residuals = 0.0
    for i in range(first, last):
        begin, end = np.uint64(indptr[i]), np.uint64(indptr[i + 1])
        total = w.dtype.type(0)
        for p in range(begin, end):
            total += data[p] * w[np.uint32(indices[p])]
        r = total + bias - y[i]
        squares += np.float64(r) * r
        residuals += r
        for p in range(begin, end):
            gradient[np.uint32(indices[p])] += data[p] * r
    return squares, residuals
