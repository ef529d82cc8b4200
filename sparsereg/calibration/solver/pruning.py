"""Selection of exactly K households by gradual pruning, swaps and filling up.

Pruning starts from weights for everybody and drops, little by little, the households that contribute
least, while the weights of the others are improved. Swaps then exchange the least useful of the kept for
the most useful of the dropped, as long as that pays.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsereg.calibration.config import PruningSchedule
from sparsereg.calibration.solver.least_squares import LeastSquares, System
from sparsereg.shapes import Float, Int

_POOL = 2.5
"""Households among which swaps choose for a while, in households that are kept: those that help most."""
_POOL_ROUNDS = 5
"""Rounds of swaps after which these are chosen anew."""
_FIRST_SHRINK = 0.75
"""Factor on the share of households exchanged after a round that failed, until the first that pays."""
_ROUGH = 1e-5
"""Optimality at which the households of weight zero are known well enough."""


def kept_at(stage: int, stages: int, num_households: int, num_kept: int, power: float) -> int:
    """Number of households to keep after a stage: N at stage 0, K at the last, falling log-polynomially."""
    share = (1.0 - stage / stages) ** power
    return max(num_kept, round(num_kept * math.pow(num_households / num_kept, share)))


def largest(values: Float[Tensor, "values"], count: int) -> Int[Tensor, "chosen"]:
    """Indices of the ``count`` largest values in ascending order; ties go to the lower index.

    Selection, not sorting: finding the smallest that is in takes a tenth of the time of ordering all.
    """
    if count >= len(values):
        return torch.arange(len(values), device=values.device)
    if count <= 0:
        return torch.arange(0, device=values.device)
    place = len(values) - count
    if values.device.type == "cpu":  # numpy's selection uses vector registers
        level = torch.from_numpy(np.partition(values.numpy(), place)[place : place + 1])
    else:
        level = torch.kthvalue(values, place + 1, keepdim=True).values
    chosen = values > level
    ties = torch.nonzero(values == level).flatten()
    chosen[ties[: count - int(chosen.sum())]] = True
    return torch.nonzero(chosen).flatten()


class Pruning:
    """A selection under way: first stages that drop households, then rounds that swap some.

    Args:
        system: All households.
        weights: Where to start, shape (households,).
        num_kept: How many to keep, from 1 to the number of candidates.
        schedule: How much work to do.
        candidates: Indices of the households to choose from, ascending; None: all. Swaps look at all.
    """

    def __init__(
        self,
        system: System,
        weights: Float[Tensor, "households"],
        num_kept: int,
        schedule: PruningSchedule,
        candidates: Int[Tensor, "candidates"] | None = None,
    ) -> None:
        self.system, self.schedule, self.num_kept = system, schedule, num_kept
        everyone = torch.arange(len(weights), device=weights.device)
        self._kept = everyone if candidates is None else candidates
        self.fit = system.of(self._kept, weights[self._kept])
        self._num_candidates = len(self._kept)
        self._stages = schedule.stages if num_kept < self._num_candidates else 1
        self.epoch, self._share, self._value = 0, schedule.swap_share, float("inf")
        self.done = False
        self._pool, self._pool_age = everyone[:0], 0
        self._among, self._has_swapped = system, False

    @property
    def num_epochs(self) -> int:
        """Most steps there will be."""
        return self._stages + self.schedule.swap_rounds

    def step(self) -> None:
        """Do one stage of pruning or one round of swaps."""
        if self.epoch == 0:
            self.fit.sweep(self.schedule.first_sweeps)
        self.epoch += 1
        if self.epoch <= self._stages:
            self._prune()
        else:
            self._swap()
        self.fit.refresh()  # what goes on from ``state_dict`` rounds as this does
        self.done = self.done or self.epoch >= self.num_epochs

    def _prune(self) -> None:
        count = kept_at(self.epoch, self._stages, self._num_candidates, self.num_kept, self.schedule.power)
        if count < len(self._kept):
            best = largest(self.fit.contributions(), count)
            self._kept = self._kept[best]
            self.fit = self.system.of(self._kept, self.fit.weights[best])
        self.fit.sweep(self.schedule.sweeps)

    def _swap(self) -> None:
        """Exchange the least useful of the kept for the most useful of the others, if that pays."""
        if self._value == float("inf"):
            self._value = self.fit.penalized_value()
        others = self.system.matrix.num_households - self.num_kept
        count = min(int(self._share * self.num_kept), others)
        if count < 1:
            self.done = True
            return
        if self._pool_age == 0:
            self._choose_pool(count)
        self._pool_age = (self._pool_age + 1) % _POOL_ROUNDS
        places = torch.searchsorted(self._pool, self._kept)
        places, fit = _exchange(self._among, places, self.fit, count, self.schedule)
        value = fit.penalized_value()
        if value < self._value:
            self._kept, self.fit, self._value = self._pool[places], fit, value
            self._has_swapped = True
        else:
            self._share *= self.schedule.swap_shrink if self._has_swapped else _FIRST_SHRINK

    def _choose_pool(self, count: int) -> None:
        """Store those who are kept, and those who might be, together."""
        gains = self.system.gains(self.fit.by_totals)
        gains[self._kept] = float("inf")
        number = max(_POOL * self.num_kept, 2.0 * (1.0 + self.schedule.swap_surplus) * count) + self.num_kept
        self._set_pool(largest(gains, int(number)))

    def _set_pool(self, pool: Int[Tensor, "pool"]) -> None:
        everyone = len(pool) == self.system.matrix.num_households
        self._pool, self._among = pool, self.system if everyone else self.system.take(pool)

    def weights(self) -> Float[Tensor, "households"]:
        """Weights of all households, zero where not kept."""
        weights = torch.zeros_like(self.system.initial_weights)
        weights[self._kept] = self.fit.weights
        return weights

    def kept(self) -> Int[Tensor, "kept"]:
        """Indices of the households that are kept, ascending."""
        return self._kept

    def state_dict(self) -> dict[str, Any]:
        """Where the selection stands, to go on from later."""
        return {
            "epoch": self.epoch,
            "kept": self._kept.clone(),
            "weights": self.fit.weights.clone(),
            "share": self._share,
            "value": self._value,
            "candidates": self._num_candidates,
            "done": self.done,
            "pool": self._pool.clone(),
            "pool_age": self._pool_age,
            "has_swapped": self._has_swapped,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a state that ``state_dict`` gave for the same problem."""
        self.epoch, self._share = int(state["epoch"]), float(state["share"])
        self._value, self._num_candidates = float(state["value"]), int(state["candidates"])
        self.done = bool(state["done"])
        self._kept = state["kept"].to(self._kept.device)
        self._has_swapped = bool(state["has_swapped"])
        if int(state["pool_age"]) > 0:
            self._pool_age = int(state["pool_age"])
            self._set_pool(state["pool"].to(self._kept.device))
        self.fit = self.system.of(self._kept, state["weights"].to(self._kept.device))


