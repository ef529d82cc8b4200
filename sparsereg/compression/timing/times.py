"""How long a layer takes as a function of its widths: timed once on a grid, monotone and piecewise linear.

A layer is a convolution or a product with a matrix of weights, alone in a runtime, with as many examples as
a call will have. Times are kept on the disk by machine, runtime, threads and shape, so that they are
measured once. Between grid points a time is interpolated, so that expected widths have an expected time
with a gradient; what the kernels do to widths between multiples of 8 and 16 is in the grid.
"""

import hashlib
import json
import logging
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sparsereg.compression.timing.runtimes import Loaded, Loaders
from sparsereg.errors import OutputError
from sparsereg.files import write_atomically

try:
    import resource
except ImportError:  # on Windows
    resource = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

CACHE = "SPARSEREG_CACHE"
"""Environment variable that names the folder of measured times."""
_SHARES = (0.0625, 0.125, 0.25, 0.5, 0.75, 1.0)
_BLOCK = 8
"""Grid points are put on multiples of it where a layer is wide enough: kernels compute blocks of channels."""
_FIRST, _FEWEST, _MOST = 2, 5, 200
"""Calls that fill the caches, and then the fewest and the most of a row."""
_RUNS, _SECONDS = 15, 0.02
"""Most runs and most time for one point of a grid."""


@dataclass(frozen=True)
class Layer:
    """A layer as far as its time depends on it.

    Attributes:
        kind: "conv" or "linear".
        inputs: channels or features that it reads, with all its groups.
        outputs: those that it makes.
        size: of the map that it makes, (height, width, ...); for "linear" (rows for one example,).
        kernel: of a convolution.
        stride: likewise.
        dilation: likewise.
        groups: likewise; as many as inputs: depthwise.
    """

    kind: str
    inputs: int
    outputs: int
    size: tuple[int, ...]
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1

    @property
    def depthwise(self) -> bool:
        """Whether each channel is its own group."""
        return self.kind == "conv" and self.groups > 1 and self.groups == self.inputs

    @property
    def said(self) -> str:
        """In words.

        Example:
            >>> Layer("conv", 16, 32, (8, 8), (3, 3), (2, 2), (1, 1)).said
            'a 3x3 convolution of 16 to 32 channels, a map of 8x8'
        """
        across = " x ".join(map(str, self.size))
        if self.kind == "linear":
            return f"a linear layer of {self.inputs} to {self.outputs}, {across} rows"
        kernel, across = "x".join(map(str, self.kernel)), across.replace(" ", "")
        groups = f" in {self.groups} groups" if self.groups > 1 else ""
        return (
            f"a {kernel} convolution of {self.inputs} to {self.outputs} channels{groups}, a map of {across}"
        )

    @property
    def elements(self) -> int:
        """Numbers that one output channel of it has for one example."""
        return math.prod(self.size)


