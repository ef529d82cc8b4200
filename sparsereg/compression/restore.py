"""A compacted network in the class that its author wrote, where that can hold it.

Which arguments of the class belong to which sizes is found by trying: one argument is changed, the class is
built without memory for its weights, and the sizes that follow it are those that it decides on. What comes
out has to give the same answers.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from sparsereg.compression.compact import compact
from sparsereg.compression.running import doubled, tensors_in
from sparsereg.compression.units.explain import inputs_of
from sparsereg.compression.verify import difference
from sparsereg.errors import InputError
from sparsereg.penalties import hard_concretes

Build = Callable[..., nn.Module]
Key = tuple[str, int | None]
"""An argument, or a position in one that is a list."""
Values = dict[Key, float]
Dim = tuple[str, int]
"""A parameter and an axis of it."""

_NOT_SIZES = ("vocab", "token", "label", "class", "position", "layers", "depth", "chans", "image", "patch")
"""Parts of names of arguments that no gate changes."""
_QUERIES = ("q_proj", "query.", "q_lin", ".q.", "to_q", "wq")
_FUSED = ("qkv", "in_proj", "c_attn", "query_key_value")
"""Parts of names of weights that make queries, and of those that make them first of three."""
_SIZES = ("inner", "intermediate", "hidden", "ff", "dim", "size", "heads")
"""Parts of names of arguments that may be sizes where nothing is said."""
_TRIED = (16, 32)
"""Values of such an argument with which its class is tried."""
_TOLERANCE = 1e-6
"""Of the spread of the answers, in float64."""


def restore_class(
    network: nn.Module, original: nn.Module, example_input: Any, build: Build | None = None
) -> nn.Module:
    """Return a smaller network as an object of the class of the original one, with the right arguments.

    The class must be able to hold the shape: the same sizes in all layers that one argument decides on
    (``shape=uniform``). A model of transformers gets a configuration of its own, so that ``save_pretrained``
    and ``from_pretrained`` know it. Where attention's heads have become smaller, its scale is put into the
    weights of the queries.

    Args:
        network: with gates, or what ``compact`` made of it.
        original: the network without gates; left as it is.
        example_input: one batch as the network takes it.
        build: makes the original network, and others with arguments of its class by name, for instance
            ``functools.partial(timm.create_model, "vit_tiny_patch16_224", num_classes=10)``; known for
            models of transformers, timm and of classes that keep their arguments if None.

    Raises:
        InputError: the class cannot hold the shape; the layers that differ are named. Or the arguments of
            the original network are not known.

    Example:
        >>> from sparsereg import gate
        >>> from sparsereg.compression import compact
        >>> class Net(nn.Sequential):
        ...     def __init__(self, hidden=4):
        ...         super().__init__(nn.Linear(3, hidden), nn.ReLU(), nn.Linear(hidden, 2))
        >>> gated = gate(Net().eval(), torch.ones(1, 3))
        >>> _ = gated[0].gate.gates.log_alpha.data.copy_(torch.tensor([9.0, -9.0, 9.0, -9.0]))
        >>> restore_class(gated, Net(), torch.ones(1, 3))[0]
        Linear(in_features=3, out_features=2, bias=True)
    """
    smaller = compact(network, example_input) if hard_concretes(network) else network
    if not isinstance(smaller, fx.GraphModule):
        raise ValueError("network must have gates, or be what compact() returned")
    restorer = _Restorer(original, build or _builder(original), _weights(smaller, original))
    reasons: list[InputError] = []
    for values in restorer.candidates(reasons):
        try:
            return restorer.made(values, smaller, example_input)
        except InputError as error:
            reasons.append(error)
    raise reasons[0]


def _weights(smaller: fx.GraphModule, original: nn.Module) -> dict[str, Tensor]:
    """What is left of each parameter and buffer of the original network, by its name."""
    there = {**dict(smaller.named_parameters(remove_duplicate=False)), **dict(smaller.named_buffers())}
    found: dict[str, Tensor] = {}
    own = {**dict(original.named_parameters(remove_duplicate=False)), **dict(original.named_buffers())}
    by_object: dict[int, str] = {}
    for name, value in own.items():
        first = by_object.setdefault(id(value), name)
        for known in (name, name.replace(".", "_"), first, first.replace(".", "_")):
            if known in there:
                found[name] = there[known].detach()
                break
    return found


@dataclass
class _Restorer:
    """Looks for the arguments with which a class has given shapes.

    Attributes:
        original: the network that was gated.
        build: makes networks of its class.
        wanted: what is left of the weights.
    """

    original: nn.Module
    build: Build
    wanted: dict[str, Tensor]

    def __post_init__(self) -> None:
        self.start = dict(_arguments(self.original))
        self.said: Values = {}
        self.first = self._shapes({})
        own = {n: tuple(p.shape) for n, p in self.original.named_parameters(remove_duplicate=False)}
        self.said = dict(self._unsaid(own))
        self.start |= self.said
        if self.first != own:
            raise InputError(
                f"restore_class: the arguments that {self._name} was made with are not known:"
                " give build=, which makes it and takes arguments of its class by name"
            )
        lost = [n for n in own if n not in self.wanted]
        if lost:
            raise InputError(
                f"restore_class: {self._name} cannot be without {lost[0]}"
                f"{f' and {len(lost) - 1} more' if len(lost) > 1 else ''}, which is gone with its branch"
            )

    @property
    def _name(self) -> str:
        return type(self.original).__name__

    def _shapes(self, values: Values) -> dict[str, tuple[int, ...]]:
        with torch.device("meta"):
            made = self.build(**_by_name(self.start, {**self.said, **values}))
        return {n: tuple(p.shape) for n, p in made.named_parameters(remove_duplicate=False)}

    def _unsaid(self, own: dict[str, tuple[int, ...]]) -> Iterator[tuple[Key, float]]:
        """Arguments that are left to the class, with the values that give the sizes which it chose."""
        for name in _unsaid(self.original):
            key, tried = (name, None), []
            for value in _TRIED:
                try:
                    with torch.device("meta"):
                        made = self.build(**{name: value})
                    tried.append(
                        {n: tuple(p.shape) for n, p in made.named_parameters(remove_duplicate=False)}
                    )
                except Exception:
                    break
            found = set(_implied(own, *tried)) if len(tried) == len(_TRIED) else set()
            if len(found) == 1:
                yield key, found.pop()

    def candidates(self, reasons: list[InputError]) -> Iterator[Values]:
        """Arguments to try: as many heads as there were, or fewer; why some are none is noted."""
        heads = [k for k, v in self.start.items() if "head" in k[0] and "dim" not in k[0] and v > 1]
        most = int(max((self.start[k] for k in heads), default=1))
        for number in range(most, 0, -1):
            fixed = {k: max(1.0, self.start[k] * number / most) for k in heads}
            if any(v != int(v) for v in fixed.values()):
                continue
            try:
                found = self._solved(fixed if number < most else {})
            except InputError as error:
                reasons.append(error)
                continue
            yield found

    def _solved(self, values: Values) -> Values:
        """Values of arguments with which the class has the wanted shapes."""
        refused = ""
        for _ in range(len(self.start) + 1):
            try:
                now, refused = self._shapes(values), ""
            except Exception as error:
                now, refused = self.first, (str(error) or type(error).__name__).strip().partition("\n")[0]
            missing = {
                (n, d) for n, s in now.items() for d, size in enumerate(s) if size != self.wanted[n].shape[d]
            }
            if not missing:
                return values
            moved = {key: self._moved(key, values, now) for key in self.start if key not in values}
            key = self._best(moved, missing)
            if key is None:
                break
            if refused:  # another argument would have to explain what this one does not
                raise InputError(self._refused(values, refused))
            values = {**values, key: self._value(key, moved, now)}
        raise InputError(self._refused(values, refused) if refused else self._ragged(missing, now))

    def _best(self, moved: Mapping[Key, Mapping[Dim, float]], missing: set[Dim]) -> Key | None:
        """The argument that alone decides on most of the sizes that are wrong."""
        counts = {key: len(self._alone(key, moved, missing)) for key in moved}
        best = max(counts, key=lambda key: counts[key], default=None)
        return best if best is not None and counts[best] else None

    def _alone(self, key: Key, moved: Mapping[Key, Mapping[Dim, float]], missing: set[Dim]) -> list[Dim]:
        own = [dim for dim in moved[key] if dim in missing]
        alone = [d for d in own if not any(d in moved[other] for other in moved if other != key)]
        return alone or own

    def _moved(self, key: Key, values: Values, now: dict[str, tuple[int, ...]]) -> dict[Dim, float]:
        """Sizes that follow an argument: by how much for each unit of it."""
        for factor in (2, 3, 0.5):
            value = self.start[key] * factor
            try:
                then = self._shapes({**values, key: value})
            except Exception:
                continue
            step = value - self.start[key]
            base = now if values else self.first
            return {
                (n, d): (then[n][d] - size) / step
                for n, s in base.items()
                for d, size in enumerate(s)
                if n in then and then[n][d] != size
            }
        return {}

    def _value(
        self,
        key: Key,
        moved: Mapping[Key, Mapping[Dim, float]],
        now: dict[str, tuple[int, ...]],
    ) -> float:
        """The value of an argument with which the sizes are right; they have to agree."""
        found: dict[float, list[str]] = {}
        alone = [d for d in moved[key] if not any(d in moved[o] for o in moved if o != key)] or list(
            moved[key]
        )
        for n, d in alone:
            value = self.start[key] + (self.wanted[n].shape[d] - now[n][d]) / moved[key][n, d]
            found.setdefault(round(value, 6), []).append(n)
        if len(found) == 1:
            return next(iter(found))
        said = "; ".join(f"{v:g} in {_some(names)}" for v, names in sorted(found.items())[:4])
        raise InputError(
            f"restore_class: {self._name} has one {key[0]} for all layers, and these differ now: {said};"
            " train with shape=uniform and with families that one argument does not tie, or keep what"
            " compact() returned"
        )

    def _refused(self, values: Values, why: str) -> str:
        said = ", ".join(f"{name}={value:g}" for (name, _), value in values.items())
        return f"restore_class: {self._name} refuses {said}: {why}"

    def _ragged(self, missing: set[Dim], now: dict[str, tuple[int, ...]]) -> str:
        layers = sorted({n for n, _ in missing})
        first = layers[0]
        return (
            f"restore_class: no arguments of {self._name} give the shape of {_some(layers)}: {first} is"
            f" {tuple(self.wanted[first].shape)} now, and would be {now[first]}"
        )

    def made(self, values: Values, smaller: nn.Module, example: Any) -> nn.Module:
        """The network, if it gives the same answers."""
        network = self.build(**_by_name(self.start, {**self.said, **values})).to(
            next(iter(self.wanted.values())).device
        )
        here = network.state_dict()
        fits = {n: v for n, v in self.wanted.items() if n in here and here[n].shape == v.shape}
        network.load_state_dict({**here, **fits})
        network.eval()
        off = _difference(network, smaller, example)
        if off > _TOLERANCE:
            _scale_queries_(network, self.original)
            off = _difference(network, smaller, example)
        if off > _TOLERANCE:
            raise InputError(
                f"restore_class: {self._name} has the shape but gives other answers, by {off:.1g} of their"
                " spread; keep what compact() returned"
            )
        return network.train(self.original.training)


def _some(names: list[str]) -> str:
    names = list(dict.fromkeys(names))
    return ", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")


@torch.no_grad()
def _difference(network: nn.Module, smaller: nn.Module, example: Any) -> float:
    """Largest difference of the answers in float64, as a share of their spread."""
    args, kwargs = doubled(inputs_of(example))
    one = tensors_in(copy.deepcopy(network).double()(*args, **kwargs))
    two = tensors_in(copy.deepcopy(smaller).double()(*args, **kwargs))
    if [a.shape for a in one] != [b.shape for b in two]:
        return math.inf
    return max((difference(b, a) for a, b in zip(one, two, strict=True)), default=0.0)


@torch.no_grad()
def _scale_queries_(network: nn.Module, original: nn.Module) -> None:
    """Multiply what makes queries, so that scores have the scale of heads of the original size."""
    one, two = _head_size(network), _head_size(original)
    if not one or not two or one == two:
        return
    factor = math.sqrt(one / two)
    for name, value in network.named_parameters():
        if any(part in f".{name}" for part in _FUSED):
            axis = value.dim() - 1 if "c_attn" in name else 0
            value.narrow(axis, 0, value.shape[axis] // 3).mul_(factor)
        elif any(part in f".{name}" for part in _QUERIES):
            value.mul_(factor)


def _head_size(network: nn.Module) -> int:
    for module in network.modules():
        for name in ("head_dim", "attention_head_size"):
            size = getattr(module, name, None)
            if isinstance(size, int):
                return size
    return 0


def _by_name(start: Values, values: Values) -> dict[str, Any]:
    """Arguments of the class: those that are changed, lists whole."""
    found: dict[str, Any] = {}
    for (name, place), value in values.items():
        number = (
            int(value)
            if value == int(value) and float(start[name, place]) == int(start[name, place])
            else value
        )
        if place is None:
            found[name] = number
            continue
        if name not in found:
            found[name] = [int(v) for (n, _), v in start.items() if n == name]
        found[name][place] = number
    return found


def _arguments(original: nn.Module) -> Iterator[tuple[Key, float]]:
    """Arguments of a network's class that may be sizes, with the values that it was made with."""
    config: Any = getattr(original, "config", None)
    if hasattr(config, "to_dict"):
        known = dict(config.to_dict())
    else:
        signature = inspect.signature(type(original).__init__).parameters.values()
        known = {p.name: _kept(original, p) for p in signature if p.name != "self"}
    for name, value in known.items():
        if any(part in name for part in _NOT_SIZES) or isinstance(value, bool):
            continue
        if isinstance(value, int | float) and value >= 1:
            yield (name, None), float(value)
        elif isinstance(value, list | tuple) and value and all(type(v) is int and v > 0 for v in value):
            yield from (((name, i), float(v)) for i, v in enumerate(value))


