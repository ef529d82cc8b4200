"""A linear layer with a gate on every weight."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsereg.checks import check_count
from sparsereg.distributions import HardConcrete
from sparsereg.layers.gated import GatedLayer, gate_mean, reset_


class L0Linear(GatedLayer):
    """Linear layer with a Hard Concrete gate on every weight: y = x (W * z)^T + b.

    Args:
        in_features: size of the input, >= 1.
        out_features: size of the output, >= 1.
        bias: whether there is a bias; it has no gate.
        temperature: beta > 0.
        init_sparsity: share of the gates that start closed, 1 - P(z > 0), in (0, 1).
        use_l2: whether ``get_l2_penalty`` counts the weights.
        generator: source of the initial weights; PyTorch's default if None.

    Raises:
        ValueError: an argument is outside its range.

    Example:
        >>> L0Linear(6, 4)(torch.ones(2, 6)).shape
        torch.Size([2, 4])
    """

    weight_gates: HardConcrete

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        temperature: float = 0.5,
        init_sparsity: float = 0.5,
        use_l2: bool = False,
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        in_features = check_count("in_features", in_features)
        out_features = check_count("out_features", out_features)
        gate = HardConcrete(
            out_features, in_features, temperature=temperature, init_mean=gate_mean(init_sparsity)
        )
        super().__init__("weight_gates", gate, use_l2)
        self.in_features = in_features
        self.out_features = out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        self.reset_parameters(generator)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw new weights and biases; the gates stay."""
        reset_(self.weight, self.bias, generator)

    def forward(self, input: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features)."""
        weight, bias = self.gated()
        return F.linear(input, weight, bias)

    def plain(self) -> nn.Linear:
        """An nn.Linear with the same output in eval mode."""
        layer = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None)
        self._fill(layer)
        return layer

    def extra_repr(self) -> str:
        """What print(module) shows."""
        bias = self.bias is not None
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={bias}"
