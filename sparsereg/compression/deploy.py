"""Files for other people's runtimes: ONNX and torch.export, checked before they are handed over."""

import copy
import functools
import logging
import operator
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from sparsereg.compression.compact import compact
from sparsereg.compression.graph import Example, examples
from sparsereg.compression.verify import difference
from sparsereg.errors import InputError
from sparsereg.files import write_atomically

TOLERANCE = 1e-4
"""Largest difference between the file's answers and the network's, as a share of their spread."""


def export(model: nn.Module, example_input: Example, path: str | Path) -> Path:
    """Write the compacted network as an ONNX or torch.export file with a dynamic batch dimension.

    BatchNorm is folded into the convolutions. The file is written beside its place, loaded, compared
    with the network at two batch sizes, and renamed. Whoever loads it needs neither sparsereg nor the
    configuration.

    Args:
        model: a network with gates, or a compacted one; left as it is.
        example_input: a batch of examples, or a tuple of batches for several inputs.
        path: ends with ``.onnx`` or ``.pt2``.

    Returns:
        The path.

    Raises:
        ValueError: another suffix.
        InputError: the network cannot be traced, or a package is missing.
        RuntimeError: the file gives other answers.

    Example:
        >>> import tempfile
        >>> from sparsereg import SparseMLP
        >>> net, x = SparseMLP(6, 8, 3), torch.ones(1, 6)
        >>> path = export(net, x, Path(tempfile.mkdtemp()) / "net.pt2")
        >>> torch.export.load(path).module()(torch.ones(5, 6)).shape
        torch.Size([5, 3])
    """
    path = Path(path)
    if path.suffix not in _WRITERS:
        raise ValueError(f"path must end with {' or '.join(_WRITERS)}, got {str(path)!r}")
    if path.suffix == ".onnx":
        _require("onnx", "onnxscript")
    device = example_tensor(example_input).device
    network = fuse(compact(model, example_input)).to(device)
    inputs = tuple(_at_least_two(x) for x in examples(example_input))
    write, load = _WRITERS[path.suffix]

    def write_and_check(beside: Path) -> None:
        with _quiet():
            write(network, inputs, beside)
            answer = load(beside)
        if answer is not None:
            _check(network, answer, inputs, path)

    write_atomically(path, write_and_check)
    return path


def example_tensor(example_input: Example) -> Tensor:
    """The first tensor of an example input."""
    return examples(example_input)[0]


def fuse(network: fx.GraphModule) -> fx.GraphModule:
    """Return a copy for inference with every BatchNorm folded into the layer before it.

    Args:
        network: a compacted network; left as it is.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)).eval()
        >>> [type(layer).__name__ for layer in fuse(compact(net, torch.ones(1, 1, 5, 5))).children()]
        ['Conv2d']
    """
    fused = copy.deepcopy(network).eval()
    for node in list(fused.graph.nodes):
        norm = _called(fused, node)
        if not isinstance(norm, nn.modules.batchnorm._BatchNorm) or norm.running_mean is None:
            continue
        (source,) = node.all_input_nodes
        layer = _called(fused, source)
        if len(source.users) != 1 or not isinstance(layer, _FUSERS):
            continue
        into = fuse_linear_bn_eval if isinstance(layer, nn.Linear) else fuse_conv_bn_eval
        fused.set_submodule(str(source.target), cast(Callable[..., nn.Module], into)(layer, norm))
        node.replace_all_uses_with(source)
        fused.graph.erase_node(node)
        fused.delete_submodule(str(node.target))
    fused.recompile()
    return fused


def shift_pools(network: fx.GraphModule) -> fx.GraphModule:
    """Return a copy in which max-pooling with stride 1 is the maximum of shifted maps: faster on CPUs.

    PyTorch's own pooling handles channels beyond a multiple of 8 one by one, so that in channels_last
    25 channels take as long as 64. The results are the same.

    Args:
        network: a compacted network; left as it is.

    Example:
        >>> x = torch.ones(1, 2, 5, 5)
        >>> pools = compact(nn.Sequential(nn.Conv2d(2, 2, 1), nn.MaxPool2d(3, 1, padding=1)), x)
        >>> torch.equal(shift_pools(pools)(x), pools(x))
        True
    """
    shifted = copy.deepcopy(network)
    for node in list(shifted.graph.nodes):
        pool = _called(shifted, node)
        if not isinstance(pool, nn.MaxPool2d) or not _keeps_size(pool):
            continue
        height, width = _pair(pool.padding)
        with shifted.graph.inserting_before(node):
            padding = (width, width, height, height)
            x = shifted.graph.call_function(
                F.pad, (node.all_input_nodes[0], padding), {"value": float("-inf")}
            )
            x = _maximum_along(shifted.graph, x, 2, 2 * height)
            x = _maximum_along(shifted.graph, x, 3, 2 * width)
        node.replace_all_uses_with(x)
        shifted.graph.erase_node(node)
        shifted.delete_submodule(str(node.target))
    shifted.recompile()
    return shifted


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _keeps_size(pool: nn.MaxPool2d) -> bool:
    """Whether it slides by one and pads so that the map keeps its size."""
    kernel, padding = _pair(pool.kernel_size), _pair(pool.padding)
    same = all(k == 2 * p + 1 for k, p in zip(kernel, padding, strict=True))
    plain = not (pool.return_indices or pool.ceil_mode)
    return same and plain and _pair(pool.stride) == (1, 1) and _pair(pool.dilation) == (1, 1)


