"""Learning-rate schedules: pure functions of the epoch, which may be a fraction."""

import bisect
import math
from collections.abc import Callable, Sequence

SCHEDULES = ("constant", "cosine", "multistep")


def learning_rate_factor(
    schedule: str,
    *,
    epochs: float,
    warmup: float = 0.0,
    final: float = 0.0,
    milestones: Sequence[float] = (),
    gamma: float = 0.1,
) -> Callable[[float], float]:
    """Return the learning rate over its peak, as a function of the epoch.

    It depends on the epoch alone and not on when training ends, so that a run that is stopped and resumed
    takes the same steps as one that is not.

    Args:
        schedule: constant, cosine (from 1 to ``final`` at ``epochs``) or multistep.
        epochs: length of the cosine, > 0.
        warmup: epochs of linear increase at the start, >= 0.
        final: factor at the end of the cosine and behind it, >= 0.
        milestones: epochs at which multistep multiplies by ``gamma``.
        gamma: factor of multistep.

    Raises:
        ValueError: unknown schedule, or a number outside its range.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"optimizer.schedule={schedule}: expected one of {', '.join(SCHEDULES)}")
    if not epochs > 0 or warmup < 0 or final < 0:
        raise ValueError(
            "optimizer: expected schedule_epochs > 0, warmup_epochs >= 0 and final_lr_ratio >= 0, "
            f"got {epochs}, {warmup}, {final}"
        )
    steps = sorted(milestones)

    def factor(epoch: float) -> float:
        if epoch < warmup:
            return max(epoch / warmup, 1e-3)
        if schedule == "multistep":
            return float(gamma ** bisect.bisect_right(steps, epoch))
        if schedule == "cosine" and epochs > warmup:
            progress = min((epoch - warmup) / (epochs - warmup), 1.0)
            return final + (1 - final) * (1 + math.cos(math.pi * progress)) / 2
        return 1.0

    return factor
