"""A LightningModule around a calibration: Trainer, checkpoints, loggers, callbacks, processes.

The solver takes its own steps, many for each training step of Lightning, so that the framework's cost does
not show. In a group of processes each one holds some of the targets (``matrix.ShardedMatrix``).

    module = CalibrationModule(problem, num_households=2000)
    pl.Trainer(max_epochs=-1, enable_model_summary=False).fit(module)
    result = module.result()
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from sparsereg.calibration.config import Settings
from sparsereg.calibration.problem import CalibrationProblem
from sparsereg.calibration.solver.calibration import Calibration, CalibrationResult


class CalibrationModule(pl.LightningModule):
    """Calibrates until it is done and then stops the Trainer. Logs loss, mean_are and kept.

    Args:
        problem: What is to be calibrated. It is not part of checkpoints.
        num_households: How many to keep; None: the method decides.
        steps: Steps of the solver (ten epochs of gates, or one stage of pruning) per training step, >= 1.
        settings: As for ``calibrate``. ``device`` comes from the Trainer.

    Raises:
        ValueError: A setting is wrong or does not fit the problem.
    """

    def __init__(
        self,
        problem: CalibrationProblem,
        num_households: int | None = None,
        *,
        steps: int = 10,
        settings: Settings | None = None,
    ) -> None:
        super().__init__()
        if steps < 1:
            raise ValueError(f"steps must be an integer >= 1, got {steps!r}")
        self.problem, self.num_households, self.steps = problem, num_households, steps
        self.settings = settings or Settings()
        self.automatic_optimization = False
        # Lightning counts the steps of an optimizer: this one has nothing to move.
        self.clock = nn.Parameter(torch.zeros(()))
        self._calibration: Calibration | None = None
        self._state: dict[str, Any] | None = None

    @property
    def calibration(self) -> Calibration:
        """The calibration under way, made on first use, on the device and in the processes of the Trainer."""
        if self._calibration is None:
            values = {**vars(self.settings), "device": str(self.device)}
            self._calibration = Calibration(self.problem, self.num_households, Settings(**values))
            if self._state is not None:
                self._calibration.load_state_dict(self._state)
        return self._calibration

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        """Let the solver take its steps, then log and count one step."""
        optimizer = self.optimizers()
        assert not isinstance(optimizer, list)
        for _ in range(self.steps):
            if not self.calibration.done:
                self.calibration.step()
        row = self.calibration.report()
        self.log_dict(
            {"loss": row["loss"], "mean_are": row["mean_are"], "kept": float(row["kept"])}, batch_size=1
        )
        optimizer.step()
        if self.calibration.done:
            self.trainer.should_stop = True

    def train_dataloader(self) -> DataLoader[int]:
        """Numbers until the calibration is done."""
        return DataLoader(_UntilDone(self), batch_size=None)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """An optimizer that moves nothing, for Lightning to count."""
        return torch.optim.SGD([self.clock], lr=0.0)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Put the state of the solver, its optimiser's moments included, into the checkpoint."""
        checkpoint["calibration"] = self.calibration.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on from there."""
        self._state, self._calibration = checkpoint["calibration"], None

    def result(self) -> CalibrationResult:
        """The final weights; call it in every process of a group."""
        return self.calibration.result()


class _UntilDone(IterableDataset[int]):
    def __init__(self, module: CalibrationModule) -> None:
        self._module = module

    def __iter__(self) -> Iterator[int]:
        number = 0
        while not self._module.calibration.done:
            yield number
            number += 1
