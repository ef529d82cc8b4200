"""How long networks take: medians of alternating runs, so that other load on the machine hits all alike."""

import logging
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sparsereg.compression.deploy import flat_inputs
from sparsereg.compression.running import evaluating
from sparsereg.compression.timing.runtimes import (
    Loaded,
    Loaders,
    Source,
    batch_of,
    check_runtime,
    default_runtime,
    torch_threads,
)
from sparsereg.compression.timing.times import seconds_of
from sparsereg.files import write_atomically

if TYPE_CHECKING:
    import pandas

logger = logging.getLogger(__name__)

SECONDS, ROUNDS = 40.0, 200
"""How long all timings may take together, and most runs of each network."""
_WARM_UP = 3
_CALLS, _ROW = 10, 0.02
"""Most calls of one network in a row, and the seconds that they may take together."""


@dataclass(frozen=True)
class Timing:
    """How long one network takes for one batch in one runtime.

    Attributes:
        model: the network's name.
        runtime: one of ``RUNTIMES``.
        batch: examples in a batch.
        seconds: of one call, median over the runs.
        low: first quartile.
        high: third quartile.
        runs: how many there were, of a few calls each.
        speedup: median over the runs of (the first network's time / this one's in the same round).

    Example:
        >>> row = Timing("compacted", "eager", 1, seconds=0.002, low=0.0019, high=0.0021, runs=9, speedup=3.0)
        >>> row.speedup
        3.0
    """

    model: str
    runtime: str
    batch: int
    seconds: float
    low: float
    high: float
    runs: int
    speedup: float

    @property
    def text(self) -> str:
        """The row of a table, see ``Latency.table``."""
        spread = f"{in_words(self.low * 1e3)} - {in_words(self.high * 1e3)}"
        time_ = f"{in_words(self.seconds * 1e3):>10s}{spread:>18s}{self.runs:6d}"
        return f"{self.model:24s}{self.runtime:>12s}{self.batch:7d}{time_}{self.speedup:9.2f}"


def in_words(milliseconds: float) -> str:
    """Two digits behind the point, and three digits of what is less than one.

    Example:
        >>> in_words(12.345), in_words(0.02345)
        ('12.35', '0.0234')
    """
    return f"{milliseconds:,.2f}" if milliseconds >= 1 else f"{milliseconds:#.3g}"


HEADER = (
    f"{'network':24s}{'runtime':>12s}{'batch':>7s}{'ms':>10s}{'quartiles':>18s}{'runs':>6s}{'speedup':>9s}"
)
"""Of the rows of ``Timing.text``."""


@dataclass(frozen=True)
class Latency:
    """Timings of several networks.

    Attributes:
        rows: one for each network, runtime and batch size.
        settings: device, threads and versions, for the caption.

    Example:
        >>> row = Timing("compacted", "eager", 1, seconds=0.002, low=0.0019, high=0.0021, runs=9, speedup=3.0)
        >>> print(Latency((row,), "one thread").table().splitlines()[1])
        compacted                      eager      1      2.00       1.90 - 2.10     9     3.00
    """

    rows: tuple[Timing, ...]
    settings: str

    def to_frame(self) -> "pandas.DataFrame":
        """The rows as a pandas data frame."""
        import pandas

        return pandas.DataFrame([asdict(row) for row in self.rows])

    def table(self) -> str:
        """The rows as text, for people."""
        return "\n".join([HEADER, *(row.text for row in self.rows), self.settings])

    def plot(self, path: str | Path) -> Path:
        """Draw the timings as bars, one panel for each batch size, and write them as an image.

        Args:
            path: the file; its suffix chooses the format.
        """
        from matplotlib.figure import Figure

        batches = sorted({r.batch for r in self.rows})
        figure = Figure(figsize=(4.5 * len(batches), 3.6), layout="constrained")
        for panel, batch in zip(figure.subplots(1, len(batches), squeeze=False)[0], batches, strict=True):
            rows = [r for r in self.rows if r.batch == batch]
            names = [f"{r.model}\n{r.runtime}" for r in rows]
            median = [r.seconds * 1e3 for r in rows]
            spread = [[(r.seconds - r.low) * 1e3 for r in rows], [(r.high - r.seconds) * 1e3 for r in rows]]
            panel.barh(names, median, xerr=spread, color="#4c72b0", ecolor="#222222", capsize=3)
            panel.invert_yaxis()
            panel.set_xlabel(f"milliseconds for a batch of {batch}")
        figure.supxlabel(self.settings, fontsize=6)
        path = Path(path)
        write_atomically(path, lambda beside: figure.savefig(beside, dpi=150))
        return path


