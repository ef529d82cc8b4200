"""The stages of a run: training, and fine-tuning of what the gates have left.

The second is what ``train.py ckpt_path=.../compacted.pt without_using_gate=true`` would do: the gates are
folded into the weights, closed channels leave, and the small network is trained on. It lives in the folder
``finetune`` of the run, with checkpoints and TensorBoard events of its own.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.loggers import TensorBoardLogger
from torch import nn

from sparsereg.compression import Accountant, compact, storage
from sparsereg.config import plain
from sparsereg.data import ImageDataModule
from sparsereg.training import build
from sparsereg.training import callbacks as ours
from sparsereg.training.checkpoint import COMPACTED, Checkpoint
from sparsereg.training.distillation import Distillation
from sparsereg.training.module import Classifier
from sparsereg.training.results import metric


@dataclass
class Stage:
    """A network, its data and what trains it.

    Attributes:
        cfg: the configuration of this stage.
        data: the images.
        net: the network.
        accountant: counts it.
        module: trains it.
        trainer: drives that.
        timer: takes the time of the epochs.
        logger: writes TensorBoard events, or False.
        folder: for everything that the stage writes.
        teacher: for distillation.
    """

    cfg: DictConfig
    data: ImageDataModule
    net: nn.Module
    accountant: Accountant
    module: Classifier
    trainer: pl.Trainer
    timer: ours.EpochTimer
    logger: TensorBoardLogger | Any
    folder: Path
    teacher: Distillation | None

    def fit(self) -> None:
        """Train, from the start or from where the checkpoint that is resumed stopped."""
        path = self.cfg.ckpt_path if self.cfg.resume_training else None
        self.trainer.fit(self.module, datamodule=self.data, ckpt_path=path)

    def test(self) -> dict[str, Any]:
        """Test the checkpoint that ``test_checkpoint`` names; return accuracies and where it is."""
        val_acc, tested = build.tested_checkpoint(self.cfg, self.trainer, self.folder)
        self.trainer.test(self.module, datamodule=self.data, ckpt_path=tested, verbose=False)
        return {"val_acc": val_acc, "test_acc": metric(self.trainer, "test_acc"), "checkpoint": tested}


def first(
    cfg: DictConfig, data: ImageDataModule, checkpoint: Checkpoint | None, overrides: list[str], outputs: Path
) -> Stage:
    """Build the network and everything around it, and make the folder of the run.

    Args:
        cfg: the checked configuration.
        data: loaded images.
        checkpoint: to start from or to resume.
        overrides: the user's.
        outputs: below which the folder is made.

    Raises:
        InputError: something of it cannot be built.
    """
    net = build.build_network(cfg, data, checkpoint)
    if checkpoint is not None and not cfg.resume_training:
        build.start_weights(net, checkpoint, cfg, overrides)
    structure = None if checkpoint is None else checkpoint.structure
    teacher = build.build_teacher(cfg, data)
    stage = _assemble(cfg, data, net, structure, teacher, lambda: build.claim_run_folder(outputs))
    stage.module.batch_norm_is_current = build.statistics_fit(cfg, net, checkpoint)
    return stage


def finetuning(before: Stage) -> Stage:
    """Compact the network of a finished stage and build what trains it further.

    Args:
        before: under gates, with the tested weights in place.
    """
    device = before.module.device
    gated = before.net.cpu().eval()
    net = compact(gated, build.example_input(before.data, gated)).to(device)
    cfg = finetuning_config(before.cfg)
    structure, teacher = storage.describe(net), before.teacher
    stage = _assemble(cfg, before.data, net.train(), structure, teacher, lambda: before.folder / "finetune")
    stage.module.batch_norm_is_current = before.module.batch_norm_is_current
    return stage


def finetuning_config(cfg: DictConfig) -> DictConfig:
    """Return the configuration of the second stage: that of a plain run on a compacted network."""
    base = cfg.copy()
    OmegaConf.set_struct(base, False)
    base.model = {"name": COMPACTED}
    epochs = cfg.finetune.epochs
    second = OmegaConf.merge(
        base,
        {
            "ckpt_path": None,
            "resume_training": False,
            "without_using_gate": True,
            "target_sparsity": None,
            "target_macs": None,
            "lambda_l0": cfg.lambda_l0 or 0.0,
            "lambda_l2": 0.0,
            "finetune": {"epochs": 0},
            "trainer": {"max_epochs": epochs},
            "optimizer": {
                "lr": cfg.finetune.lr,
                "schedule": "cosine",
                "schedule_epochs": epochs,
                "warmup_epochs": 0.0,
                "final_lr_ratio": 0.0,
            },
        },
    )
    assert isinstance(second, DictConfig)
    return second


def log_results(stage: Stage, results: dict[str, Any]) -> None:
    """Write settings and results into TensorBoard's HParams tab, once, at the end."""
    if isinstance(stage.logger, bool):
        return
    metrics = {k: results[k] for k in ("val_acc", "test_acc", "expected_sparsity", "exact_sparsity")}
    metrics = {f"final/{k}": v for k, v in metrics.items() if v is not None}
    stage.logger.log_hyperparams(build.hyperparameters(plain(stage.cfg)), metrics)
    stage.logger.finalize("success")


def _assemble(
    cfg: DictConfig,
    data: ImageDataModule,
    net: nn.Module,
    structure: str | None,
    teacher: Distillation | None,
    make_folder: Callable[[], Path],
) -> Stage:
    net = build.synchronise(cfg, net)
    accountant = Accountant(net, build.example_input(data, net))
    module = build.build_module(cfg, net, data, structure, teacher)
    folder = make_folder()  # last of what can fail, so that a wrong input leaves none
    logger = build.build_logger(cfg.logger.name, folder)
    num_batches = build.batches_per_epoch(cfg, data)
    callbacks, timer = build.build_callbacks(cfg, data, accountant, folder, logging_on=bool(logger))
    trainer = build.build_trainer(cfg, callbacks, logger, folder, num_batches, data.num_val == 0)
    return Stage(cfg, data, net, accountant, module, trainer, timer, logger, folder, teacher)
