"""Networks whose gates their author has placed: traced once, looked at whenever the gates have moved."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from sparsereg.compression.units.labels import FIRST, Ints, varying
from sparsereg.compression.units.placed import Placed, place
from sparsereg.compression.units.program import module_of
from sparsereg.compression.units.steps.chances import Pass, parts_of
from sparsereg.compression.units.steps.follow import Follower
from sparsereg.compression.units.steps.mixing import Mixing
from sparsereg.compression.units.steps.norms import Norm
from sparsereg.compression.units.steps.pairs import Pair
from sparsereg.compression.units.steps.table import Channels, Mask, Result, Source, Step, Values
from sparsereg.distributions import HardConcrete


class Flow:
    """A network as operations on channels.

    Args:
        placed: the network.
        looks: what it looked like.

    Attributes:
        steps: its operations, in order.
        size: number of all units.
        owner: for each unit the number of the operation that makes it.
    """

    def __init__(self, placed: Placed, looks: tuple[Any, ...]) -> None:
        self.placed = placed
        self.looks = looks
        self.follower = Follower(placed)
        self.steps: list[Step] = self.follower.steps
        self.size = self.follower.size
        self.owner = np.repeat(np.arange(len(self.steps)), [step.size for step in self.steps])
        self.owner = np.concatenate([np.zeros(FIRST, dtype=np.int64), self.owner])

    def __deepcopy__(self, memo: Any) -> Flow:
        return self

    def __reduce__(self) -> Any:
        return _nothing, ()  # a copy that was read from a file is traced again

    def gates(self, model: nn.Module) -> list[HardConcrete]:
        """The gates that the network uses."""
        return [self.placed.gate(model, i) for i in range(len(self.placed.gates))]

    def analyse(self, model: nn.Module, pins: Mask | None = None) -> Channels:
        """Find which units stay, with the gates and weights as they are now.

        Args:
            model: the network.
            pins: closed units that are to stay, (units,).
        """
        x = Channels(self.size, Values(self.placed, model, pins))
        for step in self.steps:
            step.forward(x)
            if pins is not None:
                x.const[step.out][pins[step.out]] = np.nan
        for step in reversed(self.steps):
            _ask(step, x)
        x.steps.reverse()
        return x

    @cached_property
    def full(self) -> tuple[int, int]:
        """Parameters and multiply-accumulates of the whole network."""
        parameters, macs = zip(*((s.num_parameters(None), s.num_macs(None)) for s in self.steps), strict=True)
        return sum(parameters), sum(macs)

    def rows(self, x: Channels) -> list[tuple[str, dict[str, int]]]:
        """What each operation costs and what is left of it, with the path of its module."""
        there, found = set(map(id, x.steps)), []
        constants = self.constants(x)
        for step in self.steps:
            left = id(step) in there
            costs = {
                "channels": step.size,
                "kept_channels": int(x.kept[step.out].sum()),
                "parameters": step.num_parameters(None),
                "kept_parameters": step.num_parameters(x) + step.num_constants(x) if left else 0,
                "macs": step.num_macs(None),
                "kept_macs": step.num_macs(x) if left else 0,
            }
            found.append((self.path(step), costs))
        for node, parameters in constants.items():
            found.append((module_of(node), {**dict.fromkeys(costs, 0), "kept_parameters": parameters}))
        return [
            (path, row) for path, row in found if row["parameters"] or row["macs"] or row["kept_parameters"]
        ]

    def path(self, step: Step) -> str:
        """Path of the module that an operation belongs to."""
        weights = [n for n in (step.node, *step.weights) if n in self.placed.program.names]
        if weights:
            return self.placed.program.names[weights[0]].rpartition(".")[0]
        return module_of(step.node)

    def kept_parameters(self, x: Channels) -> int:
        """Parameters of the smaller network."""
        own = sum(step.num_parameters(x) + step.num_constants(x) for step in x.steps)
        return own + sum(self.constants(x).values())

    def kept_macs(self, x: Channels) -> int:
        """MACs of the smaller network for one example."""
        return sum(step.num_macs(x) for step in x.steps)

    def constants(self, x: Channels) -> dict[fx.Node, int]:
        """Tensors of constants that something reads, with the parameters that they take."""
        if not (x.kept & ~np.isnan(x.const)).any():
            return {}
        found: dict[fx.Node, int] = {}
        for step in x.steps:
            wanted = [True] * len(step.sources)
            if isinstance(step, Pair):
                wanted = [mask is not None for mask in step.needs(x.kept[step.out], x)]
            for source, reads in zip(step.sources, wanted, strict=True):
                if reads:
                    self._constants(source, x, found)
        return found

    def _constants(self, node: fx.Node, x: Channels, found: dict[fx.Node, int]) -> None:
        """Note a tensor that is constant, or those that it is put together of."""
        if node in found or node not in self.follower.axes.of:
            return
        state = self.state(node, x)
        if state == CONSTANT:
            _, units = self.line(node)
            const = x.const[units][x.kept[units]]
            found[node] = len(const) if const.any() else 0
        elif state == COMPUTED and node not in self.follower.maker and node.op == "call_function":
            for source in node.all_input_nodes:
                self._constants(source, x, found)

    def line(self, node: fx.Node) -> tuple[int, Ints]:
        """The axis along which the units of a tensor lie, and these; an axis of -1 if it is one unit."""
        labels = self.follower.axes.of[node]
        assert isinstance(labels, Tensor)
        step = self.follower.maker.get(node)
        if step is not None:
            return step.axis, step.units
        axes = varying(labels)
        if not axes:
            return -1, self.follower._all(node)
        (axis,) = axes
        units = self.follower.line(node, axis)
        assert units is not None
        return axis, units

    def state(self, node: fx.Node, x: Channels) -> int:
        """What becomes of a tensor."""
        units = self._units(node)
        kept = x.kept[units]
        if not kept.any():
            return DEAD
        return COMPUTED if x.live(units[kept]).any() else CONSTANT

    def _units(self, node: fx.Node) -> Ints:
        if node not in self._known:
            self._known[node] = self.follower._all(node)
        return self._known[node]

    @cached_property
    def _known(self) -> dict[fx.Node, Ints]:
        return {}

    # --- expectations -------------------------------------------------------------------------------------

    def passed(self, model: nn.Module) -> Pass:
        """The chances of all units, with the gates as they are now."""
        gates = self.gates(model)
        device = gates[0].log_alpha.device if gates else torch.device("cpu")
        if device not in self._parts:
            self._parts[device] = [parts_of(step.ins, self.owner, self.steps, device) for step in self.steps]
        return Pass(self.steps, gates, self._parts[device])

    def expected(
        self, model: nn.Module, wanted: Callable[[str], bool] = lambda path: True
    ) -> tuple[Tensor, Tensor]:
        """Expected parameters and MACs that stay, differentiable in every log_alpha; two scalars.

        Args:
            model: the network.
            wanted: whether a module counts, by its path.
        """
        run = self.passed(model)
        parameters, macs = run.none.sum(), run.none.sum()
        for number, stays in run.stays.items():
            if not wanted(self.path(self.steps[number])):
                continue
            more_parameters, more_macs = self.steps[number].expected(run, stays)
            parameters, macs = parameters + more_parameters, macs + more_macs
        return parameters, macs

    @cached_property
    def _parts(self) -> dict[torch.device, Any]:
        return {}

    # --- rounding -----------------------------------------------------------------------------------------

    def rounded(self, x: Channels, multiple: int) -> Mask:
        """Choose the closed units to keep, the first ones of every layer with gates.

        A layer that goes altogether still goes, and no layer gets more units than it had.

        Args:
            x: which units stay without rounding.
            multiple: the number that the count of units is to be a multiple of.
        """
        pins = np.zeros(self.size, dtype=bool)
        for step in x.steps:
            if isinstance(step, Mixing | Norm) and step.closes:
                kept = x.kept[step.out]
                spare = np.flatnonzero(~kept)[: -int(kept.sum()) % multiple]
                pins[step.first + spare] = True
        return pins


def _nothing() -> None:
    return None


DEAD, CONSTANT, COMPUTED = 0, 1, 2


def _ask(step: Step, x: Channels) -> None:
    """Decide what to keep of what an operation makes, and ask what it reads for what that takes."""
    need = x.need[step.out]
    if isinstance(step, Result):
        kept = np.ones(step.size, dtype=bool)
    elif need.any():
        kept = step.keep(need)
    else:
        return
    x.kept[step.out] = kept
    if not isinstance(step, Result | Source) and not x.live(step.out)[kept].any():
        x.constant.add(step.node)
        return
    x.steps.append(step)
    for units, mask in zip(step.ins, step.needs(kept, x), strict=True):
        if mask is not None:
            x.need[units[mask]] = True


ATTRIBUTE = "_flow"
"""Where a network keeps its operations on channels, with what it looked like when it was traced."""


def flow_of(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Flow:
    """Trace a network whose gates its author has placed, or that has none; once, while it looks the same.

    Raises:
        InputError: the network cannot be traced.
    """
    looks = _looks(model, args, kwargs)
    known = model.__dict__.get(ATTRIBUTE)
    if isinstance(known, Flow) and known.looks == looks:
        return known
    flow = Flow(place(model, args, kwargs), looks)
    model.__dict__[ATTRIBUTE] = flow
    return flow


def _looks(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    """Shapes of an example, and all of a network on which its trace can depend but its code."""
    leaves = torch.utils._pytree.tree_leaves((args, dict(kwargs)))
    shapes = [(tuple(x.shape[1:]), x.dtype, x.dim()) if isinstance(x, Tensor) else repr(x) for x in leaves]
    seen: dict[int, int] = {}
    parts = []
    for name, module in model.named_modules(remove_duplicate=False):
        own = [p for p in (*module._parameters.values(), *module._buffers.values()) if p is not None]
        tensors = [(seen.setdefault(id(p), len(seen)), tuple(p.shape), p.dtype, p.device) for p in own]
        settings = (
            []
            if isinstance(module, HardConcrete)
            else [
                (key, value)
                for key, value in module.__dict__.items()
                if key != "training" and isinstance(value, int | float | str | tuple | torch.dtype | None)
            ]
        )
        parts.append((name, type(module), repr(settings), repr(tensors)))
    return repr(shapes), tuple(parts)
