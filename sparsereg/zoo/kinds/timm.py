"""``model=timm``."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from sparsereg.settings import setting
from sparsereg.zoo.network import Gateable

if TYPE_CHECKING:
    from torch import nn

    from sparsereg.data.form import Form


@dataclass(frozen=True)
class TimmModel(Gateable):
    """A network of timm with random weights, e.g. model.name=convnext_atto; other keys are its arguments."""

    OTHERS: ClassVar[str | None] = "arguments"

    source: str = setting("timm", "", choices=("timm",))
    name: str = setting("resnet18", "timm's name of it")
    weights: str | None = setting(
        None, "file with its state dict, e.g. pretrained; an output layer of other classes starts anew"
    )
    arguments: Mapping[str, Any] = setting(dict, "of timm.create_model")


def build(
    form: "Form",
    gated: bool,
    gates: dict[str, Any],
    *,
    name: str,
    weights: str | None,
    arguments: dict[str, Any],
) -> "nn.Module":
    """Build it."""
    from sparsereg.zoo.gated import check_answer
    from sparsereg.zoo.timm import timm_network

    net = timm_network(name, form, arguments)
    check_answer(net, form, f"model.name={name}")
    return net


NETWORK = TimmModel
