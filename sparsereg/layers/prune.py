"""Pruning: closed gates become zeros, open ones are multiplied into the weights, no gate is left."""

import torch
from torch import Tensor, nn

from sparsereg.checks import check_below_one
from sparsereg.distributions import HardConcrete
from sparsereg.layers.gated import GatedLayer
from sparsereg.model.basic_l0_blocks import GatedBatchNorm2d, L0Gate
from sparsereg.penalties import GatedTensor, all_gated_tensors, hard_concretes


@torch.no_grad()
def prune_model(model: nn.Module, threshold: float = 0.05) -> nn.Module:
    """Bake the gates of a network into its weights, in place, and take the gates away.

    What a gate closes at test time (P(z > 0) <= 1/2) becomes exactly zero, and so does what has
    P(z > 0) <= ``threshold``; so a threshold up to 1/2 leaves the eval output as it was, and a higher
    one removes more. The shapes stay; ``sparsereg.compression.compact`` cuts the zeros out.

    Args:
        model: a network, all of whose gates sit on parameters or directly in front of or behind a
            layer they can be multiplied into.
        threshold: probability in [0, 1).

    Returns:
        The same network in eval mode, without gates. Its state dict can be loaded into a network that
        was built with gates, which thereby loses them.

    Raises:
        ValueError: the threshold is outside its range, or a gate cannot be multiplied into anything.

    Example:
        >>> from sparsereg import L0Linear
        >>> prune_model(L0Linear(6, 4))(torch.ones(2, 6)).shape
        torch.Size([2, 4])
    """
    check_below_one("threshold", threshold)
    rows = all_gated_tensors(model)
    folded = {id(row.gate) for row in rows if row.fold}
    free = [name for name, gate in hard_concretes(model).items() if id(gate) not in folded]
    if free:
        raise ValueError(
            f"cannot prune: the gates {', '.join(free)} are not tied to a layer's parameters; "
            "use sparsereg.compression.compact, which follows the data"
        )
    _untie(model, rows)
    for row in rows:
        z = _test_gate(row.gate, threshold)
        factor = z if row.fold else (z != 0).to(z.dtype)
        weight = row.parameter
        # where, not a product: a dead weight must be zero even if it was infinite or NaN.
        weight.copy_(torch.where(row.spread(z) == 0, 0.0, weight * row.spread(factor).to(weight.dtype)))
    return _without_gates(model).eval()


def _test_gate(gate: HardConcrete, threshold: float) -> Tensor:
    z = gate.median()
    return torch.where(gate.p_active() <= threshold, torch.zeros_like(z), z)


def _untie(model: nn.Module, rows: list[GatedTensor]) -> None:
    """Give each owner its own copy of a parameter that others use too, without its gates or with others."""
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    for row in rows:
        parameter = row.parameter
        if owners.get(id(parameter), 0) > 1:
            copy = nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)
            setattr(row.owner, row.name, copy)


def _without_gates(model: nn.Module) -> nn.Module:
    """Replace what holds gates by what does not."""
    for module in list(model.modules()):
        if isinstance(module, GatedLayer):
            module.forget_gates_()
            continue
        for name, child in list(module._modules.items()):
            if child is not None:
                module._modules[name] = _plain(child)
    return _plain(model)


def _plain(module: nn.Module) -> nn.Module:
    if isinstance(module, L0Gate):
        return nn.Identity()
    if not isinstance(module, GatedBatchNorm2d):
        return module
    norm = nn.BatchNorm2d(module.num_features, eps=module.eps, momentum=module.momentum)
    state = {k: v for k, v in module.state_dict().items() if not k.startswith("gate.")}
    norm.to(module.weight.device, module.weight.dtype).load_state_dict(state)
    return norm
