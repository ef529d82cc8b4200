"""Gates in an optimizer that somebody else has made: a group of their own, whose learning rate stays."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from sparsereg.errors import InputError
from sparsereg.model.basic_l0_blocks import L0Gate
from sparsereg.penalties import hard_concretes

RATE = "gate_lr"
"""Key of a group of gates: the learning rate that it keeps."""
_LISTS = ("base_lrs", "min_lrs", "max_lrs", "_last_lr", "base_momentums", "max_momentums", "lr_lambdas")
"""What schedules of PyTorch keep for each group."""
_ONE_GROUP = ("LBFGS", "Muon", "SparseAdam")
"""Optimizers that take one group, matrices, or sparse gradients only."""


def regroup_(
    optimizers: Sequence[Optimizer],
    gates: Iterable[tuple[nn.Parameter, list[Tensor]]],
    rate: Callable[[float], float],
) -> None:
    """Give gates a group of their own in the optimizer that moves what they gate.

    The group has the settings of the first group there, but no weight decay and a learning rate of its own.

    Args:
        optimizers: of the training, not yet used; changed in place.
        gates: each gate's locations and the weights that it gates.
        rate: learning rate of the gates, from that of the first group.

    Raises:
        InputError: an optimizer cannot have another group, or none has any weights.
    """
    gates = list(gates)
    own = {id(location) for location, _ in gates}
    if not optimizers:
        raise InputError("there is no optimizer that could move the gates")
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            _leave_out(group, own)
    members: dict[int, list[nn.Parameter]] = {}
    for location, weights in gates:
        members.setdefault(_owner(optimizers, weights), []).append(location)
    for i, locations in members.items():
        _add(optimizers[i], locations, rate)


def _leave_out(group: dict[str, Any], own: set[int]) -> None:
    keep = [id(p) not in own for p in group["params"]]
    for key in ("params", "param_names"):
        if key in group:
            group[key] = [value for value, here in zip(group[key], keep, strict=True) if here]


def _owner(optimizers: Sequence[Optimizer], weights: list[Tensor]) -> int:
    """Which optimizer moves some of the weights; the first if none does."""
    wanted = {id(w) for w in weights}
    for i, optimizer in enumerate(optimizers):
        if any(id(p) in wanted for group in optimizer.param_groups for p in group["params"]):
            return i
    return 0


def _add(optimizer: Optimizer, locations: list[nn.Parameter], rate: Callable[[float], float]) -> None:
    name = type(optimizer).__name__
    if name in _ONE_GROUP:
        raise InputError(
            f"{name} cannot move gates, which are vectors with a learning rate of their own: use another"
            " optimizer for the weights that are gated, such as AdamW or SGD"
        )
    first = optimizer.param_groups[0]
    options = {key: value for key, value in first.items() if key not in ("params", "param_names", "name")}
    if "weight_decay" in options:
        options["weight_decay"] = 0.0
    own = rate(float(options.get("initial_lr", options["lr"])))
    named = [(f"gate_{i}", p) for i, p in enumerate(locations)] if "param_names" in first else locations
    optimizer.add_param_group({**options, "params": named, "lr": own, RATE: own})


def follow_(schedules: Iterable[Any]) -> None:
    """Let schedules that were made before know of the last group of their optimizer.

    What they make of its learning rate does not count, see ``keep_rates_``.

    Args:
        schedules: of ``torch.optim.lr_scheduler``; changed in place.
    """
    for schedule in schedules:
        follow_(getattr(schedule, "_schedulers", ()))
        groups = getattr(getattr(schedule, "optimizer", None), "param_groups", [])
        if not groups or RATE not in groups[-1]:
            continue
        for name in _LISTS:
            values = getattr(schedule, name, None)
            if isinstance(values, list) and len(values) == len(groups) - 1:
                values.append(values[0])


def keep_rates_(optimizer: Optimizer) -> None:
    """Set the learning rate of the gates to what it was, whatever a schedule has made of it."""
    for group in optimizer.param_groups:
        if RATE in group:
            group["lr"] = group[RATE]


def gated_weights(network: nn.Module) -> list[tuple[nn.Parameter, list[Tensor]]]:
    """Return each gate's locations, and the weights of the modules that hold it."""
    weights: dict[int, list[Tensor]] = {}
    for module in network.modules():
        for child in module.children():
            if isinstance(child, L0Gate):
                weights.setdefault(id(child.gates), []).extend(module.parameters(recurse=False))
    return [(gate.log_alpha, weights.get(id(gate), [])) for gate in hard_concretes(network).values()]
