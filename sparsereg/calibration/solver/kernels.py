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
def gather(indptr, indices, data, by_totals, out):  # type: ignore[no-untyped-def]
    """out[j] = sum over the entries of household j of data * by_totals[target]."""
    for j in range(out.shape[0]):
        total = 0.0
        # Unsigned bounds spare the check for negative indices.
        for p in range(np.uint64(indptr[j]), np.uint64(indptr[j + 1])):
            total += data[p] * by_totals[indices[p]]
        out[j] = total


@_compile
def gather_where(indptr, indices, data, by_totals, open_, out):  # type: ignore[no-untyped-def]
    """Like ``gather`` for households with open_[j] != 0; zero for the others, unread."""
    for j in range(out.shape[0]):
        total = 0.0
        if open_[j] != 0:
            for p in range(np.uint64(indptr[j]), np.uint64(indptr[j + 1])):
                total += data[p] * by_totals[indices[p]]
        out[j] = total


@_compile
def scatter(indptr, indices, data, weights, totals):  # type: ignore[no-untyped-def]
    """totals[target] += data * weights[j] over the entries of every household; zero weights unread."""
    for j in range(weights.shape[0]):
        weight = np.float64(weights[j])
        if weight != 0:
            for p in range(np.uint64(indptr[j]), np.uint64(indptr[j + 1])):
                totals[indices[p]] += data[p] * weight


_GLANCE = 64
"""Households that are looked at together: vector registers tell whether any of them needs more."""


@_compile
def _any_rare(values, is_rare, first):  # type: ignore[no-untyped-def]
    """Whether one of the rare among ``_GLANCE`` households has a value other than zero; True at the end."""
    if first + _GLANCE > values.shape[0]:
        return True
    some, rare, size = values[first : first + _GLANCE], is_rare[first : first + _GLANCE], abs(values[0] * 0)
    for j in range(_GLANCE):
        size += abs(some[j]) * rare[j]
    return size != 0


@_compile
def scatter_apart(  # type: ignore[no-untyped-def]
    indptr, indices, data, often, is_rare, near_indptr, near_indices, near_data, weights, totals
):
    """``scatter`` where the k-th of the households ``often`` is read from row k of the second storage.

    ``is_rare`` is 0 for these, else 1. The rare ones are passed over many at a time, since hardly one has a
    weight.
    """
    own = np.empty(often.shape[0], weights.dtype)
    for k in range(often.shape[0]):
        own[k] = weights[often[k]]
    scatter(near_indptr, near_indices, near_data, own, totals)
    for first in range(0, weights.shape[0], _GLANCE):
        if _any_rare(weights, is_rare, first):
            for j in range(first, min(first + _GLANCE, weights.shape[0])):
                if is_rare[j] != 0 and weights[j] != 0:
                    weight = np.float64(weights[j])
                    for p in range(np.uint64(indptr[j]), np.uint64(indptr[j + 1])):
                        totals[indices[p]] += data[p] * weight


@_compile
def gather_apart(  # type: ignore[no-untyped-def]
    indptr, indices, data, often, is_rare, near_indptr, near_indices, near_data, by_totals, open_, out
):
    """``gather_where`` where the k-th household of ``often`` is read from row k of the second storage."""
    own, slopes = np.empty(often.shape[0], open_.dtype), np.empty(often.shape[0])
    for k in range(often.shape[0]):
        own[k] = open_[often[k]]
    gather_where(near_indptr, near_indices, near_data, by_totals, own, slopes)
    out[:] = 0.0
    for k in range(often.shape[0]):
        out[often[k]] = slopes[k]
    for first in range(0, out.shape[0], _GLANCE):
        if _any_rare(open_, is_rare, first):
            for j in range(first, min(first + _GLANCE, out.shape[0])):
                if is_rare[j] != 0 and open_[j] != 0:
                    total = 0.0
                    for p in range(np.uint64(indptr[j]), np.uint64(indptr[j + 1])):
                        total += data[p] * by_totals[indices[p]]
                    out[j] = total


_PIECE = 65_536
"""Households that one piece of a target's row spans at most, so that 16 bits tell one."""