def _unsaid(original: nn.Module) -> Iterator[str]:
    """Names of sizes that a configuration leaves to the class."""
    config: Any = getattr(original, "config", None)
    if not hasattr(config, "to_dict"):
        return
    known = config.to_dict()
    wanted = [n for n, value in known.items() if value is None and any(part in n for part in _SIZES)]
    yield from dict.fromkeys([*wanted, *(n for n in ("head_dim",) if known.get(n) is None)])


def _implied(own: dict[str, tuple[int, ...]], *tried: dict[str, tuple[int, ...]]) -> Iterator[float]:
    """What an argument would have to be for the sizes that a network has, from those of two others."""
    one, two = tried
    for name, shape in own.items():
        for d, size in enumerate(shape):
            slope = (two[name][d] - one[name][d]) / (_TRIED[1] - _TRIED[0])
            if slope:
                yield round(_TRIED[0] + (size - one[name][d]) / slope, 6)


def _kept(original: nn.Module, parameter: inspect.Parameter) -> Any:
    """The value of an argument: what the network or a part of it keeps under its name, or the default."""
    for module in original.modules():
        value = module.__dict__.get(parameter.name)
        if isinstance(value, int | float | tuple | list):
            return value
    return None if parameter.default is inspect.Parameter.empty else parameter.default


