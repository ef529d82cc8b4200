"""Functions of single elements, and sums and products of tensors element by element."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from sparsereg.compression.units.labels import FIRST, Grid, Labels, live, stored, stored_together, varying
from sparsereg.compression.units.program import name_of
from sparsereg.compression.units.rules.table import STARTS, Dead, Labeller, rule

ZERO_STAYS = """
    relu relu6 leaky_relu gelu silu tanh hardswish elu selu celu mish hardtanh abs neg sqrt sin asin atan sinh
    erf sign round floor ceil trunc expm1 log1p square softsign prelu rrelu hardshrink softshrink nan_to_num
    tanhshrink real imag conj _conj resolve_conj resolve_neg positive tan
""".split()  # noqa: SIM905
"""Functions with f(0) = 0."""
_ZERO_MOVES = """
    sigmoid exp rsqrt reciprocal cos log log2 softplus hardsigmoid clamp clamp_min clamp_max clip pow
    logsigmoid log_sigmoid exp2 erfinv acos logical_not bitwise_not isnan isinf cumsum cumprod
    cosh log10 threshold eq ne lt le gt ge logical_and logical_or fill masked_fill
""".split()  # noqa: SIM905
"""Functions whose value at 0 may be another constant."""
_SUMS = ("add", "sub", "rsub", "maximum", "minimum", "__and__", "__or__", "bitwise_and", "bitwise_or")
PRODUCTS = ("mul", "multiply")
QUOTIENTS = ("div", "true_divide", "divide", "floor_divide", "remainder", "fmod", "atan2")

_RUNNING = ("cumsum", "cumprod")
ELEMENTS = {
    *(*ZERO_STAYS, *_SUMS, *PRODUCTS, *QUOTIENTS, "where", "lerp"),
    *(name for name in _ZERO_MOVES if name not in _RUNNING),
}
"""Functions of elements at the same place."""


@rule(*ZERO_STAYS)
def zero_stays(x: Labeller, node: fx.Node, a: dict[str, Any]) -> Labels:
    """What is gone stays zero."""
    labels = x.labels(node.args[0])
    if name_of(node) == "prelu":
        return pair(x, node, [labels, _prelu_weight(x, node, labels)])
    return labels


def _prelu_weight(x: Labeller, node: fx.Node, labels: Labels) -> Labels:
    weight = node.args[1]
    assert isinstance(weight, fx.Node)
    size = x.program.values[weight].numel()
    if size == 1:
        return live(())
    units = x.axes.reduce(labels, (1,), "prelu", node)
    found = x.weight(weight, 0, units, node)
    view = [1] * labels.dim()
    view[1] = -1
    return torch.from_numpy(found).int().view(view)


@rule(*_ZERO_MOVES)
def zero_moves(x: Labeller, node: fx.Node, a: dict[str, Any]) -> Labels:
    """What is gone becomes some constant."""
    if not _keeps_zero(node, {name: _number(x, value) for name, value in a.items()}):
        x.dead[node] = max(x.dead[node], Dead.CONSTANT)
    labels = _together(x, node, list(node.all_input_nodes))  # the tensor need not come first: 2 ** x
    if name_of(node).startswith("cum"):
        _keep_along(x, node, labels, a)
    return labels


def _number(x: Labeller, value: Any) -> Any:
    """The number behind a weight that is one, as a bound that a layer has stored."""
    weight = x.program.weights.get(value) if isinstance(value, fx.Node) else None
    return weight.item() if weight is not None and weight.numel() == 1 else value


def _keeps_zero(node: fx.Node, a: dict[str, Any]) -> bool:
    name = name_of(node).rstrip("_")
    if name == "pow":
        power = a.get("exponent")
        return isinstance(power, int | float) and power > 0
    if name in ("clamp", "clip", "clamp_min", "clamp_max"):
        low, high = a.get("min"), a.get("max")
        numbers = all(b is None or isinstance(b, int | float) for b in (low, high))
        return numbers and (low is None or low <= 0) and (high is None or high >= 0)
    return False


def _keep_along(x: Labeller, node: fx.Node, labels: Labels, a: dict[str, Any]) -> None:
    if (a.get("dim") or 0) % labels.dim() in varying(labels):
        x.axes.fix(labels, f"{name_of(node)} runs along it", node)


@rule(*_SUMS)
def sums(x: Labeller, node: fx.Node, a: dict[str, Any]) -> Labels:
    """Sums: both go, or none."""
    operands = [node.args[0], node.args[1]]
    if any(not isinstance(o, fx.Node) and o != 0 for o in operands):
        x.dead[node] = max(x.dead[node], Dead.CONSTANT)
    made = _together(x, node, operands)
    for o in operands:
        if isinstance(o, fx.Node) and not _covers(x, o, made):
            state = Dead.ANYTHING if o in x.depends else Dead.CONSTANT
            x.dead[node] = max(x.dead[node], state)
    return made


@rule(*PRODUCTS)
def products(x: Labeller, node: fx.Node, a: dict[str, Any]) -> Labels:
    """Products: zero where one of the factors is."""
    operands = [node.args[0], node.args[1]]
    made = _together(x, node, operands)
    covering = {o: isinstance(o, fx.Node) and _covers(x, o, made) for o in operands}
    states = [x.dead.get(o, Dead.ZERO) for o in operands if isinstance(o, fx.Node) and covering[o]]
    x.dead[node] = min(states, default=Dead.ZERO)
    if (
        states
        and x.dead[node] is not Dead.ZERO
        and any(isinstance(o, fx.Node) and o in x.depends and not covering[o] for o in operands)
    ):
        x.dead[node] = Dead.ANYTHING
    elif len(states) == 2 and Dead.ZERO not in states:
        x.dead[node] = max(states)
    return made


def _covers(x: Labeller, source: fx.Node, made: Labels) -> bool:
    """Whether what is gone of a result is gone of an operand: it has a place of its own for each unit."""
    if not _has(x, source):
        return False
    if not _is_tensor(x, source):
        return True
    labels = x.labels(source)
    return all(_size_at(labels, axis, made.dim()) == made.shape[axis] for axis in varying(made))


def _has(x: Labeller, source: fx.Node) -> bool:
    """Whether what is gone makes zeros in a tensor: it has units, or is a weight of more than a number."""
    value = x.program.weights.get(source)
    return x.has_units(source) if value is None else value.numel() > 1


_PARTS = ("slice", "narrow", "alias", "clone", "contiguous", "detach", "_to_copy", "to")
"""Operations that give a part of a tensor along some axes, or all of it."""


@rule(*QUOTIENTS)
def quotients(x: Labeller, node: fx.Node, a: dict[str, Any]) -> Labels:
    """Quotients: a divisor must not be zero where its unit is gone."""
    over, under = node.args[0], node.args[1]
    labels = _together(x, node, [over, under])
    if isinstance(under, fx.Node) and _has(x, under) and x.dead.get(under, Dead.ZERO) is Dead.ZERO:
        if isinstance(x.program.values[under], Tensor) and varying(x.labels(under)):
            x.dead[node] = Dead.ANYTHING
    elif isinstance(over, fx.Node) and _covers(x, over, labels):
        x.dead[node] = x.dead.get(over, Dead.ZERO)
    elif isinstance(over, fx.Node) and over in x.depends:
        x.dead[node] = Dead.ANYTHING
    return labels


@rule("where")
def where(x: Labeller, node: fx.Node, a: dict[str, Any]) -> Labels:
    """One of two tensors by a condition."""
    condition, first, second = node.args
    made = _together(x, node, [condition, first, second])
    for o in (first, second):
        if not isinstance(o, fx.Node) or not _covers(x, o, made):
            state = Dead.ANYTHING if isinstance(o, fx.Node) and o in x.depends else Dead.CONSTANT
            x.dead[node] = max(x.dead[node], state)
    return made


@rule("expand_as")
def as_large(x: Labeller, node: fx.Node, a: dict[str, Any]) -> Labels:
    """A tensor repeated to the size of another one, of which then may be gone what is gone of that."""
    made = _together(x, node, [a["self"], a["other"]])
    if _covers(x, a["self"], made):
        x.dead[node] = x.dead.get(a["self"], Dead.ZERO)
    else:
        x.dead[node] = Dead.ANYTHING if a["self"] in x.depends else Dead.CONSTANT
    return made


@rule("lerp")
def three(x: Labeller, node: fx.Node, a: dict[str, Any]) -> Labels:
    """From one tensor to another."""
    return _together(x, node, list(node.args[:3]))


@rule("glu")
def gated_half(x: Labeller, node: fx.Node, a: dict[str, Any]) -> Labels:
    """One half of an axis times the sigmoid of the other."""
    labels = x.labels(node.args[0])
    one, two = labels.chunk(2, a["dim"])
    x.dead[node] = Dead.ZERO
    return pair(x, node, [one, two])


def _together(x: Labeller, node: fx.Node, operands: list[Any]) -> Labels:
    """Labels of operands that are broadcast to each other; a full-size operand without units keeps theirs."""
    out = x.program.values[node]
    tensors = [o for o in operands if isinstance(o, fx.Node) and _is_tensor(x, o)]
    for o in tensors:
        for other in tensors:
            if other is not o and x.has_units(other):
                start_as(x, o, x.labels(other))
    labels = [x.labels(o) for o in tensors]
    return pair(x, node, labels).expand(out.shape)


def start_as(x: Labeller, source: Any, labels: Labels) -> None:
    """Zeros lose what is gone of the tensor that they meet.

    At once where only one operation reads them; others, such as a map that is written part by part, when the
    network is looked at again.
    """
    zeros = _zeros_behind(source)
    if zeros is None or x.axes.of.get(zeros) is not None:
        return
    shape = x.program.values[zeros].shape
    if zeros is source and len(source.users) == 1 and shape == labels.shape:
        x.axes.of[source], x.dead[source] = labels, Dead.ZERO
        return
    along = sorted(varying(labels))
    if len(along) == 1 and len(shape) == labels.dim() and shape[along[0]] == labels.shape[along[0]]:
        x.found_starts.setdefault(zeros, along[0])


def _zeros_behind(source: Any) -> fx.Node | None:
    """The zeros of a size of their own that a tensor is, or a part of."""
    while isinstance(source, fx.Node) and source.op == "call_function":
        if name_of(source) in STARTS:
            return source
        if name_of(source) not in _PARTS:
            return None
        source = source.args[0]
    return None


def _is_tensor(x: Labeller, source: fx.Node) -> bool:
    return isinstance(x.program.values[source], Tensor)


def pair(x: Labeller, node: fx.Node, labels: list[Labels]) -> Labels:
    """Labels of tensors that are broadcast to each other.

    Units at the same place go together. Where one tensor has one place for many units of the other, as a
    vector that multiplies every head, its unit stays as long as one of theirs does. Where a tensor without
    units has many places along an axis, as features that multiply a vector each, these stay.
    """
    shape = torch.broadcast_shapes(*(part.shape for part in labels))
    wide = max(labels, key=lambda part: len(varying(part)) if not _unlabelled(part) else -1)
    made = wide.expand(shape)
    axes = varying(made)
    for part in labels:
        if part is wide:
            continue
        if _unlabelled(part):
            met = [axis for axis in axes if _size_at(part, axis, len(shape)) > 1]
            x.met_without_units |= bool(met)
            if met and axes - set(met):
                made = _as_first(x, node, made, met)
            elif met:
                x.axes.fix(made, f"{name_of(node)} with a tensor of which nothing can go", node)
            continue
        missing = [axis for axis in axes if _size_at(part, axis, len(shape)) == 1]
        if missing and not varying(part):
            x.axes.fix(part, f"{name_of(node)} with many units at once", node)
        elif missing and varying(part.expand(shape)):
            _tie_to_rows(x, node, made, part.expand(shape), missing)
        else:
            made = _tie_places(x, node, made, part.expand(shape))
    return made


def _tie_to_rows(x: Labeller, node: fx.Node, made: Labels, part: Labels, missing: list[int]) -> None:
    """Each unit of a smaller tensor stays with any of the units that it meets."""
    kept = tuple(sorted(varying(part)))
    rows = x.axes.reduce(part, kept, name_of(node), node)
    units = x.axes.reduce(made, (*kept, *missing), name_of(node), node)
    x.axes.grids.append(Grid(units.reshape(rows.size, -1), np.ravel(rows)))


def _as_first(x: Labeller, node: fx.Node, made: Labels, axes: list[int]) -> Labels:
    """Labels of a tensor of which all positions along some axes stay: units go along the others alone."""
    first = made
    for axis in axes:
        first = first.narrow(axis, 0, 1)
    return _tie_places(x, node, made, first.expand(made.shape))


def _tie_places(x: Labeller, node: fx.Node, made: Labels, part: Labels) -> Labels:
    one, two = stored_together(made, part)
    clash = (one != two) & ((one >= FIRST) | (two >= FIRST))
    both = torch.maximum(one, two)
    if bool(clash.any()):
        _tie(x, node, one[clash], two[clash])
        both = torch.from_numpy(x.axes.sets.find(both.numpy())).int()  # one number for what is tied now
    return both.expand(made.shape)


def _tie(x: Labeller, node: fx.Node, a: Tensor, b: Tensor) -> None:
    """Tie two tensors of labels where both are units; a unit that meets LIVE stays."""
    one, two = a.numpy().astype("int64"), b.numpy().astype("int64")
    blank = (one == 0) | (two == 0)
    x.axes.equal(one[~blank], two[~blank], f"{name_of(node)} with what cannot go", node)


def _unlabelled(labels: Labels) -> bool:
    return bool((stored(labels) < FIRST).all())


def _size_at(labels: Labels, axis: int, rank: int) -> int:
    own = axis - (rank - labels.dim())
    return int(labels.shape[own]) if own >= 0 else 1
