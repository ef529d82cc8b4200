"""Repair of a compacted network: what reads units that are gone answers as before from those that stay.

Each layer that sums over units gets the weights with which it gives, from what is left, what the same layer
gave before: W' = argmin |W x - W' x_kept|^2 + ridge |W' - W_kept|^2 over inputs without labels, its constant
included, one layer after the other, so that later ones know what earlier ones leave over.

Source: B. Hassibi, D. Stork, "Second order derivatives for network pruning: Optimal Brain Surgeon", 1992, for
the least squares; here by whole layers, with the ridge chosen on inputs that were held out.
"""

import functools
import itertools
import logging
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from sparsereg.compression.compact import compact
from sparsereg.compression.oneshot.inputs import PART, examples, some_of, split
from sparsereg.compression.oneshot.least_squares import Sums, solve
from sparsereg.compression.oneshot.origins import Origins, Places
from sparsereg.compression.oneshot.readers import Reader, readers
from sparsereg.compression.running import Example, copied
from sparsereg.compression.walk import Route, Walk
from sparsereg.progress import bar, showing

log = logging.getLogger(__name__)

MEMORY = 2**30
"""Bytes that batches on their way through both networks may need together; else they start anew each time."""
WIDEST = 8192
"""Inputs of a layer up to which it is repaired: its normal equations take half a gigabyte then."""
ROWS, LEAST_ROWS = 24, 8192
"""Rows of a layer that are drawn of more: so many for each of its inputs, and at least that many."""
SPARE, LEAST_EXAMPLES = 2, 128
"""Examples that are looked at hold so many times these rows, and are at least that many: rows of one example
are alike."""
HELD = 4
"""Every so many-th example is held out."""
FEWEST = 8
"""Examples from which on something can be held out."""


@dataclass(frozen=True)
class _Task:
    """A layer to repair.

    Attributes:
        reader: in the small network.
        target: the same operation in the network before.
        places: of the outputs that are left among those that there were; -1 where there was none.
    """

    reader: Reader
    target: fx.Node
    places: Tensor


def repaired(
    before: nn.Module,
    after: nn.Module,
    example_input: Example,
    batches: Iterable[Any],
    *,
    round_to: int = 1,
    seed: int = 0,
    progress: bool = True,
) -> fx.GraphModule:
    """Compact a network and fit its layers to what they gave before some of its gates were shut.

    Args:
        before: the network whose answers are wanted; left as it is.
        after: the same network with more of its gates shut; left as it is.
        example_input: see ``compact``.
        batches: inputs as the network takes them, without labels; one to four thousand are plenty, from 8 on
            there is a repair.
        round_to: see ``compact``.
        seed: of the places of maps and texts that are drawn where there are more than a layer needs.
        progress: show bars on a terminal.

    Returns:
        What ``compact(after)`` returns, with other weights of the same shapes.

    Raises:
        InputError: the network cannot be traced.

    Example:
        >>> from sparsereg import SparseMLP
        >>> net, x = SparseMLP(6, 8, 3), torch.randn(32, 6)
        >>> repaired(net, net, x[:1], [x])(x).shape
        torch.Size([32, 3])
    """
    with showing(progress):
        teacher = Teacher(before, example_input)
        student = teacher.student(after, round_to)
        teacher.repair_([student], list(batches), seed)
        return student.network


@dataclass(frozen=True)
class Student:
    """What is left of a network.

    Attributes:
        network: compacted.
        places: of its weights in those of the whole one.
    """

    network: fx.GraphModule
    places: Places


