"""Batches of any kind: which part a network reads, which part it is to answer."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

LABELS = ("labels", "label", "targets", "target")
"""Names that labels have in batches that are dictionaries; the first that is there counts."""

ANSWERS = ("logits", "out", "last_hidden_state")
"""What of an answer that is a dictionary counts: the first of these that it has."""


def inputs_and_labels(batch: Any) -> tuple[Any, Any]:
    """Divide a batch into what the network reads and what it is to answer; None where there are no labels.

    A pair is (inputs, labels); in a dictionary labels have one of the names ``LABELS`` and all else is
    input.

    Args:
        batch: of a loader.

    Raises:
        TypeError: it is neither, nor a single tensor.

    Example:
        >>> inputs_and_labels({"input_ids": 1, "labels": 2})
        ({'input_ids': 1}, 2)
    """
    if isinstance(batch, Mapping):
        name = next((name for name in LABELS if name in batch), None)
        inputs = {key: value for key, value in batch.items() if key not in LABELS}
        return inputs, None if name is None else batch[name]
    if isinstance(batch, list | tuple) and len(batch) == 2:
        return batch[0], batch[1]
    if isinstance(batch, Tensor):
        return batch, None
    length = f" of length {len(batch)}" if isinstance(batch, list | tuple) else ""
    raise TypeError(
        f"expected batches (inputs, labels) or dictionaries of tensors, got a {type(batch).__name__}{length}"
    )


def tensor_of(answer: Any) -> Any:
    """Return the part of an answer that counts.

    That is the answer itself, its ``logits`` or ``out`` (Hugging Face, torchvision's segmentation networks),
    the only part of a dictionary or the first of a tuple.

    Args:
        answer: of a network.

    Raises:
        TypeError: none of several parts of a dictionary is known to count.

    Example:
        >>> tensor_of({"out": 1, "aux": 2}), tensor_of((3, 4))
        (1, 3)
    """
    if isinstance(answer, Mapping):
        name = next((name for name in ANSWERS if name in answer), None)
        if name is None and len(answer) == 1:
            name = next(iter(answer))
        if name is None:
            raise TypeError(
                f"the network answers with a dictionary of {', '.join(map(str, answer))}: expected one of "
                f"{', '.join(ANSWERS)} in it, or a task of yours with a method predictions(answer, labels)"
            )
        return answer[name]
    return answer[0] if isinstance(answer, list | tuple) and answer else answer


def call(net: nn.Module, inputs: Any) -> Any:
    """Return what a network answers; inputs by name and tuples of inputs become its arguments."""
    if isinstance(inputs, Mapping):
        return net(**inputs)
    return net(*inputs) if isinstance(inputs, tuple) else net(inputs)


def num_examples(inputs: Any) -> int:
    """Return the number of examples of a batch."""
    parts = (
        inputs.values() if isinstance(inputs, Mapping) else inputs if isinstance(inputs, tuple) else [inputs]
    )
    return next((len(part) for part in parts if isinstance(part, Tensor) and part.dim()), 1)


def moved(inputs: Any, device: torch.device) -> Any:
    """Return inputs on a device."""
    return tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, inputs)


def only(inputs: Any, taken: Any) -> Any:
    """Return inputs without those that a network does not take.

    Args:
        inputs: of a batch.
        taken: by name, what it takes: an example, say; all is left where inputs have no names here or there.

    Example:
        >>> only({"input_ids": 1, "length": 2}, {"input_ids": 3})
        {'input_ids': 1}
    """
    if not isinstance(inputs, Mapping) or not isinstance(taken, Mapping):
        return inputs
    return {name: inputs[name] for name in taken if name in inputs}
