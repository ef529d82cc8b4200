"""How items are ranked, and taken out of tensors, NumPy arrays and pandas frames."""

from typing import Any

import numpy as np
import torch
from torch import Tensor


def top(score: Tensor, k: int, generator: torch.Generator | None = None) -> Tensor:
    """Indices of the k largest scores, sorted; ties are broken at random.

    Args:
        score: any numbers, (items,).
        k: how many, in [0, items].
        generator: decides ties. If None, a fixed random order does: the same at every call, so that
            batches that are selected one after another get the same columns.

    Returns:
        (k,) distinct indices in ascending order, on the device of ``score``.
    """
    device = score.device if generator is None else generator.device
    if generator is None:
        generator = torch.Generator(device=device).manual_seed(len(score))
    order = torch.randperm(len(score), generator=generator, device=device).to(score.device)
    ranked = order[torch.sort(score[order], descending=True, stable=True).indices]
    return ranked[:k].sort().values


def take(data: Any, indices: Tensor, dim: int) -> Any:
    """Items of a tensor, array or frame.

    Args:
        data: torch.Tensor, numpy.ndarray, or a pandas DataFrame or Series.
        indices: which, (selected,).
        dim: 0 for rows, -1 for columns.

    Returns:
        The same kind of object.
    """
    if isinstance(data, Tensor):
        return data.index_select(dim, indices.to(data.device))
    positions = indices.cpu().numpy()
    if isinstance(data, np.ndarray):
        return np.take(data, positions, axis=dim)
    return data.iloc[positions] if dim == 0 else data.iloc[:, positions]


def straight_through(data: Any, z: Tensor, dim: int) -> Any:
    """Selected items with the gradient of (gate times item), and their own values.

    Args:
        data: what ``take`` returned; anything but a floating-point tensor is returned as it is.
        z: the gates of the selected items, (selected,).
        dim: 0 for rows, -1 for columns.
    """
    if not isinstance(data, Tensor) or not data.is_floating_point() or not z.requires_grad:
        return data
    shape = [1] * data.dim()
    shape[dim] = -1
    one = 1.0 + (z - z.detach())
    return data * one.to(data.device, data.dtype).view(shape)


def check_items(data: Any, count: int, dim: int, what: str) -> None:
    """Check that data has the right number of items and that its numbers are finite.

    Args:
        data: torch.Tensor, numpy.ndarray, or a pandas DataFrame or Series.
        count: items expected.
        dim: 0 for rows, -1 for columns.
        what: name of the argument, for the error.

    Raises:
        ValueError: another kind of object, another number of items, NaN or infinity.
    """
    pandas = hasattr(data, "iloc")
    if not pandas and not isinstance(data, (Tensor, np.ndarray)):
        raise ValueError(
            f"{what} must be a torch tensor, a NumPy array or a pandas frame, got {type(data).__name__}"
        )
    if len(data.shape) < 1 or data.shape[dim] != count:
        side = "rows" if dim == 0 else "columns"
        raise ValueError(f"{what} must have {count} {side}, got shape {tuple(data.shape)}")
    if not _finite(data):
        raise ValueError(f"{what} must be finite, got NaN or infinity; fill in or leave out such values")


def _finite(data: Any) -> bool:
    if isinstance(data, Tensor):
        return not (data.is_floating_point() or data.is_complex()) or bool(torch.isfinite(data).all())
    if isinstance(data, np.ndarray):
        return data.dtype.kind not in "fc" or bool(np.isfinite(data).all())
    if data.ndim == 2:
        return all(_finite(data.iloc[:, i]) for i in range(data.shape[1]))
    kind = getattr(data.dtype, "kind", "O")
    return kind not in "fc" or bool(np.isfinite(data.to_numpy(dtype=float, na_value=np.nan)).all())
