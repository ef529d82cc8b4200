"""Products of two tensors summed over an axis: matrix products, einsum, attention."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from sparsereg.compression.units.labels import FIRST, Grid, Ints, Labels, live, varying
from sparsereg.compression.units.program import Call, Program, Selected, name_of
from sparsereg.compression.units.rules.grouped import of_scores, scores_of, selected, share, shares, values_of
from sparsereg.compression.units.rules.mixing import dense, weight_behind
from sparsereg.compression.units.rules.stacked import stack_of, stacked
from sparsereg.compression.units.rules.table import Dead, Labeller, Smaller, replaced, rule

BATCH = "ABCDEFGH"


def _matmul_call(cut: Smaller, node: fx.Node, a: dict[str, Any]) -> Call:
    """Of keys and values that heads share, what the heads that are left read."""
    left, right = node.args[:2]
    ranks = [cut.program.values[n].dim() for n in (left, right)]  # type: ignore[index]
    if min(ranks) < 3 or left not in cut.labels or right not in cut.labels:
        return replaced(node)
    wanted = [cut.alive_along(cut.labels[n], r - 3) for n, r in zip((left, right), ranks, strict=True)]
    if len(wanted[0]) != len(wanted[1]) or torch.equal(*wanted):
        return replaced(node)
    both = wanted[0] & wanted[1]
    left, right = (selected(cut, n, rank - 3, both) for n, rank in zip((left, right), ranks, strict=True))
    return Call(node.target, (left, right, *node.args[2:]), node.kwargs)


@rule("matmul", "bmm", "mm", "mv", "dot", call=_matmul_call)
def matmul(x: Labeller, node: fx.Node, a: dict[str, Any]) -> Labels:
    """(..., m, k) times (..., k, n)."""
    left, right = node.args[0], node.args[1]
    stack = stack_of(x.program, node)
    if stack is not None:
        return stacked(x, node, stack)
    matrix = weight_behind(x, right)
    if matrix is not None:
        weight, transposed = matrix
        return dense(x, node, left, weight, None, *((0, 1) if transposed else (1, 0)))
    ranks = [x.program.values[n].dim() for n in (left, right)]  # type: ignore[index]
    one = "k" if ranks[0] == 1 else BATCH[-(ranks[0] - 2) :] * (ranks[0] > 2) + "mk"
    two = "k" if ranks[1] == 1 else BATCH[-(ranks[1] - 2) :] * (ranks[1] > 2) + "kn"
    batch = max(one[:-2], two[:-2], key=len)
    out = batch + ("m" if ranks[0] > 1 else "") + ("n" if ranks[1] > 1 else "")
    return contract(x, node, (left, one), (right, two), out)


@rule("baddbmm")
def baddbmm(x: Labeller, node: fx.Node, a: dict[str, Any]) -> Labels:
    """A tensor plus a batch of matrix products."""
    made = contract(x, node, (a["batch1"], "Hmk"), (a["batch2"], "Hkn"), "Hmn")
    if isinstance(a["self"], fx.Node) and x.has_units(a["self"]):
        x.fix(a["self"], "baddbmm adds it", node)
    return made


@rule("einsum")
def einsum(x: Labeller, node: fx.Node, a: dict[str, Any]) -> Labels | None:
    """Any product of two tensors."""
    stack = stack_of(x.program, node)
    if stack is not None:
        return stacked(x, node, stack)
    equation = str(a["equation"]).replace(" ", "")
    operands = a["tensors"]
    if len(operands) != 2 or "." in equation or "->" not in equation:
        for operand in operands:
            x.fix(operand, f"einsum {equation}", node)
        return None
    sides, out = equation.split("->")
    one, two = sides.split(",")
    return contract(x, node, (operands[0], one), (operands[1], two), out)


Operand = tuple[Any, str]


def contract(x: Labeller, node: fx.Node, left: Operand, right: Operand, out: str) -> Labels:
    """Labels of sum over k of left[..., k] right[..., k].

    Args:
        x: the labels so far.
        node: the operation.
        left: node, and a letter for each of its axes.
        right: the same; letters in both are summed over unless they are in ``out``.
        out: letters of the result.
    """
    shape = x.program.values[node].shape
    sides = [_side(x, source, letters, node) for source, letters in (left, right)]
    sides = _only_together(x, node, sides, set(out))
    varied = _varied(sides)
    summed = (varied[0] | varied[1]) - set(out)
    if summed:
        return _summed(x, node, (left, right), sides, varied, summed, out, shape)
    states = [x.dead.get(s, Dead.ZERO) for (s, _), v in zip((left, right), varied, strict=True) if v]
    long = [{c for i, c in enumerate(letters) if labels.shape[i] > 1} for labels, letters in sides]
    both = (varied[0] | varied[1]) & long[0] & long[1]
    varied = [v | both for v in varied]  # what goes along an axis of one factor goes along that of the other
    if all(varied) and not varied[0] <= varied[1] and not varied[1] <= varied[0]:
        zero = [x.dead.get(s, Dead.ZERO) is Dead.ZERO for s, _ in (left, right)]
        if all(zero):
            return _outer(x, node, (left, right), sides, varied, out, shape)
        common = varied[0] & varied[1]
        varied = [v if is_zero else v & common for v, is_zero in zip(varied, zero, strict=True)]
        states = [x.dead.get(s, Dead.ZERO) for (s, _), v in zip((left, right), varied, strict=True) if v]
    x.dead[node] = min(states, default=Dead.ZERO)
    return _passed(x, node, sides, varied, out, shape)


def _outer(
    x: Labeller,
    node: fx.Node,
    operands: tuple[Operand, Operand],
    sides: list[tuple[Labels, str]],
    varied: list[set[str]],
    out: str,
    shape: torch.Size,
) -> Labels:
    """Units along an axis of each factor, as in k^T v: one of the product stays while both of its own do."""
    common = "".join(sorted(varied[0] & varied[1]))
    own = ["".join(sorted(v - set(common))) for v in varied]
    one, two = (_as(x, node, side, common + own[0] + own[1]) for side in sides)
    one, two = np.broadcast_arrays(one, two)
    x.axes.fix(one[two < FIRST], f"{name_of(node)} with what cannot go", node)
    x.axes.fix(two[one < FIRST], f"{name_of(node)} with what cannot go", node)
    units = x.axes.both(np.ravel(one), np.ravel(two)).reshape(one.shape)
    if common:  # a head of one goes with that of the other
        rows = x.axes.sets.new(int(np.prod(one.shape[: len(common)])))
        x.axes.grids += [Grid(line.reshape(len(rows), -1), rows) for line in (one, two)]
        x.axes.heads += [(rows, False)] * (len(rows) > 1)
    x.through[node] = tuple(source for source, _ in operands)
    x.dead[node] = Dead.ZERO
    return _spread(np.ravel(units), common + own[0] + own[1], out, shape, units.shape)


def _side(x: Labeller, source: Any, letters: str, node: fx.Node) -> tuple[Labels, str]:
    if isinstance(source, fx.Node) and source in x.program.weights:
        value = x.program.weights[source]
        if value.is_floating_point() and value.numel() > 1_000_000:
            x.keep_weight(source, f"{name_of(node)} reads it", node)
            return x.labels(None, tuple(value.shape)), letters
    return x.labels(source), letters


def _varied(sides: list[tuple[Labels, str]]) -> list[set[str]]:
    """The letters of the axes along which the units of each factor lie."""
    return [{letters[i] for i in varying(labels)} for labels, letters in sides]


def _only_together(
    x: Labeller, node: fx.Node, sides: list[tuple[Labels, str]], out: set[str]
) -> list[tuple[Labels, str]]:
    """A factor with units along the sum, where the other's lie elsewhere, goes as both do, or stays."""
    varied = _varied(sides)
    kept = list(sides)
    for i, (labels, letters) in enumerate(sides):
        other = varied[1 - i]
        if not (varied[i] - out and other and other <= out):
            continue
        common = "".join(sorted(varied[i] & other))
        if common:
            units = _as(x, node, sides[i], common)
            labels = _spread(np.ravel(units), common, letters, labels.shape, units.shape)
        else:
            x.axes.fix(labels, f"{name_of(node)} sums over it with what has units elsewhere", node)
            labels = live(labels.shape)
        kept[i] = labels, letters
    return kept


