"""Parameters and multiply-accumulate operations of what is left of a network, exact and expected.

Each weight costs the product of what stays along its axes; each product of tensors costs the product of
what stays along the axes over which it runs. So both are sums of products of sizes of lines.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, fx

from sparsereg.compression.macs import counting
from sparsereg.compression.units.branches import ALWAYS, Ways
from sparsereg.compression.units.einsums import written_out
from sparsereg.compression.units.labels import Ints
from sparsereg.compression.units.lines import Alternatives, Bools, Lines, Sizes
from sparsereg.compression.units.program import Program, bound, name_of, plain_call
from sparsereg.compression.units.rules.cells import CELLS
from sparsereg.compression.units.rules.recurrent import BLOCKS, Pass, goes_by_units, passes
from sparsereg.compression.units.rules.stacked import stack_of
from sparsereg.compression.units.rules.table import TURNS, weight_of
from sparsereg.compression.units.solve import Units

Axis = tuple[fx.Node, int]
"""An axis of a node's tensor or of a weight."""


@dataclass(frozen=True)
class Term:
    """A cost: a number times what stays along some lines.

    Attributes:
        node: the weight, or the operation.
        factor: the rest of the product.
        ways: position in the ways of which one has to be left for it to serve anybody.
        lines: positions in `Lines.lines`.
        apart: the same lines without the choices that all of them share, for expectations.
        common: position in `Lines.sets` of the choices that they share.
    """

    node: fx.Node
    factor: float
    ways: int
    lines: tuple[int, ...]
    apart: tuple[int, ...]
    common: int


