"""A vector of gates over items, on its own or as the base of the selectors."""

import torch
from torch import Tensor, nn

from sparsereg.checks import check_below_one, check_count
from sparsereg.distributions import HardConcrete
from sparsereg.gates.selection import top


class L0Gate(nn.Module):
    """Gates over items (samples, features, ...), as l0-python's class of this name.

    Not to be taken for ``sparsereg.model.basic_l0_blocks.L0Gate``, an older promise with other
    arguments, which multiplies a dimension of the feature maps inside a network.

    Args:
        size: number of items, >= 1.
        temperature: beta > 0.
        init_mean: initial P(z > 0), in (0, 1).

    Raises:
        ValueError: an argument is outside its range.

    Example:
        >>> gate = L0Gate(5)
        >>> gate.apply_gates(torch.ones(5, 2)).shape
        torch.Size([5, 2])
    """

    def __init__(self, size: int, temperature: float = 0.5, init_mean: float = 0.5) -> None:
        super().__init__()
        self.size = check_count("size", size)
        self.init_mean = init_mean
        self.gates = HardConcrete(size, temperature=temperature, init_mean=init_mean)

    @property
    def temperature(self) -> float:
        """beta > 0 of the gates."""
        return self.gates.temperature

    @temperature.setter
    def temperature(self, value: float) -> None:
        self.gates.temperature = value

    def get_gates(self, generator: torch.Generator | None = None) -> Tensor:
        """Gates in [0, 1], (size,): a draw in training mode, the medians in eval mode."""
        z: Tensor = self.gates(generator=generator)
        return z

    def apply_gates(self, x: Tensor, dim: int = 0, generator: torch.Generator | None = None) -> Tensor:
        """Multiply a dimension of a tensor by the gates.

        Args:
            x: any shape with ``size`` at ``dim``.
            dim: the gated dimension.
            generator: source of the noise of a draw.

        Raises:
            ValueError: the dimension has another size.
        """
        if not -x.dim() <= dim < x.dim() or x.shape[dim] != self.size:
            raise ValueError(f"x must have size {self.size} at dimension {dim}, got shape {tuple(x.shape)}")
        shape = [1] * x.dim()
        shape[dim] = -1
        return x * self.get_gates(generator).to(x.device, x.dtype).view(shape)

    def get_penalty(self) -> Tensor:
        """Expected number of open gates, the sum of P(z > 0): differentiable."""
        return self.gates.get_penalty()

    @torch.no_grad()
    def get_active_indices(
        self, threshold: float | None = 0.5, generator: torch.Generator | None = None
    ) -> Tensor:
        """Indices of the items whose gate is above a threshold, in ascending order.

        Args:
            threshold: gate value in [0, 1).
            generator: source of the noise of a draw.

        Raises:
            ValueError: the threshold is outside its range.
        """
        least = check_below_one("threshold", threshold)
        return torch.nonzero(self.get_gates(generator) > least).flatten()

    @torch.no_grad()
    def _active_prob(self) -> Tensor:
        return self.gates.p_active()

    def extra_repr(self) -> str:
        """What print(module) shows."""
        return f"size={self.size}"


MAX_INIT = 0.99
"""Largest initial P(z > 0) of a selector: at 1 a gate could never learn to close."""


class Selector(L0Gate):
    """What SampleGate and FeatureGate share: a draw in training, a ranking by P(z > 0) in eval mode.

    Args:
        size: number of items, >= 1.
        target: number of items to select, in [1, size].
        temperature: beta > 0.
        names: names of the two sizes, for errors.

    Raises:
        ValueError: an argument is outside its range.
    """

    def __init__(self, size: int, target: int, temperature: float, names: tuple[str, str]) -> None:
        check_count(names[0], size)
        check_count(names[1], target, at_most=size)
        super().__init__(size, temperature, min(target / size, MAX_INIT))

    def num_eval(self) -> int:
        """Number of items that eval mode selects."""
        raise NotImplementedError

    def draw(self, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Choose items: by a draw in training mode, by rank of P(z > 0) in eval mode.

        Args:
            generator: source of the noise of a draw, and of the order of ties.

        Returns:
            Indices (selected,) in ascending order, and the gates of these items: in training mode the
            positive draws, differentiable; in eval mode ones, since what is selected counts in full.
        """
        if self.training:
            z = self.get_gates(generator)
            indices = torch.nonzero(z.detach() > 0).flatten()
            return indices, z[indices]
        # log_alpha has the order of P(z > 0), which rounds to 1 (or 0) where the gates are sure.
        indices = top(self.gates.log_alpha.detach(), self.num_eval(), generator)
        return indices, torch.ones_like(indices, dtype=self.gates.log_alpha.dtype)

    @torch.no_grad()
    def get_active_indices(
        self, threshold: float | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """Indices of the selected items, in ascending order.

        Args:
            threshold: select by this gate value in [0, 1) instead, whatever the number.
            generator: source of the noise of a draw, and of the order of ties.
        """
        if threshold is not None:
            return super().get_active_indices(threshold, generator)
        return self.draw(generator)[0]
