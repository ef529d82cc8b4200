"""A constraint on the expected cost of a network, as the loss that it is added to sees it."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor


@dataclass
class Constraint:
    """The constraint as the loss sees it: linear in the gates' locations between two measurements.

    Attributes:
        multiplier: lambda, >= 0.
        violation: log(E[cost] / target) when it was measured last.
        gradients: each gate's locations and d log E[cost] / d log_alpha.
        scalars: what TensorBoard shows.
    """

    multiplier: float
    violation: float
    gradients: list[tuple[Tensor, Tensor]]
    scalars: dict[str, float]

    def add_gradient_(self) -> None:
        """Add the gradient of the penalty to that which the gates have."""
        for log_alpha, gradient in self.gradients:
            added = self.multiplier * gradient
            log_alpha.grad = added if log_alpha.grad is None else log_alpha.grad.add_(added)

    def penalty(self) -> Tensor:
        """Return multiplier * log(E[cost] / target), a scalar: the value and the gradient measured last."""
        linear = torch.stack([(log_alpha * gradient).sum() for log_alpha, gradient in self.gradients]).sum()
        return self.multiplier * (self.violation + linear - linear.detach())


@runtime_checkable
class TakesConstraint(Protocol):
    """A LightningModule that adds ``self.constraint.penalty()`` to its loss, where there is a constraint."""

    constraint: Constraint | None
