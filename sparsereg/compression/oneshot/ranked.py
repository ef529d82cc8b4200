"""A trained network whose units stand in the order in which they go, for networks of any size of it."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from sparsereg.compression.budget import Budget, meet_all_
from sparsereg.compression.compact import compact, twin
from sparsereg.compression.count import Accountant
from sparsereg.compression.oneshot.importance import IMPORTANCE
from sparsereg.compression.oneshot.inputs import together
from sparsereg.compression.oneshot.leftover import leftover
from sparsereg.compression.oneshot.origins import OPEN, Origins
from sparsereg.compression.oneshot.repair import repaired
from sparsereg.compression.running import evaluating
from sparsereg.compression.units.explain import inputs_of
from sparsereg.compression.units.structure import structure_of
from sparsereg.distributions import HardConcrete, shift
from sparsereg.goal import Share
from sparsereg.penalties import hard_concretes

log = logging.getLogger(__name__)

BATCH = 64
"""Inputs of one step."""
FOR_IMPORTANCE = 512
"""Inputs that importance is read off."""
LEFTOVER = "leftover"
"""The importance that knows of the repair."""
NEARLY_OPEN = 0.999
"""Median of gates at which derivatives are taken; at 1 itself the gates do not move."""


class Ranked:
    """Says which units of a network are worth least for what they cost, once for all sizes.

    The order is that of the Lagrangian, worth - multiplier * E[cost], whose multiplier grows: of each gate
    the worth over the slope of the expected cost.

    Args:
        network: with gates, all wide open; left as it is.
        example: see ``compact``.
        cost: parameters or macs; None where only parts have budgets, whose parameters count then.
        batches: of inputs, without labels.
        importance: a key of ``IMPORTANCE``, or ``leftover``, which asks for gates that ``gate`` has placed:
            with gates of the author's own it is ``gradient``.
        seed: of what is drawn.
        shares: what parts of the network may cost.
    """

    def __init__(
        self,
        network: nn.Module,
        example: Any,
        cost: str | None,
        batches: Sequence[Any],
        importance: str = LEFTOVER,
        seed: int = 0,
        shares: Sequence[Share] = (),
    ) -> None:
        self.example, self.cost, self.seed = example, cost, seed
        self.batches = together(batches)
        self._few = batches[: -(-FOR_IMPORTANCE // BATCH)]
        with evaluating(network):
            self.whole = twin(network)
        compact(self.whole, example, check=False)  # what it finds out once, all copies know
        self._met = twin(self.whole)
        self._accountant = Accountant(self._met, example)
        self._parts = [held.part for held in Budget(self._accountant, cost, 1.0, 0.0, 0.0, shares).parts]
        self._origins: Origins | None = None
        ratio = self._worth(importance, torch.Generator().manual_seed(seed))
        gates = self._accountant.gates
        ratio = ratio.to(gates[0].log_alpha.device)
        rank = torch.empty_like(ratio)
        rank[ratio.argsort()] = torch.linspace(-OPEN, OPEN, len(ratio), dtype=rank.dtype, device=rank.device)
        own = rank.split([g.log_alpha.numel() for g in gates])
        self._places = [
            p.view_as(g.log_alpha) + shift(g.temperature, g.gamma, g.zeta)
            for g, p in zip(gates, own, strict=True)
        ]

    @property
    def sizes(self) -> dict[str, int]:
        """Parameters and MACs of the whole network."""
        return {"parameters": self._accountant.parameters, "macs": self._accountant.macs}

    @property
    def origins(self) -> Origins:
        """Where weights of compacted networks stand in the whole one; traced when it is asked for."""
        if self._origins is None:
            self._origins = Origins(self.whole, self.example)
        return self._origins

    def met(self, kept: float, round_to: int = 1) -> nn.Module:
        """Shut the gates that go first until a budget is met exactly.

        Args:
            kept: share of the cost that may stay.
            round_to: gates of a layer go so many at a time, see ``meet_``.

        Returns:
            The network in eval mode, its gates all wide open or shut; the next call changes it.
        """
        gates = self._accountant.gates
        for g, places in zip(gates, self._places, strict=True):
            _set_(g, places)
        reached = meet_all_(self._accountant, self.cost, kept, self._parts, round_to)
        for g in gates:
            _set_(g, torch.where(g.median() > 0, OPEN, -OPEN))
        log.info("%.1f %% of the %s stay", 100 * reached, self.cost or "whole network")
        return self._met

    def repaired(self, met: nn.Module, round_to: int = 1, progress: bool = False) -> fx.GraphModule:
        """Compact what ``met`` returned and fit it to what the whole network gave.

        Args:
            met: the network.
            round_to: see ``compact``.
            progress: show a bar on a terminal.
        """
        return repaired(
            self.whole,
            met,
            self.example,
            self.batches,
            round_to=round_to,
            seed=self.seed,
            progress=progress,
            origins=self.origins,
        )

    def _worth(self, importance: str, generator: torch.Generator) -> Tensor:
        """What each gate's unit is worth for its cost, or when it goes; (gates,)."""
        network, gates = self._met, self._accountant.gates
        for g in gates:
            inside = (NEARLY_OPEN - g.gamma) / (g.zeta - g.gamma)
            _set_(g, torch.full_like(g.log_alpha, g.temperature * math.log(inside / (1 - inside))))
        own = {id(g.log_alpha) for g in gates}
        frozen = [p for p in network.parameters() if p.requires_grad and id(p) not in own]
        for p in frozen:
            p.requires_grad_(False)
        macs = self.cost == "macs"
        expected = self._accountant.expected_macs() if macs else self._accountant.expected_parameters()
        slopes = list(torch.autograd.grad(expected, [g.log_alpha for g in gates], retain_graph=False))
        left = _leftover(network, self.example, self.batches, slopes) if importance == LEFTOVER else None
        if left is None or bool(left.isnan().any()):
            by_worth = "gradient" if importance == LEFTOVER else importance
            worth = IMPORTANCE[by_worth](network, gates, self._few, generator)
            ratio = torch.cat(
                [(w / s.double().clamp(min=1e-12)).flatten() for w, s in zip(worth, slopes, strict=True)]
            )
            left = ratio if left is None else _with_likes(left.to(ratio.device), ratio)
        for p in frozen:
            p.requires_grad_(True)
        return left


