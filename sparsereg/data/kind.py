"""What the settings of every ``data=`` have.

Nothing here imports PyTorch: the command line is checked before anything slow is loaded.
"""

import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from sparsereg.data import kinds
from sparsereg.errors import InputError
from sparsereg.own_code import is_own
from sparsereg.settings import (
    NOT_NEGATIVE,
    POSITIVE,
    SEED,
    Contradiction,
    Rule,
    Settings,
    count,
    one_of,
    setting,
    within,
)

KINDS = tuple(module.name for module in pkgutil.iter_modules(kinds.__path__))
"""Their names."""
VAL_SIZE = Rule(
    "a count >= 0, or a fraction in (0, 1)",
    lambda v: 0 < v < 1 if isinstance(v, float) else v >= 0,
)
KEPT_IN = "folder that keeps the files, relative to where you stand"


def _increasing(name: str, pair: tuple[float, float] | None, largest: float) -> None:
    if pair is not None and not 0 < pair[0] <= pair[1] <= largest:
        at_most = "" if largest == float("inf") else f" and at most {largest:g}"
        raise Contradiction(
            f"{{}}{name}={list(pair)}: expected two numbers > 0{at_most}, the smaller one first"
        )


@dataclass(frozen=True)
class Augment(Settings):
    """Random changes of training images; see ``sparsereg.data.augment.Augmentation``."""

    flip: bool = setting(False, "mirror left to right with probability 1/2")
    crop_scale: tuple[float, float] | None = setting(
        None,
        "smallest and largest share of the area that a random crop keeps; null: no crop",
        within("(0, 1]"),
    )
    crop_ratio: tuple[float, float] = setting(
        (0.9, 1.1), "smallest and largest width / height of a crop", POSITIVE
    )
    degrees: float = setting(0.0, "rotation in +- degrees", within("[0, 180]"))
    translate: float = setting(0.0, "shift in +- pixels", NOT_NEGATIVE)
    whole_pixels: bool = setting(False, "shift by whole pixels, which keeps images sharp")
    zoom: float = setting(0.0, "enlargement by 1 +- zoom", within("[0, 1)"))
    elastic: float = setting(
        0.0, "standard deviation of smooth random displacements, in pixels", NOT_NEGATIVE
    )
    elastic_smoothness: float = setting(
        4.0, "of the Gaussian that makes them smooth, in pixels", within("(0, 1000]")
    )

    def check(self) -> None:
        """Pairs are in order."""
        _increasing("crop_scale", self.crop_scale, 1.0)
        _increasing("crop_ratio", self.crop_ratio, float("inf"))


@dataclass(frozen=True)
class Data(Settings):
    """What every source has."""

    TASKS: ClassVar[tuple[str, ...]] = ()
    """Tasks that the source has labels for; () where that is seen in the data only."""
    MODEL: ClassVar[tuple[str, ...]] = ()
    """Choice of a network, and its keys, where the user names none; () for that of train.yaml."""

    name: str = setting("", "the source")
    batch_size: int = setting(
        128,
        "examples per training batch and process; more processes make the global batch larger",
        count(),
    )
    eval_batch_size: int = setting(250, "examples per validation and test batch and process", count())
    val_size: int | float = setting(
        0.1, "training examples that validate: a count, or a fraction in (0, 1); 0: none", VAL_SIZE
    )
    split_seed: int = setting(
        42, "of the draw of those examples: a fixed split, whatever the run's seed", SEED
    )

    @classmethod
    def kind_of(cls, given: Mapping[str, Any], where: str) -> type[Settings]:
        """The source that ``name`` names; your own with ``_target_``."""
        if is_own(given):
            return kind("own")
        if "name" not in given:
            raise InputError(f"{where}.name is missing: expected one of {', '.join(KINDS)}")
        one_of(given["name"], f"{where}.name", list(KINDS))
        return kind(given["name"])

    @property
    def said(self) -> str:
        """As the user gives it."""
        return f"data={self.name}"


@dataclass(frozen=True)
class ImageData(Data):
    """What every source of images has; see ``sparsereg.data.module.ImageDataModule``."""

    TASKS: ClassVar[tuple[str, ...]] = ("classification",)

    limit_train_images: int | None = setting(
        None, "train on the first so many images of the (randomly drawn) training part; null: all", count()
    )
    device_resident: bool | str = setting(
        "auto",
        "hold the uint8 images on the training device; auto: if they take half of its free memory at most",
        choices=("auto",),
    )
    augment: Augment | None = setting(
        Augment, "random changes of training images; null switches them all off"
    )


def kind(name: str) -> type[Data]:
    """Return the settings of a source."""
    found: type[Data] = importlib.import_module(f"{kinds.__name__}.{name}").DATA
    return found


def colour_photographs() -> Augment:
    """Changes that suit photographs."""
    return Augment(flip=True, crop_scale=(0.8, 1.0))


def source_of(given: Mapping[str, Any]) -> str:
    """Return the choice of the configuration group ``data`` that has these keys."""
    return "own" if is_own(given) else str(given.get("name"))
