"""Operations that move elements: labels are moved by the operation itself."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, fx

from sparsereg.compression.running import can_train
from sparsereg.compression.units.labels import Labels, along, compacted, live, varying
from sparsereg.compression.units.program import Call, Scaled, Selected, bound, name_of, plain_call
from sparsereg.compression.units.rules.elementwise import pair, start_as
from sparsereg.compression.units.rules.mixing import is_turned_weight
from sparsereg.compression.units.rules.recurrent import taken
from sparsereg.compression.units.rules.table import (
    CATS,
    JOINS,
    MOVING,
    SPLITS,
    Dead,
    Labeller,
    Smaller,
    picked,
    replaced,
    rule,
)

_ON_FLOATS = """
    pad upsample_nearest1d upsample_nearest2d upsample_nearest3d unfold im2col pixel_shuffle pixel_unshuffle
    channel_shuffle reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d
    replication_pad3d
""".split()  # noqa: SIM905
"""Operations that know floating-point numbers only; labels are small enough to be exact in them."""
COPIES = """
    to _to_copy alias detach clone contiguous lift_fresh lift_fresh_copy type_as dropout feature_dropout
    alpha_dropout feature_alpha_dropout float double half
""".split()  # noqa: SIM905
_MOVES = """
    transpose permute movedim moveaxis swapaxes swapdims t numpy_T mT unsqueeze squeeze flip cat concat
    concatenate getitem repeat repeat_interleave tril triu diagonal
    rot90 tile
""".split()  # noqa: SIM905
_VIEWS = """
    view reshape _unsafe_view flatten unflatten expand
