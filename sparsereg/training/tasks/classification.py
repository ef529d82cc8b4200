"""One class for each example: an image, or a text."""

from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy

from sparsereg.training.tasks.task import ClassTask


class Classification(ClassTask):
    """Logits (batch, classes) and labels (batch,).

    Args:
        form: what the network is built for.
    """

    name = "classification"

    def metrics(self) -> dict[str, Metric]:
        """Accuracy."""
        return {"acc": MulticlassAccuracy(self.form.num_classes, average="micro", validate_args=False)}


class TextClassification(Classification):
    """The same for texts, whose batches are dictionaries with an ``attention_mask``."""

    name = "text_classification"
