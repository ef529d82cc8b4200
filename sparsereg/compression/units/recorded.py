"""The operations of a network as it runs, in the place of a trace where only their being the same counts."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from sparsereg.compression.running import evaluating
from sparsereg.errors import InputError

Inputs = tuple[tuple[Any, ...], Mapping[str, Any]]
"""Positional ones, and by name."""
SMALL = 2**20
"""Numbers of an input, no volume, up to which operations are computed: of larger ones that takes longer."""


def same_calls(model: nn.Module, one: Inputs, other: Inputs) -> bool:
    """Whether a network calls the same operations with the same numbers on inputs of other sizes.

    It runs on both, on large inputs without computing, which takes a small part of the time of two traces.
    Operations are the innermost ones, which are told more sizes than those of a trace are: where it says no,
    a trace may still say yes.

    Args:
        model: in any mode.
        one: inputs that it takes.
        other: those of other sizes.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        >>> maps = [((torch.ones(2, 1, n, n),), {}) for n in (4, 6)]
        >>> same_calls(net, *maps), same_calls(net[2], *maps)
        (True, False)
    """
    small = all(x.dim() < 5 and x.numel() <= SMALL for x in _tensors((one, other)))
    try:
        first, second = (_calls(model, *inputs, computed=small) for inputs in (one, other))
    except Exception:  # of all kinds, of a network that does not take them, or whose path depends on numbers
        return False
    return len(first) == len(second) and all(map(_same, first, second))


def _calls(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], computed: bool
) -> list[list[Any]]:
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    given = args, dict(kwargs)
    if not computed:
        given = torch.utils._pytree.tree_map_only(Tensor, fake.from_tensor, given)
    record = _Recording((model.state_dict(), given))
    with evaluating(model), nullcontext() if computed else fake, record:
        model(*given[0], **given[1])
    return record.calls


class _Recording(TorchDispatchMode):
    """Keeps each operation that is called, with all that it is told but tensors that are known or computed.

    Args:
        known: what holds tensors that are known.
    """

    def __init__(self, known: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[list[Any]] = []
        self._known: dict[int, Tensor] = {}  # by their memory, which is theirs as long as they are here
        self._keep(known)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and keep it."""
        if func is torch.ops.aten._local_scalar_dense.default:
            raise InputError("its path depends on numbers")
        told = torch.utils._pytree.tree_leaves((args, kwargs))
        self.calls.append([func, *(None if self._knows(x) else x for x in told)])
        result = func(*args, **(kwargs or {}))
        self._keep(result)
        return result

    def _keep(self, tree: Any) -> None:
        real = (x for x in _tensors(tree) if not isinstance(x, FakeTensor))
        self._known |= {x.untyped_storage().data_ptr(): x for x in real}

    def _knows(self, x: Any) -> bool:
        real = isinstance(x, Tensor) and not isinstance(x, FakeTensor)
        return isinstance(x, FakeTensor) or (real and x.untyped_storage().data_ptr() in self._known)


def _tensors(tree: Any) -> list[Tensor]:
    return [x for x in torch.utils._pytree.tree_leaves(tree) if isinstance(x, Tensor)]


def _same(one: list[Any], other: list[Any]) -> bool:
    """Whether two operations are told the same; numbers may have been written into tensors."""
    return len(one) == len(other) and all(map(_equal, one, other))


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
    return type(a) is type(b) and bool(a == b)
