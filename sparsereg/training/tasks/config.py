"""The settings of ``task=...``: one class for each task.

Nothing here imports PyTorch: the command line is checked before anything slow is loaded.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from sparsereg.own_code import Own, is_own
from sparsereg.settings import POSITIVE, Rule, Settings, one_of, setting


@dataclass(frozen=True)
class TaskSettings(Settings):
    """What the network learns: found out from the data unless you name it."""

    FIGURES: ClassVar[tuple[str, ...]] = ()
    """Names of the figures in results.json, without ``val_`` and ``test_``; the first is the main one."""

    name: str = setting("auto", "the task; auto: that of the data", choices=("auto",))

    @classmethod
    def kind_of(cls, given: Mapping[str, Any], where: str) -> type[Settings]:
        """The task that ``name`` names; your own with ``_target_``."""
        if is_own(given):
            return OwnTask
        name = given.get("name", "auto")
        one_of(name, f"{where}.name", list(CONFIGS))
        return CONFIGS[name]

    @property
    def said(self) -> str:
        """As the user gives it."""
        return f"task={self.name}"


@dataclass(frozen=True)
class Classification(TaskSettings):
    """One class for each example: cross-entropy, accuracy."""

    FIGURES: ClassVar[tuple[str, ...]] = ("acc",)

    name: str = setting("classification", "", choices=("classification",))


@dataclass(frozen=True)
class Segmentation(TaskSettings):
    """One class for each pixel: cross-entropy, mean intersection over union, share of right pixels."""

    FIGURES: ClassVar[tuple[str, ...]] = ("mean_iou", "acc")

    name: str = setting("segmentation", "", choices=("segmentation",))
    ignore_label: int | None = setting(
        255, "pixels with this label count nowhere; null: all count", Rule("an integer", lambda v: True)
    )


@dataclass(frozen=True)
class LanguageModel(TaskSettings):
    """The next token at each place of a text: cross-entropy, bits per byte, share of right tokens."""

    FIGURES: ClassVar[tuple[str, ...]] = ("bits_per_byte", "acc")

    name: str = setting("language_model", "", choices=("language_model",))
    bytes_per_token: float | None = setting(
        None,
        "of tokens of your own, for bits per byte; null: 1 for bytes, else bits per token are told",
        POSITIVE,
    )


@dataclass(frozen=True)
class TextClassification(TaskSettings):
    """One class for each text: cross-entropy, accuracy."""

    FIGURES: ClassVar[tuple[str, ...]] = ("acc",)

    name: str = setting("text_classification", "", choices=("text_classification",))


@dataclass(frozen=True)
class OwnTask(Own, TaskSettings):
    """A task of yours: task._target_=my_module.Task task.KEY=VALUE; docs/tasks.md.

    All keys are arguments of that class. num_classes and form are given, too, where its signature has them.
    """

    GROUP: ClassVar[str] = "task"
    OTHERS: ClassVar[str | None] = "arguments"

    name: str = setting("own", "", key=False)
    _target_: str | None = setting(None, "package.module.Class, of a sparsereg.training.tasks.task.Task")
    arguments: Mapping[str, Any] = setting(dict, "of that class")


CONFIGS: dict[str, type[TaskSettings]] = {
    "auto": TaskSettings,
    "classification": Classification,
    "segmentation": Segmentation,
    "language_model": LanguageModel,
    "text_classification": TextClassification,
    "own": OwnTask,
}
"""Settings of each ``task=NAME``."""

FIGURES = tuple(dict.fromkeys(name for cls in CONFIGS.values() for name in cls.FIGURES))
"""Names of all figures of these tasks."""


def task_of(given: Mapping[str, Any] | None) -> str:
    """Return the choice of the group ``task`` that has these keys; None, of older runs, is the first task."""
    if given is None:
        return "classification"
    return "own" if is_own(given) else str(given.get("name"))
