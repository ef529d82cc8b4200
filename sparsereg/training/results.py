"""results.json: what a run reached, in numbers that other programs read."""

import logging
from typing import Any

import torch
from pytorch_lightning import Trainer
from torch import Tensor, nn

from sparsereg.compression import Accountant, Count, original_size
from sparsereg.compression.budget import exact_share
from sparsereg.compression.timing.measured import MeasuredBudget
from sparsereg.penalties import hard_concretes
from sparsereg.training.accounting import PlainAccountant
from sparsereg.training.config import Training
from sparsereg.training.target import SparsityTarget, asked_for
from sparsereg.training.tasks.task import Task

log = logging.getLogger(__name__)


def gate_summary(net: nn.Module) -> dict[str, Any]:
    """Return L_C0, expected sparsity and the number of gates and open gates, in all and of each layer.

    Means are accumulated in float64. Without gates L_C0 is not defined and becomes null.
    """
    gates = hard_concretes(net)
    if not gates:
        return {"L_C0": None, "expected_sparsity": 0.0, "gates": 0, "open_gates": 0, "open_gates_of": {}}
    with torch.no_grad():
        active = torch.cat([g.p_active().flatten().double().cpu() for g in gates.values()])
        open_gates = {name.removesuffix(".gates"): g.get_num_active() for name, g in gates.items()}
    mean = active.mean().item()
    return {
        "L_C0": mean,
        "expected_sparsity": 1 - mean,
        "gates": active.numel(),
        "open_gates": sum(open_gates.values()),
        "open_gates_of": open_gates,
    }


def count_summary(count: Count, net: nn.Module) -> dict[str, Any]:
    """Return the exact accounting under the names of results.json.

    Args:
        count: of the network.
        net: the network; one that was compacted before also tells the size it had.
    """
    return {
        "exact_sparsity": count.exact_sparsity,
        "parameters": count.parameters,
        "compacted_parameters": count.compacted_parameters,
        "macs": count.macs,
        "compacted_macs": count.compacted_macs,
        **{f"original_{key}": number for key, number in original_size(net).items()},
    }


def target_summary(
    cfg: Training, trainer: Trainer, accountant: Accountant | PlainAccountant
) -> dict[str, Any]:
    """Return lambda_l0, or the target with the lambda that was found; warn where the target is missed.

    Args:
        cfg: of the run.
        trainer: after training.
        accountant: with the gates as they are tested.
    """
    if not cfg.gated:
        return {"lambda_l0": None}
    key, asked = cfg.target_key, asked_for(cfg)
    if not cfg.has_target:
        return {"lambda_l0": cfg.lambda_l0}
    callback = next((c for c in trainer.callbacks if isinstance(c, SparsityTarget)), None)  # type: ignore[attr-defined]
    found = None if callback is None else callback.found
    summary = {"lambda_l0": None, "lambda_target": found, **_parts_summary(callback)}
    if key is None:
        return summary
    summary[key] = getattr(cfg, key)
    if asked is None:
        assert callback is not None
        return {**summary, **_measured_summary(callback)}
    cost, allowed = asked
    assert isinstance(accountant, Accountant)  # a target needs gates
    kept = exact_share(accountant, cost)
    if abs(kept - allowed) > 0.01:
        few = "is not met: %.1f %% of the %s stay; training ended early, or the gates are too few"
        coarse = "is met, but only %.1f %% of the %s stay: each gate stands for a large share of them"
        log.warning("%s=%g " + (few if kept > allowed else coarse), key, getattr(cfg, key), 100 * kept, cost)
    return summary


def _parts_summary(callback: SparsityTarget | None) -> dict[str, Any]:
    """Return what is left of parts that have budgets of their own, under ``target_parts``."""
    if callback is None or not callback.budget.parts:
        return {}
    parts = [budget.part for budget in callback.budget.parts]
    for part in parts:
        if part.exact() > part.share.kept + 0.01:
            log.warning("%s is not met: %.1f %% stay", part.share.said, 100 * part.exact())
    return {
        "target_parts": [
            {"part": p.share.where, "cost": p.share.cost, "may_stay": p.share.kept, "stays": p.exact()}
            for p in parts
        ]
    }


