"""Files for other people's runtimes: ONNX, OpenVINO and torch.export, checked before they are handed over."""

import copy
import functools
import importlib.util
import inspect
import logging
import operator
import re
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from sparsereg.compression.batch_norm_folding import fuse, layer_of
from sparsereg.compression.compact import compact
from sparsereg.compression.running import first_line, quiet, tensors_in
from sparsereg.compression.units.explain import inputs_of
from sparsereg.compression.units.recurrent_shapes import recurrent_in_one
from sparsereg.compression.units.tracing import at_least_two
from sparsereg.compression.verify import apart, exactly
from sparsereg.errors import InputError
from sparsereg.files import write_atomically
from sparsereg.progress import doing

if TYPE_CHECKING:
    import onnx

logger = logging.getLogger(__name__)

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
    with doing(f"writing {path.name}"):
        _export(model, example_input, path, round_to)
    return path


def _export(model: nn.Module, example_input: Any, path: Path, round_to: int) -> None:
    device = flat_inputs(example_input)[0].device
    network = fuse(compact(model, example_input, round_to=round_to)).to(device)
    # A folder of its own, for a format of two files.
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / f"network{path.suffix}"
        _write(network, example_input, made, path.name)
        for beside in sorted(made.parent.iterdir()):  # .bin before .xml, which is nothing without it
            write_atomically(path.with_suffix(beside.suffix), functools.partial(shutil.copyfile, beside))


def _write(network: nn.Module, example_input: Any, made: Path, name: str) -> None:
    """Write a file that answers as a network does, for any length of sequences if it does so for those."""
    _, write, load = _WRITERS[made.suffix]
    for any_length in (True, False):
        try:
            with quiet(_EXPORTERS, logging.ERROR):
                write(network, example_input, made, any_length)
                file = load(made)
            if file is not None:
                _check(network, file, example_input, name)
        except Exception as error:  # of all kinds, from three exporters
            if not any_length:
                raise
            logger.info("%s takes sequences of one length only: %s", name, first_line(error))
        else:
            return


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


_EXPORTERS = ("torch.onnx", "onnxscript", "torch.export", "torch._export", "onnx_ir")
"""Loggers of those who write files."""


@dataclass(frozen=True)
class File:
    """A file that was loaded.

    Attributes:
        answer: from an example input to what the file answers.
        shapes: of each input, with a name for each size that may differ from call to call.
    """

    answer: Callable[[Any], tuple[Tensor, ...]]
    shapes: list[tuple[int | str, ...]]


def write_onnx(network: nn.Module, example_input: Any, path: Path, any_length: bool = True) -> None:
    """Write any network as an ONNX file for any batch size, which is not compared with the network.

    Args:
        network: in eval mode, also one with gates.
        example_input: a batch as it takes it.
        path: of the file.
        any_length: for any length of sequences, too, if it can be exported so; else for the example's.

    Raises:
        InputError: a package is missing.
    """
    check_packages(".onnx")
    import onnx

    args, kwargs = to_trace(example_input)
    with quiet(_EXPORTERS, logging.ERROR), torch.inference_mode(False), torch.no_grad(), recurrent_in_one():
        try:
            traced = _exported(_with_means(network), args, kwargs, any_length)
            made = torch.onnx.export(traced, dynamo=True, external_data=False, verbose=False)
        except Exception:  # of all kinds: an exporter that knows no name for a size, a code that reads it
            if not any_length:
                raise
            return write_onnx(network, example_input, path, any_length=False)
        assert made is not None
        onnx.save(_named(made.model_proto, _is_batch(example_input)), path)


def _with_means(network: nn.Module) -> nn.Module:
    """A network that takes means over whole maps where it pools them to one place.

    Of a map of one place the exporter makes a table of where each channel lies, which is slower.
    """
    if not isinstance(network, fx.GraphModule):
        return network
    made = fx.GraphModule(network, copy.deepcopy(network.graph)).train(network.training)
    for node in made.graph.nodes:
        if node.target is torch.ops.aten.adaptive_avg_pool2d.default and list(node.args[1]) == [1, 1]:
            node.target, node.args = torch.ops.aten.mean.dim, (node.args[0], [-2, -1], True)
    made.recompile()
    return made


