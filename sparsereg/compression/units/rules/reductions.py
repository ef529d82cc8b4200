"""Operations that sum, average, pool or rank along axes."""

from __future__ import annotations

import math
from functools import reduce
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from sparsereg.compression.units.labels import Grid, Labels, live, varying
from sparsereg.compression.units.program import Call, name_of
from sparsereg.compression.units.rules.elementwise import pair
from sparsereg.compression.units.rules.table import Dead, Labeller, Smaller, replaced, rule

POOLS = """
    max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d
    adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d max_pool2d_with_indices
    upsample_bilinear2d upsample_linear1d upsample_trilinear3d upsample_bicubic2d _upsample_bilinear2d_aa
    _upsample_bicubic2d_aa lp_pool2d lp_pool1d _adaptive_avg_pool2d max_pool3d_with_indices grid_sampler
    local_response_norm
""".split()  # noqa: SIM905
"""Operations on the positions of each channel by itself."""


@rule(*POOLS)
def pools(x: Labeller, node: fx.Node, a: dict[str, Any]) -> Any:
    """Each channel by itself, whatever happens to its positions."""
    labels = x.labels(node.args[0])
    value = x.program.values[node]
    first = value if isinstance(value, Tensor) else value[0]
    spatial = _spatial(name_of(node), labels.dim())
    axis = labels.dim() - spatial - 1
    units = x.axes.reduce(labels, (axis,), name_of(node), node)
    made = torch.from_numpy(units).int().view(*(1,) * axis, -1, *(1,) * spatial).expand(first.shape)
    if isinstance(value, Tensor):
        return made
    return (made, *(made.expand(v.shape) for v in value[1:]))


def _spatial(name: str, rank: int) -> int:
    for digit in "123":
        if f"{digit}d" in name:
            return int(digit)
    return rank - 2


MEANS = ("mean", "var", "std", "var_mean")
"""Over units these are over those that stay."""


def _mean_call(cut: Smaller, node: fx.Node, a: dict[str, Any]) -> Call:
    """A mean that no normalisation takes is over all units, as zeros where they are gone."""
    labels = cut.labels.get(node.args[0])
    if not cut.is_of_all(node) or not isinstance(labels, Tensor):
        return replaced(node)
    axes = varying(labels) & set(_dims(a, labels.dim()))
    share = math.prod(cut.left(labels, d) / labels.shape[d] for d in axes)
    settings = (a.get("dim"), bool(a.get("keepdim")), share)
    return replaced(node) if share == 1 else Call(scaled_mean, (node.args[0], *settings))


def scaled_mean(x: Tensor, dim: list[int] | None, keepdim: bool, share: float) -> Tensor:
    """The mean of a tensor of which a share is left, the rest being zeros."""
    mean = torch.ops.aten.mean.dim(x, dim, keepdim)
    return torch.ops.aten.mul.Scalar(mean, share)  # type: ignore[no-any-return]


@rule("mean", call=_mean_call)
@rule("sum", "var", "std", "var_mean", "linalg_vector_norm", "norm", "nansum", "logsumexp")
def sums_over(x: Labeller, node: fx.Node, a: dict[str, Any]) -> Any:
    """Sums over axes; a mean over units is a mean over those that stay."""
    labels = x.labels(node.args[0])
    dims = _dims(a, labels.dim())
    keepdim = bool(a.get("keepdim"))
    name = name_of(node)
    reduced = varying(labels) & set(dims)
    rest = tuple(d for d in range(labels.dim()) if d not in dims)
    if not reduced:
        made = labels
        for d in sorted(dims, reverse=True):
            made = made.narrow(d, 0, 1) if keepdim else made.select(d, 0)
        value = x.program.values[node]
        if name not in ("mean", "sum") or isinstance(value, tuple):
            x.dead[node] = max(x.dead[node], Dead.CONSTANT) if name == "logsumexp" else x.dead[node]
        return made if isinstance(value, Tensor) else tuple(made for _ in value)
    if name in MEANS:
        x.axes.averaged.append(np.unique(labels.numpy()))
    if name == "logsumexp":
        x.axes.fix(labels, "logsumexp runs along it", node)
    if (a.get("p", a.get("ord")) or 0) < 0:
        x.axes.fix(labels, f"{name} of a negative order is zero where one of them is", node)
    if name not in MEANS:  # of a mean, what is gone is left out
        x.reads.append((node.args[0],))
        if x.dead.get(node.args[0], Dead.ZERO) is not Dead.ZERO:  # type: ignore[arg-type]
            x.axes.fix(labels, f"{name} sums over values that are not zero when it is gone", node)
    made = rows_of(x, node, labels, rest, tuple(dims))
    if keepdim:
        for d in sorted(dims):
            made = made.unsqueeze(d)
    x.dead[node] = Dead.CONSTANT
    value = x.program.values[node]
    return made if isinstance(value, Tensor) else tuple(made for _ in value)


def _dims(a: dict[str, Any], rank: int) -> list[int]:
    dims = a.get("dim")
    if dims is None or dims == []:
        return list(range(rank))
    return sorted({d % rank for d in ([dims] if isinstance(dims, int) else dims)})


def rows_of(
    x: Labeller, node: fx.Node, labels: Labels, rest: tuple[int, ...], over: tuple[int, ...]
) -> Labels:
    """Labels after a sum over some axes along which units lie: a row stays while one of its units does."""
    kept = tuple(d for d in rest if d in varying(labels))
    shape = [labels.shape[d] for d in rest]
    if not kept:
        return live(tuple(shape))
    inner = tuple(d for d in over if d in varying(labels))
    units = x.axes.reduce(labels, (*kept, *inner), name_of(node), node)
    outer = units.shape[: len(kept)]
    rows = x.axes.sets.new(int(np.prod(outer)))
    x.axes.grids.append(Grid(units.reshape(len(rows), -1), rows))
    view = [labels.shape[d] if d in kept else 1 for d in rest]
    return torch.from_numpy(rows).int().view(view).expand(shape)


