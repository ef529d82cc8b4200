"""Weights of several experts in one tensor: the last two axes are those of a matrix, one for each expert.

Products read them whole, expert by expert, or picked by numbers that the data decide on. The experts are as
large as each other: a unit goes in all of them. Which experts there are stays.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

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
    read = _letters(program, node)
    if read is None:
        return None
    left, right, out = read
    for (weight, own), (source, letters) in ((right, left), (left, right)):
        base = _base(program, weight)
        if base is None or _base(program, source) is not None:
            continue
        axis = {x: behind(program, weight, i)[1] for i, x in enumerate(own)}
        inside = [x for x in own if axis[x] or program.values[weight].dim() < program.values[base].dim()]
        summed = [x for x in inside if x in letters and x not in out]
        made = [x for x in inside if x in out and x not in letters]
        if len(summed) == len(made) == 1:
            at, into = axis[made[0]], axis[summed[0]]
            return Stack(base, at, into, (source, letters), summed[0], out, made[0])
    return None


def _base(program: Program, node: Any) -> fx.Node | None:
    """The stack that a node is, or is picked from; None if it is neither."""
    if not isinstance(node, fx.Node):
        return None
    found, _ = behind(program, node, -1)
    stacked = found in program.parameters and program.values[found].dim() > 2
    return found if stacked else None


def _letters(program: Program, node: fx.Node) -> tuple[Operand, Operand, str] | None:
    """Both factors with letters for their axes, and those of the product."""
    if name_of(node) == "einsum":
        a = bound(node)
        equation, operands = str(a["equation"]).replace(" ", ""), a["tensors"]
        if len(operands) != 2 or "." in equation or "->" not in equation:
            return None
        sides, out = equation.split("->")
        one, two = sides.split(",")
        return (operands[0], one), (operands[1], two), out
    ranks = [program.values[n].dim() for n in node.args[:2] if isinstance(n, fx.Node)]
    if len(ranks) != 2 or min(ranks) < 2:
        return None
    batch = "ABCDEFGH"
    one, two = (batch[10 - r : 8] + own for r, own in zip(ranks, ("mk", "kn"), strict=True))
    return (node.args[0], one), (node.args[1], two), max(one[:-2], two[:-2], key=len) + "mn"


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
