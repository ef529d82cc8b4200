"""A trained network whose units stand in the order in which they go, for networks of any size of it."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from sparsereg.compression.budget import Budget, meet_all_
from sparsereg.compression.compact import compact, twin
from sparsereg.compression.count import Accountant
from sparsereg.compression.oneshot.answers import check_answers, unexplained
from sparsereg.compression.oneshot.importance import IMPORTANCE
from sparsereg.compression.oneshot.inputs import some_of, together
from sparsereg.compression.oneshot.leftover import WAYS, leftover
from sparsereg.compression.oneshot.origins import OPEN, Origins
from sparsereg.compression.oneshot.repair import Student, Teacher, enough
from sparsereg.compression.running import evaluating
from sparsereg.compression.units.explain import inputs_of
from sparsereg.compression.units.structure import structure_of
from sparsereg.distributions import HardConcrete, log_alpha_at, shift
from sparsereg.penalties import hard_concretes
from sparsereg.progress import doing
from sparsereg.target_settings import Share

log = logging.getLogger(__name__)

FOR_IMPORTANCE = 512
"""Inputs that importance is read off."""
LEFTOVER = "leftover"
"""The importance that knows of the repair."""
CLEARLY = 1.1
"""How many times as much of the answers the first order may lose as another one, which may empty layers."""
LEVELS = (0.2, 0.4, 0.6, 0.8)
"""P(z > 0) of all gates at which it is asked what units take in time."""
NEARLY_OPEN = 0.999
"""Median of gates at which derivatives are taken; at 1 itself the gates do not move."""


Measured = Callable[[Accountant, Any], Budget]
"""What makes the budget of a network, given what counts it and an example on the CPU."""
POOR = 0.5
"""Share of the answers' variance from which on its loss is said."""


@dataclass(frozen=True)
class _Found:
    """A way to a size.

    Attributes:
        way: number of the order.
        reached: share of the cost that stays.
        locations: of the gates.
        student: what they leave.
    """

    way: int
    reached: float
    locations: list[Tensor]
    student: Student


def _clearly(left: Sequence[float], places: Sequence[int]) -> int:
    """Which of some places has clearly least left, the first of them otherwise."""
    best = min(places, key=left.__getitem__)
    return best if left[places[0]] > CLEARLY * left[best] else places[0]


