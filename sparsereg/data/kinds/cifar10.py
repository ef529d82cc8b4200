"""``data=cifar10``."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sparsereg.data.kind import KEPT_IN, Augment, Data, ImageData, colour_photographs
from sparsereg.settings import again, setting

if TYPE_CHECKING:
    from sparsereg.data.module import Source


@dataclass(frozen=True)
class Cifar10Data(ImageData):
    """CIFAR-10: 50,000 + 10,000 colour images, 32 x 32, ten classes; fetched by torchvision."""

    name: str = again(Data, "name", "cifar10")
    root: str = setting("data", KEPT_IN)
    val_size: int | float = again(Data, "val_size", 5000)
    augment: Augment | None = again(ImageData, "augment", colour_photographs)


def source(**keys: Any) -> "Source":
    """Return what reads it."""
    from sparsereg.data.cifar10 import Cifar10

    return Cifar10(**keys)


DATA = Cifar10Data
