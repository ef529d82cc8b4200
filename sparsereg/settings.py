"""One declaration of every setting: its type, range, default and what it means.

A group of settings is a frozen dataclass whose fields are made by ``setting``. Everything else follows
from the declaration: values are checked when an instance is made, ``read`` makes an instance of what a
user or a file gave and refuses what does not fit by name, and ``sparsereg.configs`` writes the YAML files
and the help texts. A new setting is its field and the place that uses it.

Nothing here imports PyTorch or Hydra: a command line is checked before anything slow is loaded.
"""

import dataclasses
import functools
import math
import numbers
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar, Union

from sparsereg.errors import InputError, nearest

LARGEST = 2**31 - 1
"""Largest integer of a setting without a rule that names another one: what is below counts in 32 bits."""
LONGEST = 4096
"""Most characters of a text."""


@dataclass(frozen=True)
class Rule:
    """Which values of the right type a setting takes.

    Attributes:
        expected: in words, e.g. "a share in [0, 1)".
        holds: whether a value is one of them.
        short: the same behind a sentence that says what the value means, e.g. "in [0, 1)".
        largest: largest integer.
    """

    expected: str
    holds: Callable[[Any], bool]
    short: str = ""
    largest: int = LARGEST


def at_least(low: float, noun: str = "a number") -> Rule:
    """Values >= low."""
    return Rule(f"{noun} >= {low:g}", lambda v: v >= low, f">= {low:g}")


def above(low: float, noun: str = "a number") -> Rule:
    """Values > low."""
    return Rule(f"{noun} > {low:g}", lambda v: v > low, f"> {low:g}")


def within(interval: str, noun: str = "a number") -> Rule:
    """Values in an interval, written as in mathematics: ``[0, 1)`` holds 0 and not 1."""
    low, high = (float(end) for end in interval[1:-1].split(","))
    from_low, to_high = interval[0] == "[", interval[-1] == "]"

    def holds(v: float) -> bool:
        return (v >= low if from_low else v > low) and (v <= high if to_high else v < high)

    return Rule(f"{noun} in {interval}", holds, f"in {interval}")


def count(low: int = 1) -> Rule:
    """Integers >= low."""
    return at_least(low, "an integer")


SEED = Rule("an integer in [0, 2**32)", lambda v: 0 <= v < 2**32, largest=2**32)
RATE = within("(0, 1)", "a rate")
SHARE = within("[0, 1]", "a share")
NOT_NEGATIVE = at_least(0)
POSITIVE = above(0)


@dataclass(frozen=True)
class Declared:
    """A setting as it was declared.

    Attributes:
        name: of the field and of the key.
        kind: its type.
        help: what it means.
        rule: which values it takes.
        choices: the texts it takes; () for any.
        empty: whether a list or a text may be empty.
        key: whether it is a key of a configuration.
        field: of the dataclass.
    """

    name: str
    kind: Any
    help: str
    rule: Rule | None
    choices: tuple[str, ...]
    empty: bool
    key: bool
    field: "dataclasses.Field[Any]"

    @property
    def default(self) -> Any:
        """Its value if nothing else is said."""
        if self.field.default_factory is not dataclasses.MISSING:
            return self.field.default_factory()
        return self.field.default

    @functools.cached_property
    def unchecked(self) -> Any:
        """The one value that need not be checked: its default, if that is just what it takes."""
        default = self.default
        if default is dataclasses.MISSING or fitted(default, self, self.name) is not default:
            return dataclasses.MISSING
        return default

    @functools.cached_property
    def kinds(self) -> tuple[Any, ...]:
        """The types it may be of."""
        return _members(self.kind)

    @functools.cached_property
    def group(self) -> "type[Settings] | None":
        """The class of the settings below this key, if there are any."""
        return next((k for k in self.kinds if _is_group(k)), None)

    @property
    def expected(self) -> str:
        """In words, what it takes."""
        if self.choices:
            words = [f"one of {', '.join(self.choices)}"]
            kinds = [k for k in _members(self.kind) if k is not str]
        else:
            kinds = list(_members(self.kind))
            words = []
        if self.rule is not None:
            if int in kinds or float in kinds:
                words.append(self.rule.expected)
            kinds = [k for k in kinds if k not in (int, float)]
        return _or([*words, *(_named(k, self.rule) for k in kinds)])


