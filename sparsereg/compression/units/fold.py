"""A smaller network from channels that are left: constants in biases, open gates in weights."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import PythonReferenceAnalysis

from sparsereg.compression.units.cut import Cut
from sparsereg.compression.units.emit import Emitter
from sparsereg.compression.units.flow import COMPUTED, CONSTANT, DEAD, Flow
from sparsereg.compression.units.labels import FIRST, Labels
from sparsereg.compression.units.lengths import Sizes
from sparsereg.compression.units.program import Call, Ready, bound, module_of, name_of, op_name
from sparsereg.compression.units.rules.moves import COPIES
from sparsereg.compression.units.rules.recurrent import BLOCKS, goes_by_units
from sparsereg.compression.units.rules.table import JOINS, rule_of
from sparsereg.compression.units.steps.single import Gate, Take
from sparsereg.compression.units.steps.table import Channels, Mask, Result, Step, Vector
from sparsereg.compression.units.tracing import has_one_batch_size, takes_any_batch
from sparsereg.errors import InputError


def folded(model: nn.Module, flow: Flow, round_to: int) -> tuple[fx.GraphModule, fx.GraphModule]:
    """Build what is left of a network, in its own precision and in float64.

    Args:
        model: with gates that its author has placed; left as it is.
        flow: of the network.
        round_to: see ``compact``.
    """
    x = flow.analyse(model)
    if round_to > 1:
        x = flow.analyse(model, flow.rounded(x, round_to))
    return Folder(flow, model, x, None).module(), Folder(flow, model, x, torch.float64).module()


class Left:
    """What rules ask of a network of which something is gone.

    Attributes:
        program: the whole network.
        labels: of each tensor.
        weights: what is left of each.
        calls: how operations are called.
    """

    def __init__(self, flow: Flow, x: Channels) -> None:
        self.program = flow.placed.program
        self.labels: dict[Any, Any] = dict(flow.follower.axes.of)
        self.weights: dict[fx.Node, Tensor] = {}
        self.calls: dict[fx.Node, Call] = {}
        self.entrances: dict[fx.Node, Any] = {}
        kept = x.kept.copy()
        kept[:FIRST] = True
        self.stays = torch.from_numpy(kept)

    def alive_along(self, labels: Labels, axis: int) -> Tensor:
        """Which positions along an axis are left, (size,)."""
        return Cut.alive_along(self, labels, axis)  # type: ignore[arg-type]

    def left(self, labels: Labels, axis: int) -> int:
        """How many positions along an axis are left."""
        return int(self.alive_along(labels, axis).sum())

    def is_of_all(self, node: fx.Node) -> bool:
        """A mean over channels keeps them all."""
        return False


class Folder(Emitter):
    """Writes what is left of a network whose gates its author has placed.

    Args:
        flow: the network.
        model: its weights and gates.
        x: which units stay.
        dtype: floating-point type of all weights; that of the model's if None.
    """

    def __init__(self, flow: Flow, model: nn.Module, x: Channels, dtype: torch.dtype | None) -> None:
        self.flow, self.channels, self.dtype = flow, x, dtype
        self.left = Left(flow, x)
        self.left.weights = _Weights(self)
        super().__init__(self.left, model)  # type: ignore[arg-type]
        self.program = dataclasses.replace(
            self.program, names=dict(self.program.names), parameters=set(self.program.parameters)
        )
        self.like = next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(()))
        self.scale = self._scales()
        self.shifts: dict[fx.Node, Vector] = {}
        self._selected: dict[Any, fx.Node] = {}
        self._constants: dict[fx.Node, fx.Node] = {}
        self._symbols: dict[Any, tuple[fx.Node, int]] = {}
        self._sizes: dict[Any, Any] = {}
        self._biases = fx.Graph()

    def _scales(self) -> Vector:
        """For each unit what its true value is, divided by that in the smaller network."""
        scale = np.ones(self.flow.size)
        for step in self.flow.steps:
            if step.homogeneous and step.ins:
                own = step.scale_of(self.channels.values) if isinstance(step, Gate) else 1.0
                scale[step.out] = scale[step.ins[0]] * own
        return scale

    def module(self) -> fx.GraphModule:
        """The smaller network, in eval mode."""
        self.fixed = self._fixed()
        self._inputs()
        for node in self.program.inputs:
            for axis, size in enumerate(
                node.meta["val"].shape if isinstance(self.program.values[node], Tensor) else ()
            ):
                if not isinstance(size, int):
                    self._symbols.setdefault(size.node.expr, (node, axis))
        for node in self.program.calls:
            if self._computed(node):
                self.made[node] = self._named(node)
        result = [self._result_of(leaf) for leaf in self.program.output.args[0]]  # type: ignore[union-attr]
        self.graph.output(self._unflattened(result))
        self._without_dead_code()
        name = f"Compacted{type(self.model).__name__.removeprefix('Gated').removeprefix('Compacted')}"
        return fx.GraphModule(self.root, self.graph, class_name=name).eval()

    def _computed(self, node: fx.Node) -> bool:
        """Whether an operation is written, when its turn comes."""
        if node not in self.flow.follower.axes.of:
            return name_of(node) not in ("_assert_scalar", "sym_size") and any(
                n in self.flow.follower.axes.of for n in node.all_input_nodes
            )
        return self.flow.state(node, self.channels) == COMPUTED

    def _named(self, node: fx.Node) -> Any:
        """Write an operation; whatever goes wrong, its user gets one line that names it."""
        try:
            return self._step(node)
        except Exception as error:
            step = self.flow.follower.maker.get(node)
            where = module_of(node) if step is None else self.flow.path(step)
            what = f"{type(self.model).__name__} cannot be compacted, at {where!r} ({name_of(node)})"
            raise InputError(f"{what}: {str(error).partition(chr(10))[0]}") from error

    def _step(self, node: fx.Node) -> Any:
        step = self.flow.follower.maker.get(node)
        if op_name(node.target) in BLOCKS and goes_by_units(node):
            return self._layers(node)
        if step is not None:
            return step.write(self)
        if name_of(node) in ("mul", "multiply"):  # one that an earlier layer has absorbed
            return self._value(next(n for n in node.all_input_nodes if n not in self.program.weights))
        rule = rule_of(node)
        call = Call(node.target, node.args, dict(node.kwargs))
        if rule is not None and rule.call is not None:
            call = rule.call(self.left, node, self.program.arguments(node))
        if name_of(node) in JOINS:
            parts = [p for p in node.args[0] if self.flow.state(p, self.channels) != DEAD]  # type: ignore[union-attr, arg-type]
            if len(parts) == 1 and name_of(node) != "stack":
                return self._value(parts[0])
            call = Call(node.target, (parts, *node.args[1:]), node.kwargs)
        if op_name(call.target) == "squeeze" and len(call.args) == 1:
            # A single channel must not go, nor a batch of one.
            before, after = (self.program.values[n].shape for n in (node.args[0], node))  # type: ignore[index]
            ones = [d for d, n in enumerate(before) if n == 1] if len(before) != len(after) else []
            call = Call(torch.ops.aten.squeeze.dims, (node.args[0], ones))
        return self._called(node, call)

    def _layers(self, node: fx.Node) -> list[Any]:
        """Write recurrent layers as their module, on a complete tensor."""
        source: Any = node.args[0]
        plain, exact = self.made.get(source), self._exact(source)
        self.made[source] = exact
        made = self._recurrent(node)
        if plain is not None:
            self.made[source] = plain
        return made

    def _called(self, node: fx.Node, call: Call) -> Any:
        if self.dtype is not None and op_name(call.target) not in COPIES and "dtype" in call.kwargs:
            own = self.dtype if call.kwargs["dtype"] == self.like.dtype else call.kwargs["dtype"]
            call = Call(call.target, call.args, {**call.kwargs, "dtype": own})
        self.left.calls[node] = _public(call)
        return super()._operation(node)

    # --- what steps ask -----------------------------------------------------------------------------------

    def read(self, step: Step, i: int, mask: Mask, *, exact: bool) -> tuple[Any, Vector]:
        """A tensor that an operation reads with the positions that it reads, and the factors left open.

        Args:
            step: the operation.
            i: position of the tensor.
            mask: of its positions along the axis.
            exact: multiply by the factors first, so that none is left open.
        """
        units, source = step.ins[i], step.sources[i]
        take = self.flow.follower.takes.get(int(units[0])) if len(units) else None
        there = self.channels.kept[units if take is None else take.ins[0]]
        node = self._value(source)
        axis = step.axis
        if axis >= 0 and len(units) > 1 and not np.array_equal(mask, there):
            node = self._selection(source, node, axis, mask[there])
        constant = self.flow.state(source, self.channels) == CONSTANT
        scale = np.ones(int(mask.sum())) if constant else self.scale[units[mask]]
        if exact and (scale != 1).any():
            factor = self._along(scale, self._rank(source), axis)
            node = self.graph.call_function(torch.mul, (node, self._number("scale", factor)))
            scale = np.ones_like(scale)
        return node, scale

    def _rank(self, node: fx.Node) -> int:
        return int(self.program.values[node].dim())

    def _selection(self, source: fx.Node, node: Any, axis: int, chosen: Mask) -> fx.Node:
        key = (source, axis, chosen.tobytes())
        if key not in self._selected:
            index = torch.from_numpy(np.flatnonzero(chosen))
            place = self._buffer("index", index)
            call = torch.index_select
            self._selected[key] = self.graph.call_function(call, (node, axis, place))
        return self._selected[key]

    def _along(self, values: Vector, rank: int, axis: int) -> Tensor:
        view = [1] * rank
        view[max(axis, 0)] = -1
        return torch.from_numpy(np.array(values)).view(view)

    def _number(self, name: str, value: Tensor, parameter: bool = False) -> fx.Node:
        """Keep numbers in the network: a parameter, or a buffer."""
        value = value.to(self.like.device, self.dtype or self.like.dtype)
        free = self._free(name)
        if parameter:
            self.root.register_parameter(free, nn.Parameter(value))
        else:
            self.root.register_buffer(free, value)
        return self.graph.get_attr(free)

    def give(self, weight: fx.Node, values: Vector) -> None:
        """Give a weight what is left of it."""
        self.left.weights[weight] = self._as(weight, values)

    def _as(self, weight: fx.Node, values: Vector) -> Tensor:
        """Numbers as a tensor where a weight is, of its type."""
        like = self.flow.placed.value(self.model, weight)
        return torch.from_numpy(np.ascontiguousarray(values)).to(like.device, self.dtype or like.dtype)

    def bias(self, weight: fx.Node, bias: fx.Node | None, values: Vector) -> fx.Node:
        """Give a layer a bias, a new one if it has none."""
        if bias is None:
            bias = self._biases.placeholder("bias")
            name = self.program.names[weight]
            self.program.names[bias] = (
                f"{name.removesuffix('weight')}bias" if name.endswith("weight") else f"{name}_bias"
            )
            self.program.parameters.add(bias)
            self.left.weights[bias] = self.program.weights[bias] = self._as(weight, values)
        else:
            self.give(bias, values)
        return bias

    def call(self, node: fx.Node, /, **arguments: Any) -> Any:
        """Write an operation with some other arguments, by name: nodes of the smaller network, or weights."""
        ready = {
            key: Ready(v) if isinstance(v, fx.Node) and v not in self.program.weights else v
            for key, v in arguments.items()
        }
        return self._called(node, _with(node, ready))

    def again(self, node: fx.Node, sources: Mapping[fx.Node, Any]) -> Any:
        """Write an operation on other tensors."""

        def swap(leaf: fx.Node) -> Any:
            return Ready(sources[leaf]) if leaf in sources else leaf

        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), swap)
        return self._called(node, Call(node.target, args, kwargs))

    def pool(self, node: fx.Node, source: Any) -> Any:
        """Write the pooling of a module as that module, which `shift_pools` looks for; None if it is none."""
        path = module_of(node)
        if name_of(node) != "max_pool2d" or not path or self._taken(self._path(path)):
            return None
        layer = dict(self.model.named_modules(remove_duplicate=False)).get(path)
        if type(layer) is not nn.MaxPool2d:
            return None
        place = self._path(path)
        self._put(place, copy.deepcopy(layer), nn.MaxPool2d, {})
        return self.graph.call_module(place, (source,))

    def two(self, node: fx.Node, sides: list[Any]) -> Any:
        """Write an operation on two tensors."""
        rest = node.args[2:]
        return self._called(node, Call(node.target, (*map(Ready, sides), *rest), dict(node.kwargs)))

    def plain(self, step: Step) -> Any:
        """Write an operation on complete tensors."""
        exact = {source: self._exact(source) for source in step.sources if source not in self.program.weights}
        return self.again(step.node, exact)

    def _exact(self, source: fx.Node) -> Any:
        """A complete tensor without open factors."""
        value = self._value(source)
        labels = self.flow.follower.axes.of[source]
        if isinstance(labels, tuple) or self.flow.state(source, self.channels) == CONSTANT:
            return value
        axis, units = self.flow.line(source)
        scale = self.scale[units]
        if (scale == 1).all():
            return value
        factor = self._number("scale", self._along(scale, self._rank(source), axis))
        return self.graph.call_function(torch.mul, (value, factor))

    def vector(self, node: fx.Node, axis: int, const: Vector) -> fx.Node:
        """Constants along an axis of a tensor: a parameter, since they were weights, or zeros."""
        value = self._along(const, self._rank(node), axis)
        return self._number(f"{node.name}_constant", value, bool(const.any()))

    def spread(self, made: Any, node: fx.Node, axis: int) -> fx.Node:
        """Give a tensor all its positions where only its units are there."""
        sizes = [self.size(s) for s in node.meta["val"].shape]
        if axis >= 0:
            sizes[axis] = -1
        return self.graph.call_method("expand", (made, *sizes))

    # --- values -------------------------------------------------------------------------------------------

    def _value(self, leaf: Any) -> Any:
        if isinstance(leaf, fx.Node) and leaf not in self.program.weights and leaf not in self.made:
            if leaf in self.flow.follower.axes.of:
                return self._constant(leaf)
            return self.size(leaf.meta["val"])
        return super()._value(leaf)

    def _constant(self, node: fx.Node) -> fx.Node:
        """A tensor of constants, made when it is first read."""
        if node not in self._constants:
            axis, units = self.flow.line(node)
            const = self.channels.const[units][self.channels.kept[units]]
            self._constants[node] = self.spread(self.vector(node, axis, const), node, axis)
        return self._constants[node]

    def _tensor(self, node: fx.Node) -> nn.Parameter | Tensor:
        made = super()._tensor(node)
        if isinstance(made, nn.Parameter) and node in self.flow.placed.program.names:
            made.requires_grad_(
                self.flow.placed.value(self.model, node).requires_grad and made.is_floating_point()
            )
        return made

    def size(self, size: Any) -> Any:
        """A size of the whole network, read off the inputs where it follows theirs."""
        if isinstance(size, int | float | bool):
            return size
        expr = size.node.expr
        if expr not in self._sizes:
            if expr.is_Integer:
                self._sizes[expr] = int(expr)
            elif expr in self._symbols:
                self._sizes[expr] = self._size_of_input(*self._symbols[expr])
            else:
                env = {symbol: fx.Proxy(self._symbol(symbol)) for symbol in expr.free_symbols}
                found = sympy_interp(PythonReferenceAnalysis, env, expr)
                self._sizes[expr] = found.node if isinstance(found, fx.Proxy) else found
        return self._sizes[expr]

    def _symbol(self, symbol: Any) -> fx.Node:
        if symbol not in self._sizes:
            self._sizes[symbol] = self._size_of_input(*self._symbols[symbol])
        found: fx.Node = self._sizes[symbol]
        return found

    def _size_of_input(self, node: fx.Node, axis: int) -> fx.Node:
        return self.graph.call_method("size", (self.made[node], axis))

    def _result_of(self, leaf: Any) -> Any:
        if not isinstance(leaf, fx.Node) or leaf in self.program.weights:
            return self._value(leaf)
        return self._exact(leaf) if leaf in self.flow.follower.axes.of else self._value(leaf)

    def _fixed(self) -> dict[int, Sizes]:
        """The sizes that inputs may have, by the input's position."""
        counted = self._counted_symbols()
        tensors = [n for n in self.program.inputs if isinstance(self.program.values[n], Tensor)]
        any_batch = not any(map(has_one_batch_size, tensors)) or takes_any_batch(self.model, self.program)
        found = {}
        for position, node in enumerate(self.program.inputs):
            value = self.program.values[node]
            if not isinstance(value, Tensor) or value.dim() < 2:
                continue
            shape = [
                own if not isinstance(s, int) and s.node.expr in counted else s
                for s, own in zip(node.meta["val"].shape, value.shape, strict=True)
            ]
            sizes = Sizes.of(shape, value.shape)
            if any_batch or not has_one_batch_size(node):
                sizes.free(0)
            chosen = {
                axis
                for (source, axis) in ((s.sources[0], s.axis) for s in self.flow.steps if self._chooses(s))
                if source is node
            }
            tokens = value.dim() == 2 and not value.is_floating_point()
            first = 2 if value.dim() > 3 else value.dim()
            if any(s < 0 for s in sizes.sizes[1:]) or (value.dim() == 2 and not tokens):
                for axis in set(range(1, first)) - chosen:
                    if sizes.sizes[axis] > 0:
                        sizes.free(axis)
            found[position] = sizes
        return found

    def _chooses(self, step: Step) -> bool:
        """Whether an operation leaves out positions of its first tensor."""
        if not step.ins or isinstance(step, Result) or step.axis < 0 or not len(step.ins[0]):
            return False
        kept = self.channels.kept
        if isinstance(step, Take):
            return bool(kept[step.out].any() and not kept[step.out].all())
        return bool(
            step.size == len(step.ins[0])
            and kept[step.out].any()
            and (kept[step.out] != kept[step.ins[0]]).any()
        )

    def _counted_symbols(self) -> set[Any]:
        """Sizes of inputs on which the number of units of some tensor, of which some leave, depends."""
        found: set[Any] = set()
        kept = self.channels.kept
        for step in self.flow.steps:
            if kept[step.out].all() and all(kept[units].all() for units in step.ins):
                continue
            for node in (step.node, *step.sources):
                value: Any = node.meta.get("val")
                along = step.axis >= 0 and isinstance(value, Tensor) and step.axis < value.dim()
                size: Any = value.shape[step.axis] if along else 0
                found |= set() if isinstance(size, int) else size.node.expr.free_symbols
        return found


