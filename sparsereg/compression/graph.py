"""Networks as graphs of channels: traced once with torch.fx, analysed whenever the gates have moved."""

import logging
import math
import operator
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, is_dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils.flop_counter import FlopCounterMode

from sparsereg.compression.macs import counting, recurrent_flops
from sparsereg.compression.ops import (
    Add,
    Attribute,
    Cat,
    Channels,
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
    Values,
    own_parameters,
)
from sparsereg.compression.sizes import Follows, follows, of_size
from sparsereg.compression.units.gating import GatedModule
from sparsereg.distributions import HardConcrete
from sparsereg.errors import InputError
from sparsereg.layers import GatedLayer, L0Conv2d, L0DepthwiseConv2d, L0Linear
from sparsereg.model.basic_l0_blocks import BatchNorm2d, L0Gate

logger = logging.getLogger(__name__)

Example = Tensor | tuple[Tensor, ...]

MIXING = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
DROPOUT = (
    nn.Identity,
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.AlphaDropout,
    nn.FeatureAlphaDropout,
)
"""Modules that hand on their input in eval mode."""
HOMOGENEOUS = (
    nn.ReLU,
    nn.LeakyReLU,
    nn.MaxPool1d,
    nn.MaxPool2d,
    nn.MaxPool3d,
    nn.AvgPool1d,
    nn.AvgPool2d,
    nn.AvgPool3d,
    nn.LPPool1d,
    nn.LPPool2d,
    nn.AdaptiveAvgPool1d,
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveAvgPool3d,
    nn.AdaptiveMaxPool1d,
    nn.AdaptiveMaxPool2d,
    nn.AdaptiveMaxPool3d,
    nn.Upsample,
    nn.UpsamplingNearest2d,
    nn.UpsamplingBilinear2d,
    nn.ZeroPad1d,
    nn.ZeroPad2d,
    nn.ZeroPad3d,
    nn.ReflectionPad1d,
    nn.ReflectionPad2d,
    nn.ReplicationPad1d,
    nn.ReplicationPad2d,
)
"""Modules with f(z x) = z f(x) for every z >= 0, channel by channel."""
ELEMENTWISE = (
    nn.ReLU6,
    nn.Hardtanh,
    nn.GELU,
    nn.Tanh,
    nn.Sigmoid,
    nn.SiLU,
    nn.ELU,
    nn.CELU,
    nn.SELU,
    nn.Mish,
    nn.Softplus,
    nn.Softsign,
    nn.Softshrink,
    nn.Hardshrink,
    nn.Hardswish,
    nn.Hardsigmoid,
    nn.LogSigmoid,
    nn.Tanhshrink,
    nn.Threshold,
    nn.ConstantPad1d,
    nn.ConstantPad2d,
    nn.ConstantPad3d,
)
"""Modules that treat channels apart but are not homogeneous."""
HOMOGENEOUS_FUNCTIONS: tuple[Any, ...] = (
    F.relu,
    torch.relu,
    "relu",
    F.leaky_relu,
    F.max_pool1d,
    F.max_pool2d,
    F.max_pool3d,
    F.avg_pool1d,
    F.avg_pool2d,
    F.avg_pool3d,
    F.adaptive_avg_pool1d,
    F.adaptive_avg_pool2d,
    F.adaptive_avg_pool3d,
    F.adaptive_max_pool1d,
    F.adaptive_max_pool2d,
    torch.max_pool2d,
    torch.abs,
    "abs",
    F.interpolate,
    "contiguous",
    "clone",
)
ELEMENTWISE_FUNCTIONS: tuple[Any, ...] = (
    F.relu6,
    F.hardtanh,
    F.gelu,
    F.silu,
    F.elu,
    F.celu,
    F.selu,
    F.mish,
    F.softplus,
    F.hardswish,
    F.hardsigmoid,
    F.logsigmoid,
    F.tanh,
    F.sigmoid,
    torch.tanh,
    torch.sigmoid,
    torch.clamp,
    "tanh",
    "sigmoid",
    "clamp",
)
DROPOUT_FUNCTIONS: dict[Any, type[nn.Module]] = {
    F.dropout: nn.Dropout,
    torch.dropout: nn.Dropout,
    F.dropout1d: nn.Dropout1d,
    F.dropout2d: nn.Dropout2d,
    F.dropout3d: nn.Dropout3d,
    F.alpha_dropout: nn.AlphaDropout,
}
REDUCTIONS: tuple[Any, ...] = (torch.mean, "mean", torch.sum, "sum", torch.amax, "amax")
RESHAPES: tuple[Any, ...] = (
    torch.flatten,
    "flatten",
    torch.reshape,
    "reshape",
    "view",
    torch.squeeze,
    "squeeze",
    torch.unsqueeze,
    "unsqueeze",
    "unflatten",
)
ADDITIONS: dict[Any, float] = {operator.add: 1.0, torch.add: 1.0, "add": 1.0}
ADDITIONS |= {operator.sub: -1.0, torch.sub: -1.0, "sub": -1.0}
PRODUCTS: tuple[Any, ...] = (operator.mul, torch.mul, "mul")
QUOTIENTS: tuple[Any, ...] = (operator.truediv, torch.div, "div")
CONCATENATIONS: tuple[Any, ...] = (torch.cat, torch.concat)
IN_PLACE: dict[Any, Any] = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
    F.relu_: F.relu,
    torch.relu_: F.relu,
    F.leaky_relu_: F.leaky_relu,
    F.elu_: F.elu,
    F.hardtanh_: F.hardtanh,
    F.selu_: F.selu,
    F.celu_: F.celu,
    "relu_": "relu",
    "add_": "add",
    "sub_": "sub",
    "mul_": "mul",
    "div_": "div",
    "tanh_": "tanh",
    "sigmoid_": "sigmoid",
    "clamp_": "clamp",
}
"""What writes into its first argument, and what does the same without."""