@rule("cosine_similarity")
def cosine(x: Labeller, node: fx.Node, a: dict[str, Any]) -> Labels:
    """Sums over an axis of the products of two tensors and of their squares."""
    labels = pair(x, node, [x.labels(a[key]) for key in ("x1", "x2")])
    dim = int(a["dim"]) % labels.dim()
    for key in ("x1", "x2"):
        x.read(a[key], (x.labels(a[key]).dim() - labels.dim() + dim,), node, "cosine_similarity")
    x.dead[node] = Dead.CONSTANT
    return rows_of(x, node, labels, tuple(d for d in range(labels.dim()) if d != dim), (dim,))


@rule("cdist")
def distances(x: Labeller, node: fx.Node, a: dict[str, Any]) -> Labels:
    """Sums of differences over the last axis."""
    one, two = (x.read(a[k], (x.labels(a[k]).dim() - 1,), node, "cdist") for k in ("x1", "x2"))
    x.axes.equal(one, two, "cdist with what cannot go", node)
    return live(x.program.values[node].shape)


_RANKINGS = """
    softmax log_softmax _softmax _log_softmax argmax argmin sort topk any all prod cummax argsort median
""".split()  # noqa: SIM905


_SHARES = ("softmax", "log_softmax", "_softmax", "_log_softmax")
_EXTREMES = ("amax", "amin", "max", "min")
_OF_ZEROS = (*_EXTREMES, "median", "sort", "topk", "cummax", "prod", "any")
"""Of nothing but zeros these are zero."""


def _places_are_read(node: fx.Node) -> bool:
    """Whether anything asks where the largest stand, and not only how large they are."""
    return any(name_of(user) == "getitem" and user.args[1] != 0 and user.users for user in node.users)


def _extreme_call(cut: Smaller, node: fx.Node, a: dict[str, Any]) -> Call:
    """The largest of units of which some are gone is at least zero, as these are."""
    labels = cut.labels.get(node.args[0])
    dims = _dims(a, labels.dim()) if isinstance(labels, Tensor) and a.get("dim") is not None else []
    if not isinstance(labels, Tensor) or all(cut.left(labels, d) == labels.shape[d] for d in dims):
        return replaced(node)
    name = name_of(node)
    settings = (a["dim"], bool(a.get("keepdim")), "max" in name, name in ("max", "min"))
    return Call(extreme_with_zero, (node.target, node.args[0], *settings))


def extreme_with_zero(
    operation: Any, x: Tensor, dim: Any, keepdim: bool, largest: bool, with_places: bool
) -> Any:
    """The largest (or smallest) along an axis and zero; with its places where the operation gives them."""
    found = operation(x, dim, keepdim)
    extreme, *places = (found[0], found[1]) if with_places else (found,)
    bounded = torch.ops.aten.clamp_min.default if largest else torch.ops.aten.clamp_max.default
    return (bounded(extreme, 0), *places) if places else bounded(extreme, 0)


def _shares(x: Labeller, node: fx.Node, labels: Labels, dim: int) -> Labels:
    """Shares of one another, as those of branches channel by channel: what shares goes together."""
    kept = tuple(sorted(varying(labels) - {dim}))
    units = x.axes.sets.find(x.axes.reduce(labels, kept, f"{name_of(node)} with what cannot go", node))
    view = [labels.shape[d] if d in kept else 1 for d in range(labels.dim())]
    return torch.from_numpy(units).int().view(view).expand(labels.shape)


@rule("amax", "amin", "max", "min", call=_extreme_call)
@rule(*_RANKINGS)
def rankings(x: Labeller, node: fx.Node, a: dict[str, Any]) -> Any:
    """Along an axis that zeros would change: its units stay."""
    labels = x.labels(node.args[0])
    if "dim" not in a or a["dim"] is None:
        x.axes.fix(labels, f"{name_of(node)} runs over it", node)
        return None
    dims = _dims(a, labels.dim())
    value = x.program.values[node]
    if name_of(node) not in _OF_ZEROS or _places_are_read(node):
        x.dead[node] = max(x.dead[node], Dead.CONSTANT)
    zero = x.dead.get(node.args[0], Dead.ZERO) is Dead.ZERO  # type: ignore[arg-type]
    if set(dims) & varying(labels) and name_of(node) in _EXTREMES and zero and not _places_are_read(node):
        x.reads.append((node.args[0],))
        x.dead[node] = Dead.CONSTANT
        made = rows_of(x, node, labels, tuple(d for d in range(labels.dim()) if d not in dims), tuple(dims))
        made = reduce(lambda part, d: part.unsqueeze(d), sorted(dims) if a.get("keepdim") else (), made)
        return made if isinstance(value, Tensor) else tuple(made for _ in value)
    if set(dims) & varying(labels) and name_of(node) in _SHARES and varying(labels) - set(dims):
        return _shares(x, node, labels, dims[0])
    if set(dims) & varying(labels):  # what comes out is of no single unit
        x.axes.fix(labels, f"{name_of(node)} runs along it", node)
        return live(value.shape) if isinstance(value, Tensor) else tuple(live(v.shape) for v in value)
    first = value if isinstance(value, Tensor) else value[0]
    made = labels
    if first.shape != labels.shape:
        if first.dim() == labels.dim():
            for d in dims:
                made = made.narrow(d, 0, 1)
            made = made.expand(first.shape)
        else:
            for d in sorted(dims, reverse=True):
                made = made.select(d, 0)
    return made if isinstance(value, Tensor) else tuple(made for _ in value)
