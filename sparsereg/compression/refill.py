"""The ONNX file of a network, made from that of another one that runs the same operations: in no time."""

import logging
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from sparsereg.compression.alike import RESHAPES, SPLIT, alike
from sparsereg.compression.deploy import check_file, to_trace, write_onnx

if TYPE_CHECKING:
    import onnx

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Written:
    """An ONNX file.

    Attributes:
        network: whose file it is.
        content: of the file.
        turned: which weight is written down with its axes exchanged, by its name in the file.
    """

    network: nn.Module
    content: bytes
    turned: dict[str, str]


def write(network: nn.Module, example_input: Any, any_length: bool) -> Written:
    """Write the ONNX file of a network, see ``write_onnx``."""
    import onnx

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.onnx"
        write_onnx(network, example_input, path, any_length)
        content = path.read_bytes()
    return Written(network, content, _turned(onnx.load_from_string(content), _own(network)))


def onnx_like(written: Written, network: nn.Module, example_input: Any) -> Written | None:
    """Return an ONNX file of a network, made from that of another one which runs the same operations.

    That takes a hundredth of the time of an export. Weights, and sizes to which tensors are reshaped, are
    those of the network; the answers of the file are compared with its own.

    Args:
        written: the other one's file.
        network: in eval mode.
        example_input: a batch as it takes it.

    Returns:
        None if they run other operations, or if the file gives other answers, because something else of the
        other network is in it, too.
    """
    import onnx

    other = written.network
    if not (isinstance(other, fx.GraphModule) and isinstance(network, fx.GraphModule)):
        return None
    if not alike(other, network):
        return None
    model = onnx.load_from_string(written.content)
    del model.graph.value_info[:]  # sizes in between are the other one's
    try:
        _take_weights(model, _own(network), written.turned)
        _take_sizes(model, _sizes(other, example_input), _sizes(network, example_input))
        content = model.SerializeToString()
        check_file(network, content, example_input)
    except Exception as error:  # of all kinds, of a runtime that finds that sizes do not fit
        logger.debug("the file of another network does not serve %s: %s", type(network).__name__, error)
        return None
    return replace(written, network=network, content=content)


_OF_NUMPY = (torch.float16, torch.float32, torch.float64)


def _own(network: nn.Module) -> dict[str, Tensor]:
    return {**dict(network.named_parameters()), **dict(network.named_buffers())}


def _turned(model: "onnx.ModelProto", own: dict[str, Tensor]) -> dict[str, str]:
    """Which weight each matrix of a file is that has the name of none; exporters turn those of products."""
    from onnx import numpy_helper

    found = {}
    plain = {name: w.detach().cpu() for name, w in own.items() if w.dim() == 2 and w.dtype in _OF_NUMPY}
    matrices = {name: w.numpy().T for name, w in plain.items() if w.layout is torch.strided}
    for given in model.graph.initializer:
        if given.name in own or len(given.dims) != 2:
            continue
        value = numpy_helper.to_array(given)
        same = (name for name, matrix in matrices.items() if np.array_equal(matrix, value))
        if (name := next(same, None)) is not None:
            found[given.name] = name
    return found


def _take_weights(model: "onnx.ModelProto", own: dict[str, Tensor], turned: dict[str, str]) -> None:
    from onnx import numpy_helper

    for given in model.graph.initializer:
        if given.name in own or given.name in turned:
            value = own[turned.get(given.name, given.name)].detach().cpu().numpy()
            value = np.ascontiguousarray(value.T if given.name in turned else value)
            given.CopyFrom(numpy_helper.from_array(value, given.name))


Size = tuple[bool, tuple[int, ...]]
"""Whether something is split, and into which sizes, or reshaped, to which."""


