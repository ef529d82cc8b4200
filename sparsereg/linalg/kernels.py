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


@_compile
def containers(indptr, indices, data, t_indptr, t_indices, t_data, looks, found, count):  # type: ignore[no-untyped-def]
    """Rows that seem to hold all of another row's entries, with equal values: found[k, :count[k]] for row k.

    Up to ``looks`` columns of each row are compared. Of rows equally long the first holds the others.
    ``t_...`` is the transposed matrix, indices ascending.
    """
    most = found.shape[1]
    for k in range(indptr.shape[0] - 1):
        first, length = np.int64(indptr[k]), np.int64(indptr[k + 1]) - np.int64(indptr[k])
        number = 0
        for look in range(min(looks, length)):
            p = first + look * length // min(looks, length)
            q, stop = np.int64(t_indptr[indices[p]]), np.int64(t_indptr[indices[p] + 1])
            if look == 0:
                for r in range(q, stop):
                    i = np.int64(t_indices[r])
                    longer = np.int64(indptr[i + 1]) - np.int64(indptr[i]) - length
                    if number < most and t_data[r] == data[p] and (longer > 0 or (longer == 0 and i < k)):
                        found[k, number] = i
                        number += 1
            else:
                left = 0
                for c in range(number):
                    while q < stop and t_indices[q] < found[k, c]:
                        q += 1
                    if q < stop and t_indices[q] == found[k, c] and t_data[q] == data[p]:
                        found[k, left] = found[k, c]
                        left += 1
                number = left
            if number == 0:
                break
        count[k] = number


@_compile
def _root(above, j):  # type: ignore[no-untyped-def]
    """The representative of the set that j is in."""
    while above[j] != j:
        above[j] = above[above[j]]
        j = above[j]
    return j


@_compile
def _unite(indptr, indices, i, above):  # type: ignore[no-untyped-def]
    """Put the columns that row i touches into one set."""
    top = _root(above, np.int64(indices[indptr[i]]))
    for p in range(np.int64(indptr[i]) + 1, np.int64(indptr[i + 1])):
        other = _root(above, np.int64(indices[p]))
        above[max(top, other)] = min(top, other)
        top = min(top, other)


@_compile
def _cover(indptr, indices, data, i, parts, value, mark, stamp, out):  # type: ignore[no-untyped-def]
    """Take of these parts of row i, in order, those whose entries are its own and in none before.

    Returns how many were taken if nothing of the row is left, else 0. ``mark`` and ``value`` are memory for
    one number per column; ``stamp`` is above all marks, by 2 from call to call.
    """
    left, number = np.int64(indptr[i + 1]) - np.int64(indptr[i]), 0
    for p in range(np.int64(indptr[i]), np.int64(indptr[i + 1])):
        mark[indices[p]], value[indices[p]] = stamp, data[p]
    for k in parts:
        first, last = np.int64(indptr[k]), np.int64(indptr[k + 1])
        fits = last - first <= left
        for p in range(first, last):
            if not fits:
                break
            fits = mark[indices[p]] == stamp and value[indices[p]] == data[p]
        if fits:
            for p in range(first, last):
                mark[indices[p]] = stamp + 1
            out[number] = k
            number += 1
            left -= last - first
    return number if left == 0 else 0


@_compile
def _one_of_each_set(indptr, indices, parts, above, mark, stamp, place, out):  # type: ignore[no-untyped-def]
    """Take of the parts in one set of columns the longest; returns how many sets there are."""
    number = 0
    for k in parts:
        at = _root(above, np.int64(indices[indptr[k]]))
        if mark[at] != stamp:
            mark[at], place[at] = stamp, number
            out[number] = k
            number += 1
        else:
            old = out[place[at]]
            if indptr[k + 1] - indptr[k] > indptr[old + 1] - indptr[old]:
                out[place[at]] = k
    return number


@_compile
def _are_apart(indptr, indices, parts, kind, above, mark, stamp, place):  # type: ignore[no-untyped-def]
    """Whether no two of these parts touch the same set of columns."""
    for k in parts:
        first = np.int64(indptr[k])
        for p in range(first, np.int64(indptr[k + 1]) if kind[k] == 3 else first + 1):
            at = _root(above, np.int64(indices[p]))
            if mark[at] == stamp and place[at] != k:
                return False
            mark[at], place[at] = stamp, k
    return True


@_compile
def _those(parts, kind, wanted, parent, i, out):  # type: ignore[no-untyped-def]
    """Pick of these parts the children of i (wanted 0), those in one set of columns (1), all but sums (2)."""
    number = 0
    for k in parts:
        if (
            (wanted == 0 and parent[k] == i)
            or (wanted == 1 and kind[k] == 1)
            or (wanted == 2 and kind[k] != 2)
        ):
            out[number] = k
            number += 1
    return number