""".split()  # noqa: SIM905


@rule(*COPIES)
def copies(x: Labeller, node: fx.Node, a: dict[str, Any]) -> Labels:
    """The same elements at the same places."""
    return x.labels(node.args[0])


def _moved(x: Labeller, node: fx.Node, floats: bool = False) -> Any:
    """Run an operation on labels in place of the values; indices stay what they are."""
    first = True

    def swap(source: fx.Node) -> Any:
        nonlocal first
        value = x.program.values[source]
        if isinstance(value, Tensor) and (can_train(value) or first or name_of(node) in JOINS):
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


def _resized(cut: Smaller, node: fx.Node, a: dict[str, Any]) -> Call:
    """View or expand to the sizes that are left."""
    if name_of(node) not in ("view", "reshape", "_unsafe_view", "expand", "unflatten"):
        return replaced(node)
    key = "sizes" if name_of(node) == "unflatten" else "shape" if name_of(node) == "reshape" else "size"
    labels = cut.labels[node]
    asked = list(bound(node)[key])
    first = a["dim"] % cut.program.values[a["self"]].dim() if key == "sizes" else labels.dim() - len(asked)
    sizes = [left_of(cut, labels, first + i, size) for i, size in enumerate(asked)]
    return replaced(node, **{key: sizes})


def left_of(cut: Smaller, labels: Labels, axis: int, size: Any) -> Any:
    """A size that an operation is given, for what is left along an axis."""
    left, whole = cut.left(labels, axis), labels.shape[axis]
    if left == whole or size == -1:
        return size
    return Scaled(size, left, whole) if isinstance(size, fx.Node) else left


def _split_call(cut: Smaller, node: fx.Node, a: dict[str, Any]) -> Call:
    parts = cut.labels[node]
    axis = (a.get("dim") or 0) % parts[0].dim()
    sizes = [cut.left(part, axis) for part in parts]
    if sizes == [part.shape[axis] for part in parts]:
        return replaced(node)
    return Call(torch.ops.aten.split_with_sizes.default, (node.args[0], sizes, axis))


def _slice_call(cut: Smaller, node: fx.Node, a: dict[str, Any]) -> Call:
    labels = cut.labels.get(node.args[0])
    if labels is None:
        return replaced(node)
    axis = (a["dim"] or 0) % labels.dim()
    alive = cut.alive_along(labels, axis)
    if bool(alive.all()):
        return replaced(node)
    chosen = torch.zeros(len(alive), dtype=torch.bool)
    chosen[slice(a["start"], a["end"], a["step"])] = True
    index = chosen[alive].nonzero().flatten()
    if len(index) and len(index) == int(index[-1] - index[0]) + 1:
        return Call(torch.ops.aten.slice.Tensor, (node.args[0], axis, int(index[0]), int(index[-1]) + 1))
    return Call(torch.ops.aten.index_select.default, (node.args[0], axis, index))


def _select_call(cut: Smaller, node: fx.Node, a: dict[str, Any]) -> Call:
    one = taken(node)
    if one is not None:
        return one
    labels = cut.labels.get(node.args[0])
    if labels is None:
        return replaced(node)
    alive = cut.alive_along(labels, a["dim"])
    index = a["index"] % len(alive)
    if bool(alive.all()):
        return replaced(node)
    if not bool(alive[index]):
        return Call(emptied, (node.args[0], a["dim"], _without_places(cut, cut.labels[node])))
    return replaced(node, index=int(alive[:index].sum()))


def emptied(x: Tensor, dim: int, axis: int | None) -> Tensor:
    """What is left of a position of which nothing is: no places along another axis, or zeros."""
    aten = torch.ops.aten
    first = aten.select.int(x, dim, 0)
    made: Tensor = aten.zeros_like.default(first) if axis is None else aten.slice.Tensor(first, axis, 0, 0)
    return made


def _without_places(cut: Smaller, labels: Labels) -> int | None:
    """The last axis along which units lie of which none is left; None if there is no such axis."""
    return next((axis for axis in sorted(varying(labels), reverse=True) if not cut.left(labels, axis)), None)


def _index_call(cut: Smaller, node: fx.Node, a: dict[str, Any]) -> Call:
    """Look up positions that are left along an axis of which some have gone."""
    labels = cut.labels.get(node.args[0])
    if labels is None:
        return replaced(node)
    indices: list[Any] = []
    for axis, source in enumerate(bound(node)["indices"]):
        alive = cut.alive_along(labels, axis) if source is not None else None
        if alive is None or bool(alive.all()):
            indices.append(source)
            continue
        index = cut.program.values[source]
        index = index.nonzero().flatten() if index.dtype is torch.bool else index
        indices.append((alive.long().cumsum(0) - 1)[_read_still(cut, node, index, alive)])
    return replaced(node, indices=indices)


def _read_still(cut: Smaller, node: fx.Node, index: Tensor, alive: Tensor) -> Tensor:
    """The part of an index that looks up positions that are left."""
    if index.dim() == 1:
        return index[alive[index]]
    labels = cut.labels[node]
    first = next(i for i, source in enumerate(bound(node)["indices"]) if source is not None)
    for d in range(index.dim()):
        index = index.index_select(d, cut.alive_along(labels, first + d).nonzero().flatten())
    return index


@rule(*_VIEWS, call=_resized)
def resized(x: Labeller, node: fx.Node, a: dict[str, Any]) -> Labels:
    """Another shape of the same elements."""
    if isinstance(node.args[-1], torch.dtype):
        raise NotImplementedError("the bits of the elements are read as other numbers")
    result = x.program.values[node]
    labels = x.labels(node.args[0])
    if name_of(node) == "expand":
        return labels.expand(result.shape)
    made = compacted(labels.reshape(result.shape))
    x.axes.shapes.append((node, made))
    return made


@rule(*_MOVES)
def moved(x: Labeller, node: fx.Node, a: dict[str, Any]) -> Any:
    """Elements at other places."""
    if is_turned_weight(x, node) or picked(x.program, node):
        return None
    _keep_places(x, node, a)
    made = _moved(x, node)
    if name_of(node) in CATS and _join(x, node, a):
        made = torch.from_numpy(x.axes.sets.find(made.numpy())).int()
    elif name_of(node) in CATS and len(varying(made)) > 1:
        x.axes.shapes.append((node, compacted(made)))
    return made


_UNEVEN = {"tril", "triu", "diagonal", "repeat_interleave", "unfold", "pad", *_ON_FLOATS}


def _keep_places(x: Labeller, node: fx.Node, a: dict[str, Any]) -> None:
    """Units stay along axes whose places an operation does not treat alike."""
    name, source = name_of(node), node.args[0]
    if name not in _UNEVEN or not isinstance(source, fx.Node):
        return
    labels = x.labels(source)
    axes: tuple[int, ...] = ()
    if name in ("tril", "triu"):
        axes = (-2, -1)
    elif name == "diagonal":
        axes = (a["dim1"], a["dim2"])
    elif name == "repeat_interleave" and isinstance(a.get("repeats"), fx.Node):
        axes = tuple(range(labels.dim())) if a.get("dim") is None else (a["dim"],)
    elif name == "unfold":
        axes = (a["dimension"],)
    elif name == "pad":
        axes = tuple(-1 - i // 2 for i, more in enumerate(a["pad"]) if isinstance(more, int) and more < 0)
    elif name in _ON_FLOATS:
        axes = tuple(range(2, labels.dim()))
    if axes and {axis % labels.dim() for axis in axes} & varying(labels):
        x.axes.fix(labels, f"{name} does not treat all places along it alike", node)


def _roll_call(cut: Smaller, node: fx.Node, a: dict[str, Any]) -> Call:
    """As many of the places that are left come to the front as did."""
    labels, shifts = cut.labels[node.args[0]], list(bound(node)["shifts"])
    for i, (shift, axis) in enumerate(zip(a["shifts"], a["dims"], strict=True)):
        alive = cut.alive_along(labels, axis)
        if not bool(alive.all()):
            shifts[i] = int(alive[len(alive) - shift % len(alive) :].sum())
    return replaced(node, shifts=shifts)


@rule("roll", call=_roll_call)
def rolled(x: Labeller, node: fx.Node, a: dict[str, Any]) -> Any:
    """Elements moved along axes, the last ones to the front; without an axis nothing goes."""
    if not a["dims"]:
        x.fix(node.args[0], "roll moves it over all axes", node)
    return _moved(x, node)


def _stack_call(cut: Smaller, node: fx.Node, a: dict[str, Any]) -> Call:
    """Of what lies one behind the other, the tensors that are left."""
    labels = cut.labels[node]
    alive = cut.alive_along(labels, a["dim"] % labels.dim())
    if not bool(alive.any()):
        return replaced(node)
    return replaced(node, tensors=[t for t, here in zip(a["tensors"], alive, strict=True) if here])


@rule("stack", call=_stack_call)
def stacked(x: Labeller, node: fx.Node, a: dict[str, Any]) -> Any:
    """Tensors one behind the other along a new axis: all have the same places left along theirs."""
    made = _moved(x, node)
    x.axes.shapes.append((node, made))
    return made


def unbound(x: Tensor, dim: int, parts: list[tuple[int | None, int | None]]) -> tuple[Tensor, ...]:
    """What is left of the parts that ``torch.unbind`` gives: each one's place, or else an axis to empty."""
    return tuple(
        emptied(x, dim, axis) if place is None else torch.ops.aten.select.int(x, dim, place)
        for place, axis in parts
    )


