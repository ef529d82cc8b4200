"""The table of rules, and what a rule is given."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from enum import IntEnum
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, fx

from sparsereg.compression.running import can_train
from sparsereg.compression.units.entrances import entrances
from sparsereg.compression.units.labels import FIRST, Axes, Ints, Labels, along, compacted, live, stored
from sparsereg.compression.units.program import Call, Program, bound, name_of, place_of
from sparsereg.errors import InputError

logger = logging.getLogger(__name__)


class Dead(IntEnum):
    """What the elements of a unit that is gone are, in one tensor."""

    ZERO = 0
    CONSTANT = 1
    ANYTHING = 2


class Smaller(Protocol):
    """What a rule may ask of a network of which something is gone.

    Attributes:
        program: the whole network.
        labels: of each tensor; a tuple of them for several.
        weights: what is left of each.
    """

    program: Program
    labels: dict[Any, Any]
    weights: dict[fx.Node, Tensor]

    def alive_along(self, labels: Labels, axis: int) -> Tensor:
        """Which positions along an axis are left, bool (size,)."""

    def left(self, labels: Labels, axis: int) -> int:
        """How many positions along an axis are left."""

    def is_of_all(self, node: fx.Node) -> bool:
        """Whether a mean counts what is gone as zeros."""


Label = Callable[["Labeller", fx.Node, dict[str, Any]], "Labels | tuple[Labels, ...] | None"]
"""Labels of a node's output from the labels of its inputs; None where nothing can go."""
Rewrite = Callable[[Smaller, fx.Node, dict[str, Any]], Call]
"""How a node is called on what is left: gets the cut, the node and its arguments by name."""


@dataclass(frozen=True)
class Rule:
    """All that is known about one kind of operation.

    Attributes:
        label: what it does to labels.
        call: how it is called on what is left; as it stands if None.
    """

    label: Label
    call: Rewrite | None = None


RULES: dict[str, Rule] = {}
"""Rules by the name of the operation in ``torch.ops.aten``, without a trailing underscore."""
BEFORE: list[Callable[[Labeller], None]] = []
"""What looks at a whole program before its operations are visited."""
TURNS = ("t", "transpose", "permute", "numpy_T", "mT", "swapaxes", "swapdims")
"""Operations that turn a matrix around."""
PICKS = ("select", "index", "index_select", *TURNS)
"""Operations that pick matrices from a stack of them, or turn all of these around."""
STARTS = ("zeros", "new_zeros")
"""Operations that make zeros of a size of their own, from which states start."""
ZEROS = (*STARTS, "zeros_like")
SPLITS = ("split", "chunk", "split_with_sizes", "unsafe_split", "tensor_split")
CATS = ("cat", "concat", "concatenate")
JOINS = (*CATS, "stack")
_READ_AS_WEIGHT = ("linear", "matmul", "bmm", "einsum")
MOVING: set[str] = set()
"""Names of operations that only move elements, or leave some out."""


def rule(*names: str, call: Rewrite | None = None) -> Callable[[Label], Label]:
    """Register a labelling function for operations."""

    def register(label: Label) -> Label:
        for name in names:
            RULES[name] = Rule(label, call)
        return label

    return register


def rule_of(node: fx.Node) -> Rule | None:
    """The rule for a node; None if there is none."""
    name = name_of(node)
    return RULES.get(name) or RULES.get(name.rstrip("_"))


