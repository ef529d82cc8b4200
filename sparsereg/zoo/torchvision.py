"""Classification networks of torchvision, with gates by ``sparsereg.gate`` on channels that can go.

They are made for images of 224 x 224 pixels in three colours. Here they get as many input channels and
classes as the data have, and if asked for a stem that does not shrink small images.
"""

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsereg.archives import load_weights, not_finite
from sparsereg.compression import gate
from sparsereg.errors import DamagedFile, InputError, nearest

log = logging.getLogger(__name__)

WITHOUT_AUXILIARY = ("googlenet", "inception_v3")
"""Networks whose auxiliary classifiers are left out: in training they return several answers."""
FAMILIES = ("channels", "units", "heads", "head_dims", "kv_groups", "width")
"""What gets gates: all that can leave the network while it trains, so no whole branches."""
STEM_POOLS = ("maxpool", "maxpool1", "features.pool0")
"""Names of the pooling right behind the first convolution."""


def torchvision_network(
    name: str,
    num_classes: int,
    image_shape: tuple[int, ...],
    *,
    gated: bool = True,
    task: str = "classification",
    small_images: bool = False,
    residual: bool = True,
    **gate_settings: Any,
) -> nn.Module:
    """Build a network with random weights.

    Args:
        name: as torchvision.models calls it, e.g. resnet18.
        num_classes: number of classes, >= 2.
        image_shape: (channels, height, width) of the images.
        gated: False leaves every gate out.
        task: ``classification`` or ``segmentation``, whose networks answer with a dictionary.
        small_images: the first convolution becomes 3x3 with stride 1, pooling behind it is left out.
        residual: whether channels that residual additions tie together get a gate, too.
        **gate_settings: keyword arguments of ``gate`` and of L0Gate.

    Raises:
        InputError: torchvision has no network of that name, it does not fit the images, or a switch is
            neither True nor False.
        ValueError: no channel of it can go.
    """
    from torchvision import models

    for key, switch in {"small_images": small_images, "residual": residual}.items():
        if not isinstance(switch, bool):
            raise InputError(f"model.{key}={switch}: expected true or false")
    known = models.list_models(module=models if task == "classification" else models.segmentation)
    if name not in known:
        raise InputError(
            f"model.name={name}: torchvision has no {task} network of that name"
            f"{nearest(name, known) or '; there are ' + ', '.join(known)}"
        )
    settings: dict[str, Any] = {"weights": None, "num_classes": num_classes}
    if task == "segmentation":
        settings["weights_backbone"] = None
    if name in WITHOUT_AUXILIARY:
        settings |= {"aux_logits": False, "init_weights": True}
    net: nn.Module = models.get_model(name, **settings)
    _read_channels_(net, image_shape[0])
    if small_images:
        _keep_size_(net, name)
    _check_runs(net, name, image_shape)
    if not gated:
        return net
    try:
        settings = {"families": FAMILIES, "residual": residual, **gate_settings}
        return gate(net, torch.zeros(1, *image_shape), **settings)
    except (ValueError, TypeError) as error:
        raise InputError(f"model.name={name}: cannot be gated: {error}") from error


def _first_convolution(net: nn.Module) -> tuple[str, nn.Conv2d]:
    """The first one, which reads the images; every network of torchvision has one."""
    return next((n, m) for n, m in net.named_modules() if isinstance(m, nn.Conv2d))


def _read_channels_(net: nn.Module, channels: int) -> None:
    """Let the first convolution read images of so many channels."""
    name, conv = _first_convolution(net)
    if conv.in_channels != channels:
        net.set_submodule(name, _like(conv, in_channels=channels))


def _keep_size_(net: nn.Module, name: str) -> None:
    """Give the network a stem that keeps the size of its images."""
    at, conv = _first_convolution(net)
    kernel = conv.kernel_size[0]
    if kernel > 7 or conv.stride == (1, 1):
        raise InputError(
            f"model.small_images=true: the stem of {name}, a {kernel}x{kernel} convolution with stride "
            f"{conv.stride[0]}, is not one that can be replaced; leave it out"
        )
    net.set_submodule(at, _like(conv, kernel_size=3, stride=1, padding=1))
    modules = dict(net.named_modules())
    for pool in STEM_POOLS:
        if pool in modules:
            net.set_submodule(pool, nn.Identity())


def _like(conv: nn.Conv2d, **changes: Any) -> nn.Conv2d:
    """A new convolution with the settings of another one but for some changes, and its initialisation."""
    settings: dict[str, Any] = {
        key: getattr(conv, key) for key in ("in_channels", "out_channels", "kernel_size", "stride", "padding")
    }
    made = nn.Conv2d(**(settings | changes), bias=conv.bias is not None)
    nn.init.kaiming_normal_(made.weight, mode="fan_out", nonlinearity="relu")
    if made.bias is not None:
        nn.init.zeros_(made.bias)
    return made


def _check_runs(net: nn.Module, name: str, image_shape: tuple[int, ...]) -> None:
    """Say in one line that a network cannot read images of this size."""
    training = net.training
    try:
        with torch.no_grad():
            net.eval()(torch.zeros(1, *image_shape))
    except (RuntimeError, ValueError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"model.name={name} cannot read images of shape {image_shape}: {reason}") from error
    finally:
        net.train(training)


def load_weights_file_(net: nn.Module, path: str | Path) -> None:
    """Start from a file with the state dict of the network, as torchvision's weights are stored.

    Gates stay as they were initialised; so does the output layer where its classes are others.

    Args:
        net: changed in place.
        path: a file that torch.save wrote.

    Raises:
        InputError: the file is missing or damaged, or does not fit the network.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"model.weights={path}: no such file")
    try:
        given = load_weights(path)
    except (DamagedFile, OSError) as error:
        raise InputError(f"model.weights={path}: not a file of weights: {error}") from error
    if not isinstance(given, dict) or not all(isinstance(v, Tensor) for v in given.values()):
        raise InputError(f"model.weights={path}: expected a state dict, names and tensors")
    own = {k: v for k, v in net.state_dict().items() if ".gate." not in k}
    last = next(reversed(own)).rpartition(".")[0] + "."
    fits = {k: v for k, v in given.items() if k in own and v.shape == own[k].shape}
    missing = [k for k in own if k not in fits and not k.startswith(last)]
    left_over = [k for k in given if k not in own]
    if missing or (left_over and not _auxiliary(left_over)):
        wrong = (missing + left_over)[0]
        raise InputError(f"model.weights={path} does not fit the network, for example in {wrong!r}")
    new = [k for k in own if k not in fits]
    if new:
        log.info("initialised anew, since model.weights has other classes: %s", ", ".join(new))
    if (wrong := not_finite(fits, dict(net.named_parameters()))) is not None:
        raise InputError(f"model.weights={path}: {wrong!r} holds numbers that are not finite")
    net.load_state_dict(fits, strict=False)


def _auxiliary(keys: list[str]) -> bool:
    return all(k.startswith(("aux", "AuxLogits")) for k in keys)
