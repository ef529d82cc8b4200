"""Schedules of the temperature beta over epochs, and how a temperature reaches every gate."""

import math
from collections.abc import Callable

from torch import nn

from sparsereg.checks import check_count, check_positive
from sparsereg.distributions import HardConcrete

SCHEDULES: dict[str, Callable[[float, float, float], float]] = {
    "constant": lambda initial, final, t: initial,
    "linear": lambda initial, final, t: initial + (final - initial) * t,
    "exponential": lambda initial, final, t: initial * (final / initial) ** t,
    "cosine": lambda initial, final, t: final + (initial - final) * (1 + math.cos(math.pi * t)) / 2,
}
"""Temperature from (initial, final, progress); progress runs from 0 to 1 over the annealing epochs."""


class TemperatureScheduler:
    """Temperature as a function of the epoch.

    Args:
        initial_temp: beta at epoch 0, > 0.
        final_temp: beta from epoch ``anneal_epochs`` on, > 0.
        anneal_epochs: number of epochs between the two, >= 1.
        schedule: a key of ``SCHEDULES``.
        total_epochs: another name of ``anneal_epochs``.

    Raises:
        ValueError: an argument is outside its range.
    """

    def __init__(
        self,
        initial_temp: float = 1.0,
        final_temp: float = 0.1,
        anneal_epochs: int | None = None,
        schedule: str = "exponential",
        *,
        total_epochs: int | None = None,
    ) -> None:
        if anneal_epochs is not None and total_epochs is not None:
            raise ValueError("anneal_epochs and total_epochs are the same thing; give one of them")
        epochs = next((n for n in (anneal_epochs, total_epochs) if n is not None), 100)
        if schedule not in SCHEDULES:
            raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, got {schedule!r}")
        self.initial_temp = check_positive("initial_temp", initial_temp)
        self.final_temp = check_positive("final_temp", final_temp)
        self.anneal_epochs = check_count("anneal_epochs", epochs)
        self.schedule = schedule

    def get_temperature(self, epoch: float) -> float:
        """Return beta at an epoch, counted from 0; fractions are allowed."""
        progress = min(max(epoch / self.anneal_epochs, 0.0), 1.0)
        return SCHEDULES[self.schedule](self.initial_temp, self.final_temp, progress)


def update_temperatures(model: nn.Module, temperature: float) -> None:
    """Set the temperature of every Hard Concrete tensor below ``model``.

    Args:
        model: any module.
        temperature: beta > 0.

    Raises:
        ValueError: the temperature is not a number > 0.
    """
    check_positive("temperature", temperature)
    for module in model.modules():
        if isinstance(module, HardConcrete):
            module.temperature = temperature