def _exported(
    network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], any_length: bool
) -> torch.export.ExportedProgram:
    return torch.export.export(
        network, args, kwargs, dynamic_shapes=_dynamic(network, args, kwargs, any_length), strict=False
    )


def _named(model: "onnx.ModelProto", batched: bool) -> "onnx.ModelProto":
    """Name the sizes that may differ: batch, length, length_2, ..., where tracing has numbered them."""
    first = [size.dim_param for size in model.graph.input[0].type.tensor_type.shape.dim[:1]]
    names = dict.fromkeys(first if batched else (), "batch")
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        for size in value.type.tensor_type.shape.dim:
            if size.dim_param.isdecimal():
                size.dim_value = int(size.dim_param)
            elif size.dim_param:
                size.dim_param = _SYMBOL.sub(functools.partial(_name, names), size.dim_param)
    return model


_SYMBOL = re.compile(r"\b[su]\d+\b")
"""A size as tracing names it."""


def _name(names: dict[str, str], found: re.Match[str]) -> str:
    number = len(set(names.values()) - {"batch"})
    return names.setdefault(found[0], f"length_{number + 1}" if number else "length")


def _is_batch(example_input: Any) -> bool:
    """Whether the first axis counts examples, in all inputs alike; those of nodes and edges do not."""
    leaves = torch.utils._pytree.tree_leaves(example_input)
    return len({x.shape[:1] for x in leaves if isinstance(x, Tensor)}) == 1


