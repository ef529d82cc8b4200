"""Budgets in milliseconds and megabytes: expected while training, measured on the smaller network at the end.

A model of the cost says what gates are worth: times of layers as ``sparsereg.compression.timing.times``
measured them, and sizes of tensors. It is made to agree with the whole network and with the smallest one,
and nothing depends on it being right in between: at the end the compacted network itself is measured, the
model's share is corrected, and the gates are set anew, until what was measured is what was asked for.
"""

import logging
import math
import statistics
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from sparsereg.compression.batch_norm_folding import fuse
from sparsereg.compression.budget import MARGIN, Budget, meet_all_
from sparsereg.compression.compact import compact
from sparsereg.compression.count import Accountant
from sparsereg.compression.running import copied
from sparsereg.compression.timing.runtimes import (
    Loaded,
    Loaders,
    batch_of,
    check_runtime,
    default_runtime,
    torch_threads,
)
from sparsereg.compression.timing.times import Clock, seconds_in_a_row
from sparsereg.compression.timing.widths import Widths
from sparsereg.compression.units.explain import inputs_of
from sparsereg.distributions import HardConcrete, gate_median, log_alpha_at, shift
from sparsereg.errors import InputError
from sparsereg.progress import bar, doing
from sparsereg.target_settings import Share

log = logging.getLogger(__name__)

TOLERANCE = 0.02
"""How far what is measured at the end may be from what was asked for, as a share of it."""
_TRIALS = 12
"""Most shares that are tried in one search."""
_LAYERS = 3
"""Times that layers which make too large steps are held while others go on."""
_SESSIONS = (4, 24)
"""Fewest and most sessions in which one network is timed."""
_PRECISION = 0.004
"""Standard error of the median over sessions that is enough, as a share of it."""
_SECONDS = 0.25
"""How long a network is called in a row, in each session."""
_ALIVE = 4
"""Sessions that are kept, so that the next one cannot lie where the last one did."""
_WIDE_OPEN = 20.0