class Labeller:
    """Visits the operations of a program in order and labels every tensor.

    Attributes:
        dead: what the elements of a unit that is gone are, in each tensor.
        unknown: operations without a rule, by name, with the first node of each.
        reads: tensors that are summed over units; of several in one product, one that is zero is enough.
        through: for products with units along axes of both factors, the factors that have to be zero.
        columns: for weights that read features of inputs, or units that are not zero when they are gone, the
            axis of their columns, which take the gates.
        kept_rows: tables of whose rows none can go, with the reason and the operation that keeps them.
        shared: for labels of scores of heads that share keys, those of the head and of its group.
        found_starts: zeros that meet units along one axis, which are theirs in a second look.
        met_without_units: whether units stay because they meet a tensor without units at every place.

    Args:
        program: the network.
        inputs: whether features of the inputs are units, too.
        vectors: computed vectors whose places are units, too, see ``constants``.
        even: whether the groups of a norm lose the same places, as a class of the network's own wants it.
        starts: zeros of a size of their own that have units, each with the axis along which these lie.
    """

    def __init__(
        self,
        program: Program,
        inputs: bool = False,
        vectors: Collection[fx.Node] = (),
        even: bool = False,
        starts: Mapping[fx.Node, int] = MappingProxyType({}),
    ) -> None:
        self.program, self.vectors, self.met_without_units = program, vectors, False
        self.even, self.starts = even, starts
        self.found_starts: dict[fx.Node, int] = {}
        self.axes = Axes()
        self.entrances = {e.node: e for e in entrances(program)} if inputs else {}
        self.dead = dict.fromkeys(program.constants, Dead.ANYTHING)
        self.unknown: dict[str, fx.Node] = {}
        self.reads: list[tuple[Any, ...]] = []
        self.columns: dict[fx.Node, int] = {}
        self.shared: dict[int, tuple[int, int]] = {}
        self.through: dict[fx.Node, tuple[Any, ...]] = {}
        self.kept_rows: dict[fx.Node, tuple[str, fx.Node]] = {}
        self.depends = self._depends()
        for look in BEFORE:
            look(self)
        for node in program.inputs:
            self._enter(node)
        for node in program.calls:
            self._visit(node)
            self._enter(node)
        self._keep_rows()
        self._keep_mixed_inputs()
        self._join_what_nobody_reads()
        self._keep_outputs()

    def _keep_rows(self) -> None:
        """Experts that have to stay are units, too, so that the reason is known."""
        for table, (why, node) in list(self.kept_rows.items()):
            axes = self.axes.weight_axes.get(table)
            if axes is None or axes[0] is not None:
                del self.kept_rows[table]
            else:
                axes[0] = self.axes.fresh(self.program.values[table].shape[0], table, 0)
                self.axes.fix(axes[0], why, node)

    def _depends(self) -> set[fx.Node]:
        found = set(self.program.inputs)
        for node in self.program.calls:
            if any(n in found for n in node.all_input_nodes):
                found.add(node)
        return found

    def _enter(self, node: fx.Node) -> None:
        """Features of an input, or places of a vector, are units of their own; they are whatever it is."""
        if node in self.entrances:
            axis, shape = self.entrances[node].axis, self.program.values[node].shape
            units = self.axes.fresh(shape[axis], node, axis)
            self.axes.inputs.append((node, axis, units))
            self.axes.of[node] = along(units, axis, shape)
            self.dead[node] = Dead.ANYTHING
        if node in self.vectors:
            shape = self.program.values[node].shape
            units, axis = self.axes.sets.new(shape[-1]), len(shape) - 1
            self.axes.vectors.append((node, axis, units))
            self.axes.of[node] = along(units, axis, shape)
            self.dead[node] = Dead.ANYTHING

    def _of_inputs(self, units: Ints) -> bool:
        """Whether some units are features of inputs, all of them."""
        if not self.axes.inputs or not (units >= FIRST).any():
            return False
        features = self.axes.sets.find(np.concatenate([own for _, _, own in self.axes.inputs]))
        return bool(np.isin(self.axes.sets.find(units[units >= FIRST]), features).all())

    def _keep_mixed_inputs(self) -> None:
        """Features that meet what a layer makes, or are summed over otherwise than by a weight, stay."""
        if not self.axes.inputs:
            return
        made = [
            np.arange(first, first + self.program.values[node].shape[axis])
            for first, node, axis in self.axes.owner
            if axis >= 0 and node not in self.entrances
        ]
        others = self.axes.sets.find(np.concatenate([np.zeros(0, dtype=np.int64), *made]))
        for node, _, units in self.axes.inputs:
            mixed = np.isin(self.axes.sets.find(units), others)
            self.axes.fix(units[mixed], "it is added to what a layer makes", node)
        for sources in self.reads:
            if all(self.dead.get(s, Dead.ZERO) is not Dead.ZERO for s in sources):
                for source in sources:
                    labels = self.axes.of.get(source)
                    if isinstance(labels, Tensor) and self._of_inputs(np.unique(stored(labels).numpy())):
                        self.axes.fix(labels, "it is summed over as it comes in", source)

    def _visit(self, node: fx.Node) -> None:
        value = self.program.values[node]
        if not _tensors(value):
            self.axes.of[node] = None
            return
        known = rule_of(node)
        if known is None:
            self._keep_inputs(node)
            return
        labelled = any(self.has_units(n) for n in node.all_input_nodes) or _weighs(self.program, node)
        labelled = labelled or name_of(node) in STARTS
        if not labelled:
            self.axes.of[node] = None
            return
        before = max((self.dead.get(n, Dead.ZERO) for n in node.all_input_nodes), default=Dead.ZERO)
        self.dead[node] = before
        try:
            found = known.label(self, node, self.program.arguments(node))
        except InputError:
            raise
        except Exception as error:  # it is called in a way that its rule does not know
            logger.debug("the rule for %s at %s: %r", name_of(node), place_of(node), error)
            self._keep_inputs(node)
            return
        if isinstance(found, tuple):
            found = tuple(compacted(part) for part in found)
        self.axes.of[node] = compacted(found) if isinstance(found, Tensor) else found

    def _keep_inputs(self, node: fx.Node) -> None:
        """An operation without a rule for this way to call it: all that it touches stays, and it is named."""
        touched = False
        for source in node.all_input_nodes:
            if source in self.program.weights:
                self.keep_weight(source, self.unknown_reason(node), node)
            elif self.has_units(source):
                touched = True
                self.fix(source, self.unknown_reason(node), node)
        if touched or any(n in self.program.parameters for n in node.all_input_nodes):
            self.unknown.setdefault(name_of(node), node)
        self.axes.of[node] = None

    @staticmethod
    def unknown_reason(node: fx.Node) -> str:
        """Why units stay that meet an operation without a rule."""
        return f"no rule for {name_of(node)}"

    def _keep_outputs(self) -> None:
        output = self.program.output
        for node in output.all_input_nodes:
            self.fix(node, "it reaches the output", output)
            if node in self.program.weights:
                self.keep_weight(node, "it is an output", output)

    def _join_what_nobody_reads(self) -> None:
        """Of a table of which the example reads some rows, the other rows go with them."""
        for weight in self.program.weights:
            labels = self.axes.of.get(weight)
            if isinstance(labels, Tensor) and labels.dim() > 1:
                read = np.unique(self._read_of(weight))
                if len(read) < labels.numel():
                    self._join_axes(labels, torch.from_numpy(np.isin(labels.numpy(), read)))

    def _join_axes(self, labels: Labels, read: Tensor) -> None:
        """Along axes of which whole positions are not read, these are as the first that is."""
        for axis in range(labels.dim()):
            reads = read.movedim(axis, 0).reshape(labels.shape[axis], -1).any(1)
            if bool(reads.any()) and not bool(reads.all()):
                lines = labels.movedim(axis, 0).numpy()
                first = int(reads.nonzero()[0])
                for position in (~reads).nonzero().flatten().tolist():
                    self.axes.sets.unite(lines[position], lines[first])
                read = read.movedim(axis, 0).clone()
                read[~reads] = read[first].clone()
                read = read.movedim(0, axis)

    def _read_of(self, weight: fx.Node) -> Ints:
        """Labels of a weight that reach operations that do more than move them."""
        found = [np.zeros(0, dtype=np.int64)]
        todo, seen = [weight], {weight}
        while todo:
            node = todo.pop()
            for user in node.users:
                moves = user.op == "call_function" and name_of(user).rstrip("_") in MOVING
                if moves and user not in seen and isinstance(self.axes.of.get(user), Tensor | tuple):
                    seen.add(user)
                    todo.append(user)
                elif not moves:
                    labels = self.axes.of.get(node)
                    parts = labels if isinstance(labels, tuple) else (labels,)
                    found += [np.unique(stored(part).numpy()) for part in parts if isinstance(part, Tensor)]
        return np.concatenate(found)

    def has_units(self, node: fx.Node) -> bool:
        """Whether anything of a tensor could go."""
        if node in self.program.weights:
            return False
        labels = self.axes.of.get(node)
        return labels is not None

    def labels(self, source: Any, shape: tuple[int, ...] = ()) -> Labels:
        """Labels of an argument: of a tensor, a weight read as it is, or a number."""
        if not isinstance(source, fx.Node):
            return live(shape)
        value = self.program.values[source]
        if source in self.program.weights and isinstance(value, Tensor):
            return self.raw(source)
        found = self.axes.of.get(source)
        if isinstance(found, Tensor):
            return found
        return live(value.shape if isinstance(value, Tensor) else ())

    def raw(self, source: fx.Node) -> Labels:
        """Labels of a weight that is added, multiplied or looked up: each element is its own unit."""
        value = self.program.weights[source]
        if not can_train(value) or value.numel() == 1:  # one number for all goes with none
            return live(value.shape)
        if read_by_rows(self.program, source):
            return along(self.weight(source, 0, None, source), 0, value.shape)
        if source in self.axes.weight_axes:
            return self._from_axes(source, value)
        if self.axes.of.get(source) is None:
            units = self.axes.fresh(value.numel(), source, -1)
            self.axes.of[source] = torch.from_numpy(units).int().view(value.shape)
            self.dead.setdefault(source, Dead.ZERO)
        labels = self.axes.of[source]
        assert isinstance(labels, Tensor)
        return labels

    def _from_axes(self, source: fx.Node, value: Tensor) -> Labels:
        axes = self.axes.weight_axes[source]
        if value.dim() == 1 and axes[0] is not None:
            return torch.from_numpy(axes[0]).int()
        self.keep_weight(source, "it is used in two ways", source)
        return live(value.shape)

    def weight(self, source: Any, axis: int, units: Ints | None, node: fx.Node) -> Ints:
        """Units of a weight along one of its axes: given ones (tied to those it has), or new ones.

        Args:
            source: the node of the weight.
            axis: of the weight.
            units: what lies along the axis, (size,); None for the weight's own.
            node: the operation that reads it.
        """
        source, axis = behind(self.program, weight_of(source), axis)
        some = some_rows(self.program, source)
        if some is not None:
            if axis != 0:
                return self.weight(some.matrix, axis, units, node)
            own = self.weight(some.matrix, 0, None, node)[some.first : some.last]
            if units is not None:
                self.axes.equal(own, units, "the weight is shared", node)
            return own
        value = self.program.values[source]
        size = value.shape[axis]
        if source not in self.program.weights and value.dim() == 1 and units is not None:
            self.axes.equal(self.labels(source).numpy(), units, f"{name_of(node)} adds it", node)
            return units
        if source not in self.program.weights:
            self.fix(source, "the weight is computed", node)
            if units is not None:
                self.axes.fix(units, "the weight is computed", node)
            return np.full(size, 1)
        if isinstance(self.axes.of.get(source), Tensor):
            self.axes.fix(self.axes.of[source], "it is used in two ways", node)  # type: ignore[arg-type]
            if units is not None:
                self.axes.fix(units, "its weight is used in two ways", node)
            return np.full(size, 1)
        axes = self.axes.weight_axes.setdefault(source, [None] * value.dim())
        known = axes[axis]
        if known is None:
            known = self.axes.fresh(size, source, axis) if units is None else units
            axes[axis] = known
        elif units is not None:
            self.axes.equal(known, units, "the weight is shared", node)
        return known

    def keep_weight(self, source: fx.Node, why: str, node: fx.Node) -> None:
        """All of a weight stays."""
        for units in self.axes.weight_axes.get(source, []):
            self.axes.fix(units, why, node)
        labels = self.axes.of.get(source)
        if isinstance(labels, Tensor):
            self.axes.fix(labels, why, node)
        if source not in self.axes.weight_axes and labels is None:
            value = self.program.weights[source]
            self.axes.weight_axes[source] = [None] * value.dim()
            self.axes.whole[source] = (why, node)

    def fix_along(self, weight: fx.Node, axis: int, why: str, node: fx.Node) -> None:
        """The units of a weight along one of its axes stay."""
        self.axes.fix(self.axes.weight_axes[weight][axis], why, node)

    def fix(self, source: Any, why: str, node: fx.Node) -> None:
        """All units of a tensor stay."""
        labels = self.axes.of.get(source) if isinstance(source, fx.Node) else None
        for part in labels if isinstance(labels, tuple) else (labels,):
            self.axes.fix(part, why, node)

    def read(
        self,
        source: Any,
        keep: tuple[int, ...],
        node: fx.Node,
        what: str,
        *,
        sums: bool = True,
        columns: tuple[tuple[Any, int], ...] = (),
    ) -> Ints:
        """Labels along the axes over which an operation sums: what is gone must have been zero there.

        Args:
            source: the tensor.
            keep: its axes, in the order of the result.
            node: the operation.
            what: its name.
            sums: whether it sums over units; else what is gone may have been anything.
            columns: weights with a column for each unit, which can be zero in place of the unit, each with
                the axis along which these lie.
        """
        labels = self.labels(source)
        if labels.numel() == 0:
            raise InputError(
                f"{what} in {place_of(node)}: nothing of the example comes so far, as where an expert gets no"
                " token; give a larger example"
            )
        found = self.axes.reduce(labels, keep, what, node)
        zero = not isinstance(source, fx.Node) or self.dead.get(source, Dead.ZERO) is Dead.ZERO
        if (self._of_inputs(found) or (sums and not zero)) and self._take_columns(columns):
            return found
        if sums:
            self.reads.append((source,))
            if not zero:
                self.axes.fix(found, f"{what} sums over values that are not zero when it is gone", node)
        return found

    def _take_columns(self, columns: tuple[tuple[Any, int], ...]) -> bool:
        """Let columns of weights take gates; False if there are none, or one has its columns elsewhere."""
        own = [behind(self.program, scaled(weight, axis), axis) for weight, axis in columns]
        known = [self.columns.get(w, axis) == axis and w not in self.program.made for w, axis in own]
        if not own or not all(known) or any(weight not in self.program.weights for weight, _ in own):
            return False
        self.columns |= dict(own)
        return True


