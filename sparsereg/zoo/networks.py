"""Networks by name, as the configuration group ``model`` names them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from sparsereg.errors import InputError, nearest


@dataclass(frozen=True)
class Task:
    """What a network has to do.

    Attributes:
        num_classes: number of classes.
        image_shape: (channels, height, width) of the images.
    """

    num_classes: int
    image_shape: tuple[int, int, int]


def _googlenet(
    task: Task, gated: bool, gates: dict[str, Any], *, gate: str, act: str, sampling: str
) -> nn.Module:
    from sparsereg.model.googlenet import GoogleNet

    return GoogleNet(
        task.num_classes,
        task.image_shape[0],
        gate=gate if gated else "none",
        act=act,
        sampling=sampling,
        **gates,
    )


def _lenet300(task: Task, gated: bool, gates: dict[str, Any], **settings: Any) -> nn.Module:
    from sparsereg.model.lenet import LeNet300

    gate = "units" if gated else "none"
    return LeNet300(task.num_classes, task.image_shape, gate=gate, **_with_rates(settings, gates))


def _lenet5(task: Task, gated: bool, gates: dict[str, Any], **settings: Any) -> nn.Module:
    from sparsereg.model.lenet import LeNet5

    gate = "units" if gated else "none"
    return LeNet5(task.num_classes, task.image_shape, gate=gate, **_with_rates(settings, gates))


def _with_rates(settings: dict[str, Any], gates: dict[str, Any]) -> dict[str, Any]:
    """Let ``model.droprate_init``, one rate for each group of gates, win over the one for all."""
    return gates | {k: v for k, v in settings.items() if k != "droprate_init" or v is not None}


def _sparse_mlp(task: Task, gated: bool, gates: dict[str, Any], **settings: Any) -> nn.Module:
    from sparsereg.model.sparse_mlp import SparseMLP

    gate = "weights" if gated else "none"
    return SparseMLP(task.num_classes, task.image_shape, gate=gate, **settings, **gates)


def _torchvision(
    task: Task, gated: bool, gates: dict[str, Any], *, name: str, weights: str | None, **settings: Any
) -> nn.Module:
    from sparsereg.zoo.torchvision import torchvision_network

    # The file of weights is read where training starts: checkpoints have weights of their own.
    return torchvision_network(
        name, task.num_classes, task.image_shape, gated=gated, **settings, **(gates if gated else {})
    )


def _compacted(task: Task, gated: bool, gates: dict[str, Any], **settings: Any) -> nn.Module:
    raise InputError("model=compacted has its structure in its file: give ckpt_path=.../compacted.pt")


NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "googlenet": _googlenet,
    "lenet300": _lenet300,
    "lenet5": _lenet5,
    "sparse_mlp": _sparse_mlp,
    "torchvision": _torchvision,
    "compacted": _compacted,
}
"""Name to builder(task, gated, gate settings, **the other keys of the group)."""


def group(settings: dict[str, Any]) -> str:
    """Return the choice of the configuration group ``model`` that has these settings."""
    return str(settings.get("source", settings["name"]))


def build(settings: dict[str, Any], task: Task, gated: bool, **gates: Any) -> nn.Module:
    """Build the network that the configuration group ``model`` describes.

    Args:
        settings: ``name`` and the keys of that network; with ``source`` that names the builder, and
            ``name`` is one of its networks.
        task: the data's classes and image shape.
        gated: False leaves every gate out.
        **gates: settings of the gates, e.g. droprate_init and temperature.

    Raises:
        InputError: unknown name or unknown key.
        ValueError: a value is outside its range.
    """
    keys = dict(settings)
    name = str(keys.pop("source")) if "source" in keys else str(keys.pop("name"))
    if name not in NETWORKS:
        raise InputError(
            f"model.name={name}: expected one of {', '.join(NETWORKS)}{nearest(name, list(NETWORKS))}"
        )
    try:
        return NETWORKS[name](task, gated, gates, **keys)
    except TypeError as error:
        if "unexpected keyword argument" in str(error):
            raise InputError(f"model={name}: {error}") from error
        raise
