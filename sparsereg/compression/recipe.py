"""How a network was made: what was called, and the numbers among the arguments."""

from __future__ import annotations

import copy
import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

Build = Callable[..., nn.Module]
Path = tuple[str | int, ...]
"""Where a number is: the name of an argument, then positions, keys and attributes in it."""
Values = dict[Path, float]
Shapes = dict[str, tuple[int, ...]]

_OPAQUE = (nn.Module, Tensor, type, FunctionType, MethodType, ModuleType, str, torch.dtype)
_LARGEST = 8
"""Levels of containers and settings inside of one another that are looked through."""


@dataclass(frozen=True)
class Recipe:
    """A call that makes a network, or a part of one.

    Attributes:
        make: what is called.
        arguments: by name; a part of the network that a function makes is a Recipe itself.
        attributes: that are set on what is made.
    """

    make: Callable[..., Any]
    arguments: Mapping[str, Any]
    attributes: Mapping[str, Any]

    def numbers(self) -> Values:
        """The numbers above zero among the arguments, wherever they are."""
        return dict(_numbers(dict(self.arguments), ()))

    def with_(self, values: Values) -> Recipe:
        """The same with some numbers changed."""
        return replace(self, arguments=_changed(dict(self.arguments), (), values, parts=False))

    def given(self, values: Mapping[str, float]) -> Recipe:
        """The same with some arguments of other values, or more of them."""
        whole = {name: int(v) if v == int(v) else v for name, v in values.items()}
        return replace(self, arguments={**self.arguments, **whole})

    def build(self, values: Values) -> Any:
        """Make it anew, with some numbers changed."""
        made = self.make(**_changed(dict(self.arguments), (), values))
        for name, value in self.attributes.items():
            if not hasattr(made, name):
                setattr(made, name, value)
        return made

    def shapes(self, values: Values) -> Shapes:
        """The shapes of the parameters of what would be made; without memory for them."""
        with torch.device("meta"):
            return shapes_of(self.build(values))


def shapes_of(network: nn.Module) -> Shapes:
    """The shape of each parameter, under all of its names."""
    return {n: tuple(p.shape) for n, p in network.named_parameters(remove_duplicate=False)}


def _numbers(value: Any, path: Path) -> Iterator[tuple[Path, float]]:
    if isinstance(value, int | float) and not isinstance(value, bool):
        if value > 0:
            yield path, float(value)
        return
    for key, inner in _inside(value) if len(path) < _LARGEST else ():
        yield from _numbers(inner, (*path, key))


def _inside(value: Any) -> Iterator[tuple[str | int, Any]]:
    """What a container or settings hold."""
    if isinstance(value, Recipe):
        yield from _inside(dict(value.arguments))
    elif isinstance(value, Mapping):
        yield from ((k, v) for k, v in value.items() if isinstance(k, str))
    elif isinstance(value, list | tuple):
        yield from enumerate(value)
    elif isinstance(value, functools.partial):
        yield from _settings(value).items()
    elif not isinstance(value, _OPAQUE) and hasattr(value, "__dict__"):
        yield from vars(value).items()


def _settings(partial: functools.partial[Any]) -> dict[str, Any]:
    """The arguments of a function that are fixed beforehand, and its defaults."""
    known: dict[str, Any] = {}
    if isinstance(partial.func, FunctionType):
        parameters = inspect.signature(partial.func).parameters.values()
        known = {p.name: p.default for p in parameters if p.default is not p.empty}
    return known | partial.keywords