class Costs:
    """Counts a network again and again while its choices change.

    Args:
        units: of the network.
    """

    def __init__(self, units: Units) -> None:
        self.units = units
        self.program: Program = units.labeller.program
        self._lines = Lines(units)
        self._of_labels: dict[fx.Node, list[Ints]] = {}
        self._ways = units.branches.ways()
        self._way_ids: dict[Ways, int] = {ALWAYS: 0}
        used = [n for n in self.program.weights if n in self.program.parameters and self._ways[n]]
        self.parameters = [self._term(n, 1.0, [(n, d) for d in range(n_dim(self.program, n))]) for n in used]
        self.macs = [t for node in self.program.calls if self._ways[node] for t in self._macs(node)]
        self._never_empty = self._lines_that_stay()
        self._projections = [self._projection(p) for node in self.program.calls for p in _projecting(node)]
        self.sizes = Sizes(self._lines, (branch.choice for branch in units.branches.found))
        self._serves = Alternatives(list(self._way_ids), self.sizes.place)
        self._arrays = {id(part): _Arrays(part) for part in (self.parameters, self.macs)}

    @cached_property
    def full(self) -> tuple[int, int]:
        """Parameters and multiply-accumulates of the whole network."""
        parameters, macs = self.exact(np.ones(len(self.choices), dtype=bool))
        computed = sum(
            made.parameters - self.program.values[node].numel() for node, made in self.program.made.items()
        )
        return int(parameters.sum()) + computed, int(macs.sum())

    @property
    def choices(self) -> list[int]:
        """The choices on which the costs depend, in order."""
        return self.sizes.choices

    def revived(self, stays: Bools) -> Bools:
        """Choices that stay where none would be left along an axis of a weight, a product or a sum.

        There the first one stays. So do the first hidden units of an LSTM with projections, which torch.nn
        wants to be more than these.
        """
        stays = stays.copy()
        counts = self.sizes.counts(stays)
        for line in self._never_empty[counts[self._never_empty] == 0].tolist():
            if counts[line] == 0:  # still, after others
                first = self._lines.sets[self._lines.lines[line][0]]
                stays[[self.sizes.place[c] for c in first]] = True
                counts = self.sizes.counts(stays)
        for units, projected in self._projections:
            for unit in self._lines.lines[units]:
                if counts[units] > counts[projected]:
                    break
                stays[[self.sizes.place[c] for c in self._lines.sets[unit]]] = True
                counts = self.sizes.counts(stays)
        for choices in self.units.branches.alternatives:
            own = [self.sizes.place[c] for c in choices]
            stays[own[0]] |= not stays[own].any()
        return stays

    def exact(self, stays: Bools) -> tuple[Ints, Ints]:
        """Parameters of each weight and multiply-accumulates of each product that stay.

        Args:
            stays: whether each choice stays, (choices,).
        """
        counts, serves = self.sizes.counts(stays), self._serves.any(stays)
        parameters, macs = (
            self._arrays[id(part)].exact(counts, serves) for part in (self.parameters, self.macs)
        )
        return parameters, macs

    def expected(self, p: Tensor) -> tuple[Tensor, Tensor]:
        """Expected parameters and multiply-accumulates, differentiable scalars.

        Args:
            p: probability that each choice stays, (choices,), float64.
        """
        parameters, macs = self.expected_terms(p)
        return parameters.sum(), macs.sum()

    def expected_terms(self, p: Tensor) -> tuple[Tensor, Tensor]:
        """Expected parameters of each weight, and multiply-accumulates of each product.

        Args:
            p: probability that each choice stays, (choices,), float64.
        """
        probability, counts = self.sizes.expected(p)
        serves = self._serves.expected(p)
        parts = (self._arrays[id(part)] for part in (self.parameters, self.macs))
        parameters, macs = (part.expected(probability, counts, serves) for part in parts)
        return parameters, macs

    def _lines_that_stay(self) -> Ints:
        """The lines of weights, products and sums: of each some place stays."""
        of_terms = (line for term in (*self.parameters, *self.macs) for line in term.lines)
        summed = dict.fromkeys(source for sources in self.units.labeller.reads for source in sources)
        tensors = (n for n in summed if isinstance(self.program.values[n], Tensor))
        axes = (self._line(n, d) for n in tensors for d in range(n_dim(self.program, n)))
        found = dict.fromkeys((*of_terms, *(self._lines.line(a) for a in axes if a.any())))
        return np.array([line for line in found if len(self._lines.lines[line])], dtype=np.int64)

    def _projection(self, one: Pass) -> tuple[int, int]:
        """The lines of what a projection reads, and of what it makes."""
        assert one.projection is not None
        read, made = (self._lines.line(self._line(one.projection, axis)) for axis in (1, 0))
        return read, made

    def _term(self, node: fx.Node, factor: float, axes: list[Axis]) -> Term:
        arrays = [self._line(*axis) for axis in axes]
        plain = math.prod(len(a) for a in arrays if not a.any())
        arrays = [a for a in arrays if a.any()]
        sets = self._lines.sets
        shared = [frozenset.intersection(*(sets[i] for i in np.unique(a))) for a in arrays]
        common = frozenset().union(*shared) if shared else frozenset()
        apart = [self._without(a, common) for a in arrays]
        return Term(
            node,
            factor * plain,
            self._way_ids.setdefault(self._ways[node], len(self._way_ids)),
            tuple(self._lines.line(a) for a in arrays),
            tuple(self._lines.line(a) for a in apart),
            self._lines.set_id(common),
        )

    def _without(self, line: Ints, common: frozenset[int]) -> Ints:
        if not common:
            return line
        ids = {int(i): self._lines.set_id(self._lines.sets[i] - common) for i in np.unique(line)}
        return np.array([ids[int(i)] for i in line])

    def _line(self, node: fx.Node, axis: int) -> Ints:
        if node not in self._of_labels:
            labels = self.units.labeller.axes.of.get(node)
            if node in self.program.weights:
                self._of_labels[node] = self._lines.of_weight(node)
            elif isinstance(labels, Tensor):
                self._of_labels[node] = self._lines.of_labels(labels)
            else:
                shape = self.program.values[node].shape
                self._of_labels[node] = [np.zeros(n, dtype=np.int64) for n in shape]
        return self._of_labels[node][axis % len(self._of_labels[node])]

    def _macs(self, node: fx.Node) -> list[Term]:
        """Products that a node computes, for one example."""
        name = name_of(node)
        share = 1.0 / self.program.batch
        if name in _PRODUCTS:
            return [self._term(node, share * f, axes) for f, axes in _PRODUCTS[name](self.program, node)]
        macs = _counted(self.program, node)
        return [self._term(node, macs * share, [])] if macs else []


