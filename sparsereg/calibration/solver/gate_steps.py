"""The arithmetic of an epoch of gates apart from the matrix: draw them, then move weights and locations.

Two homes of the same formulas: compiled loops that pass over the households once on the CPU, and torch on any
device. Their results differ by rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from sparsereg.distributions import p_active, shift
from sparsereg.linalg.adam import BETA1, BETA2, adam_step
from sparsereg.linalg.threads import in_turns
from sparsereg.shapes import Float

_LANE = 32_768
"""Households that one thread passes over at once; sums over the lanes are added in order."""


@dataclass(frozen=True)
class Shape:
    """Of the gates in one epoch: temperature beta > 0, ends gamma < 0 and zeta > 1 of the interval."""

    beta: float
    gamma: float
    zeta: float


@dataclass(frozen=True)
class Pace:
    """Of Adam in one epoch: number of the step, from 1, learning rate, and factors of the penalties."""

    step: int
    lr: float
    lambda_l2: float
    price: float = 0.0


class GateSteps(Protocol):
    """Arithmetic of the gates of some households; keeps between the calls what a draw has given."""

    def draw(
        self,
        log_weight: Float[Tensor, "households"],
        log_alpha: Float[Tensor, "households"],
        levels: Float[Tensor, "households"] | None,
        shape: Shape,
    ) -> Float[Tensor, "households"]:
        """Weights times the gates at these levels, float32; None: without gates."""

    def expected(self, log_alpha: Float[Tensor, "households"], shape: Shape) -> float:
        """Sum of P(z > 0), accumulated in float64."""

    def move(
        self,
        gradient: Float[Tensor, "households"],
        log_weight: Float[Tensor, "households"],
        log_alpha: Float[Tensor, "households"],
        moments: Float[Tensor, "4 households"],
        shape: Shape | None,
        pace: Pace,
    ) -> None:
        """Take the step of Adam from the gradient with respect to the drawn weights; None: weights only."""


class TorchSteps:
    """With torch, on any device.

    Args:
        like: Where the households are.
    """

    def __init__(self, like: Float[Tensor, "households"]) -> None:
        # New memory for every intermediate result would cost as much as the arithmetic.
        self._buffers = torch.empty(6, len(like), device=like.device)
        self._positive: Tensor
        self._weight: Tensor
        self._slope: Tensor
        self._positive, self._weight, self._slope = self._buffers[:3]

    def draw(
        self, log_weight: Tensor, log_alpha: Tensor, levels: Tensor | None, shape: Shape
    ) -> Float[Tensor, "households"]:
        """See ``GateSteps``."""
        torch.exp(log_weight, out=self._positive)
        if levels is None:
            self._weight.copy_(self._positive)
            return self._weight
        low, high, beta = shape.gamma, shape.zeta, shape.beta
        # The quantile function of ``distributions`` at uniform levels, with its derivative.
        s = levels.logit_().add_(log_alpha).div_(beta).sigmoid_()
        gate = torch.mul(s, high - low, out=self._weight).add_(low)
        torch.addcmul(s, s, s, value=-1.0, out=self._slope).mul_((high - low) / beta)
        self._slope.mul_(gate > 0.0).mul_(gate < 1.0)
        gate.clamp_(0.0, 1.0).mul_(self._positive)
        return gate

    def expected(self, log_alpha: Tensor, shape: Shape) -> float:
        """See ``GateSteps``."""
        return float(p_active(log_alpha, shape.beta, shape.gamma, shape.zeta).double().sum())

    def move(
        self,
        gradient: Tensor,
        log_weight: Tensor,
        log_alpha: Tensor,
        moments: Tensor,
        shape: Shape | None,
        pace: Pace,
    ) -> None:
        """See ``GateSteps``."""
        gradient = self._buffers[3].copy_(gradient)
        down_weight = torch.mul(gradient, self._weight, out=self._buffers[4])
        if pace.lambda_l2 > 0:
            down_weight.addcmul_(self._positive, self._positive, value=2.0 * pace.lambda_l2)
        how = pace.step, pace.lr, self._buffers[5]
        adam_step(log_weight, down_weight, moments[0], moments[1], *how)
        if shape is None:
            return
        down_alpha = gradient.mul_(self._positive).mul_(self._slope)
        if pace.price > 0:
            p = p_active(log_alpha, shape.beta, shape.gamma, shape.zeta)
            down_alpha.add_(p.addcmul_(p, p, value=-1.0), alpha=pace.price)
        adam_step(log_alpha, down_alpha, moments[2], moments[3], *how)


class CompiledSteps:
    """With numba's loops, on the CPU.

    Args:
        like: Where the households are.
    """

    def __init__(self, like: Float[Tensor, "households"]) -> None:
        num = len(like)
        self._weight, self._along = np.empty(num, np.float32), np.empty(num, np.float32)
        self._lanes = [slice(first, min(first + _LANE, num)) for first in range(0, max(num, 1), _LANE)]

    def _run(self, work: Callable[..., Any], vectors: tuple[Any, ...], *numbers: float) -> list[Any]:
        """Call a kernel for every lane: vectors of households first, then numbers."""
        arrays = [v.numpy() if isinstance(v, Tensor) else v for v in vectors]
        constants = [np.float32(number) for number in numbers]
        return in_turns(work, [(*(v[lane] for v in arrays), *constants) for lane in self._lanes])

    def draw(
        self, log_weight: Tensor, log_alpha: Tensor, levels: Tensor | None, shape: Shape
    ) -> Float[Tensor, "households"]:
        """See ``GateSteps``."""
        from sparsereg.calibration.solver import gate_kernels

        weight = torch.from_numpy(self._weight)
        if levels is None:
            return torch.exp(log_weight, out=weight)
        vectors = levels, log_weight, log_alpha, self._weight, self._along
        self._run(gate_kernels.draw, vectors, 1.0 / shape.beta, shape.gamma, shape.zeta)
        return weight

    def expected(self, log_alpha: Tensor, shape: Shape) -> float:
        """See ``GateSteps``."""
        from sparsereg.calibration.solver import gate_kernels

        return float(sum(self._run(gate_kernels.expected, (log_alpha,), _shift(shape))))

    def move(
        self,
        gradient: Tensor,
        log_weight: Tensor,
        log_alpha: Tensor,
        moments: Tensor,
        shape: Shape | None,
        pace: Pace,
    ) -> None:
        """See ``GateSteps``."""
        from sparsereg.calibration.solver import gate_kernels

        rate = pace.lr / (1.0 - BETA1**pace.step), 1.0 / math.sqrt(1.0 - BETA2**pace.step)
        if shape is None:
            vectors = gradient, self._weight, log_weight, *moments[:2]
            self._run(gate_kernels.move_weights, vectors, pace.lambda_l2, *rate)
            return
        vectors = gradient, self._weight, self._along, log_weight, log_alpha, *moments
        self._run(gate_kernels.move, vectors, pace.lambda_l2, pace.price, _shift(shape), *rate)


def _shift(shape: Shape) -> float:
    return shift(shape.beta, shape.gamma, shape.zeta)
