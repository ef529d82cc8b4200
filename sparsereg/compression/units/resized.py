"""The trace of a network of other sizes, made from that of one which runs the same operations."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, fx

from sparsereg.compression.alike import Told, place_of_sizes
from sparsereg.compression.units.program import Program


def with_sizes(program: Program, told: Told) -> Program:
    """A copy of a program whose operations are told other sizes; what they give is still to be found.

    Args:
        program: left as it is.
        told: what those of its operations that are told sizes are told in the copy, in order.
    """
    graph, place = fx.Graph(), dict[fx.Node, fx.Node]()
    left = iter(told)
    for node in program.graph.nodes:
        made = place[node] = graph.node_copy(node, place.__getitem__)
        at = place_of_sizes(node)
        if at is not None and at < len(node.args):
            own: Any = made.args[at]
            _, sizes = next(left)
            now = [old if new is None else new for old, new in zip(own, sizes, strict=True)]
            made.args = (*made.args[:at], now, *made.args[at + 1 :])
    return dataclasses.replace(
        program,
        graph=graph,
        weights={place[node]: value for node, value in program.weights.items()},
        names={place[node]: name for node, name in program.names.items()},
        parameters={place[node] for node in program.parameters},
        inputs=[place[node] for node in program.inputs],
        constants=frozenset(place[node] for node in program.constants),
        read_as={place[node]: types for node, types in program.read_as.items()},
        cast_by={place[node]: numbers for node, numbers in program.cast_by.items()},
        values={},
    )


def tell_sizes_(program: Program, before: Program) -> bool:
    """Let a copy know the sizes of its own tensors in place of those of the program that it was made from.

    Args:
        program: the copy, run on its example.
        before: what it was made from.

    Returns:
        False where a size that follows the inputs' is another one than before, so that it is not known.
    """
    for node, old in zip(program.graph.nodes, before.graph.nodes, strict=True):
        if "val" not in node.meta or node.op == "output":
            continue
        leaves, how = torch.utils._pytree.tree_flatten(node.meta["val"])
        now, known = (
            torch.utils._pytree.tree_leaves(p.values[n]) for p, n in ((program, node), (before, old))
        )
        if not len(leaves) == len(now) == len(known):
            return False
        found = [_sized(*own) for own in zip(leaves, now, known, strict=True)]
        if any(value is None for value in found):
            return False
        node.meta["val"] = torch.utils._pytree.tree_unflatten(found, how)
    return True


def _sized(value: Any, now: Any, before: Any) -> Any:
    """A tensor of a trace in the size that one has on the example; None where that is not known."""
    if not isinstance(value, Tensor):
        return value if now == before else None
    if now.shape == before.shape:
        return value
    if now.dim() != value.dim() or now.dtype != value.dtype:
        return None
    sizes = []
    for size, new, old in zip(value.shape, now.shape, before.shape, strict=True):
        if not isinstance(size, int) and new != old:
            return None
        sizes.append(new if isinstance(size, int) else size)
    return value.new_empty(sizes)
