"""How wide each layer of a network is with its gates as they are: exactly, and in expectation."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from sparsereg.compression.count import Accountant, _Channels, _Units
from sparsereg.compression.timing.times import Layer
from sparsereg.compression.units.program import bound, name_of
from sparsereg.compression.units.steps.chances import Pass
from sparsereg.compression.units.steps.mixing import Mixing

Pair = tuple[Tensor, Tensor]
"""Inputs and outputs of each layer, (layers,), float64."""


class Widths:
    """The layers of a network with weights that take time, and how much of each stays.

    Args:
        accountant: of the network.

    Attributes:
        layers: whole, in the order in which they run.
    """

    def __init__(self, accountant: Accountant) -> None:
        counted = accountant._counted
        self._own: _OfUnits | _OfChannels = (
            _OfUnits(counted) if isinstance(counted, _Units) else _OfChannels(counted)
        )
        self.layers = self._own.layers

    def whole(self) -> Pair:
        """Widths of the whole network."""
        inputs = torch.tensor([layer.inputs for layer in self.layers], dtype=torch.float64)
        return inputs, torch.tensor([layer.outputs for layer in self.layers], dtype=torch.float64)

    def expected(self) -> Pair:
        """Expected widths, differentiable in every log_alpha."""
        return self._own.expected()

    def exact(self) -> Pair:
        """Widths of the compacted network."""
        return self._own.exact()


def _ratio(layer: Layer, outputs: Any) -> Any:
    """Inputs of a layer with groups, which lose inputs and outputs together."""
    return layer.inputs * outputs / layer.outputs


class _OfUnits:
    """Layers of a network whose gates ``gate`` has put in."""

    def __init__(self, counted: _Units) -> None:
        self._counted = counted
        program = counted.costs.program
        costs = counted.costs
        nodes = [n for n in program.calls if name_of(n) in _LAYERS_OF and costs._ways[n]]
        found = [(n, _LAYERS_OF[name_of(n)](program, n)) for n in nodes]
        self.layers = [layer for _, layer in found]
        self._lines = [self._pair(node, layer) for node, layer in found]
        # Which ways have to be left for a layer to serve anybody.
        self._ways = np.array([costs._way_ids[costs._ways[node]] for node in nodes], dtype=np.int64)

    def _pair(self, node: fx.Node, layer: Layer) -> tuple[int | None, int | None]:
        """Lines along inputs and outputs; None where nothing can go, or where inputs follow outputs."""
        a = bound(node)
        if layer.kind == "linear":
            source = (a["mat1"] if name_of(node) == "addmm" else a["input"], -1)
            return self._line(*source), self._line(node, -1)
        return (None if layer.groups > 1 else self._line(a["weight"], 1)), self._line(node, 1)

    def _line(self, node: fx.Node, axis: int) -> int | None:
        line = self._counted.costs._line(node, axis)
        return self._counted.costs._lines._line_ids.get(line.tobytes()) if line.any() else None

    def _widths(self, counts: Tensor, serves: Tensor) -> Pair:
        pairs = []
        for layer, (i, o) in zip(self.layers, self._lines, strict=True):
            outputs = counts.new_tensor(float(layer.outputs)) if o is None else counts[o]
            inputs = counts.new_tensor(float(layer.inputs)) if i is None else counts[i]
            pairs.append((_ratio(layer, outputs) if layer.groups > 1 else inputs, outputs))
        if not pairs:
            return counts.new_zeros(0), counts.new_zeros(0)
        there = serves[torch.from_numpy(self._ways).to(serves.device)]
        return torch.stack([i for i, _ in pairs]) * there, torch.stack([o for _, o in pairs]) * there

    def expected(self) -> Pair:
        """Expected widths."""
        p, costs = self._counted.structure.p_active(self._counted.model), self._counted.costs
        return self._widths(costs.sizes.expected(p)[1], costs._serves.expected(p))

    def exact(self) -> Pair:
        """Widths that stay."""
        stays, costs = self._counted.structure.stays(self._counted.model), self._counted.costs
        counts, serves = (
            torch.from_numpy(x).double() for x in (costs.sizes.counts(stays), costs._serves.any(stays))
        )
        return self._widths(counts, serves)


def _linear_node(program: Any, node: fx.Node) -> Layer:
    a = bound(node)
    shape = program.values[node].shape
    inputs = program.values[a["mat1"] if name_of(node) == "addmm" else a["input"]].shape[-1]
    rows = max(1, math.prod(shape[:-1]) // program.batch)
    return Layer("linear", int(inputs), int(shape[-1]), (rows,))


def _conv_node(program: Any, node: fx.Node) -> Layer:
    a = bound(node)
    shape, weight = program.values[node].shape, program.values[a["weight"]].shape
    dims = len(weight) - 2

    def each(value: Any) -> tuple[int, ...]:
        values = [int(v) for v in value] if isinstance(value, list | tuple) else [1]
        return tuple(values * dims if len(values) == 1 else values)

    groups = int(a["groups"])
    return Layer(
        "conv", int(weight[1]) * groups, int(shape[1]), tuple(int(n) for n in shape[2:]),
        tuple(int(n) for n in weight[2:]), each(a["stride"]), each(a["dilation"]), groups,
    )  # fmt: skip


_LAYERS_OF: dict[str, Callable[[Any, fx.Node], Layer]] = {
    **dict.fromkeys(("linear", "addmm"), _linear_node),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), _conv_node),
}
"""Operations that are timed as layers."""


def _transposed_node(program: Any, node: fx.Node) -> Layer:
    """A transposed convolution takes the time of one over the positions that it reads."""
    a = bound(node)
    layer = _conv_node(program, node)
    groups, weight = int(a["groups"]), program.values[a["weight"]].shape
    positions = tuple(int(n) for n in program.values[a["input"]].shape[-len(layer.kernel) :])
    ones = (1,) * len(layer.kernel)
    return replace(layer, inputs=int(weight[0]), outputs=int(weight[1]) * groups, size=positions, stride=ones)


class _OfChannels:
    """Layers of a network whose gates its author has put in."""

    def __init__(self, counted: _Channels) -> None:
        self._flow, self._model = counted.flow, counted.model
        self._steps = [step for step in self._flow.steps if isinstance(step, Mixing)]
        program = self._flow.placed.program
        kinds = [_LAYERS_OF.get(name_of(step.node), _transposed_node) for step in self._steps]
        self.layers = [kind(program, step.node) for kind, step in zip(kinds, self._steps, strict=True)]

    def expected(self) -> Pair:
        """Expected widths."""
        run = self._flow.passed(self._model)
        pairs = [
            self._expected(run, step, layer) for step, layer in zip(self._steps, self.layers, strict=True)
        ]
        return torch.stack([i for i, _ in pairs]), torch.stack([o for _, o in pairs])

    def _expected(self, run: Pass, step: Mixing, layer: Layer) -> Pair:
        if step.number not in run.stays:
            nothing = run.none.new_zeros(())
            return nothing, nothing
        outputs = run.stays[step.number].value.sum()
        if step.shape.groups > 1:
            return _ratio(layer, outputs), outputs
        return run.staying(step, 0).sum(), outputs

    def exact(self) -> Pair:
        """Widths that stay."""
        x = self._flow.analyse(self._model)
        there = set(map(id, x.steps))
        pairs = []
        for step, layer in zip(self._steps, self.layers, strict=True):
            kept = x.kept[step.out]
            mask = step.reads(kept, x)[0] if id(step) in there else None
            outputs = float(kept.sum()) if mask is not None else 0.0
            read = 0.0 if mask is None else float(mask.sum())
            pairs.append((_ratio(layer, outputs) if step.shape.groups > 1 else read, outputs))
        both = torch.tensor(pairs, dtype=torch.float64).reshape(-1, 2)
        return both[:, 0], both[:, 1]
