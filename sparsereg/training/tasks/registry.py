"""Tasks by name, as the configuration group ``task`` names them."""

from collections.abc import Mapping
from typing import Any

from torchmetrics import Metric

from sparsereg import own_code
from sparsereg.data.form import Form
from sparsereg.errors import InputError
from sparsereg.settings import keys
from sparsereg.training.tasks.classification import Classification, TextClassification
from sparsereg.training.tasks.config import OwnTask, TaskSettings
from sparsereg.training.tasks.language_model import LanguageModel
from sparsereg.training.tasks.segmentation import Segmentation
from sparsereg.training.tasks.task import ClassTask, Task

TASKS: dict[str, type[ClassTask]] = {
    "classification": Classification,
    "segmentation": Segmentation,
    "language_model": LanguageModel,
    "text_classification": TextClassification,
}
"""The class of each ``task=NAME``; its arguments are the form and the keys of the settings."""


def build(settings: TaskSettings, form: Form) -> Task:
    """Build the task that the configuration group ``task`` describes.

    Args:
        settings: of the task; not ``auto``.
        form: what the network is built for.

    Raises:
        InputError: one of the user's is no task.
    """
    if isinstance(settings, OwnTask):
        return _own(settings, form)
    values: dict[str, Any] = {name: getattr(settings, name) for name in keys(type(settings))}
    return TASKS[values.pop("name")](form, **values)


def _own(settings: OwnTask, form: Form) -> Task:
    made = own_code.call(settings.spec, "task", num_classes=form.num_classes, form=form)
    said = settings.said
    if not isinstance(made, Task):
        raise InputError(
            f"{said}: expected a sparsereg.training.tasks.task.Task, it makes a {type(made).__name__}"
        )
    if type(made).loss in (Task.loss,):
        raise InputError(f"{said}: expected a method loss(predictions, labels), it has none")
    try:
        metrics = made.metrics()
    except NotImplementedError as error:
        raise InputError(f"{said}: {error}, which returns torchmetrics by name") from error
    if not isinstance(metrics, Mapping) or not metrics or not all(map(_is_metric, metrics.items())):
        raise InputError(
            f"{said}: metrics() must return torchmetrics by name, at least one; got {metrics!r:.200}"
        )
    return made


def _is_metric(item: tuple[Any, Any]) -> bool:
    name, metric = item
    return isinstance(name, str) and name.isidentifier() and isinstance(metric, Metric)
