"""``data=digits``."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sparsereg.data.kind import Data, ImageData
from sparsereg.settings import again, setting, within

if TYPE_CHECKING:
    from sparsereg.data.module import Source


@dataclass(frozen=True)
class DigitsData(ImageData):
    """scikit-learn's digits: 1,437 + 360 grey images, enlarged from 8 x 8; needs no network."""

    name: str = again(Data, "name", "digits")
    image_size: int = setting(
        32, "height and width that the images are enlarged to", within("[8, 224]", "an integer")
    )


def source(**keys: Any) -> "Source":
    """Return what reads it."""
    from sparsereg.data.digits import Digits

    return Digits(**keys)


DATA = DigitsData