class Tracer(fx.Tracer):
    """Follows a network down to the modules of torch.nn and to the gates."""

    where = ""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether a module is one operation; anything else is followed into."""
        if isinstance(m, L0Gate | BatchNorm2d | HardConcrete | GatedLayer):
            return True
        if isinstance(getattr(m, "gate", None), L0Gate) and isinstance(m, (*MIXING, *NORMS)):
            return True
        return super().is_leaf_module(m, module_qualified_name)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Follow a module, remembering which one in case it cannot be followed."""
        outside, self.where = self.where, self.path_of_module(m)
        result = super().call_module(m, forward, args, kwargs)
        self.where = outside
        return result


class Network:
    """A network as a graph of operations on channels.

    Args:
        model: the network.
        graph: its fx graph.
        ops: its operations by name, in an order in which they can be computed.
        batch: the batch size for which shapes were recorded.
        constants: what nodes returned that are no tensors, such as sizes.
        follows: which sizes of each tensor depend on the size of the input.
    """

    def __init__(
        self,
        model: nn.Module,
        graph: fx.Graph,
        ops: dict[str, Op],
        batch: int,
        constants: dict[fx.Node, Any],
        follows: dict[str, Follows],
    ) -> None:
        self.model = model
        self.graph = graph
        self.ops = ops
        self.batch = batch
        self.constants = constants
        self.follows = follows
        found = {id(gate): gate for op in ops.values() for gate in op.all_gates}
        self.gates: list[HardConcrete] = list(found.values())

    def analyse(self, pins: Mapping[str, Mask] | None = None) -> "Analysis":
        """Find which channels stay, with the gates and weights as they are now.

        Args:
            pins: closed channels, by the name of their tensor, that are to stay.
        """
        values = Values(self.gates, pins)
        channels: dict[str, Channels] = {}
        for name, op in self.ops.items():
            channels[name] = op.forward([channels[i] for i in op.inputs], values)
        analysis = Analysis(values, channels, {}, {}, set())
        need = {name: np.zeros(op.width, dtype=bool) for name, op in self.ops.items()}
        for name in reversed(self.ops):
            self._ask(self.ops[name], need, analysis)
        for name, op in self.ops.items():
            if name in analysis.kept and name not in analysis.constant:
                inputs = [channels[i] for i in op.inputs]
                there = [analysis.kept.get(i, need[i]) for i in op.inputs]
                analysis.read[name] = op.reads(analysis.kept[name], inputs, values, there)
        return analysis

    def parameters_of(self, op: Op, analysis: "Analysis") -> int:
        """Parameters that an operation has in the compacted network."""
        if op.name not in analysis.kept:
            return 0
        kept = analysis.kept[op.name]
        if op.name in analysis.constant:
            return int(kept.sum()) if analysis.channels[op.name].const[kept].any() else 0
        read = analysis.read[op.name]
        inputs = [analysis.channels[i] for i in op.inputs]
        return op.num_parameters(read, kept) + op.num_constants(read, kept, inputs)

    def macs_of(self, op: Op, analysis: "Analysis") -> int:
        """Multiply-accumulate operations of one example in the compacted network."""
        if op.name not in analysis.read:
            return 0
        return op.num_macs(analysis.read[op.name], analysis.kept[op.name])

    def _ask(self, op: Op, need: dict[str, Mask], analysis: "Analysis") -> None:
        """Decide what to keep of one tensor and ask its inputs for what that takes."""
        if isinstance(op, Output):
            kept = np.ones(op.width, dtype=bool)
        elif need[op.name].any():
            kept = op.keep(need[op.name])
        else:
            return
        analysis.kept[op.name] = kept
        if isinstance(op, Input | Output | Attribute):
            pass
        elif not analysis.channels[op.name].live[kept].any():
            analysis.constant.add(op.name)
            return
        inputs = [analysis.channels[i] for i in op.inputs]
        for name, mask in zip(op.inputs, op.needs(kept, inputs, analysis.values), strict=True):
            if mask is not None:
                need[name] |= mask


