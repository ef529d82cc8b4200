"""The layers of a compacted network that sum over units: linear ones and convolutions, each as a matrix."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from sparsereg.compression.units.program import op_name

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@dataclass(frozen=True)
class Reader:
    """A layer that sums over units.

    Attributes:
        node: its operation.
        source: what it reads.
        weight: name of its weight.
        bias: name of its bias; None without.
        axis: of the weight along which its outputs lie.
        layer: the convolution; None for a linear layer.
        norm: path of a BatchNorm that alone reads what the layer gives, whose mean can take a constant.
    """

    node: fx.Node
    source: fx.Node
    weight: str
    bias: str | None
    axis: int
    layer: nn.Module | None
    norm: str | None

    @property
    def groups(self) -> int:
        """Groups of channels that do not read each other."""
        return 1 if self.layer is None else int(self.layer.groups)  # type: ignore[arg-type]

    @property
    def reads(self) -> tuple[Any, ...]:
        """What it sums over: the same for layers whose rows of inputs are the same."""
        layer: Any = self.layer
        if layer is None:
            return (self.source,)
        return (
            *(self.source, layer.groups, layer.kernel_size, layer.stride, layer.dilation),
            *(layer.padding, layer.padding_mode),
        )

    def matrix(self, weight: Tensor) -> Tensor:
        """A weight as (groups, inputs, outputs), float64."""
        wide = weight.detach().double()
        if self.axis == 1:
            return wide[None]
        return wide.reshape(self.groups, weight.shape[0] // self.groups, -1).mT

    def shaped(self, matrix: Tensor, like: Tensor) -> Tensor:
        """What ``matrix`` makes of a weight, back in its shape and type."""
        return (matrix[0] if self.axis == 1 else matrix.mT.reshape(like.shape)).to(like)

    def places(self, x: Tensor, y: Tensor) -> int:
        """How many rows there are in what the layer reads and gives."""
        return math.prod(x.shape[:-1]) if self.layer is None else x.shape[0] * math.prod(y.shape[2:])

    def draw(self, x: Tensor, y: Tensor, most: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw rows of what the layer reads and gives: those of all places, or some.

        Args:
            x: what it reads.
            y: what it gives.
            most: rows that are drawn of more.
            generator: on the CPU.

        Returns:
            The places of rows among all, (rows,), and for each its example.
        """
        places = self.places(x, y)
        chosen = _drawn(places, most, generator).to(x.device)
        return chosen, chosen // max(1, places // x.shape[0])

    def inputs(self, x: Tensor, y: Tensor, chosen: Tensor, constant: bool = False) -> Tensor:
        """What the layer reads at some places, (groups, rows, inputs), float64.

        Args:
            x: what it reads.
            y: what it gives.
            chosen: places among all, see ``draw``.
            constant: put a last input behind them that is 1.
        """
        if self.layer is None:
            read = x.reshape(-1, x.shape[-1]).index_select(0, chosen)
        else:
            where = torch.unravel_index(chosen, (x.shape[0], *y.shape[2:]))
            read = self._patches(x).movedim(1, y.dim() - 1)[where]
        grouped = read.reshape(len(chosen), self.groups, -1).transpose(0, 1)
        if not constant:
            return grouped.double()
        made = grouped.new_ones(*grouped.shape[:2], grouped.shape[2] + 1, dtype=torch.float64)
        made[:, :, :-1] = grouped
        return made

    def outputs(self, y: Tensor, chosen: Tensor, columns: Tensor) -> Tensor:
        """Some of what the layer gives at some places, (groups, rows, outputs), float64.

        Args:
            y: what it gives.
            chosen: places among all, see ``draw``.
            columns: outputs, in the order in which they are wanted.
        """
        if self.layer is None:
            given = y.reshape(-1, y.shape[-1]).index_select(0, chosen)
        else:
            given = y.movedim(1, -1)[torch.unravel_index(chosen, (y.shape[0], *y.shape[2:]))]
        wanted = given.index_select(1, columns)
        return wanted.reshape(len(chosen), self.groups, -1).transpose(0, 1).double()

    def _patches(self, x: Tensor) -> Tensor:
        """A view of shape (batch, channels, *places, *taps)."""
        layer: Any = self.layer
        mode = layer.padding_mode
        if isinstance(layer.padding, str) or mode != "zeros":
            pad = layer._reversed_padding_repeated_twice
        else:
            pad = [p for p in reversed(layer.padding) for _ in range(2)]
        x = F.pad(x, pad, mode="constant" if mode == "zeros" else mode) if any(pad) else x
        for axis, (taps, stride, dilation) in enumerate(
            zip(layer.kernel_size, layer.stride, layer.dilation, strict=True), start=2
        ):
            x = x.unfold(axis, (taps - 1) * dilation + 1, stride)[..., ::dilation]
        return x


