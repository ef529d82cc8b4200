"""``data=mnist``."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sparsereg.data.kind import KEPT_IN, Data, ImageData
from sparsereg.settings import again, setting

if TYPE_CHECKING:
    from sparsereg.data.module import Source


@dataclass(frozen=True)
class MnistData(ImageData):
    """MNIST: 60,000 + 10,000 grey images, 28 x 28, ten digits; fetched by torchvision."""

    name: str = again(Data, "name", "mnist")
    root: str = setting("data", KEPT_IN)
    val_size: int | float = again(Data, "val_size", 5000)


def source(**keys: Any) -> "Source":
    """Return what reads it."""
    from sparsereg.data.mnist import Mnist

    return Mnist(**keys)


DATA = MnistData
