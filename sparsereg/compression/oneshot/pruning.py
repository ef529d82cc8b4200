"""A smaller network in one shot: no training, no labels, a few batches of inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from sparsereg.checks import check_count
from sparsereg.compression.budget import Budget, check_reachable
from sparsereg.compression.compact import ORIGINAL, compact, original_size
from sparsereg.compression.count import Accountant
from sparsereg.compression.insert import Choice, gate
from sparsereg.compression.oneshot.importance import IMPORTANCE
from sparsereg.compression.oneshot.inputs import BATCH, read_inputs
from sparsereg.compression.oneshot.ranked import LEFTOVER, Measured, Ranked, opened_
from sparsereg.compression.running import check_network
from sparsereg.compression.timing.measured import latency_budget
from sparsereg.compression.timing.runtimes import check_runtime, default_runtime
from sparsereg.errors import nearest
from sparsereg.penalties import hard_concretes
from sparsereg.progress import showing
from sparsereg.target_settings import MILLISECONDS, Parts, Share, goal, part_goals


def shrink(
    model: nn.Module,
    data: Any,
    target_macs: float | None = None,
    *,
    target_sparsity: float | None = None,
    target_latency_ms: float | None = None,
    runtime: str | None = None,
    threads: int = 1,
    batch: int = 1,
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
        data: inputs as the network takes them: a tensor or a dictionary with several examples, a Dataset, a
            DataLoader or any iterable of batches; NumPy arrays may stand for tensors. Labels in them are left
            out. One example is enough to shrink, but not to repair.
        target_macs: share of the multiply-accumulate operations to keep, in (0, 1), of the network as it
            stands: without units whose gates are shut already.
        target_sparsity: instead, share of the parameters to remove, in (0, 1).
        target_latency_ms: instead, milliseconds that one call may take, measured on this machine's CPU.
        runtime: where it is measured; onnxruntime, or eager PyTorch where that is not installed, if None.
        threads: that may compute in such a call.
        batch: examples in such a call.
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
        progress: show bars on a terminal.

    Returns:
        The compacted network, as ``compact`` returns it.

    Raises:
        InputError: the network cannot be traced, there are no data, or units alone cannot make it so small.
        ValueError: an argument is outside its range, or nothing of the network can go.

    Example:
        >>> net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
        >>> shrink(net, torch.randn(64, 8), target_macs=0.5)(torch.ones(2, 8)).shape
        torch.Size([2, 3])
    """
    check_network(model)
    shares = part_goals(target_params, target_part_macs)
    cost, kept = _goal((target_sparsity, target_macs, target_latency_ms), bool(shares))
    if importance not in (known := [LEFTOVER, *IMPORTANCE]):
        raise ValueError(
            f"importance must be one of {', '.join(known)}, got {importance!r}{nearest(importance, known)}"
        )
    measured = _measured(cost, kept, runtime, threads, batch, shares, round_to)
    batches = read_inputs(model, data, num_inputs, BATCH)
    example = torch.utils._pytree.tree_map(_first, batches[0])
    with showing(progress):
        plain = compact(model, example) if hard_concretes(model) else model
        whole = opened_(gate(plain, example, layers, families=families).eval())
        counted = None if measured else cost
        if counted is not None:
            check_reachable(Accountant(whole, example), counted, kept)
        ranked = Ranked(whole, example, counted, batches, importance, seed, shares, measured=measured)
        _, small = ranked.smaller(kept, round_to=round_to, repair=repair)
    ranked.warn(small)
    small.meta[ORIGINAL] = original_size(model) or small.meta[ORIGINAL]
    return small


def _goal(targets: tuple[float | None, float | None, float | None], parts: bool) -> tuple[str | None, float]:
    """See ``goal``; None for the cost where only parts have budgets."""
    return (None, 1.0) if parts and all(target is None for target in targets) else goal(*targets)


def _measured(
    cost: str | None,
    target: float,
    runtime: str | None,
    threads: int,
    batch: int,
    shares: Sequence[Share],
    round_to: int,
) -> Measured | None:
    """What makes the budget of a network in milliseconds; None for other budgets.

    Raises:
        InputError: the runtime is not installed.
        ValueError: the runtime is unknown, a number is no count, or what is said makes no difference.
    """
    check_count("threads", threads)
    check_count("batch", batch)
    if cost != MILLISECONDS:
        for name, value, default in (
            ("runtime", runtime, None),
            ("threads", threads, 1),
            ("batch", batch, 1),
        ):
            if value != default:
                raise ValueError(f"{name}={value!r} says how target_latency_ms is measured: give that, too")
        return None
    check_runtime(default_runtime() if runtime is None else runtime)
    if round_to != 1:
        raise ValueError("round_to: target_latency_ms measures widths as they are: leave round_to out")

    def budget(accountant: Accountant, example: Any) -> Budget:
        return latency_budget(
            accountant,
            example,
            target,
            runtime=runtime,
            threads=threads,
            batch=batch,
            shares=shares,
        )

    return budget


def _first(x: Any) -> Any:
    return x[:1] if isinstance(x, Tensor) and x.dim() else x
