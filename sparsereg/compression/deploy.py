"""Files for other people's runtimes: ONNX, OpenVINO and torch.export, checked before they are handed over."""

import copy
import functools
import importlib.util
import inspect
import logging
import operator
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from sparsereg.compression.batch_norm_folding import fuse, layer_of
from sparsereg.compression.compact import compact
from sparsereg.compression.running import quiet, tensors_in
from sparsereg.compression.units.explain import inputs_of
from sparsereg.compression.units.program import at_least_two
from sparsereg.compression.verify import difference
from sparsereg.errors import InputError
from sparsereg.files import write_atomically

TOLERANCE = 1e-4
"""Largest difference between the file's answers and the network's, as a share of their spread."""


def export(model: nn.Module, example_input: Any, path: str | Path, *, round_to: int = 1) -> Path:
    """Write the compacted network as an ONNX, OpenVINO or torch.export file with a dynamic batch dimension.

    BatchNorm is folded into the convolutions. The file is written elsewhere, loaded, compared with the
    network at two batch sizes, and put in its place. Whoever loads it needs neither sparsereg nor the
    configuration.

    Args:
        model: a network with gates, or a compacted one; left as it is.
        example_input: a batch as the network takes it: a tensor, a tuple of positional inputs, or a
            dictionary of inputs by name.
        path: ends with ``.onnx``, ``.pt2`` or ``.xml`` (OpenVINO, with its weights in a ``.bin`` beside it).
        round_to: see ``compact``.

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
    check_packages(path.suffix)
    _, write, load = _WRITERS[path.suffix]
    device = flat_inputs(example_input)[0].device
    network = fuse(compact(model, example_input, round_to=round_to)).to(device)
    # A folder of its own, for a format of two files.
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / f"network{path.suffix}"
        with quiet(_EXPORTERS, logging.ERROR):
            write(network, example_input, made)
            answer = load(made)
        if answer is not None:
            _check(network, answer, example_input, path)
        for beside in sorted(made.parent.iterdir()):  # .bin before .xml, which is nothing without it
            write_atomically(path.with_suffix(beside.suffix), functools.partial(shutil.copyfile, beside))
    return path


Flat = tuple[Tensor, ...]


def flat_inputs(example_input: Any) -> Flat:
    """The tensors of an example input in the order in which a file takes them.

    Raises:
        ValueError: one of them has no batch dimension, or there is none.
    """
    args, kwargs = inputs_of(example_input)
    found = tuple(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
    if not found or any(x.dim() < 1 or x.shape[0] < 1 for x in found):
        raise ValueError(
            "example_input must hold tensors (batch, ...), got "
            + (", ".join(str(tuple(x.shape)) for x in found) or "none")
        )
    return found


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
        pool = layer_of(shifted, node)
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


def check_packages(suffix: str) -> None:
    """Raise an InputError that says what to install unless files of a suffix can be written.

    Args:
        suffix: one that ``export`` takes.
    """
    packages = _WRITERS[suffix][0]
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        what = {".onnx": "ONNX", ".xml": "OpenVINO"}[suffix]
        raise InputError(
            f"export to {what} needs the package {missing[0]}: pip install {' '.join(packages)} onnxruntime"
        )


_EXPORTERS = ("torch.onnx", "onnxscript", "torch.export", "onnx_ir")
"""Loggers of those who write files."""

Answer = Callable[[Any], tuple[Tensor, ...]]
"""From an example input to what a file answers."""


def write_onnx(network: nn.Module, example_input: Any, path: Path) -> None:
    """Write any network as an ONNX file with a dynamic batch dimension.

    Args:
        network: in eval mode, also one with gates.
        example_input: a batch as it takes it.
        path: of the file.
    """
    check_packages(".onnx")
    args, kwargs = torch.utils._pytree.tree_map(_two, inputs_of(example_input))
    with quiet(_EXPORTERS, logging.ERROR), torch.inference_mode(False), torch.no_grad():
        torch.onnx.export(
            network,
            args,
            str(path),
            kwargs=kwargs,
            dynamo=True,
            dynamic_shapes=_dynamic(network, args, kwargs),
            external_data=False,
            verbose=False,
        )


def _two(x: Any) -> Any:
    """A batch of two or more, with tensors that any mode of autograd takes."""
    return at_least_two(x).clone() if isinstance(x, Tensor) else x


def _dynamic(network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Say for each input that its first dimension is the batch, as torch.export wants to hear it."""
    batch = torch.export.Dim("batch")
    shapes = torch.utils._pytree.tree_map(lambda x: {0: batch} if isinstance(x, Tensor) else None, args)
    if not kwargs:
        return shapes
    named = {k: {0: batch} if isinstance(x, Tensor) else None for k, x in kwargs.items()}
    return dict(zip(inspect.signature(network.forward).parameters, shapes, strict=False)) | named


