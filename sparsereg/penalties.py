"""Model-wide penalties and sparsity statistics, over every Hard Concrete tensor of a network.

Gates are found by their type, and which parameters a gate multiplies is said once per kind of module,
in ``gated_tensors``. Penalties, statistics and pruning all read it from there.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import singledispatch
from typing import Any

import torch
from torch import Tensor, nn

from sparsereg.checks import check_not_negative
from sparsereg.distributions import HardConcrete, p_active
from sparsereg.shapes import Float, Shaped
from sparsereg.temperature import TemperatureScheduler, update_temperatures
from sparsereg.tracker import History

__all__ = [
    "GatedTensor",
    "GatedWeights",
    "PenaltyTracker",
    "TemperatureScheduler",
    "compute_l0_penalty",
    "compute_l0l2_penalty",
    "compute_l2_penalty",
    "expected_l0",
    "expected_l2",
    "gated_tensors",
    "gated_weights",
    "get_active_parameter_count",
    "get_sparsity_stats",
    "hard_concretes",
    "l_c0",
    "update_temperatures",
]


def hard_concretes(model: nn.Module) -> dict[str, HardConcrete]:
    """Return every Hard Concrete tensor of a network by its name, a shared one once."""
    return {name: m for name, m in model.named_modules() if isinstance(m, HardConcrete)}


def l_c0(model: nn.Module) -> Float[Tensor, ""]:
    """L_C0: the mean of P(z > 0) over all gates of a network, a differentiable scalar in [0, 1].

    The gates are put end to end first, so that the cost does not grow with the number of layers.

    Args:
        model: a network with at least one gate.

    Raises:
        ValueError: the network has no gate.
    """
    gates = hard_concretes(model).values()
    active = _all_active(gates)
    if active is None:
        raise ValueError("the network has no gates, so L_C0 is not defined")
    num_removed = sum(gate.num_removed for gate in gates)
    # Gates that have left the network are shut for good, and still gates of it.
    return active.sum() / (active.numel() + num_removed) if num_removed else active.mean()


def _all_active(gates: Iterable[HardConcrete]) -> Float[Tensor, "all_gates"] | None:
    """P(z > 0) of all gates, end to end; None without gates."""
    groups: dict[tuple[float, float, float], list[Tensor]] = {}
    for gate in gates:
        groups.setdefault((gate.temperature, gate.gamma, gate.zeta), []).append(gate.log_alpha.flatten())
    if not groups:
        return None
    active = [
        p_active(members[0] if len(members) == 1 else torch.cat(members), *shape)
        for shape, members in groups.items()
    ]
    return active[0] if len(active) == 1 else torch.cat(active)


@dataclass(frozen=True)
class GatedTensor:
    """One parameter that a gate multiplies.

    Attributes:
        gate: the gates.
        owner: the module that holds the parameter.
        name: the parameter's name in its owner.
        dim: dimension of the parameter along which the gates lie; None: one gate for each element.
        fold: whether multiplying the parameter by the gates replaces the gates. False where a closed
            gate leaves the parameter without effect but a partly open one does not scale it.
    """

    gate: HardConcrete
    owner: nn.Module
    name: str
    dim: int | None = None
    fold: bool = True

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter."""
        parameter = self.owner._parameters[self.name]  # its own value: a module may read it through its gates
        assert parameter is not None
        return parameter

    def spread(self, x: Shaped[Tensor, "*gates"]) -> Shaped[Tensor, "..."]:
        """Reshape a tensor of the gates' shape so that it multiplies the parameter."""
        if self.dim is None:
            return x.reshape(self.parameter.shape)
        shape = [1] * self.parameter.dim()
        shape[self.dim] = -1
        return x.reshape(shape)


@singledispatch
def gated_tensors(module: nn.Module) -> list[GatedTensor]:
    """Which parameters the gates of one module multiply; a new kind of module registers its answer.

    Args:
        module: the module itself; its children answer for themselves.
    """
    return []


@dataclass(frozen=True)
class GatedWeights:
    """The weights of a layer that is counted by its weights.

    Attributes:
        weight: the weights.
        gate: their gates; None once they are baked in.
    """

    weight: Tensor
    gate: HardConcrete | None


@singledispatch
def gated_weights(module: nn.Module) -> GatedWeights | None:
    """The weights by which a layer's sparsity is counted; None for a module that is no such layer.

    Args:
        module: the module itself; its children answer for themselves.
    """
    return None


def all_gated_tensors(model: nn.Module) -> list[GatedTensor]:
    """Every parameter that a gate multiplies, below ``model``; shared modules once."""
    return [
        row
        for module in model.modules()
        for row in gated_tensors(module)
        if row.owner._parameters.get(row.name) is not None
    ]


def compute_l0_penalty(model: nn.Module) -> Float[Tensor, ""]:
    """Expected number of open gates, the sum of P(z > 0) over every gate of a network.

    Args:
        model: any module; a gate that several modules share counts once, a frozen one counts too.

    Returns:
        A scalar on the device of the gates; 0 on the device of the parameters without gates.

    Example:
        >>> from sparsereg import L0Linear
        >>> compute_l0_penalty(L0Linear(6, 4)).item() > 0
        True
    """
    active = _all_active(hard_concretes(model).values())
    return _zero(model) if active is None else active.sum()


