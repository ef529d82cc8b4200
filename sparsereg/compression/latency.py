"""How long networks take: medians of alternating runs, so that other load on the machine hits all alike."""

import logging
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sparsereg.compression.deploy import onnx_session
from sparsereg.errors import InputError
from sparsereg.files import write_atomically

if TYPE_CHECKING:
    import pandas

logger = logging.getLogger(__name__)

RUNTIMES = ("eager", "compiled", "onnxruntime")
"""PyTorch as it is, torch.compile, and onnxruntime on the exported network."""


@dataclass(frozen=True)
class Timing:
    """How long one network takes for one batch in one runtime.

    Attributes:
        model: the network's name.
        runtime: one of ``RUNTIMES``.
        batch: examples in a batch.
        seconds: median over the runs.
        low: first quartile.
        high: third quartile.
        speedup: median over the runs of (the first network's time / this one's in the same round).

    Example:
        >>> Timing("compacted", "eager", batch=1, seconds=0.002, low=0.0019, high=0.0021, speedup=3.0).speedup
        3.0
    """

    model: str
    runtime: str
    batch: int
    seconds: float
    low: float
    high: float
    speedup: float


@dataclass(frozen=True)
class Latency:
    """Timings of several networks.

    Attributes:
        rows: one for each network, runtime and batch size.
        settings: device, threads, versions and number of runs, for the caption.

    Example:
        >>> row = Timing("compacted", "eager", batch=1, seconds=0.002, low=0.0019, high=0.0021, speedup=3.0)
        >>> print(Latency((row,), "one thread").table().splitlines()[1])
        compacted                      eager      1      2.00       1.90 - 2.10     3.00
    """

    rows: tuple[Timing, ...]
    settings: str

    def to_frame(self) -> "pandas.DataFrame":
        """The rows as a pandas data frame."""
        import pandas

        return pandas.DataFrame([asdict(row) for row in self.rows])

    def table(self) -> str:
        """The rows as text, for people."""
        lines = [f"{'network':24s}{'runtime':>12s}{'batch':>7s}{'ms':>10s}{'quartiles':>18s}{'speedup':>9s}"]
        for r in self.rows:
            spread = f"{r.low * 1e3:.2f} - {r.high * 1e3:.2f}"
            time_ = f"{r.seconds * 1e3:10.2f}{spread:>18s}"
            lines.append(f"{r.model:24s}{r.runtime:>12s}{r.batch:7d}{time_}{r.speedup:9.2f}")
        return "\n".join([*lines, self.settings])

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
    models: Mapping[str, nn.Module],
    example_input: Tensor,
    *,
    batch_sizes: Sequence[int] = (1, 128),
    runtimes: Sequence[str] = ("eager",),
    repeats: int = 15,
    channels_last: bool = False,
) -> Latency:
    """Time networks against each other in eval mode.

    Each round runs every network once, in the same order; the first network is the one to compare with.

    Args:
        models: networks by name; left as they are, but for the memory format with ``channels_last``.
        example_input: at least one example, (batch, ...); it is repeated to the batch sizes.
        batch_sizes: examples in a batch.
        runtimes: which of ``RUNTIMES``; torch.compile can take minutes to compile.
        repeats: rounds, after three to warm up.
        channels_last: run eager and compiled networks in this memory format.

    Raises:
        ValueError: an unknown runtime, no network, or a number below 1.
        InputError: onnxruntime is asked for and not installed.

    Example:
        >>> net = nn.Linear(4, 2)
        >>> latency = benchmark({"dense": net}, torch.ones(1, 4), batch_sizes=(1, 8), repeats=1)
        >>> [row.batch for row in latency.rows]
        [1, 8]
    """
    unknown = [r for r in runtimes if r not in RUNTIMES]
    if unknown:
        raise ValueError(f"runtimes must be some of {', '.join(RUNTIMES)}, got {unknown[0]!r}")
    if not models or repeats < 1 or any(b < 1 for b in batch_sizes):
        raise ValueError("benchmark needs at least one network, one round and one example in a batch")
    modes = {name: [(m, m.training) for m in model.modules()] for name, model in models.items()}
    rows: list[Timing] = []
    try:
        with torch.inference_mode():
            for runtime in runtimes:
                runners = {name: _RUNNERS[runtime](m.eval(), example_input) for name, m in models.items()}
                for batch in batch_sizes:
                    x = _batch(example_input, batch, channels_last and runtime != "onnxruntime")
                    rows += _alternate(runners, x, runtime, repeats)
    finally:
        for pairs in modes.values():
            for module, training in pairs:
                module.training = training
    return Latency(tuple(rows), _settings(example_input, repeats, channels_last))


def _batch(example: Tensor, size: int, channels_last: bool) -> Tensor:
    times = -(-size // example.shape[0])
    x = example.repeat(times, *(1,) * (example.dim() - 1))[:size]
    return x.contiguous(memory_format=torch.channels_last) if channels_last and x.dim() == 4 else x


def _alternate(
    runners: Mapping[str, Callable[[Tensor], Any]], x: Tensor, runtime: str, repeats: int
) -> list[Timing]:
    seconds: dict[str, list[float]] = {name: [] for name in runners}
    for round_ in range(-3, repeats):
        for name, run in runners.items():
            _wait(x)
            start = time.perf_counter()
            run(x)
            _wait(x)
            if round_ >= 0:
                seconds[name].append(time.perf_counter() - start)
    first = next(iter(seconds.values()))
    rows = []
    for name, taken in seconds.items():
        ratios = [a / b for a, b in zip(first, taken, strict=True)]
        low, _, high = statistics.quantiles(taken, n=4) if len(taken) > 1 else taken * 3
        median = statistics.median(taken)
        rows.append(Timing(name, runtime, x.shape[0], median, low, high, statistics.median(ratios)))
    return rows


def _wait(x: Tensor) -> None:
    """Let an accelerator finish what it was given."""
    if x.device.type == "cuda":
        torch.cuda.synchronize(x.device)


def _eager(model: nn.Module, example: Tensor) -> Callable[[Tensor], Any]:
    return model


def _compiled(model: nn.Module, example: Tensor) -> Callable[[Tensor], Any]:
    compiled: Callable[[Tensor], Any] = torch.compile(model)
    return compiled


def _onnxruntime(model: nn.Module, example: Tensor) -> Callable[[Tensor], Any]:
    """The network as an ONNX file, gates and all, with PyTorch's number of threads."""
    try:
        import onnxruntime  # noqa: F401
    except ImportError as error:
        raise InputError(
            "timing onnxruntime needs packages: pip install onnx onnxscript onnxruntime"
        ) from error
    session = onnx_session(model, example)
    name = session.get_inputs()[0].name

    def run(x: Tensor) -> Any:
        return session.run(None, {name: x.cpu().numpy()})

    return run


_RUNNERS: dict[str, Callable[[nn.Module, Tensor], Callable[[Tensor], Any]]] = {
    "eager": _eager,
    "compiled": _compiled,
    "onnxruntime": _onnxruntime,
}


def _settings(example: Tensor, repeats: int, channels_last: bool) -> str:
    device = torch.cuda.get_device_name(example.device) if example.device.type == "cuda" else "CPU"
    layout = ", channels_last" if channels_last else ""
    return (
        f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}{layout};"
        f" medians of {repeats} alternating runs"
    )
