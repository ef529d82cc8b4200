"""How far weighted totals are from their targets, as a number, its gradient, and its quadratic bound."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsereg.calibration.config import CAP, LOSSES
from sparsereg.shapes import Float, Shaped


def check_loss(name: str) -> str:
    """Return the name of a loss, or raise a ValueError that lists the known ones."""
    if name not in LOSSES:
        near = difflib.get_close_matches(str(name), LOSSES, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ValueError(f"loss must be one of {', '.join(LOSSES)}, got {name!r}{hint}")
    return name


def group_shares(
    num_targets: int,
    groups: Shaped[np.ndarray, "targets={num_targets}"] | None = None,
    *,
    normalize: bool = True,
    multipliers: Mapping[Any, float] | None = None,
    target_weights: Float[np.ndarray, "targets={num_targets}"] | None = None,
) -> Float[np.ndarray, "targets={num_targets}"]:
    """Weight of every target in the loss.

    Args:
        num_targets: How many targets there are.
        groups: Label of the group of each target; None: every target for itself.
        normalize: Every group counts once, however many targets it has.
        multipliers: Factor on the targets of a group, by label, >= 0; after the normalisation.
        target_weights: Factor on each target, >= 0.

    Returns:
        Shares >= 0 of shape (targets,), float64, not normalised over groups.

    Raises:
        ValueError: multipliers without groups, for an unknown group, or negative.
    """
    shares = np.ones(num_targets) if target_weights is None else np.array(target_weights, dtype=np.float64)
    if groups is None:
        if multipliers:
            raise ValueError("group_multipliers requires target_groups to be set")
        return shares
    labels, member, counts = np.unique(np.asarray(groups), return_inverse=True, return_counts=True)
    if normalize:
        shares = shares / counts[member]
    for label, factor in (multipliers or {}).items():
        if label not in labels:
            raise ValueError(f"group_multipliers key {label!r} not found in target_groups")
        if not factor >= 0:
            raise ValueError(f"group_multipliers must be >= 0, got {factor!r} for group {label!r}")
        shares[member == np.flatnonzero(labels == label)[0]] *= factor
    return shares


@dataclass(frozen=True, eq=False)
class TargetLoss:
    """Weighted sum over targets of a loss of (total - target).

    Args:
        targets: Wanted totals, float64, shape (targets,).
        shares: Weight of each target, >= 0; a mean if they add up to one.
        loss: A name in ``LOSSES``.
        cap: Largest relative error that counts, for "capped".
        scales: What errors are compared with, > 0; None: |target| + 1, as in l0-python.
        tolerance: How far each total may be from its target without being wrong, >= 0; None: 0.

    Raises:
        ValueError: the loss is unknown, or the cap is not > 0.
    """

    targets: Float[Tensor, "targets"]
    shares: Float[Tensor, "targets"]
    loss: str = "relative"
    cap: float = CAP
    scales: Float[Tensor, "targets"] | None = None
    tolerance: Float[Tensor, "targets"] | None = None
    scale: Float[Tensor, "targets"] = field(init=False)
    """What an error is divided by: the scales, or 1 for "mse"."""

    def __post_init__(self) -> None:
        check_loss(self.loss)
        if not self.cap > 0:
            raise ValueError(f"cap must be a relative error > 0, got {self.cap!r}")
        if self.scales is None:
            object.__setattr__(self, "scales", self.targets.abs() + 1.0)
        plain = self.loss == "mse"
        object.__setattr__(self, "scale", torch.ones_like(self.targets) if plain else self.scales)

    @property
    def is_quadratic(self) -> bool:
        """Whether the loss is a sum of squares, and ``bound`` therefore the loss itself."""
        return self.loss in ("relative", "mse") and self.tolerance is None

    @cached_property
    def _twice_weight(self) -> Float[Tensor, "targets"]:
        """Second derivative of a quadratic loss with respect to each total."""
        return 2.0 * self.shares / self.scale.square()

    def _errors(
        self, totals: Float[Tensor, "targets={len(self.targets)}"]
    ) -> Float[Tensor, "targets={len(self.targets)}"]:
        """What is wrong with each total, over its scale."""
        error = totals - self.targets
        if self.tolerance is not None:
            error = error.sign() * (error.abs() - self.tolerance).clamp(min=0.0)
        return error / self.scale

    def first(self, count: int) -> TargetLoss:
        """The loss of the first targets only."""
        parts = (self.targets, self.shares, self.scales, self.tolerance)
        targets, shares, scales, tolerance = (v if v is None else v[:count] for v in parts)
        assert targets is not None
        assert shares is not None
        return TargetLoss(targets, shares, self.loss, self.cap, scales, tolerance)

    def value(self, totals: Float[Tensor, "targets={len(self.targets)}"]) -> Float[Tensor, ""]:
        """The loss, a float64 scalar."""
        return self._value(self._errors(totals))

    def _value(self, error: Float[Tensor, "targets"]) -> Float[Tensor, ""]:
        if self.loss in ("relative", "mse"):
            per_target = error.square()
        elif self.loss == "mape":
            per_target = error.abs()
        else:
            per_target = error.abs().clamp(max=self.cap)
        return (self.shares * per_target).sum()

    def gradient_by_totals(
        self, totals: Float[Tensor, "targets={len(self.targets)}"]
    ) -> Float[Tensor, "targets={len(self.targets)}"]:
        """Gradient of the loss with respect to the totals, float64."""
        return self.value_and_gradient(totals)[1]

    def value_and_gradient(
        self, totals: Float[Tensor, "targets={len(self.targets)}"]
    ) -> tuple[Float[Tensor, ""], Float[Tensor, "targets={len(self.targets)}"]]:
        """The loss and its gradient with respect to the totals, float64."""
        if self.is_quadratic:  # an epoch of gates asks for it: as few passes as there can be
            error = totals - self.targets
            slope = self._twice_weight * error
            return 0.5 * torch.dot(slope, error), slope
        error = self._errors(totals)
        if self.loss in ("relative", "mse"):
            slope = 2.0 * error
        elif self.loss == "mape":
            slope = error.sign()
        else:
            slope = error.sign() * (error.abs() < self.cap)
        return self._value(error), self.shares * slope / self.scale

    def bound(self, totals: Float[Tensor, "targets={len(self.targets)}"], floor: float = 1e-12) -> Quadratic:
        """Quadratic that touches the loss at ``totals`` and bounds it from above (itself if quadratic).

        Args:
            totals: Where to touch.
            floor: Relative error below which an absolute value is rounded off, > 0.
        """
        weight, targets = self.shares / self.scale.square(), self.targets
        if self.tolerance is not None:  # the nearest value that is right
            low, high = targets - self.tolerance, targets + self.tolerance
            targets = torch.minimum(torch.maximum(totals, low), high)
        if self.loss in ("mape", "capped"):
            error = self._errors(totals).abs()
            weight = weight / (2.0 * error.clamp(min=floor))
            if self.loss == "capped":
                weight = weight * (error < self.cap)
        return Quadratic(targets, weight, self.scales)

    def quadratic(self) -> Quadratic:
        """The squared error of the same scale: the loss itself, or a smooth stand-in for it."""
        return Quadratic(self.targets, self.shares / self.scale.square(), self.scales)


@dataclass(frozen=True, eq=False)
class Quadratic:
    """sum_i weight_i (total_i - target_i)^2.

    Args:
        targets: Wanted totals, float64.
        weight: Weight of each target's squared error, >= 0.
        scales: What an error of each is compared with, > 0; None: the largest target.
    """

    targets: Float[Tensor, "targets"]
    weight: Float[Tensor, "targets"]
    scales: Float[Tensor, "targets"] | None = None

    @cached_property
    def size(self) -> float:
        """Root of what the quadratic is when every error is as large as its scale; > 0."""
        scales = self.targets.abs() if self.scales is None else self.scales
        size = float((self.weight * scales.square()).sum().sqrt())
        return size if size > 0 else 1.0

    def value(self, totals: Float[Tensor, "targets={len(self.targets)}"]) -> Float[Tensor, ""]:
        """The quadratic, a float64 scalar."""
        return (self.weight * (totals - self.targets).square()).sum()

    def half_gradient_by_totals(
        self, totals: Float[Tensor, "targets={len(self.targets)}"]
    ) -> Float[Tensor, "targets={len(self.targets)}"]:
        """Half of its gradient with respect to the totals."""
        return self.weight * (totals - self.targets)
