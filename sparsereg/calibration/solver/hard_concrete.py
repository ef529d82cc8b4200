"""Weights exp(log_weight) times Hard Concrete gates, learned by Adam: the L0 method.

Minimises loss(totals) + lambda_l0 * sum P(z > 0) + lambda_l2 * sum exp(log_weight)^2 with the gradient
written out by hand: one product with the matrix for the totals of a draw and one for its gradient, both
reading open households only. A shut gate passes no gradient from the data, so leaving it out is exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sparsereg.calibration.solver.losses import TargetLoss
from sparsereg.calibration.solver.matrix import HouseholdMatrix
from sparsereg.distributions import GAMMA, ZETA, gate_median, p_active
from sparsereg.linalg.adam import adam_step
from sparsereg.linalg.threads import quiet_threads
from sparsereg.shapes import Float, Int

_TIDY_EVERY = 50
"""Epochs between two removals of moments so small that the processor would treat them slowly, and between
two arrangements of the matrix."""
_OFTEN = 0.02
"""P(z > 0) from which a household is stored with those that are often open."""
_PROPORTIONAL_GAIN, _INTEGRAL_GAIN, _FIRST_PRICE = 10.0, 0.02, 30.0
"""Steering of lambda_l0 by the number of households; the last is the price at which it starts."""
_RELEASE = 0.8
"""Share of the epochs over which the wanted number of households falls to K."""


@dataclass(frozen=True)
class GateSettings:
    """What the gated solver does, apart from the data.

    Args:
        lambda_l0: Factor of the expected number of kept households, >= 0.
        lambda_l2: Factor of the sum of squared weights (before the gates), >= 0.
        lr: Learning rate of Adam, > 0.
        temperature: beta as a function of the epoch.
        num_epochs: How long the run is, for the schedule of the number of households.
        num_open: Steer lambda_l0 so that this many gates are open; None: leave it.
        gamma: Lower end of the stretch interval, < 0.
        zeta: Upper end of the stretch interval, > 1.
        use_gates: False: no gates, weights only.
    """

    lambda_l0: float = 0.0
    lambda_l2: float = 0.0
    lr: float = 0.15
    temperature: Callable[[float], float] = field(default=lambda epoch: 0.65)
    num_epochs: int = 1000
    num_open: int | None = None
    gamma: float = GAMMA
    zeta: float = ZETA
    use_gates: bool = True


class GateSolver:
    """The state of a gated run: parameters, moments, the epoch; noise is a function of seed and epoch.

    Args:
        matrix: All households.
        loss: What is minimised over the totals.
        log_weight: Logarithm of the starting weights, float32, shape (households,).
        log_alpha: Starting locations of the gates, float32.
        settings: Penalties, rates and schedules.
        seed: Seed of the noise.
    """

    def __init__(
        self,
        matrix: HouseholdMatrix,
        loss: TargetLoss,
        log_weight: Float[Tensor, "households"],
        log_alpha: Float[Tensor, "households"],
        settings: GateSettings,
        seed: int = 0,
    ) -> None:
        self.matrix, self.loss, self.settings = matrix, loss, settings
        self.epoch = 0
        self.log_weight, self.log_alpha = log_weight.float().clone(), log_alpha.float().clone()
        self._moments = torch.zeros(4, len(log_weight), device=log_weight.device)
        self._seed = seed
        self._integral = 0.0
        self.last_loss = float("nan")
        # New memory for every intermediate result would cost as much as the arithmetic.
        self._buffers = torch.empty(6, len(log_weight), device=log_weight.device)
        self._positive, self._weight, self._slope = self._buffers[:3]
        self._often: Tensor | None = None
        self._products: HouseholdMatrix | _OftenOpen = matrix

    @property
    def temperature(self) -> float:
        """beta of the current epoch."""
        return self.settings.temperature(self.epoch)

    def gates(self) -> Float[Tensor, "households"]:
        """Test-time gates, float32."""
        if not self.settings.use_gates:
            return torch.ones_like(self.log_alpha)
        return gate_median(self.log_alpha, self.temperature, self.settings.gamma, self.settings.zeta)

    def weights(self) -> Float[Tensor, "households"]:
        """Weights times test-time gates, float64, zero where shut."""
        return self.log_weight.double().exp() * self.gates().double()

    def expected_kept(self) -> float:
        """Sum of P(z > 0), accumulated in float64."""
        return float(self._p_active().double().sum())

    def step(self, count: int = 1) -> None:
        """Run ``count`` epochs."""
        with quiet_threads():
            for _ in range(count):
                if self.epoch % _TIDY_EVERY == 0:
                    self._tidy()
                self._step()
                self.epoch += 1

    def _step(self) -> None:
        """One epoch: draw, weigh, and take the step of Adam."""
        totals = self._draw()
        self.last_loss = float(self.loss.value(totals))
        where = self._weight if self.settings.use_gates else None
        by_totals = self.loss.gradient_by_totals(totals)
        gradient = self._buffers[3].copy_(self._products.gradient(by_totals, where))
        down_weight = torch.mul(gradient, self._weight, out=self._buffers[4])
        if self.settings.lambda_l2 > 0:
            down_weight.addcmul_(self._positive, self._positive, value=2.0 * self.settings.lambda_l2)
        self._adam(self.log_weight, down_weight, self._moments[:2])
        if self.settings.use_gates:
            down_alpha = gradient.mul_(self._positive).mul_(self._slope)
            self._add_penalty(down_alpha)
            self._adam(self.log_alpha, down_alpha, self._moments[2:])

    def _draw(self) -> Float[Tensor, "targets"]:
        """Draw gates; keep the weights and the slope of the gates by location; return the totals."""
        torch.exp(self.log_weight, out=self._positive)
        if not self.settings.use_gates:
            return self._products.totals(self._weight.copy_(self._positive))
        low, high, beta = self.settings.gamma, self.settings.zeta, self.temperature
        # The quantile function of ``distributions`` at uniform levels, with its derivative.
        u = self.matrix.noise(self._seed, self.epoch)
        s = u.logit_().add_(self.log_alpha).div_(beta).sigmoid_()
        gate = torch.mul(s, high - low, out=self._weight).add_(low)
        torch.addcmul(s, s, s, value=-1.0, out=self._slope).mul_((high - low) / beta)
        self._slope.mul_(gate > 0.0).mul_(gate < 1.0)
        return self._products.totals(gate.clamp_(0.0, 1.0).mul_(self._positive))

    def _add_penalty(self, gradient: Float[Tensor, "households"]) -> None:
        """Add the gradient of lambda_l0 * sum P(z > 0), with lambda_l0 steered if a number is wanted."""
        p = self._p_active()
        price = self.settings.lambda_l0
        if self.settings.num_open is not None:
            price = self._steer(float(p.double().sum()))
        if price > 0:
            gradient.add_(p.addcmul_(p, p, value=-1.0), alpha=price)

    def _p_active(self) -> Float[Tensor, "households"]:
        return p_active(self.log_alpha, self.temperature, self.settings.gamma, self.settings.zeta)

    def _adam(self, value: Tensor, gradient: Tensor, moments: Tensor) -> None:
        first, second = moments
        adam_step(value, gradient, first, second, self.epoch + 1, self.settings.lr, self._buffers[5])

    def _tidy(self) -> None:
        """Forget moments too small to matter, and store together the households that are often open.

        Numbers near the smallest float are slow, and reading every tenth household from main memory costs
        nearly as much as reading all of them.
        """
        self._moments[self._moments.abs() < 1e-30] = 0.0
        if self.settings.use_gates:
            p = self._p_active()
            often = torch.nonzero(p > _OFTEN).flatten()
            self._store_apart(often if len(often) < 0.5 * len(p) else None)

    def _store_apart(self, often: Int[Tensor, "often"] | None) -> None:
        """Keep the entries of these households together; None: leave all where they are."""
        self._often = often
        self._products = self.matrix if often is None else _OftenOpen(self.matrix, often)

    def _steer(self, expected: float) -> float:
        """lambda_l0 of this epoch: proportional-integral control of log(expected / wanted) on log(lambda).

        The wanted number falls geometrically from all households to K over the first part of the run. The
        unit of lambda is the current loss per kept household, since under Adam a penalty acts by its ratio
        to the gradient of the data.
        """
        everyone = len(self.log_weight)
        share = float(self.settings.num_open or 1) / everyone
        progress = min(1.0, self.epoch / max(1.0, _RELEASE * self.settings.num_epochs))
        error = math.log(max(expected, 1e-30) / (everyone * share**progress))
        self._integral += _INTEGRAL_GAIN * max(-0.5, min(0.5, error))
        exponent = min(self._integral + _PROPORTIONAL_GAIN * error, 40.0)
        return _FIRST_PRICE * math.exp(exponent) * self.last_loss / max(expected, 1.0)

    def state_dict(self) -> dict[str, Any]:
        """Everything that a later run needs to go on as if it had not been interrupted."""
        return {
            "epoch": self.epoch,
            "log_weight": self.log_weight.clone(),
            "log_alpha": self.log_alpha.clone(),
            "moments": self._moments.clone(),
            "seed": self._seed,
            "integral": self._integral,
            "last_loss": self.last_loss,
            "often": None if self._often is None else self._often.clone(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a state that ``state_dict`` gave for the same problem.

        Raises:
            ValueError: the state belongs to another number of households.
        """
        if len(state["log_weight"]) != len(self.log_weight):
            theirs, ours = len(state["log_weight"]), len(self.log_weight)
            raise ValueError(f"the state is of {theirs} households, the problem has {ours}")
        self.epoch, self._integral = int(state["epoch"]), float(state["integral"])
        self.last_loss = float(state["last_loss"])
        for name in ("log_weight", "log_alpha"):
            getattr(self, name).copy_(state[name])
        self._moments.copy_(state["moments"])
        self._seed = int(state["seed"])
        # The arrangement too, so that sums round as they would have done.
        often = state["often"]
        self._store_apart(None if often is None else often.to(self.log_weight.device))


class _OftenOpen:
    """The products of a matrix, with some households stored apart; the others are read where they are.

    Args:
        matrix: All households.
        often: Indices of those to store apart, ascending.
    """

    def __init__(self, matrix: HouseholdMatrix, often: Int[Tensor, "often"]) -> None:
        self._matrix, self._part, self._often = matrix, matrix.take(often), often

    def totals(self, weights: Float[Tensor, "households"]) -> Float[Tensor, "targets"]:
        """See ``HouseholdMatrix``."""
        rest = self._matrix.totals(weights.index_fill(0, self._often, 0.0))
        return rest.add_(self._part.totals(weights[self._often]))

    def gradient(
        self, by_totals: Float[Tensor, "targets"], where: Float[Tensor, "households"] | None = None
    ) -> Float[Tensor, "households"]:
        """See ``HouseholdMatrix``."""
        assert where is not None
        gradient = self._matrix.gradient(by_totals, where.index_fill(0, self._often, 0.0))
        gradient[self._often] = self._part.gradient(by_totals, where[self._often])
        return gradient