def macs_of(program: Program, node: fx.Node) -> float:
    """Multiply-accumulates of an operation of the whole network, for one example."""
    name = name_of(node)
    if name not in _PRODUCTS:
        return _counted(program, node) / program.batch
    products = _PRODUCTS[name](program, node)
    sizes = [f * math.prod(program.values[n].shape[axis] for n, axis in axes) for f, axes in products]
    return float(sum(sizes) / program.batch)


class _Arrays:
    """Terms as arrays."""

    def __init__(self, terms: list[Term]) -> None:
        longest = max((len(t.lines) for t in terms), default=0)
        self.factor = np.array([t.factor for t in terms])
        self.lines = np.full((len(terms), longest), -1)
        self.apart = np.full((len(terms), longest), -1)
        for i, term in enumerate(terms):
            self.lines[i, : len(term.lines)] = term.lines
            self.apart[i, : len(term.apart)] = term.apart
        self.common = np.array([t.common for t in terms], dtype=np.int64)
        self.ways = np.array([t.ways for t in terms], dtype=np.int64)

    def exact(self, counts: Ints, serves: Bools) -> Ints:
        """Cost of each term."""
        factors = np.append(counts, 1)[self.lines].astype(np.float64)
        return np.asarray(np.rint(self.factor * factors.prod(1)).astype(np.int64) * serves[self.ways])

    def expected(self, probability: Tensor, counts: Tensor, serves: Tensor) -> Tensor:
        """Expected cost of each term."""
        device = counts.device
        factors = torch.cat([counts, counts.new_ones(1)])[torch.from_numpy(self.apart).to(device)].prod(1)
        shared = probability[torch.from_numpy(self.common).to(device)]
        shared = shared * serves[torch.from_numpy(self.ways).to(device)]
        return torch.from_numpy(self.factor).to(counts) * shared * factors


def n_dim(program: Program, node: fx.Node) -> int:
    """Number of axes of a node's tensor."""
    return int(program.values[node].dim())


def _all(program: Program, node: fx.Node) -> list[Axis]:
    return [(node, d) for d in range(n_dim(program, node))]


def _projecting(node: fx.Node) -> list[Pass]:
    """The layers and directions of an LSTM with projections."""
    if name_of(node) not in BLOCKS or not goes_by_units(node):
        return []
    return [one for one in passes(node) if one.projection is not None]


Products = list[tuple[float, list[Axis]]]


def _linear(program: Program, node: fx.Node) -> Products:
    a = bound(node)
    return [(1.0, [*_all(program, node), _read(program, (a["weight"], -1), (a["input"], -1))])]


def _addmm(program: Program, node: fx.Node) -> Products:
    a = bound(node)
    return [(1.0, [*_all(program, node), _read(program, (a["mat2"], 0), (a["mat1"], -1))])]


def _read(program: Program, weight: Axis, source: Axis) -> Axis:
    """The axis over which a layer sums: of its weight, as a tensor may hold other units at other places."""
    stored = weight_of(weight[0])
    return (stored, weight[1]) if stored in program.weights else source


def _matmul(program: Program, node: fx.Node) -> Products:
    stack = stack_of(program, node)
    if stack is not None:
        source, letters = stack.source
        return [(1.0, [*_all(program, node), (source, letters.index(stack.summed))])]
    left, right = (a for a in node.args[:2] if isinstance(a, fx.Node))
    turned = left.op == "call_function" and name_of(left) in TURNS and left.args[0] in program.weights
    read = (right, -2) if turned and program.values[right].dim() > 1 else (left, -1)
    return [(1.0, [*_all(program, node), read])]