def _unbind_call(cut: Smaller, node: fx.Node, a: dict[str, Any]) -> Call:
    labels = cut.labels[node.args[0]]
    alive = cut.alive_along(labels, a["dim"] % labels.dim())
    if bool(alive.all()) or not bool(alive.any()):
        return replaced(node)
    places = (alive.long().cumsum(0) - 1).tolist()
    parts = [
        (place, None) if here else (None, _without_places(cut, own))
        for place, here, own in zip(places, alive, cut.labels[node], strict=True)
    ]
    return Call(unbound, (node.args[0], a["dim"], parts))


@rule("unbind", call=_unbind_call)
def unbind(x: Labeller, node: fx.Node, a: dict[str, Any]) -> Any:
    """The positions along an axis, one by one."""
    return _moved(x, node)


def _join(x: Labeller, node: fx.Node, a: dict[str, Any]) -> bool:
    """What lies one behind the other has the same places left along other axes; False if there are none."""
    tensors = [part for part in a["tensors"] if x.program.values[part].dim() > 1]
    parts = [x.labels(part) for part in tensors]
    for part, own in itertools.product(tensors, parts):
        start_as(x, part, own)
    dim = a["dim"] % parts[0].dim() if parts else 0
    along = set().union(*map(varying, parts)) if parts else set()
    if not along or dim in along:
        return False
    first, *others = (x.axes.reduce(part, tuple(sorted(along)), "cat", node) for part in parts)
    for other in others:
        x.axes.equal(first, other, "cat", node)
    return True


