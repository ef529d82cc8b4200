"""The orders in which units go when each leaves least behind that a repair cannot make good.

Without the unit, every layer that reads it is fitted anew to what it gave; what that leaves over is known in
closed form from the inverse of the covariance of its inputs, which is brought up to date as units go. So
of units that say the same, one stays. What is left over of a layer counts in one of two ways, each an order:
as a share of the variance of what the layer gives, or by what it does to the network's answers, the mean
square of their derivative by each output of the layer. The first holds what every layer can say, the second
what the network says now, as long as little of it goes.

Sources: B. Hassibi, D. Stork, "Second order derivatives for network pruning: Optimal Brain Surgeon", 1992;
J. Martens, R. Grosse, "Optimizing neural networks with Kronecker-factored approximate curvature", 2015, for
the curvature as a product of what a layer reads and what depends on it; here for whole units, without labels.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from sparsereg.compression.oneshot.answers import check_answer
from sparsereg.compression.oneshot.importance import ThroughWeights, parts_of, random_sum
from sparsereg.compression.oneshot.least_squares import Sums
from sparsereg.compression.oneshot.readers import Reader, readers
from sparsereg.compression.units.structure import Structure
from sparsereg.compression.walk import Route, Running
from sparsereg.progress import bar, doing

RIDGE = 1e-3
"""Added to the covariance, as a share of the mean variance of an input."""
_ROUNDING = 1e-12
"""Share of the mean square of an input below which a variance is none."""
LARGEST = 2**28
"""Numbers in the covariances of all layers together, up to which this is done: 2 GiB."""
WAYS = 2
"""In which what is left over counts, and so orders."""
ROWS = 8192
"""Rows of a layer that are drawn of more."""


def leftover(
    small: fx.GraphModule,
    structure: Structure,
    batches: Sequence[Any],
    some: Sequence[Any],
    slopes: dict[str, Tensor],
    ways: Sequence[int] = range(WAYS),
    model: nn.Module | None = None,
) -> tuple[list[dict[str, Tensor]], Tensor | None]:
    """Return when each unit goes, in each order: the place in it, NaN for units that no layer sums over.

    The orders share the covariances. While one is found, there is one more copy of them, so that they take
    twice the memory of ``LARGEST`` numbers at most.

    Args:
        small: the network, compacted with all gates of ``structure`` open.
        structure: of the network.
        batches: of inputs, by which layers are fitted.
        some: those in which the network's answers are derived.
        slopes: what each gate's unit costs, by the path of the gates.
        ways: the orders to find; 0 is that by shares of the layers, 1 that by the answers.
        model: the network with gates, which are nearly open; None where nobody asks for their worth.

    Returns:
        By the path of the gates, float64, for each of ``ways``. None at all if the layers are too wide for
        this. And what each gate is worth as ``importance.gradient`` says it, (gates,), where it comes with
        the derivatives that are taken, and there are units that no layer sums over.

    Raises:
        InputError: the network answers NaN.
    """
    sizes = [slopes[path].numel() for path in structure.paths]
    through = None
    if model is not None:
        gates = dict(zip(structure.paths, sizes, strict=True))
        through = functools.partial(ThroughWeights.of, small, structure, model, gates)
    tables, worth = _tables(small, structure, batches, some, through, sum(sizes))
    starts = dict(zip(structure.paths, itertools.accumulate([0, *sizes]), strict=False))
    cost = torch.cat([slopes[path].double().flatten().cpu() for path in structure.paths]).clamp(min=1e-12)
    seen = [[starts[path] + place for path, place in table.gates] for table in tables]
    found = []
    for way in ways if tables else ():
        order = _order([_Fit(table, way) for table in tables], seen, cost)
        found.append(dict(zip(structure.paths, order.split(sizes), strict=True)))
    return found, worth


def _order(fits: Sequence[_Fit], seen: Sequence[Sequence[int]], cost: Tensor) -> Tensor:
    """When each gate goes, (gates,), float64; NaN for those that no table has.

    Args:
        fits: changed in place.
        seen: of each, the gates of its groups of inputs.
        cost: of each gate, (gates,), float64.
    """
    where: dict[int, list[tuple[int, int]]] = {}
    for t, own in enumerate(seen):
        for group, gate in enumerate(own):
            where.setdefault(gate, []).append((t, group))
    at = [torch.tensor(own, device=cost.device) for own in seen]
    scores = [fit.scores().to(cost.device) for fit in fits]
    order = torch.full_like(cost, torch.nan)
    error = torch.full_like(cost, torch.nan)
    error[list(where)] = 0.0
    for places, score in zip(at, scores, strict=True):
        error.index_add_(0, places, score)
    with bar("order of units", "unit", len(where)) as steps:
        for step in range(len(where)):
            gone = int((error / cost).nan_to_num(nan=torch.inf).argmin())
            order[gone] = step
            error[gone] = torch.nan
            for t, group in where[gone]:
                fits[t].remove(group)
                new = fits[t].scores().to(cost.device)
                error.index_add_(0, at[t], new - scores[t])
                scores[t] = new
            steps.update(1)
    return order


class _Table:
    """What is known of the inputs of one layer, or of several that read the same.

    Args:
        sums: over the inputs and the constant 1, of one group.
        weights: of each layer, (inputs, outputs), float64.
        senses: how much each output of each layer moves the network's answers, (outputs,), float64.
        columns: for each gate the inputs that go with it.

    Attributes:
        inverse: of the covariance of the inputs, with a ridge.
        weights: of all layers in both units in which what is left over of their outputs counts.
        gates: those that decide on inputs.
        columns: of each of these, the inputs.
    """

    def __init__(
        self, sums: Sums, weights: Sequence[Tensor], senses: Sequence[Tensor], columns: dict[Any, list[int]]
    ) -> None:
        gram = sums.gram[0]
        mean = gram[:-1, -1:]
        covariance = (gram[:-1, :-1] - mean @ mean.T / gram[-1, -1]) / gram[-1, -1]
        # Inputs that do not vary, those of one example say, leave rounding alone.
        square = gram.diagonal()[:-1].mean() / gram[-1, -1]
        least = _ROUNDING * square + torch.finfo(gram.dtype).tiny / RIDGE
        size = covariance.diagonal().mean().clamp(min=least)
        totals = [(w * (covariance @ w)).sum().clamp(min=1e-30) for w in weights]
        shares = [w / total.sqrt() for w, total in zip(weights, totals, strict=True)]
        moves = [w * sense for w, sense in zip(weights, senses, strict=True)]
        self.weights = [torch.cat(own, 1) for own in (shares, moves)]
        covariance.diagonal().add_(RIDGE * size)
        self.inverse = torch.linalg.inv(covariance)
        self.gates = list(columns)
        self.columns = [torch.tensor(c, device=gram.device) for c in columns.values()]


class _Fit:
    """Layers that are fitted to their answers while inputs go.

    Args:
        table: of what they read; left as it is.
        way: in which what is left over counts, a place in its weights.
    """

    def __init__(self, table: _Table, way: int) -> None:
        self.weights, self.inverse = table.weights[way].clone(), table.inverse.clone()
        self.columns = table.columns
        self.spans = [_span(own) for own in self.columns]
        self.change = torch.empty_like(self.inverse)
        by_size: dict[int, list[int]] = {}
        for group, own in enumerate(self.columns):
            by_size.setdefault(len(own), []).append(group)
        self.stacks = [
            (torch.tensor(groups, device=self.weights.device), torch.stack([self.columns[g] for g in groups]))
            for groups in by_size.values()
        ]

    def scores(self) -> Tensor:
        """What each group's going would leave over of the layers' answers, (groups,)."""
        found = self.weights.new_zeros(len(self.columns))
        for groups, index in self.stacks:
            if index.shape[1] == 1:
                one = index[:, 0]
                left = self.weights[one].square().sum(1) / self.inverse.diagonal()[one]
            else:
                inside = self.inverse[index[:, :, None], index[:, None, :]]
                own = self.weights[index]
                left = (own * torch.linalg.solve(inside, own)).sum((1, 2))
            found[groups] = left
        return found

    def remove(self, group: int) -> None:
        """Fit the layers to their answers without a group of inputs."""
        own = self.spans[group]
        inside = torch.linalg.inv(self.inverse[own][:, own])
        across = self.inverse[:, own] @ inside
        self.weights -= across @ self.weights[own]
        self.inverse -= torch.mm(across, self.inverse[own], out=self.change)
        self.weights[own] = 0.0
        self.inverse[own] = 0.0
        self.inverse[:, own] = 0.0
        self.inverse.diagonal()[own] = 1.0


def _span(places: Tensor) -> slice | Tensor:
    """Places as a slice, if they follow each other: what it takes of a matrix is a view."""
    first, last = int(places[0]), int(places[-1])
    follow = torch.equal(places, torch.arange(first, first + len(places), device=places.device))
    return slice(first, last + 1) if follow else places


def _tables(
    small: fx.GraphModule,
    structure: Structure,
    batches: Sequence[Any],
    some: Sequence[Any],
    through: Callable[[], ThroughWeights | None] | None,
    number: int,
) -> tuple[list[_Table], Tensor | None]:
    """A table for each tensor that layers sum over, whose units can go; none if all these are too wide.

    Args:
        small: the network, compacted.
        structure: of the network.
        batches: of inputs, by which layers are fitted.
        some: those in which the network's answers are derived.
        through: finds how to derive them by gates; None where nobody asks.
        number: of gates.

    Returns:
        What gates are worth comes with them, if that is asked for and some are in no table.
    """
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
    if not matrices or sum(len(own[0]) ** 2 for own in matrices) > LARGEST:
        return [], None
    seen = {gate for own in columns.values() for gate in own}
    by_gates = through() if through is not None and len(seen) < number else None
    sense, worth = _senses(small, [r for together in found.values() for r in together], some, by_gates)
    senses = [[sense[r] for r in together] for together in found.values()]
    sums = _sums(small, [together[0] for together in found.values()], batches)
    return [_Table(*own) for own in zip(sums, matrices, senses, columns.values(), strict=True)], worth


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
    """Sums over the inputs of layers, and a constant 1, in one pass, which checks the answers, too."""
    route, generator = Route(small), torch.Generator().manual_seed(0)
    sums: list[Sums] = []
    with bar("what layers read", "batch", len(batches)) as steps:
        for place, batch in enumerate(batches):
            walk = route.start(batch)
            for i, reader in enumerate(found):
                given = walk.before(reader.node, reader.source)
                y = walk.after(reader.node)
                chosen, _ = reader.draw(given, y, -(-ROWS // len(batches)), generator)
                x = reader.inputs(given, y, chosen, constant=True)
                if len(sums) == i:
                    sums.append(Sums.none(1, x.shape[2], 0, x.device))
                with np.errstate(invalid="ignore"):  # where numbers are infinite the answer tells
                    sums[i].add_(x, x[:, :, :0])
            check_answer(walk.answer(), place)
            steps.update(1)
    return sums


def _senses(
    small: fx.GraphModule, found: Sequence[Reader], batches: Sequence[Any], by_gates: ThroughWeights | None
) -> tuple[dict[Reader, Tensor], Tensor | None]:
    """How much each output of layers moves the answers, (outputs,), float64, and what gates are worth.

    The root of the sum, over batches and places, of the squared derivative of random sums of all answers, as
    ``importance.gradient`` takes them. Where gates are asked for, the sums are those of parts of batches, as
    there.
    """
    route, generator = Route(small), torch.Generator().manual_seed(0)
    run = _Keeping(small, {reader.node for reader in found})
    total: dict[Reader, Any] = dict.fromkeys(found, 0.0)
    worth: list[Tensor] = []
    weights = [] if by_gates is None else by_gates.weights
    with _derived(weights), doing("derivatives of the answers"):
        for part, draws in _parts(batches, by_gates is not None):
            with torch.enable_grad():
                answers = torch.utils._pytree.tree_leaves(run.run(*route.arguments(part)))
            wanted = [run.kept[reader.node] for reader in found] + weights
            for draw in range(draws):
                slopes = _slopes(answers, wanted, generator, draw + 1 < draws)
                if slopes is None:  # answers that are numbers of classes, say, have no derivative
                    continue
                for reader, slope in zip(found, slopes, strict=False):
                    squares = slope.double().square().movedim(-1 if reader.layer is None else 1, -1)
                    total[reader] = total[reader] + squares.flatten(0, -2).sum(0)
                if by_gates is not None:
                    worth.append(by_gates.by_gates(slopes[len(found) :]).square())
    mean = torch.stack(worth).mean(0) if worth else None
    return {reader: torch.as_tensor(t).sqrt() for reader, t in total.items()}, mean


def _parts(batches: Sequence[Any], gates: bool) -> Iterator[tuple[Any, int]]:
    """Parts of batches, with the number of sums that are derived of each; whole ones without gates."""
    for batch in batches:
        own, draws = parts_of(batch) if gates else ([batch], 1)
        yield from ((part, draws) for part in own)


def _slopes(
    answers: Sequence[Any], wanted: Sequence[Tensor], generator: torch.Generator, again: bool
) -> Sequence[Tensor] | None:
    """Derivatives of a random sum of answers; None of answers without any."""
    with torch.enable_grad():
        sums = [random_sum(a, generator) for a in answers if isinstance(a, Tensor) and a.requires_grad]
        if not sums:
            return None
        found: Sequence[Tensor] = torch.autograd.grad(
            torch.stack(sums).sum(), wanted, retain_graph=again, materialize_grads=True, allow_unused=True
        )
    return found


@contextmanager
def _derived(weights: Sequence[Tensor]) -> Iterator[None]:
    """Within this context answers have derivatives by weights of a network."""
    asked = [weight for weight in weights if not weight.requires_grad]
    for weight in asked:
        weight.requires_grad_(True)
    try:
        yield
    finally:
        for weight in asked:
            weight.requires_grad_(False)


class _Keeping(Running):
    """Runs a network and keeps the results of some operations, which have derivatives."""

    def __init__(self, module: fx.GraphModule, wanted: set[fx.Node]) -> None:
        super().__init__(module)
        self.wanted = wanted
        self.kept: dict[fx.Node, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Run an operation; a wanted result without a derivative becomes one by which answers are derived."""
        result = super().run_node(n)
        if n in self.wanted:
            if not result.requires_grad:
                result = result.detach().requires_grad_()
            self.kept[n] = result
        return result
