"""Normalisations: over the batch each unit for itself, over a layer all units that stay."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from sparsereg.compression.units.labels import FIRST, Labels
from sparsereg.compression.units.program import Call, bound, name_of
from sparsereg.compression.units.rules.table import Dead, Labeller, Smaller, reads_more, replaced, rule


@rule(
    "batch_norm",
    "_native_batch_norm_legit_no_training",
    "native_batch_norm",
    "instance_norm",
    "cudnn_batch_norm",
)
def batch_norm(x: Labeller, node: fx.Node, a: dict[str, Any]) -> Any:
    """Each channel by itself, with weights of its own."""
    labels = x.labels(a["input"])
    units = x.axes.reduce(labels, (1,), name_of(node), node)
    for name in ("weight", "bias", "running_mean", "running_var"):
        if isinstance(a.get(name), fx.Node):
            x.weight(a[name], 0, units, node)
    affine = isinstance(a.get("weight"), fx.Node)
    x.dead[node] = Dead.ZERO if affine else max(x.dead[node], Dead.CONSTANT)
    made = torch.from_numpy(units).int().view(1, -1, *(1,) * (labels.dim() - 2)).expand(labels.shape)
    if isinstance(x.program.values[node], Tensor):
        return made
    if reads_more(node):
        x.axes.fix(units, f"more is read of {name_of(node)} than what it norms", node)
    return (made, *(torch.full(v.shape, 1, dtype=torch.int32) for v in x.program.values[node][1:]))


def _layer_norm_call(cut: Smaller, node: fx.Node, a: dict[str, Any]) -> Call:
    labels = cut.labels[node]
    rank = len(a["normalized_shape"])
    return replaced(node, normalized_shape=[cut.left(labels, labels.dim() - rank + i) for i in range(rank)])


@rule("layer_norm", "rms_norm", "native_layer_norm", call=_layer_norm_call)
def layer_norm(x: Labeller, node: fx.Node, a: dict[str, Any]) -> Labels:
    """Over the last axes; the means are over the units that stay. Of heads, each by itself and whole."""
    labels = x.labels(a["input"])
    rank = len(a["normalized_shape"])
    axes = tuple(range(labels.dim() - rank, labels.dim()))
    if _own_lines(x, labels, rank):
        return _line_by_line(x, node, a, labels)
    units = x.axes.reduce(labels, axes, name_of(node), node)
    for name in ("weight", "bias"):
        if isinstance(a.get(name), fx.Node):
            if rank == 1:
                x.weight(a[name], 0, units, node)
            else:
                x.axes.equal(x.raw(a[name]).numpy(), units, name_of(node), node)
    x.axes.averaged.append(np.ravel(units))
    x.dead[node] = Dead.ZERO  # or nothing goes: ``Sites`` keeps what no gates can take out of the mean
    return torch.from_numpy(units).int().expand(labels.shape)


def _own_lines(x: Labeller, labels: Labels, rank: int) -> bool:
    """Whether lines along the last axes have units of their own, of one weight, as the vectors of heads.

    Elements of a table that is read as it is, such as one of queries, are no vectors of heads.
    """
    if not labels.numel():
        return False
    for _ in range(rank):
        labels = labels.select(-1, 0)
    first = np.unique(labels.numpy())
    owner = sorted((start, axis) for start, _, axis in x.axes.owner)
    makers = np.searchsorted([start for start, _ in owner], first[first >= FIRST], side="right")
    makers = makers[[owner[maker - 1][1] >= 0 for maker in makers]]
    return len(np.unique(makers)) < len(makers)


def _line_by_line(x: Labeller, node: fx.Node, a: dict[str, Any], labels: Labels) -> Labels:
    """Of each line all goes, or nothing."""
    others = tuple(range(labels.dim() - len(a["normalized_shape"])))
    x.axes.reduce(labels, others, name_of(node), node)
    x.through[node] = (a["input"],)  # no weight here can shut one line
    if isinstance(a.get("bias"), fx.Node):
        x.dead[node] = max(x.dead[node], Dead.CONSTANT)
    return labels


def _group_norm_call(cut: Smaller, node: fx.Node, a: dict[str, Any]) -> Call:
    """Groups that are left equally large are those of a group norm; else each has a size of its own."""
    labels, groups = cut.labels[node], int(a["num_groups"])
    left = cut.alive_along(labels, 1).view(groups, -1).sum(1)
    sizes = left[left > 0]
    if len(sizes.unique()) <= 1:
        return replaced(node, num_groups=max(1, len(sizes)))
    inside = torch.arange(int(sizes.max())) < sizes[:, None]
    behind = int(sizes.sum())  # a place behind the last channel holds a zero
    places = torch.full(inside.shape, behind).masked_scatter(inside, torch.arange(behind))
    member = torch.arange(len(sizes)).repeat_interleave(sizes)
    settings = (places.flatten(), sizes, member, labels.dim() - 2, len(sizes), float(a["eps"]))
    return Call(norm_by_groups, (node.args[0], a.get("weight"), a.get("bias"), *settings))


def norm_by_groups(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    places: Tensor,
    sizes: Tensor,
    member: Tensor,
    behind: int,
    groups: int,
    eps: float,
) -> Tensor:
    """A group norm of groups with different numbers of channels, in operations that every runtime knows.

    A group's variance is the mean over its channels of their own variances and squared distances from its
    mean, so that the map is read three times.

    Args:
        x: (batch, channels, ...).
        weight: (channels,), or None.
        bias: likewise.
        places: channels of each group, filled up with ``channels``, (groups * most,).
        sizes: channels of each group, (groups,).
        member: the group of each channel, (channels,).
        behind: axes behind the channels.
        groups: how many there are.
        eps: what is added to the variance.
    """
    aten, ones, axes = torch.ops.aten, [1] * behind, list(range(2, 2 + behind))

    def of_groups(each: Tensor) -> Tensor:
        """The means over groups of (batch, channels, 1, ...), for each channel that of its group."""
        filled = aten.index_select.default(aten.pad.default(each, [0, 0] * behind + [0, 1]), 1, places)
        summed = aten.sum.dim_IntList(aten.unflatten.int(filled, 1, [groups, -1]), [2])
        means = aten.div.Tensor(summed, aten.reshape.default(sizes, [-1, *ones]))
        return aten.index_select.default(means, 1, member)  # type: ignore[no-any-return]

    own = aten.mean.dim(x, axes, True) if axes else x
    mean = of_groups(own)
    away = aten.sub.Tensor(own, mean)
    spread = aten.mul.Tensor(away, away)
    if axes:
        spread = aten.add.Tensor(aten.var.dim(x, axes, False, True), spread)
    scale = aten.rsqrt.default(aten.add.Scalar(of_groups(spread), eps))
    if weight is not None:
        scale = aten.mul.Tensor(scale, aten.reshape.default(weight, [-1, *ones]))
    normed = aten.mul.Tensor(aten.sub.Tensor(x, mean), scale)
    if bias is None:
        return normed  # type: ignore[no-any-return]
    return aten.add.Tensor(normed, aten.reshape.default(bias, [-1, *ones]))  # type: ignore[no-any-return]


@rule("group_norm", call=_group_norm_call)
def group_norm(x: Labeller, node: fx.Node, a: dict[str, Any]) -> Labels:
    """Over the channels of each group; the means are over those that stay."""
    labels = x.labels(a["input"])
    units = x.axes.reduce(labels, (1,), "group_norm", node)
    for name in ("weight", "bias"):
        if isinstance(a.get(name), fx.Node):
            x.weight(a[name], 0, units, node)
    grid = units.reshape(int(a["num_groups"]), -1)
    if len(grid) == 1:
        x.axes.averaged.append(units)
    elif x.even:
        x.axes.equal(grid, np.broadcast_to(grid[0], grid.shape), "group_norm", node)
    if len(grid) > 1:
        x.axes.averaged_by_groups.append(units)
    x.dead[node] = Dead.ZERO
    return torch.from_numpy(units).int().view(1, -1, *(1,) * (labels.dim() - 2)).expand(labels.shape)


def go_by_whole_groups(x: Labeller, node: fx.Node) -> None:
    """Of a group norm that no gates can tell what is shut, a group goes as a whole."""
    a = bound(node)
    units = x.axes.reduce(x.labels(a["input"]), (1,), "group_norm", node)
    grid = units.reshape(int(a["num_groups"]), -1)
    x.axes.equal(grid, np.broadcast_to(grid[:, :1], grid.shape), "group_norm", node)
