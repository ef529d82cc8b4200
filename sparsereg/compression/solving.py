"""The numbers with which a class makes parameters of given shapes, found by trying."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping
from functools import cached_property

from sparsereg.compression.recipe import Path, Recipe, Shapes, Values
from sparsereg.compression.running import first_line
from sparsereg.errors import InputError

Dim = tuple[str, int]
"""A parameter and an axis of it."""

_TRIES = 60
"""Numbers that are tried in place of others before a shape counts as one that the class cannot hold."""
_FEW_TRIES = 10
"""The same where only some of the shapes have changed."""
_FACTORS = (2, 3, 0.5)
"""By which a number is changed to see what follows it."""


class Solver:
    """Looks for the numbers with which a class has given shapes.

    Args:
        name: of the class, for messages.
        recipe: how it is made.
        wanted: the shapes of the parameters, and perhaps of other things.
        start: the numbers that may be changed, with their values.
    """

    def __init__(self, name: str, recipe: Recipe, wanted: Shapes, start: Values) -> None:
        self.name = name
        self.recipe = recipe
        self.wanted = wanted
        self.start = start
        self.first = recipe.shapes({})
        self.most = self.left = _TRIES

    def of(self, wanted: Shapes) -> Solver:
        """The same for other shapes of the same parameters, with what is known of them."""
        assert self._unrounded.keys() <= self.moved.keys()  # found once, for all
        other = copy.copy(self)
        other.wanted, other.most = wanted, _FEW_TRIES
        return other

    def solved(self, values: Values) -> Values:
        """Return numbers with which the class has the wanted shapes.

        Args:
            values: those that are known.

        Raises:
            InputError: there are none.
        """
        self.left = self.most
        return self._solved(self._unrounded | values)

    @cached_property
    def _unrounded(self) -> Values:
        """Numbers of which sizes are made multiples, where these are what they are without."""
        rounding: Values = {}
        for key, dims in self.moved.items():
            if dims and self.start[key] > 1 and float(self.start[key]).is_integer():
                try:
                    rounding |= {key: 1.0} if self.recipe.shapes({key: 1.0}) == self.first else {}
                except Exception:  # all kinds, of the class
                    continue
        return rounding

    def _solved(self, values: Values) -> Values:
        now = self._shapes(values)
        more = now.keys() - self.wanted.keys()
        missing = {
            (n, d)
            for n in now.keys() & self.wanted.keys()
            for d, size in enumerate(now[n])
            if size != self._size(n, d)
        }
        if more and not missing:
            raise InputError(f"restore_class: {self.name} needs {min(more)} with {said(values)}")
        if not missing:
            return values
        refused: list[InputError] = []
        for key in self._best({k: dims for k, dims in self.moved.items() if k not in values}, missing):
            self.left -= 1
            try:
                return self._solved({**values, key: self._value(key, values, now)})
            except InputError as error:
                refused.append(error)
            if self.left < 0:
                break
        raise refused[0] if refused else InputError(self._ragged(missing, now))

    def _size(self, name: str, axis: int) -> int:
        shape = self.wanted[name]
        return shape[axis] if axis < len(shape) else -1

    def _shapes(self, values: Values) -> Shapes:
        try:
            return self.recipe.shapes(values)
        except Exception as error:  # all kinds, of the class
            raise InputError(
                f"restore_class: {self.name} refuses {said(values)}: {first_line(error)}"
            ) from None

    @cached_property
    def moved(self) -> dict[Path, dict[Dim, float]]:
        """For each number the sizes that follow it: by how much for each unit of it."""
        return {key: self._slopes(key, {}, self.first) for key in self.start}

    def _slopes(self, key: Path, values: Values, now: Shapes) -> dict[Dim, float]:
        for factor in _FACTORS:
            value = self.start[key] * factor
            try:
                then = self.recipe.shapes({**values, key: value})
            except Exception:  # all kinds, of the class, which does not take everything
                continue
            step = value - self.start[key]
            return {
                (n, d): (then[n][d] - size) / step
                for n, shape in now.items()
                for d, size in enumerate(shape)
                if n in self.wanted and len(then.get(n, ())) == len(shape) and then[n][d] != size
            }
        return {}

    def _best(self, moved: Mapping[Path, Mapping[Dim, float]], missing: set[Dim]) -> list[Path]:
        """The numbers that some wrong sizes follow, first those that decide on most of them alone."""
        own = {key: [d for d in dims if d in missing] for key, dims in moved.items()}
        counts = {key: (len(self._alone(dims, moved)), len(dims)) for key, dims in own.items() if dims}
        return sorted(counts, key=lambda key: counts[key], reverse=True)

    def _alone(self, dims: Iterable[Dim], moved: Mapping[Path, Mapping[Dim, float]]) -> list[Dim]:
        """Of some sizes those that only one number decides on."""
        return [d for d in dims if sum(d in other for other in moved.values()) == 1]

    def _value(self, key: Path, values: Values, now: Shapes) -> float:
        """The value of a number with which the sizes are right; they have to agree."""
        slopes = self._slopes(key, values, now) if values else self.moved[key]
        free = {k: dims for k, dims in self.moved.items() if k not in values}
        found: dict[float, list[str]] = {}
        for n, d in self._alone(slopes, free) or slopes:
            value = self.start[key] + (self._size(n, d) - now[n][d]) / slopes[n, d]
            found.setdefault(_rounded(value), []).append(n)
        if len(found) == 1 and min(found) > 0:
            return next(iter(found))
        shown = "; ".join(f"{v:g} for {_some(names)}" for v, names in sorted(found.items())[:4])
        raise InputError(
            f"restore_class: {self.name} has one {named(key)} for all layers, which would have to be {shown}"
            " now; train with shape=uniform and with families that one argument does not tie, or keep what"
            " compact() returned"
        )

    def _ragged(self, missing: set[Dim], now: Shapes) -> str:
        layers = sorted({n for n, _ in missing})
        first = layers[0]
        return (
            f"restore_class: no arguments of {self.name} give the shape of {_some(layers)}: {first} is"
            f" {self.wanted[first]} now, and would be {now[first]}"
        )


def _rounded(value: float) -> float:
    """A number of six digits, not below what it was: a class cuts what it multiplies with it."""
    near = round(value)
    return float(near) if abs(value - near) < 1e-6 else math.ceil(value * 1e6 - 1e-3) / 1e6


def said(values: Values) -> str:
    """Numbers as the class's caller would write them."""
    return ", ".join(f"{named(key)}={value:g}" for key, value in values.items())


def named(path: Path) -> str:
    """A number as its class's caller would write it."""
    return str(path[0]) + "".join(f".{p}" if isinstance(p, str) else f"[{p}]" for p in path[1:])


def _some(names: list[str]) -> str:
    names = list(dict.fromkeys(names))
    return ", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")