def _load_onnx(path: Path) -> Answer | None:
    """Run the file with onnxruntime; nothing to check where that is not installed."""
    try:
        import onnxruntime
    except ImportError:
        logging.getLogger(__name__).warning("onnxruntime is not installed, so the ONNX file was not checked")
        return None
    session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]

    def answer(example_input: Any) -> tuple[Tensor, ...]:
        flat = flat_inputs(example_input)
        feed = {name: x.detach().cpu().numpy() for name, x in zip(names, flat, strict=True)}
        return tuple(torch.as_tensor(y) for y in session.run(None, feed))

    return answer


def _write_openvino(network: nn.Module, example_input: Any, path: Path) -> None:
    import openvino

    onnx = path.with_suffix(".onnx")
    write_onnx(network, example_input, onnx)
    openvino.save_model(openvino.convert_model(str(onnx)), str(path), compress_to_fp16=False)
    onnx.unlink()


def _load_openvino(path: Path) -> Answer:
    import openvino

    # float32, whatever the processor would prefer: the file is compared, not timed.
    compiled = openvino.Core().compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

    def answer(example_input: Any) -> tuple[Tensor, ...]:
        found = compiled([x.detach().cpu().numpy() for x in flat_inputs(example_input)])
        return tuple(torch.as_tensor(found[output].copy()) for output in compiled.outputs)

    return answer


def _write_pt2(network: nn.Module, example_input: Any, path: Path) -> None:
    args, kwargs = torch.utils._pytree.tree_map(at_least_two, inputs_of(example_input))
    dynamic = _dynamic(network, args, kwargs)
    torch.export.save(torch.export.export(network, args, kwargs, dynamic_shapes=dynamic), path)


def _load_pt2(path: Path) -> Answer:
    module = torch.export.load(path).module()

    def answer(example_input: Any) -> tuple[Tensor, ...]:
        args, kwargs = inputs_of(example_input)
        return tensors_in(module(*args, **kwargs))

    return answer


_WRITERS: dict[
    str,
    tuple[tuple[str, ...], Callable[[nn.Module, Any, Path], None], Callable[[Path], Answer | None]],
] = {
    ".onnx": (("onnx", "onnxscript"), write_onnx, _load_onnx),
    ".pt2": ((), _write_pt2, _load_pt2),
    ".xml": (("onnx", "onnxscript", "openvino"), _write_openvino, _load_openvino),
}
"""Suffix to packages that are needed, writer and loader."""


def _check(network: nn.Module, answer: Answer, example_input: Any, path: Path) -> None:
    """Compare the file with the network for one example and for a batch of noise."""
    generator = torch.Generator().manual_seed(0)

    def noise(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        if not x.is_floating_point():
            return x[:1].expand(3, *x.shape[1:])
        return torch.randn(3, *x.shape[1:], generator=generator).to(x)

    one = torch.utils._pytree.tree_map(lambda x: x[:1] if isinstance(x, Tensor) else x, example_input)
    for batch in (one, torch.utils._pytree.tree_map(noise, example_input)):
        args, kwargs = inputs_of(batch)
        with torch.no_grad():
            wanted = tensors_in(network(*args, **kwargs))
            found = answer(batch)
        for a, b in zip(wanted, found, strict=True):
            error = difference(a.cpu(), b.detach().cpu())
            if not error <= TOLERANCE:
                raise RuntimeError(
                    f"{path.name} gives other answers: they differ by {error:.2g} of the output's spread"
                )
