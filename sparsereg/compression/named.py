"""Answers with names, as models of transformers give them: a smaller network gives the same kind."""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
from dataclasses import is_dataclass
from functools import cache
from typing import Any

LIBRARY = "transformers"
_HOMES = rf"{LIBRARY}\.(modeling_outputs|models\.[a-z0-9_]{{1,80}}\.modeling_[a-z0-9_]{{1,80}})"
KIND = re.compile(rf"(|{_HOMES}\.[A-Za-z0-9]{{1,80}})")
"""What a kind of answer may be called: a class of the library itself, or nothing."""


class Named(dict[str, Any]):
    """Answers by name: ``answers["logits"]``, ``answers.logits``, or ``answers[0]``."""

    def __getattr__(self, name: str) -> Any:
        """The answer of a name."""
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"there is no answer {name!r}; there are {', '.join(self)}") from None

    def __getitem__(self, key: Any) -> Any:
        """An answer by its name, or by its place."""
        return super().__getitem__(key) if isinstance(key, str) else tuple(self.values())[key]


def is_named(value: Any) -> bool:
    """Whether an answer is a dictionary of a class with fields of its own."""
    return isinstance(value, Mapping) and is_dataclass(value)


def kind_of(value: Any) -> str:
    """The class of an answer by its name; empty if it is no class of the library's."""
    name = f"{type(value).__module__}.{type(value).__name__}"
    return name if KIND.fullmatch(name) and _class(name) is type(value) else ""


def named(kind: str, answers: dict[str, Any], /) -> Any:
    """Put answers together as a class of the library does; as ``Named`` where the library is not there.

    Args:
        kind: the name of the class; empty for ``Named``.
        answers: by name.
    """
    cls = _class(kind)
    return Named(answers) if cls is None else cls(**answers)


@cache
def _class(kind: str) -> Any:
    """The class of the library that a name stands for; None if there is none."""
    if not kind or not KIND.fullmatch(kind):
        return None
    path, _, name = kind.rpartition(".")
    try:
        found = getattr(importlib.import_module(path), name, None)
        base = importlib.import_module(f"{LIBRARY}.utils").ModelOutput
    except ImportError:
        return None
    return found if isinstance(found, type) and issubclass(found, base) else None