class Milliseconds:
    """The median time of one call of the compacted network, of many in a row, as a server makes them.

    A network is loaded anew several times, since where its memory lies makes it a few per cent faster or
    slower; each time it is called for a quarter of a second, and then the whole network, for which other
    work on the machine is as heavy. Calls that were interrupted do not count. The time is the median ratio
    of the two times the median of the whole network over all of them. With one thread it is the time of the
    processor, see ``sparsereg.compression.timing.times.seconds_of``.

    Args:
        accountant: of the network.
        example_input: one example as it takes it, on the CPU.
        runtime: one of ``sparsereg.compression.timing.runtimes.RUNTIMES``.
        threads: how many may compute.
        batch: examples in a call.

    Raises:
        InputError: the runtime is not installed.
    """

    unit, key = "ms", "target_latency_ms"
    counted = False  # but measured, with noise: a little above the target is as near as a little below

    def __init__(
        self,
        accountant: Accountant,
        example_input: Any,
        runtime: str,
        threads: int,
        batch: int,
    ) -> None:
        check_runtime(runtime)
        self.what = f"{runtime}, {threads} thread{'s' * (threads > 1)}, batch {batch}"
        self._example = batch_of(example_input, batch)
        self._runtime, self._threads = runtime, threads
        self._loaders = Loaders(example_input, threads)
        self._whole: Loaded | None = None
        self._of_whole: list[float] = []
        self._widths = Widths(accountant)
        clock = Clock(runtime, threads, batch)
        self._grids = []
        layers = self._widths.layers
        with torch_threads(threads), bar("timing layers", "layer", len(layers)) as steps:
            for layer in layers:
                self._grids.append(clock.grid(layer))
                steps.update(1)
        clock.save()
        self.full = self.floor = math.nan
        self._scale, self._rate = 1.0, 0.0

    def fit(self, whole: nn.Module, smallest: nn.Module) -> None:
        """Measure the whole network and the smallest one, and make the model agree with both."""
        with torch_threads(self._threads), torch.inference_mode():
            self._whole = self._loaders.load(whole, self._runtime)
        self.floor = self.measure(smallest)
        self.full = self._of_all()
        inputs, outputs = self._widths.whole()
        layers, elements = float(self._layers(inputs, outputs)), float(self._elements(outputs))
        rest = self.full - self.floor - layers
        self._scale = min(1.0, (self.full - self.floor) / layers) if layers > 0 else 1.0
        self._rate = max(rest, 0.0) / elements if elements else 0.0

    def expected(self) -> Tensor:
        """Expected time with the gates as they are, by the model, differentiable; a scalar."""
        return self._model(*self._widths.expected())

    def exact(self) -> float:
        """Time of the compacted network with the gates as they are, by the model."""
        return float(self._model(*self._widths.exact()))

    def measure(self, network: nn.Module, target: float = math.nan) -> float:
        """Return the median time of a call of a network.

        Args:
            network: compacted.
            target: what it is compared with: where it is clearly off, fewer sessions are enough.
        """
        ratios: list[float] = []
        alive: deque[Loaded] = deque(maxlen=_ALIVE)
        with torch_threads(self._threads), torch.inference_mode():
            while not _enough(ratios, target / self._of_all()):
                alive.append(self._loaders.anew(network, self._runtime))
                ratios.append(self._ratio(alive[-1]))
        self._loaders.forget(network)
        return statistics.median(ratios) * self._of_all()

    def _of_all(self) -> float:
        """Median time of the whole network over all sessions."""
        return statistics.median(self._of_whole) * 1e3 if self._of_whole else math.nan

    def _ratio(self, loaded: Loaded) -> float:
        """Time of a network over that of the whole one."""
        assert self._whole is not None
        own = self._calls(loaded)
        self._of_whole.append(self._calls(self._whole))
        return own / self._of_whole[-1]

    def _calls(self, loaded: Loaded) -> float:
        """Median of calls in a row, in seconds."""
        return seconds_in_a_row(loaded, loaded.prepare(self._example), self._threads, _SECONDS)

    def _model(self, inputs: Tensor, outputs: Tensor) -> Tensor:
        layers, elements = self._layers(inputs, outputs), self._elements(outputs)
        return self.floor + self._scale * layers + self._rate * elements

    def _layers(self, inputs: Tensor, outputs: Tensor) -> Tensor:
        times = [grid.at(i, o) for grid, i, o in zip(self._grids, inputs, outputs, strict=True)]
        return 1e3 * torch.stack(times).sum() if times else inputs.sum()

    def _elements(self, outputs: Tensor) -> Tensor:
        return (outputs * outputs.new_tensor([layer.elements for layer in self._widths.layers])).sum()


def _enough(ratios: list[float], wanted: float) -> bool:
    """Whether their median is known well enough, or is clearly not the one that is wanted.

    Args:
        ratios: one of each session.
        wanted: nan if none is.
    """
    if not _SESSIONS[0] <= len(ratios) < _SESSIONS[1]:
        return len(ratios) >= _SESSIONS[1]
    middle = statistics.median(ratios)
    # 1.25: the standard error of a median of normal numbers over that of their mean.
    error = 1.25 * statistics.stdev(ratios) / math.sqrt(len(ratios)) / middle
    return error <= _PRECISION or abs(middle / wanted - 1) > TOLERANCE + 4 * error


