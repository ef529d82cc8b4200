"""The settings of ``model=...``: one class for each kind of network.

Nothing here imports PyTorch: the command line is checked before anything slow is loaded.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from sparsereg.errors import InputError
from sparsereg.settings import POSITIVE, RATE, Contradiction, Settings, again, count, one_of, setting, within
from sparsereg.targets import Own, is_own

_DROPOUT = within("[0, 1)", "a rate")


@dataclass(frozen=True)
class Network(Settings):
    """A network by name."""

    TASKS: ClassVar[tuple[str, ...]] = ("classification",)
    """What it can learn; () for anything."""
    DATA: ClassVar[tuple[str, ...]] = ()
    """Choice of the data where the user names none; () for that of train.yaml."""

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

    @property
    def said(self) -> str:
        """As the user gives it."""
        return f"model={self.group}"


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
class _Transformer(Network):
    """Sizes and kinds of parts of a transformer."""

    width: int = setting(128, "of the residual stream, a multiple of heads", count())
    depth: int = setting(4, "number of blocks", count())
    heads: int = setting(4, "of each attention", count())
    mlp_ratio: float = setting(4.0, "units of an MLP over the width; two thirds of that for swiglu", POSITIVE)
    mlp: str = setting("gelu", "kind of the MLPs", choices=("gelu", "swiglu"))
    norm: str = setting("layer", "kind of the norms", choices=("layer", "rms"))
    dropout: float = setting(0.0, "rate of what attention and MLP add, dropped in training", _DROPOUT)

    def check(self) -> None:
        """Heads share the width."""
        if self.width % self.heads:
            raise Contradiction(f"{{}}width={self.width} is no multiple of {{}}heads={self.heads}")


@dataclass(frozen=True)
class GptModel(_Transformer):
    """A small decoder of bytes or other tokens: a language model, or a classifier of texts."""

    TASKS: ClassVar[tuple[str, ...]] = ("language_model", "text_classification")
    DATA: ClassVar[tuple[str, ...]] = ("data=text",)
    CHOICE: ClassVar[tuple[str, ...]] = ("model=gpt",)

    name: str = setting("gpt", "", choices=("gpt",))
    positions: str = setting("rotary", "how places are told apart", choices=("rotary", "learned"))
    tied: bool = setting(True, "the output layer of a language model has the weights of the embedding")


@dataclass(frozen=True)
class VitModel(_Transformer):
    """A small vision transformer: images in patches."""

    name: str = setting("vit", "", choices=("vit",))
    width: int = again(_Transformer, "width", 64)
    depth: int = again(_Transformer, "depth", 6)
    patch_size: int = setting(4, "height and width of a patch, in pixels", count())


@dataclass(frozen=True)
class UNetModel(Network):
    """A small U-Net for segmentation."""

    TASKS: ClassVar[tuple[str, ...]] = ("segmentation",)
    CHOICE: ClassVar[tuple[str, ...]] = ("model=unet",)

    name: str = setting("unet", "", choices=("unet",))
    width: int = setting(16, "channels of the first level; each further one has twice as many", count())
    depth: int = setting(3, "how often height and width are halved", within("[1, 12]", "an integer"))


@dataclass(frozen=True)
class TorchvisionModel(Network):
    """A network of torchvision, e.g. model.name=mobilenet_v2, gated where channels can go.

    Its segmentation networks, e.g. model.name=lraspp_mobilenet_v3_large, for data with masks.
    """

    TASKS: ClassVar[tuple[str, ...]] = ("classification", "segmentation")

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
class TimmModel(Network):
    """A network of timm with random weights, e.g. model.name=convnext_atto; other keys are its arguments."""

    OTHERS: ClassVar[str | None] = "arguments"

    source: str = setting("timm", "", choices=("timm",))
    name: str = setting("resnet18", "timm's name of it")
    weights: str | None = again(TorchvisionModel, "weights", None)
    arguments: Mapping[str, Any] = setting(dict, "of timm.create_model")


@dataclass(frozen=True)
class HuggingFaceModel(Network):
    """A network of Hugging Face's transformers; other keys change its configuration. Nothing is fetched."""

    OTHERS: ClassVar[str | None] = "arguments"
    TASKS: ClassVar[tuple[str, ...]] = (
        *("classification", "segmentation", "language_model", "text_classification"),
    )

    source: str = setting("huggingface", "", choices=("huggingface",))
    name: str = setting(
        "", "its type, such as bert or llama; null or empty: that of model.config", empty=True
    )
    config: str | None = setting(
        None, "a config.json, for random weights; or a local folder with one, and perhaps with weights"
    )
    described: Mapping[str, Any] | None = setting(None, "what model.config held: a run notes it here")
    arguments: Mapping[str, Any] = setting(dict, "of its configuration, such as num_hidden_layers")


@dataclass(frozen=True)
class CompactedModel(Network):
    """A network that was made smaller; its structure is in the file that ckpt_path names."""

    TASKS: ClassVar[tuple[str, ...]] = ()

    name: str = setting("compacted", "", choices=("compacted",))


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


CONFIGS: dict[str, type[Network]] = {
    "googlenet": GoogleNetModel,
    "lenet300": LeNet300Model,
    "lenet5": LeNet5Model,
    "sparse_mlp": SparseMlpModel,
    "gpt": GptModel,
    "vit": VitModel,
    "unet": UNetModel,
    "torchvision": TorchvisionModel,
    "timm": TimmModel,
    "huggingface": HuggingFaceModel,
    "compacted": CompactedModel,
    "own": OwnNetwork,
}
"""Settings of each ``model=NAME``."""


def group_of(given: Mapping[str, Any]) -> str:
    """Return the choice of the configuration group ``model`` that has these keys."""
    return "own" if is_own(given) else str(given.get("source", given.get("name")))


def weights_file(network: Network) -> str | None:
    """Return the file that a network's weights are read from, if its kind has one."""
    return network.weights if isinstance(network, TorchvisionModel | TimmModel) else None
