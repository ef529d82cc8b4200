"""Repair of a compacted network: what reads units that are gone answers as before from those that stay.

Each layer that sums over units gets the weights with which it gives, from what is left, what the same layer
gave before: W' = argmin |W x - W' x_kept|^2 + ridge |W' - W_kept|^2 over inputs without labels, its constant
included, one layer after the other, so that later ones know what earlier ones leave over.

Source: B. Hassibi, D. Stork, "Second order derivatives for network pruning: Optimal Brain Surgeon", 1992, for
the least squares; here by whole layers, with the ridge chosen on inputs that were held out.
"""

import importlib.util
import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from sparsereg.compression.compact import compact
from sparsereg.compression.oneshot.inputs import examples
from sparsereg.compression.oneshot.least_squares import Sums, solve
from sparsereg.compression.oneshot.origins import Origins, Places
from sparsereg.compression.oneshot.readers import Reader, readers
from sparsereg.compression.running import Example
from sparsereg.compression.walk import Route, Walk

log = logging.getLogger(__name__)

MEMORY = 2**30
"""Bytes that batches on their way through both networks may need together; else they start anew each time."""
WIDEST = 8192
"""Inputs of a layer up to which it is repaired: its normal equations take half a gigabyte then."""
ROWS, LEAST_ROWS = 24, 8192
"""Rows of a layer that are drawn of more: so many for each of its inputs, and at least that many."""
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
    origins: Origins | None = None,
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
        progress: show a bar on a terminal.
        origins: of a network with these gates, where several are repaired: it takes a trace.

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
    student = compact(after, example_input, round_to=round_to)
    teacher = compact(before, example_input, check=False)
    told = Origins(before, example_input) if origins is None else origins
    sources = told.of(before), told.of(after, round_to)
    tasks = _tasks(teacher, student, *sources)
    given = list(batches)
    if sum(examples(b) for b in given) < FEWEST:
        log.warning("a repair needs %d inputs or more: give data, not one example", FEWEST)
        return student
    _Repair(teacher, student, given, torch.Generator().manual_seed(seed)).run(tasks, progress)
    return student


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


class _Silent:
    """In place of a bar."""

    def update(self, steps: int) -> None:
        """Say nothing."""


@contextmanager
def _bar(total: int, shown: bool) -> Iterator[Any]:
    """A bar of layers, where there is a terminal and tqdm is installed."""
    if not shown or importlib.util.find_spec("tqdm") is None:
        yield _Silent()
        return
    from tqdm import tqdm

    with tqdm(total=total, desc="repair", unit="layer", leave=False, delay=1, disable=None) as bar:
        yield bar


class _Repair:
    """Fits the layers of one network to those of another.

    Args:
        teacher: gives what is wanted.
        student: changed in place.
        batches: of inputs.
        generator: draws places.
    """

    def __init__(
        self, teacher: fx.GraphModule, student: fx.GraphModule, batches: list[Any], generator: torch.Generator
    ) -> None:
        self.student = student
        self.routes = Route(teacher), Route(student)
        self.batches = batches
        self.generator = generator
        self.first = [0]
        for batch in batches:
            self.first.append(self.first[-1] + examples(batch))
        self._walks: dict[int, tuple[Walk, Walk]] = {}
        self._keeps = self._fits_in_memory()

    def run(self, tasks: Sequence[_Task], progress: bool) -> None:
        """Repair layers, one after the other."""
        changed = 0
        with _bar(len(tasks), progress) as bar:
            for task in tasks:
                train, held = self._none(task)
                for i in range(len(self.batches)):
                    self._add(i, task, train, held)
                changed += self._solve(task, train, held)
                bar.update(1)
        log.info("%d of %d layers repaired on %d inputs", changed, len(tasks), self.first[-1])

    def _fits_in_memory(self) -> bool:
        needed = sum(route.start(self.batches[0]).peak() for route in self.routes)
        return needed * len(self.batches) <= MEMORY

    def _walk(self, i: int) -> tuple[Walk, Walk]:
        if not self._keeps:
            return self.routes[0].start(self.batches[i]), self.routes[1].start(self.batches[i])
        if i not in self._walks:
            self._walks[i] = self.routes[0].start(self.batches[i]), self.routes[1].start(self.batches[i])
        return self._walks[i]

    def _constant(self, task: _Task) -> bool:
        return task.reader.bias is not None or task.reader.norm is not None

    def _none(self, task: _Task) -> tuple[Sums, Sums]:
        weights = self._weights(task)
        groups, inputs, outputs = weights.shape
        return (
            Sums.none(groups, inputs, outputs, weights.device),
            Sums.none(groups, inputs, outputs, weights.device),
        )

    def _weights(self, task: _Task) -> Tensor:
        """Weights and constant of a layer that are fitted, (groups, inputs, outputs)."""
        reader = task.reader
        matrix = reader.matrix(self.student.get_parameter(reader.weight))
        if self._constant(task):
            groups, _, outputs = matrix.shape
            bias = matrix.new_zeros(groups, 1, outputs)
            if reader.bias is not None:
                bias = self.student.get_parameter(reader.bias).detach().double().view(groups, 1, outputs)
            matrix = torch.cat([matrix, bias], 1)
        return matrix[:, :, task.places >= 0] if reader.groups == 1 else matrix

    def _add(self, i: int, task: _Task, train: Sums, held: Sums) -> None:
        """Add what one batch shows of a layer."""
        teacher, student = self._walk(i)
        reader = task.reader
        axis = -1 if reader.layer is None else 1
        chosen = task.places[task.places >= 0].to(next(self.student.parameters()).device)
        wanted = teacher.after(task.target).index_select(axis, chosen)
        most = -(-max(ROWS * train.gram.shape[1], LEAST_ROWS) // len(self.batches))
        read = student.before(reader.node, reader.source)
        x, y, example = reader.rows(read, wanted, most, self.generator)
        if self._constant(task):
            x = torch.cat([x, x.new_ones(*x.shape[:2], 1)], 2)
        out = (example + self.first[i]) % HELD == HELD - 1
        for part, mine in ((train, ~out), (held, out)):
            part.add_(x[:, mine], y[:, mine])

    @torch.no_grad()
    def _solve(self, task: _Task, train: Sums, held: Sums) -> bool:
        """Give a layer the weights that its sums ask for; False if it keeps those that it has."""
        reader = task.reader
        constant = self._constant(task)
        found = solve(train, held, self._weights(task), constant) if held.rows else None
        if found is None:
            return False
        weight = self.student.get_parameter(reader.weight)
        matrix = reader.matrix(weight)
        known = slice(None) if reader.groups > 1 else (task.places >= 0).to(weight.device)
        matrix[:, :, known] = found[:, : matrix.shape[1]]
        weight.copy_(reader.shaped(matrix, weight))
        if constant:
            self._set_constant(reader, known, found[:, -1])
        return True

    def _set_constant(self, reader: Reader, known: Any, constant: Tensor) -> None:
        """Put a constant of each output, (groups, outputs), where the network has a place for it."""
        if reader.bias is not None:
            bias = self.student.get_parameter(reader.bias)
            bias[known] = constant.flatten().to(bias)
            return
        assert reader.norm is not None
        mean = self.student.get_submodule(reader.norm).running_mean
        assert isinstance(mean, Tensor)
        mean[known] -= constant.flatten().to(mean)
