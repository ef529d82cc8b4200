"""Which types that a trace has written down follow the type of the weights, as in ``x.to(y.dtype)``.

A trace in float32 says float32 there, and likewise where the network itself says so. A trace of the same
network in another type tells one from the other, so that a smaller network can change its type as well.
"""

from __future__ import annotations

import collections
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from sparsereg.compression.running import copied
from sparsereg.compression.units.program import NUMBER, Program, name_of, op_name
from sparsereg.compression.units.tracing import exported_anew

CASTS = ("to", "_to_copy")
"""Operations that give the same numbers in a type that they say."""
Place = int | str
"""An operation by its number in the trace, or a weight or an input by its name."""
Casts = tuple[torch.dtype | None, ...]


@dataclass(frozen=True)
class Precision:
    """What a network does with types.

    Attributes:
        own: the type of its weights.
        following: numbers of the operations whose type is that of the weights, in the order of the trace.
        reads: for an operation and what it reads by the trace, what it reads where the weights are of another
            type: a trace takes what a cast leaves as it is for what was cast. With the types to which that
            goes before; None: that of the weights.
    """

    own: torch.dtype
    following: frozenset[int]
    reads: Mapping[tuple[int, Place], tuple[Place, Casts]]


def precision_of(model: nn.Module, program: Program, args: Any, kwargs: Any) -> Precision | None:
    """Find out which types follow the weights; None if none is written down, or it cannot be found out.

    Args:
        model: without gates; left as it is.
        program: of it.
        args: positional inputs of an example.
        kwargs: inputs by name.
    """
    weights = [p for p in model.parameters() if p.is_floating_point()]
    if len({p.dtype for p in weights}) != 1 or not _says(program, weights[0].dtype):
        return None
    own = weights[0].dtype
    known = _written(model, program) if isinstance(model, fx.GraphModule) else None
    if known is not None:
        return Precision(own, known, {})
    other = torch.float32 if own is torch.bfloat16 else torch.bfloat16
    cast = {id(t): _in(t, own, other) for t in (*model.parameters(), *model.buffers())}
    given = torch.utils._pytree.tree_map(lambda x: _in(x, own, other), (args, dict(kwargs)))
    graph = exported_anew(copied(model, cast), *given)
    return None if graph is None else _compared(program.traced, graph, own, other)


def _says(program: Program, dtype: torch.dtype) -> bool:
    """Whether an operation, or what reads a weight, says a type."""
    said = [leaf for ways in program.read_as.values() for leaf in ways]
    for node in program.calls:
        said += torch.utils._pytree.tree_leaves((node.args, dict(node.kwargs)))
    return any(leaf is dtype for leaf in said)


def _written(network: fx.GraphModule, program: Program) -> frozenset[int] | None:
    """Which operations follow the weights, as a compacted network has it in its code already.

    Args:
        network: that was traced.
        program: of it.

    Returns:
        Their numbers; None where its operations are not those of the trace, one by one: another trace tells.
    """
    types = {n for n in network.graph.nodes if n.target is getattr and n.args[1:] == ("dtype",)}
    ops = [n for n in network.graph.nodes if isinstance(n.target, torch._ops.OpOverload)]
    say = {op_name(n.target) for n in ops if _is_told(n, types)}
    told = {op_name(n.target) for n in program.calls if _is_told(n, ())}
    if not types or told - say:
        return None
    own = [n for n in ops if op_name(n.target) in say]
    numbers = [i for i, (name, _) in enumerate(program.traced) if name in say]
    if [op_name(n.target) for n in own] != [program.traced[i][0] for i in numbers]:
        return None
    read = collections.Counter(place for _, places in program.traced for place in set(places))
    # A cast that nothing reads in the trace is one that changed nothing there.
    if any(len(n.users) != read[i] for n, i in zip(own, numbers, strict=True)):
        return None
    return frozenset(i for n, i in zip(own, numbers, strict=True) if not types.isdisjoint(n.all_input_nodes))


def _is_told(node: fx.Node, types: Collection[fx.Node]) -> bool:
    """Whether an operation is told a type, or reads one that is that of a weight."""
    leaves = torch.utils._pytree.tree_leaves((node.args, dict(node.kwargs)))
    return any(isinstance(leaf, torch.dtype) or leaf in types for leaf in leaves)


def _in(x: Any, own: torch.dtype, other: torch.dtype) -> Any:
    """A tensor of the network's own type in another one."""
    if not isinstance(x, Tensor) or x.dtype is not own:
        return x
    made = x.detach().to(other)
    return nn.Parameter(made, x.requires_grad) if isinstance(x, nn.Parameter) else made


def place_in_trace(node: fx.Node) -> Place:
    """What a node of a trace is known by."""
    place: Place = node.meta.get(NUMBER, node.name)
    return place


def sources(node: fx.Node) -> list[fx.Node]:
    """What an operation reads, in the order of its arguments, each as often as it is read."""
    found: list[fx.Node] = []
    fx.node.map_arg((node.args, dict(node.kwargs)), found.append)
    return found


def _compared(
    traced: list[tuple[str, list[Place]]], graph: fx.Graph, own: torch.dtype, other: torch.dtype
) -> Precision | None:
    """What two traces say, the second of which may go to other types more often."""
    number = 0
    more: dict[fx.Node, torch.dtype | None] = {}
    following: set[int] = set()
    reads: dict[tuple[int, Place], tuple[Place, Casts]] = {}
    twice: set[tuple[int, Place]] = set()
    for node in (n for n in graph.nodes if n.op in ("call_function", "output")):
        leaves = torch.utils._pytree.tree_leaves((node.args, dict(node.kwargs)))
        types = [leaf for leaf in leaves if isinstance(leaf, torch.dtype)]
        if number < len(traced) and traced[number][0] == name_of(node):
            node.meta[NUMBER] = number
            following |= {number} if other in types else set()
            for known, source in zip(traced[number][1], sources(node), strict=True):
                read = _without(source, more)
                twice |= {(number, known)} if reads.get((number, known), read) != read else set()
                reads[number, known] = read
            number += 1
        elif name_of(node) in CASTS and len(types) == 1:
            more[node] = None if types[0] is other else types[0]
        else:
            return None
    otherwise = {at: r for at, r in reads.items() if r != (at[1], ()) and at not in twice}
    return Precision(own, frozenset(following), otherwise) if number == len(traced) else None


def _without(source: Any, more: Mapping[fx.Node, torch.dtype | None]) -> tuple[Place, Casts]:
    """What is read through casts that the first trace has not got, and these."""
    casts: Casts = ()
    while source in more:
        casts, source = (more[source], *casts), source.args[0]
    return place_in_trace(source), casts