def setting(
    default: Any,
    help: str,
    rule: Rule | None = None,
    *,
    choices: Sequence[str] = (),
    empty: bool = False,
    key: bool = True,
) -> Any:
    """Declare a setting: a dataclass field that knows what it means and what it takes.

    Args:
        default: its value if nothing else is said; a class or a function makes it. MISSING: there is none.
        help: what it means, with its unit: one line for the YAML file and the help text.
        rule: which numbers it takes, each item of a list on its own.
        choices: which texts it takes.
        empty: whether a list or a text may be empty.
        key: False for a setting of the library that is no key of a configuration.
    """
    metadata = {"help": help, "rule": rule, "choices": tuple(choices), "empty": empty, "key": key}
    if callable(default) and default is not dataclasses.MISSING:
        once = functools.cache(default) if _is_group(default) else default  # a group is frozen: one for all
        return field(default_factory=once, metadata=metadata)
    return field(default=default, metadata=metadata)


def again(cls: "type[Settings]", name: str, default: Any, help: str = "", *, key: bool = True) -> Any:
    """Declare a setting of a parent class again, with another default.

    Args:
        cls: the parent.
        name: of the setting.
        default: as for ``setting``.
        help: what it means here; "": the same.
        key: False where it is no key of the configuration here.
    """
    before = declared(cls)[name]
    return setting(
        default,
        help or before.help,
        before.rule,
        choices=before.choices,
        empty=before.empty,
        key=key and before.key,
    )


@dataclass(frozen=True)
class Settings:
    """A group of settings. Making one checks every value, and what the values mean together.

    Raises:
        InputError: a value is of the wrong type or outside its range, or two of them contradict each other.
    """

    OTHERS: ClassVar[str | None] = None
    """The field, a mapping, that takes keys which are not declared."""

    def __post_init__(self) -> None:
        values = self.__dict__
        for name, unchecked, d in _unchecked(typing.cast(Any, type(self))):
            if values[name] is not unchecked:
                values[name] = fitted(values[name], d, name)
        self.check()

    def check(self) -> None:
        """Raise ``Contradiction`` where values do not go together."""

    @classmethod
    def kind_of(cls, given: Mapping[str, Any], where: str) -> "type[Settings]":
        """Return the subclass that these keys belong to; this class by default.

        Args:
            given: keys and values.
            where: the dotted key of the group.
        """
        return cls


