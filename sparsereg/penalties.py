"""Model-wide penalties and sparsity statistics, over every Hard Concrete tensor of a network."""

import torch
from torch import Tensor, nn

from sparsereg.distributions import HardConcrete, p_active


def hard_concretes(model: nn.Module) -> dict[str, HardConcrete]:
    """Return every Hard Concrete tensor of a network by its name, a shared one once."""
    return {name: m for name, m in model.named_modules() if isinstance(m, HardConcrete)}


def l_c0(model: nn.Module) -> Tensor:
    """L_C0: the mean of P(z > 0) over all gates of a network, a differentiable scalar in [0, 1].

    The gates are put end to end first, so that the cost does not grow with the number of layers.

    Args:
        model: a network with at least one gate.

    Raises:
        ValueError: the network has no gate.
    """
    groups: dict[tuple[float, float, float], list[Tensor]] = {}
    for gate in hard_concretes(model).values():
        groups.setdefault((gate.temperature, gate.gamma, gate.zeta), []).append(gate.log_alpha.flatten())
    if not groups:
        raise ValueError("the network has no gates, so L_C0 is not defined")
    active = [p_active(torch.cat(members), *shape) for shape, members in groups.items()]
    return torch.cat(active).mean()
