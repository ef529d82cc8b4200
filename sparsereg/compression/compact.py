"""From a network with gates to a smaller one without: the same answers, plain torch.nn modules."""

import copy
import logging
import operator
from collections.abc import Callable, Iterable
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, fx, nn

from sparsereg.compression.count import full_costs
from sparsereg.compression.graph import Analysis, Example, Network, first_line, trace
from sparsereg.compression.ops import (
    SMALLEST_FOLD,
    Add,
    Attribute,
    Cat,
    Gate,
    Input,
    Mask,
    Mixing,
    Mul,
    Norm,
    Op,
    Output,
    PerChannel,
    Reshape,
    Slopes,
    Vector,
)
from sparsereg.compression.pad import rounded_pins
from sparsereg.compression.sizes import ANY, of_size, same_positions, window
from sparsereg.compression.units.explain import inputs_of
from sparsereg.compression.units.smaller import smaller as smaller_units
from sparsereg.compression.units.structure import structure_of
from sparsereg.compression.verify import verify
from sparsereg.compression.vocabulary import reserved
from sparsereg.errors import InputError

logger = logging.getLogger(__name__)

ORIGINAL = "original"
"""Key in the ``meta`` of a compacted network: the size of the network that it was made from."""


def compact(
    model: nn.Module, example_input: Example, *, round_to: int = 1, check: bool = True
) -> fx.GraphModule:
    """Return a physically smaller network without gates that gives the same answers in eval mode.

    Closed channels go, with all that depends on them; constants move into biases where that is exact;
    open gates are folded into weights. The result consists of torch.nn modules under their old names, shares
    no memory with the model, is in eval mode, and can be trained further.

    Args:
        model: the network; left as it is.
        example_input: one batch as the network takes it: a tensor, a tuple of positional inputs, or a
            dictionary of inputs by name.
        round_to: keep closed channels where that makes the number of channels behind a gate a multiple of
            this; odd numbers can be slower than the next multiple of 8.
        check: compare both networks on the example and on noise like it, in the model's own precision and
            in float64.

    Returns:
        The network as a torch.fx.GraphModule: its ``code`` shows the forward pass, and ``meta["original"]``
        holds ``parameters`` and ``macs`` of the network that was compacted (of the first one, where a
        compacted network is compacted again).

    Raises:
        InputError: the network cannot be traced.
        ValueError: ``round_to`` is less than 1.
        RuntimeError: the compacted network gives other answers.

    Example:
        >>> from sparsereg import SparseMLP
        >>> net = SparseMLP(6, 8, 3).eval()
        >>> x = torch.ones(1, 6)
        >>> torch.allclose(compact(net, x)(x), net(x), atol=1e-5)
        True
    """
    if isinstance(round_to, bool) or not isinstance(round_to, int) or round_to < 1:
        raise ValueError(f"round_to must be an integer >= 1, got {round_to!r}")
    args, kwargs = inputs_of(example_input)
    structure = structure_of(model, args, kwargs)
    if structure is not None:
        made, wide = smaller_units(model, structure, args, kwargs, round_to)
        size = {"parameters": structure.analysis.costs.full[0], "macs": structure.analysis.costs.full[1]}
    else:
        made, wide, size = _smaller(model, example_input, round_to)
    if check:
        verify(model, made, wide, args, kwargs)
    made.meta[ORIGINAL] = original_size(model) or size
    return made


def _smaller(
    model: nn.Module, example_input: Example, round_to: int
) -> tuple[fx.GraphModule, fx.GraphModule, dict[str, int]]:
    """Compact a network whose gates its author has put in; also in float64, with the size that it had."""
    network = trace(model, example_input)
    analysis = network.analyse()
    if round_to > 1:
        analysis = network.analyse(rounded_pins(network, analysis, round_to))
    costs = full_costs(network).values()
    size = {"parameters": sum(n for n, _ in costs), "macs": sum(n for _, n in costs)}
    return build(network, analysis), build(network, analysis, torch.float64), size


def original_size(model: nn.Module) -> dict[str, int]:
    """Return ``parameters`` and ``macs`` of the network that a compacted one was made from; else nothing.

    Example:
        >>> from sparsereg import SparseMLP
        >>> original_size(compact(SparseMLP(6, 8, 3), torch.ones(1, 6)))["parameters"]
        155
    """
    found: dict[str, int] = model.meta.get(ORIGINAL, {}) if isinstance(model, fx.GraphModule) else {}
    return found


