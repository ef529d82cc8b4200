"""Query heads that share keys and values, head by head within their group.

A query head goes when its group does, or alone: then keys and values stay for the others of the group. What
it makes is not zero, so that the columns that read it take its gate.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from sparsereg.compression.units.labels import FIRST, Grid, Ints, Nested
from sparsereg.compression.units.program import Selected
from sparsereg.compression.units.rules.table import Dead, Labeller, Smaller


def shares(x: Labeller, units: Ints) -> bool:
    """Whether heads share keys, or values, labels of which are (heads, size)."""
    return int(units.min()) >= FIRST and len(np.unique(_lines(x, units))) < len(units)


def nest(x: Labeller, queries: Ints, keys: Ints) -> tuple[Ints, Ints] | None:
    """Let query heads go within the groups that share their keys; None if they share none.

    Args:
        x: the labels so far.
        queries: labels, (heads, size).
        keys: labels, (heads, size), the same for heads that share them.

    Returns:
        For each head a label of its own, and one that stays iff its group does.
    """
    if not shares(x, keys) or int(queries.min()) < FIRST or shares(x, queries):
        return None
    own, rows = x.axes.sets.new(len(keys)), x.axes.sets.new(len(keys))
    x.axes.nested.append(Nested(queries, keys, own))
    x.axes.heads.append((own, False))
    if tie_groups(x, keys, rows):
        x.axes.heads.append((rows, True))
    return own, rows


def scores_of(x: Labeller, one: Ints, two: Ints) -> Ints | None:
    """Labels of the scores of heads that share keys, (heads,); None if they share none.

    Args:
        x: the labels so far.
        one: labels of queries or keys, (heads, size).
        two: of the others.
    """
    queries, keys = (one, two) if shares(x, two) else (two, one)
    found = nest(x, queries, keys)
    if found is None:
        return None
    scores = x.axes.sets.new(len(keys))
    x.axes.grids.append(Grid(queries, scores))
    x.shared |= dict(zip(scores.tolist(), zip(*(part.tolist() for part in found), strict=True), strict=True))
    return scores


def of_scores(x: Labeller, scores: Ints) -> tuple[Ints, Ints] | None:
    """Labels of heads, and of their groups, behind scores; None if these are not of heads that share keys."""
    numbers = list(x.shared)
    roots = x.axes.sets.find(np.array(numbers, dtype=np.int64)).tolist()
    known = dict(zip(roots, x.shared.values(), strict=True))
    pairs = [known.get(root) for root in x.axes.sets.find(scores).tolist()]
    if any(pair is None for pair in pairs):
        return None
    own, rows = np.array(pairs, dtype=np.int64).T
    return own, rows


def tie_groups(x: Labeller, units: Ints, rows: Ints) -> bool:
    """Let keys, or values, go with their group; False if there is but one."""
    if len(np.unique(_lines(x, units))) == 1:
        return False
    x.axes.grids.append(Grid(units, rows))
    return True


def values_of(x: Labeller, node: fx.Node, values: Ints, own: Ints, rows: Ints) -> Ints:
    """Labels of what heads make of values that they share, (heads, size).

    Args:
        x: the labels so far.
        node: what makes it.
        values: labels, (heads, size).
        own: a label for each head.
        rows: a label for each head that stays iff its group does.
    """
    tie_groups(x, values, rows)
    made = x.axes.sets.new(values.size).reshape(values.shape)
    x.axes.nested.append(Nested(made, values, own))
    x.dead[node] = Dead.ANYTHING
    return made


def _lines(x: Labeller, units: Ints) -> Ints:
    """For each row the number of the first that is equal."""
    _, line = np.unique(x.axes.sets.find(units), axis=0, return_inverse=True)
    return np.asarray(line).ravel()


def selected(cut: Smaller, source: Any, axis: int, wanted: Tensor, times: int = 1) -> Any:
    """What is left of keys or values, for the heads that are left alone.

    Args:
        cut: the smaller network.
        source: the tensor.
        axis: that of its heads.
        wanted: which heads are left, bool (heads,).
        times: heads for each position along the axis.
    """
    labels = cut.labels.get(source)
    if labels is None or labels.shape[axis] * times != len(wanted):
        return source
    there = cut.alive_along(labels, axis)
    place = (there.cumsum(0) - 1).repeat_interleave(times)
    index = place[wanted & there.repeat_interleave(times)]
    left = int(there.sum())
    each = len(index) // max(1, left) if times > 1 else 1  # the operation repeats them itself
    if torch.equal(index, torch.arange(left).repeat_interleave(each)):
        return source
    return Selected(source, axis, index)
