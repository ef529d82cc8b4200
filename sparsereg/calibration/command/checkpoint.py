"""Checkpoints of a calibration under way: where it stands, and of which problem and settings it is."""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path

import numpy as np
import torch

from sparsereg.archives import load_torch, save_torch
from sparsereg.calibration.config import CalibrationRun
from sparsereg.calibration.problem import CalibrationProblem
from sparsereg.calibration.solver.calibration import Calibration
from sparsereg.errors import DamagedFile, InputError
from sparsereg.settings import plain

Moments = list[tuple[int, float, np.ndarray]]
_NOT_OF_THE_RUN = {
    "ckpt_path", "checkpoint_seconds", "device", "holdout", "log_moments", "plots", "problem", "require",
    "rerun", "tensorboard", "untouchable", "weights_format",
}  # fmt: skip


def fingerprint(problem: CalibrationProblem, cfg: CalibrationRun) -> str:
    """Return a digest of everything that the weights depend on: the problem's numbers and the settings.

    Args:
        problem: The problem.
        cfg: The settings.
    """
    digest = hashlib.sha256()
    m = problem.matrix
    for array in (m.indptr, m.indices, m.data, problem.targets, problem.starting_weights):
        digest.update(np.ascontiguousarray(array).data)
    numbers = (problem.target_weights, problem.scale, problem.tolerance, problem.target_hard)
    for extra in (*numbers, problem.target_groups, problem.parent):
        digest.update(str(None if extra is None else extra.tolist()).encode())
    if problem.denominators is not None:
        for array in (problem.denominators.indptr, problem.denominators.indices, problem.denominators.data):
            digest.update(np.ascontiguousarray(array).data)
    kept = {k: v for k, v in plain(cfg).items() if k not in _NOT_OF_THE_RUN}
    digest.update(json.dumps(kept, sort_keys=True).encode())
    return digest.hexdigest()


class Saver:
    """Writes and reads the checkpoints of one calibration.

    Args:
        calibration: What is under way.
        digest: Its ``fingerprint``: a checkpoint of another one is refused.
        seconds: At least so long between checkpoints that nobody asked for.
    """

    def __init__(self, calibration: Calibration, digest: str, seconds: float):
        self.calibration, self.digest, self.seconds = calibration, digest, seconds
        self._last = time.monotonic()

    def save_if_due(self, path: Path, moments: Moments) -> None:
        """Save if the last checkpoint is old enough."""
        if time.monotonic() - self._last >= self.seconds:
            self.save(path, moments)

    def save(self, path: Path, moments: Moments) -> None:
        """Write where the calibration stands, whole or not at all.

        Args:
            path: The file.
            moments: Totals at moments so far, for the log.
        """
        content = {
            "digest": self.digest,
            "calibration": self.calibration.state_dict(),
            "moments": [(epoch, loss, torch.from_numpy(totals)) for epoch, loss, totals in moments],
        }
        save_torch(path, content)
        self._last = time.monotonic()

    def load(self, path: Path) -> Moments:
        """Go on from a checkpoint and return the moments it holds.

        Raises:
            InputError: The file is missing, is no checkpoint, or is of another problem or other settings.
        """
        if not path.is_file():
            raise InputError(f"ckpt_path={path} does not exist (a run that ended has no checkpoint any more)")
        try:
            content = load_torch(path)
            digest, state, moments = content["digest"], content["calibration"], content["moments"]
        except (DamagedFile, OSError) as error:
            raise InputError(
                f"ckpt_path={path} cannot be read as a checkpoint of calibrate.py: {error}"
            ) from error
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"ckpt_path={path} is not a checkpoint of calibrate.py") from error
        if digest != self.digest:
            raise InputError(
                f"ckpt_path={path} is of another problem or of other settings:"
                " repeat the command that was interrupted, with ckpt_path added"
            )
        self.calibration.load_state_dict(state)
        return [(int(epoch), float(loss), totals.numpy()) for epoch, loss, totals in moments]
