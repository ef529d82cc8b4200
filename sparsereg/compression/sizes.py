"""Which sizes inside of a network follow the size of its input, and inputs that must have one size."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn
from torch.overrides import handle_torch_function, has_torch_function_unary

from sparsereg.compression.ops import (
    Add,
    Attribute,
    Cat,
    Gate,
    Input,
    Mixing,
    Mul,
    Norm,
    Op,
    PerChannel,
    Reshape,
)

ANY = -1
"""Stands for a size that may differ from call to call; any negative number does."""


def of_size(x: Tensor, sizes: list[int]) -> Tensor:
    """Return an input as it is, if it has the sizes that the network was compacted for.

    Args:
        x: an input of the network.
        sizes: its dimensions' sizes; -1 for one that may differ.

    Raises:
        ValueError: it has others.
    """
    if has_torch_function_unary(x):
        return handle_torch_function(of_size, (x,), x, sizes)
    fits = x.dim() == len(sizes)
    if fits:
        for found, wanted in zip(x.shape, sizes):  # noqa: B905 (TorchScript knows no strict)
            fits = fits and (wanted < 0 or found == wanted)
    if not fits:
        shape = list(x.shape)
        raise ValueError(
            f"this network was compacted for inputs of shape {sizes} (-1: any) and depends on it,"
            f" got {shape}; compact it with an example of the size that it will get"
        )
    return x


@dataclass(frozen=True)
class Follows:
    """Which sizes of a tensor depend on the size of the network's input, besides that of the batch.

    Attributes:
        width: dimension 1.
        positions: any of the dimensions behind it.
    """

    width: bool
    positions: bool


def follows(op: Op, node: fx.Node, known: Mapping[str, Follows]) -> Follows:
    """Find out which sizes of a tensor depend on the size of the network's input.

    Args:
        op: the operation that makes it.
        node: the same in the graph.
        known: the answers for its inputs.
    """
    rank = len(op.shape) if op.shape is not None else 3
    before = [known[name] for name in op.inputs]
    positions = rank > 2 and any(f.positions for f in before) and not _sets_positions(op, node)
    if isinstance(op, Input):
        return Follows(False, rank > 2)
    if isinstance(op, Attribute):
        return Follows(False, False)
    if isinstance(op, Mixing | Norm | Gate):
        return Follows(False, positions)
    if isinstance(op, Reshape):
        return Follows(before[0].width or (rank == 2 and before[0].positions), positions)
    if isinstance(op, PerChannel | Cat | Add | Mul):
        return Follows(any(f.width for f in before), positions)
    sized = any(name.name not in known for name in node.all_input_nodes)
    varies = sized or any(f.width or f.positions for f in before)
    return Follows(varies, varies)


def _sets_positions(op: Op, node: fx.Node) -> bool:
    """Whether a pooling or the like says itself how large its result is."""
    if not isinstance(op, PerChannel):
        return False
    name = str(getattr(node.target, "__name__", node.target))
    size: Any = None
    if op.module is not None:
        size = getattr(op.module, "output_size", None) or getattr(op.module, "size", None)
    elif name.startswith("adaptive_"):
        size = node.args[1] if len(node.args) > 1 else node.kwargs.get("output_size")
    elif name == "interpolate":
        size = node.args[1] if len(node.args) > 1 else node.kwargs.get("size")
    elif name in ("mean", "sum", "amax"):
        return op.shape is not None and all(n == 1 for n in op.shape[2:])
    parts = size if isinstance(size, list | tuple) else [size]
    return all(isinstance(part, int) for part in parts)


def same_positions(op: Op, node: fx.Node) -> bool:
    """Whether a tensor has the positions of its first input, whatever those are."""
    if isinstance(op, Norm | Gate | Add | Mul):
        return True
    if not isinstance(op, PerChannel):
        return False
    if op.module is not None:
        return isinstance(op.module, _POINTWISE)
    return op.passing or str(getattr(node.target, "__name__", node.target)) in _POINTWISE_FUNCTIONS


_POINTWISE: tuple[type[nn.Module], ...] = (
    *(nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout),
    *(
        nn.ReLU,
        nn.ReLU6,
        nn.LeakyReLU,
        nn.PReLU,
        nn.GELU,
        nn.Tanh,
        nn.Sigmoid,
        nn.SiLU,
        nn.ELU,
        nn.CELU,
        nn.SELU,
    ),
    *(nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.Softplus, nn.Softsign, nn.Mish, nn.LogSigmoid),
)
_POINTWISE_FUNCTIONS = frozenset(
    """
    relu leaky_relu relu6 hardtanh gelu silu elu celu selu mish softplus hardswish hardsigmoid tanh sigmoid
    clamp abs contiguous clone dropout dropout1d dropout2d dropout3d alpha_dropout add sub mul div truediv neg
    """.split()  # noqa: SIM905
)


def window(op: Op, dim: int) -> tuple[int, int, int, int] | None:
    """Kernel, stride, padding and dilation of a convolution or pooling along a dimension, if it has such."""
    module = op.layer if isinstance(op, Mixing) else op.module
    pools = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
    if isinstance(op, Mixing) and (op.transposed or isinstance(module, nn.Linear)):
        return None
    if not isinstance(op, Mixing) and (not isinstance(module, pools) or module.ceil_mode):
        return None
    found = []
    for name in ("kernel_size", "stride", "padding", "dilation"):
        value = getattr(module, name, 1)
        value = value[dim - 2] if isinstance(value, tuple) else value
        if not isinstance(value, int):
            return None
        found.append(value)
    return found[0], found[1], found[2], found[3]
