"""The LightningModule: a gated (or plain) classifier and its loss."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy

import sparsereg
from sparsereg.distributions import draw_together
from sparsereg.model.basic_l0_blocks import L0Gate
from sparsereg.model.synchronised import several_processes
from sparsereg.penalties import expected_l0, expected_l2, hard_concretes, l_c0
from sparsereg.training.config import Optimizer
from sparsereg.training.constraint import Constraint
from sparsereg.training.distillation import Distillation
from sparsereg.training.lightning import logs_now, show_learning_rates_, steps_per_epoch
from sparsereg.training.optimizers import build_optimizer, learning_rate


@dataclass(frozen=True)
class Provenance:
    """What a checkpoint must know to be tested or resumed without the command that made it.

    Attributes:
        config: the resolved configuration, plain dicts and numbers.
        num_classes: classes of the data.
        image_shape: (channels, height, width) of the images.
        gated: whether the network has gates.
        structure: of a compacted network, which no configuration describes, see
            ``sparsereg.compression.storage.describe``; None for others.
        before: while a compacted network is fine-tuned, configuration and results of the run's stage under
            gates; else None.
        data: description of the images, see ``sparsereg.data.ImageDataModule.describe``.
    """

    config: dict[str, Any]
    num_classes: int
    image_shape: tuple[int, ...]
    gated: bool
    structure: str | None = None
    before: dict[str, Any] | None = None
    data: dict[str, Any] = field(default_factory=dict)


class Classifier(pl.LightningModule):
    """Minimises cross-entropy + lambda_l0 * L_C0, where L_C0 is the mean of P(z > 0) over all gates.

    Where a constraint is set (see ``sparsereg.training.target``), its penalty takes the place of
    lambda_l0's.

    Args:
        net: images (batch, channels, height, width) to logits (batch, num_classes).
        num_classes: number of classes.
        lambda_l0: weight of the penalty, >= 0.
        lambda_l2: weight of half the expected squared norm of the weights under their gates, >= 0: the
            L2 norm inside the L0 penalty of the paper, see ``sparsereg.penalties.expected_l2``.
        optimizer: optimizer and schedule.
        provenance: stored in checkpoints.
        compiled: whether ``net`` is compiled.
        penalty: ``gates`` or, as in the paper, ``weights``: lambda_l0 is then the price of
            ``sparsereg.penalties.expected_l0`` instead of L_C0.
        distillation: a teacher; None trains on the labels alone.
        label_smoothing: share of each label that is spread over all classes, in [0, 1).
        steady_gates: the gates keep their learning rate when that of the weights falls, so that a
            constraint can still move them.
    """

    def __init__(
        self,
        net: nn.Module,
        num_classes: int,
        lambda_l0: float,
        optimizer: Optimizer,
        provenance: Provenance,
        lambda_l2: float = 0.0,
        compiled: bool = False,
        penalty: str = "gates",
        distillation: Distillation | None = None,
        label_smoothing: float = 0.0,
        steady_gates: bool = False,
    ) -> None:
        super().__init__()
        self.net = net
        self.penalty = penalty
        self.distillation = distillation
        self.label_smoothing = label_smoothing
        self.steady_gates = steady_gates
        self.constraint: Constraint | None = None
        self.lambda_l0 = lambda_l0
        self.lambda_l2 = lambda_l2
        self.penalty_scale = 1.0
        self.optimizer_settings = optimizer
        self.provenance = provenance
        self.batch_norm_is_current = False
        """Whether the BatchNorm statistics were estimated for exactly these weights and gates."""
        self._scheduled_steps = 1.0
        self._resumed_steps_per_epoch: float | None = None
        self._gates = tuple(hard_concretes(net).values())
        # Small vectors of gates; a compiled network fuses its own draws, and weight gates are large.
        self._vectors = tuple(
            m.gates for m in net.modules() if isinstance(m, L0Gate) and m.sampling == "batch" and not compiled
        )
        accuracy = MulticlassAccuracy(num_classes, average="micro", validate_args=False)
        self.train_acc = accuracy
        self.val_acc = accuracy.clone()
        self.test_acc = accuracy.clone()

    @property
    def gated(self) -> bool:
        """Whether the network has gates."""
        return bool(self._gates)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits."""
        logits: Tensor = self.net(images)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the loss of a batch; log its parts every ``trainer.log_every_n_steps`` steps."""
        images, labels = batch
        self.batch_norm_is_current = False
        draw_together(self._vectors)
        logits = self.net(images)
        acc_loss = self._task_loss(images, logits, labels)
        scalars: dict[str, Tensor | float] = {"acc_loss": acc_loss.detach()}
        loss = acc_loss
        if self._gates:
            loss = acc_loss + self._gate_penalty(scalars)
        if self.lambda_l2:
            norm = expected_l2(self.net)
            loss = loss + self.lambda_l2 / 2 * norm
            scalars["expected_l2"] = norm.detach()
        self.train_acc.update(logits.detach(), labels)
        # Every self.log call costs about half a millisecond, whether or not anything is written.
        if logs_now(self.trainer):
            scalars["train_loss"] = loss.detach()
            self.log_dict(scalars, prog_bar=True, sync_dist=several_processes())
        return loss * _share(labels)

    def _task_loss(self, images: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=self.label_smoothing)
        return loss if self.distillation is None else self.distillation.mixed(loss, images, logits)

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
        """Log the accuracy on the training images as they were seen (augmented, under sampled gates)."""
        self.log("train_acc", self.train_acc.compute(), prog_bar=True, sync_dist=several_processes())
        self.train_acc.reset()

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Count what is right among a batch of validation images."""
        self._evaluate("val", self.val_acc, batch)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Count what is right among a batch of test images."""
        self._evaluate("test", self.test_acc, batch)

    def _evaluate(self, stage: str, accuracy: Metric, batch: tuple[Tensor, Tensor]) -> None:
        images, labels = batch
        logits = self.net(images)
        accuracy.update(logits, labels)
        loss = F.cross_entropy(logits.float(), labels)
        self.log(f"{stage}_loss", loss, on_epoch=True, batch_size=len(labels), sync_dist=several_processes())
        self.log(f"{stage}_acc", accuracy, on_step=False, on_epoch=True, prog_bar=True)

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
        p = self.provenance
        checkpoint["sparsereg"] = {
            "version": sparsereg.__version__,
            "config": p.config,
            "num_classes": p.num_classes,
            "image_shape": list(p.image_shape),
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


def _share(labels: Tensor) -> Tensor | float:
    """Weight of this process's mean loss, so that the mean over processes is the mean over examples."""
    if not several_processes():
        return 1.0
    total = torch.tensor(float(len(labels)), device=labels.device)
    torch.distributed.all_reduce(total)
    return len(labels) * torch.distributed.get_world_size() / total
