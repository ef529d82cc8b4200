"""Checkpoints of a calibration under way: where it stands, and of which problem and settings it is."""

from __future__ import annotations

import hashlib
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsereg.archives import load_torch, save_torch
from sparsereg.calibration.config import CalibrationRun
from sparsereg.calibration.problem import CalibrationProblem
from sparsereg.calibration.solver.calibration import Calibration
from sparsereg.errors import DamagedFile, InputError
from sparsereg.settings import plain

Moments = list[tuple[int, float, np.ndarray]]
_NOT_OF_THE_RUN = {
    "checkpoint_seconds", "ckpt_path", "compare", "device", "fpc", "holdout", "log_moments",
    "num_replicates", "objective", "plots", "problem", "psu", "replicates", "report", "require", "rerun",
    "strata", "targets", "tensorboard", "untouchable", "variance", "weights_format",
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


def is_of(path: Path, digest: str) -> bool:
    """Whether a file is a checkpoint of the calibration with this ``fingerprint``."""
    try:
        return path.is_file() and bool(load_torch(path)["digest"] == digest)
    except (DamagedFile, OSError, LookupError, TypeError, ValueError):
        return False


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
        try:
            _check_state(self.calibration.state_dict(), state, self.calibration.problem.num_households)
            told = _checked_moments(moments, self.calibration.problem.num_targets)
            self.calibration.load_state_dict(state)
        except (LookupError, TypeError, ValueError, RuntimeError, AttributeError, OverflowError) as error:
            raise InputError(f"ckpt_path={path} is no checkpoint that can be continued: {error}") from error
        return told


_MORE = {"settled"}
"""What a state may have that it does not have at the start."""


def _check_state(own: Any, found: Any, num_households: int, where: str = "its state") -> None:
    """Check that what a file holds is like a state: the same names, types and dimensions, numbers in range.

    Args:
        own: The state of the same calibration at its start.
        found: In the file.
        num_households: Integers in tensors count households.
        where: For messages.

    Raises:
        ValueError: It is not.
    """
    if isinstance(own, dict):
        if not isinstance(found, dict) or not own.keys() <= found.keys() <= own.keys() | _MORE:
            raise ValueError(f"{where} has other parts than it should have")
        for key, value in own.items():
            _check_state(value, found[key], num_households, f"{where}, {key},")
        return
    if isinstance(found, Tensor) and (own is None or isinstance(own, Tensor)):
        fits = found.layout == torch.strided and not (found.is_complex() or found.is_meta)
        if fits and isinstance(own, Tensor):
            fits = found.dtype == own.dtype and found.dim() == own.dim()
        if fits and not found.is_floating_point() and found.numel():
            fits = found.dtype == torch.bool or 0 <= int(found.min()) <= int(found.max()) < num_households
    elif isinstance(own, float):
        fits = type(found) is float and (math.isfinite(found) or not math.isfinite(own))
    elif isinstance(own, list):  # the history, which is empty at the start
        fits = isinstance(found, list) and all(_is_report(row) for row in found)
    elif isinstance(own, int):
        fits = type(found) is type(own) and 0 <= found < 2**63
    else:
        fits = type(found) is type(own)
    if not fits:
        raise ValueError(f"{where} is not what it should be")


def _is_report(row: Any) -> bool:
    """Whether this is one row of the history."""
    keys = {"epoch", "loss", "kept", "mean_are"}
    return isinstance(row, dict) and row.keys() == keys and all(type(v) in (int, float) for v in row.values())


def _checked_moments(moments: Any, num_targets: int) -> Moments:
    """Return the totals at moments, as the log takes them."""
    told = [(int(epoch), float(loss), totals.double().numpy()) for epoch, loss, totals in moments]
    if any(totals.shape != (num_targets,) for _, _, totals in told):
        raise ValueError(f"its totals are not those of {num_targets} targets")
    return told