def _exchange(
    system: System, kept: Int[Tensor, "kept"], fit: LeastSquares, count: int, schedule: PruningSchedule
) -> tuple[Int[Tensor, "kept"], LeastSquares]:
    """Drop the ``count`` least useful, add the most useful others and a surplus, prune the surplus.

    They are added in parts, with sweeps in between, since two households that help in the same way look
    equally useful until one of them is in.
    """
    num_kept = len(kept)
    stay = largest(fit.contributions(), num_kept - count)
    kept, fit = kept[stay], system.of(kept[stay], fit.weights[stay])
    fit.sweep(max(1, schedule.swap_sweeps // 8))
    others = system.matrix.num_households - len(kept)
    number = min(others, count + int(schedule.swap_surplus * count))
    for part in range(schedule.swap_parts):
        share = number * (part + 1) // schedule.swap_parts - number * part // schedule.swap_parts
        if share:
            kept, fit = add(system, kept, fit, share, max(1, schedule.swap_sweeps // schedule.swap_parts))
    if len(kept) > num_kept:
        best = largest(fit.contributions(), num_kept)
        kept, fit = kept[best], system.of(kept[best], fit.weights[best])
        fit.sweep(max(1, schedule.swap_sweeps // 2))
    return kept, fit


def add(
    system: System, kept: Int[Tensor, "kept"], fit: LeastSquares, count: int, sweeps: int
) -> tuple[Int[Tensor, "more"], LeastSquares]:
    """Add the ``count`` households that would help most one at a time, then improve everybody's weights."""
    gains = system.gains(fit.by_totals)
    gains[kept] = -1.0
    weights = torch.zeros_like(gains)
    weights[kept] = fit.weights
    kept = torch.cat([kept, largest(gains, count)]).sort().values
    fit = system.of(kept, weights[kept], by_totals=fit.by_totals)  # they come with a weight of zero
    fit.sweep(sweeps)
    return kept, fit


def fill(
    system: System, kept: Int[Tensor, "kept"], fit: LeastSquares, rounds: int = 8
) -> tuple[Int[Tensor, "kept"], LeastSquares]:
    """Solve nearly to optimality, replacing households whose weight becomes zero by others that help.

    Args:
        system: All households.
        kept: Indices of the selection, ascending.
        fit: Its fit.
        rounds: Most times to replace.

    Returns:
        A selection of the same size and its fit; a few weights may still be zero.
    """
    fit.solve(_ROUGH)
    for _ in range(rounds):
        used = torch.nonzero(fit.weights > 0).flatten()
        missing = len(kept) - len(used)
        if missing == 0:
            break
        value = fit.penalized_value()
        smaller = system.of(kept[used], fit.weights[used])
        new_kept, new_fit = add(system, kept[used], smaller, missing, 1)
        new_fit.solve(_ROUGH)
        if new_fit.penalized_value() > value:
            break
        kept, fit = new_kept, new_fit
    return kept, fit
