"""A smaller network in one shot: no training, no labels, a few batches of inputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from sparsereg.compression.compact import ORIGINAL, compact, original_size
from sparsereg.compression.insert import Choice, gate
from sparsereg.compression.oneshot.importance import IMPORTANCE
from sparsereg.compression.oneshot.inputs import BATCH, read_inputs
from sparsereg.compression.oneshot.ranked import LEFTOVER, Ranked, opened_
from sparsereg.compression.running import check_network
from sparsereg.errors import nearest
from sparsereg.penalties import hard_concretes
from sparsereg.target_settings import Parts, goal, part_goals


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
    check_network(model)
    shares = part_goals(target_params, target_part_macs)
    cost, kept = _budget(target_macs, target_sparsity, bool(shares))
    if importance not in (known := [LEFTOVER, *IMPORTANCE]):
        raise ValueError(
            f"importance must be one of {', '.join(known)}, got {importance!r}{nearest(importance, known)}"
        )
    batches = read_inputs(model, data, num_inputs, BATCH)
    example = torch.utils._pytree.tree_map(_first, batches[0])
    plain = compact(model, example) if hard_concretes(model) else model
    whole = opened_(gate(plain, example, layers, families=families).eval())
    ranked = Ranked(whole, example, cost, batches, importance, seed, shares)
    _, small = ranked.smaller(kept, round_to=round_to, repair=repair, progress=progress)
    small.meta[ORIGINAL] = original_size(model) or small.meta[ORIGINAL]
    return small


def _budget(
    target_macs: float | None, target_sparsity: float | None, parts: bool
) -> tuple[str | None, float]:
    """See ``goal``; None for the cost where only parts have budgets."""
    if parts and target_macs is None and target_sparsity is None:
        return None, 1.0
    if (target_macs is None) == (target_sparsity is None):
        raise ValueError("give either target_macs, a share to keep, or target_sparsity, a share to remove")
    return goal(target_sparsity=target_sparsity, target_macs=target_macs)


def _first(x: Any) -> Any:
    return x[:1] if isinstance(x, Tensor) and x.dim() else x
