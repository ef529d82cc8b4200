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

from sparsereg.calibration.solver.gate_steps import CompiledSteps, GateSteps, Pace, Shape, TorchSteps
from sparsereg.calibration.solver.losses import TargetLoss
from sparsereg.calibration.solver.matrix import HouseholdMatrix
from sparsereg.distributions import GAMMA, ZETA, gate_median, p_active
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
        steps = CompiledSteps if matrix.is_compiled else TorchSteps
        self._steps: GateSteps = steps(self.log_weight)
        self._often: Tensor | None = None
        self._products: HouseholdMatrix | None = None

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
        return self._steps.expected(self.log_alpha, self._shape)

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
        s = self.settings
        levels = self.matrix.noise(self._seed, self.epoch) if s.use_gates else None
        weights = self._steps.draw(self.log_weight, self.log_alpha, levels, self._shape)
        value, by_totals = self.loss.value_and_gradient(self.products.totals(weights))
        self.last_loss = float(value)
        gradient = self.products.gradient(by_totals, weights if s.use_gates else None)
        pace = Pace(self.epoch + 1, s.lr, s.lambda_l2, self._price() if s.use_gates else 0.0)
        shape = self._shape if s.use_gates else None
        self._steps.move(gradient, self.log_weight, self.log_alpha, self._moments, shape, pace)

    @property
    def _shape(self) -> Shape:
        return Shape(self.temperature, self.settings.gamma, self.settings.zeta)

    def _price(self) -> float:
        """lambda_l0 of this epoch, steered if a number is wanted."""
        if self.settings.num_open is None:
            return self.settings.lambda_l0
        return self._steer(self.expected_kept())

    def _tidy(self) -> None:
        """Forget moments too small to matter, and store together the households that are often open.

        Numbers near the smallest float are slow, and reading every tenth household from main memory costs
        nearly as much as reading all of them.
        """
        self._moments[self._moments.abs() < 1e-30] = 0.0
        if self.settings.use_gates:
            p = p_active(self.log_alpha, self.temperature, self.settings.gamma, self.settings.zeta)
            often = torch.nonzero(p > _OFTEN).flatten()
            self._arrange(often if len(often) < 0.5 * len(p) else None)

    @property
    def products(self) -> HouseholdMatrix:
        """The matrix, arranged for those that are often open."""
        if self._products is None:
            self._products = self.matrix.arranged(self._often)
        return self._products

    def _arrange(self, often: Int[Tensor, "often"] | None) -> None:
        """Keep the entries of these households together; None: of all."""
        before = self._often
        is_same = often is before if often is None or before is None else torch.equal(often, before)
        if not is_same:
            self._often, self._products = often, None

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
        self._arrange(None if often is None else often.to(self.log_weight.device))
