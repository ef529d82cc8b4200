"""``model._target_=``: a network of the user's."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from sparsereg import own_code
from sparsereg.errors import InputError
from sparsereg.own_code import Own
from sparsereg.settings import setting
from sparsereg.zoo.network import Network

if TYPE_CHECKING:
    from torch import nn

    from sparsereg.data.form import Form


@dataclass(frozen=True)
class OwnNetwork(Own, Network):
    """A network of yours: model._target_=my_module.Net model.KEY=VALUE; docs/extending.md.

    All keys are arguments of that class or function. num_classes, image_shape, in_channels (of texts
    vocabulary and context), droprate_init, temperature and gated are given, too, where its signature has
    them. One without gates gets some.
    """

    GROUP: ClassVar[str] = "model"
    OTHERS: ClassVar[str | None] = "arguments"
    TASKS: ClassVar[tuple[str, ...]] = ()

    name: str = setting("own", "", key=False)
    _target_: str | None = setting(None, "package.module.Class, of an nn.Module")
    arguments: Mapping[str, Any] = setting(dict, "of that class")


def build(form: "Form", gated: bool, gates: dict[str, Any], *, settings: OwnNetwork) -> "nn.Module":
    """Build the network that the user named."""
    from torch import nn

    from sparsereg.penalties import hard_concretes
    from sparsereg.zoo.gated import check_answer

    said = f"model._target_={settings._target_}"
    offered = {**_offered(form), "gated": gated, **{k: v for k, v in gates.items() if k != "shape"}}
    net = own_code.call(settings.spec, "model", **offered)
    if not isinstance(net, nn.Module):
        raise InputError(f"{said}: expected a torch.nn.Module, it makes a {type(net).__name__}")
    check_answer(net, form, said)
    own_gates = bool(hard_concretes(net))
    if own_gates and not gated:
        raise InputError(
            f"{said}: the network has gates of its own, but none are wanted (without_using_gate=true): take"
            " an argument gated in its constructor, which is false then"
        )
    if own_gates and "shape" in gates:
        raise InputError(
            f"{said}: the network has gates of its own, so that shape={gates['shape']} is not to be had"
        )
    return net


def _offered(form: "Form") -> dict[str, Any]:
    """Return what a network of the user's is given, too, where its signature has the names."""
    offered: dict[str, Any] = {"num_classes": form.num_classes, "image_shape": form.image_shape}
    if form.vocabulary is None:
        return {**offered, "in_channels": form.image_shape[0]}
    return {**offered, "vocabulary": form.vocabulary, "context": form.image_shape[0]}


NETWORK = OwnNetwork
