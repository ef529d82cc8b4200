"""Weights in one tensor that products read: of several experts, say, or one matrix in an einsum.

Of more than two axes the last two are those of a matrix, one for each expert, unless letters say others.

Products read them whole, expert by expert, or picked by numbers that the data decide on. The experts are as
large as each other: a unit goes in all of them. Which experts there are: ``experts``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from sparsereg.compression.units.einsums import written_out
from sparsereg.compression.units.labels import Labels, along
from sparsereg.compression.units.program import Program, bound, name_of
from sparsereg.compression.units.rules.table import Dead, Labeller, behind

Operand = tuple[Any, str]
_PRODUCTS = ("matmul", "bmm", "einsum")


@dataclass(frozen=True)
class Stack:
    """A product with a stack of weights.

    Attributes:
        weight: the stack.
        made: its axis of units that the product makes.
        read: its axis of units that are summed over.
        source: what is multiplied, and a letter for each of its axes.
        summed: letter of the axis that is summed over.
        out: letters of the result.
        unit: that of the units that are made.
    """

    weight: fx.Node
    made: int
    read: int
    source: Operand
    summed: str
    out: str
    unit: str


def stack_of(program: Program, node: fx.Node) -> Stack | None:
    """Recognise a product with a stack of weights; None for any other operation."""
    if node.op != "call_function" or name_of(node) not in _PRODUCTS:
        return None
    read = letters_of(program, node)
    if read is None:
        return None
    left, right, out = read
    for (weight, own), (source, letters) in ((right, left), (left, right)):
        least = 2 if name_of(node) == "einsum" else 3
        base = _base(program, weight, least)
        if base is None or _base(program, source, least) is not None:
            continue
        axis = {x: behind(program, weight, i)[1] for i, x in enumerate(own)}
        stack = program.values[base].dim() > 2
        for inside in (own, [x for x in own if axis[x] > 0]) if stack else (own,):
            summed = [x for x in inside if x in letters and x not in out]
            made = [x for x in inside if x in out and x not in letters]
            over = [x for x in own if x in letters and x not in out]
            # One matrix that sums over another axis than the last mixes places, whose units pass.
            layer = len(own) > 2 or summed == [letters[-1]]
            if len(summed) == len(made) == 1 and summed == over and layer:
                at, into = axis[made[0]], axis[summed[0]]
                return Stack(base, at, into, (source, letters), summed[0], out, made[0])
    return None


def _base(program: Program, node: Any, least: int) -> fx.Node | None:
    """The stack of so many axes that a node is, or is picked from; None if it is neither."""
    if not isinstance(node, fx.Node):
        return None
    found, _ = behind(program, node, -1)
    stacked = found in program.parameters and program.values[found].dim() >= least
    return found if stacked else None


def letters_of(program: Program, node: fx.Node) -> tuple[Operand, Operand, str] | None:
    """Both factors with letters for their axes, and those of the product; None of a product of another kind.

    Args:
        program: the network.
        node: a matrix product or an einsum.
    """
    a = bound(node)
    sources: Any = a["tensors"] if name_of(node) == "einsum" else node.args[:2]
    ranks = [program.values[n].dim() for n in sources]
    if len(ranks) != 2:
        return None
    if name_of(node) == "einsum":
        one, two, out = written_out(str(a["equation"]), ranks)
    else:
        one, two = ("k" if r == 1 else _BATCH[10 - r :] + m for r, m in zip(ranks, ("mk", "kn"), strict=True))
        out = max(one[:-2], two[:-2], key=len) + "m" * (ranks[0] > 1) + "n" * (ranks[1] > 1)
    distinct = all(len(set(letters)) == len(letters) for letters in (one, two, out))
    return ((sources[0], one), (sources[1], two), out) if distinct else None


_BATCH = "ABCDEFGH"


def stacked(x: Labeller, node: fx.Node, stack: Stack) -> Labels:
    """Labels of a product with a stack of weights."""
    source, letters = stack.source
    columns = ((stack.weight, stack.read),)
    units = x.read(source, (letters.index(stack.summed),), node, name_of(node), columns=columns)
    x.weight(stack.weight, stack.read, units, node)
    made = x.weight(stack.weight, stack.made, None, node)
    x.dead[node] = Dead.ZERO
    value = x.program.values[node]
    assert isinstance(value, Tensor)
    return along(made, stack.out.index(stack.unit), value.shape)
