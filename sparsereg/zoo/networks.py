"""Networks by name, as the configuration group ``model`` names them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsereg import targets
from sparsereg.errors import InputError
from sparsereg.penalties import hard_concretes
from sparsereg.settings import keys, read
from sparsereg.zoo.config import Network, OwnNetwork


@dataclass(frozen=True)
class Task:
    """What a network has to do.

    Attributes:
        num_classes: number of classes.
        image_shape: (channels, height, width) of the images.
    """

    num_classes: int
    image_shape: tuple[int, ...]


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


def _own(settings: OwnNetwork, task: Task, gated: bool, gates: dict[str, Any]) -> nn.Module:
    """Build the network that the user named; put gates into it if it should have some and has none."""
    from sparsereg.compression import gate

    said = f"model._target_={settings._target_}"
    offered = {**vars(task), "in_channels": task.image_shape[0], "gated": gated, **gates}
    net = targets.call(settings.spec, "model", **offered)
    if not isinstance(net, nn.Module):
        raise InputError(f"{said}: expected a torch.nn.Module, it makes a {type(net).__name__}")
    _check_answer(net, task, said)
    own_gates = bool(hard_concretes(net))
    if own_gates and not gated:
        raise InputError(
            f"{said}: the network has gates of its own, but none are wanted (without_using_gate=true): take"
            " an argument gated in its constructor, which is false then"
        )
    if own_gates or not gated:
        return net
    try:
        return gate(net, torch.zeros(1, *task.image_shape), **gates)
    except ValueError as error:
        raise InputError(f"{said}: cannot be gated: {error}") from error


def _check_answer(net: nn.Module, task: Task, said: str) -> None:
    """Raise an InputError unless a network answers to images with a logit for each class."""
    training = net.training
    try:
        with torch.no_grad():
            answer = net.eval()(torch.zeros(2, *task.image_shape))
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise InputError(f"{said}: cannot read images of shape {task.image_shape}: {reason}") from error
    finally:
        net.train(training)
    expected = (2, task.num_classes)
    if not isinstance(answer, Tensor) or tuple(answer.shape) != expected:
        found = f"shape {tuple(answer.shape)}" if isinstance(answer, Tensor) else f"a {type(answer).__name__}"
        raise InputError(f"{said}: expected logits of shape {expected} for two images, got {found}")


NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "googlenet": _googlenet,
    "lenet300": _lenet300,
    "lenet5": _lenet5,
    "sparse_mlp": _sparse_mlp,
    "torchvision": _torchvision,
    "compacted": _compacted,
}
"""Name to builder(task, gated, gate settings, **the other keys of the group)."""


def build(settings: Network | Mapping[str, Any], task: Task, gated: bool, **gates: Any) -> nn.Module:
    """Build the network that the configuration group ``model`` describes.

    Args:
        settings: of the network, or its keys with ``name`` among them; see ``sparsereg.zoo.config``.
        task: the data's classes and image shape.
        gated: False leaves every gate out.
        **gates: settings of the gates, e.g. droprate_init and temperature.

    Raises:
        InputError: unknown name or unknown key.
        ValueError: a value is outside its range.
    """
    chosen = settings if isinstance(settings, Network) else read(Network, settings, "model")
    if isinstance(chosen, OwnNetwork):
        if chosen is not settings:
            raise InputError(f"model._target_={chosen._target_} comes from a file, which is data")
        return _own(chosen, task, gated, gates)
    values = {name: getattr(chosen, name) for name in keys(type(chosen))}
    values.pop("source" if "source" in values else "name")
    return NETWORKS[chosen.group](task, gated, gates, **values)
