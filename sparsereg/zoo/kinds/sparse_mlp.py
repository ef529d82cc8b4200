"""``model=sparse_mlp``."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from sparsereg.settings import count, setting
from sparsereg.zoo.network import Network

if TYPE_CHECKING:
    from torch import nn

    from sparsereg.data.form import Form


@dataclass(frozen=True)
class SparseMlpModel(Network):
    """Dense layers with a gate on every weight: saves storage, not time."""

    OWN_GATES: ClassVar[bool] = True

    name: str = setting("sparse_mlp", "", choices=("sparse_mlp",))
    hidden_sizes: tuple[int, ...] = setting(
        (300, 100), "sizes of the hidden layers; []: none", count(), empty=True
    )


def build(form: "Form", gated: bool, gates: dict[str, Any], **settings: Any) -> "nn.Module":
    """Build it."""
    from sparsereg.model.sparse_mlp import SparseMLP

    gate = "weights" if gated else "none"
    return SparseMLP(form.num_classes, form.image_shape, gate=gate, **settings, **gates)


NETWORK = SparseMlpModel