class Contradiction(InputError):
    """Values of one group that do not go together.

    Args:
        text: the message, with ``{}`` in front of each key that stands in the group.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text.replace("{}", ""))
        self.text = text


S = TypeVar("S", bound=Settings)


def declared(cls: type[Settings]) -> dict[str, Declared]:
    """Return the settings of a group by name."""
    return _declared(typing.cast(Any, cls))


@functools.cache
def _declared(cls: Any) -> dict[str, Declared]:
    hints = typing.get_type_hints(cls)
    fields = [f for f in dataclasses.fields(cls) if "help" in f.metadata]
    return {f.name: Declared(name=f.name, kind=hints[f.name], field=f, **f.metadata) for f in fields}


@functools.cache
def _unchecked(cls: Any) -> tuple[tuple[str, Any, Declared], ...]:
    return tuple((name, d.unchecked, d) for name, d in declared(cls).items())


def keys(cls: type[Settings]) -> dict[str, Declared]:
    """Return the settings of a group that are keys of its configuration."""
    return {name: d for name, d in declared(cls).items() if d.key and name != cls.OTHERS}


def read(cls: type[S], given: Any, where: str = "", base: S | None = None) -> S:
    """Make settings of what a user or a file gave; what is left out keeps its default.

    Args:
        cls: the group.
        given: keys and values, interpolations resolved.
        where: the dotted key of the group; "" at the top.
        base: holds the defaults, where they are not those of the class.

    Raises:
        InputError: a key is unknown, a value is of the wrong type or outside its range, or two of them
            contradict each other. The message names the key in full.
    """
    if not isinstance(given, Mapping):
        raise refused(where or "the configuration", given, f"keys such as {', '.join(list(keys(cls))[:3])}")
    group, prefix = cls.kind_of(given, where), f"{where}." if where else ""
    known, values, others = keys(group), vars(base).copy() if type(base) is group else {}, {}
    for name, value in given.items():
        if name in known:
            values[name] = fitted(value, known[name], prefix + name)
        elif group.OTHERS is not None and isinstance(name, str):
            others[name] = value
        else:
            near = nearest(prefix + str(name), [prefix + k for k in known])
            raise InputError(f"unknown key {prefix + str(name)!r}{near}")
    if others:
        values[str(group.OTHERS)] = others
    try:
        return typing.cast(S, group(**values))
    except Contradiction as error:
        raise InputError(error.text.replace("{}", prefix)) from None


def all_keys(cls: type[Settings], prefix: str = "") -> dict[str, Declared]:
    """Return every dotted key below a group of settings, of all its kinds, and its setting."""
    found: dict[str, Declared] = {}
    for kind in [cls, *_kinds(cls)]:
        for name, d in keys(kind).items():
            found.setdefault(prefix + name, d)
            if d.group is not None:
                found |= all_keys(d.group, f"{prefix}{name}.")
    return found


def _kinds(cls: type[Settings]) -> list[type[Settings]]:
    return [kind for child in cls.__subclasses__() for kind in (child, *_kinds(child))]


def plain(value: Any) -> Any:
    """Return settings as dicts, lists, numbers, texts and None: what YAML and JSON can write."""
    if isinstance(value, Settings):
        others = getattr(value, str(type(value).OTHERS), {})
        return {name: plain(getattr(value, name)) for name in keys(type(value))} | plain(others)
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [plain(v) for v in value]
    return value


def flat(given: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values of nested keys under dotted ones."""
    values: dict[str, Any] = {}
    for name, value in given.items():
        values |= (
            flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
        )
    return values


def value_at(given: Mapping[str, Any], path: str) -> Any:
    """Return the value under a dotted key; None where there is none."""
    for name in path.split("."):
        if not isinstance(given, Mapping):
            return None
        given = given.get(name)  # type: ignore[assignment]
    return given


def with_value(given: Mapping[str, Any], path: str, value: Any) -> dict[str, Any]:
    """Return a copy of nested keys with a value put under a dotted one."""
    name, _, rest = path.partition(".")
    if not rest:
        return {**given, name: value}
    below = given.get(name)
    return {**given, name: with_value(below if isinstance(below, Mapping) else {}, rest, value)}


