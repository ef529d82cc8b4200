"""Operations on every unit by itself: activations, pooling, gates, a choice of positions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, fx

from sparsereg.compression.units.labels import Ints
from sparsereg.compression.units.steps.chances import Chance, Pass
from sparsereg.compression.units.steps.table import Along, Channels, Vector

if TYPE_CHECKING:
    from sparsereg.compression.units.fold import Folder


class Take(Along):
    """Some positions of a tensor that one operation reads: what nobody reads is left out behind it.

    Nothing in the network stands for it.
    """

    homogeneous = True

    def forward(self, x: Channels) -> None:
        """As what it reads."""
        x.const[self.out] = x.const[self.ins[0]]


class Gate(Along):
    """A gate that no earlier layer could absorb: a factor that a later layer absorbs."""

    homogeneous = True

    def __init__(self, node: fx.Node, ins: Ints, source: fx.Node, axis: int, places: list[Ints]) -> None:
        super().__init__(node, [ins], [source], len(ins), axis)
        self.scales = places

    def forward(self, x: Channels) -> None:
        """A closed gate makes zero, an open one a factor."""
        const = x.const[self.ins[0]] * self.scale_of(x.values)
        shut = self.shut(x)
        assert shut is not None
        const[shut] = 0.0
        x.const[self.out] = const

    def write(self, fold: Folder) -> Any:
        """Nothing is left but factors."""
        return fold.read(self, 0, fold.channels.kept[self.out], exact=False)[0]


class Single(Along):
    """A function of every unit by itself.

    Args:
        apply: the operation on a float64 tensor of shape (1, units, ...); on (units,) for single elements.
        homogeneous: whether f(z x) = z f(x) for every z >= 0.
        positions: of what it reads, behind the axis; None for a function of single elements.
        any_size: whether there may be others.
    """

    def __init__(
        self,
        node: fx.Node,
        ins: Ints,
        source: fx.Node,
        axis: int,
        apply: Callable[[Tensor], Tensor],
        homogeneous: bool,
        positions: Sequence[int] | None = None,
        any_size: bool = False,
    ) -> None:
        super().__init__(node, [ins], [source], len(ins), axis)
        self.apply = apply
        self.homogeneous = homogeneous
        self.positions = positions
        self.any_size = any_size
        self.of_zero = self._constant(np.zeros(1))[0]

    def _constant(self, const: Vector) -> Vector:
        """What it makes of constants; NaN where that is not the same at every position and size."""
        if self.positions is None:
            with torch.no_grad():
                return np.asarray(self.apply(torch.from_numpy(const.copy())).numpy())
        made = self._applied(const, self.positions)
        if self.any_size:
            # Large enough that a border cannot be all there is; a sum over positions differs, too.
            made = np.concatenate([made, self._applied(const, [n + 8 for n in self.positions])], axis=1)
        same = np.ptp(made, axis=1) <= 1e-12 * np.abs(made).max(axis=1)
        return np.where(same, made[:, 0], np.nan)

    def _applied(self, const: Vector, positions: Sequence[int]) -> Vector:
        x = torch.from_numpy(const.copy()).view(1, -1, *(1,) * len(positions))
        with torch.no_grad():
            y = self.apply(x.expand(1, -1, *positions).clone())
        return np.asarray(y.reshape(len(const), -1).numpy())

    def forward(self, x: Channels) -> None:
        """A constant stays one unless padding makes it differ at the border."""
        const = x.const[self.ins[0]]
        known = ~np.isnan(const)
        if not known.any():
            return
        zero = const == 0
        const[zero] = self.of_zero
        rest = np.flatnonzero(known & ~zero)
        if len(rest):
            const[rest] = self._constant(const[rest])
        x.const[self.out] = const

    def write(self, fold: Folder) -> Any:
        """The same function."""
        source, _ = fold.read(self, 0, fold.channels.kept[self.out], exact=not self.homogeneous)
        pool = fold.pool(self.node, source)
        return fold.again(self.node, {self.sources[0]: source}) if pool is None else pool


class Slopes(Along):
    """PReLU with one slope for each unit."""

    homogeneous = True

    def __init__(self, node: fx.Node, ins: Ints, source: fx.Node, slopes: fx.Node) -> None:
        super().__init__(node, [ins], [source], len(ins), 1)
        self.slopes = slopes
        self.weights = [slopes]

    def forward(self, x: Channels) -> None:
        """A constant is multiplied by its slope if negative."""
        const = x.const[self.ins[0]]
        if not np.isnan(const).all():
            x.const[self.out] = np.where(const < 0, x.values.array(self.slopes) * const, const)

    def num_parameters(self, x: Channels | None) -> int:
        """One slope for each unit that is left."""
        return self.size if x is None else int(x.kept[self.out].sum())

    def expected(self, run: Pass, stays: Chance) -> tuple[Tensor | float, Tensor | float]:
        """One slope for each unit that stays."""
        return stays.value.sum(), 0.0

    def write(self, fold: Folder) -> Any:
        """PReLU of what is left."""
        kept = fold.channels.kept[self.out]
        source, _ = fold.read(self, 0, kept, exact=False)
        fold.give(self.slopes, fold.channels.values.array(self.slopes)[kept])
        return fold.again(self.node, {self.sources[0]: source})
