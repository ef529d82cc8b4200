"""Budgets that are met exactly: gates are opened or shut until the network costs as much as it may."""

import bisect
import itertools
import math

import torch
from torch import Tensor

from sparsereg.compression.count import Accountant
from sparsereg.distributions import log_alpha_at, shift

TRIES, ENOUGH = 100, 0.999
"""Gates below the common level that may be tried one by one, and the share of the target that ends it."""
MARGIN = 1e-3
"""How far from P(z > 0) = 1/2 a gate is put that is opened or shut, in units of P(z > 0)."""


@torch.no_grad()
def meet_(accountant: Accountant, cost: str, kept: float) -> float:
    """Open or shut the gates nearest to the boundary until the exact cost is as large as is allowed.

    A gate that is opened lets next to nothing through, one that is shut did so before: the output hardly
    changes. All gates are ranked by P(z > 0), and those above one common level end up open. A channel can
    cost more than what is left below the target then; the next gates in the order that cost less are opened
    instead. Ranked are the log odds of P(z > 0), since P itself rounds to 0 or 1.

    Args:
        accountant: of the network, whose gates are changed in place.
        cost: parameters or macs.
        kept: share of it that may stay, in (0, 1).

    Returns:
        The share that stays; above ``kept`` only if a network with a single open gate costs more.
    """
    gates = accountant.gates
    shapes = [(g.temperature, g.gamma, g.zeta) for g in gates]
    odds = [g.log_alpha.double() - shift(*shape) for g, shape in zip(gates, shapes, strict=True)]
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
    return _fill_(accountant, cost, kept, reached, candidates, opened)


def _fill_(
    accountant: Accountant,
    cost: str,
    kept: float,
    reached: float,
    candidates: list[int],
    opened: list[Tensor],
) -> float:
    """Open single gates, in this order, that fit between the share that is reached and the one allowed.

    Args:
        accountant: of the network, whose gates are changed in place.
        cost: parameters or macs.
        kept: share of it that may stay.
        reached: share of it that stays now.
        candidates: positions of shut gates in all gates' log_alpha, end to end.
        opened: each gate's log_alpha when it is open, of its shape.

    Returns:
        The share that stays then.
    """
    gates = accountant.gates
    starts = list(itertools.accumulate((g.log_alpha.numel() for g in gates), initial=0))
    for candidate in candidates:
        if reached >= ENOUGH * kept:
            break
        i = bisect.bisect_right(starts, candidate) - 1
        position = candidate - starts[i]
        log_alpha = gates[i].log_alpha.view(-1)
        before = log_alpha[position].clone()
        log_alpha[position] = opened[i].view(-1)[position]
        larger = exact_share(accountant, cost)
        if reached < larger <= kept:
            reached = larger
        else:
            log_alpha[position] = before
    return reached


def exact_share(accountant: Accountant, cost: str) -> float:
    """Return the share of the parameters or MACs that compaction leaves, with the gates as they are."""
    if cost == "parameters":
        return 1.0 - accountant.exact_sparsity()
    return accountant.count().compacted_macs / accountant.macs