def _as(x: Labeller, node: fx.Node, side: tuple[Labels, str], order: str) -> Ints:
    """Labels as an array over letters, of size 1 where the operand lacks one."""
    labels, letters = side
    there = [letter for letter in order if letter in letters]
    units = x.axes.reduce(labels, tuple(letters.index(letter) for letter in there), name_of(node), node)
    return units.reshape([labels.shape[letters.index(letter)] if letter in there else 1 for letter in order])


def _summed(
    x: Labeller,
    node: fx.Node,
    operands: tuple[Operand, Operand],
    sides: list[tuple[Labels, str]],
    varied: list[set[str]],
    summed: set[str],
    out: str,
    shape: torch.Size,
) -> Labels:
    """Units lie along the sum: those of both factors go together."""
    zero = [x.dead.get(source, Dead.ZERO) is Dead.ZERO for source, _ in operands]
    alone = [v - set(other) for v, (_, other) in zip(varied, reversed(sides), strict=True)]
    whole = not any(zero) and not (varied[0] | varied[1]) - summed - alone[0] - alone[1]
    if any(zero):
        x.reads.append(tuple(source for source, _ in operands))
    if whole:
        return _whole(x, node, sides, shape, "sums over values that are not zero when it is gone")
    side = next((i for i in (0, 1) if alone[i] and not alone[1 - i]), None)
    if side is not None and all(zero):
        found = _read_product(x, node, operands, sides, (varied, alone[side], summed), side, out, shape)
        if found is not None:
            return found
    varied = [v - a for v, a in zip(varied, alone, strict=True)]  # tied along axes of one factor alone
    batch = "".join(sorted((varied[0] | varied[1]) - summed))
    inner = "".join(sorted(summed))
    arrays = [_as(x, node, side, batch + inner) for side in sides]
    one, two = np.broadcast_arrays(*arrays)
    scores = scores_of(x, one, two) if len(batch) == len(inner) == 1 else None
    if scores is not None:
        return _spread(scores, batch, out, shape, scores.shape)
    x.axes.equal(one, two, f"{name_of(node)} sums over it with what cannot go", node)
    if not any(zero):  # what is summed goes with its row, which is anything then
        flat = one.reshape(*one.shape[: len(batch)], -1)
        x.axes.equal(flat, flat[..., :1], name_of(node), node)
        x.dead[node] = Dead.ANYTHING
    x.dead[node] = Dead.ZERO if not batch else x.dead[node]
    if not batch:
        return live(shape)
    rows = x.axes.sets.new(int(np.prod(one.shape[: len(batch)])))
    x.axes.grids.append(Grid(one.reshape(len(rows), -1), rows))
    shared = any(len(np.unique(units.reshape(len(rows), -1)[:, 0])) < len(rows) for units in (one, two))
    x.axes.heads.append((rows, shared))
    return _spread(rows, batch, out, shape, one.shape[: len(batch)])


