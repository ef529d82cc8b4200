"""From the operations of a network to operations on channels: which of them each kind is."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from sparsereg.compression.units.costs import macs_of
from sparsereg.compression.units.labels import FIRST, Axes, Ints, Labels, along, compacted, stored, varying
from sparsereg.compression.units.placed import Placed
from sparsereg.compression.units.program import called, name_of
from sparsereg.compression.units.rules.moves import COPIES
from sparsereg.compression.units.rules.table import RULES
from sparsereg.compression.units.steps.mixing import Mixing, Shape
from sparsereg.compression.units.steps.norms import Norm
from sparsereg.compression.units.steps.pairs import PAIRS, alpha_of
from sparsereg.compression.units.steps.single import Gate, Single, Slopes, Take
from sparsereg.compression.units.steps.table import Result, Source, Step, Whole

logger = logging.getLogger(__name__)

_MOVES = (
    *COPIES,
    *"""
    transpose permute movedim moveaxis swapaxes swapdims unsqueeze squeeze flip cat concat concatenate stack
    getitem repeat tile split chunk split_with_sizes unsafe_split tensor_split slice select
    view reshape _unsafe_view flatten unflatten expand expand_as
    """.split(),  # noqa: SIM905
)
"""Operations that only move elements, whatever of them is left."""
_LINEAR = """
    relu leaky_relu abs neg mul multiply div true_divide
    max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d
    adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d _adaptive_avg_pool2d
    upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_bilinear2d upsample_linear1d
    upsample_trilinear3d upsample_bicubic2d mean sum amax
    reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d replication_pad3d
""".split()  # noqa: SIM905
"""Functions with f(z x) = z f(x) for every z >= 0; of padding see below."""
_ELEMENTS = """
    relu relu6 leaky_relu gelu silu tanh hardswish elu selu celu mish hardtanh abs neg sqrt sin asin atan sinh
    cosh tan erf sign round floor ceil trunc expm1 log1p square softsign hardshrink softshrink tanhshrink
    sigmoid exp rsqrt reciprocal cos log log2 log10 softplus hardsigmoid clamp clamp_min clamp_max clip pow
    logsigmoid log_sigmoid exp2 threshold add sub rsub mul multiply div true_divide positive
""".split()  # noqa: SIM905
"""Functions of single elements."""
_POSITIONS = """
    max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d
    adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d _adaptive_avg_pool2d
    upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_bilinear2d upsample_linear1d
    upsample_trilinear3d upsample_bicubic2d
    reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d replication_pad3d
""".split()  # noqa: SIM905
"""Functions of the positions of each channel by itself."""
_NORMS = ("batch_norm", "_native_batch_norm_legit_no_training", "cudnn_batch_norm", "native_batch_norm")
_CONVOLUTIONS = """
    conv1d conv2d conv3d convolution conv_transpose1d conv_transpose2d conv_transpose3d
