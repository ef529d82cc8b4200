"""Networks by name, as the configuration group ``model`` names them."""

import importlib
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from torch import nn

from sparsereg.data.form import Form
from sparsereg.errors import InputError
from sparsereg.penalties import hard_concretes
from sparsereg.settings import read
from sparsereg.zoo import kinds
from sparsereg.zoo.gated import with_gates
from sparsereg.zoo.network import Network


def resolved(settings: Network) -> Network:
    """Return the settings of a network with what the files that they name hold.

    Raises:
        InputError: a file is missing or wrong, or none is named where one is needed.
    """
    resolve = getattr(_file(settings), "resolved", None)
    return settings if resolve is None else resolve(settings)


def _file(settings: Network) -> ModuleType:
    return importlib.import_module(f"{kinds.__name__}.{settings.group}")


def build(
    settings: Network | Mapping[str, Any],
    form: Form,
    gated: bool,
    pretrained: bool = False,
    shape: str = "free",
    **gates: Any,
) -> nn.Module:
    """Build the network that the configuration group ``model`` describes.

    Args:
        settings: of the network, or its keys with ``name`` among them; see ``sparsereg.zoo.config``.
        form: what the data look like, and the task.
        gated: False leaves every gate out.
        pretrained: whether weights are read that a folder of the settings has.
        shape: ``uniform``: layers that are alike share their gates, see ``sparsereg.gate``.
        **gates: settings of the gates, e.g. droprate_init and temperature.

    Raises:
        InputError: unknown name or unknown key.
        ValueError: a value is outside its range.
    """
    chosen = settings if isinstance(settings, Network) else read(Network, settings, "model")
    gates |= {} if shape == "free" else {"shape": shape}
    if chosen.group == "own":
        if chosen is not settings:
            raise InputError("model._target_ comes from a file, which is data")
        return _built(chosen, form, gated, gates, {"settings": chosen})
    values = chosen.structure
    if chosen.OTHERS is not None:
        values[chosen.OTHERS] = dict(getattr(chosen, chosen.OTHERS))
    if chosen.PRETRAINED:
        values["pretrained"] = pretrained
    return _built(chosen, form, gated, gates, values)


def _built(
    chosen: Network, form: Form, gated: bool, gates: dict[str, Any], values: dict[str, Any]
) -> nn.Module:
    gates = gates if chosen.OWN_GATES else {**gates, **chosen.limits}
    net: nn.Module = _file(chosen).build(form, gated, gates, **values)
    if not gated or chosen.OWN_GATES or hard_concretes(net):
        return net
    return with_gates(net, form, chosen.said, gates)
