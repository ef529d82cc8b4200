"""Weights that a network reads in another type than it keeps them in, such as those of routers in float32."""

from __future__ import annotations

from torch import Tensor, fx

from sparsereg.compression.units.program import Program, name_of

_CASTS = ("to", "_to_copy", "type_as", "float", "double", "half", "clone", "contiguous", "alias", "detach")
"""Operations that give the same numbers, of another type perhaps."""


def with_types_of_weights(program: Program) -> Program:
    """Let what reads a weight in another type read the weight itself, and note the type.

    Where a weight is read in several ways, casts that change something stay operations.

    Args:
        program: changed in place, and returned.
    """
    for node in list(program.calls):
        source = node.args[0] if node.args else None
        if isinstance(source, fx.Node) and source in program.weights and _is_cast(program, node, source):
            alone = all(_same_cast(program, node, user) for user in source.users)
            same = program.values[node].dtype is program.values[source].dtype
            if not (alone or same):
                continue
            if alone and name_of(node) in ("to", "_to_copy"):
                before = program.read_as.get(source, ())
                program.read_as[source] = (*before, program.values[node].dtype)
            for user in [u for u in source.users if _same_cast(program, node, u)] if alone else [node]:
                program.values[source] = program.values[user]
                user.replace_all_uses_with(source)
                program.graph.erase_node(user)
                del program.values[user]
    return program


def _is_cast(program: Program, node: fx.Node, source: fx.Node) -> bool:
    """Whether an operation gives the numbers of a matrix of weights, or of a kernel, in some type."""
    made, own = program.values[node], program.values[source]
    if name_of(node) not in _CASTS or not isinstance(made, Tensor) or not isinstance(own, Tensor):
        return False
    floats = made.is_floating_point() and own.is_floating_point()
    return floats and own.dim() > 0 and made.shape == own.shape and bool(node.users)


def _same_cast(program: Program, node: fx.Node, other: fx.Node) -> bool:
    """Whether two operations on a weight are casts to the same type."""
    if other.op != "call_function" or not isinstance(program.values[other], Tensor):
        return False
    alike = name_of(other) in _CASTS and other.args[0] is node.args[0] and bool(other.users)
    return alike and program.values[other].dtype is program.values[node].dtype
