"""Compiled loops over a matrix stored by household. Imported only when used, so that numba stays optional.

Every function releases the interpreter's lock and works on one range of households, so that several
ranges run in threads. The first call on a machine compiles (about a second) and keeps the result.
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
def gather(indptr, indices, data, residual, out):  # type: ignore[no-untyped-def]
    """out[j] = sum over the entries of household j of data * residual[target]."""
    for j in range(out.shape[0]):
        total = 0.0
        # Unsigned bounds spare the check for negative indices.
        for p in range(np.uint64(indptr[j]), np.uint64(indptr[j + 1])):
            total += data[p] * residual[indices[p]]
        out[j] = total


@_compile
def gather_where(indptr, indices, data, residual, open_, out):  # type: ignore[no-untyped-def]
    """Like ``gather`` for households with open_[j] != 0; zero for the others, unread."""
    for j in range(out.shape[0]):
        total = 0.0
        if open_[j] != 0:
            for p in range(np.uint64(indptr[j]), np.uint64(indptr[j + 1])):
                total += data[p] * residual[indices[p]]
        out[j] = total


@_compile
def scatter(indptr, indices, data, weights, totals):  # type: ignore[no-untyped-def]
    """totals[target] += data * weights[j] over the entries of every household; zero weights unread."""
    for j in range(weights.shape[0]):
        weight = weights[j]
        if weight != 0:
            for p in range(np.uint64(indptr[j]), np.uint64(indptr[j + 1])):
                totals[indices[p]] += data[p] * weight


@_compile
def gram(indptr, indices, data, weights, out):  # type: ignore[no-untyped-def]
    """out[i, k] += weights[j] * data_i * data_k over the entries of every household, for k <= i."""
    for j in range(weights.shape[0]):
        weight = weights[j]
        if weight != 0:
            start, end = np.uint64(indptr[j]), np.uint64(indptr[j + 1])
            for p in range(start, end):
                value = weight * data[p]
                row = out[indices[p]]
                for q in range(start, p + 1):
                    row[indices[q]] += value * data[q]


@_compile
def squared_norms(indptr, indices, data, row_weights, out):  # type: ignore[no-untyped-def]
    """out[j] = sum over the entries of household j of row_weights[target] * data^2."""
    for j in range(out.shape[0]):
        total = 0.0
        for p in range(np.uint64(indptr[j]), np.uint64(indptr[j + 1])):
            value = np.float64(data[p])
            total += row_weights[indices[p]] * value * value
        out[j] = total


@_compile
def descend(  # type: ignore[no-untyped-def]
    indptr, indices, data, row_weights, residual, weights, lower, upper, curvature, pull, center, held, sweeps
):
    """Minimise a weighted sum of squares along one household after the other, within bounds.

    ``residual`` is row_weights * (totals - targets) and is kept up to date; ``weights`` change in place.
    ``curvature`` is half the second derivative along each household; ``pull`` * (w - center)^2 is added
    to the objective. ``held`` = [sum of weights, its target, its weight, its multiplier].
    Returns the decrease of the objective in the last sweep.
    """
    decrease = 0.0
    for _ in range(sweeps):
        decrease = 0.0
        for j in range(weights.shape[0]):
            if curvature[j] <= 0.0:
                continue
            slope = pull[j] * (weights[j] - center[j]) + held[2] * (held[0] - held[1]) + held[3]
            start, stop = np.uint64(indptr[j]), np.uint64(indptr[j + 1])
            for p in range(start, stop):
                slope += data[p] * residual[indices[p]]
            new = min(max(weights[j] - slope / curvature[j], lower[j]), upper[j])
            change = new - weights[j]
            if change != 0.0:
                decrease -= change * (2.0 * slope + curvature[j] * change)
                weights[j] = new
                held[0] += change
                for p in range(start, stop):
                    residual[indices[p]] += row_weights[indices[p]] * data[p] * change
    return decrease


@_compile
def uniform(seed, epoch, out):  # type: ignore[no-untyped-def]
    """Uniform numbers in [0, 1), multiples of 2^-24, that depend on seed, epoch and place.

    Source: the finalizer of SplitMix64 (Steele, Lea, Flood, 2014) applied to a counter.
    """
    start = np.uint64(seed) + np.uint64(epoch) * np.uint64(0xD1342543DE82EF95)
    for j in range(out.shape[0]):
        z = start + np.uint64(j + 1) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
        out[j] = np.float32(np.int64(z >> np.uint64(40))) * np.float32(5.9604644775390625e-08)


@_compile
def copy_households(indptr, indices, data, chosen, new_indptr, new_indices, new_data):  # type: ignore[no-untyped-def]
    """Copy the entries of the chosen households to where ``new_indptr`` says."""
    for k in range(chosen.shape[0]):
        start, stop = np.uint64(indptr[chosen[k]]), np.uint64(indptr[chosen[k] + 1])
        place = np.uint64(new_indptr[k])
        for p in range(start, stop):
            new_indices[place] = indices[p]
            new_data[place] = data[p]
            place += np.uint64(1)