def to_trace(example_input: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Copies of inputs to trace with, which any mode of autograd takes: of batches, two examples or more."""
    batched = _is_batch(example_input)

    def copied(x: Any) -> Any:
        return (at_least_two(x) if batched else x).clone() if isinstance(x, Tensor) else x

    args, kwargs = torch.utils._pytree.tree_map(copied, inputs_of(example_input))
    return args, kwargs


def _dynamic(network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], any_length: bool) -> Any:
    """Say which sizes of each input may differ from call to call, as torch.export wants to hear it."""
    batch = {0: torch.export.Dim("batch")} if _is_batch((args, kwargs)) else {}

    def sizes(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return None
        inner = range(len(batch), x.dim()) if any_length and x.dim() < 4 else ()  # more dimensions are maps
        return {**batch, **{d: torch.export.Dim.AUTO for d in inner if x.shape[d] > 1}}

    shapes = torch.utils._pytree.tree_map(sizes, args)
    if not kwargs:
        return shapes
    named = {k: sizes(x) for k, x in kwargs.items()}
    return dict(zip(inspect.signature(network.forward).parameters, shapes, strict=False)) | named


def _load_onnx(path: Path) -> File | None:
    return _run_onnx(path.read_bytes())


def _run_onnx(content: bytes) -> File | None:
    """Run a file with onnxruntime; nothing to check where that is not installed."""
    try:
        import onnxruntime
    except ImportError:
        logger.warning("onnxruntime is not installed, so the ONNX file was not checked")
        return None
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]

    def answer(example_input: Any) -> tuple[Tensor, ...]:
        flat = flat_inputs(example_input)
        feed = {name: x.detach().cpu().numpy() for name, x in zip(names, flat, strict=True)}
        return tuple(torch.as_tensor(y) for y in session.run(None, feed))

    return File(answer, [tuple(i.shape) for i in session.get_inputs()])


def _write_openvino(network: nn.Module, example_input: Any, path: Path, any_length: bool) -> None:
    """Write for sequences of the example's length, whatever else is asked for: others make OpenVINO slow."""
    import openvino

    onnx = path.with_suffix(".onnx")
    write_onnx(network, example_input, onnx, any_length=False)
    openvino.save_model(openvino.convert_model(str(onnx)), str(path), compress_to_fp16=False)
    onnx.unlink()


def _load_openvino(path: Path) -> File:
    import openvino

    # float32, whatever the processor would prefer: the file is compared, not timed.
    compiled = openvino.Core().compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

    def answer(example_input: Any) -> tuple[Tensor, ...]:
        found = compiled([x.detach().cpu().numpy() for x in flat_inputs(example_input)])
        return tuple(torch.as_tensor(found[output].copy()) for output in compiled.outputs)

    return File(answer, [])


def _write_pt2(network: nn.Module, example_input: Any, path: Path, any_length: bool) -> None:
    args, kwargs = to_trace(example_input)
    with recurrent_in_one():
        traced = _exported(network, args, kwargs, any_length)
    torch.export.save(traced, path)


def _load_pt2(path: Path) -> File:
    exported = torch.export.load(path)
    module = exported.module()

    def answer(example_input: Any) -> tuple[Tensor, ...]:
        args, kwargs = inputs_of(example_input)
        return tensors_in(module(*args, **kwargs))

    given = set(exported.graph_signature.user_inputs)
    values = [n.meta["val"] for n in exported.graph.nodes if n.op == "placeholder" and n.name in given]
    sizes = [[d if isinstance(d, int) else str(d) for d in v.shape] for v in values if isinstance(v, Tensor)]
    return File(answer, [tuple(s) for s in sizes])


_WRITERS: dict[
    str,
    tuple[tuple[str, ...], Callable[[nn.Module, Any, Path, bool], None], Callable[[Path], File | None]],
] = {
    ".onnx": (("onnx", "onnxscript"), write_onnx, _load_onnx),
    ".pt2": ((), _write_pt2, _load_pt2),
    ".xml": (("onnx", "onnxscript", "openvino"), _write_openvino, _load_openvino),
}
"""Suffix to packages that are needed, writer and loader."""


def _exact(network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, ...]:
    return tensors_in(exactly(network, args, kwargs))


def check_file(network: nn.Module, content: bytes, example_input: Any) -> None:
    """Compare an ONNX file with a network, as ``export`` does.

    Args:
        network: in eval mode.
        content: of the file.
        example_input: a batch as they take it.

    Raises:
        RuntimeError: it gives other answers, or there is no onnxruntime to try it with.
    """
    file = _run_onnx(content)
    if file is None:
        raise RuntimeError("a file cannot be compared without onnxruntime")
    _check(network, file, example_input, "the file")


def _check(network: nn.Module, file: File, example_input: Any, name: str) -> None:
    """Compare the file with the network for one example, for a batch of noise and for shorter sequences."""
    generator = torch.Generator().manual_seed(0)
    batched = _is_batch(example_input)

    def noise(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        size = (3, *x.shape[1:]) if batched else x.shape
        if not x.is_floating_point():
            return x[:1].expand(size) if batched else x
        return torch.randn(size, generator=generator).to(x)

    def first(x: Any) -> Any:
        return x[:1] if isinstance(x, Tensor) and batched else x

    one = torch.utils._pytree.tree_map(first, example_input)
    many = torch.utils._pytree.tree_map(noise, example_input)
    for batch in (one, many, *_shorter(network, file.shapes, many)):
        args, kwargs = inputs_of(batch)
        with torch.no_grad():
            wanted = tensors_in(network(*args, **kwargs))
            found = tuple(y.detach().to(a.device) for a, y in zip(wanted, file.answer(batch), strict=True))
            error = apart(wanted, found, TOLERANCE, functools.partial(_exact, network, args, kwargs))
        if error:
            raise RuntimeError(
                f"{name} gives other answers: they differ by {error:.2g} of the output's spread"
            )


def _shorter(network: nn.Module, shapes: list[tuple[int | str, ...]], batch: Any) -> list[Any]:
    """A batch of shorter sequences, if the file takes some and the network does, too."""
    if not any(isinstance(size, str) for shape in shapes for size in shape[1:]):
        return []
    of = dict(zip(map(id, flat_inputs(batch)), shapes, strict=True))

    def cut(x: Any) -> Any:
        for d, size in enumerate(of.get(id(x), ())[1:], 1):
            x = x.narrow(d, 0, x.shape[d] - x.shape[d] // 3) if isinstance(size, str) else x
        return x

    made = torch.utils._pytree.tree_map(cut, batch)
    args, kwargs = inputs_of(made)
    try:
        with torch.no_grad():
            network(*args, **kwargs)
    except Exception as error:  # of all kinds, of the user's code
        logger.debug("%s refuses shorter sequences: %s", type(network).__name__, error)
        return []
    return [made]