def _convolution(program: Program, node: fx.Node) -> Products:
    a = bound(node)
    weight = a["weight"]
    taps = math.prod(program.values[weight].shape[2:])
    transposed = "transpose" in name_of(node) or bool(a.get("transposed"))
    return [(float(taps), [*_all(program, a["input"] if transposed else node), (weight_of(weight), 1)])]


def _attention(program: Program, node: fx.Node) -> Products:
    a = bound(node)
    query, key = a["query"], a["key"]
    return [(1.0, [*_all(program, query), (key, -2)]), (1.0, [*_all(program, node), (key, -2)])]


def _einsum(program: Program, node: fx.Node) -> Products:
    if stack_of(program, node) is not None:
        return _matmul(program, node)
    a = bound(node)
    operands = a["tensors"]
    if len(operands) != 2:
        return [(float(_counted(program, node)), [])]
    one, two, out = written_out(str(a["equation"]), [n_dim(program, n) for n in operands])
    # What is summed of one factor alone is summed before; a product without a sum does not count.
    shared = {*one} & {*two}
    if shared <= {*out}:
        return []
    where: dict[str, Axis] = {}
    for letters, operand in zip((one, two), operands, strict=True):
        for d, letter in enumerate(letters):
            long = letter not in where or program.values[operand].shape[d] > 1
            if long and letter in {*out} | shared:
                where[letter] = (operand, d)
    return [(1.0, list(where.values()))]


def _bilinear(program: Program, node: fx.Node) -> Products:
    a = bound(node)
    return [(1.0, [*_all(program, node), (a["input1"], -1), (a["input2"], -1)])]


def _layers(program: Program, node: fx.Node) -> Products:
    """Every step of a recurrent layer applies every matrix once."""
    source = bound(node)["input"] if "input" in bound(node) else bound(node)["data"]
    steps = [(source, d) for d in range(n_dim(program, source) - 1)]
    matrices = [w for w in bound(node)["params"] if program.values[w].dim() == 2]
    return [(1.0, [*steps, (w, 0), (w, 1)]) for w in matrices]


def _cell(program: Program, node: fx.Node) -> Products:
    """One step applies both matrices."""
    a = bound(node)
    examples = [(a["input"], d) for d in range(n_dim(program, a["input"]) - 1)]
    return [(1.0, [*examples, (w, 0), (w, 1)]) for w in (a["w_ih"], a["w_hh"])]


_PRODUCTS: dict[str, Callable[[Program, fx.Node], Products]] = {
    "linear": _linear,
    "addmm": _addmm,
    "scaled_dot_product_attention": _attention,
    "einsum": _einsum,
    "bilinear": _bilinear,
    **dict.fromkeys(BLOCKS, _layers),
    **dict.fromkeys(CELLS, _cell),
    **dict.fromkeys(("matmul", "bmm", "mm", "mv", "dot"), _matmul),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "convolution", "deform_conv2d"), _convolution),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), _convolution),
}
"""Over which axes each kind of product runs."""


def _counted(program: Program, node: fx.Node) -> float:
    """Multiply-accumulates of any other operation, as PyTorch counts them."""
    if not any(n in program.weights for n in node.all_input_nodes) and name_of(node) not in _MAY_COUNT:
        return 0.0
    args, kwargs = (
        fx.node.map_aggregate(
            part,
            lambda leaf: program.values[leaf] if isinstance(leaf, fx.Node) else leaf,
        )
        for part in (node.args, node.kwargs)
    )
    with torch.no_grad(), counting() as counter:
        plain_call(node, args, kwargs)
    return counter.get_total_flops() / 2


_MAY_COUNT = ("addbmm", "chain_matmul", "tensordot", "multi_head_attention_forward", "_trilinear")
"""Operations without weights that PyTorch counts."""