@dataclass(frozen=True)
class Grid:
    """Seconds of a layer at some widths.

    Attributes:
        inputs: widths of what is read, ascending from 0.
        outputs: widths of what is made, ascending from 0.
        seconds: (inputs, outputs), float64, ascending along both.
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    seconds: np.ndarray

    def at(self, inputs: Tensor, outputs: Tensor) -> Tensor:
        """Time at any widths, which may be fractions, differentiable; scalars in and out."""
        table = torch.from_numpy(self.seconds).to(inputs)
        i, a = _place(self.inputs, inputs)
        j, b = _place(self.outputs, outputs)
        low = table[i, j] * (1 - b) + table[i, j + 1] * b
        high = table[i + 1, j] * (1 - b) + table[i + 1, j + 1] * b
        return low * (1 - a) + high * a


def _place(points: tuple[int, ...], width: Tensor) -> tuple[int, Tensor]:
    """The grid cell of a width, and how far in it the width is, differentiable."""
    value = float(width.detach())
    cell = min(max(int(np.searchsorted(points, value, side="right")) - 1, 0), len(points) - 2)
    low, high = points[cell], points[cell + 1]
    return cell, (width - low) / (high - low)


class Clock:
    """Times layers in one runtime on this machine, each once: what was measured before is read from the disk.

    Args:
        runtime: one of ``sparsereg.compression.timing.runtimes.RUNTIMES``; layers are timed
            eagerly for "compiled".
        threads: how many may compute.
        batch: examples in a call.
        folder: where times are kept; that of ``cache_folder`` if None.
    """

    def __init__(self, runtime: str, threads: int, batch: int, folder: Path | None = None) -> None:
        self.runtime = "eager" if runtime == "compiled" else runtime
        self.threads = threads
        self.batch = batch
        self._machine = _machine(self.runtime, threads)
        name = hashlib.sha256(json.dumps(self._machine, sort_keys=True).encode()).hexdigest()[:16]
        self.file = (cache_folder() if folder is None else folder) / "layers" / f"{name}.json"
        self._known = _read(self.file, self._machine)

    def grid(self, layer: Layer) -> Grid:
        """Return the times of a layer; measure them if that was never done."""
        inputs, outputs = _points(layer.inputs), _points(layer.outputs)
        key = json.dumps([asdict(layer), self.batch, inputs, outputs])
        if key not in self._known:
            self._known[key] = self._measure(layer, inputs, outputs)
        table = np.array(self._known[key], dtype=np.float64)
        # What a call costs whatever it computes is counted once, for the whole network.
        table = np.maximum(table - table.min(), 0.0)
        table = np.maximum.accumulate(np.maximum.accumulate(table, axis=0), axis=1)
        return Grid((0, *inputs), (0, *outputs), np.pad(table, ((1, 0), (1, 0))))

    def save(self) -> None:
        """Keep what was measured; a folder that cannot be written to costs the next run the time again."""
        content = json.dumps({"machine": self._machine, "seconds": self._known})
        try:
            write_atomically(self.file, lambda beside: beside.write_text(content))
        except (OutputError, OSError) as error:
            logger.warning("times of layers are not kept: %s", error)

    def _measure(self, layer: Layer, inputs: list[int], outputs: list[int]) -> list[list[float]]:
        logger.info("timing %s in %s", layer.said, self.runtime)
        if layer.depthwise:
            row = [self._seconds(layer, n, n) for n in outputs]
            return [row for _ in inputs]
        return [[self._seconds(layer, i, o) for o in outputs] for i in inputs]

    def _seconds(self, layer: Layer, inputs: int, outputs: int) -> float:
        loaded, x = _alone(layer, inputs, outputs, self.runtime, self.threads, self.batch)
        given = loaded.prepare(x)
        taken: list[float] = []
        loaded.run(given)
        end = time.perf_counter() + _SECONDS
        while len(taken) < 3 or (len(taken) < _RUNS and time.perf_counter() < end):
            taken.append(seconds_of(loaded, given, self.threads))
        # Other work on the machine only ever adds time.
        return min(statistics.median(taken), 1.2 * min(taken))


def seconds_of(loaded: Loaded, given: Any, threads: int) -> float:
    """Run a network once and return how long it computed.

    Of a single thread that is the time of the processor: the same as a clock's where nothing else runs, and
    not longer where other programs take their turns. Of several threads it is a clock's time.

    Args:
        loaded: the network.
        given: what it reads, prepared.
        threads: that it may compute with.
    """
    clock = time.process_time if threads == 1 else time.perf_counter
    start = clock()
    loaded.run(given)
    return clock() - start


def seconds_in_a_row(loaded: Loaded, given: Any, threads: int, seconds: float) -> float:
    """Median time of calls of a network one after the other, as a server makes them.

    Where the system gave the processor to somebody else, the caches are somebody else's afterwards: such a
    call and the one behind it do not count, as long as enough others are left.

    Args:
        loaded: the network.
        given: what it reads, prepared.
        threads: that it may compute with.
        seconds: that the calls may take together.
    """
    for _ in range(_FIRST):
        loaded.run(given)
    taken: list[float] = []
    calm: list[float] = []
    before, was_calm = _interruptions(), False
    while len(taken) < _FEWEST or (len(taken) < _MOST and sum(taken) < seconds):
        taken.append(seconds_of(loaded, given, threads))
        after = _interruptions()
        if was_calm and after == before:
            calm.append(taken[-1])
        before, was_calm = after, after == before
    return statistics.median(calm if len(calm) >= _FEWEST else taken)


def _interruptions() -> int:
    """How often the processor was taken from this process; always 0 where the system does not tell."""
    if resource is None:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def cache_folder() -> Path:
    """The folder for what was measured on this machine: ``$SPARSEREG_CACHE``, or the user's own."""
    if os.environ.get(CACHE):
        return Path(os.environ[CACHE])
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")) / "sparsereg"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "sparsereg"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sparsereg"


