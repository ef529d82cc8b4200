"""Recurrent cells that a network calls step by step, and the zeros from which their states start."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from torch import Tensor, fx

from sparsereg.compression.units.labels import FIRST, Labels, along
from sparsereg.compression.units.program import Call, bound, name_of
from sparsereg.compression.units.rules.moves import left_of
from sparsereg.compression.units.rules.recurrent import BLOCKS, CANDIDATE, kept
from sparsereg.compression.units.rules.table import STARTS, Dead, Labeller, Smaller, replaced, rule

CELLS = {f"{kind}_cell": kind for kind in BLOCKS}
"""The kind of recurrent layer of each kind of cell."""


def rows_of_cell(node: fx.Node) -> list[fx.Node]:
    """The weights of a cell with a row for each unit of each block."""
    found = [bound(node)[key] for key in ("w_ih", "w_hh", "b_ih", "b_hh")]
    return [weight for weight in found if weight is not None]


@rule(*CELLS)
def cell(x: Labeller, node: fx.Node, a: dict[str, Any]) -> Any:
    """One step: each hidden unit with its rows in all blocks, its state before and what reads it."""
    states = a["hx"] if isinstance(a["hx"], list | tuple) else [a["hx"]]
    able = all(x.has_units(s) and x.dead.get(s, Dead.ZERO) is Dead.ZERO for s in states)
    if not able or any(bool((x.labels(s) < FIRST).any()) for s in states):
        return kept(x, node)
    name, rank = name_of(node), x.program.values[a["input"]].dim()
    read = x.read(a["input"], (rank - 1,), node, name, columns=((a["w_ih"], 1),))
    rows = x.weight(a["w_ih"], 0, None, node)
    blocks = rows.reshape(BLOCKS[CELLS[name]], -1)
    units = blocks[CANDIDATE[CELLS[name]]]
    x.axes.equal(blocks, np.broadcast_to(units, blocks.shape), name, node)
    x.weight(a["w_ih"], 1, read, node)
    x.weight(a["w_hh"], 1, units, node)
    for weight in rows_of_cell(node)[1:]:
        x.weight(weight, 0, rows, node)
    for state in states:
        x.axes.equal(x.axes.reduce(x.labels(state), (rank - 1,), name, node), units, name, node)
    x.reads.append((node,))
    x.dead[node] = Dead.ZERO
    value = x.program.values[node]
    if isinstance(value, Tensor):
        return along(units, rank - 1, value.shape)
    return tuple(along(units, rank - 1, part.shape) for part in value)


def _zeros_call(cut: Smaller, node: fx.Node, a: dict[str, Any]) -> Call:
    labels = cut.labels[node]
    sizes = bound(node)["size"]  # sizes that differ from call to call are nodes there
    return replaced(node, size=[left_of(cut, labels, i, size) for i, size in enumerate(sizes)])


@rule(*STARTS, call=_zeros_call)
def zeros(x: Labeller, node: fx.Node, a: dict[str, Any]) -> Labels | None:
    """A state to start from: nothing is lost where its units are gone."""
    value = x.program.values[node]
    axes = {axis % value.dim() for axis in _read_along(node)} or {
        x.starts[n] for n in (node,) if n in x.starts
    }
    if len(axes) != 1 or value.shape[min(axes)] < 2:
        return None
    x.dead[node] = Dead.ZERO
    return along(x.axes.sets.new(value.shape[min(axes)]), min(axes), value.shape)


def _read_along(node: fx.Node) -> Iterator[int]:
    """The axes along which cells, layers and convolutions read a tensor, be it beside others."""
    for user in node.users:
        name = name_of(user) if user.op == "call_function" else ""
        if name in CELLS or (name == "linear" and user.args[0] is node):
            yield -1
        elif name in ("conv1d", "conv2d", "conv3d") and user.args[0] is node:
            yield 1
        elif name == "deform_conv2d" and bound(user)["bias"] is node:  # torchvision's place of none
            yield 0
        elif name == "cat":
            yield from _read_along(user)
