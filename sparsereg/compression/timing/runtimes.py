"""Where a network runs: PyTorch as it is or compiled, onnxruntime, OpenVINO; from memory or from its file."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsereg.compression.deploy import Flat, flat_inputs
from sparsereg.compression.refill import Written, onnx_like, write
from sparsereg.compression.units.explain import inputs_of
from sparsereg.errors import InputError

Source = nn.Module | Path
"""A network in memory, or a file that ``export`` wrote."""


@dataclass(frozen=True)
class Loaded:
    """A network that is ready to run.

    Attributes:
        prepare: from an example input, see ``sparsereg.compression.compact``, to what ``run`` takes.
        run: computes the answers.
        tensors: from what ``run`` returns to tensors.
    """

    prepare: Callable[[Any], Any]
    run: Callable[[Any], Any]
    tensors: Callable[[Any], tuple[Tensor, ...]]


class Loaders:
    """Makes networks run; remembers the ONNX file of each network in memory, which takes seconds to write.

    Of networks that run the same operations one file is written, filled with the weights and sizes of each.

    Args:
        example_input: a batch as the networks take it.
        threads: how many may compute.
    """

    def __init__(self, example_input: Any, threads: int) -> None:
        self.example_input = example_input
        self.threads = threads
        self._onnx: dict[tuple[int, bool], Written] = {}
        self._compiled: tuple[nn.Module, Loaded] | None = None

    def load(self, source: Source, runtime: str) -> Loaded:
        """Make a network run in a runtime.

        Args:
            source: the network, in eval mode, or its file.
            runtime: one of ``RUNTIMES``.

        Raises:
            InputError: the runtime is not installed, or the file is none of its own.
            ValueError: an unknown runtime.
        """
        check_runtime(runtime)
        return _LOADERS[runtime](self, source)

    def anew(self, network: nn.Module, runtime: str) -> Loaded:
        """Make a network run in memory of its own, so that two of them do not lie in the same place.

        A compiled one, which takes minutes, is compiled once.

        Args:
            network: in eval mode.
            runtime: one of ``RUNTIMES``.
        """
        if runtime != "compiled":
            return self.load(copy.deepcopy(network) if runtime == "eager" else network, runtime)
        if self._compiled is None or self._compiled[0] is not network:
            self._compiled = network, self.load(network, runtime)
        return self._compiled[1]

    def forget(self, source: Source) -> None:
        """Give the memory of a network's file back."""
        for any_length in (True, False):
            self._onnx.pop((id(source), any_length), None)

    def run_onnx(self, content: bytes, runtime: str) -> Loaded:
        """Make the content of an ONNX file run in onnxruntime or OpenVINO."""
        return (
            _onnxruntime_of(content, self.threads)
            if runtime == "onnxruntime"
            else _openvino_of(content, self.threads)
        )

    def onnx(self, source: Source, any_length: bool) -> bytes:
        """Return the ONNX file of a network, for sequences of any length or of the example's."""
        if isinstance(source, Path):
            return source.read_bytes()
        key = id(source), any_length
        if key not in self._onnx:
            made = self._like_another(source, any_length)
            self._onnx[key] = made or write(source, self.example_input, any_length)
        return self._onnx[key].content

    def _like_another(self, network: nn.Module, any_length: bool) -> Written | None:
        """The file of a network that runs the operations of one whose file there is."""
        others = (written for (_, length), written in self._onnx.items() if length == any_length)
        found = (onnx_like(written, network, self.example_input) for written in others)
        return next((made for made in found if made is not None), None)


def check_runtime(runtime: str) -> None:
    """Raise unless a runtime is known and installed.

    Args:
        runtime: to be looked for.

    Raises:
        ValueError: it is none of ``RUNTIMES``.
        InputError: a package is missing; says how to install it.
    """
    if runtime not in RUNTIMES:
        raise ValueError(f"runtimes must be some of {', '.join(RUNTIMES)}, got {runtime!r}")
    missing = [name for name in RUNTIMES[runtime] if find_spec(name) is None]
    if missing:
        raise InputError(
            f"runtime={runtime} needs the package {missing[0]}: pip install {' '.join(RUNTIMES[runtime])}"
        )


def installed(runtime: str) -> bool:
    """Whether all packages of a runtime are there."""
    return all(find_spec(name) is not None for name in RUNTIMES[runtime])


