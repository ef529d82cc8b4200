"""Attention as one operation: softmax(q k^T + mask) v, head by head."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from sparsereg.compression.units.labels import FIRST, Grid, Ints, Labels, varying
from sparsereg.compression.units.program import Call, Program, Selected
from sparsereg.compression.units.rules.grouped import nest, selected, shares, values_of
from sparsereg.compression.units.rules.table import Dead, Labeller, Smaller, replaced, rule


def _attention_call(cut: Smaller, node: fx.Node, a: dict[str, Any]) -> Call:
    """The scale is that of the original size of a head; keys, values and masks are those of what is left."""
    scale = a["scale"] or 1 / math.sqrt(cut.program.values[a["query"]].shape[-1])
    query, key, value, mask = (a[name] for name in ("query", "key", "value", "attn_mask"))
    rank = cut.program.values[query].dim()
    if rank < 4 or query not in cut.labels:
        return replaced(node, scale=scale)
    back = _axis_of_heads([cut.labels.get(n) for n in (query, key, value)])
    heads = cut.alive_along(cut.labels[query], rank + back)
    times = len(heads) // cut.program.values[key].shape[back] if a.get("enable_gqa") else 1
    key, value = (selected(cut, n, rank + back, heads, times) for n in (key, value))
    if _is_for_heads(cut.program, mask, back) and cut.labels.get(mask) is None and not bool(heads.all()):
        mask = Selected(mask, cut.program.values[mask].dim() + back, heads.nonzero().flatten())
        return replaced(node, scale=scale, key=key, value=value, attn_mask=mask)
    return replaced(node, scale=scale, key=key, value=value)


def _axis_of_heads(labels: Iterable[Labels | None]) -> int:
    """Axis of the heads, from the end: the third, or the last one before it along which units differ.

    Blocks of an image, or windows, may stand between the heads and the tokens.
    """
    axes = {axis - part.dim() for part in labels if part is not None for axis in varying(part)}
    return max((axis for axis in axes if axis < -2), default=-3)


def _is_for_heads(program: Program, mask: Any, back: int) -> bool:
    """Whether a mask has a place of its own for each head, along that axis from the end."""
    value = program.values[mask] if isinstance(mask, fx.Node) else None
    return isinstance(value, Tensor) and value.dim() >= -back and value.shape[back] > 1


@rule("scaled_dot_product_attention", call=_attention_call)
def attention(x: Labeller, node: fx.Node, a: dict[str, Any]) -> Labels:
    """softmax(q k^T + mask) v, head by head."""
    sources = [a[name] for name in ("query", "key", "value")]
    back = _axis_of_heads(x.labels(source) for source in sources)
    query, key, value = (_heads(x, node, source, back) for source in sources)
    times = query.shape[0] // key.shape[0] if a.get("enable_gqa") and key.shape[0] else 1
    if times > 1:
        key, value = key.repeat(times, 0), value.repeat(times, 0)
    one, two = np.broadcast_arrays(query, key)
    made = _in_groups(x, node, a, back, one, two, value)
    if made is None:
        made = value
        x.axes.equal(one, two, "queries meet keys that cannot go", node)
        _by_heads(x, node, a, back, one, key, value)
    for name in ("query", "key"):
        if x.dead.get(a[name], Dead.ZERO) is not Dead.ZERO:
            x.axes.equal(one, one[:, :1], "attention", node)  # its places go with the head
    x.reads.append((a["query"], a["key"]))
    shape = x.program.values[node].shape
    view = [1] * len(shape)
    view[-1] = made.shape[1]
    if len(shape) > 2:
        view[back] = made.shape[0]
    return torch.from_numpy(np.ascontiguousarray(made)).int().view(view).expand(shape)


def _in_groups(
    x: Labeller, node: fx.Node, a: dict[str, Any], back: int, queries: Ints, keys: Ints, values: Ints
) -> Ints | None:
    """Labels of what heads make that share keys and values, (heads, size); None if they share none."""
    if _is_for_heads(x.program, a.get("attn_mask"), back) or not shares(x, values):
        return None
    found = nest(x, queries, keys)
    return None if found is None else values_of(x, node, values, *found)


def _by_heads(
    x: Labeller, node: fx.Node, a: dict[str, Any], back: int, queries: Ints, keys: Ints, values: Ints
) -> None:
    """Queries, keys and values go by heads; of a single one, places in its vectors go one by one."""
    x.dead[node] = x.dead.get(a["value"], Dead.ZERO)
    if len(queries) == 1:
        return
    rows = x.axes.sets.new(len(queries))
    for units in (queries, np.broadcast_to(values, (len(queries), values.shape[1]))):
        if (units >= FIRST).any():
            x.axes.grids.append(Grid(np.array(units), rows))
    x.axes.heads.append((rows, len(np.unique(keys[:, 0])) < len(keys)))
    _mask(x, node, a, back, rows)


def _heads(x: Labeller, node: fx.Node, source: fx.Node, back: int) -> Ints:
    """Units of (..., heads, ..., tokens, size) as (heads, size)."""
    labels = x.labels(source)
    axes = (labels.dim() + back, labels.dim() - 1) if labels.dim() > 3 else (labels.dim() - 1,)
    units = x.axes.reduce(labels, axes, "attention", node)
    return units if units.ndim == 2 else units[None]


def _mask(x: Labeller, node: fx.Node, a: dict[str, Any], back: int, rows: Ints) -> None:
    mask = a.get("attn_mask")
    if not isinstance(mask, fx.Node) or not _is_for_heads(x.program, mask, back):
        return
    labels = x.labels(mask)
    if mask not in x.program.weights and not x.has_units(mask):
        return  # of one that is computed otherwise, heads that are gone are left out
    units = x.axes.reduce(labels, (labels.dim() + back,), "the mask of attention", node)
    x.axes.equal(units, rows, "the mask of attention", node)
