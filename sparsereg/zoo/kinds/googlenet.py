"""``model=googlenet``."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from sparsereg.settings import setting
from sparsereg.zoo.network import Network, sampling

if TYPE_CHECKING:
    from torch import nn

    from sparsereg.data.form import Form


@dataclass(frozen=True)
class GoogleNetModel(Network):
    """The small GoogleNet, 260,650 weights for ten classes."""

    OWN_GATES: ClassVar[bool] = True

    name: str = setting("googlenet", "", choices=("googlenet",))
    gate: str = setting(
        "branches",
        "branches: the four branches of each block; all: every channel that can go; none",
        choices=("branches", "all", "none"),
    )
    act: str = setting("relu", "activation", choices=("relu", "leaky_relu", "gelu", "tanh"))
    sampling: str = sampling()


def build(
    form: "Form", gated: bool, gates: dict[str, Any], *, gate: str, act: str, sampling: str
) -> "nn.Module":
    """Build it."""
    from sparsereg.model.googlenet import GoogleNet

    return GoogleNet(
        form.num_classes,
        form.image_shape[0],
        gate=gate if gated else "none",
        act=act,
        sampling=sampling,
        **gates,
    )


NETWORK = GoogleNetModel
