"""Ways to choose households: each one a sequence of short steps that can be interrupted and resumed."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from sparsereg.calibration.config import PruningSchedule
from sparsereg.calibration.solver.hard_concrete import GateSettings, GateSolver
from sparsereg.calibration.solver.least_squares import System
from sparsereg.calibration.solver.losses import TargetLoss
from sparsereg.calibration.solver.matrix import HouseholdMatrix
from sparsereg.calibration.solver.pruning import Pruning, add, largest
from sparsereg.shapes import Bool, Float, Int

_EPOCHS_PER_STEP = 10
_NO_EPOCH = 2**40
"""Noise of later epochs than there are serves other ends."""
_SMALLEST_START = 1e-8
"""Share of the largest weight that each starts with at least, since logarithms are learned."""
_GATE_MARGIN = 1.2
"""Gates aim at this many times the wanted number: overshooting cannot be undone, a rest can be pruned."""
_SETTLE = PruningSchedule(stages=20, sweeps=40, first_sweeps=20, swap_rounds=0)
"""Pruning of that rest."""


@dataclass(frozen=True, eq=False)
class Goal:
    """What a selection method is given.

    Args:
        system: The least-squares problem of all households.
        loss: The loss with weights of the targets that are not normalised: what the gates minimise.
        num_kept: How many to keep, or None if the method decides.
        gates: Settings of the gates.
        droprate_init: Initial dropout rate d of the gates before they are stretched, in (0, 1): they start at
            log_alpha = log((1 - d) / d).
        schedule: Work of the pruning.
        gate_share: Share of the households that "hybrid" leaves to the gates, in [0, 1].
        seed: Seed of all noise.
        log_weight_jitter: Standard deviation of noise on the logarithm of the starting weights of the gates.
        log_alpha_jitter: Standard deviation of noise on the locations of the gates.
        start: Weights of an earlier calibration to start from, 0 where there is none.
    """

    system: System
    loss: TargetLoss
    num_kept: int | None
    gates: GateSettings = field(default_factory=GateSettings)
    droprate_init: float = 0.001
    schedule: PruningSchedule = field(default_factory=PruningSchedule)
    gate_share: float = 0.25
    seed: int = 0
    log_weight_jitter: float = 0.05
    log_alpha_jitter: float = 0.01
    start: Tensor | None = None

    def without(self, targets: Int[Tensor, "left_out"]) -> Goal:
        """Return the goal with these targets left out of the loss."""
        shares = self.loss.shares.index_fill(0, targets, 0.0)
        weight = self.system.quadratic.weight.index_fill(0, targets, 0.0)
        quadratic = replace(self.system.quadratic, weight=weight)
        return replace(
            self, loss=replace(self.loss, shares=shares), system=self.system.with_quadratic(quadratic)
        )

    def starting_weights(self) -> Float[Tensor, "households"]:
        """Initial weights times the one factor that brings all totals closest to their targets."""
        initial = self.system.initial_weights
        quadratic = self.system.quadratic
        totals = self.system.matrix.totals(initial)
        along = (quadratic.weight * totals * quadratic.targets).sum()
        size = (quadratic.weight * totals.square()).sum()
        factor = float(along / size) if size > 0 else 1.0
        return initial * factor if factor > 0 else initial

    def scaled_to_all(self, households: Int[Tensor, "selected"]) -> Float[Tensor, "selected"]:
        """Starting weights of some households, > 0, scaled so that they add up to those of all."""
        start = self.starting_weights()
        share = start.sum() / start[households].sum().clamp(min=1e-300)
        return (start[households] * share).clamp(min=float(start.max()) * 1e-6)

    def wanted(self) -> int:
        """How many households to keep, for methods that must be told."""
        assert self.num_kept is not None
        return self.num_kept


class Selection(Protocol):
    """A selection under way."""

    epoch: int
    done: bool

    @property
    def num_epochs(self) -> int:
        """Most epochs there will be."""

    def step(self) -> None:
        """Work for a short while."""

    def weights(self) -> Float[Tensor, "households"]:
        """Current weights of all households, float64, zero where not kept."""

    def kept(self) -> Int[Tensor, "kept"]:
        """Indices of the households that are kept, ascending, also where a weight is zero at present."""

    def state_dict(self) -> dict[str, Any]:
        """Where the selection stands: numbers and tensors."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""


