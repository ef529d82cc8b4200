"""Selection of columns."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sparsereg.gates.l0_gate import Selector
from sparsereg.gates.selection import check_items, straight_through, take


class FeatureGate(Selector):
    """Selects columns of a data set.

    In eval mode at most ``max_features`` columns, those with the largest P(z > 0); equal ones are
    chosen among by a generator. If the gates expect fewer (their P(z > 0) sum to less), it is that
    number, rounded and at least 1. In training mode each column is drawn by itself with its own
    P(z > 0): the number is random with expectation ``get_penalty``, which starts at ``max_features``
    (at 0.99 n_features if that is less).

    Args:
        n_features: number of columns, >= 1.
        max_features: largest number of columns to select, in [1, n_features].
        temperature: beta > 0.

    Raises:
        ValueError: an argument is outside its range.

    Example:
        >>> gate = FeatureGate(n_features=10, max_features=3)
        >>> gate.select_features(torch.randn(4, 10))[0].shape[0]
        4
    """

    def __init__(self, n_features: int, max_features: int, temperature: float = 0.1) -> None:
        super().__init__(n_features, max_features, temperature, ("n_features", "max_features"))
        self.n_features = n_features
        self.max_features = max_features

    def num_eval(self) -> int:
        """Number of columns that eval mode selects, in [1, max_features]."""
        expected = round(self._active_prob().double().sum().item())
        return min(self.max_features, max(1, expected))

    def select_features(self, data: Any, generator: torch.Generator | None = None) -> tuple[Any, Tensor]:
        """Select columns.

        Args:
            data: tensor or NumPy array (..., n_features) or pandas frame, without NaN or infinity.
            generator: source of the noise of a draw, and of the order of ties.

        Returns:
            The selected columns, and their indices in ascending order. In training mode columns of a
            floating-point tensor carry the gradient of (gate times column), so that a loss on them
            reaches the gates; their values are the columns' own.

        Raises:
            ValueError: ``data`` has another number of columns, or NaN or infinity.
        """
        check_items(data, self.n_features, -1, "data")
        indices, z = self.draw(generator)
        return straight_through(take(data, indices, -1), z, -1), indices

    def select_features_with_names(
        self,
        data: Any,
        feature_names: Sequence[str] | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Any, list[str]]:
        """Select columns and name them.

        Args:
            data: as for ``select_features``.
            feature_names: one name for each column; None: a frame's own.
            generator: source of the noise of a draw, and of the order of ties.

        Returns:
            The selected columns and their names.

        Raises:
            ValueError: the names do not match the columns, or ``data`` is wrong.
        """
        names = self._names(data, feature_names)
        selected, indices = self.select_features(data, generator)
        return selected, [names[i] for i in indices.tolist()]

    def _names(self, data: Any, feature_names: Sequence[str] | None) -> list[str]:
        columns = list(data.columns) if hasattr(data, "columns") else None
        if feature_names is None:
            if columns is None:
                raise ValueError("feature_names must be given unless data is a pandas frame")
            return columns
        names = list(feature_names)
        if len(names) != self.n_features:
            raise ValueError(f"feature_names must have {self.n_features} names, got {len(names)}")
        if columns is not None and len(columns) == len(names) and columns != names:
            wrong = next((a, b) for a, b in zip(names, columns, strict=True) if a != b)
            raise ValueError(
                f"feature_names must match the frame's columns, got {wrong[0]!r} where it has {wrong[1]!r}"
            )
        return names

    def get_feature_importance(self) -> Tensor:
        """P(z > 0) of each column, (n_features,)."""
        return self._active_prob()