class Teacher:
    """A network whose answers are wanted of what is left of it when gates are shut.

    Args:
        before: the network, with gates; left as it is.
        example: see ``compact``.
        known: what ``compact(before)`` returns, where there is such a network; left as it is.

    Attributes:
        network: compacted.
    """

    def __init__(self, before: nn.Module, example: Example, known: fx.GraphModule | None = None) -> None:
        self._before, self._example = before, example
        made = compact(before, example, check=False) if known is None else copied(known)
        self.network = made.eval().requires_grad_(False)

    @functools.cached_property
    def origins(self) -> Origins:
        """Where weights of compacted networks stand in the whole one; traced when it is asked for."""
        return Origins(self._before, self._example)

    @functools.cached_property
    def _places(self) -> Places:
        return self.origins.of(self._before)

    def student(self, after: nn.Module, round_to: int = 1) -> Student:
        """Compact the network with more of its gates shut.

        Args:
            after: the network with these gates; left as it is.
            round_to: see ``compact``.
        """
        small = compact(after, self._example, round_to=round_to)
        return Student(small, self.origins.of(after, round_to))

    def repair_(self, students: Sequence[Student], batches: list[Any], seed: int) -> None:
        """Fit the layers of several students, on one way through the teacher where memory allows it.

        Args:
            students: changed in place.
            batches: of inputs.
            seed: of the places that are drawn, for each student the same.
        """
        if sum(examples(b) for b in batches) < FEWEST:
            log.warning("a repair needs %d inputs or more: give data, not one example", FEWEST)
            return
        peak = _peak(self.network, batches)  # that of a student is not larger
        keeps = 2 * peak <= MEMORY
        together = max(1, min(len(students), MEMORY // max(1, peak) - 1)) if keeps else 1
        for i in range(0, len(students), together):
            inputs = _Inputs(batches, keeps)
            own = [
                _Repair(
                    _tasks(self.network, s.network, self._places, s.places),
                    s.network,
                    inputs,
                    torch.Generator().manual_seed(seed),
                )
                for s in students[i : i + together]
            ]
            _run(self.network, own, inputs)


def _peak(network: fx.GraphModule, batches: Sequence[Any]) -> int:
    """Bytes that batches need together on their way through a network, as some examples say."""
    some = split(batches[0], examples(batches[0]) // PART)[0]
    share = examples(batches[0]) / max(1, examples(some))
    return math.ceil(Route(network).start(some).peak() * share * len(batches))


def enough(network: fx.GraphModule, batches: Sequence[Any]) -> list[Any]:
    """As many batches as hold the rows by which every layer can be fitted.

    A text has a row for each token, a map one for each place: then fewer examples will do than where a layer
    sees one row of each.

    Args:
        network: compacted, in eval mode.
        batches: of inputs.

    Returns:
        Some that lie evenly among them, or all.
    """
    walk, first = Route(network).start(batches[0]), examples(batches[0])
    wanted = LEAST_EXAMPLES
    for reader in readers(network):
        read = walk.before(reader.node, reader.source)
        places = reader.places(read, walk.after(reader.node))
        inputs = reader.matrix(network.get_parameter(reader.weight)).shape[1]
        wanted = max(wanted, math.ceil(SPARE * _drawn(inputs) * first / max(1, places)))
    return some_of(batches, wanted)


def _drawn(inputs: int) -> int:
    """Rows of a layer that are drawn of more."""
    return max(ROWS * inputs, LEAST_ROWS)


def _tasks(teacher: fx.GraphModule, student: fx.GraphModule, before: Places, after: Places) -> list[_Task]:
    """The layers that are in both networks, with what is left of their outputs."""
    theirs = {reader.weight: reader for reader in readers(teacher)}
    place = {node: i for i, node in enumerate(teacher.graph.nodes)}
    found: list[_Task] = []
    for reader in readers(student):
        other = theirs.get(reader.weight)
        if other is None or reader.weight not in before or reader.weight not in after:
            continue
        known = {p: i for i, p in enumerate(before[reader.weight][reader.axis].tolist())}
        places = torch.tensor([known.get(p, -1) for p in after[reader.weight][reader.axis].tolist()])
        later = not found or place[found[-1].target] < place[other.node]
        if later and _serves(student.get_parameter(reader.weight), reader, places):
            found.append(_Task(reader, other.node, places))
    return found


def _serves(weight: Tensor, reader: Reader, places: Tensor) -> bool:
    """Whether a layer can be repaired: not too wide, nor one that lives on zeros among its weights."""
    inputs = weight.numel() // max(1, weight.shape[reader.axis])
    sparse = float((weight == 0).double().mean()) > 0.01
    whole = bool((places >= 0).all())
    return inputs <= WIDEST and not sparse and (whole if reader.groups > 1 else bool((places >= 0).any()))


class _Inputs:
    """Batches on their way through networks.

    Args:
        batches: of inputs.
        keeps: whether they all are on their way at once; else each starts anew for every layer.
    """

    def __init__(self, batches: Sequence[Any], keeps: bool) -> None:
        self.batches = batches
        self.first = [0, *itertools.accumulate(examples(batch) for batch in batches)]
        self._keeps = keeps

    def through(self, network: fx.GraphModule) -> Callable[[int], Walk]:
        """Return what gives the walk of each batch through a network."""
        route = Route(network)

        def start(i: int) -> Walk:
            return route.start(self.batches[i])

        return functools.cache(start) if self._keeps else start


def _run(teacher: fx.GraphModule, repairs: "Sequence[_Repair]", inputs: _Inputs) -> None:
    """Repair the layers of networks, one after the other in the order in which the teacher runs them."""
    walk = inputs.through(teacher)
    targets = {target for repair in repairs for target in repair.tasks}
    order = [node for node in teacher.graph.nodes if node in targets]
    with bar("repair", "layer", len(order)) as steps:
        for target in order:
            started = [(repair, *repair.start(target)) for repair in repairs if target in repair.tasks]
            for i in range(len(inputs.batches)):
                wanted = walk(i).after(target)
                for repair, train, held in started:
                    repair.add(i, target, wanted, train, held)
            for repair, train, held in started:
                repair.solve(target, train, held)
            steps.update(1)
    for repair in repairs:
        done = f"{repair.changed} of {len(repair.tasks)}"
        log.info("%s layers repaired on %d inputs", done, inputs.first[-1])


class _Repair:
    """Fits the layers of one network to those of another.

    Args:
        tasks: its layers.
        student: changed in place.
        inputs: of both networks.
        generator: draws places.

    Attributes:
        changed: how many layers have other weights than before.
    """

    def __init__(
        self, tasks: Sequence[_Task], student: fx.GraphModule, inputs: _Inputs, generator: torch.Generator
    ) -> None:
        self.tasks = {task.target: task for task in tasks}
        self.changed = 0
        self._student = student
        self._inputs = inputs
        self._walk = inputs.through(student)
        self._generator = generator

    def start(self, target: fx.Node) -> tuple[Sums, Sums]:
        """Sums over no rows of a layer: those that it is fitted by, and those that are held out."""
        weights = self._weights(self.tasks[target])
        groups, size, outputs = weights.shape
        return (
            Sums.none(groups, size, outputs, weights.device),
            Sums.none(groups, size, outputs, weights.device),
        )

    def add(self, i: int, target: fx.Node, wanted: Tensor, train: Sums, held: Sums) -> None:
        """Add what one batch shows of a layer.

        Args:
            i: place of the batch.
            target: the layer in the teacher.
            wanted: what it gives there.
            train: sums that the layer is fitted by.
            held: those that are held out.
        """
        task = self.tasks[target]
        reader = task.reader
        most = -(-_drawn(train.gram.shape[1]) // len(self._inputs.batches))
        read = self._walk(i).before(reader.node, reader.source)
        chosen, example = reader.draw(read, wanted, most, self._generator)
        out = (example + self._inputs.first[i]) % HELD == HELD - 1
        chosen = torch.cat([chosen[~out], chosen[out]])  # so that both parts are views
        columns = task.places[task.places >= 0].to(wanted.device)
        x = reader.inputs(read, wanted, chosen, self._constant(task))
        y = reader.outputs(wanted, chosen, columns)
        mine = len(chosen) - int(out.sum())
        train.add_(x[:, :mine], y[:, :mine])
        held.add_(x[:, mine:], y[:, mine:])

    @torch.no_grad()
    def solve(self, target: fx.Node, train: Sums, held: Sums) -> None:
        """Give a layer the weights that its sums ask for, if there are better ones than those that it has."""
        task = self.tasks[target]
        reader = task.reader
        constant = self._constant(task)
        found = solve(train, held, self._weights(task), constant) if held.rows else None
        if found is None:
            return
        self.changed += 1
        weight = self._student.get_parameter(reader.weight)
        matrix = reader.matrix(weight)
        known = slice(None) if reader.groups > 1 else (task.places >= 0).to(weight.device)
        matrix[:, :, known] = found[:, : matrix.shape[1]]
        weight.copy_(reader.shaped(matrix, weight))
        if constant:
            self._set_constant(reader, known, found[:, -1])

    def _constant(self, task: _Task) -> bool:
        return task.reader.bias is not None or task.reader.norm is not None

    def _weights(self, task: _Task) -> Tensor:
        """Weights and constant of a layer that are fitted, (groups, inputs, outputs)."""
        reader = task.reader
        matrix = reader.matrix(self._student.get_parameter(reader.weight))
        if self._constant(task):
            groups, _, outputs = matrix.shape
            bias = matrix.new_zeros(groups, 1, outputs)
            if reader.bias is not None:
                bias = self._student.get_parameter(reader.bias).detach().double().view(groups, 1, outputs)
            matrix = torch.cat([matrix, bias], 1)
        return matrix[:, :, task.places >= 0] if reader.groups == 1 else matrix

    def _set_constant(self, reader: Reader, known: Any, constant: Tensor) -> None:
        """Put a constant of each output, (groups, outputs), where the network has a place for it."""
        if reader.bias is not None:
            bias = self._student.get_parameter(reader.bias)
            bias[known] = constant.flatten().to(bias)
            return
        assert reader.norm is not None
        mean = self._student.get_submodule(reader.norm).running_mean
        assert isinstance(mean, Tensor)
        mean[known] -= constant.flatten().to(mean)
