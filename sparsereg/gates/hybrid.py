"""Selection of rows, one share by gates and one at random."""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sparsereg.checks import check_count, check_share
from sparsereg.gates.sample import SampleGate
from sparsereg.gates.selection import check_items, straight_through, take

DEFAULT_SHARE = 0.2
"""Share of the items that are selected if no number is given (l0-python's default)."""


class HybridGate(nn.Module):
    """Selects rows of a data set, one share by gates and one at random from the rest.

    The two shares never overlap. In eval mode they have exactly ``n_l0`` and ``n_random`` rows.
    In training mode the first is a draw (see ``SampleGate``), the second still has ``n_random``
    rows, or what the first has left.

    Args:
        n_items: number of rows, >= 1.
        l0_fraction: share of the target that gates select, in (0, 1]; at least one row.
        random_fraction: share of the target that is selected at random, in [0, 1]; the two sum to at
            most 1.
        target_items: number of rows to select, in [1, n_items]; a fifth of ``n_items`` if None.
        temperature: beta > 0.

    Raises:
        ValueError: an argument is outside its range.

    Example:
        >>> len(HybridGate(n_items=20, target_items=8).select(torch.randn(20, 4))) > 0
        True
    """

    def __init__(
        self,
        n_items: int,
        l0_fraction: float = 0.25,
        random_fraction: float = 0.75,
        target_items: int | None = None,
        temperature: float = 0.25,
    ) -> None:
        super().__init__()
        n_items = check_count("n_items", n_items)
        target = max(1, int(n_items * DEFAULT_SHARE)) if target_items is None else target_items
        target = check_count("target_items", target, at_most=n_items)
        both = check_share("l0_fraction", l0_fraction) + check_share("random_fraction", random_fraction)
        if l0_fraction == 0:
            raise ValueError("l0_fraction must be above 0: without gates there is nothing to learn, got 0")
        if both > 1 + 1e-9:
            raise ValueError(f"l0_fraction and random_fraction must sum to at most 1, got {both:g}")
        self.n_items = n_items
        self.l0_fraction = l0_fraction
        self.random_fraction = random_fraction
        self.target_items = target
        self.n_l0 = max(1, round(target * l0_fraction))
        # Two shares that make up the whole must not lose a row to rounding.
        share = target if math.isclose(both, 1.0) else round(target * random_fraction)
        self.n_random = min(share, target - self.n_l0)
        self.l0_gate = SampleGate(n_items, self.n_l0, temperature)

    def select(
        self, data: Any, random_seed: int | None = None, generator: torch.Generator | None = None
    ) -> tuple[Any, Tensor, np.ndarray]:
        """Select rows.

        Args:
            data: tensor, NumPy array or pandas frame of ``n_items`` rows, without NaN or infinity.
            random_seed: makes a generator of its own for this call; PyTorch's is left alone.
            generator: source of the random share, of the noise of a draw, and of the order of ties,
                instead of ``random_seed``. PyTorch's default generator if both are None.

        Returns:
            The selected rows, their indices in ascending order, and for each ``"l0"`` or ``"random"``.

        Raises:
            ValueError: ``data`` has another number of rows, or NaN or infinity; both sources are given.
        """
        if random_seed is not None:
            if generator is not None:
                raise ValueError("random_seed and generator are two sources of the same noise; give one")
            device = self.l0_gate.gates.log_alpha.device
            generator = torch.Generator(device=device).manual_seed(random_seed)
        check_items(data, self.n_items, 0, "data")
        chosen, z = self.l0_gate.draw(generator)
        rest = torch.ones(self.n_items, dtype=torch.bool, device=chosen.device)
        rest[chosen] = False
        others = torch.nonzero(rest).flatten()
        device = others.device if generator is None else generator.device
        order = torch.randperm(len(others), generator=generator, device=device)
        others = others[order[: self.n_random].to(others.device)]
        indices, position = torch.cat([chosen, others]).sort()
        factor = torch.cat([z, torch.ones_like(others, dtype=z.dtype)])[position]
        types = np.where((position < len(chosen)).cpu().numpy(), "l0", "random")
        return straight_through(take(data, indices, 0), factor, 0), indices, types

    def get_penalty(self) -> Tensor:
        """Expected number of open gates of the first share: differentiable."""
        return self.l0_gate.get_penalty()

    def extra_repr(self) -> str:
        """What print(module) shows."""
        return f"n_items={self.n_items}, n_l0={self.n_l0}, n_random={self.n_random}"
