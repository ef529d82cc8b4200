"""The algebra of channels: what is constant, what is needed, what it costs. One class a kind of operation.

Each operation makes units of its own: the positions along one axis of its result. It knows which of them are
constant when some of those that it reads are (``forward``), which of those that it reads must be there for
given ones of its own (``needs``), and what it costs with given ones. A unit is *constant* if it has one value
for every input and at every position. Operations that only move elements make no units: theirs are those
of what they move.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from sparsereg.compression.units.labels import Ints
from sparsereg.compression.units.placed import Placed
from sparsereg.compression.units.program import called, name_of
from sparsereg.compression.units.rules.moves import COPIES
from sparsereg.compression.units.steps.chances import Chance, Pass, Wanted, any_of
from sparsereg.distributions import HardConcrete, gate_median

if TYPE_CHECKING:
    from sparsereg.compression.units.fold import Folder

Mask = NDArray[np.bool_]
Vector = NDArray[np.float64]


class Values:
    """The numbers of a network at one moment, in float64 on the CPU, each read at most once.

    A gate is zero exactly where the network's own evaluation makes it zero.

    Args:
        placed: the network as operations.
        model: the network.
        pins: closed units that are to stay as if they were open, (units,).

    Attributes:
        z: all gates end to end.
        shut: which of them are zero.
    """

    def __init__(self, placed: Placed, model: nn.Module, pins: Mask | None = None) -> None:
        self.placed = placed
        self.model = model
        self.pins = pins
        self._tensors: dict[fx.Node, Any] = {}
        self._arrays: dict[fx.Node, Vector] = {}
        gates = [placed.gate(model, i) for i in range(len(placed.gates))]
        self.z, self.shut = _medians(gates)
        self._sizes = [tuple(gate.log_alpha.shape) for gate in gates]

    def tensor(self, node: fx.Node) -> Tensor:
        """A weight, with the gates that multiply it."""
        if node not in self._tensors:
            self._tensors[node] = self._evaluated(node)
        found: Tensor = self._tensors[node]
        return found

    def array(self, node: fx.Node) -> Vector:
        """The same, flat."""
        if node not in self._arrays:
            self._arrays[node] = self.tensor(node).flatten().numpy()
        return self._arrays[node]

    def _evaluated(self, node: fx.Node) -> Any:
        placed = self.placed
        if node in placed.of_gate:
            gate = placed.of_gate[node]
            first = placed.first[gate]
            part = torch.from_numpy(self.z[first : first + int(np.prod(self._sizes[gate]))])
            return part.view(self._sizes[gate])
        if node in placed.made:
            return self.tensor(placed.made[node].call)
        if node in placed.calls:
            call = placed.calls[node]
            if name_of(node) in COPIES:
                return self.tensor(call.args[0])
            args, kwargs = fx.node.map_arg((call.args, dict(call.kwargs)), self.tensor)
            return called(call.target, args, kwargs)
        value = placed.value(self.model, node).detach().cpu()
        return value.double() if value.is_floating_point() else value


def _medians(gates: Sequence[HardConcrete]) -> tuple[Vector, Mask]:
    """Test-time gates end to end, and which are zero; in one pass for all of one temperature."""
    groups: dict[tuple[Any, ...], list[int]] = {}
    for i, gate in enumerate(gates):
        key = (gate.temperature, gate.gamma, gate.zeta, gate.log_alpha.dtype, gate.log_alpha.device)
        groups.setdefault(key, []).append(i)
    parts: dict[int, tuple[Vector, Mask]] = {}
    for (*shape, _, _), members in groups.items():
        end_to_end = torch.cat([gates[i].log_alpha.detach().flatten() for i in members])
        shut = gate_median(end_to_end, *shape) == 0
        z = gate_median(end_to_end.double(), *shape).masked_fill(shut, 0.0).cpu().numpy()
        places = np.cumsum([0, *(gates[i].log_alpha.numel() for i in members)])
        off = shut.cpu().numpy()
        for i, first, last in zip(members, places[:-1], places[1:], strict=True):
            parts[i] = (z[first:last], off[first:last])
    order = [parts[i] for i in range(len(gates))]
    empty: tuple[Vector, Mask] = (np.zeros(0), np.zeros(0, dtype=bool))
    z, off = (np.concatenate(side) for side in zip(empty, *order, strict=True))
    return z, off


class Channels:
    """What is known about all units of a network at one moment.

    Attributes:
        values: gates and weights that it was found with.
        const: the value of a constant unit, NaN for one that depends on the input.
        need: units that something reads.
        kept: units that are there in the smaller network.
        steps: operations that are computed there.
        constant: operations of which nothing but constants stays.
    """

    def __init__(self, size: int, values: Values) -> None:
        self.values = values
        self.const = np.full(size, np.nan)
        self.need = np.zeros(size, dtype=bool)
        self.kept = np.zeros(size, dtype=bool)
        self.steps: list[Step] = []
        self.constant: set[fx.Node] = set()

    def live(self, units: Any) -> Mask:
        """Which units depend on the input."""
        found: Mask = np.isnan(self.const[units])
        return found


class Step:
    """An operation that makes units of its own. The base class keeps all that it reads, and is kept whole.

    Args:
        node: the operation; the output's own node for the result.
        ins: for each tensor that it reads, the units along an axis.
        sources: these tensors.
        size: units that it makes.
        axis: of its result, along which they lie.
        macs: multiply-accumulate operations for one example.

    Attributes:
        number: its own, in the order of all.
        first: number of the first unit that it makes.
        scales: gates that were absorbed, for each unit a place in the gates.
        weights: parameters that it holds.
    """

    homogeneous = False
    """Whether f(z x) = z f(x) for every z >= 0."""

    def __init__(
        self,
        node: fx.Node,
        ins: Sequence[Ints],
        sources: Sequence[fx.Node],
        size: int = 1,
        axis: int = 0,
        macs: float = 0.0,
    ) -> None:
        self.node = node
        self.ins = list(ins)
        self.sources = list(sources)
        self.size = size
        self.axis = axis
        self.macs = macs
        self.first = 0
        self.number = 0
        self.scales: list[Ints] = []
        self.weights: list[fx.Node] = []

    @property
    def out(self) -> slice:
        """The units that it makes."""
        return slice(self.first, self.first + self.size)

    @property
    def units(self) -> Ints:
        """Their numbers."""
        return np.arange(self.first, self.first + self.size)

    @property
    def closes(self) -> list[Ints]:
        """Gates that shut its units, for each unit a place in the gates."""
        return self.scales

    @property
    def all_gates(self) -> list[Ints]:
        """Places of all gates that decide about it."""
        return self.closes

    def forward(self, x: Channels) -> None:
        """Note which of its units are constant."""

    def keep(self, need: Mask) -> Mask:
        """The units to keep so that those in ``need`` are there; at least these."""
        return np.ones(self.size, dtype=bool)

    def needs(self, kept: Mask, x: Channels) -> list[Mask | None]:
        """For each tensor that it reads the positions that must be there; None where it does without."""
        return [np.ones(len(units), dtype=bool) for units in self.ins]

    def reads(self, kept: Mask, x: Channels) -> list[Mask | None]:
        """The positions that are read, of those that are there."""
        return self.needs(kept, x)

    def num_parameters(self, x: Channels | None) -> int:
        """Parameters that are left; all of them for None."""
        return 0

    def num_macs(self, x: Channels | None) -> int:
        """Multiply-accumulate operations for one example that are left; all of them for None."""
        return round(self.macs)

    def num_constants(self, x: Channels) -> int:
        """Parameters that come in for constants that are not read."""
        return 0

    def shut(self, x: Channels) -> Mask | None:
        """Which of its units gates have shut; None if it has no gates."""
        closes = self.closes
        if not closes:
            return None
        found: Mask = x.values.shut[closes[0]]
        for places in closes[1:]:
            found = found | x.values.shut[places]
        return found

    def scale_of(self, values: Values) -> Vector:
        """What the gates that were absorbed multiply its units by."""
        scale = np.ones(self.size)
        for places in self.scales:
            scale = scale * values.z[places]
        return scale

    # --- chances --------------------------------------------------------------------------------------

    def alive(self, run: Pass, ins: list[Chance]) -> Chance:
        """Chance that each of its units is not constant."""
        return Chance(run.ones(self.size))

    def ask(self, run: Pass, stays: Chance, wanted: Wanted) -> list[Wanted]:
        """What it wants of what it reads."""
        needed = any_of(stays.value)
        return [Wanted(anyway=Chance(needed.expand(len(units)))) for units in self.ins]

    def expected(self, run: Pass, stays: Chance) -> tuple[Tensor | float, Tensor | float]:
        """Expected parameters and multiply-accumulates."""
        return 0.0, self.macs * any_of(stays.value)[0] if self.macs else 0.0

    # --- writing --------------------------------------------------------------------------------------

    def write(self, fold: Folder) -> Any:
        """Write the operation into the smaller network; the node that returns."""
        return fold.plain(self)


class Source(Step):
    """An input of the network, or a weight that is read as it is."""

    def __init__(self, node: fx.Node, parameters: int) -> None:
        super().__init__(node, [], [])
        self.parameters = parameters

    def num_parameters(self, x: Channels | None) -> int:
        """All of it."""
        return self.parameters

    def expected(self, run: Pass, stays: Chance) -> tuple[Tensor | float, Tensor | float]:
        """All of it, if anything reads it."""
        return self.parameters * stays.value.sum(), 0.0


class Whole(Step):
    """An operation that is kept as it is, on complete inputs."""


class Result(Step):
    """What the network returns: complete, in the user's order."""


class Along(Step):
    """An operation that treats every unit by itself: as many as it reads from its first tensor."""

    def keep(self, need: Mask) -> Mask:
        """The needed units."""
        return need

    def needs(self, kept: Mask, x: Channels) -> list[Mask | None]:
        """Unit by unit."""
        return [kept] * len(self.ins)

    def alive(self, run: Pass, ins: list[Chance]) -> Chance:
        """As what it reads."""
        return ins[0] & run.gates(self)

    def ask(self, run: Pass, stays: Chance, wanted: Wanted) -> list[Wanted]:
        """Unit by unit."""
        alive = None if wanted.alive is None else wanted.alive & run.gates(self)
        return [Wanted(alive, wanted.anyway)]
