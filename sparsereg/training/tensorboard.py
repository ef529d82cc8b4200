"""What a run shows in TensorBoard: scalars in groups, gates as pictures, settings beside results."""

import contextlib
import math
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from pytorch_lightning.loggers import TensorBoardLogger
from torch import Tensor

from sparsereg.distributions import HardConcrete

GROUPS = {
    "train": ("acc_loss", "expected_l2", "seconds_per_epoch", "temperature"),
    "val": (),
    "test": (),
    "gates": ("L_C0", "expected_sparsity", "exact_sparsity", "open_gates", "gates_removed"),
    "target": ("lambda_target", "target_kept", "expected_kept"),
}
"""The groups of scalars, and the names in each, besides those that start with the group's; a name is the last
part of its tag."""
METRICS = ("exact_sparsity", "expected_sparsity")
"""What the HParams tab compares runs by, besides the figures of the task."""
_PIXELS = 256
_LONGEST_NAME = 120


def tag_of(name: str) -> str:
    """Return the tag of a scalar: ``val_acc`` is ``val/val_acc``; a name with a group of its own keeps it.

    Args:
        name: as it was logged.
    """
    first = name.partition("/")[0]
    if first == "open_gates" or name in GROUPS["gates"]:
        return f"gates/{name}"
    group = next((g for g, names in GROUPS.items() if name in names or name.startswith(f"{g}_")), None)
    if group is None and ("/" in name or name in ("epoch", "hp_metric")):
        return name
    return f"{group or 'train'}/{name}"


class TensorBoard(TensorBoardLogger):
    """Lightning's logger with tags in groups, see ``tag_of``."""

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Write scalars under their tags."""
        super().log_metrics({tag_of(name): value for name, value in metrics.items()}, step)


def show_gates(writer: Any, gates: Mapping[str, HardConcrete], step: int) -> None:
    """Write histograms of the gates, and a map of each layer: dark is shut, bright is open.

    Args:
        writer: of TensorBoard.
        gates: by name.
        step: of the run.
    """
    for name, gate in gates.items():
        with torch.no_grad():
            active = gate.p_active()
        writer.add_histogram(f"gates/p_active/{name}", active.flatten(), step)
        writer.add_histogram(f"gates/log_alpha/{name}", gate.log_alpha.detach(), step)
        writer.add_image(f"gates/map/{name}", gate_map(active), step)


def gate_map(active: Tensor) -> Tensor:
    """Return P(z > 0) of a layer as a picture of shape (1, height, width) in [0, 1].

    Weights stand as in their matrix, a row for each output; a vector stands row by row, as near to a square
    as its length allows, so that gates of the pixels of an image are seen as that image. Few gates are drawn
    large, many are averaged.

    Args:
        active: P(z > 0) of the gates, in any shape.
    """
    field = active.detach().float().cpu()
    if field.dim() < 2 or min(field.shape[0], field[0].numel()) == 1:
        field = field.flatten()
        width = max(1, math.isqrt(max(field.numel() - 1, 0)) + 1)
        field = F.pad(field, (0, -field.numel() % width)).reshape(-1, width)
    else:
        field = field.flatten(1)
    picture = field[None, None]
    if max(picture.shape) > _PIXELS:
        height, width = (min(side, _PIXELS) for side in picture.shape[2:])
        return F.adaptive_avg_pool2d(picture, (height, width))[0]
    enlarged = max(1, _PIXELS // (2 * max(picture.shape)))
    return F.interpolate(picture, scale_factor=enlarged, mode="nearest")[0]


def in_order(settings: Mapping[str, Any], named: Iterable[str]) -> dict[str, Any]:
    """Return settings with those first that the user named.

    Args:
        settings: flat, nested keys with slashes.
        named: dotted keys.
    """
    first: list[str] = []
    for name in (name.replace(".", "/") for name in named):
        first += [key for key in settings if key == name or key.startswith(f"{name}/")]
    return {key: settings[key] for key in [*dict.fromkeys(first), *settings]}


def name_by_overrides(folder: Path, overrides: Iterable[str]) -> Path | None:
    """Link a run's folder under a name that says what sets it apart: TensorBoard shows names of folders.

    Args:
        folder: of the run, ``.../lightning_logs/version_N``.
        overrides: of the command.

    Returns:
        The link, ``.../by_overrides/lambda_l0=0.5,seed=1 (version_N)``; None where none can be made.
    """
    text = ",".join(override.lstrip("+") for override in overrides) or "defaults"
    text = re.sub(r"[^\w.,=+\-\[\]]+", "_", text)[:_LONGEST_NAME]
    link = folder.parent.parent / "by_overrides" / f"{text} ({folder.name})"
    with contextlib.suppress(OSError):  # a file system without links
        link.parent.mkdir(exist_ok=True)
        link.symlink_to(os.path.relpath(folder, link.parent), target_is_directory=True)
        return link
    return None