def benchmark(
    models: Mapping[str, Source],
    example_input: Any,
    *,
    batch_sizes: Sequence[int] = (1, 32),
    runtimes: Sequence[str] = (),
    threads: int | None = None,
    seconds: float = SECONDS,
    repeats: int = ROUNDS,
    channels_last: bool = False,
    on_row: Callable[[Timing], None] | None = None,
    on_step: Callable[[str], None] | None = None,
) -> Latency:
    """Time networks against each other in eval mode, in turns, so that drift of the machine hits all alike.

    In each round every network has its turn, in the same order; the first network is the one to compare with.
    A turn is a few calls in a row, the first of which does not count: it would find in the caches what the
    network before left there, which costs small ones most.
    PyTorch's eager mode at a batch of one mostly times how operations are called, not what they compute: for
    what a smaller network gains there, use another runtime.

    Args:
        models: networks by name, left as they are, or files that ``export`` wrote.
        example_input: at least one example as the networks take it; it is repeated to the batch sizes.
        batch_sizes: examples in a batch.
        runtimes: which of ``RUNTIMES``; () for onnxruntime, or eager PyTorch where that is not installed.
            torch.compile can take minutes to compile. A file takes part in the runtimes that read it.
        threads: how many may compute; those of PyTorch if None.
        seconds: for all timings together, without what loads, exports or compiles the networks.
        repeats: most rounds for each runtime and batch size, after three to warm up.
        channels_last: run eager and compiled networks in this memory format.
        on_row: is told each row as soon as it is measured.
        on_step: is told what is being prepared.

    Raises:
        ValueError: an unknown runtime, no network, or a number below 1.
        InputError: a runtime is not installed; says how to install it.

    Example:
        >>> net = nn.Linear(4, 2)
        >>> x = torch.ones(1, 4)
        >>> latency = benchmark({"dense": net}, x, batch_sizes=(1, 8), runtimes=["eager"], repeats=1)
        >>> [row.batch for row in latency.rows]
        [1, 8]
    """
    runtimes = tuple(runtimes) or (default_runtime(),)
    for runtime in runtimes:
        check_runtime(runtime)
    threads = torch.get_num_threads() if threads is None else threads
    if not models or repeats < 1 or threads < 1 or any(b < 1 for b in batch_sizes) or not seconds > 0:
        raise ValueError("benchmark needs at least one network, round, thread, second and example in a batch")
    share = seconds / (len(runtimes) * len(batch_sizes))
    loaders, rows = Loaders(example_input, threads), []
    in_memory = [m for m in models.values() if isinstance(m, nn.Module)]
    with evaluating(*in_memory), torch_threads(threads), torch.inference_mode():
        for runtime in runtimes:
            ready = _loaded(models, loaders, runtime, on_step)
            for batch in batch_sizes if ready else ():
                own_layout = channels_last and runtime in ("eager", "compiled")
                x = batch_of(example_input, batch, channels_last=own_layout)
                for row in _alternate(ready, x, runtime, batch, threads, repeats, share):
                    rows.append(row)
                    if on_row is not None:
                        on_row(row)
    return Latency(tuple(rows), _settings(example_input, threads, channels_last))


READS = {".onnx": ("onnxruntime", "openvino"), ".xml": ("openvino",), ".pt2": ("eager", "compiled")}
"""Which runtimes read a file."""


def _loaded(
    models: Mapping[str, Source], loaders: Loaders, runtime: str, on_step: Callable[[str], None] | None
) -> dict[str, Loaded]:
    found = {}
    for name, source in models.items():
        if isinstance(source, Path) and runtime not in READS.get(source.suffix, ()):
            continue
        if on_step is not None:
            on_step(f"{name} for {runtime}")
        found[name] = loaders.load(source, runtime)
    return found


def _alternate(
    ready: Mapping[str, Loaded],
    example: Any,
    runtime: str,
    batch: int,
    threads: int,
    repeats: int,
    seconds: float,
) -> list[Timing]:
    """Run all networks in turns until the time is used up, each at least once after warming up."""
    given = {name: loaded.prepare(example) for name, loaded in ready.items()}
    taken: dict[str, list[float]] = {name: [] for name in ready}

    def run_all(counts: bool) -> None:
        for name, loaded in ready.items():
            elapsed = _turn(loaded, given[name], example, threads)
            if counts:
                taken[name].append(elapsed)

    run_all(counts=False)  # compiles, where that is done at the first call: not part of the time
    end = time.perf_counter() + seconds
    for _ in range(_WARM_UP - 1):
        if time.perf_counter() < end:
            run_all(counts=False)
    for round_ in range(repeats):
        if round_ and time.perf_counter() > end:
            break
        run_all(counts=True)
    first = next(iter(taken.values()))
    return [_timing(name, runtime, batch, own, first) for name, own in taken.items()]


def _turn(loaded: Loaded, given: Any, example: Any, threads: int) -> float:
    """Median time of calls in a row, where the first one shows that there is time for several."""
    first = _time(loaded, given, example, threads)
    if first >= _ROW:
        return first
    taken: list[float] = []
    end = time.perf_counter() + _ROW
    while not taken or (len(taken) < _CALLS and time.perf_counter() < end):
        taken.append(_time(loaded, given, example, threads))
    return statistics.median(taken)


def _time(loaded: Loaded, given: Any, example: Any, threads: int) -> float:
    """Seconds of a call: as budgets count them on a CPU, of an accelerator those of a clock."""
    device = flat_inputs(example)[0].device
    if device.type == "cpu":
        return seconds_of(loaded, given, threads)
    torch.accelerator.synchronize(device)  # let it finish what it was given
    start = time.perf_counter()
    loaded.run(given)
    torch.accelerator.synchronize(device)
    return time.perf_counter() - start


def _timing(name: str, runtime: str, batch: int, taken: Sequence[float], first: Sequence[float]) -> Timing:
    ratios = [a / b for a, b in zip(first, taken, strict=True)]
    low, _, high = statistics.quantiles(taken, n=4) if len(taken) > 1 else [taken[0]] * 3
    median = statistics.median(taken)
    return Timing(name, runtime, batch, median, low, high, len(taken), statistics.median(ratios))


def _settings(example: Any, threads: int, channels_last: bool) -> str:
    device = flat_inputs(example)[0].device
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    layout = ", channels_last" if channels_last else ""
    plural = "" if threads == 1 else "s"
    clock = ", processor time" if threads == 1 and device.type == "cpu" else ""
    return (
        f"{where}, {threads} thread{plural}{clock}, torch {torch.__version__}{layout}; medians of alternating"
        " runs"
    )
