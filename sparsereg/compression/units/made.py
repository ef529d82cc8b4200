"""Weights that are computed from others, as by a spectral norm, a standardisation or a low-rank update.

What they come to is a weight like any other, which is cut and written in their place; gates sit on the
parameters that are zero where it is to be zero.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize
from torch.nn.utils.spectral_norm import SpectralNorm

from sparsereg.compression.running import evaluating
from sparsereg.compression.units.program import Program, bound, called, name_of
from sparsereg.compression.units.read_as import with_weights_as_read
from sparsereg.compression.units.rules.table import (
    JOINS,
    MOVING,
    TURNS,
    normed_by_lines,
    out_axis,
    some_rows,
    weight_of,
)
from sparsereg.compression.units.rules.table import behind as base_of
from sparsereg.compression.units.tracing import trace

_READS = {
    "linear": ("weight", 0),
    "addmm": ("mat2", 1),
    "mm": ("mat2", 1),
    "matmul": ("other", 1),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "convolution"), ("weight", 0)),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), ("weight", 1)),
}
"""Operations that read a weight: what they call it, and its axis of units that they make."""
_MATRICES = ("mat2", "other", "self")
_SAME = ("flatten", "view", "reshape", "expand", "clone", "alias", "contiguous", "detach")
"""Operations that leave all elements where they are if the shape stays."""
_ALIKE = 1e-9


@dataclass(frozen=True)
class Made:
    """How a weight is computed.

    Attributes:
        graph: of the operations.
        sources: the name in the network of each of its placeholders.
        fixed: the values of those that the network knows by no name.
        gates: parameters that take the gates of its units, each with the shape in which these multiply it; or
            the weight itself, which its module reads from parametrisations.
        parameters: numbers of the parameters behind it.
    """

    graph: fx.Graph
    sources: dict[fx.Node, str]
    fixed: dict[str, Tensor]
    gates: dict[str, tuple[int, ...]]
    parameters: int

    @property
    def sources_of_gates(self) -> list[str]:
        """The parameters behind the weight that take its gates; none if it takes them itself."""
        return [name for name in self.gates if name in self.sources.values()]

    def value(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """What the weight comes to.

        Args:
            tensors: parameters and buffers of the network by their names.
        """
        found: dict[fx.Node, Tensor] = {}
        for node in self.graph.nodes:
            if node.op == "placeholder":
                name = self.sources[node]
                found[node] = tensors[name] if name in tensors else self.fixed[name]
            elif node.op == "call_function":
                args, kwargs = (fx.node.map_arg(part, found.__getitem__) for part in (node.args, node.kwargs))
                found[node] = called(node.target, args, kwargs)
        return found[node.args[0]]


def followed(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Program:
    """A network as operations on weights, those that are computed from others being weights of their own.

    Args:
        model: left as it is.
        args: positional inputs of one example batch.
        kwargs: inputs by name.

    Raises:
        InputError: the network cannot be traced.
    """
    return with_made_weights(with_weights_as_read(trace(model, *args, **kwargs)), model)


def with_made_weights(program: Program, model: nn.Module) -> Program:
    """Put weights in the places of those that layers read and that are computed from weights alone.

    Args:
        program: changed in place, and returned.
        model: the network that it is of.
    """
    axes: dict[fx.Node, int] = {}
    behind: dict[fx.Node, list[fx.Node]] = {}
    for node in program.calls:
        source, axis = _computed_weight(program, node)
        if source is not None and source not in behind:
            axes[source], behind[source] = axis, _behind(program, source)
    own = {source: n for source, n in behind.items() if _is_computed(n) or _is_moved(program, source, n)}
    inner = {n for source, nodes in own.items() for n in nodes if n is not source}
    alike: dict[object, list[fx.Node]] = {}
    for source in own:
        if source not in inner:
            alike.setdefault(_number(program, source), []).append(source)
    for sources in alike.values():
        nodes = list(dict.fromkeys(n for source in sources for n in own[source]))
        made = _made(program, model, sources, nodes, own[sources[0]], axes[sources[0]])
        if made is not None:
            _enter(program, sources, nodes, made)
    return program


def _computed_weight(program: Program, node: fx.Node) -> tuple[fx.Node | None, int]:
    """What a layer reads as its weight if an operation gives it; its axis of units that the layer makes."""
    key, axis = _READS.get(name_of(node), ("", 0))
    ways = [(key, out_axis(node, axis))] if key else []
    if name_of(node) in ("mm", "matmul"):
        ways.append(("self", 0))
    for key, axis in ways:
        source = bound(node)[key]
        if not isinstance(source, fx.Node) or source.op != "call_function":
            continue
        value: Any = program.values[source]
        matrix = isinstance(value, Tensor) and value.is_floating_point() and value.dim() >= 2
        if matrix and not (value.dim() > 2 and key in _MATRICES) and _behind(program, source):
            return source, axis
    return None, 0


def _is_computed(behind: list[fx.Node]) -> bool:
    """Whether operations do more than rules know of weights: than move them, or norm them line by line.

    Norms of lines have a rule of their own, which keeps what is normed and its size apart.
    """
    names = {name_of(n).rstrip("_") for n in behind if not normed_by_lines(n)}
    return bool(names - (MOVING - set(JOINS)))


def _is_moved(program: Program, source: fx.Node, nodes: list[fx.Node]) -> bool:
    """Whether layers read a weight in another shape, or a part of one, in a way that rules do not know.

    They know matrices that are turned around, some rows of one, and matrices of a stack.
    """
    layers = [u for u in source.users if u.op == "call_function" and name_of(u) in _READS]
    weight, _ = base_of(program, weight_of(source), 0)
    turned = (
        name_of(weight) in TURNS and weight.args[0] in program.weights and program.values[weight].dim() == 2
    )
    known = turned or weight in program.weights or some_rows(program, weight) is not None
    return bool(nodes and layers) and not known


def _behind(program: Program, source: fx.Node) -> list[fx.Node]:
    """The operations that compute a tensor from weights alone, in order; none if something else is read."""
    found: set[fx.Node] = set()
    waiting = [source]
    while waiting:
        node = waiting.pop()
        if node.op == "call_function" and node not in found:
            found.add(node)
            waiting += node.all_input_nodes
        elif node.op != "call_function" and node not in program.weights:
            return []
    return [n for n in program.calls if n in found]


def _number(program: Program, node: fx.Node) -> object:
    """The same for two nodes that compute the same from the same weights."""
    if node in program.weights:
        return node
    first = node.args[0] if node.args else None
    if (
        name_of(node) in _SAME
        and isinstance(first, fx.Node)
        and program.values[first].shape == program.values[node].shape
    ):
        return _number(program, first)
    parts = fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: _Key(_number(program, n)))  # type: ignore[arg-type, return-value]
    return repr((node.target, parts))


@dataclass(frozen=True)
class _Key:
    """Stands for a node in what is compared."""

    number: object


def _made(
    program: Program,
    model: nn.Module,
    alike: list[fx.Node],
    behind: list[fx.Node],
    first: list[fx.Node],
    axis: int,
) -> Made | None:
    """How weights are computed; None if something else reads their sources, or these are fewer than they.

    Args:
        program: the network as it was traced.
        model: the network.
        alike: the weights, which come to the same.
        behind: the operations that compute them all.
        first: those of the first one.
        axis: of the units that a layer makes with them.
    """
    source = alike[0]
    own = {n for node in behind for n in node.all_input_nodes if n in program.weights}
    parameters = {n for n in own if n in program.parameters}
    number = sum(program.weights[n].numel() for n in parameters)
    inside = {*parameters, *behind} - set(alike)
    if number < program.values[source].numel() or any(set(n.users) - set(behind) for n in inside):
        return None
    graph, env = fx.Graph(), {}
    sources = {}
    for weight in sorted(own, key=lambda n: n.name):
        env[weight] = graph.placeholder(weight.name)
        sources[env[weight]] = program.names[weight]
        for way in program.read_as.get(weight, ()):
            cast = isinstance(way, torch.dtype)
            target = torch.ops.aten.to.dtype if cast else torch.ops.aten.add.Tensor
            env[weight] = graph.call_function(target, (env[weight], way))
    for node in first:
        env[node] = graph.node_copy(node, env.__getitem__)
    graph.output(env[source])
    fixed = {program.names[n]: program.weights[n] for n in own - parameters}
    made = Made(graph, sources, fixed, {}, number)
    own_name = _name(program, made)
    if _is_read_from(model, own_name, program.values[source]):
        made.gates[own_name] = _along(program.values[source].shape, (axis,))
        return made
    named = {program.names[n]: program.weights[n] for n in own}
    able = {program.names[n] for n in parameters if program.weights[n].is_floating_point()}
    made.gates.update(_gates(made, named, able, axis))
    return made


def _is_read_from(model: nn.Module, name: str, value: Tensor) -> bool:
    """Whether a module reads a weight as an attribute that parametrisations, or a hook, compute."""
    path, _, own = name.rpartition(".")
    module = model.get_submodule(path)
    hooks = [h for h in module._forward_pre_hooks.values() if isinstance(h, SpectralNorm) and h.name == own]
    if not (hooks or parametrize.is_parametrized(module, own)):
        return False
    with evaluating(model):  # in which no norm takes a step
        found = hooks[0].compute_weight(module, False) if hooks else getattr(module, own)
    return found.shape == value.shape and _close(found.detach().to(value), value)


def _along(shape: Sequence[int], axes: Collection[int]) -> tuple[int, ...]:
    """A shape of which all but some axes are one."""
    return tuple(size if d in axes else 1 for d, size in enumerate(shape))


def _gates(
    made: Made, tensors: Mapping[str, Tensor], able: set[str], axis: int
) -> Mapping[str, tuple[int, ...]]:
    """The fewest parameters with which the units of a weight are zero, at best in proportion to it."""
    whole = made.value(tensors)
    ways = [
        [(name, along) for along in _ways(tensors[name].shape, whole.shape[axis])]
        for name in sorted(able, key=lambda n: (tensors[n].numel(), n))
    ]
    ways = [w for w in ways if w]
    trials = [[one] for way in ways for one in way]
    trials += [list(several) for several in itertools.islice(itertools.product(*ways), 16)]
    for test in (_in_proportion, _zero_with):
        for trial in trials:
            if test(made, tensors, dict(trial), whole, axis):
                return dict(trial)
    return {}


def _ways(shape: torch.Size, size: int) -> list[tuple[int, ...]]:
    """The shapes in which so many gates can multiply a parameter: along one axis, or several in order."""
    found = [_along(shape, (d,)) for d in range(len(shape)) if shape[d] == size]
    wide = [d for d in range(len(shape)) if shape[d] > 1]
    several = [axes for n in (2, 3) for axes in itertools.combinations(wide, n)]
    return found + [along for along in (_along(shape, axes) for axes in several) if math.prod(along) == size]


def _halved(
    made: Made, tensors: Mapping[str, Tensor], trial: Mapping[str, tuple[int, ...]], size: int, factor: float
) -> tuple[Tensor, Tensor]:
    """The weight with every second position of some parameters multiplied, and which these are."""
    chosen = torch.arange(size) % 2 == 0
    z = torch.where(chosen, factor, 1.0)
    changed = {}
    for name, along in trial.items():
        changed[name] = tensors[name] * z.to(tensors[name]).view(along)
    return made.value({**tensors, **changed}), chosen


def _in_proportion(
    made: Made, tensors: Mapping[str, Tensor], trial: Mapping[str, tuple[int, ...]], whole: Tensor, axis: int
) -> bool:
    found, chosen = _halved(made, tensors, trial, whole.shape[axis], 0.5)
    found, whole = found.movedim(axis, 0), whole.movedim(axis, 0)
    wanted = torch.where(chosen.to(whole.device).view(-1, *[1] * (whole.dim() - 1)), whole / 2, whole)
    return _close(found, wanted) and _zero_with(made, tensors, trial, whole.movedim(0, axis), axis)


def _zero_with(
    made: Made, tensors: Mapping[str, Tensor], trial: Mapping[str, tuple[int, ...]], whole: Tensor, axis: int
) -> bool:
    found, chosen = _halved(made, tensors, trial, whole.shape[axis], 0.0)
    nothing = made.value({**tensors, **{name: torch.zeros_like(tensors[name]) for name in trial}})
    gone = found.movedim(axis, 0)[chosen.to(found.device)]
    return bool((gone == 0).all() and (nothing == 0).all() and found.isfinite().all())


def _close(a: Tensor, b: Tensor) -> bool:
    limit = math.sqrt(torch.finfo(a.dtype).eps) if a.dtype is not torch.float64 else _ALIKE
    return bool(((a - b).abs() <= limit * (b.abs() + b.abs().mean())).all())


def _enter(program: Program, alike: list[fx.Node], behind: list[fx.Node], made: Made) -> None:
    """Let a placeholder for what weights come to take the place of all that computes them."""
    name = _name(program, made)
    with program.graph.inserting_before(next(iter(program.graph.nodes))):
        node = program.graph.placeholder(f"made_{name.replace('.', '_')}")
    node.meta.update(alike[0].meta)
    program.values[node] = program.weights[node] = program.values[alike[0]]
    program.names[node] = name
    sources = {n for one in behind for n in one.all_input_nodes if n in program.weights}
    for one in alike:
        one.replace_all_uses_with(node)
    for one in reversed(behind):
        program.graph.erase_node(one)
        del program.values[one]
    for one in sources:
        if not one.users:
            program.graph.erase_node(one)
            del program.weights[one], program.names[one], program.values[one]
            program.parameters.discard(one)
    program.parameters.add(node)
    program.made[node] = made


def _name(program: Program, made: Made) -> str:
    """What a weight is called: as the largest parameter behind it, without what a parametrisation adds."""
    size = {program.names[n]: program.weights[n].numel() for n in program.parameters}
    path = max(made.sources.values(), key=lambda n: (size.get(n, 0), n)).split(".")
    if "parametrizations" in path:
        at = path.index("parametrizations")
        path = [*path[:at], path[at + 1]]
    return ".".join(path).removesuffix("_orig")


def gate_names(program: Program, node: fx.Node) -> dict[str, tuple[int, ...] | None]:
    """The parameters on which the gates of a weight sit; for one that is computed with the shape of these."""
    made = program.made.get(node)
    return {program.names[node]: None} if made is None else dict(made.gates)