def _changed(value: Any, path: Path, values: Values, parts: bool = True) -> Any:
    """A copy with some numbers changed; modules and functions stay what they are, parts are made if asked."""
    if path in values:
        number = values[path]
        return int(number) if isinstance(value, int) and number == int(number) else number
    inner: dict[Any, Any] = {k: _changed(v, (*path, k), values, parts) for k, v in _inside(value)}
    if isinstance(value, Recipe):
        arguments = {**value.arguments, **inner}
        return value.make(**arguments) if parts else replace(value, arguments=arguments)
    if isinstance(value, Mapping):
        return dict(value) | inner
    if isinstance(value, list | tuple):
        filled = [inner.get(i, v) for i, v in enumerate(value)]
        return type(value)(*filled) if hasattr(value, "_fields") else type(value)(filled)
    if isinstance(value, functools.partial):
        keywords = {k: v for k, v in inner.items() if k in value.keywords or (*path, k) in values}
        return functools.partial(value.func, *value.args, **value.keywords | keywords)
    if not inner or len(path) >= _LARGEST:
        return value
    made = copy.copy(value)
    made.__dict__.update(inner)
    return made


def recipes(original: nn.Module, build: Build | None) -> Iterator[Recipe]:
    """Ways in which a network may have been made, the likeliest first."""
    if build is not None:
        yield from filter(None, [recorded(build, type(original))])
        yield Recipe(build, _kept_arguments(original, asked=False), {})
        return
    config: Any = getattr(original, "config", None)
    if hasattr(config, "to_dict"):
        yield Recipe(lambda **values: _of_config(original, values), config.to_dict(), {})
        return
    pretrained = getattr(original, "pretrained_cfg", None)
    name = getattr(pretrained, "architecture", None) or (pretrained or {}).get("architecture")
    if name:
        yield from filter(None, [recorded(functools.partial(_of_timm, original, name), type(original))])
        return
    yield Recipe(type(original), _kept_arguments(original), {})
    for builder in _torchvision_builders(type(original)):
        yield from filter(None, [recorded(builder, type(original))])


def _of_config(original: nn.Module, values: dict[str, Any]) -> nn.Module:
    config: Any = original.config
    cls = type(original)
    more = {}
    if "add_pooling_layer" in inspect.signature(cls.__init__).parameters:
        more["add_pooling_layer"] = getattr(original, "pooler", None) is not None
    wanted = type(config)(**{**config.to_dict(), **values})
    # How operations are computed is no part of what a configuration saves.
    for how in ("_attn_implementation", "_experts_implementation"):
        if getattr(config, how, None) is not None:
            setattr(wanted, how, getattr(config, how))
    made: nn.Module = cls(wanted, **more)
    return made


def _of_timm(original: nn.Module, name: str) -> nn.Module:
    import timm

    settings: dict[str, Any] = {"num_classes": getattr(original, "num_classes", 1000)}
    size = getattr(getattr(original, "patch_embed", None), "img_size", None)
    if size is not None:
        settings["img_size"] = size
    first = next((m for m in original.modules() if isinstance(m, nn.Conv2d)), None)
    if first is not None:
        settings["in_chans"] = first.in_channels
    made: nn.Module = timm.create_model(name, pretrained=False, **settings)
    return made


def _torchvision_builders(cls: type[nn.Module]) -> Iterator[Build]:
    """The functions of torchvision that make networks of a class."""
    if cls.__module__.partition(".")[0] != "torchvision":
        return
    from torchvision import models

    for name in models.list_models():
        builder = models.get_model_builder(name)
        if builder.__module__ == cls.__module__:
            yield builder


def _kept_arguments(original: nn.Module, asked: bool = True) -> dict[str, Any]:
    """Arguments of a class by what a network keeps under their names, or their defaults.

    Args:
        original: the network.
        asked: whether those without a default that nobody keeps are guessed, too.
    """
    found = {}
    for parameter in inspect.signature(type(original).__init__).parameters.values():
        named = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        if parameter.name == "self" or not named:
            continue
        value = _kept(original, parameter)
        if value is None and parameter.default is inspect.Parameter.empty and asked:
            counts = "layer" in parameter.name or "depth" in parameter.name
            value = _number_of_layers(original) if counts else None
        if value is not None:
            found[parameter.name] = value
    return found


