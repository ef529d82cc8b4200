"""Inputs without labels, from whatever a user has: a tensor, an array, batches, a Dataset, a DataLoader."""

from __future__ import annotations

import inspect
import itertools
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

from sparsereg.checks import check_count
from sparsereg.compression.running import evaluating, first_line
from sparsereg.compression.units.explain import inputs_of
from sparsereg.data.batches import LABELS
from sparsereg.errors import InputError

log = logging.getLogger(__name__)

BATCH = 64
"""Inputs of one step."""


def read_inputs(model: nn.Module, data: Any, num_inputs: int, batch_size: int) -> list[Any]:
    """Take inputs from data, without labels, where the network is.

    Args:
        model: that reads them.
        data: a tensor, a tuple of positional inputs or a dictionary of inputs by name; or a DataLoader, a
            list or any iterable of such batches; or a Dataset. NumPy arrays may stand for tensors. What is
            more than the arguments that the network cannot do without is left out, and so are labels by name.
        num_inputs: how many at most; of a tensor or a dataset that holds more, evenly spread over it.
        batch_size: of the batches that are returned, at most.

    Returns:
        Batches as ``sparsereg.compression.compact`` takes an example.

    Raises:
        InputError: there are none, or one is of another kind.
        ValueError: no inputs are to be used.
    """
    check_count("num_inputs", num_inputs)
    data = _spread(_as_loader(_as_tensors(model, data), batch_size), num_inputs)
    place = next((p.device for p in model.parameters()), torch.device("cpu"))
    found: list[Any] = []
    left = num_inputs
    for batch in [data] if _is_batch(model, data) else _iterated(data):
        inputs = torch.utils._pytree.tree_map(
            lambda x: x.to(place) if isinstance(x, Tensor) else x,
            _without_labels(model, _as_tensors(model, batch)),
        )
        if not found:
            _say_what_is_left_out(model, batch)
        size = examples(inputs)
        for start in range(0, min(size, left), batch_size):
            found.append(_part(inputs, size, start, min(start + batch_size, size, left)))
        left -= min(size, left)
        if left <= 0:
            break
    if not found:
        raise InputError("there are no inputs in the data: give a tensor, batches, or a DataLoader of some")
    _check_like_the_first(model, found)
    return found


@torch.no_grad()
def _check_like_the_first(model: nn.Module, batches: Sequence[Any]) -> None:
    """Raise an InputError if the network takes no batch of other shapes or types than the first one has.

    The first one is the example, which is looked at by whoever reads these batches.
    """
    known = {_form(batches[0])}
    for place, batch in enumerate(batches):
        if (form := _form(batch)) in known:
            continue
        known.add(form)
        args, kwargs = inputs_of(_part(batch, examples(batch), 0, 1))
        try:
            with evaluating(model):
                model(*args, **kwargs)
        except Exception as error:  # of all kinds, from the network
            raise InputError(
                f"data: {type(model).__name__} does not take batch {place}, whose shapes or types are not"
                f" those of batch 0: {first_line(error)}"
            ) from error


def _form(batch: Any) -> tuple[Any, ...]:
    """What a network could refuse about a batch: shapes and types but for the number of examples."""
    leaves, structure = torch.utils._pytree.tree_flatten(batch)
    shapes = ((tuple(x.shape[1:]), x.dtype) if isinstance(x, Tensor) else type(x) for x in leaves)
    return (str(structure), *shapes)


PART = 8
"""Fewest examples of a part of a batch: the answers' spread is known from so many."""
AT_ONCE, NUMBERS = 512, 2**17
"""Examples, and numbers in them, up to which small batches are put together."""


def together(batches: Sequence[Any]) -> list[Any]:
    """Put batches of small images or vectors together, so that less is spent on calling operations.

    Batches of anything else, such as tokens, whose inner states are wide, stay as they are.
    """
    found: list[Any] = []
    for batch in batches:
        both = (found[-1], batch) if found else ()
        small = all(isinstance(x, Tensor) and x.is_floating_point() and x.dim() > 1 for x in (*both, batch))
        if both and small and _fit(*both):
            found[-1] = torch.cat(both)
        else:
            found.append(batch)
    return found


def _fit(a: Tensor, b: Tensor) -> bool:
    """Whether two batches are small enough to be one."""
    alike = a.shape[1:] == b.shape[1:] and a.dtype == b.dtype
    return alike and len(a) + len(b) <= AT_ONCE and a.numel() + b.numel() <= NUMBERS


def _spread(data: Any, num_inputs: int) -> Any:
    """Some examples of data that hold more, from the first to the last: many are sorted by class."""
    if isinstance(data, Tensor) and data.dim() and len(data) > num_inputs:
        return data[_evenly(len(data), num_inputs)]
    if not isinstance(data, DataLoader) or data.batch_size is None:
        return data
    dataset: Any = data.dataset
    if isinstance(dataset, IterableDataset) or len(dataset) <= num_inputs:
        return data
    some = Subset(dataset, _evenly(len(dataset), num_inputs).tolist())
    return DataLoader(some, data.batch_size, collate_fn=data.collate_fn)


