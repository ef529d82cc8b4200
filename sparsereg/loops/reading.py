"""Examples of what a network reads: whether they fit, and what of a batch is like them."""

import inspect
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from sparsereg.compression.running import check_steady, evaluating, first_line
from sparsereg.compression.units.explain import inputs_of
from sparsereg.data.batches import LABELS, call, inputs_and_labels, moved, num_examples
from sparsereg.data.form import arguments_of
from sparsereg.errors import InputError

ROWS = 2
"""Examples of a batch that are enough to look at a network."""


def device_of(network: nn.Module) -> torch.device:
    """Where a network is: where its first parameter is."""
    return next((p.device for p in network.parameters()), torch.device("cpu"))


@contextmanager
def isolated() -> Iterator[None]:
    """Leave the generators of PyTorch, NumPy and Python as they are, whatever is drawn meanwhile."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def check_example(network: nn.Module, example: Any) -> Any:
    """Call a network twice in eval mode, without gradients, and return the example where the network is.

    Args:
        network: left as it is, modes and noise included.
        example: one batch as it takes it: a tensor, a tuple of inputs, or a dictionary of inputs by name.

    Raises:
        InputError: it cannot be called with the example, or answers differently the second time.
    """
    inputs_of(example)
    example = moved(tuple(example) if isinstance(example, list) else example, device_of(network))
    name = type(network).__name__
    try:
        with isolated(), evaluating(network):
            first, second = call(network, example), call(network, example)
    except Exception as error:
        raise InputError(
            f"{name} cannot be called with this example ({described(example)}): {first_line(error)}; give one"
            " batch as its forward takes it: a tensor, a tuple of inputs, or a dictionary of inputs by name"
        ) from error
    check_steady(network, first, second)
    return example


def described(example: Any) -> str:
    """What an example is made of, for messages: types and shapes."""
    if isinstance(example, Mapping):
        return ", ".join(f"{name}: {described(value)}" for name, value in example.items())
    if isinstance(example, tuple | list):
        return ", ".join(described(value) for value in example)
    if isinstance(example, Tensor):
        return f"{str(example.dtype).removeprefix('torch.')} {tuple(example.shape)}"
    return type(example).__name__


def few(network: nn.Module, inputs: Any) -> Any:
    """Return the first examples of a batch, or the whole where the network takes no part of it.

    Args:
        network: that reads it.
        inputs: as the network takes them.
    """
    size = num_examples(inputs)
    part = tree_map(lambda x: x[:ROWS] if isinstance(x, Tensor) and x.dim() and len(x) == size else x, inputs)
    try:
        with isolated(), evaluating(network):
            call(network, part)
    except Exception:
        return inputs
    return part


def as_inputs(network: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Return arguments of a call as one example: a tensor, a tuple, or a dictionary by name.

    Args:
        network: that was called.
        args: positional ones.
        kwargs: those by name.

    Raises:
        InputError: no tensor is among them.
    """
    if not any(isinstance(x, Tensor) for x in tree_leaves((args, dict(kwargs)))):
        raise InputError(f"{type(network).__name__} is called without a tensor: give example=...")
    if args and kwargs:
        kwargs, args = inspect.signature(network.forward).bind(*args, **kwargs).arguments, ()
    if kwargs:
        return {name: value for name, value in kwargs.items() if value is not None}
    return args[0] if len(args) == 1 and isinstance(args[0], Tensor) else args


def by_rule(network: nn.Module, batch: Any) -> Any:
    """Return what a network reads of a batch: the first of a list or tuple; of a dictionary what it knows.

    Args:
        network: that reads it; its forward says which names it knows.
        batch: of a loader.

    Raises:
        InputError: it is something else.
    """
    if isinstance(batch, Mapping):
        known = arguments_of(network)
        names = [n for n in batch if n not in LABELS and (known is None or n in known)]
        if names:
            return {name: batch[name] for name in names}
    if isinstance(batch, list | tuple) and batch and isinstance(batch[0], Tensor | Mapping):
        return batch[0]
    if isinstance(batch, Tensor):
        return inputs_and_labels(batch)[0]
    raise InputError(
        f"what {type(network).__name__} reads of a batch is not clear ({described(batch)}): give"
        " example=..., one batch as its forward takes it"
    )


def like(example: Any, batch: Any) -> Any:
    """Return what of a batch is what an example is of: the same names, or as many first parts.

    Args:
        example: a tensor, a tuple of inputs, or a dictionary of inputs by name.
        batch: the same, perhaps with labels behind.

    Raises:
        InputError: the batch has not got what the example has.
    """
    try:
        if isinstance(example, Mapping):
            return {name: batch[name] for name in example}
        if isinstance(example, tuple):
            return tuple(batch[: len(example)])
        return batch if isinstance(batch, Tensor) else batch[0]
    except (TypeError, KeyError, IndexError, ValueError) as error:
        raise InputError(
            f"a batch ({described(batch)}) has not got what the example has ({described(example)})"
        ) from error
