"""Operations that sum, average, pool or rank along axes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from sparsereg.compression.units.labels import Grid, Labels, live, varying
from sparsereg.compression.units.program import name_of
from sparsereg.compression.units.rules.table import Dead, Labeller, rule

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


@rule("mean", "sum", "var", "std", "var_mean", "linalg_vector_norm", "norm", "nansum", "logsumexp")
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
    if x.dead.get(node.args[0], Dead.ZERO) is not Dead.ZERO:  # type: ignore[arg-type]
        x.axes.fix(labels, f"{name} sums over values that are not zero when it is gone", node)
    if name not in MEANS:
        x.reads.append((node.args[0],))
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


_RANKINGS = """
    softmax log_softmax _softmax _log_softmax amax amin max min argmax argmin sort topk any all prod cummax
    argsort median
""".split()  # noqa: SIM905


@rule(*_RANKINGS)
def rankings(x: Labeller, node: fx.Node, a: dict[str, Any]) -> Any:
    """Along an axis that zeros would change: its units stay."""
    labels = x.labels(node.args[0])
    if "dim" not in a or a["dim"] is None:
        x.axes.fix(labels, f"{name_of(node)} runs over it", node)
        return None
    dims = _dims(a, labels.dim())
    value = x.program.values[node]
    x.dead[node] = max(x.dead[node], Dead.CONSTANT)
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