class _Weights(dict[fx.Node, Tensor]):
    """What is left of weights; of those that nobody has cut, all."""

    def __init__(self, fold: Folder) -> None:
        super().__init__()
        self.fold = fold

    def __missing__(self, node: fx.Node) -> Tensor:
        fold = self.fold
        value, like = fold.channels.values.tensor(node), fold.flow.placed.value(fold.model, node)
        own = fold.dtype if fold.dtype is not None and like.is_floating_point() else like.dtype
        self[node] = value.to(like.device, own)
        return self[node]


_PUBLIC: dict[str, Any] = {
    **{
        name: getattr(torch, name)
        for name in ("relu", "sigmoid", "tanh", "cat", "max_pool2d", "index_select", "mean")
    },
    **{
        name: getattr(F, name)
        for name in ("avg_pool2d", "avg_pool3d", "gelu", "leaky_relu", "hardswish", "elu")
    },
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": torch.div,
    "flatten": torch.flatten,
}
"""The functions that a user would write, for operations that take the same arguments in the same order."""
_ENLARGED = {
    "upsample_nearest1d": "nearest",
    "upsample_nearest2d": "nearest",
    "upsample_nearest3d": "nearest",
    "upsample_linear1d": "linear",
    "upsample_bilinear2d": "bilinear",
    "upsample_trilinear3d": "trilinear",
    "upsample_bicubic2d": "bicubic",
}


