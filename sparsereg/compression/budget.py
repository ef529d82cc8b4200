"""What a network may cost: a multiplier that holds the expected cost, and gates set to meet the exact one.

Minimise the task loss subject to E[cost] <= target, where E[cost] is the expected number of parameters
(or MACs) of the compacted network, see ``Accountant``. The Lagrangian is

    loss + multiplier * log(E[cost] / target(t))

with a target that falls geometrically from the whole network to the one asked for, and a
proportional-integral multiplier. A purely integral one overshoots: it has grown while the ramp fell, and
goes on closing gates after the constraint holds. Here the integral starts again from zero then.
"""

import bisect
import itertools
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparsereg.compression.count import Accountant
from sparsereg.distributions import log_alpha_at, shift

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
    """

    multiplier: float
    violation: float
    gradients: list[tuple[Tensor, Tensor]]
    scalars: dict[str, float]

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
        return bool(own)

    def penalty(self) -> Tensor:
        """Return multiplier * log(E[cost] / target), a scalar: the value and the gradient measured last."""
        linear = torch.stack([(log_alpha * gradient).sum() for log_alpha, gradient in self.gradients]).sum()
        return self.multiplier * (self.violation + linear - linear.detach())


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
        cost: one of ``COSTS``; a class below may name another.
        kept: share of it that may stay in the end, in (0, 1).
        proportional_gain: of the multiplier.
        integral_gain: of the multiplier.
        round_to: see ``meet_``.

    Attributes:
        constraint: as it was measured last; None before.
        multiplier: of the constraint.
        met: whether the gates have been set to the exact count since ``measure`` was called.
    """

    def __init__(
        self,
        accountant: Accountant,
        cost: str,
        kept: float,
        proportional_gain: float,
        integral_gain: float,
        round_to: int = 1,
    ) -> None:
        self.accountant = accountant
        self.round_to = round_to
        self.cost = cost
        self.kept = kept
        self.multiplier = Multiplier(proportional_gain, integral_gain)
        self.constraint: Constraint | None = None
        self.met = False

    def expected_share(self) -> Tensor:
        """Share of the cost that is expected to stay, differentiable in every log_alpha; a scalar."""
        if self.cost == "parameters":
            return self.accountant.expected_parameters() / self.accountant.parameters
        return self.accountant.expected_macs() / self.accountant.macs

    def measure(self, allowed: float, steps: int = 1) -> Constraint:
        """Compare the expected cost with what is allowed now, and move the multiplier.

        Args:
            allowed: share of the cost, in (0, 1].
            steps: of the optimizer for which the result will be used.
        """
        expected = self.expected_share()
        locations = [gate.log_alpha for gate in self.accountant.gates]
        gradients = torch.autograd.grad(expected.log(), locations, allow_unused=True)
        share = float(expected.detach())
        violation = math.log(share / allowed)
        multiplier = self.multiplier.update(violation, steps)
        self.met = False
        self.constraint = Constraint(
            multiplier,
            violation,
            [(a, g) for a, g in zip(locations, gradients, strict=True) if g is not None],
            {"lambda_target": multiplier, "target_kept": allowed, "expected_kept": share},
        )
        return self.constraint

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
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what ``state_dict`` returned.

        Raises:
            ValueError: it is of other gates.
        """
        locations = [gate.log_alpha for gate in self.accountant.gates]
        pairs: list[tuple[Tensor, Tensor]] = []
        for place, gradient in state["gradients"].items():
            at = int(place)
            shape = locations[at].shape if 0 <= at < len(locations) else None
            value = torch.as_tensor(gradient)
            if value.shape != shape:
                raise ValueError(
                    f"this state is of other gates: its gate {at} has {tuple(value.shape)} places"
                )
            pairs.append((locations[at], value.to(locations[at])))
        self.multiplier.integral = float(state["integral"])
        self.constraint = None
        if state["multiplier"] is not None:
            scalars = {name: float(value) for name, value in state["scalars"].items()}
            self.constraint = Constraint(
                float(state["multiplier"]), float(state["violation"]), pairs, scalars
            )

    def meet(self) -> None:
        """Open or shut the gates nearest to the boundary, so that the exact cost is what is allowed."""
        with torch.no_grad():
            share = float(self.expected_share())
        if share > UNDECIDED * self.kept:
            log.warning(
                "the gates have not come near the target: %.1f %% of the %s are expected to stay, %.1f %% "
                "may; the rest is cut off now, which costs accuracy. Train longer, or let the gates learn "
                "faster (optimizer.gate_lr_ratio of train.py, gate_lr)",
                100 * share,
                self.cost,
                100 * self.kept,
            )
        meet_(self.accountant, self.cost, self.kept, self.round_to)
        self.met = True


UNDECIDED = 1.1
"""Expected over allowed cost at the end, from which on meeting the target is worth a warning."""
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
    gates = accountant.gates
    shapes = [(g.temperature, g.gamma, g.zeta) for g in gates]
    odds = [g.log_alpha.double() - shift(*shape) for g, shape in zip(gates, shapes, strict=True)]
    blocks = [_blocks(o, round_to) for o in odds]
    odds = [_common(o, block) for o, block in zip(odds, blocks, strict=True)]
    opened = [
        g.log_alpha.clamp(min=log_alpha_at(0.5 + MARGIN, *shape))
        for g, shape in zip(gates, shapes, strict=True)
    ]
    shut = [
        g.log_alpha.clamp(max=log_alpha_at(0.5 - MARGIN, *shape))
        for g, shape in zip(gates, shapes, strict=True)
    ]
    ranked = torch.cat([o.flatten() for o in odds])
    levels = sorted(set(ranked.tolist()))

    def share(num_shut: int) -> float:
        """Put a level between the gates and return what stays."""
        level = levels[num_shut - 1] if num_shut else -math.inf
        for i, gate in enumerate(gates):
            gate.log_alpha.copy_(torch.where(odds[i] > level, opened[i], shut[i]))
        return exact_share(accountant, cost)

    # More shut levels never cost more: the first number of them that is cheap enough.
    num_shut = bisect.bisect_left(range(len(levels)), True, key=lambda n: share(n) <= kept)
    num_shut = min(num_shut, len(levels) - 1)
    reached = share(num_shut)
    if num_shut == 0:
        return reached
    next_below = ranked.where(ranked <= levels[num_shut - 1], -math.inf).topk(min(TRIES, len(ranked)))
    candidates = next_below.indices[next_below.values > -math.inf].tolist()
    return _fill_(accountant, cost, kept, reached, candidates, opened, blocks)


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


def _fill_(
    accountant: Accountant,
    cost: Exact,
    kept: float,
    reached: float,
    candidates: list[int],
    opened: list[Tensor],
    blocks: list[list[Tensor]],
) -> float:
    """Open gates, in this order, that fit between the share that is reached and the one allowed.

    Args:
        accountant: of the network, whose gates are changed in place.
        cost: parameters or macs, or what returns the share of another cost that stays.
        kept: share of it that may stay.
        reached: share of it that stays now.
        candidates: positions of shut gates in all gates' log_alpha, end to end.
        opened: each gate's log_alpha when it is open, of its shape.
        blocks: positions in each gate's log_alpha that are opened together.

    Returns:
        The share that stays then.
    """
    gates = accountant.gates
    starts = list(itertools.accumulate((g.log_alpha.numel() for g in gates), initial=0))
    of = [{int(p): block for block in own for p in block} for own in blocks]
    tried: set[tuple[int, int]] = set()
    for candidate in candidates:
        if reached >= ENOUGH * kept:
            break
        i = bisect.bisect_right(starts, candidate) - 1
        together = of[i][candidate - starts[i]]
        if (i, int(together[0])) in tried:
            continue
        tried.add((i, int(together[0])))
        log_alpha = gates[i].log_alpha.view(-1)
        before = log_alpha[together].clone()
        log_alpha[together] = opened[i].view(-1)[together]
        larger = exact_share(accountant, cost)
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
def least_share(accountant: Accountant, cost: str) -> float:
    """Return the share of the parameters or MACs that stays with every gate shut: what gates cannot take.

    Args:
        accountant: of the network, whose gates are as before afterwards.
        cost: parameters or macs.
    """
    before = [gate.log_alpha.clone() for gate in accountant.gates]
    try:
        for gate in accountant.gates:
            gate.log_alpha.fill_(-math.inf)
        return exact_share(accountant, cost)
    finally:
        for gate, location in zip(accountant.gates, before, strict=True):
            gate.log_alpha.copy_(location)