def build(network: Network, analysis: Analysis, dtype: torch.dtype | None = None) -> fx.GraphModule:
    """Build the network that an analysis describes.

    Args:
        network: the traced network.
        analysis: which channels stay.
        dtype: floating-point type of all weights; that of the model's if None.
    """
    builder = _Builder(network, analysis, dtype)
    for op in network.ops.values():
        builder.add(op)
    builder.finish()
    _write_in_place_where_safe(builder.graph, builder.root)
    name = f"Compacted{type(network.model).__name__.removeprefix('Compacted')}"
    module = fx.GraphModule(builder.root, builder.graph, class_name=name)
    return module.eval()


class _Builder:
    """The network under construction: its modules, its graph, and which node is which tensor."""

    def __init__(self, network: Network, analysis: Analysis, dtype: torch.dtype | None) -> None:
        self.network = network
        self.analysis = analysis
        self.dtype = dtype
        self.graph = fx.Graph()
        self.root = nn.Module()
        self.made: dict[str, fx.Node] = {}
        self.shifts: dict[str, Vector] = {}
        self.copies: dict[int, Any] = {}
        self.sources = {node.name: node for node in network.graph.nodes}
        self._sizes: dict[tuple[str, int], fx.Node] = {}
        self._any_size = True
        self._fixed: dict[str, list[int]] = {}
        self._like = first_weight(network.model)

    def add(self, op: Op) -> None:
        """Add an operation, unless it goes."""
        if isinstance(op, Input):
            node = self.graph.placeholder(op.name)
            self.made[op.name] = node
            kept = self.analysis.kept.get(op.name)
            if kept is not None:
                self.made[op.name] = self.select(node, kept, np.ones_like(kept), op.name)
        elif op.name in self.analysis.kept and op.name not in self.analysis.constant:
            try:
                self.made[op.name] = _BUILD[type(op)](self, op)
            except Exception as error:
                what = f"{op.path or op.name!r} ({type(op.module).__name__ if op.module else op.kind})"
                name = type(self.network.model).__name__
                raise InputError(f"{name} cannot be compacted, at {what}: {first_line(error)}") from error

    def tensor(self, name: str, values: Vector | Tensor, parameter: bool = False) -> fx.Node:
        """Keep numbers in the network: a parameter, or a buffer."""
        value = torch.as_tensor(values)
        if value.is_floating_point():
            value = self.cast(value)
        value = value.to(self._like.device)
        if parameter:
            self.root.register_parameter(name, nn.Parameter(value))
        else:
            self.root.register_buffer(name, value)
        return self.graph.get_attr(name)

    def cast(self, value: Tensor) -> Tensor:
        """Give new numbers the model's floating-point type."""
        return value.to(self.dtype or self._like.dtype)

    def select(self, node: fx.Node, want: Mask, there: Mask, name: str) -> fx.Node:
        """Take some of the channels that are there."""
        if np.array_equal(want, there):
            return node
        self._selects(name)
        index = torch.from_numpy(np.flatnonzero(want[there]))
        return self.graph.call_function(
            torch.index_select, (node, 1, self.tensor(self._free(f"{name}_index"), index))
        )

    def read(self, op: Op, i: int, *, exact: bool) -> tuple[fx.Node, Vector]:
        """The i-th input of an operation with the channels that it reads, and the factors left open.

        Args:
            op: the operation.
            i: position of the input.
            exact: multiply by the factors first, so that none is left open.
        """
        source, mask = op.inputs[i], self.analysis.read[op.name][i]
        assert mask is not None
        node = self._source(source)
        node = self.select(node, mask, self.analysis.kept[source], op.name)
        if source in self.analysis.constant:
            return node, np.ones(int(mask.sum()))
        scale = self.analysis.channels[source].scale[mask]
        if exact and (scale != 1).any():
            factor = self.tensor(self._free(f"{op.name}_scale"), self._along(scale, source))
            return self.graph.call_function(torch.mul, (node, factor)), np.ones_like(scale)
        return node, scale

    def _source(self, name: str) -> fx.Node:
        """The node of a tensor; a tensor of constants is made when it is first read."""
        if name not in self.made:
            self.made[name] = self._constant(name)
        return self.made[name]

    def _constant(self, name: str) -> fx.Node:
        shape = self.network.ops[name].shape
        const = self.analysis.channels[name].const[self.analysis.kept[name]]
        assert shape is not None
        vector = self.vector(f"{name}_constant", const, name)
        first, *positions = self.sizes_of(name, (0, *range(2, len(shape))))
        return self.graph.call_method("expand", (vector, first, -1, *positions))

    def vector(self, name: str, const: Vector, like: str) -> fx.Node:
        """Constants along the channels of a tensor: a parameter, since they were weights, or zeros."""
        return self.tensor(self._free(name), self._along(const, like), parameter=bool(const.any()))

    def _along(self, values: Vector, like: str) -> Tensor:
        shape = self.network.ops[like].shape
        assert shape is not None
        return torch.from_numpy(np.array(values)).view(1, -1, *(1,) * (len(shape) - 2))

    def _free(self, name: str) -> str:
        taken = {n for n, _ in self.root.named_children()} | {n for n, _ in self.root.named_parameters()}
        taken |= {n for n, _ in self.root.named_buffers()} | reserved(fx.GraphModule)
        number = 0
        while (candidate := f"{name}_{number}" if number else name) in taken:
            number += 1
        return candidate

    def sizes_of(self, name: str, dims: Iterable[int]) -> tuple[Any, ...]:
        """Some dimensions' sizes of a tensor of the original network, as they are in the compacted one's run.

        A size that nothing can tell any more is the example's, and the network takes no other inputs then.
        """
        return tuple(self._size_of(name, dim) for dim in dims)

    def _size_of(self, name: str, dim: int) -> Any:
        op = self.network.ops[name]
        assert op.shape is not None
        dim %= len(op.shape)
        node = self._node_with_size(name, dim)
        if node is not None:
            return node
        following = self.network.follows[name]
        if dim == 0 and op.shape[0] == self.network.batch:
            return self._size_node(next(n for n in self.graph.nodes if n.op == "placeholder"), 0)
        if following.positions if dim > 1 else following.width or dim == 0:
            self._any_size = False
        return op.shape[dim]

    def _node_with_size(self, name: str, dim: int) -> fx.Node | None:
        """The size as a node of the compacted network, if there is a tensor left that has it."""
        op = self.network.ops[name]
        kept = self.analysis.kept.get(name)
        there = name in self.made and name not in self.analysis.constant
        if there and (dim != 1 or (kept is not None and kept.all())):
            return self._size_node(self.made[name], dim)
        if dim < 2 or not op.inputs:
            return None
        if same_positions(op, self.sources[name]):
            found = (self._node_with_size(i, dim) for i in op.inputs if self._as_large(i, op))
            return next((node for node in found if node is not None), None)
        slides = window(op, dim)
        source = self._node_with_size(op.inputs[0], dim) if slides is not None else None
        if slides is None or source is None:
            return None
        kernel, stride, padding, dilation = slides
        reach = 2 * padding - dilation * (kernel - 1) - 1
        steps = self.graph.call_function(operator.add, (source, reach))
        return self.graph.call_function(
            operator.add, (self.graph.call_function(operator.floordiv, (steps, stride)), 1)
        )

    def _as_large(self, name: str, op: Op) -> bool:
        """Whether an input has the positions of the result, and is not one that is spread over them."""
        return self.network.ops[name].shape[2:] == op.shape[2:]  # type: ignore[index]

    def _size_node(self, node: fx.Node, dim: int) -> fx.Node:
        key = (node.name, dim)
        if key not in self._sizes:
            with self.graph.inserting_after(self._last_placeholder() if node.op == "placeholder" else node):
                self._sizes[key] = self.graph.call_method("size", (node, dim))
        return self._sizes[key]

    def _last_placeholder(self) -> fx.Node:
        last: fx.Node = [n for n in self.graph.nodes if n.op == "placeholder"][-1]
        return last

    def _selects(self, name: str) -> None:
        """Note that positions are picked by number: then an input of another size must not get so far."""
        op = self.network.ops[name]
        if isinstance(op, Input):
            assert op.shape is not None
            self._fixed.setdefault(name, [ANY] * len(op.shape))[1] = op.shape[1]
        elif any(self.network.follows[i].width for i in (name, *op.inputs)):
            self._any_size = False

    def finish(self) -> None:
        """Leave out what nobody reads, and let inputs have only the sizes that the network was made for."""
        for node in reversed(list(self.graph.nodes)):
            if node.op in ("call_function", "call_method") and not node.users:
                self.graph.erase_node(node)
        for node in [n for n in self.graph.nodes if n.op == "placeholder"]:
            sizes = self._fixed.get(node.name, [ANY] * len(self._shape(node.name)))
            if not self._any_size:
                sizes = [ANY, *self._shape(node.name)[1:]]
            for earlier in self.network.graph.nodes:
                if earlier.target is of_size and earlier.args[0].name == node.name:
                    sizes = [max(pair) for pair in zip(sizes, earlier.args[1], strict=True)]
            if any(size != ANY for size in sizes):
                with self.graph.inserting_after(self._last_placeholder()):
                    checked = self.graph.call_function(of_size, (node, sizes))
                node.replace_all_uses_with(checked, lambda user, own=checked: user is not own)

    def _shape(self, name: str) -> tuple[int, ...]:
        shape = self.network.ops[name].shape
        assert shape is not None
        return shape

    def module(self, op: Op, module: nn.Module, inputs: tuple[Any, ...], kwargs: Any = None) -> fx.Node:
        """Put a module at its old place and call it."""
        path = op.path or op.name
        first = path.split(".")[0]
        if first in reserved(fx.GraphModule):  # a layer called graph or code, say
            path = f"{first}_{path.removeprefix(first)}"
        owner: nn.Module = self.root
        *parents, last = path.split(".")
        for parent in parents:
            if parent not in owner._modules:
                owner.add_module(parent, nn.Module())
            owner = owner.get_submodule(parent)
        owner.add_module(last, module)
        return self.graph.call_module(path, inputs, kwargs)

    def copied(self, thing: Any) -> Any:
        """A copy; what is shared in the model is shared in the copies."""
        made = copy.deepcopy(thing, self.copies)
        if self.dtype is not None and isinstance(made, nn.Module | Tensor):
            return made.to(self.dtype) if isinstance(made, nn.Module) or made.is_floating_point() else made
        return made

    def arguments(self, op: Op, replace: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Arguments of the original node, with its inputs replaced."""
        node = self.sources[op.name]

        def swap(leaf: fx.Node) -> Any:
            return replace[leaf.name] if leaf.name in replace else self.size(leaf)

        args = fx.node.map_arg(node.args, swap)
        return args, cast(dict[str, Any], fx.node.map_arg(node.kwargs, swap))

    def size(self, node: fx.Node) -> Any:
        """A node that is no tensor: sizes are read off the tensors that have them, the rest is computed."""
        known = self.network.constants[node]
        function, args = node.target, node.args
        whole = self._whose_shape(node)
        if whole is not None:
            return self.sizes_of(whole.name, range(len(self._shape(whole.name))))
        if node.op == "call_method" and function == "size":
            dim = args[1] if len(args) > 1 else node.kwargs.get("dim")
            return self._size_of(cast(fx.Node, args[0]).name, cast(int, dim))
        if function is operator.getitem and isinstance(args[0], fx.Node):
            whole = self._whose_shape(args[0])
            if whole is not None and isinstance(args[1], int | slice):
                dims = range(len(self._shape(whole.name)))[args[1]]
                if isinstance(dims, int):
                    return self._size_of(whole.name, dims)
                return self.sizes_of(whole.name, dims)
        if (
            function is getattr
            and args[1] in ("dtype", "device")
            and cast(fx.Node, args[0]).name in self.made
        ):
            return self.graph.call_function(getattr, (self.made[cast(fx.Node, args[0]).name], args[1]))
        if function is getattr or (node.op == "call_method" and function in ("dim", "ndimension")):
            return known
        if node.op == "call_function":
            return self._computed(node)
        self._any_size = False
        return known

    def _whose_shape(self, node: fx.Node) -> fx.Node | None:
        """The tensor of which a node is the whole shape."""
        source = node.args[0] if node.args else None
        if not isinstance(source, fx.Node) or source.name not in self.network.ops:
            return None
        by_method = node.op == "call_method" and node.target == "size" and len(node.args) == 1
        by_name = node.target is getattr and node.args[1] == "shape"
        return source if (by_method and not node.kwargs) or by_name else None

    def _computed(self, node: fx.Node) -> Any:
        """What a function makes of sizes: a number, where they are; else a node."""
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), self.size)
        function = cast(Callable[..., Any], node.target)
        found: list[fx.Node] = []
        fx.node.map_arg((args, kwargs), lambda n: found.append(n) or n)  # type: ignore[func-returns-value]
        if found and not isinstance(args[0] if args else None, tuple | list):
            return self.graph.call_function(function, args, kwargs)
        return function(*args, **kwargs)


def first_weight(model: nn.Module) -> Tensor:
    """A weight whose type and device stand for the model's."""
    return next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(()))


