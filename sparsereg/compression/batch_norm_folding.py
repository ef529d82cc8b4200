"""BatchNorm folded into the layers before it, for inference."""

import copy
from collections.abc import Callable
from typing import cast

from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

_FUSERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


def fuse(network: fx.GraphModule) -> fx.GraphModule:
    """Return a copy for inference with every BatchNorm folded into the layer before it.

    Args:
        network: a compacted network; left as it is.

    Example:
        >>> import torch
        >>> from sparsereg.compression import compact
        >>> net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)).eval()
        >>> [type(layer).__name__ for layer in fuse(compact(net, torch.ones(1, 1, 5, 5))).children()]
        ['Conv2d']
    """
    fused = copy.deepcopy(network).eval()
    for node in list(fused.graph.nodes):
        norm = layer_of(fused, node)
        if not isinstance(norm, nn.modules.batchnorm._BatchNorm) or norm.running_mean is None:
            continue
        (source,) = node.all_input_nodes
        layer = layer_of(fused, source)
        if len(source.users) != 1 or not isinstance(layer, _FUSERS):
            continue
        into = fuse_linear_bn_eval if isinstance(layer, nn.Linear) else fuse_conv_bn_eval
        fused.set_submodule(str(source.target), cast(Callable[..., nn.Module], into)(layer, norm))
        node.replace_all_uses_with(source)
        fused.graph.erase_node(node)
        fused.delete_submodule(str(node.target))
    fused.recompile()
    return fused


def layer_of(network: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    """Return the layer that a node calls; None if it calls none."""
    return network.get_submodule(str(node.target)) if node.op == "call_module" else None
