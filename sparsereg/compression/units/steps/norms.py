"""BatchNorm: an affine map of every channel, with gates folded into weight and bias."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor, fx

from sparsereg.compression.units.labels import Ints
from sparsereg.compression.units.placed import Placed
from sparsereg.compression.units.program import bound
from sparsereg.compression.units.steps.chances import Chance, Pass
from sparsereg.compression.units.steps.table import Along, Channels, Values, Vector

if TYPE_CHECKING:
    from sparsereg.compression.units.fold import Folder

_OWN = ("weight", "bias", "running_mean", "running_var")


class Norm(Along):
    """BatchNorm in eval mode; without running statistics it takes those of the batch."""

    def __init__(self, node: fx.Node, ins: Ints, source: fx.Node, placed: Placed) -> None:
        super().__init__(node, [ins], [source], len(ins), 1)
        a = bound(node)
        self.own: dict[str, fx.Node] = {key: a[key] for key in _OWN if isinstance(a.get(key), fx.Node)}
        self.weights = list(self.own.values())
        self.eps = float(a["eps"])
        self.tracks = "running_mean" in self.own and not a.get("training")
        self.affine = "weight" in self.own and "bias" in self.own
        self.rows = placed.places(self.own["weight"]) if self.affine else []
        self.bias_rows = placed.places(self.own["bias"]) if self.affine else []

    @property
    def closes(self) -> list[Ints]:
        """Gates on weight and bias, and those behind it."""
        both = [r for r in self.rows if any(np.array_equal(r, b) for b in self.bias_rows)]
        return [*both, *self.scales]

    @property
    def all_gates(self) -> list[Ints]:
        """Gates of the weight, of the bias, and behind."""
        return [*self.rows, *self.bias_rows, *self.scales]

    def bias_of(self, values: Values) -> Vector:
        """The bias, with all gates."""
        bias = values.array(self.own["bias"]) if "bias" in self.own else np.zeros(self.size)
        return bias * self.scale_of(values)

    def map_of(self, values: Values) -> tuple[Vector, Vector]:
        """Slope and intercept of every channel."""
        weight = values.array(self.own["weight"]) if "weight" in self.own else np.ones(self.size)
        slope = weight * self.scale_of(values)
        if not self.tracks:
            return slope, self.bias_of(values)
        slope = slope / np.sqrt(values.array(self.own["running_var"]) + self.eps)
        return slope, self.bias_of(values) - slope * values.array(self.own["running_mean"])

    def forward(self, x: Channels) -> None:
        """A constant stays one, usually another; a closed gate makes it zero."""
        const = x.const[self.ins[0]]
        if not np.isnan(const).all():
            slope, intercept = self.map_of(x.values)
            # Without running statistics a constant is its own mean.
            x.const[self.out] = slope * const + intercept if self.tracks else const * 0 + intercept
        shut = self.shut(x)
        if shut is not None:
            x.const[self.out][shut] = 0.0

    def num_parameters(self, x: Channels | None) -> int:
        """Weight and bias of the channels that are left."""
        kept = self.size if x is None else int(x.kept[self.out].sum())
        return kept * sum(key in self.own for key in ("weight", "bias"))

    def expected(self, run: Pass, stays: Chance) -> tuple[Tensor | float, Tensor | float]:
        """Weight and bias of the channels that stay."""
        return stays.value.sum() * sum(key in self.own for key in ("weight", "bias")), 0.0

    def write(self, fold: Folder) -> Any:
        """BatchNorm of the kept channels, with gates in its weight and bias."""
        x = fold.channels
        kept = x.kept[self.out]
        source, _ = fold.read(self, 0, kept, exact=True)
        scale = self.scale_of(x.values)
        for key in ("weight", "bias"):
            if key in self.own:
                fold.give(self.own[key], (x.values.array(self.own[key]) * scale)[kept])
        if "running_mean" in self.own:
            shift = fold.shifts.pop(self.node, np.zeros(self.size))
            fold.give(self.own["running_mean"], (x.values.array(self.own["running_mean"]) - shift)[kept])
            fold.give(self.own["running_var"], x.values.array(self.own["running_var"])[kept])
        return fold.call(self.node, input=source)
