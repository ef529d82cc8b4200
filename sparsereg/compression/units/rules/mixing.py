"""Linear layers, convolutions and embeddings: weights that read one axis and make another."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import fx

from sparsereg.compression.units.labels import FIRST, LIVE, Grid, Ints, Labels, along, live, varying
from sparsereg.compression.units.program import Call, name_of
from sparsereg.compression.units.rules.table import (
    TURNS,
    Dead,
    Labeller,
    Smaller,
    normed_by_lines,
    reads_more,
    replaced,
    rule,
    weight_of,
)

MAKERS: dict[str, tuple[str, ...]] = {
    "linear": ("weight", "bias"),
    "addmm": ("mat2", "self"),
    "embedding": ("weight",),
    "embedding_bag": ("weight",),
    "bilinear": ("weight", "bias"),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "convolution", "deform_conv2d"), ("weight", "bias")),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), ("weight", "bias")),
    **dict.fromkeys(("batch_norm", "layer_norm", "rms_norm", "group_norm"), ("weight", "bias")),
    **dict.fromkeys(("instance_norm", "cudnn_batch_norm", "native_batch_norm"), ("weight", "bias")),
    **dict.fromkeys(("_native_batch_norm_legit_no_training", "native_layer_norm"), ("weight", "bias")),
}
"""Operations that make units, with the arguments that are theirs."""
MATRICES = ("matmul", "bmm", "mm", "einsum", "scaled_dot_product_attention")
"""Products of two tensors that are summed over."""


@rule("linear")
def linear(x: Labeller, node: fx.Node, a: dict[str, Any]) -> Labels:
    """y = x W^T + b on the last axis."""
    return dense(x, node, a["input"], a["weight"], a["bias"], 0, 1)


@rule("addmm")
def addmm(x: Labeller, node: fx.Node, a: dict[str, Any]) -> Labels:
    """b + x W, the linear layer of GPT-2."""
    return dense(x, node, a["mat1"], a["mat2"], a["self"], 1, 0)


def dense(
    x: Labeller, node: fx.Node, source: Any, weight: Any, bias: Any, out: int, into: int, axis: int = -1
) -> Labels:
    """A layer whose weight makes units along its axis ``out`` and reads others along ``into``.

    Args:
        x: the labels so far.
        node: the layer.
        source: what it reads, and what it makes, along ``axis``.
        weight: its weight.
        bias: its bias, if it has one.
        out: the axis of the weight that makes.
        into: the one that reads.
        axis: counts from the end.
    """
    shape = x.program.values[node].shape
    rank = x.program.values[source].dim()
    passed = _passed(x, node, source, set(range(rank)) - {rank + axis}, (weight, into, out), bias)
    if passed is not None:
        return passed
    read = x.read(source, (rank + axis,), node, name_of(node), columns=((weight, into),))
    x.weight(weight, into, read, node)
    units = x.weight(weight, out, None, node)
    if isinstance(bias, fx.Node):
        x.weight(bias, 0, units, node)
    x.dead[node] = Dead.ZERO
    return along(units, len(shape) + axis, shape)


def _passed(
    x: Labeller, node: fx.Node, source: Any, free: set[int], weight: tuple[Any, int, int], bias: Any
) -> Labels | None:
    """What a layer along one axis makes of units along others, each position of which it takes by itself.

    So channels go through a layer along the tokens. What it makes along its own axis stays then, since an
    element has one label; where that would be more, what lies along the others is tied.

    Args:
        x: the labels so far.
        node: the layer.
        source: what it reads.
        free: axes whose positions do not meet.
        weight: its weight, the axis that reads and the one that makes.
        bias: its bias, if it has one.

    Returns:
        Labels of what it makes; None where units do not lie along such axes alone.
    """
    if not isinstance(source, fx.Node) or weight[0] not in x.program.weights:
        return None
    labels, (matrix, into, out) = x.labels(source), weight
    along_them = sorted(varying(labels))
    size = x.program.values[matrix].shape
    if not along_them or not set(along_them) <= free:
        return None
    units = x.axes.reduce(labels, tuple(along_them), name_of(node), node)
    if len(np.unique(units[units >= FIRST])) < size[out]:
        return None
    why = f"{name_of(node)} passes on what lies along another axis"
    x.weight(matrix, into, np.full(size[into], LIVE), node)
    x.axes.fix(x.weight(matrix, out, None, node), why, node)
    if isinstance(bias, fx.Node):
        x.axes.fix(x.weight(bias, 0, None, node), why, node)
        x.dead[node] = max(x.dead.get(source, Dead.ZERO), Dead.CONSTANT)
    x.through[node] = (source,)
    sizes = [n if axis in along_them else 1 for axis, n in enumerate(labels.shape)]
    return torch.from_numpy(units).int().view(sizes).expand(x.program.values[node].shape)


def weight_behind(x: Labeller, source: Any) -> tuple[fx.Node, bool] | None:
    """A matrix of weights that a product reads, as it is or turned around; None if it is no such."""
    if not isinstance(source, fx.Node):
        return None
    turned = is_turned_weight(x, source)
    weight = source.args[0] if turned else source
    if not isinstance(weight, fx.Node) or weight not in x.program.parameters:
        return None
    matrix = x.program.values[weight].dim() == 2
    others = () if turned else ("linear",)
    return (weight, turned) if matrix and _only_multiplied(x, source, others) else None


def product_with_weight(x: Labeller, node: fx.Node) -> tuple[fx.Node, int, int] | None:
    """A product that is a layer: its weight, the axis of it that makes units, and that of what it reads.

    It reads along the last axis where the weight comes second, as in ``x @ w``, else along the one before it.
    """
    for place, axis in ((1, -1), (0, -2)):
        matrix = weight_behind(x, node.args[place])
        if matrix is not None:
            weight, turned = matrix
            return weight, 1 - turned if place else int(turned), axis
    return None


def is_turned_weight(x: Labeller, node: fx.Node) -> bool:
    """Whether a node is a matrix of weights turned around, for products only."""
    if node.op != "call_function" or name_of(node) not in TURNS or node.args[0] not in x.program.parameters:
        return False
    return x.program.values[node].dim() == 2 and _only_multiplied(x, node)


def _only_multiplied(x: Labeller, source: fx.Node, others: tuple[str, ...] = ()) -> bool:
    """Whether all that reads a matrix multiplies by it: products, and layers that are named."""
    return all(
        name_of(user) in ("matmul", "mm", *others)
        and user.args[0] is not user.args[1]
        and (user.args[1] is source or (user.args[0] is source and _is_read(x, user.args[1])))
        for user in source.users
    )


def _is_read(x: Labeller, source: Any) -> bool:
    """Whether a matrix, or several, comes from the inputs, so that what multiplies it is a layer."""
    return source in x.depends and x.program.values[source].dim() > 1


def _conv_call(cut: Smaller, node: fx.Node, a: dict[str, Any]) -> Call:
    """A grouped convolution has as many groups as are left."""
    groups = _groups(a)
    if groups == 1:
        return replaced(node)
    weight = weight_of(a["weight"])
    if weight not in cut.weights:
        return replaced(node)
    whole, left = cut.program.values[weight], cut.weights[weight].shape
    if _transposed(node, a):
        return replaced(node, groups=left[0] * groups // whole.shape[0])
    labels = cut.labels.get(a["input"])
    axis = cut.program.values[a["input"]].dim() - whole.dim() + 1
    come = cut.left(labels, axis) if labels is not None else cut.program.values[a["input"]].shape[axis]
    return replaced(node, groups=come // left[1])


def _free_axes(a: dict[str, Any], axis: int, kernel: torch.Size) -> set[int]:
    """Axes of maps whose positions a convolution takes one by one, and does not add any to."""
    found = set(range(axis))
    for d, taps in enumerate(kernel):
        stride, padding, more = (
            _of(a.get(k), d, n) for k, n in (("stride", 1), ("padding", 0), ("output_padding", 0))
        )
        if (taps, stride, padding, more) == (1, 1, 0, 0):
            found.add(axis + 1 + d)
    return found


def _of(sizes: Any, d: int, none: int) -> int:
    """One of the sizes that an operation has for its axes: a number for all, or one for each."""
    if isinstance(sizes, str) or sizes is None or sizes == []:
        return none
    listed = [sizes] if isinstance(sizes, int) else list(sizes)
    return int(listed[d % len(listed)])


def _groups(a: dict[str, Any]) -> int:
    return int(a.get("groups") or 1)


def _transposed(node: fx.Node, a: dict[str, Any]) -> bool:
    return "transpose" in name_of(node) or bool(a.get("transposed"))


@rule("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "convolution",
      call=_conv_call)  # fmt: skip
def convolution(x: Labeller, node: fx.Node, a: dict[str, Any]) -> Labels:
    """Convolutions mix the channels of each of their groups."""
    source, weight, bias = a["input"], a["weight"], a["bias"]
    shape = x.program.values[node].shape
    whole = x.program.values[weight]
    axis = len(shape) - whole.dim() + 1
    groups, transposed = _groups(a), _transposed(node, a)
    into, out = (0, 1) if transposed else (1, 0)
    each = groups > 1 and groups == x.program.values[source].shape[axis]
    passed = _passed(x, node, source, _free_axes(a, axis, whole.shape[2:]), (weight, into, out), bias)
    if passed is not None:
        return passed
    columns = ((weight, into),) if groups == 1 else ()
    read = x.read(source, (axis,), node, name_of(node), sums=not each, columns=columns)
    if groups == 1:
        x.weight(weight, into, read, node)
        units = x.weight(weight, out, None, node)
    else:
        units = _grouped(x, node, weight, read, groups, transposed)
    if isinstance(bias, fx.Node):
        x.weight(bias, 0, units, node)
    x.dead[node] = Dead.ZERO
    return along(units, axis, shape)


def _grouped(x: Labeller, node: fx.Node, weight: Any, read: Ints, groups: int, transposed: bool) -> Ints:
    """Groups go as a whole; of each group that stays, as many units stay as of any other."""
    whole = x.program.values[weight]
    ins = len(read) // groups
    outs = whole.shape[1] if transposed else whole.shape[0] // groups
    if ins == 1 and outs == 1:  # depthwise: what comes in goes out
        return x.weight(weight, 0, read, node)
    if transposed:  # its weight has one axis for what all groups make: only whole groups go
        grid = x.weight(weight, 0, read, node).reshape(groups, ins)
        x.axes.equal(grid, np.broadcast_to(grid[:, :1], grid.shape), name_of(node), node)
        return np.repeat(grid[:, 0], outs)
    units, rows = x.weight(weight, 0, None, node), x.axes.sets.new(groups)
    inside = x.weight(weight, 1, None, node) if ins > 1 else np.full(1, LIVE)
    if (read < FIRST).any():
        for own in (read, rows, inside):
            x.axes.fix(own, f"{name_of(node)} reads what cannot go by groups", node)
    elif ins == 1:
        rows = read
    else:
        x.axes.grids.append(Grid(read.reshape(groups, ins), rows))
        x.axes.grids.append(Grid(read.reshape(groups, ins).T, inside))
    x.axes.grids.append(Grid(units.reshape(groups, outs), rows))
    return units


@rule("deform_conv2d")
def deformable(x: Labeller, node: fx.Node, a: dict[str, Any]) -> Labels:
    """A convolution of torchvision that reads at places which others say, all of which stay."""
    for key in ("offset", "mask"):
        x.fix(a[key], f"deform_conv2d reads its {key}", node)
    weight, shape = a["weight"], x.program.values[node].shape
    read = x.read(a["input"], (1,), node, name_of(node))
    units = x.weight(weight, 0, None, node)
    if a["groups"] > 1:
        x.axes.fix(units, "deform_conv2d has groups", node)
    if max(a["groups"], a["offset_groups"]) > 1:
        x.axes.fix(read, "deform_conv2d has groups", node)
    else:
        x.weight(weight, 1, read, node)
    x.weight(a["bias"], 0, units, node)
    x.dead[node] = Dead.ZERO
    return along(units, 1, shape)


@rule("_weight_norm")
def weight_norm(x: Labeller, node: fx.Node, a: dict[str, Any]) -> None:
    """g v / |v|, the norm taken over all axes but one: zeros in v do not change it."""
    if not normed_by_lines(node):
        x.keep_weight(a["v"], "weight_norm takes one norm of all of it", node)
        return
    axis = a["dim"] % x.program.values[a["v"]].dim()
    if axis < 2:  # of a convolution's kernel nothing goes
        x.weight(a["g"], axis, x.weight(a["v"], axis, None, node), node)


@rule("embedding")
def embedding(x: Labeller, node: fx.Node, a: dict[str, Any]) -> Labels:
    """Rows of a table by their numbers."""
    return along(_columns(x, node, a["weight"]), -1, x.program.values[node].shape)


@rule("embedding_bag")
def embedding_bag(x: Labeller, node: fx.Node, a: dict[str, Any]) -> tuple[Labels, ...]:
    """Sums, means or largest of rows of a table, column by column; behind them what gradients need."""
    units = _columns(x, node, a["weight"])
    made, *others = x.program.values[node]
    if reads_more(node):
        x.axes.fix(units, "more is read of embedding_bag than its sums", node)
    return along(units, -1, made.shape), *(live(v.shape) for v in others)


def _columns(x: Labeller, node: fx.Node, table: Any) -> Ints:
    """Units along the width of a table, of which single rows are read."""
    if not x.axes.picks_experts(node):
        x.axes.fix(x.weight(table, 0, None, node), "tokens are looked up in it", node)
    x.dead[node] = Dead.ZERO
    return x.weight(table, 1, None, node)


@rule("bilinear")
def bilinear(x: Labeller, node: fx.Node, a: dict[str, Any]) -> Labels:
    """y_k = x1^T W_k x2 + b_k."""
    one = x.read(a["input1"], (x.program.values[a["input1"]].dim() - 1,), node, "bilinear")
    two = x.read(a["input2"], (x.program.values[a["input2"]].dim() - 1,), node, "bilinear")
    x.weight(a["weight"], 1, one, node)
    x.weight(a["weight"], 2, two, node)
    units = x.weight(a["weight"], 0, None, node)
    if isinstance(a["bias"], fx.Node):
        x.weight(a["bias"], 0, units, node)
    shape = x.program.values[node].shape
    x.dead[node] = Dead.ZERO
    return along(units, len(shape) - 1, shape)