@dataclass(eq=False)
class Analysis:
    """Which channels of which tensors stay.

    Attributes:
        values: gates and weights that it was made with.
        channels: constants and factors of every tensor.
        kept: the channels that stay; a tensor that goes altogether is missing.
        read: for every operation that stays, the channels read from each input; None for an input
            that it does without.
        constant: tensors of which nothing but constants stays.
    """

    values: Values
    channels: dict[str, Channels]
    kept: dict[str, Mask]
    read: dict[str, list[Mask | None]]
    constant: set[str]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; every module's own mode is put back afterwards."""
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def trace(model: nn.Module, example_input: Example) -> Network:
    """Trace a network into a graph of operations on channels.

    The network is not disturbed: modes, statistics and the random state stay as they are.

    Args:
        model: the network.
        example_input: a batch of examples, or a tuple of batches for several inputs.

    Raises:
        InputError: the network cannot be traced, or holds gates that no rule is known for.
    """
    several = next((name for name, m in model.named_modules() if isinstance(m, GatedModule)), None)
    if several is not None:
        raise InputError(
            f"{type(model).__name__} has a layer with gates of several kinds, {several!r}: it is counted and"
            " compacted, but its channels cannot leave while it trains (compact_every_n_epochs=0)"
        )
    inputs = examples(example_input)
    with evaluating(model):
        graph = _symbolic(model, inputs)
        _undo_writing_in_place(graph, model)
        for node in reversed(list(graph.nodes)):
            if node.op not in ("placeholder", "output") and not node.users:
                graph.erase_node(node)
        # One example cannot be told from a dimension of size one; two of them can.
        twice = tuple(x if x.shape[0] > 1 else torch.cat([x, x]) for x in inputs)
        recorder = _Recorder(model, graph)
        try:
            with counting() as recorder.counter:
                recorder.run(*twice)
        except Exception as error:
            name = type(model).__name__
            raise InputError(
                f"{name} does not run on the example input, at {recorder.where!r}: {first_line(error)}"
            ) from error
    batch = twice[0].shape[0]
    with evaluating(model):
        ops, constants, following = _operations(model, graph, recorder, batch)
    _refuse_unknown_gates(model, ops)
    _sink_gates(ops)
    return Network(model, graph, ops, batch, constants, following)


def examples(example_input: Example) -> tuple[Tensor, ...]:
    """The example input as a tuple of tensors.

    Raises:
        ValueError: it is no tensor or tuple of tensors with a batch dimension.
    """
    inputs = tuple(example_input) if isinstance(example_input, tuple | list) else (example_input,)
    for x in inputs:
        if not isinstance(x, Tensor) or x.dim() < 1 or x.shape[0] < 1:
            raise ValueError(
                "example_input must be a tensor (batch, ...) or a tuple of such tensors, got "
                + (f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__)
            )
    return inputs


