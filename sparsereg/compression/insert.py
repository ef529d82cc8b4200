"""Gates for networks that have none: which channels can go is read off the network's graph."""

import copy
import difflib
import fnmatch
import logging
from collections.abc import Callable, Iterable, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from sparsereg.compression.graph import Example, Network, trace
from sparsereg.compression.ops import Add, Cat, Gate, Mixing, Mul, Norm, Op, PerChannel, Reshape
from sparsereg.model.basic_l0_blocks import GatedBatchNorm2d, GateFactory, L0Gate

logger = logging.getLogger(__name__)

Choice = str | Sequence[str] | Callable[[str, nn.Module], bool]


class GatedConv2d(nn.Conv2d):
    """Convolution with gates on its output channels, bias included, folded into weight and bias.

    Its state dict is that of nn.Conv2d plus ``gate.*``. Made by ``gate``.
    """

    gate: L0Gate

    def forward(self, input: Tensor) -> Tensor:
        """Convolve and gate a map of shape (batch, in_channels, height, width)."""
        if self.gate.per_example:
            return self.gate(super().forward(input))  # type: ignore[no-any-return]
        z = self.gate.gates().to(self.weight.dtype)
        bias = None if self.bias is None else self.bias * z
        gated: Tensor = self._conv_forward(input, self.weight * z.view(-1, 1, 1, 1), bias)
        return gated


class GatedLinear(nn.Linear):
    """Linear layer with gates on its output units, bias included, folded into weight and bias.

    Its state dict is that of nn.Linear plus ``gate.*``. Made by ``gate``.
    """

    gate: L0Gate

    def forward(self, input: Tensor) -> Tensor:
        """Map (batch, in_features) to (batch, out_features) and gate it."""
        if self.gate.per_example:
            return self.gate(super().forward(input))  # type: ignore[no-any-return]
        z = self.gate.gates().to(self.weight.dtype)
        return F.linear(input, self.weight * z.view(-1, 1), None if self.bias is None else self.bias * z)


class GatedBatchNorm1d(nn.BatchNorm1d):
    """BatchNorm of units with gates behind it. Its state dict is that of nn.BatchNorm1d plus ``gate.*``."""

    gate: L0Gate

    def forward(self, input: Tensor) -> Tensor:
        """Normalise and gate units of shape (batch, num_features) or (batch, num_features, length)."""
        return self.gate(super().forward(input))  # type: ignore[no-any-return]


GATED: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv2d: GatedConv2d,
    nn.Linear: GatedLinear,
    nn.BatchNorm1d: GatedBatchNorm1d,
    nn.BatchNorm2d: GatedBatchNorm2d,
}
"""The class with gates for each class that can get some."""


def gate(
    model: nn.Module,
    example_input: Example,
    layers: Choice | None = None,
    *,
    residual: bool = True,
    **gate_settings: object,
) -> nn.Module:
    """Return a copy of a network with gates on the channels and units that can go.

    A gate goes behind the BatchNorm of a convolution or linear layer (into its affine), or onto the rows
    of the layer where no BatchNorm follows. Tensors that are added must lose the same channels, so
    they share one gate. Left alone are channels that reach the output, an operation that no rule is known
    for, or a BatchNorm further on (it would divide the gate away), and grouped convolutions.

    Args:
        model: a network without gates; left as it is. Its state dict fits the result but for the gates' keys,
            which end in ``gate.gates.log_alpha`` and ``gate.gates._extra_state``.
        example_input: a batch of examples, or a tuple of batches for several inputs.
        layers: which convolutions and linear layers to gate: a pattern such as ``layer3.*``, several, or
            a function of name and module. One of several layers that share a gate is enough. All if None.
        residual: whether channels that residual additions tie together get a gate, too.
        **gate_settings: keyword arguments of L0Gate, such as ``droprate_init`` and ``temperature``.

    Raises:
        InputError: the network cannot be traced.
        ValueError: no layer has that name, or none can be gated.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 3))
        >>> gate(net, torch.ones(1, 3, 6, 6))(torch.ones(1, 3, 6, 6)).shape
        torch.Size([1, 2, 2, 2])
    """
    network = trace(model, example_input)
    if network.gates:
        raise ValueError(f"{type(model).__name__} already has gates; gate() takes a network without")
    groups = removable_channels(network)
    wanted = _chooser(layers, [op for op in network.ops.values() if isinstance(op, Mixing)])
    factory = GateFactory(**gate_settings)
    gated = copy.deepcopy(model)
    sites = 0
    for group in groups:
        if len(group.sites) > 1 and not residual:
            continue
        if any(wanted(op.path, op.holder) for op in group.producers):
            shared = factory(group.sites[0].width)
            for site in group.sites:
                gated.set_submodule(site.path, _gated_layer(gated.get_submodule(site.path), shared))
                sites += 1
    if not sites:
        raise ValueError("none of these layers has channels that can go, so there is nothing to gate")
    logger.info("%d layers of %s have gates now", sites, type(model).__name__)
    return gated


def _chooser(layers: Choice | None, known: Iterable[Mixing]) -> Callable[[str, nn.Module], bool]:
    if layers is None:
        return lambda name, module: True
    if callable(layers):
        return layers
    patterns = [layers] if isinstance(layers, str) else list(layers)
    names = [op.path for op in known]
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            near = difflib.get_close_matches(pattern, names, 3, 0.4) or names[:3]
            raise ValueError(
                f"layers: no convolution or linear layer is called {pattern!r}; there are {', '.join(near)}"
            )
    return lambda name, module: any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


