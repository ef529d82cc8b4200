"""An optimizer and a schedule that sparsereg does not know."""

from collections.abc import Callable

import torch
from torch import Tensor


class Lion(torch.optim.Optimizer):
    """Steps of one length in the direction of the momentum's sign (Chen et al., 2023)."""

    def __init__(self, params: list[dict], lr: float, betas: tuple[float, float] = (0.9, 0.99)) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """Take one."""
        with torch.enable_grad():
            loss = None if closure is None else closure()
        for group in self.param_groups:
            one, two = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(group["lr"] * torch.lerp(p.grad, momentum, one).sign())
                momentum.lerp_(p.grad, 1 - two)
        return loss


def falling(epochs: int) -> Callable[[float], float]:
    """Return a straight line down to a tenth."""
    return lambda epoch: max(1 - 0.9 * epoch / epochs, 0.1)