def _symbolic(model: nn.Module, inputs: Sequence[Tensor]) -> fx.Graph:
    tracer = Tracer()
    try:
        graph = tracer.trace(model)
    except Exception as error:
        # Whatever the network's own code does with a stand-in for a tensor, its user gets one line.
        where = f"in {tracer.where!r}" if tracer.where else "in its forward"
        line = _own_line(error)
        raise InputError(
            f"{type(model).__name__} cannot be traced, {where}{line}: {first_line(error)}"
        ) from error
    wanted = [n for n in graph.nodes if n.op == "placeholder"]
    variable = next((n.target for n in wanted if str(n.target).startswith("*")), None)
    if variable is not None:
        raise InputError(
            f"{type(model).__name__} takes its inputs as {variable}, which cannot be followed;"
            " give each a name"
        )
    if len(wanted) != len(inputs):
        extra = wanted[len(inputs) :]
        if len(wanted) < len(inputs) or any(not n.args for n in extra):
            raise ValueError(f"example_input must hold {len(wanted)} tensors, got {len(inputs)}")
        for node in extra:
            if node.users:
                raise InputError(f"the optional input {node.name!r} is used, so give an example for it")
            graph.erase_node(node)
    return graph


def _own_line(error: BaseException) -> str:
    """File and line in the network's code that could not be followed."""
    found = ""
    at = error.__traceback__
    while at is not None:
        path = at.tb_frame.f_code.co_filename
        if "/torch/" not in path and path != __file__ and not path.startswith("<"):
            found = f" (line {at.tb_lineno} of {path.rsplit('/', 1)[-1]})"
        at = at.tb_next
    return found


def _undo_writing_in_place(graph: fx.Graph, model: nn.Module) -> None:
    """Let everything that reads a tensor after it was written into read the written one."""
    for node in list(graph.nodes):
        written = node.target in IN_PLACE or bool(node.kwargs.get("inplace"))
        if node.op == "call_module":
            written = bool(getattr(model.get_submodule(node.target), "inplace", False))
        if not written or not node.args or not isinstance(node.args[0], fx.Node):
            continue
        before = True
        for other in list(graph.nodes):
            if other is node:
                before = False
            elif not before and node.args[0] in other.all_input_nodes:
                other.replace_input_with(node.args[0], node)
        if node.op != "call_module":
            node.target = IN_PLACE.get(node.target, node.target)
            node.kwargs = {k: v for k, v in node.kwargs.items() if k != "inplace"}


class _Recorder(fx.Interpreter):
    """Runs a graph and records what every node returned and what it cost."""

    def __init__(self, model: nn.Module, graph: fx.Graph) -> None:
        super().__init__(model, graph=graph)
        self.results: dict[fx.Node, Any] = {}
        self.flops: dict[fx.Node, int] = {}
        self.counter: FlopCounterMode
        self.where = ""

    def run_node(self, n: fx.Node) -> Any:
        self.where = n.name
        before = self.counter.get_total_flops()
        result = super().run_node(n)
        self.results[n] = _shape(result)
        self.flops[n] = self.counter.get_total_flops() - before
        layer = self.module.get_submodule(str(n.target)) if n.op == "call_module" else None
        if isinstance(layer, nn.RNNBase):
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            self.flops[n] = recurrent_flops(layer, args[0] if args else kwargs["input"])
        return result


def first_line(error: Exception) -> str:
    """What an error says, on one line."""
    text = str(error).strip()
    line = text.splitlines()[0] if text else ""
    return line if " " in line else f"{type(error).__name__} {line}".strip()


@dataclass(frozen=True)
class _Shape:
    """Shape of a tensor; None for a collection of tensors."""

    size: tuple[int, ...] | None


def _shape(result: Any) -> Any:
    if isinstance(result, Tensor):
        return _Shape(tuple(result.shape))
    return _Shape(None) if tensors_in(result) else result


