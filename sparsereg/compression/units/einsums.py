"""Products that are written as equations of letters, or outer ones, as products that all rules know."""

from __future__ import annotations

import itertools
import math
import string
from collections.abc import Collection
from typing import Any, cast

import torch
from torch import fx


def in_pairs(graph: fx.Graph) -> None:
    """Let a product of three tensors or more be one of two after the other, as PyTorch computes it."""
    for node in [n for n in graph.nodes if n.target is torch.ops.aten.einsum.default]:
        equation, tensors = str(node.args[0]), list(node.args[1])
        if len(tensors) < 3:
            continue
        shapes = [t.meta["val"].shape for t in tensors]
        *letters, out = written_out(equation, [len(shape) for shape in shapes])
        pairs = zip("".join(letters), itertools.chain(*shapes), strict=True)
        size = {letter: n for letter, n in pairs if not (isinstance(n, int) and n == 1)}
        made, read = tensors[0], letters[0]
        for i, (tensor, own) in enumerate(zip(tensors[1:], letters[1:], strict=True), start=2):
            later = {*out}.union(*letters[i:])
            left = "".join(c for c in dict.fromkeys(read + own) if c in later) if i < len(tensors) else out
            with graph.inserting_before(node):
                made = graph.call_function(node.target, (f"{read},{own}->{left}", [made, tensor]))
            value = node.meta["val"].new_empty([size.get(c, 1) for c in left])
            made.meta, read = {**node.meta, "val": value}, left
        node.replace_all_uses_with(made)
        graph.erase_node(node)


def with_matrices(graph: fx.Graph, weights: Collection[str]) -> None:
    """Let products with weights that sum over several axes, or make several, be linear layers.

    Args:
        graph: changed in place.
        weights: names of the nodes that are weights.
    """
    for node in [n for n in graph.nodes if n.target is torch.ops.aten.tensordot.default]:
        _let_equation(node)
    for node in [n for n in graph.nodes if n.target is torch.ops.aten.einsum.default]:
        tensors: Any = list(node.args[1])
        *letters, out = written_out(str(node.args[0]), [t.meta["val"].dim() for t in tensors])
        if len(tensors) == 1:
            _let_turn(graph, node, (tensors[0], letters[0]), out)
        for one, two in itertools.permutations(zip(tensors, letters, strict=True), 2):
            if one[0].name in weights and two[0].name not in weights and len(tensors) == 2:
                _let_layer(graph, node, one, two, out)


def _let_equation(node: fx.Node) -> None:
    """Let a product over axes that are named be an equation of letters."""
    one, two, axes, others = cast("tuple[Any, ...]", node.args[:4])
    ranks = [n.meta["val"].dim() for n in (one, two)]
    first = string.ascii_letters[: ranks[0]]
    second = list(string.ascii_letters[ranks[0] : sum(ranks)])
    for a, b in zip(axes, others, strict=True):
        second[b] = first[a]
    out = "".join(c for c in (*first, *second) if (c in first) is not (c in second))
    node.target, node.args = torch.ops.aten.einsum.default, (f"{first},{''.join(second)}->{out}", [one, two])


Factor = tuple[fx.Node, str]
"""A tensor with a letter for each of its axes."""


