"""Operations that move elements: labels are moved by the operation itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from sparsereg.compression.units.labels import Labels
from sparsereg.compression.units.program import name_of, plain_call
from sparsereg.compression.units.rules.table import Dead, Labeller, Smaller, rule

_ON_FLOATS = """
    pad upsample_nearest1d upsample_nearest2d upsample_nearest3d unfold im2col pixel_shuffle pixel_unshuffle
    channel_shuffle reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d
    replication_pad3d
""".split()  # noqa: SIM905
"""Operations that know floating-point numbers only; labels are small enough to be exact in them."""
_COPIES = """
    to _to_copy alias detach clone contiguous lift_fresh lift_fresh_copy type_as dropout feature_dropout
    alpha_dropout float double half
""".split()  # noqa: SIM905
_MOVES = """
    transpose permute movedim moveaxis swapaxes swapdims t numpy_T mT unsqueeze squeeze roll flip cat concat
    concatenate stack unbind getitem repeat repeat_interleave tril triu gather index_select narrow diagonal
    select_scatter slice_scatter rot90 tile broadcast_to hstack vstack column_stack take_along_dim
""".split()  # noqa: SIM905
_VIEWS = """
    view reshape _unsafe_view flatten unflatten expand expand_as view_as reshape_as
""".split()  # noqa: SIM905


@rule(*_COPIES)
def copies(x: Labeller, node: fx.Node, a: dict[str, Any]) -> Labels:
    """The same elements at the same places."""
    return x.labels(node.args[0])


def _moved(x: Labeller, node: fx.Node, floats: bool = False) -> Any:
    """Run an operation on labels in place of the values; indices stay what they are."""
    first = True

    def swap(source: fx.Node) -> Any:
        nonlocal first
        value = x.program.values[source]
        if isinstance(value, Tensor) and (value.is_floating_point() or first):
            first = False
            labels = x.labels(source)
            return labels.double() if floats else labels
        if isinstance(value, list | tuple) and value and isinstance(value[0], Tensor):
            found = x.axes.of.get(source)
            return found if found is not None else [x.labels(None, tuple(v.shape)) for v in value]
        return value

    args, kwargs = fx.node.map_arg(node.args, swap), fx.node.map_arg(node.kwargs, swap)
    result = plain_call(node, args, kwargs)
    if isinstance(result, Tensor):
        return result.round().int() if floats else result
    return tuple(r.round().int() if floats else r for r in result)


def _resized(cut: Smaller, node: fx.Node, a: dict[str, Any], v: dict[str, Any]) -> Any:
    """View or expand to the sizes that are left."""
    labels = cut.labels[node]
    size = [cut.left(labels, axis) for axis in range(labels.dim())]
    if name_of(node) in ("expand", "expand_as"):
        return v["self"].expand(size)
    return v["self"].reshape(size)


def _split_call(cut: Smaller, node: fx.Node, a: dict[str, Any], v: dict[str, Any]) -> Any:
    parts = cut.labels[node]
    source = cut.labels.get(a["self"])
    rank = (source if source is not None else cut.program.values[a["self"]]).dim()
    axis = (a.get("dim") or 0) % rank
    return torch.split(v["self"], [cut.left(part, axis) for part in parts], axis)


def _slice_call(cut: Smaller, node: fx.Node, a: dict[str, Any], v: dict[str, Any]) -> Any:
    labels = cut.labels.get(a["self"])
    axis = a["dim"] or 0
    if labels is None:
        return plain_call(node, *cut.arguments)
    alive = cut.alive_along(labels, axis)
    index = torch.arange(len(alive))[slice(a["start"], a["end"], a["step"])]
    chosen = torch.zeros(len(alive), dtype=torch.bool)
    chosen[index] = True
    return v["self"].index_select(axis, chosen[alive].nonzero().flatten())


def _select_call(cut: Smaller, node: fx.Node, a: dict[str, Any], v: dict[str, Any]) -> Any:
    labels = cut.labels.get(a["self"])
    if labels is None:
        return plain_call(node, *cut.arguments)
    alive = cut.alive_along(labels, a["dim"])
    index = a["index"] % len(alive)
    return v["self"].select(a["dim"], int(alive[:index].sum()))


def _index_call(cut: Smaller, node: fx.Node, a: dict[str, Any], v: dict[str, Any]) -> Any:
    """Look up positions that are left along an axis of which some have gone."""
    labels = cut.labels.get(a["self"])
    if labels is None:
        return plain_call(node, *cut.arguments)
    indices: list[Tensor | None] = []
    for axis, index in enumerate(v["indices"]):
        if index is None:
            indices.append(None)
            continue
        alive = cut.alive_along(labels, axis)
        place = alive.long().cumsum(0) - 1
        index = index[alive[index]] if not bool(alive.all()) else index
        indices.append(place[index])
    return torch.ops.aten.index.Tensor(v["self"], indices)


@rule(*_VIEWS, call=_resized)
def resized(x: Labeller, node: fx.Node, a: dict[str, Any]) -> Labels:
    """Another shape of the same elements."""
    result = x.program.values[node]
    labels = x.labels(node.args[0])
    if name_of(node) in ("expand", "expand_as"):
        return labels.expand(result.shape)
    made = labels.reshape(result.shape)
    x.axes.shapes.append((node, made))
    return made


@rule(*_MOVES)
def moved(x: Labeller, node: fx.Node, a: dict[str, Any]) -> Any:
    """Elements at other places."""
    return _moved(x, node)


@rule("split", "chunk", "split_with_sizes", "unsafe_split", "tensor_split", call=_split_call)
def parts(x: Labeller, node: fx.Node, a: dict[str, Any]) -> Any:
    """Parts of a tensor along an axis."""
    return _moved(x, node)


@rule("slice", call=_slice_call)
def sliced(x: Labeller, node: fx.Node, a: dict[str, Any]) -> Any:
    """A part of a tensor along an axis."""
    return _moved(x, node)


@rule("select", call=_select_call)
def selected(x: Labeller, node: fx.Node, a: dict[str, Any]) -> Any:
    """One position along an axis."""
    return _moved(x, node)


@rule("index", call=_index_call)
def indexed(x: Labeller, node: fx.Node, a: dict[str, Any]) -> Any:
    """Positions that a tensor of indices names."""
    return _moved(x, node)


@rule(*_ON_FLOATS)
def moved_as_floats(x: Labeller, node: fx.Node, a: dict[str, Any]) -> Any:
    """Elements at other places, by operations that know floating-point numbers only."""
    if name_of(node) == "pad" and a.get("value"):
        x.dead[node] = max(x.dead[node], Dead.CONSTANT)
    return _moved(x, node, floats=True)


@rule("zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like")
def alike(x: Labeller, node: fx.Node, a: dict[str, Any]) -> Labels:
    """A new tensor of the shape of another one."""
    x.dead[node] = Dead.CONSTANT
    return x.labels(node.args[0])


@rule("new_zeros", "new_ones", "new_full", "new_empty", "size", "sym_size", "_assert_tensor_metadata")
def shapes_only(x: Labeller, node: fx.Node, a: dict[str, Any]) -> None:
    """Nothing of the values is read."""
