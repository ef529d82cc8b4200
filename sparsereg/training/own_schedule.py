"""Learning-rate schedules of the user's: a function of the epoch, or a scheduler of PyTorch's.

Either becomes a function of the place in training, so that a run that is stopped and resumed takes the same
steps as one that is not, and a checkpoint needs nothing of it.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from sparsereg import own_code
from sparsereg.errors import InputError
from sparsereg.training.config import Optimizer

KEY = "optimizer.schedule"


def own_learning_rate(
    spec: Mapping[str, Any], settings: Optimizer, steps_per_epoch: float
) -> Callable[[float], float]:
    """Return the learning rate over its peak, as the user's code has it.

    Args:
        spec: ``_target_`` and its arguments. ``epochs`` (``schedule_epochs``), ``steps_per_epoch`` and
            ``optimizer`` are given, too, where its signature has these names.
        settings: the configuration group ``optimizer``.
        steps_per_epoch: > 0.

    Raises:
        InputError: it makes neither a function nor a scheduler whose rates depend on the place alone.
    """
    said = f"{KEY}.{own_code.TARGET}={spec[own_code.TARGET]}"
    model = torch.optim.SGD([torch.zeros(1)], lr=settings.lr, momentum=0.9)
    epochs, steps = settings.schedule_epochs, max(round(steps_per_epoch), 1)
    made = own_code.call(spec, KEY, optimizer=model, epochs=epochs, steps_per_epoch=steps)
    if isinstance(made, LRScheduler):
        replayed = _Replayed(made, model, said)
        counts = steps_per_epoch if settings.schedule_interval == "step" else 1.0
        return lambda epoch: replayed(math.floor(epoch * counts + 1e-6))
    if not callable(made):
        raise InputError(
            f"{said}: expected a function of the epoch, or a torch.optim.lr_scheduler, it makes a "
            f"{type(made).__name__}"
        )
    return lambda epoch: _factor(made, epoch, said)


def _factor(function: Callable[[float], Any], epoch: float, said: str) -> float:
    try:
        value = float(function(epoch))
    except Exception as error:
        where = f"{said} at epoch {epoch:g}: {type(error).__name__}: {error}{own_code.place(error)}"
        raise InputError(where) from error
    return _checked(value, f"{said} at epoch {epoch:g}")


def _checked(value: float, said: str) -> float:
    if not (math.isfinite(value) and value >= 0):
        raise InputError(f"{said}: expected a number >= 0, the learning rate over its peak, got {value}")
    return value


class _Replayed:
    """The rates of a scheduler over its first one's peak, by the number of its steps.

    Args:
        scheduler: on ``model``.
        model: an optimizer with the peak learning rate and nothing to train.
        said: the setting, for messages.

    Raises:
        InputError: it waits for a metric, or moves more than the learning rate.
    """

    def __init__(self, scheduler: LRScheduler, model: torch.optim.Optimizer, said: str) -> None:
        if isinstance(scheduler, ReduceLROnPlateau):
            raise InputError(f"{said}: it waits for a metric; expected one that counts epochs or steps")
        if scheduler.optimizer is not model:
            raise InputError(f"{said}: expected a scheduler of the argument 'optimizer' that it is given")
        self.scheduler, self.model, self.said = scheduler, model, said
        self.peak = float(model.defaults["lr"])
        self.factors: list[float] = []

    def __call__(self, count: int) -> float:
        while len(self.factors) <= count:
            if self.factors:
                self._step()
            group = self.model.param_groups[0]
            if group["momentum"] != self.model.defaults["momentum"]:
                raise InputError(
                    f"{self.said}: it moves the momentum, too, and only the learning rate is followed; with "
                    f"a scheduler of PyTorch's give {KEY}.cycle_momentum=false"
                )
            said = f"{self.said} after {len(self.factors)} of its steps"
            self.factors.append(_checked(float(group["lr"]) / self.peak, said))
        return self.factors[count]

    def _step(self) -> None:
        self.model.step()
        try:
            self.scheduler.step()
        except Exception as error:
            raise InputError(
                f"{self.said}: {type(error).__name__}: {error} (after {len(self.factors) - 1} of its steps)"
            ) from error