def _read_product(
    x: Labeller,
    node: fx.Node,
    operands: tuple[Operand, Operand],
    sides: list[tuple[Labels, str]],
    letters: tuple[list[set[str]], set[str], set[str]],
    side: int,
    out: str,
    shape: torch.Size,
) -> Labels | None:
    """A sum over one of the axes along which a product of two factors has units, as q (k^T v)."""
    varied, alone, summed = letters
    batch = "".join(sorted((varied[0] | varied[1]) - summed - alone))
    own, inner = "".join(sorted(alone)), "".join(sorted(summed))
    many = _as(x, node, sides[side], batch + inner + own)
    middle = many.shape[len(batch) : len(batch + inner)]
    many = many.reshape(*many.shape[: len(batch)], -1, *many.shape[len(batch + inner) :])
    parts = x.axes.parts_of(many)
    if parts is None:
        return None
    read, made = sorted(parts, key=lambda part: bool((np.diff(part, axis=-1) != 0).any()))
    few = _as(x, node, sides[1 - side], batch + inner)
    few = np.broadcast_to(few, (*few.shape[: len(batch)], *middle)).reshape(*few.shape[: len(batch)], -1)
    read = read.reshape(*many.shape[: len(batch) + 1], -1)[..., 0]
    x.axes.equal(few, read, f"{name_of(node)} sums over it with what cannot go", node)
    made = np.asarray(made.take(0, axis=len(batch)))
    x.through[node] = (operands[side][0],)
    x.dead[node] = Dead.ZERO
    return _spread(np.ravel(made), batch + own, out, shape, made.shape)