def out_axis(node: fx.Node, axis: int) -> int:
    """The axis of a weight along which an operation makes units; a depthwise one also reads along it.

    Args:
        node: the operation.
        axis: where it has one group.
    """
    return 0 if (bound(node).get("groups") or 1) != 1 else axis


def normed_by_lines(node: fx.Node) -> bool:
    """Whether a node is a weight norm over all axes but one; one norm of all is computed like any other."""
    return node.op == "call_function" and name_of(node) == "_weight_norm" and bound(node)["dim"] != -1


def weight_of(source: fx.Node) -> fx.Node:
    """The weight that has the shape and the zeros of one that is computed from it by a weight norm."""
    while normed_by_lines(source):
        source = source.args[0]  # type: ignore[assignment]
    return source


def scaled(weight: Any, axis: int) -> Any:
    """The weight to multiply so that one is multiplied along an axis.

    Of one that is computed by a weight norm this is its norm where there is one for each place, else what is
    normed; of some rows of a matrix, the matrix.
    """
    if isinstance(weight, fx.Node) and weight.op == "call_function" and weight_rows(weight) is not None:
        return weight_rows(weight)
    if isinstance(weight, fx.Node) and normed_by_lines(weight):
        a = bound(weight)
        return a["g"] if a["dim"] % a["v"].meta["val"].dim() == axis else a["v"]
    return weight