def shown(value: Any) -> str:
    """Return a value as the user would write it, shortened."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    if isinstance(value, Mapping):
        text = "{" + ", ".join(f"{k}: {shown(v)}" for k, v in value.items()) + "}"
    elif isinstance(value, Sequence) and not isinstance(value, str):
        text = "[" + ", ".join(shown(v) for v in value) + "]"
    elif isinstance(value, int) and abs(value) >= 10**40:  # Python refuses to write thousands of digits
        text = f"(an integer of {value.bit_length()} bits)"
    else:
        text = " ".join(str(value).split())
    return text if len(text) <= 80 else text[:77] + "..."


def refused(key: str, value: Any, expected: str) -> InputError:
    """Return the error about a value that a setting does not take."""
    return InputError(f"{key}={shown(value)}: expected {expected}")


def check_objective(given: str | tuple[str, ...], known: Sequence[str]) -> None:
    """Raise an InputError unless ``objective`` names numbers that the results of a script have."""
    for name in (given,) if isinstance(given, str) else given:
        one_of(name, "objective", known)


def one_of(value: str, key: str, known: Sequence[str]) -> None:
    """Raise an InputError that names the key and the nearest known choice unless the value is known."""
    if value not in known:
        raise refused(key, value, f"one of {', '.join(known)}{nearest(str(value), list(known))}")


def fitted(value: Any, d: Declared, key: str) -> Any:
    """Return a value as the type of its setting, checked against everything that was declared.

    Args:
        value: as it was given.
        d: the setting.
        key: its dotted key, for messages.

    Raises:
        InputError: it does not fit.
    """
    group = d.group
    if group is not None and not isinstance(value, group) and (isinstance(value, Mapping) or d.kind is group):
        return read(group, value, key, d.default)
    try:
        fit = _cast_first(value, d.kinds)
    except TypeError:
        raise refused(key, value, d.expected) from None
    return _checked(fit, d, key, value)


def _checked(value: Any, d: Declared, key: str, given: Any) -> Any:
    """Return a value of the right type if it is within what its setting takes; show it as it was given."""
    if value is None:
        return value
    for text in value if isinstance(value, tuple) else (value,):
        if d.choices and isinstance(text, str) and text not in d.choices:
            raise refused(key, given, d.expected + nearest(text, list(d.choices)))
    if not d.empty and isinstance(value, str | tuple) and len(value) == 0:
        raise refused(key, given, f"{d.expected}, not empty")
    numbers = [v for v in (value if isinstance(value, tuple) else (value,)) if _is_number(v)]
    largest = LARGEST if d.rule is None else d.rule.largest
    if any(isinstance(v, int) and abs(v) > largest for v in numbers):
        raise refused(key, given, f"{d.expected}, at most {largest:,}")
    if d.rule is not None and not all(d.rule.holds(v) for v in numbers):
        raise refused(key, given, d.expected)
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _members(kind: Any) -> tuple[Any, ...]:
    """Return the types of a union, or the one type."""
    return typing.get_args(kind) if typing.get_origin(kind) in (Union, types.UnionType) else (kind,)


def _is_group(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Settings)


def _cast(value: Any, kind: Any) -> Any:
    """Return a value as one type, or raise a TypeError or ValueError. Numbers are no switches nor texts."""
    if kind is Any:
        return value
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if len(_members(kind)) > 1:
        return _cast_first(value, _members(kind))
    if origin is tuple:
        return _cast_items(value, arguments)
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            raise TypeError
        return {_cast(k, arguments[0]): _cast(v, arguments[1]) for k, v in value.items()}
    if kind is float and _is_number(value) and math.isfinite(value):
        return float(value)
    if kind is int and _is_number(value) and isinstance(value, numbers.Integral):
        return int(value)
    if kind is str and (isinstance(value, str) or (_is_number(value) and math.isfinite(value))):
        return _text(value)
    if isinstance(kind, type) and kind not in (int, float, str) and isinstance(value, kind):
        return value
    raise TypeError


def _cast_first(value: Any, kinds: tuple[Any, ...]) -> Any:
    """Return a value as the first of several types that it can be."""
    for kind in kinds:
        try:  # contextlib.suppress takes longer than the cast
            return _cast(value, kind)
        except (TypeError, ValueError, OverflowError):
            continue
    raise TypeError


def _cast_items(value: Any, kinds: tuple[Any, ...]) -> tuple[Any, ...]:
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise TypeError
    if kinds[1:] == (Ellipsis,):
        return tuple(_cast(v, kinds[0]) for v in value)
    return tuple(_cast(v, k) for v, k in zip(value, kinds, strict=True))


def _text(value: Any) -> str:
    """Return a text of one line that can be written; a number, of a column say, is taken as its digits."""
    text = value if isinstance(value, str) else shown(value)
    text.encode()  # half a surrogate, of an argument that is not UTF-8, cannot be
    if len(text) > LONGEST or any(ord(c) < 32 for c in text):
        raise ValueError
    return text


_WORDS = {
    int: "an integer",
    float: "a number",
    bool: "true or false",
    str: "a text",
    type(None): "null",
}


def _named(kind: Any, rule: Rule | None) -> str:
    """Return a type in words, with the rule for each item of a list."""
    if kind in _WORDS:
        return _WORDS[kind]
    if kind is Any:
        return "a value"
    items = typing.get_args(kind)
    if typing.get_origin(kind) is not tuple:
        return "keys and values"
    plural = {int: "integers", float: "numbers", str: "texts"}
    noun = plural.get(items[0]) or "items, " + _or([_WORDS[k] for k in _members(items[0])])
    many = "" if items[1:] == (Ellipsis,) else f"{len(items)} "
    return f"a list of {many}{noun}" + (f", each {rule.expected}" if rule else "")


def _or(words: list[str]) -> str:
    unique = list(dict.fromkeys(w for w in words if w))
    return unique[0] if len(unique) == 1 else f"{', '.join(unique[:-1])} or {unique[-1]}"
