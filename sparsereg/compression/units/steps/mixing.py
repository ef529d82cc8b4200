"""Linear layers and convolutions (also grouped, depthwise, transposed): they mix the units of a group."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, fx

from sparsereg.compression.units.labels import Ints
from sparsereg.compression.units.placed import Placed
from sparsereg.compression.units.program import bound, name_of
from sparsereg.compression.units.steps.chances import Chance, Pass, Wanted, any_of
from sparsereg.compression.units.steps.table import Channels, Mask, Step, Values, Vector

if TYPE_CHECKING:
    from sparsereg.compression.units.fold import Folder


@dataclass(frozen=True)
class Shape:
    """How the weight of a layer lies.

    Attributes:
        groups: groups of channels.
        outs: output channels of a group.
        ins: input channels of a group.
        tail: sizes of the kernel.
        transposed: whether inputs come first.
    """

    groups: int
    outs: int
    ins: int
    tail: tuple[int, ...]
    transposed: bool

    @property
    def taps(self) -> int:
        """Positions of the kernel."""
        return math.prod(self.tail)

    def oriented(self, flat: Any) -> Any:
        """A flat weight as (groups, out of a group, in of a group, taps)."""
        if self.transposed:
            return flat.reshape(self.groups, self.ins, self.outs, self.taps).swapaxes(1, 2)
        return flat.reshape(self.groups, self.outs, self.ins, self.taps)

    def back(self, weight: Vector) -> Vector:
        """The other way round, with the sizes that ``weight`` has."""
        groups, outs, ins, _ = weight.shape
        if self.transposed:
            return weight.swapaxes(1, 2).reshape(groups * ins, outs, *self.tail)
        return weight.reshape(groups * outs, ins, *self.tail)


class Mixing(Step):
    """A layer that mixes channels. Gates on its rows, columns or single weights are read off its weight.

    Attributes:
        weight: its weight.
        bias: its bias, if it has one.
        absorber: the normalisation behind it that takes a constant for it.
    """

    def __init__(
        self,
        node: fx.Node,
        ins: Ints,
        source: fx.Node,
        axis: int,
        shape: Shape,
        weight: fx.Node,
        bias: fx.Node | None,
        placed: Placed,
        macs: float,
    ) -> None:
        super().__init__(node, [ins], [source], shape.groups * shape.outs, axis, macs)
        self.shape = shape
        self.weight, self.bias = weight, bias
        self.absorber: Step | None = None
        self.steady = _steady(node, shape)
        self.weights = [n for n in (weight, bias) if n is not None]
        self.rows: list[Ints] = []
        self.columns: list[Ints] = []
        self.single: list[Ints] = []
        for places in placed.places(weight):
            self._gate(shape.oriented(places))
        self.macs_per_weight = macs / max(self.size * shape.ins, 1)

    def _gate(self, places: NDArray[np.int64]) -> None:
        """Gates lie along the rows, the columns or on single weights."""
        if (places == places[:, :, :1, :1]).all():
            self.rows.append(places[:, :, 0, 0].reshape(-1))
        elif self.shape.groups == 1 and (places == places[:, :1, :, :1]).all():
            self.columns.append(places[0, 0, :, 0])
        elif self.shape.groups == 1:
            self.single.append(places[0])

    @property
    def closes(self) -> list[Ints]:
        """Gates on its rows, and those behind it."""
        return [*self.rows, *self.scales]

    @property
    def all_gates(self) -> list[Ints]:
        """Gates of its rows, columns and weights."""
        return [*self.closes, *self.columns, *(places.reshape(-1) for places in self.single)]

    def oriented(self, values: Values) -> Vector:
        """The weights, with all gates, as (groups, out of a group, in of a group, taps)."""
        weight: Vector = self.shape.oriented(values.array(self.weight))
        if self.scales:
            weight = weight * self.scale_of(values).reshape(self.shape.groups, self.shape.outs, 1, 1)
        return weight

    def bias_of(self, values: Values) -> Vector | None:
        """The bias, with all gates."""
        if self.bias is None:
            return None
        return values.array(self.bias) * self.scale_of(values)

    def folds(self, x: Channels) -> Mask:
        """Positions that need not be read: what they contribute is a constant."""
        const = x.const[self.ins[0]]
        return np.asarray(~np.isnan(const) if self.steady else const == 0)

    def connected(self, x: Channels) -> Mask:
        """Which weights are not behind a closed gate of their own, (out, in); without groups."""
        open_: Mask = np.ones((self.size, self.shape.ins), dtype=bool)
        for places in self.single:
            open_ &= np.asarray((~x.values.shut[places]).any(-1))
        for places in self.columns:
            open_ &= ~x.values.shut[places]
        return open_

    def forward(self, x: Channels) -> None:
        """Constant where all the inputs of a group are; a closed gate makes its row constant."""
        rows = self._dead_rows(x)
        if not rows.any():
            return
        total = self.contribution(np.where(self.folds(x), x.const[self.ins[0]], 0.0), x.values)
        bias = self.bias_of(x.values)
        total = total if bias is None else total + bias
        x.const[self.out] = np.where(rows, total, np.nan)

    def _dead_rows(self, x: Channels) -> Mask:
        """Outputs that read nothing but constants."""
        folded, shut = self.folds(x), self.shut(x)
        if self.single or self.columns:
            dead: Mask = np.asarray(~self.connected(x)[:, ~folded].any(axis=1))
        elif folded.any():
            whole = folded.reshape(self.shape.groups, -1).all(axis=1)
            dead = whole.repeat(self.shape.outs)
        else:
            dead = np.zeros(self.size, dtype=bool)
        return dead if shut is None else dead | shut

    def contribution(self, const: Vector, values: Values) -> Vector:
        """What constant inputs add to every output; (in,) to (out,)."""
        if not const.any():
            return np.zeros(self.size)
        weight = self.oriented(values).sum(axis=-1)
        return np.asarray((weight * const.reshape(self.shape.groups, 1, -1)).sum(axis=-1).reshape(-1))

    def keep(self, need: Mask) -> Mask:
        """The needed units; groups stay equally large."""
        return need if self.shape.groups == 1 else _even(need, self.shape.groups)

    def needs(self, kept: Mask, x: Channels) -> list[Mask | None]:
        """Every input that is not a constant to fold, of the groups that are left."""
        need = ~self.folds(x)
        if self.single or self.columns:
            need &= self.connected(x)[kept].any(axis=0)
        if self.shape.groups == 1:
            return [need]
        alive = kept.reshape(self.shape.groups, -1).any(axis=1)
        need = need.reshape(self.shape.groups, -1)
        need[~alive] = False
        # A group that is left keeps one input, even if that is a constant: a convolution has no empty group.
        need[alive & ~need.any(axis=1), 0] = True
        return [_even(need.reshape(-1), self.shape.groups)]

    def reads(self, kept: Mask, x: Channels) -> list[Mask | None]:
        """Everything that is there, so that no selection has to be copied; of groups, what is needed."""
        return [x.kept[self.ins[0]]] if self.shape.groups == 1 else self.needs(kept, x)

    def folded(self, read: Mask, x: Channels) -> Vector:
        """The constants that are added to the bias, for the inputs that are not read."""
        return np.where(self.folds(x) & ~read, x.const[self.ins[0]], 0.0)

    def num_parameters(self, x: Channels | None) -> int:
        """Weights and the bias, if it has one."""
        outs = self.size if x is None else int(x.kept[self.out].sum())
        weights = self._left(x) * self.shape.taps
        return weights + (outs if self.bias is not None else 0)

    def num_macs(self, x: Channels | None) -> int:
        """Weights times the positions at which they are applied."""
        return round(self._left(x) * self.macs_per_weight)

    def _left(self, x: Channels | None) -> int:
        """Pairs of an input and an output that are left."""
        groups = self.shape.groups
        if x is None:
            return self.size * self.shape.ins
        kept = x.kept[self.out]
        read = self.reads(kept, x)[0]
        assert read is not None
        if groups == 1:
            return int(read.sum()) * int(kept.sum())
        alive = int(kept.reshape(groups, -1).any(axis=1).sum())
        return int(kept.sum()) * int(read.sum()) // max(alive, 1)

    def num_constants(self, x: Channels) -> int:
        """A bias where there was none, unless the normalisation behind takes it."""
        if self.bias is not None or self.absorber is not None:
            return 0
        kept = x.kept[self.out]
        read = self.reads(kept, x)[0]
        assert read is not None
        return int(kept.sum()) if self.folded(read, x).any() else 0

    # --- chances --------------------------------------------------------------------------------------

    def _connections(self, run: Pass) -> Tensor:
        """Chance that any weight between two units is open, (out, in)."""
        chance = run.ones(1)
        for places in self.single:
            p = run.chances(places)
            chance = chance * (p.squeeze(2) if self.shape.taps == 1 else 1 - (1 - p).prod(dim=2))
        for places in self.columns:
            chance = chance * run.chances(places)
        return chance.expand(self.size, self.shape.ins)

    def _each(self) -> bool:
        return self.shape.ins == 1 and self.shape.outs == 1

    def alive(self, run: Pass, ins: list[Chance]) -> Chance:
        """If anything that its group reads is."""
        gates = run.gates(self)
        if self.single or self.columns:
            through = self._connections(run) * ins[0].value
            return Chance(1 - (1 - through).prod(dim=1)) & gates
        if self._each():
            return ins[0] & gates
        return Chance(any_of(ins[0].value, self.shape.groups).repeat_interleave(self.shape.outs)) & gates

    def ask(self, run: Pass, stays: Chance, wanted: Wanted) -> list[Wanted]:
        """All that is alive, if anything of its group stays."""
        if self.single or self.columns:
            through = self._connections(run) * stays.value.unsqueeze(1)
            return [Wanted(alive=Chance(1 - (1 - through).prod(dim=0)))]
        if self._each():
            return [Wanted(anyway=stays)]
        return [
            Wanted(alive=Chance(any_of(stays.value, self.shape.groups).repeat_interleave(self.shape.ins)))
        ]

    def expected(self, run: Pass, stays: Chance) -> tuple[Tensor | float, Tensor | float]:
        """Expected weights: outputs times inputs."""
        value = stays.value
        outs, groups = value.sum(), self.shape.groups
        read = run.staying(self, 0)
        if groups == 1:
            ins = read.sum()
        else:
            of_groups = any_of(value, groups)
            ins = of_groups.new_ones(())
            if self.shape.ins > 1:
                inside = read.reshape(groups, -1).sum(dim=1) * of_groups
                ins = inside.sum() / of_groups.sum().clamp(min=1e-12)
        weights = outs * ins
        return weights * self.shape.taps + (
            outs if self.bias is not None else 0.0
        ), weights * self.macs_per_weight

    # --- writing --------------------------------------------------------------------------------------

    def write(self, fold: Folder) -> Any:
        """The layer of what is left; open gates and constants go into its weights."""
        x, shape = fold.channels, self.shape
        kept = x.kept[self.out]
        read = self.reads(kept, x)[0]
        assert read is not None
        source, scale = fold.read(self, 0, read, exact=False)
        factors = np.ones(len(read))
        factors[read] = scale
        weight = self.oriented(x.values) * factors.reshape(shape.groups, 1, shape.ins, 1)
        rows, columns = kept.reshape(shape.groups, -1), read.reshape(shape.groups, -1)
        alive = [g for g in range(shape.groups) if rows[g].any()]
        fold.give(self.weight, shape.back(np.stack([weight[g][rows[g]][:, columns[g]] for g in alive])))
        bias = self.bias_of(x.values)
        folded = self.folded(read, x)
        if folded.any():
            shift = self.contribution(folded, x.values)
            if self.absorber is not None:
                fold.shifts[self.absorber.node] = shift
            else:
                bias = shift if bias is None else bias + shift
        own = None if bias is None else fold.bias(self.weight, self.bias, bias[kept])
        args = {"input": source, "bias": own}
        if shape.groups > 1:
            args["groups"] = len(alive)
        return fold.call(self.node, **args)


def _even(need: Mask, groups: int) -> Mask:
    """Enlarge a mask so that every group that has any unit has the same number."""
    grouped = need.reshape(groups, -1).copy()
    counts = grouped.sum(axis=1)
    most = counts.max()
    for g in np.flatnonzero((counts > 0) & (counts < most)):
        spare = np.flatnonzero(~grouped[g])[: most - counts[g]]
        grouped[g, spare] = True
    return grouped.reshape(-1)


def _steady(node: fx.Node, shape: Shape) -> bool:
    """Whether a constant that is not zero gives a constant output at every position."""
    if name_of(node) == "linear":
        return True
    a = bound(node)
    padding = a["padding"]
    padded = padding == "same" if isinstance(padding, str) else any(_numbers(padding))
    if shape.transposed:
        return shape.taps == 1 and not padded and all(s == 1 for s in _numbers(a["stride"]))
    return not padded or (shape.taps == 1 and padding == "same")


def _numbers(value: Any) -> Sequence[int]:
    return [value] if isinstance(value, int) else list(value)