def _gather_call(cut: Smaller, node: fx.Node, a: dict[str, Any]) -> Call:
    """Look up by what is left of an index along the other axes, unless it has one place there for all."""
    labels, key = cut.labels[node], "index" if "index" in a else "indices"
    index, own = a[key], cut.labels.get(a[key])
    shape = cut.program.values[index].shape
    for d in range(labels.dim()) if a["dim"] is not None else ():
        alive = cut.alive_along(labels, d)
        spread = shape[d] != len(alive) or d == a["dim"] % labels.dim()
        if not (spread or bool(alive.all()) or (own is not None and not bool(cut.alive_along(own, d).all()))):
            index = Selected(index, d, alive.nonzero().flatten())
    return replaced(node, **{key: index})


@rule("gather", "take_along_dim", call=_gather_call)
def gather(x: Labeller, node: fx.Node, a: dict[str, Any]) -> Any:
    """Elements that an index names along one axis; along it all stays."""
    if x.axes.picks_experts(node):
        return _rows(x, node)
    labels = x.labels(node.args[0])
    if a["dim"] is None or a["dim"] % labels.dim() in varying(labels):
        x.axes.fix(labels, f"{name_of(node)} looks up places along it", node)
        return live(x.program.values[node].shape)
    return _moved(x, node)


@rule(*SPLITS, call=_split_call)
def parts(x: Labeller, node: fx.Node, a: dict[str, Any]) -> Any:
    """Parts of a tensor along an axis."""
    return _moved(x, node)


def _narrow_call(cut: Smaller, node: fx.Node, a: dict[str, Any]) -> Call:
    if not isinstance(a["start"], int):
        return replaced(node)
    return _slice_call(cut, node, {**a, "end": a["start"] + a["length"], "step": 1})


@rule("narrow", call=_narrow_call)
@rule("slice", call=_slice_call)
def sliced(x: Labeller, node: fx.Node, a: dict[str, Any]) -> Any:
    """A part of a tensor along an axis."""
    return _moved(x, node)


@rule("select", call=_select_call)
def selected(x: Labeller, node: fx.Node, a: dict[str, Any]) -> Any:
    """One position along an axis."""
    return None if picked(x.program, node) else _moved(x, node)


def _scatter_call(cut: Smaller, node: fx.Node, a: dict[str, Any]) -> Call:
    """Write to the positions that are left of those that are written to."""
    labels = cut.labels[node]
    axis = (a["dim"] or 0) % labels.dim()
    alive = cut.alive_along(labels, axis)
    if bool(alive.all()):
        return replaced(node)
    chosen = torch.zeros(len(alive), dtype=torch.bool)
    chosen[_written(a)] = True
    index = chosen[alive].nonzero().flatten()
    if name_of(node) == "select_scatter" and len(index):
        return replaced(node, index=int(index[0]))
    if not len(index):
        return Call(torch.ops.aten.clone.default, (node.args[0],))
    return Call(torch.ops.aten.index_copy.default, (node.args[0], axis, index, node.args[1]))


def _written(a: dict[str, Any]) -> Any:
    return a["index"] if "index" in a else slice(a["start"], a["end"], a["step"])