""".split()  # noqa: SIM905


class Follower:
    """Visits the operations of a network in order.

    Args:
        placed: the network.

    Attributes:
        steps: its operations on channels, in order.
        axes: labels of each node's tensor, as far as it has units.
        maker: the operation that makes a node's units, for nodes that are not moves.
        takes: for positions that one operation reads, by their first unit.
        unknown: operations without a rule.
    """

    def __init__(self, placed: Placed) -> None:
        self.placed = placed
        self.program = placed.program
        self.axes = Axes()
        self.dead: dict[fx.Node, Any] = {}
        self.steps: list[Step] = []
        self.size = FIRST
        self.maker: dict[fx.Node, Step] = {}
        self.takes: dict[int, Take] = {}
        self._taken: dict[tuple[fx.Node, int], Ints] = {}
        self.unknown: list[fx.Node] = []
        self.shared = self._shared()
        for node in self.program.inputs:
            if isinstance(self.program.values[node], Tensor):
                self._source(node, 0)
        for node in self.program.calls:
            self._visit(node)
        output = self.program.output
        results = output.all_input_nodes
        self._add(Result(output, [self._all(n) for n in results], results))
        self._find_absorbers()

    # --- what rules for moves ask -------------------------------------------------------------------------

    def labels(self, source: Any, shape: tuple[int, ...] = ()) -> Labels:
        """Labels of a tensor."""
        assert isinstance(source, fx.Node)
        if source not in self.axes.of and source in self.program.weights:
            trains = source in self.program.parameters
            self._source(source, self.program.weights[source].numel() if trains else 0)
        found = self.axes.of[source]
        assert isinstance(found, Tensor)
        return found

    def has_units(self, node: fx.Node) -> bool:
        """Whether anything is known about a tensor."""
        return node in self.axes.of

    # --- building -----------------------------------------------------------------------------------------

    def _shared(self) -> set[fx.Node]:
        """Weights that are read at more than one place."""
        uses: Counter[fx.Node] = Counter()
        of: dict[fx.Node, fx.Node] = {}
        for node in self.program.calls:
            for weight in node.all_input_nodes:
                made = self.placed.made.get(weight)
                gates_alone = made is not None and made.parameter is None
                if weight in self.program.weights and not gates_alone:
                    of[weight] = weight if made is None or made.parameter is None else made.parameter
                    uses[of[weight]] += 1
        return {w for w, parameter in of.items() if uses[parameter] > 1}

    def _add(self, step: Step) -> Step:
        step.first, step.number = self.size, len(self.steps)
        self.size += step.size
        self.steps.append(step)
        return step

    def _source(self, node: fx.Node, parameters: int) -> None:
        step = self._add(Source(node, parameters))
        self.maker[node] = step
        self.axes.of[node] = _one(step.first, self.program.values[node].shape)

    def _made(self, node: fx.Node, step: Step) -> None:
        """Note the units of an operation's result."""
        self._add(step)
        self.maker[node] = step
        value = self.program.values[node]
        if not isinstance(value, Tensor):
            parts = value if isinstance(value, list | tuple) else []
            shapes = [v.shape for v in parts if isinstance(v, Tensor)]
            if step.axis < 0:
                self.axes.of[node] = tuple(_one(step.first, shape) for shape in shapes)
            else:
                self.axes.of[node] = tuple(along(step.units, step.axis, shape) for shape in shapes)
        elif step.axis < 0:
            self.axes.of[node] = _one(step.first, value.shape)
        else:
            self.axes.of[node] = along(step.units, step.axis, value.shape)

    def _all(self, node: fx.Node) -> Ints:
        """All units of a tensor, or of several."""
        if node in self.program.weights:
            self.labels(node)
        found = self.axes.of.get(node)
        parts = found if isinstance(found, tuple) else () if found is None else (found,)
        units = [np.unique(stored(part).numpy()) for part in parts]
        return np.unique(np.concatenate([np.zeros(0, dtype=np.int64), *units])).astype(np.int64)

    def _visit(self, node: fx.Node) -> None:
        if not _tensors(self.program.values[node]):
            if name_of(node) not in ("sym_size", "_assert_scalar") and _tensors_before(self.program, node):
                self._add(Result(node, [self._all(n) for n in node.all_input_nodes], node.all_input_nodes))
            return
        name = name_of(node).rstrip("_") if name_of(node) not in _ENDS else name_of(node)
        follow = FOLLOW.get(name)
        done = False
        if follow is not None and not self.shared & set(node.all_input_nodes):
            try:
                done = follow(self, node, self.program.arguments(node))
            except Exception as error:  # an unusual use that its rule did not think of is one without a rule
                logger.info("%s: %s is used in an unusual way: %s", node.name, name, error)
        if not done:
            self._whole(node)

    def _whole(self, node: fx.Node) -> None:
        sources = [n for n in node.all_input_nodes if self._all(n).size]
        self.unknown.append(node)
        if sources and self.placed.gates:  # without gates nothing could go anyway
            logger.info("%s is kept as it is: no rule for %s", node.name, name_of(node))
        self._made(
            node, Whole(node, [self._all(n) for n in sources], sources, 1, -1, macs_of(self.program, node))
        )

    def line(self, source: fx.Node, axis: int) -> Ints | None:
        """Units along an axis of a tensor; None if they lie along others, too."""
        labels = self.labels(source)
        if varying(labels) - {axis}:
            return None
        others = [d for d in range(labels.dim()) if d != axis]
        return (labels.amax(others) if others else labels).numpy().astype(np.int64)

    def read(self, source: fx.Node, axis: int) -> Ints | None:
        """The same, each position a unit of its own, so that any of them can be left out."""
        units = self.line(source, axis)
        if units is None or len(np.unique(units)) == len(units):
            return units
        if (source, axis) not in self._taken:
            step = self._add(Take(source, [units], [source], len(units), axis))
            self.takes[step.first] = step  # type: ignore[assignment]
            self._taken[source, axis] = step.units
        return self._taken[source, axis]

    def axis_of(self, *sources: fx.Node) -> int | None:
        """The axis along which units lie of tensors that meet element by element; -1: none, None: many."""
        rank = max(self.program.values[n].dim() for n in sources)
        axes = {d + rank - self.labels(n).dim() for n in sources for d in varying(self.labels(n))}
        return None if len(axes) > 1 else next(iter(axes), -1)

    def _find_absorbers(self) -> None:
        """BatchNorm behind a layer without bias takes its constants."""
        for step in self.steps:
            if isinstance(step, Mixing) and step.bias is None and len(step.node.users) == 1:
                behind = self.maker.get(next(iter(step.node.users)))
                if isinstance(behind, Norm) and behind.tracks and np.array_equal(behind.ins[0], step.units):
                    step.absorber = behind


