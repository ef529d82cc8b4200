"""The settings of ``data=...``: one class for each source.

Nothing here imports PyTorch: the command line is checked before anything slow is loaded.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from sparsereg.errors import InputError
from sparsereg.settings import (
    NOT_NEGATIVE,
    POSITIVE,
    SEED,
    Contradiction,
    Rule,
    Settings,
    again,
    count,
    one_of,
    setting,
    within,
)
from sparsereg.targets import Own, is_own

VAL_SIZE = Rule(
    "a count >= 0, or a fraction in (0, 1)",
    lambda v: 0 < v < 1 if isinstance(v, float) else v >= 0,
)


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
            return OwnData
        if "name" not in given:
            raise InputError(f"{where}.name is missing: expected one of {', '.join(CONFIGS)}")
        one_of(given["name"], f"{where}.name", list(CONFIGS))
        return CONFIGS[given["name"]]

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


def _colour_photographs() -> Augment:
    return Augment(flip=True, crop_scale=(0.8, 1.0))


_KEPT_IN = "folder that keeps the files, relative to where you stand"


@dataclass(frozen=True)
class Cifar10Data(ImageData):
    """CIFAR-10: 50,000 + 10,000 colour images, 32 x 32, ten classes; fetched by torchvision."""

    name: str = again(Data, "name", "cifar10")
    root: str = setting("data", _KEPT_IN)
    val_size: int | float = again(Data, "val_size", 5000)
    augment: Augment | None = again(ImageData, "augment", _colour_photographs)


@dataclass(frozen=True)
class MnistData(ImageData):
    """MNIST: 60,000 + 10,000 grey images, 28 x 28, ten digits; fetched by torchvision."""

    name: str = again(Data, "name", "mnist")
    root: str = setting("data", _KEPT_IN)
    val_size: int | float = again(Data, "val_size", 5000)


@dataclass(frozen=True)
class DigitsData(ImageData):
    """scikit-learn's digits: 1,437 + 360 grey images, enlarged from 8 x 8; needs no network."""

    name: str = again(Data, "name", "digits")
    image_size: int = setting(
        32, "height and width that the images are enlarged to", within("[8, 224]", "an integer")
    )


@dataclass(frozen=True)
class NpzData(ImageData):
    """Your own arrays: train_images, train_labels, test_images, test_labels; see docs/data.md.

    For segmentation train_masks and test_masks instead of labels.
    """

    TASKS: ClassVar[tuple[str, ...]] = ()

    name: str = again(Data, "name", "npz")
    path: str | None = setting(None, "the archive: data.path=FILE.npz")


@dataclass(frozen=True)
class ImageFolderData(ImageData):
    """Your own images: root/train/CLASS/* and root/test/CLASS/*; see docs/data.md."""

    name: str = again(Data, "name", "image_folder")
    root: str | None = setting(None, "the folder: data.root=FOLDER")
    image_size: int = setting(
        32, "images are scaled and cut to this height and width, in pixels", within("[1, 8192]", "an integer")
    )
    channels: int = setting(3, "3: colour, 1: grey", Rule("1 (grey) or 3 (colour)", lambda v: v in (1, 3)))
    max_memory_gb: float = setting(
        4.0,
        "decoded images are held in memory up to this size (GiB); a larger set is decoded while training",
        NOT_NEGATIVE,
    )
    num_workers: int = setting(
        2, "processes that decode; 0: the training process itself", within("[0, 1024]", "an integer")
    )
    augment: Augment | None = again(ImageData, "augment", _colour_photographs)