def _measured_summary(callback: SparsityTarget) -> dict[str, Any]:
    """Return what was measured of the network that a budget in milliseconds or megabytes has left."""
    budget = callback.budget
    assert isinstance(budget, MeasuredBudget)
    if budget.reached is None:
        log.warning("%s=%g was not met: training ended early", budget.cost, budget.target)
    measured = str(budget.cost).replace("target", "measured")
    whole, smallest = (f"{measured}_{which}" for which in ("whole", "smallest"))
    cost = budget.measured
    return {
        measured: budget.reached,
        whole: cost.full,
        smallest: cost.floor,
        "measured_with": cost.what,
    }


def headline(results: dict[str, Any], task: Task) -> str:
    """Return the few lines that a script prints at the end.

    Args:
        results: of results.json.
        task: whose figures come first.
    """
    figures = [name for figure in task.figures for name in (f"val_{figure}", f"test_{figure}")]
    keys = (*figures, "L_C0", "expected_sparsity", "exact_sparsity")
    width = max(18, *(len(key) for key in figures))
    lines = [f"{key:{width}s} {results[key]:.4f}" for key in keys if results.get(key) is not None]
    if "original_parameters" in results:
        left = results["compacted_parameters"] / results["original_parameters"]
        lines.append(
            f"made by compaction from a network of {results['original_parameters']:,} parameters, "
            f"of which {1 - left:.4f} are gone"
        )
    return "\n".join(lines)


def metric(trainer: Trainer, name: str) -> float | None:
    """Return a logged metric as a number, None if it was not logged."""
    value = trainer.callback_metrics.get(name)
    return None if value is None else as_written(value)


def as_written(value: Tensor) -> float:
    """Return the value of a metric as results.json has it.

    Metrics are float32: seven digits are what they hold, and 0.9 is not written as 0.8999999761581421.

    Args:
        value: ().
    """
    return float(f"{float(value):.7g}")


def names(stage: str, task: Task) -> list[str]:
    """Return the names that a task's figures have in results.json: ``val_acc``, say."""
    return [f"{stage}_{figure}" for figure in task.figures]


def measured(trainer: Trainer, stage: str, task: Task) -> dict[str, float | None]:
    """Return the figures that were measured in a stage, ``val`` or ``test``; None for those that were not."""
    return {name: metric(trainer, name) for name in names(stage, task)}


def block_table(count: Count, net: nn.Module) -> str:
    """Return a table with a line for each block: its gates, open gates, parameters and those kept.

    A block is a child of the network, or a child of a numbered sequence of blocks.
    """
    rows: dict[str, list[int]] = {}
    for layer in count.layers:
        row = rows.setdefault(_block(layer.name), [0, 0, 0, 0])
        row[2] += layer.parameters
        row[3] += layer.kept_parameters
    for name, gate in hard_concretes(net).items():
        row = rows.setdefault(_block(name), [0, 0, 0, 0])
        row[0] += gate.log_alpha.numel()
        row[1] += gate.get_num_active()
    total = [sum(row[i] for row in rows.values()) for i in range(4)]
    lines = [f"{'block':16s}{'gates':>8s}{'open':>8s}{'parameters':>12s}{'kept':>10s}{'kept %':>8s}"]
    for name, row in [*rows.items(), ("all", total)]:
        share = f"{100 * row[3] / row[2]:.1f}" if row[2] else ""
        lines.append(f"{name:16s}{row[0]:8,}{row[1]:8,}{row[2]:12,}{row[3]:10,}{share:>8s}")
    return "\n".join(lines)


def _block(name: str) -> str:
    parts = name.split(".")
    return ".".join(parts[:2]) if len(parts) > 1 and parts[1].isdigit() else parts[0]