def _let_layer(graph: fx.Graph, node: fx.Node, weight: Factor, source: Factor, out: str) -> None:
    """Let a product with a weight of several axes on one side be a linear layer with a matrix.

    A stack of matrices, one for each place along the weight's first axis, stays.
    """
    (tensor, own), (read, letters) = weight, source
    size = dict(zip(own, tensor.meta["val"].shape, strict=True))
    summed, made = [c for c in own if c not in out], [c for c in own if c in out]
    left = [c for c in letters if c not in summed]
    if not _is_dense(weight, source, out) or not (len(summed) > 1 or (len(made) > 1 and own[0] in summed)):
        return
    aten, sizes = torch.ops.aten, [math.prod(size[c] for c in part) for part in (made, summed)]
    with graph.inserting_before(node):
        rows = step(graph, node, aten.permute.default, read, [letters.index(c) for c in left + summed])
        rows = step(graph, node, aten.flatten.using_ints, rows, len(left), -1)
        matrix = step(graph, node, aten.permute.default, tensor, [own.index(c) for c in made + summed])
        matrix = step(graph, node, aten.reshape.default, matrix, sizes)
        found = step(graph, node, aten.linear.default, rows, matrix)
        found = step(graph, node, aten.unflatten.int, found, -1, [size[c] for c in made])
        found = step(graph, node, aten.permute.default, found, [(left + made).index(c) for c in out])
    node.replace_all_uses_with(found)
    graph.erase_node(node)


def _let_turn(graph: fx.Graph, node: fx.Node, source: Factor, out: str) -> None:
    """Let an equation of one tensor, which sums over axes and turns others around, be these operations."""
    read, own = source
    if len(set(own)) < len(own):  # a diagonal
        return
    left, gone = [c for c in own if c in out], [own.index(c) for c in own if c not in out]
    with graph.inserting_before(node):
        if gone:
            read = step(graph, node, torch.ops.aten.sum.dim_IntList, read, gone)
    node.target, node.args = torch.ops.aten.permute.default, (read, [left.index(c) for c in out])


def _is_dense(weight: Factor, source: Factor, out: str) -> bool:
    """Whether each axis of a weight is summed over or made, and nothing else is summed over or made."""
    (tensor, own), (read, letters) = weight, source
    summed, made = set(own) - set(out), set(own) & set(out)
    distinct = all(len(set(x)) == len(x) for x in (own, letters, out))
    alone = set(letters) & set(own) == summed and set(letters) - summed == set(out) - made
    shapes = tensor.meta["val"].shape, read.meta["val"].shape
    if not (distinct and alone and summed and made):
        return False
    return all(shapes[0][own.index(c)] == shapes[1][letters.index(c)] for c in summed)


def step(graph: fx.Graph, node: fx.Node, target: Any, *args: Any) -> fx.Node:
    """A new operation at the place of a node."""
    made = graph.call_function(target, args)
    made.meta = {**node.meta, "val": target(*fx.node.map_arg(args, lambda n: n.meta["val"]))}
    return made


def outer_as_products(graph: fx.Graph) -> None:
    """Let an outer product be one of a column and a row, element by element."""
    aten = torch.ops.aten
    for node in [n for n in graph.nodes if n.target in (aten.outer.default, aten.ger.default)]:
        column, row = node.args
        with graph.inserting_before(node):
            wide = graph.call_function(aten.unsqueeze.default, (column, 1))
        wide.meta = {**node.meta, "val": column.meta["val"].unsqueeze(1)}
        node.target, node.args = aten.mul.Tensor, (wide, row)


def written_out(equation: str, ranks: list[int]) -> list[str]:
    """The letters of each factor of an einsum and of its result, with some for what dots stand for.

    Args:
        equation: of the einsum.
        ranks: number of axes of each factor.

    Example:
        >>> written_out("...ij, jk", [4, 2])
        ['abij', 'jk', 'abik']
    """
    sides, arrow, out = equation.replace(" ", "").partition("->")
    factors = sides.split(",")
    dotted = [rank - len(f) + 3 for f, rank in zip(factors, ranks, strict=True) if "..." in f]
    dots = "".join([c for c in string.ascii_letters if c not in equation][: max(dotted, default=0)])
    if not arrow:
        once = sorted(c for c in set(sides) - {",", "."} if sides.count(c) == 1)
        out = "..." * bool(dotted) + "".join(once)
    own = [dots[len(dots) - (rank - len(f) + 3) :] for f, rank in zip(factors, ranks, strict=True)]
    return [*(f.replace("...", d) for f, d in zip(factors, own, strict=True)), out.replace("...", dots)]
