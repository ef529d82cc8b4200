"""Storage of pruned weights as compressed sparse rows: what unstructured sparsity saves.

Gates on single weights save room on disk. They save no time: a dense matrix product with zeros in it
takes as long as one without, and a sparse one is slower than it until almost everything is gone.
For speed, gate channels or units and compact the network.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsereg.archives import load_torch, save_torch

PARTS = ("counts", "columns", "values", "shape")
"""A matrix in the file: non-zeros in each row, their columns, their values, and the tensor's shape."""


@dataclass(frozen=True)
class Storage:
    """Measured size of a network in a file.

    Attributes:
        dense_bytes: tensors of the state dict as they are.
        stored_bytes: the file that ``save_csr`` wrote.
        num_weights: elements of the state dict.
        num_nonzero: elements that are not zero.
    """

    dense_bytes: int
    stored_bytes: int
    num_weights: int
    num_nonzero: int

    @property
    def ratio(self) -> float:
        """How many times smaller the file is than the dense tensors."""
        return self.dense_bytes / self.stored_bytes


def save_csr(model: nn.Module, path: str | os.PathLike[str]) -> Storage:
    """Write the state dict of a pruned network, matrices as compressed sparse rows where that is smaller.

    Args:
        model: a network, pruned before (``sparsereg.prune_model``).
        path: file to write; it appears whole or not at all.

    Returns:
        The measured sizes.
    """
    state = {k: v.detach().cpu() for k, v in model.state_dict().items() if isinstance(v, Tensor)}
    file = Path(path)
    save_torch(file, {k: _pack(v) for k, v in state.items()})
    return Storage(
        dense_bytes=sum(v.numel() * v.element_size() for v in state.values()),
        stored_bytes=file.stat().st_size,
        num_weights=sum(v.numel() for v in state.values()),
        num_nonzero=sum(int(torch.count_nonzero(v)) for v in state.values()),
    )


def load_csr(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read what ``save_csr`` wrote, as a dense state dict.

    Args:
        path: the file.

    Raises:
        DamagedFile: the file is not as it was written.
    """
    stored = load_torch(path)
    return {key: _unpack(value) for key, value in stored.items()}


def _pack(x: Tensor) -> Any:
    """Compressed sparse rows in the narrowest index type, or the tensor itself if it is smaller."""
    if x.dim() < 2 or not x.is_floating_point():
        return x
    matrix = x.flatten(1)
    where = matrix != 0
    narrow = torch.int16 if matrix.shape[1] <= 1 << 15 else torch.int32
    packed = {
        "counts": where.sum(1).to(torch.int32),
        "columns": where.nonzero()[:, 1].to(narrow),
        "values": matrix[where],
        "shape": torch.tensor(x.shape),
    }
    size = sum(t.numel() * t.element_size() for t in packed.values())
    return packed if size < x.numel() * x.element_size() else x


def _unpack(value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value
    counts, columns, values, shape = (value[part] for part in PARTS)
    x = torch.zeros(tuple(shape.tolist()), dtype=values.dtype)
    rows = torch.repeat_interleave(torch.arange(len(counts)), counts)
    x.flatten(1)[rows, columns.long()] = values
    return x
