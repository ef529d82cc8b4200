"""results.json: what a run reached, in numbers that other programs read."""

from typing import Any

import torch
from pytorch_lightning import Trainer
from torch import nn

from sparsereg.compression import Count
from sparsereg.penalties import hard_concretes


def gate_summary(net: nn.Module) -> dict[str, Any]:
    """Return L_C0, expected sparsity and the number of gates and open gates, accumulated in float64.

    Without gates L_C0 is not defined and becomes null.
    """
    gates = hard_concretes(net)
    if not gates:
        return {"L_C0": None, "expected_sparsity": 0.0, "gates": 0, "open_gates": 0}
    with torch.no_grad():
        active = torch.cat([g.p_active().flatten().double().cpu() for g in gates.values()])
        num_open = sum(g.get_num_active() for g in gates.values())
    mean = active.mean().item()
    return {"L_C0": mean, "expected_sparsity": 1 - mean, "gates": active.numel(), "open_gates": num_open}


def count_summary(count: Count) -> dict[str, Any]:
    """Return the exact accounting under the names of results.json."""
    return {
        "exact_sparsity": count.exact_sparsity,
        "parameters": count.parameters,
        "compacted_parameters": count.compacted_parameters,
        "macs": count.macs,
        "compacted_macs": count.compacted_macs,
    }


def metric(trainer: Trainer, name: str) -> float | None:
    """Return a logged metric as a number, None if it was not logged."""
    value = trainer.callback_metrics.get(name)
    return None if value is None else float(value)