@rule("slice_scatter", "select_scatter", call=_scatter_call)
def scattered(x: Labeller, node: fx.Node, a: dict[str, Any]) -> Any:
    """A tensor of which one part is another tensor; units that come to lie over others go with them."""
    labels, source = x.labels(node.args[0]), x.labels(node.args[1])
    axis = (a["dim"] or 0) % labels.dim()
    start_as(x, node.args[0], source.unsqueeze(axis) if "index" in a else source)
    written = labels.movedim(axis, 0)[_written(a)]
    pair(x, node, [written if "index" in a else written.movedim(0, axis), source])
    for side in node.args[:2]:
        if isinstance(side, fx.Node) and not x.has_units(side):
            x.dead[node] = max(x.dead[node], Dead.ANYTHING)
    return _moved(x, node)


@rule("index", call=_index_call)
def indexed(x: Labeller, node: fx.Node, a: dict[str, Any]) -> Any:
    """Positions that a tensor of indices names, or a mask."""
    indices = [x.program.values[n] for n in a.get("indices", ()) if isinstance(n, fx.Node)]
    if any(index.dtype is torch.bool and index.dim() > 1 for index in indices):
        x.fix(node.args[0], "index by a mask of several axes", node)
        return None
    if x.axes.picks_experts(node):
        return _rows(x, node)
    if picked(x.program, node):
        return None
    made = _moved(x, node)
    if any(index.dim() > 1 for index in indices):
        x.axes.shapes.append((node, made))
    return made


def _rows(x: Labeller, node: fx.Node) -> Labels | None:
    """What is picked of a table of experts: one that is no stack of matrices has units along its width."""
    table: Any = node.args[0]
    if x.program.values[table].dim() != 2:
        return None
    x.dead[node] = Dead.ZERO
    return along(x.weight(table, 1, None, node), -1, x.program.values[node].shape)


def _index_select_call(cut: Smaller, node: fx.Node, a: dict[str, Any]) -> Call:
    """Look up positions that are left along the axis."""
    labels = cut.labels.get(node.args[0])
    alive = None if labels is None else cut.alive_along(labels, a["dim"] % labels.dim())
    if alive is None or bool(alive.all()):
        return replaced(node)
    index = cut.program.values[a["index"]]
    left = (alive.long().cumsum(0) - 1)[index[alive[index]]]
    return Call(torch.ops.aten.index_select.default, (node.args[0], a["dim"], left))


@rule("index_select", call=_index_select_call)
def selected_by_index(x: Labeller, node: fx.Node, a: dict[str, Any]) -> Any:
    """Positions that an index names along one axis."""
    return indexed(x, node, a)


@rule(*_ON_FLOATS)
def moved_as_floats(x: Labeller, node: fx.Node, a: dict[str, Any]) -> Any:
    """Elements at other places, by operations that know floating-point numbers only."""
    if name_of(node) == "pad" and a.get("value"):
        x.dead[node] = max(x.dead[node], Dead.CONSTANT)
    _keep_places(x, node, a)
    made = _moved(x, node, floats=True)
    if name_of(node) == "pixel_shuffle":  # the places that become one channel go together
        x.axes.reduce(made, (made.dim() - 3,), "pixel_shuffle", node)
    if name_of(node) == "channel_shuffle":
        units = x.axes.reduce(made, (1,), "channel_shuffle", node).reshape(-1, a["groups"])
        x.axes.equal(units, units[:, :1], "channel_shuffle", node)
    return made


@rule("zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like")
def alike(x: Labeller, node: fx.Node, a: dict[str, Any]) -> Labels:
    """A new tensor of the shape of another one."""
    x.dead[node] = Dead.ZERO if name_of(node) == "zeros_like" else Dead.CONSTANT
    return x.labels(node.args[0])


@rule("new_ones", "new_full", "new_empty", "size", "sym_size", "_assert_tensor_metadata")
def shapes_only(x: Labeller, node: fx.Node, a: dict[str, Any]) -> None:
    """Nothing of the values is read."""


MOVING.update(COPIES, _MOVES, _VIEWS, SPLITS)
MOVING.update(("stack", "slice", "select", "index", "index_select", "gather", "roll", "unbind", "narrow"))
