"""A smaller network in one shot: no training, no labels, a few batches of inputs."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from sparsereg.compression.budget import Budget, meet_all_
from sparsereg.compression.compact import ORIGINAL, compact, original_size
from sparsereg.compression.count import Accountant
from sparsereg.compression.insert import Choice, gate
from sparsereg.compression.oneshot.importance import IMPORTANCE
from sparsereg.compression.oneshot.inputs import read_inputs
from sparsereg.compression.oneshot.leftover import leftover
from sparsereg.compression.oneshot.origins import OPEN
from sparsereg.compression.oneshot.repair import repaired
from sparsereg.compression.units.explain import inputs_of
from sparsereg.compression.units.structure import structure_of
from sparsereg.distributions import HardConcrete, shift
from sparsereg.errors import nearest
from sparsereg.goal import Parts, Share, goal, part_goals
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


def shrink(
    model: nn.Module,
    data: Any,
    target_macs: float | None = None,
    *,
    target_sparsity: float | None = None,
    target_params: Parts | None = None,
    target_part_macs: Parts | None = None,
    importance: str = "leftover",
    repair: bool = True,
    num_inputs: int = 2048,
    layers: Choice | None = None,
    families: str | list[str] | None = None,
    round_to: int = 1,
    seed: int = 0,
    progress: bool = True,
) -> fx.GraphModule:
    """Return a smaller network without training and without labels.

    What units are worth is read off a few batches; what is worth least for what it costs goes, until the
    budget is met exactly; then what reads units that are gone is fitted to what it gave before.

    Args:
        model: a trained network, with or without gates, or one that ``compact`` made; left as it is.
        data: inputs as the network takes them: a tensor or a dictionary with several examples, a DataLoader
            or any iterable of batches. Labels in them are left out. One example is enough to shrink, but not
            to repair.
        target_macs: share of the multiply-accumulate operations to keep, in (0, 1), of the network as it
            stands: without units whose gates are shut already.
        target_sparsity: instead, share of the parameters to remove, in (0, 1).
        target_params: shares of the parameters to remove from parts, ``{"blocks.*.mlp": 0.5}``: modules by a
            pattern of names, or families of gates. Beside a target of the whole network, or alone.
        target_part_macs: shares of the multiply-accumulate operations of parts to keep.
        importance: ``leftover``, what a repair could not make good
            (``sparsereg.compression.oneshot.leftover``; very wide networks take gradient instead), or
            ``gradient``, ``magnitude``, ``taylor`` (``sparsereg.compression.oneshot.importance``).
        repair: fit the layers that are left (``sparsereg.compression.oneshot.repair``).
        num_inputs: how many inputs of the data are used.
        layers: which layers may lose units; see ``sparsereg.gate``.
        families: which kinds of units may go; see ``sparsereg.gate``.
        round_to: see ``compact``; the budget is met before.
        seed: of what is drawn.
        progress: show a bar on a terminal.

    Returns:
        The compacted network, as ``compact`` returns it.

    Raises:
        InputError: the network cannot be traced, or there are no data.
        ValueError: an argument is outside its range, or nothing of the network can go.

    Example:
        >>> net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
        >>> shrink(net, torch.randn(64, 8), target_macs=0.5)(torch.ones(2, 8)).shape
        torch.Size([2, 3])
    """
    shares = part_goals(target_params, target_part_macs)
    cost, kept = _budget(target_macs, target_sparsity, bool(shares))
    if importance not in (known := [LEFTOVER, *IMPORTANCE]):
        raise ValueError(
            f"importance must be one of {', '.join(known)}, got {importance!r}{nearest(importance, known)}"
        )
    batches = read_inputs(model, data, num_inputs, BATCH)
    example = torch.utils._pytree.tree_map(_first, batches[0])
    plain = compact(model, example) if hard_concretes(model) else model
    whole = gate(plain, example, layers, families=families).eval()
    for found in hard_concretes(whole).values():
        _set_(found, torch.full_like(found.log_alpha, OPEN))
    met = copy.deepcopy(whole)
    draws = torch.Generator().manual_seed(seed)
    meet_by_importance_(met, example, cost, kept, batches, importance, draws, shares)
    if repair:
        small = repaired(whole, met, example, batches, round_to=round_to, seed=seed, progress=progress)
    else:
        small = compact(met, example, round_to=round_to)
    small.meta[ORIGINAL] = original_size(model) or small.meta[ORIGINAL]
    return small


def meet_by_importance_(
    network: nn.Module,
    example: Any,
    cost: str | None,
    kept: float,
    batches: Sequence[Any],
    importance: str,
    generator: torch.Generator,
    shares: Sequence[Share] = (),
    round_to: int = 1,
) -> float:
    """Shut the gates that are worth least for what they cost until a budget is met.

    The order is that of the Lagrangian, worth - multiplier * E[cost], whose multiplier grows: of each gate
    the worth over the slope of the expected cost.

    Args:
        network: in eval mode; its gates are all wide open or shut afterwards.
        example: see ``compact``.
        cost: parameters or macs; None where only parts have budgets, whose parameters count then.
        kept: share of it that may stay.
        batches: of inputs.
        importance: a key of ``IMPORTANCE``, or ``leftover``.
        generator: on the CPU.
        shares: what parts of the network may cost.
        round_to: gates of a layer go so many at a time, see ``meet_``.

    Returns:
        The share that stays.
    """
    accountant = Accountant(network, example)
    parts = [held.part for held in Budget(accountant, cost, kept, 0.0, 0.0, shares).parts]
    gates = accountant.gates
    for g in gates:
        inside = (NEARLY_OPEN - g.gamma) / (g.zeta - g.gamma)
        _set_(g, torch.full_like(g.log_alpha, g.temperature * math.log(inside / (1 - inside))))
    own = {id(g.log_alpha) for g in gates}
    frozen = [p for p in network.parameters() if p.requires_grad and id(p) not in own]
    for p in frozen:
        p.requires_grad_(False)
    expected = accountant.expected_macs() if cost == "macs" else accountant.expected_parameters()
    slopes = list(torch.autograd.grad(expected, [g.log_alpha for g in gates], retain_graph=False))
    some = batches[: -(-FOR_IMPORTANCE // BATCH)]
    by_worth = "gradient" if importance == LEFTOVER else importance
    worth = IMPORTANCE[by_worth](network, gates, some, generator)
    ratio = torch.cat(
        [(w / s.double().clamp(min=1e-12)).flatten() for w, s in zip(worth, slopes, strict=True)]
    )
    if importance == LEFTOVER:
        ratio = _by_leftover(network, example, batches, slopes, ratio)
    for p in frozen:
        p.requires_grad_(True)
    rank = torch.empty_like(ratio)
    rank[ratio.argsort()] = torch.linspace(-OPEN, OPEN, len(ratio), dtype=rank.dtype, device=rank.device)
    for g, own in zip(gates, rank.split([g.log_alpha.numel() for g in gates]), strict=True):
        _set_(g, own.view_as(g.log_alpha) + shift(g.temperature, g.gamma, g.zeta))
    reached = meet_all_(accountant, cost, kept, parts, round_to)
    for g in gates:
        _set_(g, torch.where(g.median() > 0, OPEN, -OPEN))
    log.info("%.1f %% of the %s stay", 100 * reached, cost or "whole network")
    return reached


def _by_leftover(
    network: nn.Module, example: Any, batches: Sequence[Any], slopes: list[Tensor], ratio: Tensor
) -> Tensor:
    """The order in which a repair misses units least; those that no layer sums over among their likes.

    Args:
        network: with all gates open.
        example: see ``compact``.
        batches: of inputs.
        slopes: what each gate's unit costs.
        ratio: what each is worth for its cost, another way, (gates,).
    """
    structure = structure_of(network, *inputs_of(example))
    assert structure is not None  # gate() made it
    found = leftover(network, structure, example, batches, dict(zip(structure.paths, slopes, strict=True)))
    if found is None:
        log.info("layers too wide to say what a repair would leave over: units are ranked by gradient")
        return ratio
    order = torch.cat([found[path] for path in structure.paths]).to(ratio.device)
    unseen = order.isnan()
    like = torch.searchsorted(ratio[~unseen].sort().values, ratio[unseen])
    order[unseen] = like.to(order) - 0.5
    return order


def _budget(
    target_macs: float | None, target_sparsity: float | None, parts: bool
) -> tuple[str | None, float]:
    """See ``goal``; None for the cost where only parts have budgets."""
    if parts and target_macs is None and target_sparsity is None:
        return None, 1.0
    if (target_macs is None) == (target_sparsity is None):
        raise ValueError("give either target_macs, a share to keep, or target_sparsity, a share to remove")
    return goal(target_sparsity=target_sparsity, target_macs=target_macs)


@torch.no_grad()
def _set_(gate: HardConcrete, log_alpha: Tensor) -> None:
    gate.log_alpha.copy_(log_alpha)


def _first(x: Any) -> Any:
    return x[:1] if isinstance(x, Tensor) and x.dim() else x
