"""For which sizes of its inputs a traced network is the network itself.

Tracing follows the path of the example. Where the path depends on a size (a sequence that is too long is cut,
one that does not fill its windows is padded), it holds for the sizes that take the same path.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch

from sparsereg.compression.sizes import ANY

TRIED = 48
"""Sizes on either side on which rules are tried that are no range and no multiple."""


@dataclass
class Sizes:
    """The sizes that an input may have, as ``of_size`` checks them.

    Attributes:
        sizes: of each dimension; -n where it may differ and is at least n.
        most: the largest; 0 where there is none.
        step: what it must be a multiple of; negative: must not be; 0 where it may be any.
    """

    sizes: list[int]
    most: list[int]
    step: list[int]

    @classmethod
    def of(cls, shape: Sequence[int | torch.SymInt], example: Sequence[int]) -> "Sizes":
        """The sizes that a traced input may have.

        Args:
            shape: as it was traced.
            example: the sizes of the example, which are meant where no rule says others.
        """
        limits = [_limits(size, own) for size, own in zip(shape, example, strict=True)]
        return cls(*(list(part) for part in zip(*limits, strict=True)))

    @classmethod
    def said(
        cls, sizes: Sequence[int], most: Sequence[int] | None = None, step: Sequence[int] | None = None
    ) -> "Sizes":
        """As ``arguments`` has it."""
        none = [0] * len(sizes)
        return cls(list(sizes), list(most or none), list(step or none))

    def free(self, axis: int) -> None:
        """Let a dimension have any size."""
        self.sizes[axis], self.most[axis], self.step[axis] = ANY, 0, 0

    @property
    def arguments(self) -> tuple[list[int] | None, ...]:
        """What ``of_size`` is told beside the input; nothing if any size will do."""
        rest = [values if any(values) else None for values in (self.most, self.step)]
        while rest and rest[-1] is None:
            rest.pop()
        return (self.sizes, *rest) if rest or any(s != ANY for s in self.sizes) else ()


def _limits(size: Any, example: int) -> tuple[int, int, int]:
    """Least, largest and step of a size."""
    if isinstance(size, int):
        return size, 0, 0
    symbol, environment = size.node.expr, size.node.shape_env
    if not symbol.is_Symbol:
        return example, 0, 0
    rules = [g.expr for g in environment.guards if g.expr.free_symbols == {symbol}]
    step = _step(symbol, rules)
    if step is None:
        return example, 0, 0
    bounds = environment.var_to_range[symbol]
    low, most = int(bounds.lower), int(bounds.upper) if bounds.upper.is_Integer else 0
    some = _some(example, low, most, step)
    if not all(_holds(rule, symbol, n) for rule in _told(rules) for n in some):
        return example, 0, 0
    return (ANY if low <= 2 else -low), most, step


def _told(rules: Sequence[Any]) -> list[Any]:
    """Rules that say what comes of a size, such as the number of its windows, or whether that is even.

    Even that a map has one position left is such: squeezed it loses its axis. Least and largest sizes are in
    the range of the symbol already.
    """
    return [r for r in rules if type(r).__name__ == "Equality" or r.find(_is_remainder)]


def _some(example: int, low: int, most: int, step: int) -> list[int]:
    """Sizes that seem to be allowed, to try rules on: small ones, those about the example, large ones."""
    near = range(max(low, example - TRIED), example + TRIED)
    sizes = {*range(low, low + TRIED), *near, *(example * n for n in (2, 3, 5, 10, 100))}
    return [n for n in sizes if (not most or n <= most) and (not step or (n % abs(step) == 0) == (step > 0))]


def _holds(rule: Any, symbol: Any, n: int) -> bool:
    try:
        return rule.subs(symbol, n) is sympy.true
    except ZeroDivisionError:  # a remainder of a number of windows, of which there is none
        return False


def _step(symbol: Any, rules: Sequence[Any]) -> int | None:
    """What a size was found to be a multiple of; negative: not to be; None: a rule of another kind."""
    multiple, others = 1, set()
    for rule in rules:
        own = [p for p in rule.find(_is_remainder) if p.args[0] == symbol and p.args[1].is_Integer]
        if not own:
            continue
        number, told = int(own[0].args[1]), type(rule).__name__
        if rule.args[1] != 0 or told not in ("Equality", "Unequality"):
            return None
        if told == "Equality":
            multiple = math.lcm(multiple, number)
        else:
            others.add(number)
    if not others:
        return multiple if multiple > 1 else 0
    return -others.pop() if multiple == 1 and len(others) == 1 else None


def _is_remainder(part: Any) -> bool:
    return type(part).__name__.endswith("Mod")
