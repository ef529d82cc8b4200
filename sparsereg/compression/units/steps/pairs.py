"""Sums, differences, products and quotients of two tensors: both keep the same units."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import fx

from sparsereg.compression.units.labels import Ints
from sparsereg.compression.units.program import name_of
from sparsereg.compression.units.steps.chances import Chance, Pass, Wanted, any_of
from sparsereg.compression.units.steps.table import Along, Channels, Mask, Vector

if TYPE_CHECKING:
    from sparsereg.compression.units.fold import Folder


class Pair(Along):
    """Two tensors element by element.

    Args:
        wide: for each side, whether it has all positions of the result and not only units.
        alpha: factor of the second side of a sum.
    """

    def __init__(
        self,
        node: fx.Node,
        ins: Sequence[Ints],
        sources: Sequence[fx.Node],
        axis: int,
        wide: Sequence[bool],
        alpha: float = 1.0,
    ) -> None:
        super().__init__(node, ins, sources, len(ins[0]), axis)
        self.wide = list(wide)
        self.alpha = alpha

    def joined(self, a: Vector, b: Vector) -> Vector:
        """What two constants make; NaN where either is none and that matters."""
        raise NotImplementedError

    def needless(self, side: int, const: Vector) -> bool:
        """Whether a side that is constant throughout can be left out."""
        return False

    def forward(self, x: Channels) -> None:
        """Constant where both are."""
        a, b = x.const[self.ins[0]], x.const[self.ins[1]]
        if not (np.isnan(a).all() and np.isnan(b).all()):
            x.const[self.out] = self.joined(a, b)

    def needs(self, kept: Mask, x: Channels) -> list[Mask | None]:
        """Both sides, unit by unit; a side that is constant throughout becomes a vector."""
        return [kept if x.live(units[kept]).any() else None for units in self.ins]

    def num_constants(self, x: Channels) -> int:
        """A vector for a side that is constant throughout, unless it does nothing."""
        kept = x.kept[self.out]
        missing = [i for i, mask in enumerate(self.needs(kept, x)) if mask is None]
        left = [i for i in missing if x.const[self.ins[i][kept]].any()]
        return len(left) * int(kept.sum())

    def ask(self, run: Pass, stays: Chance, wanted: Wanted) -> list[Wanted]:
        """A side of which nothing is alive becomes a vector; else it keeps what the result keeps."""
        wishes = []
        for i in range(len(self.ins)):
            there = any_of(run.living(self, i).value)
            wishes.append(Wanted(anyway=Chance(stays.other * there, stays.gates)))
        return wishes

    def write(self, fold: Folder) -> Any:
        """The same of what is left; vectors for sides that are constant throughout."""
        x = fold.channels
        kept = x.kept[self.out]
        sides: list[Any] = []
        for i, mask in enumerate(self.needs(kept, x)):
            const = x.const[self.ins[i][kept]]
            if mask is not None:
                sides.append(fold.read(self, i, mask, exact=True)[0])
            elif self.needless(i, const):
                sides.append(None)
            else:
                sides.append(fold.vector(self.node, self.axis, const))
        made = self._call(fold, sides)
        spread = any(w for w, side in zip(self.wide, self.needs(kept, x), strict=True) if side is not None)
        return made if spread else fold.spread(made, self.node, self.axis)

    def _call(self, fold: Folder, sides: list[Any]) -> Any:
        """The operation on its sides, one of which may be missing."""
        return fold.two(self.node, sides)


class Add(Pair):
    """Sum or difference."""

    def joined(self, a: Vector, b: Vector) -> Vector:
        """The sum of the constants."""
        return a + self.alpha * b

    def needless(self, side: int, const: Vector) -> bool:
        """Zeros."""
        return not const.any()

    def alive(self, run: Pass, ins: list[Chance]) -> Chance:
        """If either side is."""
        return ins[0] | ins[1]

    def _call(self, fold: Folder, sides: list[Any]) -> Any:
        left, right = sides
        if right is None:
            return left
        if left is None:
            return right if self.alpha == 1 else fold.graph.call_function(operator.mul, (right, self.alpha))
        return fold.two(self.node, sides)


class Mul(Pair):
    """Product, such as squeeze and excitation."""

    def joined(self, a: Vector, b: Vector) -> Vector:
        """Zero where one is zero, constant where both are."""
        const = a * b
        const[(a == 0) | (b == 0)] = 0.0
        return const

    def alive(self, run: Pass, ins: list[Chance]) -> Chance:
        """If both sides are; a map times a vector of excitations lives as the map does."""
        if self.wide[0] != self.wide[1]:
            return ins[0] if self.wide[0] else ins[1]
        return ins[0] & ins[1]


class Over(Pair):
    """Quotient."""

    def joined(self, a: Vector, b: Vector) -> Vector:
        """Constant where both are; zero over zero is none."""
        with np.errstate(divide="ignore", invalid="ignore"):
            const = np.asarray(a / b)
        return np.where(np.isfinite(const), const, np.nan)

    def alive(self, run: Pass, ins: list[Chance]) -> Chance:
        """If either side is."""
        return ins[0] | ins[1]


PAIRS: dict[str, type[Pair]] = {
    "add": Add,
    "sub": Add,
    "mul": Mul,
    "multiply": Mul,
    "div": Over,
    "true_divide": Over,
}


def alpha_of(node: fx.Node) -> float | None:
    """Factor of the second side; None if it is no number."""
    alpha = node.kwargs.get("alpha", 1)
    if not isinstance(alpha, int | float):
        return None
    return -float(alpha) if name_of(node) == "sub" else float(alpha)
