"""Sparsity on demand: a constrained problem solved while training, instead of a choice of lambda.

Minimise the task loss subject to E[cost] <= target, where E[cost] is the expected number of parameters
(or MACs) of the compacted network, see ``sparsereg.compression.expected``. The Lagrangian is

    loss + multiplier * log(E[cost] / target(t))

with a target that falls geometrically from the whole network to the one asked for, and a
proportional-integral multiplier. A purely integral one overshoots: it has grown while the ramp fell, and
goes on closing gates after the constraint holds. Here the integral starts again from zero then.
"""

import logging
import math
from dataclasses import MISSING, dataclass
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from torch import Tensor

from sparsereg.compression import Accountant
from sparsereg.compression.budget import meet_
from sparsereg.settings import NOT_NEGATIVE, POSITIVE, setting, within
from sparsereg.training.averaging import WeightAverage
from sparsereg.training.config import Target, Training
from sparsereg.training.constraint import Constraint, TakesConstraint

log = logging.getLogger(__name__)

COSTS = ("parameters", "macs")
"""What a target can be about."""


def asked_for(cfg: Training) -> tuple[str, float] | None:
    """Return the cost that a configuration's target is about and the share that may stay; None without."""
    if cfg.target_sparsity is not None:
        return "parameters", 1 - cfg.target_sparsity
    return None if cfg.target_macs is None else ("macs", cfg.target_macs)


@dataclass(frozen=True, kw_only=True)
class TargetSettings(Target):
    """What is asked for, and how fast, in the epochs that a run has."""

    cost: str = setting(MISSING, "parameters or macs", choices=COSTS)
    kept: float = setting(MISSING, "share of the cost that may stay", within("(0, 1)", "a share"))
    start_epoch: float = setting(MISSING, "no constraint before this epoch", NOT_NEGATIVE)
    ramp_epochs: float = setting(MISSING, "epochs over which the target falls to kept", POSITIVE)

    @property
    def end_epoch(self) -> float:
        """The epoch from which the target asked for is in force."""
        return self.start_epoch + self.ramp_epochs

    def share_at(self, epoch: float) -> float:
        """Share of the cost that is allowed at an epoch, which may be a fraction."""
        progress = min(max((epoch - self.start_epoch) / self.ramp_epochs, 0.0), 1.0)
        return math.pow(self.kept, progress)


class Multiplier:
    """Proportional-integral multiplier >= 0 of an inequality constraint g <= 0.

    Args:
        proportional_gain: multiplier for each unit of g.
        integral_gain: gain for each unit of g and step.
    """

    def __init__(self, proportional_gain: float, integral_gain: float) -> None:
        self.proportional_gain = proportional_gain
        self.integral_gain = integral_gain
        self.integral = 0.0

    def update(self, violation: float, steps: int = 1) -> float:
        """Take note of g, which holds for so many steps, and return the multiplier."""
        if violation <= 0:
            self.integral = 0.0
        else:
            self.integral += self.integral_gain * violation * steps
        return max(0.0, self.integral + self.proportional_gain * violation)


class SparsityTarget(Callback):
    """Train under a target on the expected cost; meet it on the exact count at the end.

    Works in any LightningModule whose network has gates. One that takes a constraint adds its penalty to the
    loss (`sparsereg.training.constraint.TakesConstraint`); in any other one the penalty's gradient,
    which is known, is added to that of the gates before each step of the optimizer.

    At the last epoch, before it is measured and saved, the few gates nearest to the boundary are opened
    or shut so that the compacted network costs as much as it may, and no more.

    Args:
        accountant: counts the network.
        settings: the target.
        average: holds the averaged weights that are measured and saved, if there are any.
    """

    def __init__(
        self, accountant: Accountant, settings: TargetSettings, average: WeightAverage | None = None
    ) -> None:
        self.accountant = accountant
        self.settings = settings
        self.average = average
        self.multiplier = Multiplier(settings.proportional_gain, settings.integral_gain)
        self.constraint: Constraint | None = None
        self.found: float | None = None
        """The multiplier of the last step that looked at the cost."""
        self._met = False

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A new epoch has not been brought to the exact count yet."""
        self._met = False

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Measure the expected cost and hand the constraint to the loss."""
        s = self.settings
        if batch_idx % s.every_n_steps:
            return
        epoch = trainer.current_epoch + batch_idx / trainer.num_training_batches
        if epoch < s.start_epoch:
            return
        expected, full = self._costs()
        locations = [gate.log_alpha for gate in self.accountant.gates]
        gradients = torch.autograd.grad(expected.log(), locations, allow_unused=True)
        allowed = s.share_at(epoch)
        share = float(expected.detach()) / full
        violation = math.log(share / allowed)
        multiplier = self.found = self.multiplier.update(violation, s.every_n_steps)
        self.constraint = Constraint(
            multiplier,
            violation,
            [(a, g) for a, g in zip(locations, gradients, strict=True) if g is not None],
            {"lambda_target": multiplier, "target_kept": allowed, "expected_kept": share},
        )
        if isinstance(pl_module, TakesConstraint):
            pl_module.constraint = self.constraint

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Where the module's loss knows of no constraint, add its gradient to that of the loss."""
        if self.constraint is None or isinstance(pl_module, TakesConstraint):
            return
        self.constraint.add_gradient_()
        pl_module.log_dict(self.constraint.scalars)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """At the last epoch meet the target exactly; averaged weights are in place already."""
        if self._is_last(trainer) and not self._met:
            self._meet()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The same where there was no validation."""
        if not self._is_last(trainer) or self._met:
            return
        if self.average is None:
            self._meet()
        else:
            with self.average.in_place(pl_module):
                self._meet()

    def state_dict(self) -> dict[str, Any]:
        """The integral and the multiplier, so that a resumed run goes on."""
        return {"integral": self.multiplier.integral, "multiplier": self.found}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the integral of the run that is resumed."""
        self.multiplier.integral = state_dict["integral"]
        self.found = state_dict["multiplier"]

    def _is_last(self, trainer: pl.Trainer) -> bool:
        last = trainer.current_epoch + 1 == trainer.max_epochs and trainer.state.stage != "sanity_check"
        return last and trainer.current_epoch + 1 >= self.settings.end_epoch

    def _costs(self) -> tuple[Tensor, int]:
        if self.settings.cost == "parameters":
            return self.accountant.expected_parameters(), self.accountant.parameters
        return self.accountant.expected_macs(), self.accountant.macs

    def _meet(self) -> None:
        s = self.settings
        with torch.no_grad():
            expected, full = self._costs()
        share = float(expected) / full
        if share > UNDECIDED * s.kept:
            log.warning(
                "the gates have not come near the target: %.1f %% of the %s are expected to stay, %.1f %% "
                "may; the rest is cut off now, which costs accuracy. Train longer, or raise "
                "optimizer.gate_lr_ratio",
                100 * share,
                s.cost,
                100 * s.kept,
            )
        meet_(self.accountant, s.cost, s.kept)
        self._met = True


UNDECIDED = 1.1
"""Expected over allowed cost at the end, from which on meeting the target is worth a warning."""
