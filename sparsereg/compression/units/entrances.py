"""Where the features of a network's inputs are read: columns of the data that might be left out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, fx

from sparsereg.compression.units.program import Program, name_of

_MOVES = """
    view reshape _unsafe_view flatten permute transpose contiguous to _to_copy unflatten movedim squeeze
""".split()  # noqa: SIM905
"""What may stand between an input and the tensor whose features are read."""
_LAST = ("linear", "addmm", "matmul", "mm", "lstm", "gru", "rnn_tanh", "rnn_relu")
"""Operations that read the last axis."""


@dataclass(frozen=True)
class Entrance:
    """A tensor of features.

    Attributes:
        source: the input that it comes from.
        node: the input itself, or what views and moves make of it.
        axis: along which the features lie.
    """

    source: fx.Node
    node: fx.Node
    axis: int


def entrances(program: Program) -> Iterator[Entrance]:
    """The inputs whose features a layer reads one by one, with the place where it does."""
    for source in program.inputs:
        value = program.values[source]
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.dim() < 2:
            continue
        node = source
        while len(node.users) == 1 and name_of(next(iter(node.users))).rstrip("_") in _MOVES:
            node = next(iter(node.users))
        axis = _axis(program, node)
        if axis:
            yield Entrance(source, node, axis)


def _axis(program: Program, start: fx.Node) -> int | None:
    """The axis along which the first layer behind a tensor reads it; None if none does as it lies."""
    shape = program.values[start].shape
    waiting, seen = [start], {start}
    while waiting:
        node = waiting.pop(0)
        for user in node.users:
            name = name_of(user) if user.op == "call_function" else ""
            if name in _LAST:
                return len(shape) - 1
            if name.startswith("conv"):
                return 1
            value = program.values.get(user)
            if isinstance(value, Tensor) and value.shape == shape and user not in seen:
                seen.add(user)
                waiting.append(user)
    return None