def _mixing(b: _Builder, op: Op) -> fx.Node:
    assert isinstance(op, Mixing)
    source, scale = b.read(op, 0, exact=False)
    read, kept = b.analysis.read[op.name][0], b.analysis.kept[op.name]
    assert read is not None
    values = b.analysis.values
    z = op.gate_values(values)
    factors = np.ones(len(read))
    factors[read] = scale
    weight = op.oriented(values) * factors.reshape(op.groups, 1, op.in_group, 1)
    weight = weight * z.reshape(op.groups, op.out_group, 1, 1)
    rows = kept.reshape(op.groups, -1)
    columns = read.reshape(op.groups, -1)
    parts = [weight[g][rows[g]][:, columns[g]] for g in range(op.groups) if rows[g].any()]
    folded = op.folded(read, b.analysis.channels[op.inputs[0]])
    shift = op.contribution(folded, values) if folded.any() else None
    bias = values.array(op.bias) if op.bias is not None else None
    if shift is not None and op.absorber is not None:
        b.shifts[op.absorber] = shift
    elif shift is not None:
        bias = shift if bias is None else bias + shift
    bias = None if bias is None else (bias * z)[kept]
    return b.module(op, _layer(b, op, np.stack(parts), bias), (source,))


def _layer(b: _Builder, op: Mixing, weight: Vector, bias: Vector | None) -> nn.Module:
    """A layer with the weights (groups, out of a group, in of a group, taps)."""
    groups, outs, ins, _ = weight.shape
    like = op.layer
    if op.transposed:
        weight = weight.swapaxes(1, 2).reshape(groups * ins, outs, *op.weight.shape[2:])
    else:
        weight = weight.reshape(groups * outs, ins, *op.weight.shape[2:])
    settings: dict[str, Any] = {"bias": bias is not None, "device": "meta"}
    made: nn.Module
    if isinstance(like, nn.Linear):
        made = nn.Linear(ins, outs, **settings)
    else:
        cls = next(c for c in type(like).__mro__ if c.__module__ == nn.Conv2d.__module__)
        for name in ("kernel_size", "stride", "padding", "dilation", "padding_mode"):
            settings[name] = getattr(like, name)
        if op.transposed:
            settings["output_padding"] = like.output_padding
        made = cls(groups * ins, groups * outs, groups=groups, **settings)
    made.weight = _parameter(b, weight, op.weight)
    if bias is not None:
        made.bias = _parameter(b, bias, op.weight if op.bias is None else op.bias)
    return made


