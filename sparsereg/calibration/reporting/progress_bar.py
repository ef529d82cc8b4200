"""The bar that a user sees while a calibration runs: loss, mean error, households kept."""

import shutil
import sys
from typing import Any


def opened() -> Any:
    """Return a bar within 80 columns, which is none where stdout is no terminal."""
    from tqdm import tqdm

    return tqdm(
        total=0,
        desc="calibrate",
        ncols=min(80, shutil.get_terminal_size((80, 24)).columns) - 1,
        bar_format="{desc} {percentage:3.0f}%|{bar}| {remaining}{postfix}",
        file=sys.stdout,
        disable=None,
        leave=False,
    )


def show(bar: Any, epoch: int, epochs: int, loss: float, mean: float, kept: int) -> None:
    """Move a bar on, and show the three figures of one moment.

    Args:
        bar: see ``opened``.
        epoch: Passes done so far.
        epochs: Passes planned.
        loss: The solver's loss.
        mean: Mean absolute relative error.
        kept: Households with a positive weight.
    """
    bar.total = max(epochs, epoch)
    bar.set_postfix_str(f"loss {loss:.3g}, error {mean:.2%}, kept {kept:,}", refresh=False)
    bar.update(epoch - bar.n)
