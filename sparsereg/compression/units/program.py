"""A network as the list of operations that it runs on one example: the graph of ``torch.export``.

Every tensor of the graph is computed once, so that its shape, and the numbers of index tensors, are known.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

TORCH = Path(torch.__file__).parent
"""Where PyTorch's own code lies."""
NUMBER = "number"
"""Key in the ``meta`` of an operation: its place among all, as they were traced."""


@dataclass
class Program:
    """The operations of a network in the order in which they run.

    Attributes:
        graph: nodes call functions of ``torch.ops.aten``; placeholders are parameters, buffers, inputs.
        weights: the tensor behind each placeholder that is a parameter, buffer or constant.
        names: the name in the network of each of them.
        parameters: those that are parameters.
        constants: those that the network holds under no name, which take no gates.
        read_as: how some of the weights are read: in another type, or plus a number, one after another.
        values: what each node gave on the example, on the CPU or where the network is.
        inputs: the placeholders of the user's inputs, in order.
        example: what they were.
        returns: how the flat results are put together, as torch.utils._pytree says it.
        takes: likewise how the flat inputs are.
        made: how those of the weights are computed that are none of the network's own.
        said: the operations of a compacted network by its own word, see ``sparsereg.compression.alike``.
        alike: the same for whatever sizes; None where its sizes are not those of the trace, one by one.
        traced: the operations as they were traced, each with what it reads, see ``precision``; a node knows
            its ``NUMBER`` among them.
        cast_by: the numbers of those that read weights in another type, of which the graph has no more.
        precision: what ``precision_of`` has found, once; programs of the same operations share it.
    """

    graph: fx.Graph
    weights: dict[fx.Node, Tensor]
    names: dict[fx.Node, str]
    parameters: set[fx.Node]
    values: dict[fx.Node, Any]
    inputs: list[fx.Node]
    example: tuple[Any, ...] = field(default=(), repr=False)
    returns: Any = None
    takes: Any = None
    made: dict[fx.Node, Any] = field(default_factory=dict, repr=False)
    said: list[Any] | None = field(default=None, repr=False)
    alike: list[Any] | None = field(default=None, repr=False)
    constants: frozenset[fx.Node] = frozenset()
    read_as: dict[fx.Node, tuple[torch.dtype | float, ...]] = field(default_factory=dict, repr=False)
    traced: list[tuple[str, list[Any]]] = field(default_factory=list, repr=False)
    cast_by: dict[fx.Node, tuple[int, ...]] = field(default_factory=dict, repr=False)
    precision: list[Any] = field(default_factory=list, repr=False)

    @property
    def calls(self) -> Iterator[fx.Node]:
        """The nodes that compute something."""
        return (node for node in self.graph.nodes if node.op == "call_function")

    @property
    def output(self) -> fx.Node:
        """The node that returns."""
        last: fx.Node = next(node for node in reversed(self.graph.nodes) if node.op == "output")
        return last

    @property
    def values_of_output(self) -> Any:
        """What the network gave on the example."""
        return fx.node.map_arg(self.output.args[0], lambda node: self.values[node])

    def run(
        self,
        weights: Mapping[fx.Node, Tensor],
        *inputs: Any,
        call: Any = None,
        calls: Mapping[fx.Node, Call] | None = None,
        passed: Mapping[fx.Node, fx.Node | None] | None = None,
        serving: set[fx.Node] | None = None,
        entrances: Mapping[fx.Node, tuple[int, Tensor]] | None = None,
    ) -> Any:
        """Run the graph with other weights.

        Args:
            weights: for every placeholder that is not an input.
            inputs: as the network takes them, flat.
            call: computes a node from its arguments; the node's own function if None.
            calls: other functions and arguments for some of the nodes.
            passed: nodes that hand on what another one gives.
            serving: nodes that are run; all if None.
            entrances: nodes of whose results only some positions along an axis are read.
        """
        env: dict[fx.Node, Any] = {}
        given = iter(inputs)

        def value(leaf: Any) -> Any:
            if isinstance(leaf, Scaled):
                return env[leaf.node] * leaf.left // leaf.whole
            if isinstance(leaf, Selected):
                source = value(leaf.node)
                return source.index_select(leaf.axis, leaf.index.to(source.device))
            return env[leaf] if isinstance(leaf, fx.Node) else leaf

        for node in self.graph.nodes:
            if node.op == "placeholder":
                env[node] = self.as_read(node, weights[node]) if node in weights else next(given)
            elif serving is not None and node not in serving:
                continue
            elif passed and node in passed:
                env[node] = value(passed[node])
            elif node.op == "call_function":
                own = (calls or {}).get(node) or Call(node.target, node.args, node.kwargs)
                args, kwargs = (fx.node.map_aggregate(part, value) for part in (own.args, own.kwargs))
                env[node] = call(node, args, kwargs) if call else called(own.target, args, kwargs)
            elif node.op == "output":
                return fx.node.map_aggregate(node.args[0], value)
            if entrances and node in entrances:
                axis, kept = entrances[node]
                env[node] = env[node].index_select(axis, kept)
        raise AssertionError("a graph without output")

    def as_read(self, weight: fx.Node, value: Tensor) -> Tensor:
        """A weight as the network reads it."""
        for way in self.read_as.get(weight, ()):
            value = value.to(way) if isinstance(way, torch.dtype) else value + way
        return value

    def added_to(self, weight: fx.Node) -> float:
        """The number that the network adds to a weight wherever it reads it, as in 1 + weight."""
        return sum(way for way in self.read_as.get(weight, ()) if not isinstance(way, torch.dtype))

    @property
    def batch(self) -> int:
        """Number of examples: the first size of the first input that has one."""
        sizes = [x.shape[0] for x in self.example if isinstance(x, Tensor) and x.dim()]
        return int(sizes[0]) if sizes else 1

    @torch.no_grad()
    def run_on_example(self) -> None:
        """Find what each node gives on the example."""

        def call(node: fx.Node, args: Any, kwargs: Any) -> Any:
            self.values[node] = plain_call(node, args, kwargs)
            return self.values[node]

        self.run(self.weights, *self.example, call=call)
        self.values.update(self.weights)
        self.values.update(zip(self.inputs, self.example, strict=True))

    def forget(self) -> None:
        """Keep the shapes of what was computed and no numbers but whole ones, such as indices."""
        for node, value in self.values.items():
            self.values[node] = torch.utils._pytree.tree_map(_shape_only, value)

    def arguments(self, node: fx.Node) -> dict[str, Any]:
        """Arguments of a node by name; sizes that are computed are those of the example."""

        def value(leaf: Any) -> Any:
            number = self.values.get(leaf) if isinstance(leaf, fx.Node) else None
            return number if isinstance(number, int | float) else leaf

        return {name: fx.node.map_aggregate(v, value) for name, v in bound(node).items()}


