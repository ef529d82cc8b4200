"""Weights that a network reads in another way than it keeps them.

In another type, as those of routers in float32, or plus a number, as in norms that multiply by 1 + weight.
"""

from __future__ import annotations

from torch import Tensor, fx

from sparsereg.compression.running import can_train
from sparsereg.compression.units.program import NUMBER, Program, bound, name_of

_CASTS = ("to", "_to_copy", "type_as", "float", "double", "half", "clone", "contiguous", "alias", "detach")
"""Operations that give the same numbers, of another type perhaps."""


def with_weights_as_read(program: Program) -> Program:
    """Let what reads a weight in another type, or plus a number, read the weight itself, and note which.

    Where a weight is read in several ways, operations that change something stay.

    Args:
        program: changed in place, and returned.
    """
    for node in list(program.calls):
        source = node.args[0] if node.args else None
        if isinstance(source, fx.Node) and source in program.weights and _is_way(program, node, source):
            alone = all(_same_way(program, node, user) for user in source.users)
            nothing = _added(node) is None and program.values[node].dtype is program.values[source].dtype
            if not (alone or nothing):
                continue
            added = _added(node)
            if alone and (added is not None or name_of(node) in ("to", "_to_copy")):
                way = program.values[node].dtype if added is None else added
                program.read_as[source] = (*program.read_as.get(source, ()), way)
                program.cast_by[source] = (*program.cast_by.get(source, ()), node.meta[NUMBER])
            for user in [u for u in source.users if _same_way(program, node, u)] if alone else [node]:
                program.values[source] = program.values[user]
                user.replace_all_uses_with(source)
                program.graph.erase_node(user)
                del program.values[user]
    return program


def _added(node: fx.Node) -> float | None:
    """The number that an operation adds to what it reads first; None if it does something else."""
    a = bound(node) if name_of(node) in ("add", "sub") else {}
    number = a.get("other")
    if not isinstance(number, int | float) or a.get("alpha") != 1:
        return None
    return float(number if name_of(node) == "add" else -number)


def _is_way(program: Program, node: fx.Node, source: fx.Node) -> bool:
    """Whether an operation gives the numbers of a weight in some type, or all of them plus a number."""
    made, own = program.values[node], program.values[source]
    if not isinstance(made, Tensor) or not isinstance(own, Tensor):
        return False
    if name_of(node) not in _CASTS and (_added(node) is None or not can_train(own)):
        return False
    floats = made.is_floating_point() and own.is_floating_point()
    return floats and own.dim() > 0 and made.shape == own.shape and bool(node.users)


def _same_way(program: Program, node: fx.Node, other: fx.Node) -> bool:
    """Whether two operations on a weight are casts to the same type, or add the same number."""
    if other.op != "call_function" or not isinstance(program.values[other], Tensor):
        return False
    alike = name_of(other) in _CASTS and name_of(node) in _CASTS
    alike |= _added(node) is not None and _added(other) == _added(node)
    alike = alike and other.args[0] is node.args[0] and bool(other.users)
    return alike and program.values[other].dtype is program.values[node].dtype
