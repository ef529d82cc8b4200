"""What the settings of every ``model=`` have.

Nothing here imports PyTorch: the command line is checked before anything slow is loaded.
"""

import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from sparsereg.errors import InputError
from sparsereg.own_code import is_own
from sparsereg.settings import POSITIVE, Contradiction, Settings, count, keys, one_of, setting, within
from sparsereg.target_settings import FAMILIES
from sparsereg.zoo import kinds

KINDS = tuple(module.name for module in pkgutil.iter_modules(kinds.__path__))
"""Their names."""
DROPOUT = within("[0, 1)", "a rate")


@dataclass(frozen=True)
class Network(Settings):
    """A network by name."""

    TASKS: ClassVar[tuple[str, ...]] = ("classification",)
    """What it can learn; () for anything."""
    DATA: ClassVar[tuple[str, ...]] = ()
    """Choice of the data where the user names none; () for that of train.yaml."""
    PRETRAINED: ClassVar[bool] = False
    """Whether its builder is told if it is to read weights, too."""
    OWN_GATES: ClassVar[bool] = False
    """Whether its gates are placed by its author, not by ``sparsereg.gate``."""
    ABOUT_GATES: ClassVar[tuple[str, ...]] = ()
    """Keys that say what ``sparsereg.gate`` may do; its builder does not take them."""

    name: str = setting("", "the network")

    @classmethod
    def kind_of(cls, given: Mapping[str, Any], where: str) -> type[Settings]:
        """The kind that ``source`` names, or ``name`` without a source; your own with ``_target_``."""
        if is_own(given):
            return kind("own")
        key = "source" if "source" in given else "name"
        if key not in given:
            raise InputError(f"{where}.name is missing: expected one of {', '.join(KINDS)}")
        one_of(given[key], f"{where}.{key}", list(KINDS))
        return kind(given[key])

    @property
    def group(self) -> str:
        """The choice of the configuration group ``model`` that has these settings."""
        return group_of(vars(self))

    @property
    def limits(self) -> dict[str, Any]:
        """What ``sparsereg.gate`` is told about which units may go; {} for all that can."""
        return {}

    @property
    def structure(self) -> dict[str, Any]:
        """The keys that its builder takes: all but those about gates, and the one that names its kind."""
        known = keys(type(self))
        excluded = ("source" if "source" in known else "name", *self.ABOUT_GATES)
        return {name: getattr(self, name) for name in known if name not in excluded}

    @property
    def said(self) -> str:
        """As the user gives it."""
        return f"model={self.group}"


def kind(name: str) -> "type[Network]":
    """Return the settings of a kind of network."""
    found: type[Network] = importlib.import_module(f"{kinds.__name__}.{name}").NETWORK
    return found


def group_of(given: Mapping[str, Any]) -> str:
    """Return the choice of the configuration group ``model`` that has these keys."""
    return "own" if is_own(given) else str(given.get("source", given.get("name")))


def sampling() -> Any:
    """When gates are drawn."""
    return setting(
        "batch",
        "batch: gates shared by a batch, which BatchNorm takes in; example: drawn for each image",
        choices=("batch", "example"),
    )


def weights() -> Any:
    """The file that weights are read from."""
    return setting(
        None, "file with its state dict, e.g. pretrained; an output layer of other classes starts anew"
    )


def with_rates(settings: dict[str, Any], gates: dict[str, Any]) -> dict[str, Any]:
    """Let ``model.droprate_init``, one rate for each group of gates, win over the one for all."""
    return gates | {k: v for k, v in settings.items() if k != "droprate_init" or v is not None}


@dataclass(frozen=True)
class Gateable(Network):
    """A network that gets its gates by its operations: on all that can go, or on what is asked for."""

    ABOUT_GATES: ClassVar[tuple[str, ...]] = ("gate", "gate_layers")

    gate: str | tuple[str, ...] | None = setting(
        None, "what gets gates, e.g. heads or [heads,units]; null: all that can go", choices=tuple(FAMILIES)
    )
    gate_layers: str | tuple[str, ...] | None = setting(
        None, "which layers get gates: a pattern of their names, e.g. blocks.*.mlp.*, or several; null: all"
    )

    @property
    def limits(self) -> dict[str, Any]:
        """The families and layers that were asked for."""
        asked = {"families": self.gate, "layers": self.gate_layers}
        return {key: value for key, value in asked.items() if value is not None}


@dataclass(frozen=True)
class Transformer(Gateable):
    """Sizes and kinds of parts of a transformer."""

    width: int = setting(128, "of the residual stream, a multiple of heads", count())
    depth: int = setting(4, "number of blocks", count())
    heads: int = setting(4, "of each attention", count())
    mlp_ratio: float = setting(4.0, "units of an MLP over the width; two thirds of that for swiglu", POSITIVE)
    mlp: str = setting("gelu", "kind of the MLPs", choices=("gelu", "swiglu"))
    norm: str = setting("layer", "kind of the norms", choices=("layer", "rms"))
    dropout: float = setting(0.0, "rate of what attention and MLP add, dropped in training", DROPOUT)

    def check(self) -> None:
        """Heads share the width."""
        if self.width % self.heads:
            raise Contradiction(f"{{}}width={self.width} is no multiple of {{}}heads={self.heads}")
