"""What a network may cost: a multiplier that holds the expected cost, and gates set to meet the exact one.

Minimise the task loss subject to E[cost] <= target, where E[cost] is the expected number of parameters
(or MACs) of the compacted network, see ``Accountant``. The Lagrangian is

    loss + multiplier * log(E[cost] / target(t))

with a target that falls geometrically from the whole network to the one asked for, and a
proportional-integral multiplier. A purely integral one overshoots: it has grown while the ramp fell, and
goes on closing gates after the constraint holds. Here the integral starts again from zero then. Parts of the
network with a budget of their own (``sparsereg.compression.parts``) have a constraint and a multiplier each.
"""

import bisect
import functools
import itertools
import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sparsereg.compression.count import Accountant
from sparsereg.compression.parts import Part, parts_of
from sparsereg.distributions import HardConcrete, log_alpha_at, shift
from sparsereg.errors import InputError
from sparsereg.target_settings import Share, falling

log = logging.getLogger(__name__)

COSTS = ("parameters", "macs")
"""What a target can be about."""
Exact = str | Callable[[], float]
"""A cost: one of ``COSTS``, or what returns the share of it that compaction would leave now."""


@dataclass
class Constraint:
    """The constraint as the loss sees it: linear in the gates' locations between two measurements.

    Attributes:
        multiplier: lambda, >= 0.
        violation: log(E[cost] / target) when it was measured last.
        gradients: each gate's locations and d log E[cost] / d log_alpha.
        scalars: what TensorBoard shows.
        parts: constraints beside it.
    """

    multiplier: float
    violation: float
    gradients: list[tuple[Tensor, Tensor]]
    scalars: dict[str, float]
    parts: tuple["Constraint", ...] = ()

    def add_gradient_(self, optimizer: torch.optim.Optimizer | None = None, scale: float = 1.0) -> bool:
        """Add the gradient of the penalty to that which the gates have.

        Args:
            optimizer: only to gates that it moves; to all if None.
            scale: of the gradients, which mixed precision enlarges.

        Returns:
            Whether there were any.
        """
        moved = None if optimizer is None else {id(p) for g in optimizer.param_groups for p in g["params"]}
        own = [(a, g) for a, g in self.gradients if moved is None or id(a) in moved]
        for log_alpha, gradient in own:
            added = (scale * self.multiplier * gradient).to(log_alpha.dtype)
            log_alpha.grad = added if log_alpha.grad is None else log_alpha.grad.add_(added)
        others = [part.add_gradient_(optimizer, scale) for part in self.parts]
        return bool(own) or any(others)

    def penalty(self) -> Tensor:
        """Return multiplier * log(E[cost] / target), a scalar: the value and the gradient measured last."""
        penalties = [part.penalty() for part in self.parts]
        if self.gradients:
            linear = torch.stack([(place * slope).sum() for place, slope in self.gradients]).sum()
            penalties.append(self.multiplier * (self.violation + linear - linear.detach()))
        return torch.stack(penalties).sum()


class Multiplier:
    """Proportional-integral multiplier >= 0 of an inequality constraint g <= 0.

    Args:
        proportional_gain: multiplier for each unit of g.
        integral_gain: gain for each unit of g and step.
    """

    def __init__(self, proportional_gain: float, integral_gain: float) -> None:
        self.proportional_gain = proportional_gain
        self.integral_gain = integral_gain
        self.integral = 0.0

    def update(self, violation: float, steps: int = 1) -> float:
        """Take note of g, which holds for so many steps, and return the multiplier."""
        if violation <= 0:
            self.integral = 0.0
        else:
            self.integral += self.integral_gain * violation * steps
        return max(0.0, self.integral + self.proportional_gain * violation)