def _drawn(places: int, most: int, generator: torch.Generator) -> Tensor:
    if places <= most:
        return torch.arange(places)
    return torch.randperm(places, generator=generator)[:most].sort().values


def readers(module: fx.GraphModule) -> list[Reader]:
    """Find the layers of a compacted network that sum over units, in the order in which they run.

    One whose weight or bias something else uses, too, is left out: what would serve the one might not serve
    the other.
    """
    owners = [_parameters(module, node) for node in module.graph.nodes]
    uses = Counter(id(p) for used in owners for p in used)
    found = []
    for node in module.graph.nodes:
        reader = _layer(module, node) or _function(module, node)
        if reader is not None and all(uses[id(p)] == 1 for p in _own(module, reader)):
            found.append(reader)
    return found


def _parameters(module: fx.GraphModule, node: fx.Node) -> list[Any]:
    if node.op == "call_module":
        return list(module.get_submodule(str(node.target)).parameters())
    read = [user for user in node.users if user.target is not getattr]  # for its type
    return [_attribute(module, node)] * len(read) if node.op == "get_attr" else []


def _own(module: fx.GraphModule, reader: Reader) -> list[Any]:
    names = [name for name in (reader.weight, reader.bias) if name is not None]
    return [module.get_parameter(name) for name in names]


def _attribute(module: fx.GraphModule, node: fx.Node) -> Any:
    owner, _, name = str(node.target).rpartition(".")
    return getattr(module.get_submodule(owner), name)


def _layer(module: fx.GraphModule, node: fx.Node) -> Reader | None:
    if node.op != "call_module" or not isinstance(node.args[0], fx.Node):
        return None
    layer = module.get_submodule(str(node.target))
    if type(layer) is not nn.Linear and type(layer) not in _CONVOLUTIONS:
        return None
    bias = None if layer.bias is None else f"{node.target}.bias"
    convolution = None if isinstance(layer, nn.Linear) else layer
    norm = None if bias is not None else _norm(module, node)
    return Reader(node, node.args[0], f"{node.target}.weight", bias, 0, convolution, norm)


def _norm(module: fx.GraphModule, node: fx.Node) -> str | None:
    users = list(node.users)
    if len(users) != 1 or users[0].op != "call_module":
        return None
    norm = module.get_submodule(str(users[0].target))
    uses = sum(n.op == "call_module" and n.target == users[0].target for n in module.graph.nodes)
    tracks = type(norm) in _NORMS and norm.running_mean is not None and uses == 1
    return str(users[0].target) if tracks else None


def _function(module: fx.GraphModule, node: fx.Node) -> Reader | None:
    name = op_name(node.target) if node.op == "call_function" else ""
    if name not in ("linear", "addmm") or len(node.args) < 2 or node.kwargs:
        return None
    addmm = name == "addmm"
    source, weight = (node.args[1], node.args[2]) if addmm else (node.args[0], node.args[1])
    bias = node.args[0] if addmm else node.args[2] if len(node.args) > 2 else None
    if not all(isinstance(v, fx.Node) for v in (source, weight)) or weight.op != "get_attr":  # type: ignore[union-attr]
        return None
    constant = bias is None or (isinstance(bias, fx.Node) and bias.op == "get_attr")
    if not constant or not isinstance(_attribute(module, weight), nn.Parameter):  # type: ignore[arg-type]
        return None
    named = None if bias is None else str(bias.target)  # type: ignore[union-attr]
    return Reader(node, source, str(weight.target), named, int(addmm), None, None)  # type: ignore[arg-type, union-attr]
