"""What every task says: how batches and answers are read, what is lost, what is measured."""

import inspect
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric

from sparsereg.data.batches import inputs_and_labels, tensor_of
from sparsereg.data.form import Form, Inputs

SHARES = {
    "acc": "accuracy",
    "mean_iou": "mean intersection over union",
}
"""Figures that are shares in [0, 1], shown in per cent, and their words."""


class Task:
    """What a network learns. A task of yours derives from it and has at least ``loss`` and ``metrics``.

    Attributes:
        figures: names of ``metrics``, the main one first: it chooses the best checkpoint, and a sweep
            compares by it. results.json has each as ``val_NAME`` and ``test_NAME``.

    Example:
        >>> import torch
        >>> from torchmetrics import MeanSquaredError
        >>> class Regression(Task):
        ...     def loss(self, predictions, labels):
        ...         return F.mse_loss(predictions.squeeze(1), labels)
        ...
        ...     def metrics(self):
        ...         return {"mse": MeanSquaredError()}
        >>> Regression().figures
        ('mse',)
    """

    name = "own"

    def split(self, batch: Any) -> tuple[Inputs, Any]:
        """Divide a batch into what the network reads and what it is to answer.

        Args:
            batch: (inputs, labels), or a dictionary, see ``sparsereg.data.batches.inputs_and_labels``.
        """
        return inputs_and_labels(batch)

    def predictions(self, answer: Any, labels: Any) -> tuple[Any, Any]:
        """Return what ``loss`` and the metrics get: of an answer with several parts the one that counts.

        Args:
            answer: of the network.
            labels: of the batch.
        """
        return tensor_of(answer), labels

    def loss(self, predictions: Any, labels: Any) -> Tensor:
        """Return the loss of a batch, a scalar: a mean over what is predicted.

        Args:
            predictions: of the network, see ``predictions``.
            labels: likewise.
        """
        raise NotImplementedError(f"{type(self).__name__} has no method loss(predictions, labels)")

    def metrics(self) -> dict[str, Metric]:
        """Return new metrics by name, each updated by (predictions, labels); the main one first."""
        raise NotImplementedError(f"{type(self).__name__} has no method metrics()")

    @property
    def figures(self) -> tuple[str, ...]:
        """Names of the metrics."""
        return tuple(self.metrics())

    @property
    def figure(self) -> str:
        """Name of the main metric."""
        return self.figures[0]

    @property
    def larger_is_better(self) -> bool:
        """Whether the main metric is good when it is large."""
        return self.metrics()[self.figure].higher_is_better is not False

    @property
    def smooths(self) -> bool:
        """Whether ``loss`` takes ``label_smoothing``."""
        return "label_smoothing" in inspect.signature(self.loss).parameters


def mean_cross_entropy(logits: Tensor, labels: Tensor, ignored: int, label_smoothing: float) -> Tensor:
    """Return the mean cross-entropy over the labels that count; zero where none does.

    Args:
        logits: (examples, classes, ...).
        labels: (examples, ...), int64.
        ignored: the label that does not count.
        label_smoothing: share of each label that is spread over all classes.
    """
    total = F.cross_entropy(
        logits.float(), labels, ignore_index=ignored, reduction="sum", label_smoothing=label_smoothing
    )
    return total / (labels != ignored).sum().clamp(min=1)


class ClassTask(Task):
    """A task whose predictions are logits: the ground of those that are built in.

    Args:
        form: what the network is built for.
    """

    def __init__(self, form: Form) -> None:
        self.form = form

    def loss(self, predictions: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """Return the mean cross-entropy."""
        return F.cross_entropy(predictions.float(), labels, label_smoothing=label_smoothing)
