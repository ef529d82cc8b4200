"""What recurrent operations return, without their steps.

PyTorch finds the shape that an operation would make by running it on tensors without numbers, and a recurrent
layer step by step: a quarter of a minute for a GRU over 256 steps, and only for that number of steps.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._decomp import decomposition_table

_KEY = torch._C.DispatchKey.CompositeImplicitAutograd


def _states(x: Tensor, states: Sequence[Tensor], bidirectional: bool) -> tuple[Tensor, ...]:
    """Outputs of all steps and last states of a layer that starts from these."""
    width = states[0].shape[-1] * (2 if bidirectional else 1)
    return x.new_empty((*x.shape[:-1], width)), *(torch.empty_like(s) for s in states)


def _lstm(x: Tensor, states: Sequence[Tensor], *rest: Any) -> tuple[Tensor, ...]:
    """As ``aten.lstm.input``."""
    return _states(x, states, rest[5])


def _recurrent(x: Tensor, state: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """As ``aten.gru.input``, ``aten.rnn_tanh.input`` and ``aten.rnn_relu.input``."""
    return _states(x, [state], rest[5])


_SHAPES = {
    torch.ops.aten.lstm.input: _lstm,
    torch.ops.aten.gru.input: _recurrent,
    torch.ops.aten.rnn_tanh.input: _recurrent,
    torch.ops.aten.rnn_relu.input: _recurrent,
}


@contextmanager
def recurrent_in_one() -> Iterator[None]:
    """While it holds, recurrent layers are traced as one operation each, over any number of steps.

    For tracing only: an operation that runs on numbers meanwhile may be given none.
    """
    with ExitStack() as stack:
        for op, shapes in _SHAPES.items():
            stack.enter_context(_replaced(op.py_kernels, _KEY, shapes))
            stack.enter_context(_replaced(decomposition_table, op, shapes))
        yield


@contextmanager
def _replaced(table: dict[Any, Any], key: Any, value: Any) -> Iterator[None]:
    before = table.get(key)
    table[key] = value
    try:
        yield
    finally:
        del table[key]
        if before is not None:
            table[key] = before