def compute_l2_penalty(model: nn.Module) -> Float[Tensor, ""]:
    """Sum of the squared weights of all layers, without biases, frozen weights and the gates' own parameters.

    Args:
        model: any module; a shared parameter counts once.

    Returns:
        A scalar on the device of the weights.

    Example:
        >>> from sparsereg import L0Linear
        >>> compute_l2_penalty(L0Linear(6, 4, use_l2=True)).item() >= 0
        True
    """
    return _sum((w.float().square().sum() for w in _weights(model)), model)


def compute_l0l2_penalty(
    model: nn.Module, l0_lambda: float = 1e-3, l2_lambda: float = 1e-4
) -> Float[Tensor, ""]:
    """l0_lambda times ``compute_l0_penalty`` plus l2_lambda times ``compute_l2_penalty``.

    Args:
        model: any module.
        l0_lambda: price of an open gate, >= 0.
        l2_lambda: price of a squared weight, >= 0.

    Raises:
        ValueError: a price is negative or not finite.

    Example:
        >>> from sparsereg import L0Linear
        >>> compute_l0l2_penalty(L0Linear(6, 4), l0_lambda=0.1, l2_lambda=0.0).item() > 0
        True
    """
    for name, value in (("l0_lambda", l0_lambda), ("l2_lambda", l2_lambda)):
        check_not_negative(name, value)
    return l0_lambda * compute_l0_penalty(model) + l2_lambda * compute_l2_penalty(model)


def expected_l0(model: nn.Module) -> Float[Tensor, ""]:
    """Expected share of the gated weights whose own gate is open: the L0 norm of the paper, over all.

    A gate on a group of weights counts as often as the group has members, where L_C0 counts it once.
    Each layer counts its own gates only. The paper's lambda / N per weight is lambda_l0 = lambda W / N
    here, with W gated weights and N training images.

    Args:
        model: a network with at least one gate.

    Returns:
        A differentiable scalar in [0, 1].

    Raises:
        ValueError: no parameter has a gate.

    Source: Louizos, Welling, Kingma 2018, equation 12, with group sizes as in section 4.1.
    """
    rows = all_gated_tensors(model)
    if not rows:
        raise ValueError("the network has no gated weights, so their expected L0 norm is not defined")
    sizes = [row.parameter.numel() for row in rows]
    means = torch.stack([row.gate.p_active().mean() for row in rows])
    return means @ means.new_tensor(sizes) / sum(sizes)


def expected_l2(model: nn.Module) -> Float[Tensor, ""]:
    """Expected squared norm of the weights under the gates: each square times P(its gates are open).

    This is the L2 norm inside the L0 penalty: a weight that is gone costs nothing, so weight decay
    does not pull on gates' weights in proportion to how rarely they are used. With lambda_l0 / N on
    the gates and this times lambda_l2 / 2, it is the penalty of the paper.

    Args:
        model: any module; weights without a gate count in full.

    Returns:
        A differentiable scalar (in the weights and in the locations of the gates).

    Source: Louizos, Welling, Kingma 2018, section 2.3.
    """
    rows: dict[int, list[GatedTensor]] = {}
    for row in all_gated_tensors(model):
        rows.setdefault(id(row.parameter), []).append(row)

    def terms() -> Iterator[Tensor]:
        for weight in _weights(model):
            square = weight.float().square()
            for row in rows.get(id(weight), ()):
                square = square * row.spread(row.gate.p_active())
            yield square.sum()

    return _sum(terms(), model)