def _whole(
    x: Labeller,
    node: fx.Node,
    sides: list[tuple[Labels, str]],
    shape: torch.Size,
    why: str = "has units along two of its axes",
) -> Labels:
    """Nothing of either factor goes: of units along two axes of the result, say, there are no labels."""
    for labels, _ in sides:
        x.axes.fix(labels, f"{name_of(node)} {why}", node)
    return live(shape)


def _spread(rows: Ints, batch: str, out: str, shape: torch.Size, sizes: tuple[int, ...]) -> Labels:
    order = sorted(range(len(batch)), key=lambda i: out.index(batch[i]))
    labels = torch.from_numpy(rows.reshape(sizes).transpose(order)).int()
    view = [sizes[batch.index(letter)] if letter in batch else 1 for letter in out]
    return labels.reshape(view).expand(shape)


def _passed(
    x: Labeller,
    node: fx.Node,
    sides: list[tuple[Labels, str]],
    varied: list[set[str]],
    out: str,
    shape: torch.Size,
) -> Labels:
    """No units along the sum: the result has those of the factors."""
    if varied[0] and varied[1]:
        small, large = (0, 1) if varied[0] <= varied[1] else (1, 0)
        if not varied[small] <= varied[large]:
            return _whole(x, node, sides, shape)
        made = _tie_rows(x, node, sides, varied, small, large)
        if made is not None:
            letters = "".join(sorted(varied[small])) + "".join(sorted(varied[large] - varied[small]))
            return _spread(np.ravel(made), letters, out, shape, made.shape)
    else:
        large = 0 if varied[0] else 1
    if not varied[large]:
        return live(shape)
    order = "".join(letter for letter in out if letter in varied[large])
    units = _as(x, node, sides[large], order)
    return _spread(np.ravel(units), order, out, shape, units.shape)


def _tie_rows(
    x: Labeller,
    node: fx.Node,
    sides: list[tuple[Labels, str]],
    varied: list[set[str]],
    small: int,
    large: int,
) -> Ints | None:
    """The scores of a head go with the values of that head; labels of what it makes of shared ones."""
    batch = "".join(sorted(varied[small]))
    inner = "".join(sorted(varied[large] - varied[small]))
    rows = np.ravel(_as(x, node, sides[small], batch))
    units = _as(x, node, sides[large], batch + inner).reshape(len(rows), -1)
    pair = of_scores(x, rows) if len(batch) == len(inner) == 1 else None
    if pair is not None and shares(x, units):
        return values_of(x, node, units, *pair)
    x.axes.fix(units[rows < FIRST], f"{name_of(node)} with what cannot go", node)
    units, rows = units[rows >= FIRST], rows[rows >= FIRST]
    if inner and len(rows):
        x.axes.grids.append(Grid(units, rows))
    else:
        x.axes.equal(rows, np.ravel(units), name_of(node), node)
    return None


def _attention_call(cut: Smaller, node: fx.Node, a: dict[str, Any]) -> Call:
    """The scale is that of the original size of a head; keys, values and masks are those of what is left."""
    scale = a["scale"] or 1 / math.sqrt(cut.program.values[a["query"]].shape[-1])
    query, key, value, mask = (a[name] for name in ("query", "key", "value", "attn_mask"))
    rank = cut.program.values[query].dim()
    if rank < 4 or query not in cut.labels:
        return replaced(node, scale=scale)
    heads = cut.alive_along(cut.labels[query], rank - 3)
    times = len(heads) // cut.program.values[key].shape[-3] if a.get("enable_gqa") else 1
    key, value = (selected(cut, n, rank - 3, heads, times) for n in (key, value))
    if _is_for_heads(cut.program, mask) and cut.labels.get(mask) is None and not bool(heads.all()):
        mask = Selected(mask, cut.program.values[mask].dim() - 3, heads.nonzero().flatten())
        return replaced(node, scale=scale, key=key, value=value, attn_mask=mask)
    return replaced(node, scale=scale, key=key, value=value)


