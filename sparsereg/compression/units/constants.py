"""Vectors that a network computes from nothing but numbers, such as the frequencies of rotary positions.

Where they lie along places that can go, as those in the vectors of heads, they lose what is lost there. They
are computed as before, of any type and on any device, and then picked from.
"""

from __future__ import annotations

from torch import Tensor, fx

from sparsereg.compression.units.program import Program
from sparsereg.compression.units.rules.table import Labeller


def labelled(program: Program, inputs: bool = False, even: bool = False) -> Labeller:
    """Label a program; places of computed vectors, or zeros, are units only where something would stay else.

    Args:
        program: the network.
        inputs: whether features of the inputs are units, too.
        even: whether the groups of a norm lose the same places.
    """
    found = Labeller(program, inputs, even=even)
    known = vectors(program) if found.met_without_units else set()
    again = known or found.found_starts
    return Labeller(program, inputs, known, even, found.found_starts) if again else found


def vectors(program: Program) -> set[fx.Node]:
    """The last operations that give vectors of numbers, which are the last axis of what comes of them."""
    depends = set(program.inputs) | set(program.weights)
    found: dict[fx.Node, int] = {}
    for node in program.calls:
        if any(source in depends for source in node.all_input_nodes):
            depends.add(node)
            continue
        size = _length(program, node)
        if size is not None:
            found[node] = size
    return {
        node
        for node, size in found.items()
        if any(user not in found and _last(program, user) == size for user in node.users)
    }


def _length(program: Program, node: fx.Node) -> int | None:
    """The length of a vector of floating-point numbers; None for anything else."""
    value = program.values.get(node)
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.dim() < 1:
        return None
    return int(value.shape[-1]) if value.numel() == value.shape[-1] > 1 else None


def _last(program: Program, node: fx.Node) -> int | None:
    value = program.values.get(node)
    return int(value.shape[-1]) if isinstance(value, Tensor) and value.dim() else None
