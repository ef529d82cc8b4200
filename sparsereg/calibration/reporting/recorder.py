"""Follow a calibration while it runs: history, moments for the log, TensorBoard, a progress bar."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from sparsereg.calibration.measures import relative_errors
from sparsereg.calibration.problem import CalibrationProblem
from sparsereg.calibration.reporting import progress_bar

TAGS = ("fit/loss", "errors/mean_are", "weights/kept")
"""What TensorBoard shows while a calibration runs: a group, and the name that results.json has."""


class Recorder:
    """Takes what the solver tells once per report; use it as a context manager.

    Args:
        problem: What is calibrated.
        folder: Where TensorBoard's events go; None: no events.
        moments: About how many sets of totals to keep for the log.
        history: What a run that is continued has told before.
        totals: Its totals.
        bar: Show a progress bar, where stdout is a terminal.
    """

    def __init__(
        self,
        problem: CalibrationProblem,
        folder: Path | None,
        moments: int,
        history: Sequence[dict[str, float]] = (),
        totals: Sequence[tuple[int, float, np.ndarray]] = (),
        bar: bool = True,
    ):
        self.problem, self.moments = problem, moments
        self.history = [dict(row) for row in history]
        self.totals = list(totals)
        self._folder, self._show = folder, bar
        self._bar: Any = None
        self._writer: Any = None

    def __enter__(self) -> Recorder:
        if self._folder is not None:
            from torch.utils.tensorboard.writer import SummaryWriter

            self._writer = SummaryWriter(str(self._folder))
        if self._show:
            self._bar = progress_bar.opened()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for resource in (self._bar, self._writer):
            if resource is not None:
                resource.close()

    def record(self, epoch: int, epochs: int, loss: float, kept: int, totals: np.ndarray) -> None:
        """Take note of one moment of the run.

        Args:
            epoch: Passes done so far, from 0; never less than before.
            epochs: Passes planned.
            loss: The solver's loss.
            kept: Households with a positive weight.
            totals: Weighted totals, shape (targets,); those of pseudo-targets behind them are left out.
        """
        totals = totals[: self.problem.num_targets]
        errors = np.abs(relative_errors(np.asarray(totals, dtype=np.float64), self.problem.targets))
        mean = float(np.nanmean(errors)) if not np.isnan(errors).all() else math.nan
        row = {"epoch": epoch, "loss": float(loss), "mean_are": mean, "kept": int(kept)}
        self.history.append(row)
        if not self.totals or epoch >= self.totals[-1][0] + max(1, epochs // self.moments):
            self.totals.append((epoch, float(loss), np.array(totals, dtype=np.float64)))
        if self._writer is not None:
            for tag in TAGS:
                self._writer.add_scalar(tag, row[tag.rpartition("/")[2]], epoch)
        if self._bar is not None:
            progress_bar.show(self._bar, epoch, epochs, loss, mean, kept)

    def finish(self, loss: float, weights: np.ndarray) -> None:
        """Take the final weights as the last moment, with their histogram.

        Args:
            loss: The loss of the final weights.
            weights: Shape (households,).
        """
        epoch = int(self.history[-1]["epoch"]) + 1 if self.history else 0
        totals = self.problem.estimates(weights)
        self.record(epoch, 0, loss, int((weights > 0).sum()), totals)  # of a run of 0, each moment is kept
        if self._writer is not None:
            self._writer.add_histogram("weights/of_the_kept", weights[weights > 0], epoch)
            errors = relative_errors(totals, self.problem.targets)
            errors = errors[~np.isnan(errors)]
            if len(errors):
                self._writer.add_histogram("errors/relative", np.clip(errors, -1, 1), epoch)
