"""Where the features of a network's inputs are read: columns of the data that might be left out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
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
        node: the input itself, or what views and moves make of it, or what is picked of that.
        axis: along which the features lie.
        picked: which features the places along the axis are, where some are picked.
        of: how many features there are.
    """

    source: fx.Node
    node: fx.Node
    axis: int
    picked: Tensor | None = None
    of: int = 0

    def unread(self, alive: NDArray[np.bool_]) -> list[int]:
        """The features of the input that nothing reads when only some places along the axis are left."""
        places = np.arange(self.of) if self.picked is None else self.picked.cpu().numpy()
        found: list[int] = np.setdiff1d(np.arange(self.of), places[alive]).tolist()
        return found


def entrances(program: Program) -> Iterator[Entrance]:
    """The inputs whose features a layer reads one by one, with the place where it does."""
    for source in program.inputs:
        value = program.values[source]
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.dim() < 2:
            continue
        node, after = source, _only_user(source)
        while after is not None and name_of(after).rstrip("_") in _MOVES:
            node, after = after, _only_user(after)
        of, picked = program.values[node].shape, None
        if after is not None and name_of(after) == "index_select":
            node, picked = after, program.weights.get(after.args[2])  # type: ignore[arg-type]
        axis = axis_of_features(program, node)
        if axis and (node is not after or (picked is not None and node.args[1] == axis)):
            yield Entrance(source, node, axis, picked, of[axis])


def _only_user(node: fx.Node) -> fx.Node | None:
    """The operation that alone reads what a node gives, but for its sizes."""
    users = [user for user in node.users if not name_of(user).startswith("sym_size")]
    return users[0] if len(users) == 1 else None


def axis_of_features(program: Program, start: fx.Node) -> int | None:
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