@_compile
def nest(indptr, indices, data, order, part_ptr, part_of, parent, kind, above, sum_ptr, sum_of):  # type: ignore[no-untyped-def]
    """Find rows that are sums of parts without a common column.

    Rows are visited in ``order``, short ones first. What row i may consist of is
    part_of[part_ptr[i]:part_ptr[i + 1]], long ones first: the rows that name it as their ``parent``, or one
    of each set of columns, or what fits and lies in different sets. ``kind`` is 1 for what may be part of
    any row, and becomes 2 for sums, 3 for parts that spread over several sets. Other parts unite their
    columns (``above``). The parts of the n-th sum are sum_of[sum_ptr[n]:sum_ptr[n + 1]], none of them a sum.
    Returns the sums.
    """
    value, mark = np.empty(above.shape[0], data.dtype), np.full(above.shape[0], -1, np.int64)
    place, number_of = np.empty(above.shape[0], np.int64), np.full(kind.shape[0], -1, np.int64)
    some, out = np.empty(part_of.shape[0] + 1, np.int64), np.empty(part_of.shape[0] + 1, np.int64)
    sums = np.empty(kind.shape[0], np.int64)
    count, stamp, total = 0, 0, 0
    for i in order:
        parts, sets, number = part_of[part_ptr[i] : part_ptr[i + 1]], 0, 0
        for way in range(3):
            candidates = some[: _those(parts, kind, way, parent, i, some)]
            if way == 1:
                sets = _one_of_each_set(indptr, indices, candidates, above, mark, stamp, place, out)
                stamp += 2
                some[:sets] = out[:sets]
                candidates = some[:sets]
            if candidates.shape[0] > 0:
                number = _cover(indptr, indices, data, i, candidates, value, mark, stamp, out)
                stamp += 2
            if way == 2 and number > 0:
                number *= _are_apart(indptr, indices, out[:number], kind, above, mark, stamp, place)
                stamp += 2
            if number > 0:
                break
        if number > 0:
            kind[i], number_of[i], sums[count] = 2, count, i
            for c in range(number):
                n = number_of[out[c]]
                if n < 0:
                    sum_of[total] = out[c]
                    total += 1
                else:
                    width = sum_ptr[n + 1] - sum_ptr[n]
                    sum_of[total : total + width] = sum_of[sum_ptr[n] : sum_ptr[n + 1]]
                    total += width
            count += 1
            sum_ptr[count] = total
        elif kind[i] == 1 and sets > 1:
            kind[i] = 3
        elif kind[i] == 1:
            _unite(indptr, indices, i, above)
    return sums[:count]


@_compile
def page_keys(indptr, indices, sum_ptr, sum_of, order, key):  # type: ignore[no-untyped-def]
    """key[column] = the part it has entries in of the last of these sums that touches it; -1: of none."""
    for n in order:
        for c in range(sum_ptr[n], sum_ptr[n + 1]):
            k = sum_of[c]
            for p in range(np.int64(indptr[k]), np.int64(indptr[k + 1])):
                key[indices[p]] = k


@_compile
def split_pages(indptr, indices, order, key, up_ptr, up_of, num_sums, page):  # type: ignore[no-untyped-def]
    """Number pages so that no sum has two parts on one; columns of one key come one after the other."""
    part, stamp = np.full(num_sums, -1, np.int64), np.full(num_sums, -1, np.int64)
    current, last_key = -1, np.int64(-2)
    for j in order:
        fits = key[j] == last_key
        if fits:
            for p in range(np.int64(indptr[j]), np.int64(indptr[j + 1])):
                k = np.int64(indices[p])
                for a in range(up_ptr[k], up_ptr[k + 1]):
                    if stamp[up_of[a]] == current and part[up_of[a]] != k:
                        fits = False
        if not fits:
            current += 1
            last_key = key[j]
        for p in range(np.int64(indptr[j]), np.int64(indptr[j + 1])):
            k = np.int64(indices[p])
            for a in range(up_ptr[k], up_ptr[k + 1]):
                stamp[up_of[a]], part[up_of[a]] = current, k
        page[j] = current
    return current + 1


@_compile
def expand(stored, sums, indptr, parts, totals, out):  # type: ignore[no-untyped-def]
    """Totals of all rows from those of the stored ones."""
    for k in range(stored.shape[0]):
        out[stored[k]] = totals[k]
    for i in range(sums.shape[0]):
        total = 0.0
        for p in range(indptr[i], indptr[i + 1]):
            total += totals[parts[p]]
        out[sums[i]] = total


@_compile
def collapse(stored, sums, indptr, wholes, values, out):  # type: ignore[no-untyped-def]
    """For each stored row a value of its own and those of the sums it is part of."""
    for k in range(stored.shape[0]):
        total = values[stored[k]]
        for p in range(indptr[k], indptr[k + 1]):
            total += values[sums[wholes[p]]]
        out[k] = total
