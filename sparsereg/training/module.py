"""The LightningModule: a gated (or plain) network, its task and its loss."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torchmetrics import Metric

import sparsereg
from sparsereg.compression.budget import Constraint
from sparsereg.data.batches import call, num_examples, only
from sparsereg.data.form import Form, Inputs
from sparsereg.device import several_processes
from sparsereg.distributions import draw_together
from sparsereg.model.basic_l0_blocks import L0Gate
from sparsereg.penalties import expected_l0, expected_l2, hard_concretes, l_c0
from sparsereg.training.config import Optimizer
from sparsereg.training.distillation import Distillation
from sparsereg.training.lightning import logs_now, show_learning_rates_, steps_per_epoch
from sparsereg.training.optimizers import build_optimizer, learning_rate
from sparsereg.training.tasks.task import Task


@dataclass(frozen=True)
class RunNotes:
    """What a checkpoint must know to be tested or resumed without the command that made it.

    Attributes:
        config: the resolved configuration, plain dicts and numbers.
        form: what the network was built for.
        gated: whether the network has gates.
        structure: of a compacted network, which no configuration describes, see
            ``sparsereg.compression.storage.describe``; None for others.
        before: while a compacted network is fine-tuned, configuration and results of the run's stage under
            gates; else None.
        data: its description, see ``sparsereg.data.ImageDataModule.describe``.
    """

    config: dict[str, Any]
    form: Form
    gated: bool
    structure: str | None = None
    before: dict[str, Any] | None = None
    data: dict[str, Any] = field(default_factory=dict)


class Learner(pl.LightningModule):
    """Minimises the loss of a task + lambda_l0 * L_C0, where L_C0 is the mean of P(z > 0) over all gates.

    Where a constraint is set (see ``sparsereg.compression.budget``), its penalty takes the place of
    lambda_l0's.

    Args:
        net: what the task's batches hold to what its loss takes.
        task: what is learnt.
        lambda_l0: weight of the penalty, >= 0.
        lambda_l2: weight of half the expected squared norm of the weights under their gates, >= 0: the
            L2 norm inside the L0 penalty of the paper, see ``sparsereg.penalties.expected_l2``.
        optimizer: optimizer and schedule.
        notes: stored in checkpoints.
        compiled: whether ``net`` is compiled.
        penalty: ``gates`` or, as in the paper, ``weights``: lambda_l0 is then the price of
            ``sparsereg.penalties.expected_l0`` instead of L_C0.
        distillation: a teacher; None trains on the labels alone.
        label_smoothing: share of each label that is spread over all classes, in [0, 1); > 0 for tasks whose
            loss takes it.
        steady_gates: the gates keep their learning rate when that of the weights falls, so that a
            constraint can still move them.
    """

    def __init__(
        self,
        net: nn.Module,
        task: Task,
        lambda_l0: float,
        optimizer: Optimizer,
        notes: RunNotes,
        lambda_l2: float = 0.0,
        compiled: bool = False,
        penalty: str = "gates",
        distillation: Distillation | None = None,
        label_smoothing: float = 0.0,
        steady_gates: bool = False,
    ) -> None:
        super().__init__()
        self.net = net
        self.task = task
        self.penalty = penalty
        self.distillation = distillation
        self.label_smoothing = label_smoothing
        self.steady_gates = steady_gates
        self.constraint: Constraint | None = None
        self.lambda_l0 = lambda_l0
        self.lambda_l2 = lambda_l2
        self.penalty_scale = 1.0
        self.optimizer_settings = optimizer
        self.notes = notes
        self.batch_norm_is_current = False
        """Whether the BatchNorm statistics were estimated for exactly these weights and gates."""
        self._scheduled_steps = 1.0
        self._resumed_steps_per_epoch: float | None = None
        self._gates = tuple(hard_concretes(net).values())
        # Small vectors of gates; a compiled network fuses its own draws, and weight gates are large.
        self._vectors = tuple(
            m.gates for m in net.modules() if isinstance(m, L0Gate) and m.sampling == "batch" and not compiled
        )
        self._taken = notes.form.inputs
        self.train_metrics, self.val_metrics, self.test_metrics = (
            nn.ModuleDict(task.metrics()) for _ in range(3)
        )

    @property
    def gated(self) -> bool:
        """Whether the network has gates."""
        return bool(self._gates)

    def forward(self, *inputs: Any, **by_name: Any) -> Any:
        """Return what the network answers; inputs by name that it does not take are left out."""
        return self.net(*inputs, **only(by_name, self._taken))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss of a batch; log its parts every ``trainer.log_every_n_steps`` steps."""
        inputs, labels = self._split(batch)
        self.batch_norm_is_current = False
        draw_together(self._vectors)
        predictions, labels = self.task.predictions(call(self.net, inputs), labels)
        acc_loss = self._task_loss(inputs, predictions, labels)
        scalars: dict[str, Tensor | float] = {"acc_loss": acc_loss.detach()}
        loss = acc_loss
        if self._gates:
            loss = acc_loss + self._gate_penalty(scalars)
        if self.lambda_l2:
            norm = expected_l2(self.net)
            loss = loss + self.lambda_l2 / 2 * norm
            scalars["expected_l2"] = norm.detach()
        _update(self.train_metrics, predictions, labels)
        # Every self.log call costs about half a millisecond, whether or not anything is written.
        if logs_now(self.trainer):
            scalars["train_loss"] = loss.detach()
            self.log_dict(scalars, prog_bar=True, sync_dist=several_processes())
        return loss * _share(num_examples(inputs), self.device)

    def _split(self, batch: Any) -> tuple[Inputs, Any]:
        """Return what the network reads of a batch, and what it is to answer."""
        inputs, labels = self.task.split(batch)
        return only(inputs, self._taken), labels

    def _task_loss(self, inputs: Inputs, predictions: Any, labels: Any) -> Tensor:
        smoothing = {"label_smoothing": self.label_smoothing} if self.label_smoothing else {}
        loss = self.task.loss(predictions, labels, **smoothing)
        if self.distillation is None:
            return loss
        taught, _ = self.task.predictions(self.distillation.answer(inputs), labels)
        return self.distillation.mixed(loss, predictions, taught)

    def _gate_penalty(self, scalars: dict[str, Tensor | float]) -> Tensor | float:
        """Return what open gates cost, and note L_C0 and the state of a constraint."""
        mean_p_active = l_c0(self.net)
        scalars["L_C0"] = mean_p_active.detach()
        if self.constraint is not None:
            scalars |= self.constraint.scalars
            return self.constraint.penalty()
        price = mean_p_active if self.penalty == "gates" else expected_l0(self.net)
        return self.penalty_scale * self.lambda_l0 * price

    def on_train_epoch_end(self) -> None:
        """Log the figures on the training examples as they were seen (augmented, under sampled gates)."""
        for name, metric in self.train_metrics.items():
            assert isinstance(metric, Metric)
            self.log(f"train_{name}", metric.compute(), prog_bar=True, sync_dist=several_processes())
            metric.reset()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Measure on a batch of validation examples."""
        self._evaluate("val", self.val_metrics, batch)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Measure on a batch of test examples."""
        self._evaluate("test", self.test_metrics, batch)

    def _evaluate(self, stage: str, metrics: nn.ModuleDict, batch: Any) -> None:
        inputs, labels = self._split(batch)
        predictions, labels = self.task.predictions(call(self.net, inputs), labels)
        _update(metrics, predictions, labels)
        loss = self.task.loss(predictions, labels)
        size = num_examples(inputs)
        self.log(f"{stage}_loss", loss, on_epoch=True, batch_size=size, sync_dist=several_processes())
        for name, metric in metrics.items():
            assert isinstance(metric, Metric)
            self.log(f"{stage}_{name}", metric, on_step=False, on_epoch=True, prog_bar=True, batch_size=size)

    def configure_optimizers(self) -> Any:
        """Build the optimizer and step its schedule after every batch."""
        optimizer = build_optimizer(self.net, self.optimizer_settings)
        steps = self._scheduled_steps = max(steps_per_epoch(self.trainer), 1.0)
        factor = learning_rate(self.optimizer_settings, steps)

        def scheduled(step: int) -> float:
            return factor(step / steps)

        def steady(step: int) -> float:
            return 1.0

        factors: list[Callable[[int], float]] = [
            steady if self.steady_gates and group["name"] == "gates" else scheduled
            for group in optimizer.param_groups
        ]
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factors)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_start(self) -> None:
        """In a resumed run let the optimizer and its schedule have the settings of this command.

        Lightning has brought back those of the run with the optimizer's state; where nothing was changed
        they are the same. The place in the schedule is counted in steps: it is moved where epochs have more
        or fewer.
        """
        if self._resumed_steps_per_epoch is None:
            return
        optimizer, schedule = self.optimizers(use_pl_optimizer=False), self.lr_schedulers()
        assert isinstance(optimizer, torch.optim.Optimizer)
        assert isinstance(schedule, torch.optim.lr_scheduler.LambdaLR)
        if self._scheduled_steps != self._resumed_steps_per_epoch:
            schedule.last_epoch = round(self.trainer.current_epoch * self._scheduled_steps)
        groups, new = optimizer.param_groups, build_optimizer(self.net, self.optimizer_settings).param_groups
        for group, settings in zip(groups, new, strict=True):
            group.update({k: v for k, v in settings.items() if k != "params"}, initial_lr=settings["lr"])
        schedule.base_lrs = [group["lr"] for group in groups]
        for group, factor in zip(groups, schedule.lr_lambdas, strict=True):
            group["lr"] = group["lr"] * factor(schedule.last_epoch)
        show_learning_rates_(schedule, [group["lr"] for group in groups])

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what test.py needs."""
        p = self.notes
        checkpoint["sparsereg"] = {
            "version": sparsereg.__version__,
            "config": p.config,
            **p.form.described(),
            "gated": p.gated,
            "structure": p.structure,
            "before": p.before,
            "data": p.data,
            "steps_per_epoch": self._scheduled_steps,
            "batch_norm_is_current": self.batch_norm_is_current,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Remember whether the statistics in the checkpoint were estimated for its weights."""
        self.batch_norm_is_current = bool(checkpoint["sparsereg"]["batch_norm_is_current"])
        self._resumed_steps_per_epoch = checkpoint["sparsereg"].get("steps_per_epoch")


def _update(metrics: nn.ModuleDict, predictions: Any, labels: Any) -> None:
    found = predictions.detach() if isinstance(predictions, Tensor) else predictions
    for metric in metrics.values():
        assert isinstance(metric, Metric)
        metric.update(found, labels)


def _share(size: int, device: torch.device) -> Tensor | float:
    """Weight of this process's mean loss, so that the mean over processes is the mean over examples."""
    if not several_processes():
        return 1.0
    total = torch.tensor(float(size), device=device)
    torch.distributed.all_reduce(total)
    return size * torch.distributed.get_world_size() / total