def some_of(batches: Sequence[Any], wanted: int) -> list[Any]:
    """Batches of about the same size that hold so many examples, or all; they lie evenly among them."""
    number = min(len(batches), math.ceil(wanted / max(1, examples(batches[0]))))
    return [batches[i] for i in _evenly(len(batches), number).tolist()]


def _evenly(size: int, number: int) -> Tensor:
    return torch.arange(number) * size // number


def examples(inputs: Any) -> int:
    """Number of examples of a batch: the first size of its first tensor."""
    leaves = [x for x in torch.utils._pytree.tree_leaves(inputs) if isinstance(x, Tensor) and x.dim()]
    return int(leaves[0].shape[0]) if leaves else 0


def split(inputs: Any, parts: int) -> list[Any]:
    """A batch in so many parts, fewer where these had less than ``PART`` examples."""
    size = examples(inputs)
    parts = max(1, min(parts, size // PART))
    ends = [size * i // parts for i in range(parts + 1)]
    return [_part(inputs, size, *pair) for pair in itertools.pairwise(ends)] if parts > 1 else [inputs]


def _as_tensors(model: nn.Module, data: Any) -> Any:
    """Data with tensors for arrays; those of double precision, NumPy's default, get that of the weights."""
    real = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.get_default_dtype())

    def tensor(x: Any) -> Any:
        if not isinstance(x, np.ndarray) or x.dtype.kind not in "biuf":
            return x
        made = torch.as_tensor(x)
        return made.to(real) if made.dtype == torch.float64 else made

    known = isinstance(data, np.ndarray | Mapping | tuple | list)
    return torch.utils._pytree.tree_map(tensor, data) if known else data


def _as_loader(data: Any, batch_size: int) -> Any:
    return DataLoader(data, batch_size) if isinstance(data, Dataset) else data


def _is_batch(model: nn.Module, data: Any) -> bool:
    """Whether data are one batch: of a list only where its tensors could not be batches of their own."""
    if isinstance(data, tuple):
        return any(isinstance(x, Tensor) for x in data)
    if not isinstance(data, list) or len(data) < 2 or not all(isinstance(x, Tensor) for x in data):
        return isinstance(data, Tensor | Mapping)
    return _required(model) > 1 or len({(x.dim(), x.dtype) for x in data}) > 1


def _iterated(data: Any) -> Iterator[Any]:
    if isinstance(data, str) or not isinstance(data, Iterable):
        raise InputError(
            "data: expected a tensor, an array, batches, a Dataset or a DataLoader,"
            f" got a {type(data).__name__}"
        )
    return iter(data)


def _without_labels(model: nn.Module, batch: Any) -> Any:
    """What of a batch the network reads."""
    if isinstance(batch, Tensor):
        return batch
    if isinstance(batch, Mapping):
        return {k: v for k, v in batch.items() if k not in LABELS}
    if not isinstance(batch, tuple | list) or not batch:
        raise InputError(f"data: expected batches of tensors or arrays, got a {type(batch).__name__}")
    if not isinstance(batch[0], Tensor):
        return _without_labels(model, batch[0])
    taken = tuple(batch[: max(1, _required(model))])
    return taken if len(taken) > 1 else taken[0]


def _say_what_is_left_out(model: nn.Module, batch: Any) -> None:
    """Say so where what is taken for labels, although labels of classes are integers, may be an input."""
    taken = max(1, _required(model))
    if not isinstance(batch, tuple | list) or len(batch) <= taken or len(_positional(model)) <= taken:
        return
    if isinstance(batch[0], Tensor) and isinstance(batch[taken], Tensor) and batch[taken].is_floating_point():
        log.warning(
            "data: of each batch the first %d of %d parts are read, what follows is taken for labels; if it"
            " is %s of forward, give batches that are dictionaries of inputs by name",
            taken,
            len(batch),
            _positional(model)[taken].name,
        )


def _required(model: nn.Module) -> int:
    """Positional inputs that a network cannot do without."""
    return sum(p.default is p.empty for p in _positional(model))


def _positional(model: nn.Module) -> list[inspect.Parameter]:
    parameters = inspect.signature(model.forward).parameters.values()
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [p for p in parameters if p.kind in kinds]


def _part(inputs: Any, size: int, start: int, end: int) -> Any:
    def cut(x: Any) -> Any:
        return x[start:end] if isinstance(x, Tensor) and x.dim() and x.shape[0] == size else x

    return torch.utils._pytree.tree_map(cut, inputs)