@_compile
def count_by_target(indptr, indices, data, start, last, length, pieces, is_ones):  # type: ignore[no-untyped-def]
    """Entries and pieces of each target's row, its last piece's first and last household, if all are 1.

    Returns how far a target's households are from the next ones in the same piece, all added up.
    """
    far = 0
    for j in range(indptr.shape[0] - 1):
        for p in range(indptr[j], indptr[j + 1]):
            k = indices[p]
            if length[k] == 0 or j - start[k] >= _PIECE:
                pieces[k] += 1
                start[k] = last[k] = j
            far += j - last[k]
            last[k] = j
            length[k] += 1
            if data[p] != 1.0:
                is_ones[k] = 0
    return far


@_compile
def store_by_target(  # type: ignore[no-untyped-def]
    indptr, indices, data, piece_ptr, piece, place, is_ones, value_shift, start, entry, offsets, values
):
    """Store a matrix of households by target, in pieces.

    The pieces of target k are piece_ptr[k]:piece_ptr[k + 1]; ``start`` is the household that a piece counts
    ``offsets`` from, ``entry`` its first entry. The value of entry p is values[p + value_shift[k]], unless
    all of the target's are 1. ``piece`` and ``place`` are where each target stands: one piece before its
    first, and at its first entry.
    """
    for j in range(indptr.shape[0] - 1):
        for p in range(indptr[j], indptr[j + 1]):
            k = indices[p]
            a, q = piece[k], place[k]
            if a < piece_ptr[k] or j - start[a] >= _PIECE:
                a += 1
                piece[k], start[a], entry[a] = a, j, q
            offsets[q] = j - start[a]
            place[k] = q + 1
            if is_ones[k] == 0:
                values[q + value_shift[k]] = data[p]


@_compile
def totals_by_target(  # type: ignore[no-untyped-def]
    piece_ptr, is_ones, value_shift, start, entry, offsets, values, weights, first, last, totals
):
    """totals[k] = sum of value * weight over the row of each target from ``first`` to ``last``."""
    for k in range(first, last):
        total, shift = 0.0, np.uint64(value_shift[k])
        for a in range(piece_ptr[k], piece_ptr[k + 1]):
            near = weights[start[a] :]
            begin, end = np.uint64(entry[a]), np.uint64(entry[a + 1])
            if is_ones[k] != 0:
                for p in range(begin, end):
                    total += near[offsets[p]]
            else:
                for p in range(begin, end):
                    total += np.float64(near[offsets[p]]) * values[p + shift]
        totals[k] = total


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
    indptr,
    indices,
    data,
    row_weights,
    by_totals,
    weights,
    lower,
    upper,
    curvature,
    pull,
    center,
    held,
    sweeps,
):
    """Minimise a weighted sum of squares along one household after the other, within bounds.

    ``by_totals`` is row_weights * (totals - targets) and is kept up to date; ``weights`` change in place.
    ``curvature`` is half the second derivative along each household; ``pull`` * (w - center)^2 is added
    to the objective. ``held`` = [sum of weights, its target, its weight, its multiplier].
    """
    for _ in range(sweeps):
        for j in range(weights.shape[0]):
            if curvature[j] <= 0.0:
                continue
            slope = pull[j] * (weights[j] - center[j]) + held[2] * (held[0] - held[1]) + held[3]
            start, stop = np.uint64(indptr[j]), np.uint64(indptr[j + 1])
            for p in range(start, stop):
                slope += data[p] * by_totals[indices[p]]
            new = min(max(weights[j] - slope / curvature[j], lower[j]), upper[j])
            change = new - weights[j]
            if change != 0.0:
                weights[j] = new
                held[0] += change
                for p in range(start, stop):
                    by_totals[indices[p]] += row_weights[indices[p]] * data[p] * change