def _is_for_heads(program: Program, mask: Any) -> bool:
    """Whether a mask has a place of its own for each head."""
    value = program.values[mask] if isinstance(mask, fx.Node) else None
    return isinstance(value, Tensor) and value.dim() > 2 and value.shape[-3] > 1


@rule("scaled_dot_product_attention", call=_attention_call)
def attention(x: Labeller, node: fx.Node, a: dict[str, Any]) -> Labels:
    """softmax(q k^T + mask) v, head by head."""
    query, key, value = (_heads(x, node, a[name]) for name in ("query", "key", "value"))
    times = query.shape[0] // key.shape[0] if a.get("enable_gqa") and key.shape[0] else 1
    if times > 1:
        key, value = key.repeat(times, 0), value.repeat(times, 0)
    one, two = np.broadcast_arrays(query, key)
    made = _in_groups(x, node, a, one, two, value)
    if made is None:
        made = value
        x.axes.equal(one, two, "queries meet keys that cannot go", node)
        _by_heads(x, node, a, one, key, value)
    for name in ("query", "key"):
        if x.dead.get(a[name], Dead.ZERO) is not Dead.ZERO:
            x.axes.equal(one, one[:, :1], "attention", node)  # its places go with the head
    x.reads.append((a["query"], a["key"]))
    shape = x.program.values[node].shape
    view = [1] * len(shape)
    view[-1] = made.shape[1]
    if len(shape) > 2:
        view[-3] = made.shape[0]
    return torch.from_numpy(np.ascontiguousarray(made)).int().view(view).expand(shape)


def _in_groups(
    x: Labeller, node: fx.Node, a: dict[str, Any], queries: Ints, keys: Ints, values: Ints
) -> Ints | None:
    """Labels of what heads make that share keys and values, (heads, size); None if they share none."""
    mask = a.get("attn_mask")
    if isinstance(mask, fx.Node) and x.labels(mask).dim() > 2 and x.labels(mask).shape[-3] > 1:
        return None
    if not shares(x, values):
        return None
    found = share(x, queries, keys)
    return None if found is None else values_of(x, node, values, *found)


def _by_heads(x: Labeller, node: fx.Node, a: dict[str, Any], queries: Ints, keys: Ints, values: Ints) -> None:
    """Queries, keys and values go by heads."""
    rows = x.axes.sets.new(len(queries))
    for units in (queries, np.broadcast_to(values, (len(queries), values.shape[1]))):
        if (units >= FIRST).any():
            x.axes.grids.append(Grid(np.array(units), rows))
    if len(rows) > 1:
        x.axes.heads.append((rows, len(np.unique(keys[:, 0])) < len(keys)))
    _mask(x, node, a, rows)
    x.dead[node] = x.dead.get(a["value"], Dead.ZERO)


def _heads(x: Labeller, node: fx.Node, source: fx.Node) -> Ints:
    """Units of (..., heads, tokens, size) as (heads, size)."""
    labels = x.labels(source)
    axes = (labels.dim() - 3, labels.dim() - 1) if labels.dim() > 3 else (labels.dim() - 1,)
    units = x.axes.reduce(labels, axes, "attention", node)
    return units if units.ndim == 2 else units[None]


def _mask(x: Labeller, node: fx.Node, a: dict[str, Any], rows: Ints) -> None:
    mask = a.get("attn_mask")
    if not isinstance(mask, fx.Node) or not _is_for_heads(x.program, mask):
        return
    labels = x.labels(mask)
    if mask not in x.program.weights and not x.has_units(mask):
        return  # of one that is computed otherwise, heads that are gone are left out
    units = x.axes.reduce(labels, (labels.dim() - 3,), "the mask of attention", node)
    x.axes.equal(units, rows, "the mask of attention", node)
