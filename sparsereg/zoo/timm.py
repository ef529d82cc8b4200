"""Networks of timm with random weights; nothing is fetched."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from sparsereg.data.form import Form
from sparsereg.errors import InputError, nearest
from sparsereg.extras import need

FETCHES = ("pretrained", "checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")
"""Arguments of ``timm.create_model`` that would fetch or read files."""


def timm_network(name: str, form: Form, arguments: Mapping[str, Any]) -> nn.Module:
    """Build a classification network.

    Args:
        name: as timm calls it, e.g. resnet18.
        form: whose classes, channels and image size it gets.
        arguments: further ones of ``timm.create_model``, which win.

    Raises:
        InputError: timm has no network of that name, or it does not take an argument.
        MissingExtra: timm is not installed.
    """
    need("timm", "timm")
    import timm

    said = f"model.name={name}"
    if not timm.is_model(name):
        hint = nearest(name, timm.list_models())
        hub = "; names on a hub are not looked up" if "/" in name or ":" in name else ""
        raise InputError(f"{said}: timm has no network of that name{hint}{hub}")
    for key in FETCHES:
        if arguments.get(key):
            raise InputError(
                f"model.{key}={arguments[key]}: nothing is fetched; a local file of weights is model.weights"
            )
    given: dict[str, Any] = {"num_classes": form.num_classes, "in_chans": form.image_shape[0]}
    known = timm.get_pretrained_cfg(name, allow_unregistered=True)
    if known is not None and known.fixed_input_size:
        given["img_size"] = tuple(form.image_shape[1:])
    rest = {key: tuple(value) if isinstance(value, list) else value for key, value in arguments.items()}
    try:
        made: nn.Module = timm.create_model(name, pretrained=False, **{**given, **rest})
    except (TypeError, ValueError, RuntimeError, AssertionError, LookupError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise InputError(
            f"{said}: cannot be built for images of shape {form.image_shape}: {reason}"
        ) from error
    return made
