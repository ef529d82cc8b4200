"""The order in which units go when each leaves least behind that a repair cannot make good.

Without the unit, every layer that reads it is fitted anew to what it gave; what that leaves over is known in
closed form from the inverse of the covariance of its inputs, which is brought up to date as units go. So
of units that say the same, one stays.

Source: B. Hassibi, D. Stork, "Second order derivatives for network pruning: Optimal Brain Surgeon", 1992;
here for whole units, and for the answers of layers in place of the loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from sparsereg.compression.compact import compact
from sparsereg.compression.oneshot.least_squares import Sums
from sparsereg.compression.oneshot.readers import Reader, readers
from sparsereg.compression.units.structure import Structure
from sparsereg.compression.walk import Route

RIDGE = 1e-3
"""Added to the covariance, as a share of the mean variance of an input."""
_ROUNDING = 1e-12
"""Share of the mean square of an input below which a variance is none."""
LARGEST = 2**28
"""Numbers in the covariances of all layers together, up to which this is done: 2 GiB."""
ROWS = 8192
"""Rows of a layer that are drawn of more."""


def leftover(
    network: nn.Module, structure: Structure, example: Any, batches: Sequence[Any], slopes: dict[str, Tensor]
) -> dict[str, Tensor] | None:
    """Return when each unit goes: the place in the order, NaN for units that no layer sums over.

    Args:
        network: with all gates of ``structure`` open, in eval mode.
        structure: of it.
        example: see ``compact``.
        batches: of inputs.
        slopes: what each gate's unit costs, by the path of the gates.

    Returns:
        By the path of the gates, float64; None if the layers are too wide for this.
    """
    tables = _tables(network, structure, example, batches)
    if tables is None:
        return None
    starts, total = {}, 0
    for path in structure.paths:
        starts[path], total = total, total + slopes[path].numel()
    cost = torch.cat([slopes[path].double().flatten().cpu() for path in structure.paths]).clamp(min=1e-12)
    error = torch.full((total,), torch.nan, dtype=torch.float64)
    seen = [[starts[path] + place for path, place in table.gates] for table in tables]
    order = torch.full((total,), torch.nan, dtype=torch.float64)
    readers_of: dict[int, list[tuple[int, int]]] = {}
    for t, own in enumerate(seen):
        for group, gate in enumerate(own):
            readers_of.setdefault(gate, []).append((t, group))
    scores = [table.scores() for table in tables]
    for gate, where in readers_of.items():
        error[gate] = sum(scores[t][g] for t, g in where)
    for step in range(len(readers_of)):
        ratio = (error / cost).nan_to_num(nan=torch.inf)
        gone = int(ratio.argmin())
        order[gone] = step
        error[gone] = torch.nan
        for t, group in readers_of[gone]:
            tables[t].remove(group)
            new = tables[t].scores()
            for other, gate in enumerate(seen[t]):
                error[gate] += new[other] - scores[t][other]
            scores[t] = new
    return {p: order[starts[p] : starts[p] + slopes[p].numel()] for p in structure.paths}


class _Table:
    """What is known of the inputs of one layer, or of several that read the same.

    Args:
        sums: over the inputs and the constant 1, of one group.
        weights: of each layer, (inputs, outputs), float64.
        columns: for each gate the inputs that go with it.
    """

    def __init__(self, sums: Sums, weights: Sequence[Tensor], columns: dict[Any, list[int]]) -> None:
        gram = sums.gram[0]
        mean = gram[:-1, -1:]
        covariance = gram[:-1, :-1] - mean @ mean.T / gram[-1, -1]
        # Inputs that do not vary, those of one example say, leave rounding alone.
        least = _ROUNDING * gram.diagonal()[:-1].mean() + torch.finfo(gram.dtype).tiny / RIDGE
        size = covariance.diagonal().mean().clamp(min=least)
        totals = [(w * (covariance @ w)).sum().clamp(min=1e-30) for w in weights]
        self.weights = torch.cat([w / total.sqrt() for w, total in zip(weights, totals, strict=True)], 1)
        covariance.diagonal().add_(RIDGE * size)
        self.inverse = torch.linalg.inv(covariance)
        self.gates = list(columns)
        self.columns = [torch.tensor(c, device=gram.device) for c in columns.values()]
        by_size: dict[int, list[int]] = {}
        for group, own in enumerate(self.columns):
            by_size.setdefault(len(own), []).append(group)
        self.stacks = [
            (groups, torch.stack([self.columns[g] for g in groups])) for groups in by_size.values()
        ]

    def scores(self) -> list[float]:
        """What each group's going would leave over, as shares of the variance of the layers' answers."""
        found = [0.0] * len(self.columns)
        for groups, index in self.stacks:
            inside = self.inverse[index[:, :, None], index[:, None, :]]
            own = self.weights[index]
            left = (own * torch.linalg.solve(inside, own)).sum((1, 2))
            for group, value in zip(groups, left.tolist(), strict=True):
                found[group] = value
        return found

    def remove(self, group: int) -> None:
        """Fit the layers to their answers without a group of inputs."""
        own = self.columns[group]
        inside = torch.linalg.inv(self.inverse[own][:, own])
        across = self.inverse[:, own] @ inside
        self.weights -= across @ self.weights[own]
        self.inverse -= across @ self.inverse[own]
        self.weights[own] = 0.0
        self.inverse[own] = 0.0
        self.inverse[:, own] = 0.0
        self.inverse[own, own] = 1.0


def _tables(
    network: nn.Module, structure: Structure, example: Any, batches: Sequence[Any]
) -> list[_Table] | None:
    """A table for each tensor that layers sum over, whose units can go; None if these are too wide."""
    small = compact(network, example, check=False)
    analysis = structure.analysis
    nodes = {name: node for node, name in analysis.program.names.items()}
    found: dict[Any, list[Reader]] = {}
    columns: dict[Any, dict[Any, list[int]]] = {}
    for reader in readers(small):
        node = nodes.get(reader.weight)
        weight = small.get_parameter(reader.weight)
        if node is not None and reader.groups == 1 and weight.shape == analysis.program.values[node].shape:
            own = _columns(structure, node, reader, weight)
            if own:
                found.setdefault(reader.reads, []).append(reader)
                columns.setdefault(reader.reads, own)
    matrices = [[r.matrix(small.get_parameter(r.weight))[0] for r in together] for together in found.values()]
    if sum(len(own[0]) ** 2 for own in matrices) > LARGEST:
        return None
    sums = _sums(small, [together[0] for together in found.values()], batches)
    return [_Table(*own) for own in zip(sums, matrices, columns.values(), strict=True)]


def _columns(structure: Structure, node: fx.Node, reader: Reader, weight: Tensor) -> dict[Any, list[int]]:
    """For each gate the inputs of a layer, as a matrix, that go with it."""
    lines = structure.analysis.units.labeller.axes.weight_axes.get(node)
    line = lines[1 - reader.axis] if lines else None
    if line is None:
        return {}
    taps = weight[0, 0].numel() if reader.layer is not None else 1
    found: dict[Any, list[int]] = {}
    for place, choices in enumerate(structure.analysis.sets_of(np.asarray(line))):
        for choice in choices & structure.gates.keys():
            found.setdefault(structure.gates[choice], []).extend(range(place * taps, (place + 1) * taps))
    return found


def _sums(small: fx.GraphModule, found: Sequence[Reader], batches: Sequence[Any]) -> list[Sums]:
    """Sums over the inputs of layers, and a constant 1, in one pass."""
    route, generator = Route(small), torch.Generator().manual_seed(0)
    sums: list[Sums] = []
    for batch in batches:
        walk = route.start(batch)
        for i, reader in enumerate(found):
            given = walk.before(reader.node, reader.source)
            x, y, _ = reader.rows(given, walk.after(reader.node), -(-ROWS // len(batches)), generator)
            x = torch.cat([x, x.new_ones(*x.shape[:2], 1)], 2)
            if len(sums) == i:
                sums.append(Sums.none(1, x.shape[2], 1, x.device))
            sums[i].add_(x, y[:, :, :1] * 0)
    return sums
