"""Sparsity on demand: a constrained problem solved while training, instead of a choice of lambda.

Minimise the task loss subject to E[cost] <= target, where E[cost] is the expected number of parameters
(or MACs) of the compacted network, see ``sparsereg.compression.expected``. The Lagrangian is

    loss + multiplier * log(E[cost] / target(t))

with a target that falls geometrically from the whole network to the one asked for, and a
proportional-integral multiplier. A purely integral one overshoots: it has grown while the ramp fell, and
goes on closing gates after the constraint holds. Here the integral starts again from zero then.
"""

import bisect
import itertools
import logging
import math
from dataclasses import MISSING, dataclass
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from torch import Tensor

from sparsereg.compression import Accountant
from sparsereg.distributions import log_alpha_at, shift
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
TRIES, ENOUGH = 100, 0.999
"""Gates below the common level that may be tried one by one, and the share of the target that ends it."""
MARGIN = 1e-3
"""How far from P(z > 0) = 1/2 a gate is put that is opened or shut, in units of P(z > 0)."""


@torch.no_grad()
def meet_(accountant: Accountant, cost: str, kept: float) -> float:
    """Open or shut the gates nearest to the boundary until the exact cost is as large as is allowed.

    A gate that is opened lets next to nothing through, one that is shut did so before: the output hardly
    changes. All gates are ranked by P(z > 0), and those above one common level end up open. A channel can
    cost more than what is left below the target then; the next gates in the order that cost less are opened
    instead. Ranked are the log odds of P(z > 0), since P itself rounds to 0 or 1.

    Args:
        accountant: of the network, whose gates are changed in place.
        cost: parameters or macs.
        kept: share of it that may stay, in (0, 1).

    Returns:
        The share that stays; above ``kept`` only if a network with a single open gate costs more.
    """
    gates = accountant.gates
    shapes = [(g.temperature, g.gamma, g.zeta) for g in gates]
    odds = [g.log_alpha.double() - shift(*shape) for g, shape in zip(gates, shapes, strict=True)]
    opened = [
        g.log_alpha.clamp(min=log_alpha_at(0.5 + MARGIN, *shape))
        for g, shape in zip(gates, shapes, strict=True)
    ]
    shut = [
        g.log_alpha.clamp(max=log_alpha_at(0.5 - MARGIN, *shape))
        for g, shape in zip(gates, shapes, strict=True)
    ]
    ranked = torch.cat([o.flatten() for o in odds])
    levels = sorted(set(ranked.tolist()))

    def share(num_shut: int) -> float:
        """Put a level between the gates and return what stays."""
        level = levels[num_shut - 1] if num_shut else -math.inf
        for i, gate in enumerate(gates):
            gate.log_alpha.copy_(torch.where(odds[i] > level, opened[i], shut[i]))
        return exact_share(accountant, cost)

    # More shut levels never cost more: the first number of them that is cheap enough.
    num_shut = bisect.bisect_left(range(len(levels)), True, key=lambda n: share(n) <= kept)
    num_shut = min(num_shut, len(levels) - 1)
    reached = share(num_shut)
    if num_shut == 0:
        return reached
    next_below = ranked.where(ranked <= levels[num_shut - 1], -math.inf).topk(min(TRIES, len(ranked)))
    candidates = next_below.indices[next_below.values > -math.inf].tolist()
    return _fill_(accountant, cost, kept, reached, candidates, opened)


def _fill_(
    accountant: Accountant,
    cost: str,
    kept: float,
    reached: float,
    candidates: list[int],
    opened: list[Tensor],
) -> float:
    """Open single gates, in this order, that fit between the share that is reached and the one allowed.

    Args:
        accountant: of the network, whose gates are changed in place.
        cost: parameters or macs.
        kept: share of it that may stay.
        reached: share of it that stays now.
        candidates: positions of shut gates in all gates' log_alpha, end to end.
        opened: each gate's log_alpha when it is open, of its shape.

    Returns:
        The share that stays then.
    """
    gates = accountant.gates
    starts = list(itertools.accumulate((g.log_alpha.numel() for g in gates), initial=0))
    for candidate in candidates:
        if reached >= ENOUGH * kept:
            break
        i = bisect.bisect_right(starts, candidate) - 1
        position = candidate - starts[i]
        log_alpha = gates[i].log_alpha.view(-1)
        before = log_alpha[position].clone()
        log_alpha[position] = opened[i].view(-1)[position]
        larger = exact_share(accountant, cost)
        if reached < larger <= kept:
            reached = larger
        else:
            log_alpha[position] = before
    return reached


def exact_share(accountant: Accountant, cost: str) -> float:
    """Return the share of the parameters or MACs that compaction leaves, with the gates as they are."""
    if cost == "parameters":
        return 1.0 - accountant.exact_sparsity()
    return accountant.count().compacted_macs / accountant.macs
