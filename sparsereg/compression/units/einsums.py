"""Products that are written as equations of letters, or outer ones, as products that all rules know."""

from __future__ import annotations

import itertools
import string

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