def get_sparsity_stats(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Sparsity of each gated module: of layers by their weights, of free gates by themselves.

    Args:
        model: any module; a shared module appears once, under its first name.

    Returns:
        For each module's name: ``sparsity`` = ``expected_sparsity`` (1 - mean P(z > 0) over its gates),
        ``exact_sparsity`` (share of its weights that a closed gate or pruning holds at zero),
        ``active_params`` (expected number of weights in use), ``total_params``, ``num_gates`` and
        ``num_open_gates`` (P(z > 0) > 1/2). Plain Python numbers, summed in float64.

    Example:
        >>> from sparsereg import SparseMLP
        >>> len(get_sparsity_stats(SparseMLP(6, 8, 3))) > 0
        True
    """
    stats: dict[str, dict[str, Any]] = {}
    counted: set[int] = set()
    for name, module in model.named_modules():
        if isinstance(module, HardConcrete):
            if id(module) not in counted:
                stats[name.removesuffix(".gates")] = _gate_stats(module, 1.0)
            continue
        weights = gated_weights(module)
        if weights is None:
            continue
        if weights.gate is None:
            stats[name] = _pruned_stats(weights.weight)
            continue
        counted.add(id(weights.gate))
        stats[name] = _gate_stats(weights.gate, weights.weight.numel() / weights.gate.log_alpha.numel())
    return stats


@torch.no_grad()
def _gate_stats(gate: HardConcrete, weights_per_gate: float) -> dict[str, Any]:
    num_gates = gate.log_alpha.numel()
    active = gate.p_active().double().sum().item()
    num_open = gate.get_num_active()
    return {
        "sparsity": 1.0 - active / num_gates,
        "expected_sparsity": 1.0 - active / num_gates,
        "exact_sparsity": 1.0 - num_open / num_gates,
        "active_params": active * weights_per_gate,
        "total_params": round(num_gates * weights_per_gate),
        "num_gates": num_gates,
        "num_open_gates": num_open,
    }


@torch.no_grad()
def _pruned_stats(weight: Tensor) -> dict[str, Any]:
    """The same for a layer whose gates are baked in: what is left is certain."""
    total = weight.numel()
    left = int(torch.count_nonzero(weight).item())
    sparsity = 1.0 - left / total
    return {
        "sparsity": sparsity,
        "expected_sparsity": sparsity,
        "exact_sparsity": sparsity,
        "active_params": float(left),
        "total_params": total,
        "num_gates": 0,
        "num_open_gates": 0,
    }


@torch.no_grad()
def get_active_parameter_count(model: nn.Module, example_input: Any = None) -> int:
    """Number of parameters of a network that are in use: all but the zeros and what a closed gate removes.

    The gates' own locations are no parameters of the network and never count; a shared parameter
    counts once and a frozen one counts. A weight that is exactly zero does not count, and neither does
    a zero bias behind weights that are all zero; so the count is the same before and after pruning.

    Args:
        model: any module.
        example_input: one input. With it the network is traced and compacted
            (``sparsereg.compression.compact``), and what the closed gates make useless elsewhere,
            such as the next layer's weights on a dead channel, is subtracted too.

    Returns:
        The count at test time, when a gate is closed if P(z > 0) <= 1/2.

    Example:
        >>> from sparsereg import L0Linear
        >>> 0 <= get_active_parameter_count(L0Linear(6, 4)) <= 28
        True
    """
    if example_input is not None:
        from sparsereg.compression import compact

        return get_active_parameter_count(compact(model, example_input))
    shut: dict[int, Tensor] = {}
    for row in all_gated_tensors(model):
        closed = row.spread(row.gate.median() == 0).expand(row.parameter.shape)
        shut[id(row.parameter)] = shut.get(id(row.parameter), torch.zeros_like(closed)) | closed
    for module in model.modules():
        _add_zeros(module, shut)
    own = {id(g.log_alpha) for g in hard_concretes(model).values()}
    return sum(
        p.numel() - (int(shut[id(p)].sum().item()) if id(p) in shut else 0)
        for p in model.parameters()
        if id(p) not in own
    )


def _add_zeros(module: nn.Module, shut: dict[int, Tensor]) -> None:
    """Mark the zeros of one module's weight, and its zero biases where nothing else is left."""
    weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
    if weight is None:
        return
    zero = shut.get(id(weight), torch.zeros_like(weight, dtype=torch.bool)) | (weight == 0)
    if bias is not None and bias.shape == weight.shape[:1]:
        silent = zero.flatten(1).all(1) if zero.dim() > 1 else zero
        silent = silent & (bias == 0)
        shut[id(bias)] = shut.get(id(bias), torch.zeros_like(silent)) | silent
        zero = zero if zero.dim() > 1 else zero & (bias == 0)
    shut[id(weight)] = shut.get(id(weight), torch.zeros_like(zero)) | zero


def _weights(model: nn.Module) -> Iterator[nn.Parameter]:
    """Trainable parameters that are called a weight, each once, the gates' locations left out."""
    seen: set[int] = set()
    for module in model.modules():
        if isinstance(module, HardConcrete):
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if "weight" in name and parameter.requires_grad and id(parameter) not in seen:
                seen.add(id(parameter))
                yield parameter


def _sum(terms: Iterable[Float[Tensor, ""]], model: nn.Module) -> Float[Tensor, ""]:
    total: Tensor | None = None
    for term in terms:
        total = term if total is None else total + term.to(total.device)
    return _zero(model) if total is None else total


def _zero(model: nn.Module) -> Float[Tensor, ""]:
    parameter = next(model.parameters(), None)
    return torch.zeros((), device=None if parameter is None else parameter.device)


class PenaltyTracker(History):
    """Histories of named numbers, and of the penalties of a network, during training.

    Example:
        >>> tracker = PenaltyTracker()
        >>> tracker.log("l0", 0.5)
        >>> tracker.get_history("l0")
        [0.5]
    """

    def log_model(self, model: nn.Module) -> None:
        """Append ``l0_penalty``, ``expected_sparsity`` and ``active_parameters`` of a network."""
        active = _all_active(hard_concretes(model).values())
        self.log("active_parameters", get_active_parameter_count(model))
        if active is not None:
            expected = active.detach().double()
            self.log("l0_penalty", expected.sum().item())
            self.log("expected_sparsity", 1.0 - expected.mean().item())