@_compile
def uniform(seed, epoch, keys, out):  # type: ignore[no-untyped-def]
    """Uniform numbers in [0, 1), multiples of 2^-24, that depend on seed, epoch and key.

    Source: the finalizer of SplitMix64 (Steele, Lea, Flood, 2014) applied to a counter.
    """
    start = np.uint64(seed) + np.uint64(epoch) * np.uint64(0xD1342543DE82EF95)
    for j in range(out.shape[0]):
        z = start + (np.uint64(keys[j]) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
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


@_compile
def touched(indices, start, stop, out):  # type: ignore[no-untyped-def]
    """out[target] = 1 for every target that these entries touch."""
    for p in range(start, stop):
        out[indices[p]] = 1


@_compile
def page_rows(indptr, indices, page, is_part, seen, rows, row_page):  # type: ignore[no-untyped-def]
    """List for every page the stored parts that its households touch, once each if they lie together."""
    number = 0
    for j in range(page.shape[0]):
        for p in range(indptr[j], indptr[j + 1]):
            k = indices[p]
            if is_part[k] and seen[k] != page[j]:
                seen[k] = page[j]
                rows[number], row_page[number] = k, page[j]
                number += 1
    return number


@_compile
def _leave_page(first, last, rows, ups, width, above, per_whole, up, now, before, change):  # type: ignore[no-untyped-def]
    """Enter what happened on a page into the changes of its rows, and into the sums these are part of."""
    for c in range(first, last):
        k = rows[c]
        moved = (now[k] - before[k]) * per_whole[k]
        change[k] += moved
        for q in range(c * width, (c + 1) * width):
            up[ups[q]] += above[ups[q]] * moved


@_compile
def _enter_page(first, last, rows, ups, width, own, base, up, now, before, change):  # type: ignore[no-untyped-def]
    """Read what the rows of a page come to, with the sums that they are part of."""
    for c in range(first, last):
        k = rows[c]
        total = base[k] + own[k] * change[k]
        for q in range(c * width, (c + 1) * width):
            total += up[ups[q]]
        now[k] = before[k] = total


@_compile
def descend_pages(  # type: ignore[no-untyped-def]
    indptr, indices, data, page, list_ptr, list_rows, ups, width, own, above, whole, per_whole, base, up, now,
    before, change, weights, lower, upper, stretch, pull, center, held, lanes, sweeps
):  # fmt: skip
    """``descend`` where some targets are sums of the stored ones, page after page of households.

    A stored target k moves by whole[k] = own[k] + sum of above[its sums] times the change of its total;
    ``per_whole`` is one over it, or 0. The sums of the c-th listed row are ups[c * width:(c + 1) * width],
    filled up with the last place of ``up`` and ``above``, a sum that is none. ``base`` and ``up`` are the
    residuals of stored targets and of sums, ``now`` what a household sees of a stored target: its gradient
    and those of its sums, right on the current page; ``change`` collects the changes of the stored totals.
    ``stretch`` is one over the curvature, or 0. ``lanes`` work beside each other, and each expects of the
    others what it does itself.
    """
    for _ in range(sweeps):
        current = np.int64(-1)
        for j in range(weights.shape[0]):
            if page[j] != current:
                if current >= 0:
                    _leave_page(list_ptr[current], list_ptr[current + 1], list_rows, ups, width, above,
                                per_whole, up, now, before, change)  # fmt: skip
                current = np.int64(page[j])
                _enter_page(list_ptr[current], list_ptr[current + 1], list_rows, ups, width, own, base, up,
                            now, before, change)  # fmt: skip
            if stretch[j] == 0.0:
                continue
            slope = pull[j] * (weights[j] - center[j]) + held[2] * (held[0] - held[1]) + held[3]
            start, stop = np.uint64(indptr[j]), np.uint64(indptr[j + 1])
            for p in range(start, stop):
                slope += data[p] * now[indices[p]]
            new = min(max(weights[j] - slope * stretch[j], lower[j]), upper[j])
            step = new - weights[j]
            if step != 0.0:
                weights[j] = new
                held[0] += lanes * step
                for p in range(start, stop):
                    now[indices[p]] += whole[indices[p]] * data[p] * step
        if current >= 0:
            _leave_page(list_ptr[current], list_ptr[current + 1], list_rows, ups, width, above, per_whole, up,
                        now, before, change)  # fmt: skip
