"""``model=torchvision``."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from sparsereg.settings import setting
from sparsereg.zoo.network import Gateable, sampling, weights

if TYPE_CHECKING:
    from torch import nn

    from sparsereg.data.form import Form


@dataclass(frozen=True)
class TorchvisionModel(Gateable):
    """A network of torchvision, e.g. model.name=mobilenet_v2, gated where channels can go.

    Its segmentation networks, e.g. model.name=lraspp_mobilenet_v3_large, for data with masks.
    """

    TASKS: ClassVar[tuple[str, ...]] = ("classification", "segmentation")
    ABOUT_GATES: ClassVar[tuple[str, ...]] = (*Gateable.ABOUT_GATES, "residual")

    source: str = setting("torchvision", "", choices=("torchvision",))
    name: str = setting("resnet18", "torchvision's name of it")
    weights: str | None = weights()
    small_images: bool = setting(
        False, "true: a stem for 32 x 32 images, a 3x3 convolution that keeps their size and no pooling"
    )
    residual: bool = setting(True, "gates on channels that residual additions tie together, too")
    sampling: str = sampling()

    @property
    def limits(self) -> dict[str, Any]:
        """Whether channels that residual additions tie together may go, too."""
        return {**super().limits, "residual": self.residual}


def build(
    form: "Form", gated: bool, gates: dict[str, Any], *, name: str, weights: str | None, **settings: Any
) -> "nn.Module":
    """Build it."""
    from sparsereg.zoo.torchvision import torchvision_network

    # The file of weights is read where training starts: checkpoints have weights of their own.
    return torchvision_network(
        name,
        form.num_classes,
        form.image_shape,
        gated=gated,
        task=form.task,
        **settings,
        **(gates if gated else {}),
    )


NETWORK = TorchvisionModel
