"""What a network may cost in the end, as it is asked for in a loop of your own, and the budget of it."""

from dataclasses import dataclass
from typing import Any

import torch

from sparsereg.checks import check_count
from sparsereg.compression.budget import Budget, check_reachable
from sparsereg.compression.count import Accountant
from sparsereg.compression.timing.measured import latency_budget
from sparsereg.compression.timing.runtimes import check_runtime, default_runtime
from sparsereg.data.batches import moved
from sparsereg.device import several_processes
from sparsereg.errors import InputError
from sparsereg.loops.reading import isolated
from sparsereg.target_settings import MILLISECONDS, Parts, Share, Target, goal, part_goals


@dataclass(frozen=True)
class Asked:
    """One of three targets, how a call is measured where it is one in milliseconds, and targets of parts.

    Attributes:
        target_sparsity: share of the parameters to remove, in (0, 1); or
        target_macs: share of the multiply-accumulate operations to keep, in (0, 1); or
        target_latency_ms: milliseconds that one call of the compacted network may take, > 0.
        runtime: where it is measured, see ``sparsereg.compression.timing.measured.latency_budget``.
        threads: that may compute in such a call.
        batch: examples in such a call.
        target_params: shares of the parameters to remove from parts, see ``target_settings.part_goals``.
        target_part_macs: shares of the multiply-accumulate operations of parts to keep.

    Raises:
        InputError: the runtime is not installed.
        ValueError: none of the targets is given, or several, one is outside its range, the runtime is
            unknown, or it is said how to measure what is not measured.
    """

    target_sparsity: float | None = None
    target_macs: float | None = None
    target_latency_ms: float | None = None
    runtime: str | None = None
    threads: int = 1
    batch: int = 1
    target_params: Parts | None = None
    target_part_macs: Parts | None = None

    def __post_init__(self) -> None:
        cost, _ = self.cost
        check_count("threads", self.threads)
        check_count("batch", self.batch)
        if cost == MILLISECONDS:
            check_runtime(default_runtime() if self.runtime is None else self.runtime)
            return
        timing = {"runtime": (self.runtime, None), "threads": (self.threads, 1), "batch": (self.batch, 1)}
        for name, (value, default) in timing.items():
            if value != default:
                raise ValueError(f"{name}={value!r} says how target_latency_ms is measured: give that, too")

    @property
    def shares(self) -> tuple[Share, ...]:
        """What parts may cost."""
        return part_goals(self.target_params, self.target_part_macs)

    @property
    def cost(self) -> tuple[str | None, float]:
        """What the whole network may cost; nothing is said of it where only parts have targets."""
        targets = self.target_sparsity, self.target_macs, self.target_latency_ms
        if self.shares and all(target is None for target in targets):
            return None, 1.0
        return goal(*targets)

    def of_one_shot(self) -> tuple[str | None, float]:
        """The same, where units are to go in one shot.

        Raises:
            InputError: it is a time, which is known of whole networks only.
        """
        cost, kept = self.cost
        if cost == MILLISECONDS:
            raise InputError(
                "target_latency_ms is met by gates that learn: for a start in one shot give target_macs or"
                " target_sparsity"
            )
        return cost, kept

    def budget(self, accountant: Accountant, example: Any, how: Target) -> Budget:
        """Return the budget of a network with gates.

        Args:
            accountant: of it.
            example: one batch as the network takes it.
            how: the target is reached.

        Raises:
            InputError: the network cannot be that small or fast, or already is.
        """
        cost, kept = self.cost
        gains = how.proportional_gain, how.integral_gain
        if cost != MILLISECONDS:
            if cost is not None:
                check_reachable(accountant, cost, kept)
            return Budget(accountant, cost, kept, *gains, self.shares)
        if several_processes():
            raise InputError("target_latency_ms is measured by one process: give the Trainer devices=1")
        timing: dict[str, Any] = {"runtime": self.runtime, "threads": self.threads, "batch": self.batch}
        timing["shares"] = self.shares
        with isolated():
            return latency_budget(accountant, moved(example, torch.device("cpu")), kept, *gains, **timing)