def _parameter(b: _Builder, values: Vector, like: Tensor) -> nn.Parameter:
    value = torch.from_numpy(np.ascontiguousarray(values)).to(like.device, b.dtype or like.dtype)
    return nn.Parameter(value, requires_grad=like.requires_grad)


def _norm(b: _Builder, op: Op) -> fx.Node:
    """BatchNorm of the kept channels; open factors go into its statistics, gates into its affine."""
    assert isinstance(op, Norm)
    norm, values = op.norm, b.analysis.values
    kept = b.analysis.kept[op.name]
    factors = b.analysis.channels[op.inputs[0]].scale[kept]
    tiny = (factors > 0) & (factors < SMALLEST_FOLD)
    source, scale = b.read(op, 0, exact=bool(tiny.any()) or not op.tracks)
    cls = next(c for c in type(norm).__mro__ if c.__module__ == nn.BatchNorm2d.__module__)
    made = cls(
        int(kept.sum()),
        eps=norm.eps,
        momentum=norm.momentum,
        affine=norm.affine,
        track_running_stats=op.tracks,
        device="meta",
    )
    z = op.gate_values(values)[kept]
    shut = scale == 0
    safe = np.where(shut, 1.0, scale)
    if norm.affine:
        weight = values.array(norm.weight)[kept] * z
        bias = values.array(norm.bias)[kept] * z
        if shut.any():
            # What stays of a channel behind a closed gate is a constant.
            weight[shut] = 0.0
            bias[shut] = b.analysis.channels[op.name].const[kept][shut]
        made.weight = _parameter(b, weight, norm.weight)
        made.bias = _parameter(b, bias, norm.bias)
    if norm.running_mean is not None and norm.running_var is not None:
        mean = (values.array(norm.running_mean) - b.shifts.get(op.name, np.zeros(op.width)))[kept]
        variance = (values.array(norm.running_var)[kept] + norm.eps) / safe**2 - norm.eps
        made.running_mean = _parameter(b, mean / safe, norm.running_mean).data
        made.running_var = _parameter(b, variance, norm.running_var).data
        assert norm.num_batches_tracked is not None
        made.num_batches_tracked = norm.num_batches_tracked.clone()
    return b.module(op, made, (source,))


