"""Weights of a layer from sums over its inputs: ridge regression towards the weights that it has.

The sums are those of the normal equations, in float64, so that memory depends on the layer's size and not on
the number of inputs. How strongly the weights are held is chosen on inputs that were held out, among them
so strongly that they stay as they are: what is found is never worse than what was there, on those.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

RIDGES = (1e-6, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Weights of the penalty, as shares of the mean square of an input."""
_ROUNDING = 1e-12
"""Share of the wanted answers' square by which weights have to be better than those that there are."""
_SMALLEST = 1e-10
"""The same for the constant, which is not held, so that a system stays solvable."""


@dataclass
class Sums:
    """Sums over rows of inputs x and wanted outputs y, for each group of a layer.

    Attributes:
        gram: of x x^T, (groups, inputs, inputs), float64.
        cross: of x y^T, (groups, inputs, outputs).
        square: of |y|^2, a scalar.
        rows: how many there were.
    """

    gram: Tensor
    cross: Tensor
    square: Tensor
    rows: int = 0

    @classmethod
    def none(cls, groups: int, inputs: int, outputs: int, device: torch.device) -> "Sums":
        """Sums over no rows."""
        new = torch.zeros((), dtype=torch.float64, device=device)
        return cls(new.new_zeros(groups, inputs, inputs), new.new_zeros(groups, inputs, outputs), new)

    def add_(self, x: Tensor, y: Tensor) -> None:
        """Add rows.

        Args:
            x: (groups, rows, inputs), float64.
            y: (groups, rows, outputs), float64.
        """
        if len(x) == 1 and x.device.type == "cpu":
            own = x[0].numpy()
            self.gram += torch.from_numpy(own.T @ own)  # NumPy sees the symmetry: half the work of PyTorch's
        else:
            self.gram.baddbmm_(x.mT, x)
        self.cross.baddbmm_(x.mT, y)
        self.square += y.square().sum()
        self.rows += x.shape[1]

    def __add__(self, other: "Sums") -> "Sums":
        return Sums(
            self.gram + other.gram,
            self.cross + other.cross,
            self.square + other.square,
            self.rows + other.rows,
        )

    def left(self, weights: Tensor) -> Tensor:
        """Sums of x (y - x w)^T, (groups, inputs, outputs).

        Args:
            weights: (groups, inputs, outputs).
        """
        return self.cross - self.gram @ weights

    def error(self, weights: Tensor) -> float:
        """Sum of squares that weights leave over.

        Args:
            weights: (groups, inputs, outputs).
        """
        left = (weights * (self.gram @ weights)).sum() - 2 * (weights * self.cross).sum() + self.square
        return float(left)


def solve(train: Sums, held: Sums, weights: Tensor, constant: bool) -> Tensor | None:
    """Return better weights; None if those that there are answer best to what was held out.

    Args:
        train: sums that candidates are found by.
        held: sums that they are compared by. The chosen strength of the ridge is used on both.
        weights: that the layer has, (groups, inputs, outputs), float64.
        constant: whether the last input is a constant, which is not held.
    """
    best, chosen = held.error(weights) - _ROUNDING * float(held.square), None
    left = train.left(weights)
    for ridge in RIDGES:
        found = _ridge(train, left, weights, constant, ridge)
        if found is not None and (error := held.error(found)) < best:
            best, chosen = error, ridge
    if chosen is None:
        return None
    both = train + held
    return _ridge(both, both.left(weights), weights, constant, chosen)


def _ridge(sums: Sums, left: Tensor, weights: Tensor, constant: bool, ridge: float) -> Tensor | None:
    """argmin |y - x w|^2 + strength |w - weights|^2; None if the system has no solution.

    Args:
        sums: over x and y.
        left: what ``weights`` leave over of them.
        weights: that the layer has.
        constant: whether the last input is one.
        ridge: share of the mean square of an input.
    """
    size = sums.gram.diagonal(dim1=1, dim2=2)
    mean = size[:, : size.shape[1] - constant].mean(1, keepdim=True).clamp(min=torch.finfo(size.dtype).tiny)
    strength = (ridge * mean).expand_as(size).clone()
    if constant:
        strength[:, -1:] = _SMALLEST * size[:, -1:]
    held = sums.gram.clone()
    held.diagonal(dim1=1, dim2=2).add_(strength)
    factor, failed = torch.linalg.cholesky_ex(held)
    if bool(failed.any()):
        return None
    found = weights + torch.cholesky_solve(left, factor)
    return found if bool(found.isfinite().all()) else None
