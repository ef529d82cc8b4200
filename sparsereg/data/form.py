"""What examples look like to a network: of which task, of which shape, how many classes."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from sparsereg.errors import InputError

BYTES = 256
"""Different values of a byte: the vocabulary of a text that is read byte by byte."""

Inputs = Tensor | dict[str, Tensor]
"""What a network reads: a batch, or several by the names of its arguments."""


@dataclass(frozen=True)
class Form:
    """What a network is built for.

    Attributes:
        num_classes: classes of the labels; of a language model its vocabulary.
        image_shape: of one example without the batch: (channels, height, width) of an image, (length,) of a
            text or series.
        task: what is to be learnt, a key of ``sparsereg.training.tasks.config.CONFIGS``.
        vocabulary: number of different tokens; None where inputs are no tokens.
        inputs: of batches that are dictionaries, type and shape of one example of each input, by name; None
            where the input is one tensor.
    """

    num_classes: int
    image_shape: tuple[int, ...]
    task: str = "classification"
    vocabulary: int | None = None
    inputs: Mapping[str, tuple[str, tuple[int, ...]]] | None = None

    @property
    def answer_shape(self) -> tuple[int, ...] | None:
        """Shape of the answer to one example; None where the task leaves it open."""
        known = {
            "classification": (self.num_classes,),
            "text_classification": (self.num_classes,),
            "segmentation": (self.num_classes, *self.image_shape[1:]),
            "language_model": (*self.image_shape, self.num_classes),
        }
        return known.get(self.task)

    def example(
        self,
        batch: int = 1,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> Inputs:
        """Return inputs of zeros, and of ones where they are masks, for tracing.

        Args:
            batch: how many examples.
            device: where they lie.
            dtype: of what is no integer.

        Example:
            >>> Form(10, (3, 8, 8)).example(2).shape
            torch.Size([2, 3, 8, 8])
            >>> Form(256, (16,), "language_model", 256).example().dtype
            torch.int64
        """
        if self.inputs is None:
            kind = dtype if self.vocabulary is None else torch.int64
            return torch.zeros(batch, *self.image_shape, device=device, dtype=kind)
        made = {}
        for name, (kind_name, shape) in self.inputs.items():
            kind = getattr(torch, kind_name)
            made[name] = torch.full(
                (batch, *shape),
                int("mask" in name),
                device=device,
                dtype=dtype if kind.is_floating_point else kind,
            )
        return made

    def taken_by(self, net: nn.Module) -> "Form":
        """Return the form without inputs by name that a network does not take."""
        if self.inputs is None:
            return self
        known = arguments_of(net)
        taken = {name: self.inputs[name] for name in self.inputs if known is None or name in known}
        if not taken:
            raise InputError(
                f"batches hold {', '.join(self.inputs)}, of which {type(net).__name__}.forward takes none: "
                f"its arguments are {', '.join(sorted(known or ()))}"
            )
        return replace(self, inputs=taken)

    def described(self) -> dict[str, Any]:
        """Return the form as a checkpoint stores it, see ``read``."""
        inputs: dict[str, Any] | None = None
        if self.inputs is not None:
            inputs = {name: [kind, list(shape)] for name, (kind, shape) in self.inputs.items()}
        return {
            "num_classes": self.num_classes,
            "image_shape": list(self.image_shape),
            "vocabulary": self.vocabulary,
            "inputs": inputs,
        }

    @classmethod
    def read(cls, given: Mapping[str, Any], task: str) -> "Form":
        """Make a form of what ``described`` returned.

        Args:
            given: checked.
            task: what is to be learnt.

        Example:
            >>> form = Form(4, (8,), "text_classification", 256, {"input_ids": ("int64", (8,))})
            >>> Form.read(form.described(), form.task) == form
            True
        """
        inputs = given.get("inputs")
        return cls(
            given["num_classes"],
            tuple(given["image_shape"]),
            task,
            given.get("vocabulary"),
            inputs and {name: (str(kind), tuple(shape)) for name, (kind, shape) in inputs.items()},
        )


def is_described(inputs: Any) -> bool:
    """Whether something from a file describes inputs by name, as ``Form.described`` does."""
    kinds = ("float16", "bfloat16", "float32", "float64", "uint8", "int8", "int16", "int32", "int64", "bool")
    return (
        isinstance(inputs, dict)
        and bool(inputs)
        and all(
            isinstance(name, str)
            and isinstance(item, list | tuple)
            and len(item) == 2
            and item[0] in kinds
            and isinstance(item[1], list | tuple)
            and all(isinstance(n, int) and not isinstance(n, bool) and 0 < n < 2**31 for n in item[1])
            for name, item in inputs.items()
        )
    )


def arguments_of(net: nn.Module) -> set[str] | None:
    """Return the names that a network's forward takes; None if it takes any."""
    parameters = inspect.signature(net.forward).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    return {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
