"""``data=npz``."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from sparsereg.data.kind import Data, ImageData
from sparsereg.settings import again, setting

if TYPE_CHECKING:
    from sparsereg.data.module import Source


@dataclass(frozen=True)
class NpzData(ImageData):
    """Your own arrays: train_images, train_labels, test_images, test_labels; see docs/data.md.

    For segmentation train_masks and test_masks instead of labels.
    """

    TASKS: ClassVar[tuple[str, ...]] = ()

    name: str = again(Data, "name", "npz")
    path: str | None = setting(None, "the archive: data.path=FILE.npz")


def source(**keys: Any) -> "Source":
    """Return what reads it."""
    from sparsereg.data.npz import Npz

    return Npz(**keys)


DATA = NpzData