@dataclass(frozen=True)
class TextData(Data):
    """A text, byte by byte: windows, and the byte that comes next at each place; see docs/tasks.md."""

    TASKS: ClassVar[tuple[str, ...]] = ("language_model",)
    MODEL: ClassVar[tuple[str, ...]] = ("model=gpt",)

    name: str = again(Data, "name", "text")
    path: str | None = setting(
        None,
        "a file, or a folder of files; null: the sources of Python's standard library, found where it is",
    )
    pattern: str = setting("*", "of the names of the files of a folder, such as *.txt")
    context: int = setting(128, "bytes of a window", within("[1, 65536]", "an integer"))
    train_windows: int = setting(1024, "windows of an epoch, drawn anew in each", count())
    eval_windows: int | None = setting(
        512, "windows of validation and of test at most, spread evenly; null: all", count()
    )
    batch_size: int = again(Data, "batch_size", 16)
    eval_batch_size: int = again(Data, "eval_batch_size", 64)
    val_size: float = setting(
        0.05, "share of the bytes that validates; 0: none", within("[0, 0.5]", "a share")
    )
    test_size: float = setting(0.05, "share of the bytes that tests", within("(0, 0.5]", "a share"))
    max_memory_gb: float = setting(
        1.0,
        "files are read into memory up to this size (GiB); a single larger one stays on the disk",
        NOT_NEGATIVE,
    )

    def check(self) -> None:
        """Something is left to train on."""
        if self.val_size + self.test_size >= 0.9:
            raise Contradiction(
                f"{{}}val_size={self.val_size:g} and {{}}test_size={self.test_size:g} leave too little"
                " to train on"
            )


@dataclass(frozen=True)
class LabelledTextData(Data):
    """Texts with a class each, byte by byte: a CSV file, or PATH/CLASS/*; see docs/tasks.md."""

    TASKS: ClassVar[tuple[str, ...]] = ("text_classification",)
    MODEL: ClassVar[tuple[str, ...]] = ("model=gpt",)

    name: str = again(Data, "name", "labelled_text")
    path: str | None = setting(
        None,
        "a CSV file with a header, or a folder: PATH/CLASS/*, or PATH/train/CLASS/* and PATH/test/CLASS/*",
    )
    text: str = setting("text", "column of the texts, of a CSV file")
    label: str = setting("label", "column of the classes, of a CSV file")
    context: int = setting(256, "bytes that are read of each text", within("[1, 65536]", "an integer"))
    batch_size: int = again(Data, "batch_size", 32)
    eval_batch_size: int = again(Data, "eval_batch_size", 64)
    test_size: float = setting(
        0.1, "share of the texts that tests, where the folder does not say it", within("(0, 0.5]", "a share")
    )
    max_memory_gb: float = setting(1.0, "texts are held in memory, up to this size (GiB)", NOT_NEGATIVE)


@dataclass(frozen=True)
class OwnData(Own, Data):
    """Data of yours: data._target_=my_module.Data data.KEY=VALUE; docs/extending.md.

    A LightningDataModule whose batches are (inputs, labels) or dictionaries. All keys are its arguments.
    """

    GROUP: ClassVar[str] = "data"
    OTHERS: ClassVar[str | None] = "arguments"

    name: str = again(Data, "name", "own", key=False)
    batch_size: int = again(Data, "batch_size", 128, key=False)
    eval_batch_size: int = again(Data, "eval_batch_size", 250, key=False)
    val_size: int | float = again(Data, "val_size", 0.1, key=False)
    split_seed: int = again(Data, "split_seed", 42, key=False)
    _target_: str | None = setting(None, "package.module.Class, of a LightningDataModule")
    arguments: Mapping[str, Any] = setting(dict, "of that class")


CONFIGS: dict[str, type[Data]] = {
    "cifar10": Cifar10Data,
    "mnist": MnistData,
    "digits": DigitsData,
    "npz": NpzData,
    "image_folder": ImageFolderData,
    "text": TextData,
    "labelled_text": LabelledTextData,
    "own": OwnData,
}
"""Settings of each ``data=NAME``."""


def source_of(given: Mapping[str, Any]) -> str:
    """Return the choice of the configuration group ``data`` that has these keys."""
    return "own" if is_own(given) else str(given.get("name"))