def _gate(b: _Builder, op: Op) -> fx.Node:
    """Nothing is left but factors that later layers absorb."""
    return b.read(op, 0, exact=False)[0]


def _per_channel(b: _Builder, op: Op) -> fx.Node:
    assert isinstance(op, PerChannel)
    source, _ = b.read(op, 0, exact=not op.homogeneous)
    if op.passing:
        return source
    replace = {op.inputs[0]: source}
    if isinstance(op.module, nn.Module):
        module = b.copied(op.module)
        return b.module(op, module, *b.arguments(op, replace))
    node = b.sources[op.name]
    if op.drops is not None:
        # The function was traced in eval mode; a module drops again when the network is trained.
        return b.module(op, op.drops(_drop_probability(node)), (source,))
    args, kwargs = b.arguments(op, replace)
    return b.graph.create_node(node.op, node.target, args, kwargs)


def _drop_probability(node: fx.Node) -> float:
    p = node.args[1] if len(node.args) > 1 else node.kwargs.get("p", 0.5)
    assert isinstance(p, int | float)
    return float(p)


def _write_in_place_where_safe(graph: fx.Graph, root: nn.Module) -> None:
    """Let activations overwrite only what a layer has made for them alone."""
    makers = (nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm, nn.Linear)
    for node in graph.nodes:
        module = root.get_submodule(node.target) if node.op == "call_module" else None
        if not getattr(module, "inplace", False):
            continue
        (source,) = node.all_input_nodes
        made = source.op == "call_module" and isinstance(root.get_submodule(source.target), makers)
        if not made or len(source.users) > 1:
            module.inplace = False  # type: ignore[union-attr]


