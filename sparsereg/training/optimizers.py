"""Optimizers with a parameter group of their own for the gates."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from sparsereg import own_code
from sparsereg.errors import InputError
from sparsereg.penalties import hard_concretes
from sparsereg.training.config import Optimizer, OwnOptimizer
from sparsereg.training.own_schedule import own_learning_rate
from sparsereg.training.schedules import learning_rate_factor


def learning_rate(settings: Optimizer, steps_per_epoch: float) -> Callable[[float], float]:
    """Return the learning rate over its peak as a function of the epoch, which may be a fraction.

    Args:
        settings: the configuration group ``optimizer``.
        steps_per_epoch: > 0; for a schedule of the user's that counts steps.
    """
    if not isinstance(settings.schedule, str):
        return own_learning_rate(settings.schedule, settings, steps_per_epoch)
    return learning_rate_factor(
        settings.schedule,
        epochs=settings.schedule_epochs,
        warmup=settings.warmup_epochs,
        final=settings.final_lr_ratio,
        milestones=settings.milestones,
        gamma=settings.gamma,
    )


def check_own_code(net: nn.Module, settings: Optimizer, epochs: int | None, steps_per_epoch: float) -> None:
    """Make the optimizer and ask for the learning rate of each epoch, so that errors show before training.

    Args:
        net: the network.
        settings: the configuration group ``optimizer``.
        epochs: of the run; None or -1: there is no limit, and only the first is asked for.
        steps_per_epoch: > 0.

    Raises:
        InputError: code of the user's cannot be used.
    """
    build_optimizer(net, settings)
    factor = learning_rate(settings, steps_per_epoch)
    for epoch in range(1 if epochs is None or epochs < 0 else epochs):
        factor(float(epoch))


def build_optimizer(net: nn.Module, settings: Optimizer) -> torch.optim.Optimizer:
    """Return the optimizer with the groups ``weights``, ``norms_and_biases`` and ``gates``.

    Args:
        net: the network.
        settings: the configuration group ``optimizer``.
    """
    gate_ids = {id(h.log_alpha) for h in hard_concretes(net).values()}
    trained = [p for p in net.parameters() if p.requires_grad]
    weights = [p for p in trained if id(p) not in gate_ids]
    decayed = [p for p in weights if settings.decay_all or p.dim() > 1]
    others = [p for p in weights if not (settings.decay_all or p.dim() > 1)]
    gates = [p for p in trained if id(p) in gate_ids]
    groups = [
        {"name": "weights", "params": decayed, "weight_decay": settings.weight_decay, "lr": settings.lr},
        {"name": "norms_and_biases", "params": others, "weight_decay": 0.0, "lr": settings.lr},
        {"name": "gates", "params": gates, "weight_decay": 0.0, "lr": settings.lr * settings.gate_lr_ratio},
    ]
    groups = [g for g in groups if g["params"]]
    if isinstance(settings, OwnOptimizer):
        return _own(groups, settings)
    if settings.name == "sgd":
        return torch.optim.SGD(
            groups, lr=settings.lr, momentum=settings.momentum, nesterov=settings.momentum > 0
        )
    return torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, fused=True)


def _own(groups: list[dict[str, Any]], settings: OwnOptimizer) -> torch.optim.Optimizer:
    """Make the optimizer that the user named."""
    made = own_code.call(settings.spec, "optimizer", (groups,), lr=settings.lr)
    if not isinstance(made, torch.optim.Optimizer):
        raise InputError(
            f"optimizer._target_={settings._target_}: expected a torch.optim.Optimizer, it makes a "
            f"{type(made).__name__}"
        )
    return made
