"""Schedules of the temperature beta over epochs, and how a temperature reaches every gate."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sparsereg.checks import check_count, check_positive
from sparsereg.settings import Settings, at_least, count, setting

if TYPE_CHECKING:  # the schedules are numbers only, and settings are read before PyTorch is loaded
    from torch import nn

SCHEDULES: dict[str, Callable[[float, float, float], float]] = {
    "constant": lambda initial, final, t: initial,
    "linear": lambda initial, final, t: initial + (final - initial) * t,
    "exponential": lambda initial, final, t: initial * (final / initial) ** t,
    "cosine": lambda initial, final, t: final + (initial - final) * (1 + math.cos(math.pi * t)) / 2,
}
"""Temperature from (initial, final, progress); progress runs from 0 to 1 over the annealing epochs."""


COLDEST = at_least(1e-6)
"""Below, log_alpha over beta leaves the range of float32."""


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

    Example:
        >>> schedule = TemperatureScheduler(1.0, 0.5, anneal_epochs=10, schedule="linear")
        >>> schedule.get_temperature(5)
        0.75
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


@dataclass(frozen=True)
class Temperature(Settings):
    """beta of the Hard Concrete distribution over the epochs."""

    schedule: str = setting("constant", "how it goes from initial to final", choices=tuple(SCHEDULES))
    initial: float = setting(2 / 3, "at the start", COLDEST)
    final: float = setting(0.1, "at the end; not used by constant", COLDEST)
    anneal_epochs: int = setting(10, "epochs from initial to final; not used by constant", count())

    def scheduler(self) -> TemperatureScheduler:
        """Return beta as a function of the epoch."""
        return TemperatureScheduler(self.initial, self.final, self.anneal_epochs, self.schedule)


def update_temperatures(model: "nn.Module", temperature: float) -> None:
    """Set the temperature of every Hard Concrete tensor below ``model``.

    Args:
        model: any module.
        temperature: beta > 0.

    Raises:
        ValueError: the temperature is not a number > 0.

    Example:
        >>> from sparsereg import L0Linear
        >>> layer = L0Linear(6, 4)
        >>> update_temperatures(layer, 0.25)
        >>> [gate.temperature for gate in layer.modules() if hasattr(gate, "log_alpha")]
        [0.25]
    """
    from sparsereg.distributions import HardConcrete

    check_positive("temperature", temperature)
    for module in model.modules():
        if isinstance(module, HardConcrete):
            module.temperature = temperature