_ENDS = ("__and__", "__or__")


def _one(unit: int, shape: torch.Size) -> Labels:
    """Labels of a tensor that is one unit."""
    return torch.full((), unit, dtype=torch.int32).expand(shape)


def _tensors(value: Any) -> bool:
    if isinstance(value, Tensor):
        return True
    return isinstance(value, list | tuple) and any(isinstance(v, Tensor) for v in value)


def _tensors_before(program: Any, node: fx.Node) -> bool:
    return any(_tensors(program.values.get(n)) for n in node.all_input_nodes)


# --- kinds of operations ------------------------------------------------------------------------------------


def move(x: Follower, node: fx.Node, a: dict[str, Any]) -> bool:
    """Elements at other places: their units stay theirs."""
    label = RULES.get(name_of(node), RULES.get(name_of(node).rstrip("_")))
    assert label is not None
    if name_of(node) == "expand_as":
        made: Any = x.labels(a["self"]).expand(x.program.values[node].shape)
    else:
        made = label.label(x, node, a)  # type: ignore[arg-type]
    if made is None:
        return False
    parts = [compacted(part) for part in (made if isinstance(made, tuple) else (made,))]
    if any(len(varying(part)) > 1 or bool((stored(part) < FIRST).any()) for part in parts):
        return False
    x.axes.of[node] = tuple(parts) if isinstance(made, tuple) else parts[0]
    return True


def _linear(x: Follower, node: fx.Node, a: dict[str, Any]) -> bool:
    source, weight = a["input"], a["weight"]
    return _mix(x, node, source, x.program.values[source].dim() - 1, weight, a["bias"], 1, False)


def _convolution(x: Follower, node: fx.Node, a: dict[str, Any]) -> bool:
    weight = a["weight"]
    transposed = "transpose" in name_of(node) or bool(a.get("transposed"))
    axis = x.program.values[node].dim() - x.program.values[weight].dim() + 1
    return _mix(x, node, a["input"], axis, weight, a["bias"], int(a.get("groups") or 1), transposed)