def _builder(original: nn.Module) -> Build:
    """How a network was made, as far as it can be known."""
    config: Any = getattr(original, "config", None)
    if hasattr(config, "to_dict"):
        return lambda **values: _of_config(original, values)
    pretrained = getattr(original, "pretrained_cfg", None)
    name = getattr(pretrained, "architecture", None) or (pretrained or {}).get("architecture")
    if name:
        return lambda **values: _of_timm(original, name, values)
    return lambda **values: type(original)(**{**_required(original), **values})


def _of_config(original: nn.Module, values: dict[str, Any]) -> nn.Module:
    config: Any = original.config
    cls = type(original)
    more = {}
    if "add_pooling_layer" in inspect.signature(cls.__init__).parameters:
        more["add_pooling_layer"] = getattr(original, "pooler", None) is not None
    made: nn.Module = cls(type(config)(**{**config.to_dict(), **values}), **more)
    return made


def _of_timm(original: nn.Module, name: str, values: dict[str, Any]) -> nn.Module:
    import timm

    settings: dict[str, Any] = {"num_classes": getattr(original, "num_classes", 1000)}
    size = getattr(getattr(original, "patch_embed", None), "img_size", None)
    if size is not None:
        settings["img_size"] = size
    first = next((m for m in original.modules() if isinstance(m, nn.Conv2d)), None)
    if first is not None:
        settings["in_chans"] = first.in_channels
    made: nn.Module = timm.create_model(name, pretrained=False, **settings, **values)
    return made


def _required(original: nn.Module) -> dict[str, Any]:
    """All arguments of a class that a network keeps by name, and those without a default."""
    found = {}
    for parameter in inspect.signature(type(original).__init__).parameters.values():
        named = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        if parameter.name == "self" or not named:
            continue
        value = _kept(original, parameter)
        if value is None and parameter.default is inspect.Parameter.empty:
            value = (
                _number_of_layers(original)
                if "layer" in parameter.name or "depth" in parameter.name
                else None
            )
        if value is not None:
            found[parameter.name] = value
    return found


def _number_of_layers(original: nn.Module) -> int:
    """The most modules of one class in one list."""
    lists = [m for m in original.modules() if isinstance(m, nn.ModuleList | nn.Sequential)]
    return max((len(m) for m in lists if len({type(c) for c in m}) == 1), default=0)
