"""``model=vit``."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sparsereg.settings import again, count, setting
from sparsereg.zoo.network import Transformer

if TYPE_CHECKING:
    from torch import nn

    from sparsereg.data.form import Form


@dataclass(frozen=True)
class VitModel(Transformer):
    """A small vision transformer: images in patches."""

    name: str = setting("vit", "", choices=("vit",))
    width: int = again(Transformer, "width", 64)
    depth: int = again(Transformer, "depth", 6)
    patch_size: int = setting(4, "height and width of a patch, in pixels", count())


def build(form: "Form", gated: bool, gates: dict[str, Any], *, patch_size: int, **sizes: Any) -> "nn.Module":
    """Build it."""
    from sparsereg.model.transformer import Shape
    from sparsereg.model.vit import ViT

    return ViT(form.num_classes, form.image_shape, patch_size, Shape(**sizes))


NETWORK = VitModel
