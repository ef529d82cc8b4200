"""Whether two compacted networks run the same operations, on weights of whatever sizes.

What is made for one of them, a trace or a file, then serves the other with its own weights and sizes.
"""

from typing import Any

import torch
from torch import fx, nn

_WIDTHS: dict[type[nn.Module], tuple[str, ...]] = {
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), ("in_channels", "out_channels")),
    nn.Linear: ("in_features", "out_features"),
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), ("num_features",)),
}
"""Settings of layers that are nothing but sizes of their weights, which their operations read off these."""
_SIZES: dict[type[nn.Module], tuple[str, ...]] = {
    nn.Embedding: ("embedding_dim",),
    nn.GroupNorm: ("num_channels",),
    nn.LayerNorm: ("normalized_shape",),
    nn.RMSNorm: ("normalized_shape",),
}
"""Settings of layers that their operations are told, and that are sizes of their weights."""
_NORMS = (torch.ops.aten.layer_norm.default, torch.ops.aten.rms_norm.default)
SPLIT = torch.ops.aten.split_with_sizes.default
RESHAPES = (
    torch.ops.aten.expand.default,
    torch.ops.aten.flatten.using_ints,
    torch.ops.aten.reshape.default,
    torch.ops.aten.unflatten.int,
    torch.ops.aten.view.default,
)
"""Operations that give a tensor the sizes that they are told, or that follow from its own."""
_PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device)


def alike(one: fx.GraphModule, other: fx.GraphModule) -> bool:
    """Whether two networks call the same operations in the same order, with the same settings.

    Sizes to which tensors are reshaped or split, and those of norms, may differ; other numbers are settings.

    Example:
        >>> a, b = (fx.symbolic_trace(nn.Sequential(nn.Linear(4, n), nn.LayerNorm(n))) for n in (2, 3))
        >>> alike(a, b)
        True
    """
    return operations(one, sizes=False) == operations(other, sizes=False)


def operations(network: fx.GraphModule, *, sizes: bool = True) -> list[Any]:
    """What a network does, to be compared with what another one does.

    Args:
        network: that was traced or compacted.
        sizes: whether the sizes that operations are told are told apart, too.
    """
    place = {node: i for i, node in enumerate(network.graph.nodes)}
    return [
        (
            *(node.op, node.target, _settings(network, node, sizes)),
            fx.node.map_arg(_arguments(node, sizes), lambda n: _Place(place[n])),
        )
        for node in place
    ]


def _arguments(node: fx.Node, sizes: bool) -> Any:
    if sizes or node.target not in (*RESHAPES, *_NORMS, SPLIT):
        return node.args, node.kwargs
    told, rest = node.args[1:2], node.args[2:]
    if node.target is torch.ops.aten.unflatten.int:  # the axis comes first
        told, rest = node.args[2:], node.args[1:2]
    elif node.target is torch.ops.aten.flatten.using_ints:
        told, rest = (), node.args[1:]
    any_size = fx.node.map_aggregate(told, lambda x: 1 if isinstance(x, int) and x > 0 else x)
    return node.args[:1], any_size, rest, node.kwargs


Told = list[tuple[Any, list[int | None]]]
"""Operations that are told sizes, in order, with these; None for one that is known when it runs only."""


def sizes_told(graph: fx.Graph, network: nn.Module) -> Told:
    """What operations of a network are told of sizes which ``alike`` lets differ.

    Args:
        graph: of the network, or of its trace.
        network: what its modules belong to.
    """
    found: Told = []
    for node in graph.nodes:
        layer = network.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(layer, nn.LayerNorm | nn.RMSNorm):
            norm = _NORMS[isinstance(layer, nn.RMSNorm)]
            found.append((norm, list(layer.normalized_shape)))
        elif (at := place_of_sizes(node)) is not None and at < len(node.args):
            sizes: Any = node.args[at]
            found.append((node.target, [x if type(x) is int else None for x in sizes]))
    return found


def place_of_sizes(node: fx.Node) -> int | None:
    """Which argument of an operation says sizes; None of one that is told none."""
    if node.target is torch.ops.aten.flatten.using_ints or node.target not in (*RESHAPES, *_NORMS, SPLIT):
        return None
    return 2 if node.target is torch.ops.aten.unflatten.int else 1


class _Place(int):
    """Of an operation whose result is read: another thing than a number."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Place) and int(self) == int(other)

    __hash__ = int.__hash__


def _settings(network: fx.GraphModule, node: fx.Node, sizes: bool) -> Any:
    """Type and settings of what an operation calls or reads by its name."""
    if node.op == "get_attr":
        path, _, name = str(node.target).rpartition(".")
        value = getattr(network.get_submodule(path), name)
        return type(value), getattr(value, "dtype", None), getattr(value, "ndim", None)
    if node.op != "call_module":
        return None
    layer = network.get_submodule(str(node.target))
    left_out = (*_WIDTHS.get(type(layer), ()), *(() if sizes else _SIZES.get(type(layer), ())))
    own = {k: v for k, v in vars(layer).items() if not k.startswith("_") and k not in left_out}
    plain = all(isinstance(x, _PLAIN) for x in torch.utils._pytree.tree_leaves(own))
    weights = {name: (w.dtype, w.dim()) for name, w in layer.state_dict().items()}
    # Of settings of other kinds, and of layers in layers, nothing is known.
    return (type(layer), own, weights) if plain and not list(layer.children()) else object()
