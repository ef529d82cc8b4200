"""Optimizers with a parameter group of their own for the gates."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from sparsereg.penalties import hard_concretes
from sparsereg.training.schedules import learning_rate_factor


@dataclass(frozen=True)
class OptimizerSettings:
    """The configuration group ``optimizer``.

    Attributes:
        name: adamw or sgd.
        lr: peak learning rate of the weights, > 0.
        weight_decay: decoupled (adamw) or L2 (sgd) decay of the weights, >= 0.
        decay_all: decay BatchNorm parameters and biases, too.
        gate_lr_ratio: learning rate of the gates over ``lr``, > 0. With 1 hardly any gate closes in the
            time that the weights need.
        betas: of AdamW.
        momentum: of SGD.
        schedule: see :func:`~sparsereg.training.schedules.learning_rate_factor`, as the following.
        schedule_epochs: length of the schedule.
        warmup_epochs: epochs of linear increase.
        final_lr_ratio: learning rate at the end over the peak.
        milestones: epochs of multistep.
        gamma: factor of multistep.
    """

    name: str = "adamw"
    lr: float = 1e-3
    weight_decay: float = 0.0
    decay_all: bool = False
    gate_lr_ratio: float = 10.0
    betas: tuple[float, float] = (0.9, 0.999)
    momentum: float = 0.9
    schedule: str = "constant"
    schedule_epochs: int = 30
    warmup_epochs: float = 0.0
    final_lr_ratio: float = 0.0
    milestones: tuple[float, ...] = ()
    gamma: float = 0.1

    def __post_init__(self) -> None:
        if self.name not in ("adamw", "sgd"):
            raise ValueError(f"optimizer.name={self.name}: expected adamw or sgd")
        for key in ("lr", "gate_lr_ratio"):
            if not getattr(self, key) > 0:
                raise ValueError(f"optimizer.{key}={getattr(self, key)}: expected a number > 0")
        if not self.weight_decay >= 0:
            raise ValueError(f"optimizer.weight_decay={self.weight_decay}: expected a number >= 0")
        if len(self.betas) != 2 or not all(0 <= b < 1 for b in self.betas):
            raise ValueError(f"optimizer.betas={list(self.betas)}: expected two numbers in [0, 1)")
        self.factor()

    def factor(self) -> Callable[[float], float]:
        """Return the learning rate over its peak as a function of the epoch."""
        return learning_rate_factor(
            self.schedule,
            epochs=self.schedule_epochs,
            warmup=self.warmup_epochs,
            final=self.final_lr_ratio,
            milestones=self.milestones,
            gamma=self.gamma,
        )


def build_optimizer(net: nn.Module, settings: OptimizerSettings) -> torch.optim.Optimizer:
    """Return the optimizer with the groups ``weights``, ``norms_and_biases`` and ``gates``.

    Args:
        net: the network.
        settings: see :class:`OptimizerSettings`.
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
    if settings.name == "sgd":
        return torch.optim.SGD(
            groups, lr=settings.lr, momentum=settings.momentum, nesterov=settings.momentum > 0
        )
    return torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, fused=True)
