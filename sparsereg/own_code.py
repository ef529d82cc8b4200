"""Code of yours by name: ``KEY._target_=package.module.Class`` and its arguments.

A name is looked up only where the user gave it, on the command line or in a file of configurations of theirs.
What a checkpoint holds is data: a ``_target_`` in it is shown to the user, who has to repeat it
(``check_repeated``), and never looked up.
"""

import functools
import importlib
import importlib.util
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

from sparsereg.errors import InputError, nearest
from sparsereg.settings import shown

TARGET = "_target_"
RESERVED = (TARGET, "_args_", "_partial_")
"""Keys that say what is called and how, as Hydra knows them."""


def is_own(given: Any) -> bool:
    """Whether settings name code of the user's."""
    return isinstance(given, Mapping) and TARGET in given


def call(spec: Mapping[str, Any], key: str, first: tuple[Any, ...] = (), **offered: Any) -> Any:
    """Call what ``_target_`` names with the other keys; mappings among them that have a target come first.

    Args:
        spec: ``_target_``, arguments by name, ``_args_`` (positional ones), ``_partial_`` (true: the function
            with its arguments, not its result).
        key: dotted key of the settings, for messages.
        first: arguments that come before those.
        **offered: arguments that are given, too, where the signature has their names.

    Raises:
        InputError: there is no such thing, the arguments are not its own, or it raises an error.
    """
    target = locate(spec.get(TARGET), f"{key}.{TARGET}")
    named = {k: _value(v, f"{key}.{k}") for k, v in spec.items() if k not in RESERVED}
    positional = [*first, *(_value(v, f"{key}._args_") for v in spec.get("_args_") or ())]
    named = {k: v for k, v in offered.items() if k in parameters(target)} | named
    said = f"{key}.{TARGET}={spec[TARGET]}"
    if spec.get("_partial_"):
        return functools.partial(target, *positional, **named)
    try:
        inspect.signature(target).bind(*positional, **named)
    except TypeError as error:
        raise InputError(f"{said}: {error}; its arguments are {_signature(target)}") from None
    except ValueError:  # written in C: there is no signature
        pass
    try:
        return target(*positional, **named)
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{said}: {type(error).__name__}: {error}{place(error)}") from error


def locate(target: Any, key: str) -> Callable[..., Any]:
    """Return the class or function of a dotted name; modules in the current folder are found, too.

    Raises:
        InputError: there is none.
    """
    if not isinstance(target, str) or not all(part.isidentifier() for part in target.split(".")):
        raise InputError(
            f"{key}={shown(target)}: expected the name of a class, such as my_package.my_module.Net"
        )
    path = target.split(".")
    if len(path) < 2:
        raise InputError(f"{key}={target}: expected module.Class, such as my_module.{target}")
    see_current_folder()
    module, rest = _module(path, f"{key}={target}")
    found: Any = module
    for i, name in enumerate(rest):
        if not hasattr(found, name):
            within = ".".join([module.__name__, *rest[:i]])
            near = nearest(name, [n for n in dir(found) if not n.startswith("_")])
            file = getattr(module, "__file__", None)
            raise InputError(f"{key}={target}: {within}{f' ({file})' if file else ''} has no {name!r}{near}")
        found = getattr(found, name)
    if not callable(found):
        kind = "a module" if isinstance(found, ModuleType) else f"of type {type(found).__name__}"
        raise InputError(f"{key}={target}: expected a class or a function, it is {kind}")
    return found  # type: ignore[no-any-return]


def see_current_folder() -> None:
    """Let modules be imported from where the user stands, as ``python -m`` does."""
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)


def _module(path: list[str], said: str) -> tuple[ModuleType, list[str]]:
    """Import the longest part of a dotted name that is a module; return it and the rest of the name."""
    module: ModuleType | None = None
    for i in range(1, len(path)):
        name = ".".join(path[:i])
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name:
                raise InputError(f"{said}: {name} cannot be imported: {error}{place(error)}") from error
            if module is None:
                raise InputError(
                    f"{said}: there is no module {name!r} in {os.getcwd()} or among what is installed; run"
                    " where its file is, or add its folder to PYTHONPATH"
                ) from None
            return module, path[i - 1 :]
        except Exception as error:
            raise InputError(
                f"{said}: {name} cannot be imported: {type(error).__name__}: {error}{place(error)}"
            ) from error
    assert module is not None
    return module, path[-1:]