def _slopes(b: _Builder, op: Op) -> fx.Node:
    assert isinstance(op.module, nn.PReLU)
    source, _ = b.read(op, 0, exact=False)
    kept = b.analysis.kept[op.name]
    made = nn.PReLU(int(kept.sum()), device="meta")
    made.weight = _parameter(b, b.analysis.values.array(op.module.weight)[kept], op.module.weight)
    return b.module(op, made, (source,))


def _reshape(b: _Builder, op: Op) -> fx.Node:
    assert isinstance(op, Reshape)
    assert op.shape is not None
    source, _ = b.read(op, 0, exact=False)
    read, kept = b.analysis.read[op.name][0], b.analysis.kept[op.name]
    assert read is not None
    before = b.network.ops[op.inputs[0]].shape
    assert before is not None
    if len(op.shape) == 2:
        node = source if len(before) == 2 else b.graph.call_function(torch.flatten, (source, 1))
    else:
        node = _positions_reshaped(b, op, source, int(read.sum()), before)
    return b.select(node, kept, read.repeat(op.spread), op.name)


def _positions_reshaped(b: _Builder, op: Op, source: fx.Node, width: int, before: tuple[int, ...]) -> fx.Node:
    """The same change of shape for the channels that are left."""
    node = b.sources[op.name]
    if op.module is not None:
        return b.module(op, b.copied(op.module), (source,))
    args, kwargs = b.arguments(op, {op.inputs[0]: source})
    name = str(getattr(node.target, "__name__", node.target))
    if name == "squeeze" and len(args) == 1 and not kwargs:
        # A single channel must not go, nor a batch of one.
        ones = tuple(d for d, n in enumerate(before) if d > 1 and n == 1)
        return b.graph.call_function(torch.squeeze, (source, ones))
    if name in ("view", "reshape"):
        given = args[1] if len(args) == 2 else args[1:] or kwargs.get("shape", kwargs.get("size"))
        sizes = given if isinstance(given, tuple | list) else (given,)
        first = b.sizes_of(op.inputs[0], (0,))
        return b.graph.call_function(torch.reshape, (source, (*first, width, *sizes[2:])))
    return b.graph.create_node(node.op, node.target, args, kwargs)


