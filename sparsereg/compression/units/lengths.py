"""For which sizes of its inputs a traced network is the network itself.

Tracing follows the path of the example. Where the path depends on a size (a sequence that is too long is cut,
one that does not fill its windows is padded), it holds for the sizes that take the same path.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sparsereg.compression.sizes import ANY


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
    step = _step(symbol, environment.guards)
    if step is None or any(_says(guard.expr, symbol) for guard in environment.guards):
        return example, 0, 0
    bounds = environment.var_to_range[symbol]
    low = int(bounds.lower)
    return (ANY if low <= 2 else -low), (int(bounds.upper) if bounds.upper.is_Integer else 0), step


def _says(rule: Any, symbol: Any) -> bool:
    """Whether a rule says what comes of a size alone, such as the number of its windows.

    That something has the size 1 is asked wherever tensors are broadcast, and says nothing.
    """
    if type(rule).__name__ != "Equality":
        return False
    one, two = rule.args
    return any(
        a.free_symbols == {symbol} and b.is_Integer and b not in (0, 1) for a, b in ((one, two), (two, one))
    )


def _step(symbol: Any, guards: Sequence[Any]) -> int | None:
    """What a size was found to be a multiple of; negative: not to be; None: a rule of another kind."""
    multiple, others = 1, set()
    for guard in guards:
        parts = guard.expr.find(lambda part: type(part).__name__.endswith("Mod"))
        own = [p for p in parts if p.args[0] == symbol and p.args[1].is_Integer]
        if not own:
            continue
        number, told = int(own[0].args[1]), type(guard.expr).__name__
        if guard.expr.args[1] != 0 or told not in ("Equality", "Unequality"):
            return None
        if told == "Equality":
            multiple = math.lcm(multiple, number)
        else:
            others.add(number)
    if not others:
        return multiple if multiple > 1 else 0
    return -others.pop() if multiple == 1 and len(others) == 1 else None