class Budget:
    """The share of a network's cost that may stay: what its gates are told while training, and at the end.

    Args:
        accountant: counts the network.
        cost: one of ``COSTS``; a class below may name another; None where parts only have budgets.
        kept: share of it that may stay in the end, in (0, 1).
        proportional_gain: of the multiplier.
        integral_gain: of the multiplier.
        shares: what parts of the network may cost.
        round_to: see ``meet_``.

    Attributes:
        constraint: as it was measured last; None before.
        multiplier: of the constraint.
        parts: budgets of parts.
        met: whether the gates have been set to the exact count since ``measure`` was called.

    Raises:
        InputError: there is no such part, or it cannot be that small.
    """

    def __init__(
        self,
        accountant: Accountant,
        cost: str | None,
        kept: float,
        proportional_gain: float,
        integral_gain: float,
        shares: Sequence[Share] = (),
        round_to: int = 1,
    ) -> None:
        self.accountant = accountant
        self.round_to = round_to
        self.cost = cost
        self.kept = kept
        self.multiplier = Multiplier(proportional_gain, integral_gain)
        self.constraint: Constraint | None = None
        self.met = False
        self.parts = [
            PartBudget(accountant, part, proportional_gain, integral_gain)
            for part in parts_of(accountant, shares)
        ]

    def expected_share(self) -> Tensor:
        """Share of the cost that is expected to stay, differentiable in every log_alpha; a scalar."""
        if self.cost == "parameters":
            return self.accountant.expected_parameters() / self.accountant.parameters
        return self.accountant.expected_macs() / self.accountant.macs

    def measure(self, progress: float, steps: int = 1) -> Constraint:
        """Compare the expected cost with what is allowed now, and move the multiplier.

        Args:
            progress: from 0, where the whole network is allowed, to 1, where the target is in force.
            steps: of the optimizer for which the result will be used.
        """
        self.met = False
        parts = tuple(part.measure(progress, steps) for part in self.parts)
        own = Constraint(0.0, 0.0, [], {}) if self.cost is None else self._measured(progress, steps)
        scalars = dict(own.scalars)
        for part, constraint in zip(self.parts, parts, strict=True):
            name = re.sub(r"[^\w.-]+", "_", part.name)  # trackers of runs take no stars
            scalars |= {f"{key}/{name}": value for key, value in constraint.scalars.items()}
        self.constraint = replace(own, scalars=scalars, parts=parts)
        return self.constraint

    def _measured(self, progress: float, steps: int) -> Constraint:
        allowed, expected = falling(self.kept, progress), self.expected_share()
        locations = [gate.log_alpha for gate in self.accountant.gates]
        gradients = torch.autograd.grad(expected.log(), locations, allow_unused=True)
        share = float(expected.detach())
        violation = math.log(share / allowed)
        multiplier = self.multiplier.update(violation, steps)
        return Constraint(
            multiplier,
            violation,
            [(a, g) for a, g in zip(locations, gradients, strict=True) if g is not None],
            {"lambda_target": multiplier, "target_kept": allowed, "expected_kept": share},
        )

    def state_dict(self) -> dict[str, Any]:
        """The multiplier and what was measured last, tensors and numbers, so that a loop goes on exactly."""
        now = self.constraint
        places = {id(gate.log_alpha): i for i, gate in enumerate(self.accountant.gates)}
        gradients = [] if now is None else [(places[id(a)], g.detach().cpu()) for a, g in now.gradients]
        return {
            "integral": self.multiplier.integral,
            "multiplier": None if now is None else now.multiplier,
            "violation": None if now is None else now.violation,
            "scalars": {} if now is None else dict(now.scalars),
            "gradients": dict(gradients),
            "parts": {part.name: part.state_dict() for part in self.parts},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what ``state_dict`` returned.

        Raises:
            ValueError: it is of other gates, or of other parts.
        """
        states = dict(state.get("parts") or {})
        if set(states) != {part.name for part in self.parts}:
            raise ValueError(f"this state is of other parts: {', '.join(states) or 'none'}")
        for part in self.parts:
            part.load_state_dict(states[part.name])
        self.multiplier.integral = float(state["integral"])
        self.constraint = None
        pairs = self._pairs(state["gradients"])
        if state["multiplier"] is not None:
            scalars = {name: float(value) for name, value in state["scalars"].items()}
            constraints = tuple(part.constraint for part in self.parts if part.constraint is not None)
            self.constraint = Constraint(
                float(state["multiplier"]), float(state["violation"]), pairs, scalars, constraints
            )

    def _pairs(self, gradients: Mapping[Any, Any]) -> list[tuple[Tensor, Tensor]]:
        """Locations and their slopes, from the numbers of gates."""
        locations = [gate.log_alpha for gate in self.accountant.gates]
        pairs: list[tuple[Tensor, Tensor]] = []
        for place, gradient in gradients.items():
            at = int(place)
            shape = locations[at].shape if 0 <= at < len(locations) else None
            value = torch.as_tensor(gradient)
            if value.shape != shape:
                raise ValueError(
                    f"this state is of other gates: its gate {at} has {tuple(value.shape)} places"
                )
            pairs.append((locations[at], value.to(locations[at])))
        return pairs

    def integrals(self) -> dict[str, float]:
        """What multipliers have gathered: ``integral``, and of parts ``integral NAME``."""
        parts = {f"integral {part.name}": part.multiplier.integral for part in self.parts}
        return {"integral": self.multiplier.integral, **parts}

    def load_integrals(self, integrals: Mapping[str, float]) -> None:
        """Go on from what ``integrals`` returned; parts that were not there start anew."""
        self.multiplier.integral = float(integrals["integral"])
        for part in self.parts:
            part.multiplier.integral = float(integrals.get(f"integral {part.name}", 0.0))

    @property
    def decided(self) -> bool:
        """Whether every gate was opened or shut for good, as a start in one shot does."""
        return all(bool((gate.log_alpha.abs() > SURE / 2).all()) for gate in self.accountant.gates)

    def meet(self) -> None:
        """Open or shut the gates nearest to the boundary, so that the exact cost is what is allowed."""
        self.met = True
        if self.decided:
            return
        for held in [self, *self.parts]:
            held.warn()
        cost = self.cost if self.cost is None or self.cost in COSTS else self.exact_share
        parts = [part.part for part in self.parts]
        meet_all_(self.accountant, cost, self.kept, parts, self.round_to)

    def exact_share(self) -> float:
        """Share of the cost that compaction leaves now; of the whole network without a cost."""
        return 1.0 if self.cost is None else exact_share(self.accountant, self.cost)

    @property
    def what(self) -> str:
        """What the budget is about, for messages."""
        return str(self.cost)

    @torch.no_grad()
    def warn(self) -> None:
        """Say so where the gates have not come near the target."""
        share = 0.0 if self.cost is None else float(self.expected_share())
        if share > UNDECIDED * self.kept:
            log.warning(
                "the gates have not come near the target: %.1f %% of the %s are expected to stay, %.1f %% "
                "may; the rest is cut off now, which costs accuracy. Train longer, or let the gates learn "
                "faster (optimizer.gate_lr_ratio of train.py, gate_lr)",
                100 * share,
                self.what,
                100 * self.kept,
            )


class PartBudget(Budget):
    """The share of the cost of a part that may stay.

    Args:
        accountant: counts the network.
        part: of it.
        proportional_gain: of the multiplier.
        integral_gain: of the multiplier.

    Raises:
        InputError: with every gate shut more stays.
    """

    def __init__(
        self, accountant: Accountant, part: Part, proportional_gain: float, integral_gain: float
    ) -> None:
        share = part.share
        super().__init__(accountant, share.cost, share.kept, proportional_gain, integral_gain)
        self.part = part
        least = least_share(accountant, part.exact)
        if least >= 1:
            raise InputError(f"{share.said}: none of its {share.cost} can go; explain() says why")
        if share.kept < least:
            most = least if share.cost == "macs" else 1 - least
            bound = f"more than {most:.4f}" if share.cost == "macs" else f"at most {most:.4f}"
            raise InputError(
                f"{share.said} cannot be met: with every gate shut {least:.2%} of these {share.cost} stay;"
                f" give {bound}, or let more families or layers go"
            )

    @property
    def name(self) -> str:
        """The part, for logs; where it is about MACs with that behind it."""
        return self.part.share.where + (" macs" if self.cost == "macs" else "")

    @property
    def what(self) -> str:
        """What the budget is about, for messages."""
        return f"{self.cost} of {self.part.share.where}"

    def expected_share(self) -> Tensor:
        """Share of the part's cost that is expected to stay, a differentiable scalar."""
        return self.part.expected()


SURE = 20.0
"""Location of a gate for good: a draw is neither 0 nor 1 with a chance of 1e-8, and no gradient moves it."""
UNDECIDED = 1.1
"""Expected over allowed cost at the end, from which on meeting the target is worth a warning."""
ROOM, PASSED_OVER = 0.95, 20
"""Share of the target below which gates may be passed over, and how many at most."""
TRIES, ENOUGH = 100, 0.999
"""Gates below the common level that may be tried one by one, and the share of the target that ends it."""
MARGIN = 1e-3
"""How far from P(z > 0) = 1/2 a gate is put that is opened or shut, in units of P(z > 0)."""


@torch.no_grad()
def meet_(accountant: Accountant, cost: Exact, kept: float, round_to: int = 1) -> float:
    """Open or shut the gates nearest to the boundary until the exact cost is as large as is allowed.

    A gate that is opened lets next to nothing through, one that is shut did so before: the output hardly
    changes. All gates are ranked by P(z > 0), and those above one common level end up open. A channel can
    cost more than what is left below the target then; the next gates in the order that cost less are opened
    instead. Ranked are the log odds of P(z > 0), since P itself rounds to 0 or 1.

    Args:
        accountant: of the network, whose gates are changed in place.
        cost: parameters or macs, or what returns the share of another cost that stays.
        kept: share of it that may stay, in (0, 1).
        round_to: gates of a layer are opened and shut so many at a time, in the order of their odds, so that
            widths are multiples of it, which kernels of today like.

    Returns:
        The share that stays; above ``kept`` only if a network with a single open gate costs more.
    """
    return _Ranked(accountant.gates, round_to).meet_(lambda: exact_share(accountant, cost), kept)


@torch.no_grad()
def meet_all_(
    accountant: Accountant,
    cost: Exact | None,
    kept: float,
    parts: Sequence[Part],
    round_to: int = 1,
    pass_over: bool = False,
) -> float:
    """Set gates so that the network and parts of it cost what they may.

    One level is common to all gates. Parts that would cost more than they may, or nearly as much, get a level
    of their own for the gates that are theirs; the others make up for it. What gates of several parts do to
    each other is undone in a few rounds. Where only parts have budgets, what training has shut of them beyond
    that, such as the width that they share with the rest, is opened again as far as they allow.

    Args:
        accountant: of the network, whose gates are changed in place.
        cost: of the network, see ``meet_``; None if only parts have budgets.
        kept: share of it that may stay.
        parts: with budgets of their own.
        round_to: see ``meet_``.
        pass_over: whether all gates were open before, so that any may stay so: where without the gate that
            is shut last, such as that of a whole block, much less would be left than may be, it stays open,
            and the next ones are shut instead. Else only gates that training has left open.

    Returns:
        The share of the network's cost that stays; 1 without one.
    """
    ranked = _Ranked(accountant.gates, round_to)
    held: list[Part] = []

    def whole() -> float:
        return 1.0 if cost is None else exact_share(accountant, cost)

    def meet_whole() -> None:
        if cost is not None:
            movable = _without([part.own for part in held], accountant.gates)
            ranked.meet_passing_over_(whole, kept, movable, -math.inf if pass_over else 0.0)

    for _ in range(ROUNDS if parts else 1):
        meet_whole()
        tight = [part for part in parts if cost is None or part.exact() > part.share.kept / UNDECIDED]
        held += [part for part in tight if part not in held]
        for i, part in enumerate(held):
            ranked.meet_(part.exact, part.share.kept, _less(part.own, [p.own for p in held[:i]]))
    meet_whole()
    for part, gates in [(one, gates) for one in parts for gates in (one.own, one.touched)]:
        if part.exact() > part.share.kept:
            ranked.meet_(part.exact, part.share.kept, ranked.open_among(gates))
    if cost is not None and whole() > kept:
        ranked.meet_(whole, kept, ranked.open_among(_without([], accountant.gates)))
    if cost is None and parts:
        fullest = functools.partial(_fullest, parts)
        ranked.meet_(fullest, 1.0, ranked.shut_among(_any_of([part.touched for part in parts])))
    return whole()


def _fullest(parts: Sequence[Part]) -> float:
    """The largest share that a part has of what it may cost."""
    return max(part.exact() / part.share.kept for part in parts)


def _blocks(odds: Tensor, size: int) -> list[Tensor]:
    """Positions of the gates of a layer that are opened and shut together; weights have gates each alone."""
    order = odds.flatten().argsort(descending=True)
    return list(order.split(size if odds.dim() == 1 else 1))


def _common(odds: Tensor, blocks: list[Tensor]) -> Tensor:
    """Give all gates of a block their mean odds; the order of blocks is that of their gates."""
    common = odds.flatten().clone()
    for block in blocks:
        if len(block) > 1:
            common[block] = common[block].mean()
    return common.view_as(odds)


ROUNDS = 4
"""In which gates that several parts share are balanced."""
Places = Sequence[Tensor]
"""For each gate which of its places are meant."""


def _without(taken: Sequence[Places], gates: Sequence[HardConcrete]) -> Places:
    """All places but some."""
    everything = [torch.ones_like(gate.log_alpha, dtype=torch.bool) for gate in gates]
    return _less(everything, taken)


def _any_of(places: Sequence[Places]) -> Places:
    return [torch.stack(own).any(0) for own in zip(*places, strict=True)]


def _less(places: Places, taken: Sequence[Places]) -> Places:
    for others in taken:
        places = [own & ~other for own, other in zip(places, others, strict=True)]
    return places


class _Ranked:
    """Gates in the order in which they are open, as training has left them.

    Args:
        gates: of a network; changed in place.
        round_to: see ``meet_``.

    Attributes:
        level: log odds of the gates that ``meet_`` shut last; -inf if it shut none.
    """

    def __init__(self, gates: Sequence[HardConcrete], round_to: int = 1) -> None:
        self.gates = gates
        shapes = [(g.temperature, g.gamma, g.zeta) for g in gates]
        pairs = list(zip(gates, shapes, strict=True))
        odds = [g.log_alpha.double() - shift(*shape) for g, shape in pairs]
        self.blocks = [_blocks(o, round_to) for o in odds]
        self.odds = [_common(o, block) for o, block in zip(odds, self.blocks, strict=True)]
        self.opened = [g.log_alpha.clamp(min=log_alpha_at(0.5 + MARGIN, *shape)) for g, shape in pairs]
        self.shut = [g.log_alpha.clamp(max=log_alpha_at(0.5 - MARGIN, *shape)) for g, shape in pairs]
        self.level = -math.inf

    def open_among(self, places: Places) -> Places:
        """Those of some places that are open now."""
        return [own & (g.median() > 0) for own, g in zip(places, self.gates, strict=True)]

    def shut_among(self, places: Places) -> Places:
        """Those of some places that are shut now."""
        return [own & (g.median() <= 0) for own, g in zip(places, self.gates, strict=True)]

    def meet_(self, share: Callable[[], float], kept: float, movable: Places | None = None) -> float:
        """Put a level between the gates until a share is as large as is allowed, and return it.

        Args:
            share: of a cost that stays now.
            kept: share of it that may stay.
            movable: the gates that may be set; all if None.
        """
        movable = _without([], self.gates) if movable is None else movable
        ranked = torch.cat(
            [odds.where(own, math.inf).flatten() for odds, own in zip(self.odds, movable, strict=True)]
        )
        levels = sorted(set(ranked[ranked < math.inf].tolist()))
        if not levels:
            return share()

        def at(num_shut: int) -> float:
            self._put(levels[num_shut - 1] if num_shut else -math.inf, movable)
            return share()

        # More shut levels never cost more: the first number of them that is cheap enough.
        num_shut = bisect.bisect_left(range(len(levels)), True, key=lambda n: at(n) <= kept)
        whole = all(bool(own.all()) for own in movable)  # of a whole network some gate stays open
        num_shut = min(num_shut, len(levels) - 1) if whole else num_shut
        reached = at(num_shut)
        self.level = levels[num_shut - 1] if num_shut else -math.inf
        if num_shut == 0:
            return reached
        below = ranked.where(ranked <= levels[num_shut - 1], -math.inf).topk(min(TRIES, len(ranked)))
        candidates = below.indices[below.values > -math.inf].tolist()
        return self._fill(share, kept, reached, candidates, movable)

    def meet_passing_over_(
        self, share: Callable[[], float], kept: float, movable: Places, least: float
    ) -> float:
        """The same; the last gate that is shut stays open while without it much less is left than may be.

        The next ones in the order are shut instead, if more of what may be is left then.

        Args:
            share: of a cost that stays now.
            kept: share of it that may stay.
            movable: the gates that may be set.
            least: log odds above which a gate may stay open.
        """
        reached = self.meet_(share, kept, movable)
        best, found = [gate.log_alpha.clone() for gate in self.gates], reached
        for _ in range(PASSED_OVER):
            if found >= ROOM * kept or reached > kept or self.level <= least:
                break
            last = [own & (odds == self.level) for own, odds in zip(movable, self.odds, strict=True)]
            for gate, opened, own in zip(self.gates, self.opened, last, strict=True):
                gate.log_alpha.copy_(torch.where(own, opened, gate.log_alpha))
            movable = _less(movable, [last])
            reached = self.meet_(share, kept, movable)
            if found < reached <= kept:
                best, found = [gate.log_alpha.clone() for gate in self.gates], reached
        for gate, location in zip(self.gates, best, strict=True):
            gate.log_alpha.copy_(location)
        return found

    def _put(self, level: float, movable: Places) -> None:
        """Open what is above a level, and shut what is not."""
        for gate, odds, opened, shut, own in zip(
            self.gates, self.odds, self.opened, self.shut, movable, strict=True
        ):
            value = torch.where(odds > level, opened, shut)
            gate.log_alpha.copy_(torch.where(own, value, gate.log_alpha))

    def _fill(
        self,
        share: Callable[[], float],
        kept: float,
        reached: float,
        candidates: Sequence[int],
        movable: Places,
    ) -> float:
        """Open gates, in this order, that fit between the share that is reached and the one allowed.

        Args:
            share: of a cost that stays now.
            kept: share of it that may stay.
            reached: share of it that stays now.
            candidates: positions of shut gates in all gates' log_alpha, end to end.
            movable: the gates that may be set.

        Returns:
            The share that stays then.
        """
        starts = list(itertools.accumulate((g.log_alpha.numel() for g in self.gates), initial=0))
        of = [{int(p): block for block in own for p in block} for own in self.blocks]
        tried: set[tuple[int, int]] = set()
        for candidate in candidates:
            if reached >= ENOUGH * kept:
                break
            i = bisect.bisect_right(starts, candidate) - 1
            together = of[i][candidate - starts[i]]
            together = together[movable[i].flatten()[together]]
            if (i, int(together[0])) in tried:
                continue
            tried.add((i, int(together[0])))
            log_alpha = self.gates[i].log_alpha.view(-1)
            before = log_alpha[together].clone()
            log_alpha[together] = self.opened[i].view(-1)[together]
            larger = share()
            if reached < larger <= kept:
                reached = larger
            else:
                log_alpha[together] = before
        return reached


def exact_share(accountant: Accountant, cost: Exact) -> float:
    """Return the share of the parameters or MACs that compaction leaves, with the gates as they are."""
    if not isinstance(cost, str):
        return cost()
    if cost == "parameters":
        return 1.0 - accountant.exact_sparsity()
    return accountant.exact_macs() / accountant.macs


@torch.no_grad()
def least_share(accountant: Accountant, cost: Exact) -> float:
    """Return the share of a cost that stays with every gate shut: what gates cannot take.

    Args:
        accountant: of the network, whose gates are as before afterwards.
        cost: parameters or macs, or what returns the share of another cost that stays.
    """
    before = [gate.log_alpha.clone() for gate in accountant.gates]
    try:
        for gate in accountant.gates:
            gate.log_alpha.fill_(-math.inf)
        return exact_share(accountant, cost)
    finally:
        for gate, location in zip(accountant.gates, before, strict=True):
            gate.log_alpha.copy_(location)


def check_reachable(accountant: Accountant, cost: str, kept: float) -> None:
    """Check that a network can be as small as it is to be.

    Args:
        accountant: of the network.
        cost: parameters or macs.
        kept: share of it that may stay.

    Raises:
        InputError: with every gate shut more stays.
    """
    least = least_share(accountant, cost)
    if kept < least:
        given = f"target_macs={kept:g}" if cost == "macs" else f"target_sparsity={1 - kept:g}"
        raise InputError(
            f"{given} cannot be met: with every gate shut {least:.2%} of the {cost} stay; give"
            f" {'target_macs of more than that' if cost == 'macs' else f'at most {1 - least:.4f}'}, or let"
            " more families or layers go"
        )