class Megabytes:
    """Weights and the largest sum of all tensors that a call of the compacted network holds at once.

    Counted on its operations in the order in which they run, each tensor from the operation that makes it to
    the last one that reads it; views take nothing. In 10^6 bytes.

    Args:
        accountant: of the network.
        example_input: one example as it takes it, on the CPU.
        batch: examples in a call.
    """

    unit, key = "MB", "target_memory_mb"
    counted = True  # without noise: above the target is too much

    def __init__(self, accountant: Accountant, example_input: Any, batch: int) -> None:
        self.what = f"batch {batch}"
        self._accountant = accountant
        self._example = batch_of(example_input, batch)
        self._widths = Widths(accountant)
        self.full = self.floor = math.nan
        self._weights = self._activations = 0.0

    def fit(self, whole: nn.Module, smallest: nn.Module) -> None:
        """Measure the whole network and the smallest one, and make the model agree with both."""
        self.full, self.floor = self.measure(whole), self.measure(smallest)
        self._weights = min(_megabytes_of_weights(whole), self.full - self.floor)
        self._activations = self.full - self.floor - self._weights
        self._largest = float(self._peak(*self._widths.whole()))

    def expected(self) -> Tensor:
        """Expected megabytes with the gates as they are, by the model, differentiable; a scalar."""
        return self._model(self._accountant.expected_parameters(), *self._widths.expected())

    def exact(self) -> float:
        """Megabytes of the compacted network with the gates as they are, by the model."""
        left = (1 - self._accountant.exact_sparsity()) * self._accountant.parameters
        inputs, outputs = self._widths.exact()
        return float(self._model(inputs.new_tensor(left), inputs, outputs))

    def measure(self, network: nn.Module, target: float = math.nan) -> float:
        """Return the weights and the peak of the activations of a compacted network.

        Args:
            network: compacted.
            target: makes no difference to what is counted.
        """
        assert isinstance(network, fx.GraphModule)
        return _megabytes_of_weights(network) + peak_megabytes(network, self._example)

    def _model(self, parameters: Tensor, inputs: Tensor, outputs: Tensor) -> Tensor:
        weights = self._weights * parameters / self._accountant.parameters
        return (
            self.floor + weights + self._activations * self._peak(inputs, outputs) / max(self._largest, 1.0)
        )

    def _peak(self, inputs: Tensor, outputs: Tensor) -> Tensor:
        """Numbers that the layer with the most of them reads and makes."""
        layers = self._widths.layers
        made = outputs * outputs.new_tensor([layer.elements for layer in layers])
        read = inputs * inputs.new_tensor([layer.elements * math.prod(layer.stride) for layer in layers])
        return (made + read).max() if layers else outputs.sum()


def _megabytes_of_weights(network: nn.Module) -> float:
    return sum(t.numel() * t.element_size() for t in (*network.parameters(), *network.buffers())) / 1e6


@torch.no_grad()
def peak_megabytes(network: fx.GraphModule, example_input: Any) -> float:
    """Return the largest sum of all tensors, inputs included, that are alive at once, in 10^6 bytes.

    Args:
        network: compacted.
        example_input: a batch as it takes it.

    Example:
        >>> net = nn.Sequential(nn.Linear(1000, 500, bias=False), nn.ReLU())
        >>> peak_megabytes(compact(net, torch.ones(1, 1000)), torch.ones(1, 1000))
        0.006
    """
    own = torch.utils._pytree.tree_map_only(Tensor, torch.clone, example_input)  # a slice holds all it is of
    args, kwargs = inputs_of(own)
    by_name = iter(args)
    given = [
        kwargs[str(n.target)] if str(n.target) in kwargs else next(by_name)
        for n in network.graph.nodes
        if n.op == "placeholder"
    ]
    sizes = _Sizes(network)
    sizes.run(*given)
    last = {read: i for i, node in enumerate(network.graph.nodes) for read in node.all_input_nodes}
    alive: dict[int, int] = {}
    peak = 0
    for i, node in enumerate(network.graph.nodes):
        alive |= sizes.storages.get(node, {})
        peak = max(peak, sum(alive.values()))
        needed = {s for n, at in last.items() if at > i for s in sizes.storages.get(n, {})}
        alive = {s: size for s, size in alive.items() if s in needed}
    return peak / 1e6


