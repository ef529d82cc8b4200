"""The settings of ``model=...``: one class for each kind of network.

Nothing here imports PyTorch: the command line is checked before anything slow is loaded.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from sparsereg.errors import InputError
from sparsereg.settings import RATE, Settings, count, one_of, setting, within
from sparsereg.targets import TARGET, is_own

_DROPOUT = within("[0, 1)", "a rate")


@dataclass(frozen=True)
class Network(Settings):
    """A network by name."""

    name: str = setting("", "the network")

    @classmethod
    def kind_of(cls, given: Mapping[str, Any], where: str) -> type[Settings]:
        """The kind that ``source`` names, or ``name`` without a source; your own with ``_target_``."""
        if is_own(given):
            return OwnNetwork
        key = "source" if "source" in given else "name"
        if key not in given:
            raise InputError(f"{where}.name is missing: expected one of {', '.join(CONFIGS)}")
        one_of(given[key], f"{where}.{key}", list(CONFIGS))
        return CONFIGS[given[key]]

    @property
    def group(self) -> str:
        """The choice of the configuration group ``model`` that has these settings."""
        return group_of(vars(self))


def _sampling() -> Any:
    return setting(
        "batch",
        "batch: gates shared by a batch, which BatchNorm takes in; example: drawn for each image",
        choices=("batch", "example"),
    )


@dataclass(frozen=True)
class GoogleNetModel(Network):
    """The small GoogleNet, 260,650 weights for ten classes."""

    name: str = setting("googlenet", "", choices=("googlenet",))
    gate: str = setting(
        "branches",
        "branches: the four branches of each block; all: every channel that can go; none",
        choices=("branches", "all", "none"),
    )
    act: str = setting("relu", "activation", choices=("relu", "leaky_relu", "gelu", "tanh"))
    sampling: str = _sampling()


@dataclass(frozen=True)
class LeNet300Model(Network):
    """LeNet-300-100: dense layers of 300 and 100 units, gates on the input pixels and on the hidden units."""

    name: str = setting("lenet300", "", choices=("lenet300",))
    sampling: str = _sampling()
    droprate_init: float | tuple[float, ...] | None = setting(
        None,
        "one rate for each group of gates (input pixels, 300 units, 100 units); null: the general"
        " droprate_init",
        RATE,
    )
    dropout: float | tuple[float, ...] = setting(
        0.0, "rate of dropped activations in training, for all or one for each of these groups", _DROPOUT
    )


@dataclass(frozen=True)
class LeNet5Model(Network):
    """LeNet-5 as in Caffe: 20 and 50 filters, 500 units, gates on filters and on the dense layers' units."""

    name: str = setting("lenet5", "", choices=("lenet5",))
    sampling: str = _sampling()
    droprate_init: float | tuple[float, ...] | None = setting(
        None,
        "one rate for each group of gates (20 filters, 50 filters, units that enter the dense layers, 500"
        " units); null: the general droprate_init",
        RATE,
    )
    dropout: float | tuple[float, ...] = setting(
        0.0, "rate of dropped activations in training, for all or one for each of these groups", _DROPOUT
    )


@dataclass(frozen=True)
class SparseMlpModel(Network):
    """Dense layers with a gate on every weight: saves storage, not time."""

    name: str = setting("sparse_mlp", "", choices=("sparse_mlp",))
    hidden_sizes: tuple[int, ...] = setting(
        (300, 100), "sizes of the hidden layers; []: none", count(), empty=True
    )


@dataclass(frozen=True)
class TorchvisionModel(Network):
    """A classification network of torchvision, e.g. model.name=mobilenet_v2, gated where channels can go."""

    source: str = setting("torchvision", "", choices=("torchvision",))
    name: str = setting("resnet18", "torchvision's name of it")
    weights: str | None = setting(
        None, "file with its state dict, e.g. pretrained; an output layer of other classes starts anew"
    )
    small_images: bool = setting(
        False, "true: a stem for 32 x 32 images, a 3x3 convolution that keeps their size and no pooling"
    )
    residual: bool = setting(True, "gates on channels that residual additions tie together, too")
    sampling: str = _sampling()


@dataclass(frozen=True)
class CompactedModel(Network):
    """A network that was made smaller; its structure is in the file that ckpt_path names."""

    name: str = setting("compacted", "", choices=("compacted",))


@dataclass(frozen=True)
class OwnNetwork(Network):
    """A network of yours: model._target_=my_module.Net model.KEY=VALUE; docs/extending.md.

    All keys are arguments of that class or function. num_classes, image_shape, in_channels, droprate_init,
    temperature and gated are given, too, where its signature has them. One without gates gets some.
    """

    OTHERS: ClassVar[str | None] = "arguments"

    name: str = setting("own", "", key=False)
    _target_: str | None = setting(None, "package.module.Class, of an nn.Module from images to logits")
    arguments: Mapping[str, Any] = setting(dict, "of that class")

    @property
    def spec(self) -> dict[str, Any]:
        """What is called, with its arguments."""
        return {TARGET: self._target_, **self.arguments}


CONFIGS: dict[str, type[Network]] = {
    "googlenet": GoogleNetModel,
    "lenet300": LeNet300Model,
    "lenet5": LeNet5Model,
    "sparse_mlp": SparseMlpModel,
    "torchvision": TorchvisionModel,
    "compacted": CompactedModel,
    "own": OwnNetwork,
}
"""Settings of each ``model=NAME``."""


def group_of(given: Mapping[str, Any]) -> str:
    """Return the choice of the configuration group ``model`` that has these keys."""
    return "own" if is_own(given) else str(given.get("source", given.get("name")))


def weights_file(network: Network) -> str | None:
    """Return the file that a network's weights are read from, if its kind has one."""
    return network.weights if isinstance(network, TorchvisionModel) else None
