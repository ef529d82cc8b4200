"""The next token at each place of a text."""

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy

from sparsereg.data.batches import tensor_of
from sparsereg.data.form import BYTES, Form, Inputs
from sparsereg.training.tasks.task import ClassTask, mean_cross_entropy

IGNORED = -100
"""Label of places that do not count, as in PyTorch and at Hugging Face."""


class LanguageModel(ClassTask):
    """Logits (batch, length, vocabulary) and the token that comes next at each place.

    A batch is (tokens, next tokens); or a dictionary as at Hugging Face, ``input_ids`` and perhaps
    ``attention_mask`` and ``labels``, whose labels stand at the place of their own token and are moved by one
    here; or a single tensor of tokens.

    Args:
        form: what the network is built for.
        bytes_per_token: of a text, for bits per byte; None: 1 where tokens are bytes, else bits per token are
            told.
    """

    name = "language_model"

    def __init__(self, form: Form, bytes_per_token: float | None = None) -> None:
        super().__init__(form)
        self.bytes_per_token = bytes_per_token

    def split(self, batch: Any) -> tuple[Inputs, Tensor]:
        """Return what is read, and the next token at each place."""
        if isinstance(batch, Tensor):
            return batch[:, :-1], batch[:, 1:]
        inputs, labels = super().split(batch)
        if not isinstance(inputs, Mapping):
            return inputs, labels
        if labels is None:
            labels = inputs["input_ids"]
            if "attention_mask" in inputs:
                labels = labels.masked_fill(inputs["attention_mask"] == 0, IGNORED)
        return dict(inputs), F.pad(labels[:, 1:], (0, 1), value=IGNORED)

    def predictions(self, answer: Any, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits (places, vocabulary) and labels (places,)."""
        logits: Tensor = tensor_of(answer)
        return logits.reshape(-1, logits.shape[-1]), labels.reshape(-1)

    def loss(self, predictions: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """Return the mean cross-entropy in nats over the places that count."""
        return mean_cross_entropy(predictions, labels, IGNORED, label_smoothing)

    def metrics(self) -> dict[str, Metric]:
        """Bits per byte (or per token), and the share of right tokens."""
        accuracy = MulticlassAccuracy(
            self.form.num_classes, average="micro", ignore_index=IGNORED, validate_args=False
        )
        told = self.bytes_per_token is not None or self.form.vocabulary in (None, BYTES)
        return {
            "bits_per_byte" if told else "bits_per_token": MeanBits(self.bytes_per_token or 1.0),
            "acc": accuracy,
        }


class MeanBits(Metric):
    """Mean cross-entropy in bits for each byte, summed in float64.

    Args:
        bytes_per_token: bytes that a token stands for, on average, > 0.

    Example:
        >>> bits = MeanBits()
        >>> bits.update(torch.zeros(3, 256), torch.tensor([0, 7, 255]))
        >>> round(float(bits.compute()), 6)
        8.0
    """

    higher_is_better = False
    is_differentiable = False
    full_state_update = False
    nats: Tensor
    count: Tensor

    def __init__(self, bytes_per_token: float = 1.0) -> None:
        super().__init__()
        self.bytes_per_token = bytes_per_token
        self.add_state("nats", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, predictions: Tensor, labels: Tensor) -> None:
        """Add a batch: logits (places, vocabulary) and labels (places,)."""
        nats = F.cross_entropy(predictions.float(), labels, ignore_index=IGNORED, reduction="none")
        self.nats += nats.double().sum()
        self.count += (labels != IGNORED).sum()

    def compute(self) -> Tensor:
        """Return the mean so far."""
        return self.nats / self.count / math.log(2) / self.bytes_per_token