def _points(width: int) -> list[int]:
    """Widths of a grid: shares of the whole, on multiples of a block where there is more than one."""
    found = {1, width}
    for share in _SHARES:
        n = max(1, round(share * width))
        found.add(n if n < 2 * _BLOCK else min(width, _BLOCK * round(n / _BLOCK)))
    return sorted(found)


def _machine(runtime: str, threads: int) -> dict[str, Any]:
    """What a time depends on besides the layer."""
    package = {"onnxruntime": "onnxruntime", "openvino": "openvino"}.get(runtime, "torch")
    try:
        number = version(package)
    except PackageNotFoundError:
        number = ""
    return {
        "processor": _processor(),
        "system": platform.system(),
        "runtime": f"{runtime} {package} {number}",
        "threads": threads,
    }


def _processor() -> str:
    """The processor's name; where the system does not tell, its kind."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next(
        (x.partition(":")[2].strip() for x in lines if x.startswith("model name")), platform.machine()
    )


def _read(file: Path, machine: dict[str, Any]) -> dict[str, list[list[float]]]:
    """Read measured times; what is not whole is measured again."""
    try:
        content = json.loads(file.read_text())
        if content["machine"] != machine:
            return {}
        return {key: table for key, table in content["seconds"].items() if _is_table(key, table)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _is_table(key: str, table: Any) -> bool:
    _, _, inputs, outputs = json.loads(key)
    array = np.array(table, dtype=np.float64)
    return array.shape == (len(inputs), len(outputs)) and bool(
        np.isfinite(array).all() and (array >= 0).all()
    )


def _alone(
    layer: Layer, inputs: int, outputs: int, runtime: str, threads: int, batch: int
) -> tuple[Loaded, Tensor]:
    """A layer of some widths, alone and ready to run, and what it reads."""
    x, weight, settings = _operands(layer, inputs, outputs, batch)
    if runtime == "eager":
        run: Callable[[Tensor], Tensor]
        if layer.kind == "linear":
            run = lambda given: F.linear(given, weight)  # noqa: E731
        else:
            run = lambda given: torch.convolution(given, weight, None, *settings)  # noqa: E731
        return Loaded(lambda given: given, run, lambda answer: (answer,)), x
    loaders = Loaders(x, threads)
    return loaders.run_onnx(_onnx(layer, x, weight, settings), runtime), x


def _operands(layer: Layer, inputs: int, outputs: int, batch: int) -> tuple[Tensor, Tensor, tuple[Any, ...]]:
    """Input, weight, and what torch.convolution takes besides."""
    generator = torch.Generator().manual_seed(0)
    if layer.kind == "linear":
        x = torch.randn(batch * layer.elements, inputs, generator=generator)
        return x, torch.randn(outputs, inputs, generator=generator) / math.sqrt(inputs), ()
    groups = inputs if layer.depthwise else math.gcd(math.gcd(layer.groups, inputs), outputs)
    weight = torch.randn(outputs, inputs // groups, *layer.kernel, generator=generator)
    size = [
        (n - 1) * s + d * (k - 1) + 1
        for n, s, d, k in zip(layer.size, layer.stride, layer.dilation, layer.kernel, strict=True)
    ]
    x = torch.randn(batch, inputs, *size, generator=generator)
    zeros = [0] * len(size)
    return x, weight, (layer.stride, zeros, layer.dilation, False, zeros, groups)


def _onnx(layer: Layer, x: Tensor, weight: Tensor, settings: tuple[Any, ...]) -> bytes:
    """The layer as an ONNX file."""
    from onnx import TensorProto, helper, numpy_helper

    if layer.kind == "linear":
        node = helper.make_node("MatMul", ["x", "w"], ["y"])
        weight = weight.T.contiguous()
    else:
        stride, _, dilation, _, _, groups = settings
        node = helper.make_node(
            "Conv", ["x", "w"], ["y"], kernel_shape=list(layer.kernel), strides=list(stride),
            dilations=list(dilation), group=groups,
        )  # fmt: skip
    graph = helper.make_graph(
        [node],
        "layer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, list(x.shape))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(weight.numpy(), "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    content: bytes = model.SerializeToString()
    return content