class Fixed:
    """A selection that is known at once: everybody, a given one, or a random sample.

    Args:
        weights: Weights of all households, zero where not kept.
    """

    num_epochs = 1

    def __init__(self, weights: Float[Tensor, "households"]) -> None:
        self.epoch, self.done, self._weights = 0, False, weights

    def step(self) -> None:
        """Nothing is left to do."""
        self.epoch, self.done = 1, True

    def weights(self) -> Float[Tensor, "households"]:
        """See ``Selection``."""
        return self._weights

    def kept(self) -> Int[Tensor, "kept"]:
        """See ``Selection``."""
        return torch.nonzero(self._weights > 0).flatten()

    def state_dict(self) -> dict[str, Any]:
        """See ``Selection``."""
        return {"epoch": self.epoch, "done": self.done, "weights": self._weights.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See ``Selection``."""
        self.epoch, self.done = int(state["epoch"]), bool(state["done"])
        self._weights = state["weights"].to(self._weights.device)


def gates_of(goal: Goal, settings: GateSettings, largest: float | None = None) -> GateSolver:
    """Gates on all households at the goal's starting weights, with a little noise.

    Args:
        goal: The problem.
        settings: Of the gates.
        largest: Initial weight of any household, in all processes; None: of these.
    """
    initial, matrix = goal.system.initial_weights, goal.system.matrix
    if goal.start is not None:
        initial = torch.where(goal.start > 0, goal.start, initial)
    floor = _SMALLEST_START * (float(initial.max()) if largest is None else largest)
    log_weight = initial.clamp(min=floor).log().float()
    location = math.log((1.0 - goal.droprate_init) / goal.droprate_init)
    jitter = [_normal(matrix, goal.seed, _NO_EPOCH + k) for k in range(2)]
    return GateSolver(
        matrix, goal.loss, log_weight + goal.log_weight_jitter * jitter[0],
        location + goal.log_alpha_jitter * jitter[1], settings, goal.seed,
    )  # fmt: skip


def _normal(matrix: HouseholdMatrix, seed: int, epoch: int) -> Float[Tensor, "households"]:
    """Standard normal numbers, float32, from the noise of the households."""
    between = matrix.noise(seed, epoch).double().add_(2.0**-25)
    normal: Tensor = torch.special.ndtri(between).float()
    return normal


class Gated:
    """Selection by Hard Concrete gates, settled to an exact number at the end if one is wanted.

    Args:
        goal: The problem and the settings.
        num_kept: How many to keep; None: lambda_l0 decides.
    """

    def __init__(self, goal: Goal, num_kept: int | None) -> None:
        self.goal, self.num_kept = goal, num_kept
        settings = goal.gates
        households = goal.system.matrix.num_households
        if num_kept is not None:
            aim = min(households, round(_GATE_MARGIN * num_kept))
            settings = replace(settings, num_open=aim)
        self.solver = gates_of(goal, settings)
        self.epoch, self.done = 0, False
        self.num_epochs = settings.num_epochs
        self._settled: tuple[Tensor, Tensor] | None = None

    def step(self) -> None:
        """Run some epochs; after the last, settle the number of households."""
        count = min(_EPOCHS_PER_STEP, self.num_epochs - self.solver.epoch)
        self.solver.step(count)
        self.epoch = self.solver.epoch
        if self.epoch >= self.num_epochs:
            self.done = True
            if self.num_kept is not None:
                self._settled = self._settle(self.num_kept)

    def _settle(self, count: int) -> tuple[Int[Tensor, "kept"], Float[Tensor, "households"]]:
        """Bring the open households to exactly ``count``: prune the rest away, or add what helps most.

        Returns:
            Indices of the kept, and weights of all households.
        """
        system, weights = self.goal.system, self.solver.weights()
        open_ = torch.nonzero(weights > 0).flatten()
        if len(open_) > count:
            pruning = Pruning(system, weights, count, _SETTLE, open_)
            while not pruning.done:
                pruning.step()
            return pruning.kept(), pruning.weights()
        kept, fit = add(system, open_, system.of(open_, weights[open_]), count - len(open_), 1)
        return kept, torch.zeros_like(weights).index_put_((kept,), fit.weights)

    def weights(self) -> Float[Tensor, "households"]:
        """See ``Selection``."""
        return self.solver.weights() if self._settled is None else self._settled[1]

    def kept(self) -> Int[Tensor, "kept"]:
        """See ``Selection``."""
        if self._settled is not None:
            return self._settled[0]
        return torch.nonzero(self.solver.weights() > 0).flatten()

    def state_dict(self) -> dict[str, Any]:
        """See ``Selection``."""
        state = {"solver": self.solver.state_dict(), "done": self.done}
        return state if self._settled is None else {**state, "settled": list(self._settled)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See ``Selection``."""
        self.solver.load_state_dict(state["solver"])
        self.epoch, self.done = self.solver.epoch, bool(state["done"])
        settled = state.get("settled")
        device = self.goal.system.matrix.device
        self._settled = None if settled is None else (settled[0].to(device), settled[1].to(device))


class Hybrid(Gated):
    """A share of the households by gates, the rest at random in proportion to their initial weights."""

    def __init__(self, goal: Goal) -> None:
        self._by_gates = round(goal.gate_share * goal.wanted())
        super().__init__(goal, max(1, self._by_gates))

    def _settle(self, count: int) -> tuple[Int[Tensor, "kept"], Float[Tensor, "households"]]:
        kept, weights = torch.zeros(0, dtype=torch.long), torch.zeros_like(self.solver.weights())
        if self._by_gates:
            kept, weights = super()._settle(count)
        taken = torch.zeros(len(weights), dtype=torch.bool, device=weights.device)
        taken[kept] = True
        number = self.goal.wanted() - len(kept)
        drawn = sample_in_proportion(self.goal.system.initial_weights, number, self.goal.seed + 1, taken)
        weights[drawn] = self.goal.scaled_to_all(drawn)
        return torch.cat([kept.to(drawn), drawn]).sort().values, weights


def sample_in_proportion(
    sizes: Float[Tensor, "households"],
    count: int,
    seed: int,
    excluded: Bool[Tensor, "households"] | None = None,
) -> Int[Tensor, "drawn"]:
    """Draw ``count`` different households with chances in proportion to their sizes; ascending indices.

    Keys log(u) / size; the largest are drawn (Efraimidis and Spirakis, 2006). Households of size zero come
    last, excluded ones never.
    """
    generator = torch.Generator().manual_seed(seed)
    u = torch.rand(len(sizes), generator=generator, dtype=torch.float64).to(sizes.device)
    tiny = 1e-12 * float(sizes.max().clamp(min=1e-300))
    keys = u.clamp(min=1e-300).log() / sizes.clamp(min=tiny)
    if excluded is not None:
        keys[excluded] = -float("inf")
    return largest(keys, count)


def _random(goal: Goal, sizes: Float[Tensor, "households"]) -> Selection:
    drawn = sample_in_proportion(sizes, goal.wanted(), goal.seed)
    weights = torch.zeros_like(sizes)
    weights[drawn] = goal.scaled_to_all(drawn)
    return Fixed(weights)


_FEW_SWAPS = {"swap_rounds": 8, "swap_share": 0.1, "swap_parts": 2}
"""At most this work on swaps where there are more households than targets: weights alone do the rest."""


def _pruning(goal: Goal) -> Selection:
    """Pruning and swaps, fewer of these where weights alone can meet most targets."""
    schedule = goal.schedule
    if goal.wanted() >= goal.system.matrix.num_targets:
        schedule = replace(
            schedule,
            swap_rounds=min(schedule.swap_rounds, int(_FEW_SWAPS["swap_rounds"])),
            swap_share=min(schedule.swap_share, _FEW_SWAPS["swap_share"]),
            swap_parts=min(schedule.swap_parts, int(_FEW_SWAPS["swap_parts"])),
        )
    if goal.start is not None:
        return _from_start(goal, goal.start, schedule)
    return Pruning(goal.system, goal.starting_weights(), goal.wanted(), schedule)


def _from_start(goal: Goal, start: Tensor, schedule: PruningSchedule) -> Selection:
    """Go on from the households that an earlier calibration kept: prune them, or fill them up, then swap."""
    system, kept = goal.system, torch.nonzero(start > 0).flatten()
    weights, missing = start, goal.wanted() - len(kept)
    if missing > 0:
        kept, fit = add(system, kept, system.of(kept, start[kept]), missing, schedule.swap_sweeps)
        weights = torch.zeros_like(start).index_put_((kept,), fit.weights)
    return Pruning(system, weights, goal.wanted(), schedule, kept)


def _known_or_initial(goal: Goal) -> Tensor:
    """Weights of an earlier calibration, and initial ones, scaled, where there are none."""
    initial = goal.starting_weights()
    return initial if goal.start is None else torch.where(goal.start > 0, goal.start, initial)


METHODS: dict[str, Callable[[Goal], Selection]] = {
    "pruning": _pruning,
    "hard_concrete": lambda goal: Gated(goal, goal.num_kept),
    "hybrid": Hybrid,
    "random": lambda goal: _random(goal, torch.ones_like(goal.system.initial_weights)),
    "pps": lambda goal: _random(goal, goal.system.initial_weights),
    "all": lambda goal: Fixed(_known_or_initial(goal)),
}
"""pruning: gradual pruning and swaps. hard_concrete: gates. hybrid: a share by gates, the rest at random.
random: a simple random sample. pps: a sample in proportion to the initial weights. all: everybody."""
NAMES = (*METHODS, "calibrate")
"""calibrate: everybody, and targets are met exactly, see ``exact``: there is nothing to choose."""
_EVERYBODY = ("all", "calibrate")
STARTED = ("pruning", "hard_concrete", *_EVERYBODY)
"""Methods that can start from the weights of an earlier calibration; the others draw households."""


def method_of(name: str, num_households: int | None, lambda_l0: float | None = None) -> str:
    """Resolve "auto" and check that a method fits what is known.

    Args:
        name: "auto" or one of ``NAMES``.
        num_households: How many to keep; None: not said.
        lambda_l0: Price of a household; None: not said. Without both, nobody wants to lose households.

    Raises:
        ValueError: the method is unknown, needs a number of households, or takes none.
    """
    if name == "auto":
        if num_households is not None:
            return "pruning"
        return "all" if lambda_l0 is None else "hard_concrete"
    if name not in NAMES:
        near = difflib.get_close_matches(str(name), NAMES, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ValueError(f"method must be auto or one of {', '.join(NAMES)}, got {name!r}{hint}")
    if num_households is None and name not in ("hard_concrete", *_EVERYBODY):
        raise ValueError(f"method={name!r} needs num_households, how many to keep")
    if num_households is not None and name in _EVERYBODY:
        raise ValueError(
            f"method={name!r} keeps everybody: leave num_households out or choose another method"
        )
    return name