class _Sizes(fx.Interpreter):
    """Runs a graph and notes which memory each of its tensors is in; keeps all: none is used twice."""

    def __init__(self, network: fx.GraphModule) -> None:
        super().__init__(network, garbage_collect_values=False)
        self.storages: dict[fx.Node, dict[int, int]] = {}
        held = (*network.parameters(), *network.buffers())
        self._weights = {t.untyped_storage().data_ptr() for t in held}

    def run_node(self, n: fx.Node) -> Any:
        """Run it as ever, and look at the result."""
        result = super().run_node(n)
        tensors = [x for x in torch.utils._pytree.tree_leaves(result) if isinstance(x, Tensor)]
        memory = [(x.untyped_storage().data_ptr(), x.untyped_storage().nbytes()) for x in tensors]
        self.storages[n] = {pointer: size for pointer, size in memory if pointer not in self._weights}
        return result


Cost = Milliseconds | Megabytes


class MeasuredBudget(Budget):
    """What a compacted network may cost when it is measured.

    Args:
        accountant: counts the network.
        cost: what is measured.
        target: how much of it is allowed, in its unit.
        example_input: one example as the network takes it, on the CPU.
        proportional_gain: of the multiplier.
        integral_gain: of the multiplier.
        shares: what parts of the network may cost.
        round_to: see ``sparsereg.compression.budget.meet_``.

    Attributes:
        reached: what was measured last by ``meet``; None before.

    Raises:
        InputError: the target is below what the smallest network costs, or not below what the whole one does.
    """

    def __init__(
        self,
        accountant: Accountant,
        cost: Cost,
        target: float,
        example_input: Any,
        proportional_gain: float = 10.0,
        integral_gain: float = 0.01,
        shares: Sequence[Share] = (),
        round_to: int = 1,
    ) -> None:
        self.measured, self.target, self.example_input = cost, target, example_input
        self.reached: float | None = None
        self._smallest = "with all gates shut"
        super().__init__(accountant, cost.key, 1.0, proportional_gain, integral_gain, shares, round_to)
        with _plain_tensors(), doing("measuring the whole network and the smallest"):
            self._fit()
        self.kept = target / cost.full

    def expected_share(self) -> Tensor:
        """Share of the cost that is expected to stay, by the model; a scalar."""
        return self.measured.expected() / self.measured.full

    def exact_share(self) -> float:
        """Share of the cost that compaction leaves, by the model."""
        return self.measured.exact() / self.measured.full

    def _fit(self) -> None:
        gates, cost = self.accountant.gates, self.measured
        before = [gate.log_alpha.clone() for gate in gates]
        try:
            for gate in gates:
                gate.log_alpha.fill_(_WIDE_OPEN)
            self._fit_between(self._compacted())
        finally:
            _restore(gates, before)
        said = f"{cost.key}={self.target:g}"
        if self.target < cost.floor * (1 + TOLERANCE):
            raise InputError(
                f"{said}: {self._smallest} the network still takes {cost.floor:.3g} {cost.unit}"
                f" ({cost.what}): ask for more"
            )
        if self.target >= cost.full:
            raise InputError(
                f"{said}: the whole network takes {cost.full:.3g} {cost.unit} ({cost.what}): ask for less"
            )
        log.info(
            "the whole network takes %.3g %s (%s), the smallest %.3g",
            cost.full,
            cost.unit,
            cost.what,
            cost.floor,
        )

    def _fit_between(self, whole: fx.GraphModule) -> None:
        """Fit the model between the whole network and the one with all gates shut."""
        for gate in self.accountant.gates:
            gate.log_alpha.fill_(-_WIDE_OPEN)
        smallest = self._compacted()
        if not _answers(smallest):
            for gate in self.accountant.gates:
                gate.log_alpha.view(-1)[0] = _WIDE_OPEN
            smallest, self._smallest = self._compacted(), "with one unit left in each place"
        self.measured.fit(whole, smallest)

    def _compacted(self) -> fx.GraphModule:
        model = self.accountant.model
        if next(model.parameters()).device.type != "cpu":
            model = copied(model).cpu()
        return fuse(compact(model, self.example_input, check=False))

    def meet(self) -> None:
        """Set the gates so that the compacted network takes what it may: set, measure, correct, repeat."""
        with _plain_tensors(), bar("measuring networks", "network", None) as steps:
            self._meet(steps)

    def _meet(self, steps: Any) -> None:
        gates, cost = self.accountant.gates, self.measured
        start = [gate.log_alpha.clone() for gate in gates]
        known: dict[bytes, float] = {}
        found = self._search(start, known, steps)
        nearest = min(found, key=lambda one: one.error)
        if nearest.error > TOLERANCE and not self.parts and self.round_to == 1:
            found += self._between(start, found, known, steps)
            nearest = min(found, key=lambda one: one.error)
        for _ in range(_LAYERS):
            held = None if nearest.error <= TOLERANCE else self._without_step(start, found)
            if held is None:
                break
            start = held
            found += self._search(start, known, steps)
            nearest = min(found, key=lambda one: one.error)
        self.reached, self.met = nearest.value, True
        _restore(gates, nearest.gates)
        if nearest.error > TOLERANCE:
            log.warning(
                "%s=%g: the nearest that was found is %.4g %s; single gates cost more than 2 %% here",
                cost.key,
                self.target,
                self.reached,
                cost.unit,
            )

    def _search(self, start: Sequence[Tensor], known: dict[bytes, float], steps: Any) -> list["_Trial"]:
        """Correct the share that the model may keep until what is measured is what was asked for.

        Args:
            start: locations of the gates, whose order is kept.
            known: what was measured, by the gates that are open; added to.
            steps: a bar of what is measured.
        """
        gates, cost = self.accountant.gates, self.measured
        found: list[_Trial] = []
        low, high, kept = cost.floor / cost.full, 1.0, self.kept
        for _ in range(_TRIALS):
            _restore(gates, start)
            parts = [part.part for part in self.parts]
            meet_all_(self.accountant, self.exact_share, kept, parts, self.round_to)
            found.append(self._tried(known, steps))
            if found[-1].error <= TOLERANCE / 4:
                break
            value = found[-1].value
            low, high = (low, kept) if value > self.target else (kept, high)
            nearer = kept + (self.target - value) / cost.full
            kept = nearer if low < nearer < high else (low + high) / 2
            if high - low < 1e-4:
                break
        return found

    def _tried(self, known: dict[bytes, float], steps: Any) -> "_Trial":
        """Measure the network as its gates are now, unless that was done; see ``_search``."""
        gates, cost = self.accountant.gates, self.measured
        open_ = torch.cat([gate.median().flatten() > 0 for gate in gates]).cpu().numpy().tobytes()
        if open_ not in known:
            known[open_] = cost.measure(self._compacted(), self.target)
            log.info("%s=%g: measured %.4g %s", cost.key, self.target, known[open_], cost.unit)
            steps.set_postfix_str(f"{known[open_]:.4g} of {self.target:g} {cost.unit}")
            steps.update(1)
        error = known[open_] / self.target - 1
        off = math.inf if error > 0 and cost.counted else abs(error)
        return _Trial(off, known[open_], [gate.log_alpha.clone() for gate in gates])

    def _between(
        self, start: Sequence[Tensor], found: Sequence["_Trial"], known: dict[bytes, float], steps: Any
    ) -> list["_Trial"]:
        """Open gates one by one from the nearest network below the target on, towards the one above it.

        Where the model says the same of several widths, their gates open together, however long they take.
        Where none above was found, it is the whole network.
        """
        below, above = self._sides(found)
        if below is None:
            return []
        gates, tried = self.accountant.gates, list[_Trial]()
        if above is None:
            opened = [
                s.clamp(min=log_alpha_at(0.5 + MARGIN, *g._shape)) for s, g in zip(start, gates, strict=True)
            ]
            above = _Trial(math.inf, self.measured.full, opened)
        opens = torch.cat(
            [
                ((gate_median(b, *g._shape) > 0) & (gate_median(a, *g._shape) <= 0)).flatten()
                for a, b, g in zip(below.gates, above.gates, gates, strict=True)
            ]
        )
        odds = torch.cat([s.flatten().double() - shift(*g._shape) for s, g in zip(start, gates, strict=True)])
        order = odds.where(opens, -math.inf).argsort(descending=True)[: int(opens.sum())]
        low, high = 0, len(order)
        while high - low > 1 and all(one.error > TOLERANCE / 4 for one in tried):
            middle = (low + high) // 2
            chosen = torch.zeros_like(opens).index_fill(0, order[:middle], 1)
            parts = chosen.split([g.log_alpha.numel() for g in gates])
            for g, a, b, own in zip(gates, below.gates, above.gates, parts, strict=True):
                g.log_alpha.copy_(torch.where(own.view_as(a), b, a))
            tried.append(self._tried(known, steps))
            low, high = (low, middle) if tried[-1].value > self.target else (middle, high)
        return tried

    def _sides(self, found: Sequence["_Trial"]) -> tuple["_Trial | None", "_Trial | None"]:
        """The nearest that was found below the target, and above it."""
        below = max((t for t in found if t.value <= self.target), key=lambda t: t.value, default=None)
        above = min((t for t in found if t.value > self.target), key=lambda t: t.value, default=None)
        return below, above

    def _without_step(self, start: Sequence[Tensor], found: Sequence["_Trial"]) -> list[Tensor] | None:
        """Locations with which a layer that makes too large a step to the target stays below it.

        Kernels compute channels in blocks, so that one more can cost much; others then fill what is left.

        Args:
            start: locations that the steps were made from.
            found: what was measured.

        Returns:
            Locations; None if all that was measured is on one side of the target.
        """
        below, above = self._sides(found)
        if below is None or above is None:
            return None
        held = []
        for location, one, other, gate in zip(
            start, below.gates, above.gates, self.accountant.gates, strict=True
        ):
            open_, later = (gate_median(v, *gate._shape) > 0 for v in (one, other))
            held.append(location if torch.equal(open_, later) else torch.where(open_, location, -_WIDE_OPEN))
        return held