@dataclass(frozen=True)
class Rows:
    """Some rows of a matrix of weights, from the first to the one behind the last."""

    matrix: fx.Node
    first: int
    last: int


def some_rows(program: Program, node: fx.Node) -> Rows | None:
    """The rows that a node is of a matrix of which linear layers read parts, such as queries alone."""
    matrix = weight_rows(node)
    if matrix is None or not read_by_rows(program, matrix):
        return None
    if name_of(node) == "slice":
        size = int(program.values[matrix].shape[0])
        first, last, _ = slice(bound(node)["start"], bound(node)["end"]).indices(size)
        return Rows(matrix, first, last)
    split: Any = node.args[0]
    place: Any = node.args[1]
    sizes = [int(part.shape[0]) for part in program.values[split]]
    first = sum(sizes[:place])
    return Rows(matrix, first, first + sizes[place])


def weight_rows(node: fx.Node) -> fx.Node | None:
    """What a node takes some rows from, one after the other; None if it is not such a part."""
    if node.op != "call_function":
        return None
    source: Any = node.args[0] if node.args else None
    if name_of(node) == "getitem" and isinstance(source, fx.Node) and source.op == "call_function":
        return _whole_of(source) if name_of(source) in SPLITS else None
    if name_of(node) == "slice" and bound(node)["step"] == 1:
        return _whole_of(node)
    return None