def tensors_in(result: Any) -> tuple[Tensor, ...]:
    """All tensors in what a network or an operation returns: lists, tuples, dictionaries, dataclasses."""
    found: list[Tensor] = []

    def collect(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif is_dataclass(leaf) and not isinstance(leaf, type):
            found.extend(tensors_in(dict(vars(leaf))))
        return leaf

    fx.node.map_aggregate(result, collect)
    return tuple(found)


@dataclass(frozen=True)
class Node:
    """A node of the fx graph with what is known about it, for the functions that recognise it."""

    node: fx.Node
    inputs: list[str]
    shapes: list[tuple[int, ...] | None]
    shape: tuple[int, ...] | None
    module: nn.Module | None
    macs: int
    constants: Mapping[fx.Node, Any]
    any_size: bool

    @property
    def common(self) -> dict[str, Any]:
        """Arguments of every Op."""
        path = str(self.node.target) if self.node.op in ("call_module", "get_attr") else ""
        return {
            "name": self.node.name,
            "inputs": self.inputs,
            "shape": self.shape,
            "module": self.module,
            "path": path,
            "macs": self.macs,
        }

    def channelwise(self) -> bool:
        """Whether there is one input and the output has its batch and channels."""
        if len(self.shapes) != 1 or self.shapes[0] is None or self.shape is None:
            return False
        return len(self.shape) > 1 and self.shape[:2] == self.shapes[0][:2]

    def apply(self, x: Tensor) -> Tensor:
        """Do what the node does, to another tensor; sizes and the like are those of the example."""
        args, kwargs = fx.node.map_arg(
            (self.node.args, self.node.kwargs), lambda n: x if n.name in self.inputs else self.constants[n]
        )
        if self.module is not None:
            result: Tensor = self.module(*args, **kwargs)
            return result
        if self.node.op == "call_method":
            return getattr(args[0], str(self.node.target))(*args[1:], **kwargs)  # type: ignore[no-any-return]
        return self.node.target(*args, **kwargs)  # type: ignore[operator,no-any-return]


def _operations(
    model: nn.Module, graph: fx.Graph, recorder: _Recorder, batch: int
) -> tuple[dict[str, Op], dict[fx.Node, Any], dict[str, Follows]]:
    """Recognise every node that is a tensor; keep the values of the others."""
    ops: dict[str, Op] = {}
    constants: dict[fx.Node, Any] = {}
    following: dict[str, Follows] = {}
    shared = _shared(model, graph)
    for node in graph.nodes:
        known = recorder.results[node]
        if not isinstance(known, _Shape) and node.op != "output":
            constants[node] = known
            continue
        inputs = [n.name for n in node.all_input_nodes if n.name in ops]
        known = recorder.results[node]
        found = Node(
            node,
            inputs,
            [ops[i].shape for i in inputs],
            known.size if isinstance(known, _Shape) else None,
            model.get_submodule(str(node.target)) if node.op == "call_module" else None,
            recorder.flops[node] // (2 * batch),
            constants,
            any(following[i].positions for i in inputs),
        )
        op = _recognise(model, found, shared)
        op.input_widths = [ops[i].width for i in op.inputs]
        following[node.name] = follows(op, node, following)
        ops[node.name] = op
    seen: set[str] = set()
    for op in ops.values():
        # A module that is called twice has its parameters once.
        op.owns_parameters = op.path not in seen or not op.path
        seen.add(op.path)
    return ops, constants, following


def _shared(model: nn.Module, graph: fx.Graph) -> set[str]:
    """Modules whose weights are read at more than one place (a gate may be: it has no weights)."""
    readers: dict[int, list[str]] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            for p in own_parameters(model.get_submodule(node.target)):
                readers.setdefault(id(p), []).append(node.target)
        elif node.op == "get_attr":
            readers.setdefault(id(_attribute(model, node.target)), []).append(node.target)
    return {path for paths in readers.values() if len(paths) > 1 for path in paths}


def _attribute(model: nn.Module, path: str) -> Any:
    owner, _, name = path.rpartition(".")
    return getattr(model.get_submodule(owner), name)


def _recognise(model: nn.Module, found: Node, shared: set[str]) -> Op:
    """Choose the class of a node; ``Op`` itself, which keeps everything, if none fits."""
    node = found.node
    op: Op | None = None
    if node.op == "placeholder":
        return Input(**found.common)
    if node.op == "output":
        return Output(**found.common)
    if node.op == "get_attr":
        return Attribute(node.name, _attribute(model, str(node.target)), str(node.target))
    try:
        if node.op != "call_module":
            op = _recognise_function(found)
        elif node.target not in shared:
            op = _recognise_module(found)
    except InputError:
        raise
    except Exception as error:
        # An unusual use of an operation that its rule did not think of is one without a rule.
        logger.info("%s: %s is used in an unusual way: %s", node.name, _what(found), first_line(error))
    if op is None:
        # Without gates nothing could go anyway.
        if any(isinstance(m, HardConcrete) for m in model.modules()):
            logger.info("%s is kept as it is: no rule for %s", node.name, _what(found))
        op = Op(**found.common)
    return op


def _what(found: Node) -> str:
    if found.module is not None:
        return f"{type(found.module).__name__} {found.node.target!r}"
    return str(getattr(found.node.target, "__name__", found.node.target))


def _recognise_module(found: Node) -> Op | None:
    """One function for each kind of module; the first base class in the table decides."""
    for cls in type(found.module).__mro__:
        if cls in MODULES:
            return MODULES[cls](found)
    return None


def _recognise_function(found: Node) -> Op | None:
    recognise = FUNCTIONS.get(found.node.target)
    return recognise(found) if recognise is not None else None


def _mixing(found: Node) -> Op | None:
    # A linear layer on more than (batch, units) mixes another dimension than 1.
    if isinstance(found.module, nn.Linear) and (found.shape is None or len(found.shape) != 2):
        return None
    if found.shapes[0] is None or len(found.shapes) != 1:
        return None
    unbatched = not isinstance(found.module, nn.Linear) and len(found.shapes[0]) != _conv_dims(found.module)
    return None if unbatched else _with_own_gate(Mixing(**found.common), found)


def _with_own_gate(op: Op, found: Node) -> Op:
    """A layer may carry a gate on its output, folded into its weights or affine."""
    own = getattr(found.module, "gate", None)
    if isinstance(own, L0Gate):
        op.gates.append(own.gates)
    return op


def _conv_dims(module: nn.Module | None) -> int:
    assert isinstance(module, nn.modules.conv._ConvNd)
    return 2 + len(module.kernel_size)


def _gated_layer(found: Node) -> Op | None:
    """A layer with gates on its weights or on its channels."""
    module = found.module
    if isinstance(module, L0Linear):
        if found.shape is None or len(found.shape) != 2:
            return None
        layer: nn.Module = nn.Linear(module.in_features, module.out_features, device="meta")
    else:
        assert isinstance(module, L0Conv2d | L0DepthwiseConv2d)
        depthwise = isinstance(module, L0DepthwiseConv2d)
        width = module.gated_weight.shape[0]
        layer = nn.Conv2d(
            module.in_channels,
            width,
            module.kernel_size,
            module.stride,
            module.padding,
            groups=width if depthwise else 1,
            device="meta",
        )
    holder = module.depthwise_conv if isinstance(module, L0DepthwiseConv2d) else module
    weight_gate = module.gate if module.per_weight else None
    op = Mixing(**found.common, layer=layer, holder=holder, weight_gate=weight_gate)
    if module.gate is not None and not module.per_weight:
        op.gates.append(module.gate)
    return op


def _norm(found: Node) -> Op | None:
    if not found.channelwise():
        return None
    return _with_own_gate(Norm(**found.common), found)


def _gate(found: Node) -> Op | None:
    assert isinstance(found.module, L0Gate)
    if found.shape is None or found.module.dim % len(found.shape) != 1:
        raise InputError(
            f"the gate {found.node.target!r} is on dimension {found.module.dim} of a tensor of shape"
            f" (batch, ...) {found.shape}; only gates on dimension 1 can be compacted"
        )
    op = Gate(**found.common)
    op.gates.append(found.module.gates)
    return op


def _per_channel(
    found: Node,
    *,
    homogeneous: bool,
    identity: bool = False,
    passing: bool = False,
    drops: type[nn.Module] | None = None,
) -> Op | None:
    if not found.channelwise():
        return None
    shape = found.shapes[0]
    assert shape is not None
    apply = _identity if identity else found.apply
    passing = passing or isinstance(found.module, nn.Identity)
    return PerChannel(
        **found.common,
        apply=apply,
        homogeneous=homogeneous,
        input_shape=shape,
        any_size=found.any_size,
        passing=passing,
        drops=drops,
    )


def _identity(x: Tensor) -> Tensor:
    return x


def _sized(found: Node) -> Op | None:
    """An input of one size, in a network that was compacted before."""
    return _per_channel(found, homogeneous=True, identity=True, passing=True)


def _pool_with_indices(found: Node) -> Op | None:
    if getattr(found.module, "return_indices", False) or found.node.kwargs.get("return_indices"):
        return None
    return _per_channel(found, homogeneous=True)


def _dropout(found: Node, drops: type[nn.Module]) -> Op | None:
    if _argument(found.node, 2, "training", True):
        raise InputError(
            f"{found.node.name!r} ({_what(found)}) also drops in eval mode; pass training=self.training"
        )
    return _per_channel(found, homogeneous=True, identity=True, drops=drops)


def _prelu(found: Node) -> Op | None:
    assert isinstance(found.module, nn.PReLU)
    if found.module.num_parameters == 1 or not found.channelwise():
        return None
    shape = found.shapes[0]
    assert shape is not None
    return Slopes(**found.common, apply=_identity, homogeneous=True, input_shape=shape)


def _reduction(found: Node) -> Op | None:
    """A mean or sum over positions."""
    dims = _argument(found.node, 1, "dim", None)
    if dims is None or not found.channelwise() or found.shapes[0] is None:
        return None
    rank = len(found.shapes[0])
    dims = [dims] if isinstance(dims, int) else list(dims)
    return _per_channel(found, homogeneous=True) if all(d % rank > 1 for d in dims) else None


def _reshape(found: Node) -> Op | None:
    if len(found.shapes) != 1 or found.shapes[0] is None or found.shape is None or len(found.shape) < 2:
        return None
    before, after = found.shapes[0], found.shape
    flattened = len(after) == 2 and len(before) > 1 and after[1] == math.prod(before[1:])
    if before[0] != after[0] or len(before) < 2 or not (flattened or before[:2] == after[:2]):
        return None
    return Reshape(**found.common, input_shape=before, sized=not _flattens(found))


def _flattens(found: Node) -> bool:
    """Whether it works for any number of channels: flattening, or a last size that is left open."""
    if isinstance(found.module, nn.Flatten) or found.node.target in (torch.flatten, "flatten"):
        return True
    last = found.node.args[-1]
    last = last[-1] if isinstance(last, list | tuple) and last else last
    return bool(found.shape is not None and len(found.shape) == 2 and last == -1)


def _cat(found: Node) -> Op | None:
    dim = _argument(found.node, 1, "dim", 0)
    parts = found.node.args[0] if found.node.args else found.node.kwargs.get("tensors")
    if not isinstance(parts, list | tuple) or found.shape is None or dim % len(found.shape) != 1:
        return None
    # The same tensor may stand in the list twice.
    names = [n.name for n in parts if isinstance(n, fx.Node)]
    return Cat(**{**found.common, "inputs": names}) if set(names) == set(found.inputs) else None


def _binary(found: Node, cls: Callable[..., Op], *, homogeneous: bool, **settings: float) -> Op | None:
    """Two tensors with the same channels, or a tensor and a number."""
    if len(found.node.args) != 2 or found.node.kwargs:
        return None
    names = [n.name for n in found.node.args if isinstance(n, fx.Node)]
    if len(names) == 1 and names == found.inputs:
        number = next(a for a in found.node.args if not isinstance(a, fx.Node))
        return _per_channel(found, homogeneous=homogeneous) if isinstance(number, int | float) else None
    # The same tensor may stand on both sides.
    shapes = found.shapes * 2 if len(found.shapes) == 1 else found.shapes
    if len(names) != 2 or len(shapes) != 2 or set(names) != set(found.inputs) or found.shape is None:
        return None
    same = all(s is not None and len(s) == len(found.shape) > 1 and s[:2] == found.shape[:2] for s in shapes)
    return cls(**{**found.common, "inputs": names}, **settings) if same else None


def _quotient(found: Node) -> Op | None:
    divisor = found.node.args[1] if len(found.node.args) > 1 else None
    if not isinstance(divisor, int | float):
        return None
    return _per_channel(found, homogeneous=True)


def _argument(node: fx.Node, position: int, name: str, default: Any) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


Recognise = Callable[[Node], Op | None]
MODULES: dict[type[nn.Module], Recognise] = {
    **dict.fromkeys(MIXING, _mixing),
    **dict.fromkeys(NORMS, _norm),
    GatedLayer: _gated_layer,
    L0Gate: _gate,
    **dict.fromkeys(HOMOGENEOUS, _pool_with_indices),
    **dict.fromkeys(ELEMENTWISE, partial(_per_channel, homogeneous=False)),
    **dict.fromkeys(DROPOUT, partial(_per_channel, homogeneous=True, identity=True)),
    nn.PReLU: _prelu,
    nn.Flatten: _reshape,
    nn.Unflatten: _reshape,
}
"""How each kind of module is recognised."""
FUNCTIONS: dict[Any, Recognise] = {
    **dict.fromkeys(HOMOGENEOUS_FUNCTIONS, _pool_with_indices),
    **dict.fromkeys(ELEMENTWISE_FUNCTIONS, partial(_per_channel, homogeneous=False)),
    **{function: partial(_dropout, drops=module) for function, module in DROPOUT_FUNCTIONS.items()},
    **dict.fromkeys(REDUCTIONS, _reduction),
    **dict.fromkeys(RESHAPES, _reshape),
    **{f: partial(_binary, cls=Add, homogeneous=False, sign=sign) for f, sign in ADDITIONS.items()},
    **dict.fromkeys(PRODUCTS, partial(_binary, cls=Mul, homogeneous=True)),
    **dict.fromkeys(QUOTIENTS, _quotient),
    **dict.fromkeys(CONCATENATIONS, _cat),
    of_size: _sized,
}
"""How each kind of function or tensor method is recognised."""


def _refuse_unknown_gates(model: nn.Module, ops: dict[str, Op]) -> None:
    """Stop at gates that would be handed on as they are: the result is to have none."""
    for op in ops.values():
        known = isinstance(op, Gate | Norm | Mixing)
        if op.module is not None and not known:
            for name, part in op.module.named_modules():
                if isinstance(part, HardConcrete):
                    where = f"{op.path}.{name}".rstrip(".")
                    raise InputError(
                        f"no rule for the gates {where!r} in {type(op.module).__name__} {op.path!r}"
                    )


def _sink_gates(ops: dict[str, Op]) -> None:
    """Hand each gate to the layer before it, where only homogeneous operations are in between.

    act(z x) = z act(x) for z >= 0, so the layer's rows or the BatchNorm's affine absorb the gate.
    """
    users = Counter(name for op in ops.values() for name in op.inputs)
    for op in ops.values():
        if isinstance(op, Mixing):
            readers = [o for o in ops.values() if op.name in o.inputs]
            alone = len(readers) == 1 and isinstance(readers[0], Norm) and readers[0].tracks
            op.absorber = readers[0].name if alone and op.bias is None else None
    for name, op in list(ops.items()):
        if not isinstance(op, Gate):
            continue
        source = ops[op.inputs[0]]
        while isinstance(source, PerChannel) and source.homogeneous and users[source.name] == 1:
            source = ops[source.inputs[0]]
        absorbs = isinstance(source, Mixing) or (isinstance(source, Norm) and source.norm.affine)
        if absorbs and users[source.name] == 1:
            source.gates.extend(op.gates)
            ops[name] = _passing(op)


def _passing(gate: Gate) -> PerChannel:
    """What is left of a gate that an earlier layer has absorbed."""
    assert gate.shape is not None
    passing = PerChannel(
        gate.name,
        gate.inputs,
        gate.shape,
        None,
        apply=_identity,
        homogeneous=True,
        input_shape=gate.shape,
        passing=True,
    )
    passing.input_widths = gate.input_widths
    return passing