def _cat(b: _Builder, op: Op) -> fx.Node:
    parts, scales = [], []
    for i, read in enumerate(b.analysis.read[op.name]):
        if read is not None:
            node, scale = b.read(op, i, exact=False)
            parts.append(node)
            scales.append(scale)
    return parts[0] if len(parts) == 1 else b.graph.call_function(torch.cat, (parts, 1))


def _pairwise(b: _Builder, op: Op) -> fx.Node:
    """Sum or product; an input that is constant throughout is a vector along the channels."""
    assert isinstance(op, Add | Mul)
    kept = b.analysis.kept[op.name]
    sides: list[fx.Node | None] = []
    for i, read in enumerate(b.analysis.read[op.name]):
        if read is not None:
            sides.append(b.read(op, i, exact=True)[0])
            continue
        const = b.analysis.channels[op.inputs[i]].const[kept]
        needless = isinstance(op, Add) and not const.any()
        sides.append(None if needless else b.vector(f"{op.name}_constant", const, op.inputs[i]))
    return _spread(b, op, _joined(b, op, *sides))


def _joined(b: _Builder, op: Add | Mul, left: fx.Node | None, right: fx.Node | None) -> fx.Node:
    if isinstance(op, Mul):
        return b.graph.call_function(torch.mul, (left, right))
    if right is None:
        assert left is not None
        return left
    if left is None:
        return right if op.sign > 0 else b.graph.call_function(torch.neg, (right,))
    return b.graph.call_function(torch.add if op.sign > 0 else torch.sub, (left, right))


def _spread(b: _Builder, op: Op, node: fx.Node) -> fx.Node:
    """Give a result all its positions where the side that had them has become a vector."""
    assert op.shape is not None
    read = zip(op.inputs, b.analysis.read[op.name], strict=True)
    shapes = [b.network.ops[name].shape or () for name, mask in read if mask is not None]
    if any(shape[2:] == op.shape[2:] for shape in shapes):
        return node
    first, *positions = b.sizes_of(op.name, (0, *range(2, len(op.shape))))
    return b.graph.call_method("expand", (node, first, -1, *positions))


def _other(b: _Builder, op: Op) -> fx.Node:
    """An operation that is kept as it is, on complete inputs."""
    replace: dict[str, Any] = {}
    for i, name in enumerate(op.inputs):
        replace[name] = b.read(op, i, exact=True)[0]
    args, kwargs = b.arguments(op, replace)
    node = b.sources[op.name]
    if isinstance(op, Output):
        output: fx.Node = b.graph.output(args[0])
        return output
    if op.module is not None:
        return b.module(op, b.copied(op.module), args, kwargs)
    return b.graph.create_node(node.op, node.target, args, kwargs)


def _attribute(b: _Builder, op: Op) -> fx.Node:
    assert isinstance(op, Attribute)
    tensor = b.copied(op.tensor)
    if not isinstance(op.tensor, nn.Parameter):
        return b.tensor(b._free(op.name), tensor)
    name = b._free(op.name)
    b.root.register_parameter(name, nn.Parameter(tensor, requires_grad=op.tensor.requires_grad))
    return b.graph.get_attr(name)


_BUILD: dict[type[Op], Callable[[_Builder, Op], fx.Node]] = {
    Op: _other,
    Output: _other,
    Attribute: _attribute,
    Mixing: _mixing,
    Norm: _norm,
    Gate: _gate,
    PerChannel: _per_channel,
    Slopes: _slopes,
    Reshape: _reshape,
    Cat: _cat,
    Add: _pairwise,
    Mul: _pairwise,
}
"""How each kind of operation is rebuilt."""