class _Trial(NamedTuple):
    """A network that was measured.

    Attributes:
        error: how far it is from the target, as a share of it; infinite above one that is counted.
        value: what was measured.
        gates: their locations.
    """

    error: float
    value: float
    gates: list[Tensor]


def _answers(network: fx.GraphModule) -> bool:
    """Whether a network's answer depends on what it is given: without units it may be a constant."""
    reached = {node for node in network.graph.nodes if node.op == "placeholder"}
    for node in network.graph.nodes:
        sizes_only = node.target == "size" or "sym_size" in str(node.target)
        if not sizes_only and reached & set(node.all_input_nodes):
            reached.add(node)
    return any(node.op == "output" for node in reached)


@contextmanager
def _plain_tensors() -> Iterator[None]:
    """No gradients, but tensors that exporters take, also where Lightning validates in inference mode."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def _restore(gates: list[HardConcrete], values: Sequence[Tensor]) -> None:
    for gate, value in zip(gates, values, strict=True):
        gate.log_alpha.copy_(value)


def latency_budget(
    accountant: Accountant,
    example_input: Any,
    milliseconds: float,
    proportional_gain: float = 10.0,
    integral_gain: float = 0.01,
    *,
    runtime: str | None = None,
    threads: int = 1,
    batch: int = 1,
    shares: Sequence[Share] = (),
) -> MeasuredBudget:
    """Return the budget of a network in milliseconds, for a loop of yours.

    Args:
        accountant: of the network with gates.
        example_input: one example as it takes it, on the CPU.
        milliseconds: that one call of the compacted network may take.
        proportional_gain: of the multiplier.
        integral_gain: of the multiplier.
        runtime: where; onnxruntime, or eager PyTorch where that is not installed, if None.
        threads: how many may compute.
        batch: examples in a call.
        shares: what parts of the network may cost.

    Raises:
        InputError: the runtime is not installed, or the network cannot be that fast, or already is.
    """
    where = default_runtime() if runtime is None else runtime
    cost = Milliseconds(accountant, example_input, where, threads, batch)
    gains = proportional_gain, integral_gain
    return MeasuredBudget(accountant, cost, milliseconds, example_input, *gains, shares)
