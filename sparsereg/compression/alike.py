"""Whether two compacted networks run the same operations, on weights of whatever sizes.

What is made for one of them, a trace or a file, then serves the other with its own weights.
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
_PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device)


def alike(one: fx.GraphModule, other: fx.GraphModule) -> bool:
    """Whether two networks call the same operations in the same order, with the same settings.

    Sizes that are written into an operation, such as those of a reshape, are settings.

    Example:
        >>> a, b = (fx.symbolic_trace(nn.Sequential(nn.Linear(4, n), nn.ReLU())) for n in (2, 3))
        >>> alike(a, b)
        True
    """
    return operations(one) == operations(other)


def operations(network: fx.GraphModule) -> list[Any]:
    """What a network does, to be compared with what another one does; see ``alike``."""
    place = {node: i for i, node in enumerate(network.graph.nodes)}
    return [
        (
            *(node.op, node.target, _settings(network, node)),
            fx.node.map_arg((node.args, node.kwargs), lambda n: _Place(place[n])),
        )
        for node in place
    ]


class _Place(int):
    """Of an operation whose result is read: another thing than a number."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Place) and int(self) == int(other)

    __hash__ = int.__hash__


def _settings(network: fx.GraphModule, node: fx.Node) -> Any:
    """Type and settings of what an operation calls or reads by its name."""
    if node.op == "get_attr":
        path, _, name = str(node.target).rpartition(".")
        value = getattr(network.get_submodule(path), name)
        return type(value), getattr(value, "dtype", None), getattr(value, "ndim", None)
    if node.op != "call_module":
        return None
    layer = network.get_submodule(str(node.target))
    left_out = _WIDTHS.get(type(layer), ())
    own = {k: v for k, v in vars(layer).items() if not k.startswith("_") and k not in left_out}
    plain = all(isinstance(x, _PLAIN) for x in torch.utils._pytree.tree_leaves(own))
    weights = {name: (w.dtype, w.dim()) for name, w in layer.state_dict().items()}
    # Of settings of other kinds, and of layers in layers, nothing is known.
    return (type(layer), own, weights) if plain and not list(layer.children()) else object()