def _mix(
    x: Follower,
    node: fx.Node,
    source: fx.Node,
    axis: int,
    weight: Any,
    bias: Any,
    groups: int,
    transposed: bool,
) -> bool:
    own = [n for n in (weight, bias) if isinstance(n, fx.Node)]
    if any(n not in x.program.weights for n in own):
        return False
    ins = x.read(source, axis)
    if ins is None:
        return False
    value = x.program.values[weight]
    first, second, *tail = value.shape
    outs = second if transposed else first // groups
    shape = Shape(groups, outs, len(ins) // groups, tuple(tail), transposed)
    bias = bias if isinstance(bias, fx.Node) else None
    macs = macs_of(x.program, node)
    x._made(node, Mixing(node, ins, source, axis, shape, weight, bias, x.placed, macs))
    return True


def _norm(x: Follower, node: fx.Node, a: dict[str, Any]) -> bool:
    own = [a.get(key) for key in ("weight", "bias", "running_mean", "running_var")]
    units = x.line(a["input"], 1)
    if units is None or any(isinstance(n, fx.Node) and n not in x.program.weights for n in own):
        return False
    if not isinstance(x.program.values[node], Tensor):
        return False
    x._made(node, Norm(node, units, a["input"], x.placed))
    return True


def _element(x: Follower, node: fx.Node, a: dict[str, Any]) -> bool:
    """A function of single elements of one tensor."""
    if len(node.all_input_nodes) != 1:
        return False
    (source,) = node.all_input_nodes
    axis = x.axis_of(source)
    if source in x.program.weights or axis is None:
        return False
    units = x.line(source, axis) if axis >= 0 else x._all(source)
    assert units is not None
    step = Single(
        node,
        units,
        source,
        axis,
        _apply(x, node, source),
        name_of(node).rstrip("_") in _LINEAR and node.args[0] is source,
    )
    x._made(node, step)
    return True


def _positions(x: Follower, node: fx.Node, a: dict[str, Any]) -> bool:
    """A function of the positions of each channel of one tensor."""
    source = node.args[0]
    if not isinstance(source, fx.Node) or source in x.program.weights:
        return False
    if any(_tensors(x.program.values.get(n)) for n in node.all_input_nodes if n is not source):
        return False
    made = x.program.values[node]
    if not isinstance(made, Tensor):  # a maximum and its places, which nobody reads
        read = [u for u in node.users if u.users]
        if any(u.op != "call_function" or name_of(u) != "getitem" or u.args[1] != 0 for u in read):
            return False
        made = made[0]
    before, after = x.program.values[source].shape, made.shape
    units = x.line(source, 1) if len(before) > 2 else None
    if units is None or before[:2] != after[:2]:
        return False
    name = name_of(node).rstrip("_")
    padded = name == "pad" and (a["mode"] != "constant" or not a["value"])
    homogeneous = name in _LINEAR or padded
    any_size = any(not isinstance(s, int) for s in source.meta["val"].shape[2:])
    x._made(
        node,
        Single(node, units, source, 1, _apply(x, node, source), homogeneous, before[2:], any_size),
    )
    return True


def _reduction(x: Follower, node: fx.Node, a: dict[str, Any]) -> bool:
    """A mean, sum or maximum over positions."""
    dims = a.get("dim")
    rank = x.program.values[node.args[0]].dim()  # type: ignore[index]
    dims = [dims] if isinstance(dims, int) else list(dims or [])
    if not dims or any(d % rank < 2 for d in dims):
        return False
    return _positions(x, node, a)


def _apply(x: Follower, node: fx.Node, source: fx.Node) -> Callable[[Tensor], Tensor]:
    """What a node does, to another tensor; sizes and the like are those of the example."""

    def apply(tensor: Tensor) -> Tensor:
        def value(leaf: fx.Node) -> Any:
            return tensor if leaf is source else x.program.values[leaf]

        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), value)
        made = called(node.target, args, kwargs)
        first: Tensor = made if isinstance(made, Tensor) else made[0]
        return first

    return apply


def _slopes(x: Follower, node: fx.Node, a: dict[str, Any]) -> bool:
    source, slopes = a["self"], a["weight"]
    if slopes not in x.program.weights or x.program.values[slopes].numel() == 1:
        return False
    units = x.line(source, 1)
    if units is None:
        return False
    x._made(node, Slopes(node, units, source, slopes))
    return True


