"""One class for each pixel."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

from sparsereg.data.batches import tensor_of
from sparsereg.data.form import Form
from sparsereg.training.tasks.task import ClassTask, mean_cross_entropy

_NONE = -100
"""A label that no pixel has, where all of them count."""


class Segmentation(ClassTask):
    """Logits (batch, classes, height, width) and masks (batch, height, width).

    Logits of a coarser grid (Hugging Face's networks) are enlarged to that of the masks. The figures are
    those of all pixels of a data set together: a class counts that is among labels or answers.

    Args:
        form: what the network is built for.
        ignore_label: pixels with this label count nowhere; None: all count.
    """

    name = "segmentation"

    def __init__(self, form: Form, ignore_label: int | None = 255) -> None:
        super().__init__(form)
        self.ignored = _NONE if ignore_label is None else ignore_label

    def predictions(self, answer: Any, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits at the size of the masks, and masks without a dimension of channels."""
        logits: Tensor = tensor_of(answer)
        masks = labels.squeeze(1) if labels.dim() == 4 else labels
        if logits.shape[2:] != masks.shape[1:]:
            logits = F.interpolate(logits, size=masks.shape[1:], mode="bilinear", align_corners=False)
        return logits, masks.long()

    def loss(self, predictions: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """Return the mean cross-entropy over the pixels that count."""
        return mean_cross_entropy(predictions, labels, self.ignored, label_smoothing)

    def metrics(self) -> dict[str, Metric]:
        """Mean intersection over union, and the share of right pixels."""
        settings: dict[str, Any] = {"ignore_index": self.ignored, "validate_args": False}
        return {
            "mean_iou": MulticlassJaccardIndex(self.form.num_classes, average="macro", **settings),
            "acc": MulticlassAccuracy(self.form.num_classes, average="micro", **settings),
        }