def default_runtime() -> str:
    """The runtime that is used where none is named: onnxruntime where it is installed, else eager PyTorch."""
    return "onnxruntime" if installed("onnxruntime") else "eager"


@contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """Let PyTorch compute with so many threads for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def batch_of(example_input: Any, size: int, *, channels_last: bool = False) -> Any:
    """Repeat an example input to a batch of a size.

    Args:
        example_input: at least one example.
        size: examples in the batch.
        channels_last: lay maps out in this memory format.
    """

    def repeated(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        x = x.repeat(-(-size // x.shape[0]), *(1,) * (x.dim() - 1))[:size]
        return x.contiguous(memory_format=torch.channels_last) if channels_last and x.dim() == 4 else x

    return torch.utils._pytree.tree_map(repeated, example_input)


def _eager(loaders: Loaders, source: Source) -> Loaded:
    return _in_torch(source if isinstance(source, nn.Module) else _torch_file(source))


def _compiled(loaders: Loaders, source: Source) -> Loaded:
    network = source if isinstance(source, nn.Module) else _torch_file(source)
    torch._dynamo.reset()  # else what other networks compiled to counts against this one
    return _in_torch(torch.compile(network))


def _torch_file(path: Path) -> nn.Module:
    if path.suffix != ".pt2":
        raise InputError(f"{path}: PyTorch runs .pt2 files, this one needs onnxruntime or openvino")
    return torch.export.load(path).module()


def _in_torch(network: Callable[..., Any]) -> Loaded:
    def run(given: tuple[tuple[Any, ...], dict[str, Any]]) -> Any:
        return network(*given[0], **given[1])

    def tensors(answer: Any) -> tuple[Tensor, ...]:
        return tuple(x for x in torch.utils._pytree.tree_leaves(answer) if isinstance(x, Tensor))

    return Loaded(inputs_of, run, tensors)


def onnx_session(content: bytes, threads: int) -> Any:
    """An onnxruntime session on the CPU.

    Args:
        content: of an ONNX file.
        threads: how many may compute.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    # Threads that wait for the next run would take the processor from the network that is timed next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def _onnxruntime(loaders: Loaders, source: Source) -> Loaded:
    return _onnxruntime_of(loaders.onnx(source, any_length=True), loaders.threads)


def _onnxruntime_of(content: bytes, threads: int) -> Loaded:
    session = onnx_session(content, threads)
    names = [i.name for i in session.get_inputs()]

    def prepare(example_input: Any) -> dict[str, Any]:
        return dict(zip(names, _arrays(example_input), strict=True))

    def run(feed: dict[str, Any]) -> Any:
        return session.run(None, feed)

    return Loaded(prepare, run, _from_arrays)


def _openvino(loaders: Loaders, source: Source) -> Loaded:
    ir = isinstance(source, Path) and source.suffix == ".xml"
    return _openvino_of(str(source) if ir else loaders.onnx(source, any_length=False), loaders.threads)


def _openvino_of(model_or_path: bytes | str, threads: int) -> Loaded:
    import openvino

    core = openvino.Core()
    model = core.read_model(model_or_path)
    settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1}
    request = core.compile_model(model, "CPU", settings).create_infer_request()

    def run(arrays: list[Any]) -> Any:
        return list(request.infer(arrays, share_inputs=True).values())

    return Loaded(_arrays, run, _from_arrays)


def _arrays(example_input: Any) -> list[Any]:
    flat: Flat = flat_inputs(example_input)
    return [x.detach().cpu().contiguous().numpy() for x in flat]


def _from_arrays(answers: Any) -> tuple[Tensor, ...]:
    return tuple(torch.from_numpy(array.copy()) for array in answers)


RUNTIMES: dict[str, tuple[str, ...]] = {
    "eager": (),
    "compiled": (),
    "onnxruntime": ("onnx", "onnxscript", "onnxruntime"),
    "openvino": ("onnx", "onnxscript", "openvino"),
}
"""PyTorch as it is, torch.compile, onnxruntime and OpenVINO on the exported network; what each needs."""

_LOADERS: dict[str, Callable[[Loaders, Source], Loaded]] = {
    "eager": _eager,
    "compiled": _compiled,
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
}