def _maximum_along(graph: fx.Graph, x: fx.Node, dim: int, shifts: int) -> fx.Node:
    """Maximum of a map and its shifts along one dimension, which gets shorter by ``shifts``."""
    rest = (slice(None),) * dim
    parts = [
        graph.call_function(operator.getitem, (x, (*rest, slice(i, i - shifts or None))))
        for i in range(shifts + 1)
    ]
    return functools.reduce(lambda a, b: graph.call_function(torch.maximum, (a, b)), parts)


_FUSERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


def _called(network: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    return network.get_submodule(str(node.target)) if node.op == "call_module" else None


def _at_least_two(x: Tensor) -> Tensor:
    """A batch of one would be taken for a fixed size."""
    return x if x.shape[0] > 1 else torch.cat([x, x])


def _require(*packages: str) -> None:
    import importlib.util

    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(
            f"export to ONNX needs the package {missing[0]}: pip install {' '.join(packages)} onnxruntime"
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporters' notes to their own developers away from the user."""
    names = ("torch.onnx", "onnxscript", "torch.export", "onnx_ir")
    levels = {name: logging.getLogger(name).level for name in names}
    try:
        for name in names:
            logging.getLogger(name).setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


Answer = Callable[[Sequence[Tensor]], tuple[Tensor, ...]]


def _write_onnx(network: nn.Module, inputs: tuple[Tensor, ...], path: Path) -> None:
    batch = torch.export.Dim("batch")
    torch.onnx.export(
        network,
        inputs,
        str(path),
        dynamo=True,
        dynamic_shapes=tuple({0: batch} for _ in inputs),
        external_data=False,
        verbose=False,
    )


def onnx_session(network: nn.Module, example: Tensor) -> Any:
    """An onnxruntime session that runs a network of one input, with PyTorch's number of threads.

    Args:
        network: any network that torch.onnx exports, also one with gates; in eval mode.
        example: a batch of examples.
    """
    import onnxruntime

    _require("onnx", "onnxscript")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder, _quiet(), torch.inference_mode(False), torch.no_grad():
        path = Path(folder) / "network.onnx"
        _write_onnx(network, (_at_least_two(example.clone()),), path)
        return onnxruntime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])


def _load_onnx(path: Path) -> Answer | None:
    """Run the file with onnxruntime; nothing to check where that is not installed."""
    try:
        import onnxruntime
    except ImportError:
        logging.getLogger(__name__).warning("onnxruntime is not installed, so the ONNX file was not checked")
        return None
    session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]

    def answer(inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        feed = {name: x.detach().cpu().numpy() for name, x in zip(names, inputs, strict=True)}
        return tuple(torch.as_tensor(y) for y in session.run(None, feed))

    return answer


def _write_pt2(network: nn.Module, inputs: tuple[Tensor, ...], path: Path) -> None:
    batch = torch.export.Dim("batch")
    program = torch.export.export(network, inputs, dynamic_shapes=tuple({0: batch} for _ in inputs))
    torch.export.save(program, path)


def _load_pt2(path: Path) -> Answer:
    module = torch.export.load(path).module()

    def answer(inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        found = module(*inputs)
        return tuple(found) if isinstance(found, tuple | list) else (found,)

    return answer


_WRITERS: dict[str, tuple[Callable[[nn.Module, tuple[Tensor, ...], Path], None], Callable[[Path], Any]]] = {
    ".onnx": (_write_onnx, _load_onnx),
    ".pt2": (_write_pt2, _load_pt2),
}
"""Suffix to writer and loader."""


def _check(network: nn.Module, answer: Answer, inputs: tuple[Tensor, ...], path: Path) -> None:
    """Compare the file with the network for one example and for a batch of noise."""
    generator = torch.Generator().manual_seed(0)
    noise = tuple(
        torch.randn(3, *x.shape[1:], generator=generator).to(x) if x.is_floating_point() else x
        for x in inputs
    )
    for batch in (tuple(x[:1] for x in inputs), noise):
        with torch.no_grad():
            wanted = network(*batch)
            found = answer(batch)
        wanted = tuple(wanted) if isinstance(wanted, tuple | list) else (wanted,)
        for a, b in zip(wanted, found, strict=True):
            error = difference(a.cpu(), b.detach().cpu())
            if not error <= TOLERANCE:
                raise RuntimeError(
                    f"{path.name} gives other answers: they differ by {error:.2g} of the output's spread"
                )
