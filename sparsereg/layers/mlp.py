"""A multi-layer perceptron with a gate on every weight."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsereg.layers.linear import L0Linear
from sparsereg.penalties import compute_l0_penalty, get_sparsity_stats


class SparseMLP(nn.Module):
    """Three ``L0Linear`` layers with ReLU between them.

    Args:
        input_dim: size of a flattened input, >= 1.
        hidden_dim: size of both hidden layers, >= 1.
        output_dim: size of the output, >= 1.
        init_sparsity: share of the gates that start closed, 1 - P(z > 0), in (0, 1).
        temperature: beta > 0.
        use_l2: whether ``get_l2_loss`` counts the weights.
        generator: source of the initial weights; PyTorch's default if None.

    Raises:
        ValueError: an argument is outside its range.

    Example:
        >>> SparseMLP(input_dim=6, hidden_dim=8, output_dim=3)(torch.ones(2, 6)).shape
        torch.Size([2, 3])
    """

    def __init__(
        self,
        input_dim: int = 784,
        hidden_dim: int = 256,
        output_dim: int = 10,
        init_sparsity: float = 0.5,
        temperature: float = 0.5,
        use_l2: bool = False,
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        settings: dict[str, Any] = {
            "temperature": temperature,
            "init_sparsity": init_sparsity,
            "use_l2": use_l2,
            "generator": generator,
        }
        self.use_l2 = use_l2
        self.fc1 = L0Linear(input_dim, hidden_dim, **settings)
        self.fc2 = L0Linear(hidden_dim, hidden_dim, **settings)
        self.fc3 = L0Linear(hidden_dim, output_dim, **settings)

    def forward(self, x: Tensor) -> Tensor:
        """Inputs (batch, ...), flattened, to (batch, output_dim)."""
        x = F.relu(self.fc1(torch.flatten(x, 1)))
        logits: Tensor = self.fc3(F.relu(self.fc2(x)))
        return logits

    def get_l0_loss(self) -> Tensor:
        """Expected number of open gates of all layers."""
        if self.fc1.gate is None:  # pruned: what is left
            return torch.stack([layer.get_l0_penalty() for layer in self._layers()]).sum()
        return compute_l0_penalty(self)

    def get_l2_loss(self) -> Tensor:
        """Sum of the squared weights of all layers; 0 unless ``use_l2``."""
        return torch.stack([layer.get_l2_penalty() for layer in self._layers()]).sum()

    def get_sparsity_stats(self) -> dict[str, dict[str, Any]]:
        """See ``sparsereg.penalties.get_sparsity_stats``."""
        return get_sparsity_stats(self)

    def _layers(self) -> tuple[L0Linear, L0Linear, L0Linear]:
        return self.fc1, self.fc2, self.fc3
