"""Tensors whose positions an index adds to, or writes over, as messages that nodes of a graph sum up."""

from __future__ import annotations

from typing import Any

from torch import fx

from sparsereg.compression.units.labels import Labels, varying
from sparsereg.compression.units.program import Call, Program, Selected, name_of
from sparsereg.compression.units.rules.elementwise import pair, start_as
from sparsereg.compression.units.rules.table import Dead, Labeller, Smaller, replaced, rule


def _element_call(cut: Smaller, node: fx.Node, a: dict[str, Any]) -> Call:
    """An index of elements, for what is left of these."""
    labels, index = cut.labels[node], a["index"]
    own = cut.labels.get(index)
    for axis in sorted(varying(labels)):
        alive = cut.alive_along(labels, axis)
        if bool(alive.all()) or (own is not None and not bool(cut.alive_along(own, axis).all())):
            continue
        index = Selected(index, axis, alive.nonzero().flatten())
    return replaced(node, index=index)


def _narrow(program: Program, mask: fx.Node) -> fx.Node | None:
    """The mask that is repeated along the last axis to give a mask; None if it may differ along it."""
    while program.values[mask].dim() == 0 or program.values[mask].shape[-1] != 1:
        if name_of(mask) not in ("expand", "expand_as", "to", "_to_copy", "clone", "contiguous", "alias"):
            return None
        mask = mask.args[0]  # type: ignore[assignment]
        if mask.op != "call_function":
            return None
    return mask


def _mask_call(cut: Smaller, node: fx.Node, a: dict[str, Any]) -> Call:
    return replaced(node, mask=_narrow(cut.program, a["mask"]))


@rule("masked_scatter", call=_mask_call)
def filled_in(x: Labeller, node: fx.Node, a: dict[str, Any]) -> Labels:
    """Vectors of one tensor in places of another's, as those of images among those of tokens."""
    labels = x.labels(a["self"])
    last, shape = labels.dim() - 1, labels.shape
    parts = [labels, x.labels(a["source"])]
    if any(varying(part) - {part.dim() - 1} or part.shape[-1] != shape[-1] for part in parts):
        raise NotImplementedError("units lie along other axes than the last one")
    if _narrow(x.program, a["mask"]) is None:
        raise NotImplementedError("the mask may differ along the units")
    start_as(x, a["self"], parts[1].reshape(-1, shape[-1])[:1].expand(shape))
    lines = [x.labels(a[key]).reshape(-1, shape[-1])[0] for key in ("self", "source")]
    zero = all(
        x.dead.get(a[key], Dead.ZERO) is Dead.ZERO and x.has_units(a[key]) for key in ("self", "source")
    )
    x.dead[node] = Dead.ZERO if zero else Dead.ANYTHING
    return pair(x, node, lines).view(*(1,) * last, -1).expand(shape)


@rule("index_add", "index_copy")
@rule("scatter", "scatter_add", "scatter_reduce", call=_element_call)
def added(x: Labeller, node: fx.Node, a: dict[str, Any]) -> Labels:
    """Units along other axes, of what is added and what it is added to; along that of the index all stays."""
    into, source = a["self"], a.get("src", a.get("source"))
    if not isinstance(source, fx.Node):
        raise NotImplementedError("a number is written")
    shape = x.program.values[node].shape
    dim = a["dim"] % len(shape)
    labels = [x.labels(into), x.labels(source)]
    if any(dim in varying(part) for part in labels) or labels[0].dim() != labels[1].dim():
        raise NotImplementedError("units lie along the axis of the index")
    elements = name_of(node).startswith("scatter")
    if elements and any(p.shape[d] != shape[d] for p in labels for d in range(len(shape)) if d != dim):
        raise NotImplementedError("some of the positions are left as they are")
    start_as(x, into, labels[1].narrow(dim, 0, 1).expand(x.program.values[into].shape))
    labels[0] = x.labels(into)
    made = pair(x, node, [part.narrow(dim, 0, 1) for part in labels])
    zero = all(x.dead.get(part, Dead.ZERO) is Dead.ZERO and x.has_units(part) for part in (into, source))
    x.dead[node] = Dead.ZERO if zero else Dead.ANYTHING
    return made.expand(shape)