def _public(call: Call) -> Call:
    """The same with the function that a user would write, which all of PyTorch's tools understand."""
    name = op_name(call.target)
    if getattr(call.target, "_schema", None) is None:
        return call
    if name in _ENLARGED and call.target._overloadname == "vec":
        given = dict(zip((a.name for a in call.target._schema.arguments), call.args, strict=False))
        settings = {
            "size": given.get("output_size"),
            "scale_factor": given.get("scale_factors"),
            "mode": _ENLARGED[name],
            "align_corners": given.get("align_corners"),
        }
        return Call(F.interpolate, (given["input"],), {k: v for k, v in settings.items() if v is not None})
    return Call(_PUBLIC.get(name, call.target), call.args, call.kwargs)


def _with(node: fx.Node, values: Mapping[str, Any]) -> Call:
    """The call of a node with other arguments, by name; those that it was not given, too."""
    schema = node.target._schema  # type: ignore[union-attr]
    own = bound(node)
    last = max((i for i, a in enumerate(schema.arguments) if a.name in values), default=-1)
    count = max(last + 1, len(node.args))
    args = []
    kwargs = {k: v for k, v in node.kwargs.items() if k not in values}
    for argument in schema.arguments[:count]:
        kwargs.pop(argument.name, None)
        args.append(values.get(argument.name, own[argument.name]))
    return Call(node.target, tuple(args), kwargs)
