"""Normalisations: over the batch each unit for itself, over a layer all units that stay."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from sparsereg.compression.units.labels import FIRST, Labels
from sparsereg.compression.units.program import Call, name_of
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
    x.dead[node] = Dead.ZERO if isinstance(a.get("weight"), fx.Node) else Dead.ANYTHING
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
    labels = cut.labels[node]
    if a["num_groups"] == 1:
        return replaced(node)
    return replaced(node, num_groups=cut.left(labels, 1) * a["num_groups"] // labels.shape[1])


@rule("group_norm", call=_group_norm_call)
def group_norm(x: Labeller, node: fx.Node, a: dict[str, Any]) -> Labels:
    """Over the channels of each group: a group goes as a whole."""
    labels = x.labels(a["input"])
    units = x.axes.reduce(labels, (1,), "group_norm", node)
    for name in ("weight", "bias"):
        if isinstance(a.get(name), fx.Node):
            x.weight(a[name], 0, units, node)
    groups = int(a["num_groups"])
    grid = units.reshape(groups, -1)
    if groups == 1:
        x.axes.averaged.append(units)
    else:
        for column in grid[:, 1:].T:
            x.axes.equal(column, grid[:, 0], "group_norm", node)
    x.dead[node] = Dead.ZERO if isinstance(a.get("weight"), fx.Node) else Dead.ANYTHING
    return torch.from_numpy(units).int().view(1, -1, *(1,) * (labels.dim() - 2)).expand(labels.shape)