class _Recording(fx.Interpreter):
    """Runs a network and keeps the sizes of what it reshapes and splits."""

    def __init__(self, network: fx.GraphModule) -> None:
        super().__init__(network)
        self.found: list[Size] = []

    def run_node(self, n: fx.Node) -> Any:
        """Run an operation."""
        answer = super().run_node(n)
        if n.target in RESHAPES or (
            n.op == "call_module" and isinstance(self.fetch_attr(str(n.target)), nn.Flatten | nn.Unflatten)
        ):
            self.found.append((False, tuple(answer.shape)))
        elif n.target is SPLIT:
            told: Any = n.args[1]
            self.found.append((True, tuple(told)))
        return answer


def _sizes(network: fx.GraphModule, example_input: Any) -> list[Size]:
    """The sizes of all that a network reshapes and splits, in the order in which it does so."""
    args, kwargs = to_trace(example_input)
    names = [str(node.target) for node in network.graph.nodes if node.op == "placeholder"]
    recording = _Recording(network)
    with torch.no_grad():
        recording.run(*args, *(kwargs[name] for name in names[len(args) :] if name in kwargs))
    return recording.found


def _take_sizes(model: "onnx.ModelProto", before: list[Size], after: list[Size]) -> None:
    """Let a file reshape and split to the sizes of one network what went to those of another one.

    What a network reshapes and splits stands in its file in the same order, between what the exporter adds.
    """
    left = list(zip(before, after, strict=True))
    makers = {node.output[0]: node for node in model.graph.node if node.op_type == "Concat"}
    values = {given.name: given for given in model.graph.initializer}
    nodes = []
    for node in model.graph.node:
        told = node.op_type in ("Reshape", "Expand", "Split") and len(node.input) > 1
        parts = _parts(node.input[1], makers, values) if told else []
        numbers = [size for _, sizes in parts for size in sizes]
        splits = node.op_type == "Split"
        at = next((i for i, (size, _) in enumerate(left) if _fit(numbers, size, splits)), None)
        if at is not None:
            _, (_, sizes) = left[at]
            left = left[at + 1 :]
            nodes += _tell(model, node, parts, sizes)
        nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    _forget_unread(model)


def _forget_unread(model: "onnx.ModelProto") -> None:
    """Leave out what nothing reads any more, of which runtimes warn."""
    graph = model.graph
    read = {name for node in graph.node for name in node.input} | {value.name for value in graph.output}
    kept = [given for given in graph.initializer if given.name in read]
    del graph.initializer[:]
    graph.initializer.extend(kept)


Parts = list[tuple[str, list[int | None]]]
"""Names of vectors that make up a size, with their numbers; None for what is known when it runs only."""


def _parts(name: str, makers: dict[str, Any], values: dict[str, Any]) -> Parts:
    from onnx import numpy_helper

    names = list(makers[name].input) if name in makers else [name]
    return [(n, numpy_helper.to_array(values[n]).ravel().tolist() if n in values else [None]) for n in names]


def _fit(told: list[int | None], size: Size, splits: bool) -> bool:
    """Whether numbers are written down, all of them those of a size."""
    written = [(a, b) for a, b in zip(told, size[1], strict=False) if a is not None and a > 0]
    same = len(told) == len(size[1]) and all(a == b for a, b in written)
    return splits == size[0] and bool(written) and same


def _tell(model: "onnx.ModelProto", node: Any, parts: Parts, sizes: tuple[int, ...]) -> list[Any]:
    """Let an operation make sizes: in vectors of its own, since others may read what it has read.

    Returns:
        What has to run before.
    """
    from onnx import helper, numpy_helper

    names, rest = [], list(sizes)
    for number, (name, told) in enumerate(parts):
        own, rest = rest[: len(told)], rest[len(told) :]
        if None not in told:
            given = [b if a is not None and a > 0 else a for a, b in zip(told, own, strict=True)]
            name = f"{name}_of_{node.output[0]}_{number}"  # longer than any that there is
            model.graph.initializer.append(numpy_helper.from_array(np.array(given, np.int64), name))
        names.append(name)
    if len(names) == 1:
        node.input[1] = names[0]
        return []
    node.input[1] = f"{names[-1]}_joined"
    return [helper.make_node("Concat", names, [node.input[1]], axis=0)]
