"""``model=unet``."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from sparsereg.settings import count, setting, within
from sparsereg.zoo.network import Gateable

if TYPE_CHECKING:
    from torch import nn

    from sparsereg.data.form import Form


@dataclass(frozen=True)
class UNetModel(Gateable):
    """A small U-Net for segmentation."""

    TASKS: ClassVar[tuple[str, ...]] = ("segmentation",)

    name: str = setting("unet", "", choices=("unet",))
    width: int = setting(16, "channels of the first level; each further one has twice as many", count())
    depth: int = setting(3, "how often height and width are halved", within("[1, 12]", "an integer"))


def build(form: "Form", gated: bool, gates: dict[str, Any], *, width: int, depth: int) -> "nn.Module":
    """Build it."""
    from sparsereg.model.unet import UNet

    return UNet(form.num_classes, form.image_shape[0], width, depth)


NETWORK = UNetModel