def _whole_of(node: fx.Node) -> fx.Node | None:
    whole: Any = node.args[0]
    return whole if bound(node).get("dim") == 0 and whole.op == "placeholder" else None


def read_by_rows(program: Program, weight: fx.Node) -> bool:
    """Whether all that reads a matrix of weights are linear layers, of which some read parts of it alone."""
    if weight not in program.parameters or program.values[weight].dim() != 2:
        return False
    parts = [user for user in weight.users if name_of(user) in (*SPLITS, "slice")]
    ends = [u for part in parts for u in ([part] if name_of(part) == "slice" else part.users)]
    ends += [user for user in weight.users if user not in parts]
    rows = [end for end in ends if end not in weight.users or end in parts]
    if not parts or any(weight_rows(end) is not weight for end in rows):
        return False
    layers = [(user, end) for end in rows for user in end.users]
    layers += [(end, weight) for end in ends if end not in rows]
    return all(name_of(user) == "linear" and user.args[1] is read for user, read in layers)


def picked(program: Program, node: fx.Node) -> bool:
    """Whether a node is some of a stack of matrices, or weights turned around, for products only."""
    if node.op != "call_function" or not node.args or not isinstance(node.args[0], fx.Node):
        return False
    name, source = name_of(node), node.args[0]
    value = program.values.get(source)
    rank = value.dim() if source in program.parameters and isinstance(value, Tensor) else 0
    if rank == 2:
        return name in TURNS and all(name_of(u) == "linear" and u.args[1] is node for u in node.users)
    if name not in PICKS or not (rank == 3 or picked(program, source)):
        return False
    return _first_axis_only(node) and all(
        user.op == "call_function" and (name_of(user) in _READ_AS_WEIGHT or picked_by(program, user, node))
        for user in node.users
    )


