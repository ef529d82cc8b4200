"""Sparsity on demand: a constrained problem solved while training, instead of a choice of lambda.

The problem and its multiplier are those of ``sparsereg.compression.budget``; here they meet Lightning.
"""

from dataclasses import MISSING, dataclass
from typing import Any, Protocol, runtime_checkable

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback

from sparsereg.compression import Accountant
from sparsereg.compression.budget import COSTS, Budget, Constraint, check_reachable
from sparsereg.compression.timing.measured import MeasuredBudget, Megabytes, latency_budget
from sparsereg.settings import NOT_NEGATIVE, POSITIVE, setting, within
from sparsereg.target_settings import Target, goal
from sparsereg.training.averaging import WeightAverage
from sparsereg.training.config import MEASURED, Training


def asked_for(cfg: Training) -> tuple[str, float] | None:
    """Return the cost that a configuration's target is about and the share that may stay; None without."""
    if cfg.target_key is None or cfg.target_key in MEASURED:
        return None
    return goal(cfg.target_sparsity, cfg.target_macs)


def measured_budget(cfg: Training, accountant: Accountant, example_input: Any) -> MeasuredBudget | None:
    """Return the budget in milliseconds or megabytes that is asked for; None without.

    Args:
        cfg: the configuration.
        accountant: counts the network.
        example_input: one example as it takes it, on the CPU.

    Raises:
        InputError: the runtime is not installed, or the network cannot be that small, or already is.
    """
    gains = cfg.gains
    if cfg.target_latency_ms is not None:
        timing: dict[str, Any] = {"runtime": cfg.runtime, "threads": cfg.threads, "batch": cfg.batch}
        timing["shares"] = cfg.target.parts
        return latency_budget(accountant, example_input, cfg.target_latency_ms, *gains, **timing)
    if cfg.target_memory_mb is not None:
        cost = Megabytes(accountant, example_input, cfg.batch)
        parts = cfg.target.parts
        return MeasuredBudget(accountant, cost, cfg.target_memory_mb, example_input, *gains, parts)
    return None


@runtime_checkable
class TakesConstraint(Protocol):
    """A LightningModule that adds ``self.constraint.penalty()`` to its loss, where there is a constraint."""

    constraint: Constraint | None


@dataclass(frozen=True, kw_only=True)
class TargetSettings(Target):
    """What is asked for, and how fast, in the epochs that a run has."""

    cost: str | None = setting(
        MISSING, "what is to fall; None where only parts have targets", choices=(*COSTS, *MEASURED)
    )
    kept: float | None = setting(
        MISSING, "share of the cost that may stay; None likewise", within("(0, 1)", "a share")
    )
    start_epoch: float = setting(MISSING, "no constraint before this epoch", NOT_NEGATIVE)
    ramp_epochs: float = setting(MISSING, "epochs over which the target falls to kept", POSITIVE)

    @property
    def end_epoch(self) -> float:
        """The epoch from which the target asked for is in force."""
        return self.start_epoch + self.ramp_epochs

    def progress_at(self, epoch: float) -> float:
        """How far the target has fallen at an epoch, which may be a fraction: 0 not at all, 1 altogether."""
        return (epoch - self.start_epoch) / self.ramp_epochs


class SparsityTarget(Callback):
    """Train under a target on the expected cost; meet it on the exact count at the end.

    Works in any LightningModule whose network has gates. One that takes a constraint adds its penalty to the
    loss (`TakesConstraint`); in any other one the gradient of the penalty,
    which is known, is added to that of the gates before each step of the optimizer.

    At the last epoch, before it is measured and saved, the few gates nearest to the boundary are opened
    or shut so that the compacted network costs as much as it may, and no more.

    Args:
        accountant: counts the network.
        settings: the target.
        average: holds the averaged weights that are measured and saved, if there are any.
        budget: of a cost that is measured; one of ``COSTS`` if None.
    """

    def __init__(
        self,
        accountant: Accountant,
        settings: TargetSettings,
        average: WeightAverage | None = None,
        budget: Budget | None = None,
    ) -> None:
        self.settings = settings
        self.average = average
        gains = settings.proportional_gain, settings.integral_gain
        kept = 1.0 if settings.kept is None else settings.kept
        if budget is None and settings.cost is not None:
            check_reachable(accountant, settings.cost, kept)
        self.budget = budget or Budget(accountant, settings.cost, kept, *gains, settings.parts)
        self.budget.round_to = settings.round_to
        self.found: float | None = None
        """The multiplier of the last step that looked at the cost."""

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A new epoch has not been brought to the exact count yet."""
        self.budget.met = False

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
        constraint = self.budget.measure(s.progress_at(epoch), s.every_n_steps)
        self.found = constraint.multiplier
        if isinstance(pl_module, TakesConstraint):
            pl_module.constraint = constraint

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Where the module's loss knows of no constraint, add its gradient to that of the loss."""
        constraint = self.budget.constraint
        if constraint is None or isinstance(pl_module, TakesConstraint):
            return
        if constraint.add_gradient_(optimizer):
            pl_module.log_dict(constraint.scalars)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """At the last epoch meet the target exactly; averaged weights are in place already."""
        if self._is_last(trainer) and not self.budget.met:
            self.budget.meet()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The same where there was no validation."""
        if not self._is_last(trainer) or self.budget.met:
            return
        if self.average is None:
            self.budget.meet()
        else:
            with self.average.in_place(pl_module):
                self.budget.meet()

    def state_dict(self) -> dict[str, Any]:
        """The integrals and the multiplier, so that a resumed run goes on."""
        return {**self.budget.integrals(), "multiplier": self.found}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the integral of the run that is resumed."""
        self.budget.load_integrals(state_dict)
        self.found = state_dict["multiplier"]

    def _is_last(self, trainer: pl.Trainer) -> bool:
        last = trainer.current_epoch + 1 == trainer.max_epochs and trainer.state.stage != "sanity_check"
        return last and trainer.current_epoch + 1 >= self.settings.end_epoch