class Ranked:
    """Says which units of a network are worth least for what they cost, once for all sizes.

    The order is that of the Lagrangian, worth - multiplier * E[cost], whose multiplier grows: of each gate
    the worth over the slope of the expected cost. Of ``leftover`` there are two orders: at each size the
    second is taken where the answers after it are clearly nearer to the whole network's, see ``CLEARLY``.
    Units that no layer sums over, such as blocks, have a place in them by their ``gradient`` alone: where
    some of them go, the size is also made with them going last.
    Whoever makes more sizes, each from the one before, may keep to the one that was clearly nearer once.

    Args:
        network: with gates, all wide open; left as it is.
        example: see ``compact``.
        cost: parameters or macs; None where only parts have budgets, whose parameters count then.
        batches: of inputs, without labels.
        importance: a key of ``IMPORTANCE``, or ``leftover``, which asks for gates that ``gate`` has placed:
            with gates of the author's own it is ``gradient``.
        seed: of what is drawn.
        shares: what parts of the network may cost.
        order: of the two of ``leftover`` the only one to be found, 0 or 1; None finds both.
        measured: makes the budget that is met instead of a cost.
        plain: the network without gates, if it is a compacted one.

    Attributes:
        order: the one that was given, or was clearly nearer at the last size; None as long as none was.
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
        order: int | None = None,
        measured: Measured | None = None,
        plain: fx.GraphModule | None = None,
    ) -> None:
        self.example, self.cost, self.seed, self.order = example, cost, seed, order
        with evaluating(network):
            self.whole = twin(network)
        self._teacher = Teacher(self.whole, example, plain)  # what it finds out once, all copies know
        some = enough(self._teacher.network, batches)
        self.batches = together(some)
        self._few = some_of(some, FOR_IMPORTANCE)
        self._met = twin(self.whole)
        self._accountant = Accountant(self._met, example)
        self._measured = None if measured is None else measured(self._accountant, _on_cpu(example))
        self._parts = [held.part for held in Budget(self._accountant, cost, 1.0, 0.0, 0.0, shares).parts]
        ratios, unseen = self._ratios(importance, torch.Generator().manual_seed(seed))
        gates = self._accountant.gates
        self._orders = [_places(ratio, gates) for ratio in ratios]
        self._unseen = unseen.split([g.log_alpha.numel() for g in gates])
        spared = ratios if unseen.any() and measured is None else []
        self._sparing = [_places(torch.where(unseen, r + r.max() - r.min() + 1, r), gates) for r in spared]

    @property
    def sizes(self) -> dict[str, int]:
        """Parameters and MACs of the whole network."""
        return {"parameters": self._accountant.parameters, "macs": self._accountant.macs}

    @property
    def origins(self) -> Origins:
        """Where weights of compacted networks stand in the whole one; traced when it is asked for."""
        return self._teacher.origins

    def smaller(
        self, kept: float, at_once: int = 1, round_to: int = 1, repair: bool = True
    ) -> tuple[nn.Module, fx.GraphModule]:
        """Shut the gates that go first until a budget is met exactly, compact, and fit what is left.

        That is done in each order, and again with units that no layer sums over last if some of them went;
        what is returned answers most like the whole network to the inputs.

        Args:
            kept: share of the cost that may stay.
            at_once: gates of a layer go so many at a time, see ``round_to`` of ``meet_``.
            round_to: see ``compact``.
            repair: fit what is left to what the whole network gave.

        Returns:
            The network in eval mode, its gates all wide open or shut, which the next call changes; and what
            is left of it, compacted.
        """
        gates = self._accountant.gates
        found: list[_Found] = []
        for way, places in self._ways():
            reached = self._meet_(places, kept, at_once)
            now = [g.log_alpha.clone() for g in gates]
            if not any(all(map(torch.equal, now, other.locations)) for other in found):
                found.append(_Found(way, reached, now, self._student(round_to, repair)))
        if repair:
            self._teacher.repair_([f.student for f in found], self.batches, self.seed)
        chosen = found[self._nearest(found)]
        for g, location in zip(gates, chosen.locations, strict=True):
            _set_(g, location)
        what = "milliseconds" if self._measured else self.cost or "whole network"
        log.info("%.1f %% of the %s stay", 100 * chosen.reached, what)
        return self._met, chosen.student.network

    def warn(self, small: nn.Module) -> None:
        """Say so where a smaller network's answers have little to do with those of the whole one."""
        (lost,) = unexplained(self._teacher.network, [small], together(self._few))
        if lost > POOR:
            log.warning(
                "the smaller network keeps little of what the network says: %.0f %% of the variance of its"
                " answers is lost on these inputs; give a larger target, or train it further",
                100 * lost,
            )

    def _meet_(self, places: Sequence[Tensor], kept: float, at_once: int) -> float:
        """Open or shut all gates, in an order; return the share of the cost that stays."""
        gates = self._accountant.gates
        for g, place in zip(gates, places, strict=True):
            _set_(g, place)
        if self._measured is None:
            reached = meet_all_(self._accountant, self.cost, kept, self._parts, at_once, pass_over=True)
        else:
            self._measured.meet()
            reached = self._measured.exact_share()
        for g in gates:
            _set_(g, torch.where(g.median() > 0, OPEN, -OPEN))
        return reached

    def _student(self, round_to: int, repair: bool) -> Student:
        """What the gates leave; where its weights stand is known if they are to be repaired."""
        if repair:
            return self._teacher.student(self._met, round_to)
        return Student(compact(self._met, self.example, round_to=round_to), {})

    def _ways(self) -> Iterator[tuple[int, list[Tensor]]]:
        """The orders, by their numbers; again with units that no layer sums over last, where some went."""
        for way, places in enumerate(self._orders):
            yield way, places
            shut = zip(self._accountant.gates, self._unseen, strict=True)
            if self._sparing and any(bool((g.log_alpha.flatten() < 0)[own].any()) for g, own in shut):
                yield way, self._sparing[way]

    def _nearest(self, found: Sequence[_Found]) -> int:
        """Which of some networks answers most like the whole one, its place; the first unless clearly."""
        if len(found) == 1:
            return 0
        networks = [f.student.network for f in found]
        left = unexplained(self._teacher.network, networks, together(self._few))
        shown = ", ".join(f"{share:.3g}" for share in left)
        log.info("shares of the answers' variance that are lost in each order: %s", shown)
        ways: dict[int, list[int]] = {}
        for place, f in enumerate(found):
            ways.setdefault(f.way, []).append(place)
        best = [_clearly(left, own) for own in ways.values()]
        if len(best) == 1:
            return best[0]
        least = min(best, key=left.__getitem__)
        self.order = best.index(least) if max(left[i] for i in best) > CLEARLY * left[least] else None
        return best[self.order or 0]

    def _ratios(self, importance: str, generator: torch.Generator) -> tuple[list[Tensor], Tensor]:
        """In each order, what each gate's unit is worth for its cost, or when it goes; (gates,).

        And which units have no place in the orders but by what they are worth: no layer sums over them, as
        over blocks.
        """
        network, gates = self._met, self._accountant.gates
        for g in gates:
            inside = (NEARLY_OPEN - g.gamma) / (g.zeta - g.gamma)
            _set_(g, torch.full_like(g.log_alpha, g.temperature * math.log(inside / (1 - inside))))
        own = {id(g.log_alpha) for g in gates}
        frozen = [p for p in network.parameters() if p.requires_grad and id(p) not in own]
        for p in frozen:
            p.requires_grad_(False)
        slopes = self._slopes()
        orders, known = self._leftover(slopes) if importance == LEFTOVER else ([], None)
        if not orders:  # else they were looked at already
            check_answers(self._teacher.network, self.batches)
        if not orders or bool(orders[0].isnan().any()):
            by_worth = "gradient" if importance == LEFTOVER else importance
            with doing(f"what units are worth by {by_worth}"):
                worth = known or IMPORTANCE[by_worth](network, gates, self._few, generator)
            ratio = torch.cat(
                [(w / s.double().clamp(min=1e-12)).flatten() for w, s in zip(worth, slopes, strict=True)]
            )
            unseen = orders[0].isnan().to(ratio.device) if orders else torch.zeros_like(ratio).bool()
            orders = [_with_likes(order.to(ratio.device), ratio) for order in orders] or [ratio]
        else:
            unseen = torch.zeros_like(orders[0]).bool()
        for p in frozen:
            p.requires_grad_(True)
        return orders, unseen

    def _slopes(self) -> list[Tensor]:
        """What each gate's unit costs: the slope of the expected cost by its gate."""
        locations = [g.log_alpha for g in self._accountant.gates]
        if self._measured is None:
            macs = self.cost == "macs"
            expected = self._accountant.expected_macs() if macs else self._accountant.expected_parameters()
            return list(torch.autograd.grad(expected, locations))
        # Times are the same for several widths in a row: the mean slope on the way down has none of that.
        before = [location.detach().clone() for location in locations]
        slopes = [torch.zeros_like(location) for location in locations]
        for level in LEVELS:
            for g in self._accountant.gates:
                _set_(g, torch.full_like(g.log_alpha, log_alpha_at(level, g.temperature, g.gamma, g.zeta)))
            found = torch.autograd.grad(self._measured.expected_share(), locations, allow_unused=True)
            slopes = [s if f is None else s + f for s, f in zip(slopes, found, strict=True)]
        for g, location in zip(self._accountant.gates, before, strict=True):
            _set_(g, location)
        return slopes

    def _leftover(self, slopes: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor] | None]:
        """The orders in which a repair misses units least; NaN for those that no layer sums over.

        Args:
            slopes: what each gate's unit costs.

        Returns:
            And what each gate's unit is worth, where that is found on the way.
        """
        structure = structure_of(self._met, *inputs_of(self.example))
        if structure is None:
            return [], None
        costs = dict(zip(structure.paths, slopes, strict=True))
        ways = range(WAYS) if self.order is None else [self.order]
        few, whole = self._few, self._teacher.network
        orders, worth = leftover(whole, structure, self.batches, few, costs, ways, self._met)
        if not orders:
            log.info("no layers, or too wide ones, to say what a repair would leave over: ranked by gradient")
        found = [torch.cat([order[path] for path in structure.paths]) for order in orders]
        return found, None if worth is None else [
            w.view_as(s) for w, s in zip(worth.split([s.numel() for s in slopes]), slopes, strict=True)
        ]


def opened_(network: nn.Module) -> nn.Module:
    """Open all gates of a network wide; return it."""
    for g in hard_concretes(network).values():
        _set_(g, torch.full_like(g.log_alpha, OPEN))
    return network


def _places(ratio: Tensor, gates: Sequence[HardConcrete]) -> list[Tensor]:
    """Locations of gates that stand in an order.

    Args:
        ratio: grows with the order, (gates,).
        gates: of a network.
    """
    ratio = ratio.to(gates[0].log_alpha.device)
    rank = torch.empty_like(ratio)
    rank[ratio.argsort()] = torch.linspace(-OPEN, OPEN, len(ratio), dtype=rank.dtype, device=rank.device)
    own = rank.split([g.log_alpha.numel() for g in gates])
    return [
        p.view_as(g.log_alpha) + shift(g.temperature, g.gamma, g.zeta)
        for g, p in zip(gates, own, strict=True)
    ]


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


def _on_cpu(example: Any) -> Any:
    return torch.utils._pytree.tree_map(lambda x: x.cpu() if isinstance(x, Tensor) else x, example)


@torch.no_grad()
def _set_(gate: HardConcrete, log_alpha: Tensor) -> None:
    gate.log_alpha.copy_(log_alpha)
