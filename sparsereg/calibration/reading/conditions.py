"""Conditions over the columns of a table, such as ``state == 'CA' and age_head >= 65``.

A condition is parsed here, by hand, into a small tree; nothing from the file is ever run as code.

The language: comparisons ``== != < <= > >=`` (also chained, ``18 <= age < 65``) between columns,
numbers, quoted texts and ``true``/``false``; ``column in ('a', 'b')`` and ``not in`` (round or square
brackets); ``column is missing`` and ``is not missing``; ``not``, ``and``, ``or`` (also ``~ & |``) with
parentheses, binding in this order; a boolean column alone. A column name with other than letters, digits and
underscores stands in backticks.

Logic has three values, as in SQL and R: what compares a missing value is unknown, ``not`` unknown is unknown,
and a household counts only where the whole condition is true.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NoReturn, TypeAlias

from sparsereg.calibration.reading.cells import shown
from sparsereg.errors import InputError

Literal: TypeAlias = "float | int | str | bool"


@dataclass(frozen=True)
class Column:
    """A column of the table, by name; alone as a condition it must be boolean."""

    name: str


@dataclass(frozen=True)
class Constant:
    """A number, a text or a boolean written in the condition."""

    value: Literal
    kind: str  # "number", "text" or "boolean": 1 == True in Python, so the value alone does not tell


@dataclass(frozen=True)
class Compare:
    """``left op right``; op is a key of ``COMPARISONS``."""

    left: Column | Constant
    op: str
    right: Column | Constant


@dataclass(frozen=True)
class In:
    """``column in (values)``."""

    column: Column
    values: tuple[Constant, ...]


@dataclass(frozen=True)
class Missing:
    """``column is missing``: the only condition that a missing value fulfils."""

    column: Column


@dataclass(frozen=True)
class Not:
    """The item does not hold."""

    item: Condition


@dataclass(frozen=True)
class And:
    """All items hold; of none: every household."""

    items: tuple[Condition, ...]


@dataclass(frozen=True)
class Or:
    """At least one item holds."""

    items: tuple[Condition, ...]


Condition: TypeAlias = "Column | Constant | Compare | In | Missing | Not | And | Or"

COMPARISONS: dict[str, Callable[[Any, Any], Any]] = {
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
MIRRORED = {"==": "==", "!=": "!=", "<": ">", "<=": ">=", ">": "<", ">=": "<="}
OPPOSITE = {"==": "!=", "!=": "==", "<": ">=", "<=": ">", ">": "<=", ">=": "<"}

# Every alternative begins with characters of its own and takes what it can: a token is read in linear time.
_TOKEN = re.compile(
    r"""\s*(?:
    (?P<number>(?:[0-9]|\.[0-9])(?:[\w.]|(?<=[eE])[+-](?=[0-9]))*)
    |(?P<text>'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")
    |(?P<name>[^\W\d]\w*)
    |`(?P<quoted>[^`]+)`
    |(?P<op>==|!=|<>|<=|>=|&&|\|\||[-+<>=!&|~()\[\],])
    )""",
    re.VERBOSE,
)
_NUMBER = re.compile(r"(?:[0-9][0-9_]*(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
_WORDS = {"and", "or", "not", "in", "true", "false"}
_SAME = {"&": "and", "&&": "and", "|": "or", "||": "or", "~": "not", "!": "not", "<>": "!="}
_MAX_LENGTH = 200_000
"""Characters of a condition: a list of 20,000 districts still fits."""
_MAX_DEPTH = 100
_MAX_DIGITS = 400
"""Characters of a number: more than any number of double precision needs."""


@dataclass(frozen=True)
class _Token:
    kind: str  # "number", "text", "name", "word" (also operators and brackets) or "end"
    text: str
    at: int


def parse(text: str) -> Condition:
    """Parse a condition into its tree.

    Args:
        text: The condition; empty or blank means every household.

    Raises:
        InputError: The text is not a condition; the message shows where it stops making sense.
    """
    if len(text) > _MAX_LENGTH:
        raise InputError(
            f"{_shown(text)} has {len(text):,} characters; a condition has at most {_MAX_LENGTH:,}"
        )
    if not text.strip():
        return And(())
    return _Parser(text).whole()


def columns_of(condition: Condition) -> Iterator[str]:
    """Yield the name of every column that a condition uses, with repetition."""
    match condition:
        case Column(name):
            yield name
        case Compare(left, _, right):
            yield from columns_of(left)
            yield from columns_of(right)
        case In(column, _) | Missing(column):
            yield column.name
        case Not(item):
            yield from columns_of(item)
        case And(items) | Or(items):
            for item in items:
                yield from columns_of(item)


def conjuncts(condition: Condition) -> tuple[Condition, ...]:
    """Split a condition into parts that must all hold, through nested ``and``."""
    if isinstance(condition, And):
        return tuple(part for item in condition.items for part in conjuncts(item))
    return (condition,)


def equality(part: Condition) -> tuple[str, Constant] | None:
    """Return the column and the value if the part says that a column equals one value."""
    match part:
        case Compare(Column(name), "==", Constant() as value) | In(Column(name), (value,)):
            return name, value
        case Column(name):
            return name, Constant(True, "boolean")
    return None


class _Parser:
    """Recursive descent, one method per level of binding, from ``or`` down to values."""

    def __init__(self, text: str):
        self.text = text
        self.tokens = list(_tokens(text))
        self.position = 0
        self.depth = 0

    def whole(self) -> Condition:
        condition = self._or()
        if self._now.kind != "end":
            self._refuse("'and', 'or' or the end")
        return condition

    @property
    def _now(self) -> _Token:
        return self.tokens[self.position]

    def _accept(self, *words: str) -> str | None:
        token = self._now
        if token.kind != "word" or token.text not in words:
            return None
        self.position += 1
        return token.text

    def _expect(self, word: str) -> None:
        if self._accept(word) is None:
            self._refuse(repr(word))

    def _refuse(self, expected: str) -> NoReturn:
        token = self._now
        if token.kind == "word" and token.text == "=":
            raise InputError(f"{_shown(self.text)}: write == to compare, not = (character {token.at + 1})")
        found = "the condition ends" if token.kind == "end" else f"there is {shown(token.text)}"
        raise InputError(
            f"{_shown(self.text)} is not a condition: expected {expected} at character {token.at + 1},"
            f" {found}"
        )

    def _or(self) -> Condition:
        self.depth += 1
        if self.depth > _MAX_DEPTH:
            raise InputError(
                f"{_shown(self.text)}: more than {_MAX_DEPTH} parentheses or 'not' inside each other"
            )
        items = [self._and()]
        while self._accept("or"):
            items.append(self._and())
        self.depth -= 1
        return items[0] if len(items) == 1 else Or(tuple(items))

    def _and(self) -> Condition:
        items = [self._not()]
        while self._accept("and"):
            items.append(self._not())
        return items[0] if len(items) == 1 else And(tuple(items))

    def _not(self) -> Condition:
        negations = 0
        while self._accept("not"):
            negations += 1
        condition = self._comparison()
        return Not(condition) if negations % 2 else condition

    def _comparison(self) -> Condition:
        if self._accept("("):
            inside = self._or()
            self._expect(")")
            return inside
        left = self._value()
        negated = self._accept("not")
        if self._accept("in"):
            member = self._membership(left)
            return Not(member) if negated else member
        if negated:
            self._refuse("'in'")
        if self._accept_name("is"):
            return self._missing(left)
        links: list[Condition] = []
        while op := self._accept(*COMPARISONS):
            right = self._value()
            links.append(_compare(left, op, right))
            left = right
        if not links:
            return self._truth(left)
        return links[0] if len(links) == 1 else And(tuple(links))

    def _truth(self, value: Column | Constant) -> Condition:
        if isinstance(value, Constant) and value.kind != "boolean":
            self._refuse("a comparison")
        return value

    def _accept_name(self, name: str) -> bool:
        """Take a word that is only one where no column can stand, as after a value."""
        found = self._now.kind == "name" and self._now.text.lower() == name
        self.position += found
        return found

    def _missing(self, left: Column | Constant) -> Condition:
        if not isinstance(left, Column):
            self._refuse("a column before 'is missing'")
        negated = self._accept("not")
        if not self._accept_name("missing"):
            self._refuse("'missing' or 'not missing'")
        return Not(Missing(left)) if negated else Missing(left)

    def _membership(self, left: Column | Constant) -> In:
        if not isinstance(left, Column):
            self._refuse("a column before 'in'")
        opening = self._accept("(", "[")
        if opening is None:
            self._refuse("'(' or '['")
        values: list[Constant] = []
        closing = {"(": ")", "[": "]"}[opening]
        while not self._accept(closing):
            value = self._value()
            if not isinstance(value, Constant):
                self.position -= 1
                self._refuse("a number or a quoted text")
            values.append(value)
            if not self._accept(","):
                self._expect(closing)
                break
        if not values:
            raise InputError(f"{_shown(self.text)}: the list after 'in' is empty")
        return In(left, tuple(values))

    def _value(self) -> Column | Constant:
        sign = self._accept("-", "+")
        token = self._now
        if token.kind == "number":
            self.position += 1
            number = _number(token, self.text)
            return Constant(-number if sign == "-" else number, "number")
        if sign:
            self._refuse("a number")
        if token.kind == "text":
            self.position += 1
            return Constant(re.sub(r"\\(.)", r"\1", token.text[1:-1]), "text")
        if word := self._accept("true", "false"):
            return Constant(word == "true", "boolean")
        if token.kind == "name":
            self.position += 1
            return Column(token.text)
        self._refuse("a column, a number or a quoted text")


def _compare(left: Column | Constant, op: str, right: Column | Constant) -> Compare:
    """Put the column on the left: ``65 <= age`` is ``age >= 65``."""
    if isinstance(left, Constant) and isinstance(right, Column):
        return Compare(right, MIRRORED[op], left)
    return Compare(left, op, right)


def _tokens(text: str) -> Iterator[_Token]:
    position = 0
    end = len(text.rstrip())
    while position < end:
        match = _TOKEN.match(text, position)
        if match is None:
            start = position + len(text[position:]) - len(text[position:].lstrip())
            what = "a text without its closing quote" if text[start] in "'\"" else repr(text[start])
            raise InputError(f"{_shown(text)} is not a condition: {what} at character {start + 1}")
        kind = match.lastgroup or ""
        word = match.group(kind)
        if kind == "op" or (kind == "name" and word.lower() in _WORDS):
            yield _Token("word", _SAME.get(word, word.lower()), match.start(kind))
        else:
            yield _Token("name" if kind == "quoted" else kind, word, match.start(kind))
        position = match.end()
    yield _Token("end", "", end)


def _number(token: _Token, text: str) -> float | int:
    """Read a number; a whole one exactly, as far as 64 bits go."""
    if len(token.text) > _MAX_DIGITS:
        raise InputError(
            f"{_shown(text)}: the number at character {token.at + 1} has {len(token.text):,} characters,"
            f" at most {_MAX_DIGITS} are read"
        )
    if not _NUMBER.fullmatch(token.text):
        place = f"at character {token.at + 1}"
        raise InputError(f"{_shown(text)} is not a condition: {shown(token.text)} {place}")
    value = float(token.text)
    if not math.isfinite(value):
        raise InputError(f"{_shown(text)}: {token.text} at character {token.at + 1} is beyond all numbers")
    plain = token.text.replace("_", "")
    if plain.isdigit() and int(plain) < 2**64:
        return int(plain)
    return int(value) if value.is_integer() and value < 2**63 else value


def _shown(text: str) -> str:
    text = " ".join(text.split())
    return f'"{text if len(text) <= 120 else text[:117] + "..."}"'