def _kept(original: nn.Module, parameter: inspect.Parameter) -> Any:
    """The value of an argument: what the network or a part of it keeps under its name, or the default."""
    for module in original.modules():
        value = module.__dict__.get(parameter.name)
        if isinstance(value, int | float | tuple | list):
            return value
    return None if parameter.default is inspect.Parameter.empty else parameter.default


def _number_of_layers(original: nn.Module) -> int:
    """The most modules of one class in one list."""
    lists = [m for m in original.modules() if isinstance(m, nn.ModuleList | nn.Sequential)]
    return max((len(m) for m in lists if len({type(c) for c in m}) == 1), default=0)


# ---- watching a network being made


def recorded(build: Build, cls: type[nn.Module]) -> Recipe | None:
    """The arguments that a class gets while a function makes a network of it.

    Args:
        build: called without arguments, on no device.
        cls: of the network.

    Returns:
        How to make it; None if the function fails, or makes something else.
    """
    for device in ("meta", "cpu"):
        try:
            return _recorded(build, cls, device)
        except NotImplementedError:  # sizes are computed with tensors, as RegNet's are
            continue
        except Exception:  # all kinds, of a library's code; other ways are tried then
            return None
    return None


def _recorded(build: Build, cls: type[nn.Module], device: str) -> Recipe | None:
    calls: dict[int, dict[str, Any] | None] = {}
    parts: list[tuple[Any, Recipe]] = []
    watched = _watched_functions(sys.modules[cls.__module__], parts)
    with _watched(cls, calls), watched, torch.device(device):
        made = build()
    arguments = calls.get(id(made)) if type(made) is cls else None
    if arguments is None:
        return None
    for name, value in arguments.items():
        if isinstance(value, nn.Module):
            arguments[name] = next((recipe for part, recipe in parts if part is value), value)
    extra = {k: v for k, v in vars(made).items() if k in ("pretrained_cfg", "default_cfg", "_traits")}
    return Recipe(cls, arguments, extra)


@contextmanager
def _watched(cls: type[nn.Module], calls: dict[int, dict[str, Any] | None]) -> Iterator[None]:
    """Note the arguments of each object of a class that is made meanwhile."""
    init: Any = cls.__init__
    signature = inspect.signature(init)
    own = "__init__" in vars(cls)

    @functools.wraps(init)
    def noting(self: Any, *args: Any, **kwargs: Any) -> None:
        calls.setdefault(id(self), _bound(signature, (self, *args), kwargs))
        init(self, *args, **kwargs)

    cls.__init__ = noting  # type: ignore[method-assign]
    try:
        yield
    finally:
        if own:
            cls.__init__ = init  # type: ignore[method-assign]
        else:
            del cls.__init__


@contextmanager
def _watched_functions(module: ModuleType, parts: list[tuple[Any, Recipe]]) -> Iterator[None]:
    """Note the calls of a module's functions that make parts of networks meanwhile."""

    def watched(function: Any) -> Any:
        @functools.wraps(function)
        def noting(*args: Any, **kwargs: Any) -> Any:
            made = function(*args, **kwargs)
            arguments = _bound(inspect.signature(function), args, kwargs)
            if isinstance(made, nn.Module) and arguments is not None:
                parts.append((made, Recipe(function, arguments, {})))
            return made

        return noting

    own = {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, FunctionType) and value.__module__ == module.__name__
    }
    try:
        for name, function in own.items():
            setattr(module, name, watched(function))
        yield
    finally:
        for name, function in own.items():
            setattr(module, name, function)


def _bound(signature: inspect.Signature, args: Any, kwargs: Any) -> dict[str, Any] | None:
    """Arguments by name, with defaults, copied; None if some have no name."""
    bound = signature.bind(*args, **kwargs)
    bound.apply_defaults()
    found: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_KEYWORD:
            found |= value
        elif kind is inspect.Parameter.VAR_POSITIONAL or kind is inspect.Parameter.POSITIONAL_ONLY:
            if value:
                return None
        elif name != "self":
            found[name] = value
    return {name: _changed(value, (), {}) for name, value in found.items()}