def opened_(network: nn.Module) -> nn.Module:
    """Open all gates of a network wide; return it."""
    for g in hard_concretes(network).values():
        _set_(g, torch.full_like(g.log_alpha, OPEN))
    return network


def _leftover(
    network: nn.Module, example: Any, batches: Sequence[Any], slopes: list[Tensor]
) -> Tensor | None:
    """The order in which a repair misses units least; NaN for those that no layer sums over.

    Args:
        network: with all gates open.
        example: see ``compact``.
        batches: of inputs.
        slopes: what each gate's unit costs.
    """
    structure = structure_of(network, *inputs_of(example))
    if structure is None:
        return None
    found = leftover(network, structure, example, batches, dict(zip(structure.paths, slopes, strict=True)))
    if found is None:
        log.info("layers too wide to say what a repair would leave over: units are ranked by gradient")
        return None
    return torch.cat([found[path] for path in structure.paths])


def _with_likes(order: Tensor, ratio: Tensor) -> Tensor:
    """An order in which units that have no place in it go with those that are worth as much another way.

    Args:
        order: NaN for units without a place, (gates,).
        ratio: what each is worth for its cost, another way, (gates,).
    """
    unseen = order.isnan()
    like = torch.searchsorted(ratio[~unseen].sort().values, ratio[unseen])
    order[unseen] = like.to(order) - 0.5
    return order


@torch.no_grad()
def _set_(gate: HardConcrete, log_alpha: Tensor) -> None:
    gate.log_alpha.copy_(log_alpha)