def parameters(target: Callable[..., Any]) -> set[str]:
    """Return the names of the arguments that a callable takes by name."""
    try:
        found = inspect.signature(target).parameters.values()
    except (ValueError, TypeError):
        return set()
    return {p.name for p in found if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}


def source_files(node: Any) -> Iterator[str]:
    """Yield the files of the modules that targets name; nothing is imported to find them."""
    if isinstance(node, Mapping):
        if isinstance(node.get(TARGET), str):
            yield from _files_of(node[TARGET].split("."))
        node = list(node.values())
    if isinstance(node, list | tuple):
        for value in node:
            yield from source_files(value)


def _files_of(path: list[str]) -> Iterator[str]:
    see_current_folder()
    spec = importlib.util.find_spec(path[0]) if all(part.isidentifier() for part in path) else None
    if spec is None or spec.origin is None:
        return
    folder = Path(spec.origin).parents[0 if spec.submodule_search_locations is None else 1]
    for i in range(1, len(path)):
        base = folder.joinpath(*path[:i])
        yield from (str(file) for file in (base.with_suffix(".py"), base / "__init__.py") if file.is_file())


def code_in(node: Any, prefix: str = "") -> dict[str, Any]:
    """Return what names code in nested settings, by dotted key; a list that holds some counts as a whole."""
    found: dict[str, Any] = {}
    if isinstance(node, Mapping):
        for key, value in node.items():
            if key in RESERVED:
                found[f"{prefix}{key}"] = value
            else:
                found |= code_in(value, f"{prefix}{key}.")
    elif isinstance(node, list | tuple) and any(code_in(value) for value in node):
        found[prefix.removesuffix(".")] = node
    return found


def check_repeated(stored: Mapping[str, Any], given: Mapping[str, Any], source: str) -> None:
    """Check that every name of code that would be looked up was given by the user.

    Args:
        stored: code by dotted key that settings from a file would name, see ``code_in``.
        given: the same of what the user gave.
        source: the file, for messages.

    Raises:
        InputError: one was not.
    """
    lacking = {key: value for key, value in stored.items() if key not in given}
    if lacking:
        named = " ".join(f"{key}={shown(value)}" for key, value in lacking.items())
        raise InputError(
            f"{source} was made with code of yours, which no checkpoint brings along: add {named} to the"
            " command line, and run where its file is or add its folder to PYTHONPATH"
        )


def _value(value: Any, key: str) -> Any:
    if is_own(value):
        return call(value, key)
    if isinstance(value, Mapping):
        return {k: _value(v, f"{key}.{k}") for k, v in value.items()}
    return [_value(v, key) for v in value] if isinstance(value, list | tuple) else value


def _signature(target: Callable[..., Any]) -> str:
    text = str(inspect.signature(target)).partition(" ->")[0]
    return text if len(text) <= 300 else text[:297] + "..."


def place(error: BaseException) -> str:
    """Say, in brackets, where an error was raised: the last line of the user's own file; "" if in none."""
    if isinstance(error, SyntaxError):
        return ""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename.endswith(".py")]
    frames = [f for f in frames if not f.filename.startswith((sys.prefix, str(Path(__file__).parent)))]
    return f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""


class Own:
    """What the settings of something of the user's own have in common: a class or function and its arguments.

    Attributes:
        GROUP: the group of the configuration.
    """

    GROUP: ClassVar[str]
    _target_: str | None
    arguments: Mapping[str, Any]

    @property
    def spec(self) -> dict[str, Any]:
        """What is called, with its arguments."""
        return {TARGET: self._target_, **self.arguments}

    @property
    def said(self) -> str:
        """As the user gives it."""
        return f"{self.GROUP}.{TARGET}={self._target_}"