def _gated_layer(layer: nn.Module, gate: L0Gate) -> nn.Module:
    """A layer of PyTorch with gates: the same settings, weights, mode, type and device."""
    cls = GATED[type(layer)]
    weight = layer.weight
    assert isinstance(weight, Tensor)
    gate = gate.to(weight.device)
    if cls is GatedBatchNorm2d:
        assert isinstance(layer, nn.BatchNorm2d)
        made: nn.Module = GatedBatchNorm2d(layer.num_features, gate, layer.eps, layer.momentum)
        made.load_state_dict(layer.state_dict(), strict=False)
        made.to(weight.device, weight.dtype)
        for name, parameter in layer.named_parameters():
            made.get_parameter(name).requires_grad_(parameter.requires_grad)
        return made.train(layer.training)
    # The others differ from their base in nothing but the gate: a copy of another class has it all.
    made = copy.deepcopy(layer)
    made.__class__ = cls
    made.gate = gate
    gate.train(layer.training)
    return made


class ChannelGroup:
    """Channels that can only go together: those of tensors that are added, or made from one another.

    Args:
        producers: the convolutions and linear layers that make them.
        sites: where a gate has to go, one operation for each producer that is not behind another one.
    """

    def __init__(self, producers: list[Mixing], sites: list[Op]) -> None:
        self.producers = producers
        self.sites = sites


def removable_channels(network: Network) -> list[ChannelGroup]:
    """Find the channels of a network without gates that a gate could take away.

    Args:
        network: the traced network.

    Returns:
        Groups in the order of the network.
    """
    tied = _Ties(network)
    groups: dict[str, list[Mixing]] = {}
    for op in network.ops.values():
        if isinstance(op, Mixing):
            groups.setdefault(tied.find(op.name), []).append(op)
    found = []
    for root, producers in groups.items():
        heads = [op for op in producers if not tied.follows(op)]
        sites = [tied.site(op) for op in heads]
        if root not in tied.fixed and sites and all(_takes_gate(site) for site in sites):
            found.append(ChannelGroup(producers, sites))
    return found


def _takes_gate(site: Op) -> bool:
    if isinstance(site, Norm) and not (site.norm.affine and site.tracks):
        return False
    return type(site.module) in GATED


def _depthwise(op: Op) -> bool:
    return isinstance(op, Mixing) and op.groups > 1 and op.in_group == 1 and op.out_group == 1


class _Ties:
    """Which tensors have the same channels (union-find), and which of them must keep them all."""

    def __init__(self, network: Network) -> None:
        self.ops = network.ops
        self.parent = {name: name for name in self.ops}
        self.readers: dict[str, list[Op]] = {name: [] for name in self.ops}
        for op in self.ops.values():
            for name in op.inputs:
                self.readers[name].append(op)
        for op in self.ops.values():
            if isinstance(op, PerChannel | Norm | Reshape | Add | Mul | Gate) or _depthwise(op):
                for name in op.inputs:
                    self.parent[self.find(name)] = self.find(op.name)
        self.fixed: set[str] = set()
        for op in self.ops.values():
            self._fix(op)

    def find(self, name: str) -> str:
        """The tensor that stands for all that have the same channels."""
        while self.parent[name] != name:
            name = self.parent[name]
        return name

    def _fix(self, op: Op) -> None:
        """Note the tensors that have to keep their channels because of one operation."""
        if isinstance(op, Mixing):
            if op.groups > 1 and not _depthwise(op):
                self._keep(op.inputs[0])
                self._keep(op.name)
        elif isinstance(op, Norm):
            source = self.ops[op.inputs[0]]
            if not isinstance(source, Mixing) or len(self.readers[source.name]) > 1:
                self._keep(op.inputs[0])
        elif isinstance(op, Add | Mul):
            for name in op.inputs:
                if isinstance(self.ops[name], Cat):
                    self._keep(name)
        elif not isinstance(op, PerChannel | Reshape | Cat | Gate):
            # The input, the output, attributes and whatever has no rule.
            self._keep(op.name)
            for name in op.inputs:
                self._keep(name)

    def _keep(self, name: str) -> None:
        """All channels of a tensor stay, and those of the parts that it was put together from."""
        root = self.find(name)
        if root in self.fixed:
            return
        self.fixed.add(root)
        for op in self.ops.values():
            if isinstance(op, Cat) and self.find(op.name) == root:
                for part in op.inputs:
                    self._keep(part)

    def site(self, op: Mixing) -> Op:
        """The BatchNorm behind a layer, or the layer."""
        readers = self.readers[op.name]
        return readers[0] if len(readers) == 1 and isinstance(readers[0], Norm) else op

    def follows(self, op: Op) -> bool:
        """Whether a later operation closes these channels anyway: a depthwise layer, or a product."""
        readers = self.readers[op.name]
        if not readers:
            return False
        return all(self._closes(op, reader) for reader in readers)

    def _closes(self, op: Op, reader: Op) -> bool:
        if _depthwise(reader):
            return True
        if isinstance(reader, Mul):
            sizes = {name: _positions(self.ops[name]) for name in reader.inputs}
            return sizes[op.name] < max(sizes.values())
        return isinstance(reader, PerChannel | Norm | Reshape) and self.follows(reader)


def _positions(op: Op) -> int:
    size = 1
    for n in (op.shape or ())[2:]:
        size *= n
    return size