def _pair(x: Follower, node: fx.Node, a: dict[str, Any]) -> bool:
    """Two tensors element by element, or one and a number."""
    sides = [s for s in node.args[:2] if isinstance(s, fx.Node) and _tensors(x.program.values[s])]
    if len(sides) != 2:
        return _element(x, node, a)
    if name_of(node).rstrip("_") in ("mul", "multiply") and _gate(x, node, sides):
        return True
    if any(s in x.program.weights for s in sides):
        return False
    alpha = alpha_of(node)
    axis = x.axis_of(*sides)
    if axis is None or alpha is None or (len(node.args) > 2):
        return False
    shapes = [x.program.values[s].shape for s in sides]
    rank = x.program.values[node].dim()
    if any(len(shape) != rank for shape in shapes):
        return False
    if axis < 0 and any(len(x._all(s)) != 1 for s in sides):
        return False
    lines = [x.line(s, axis) if axis >= 0 else x._all(s) for s in sides]
    found: list[Ints] = [units for units in lines if units is not None]
    if len(found) != 2 or len(found[0]) != len(found[1]):
        return False
    whole = x.program.values[node].shape
    wide = [
        all(s == w for d, (s, w) in enumerate(zip(shape, whole, strict=True)) if d != axis)
        for shape in shapes
    ]
    kind = PAIRS[name_of(node).rstrip("_")]
    x._made(node, kind(node, found, sides, axis, wide, alpha))
    return True


def _gate(x: Follower, node: fx.Node, sides: Sequence[Any]) -> bool:
    """A tensor times gates along one axis."""
    pure = [s for s in sides if s in x.placed.made and x.placed.made[s].parameter is None]
    if len(pure) != 1:
        return False
    z = pure[0]
    source = sides[1] if sides[0] is z else sides[0]
    shape = x.program.values[node].shape
    places = [np.broadcast_to(p, tuple(shape)) for p in x.placed.places(z)]
    axes = {d for p in places for d in range(len(shape)) if shape[d] > 1 and (np.take(p, [0], d) != p).any()}
    axis = next(iter(axes), 1) if len(axes) < 2 and len(shape) > 1 else None
    if source in x.program.weights or axis is None or x.program.values[source].shape != shape:
        return False
    units = x.line(source, axis)
    if units is None:
        return False
    lines = [np.moveaxis(p, axis, 0).reshape(shape[axis], -1)[:, 0] for p in places]
    if _absorbed(x, source, units, lines):
        x.axes.of[node] = x.labels(source)
    else:
        x._made(node, Gate(node, units, source, axis, lines))
    return True


def _absorbed(x: Follower, source: fx.Node, units: Ints, places: list[Ints]) -> bool:
    """Hand gates to the layer before them, where only homogeneous operations are in between.

    act(z x) = z act(x) for z >= 0, so the layer's rows or the affine of BatchNorm absorb the gate.
    """
    while len(source.users) == 1:
        step = x.maker.get(source)
        if step is None and source.op == "call_function" and name_of(source) in COPIES:
            source = source.args[0]  # type: ignore[assignment]
            continue
        if step is None or not np.array_equal(units, step.units):
            return False
        if isinstance(step, Mixing) or (isinstance(step, Norm) and step.affine):
            step.scales += places
            return True
        if not isinstance(step, Single) or not step.homogeneous:
            return False
        source, units = step.sources[0], step.ins[0]
    return False


FOLLOW: dict[str, Callable[[Follower, fx.Node, dict[str, Any]], bool]] = {
    **dict.fromkeys(_MOVES, move),
    **dict.fromkeys(_ELEMENTS, _element),
    **dict.fromkeys((*_POSITIONS, "pad"), _positions),
    **dict.fromkeys(("mean", "sum", "amax"), _reduction),
    **dict.fromkeys(PAIRS, _pair),
    **dict.fromkeys(_NORMS, _norm),
    **dict.fromkeys(_CONVOLUTIONS, _convolution),
    "linear": _linear,
    "prelu": _slopes,
}
"""How each kind of operation is recognised; the function says whether it fits."""