def picked_by(program: Program, user: fx.Node, node: fx.Node) -> bool:
    """Whether a node is a further pick of one, whose own users are products."""
    return (
        name_of(user) in PICKS
        and user.args[0] is node
        and _first_axis_only(user)
        and all(name_of(last) in _READ_AS_WEIGHT for last in user.users if last.op == "call_function")
    )


def _first_axis_only(node: fx.Node) -> bool:
    name = name_of(node)
    if name == "select":
        return bool(node.args[1] == 0)
    if name == "index":
        return len(node.args[1]) == 1  # type: ignore[arg-type]
    return name != "index_select" or bool(node.args[1] == 0)


def behind(program: Program, source: fx.Node, axis: int) -> tuple[fx.Node, int]:
    """The stack of weights that a node is picked from, and the axis of it that an axis of the node is.

    Args:
        program: the network.
        source: the node; itself where it is not picked from a stack.
        axis: of it; negative ones count from the end.
    """
    while picked(program, source):
        rank = program.values[source].dim()
        before = program.values[source.args[0]].dim()  # type: ignore[index]
        axis = axis % rank
        if name_of(source) in TURNS:
            order = list(range(rank))
            axis = _turned(source, order)[axis]
        else:
            axis += before - rank
        source = source.args[0]  # type: ignore[assignment]
    return source, axis


def _turned(node: fx.Node, order: list[int]) -> list[int]:
    """Where each axis of a tensor that is turned around was before."""
    if name_of(node) == "permute":
        dims: Any = node.args[1]
        return [int(d) % len(order) for d in dims]
    pair: Any = node.args[1:3] if name_of(node) in ("transpose", "swapaxes", "swapdims") else (-2, -1)
    one, two = pair
    order[one], order[two] = order[two], order[one]
    return order


def reads_more(node: fx.Node) -> bool:
    """Whether more is read of an operation's results than the first, which is what it is for."""
    return any(u.users and (name_of(u) != "getitem" or u.args[1] != 0) for u in node.users)


def replaced(node: fx.Node, **values: Any) -> Call:
    """The call of a node as it stands, but for some arguments, by name."""
    schema = node.target._schema  # type: ignore[union-attr]
    args, kwargs = list(node.args), dict(node.kwargs)
    placed = [a for a in schema.arguments if not a.kwarg_only]
    last = max((i for i, a in enumerate(placed) if a.name in values and a.name not in kwargs), default=-1)
    for argument in placed[len(args) : last + 1]:
        args.append(kwargs.pop(argument.name, argument.default_value))
    for i, argument in enumerate(schema.arguments):
        if argument.name in values and i < len(args):
            args[i] = values[argument.name]
        elif argument.name in values:
            kwargs[argument.name] = values[argument.name]
    return Call(node.target, tuple(args), kwargs)


def _tensors(value: Any) -> bool:
    if isinstance(value, Tensor):
        return True
    return isinstance(value, list | tuple) and any(isinstance(v, Tensor) for v in value)


def _weighs(program: Program, node: fx.Node) -> bool:
    """Whether an operation reads a floating-point weight, or one that was turned around or normed."""
    return any(_is_weight(program, source) for source in node.all_input_nodes)


def _is_weight(program: Program, source: fx.Node) -> bool:
    source = weight_of(source)
    if source.op == "call_function" and name_of(source) in TURNS:
        source = source.args[0]  # type: ignore[assignment]
    return source in program.weights and can_train(program.weights[source])
