"""Selection of rows."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsereg.gates.l0_gate import Selector
from sparsereg.gates.selection import check_items, straight_through, take


class SampleGate(Selector):
    """Selects rows of a data set.

    In eval mode exactly ``target_samples`` rows, those with the largest P(z > 0); equal ones are chosen
    among by a generator. In training mode each row by itself with its own P(z > 0): the number is
    random with expectation ``get_penalty``, which starts at ``target_samples`` (at 0.99 n_samples
    if that is less).

    Args:
        n_samples: number of rows, >= 1.
        target_samples: number of rows to select, in [1, n_samples].
        temperature: beta > 0.

    Raises:
        ValueError: an argument is outside its range.

    Example:
        >>> gate = SampleGate(n_samples=10, target_samples=3)
        >>> gate.select_samples(torch.randn(10, 4))[0].shape[1]
        4
    """

    def __init__(self, n_samples: int, target_samples: int, temperature: float = 0.25) -> None:
        super().__init__(n_samples, target_samples, temperature, ("n_samples", "target_samples"))
        self.n_samples = n_samples
        self.target_samples = target_samples

    def num_eval(self) -> int:
        """Number of rows that eval mode selects: ``target_samples``."""
        return self.target_samples

    def select_samples(self, data: Any, generator: torch.Generator | None = None) -> tuple[Any, Tensor]:
        """Select rows.

        Args:
            data: tensor, NumPy array or pandas frame of ``n_samples`` rows, without NaN or infinity.
            generator: source of the noise of a draw, and of the order of ties.

        Returns:
            The selected rows, and their indices in ascending order. In training mode rows of a
            floating-point tensor carry the gradient of (gate times row), so that a loss on them
            reaches the gates; their values are the rows' own.

        Raises:
            ValueError: ``data`` has another number of rows, or NaN or infinity.
        """
        check_items(data, self.n_samples, 0, "data")
        indices, z = self.draw(generator)
        return straight_through(take(data, indices, 0), z, 0), indices

    def select_weighted_samples(
        self, data: Any, weights: Any, generator: torch.Generator | None = None
    ) -> tuple[Any, Tensor, Tensor]:
        """Select rows with their weights.

        Args:
            data: tensor, NumPy array or pandas frame of ``n_samples`` rows.
            weights: (n_samples,), finite.
            generator: source of the noise of a draw, and of the order of ties.

        Returns:
            The selected rows, their weights and their indices. In training mode a weight is multiplied
            by its gate, differentiably; in eval mode it is the given one.

        Raises:
            ValueError: an argument has another number of rows, or NaN or infinity.
        """
        check_items(data, self.n_samples, 0, "data")
        weights = weights if isinstance(weights, Tensor) else torch.as_tensor(np.asarray(weights))
        check_items(weights, self.n_samples, 0, "weights")
        if weights.dim() != 1:
            raise ValueError(f"weights must have shape ({self.n_samples},), got {tuple(weights.shape)}")
        indices, z = self.draw(generator)
        chosen = take(weights, indices, 0)
        if chosen.is_floating_point():
            chosen = chosen * z.to(chosen.device, chosen.dtype)
        elif self.training:
            chosen = chosen * z.to(chosen.device)
        return straight_through(take(data, indices, 0), z, 0), chosen, indices
