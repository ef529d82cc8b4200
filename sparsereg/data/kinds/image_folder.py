"""``data=image_folder``."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sparsereg.data.kind import Augment, Data, ImageData, colour_photographs
from sparsereg.settings import NOT_NEGATIVE, Rule, again, setting, within

if TYPE_CHECKING:
    from sparsereg.data.module import Source


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
    augment: Augment | None = again(ImageData, "augment", colour_photographs)


def source(**keys: Any) -> "Source":
    """Return what reads it."""
    from sparsereg.data.image_folder import ImageFolder

    return ImageFolder(**keys)


DATA = ImageFolderData