@dataclass(frozen=True)
class Scaled:
    """A size that is known only when the network runs, times a fraction: of what is left of an axis.

    Attributes:
        node: the size of the whole axis.
        left: positions that are left on the example.
        whole: positions that there were.
    """

    node: fx.Node
    left: int
    whole: int


@dataclass(frozen=True)
class Selected:
    """What is left of a tensor, at some of its positions alone.

    Attributes:
        node: the tensor, or what is selected of it along another axis.
        axis: of it.
        index: positions along the axis, among those that are left.
    """

    node: fx.Node | Selected
    axis: int
    index: Tensor


@dataclass(frozen=True)
class Ready:
    """A node of the smaller network in the arguments of one of the whole network."""

    node: Any


@dataclass(frozen=True)
class Call:
    """How an operation is called on what is left.

    Attributes:
        target: the function.
        args: nodes of the whole network stand for what is left of their tensors; tensors are constants.
        kwargs: the same by name.
    """

    target: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)


def plain_call(node: fx.Node, args: Any, kwargs: Any) -> Any:
    """Call a node's function; one that writes in place writes into a copy."""
    return called(node.target, args, kwargs)


def called(target: Any, args: Any, kwargs: Any) -> Any:
    """Call a function of the graph; one that writes in place writes into a copy."""
    name = op_name(target)
    if name.endswith("_") and args and isinstance(args[0], Tensor):
        args = (args[0].clone(), *args[1:])
    # Labels and cut tensors need not lie as the original did.
    if name == "view" and not isinstance(args[1], torch.dtype):
        return torch.reshape(args[0], args[1])
    return target(*args, **kwargs)


def name_of(node: fx.Node) -> str:
    """Name of a node's operation without namespace and overload: ``conv2d``, ``add``, ``getitem``."""
    return op_name(node.target)


def op_name(target: Any) -> str:
    """Name of an operation without namespace and overload."""
    schema = getattr(target, "_schema", None)
    if schema is None:
        return str(getattr(target, "__name__", target))
    return str(schema.name).partition("::")[2]


def bound(node: fx.Node) -> dict[str, Any]:
    """Arguments of a node by their names in the operation's schema, defaults filled in."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return dict(enumerate(node.args))  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for i, argument in enumerate(schema.arguments):
        if i < len(node.args):
            values[argument.name] = node.args[i]
        elif argument.name in node.kwargs:
            values[argument.name] = node.kwargs[argument.name]
        else:
            values[argument.name] = argument.default_value if argument.has_default_value() else None
    return values


def place_of(node: fx.Node) -> str:
    """Where in the user's code a node comes from: ``file.py:12``; empty if unknown."""
    lines = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
    own = [(file, line) for file, line in lines if TORCH not in Path(file).parents]
    if not own and not lines:
        return ""
    file, line = (own or lines)[-1]
    return f"{Path(file).name}:{line}"


def module_of(node: fx.Node) -> str:
    """Dotted path of the innermost module that ran a node; empty for the network itself."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [path for path, _ in stack.values()]
    return str(paths[-1]) if paths else ""


def _shape_only(x: Any) -> Any:
    return x.to("meta") if isinstance(x, Tensor) and x.is_floating_point() else x
