"""Recurrent layers (LSTM, GRU, RNN), layer by layer and direction by direction.

A hidden unit whose candidate is zero at every step stays zero if it starts at zero: the cell of an LSTM
is then f 0 + i 0, the state of a GRU (1 - u) 0 + u 0. So the rows of the candidate take the gate.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from sparsereg.compression.units.labels import Ints, along
from sparsereg.compression.units.program import Call, bound, name_of
from sparsereg.compression.units.rules.table import ZEROS, Dead, Labeller, Smaller, replaced, rule, weight_of

BLOCKS = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}
"""Blocks of rows that the weights of each kind have."""
CANDIDATE = {"lstm": 2, "gru": 2, "rnn_tanh": 0, "rnn_relu": 0}
"""Which of the blocks makes what is written into the state."""
KINDS: dict[str, type[nn.RNNBase]] = {
    "lstm": nn.LSTM,
    "gru": nn.GRU,
    "rnn_tanh": nn.RNN,
    "rnn_relu": nn.RNN,
}


@dataclass(frozen=True)
class Pass:
    """The weights of one layer in one direction.

    Attributes:
        layer: number of the layer.
        reverse: whether it runs from the end.
        rows: those with a row for each unit of each block, those that read the input and the state first.
        projection: makes the state from the units; None without.
    """

    layer: int
    reverse: bool
    rows: tuple[fx.Node, ...]
    projection: fx.Node | None

    @property
    def all(self) -> tuple[fx.Node, ...]:
        """All of them, in order."""
        return self.rows if self.projection is None else (*self.rows, self.projection)


def passes(node: fx.Node) -> Iterator[Pass]:
    """The layers and directions of a recurrent operation, in order."""
    a = bound(node)
    weights, layers = list(a["params"]), int(a["num_layers"])
    directions = 2 if a["bidirectional"] else 1
    each = len(weights) // (layers * directions)
    rows = 4 if a["has_biases"] else 2
    for i in range(layers * directions):
        own = weights[i * each : (i + 1) * each]
        projection = own[rows] if len(own) > rows else None
        yield Pass(i // directions, i % directions == 1, tuple(own[:rows]), projection)


def goes_by_units(node: fx.Node) -> bool:
    """Whether hidden units can go: the states that an operation is given are zeros, no weight is computed."""
    a = bound(node)
    if "batch_sizes" in a or "hx" not in a or any(w.op != "placeholder" for w in a["params"]):
        return False
    states = a["hx"] if isinstance(a["hx"], list | tuple) else [a["hx"]]
    return all(isinstance(s, fx.Node) and name_of(s) in ZEROS for s in states)


def last_states(node: fx.Node) -> list[fx.Node]:
    """The tensors of last states that somebody reads."""
    return [u for u in node.users if u.users and name_of(u) == "getitem" and u.args[1] != 0]


def apart(state: Any) -> bool:
    """Whether a node holds last states of a recurrent layer that are only taken one by one."""
    if not isinstance(state, fx.Node) or state.op != "call_function" or name_of(state) != "getitem":
        return False
    if not isinstance(state.args[0], fx.Node) or name_of(state.args[0]) not in BLOCKS:
        return False
    return bool(state.args[1] != 0) and all(
        name_of(u) == "select" and bound(u)["dim"] == 0 for u in state.users
    )


def _call(cut: Smaller, node: fx.Node, a: dict[str, Any]) -> Call:
    """Layer by layer, each of its own size."""
    whole = all(cut.weights[w].shape == cut.program.values[w].shape for p in passes(node) for w in p.all)
    if whole or not goes_by_units(node):
        return replaced(node)
    found = [list(p.all) for p in passes(node)]
    one_by_one = all(apart(state) for state in last_states(node))
    settings = (bool(a["has_biases"]), bool(a["bidirectional"]), bool(a["batch_first"]), one_by_one)
    return Call(run_layers, (node.target, node.args[0], found, *settings))


def run_layers(
    operation: Any,
    x: Tensor,
    weights: list[list[Tensor]],
    has_biases: bool,
    bidirectional: bool,
    batch_first: bool,
    one_by_one: bool,
) -> tuple[Any, ...]:
    """Run layers whose sizes may differ, from states of zeros.

    Args:
        operation: that of one layer.
        x: (steps, batch, features), or (batch, steps, features).
        weights: of each layer and direction.
        has_biases: whether two of the weights are biases.
        bidirectional: whether each layer runs in both directions.
        batch_first: the layout of ``x``.
        one_by_one: whether last states are returned as a list.
    """
    steps, batch = (1, 0) if batch_first else (0, 1)
    lasts: list[list[Tensor]] = []
    directions = 2 if bidirectional else 1
    for layer in range(len(weights) // directions):
        outs = []
        for reverse in range(directions):
            own = weights[layer * directions + reverse]
            states = [x.new_zeros(1, x.shape[batch], own[1].shape[1])]
            if "lstm" in str(operation):
                states.append(x.new_zeros(1, x.shape[batch], own[0].shape[0] // 4))
            start = states if len(states) > 1 else states[0]
            source = x.flip(steps) if reverse else x
            settings = (has_biases, 1, 0.0, False, False, batch_first)
            out, *last = operation(source, start, own, *settings)
            outs.append(out.flip(steps) if reverse else out)
            lasts.append([state[0] for state in last])
        x = torch.cat(outs, -1)
    parts = [list(part) for part in zip(*lasts, strict=True)]
    apart = [one_by_one or len({state.shape for state in part}) > 1 for part in parts]
    return (x, *(part if alone else torch.stack(part) for part, alone in zip(parts, apart, strict=True)))


@rule(*BLOCKS, call=_call)
def recurrent(x: Labeller, node: fx.Node, a: dict[str, Any]) -> Any:
    """Each hidden unit with its rows in all blocks and with what reads it."""
    if not goes_by_units(node):
        return kept(x, node)
    columns = tuple((one.rows[0], 1) for one in passes(node) if one.layer == 0)
    read = x.read(node.args[0], (2,), node, name_of(node), columns=columns)
    states: list[Ints] = []
    cells: list[Ints] = []
    layers: dict[int, list[Ints]] = {}
    for one in passes(node):
        source = read if one.layer == 0 else np.concatenate(layers[one.layer - 1])
        units, state = _one_pass(x, node, one, source)
        layers.setdefault(one.layer, []).append(state)
        states.append(state)
        cells.append(units)
    x.reads.append((node,))
    x.dead[node] = Dead.ZERO
    shapes = [value.shape for value in x.program.values[node]]
    made = [along(np.concatenate(layers[max(layers)]), 2, shapes[0])]
    for parts, shape in zip((states, cells), shapes[1:], strict=False):
        labels = torch.from_numpy(np.stack(parts)).int().unsqueeze(1).expand(shape)
        made.append(labels)
    for last in last_states(node):
        if not apart(last):  # one tensor holds them, so that all are of one size
            x.axes.shapes.append((node, made[int(last.args[1])]))  # type: ignore[arg-type]
    return tuple(made)


def _one_pass(x: Labeller, node: fx.Node, one: Pass, source: Ints) -> tuple[Ints, Ints]:
    """Units of one layer in one direction, and those of its state."""
    name = name_of(node)
    rows = x.weight(one.rows[0], 0, None, node)
    blocks = rows.reshape(BLOCKS[name], -1)
    units = blocks[CANDIDATE[name]]
    x.axes.equal(blocks, np.broadcast_to(units, blocks.shape), name, node)
    x.weight(one.rows[0], 1, source, node)
    for weight in one.rows[1:]:
        x.weight(weight, 0, rows, node)
    state = units
    if one.projection is not None:
        x.weight(one.projection, 1, units, node)
        state = x.weight(one.projection, 0, None, node)
    x.weight(one.rows[1], 1, state, node)
    return units, state


def kept(x: Labeller, node: fx.Node) -> None:
    """All that a recurrent operation touches stays."""
    why = f"{name_of(node)} starts from states that are not zeros, or its weights are computed"
    for source in map(weight_of, node.all_input_nodes):
        if source in x.program.weights:
            x.keep_weight(source, why, node)
        else:
            x.fix(source, why, node)


def taken(node: fx.Node) -> Call | None:
    """How one of the last states is taken, where these are a list."""
    if not apart(node.args[0]):
        return None
    return Call(operator.getitem, (node.args[0], bound(node)["index"]))


def candidate_rows(name: str, size: int) -> tuple[int, int]:
    """First and last row (exclusive) of the block that makes what is written into the state."""
    each = size // BLOCKS[name]
    return CANDIDATE[name] * each, (CANDIDATE[name] + 1) * each
