"""Layers whose weights or channels carry Hard Concrete gates, and pruning."""

from sparsereg.layers.conv import L0Conv2d, L0DepthwiseConv2d
from sparsereg.layers.gated import GatedLayer
from sparsereg.layers.linear import L0Linear
from sparsereg.layers.mlp import SparseMLP
from sparsereg.layers.prune import prune_model
from sparsereg.layers.storage import Storage, load_csr, save_csr

__all__ = [
    "GatedLayer",
    "L0Conv2d",
    "L0DepthwiseConv2d",
    "L0Linear",
    "SparseMLP",
    "Storage",
    "load_csr",
    "prune_model",
    "save_csr",
]
