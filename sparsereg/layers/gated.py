"""What all layers with gates on their weights or channels share."""

from typing import Any

import torch
from torch import Tensor, nn

from sparsereg.checks import check_probability
from sparsereg.distributions import HardConcrete
from sparsereg.penalties import GatedTensor, GatedWeights, gated_tensors, gated_weights


class GatedLayer(nn.Module):
    """A layer with one tensor of gates, under ``weight_gates`` or ``channel_gates``.

    Pruning bakes the gates into the parameters and takes them away; ``gate`` is then None and the
    state dict holds the marker ``baked`` instead of the gates. Loading such a state dict into a layer
    with gates prunes that layer; a state dict with neither is refused, with the keys that it lacks.

    Args:
        gate_name: name under which the gates are registered.
        gate: the gates.
        use_l2: whether ``get_l2_penalty`` counts this layer.
    """

    def __init__(self, gate_name: str, gate: HardConcrete, use_l2: bool = False) -> None:
        super().__init__()
        self.use_l2 = use_l2
        self._gate_name = gate_name
        self.add_module(gate_name, gate)

    @property
    def gate(self) -> HardConcrete | None:
        """The gates; None once they are baked in."""
        return self._modules.get(self._gate_name)  # type: ignore[return-value]

    @property
    def gated_weight(self) -> nn.Parameter:
        """The weights that the gates multiply."""
        return self.weight  # type: ignore[return-value]

    @property
    def per_weight(self) -> bool:
        """Whether each weight has its own gate; else each output channel has one."""
        return self._gate_name == "weight_gates"

    def gated(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias under the gates: a draw in training mode, the medians in eval mode."""
        weight, bias, gate = self.gated_weight, self._plain_bias, self.gate
        if gate is None:
            return weight, bias
        if self.per_weight:
            return gate.times(weight.view(gate.gate_size)).view(weight.shape), bias
        # The gate closes the whole channel, bias included, so that a closed one emits exactly zero.
        z = gate().to(weight.dtype)
        return weight * z.view(-1, *(1,) * (weight.dim() - 1)), None if bias is None else bias * z

    @property
    def _plain_bias(self) -> nn.Parameter | None:
        return self.bias  # type: ignore[return-value]

    def get_l0_penalty(self) -> Tensor:
        """Expected number of open gates, a differentiable scalar; of a pruned layer what is left."""
        if self.gate is not None:
            return self.gate.get_penalty()
        return (1.0 - self._zeros()).sum()

    def get_l2_penalty(self) -> Tensor:
        """Sum of the squared weights, without gates; 0 unless ``use_l2``."""
        if not self.use_l2:
            return torch.zeros((), device=self.gated_weight.device)
        return self.gated_weight.float().square().sum()

    def get_sparsity(self) -> float:
        """Expected share of closed gates, 1 - mean P(z > 0); of a pruned layer the share of zeros."""
        if self.gate is not None:
            return self.gate.get_sparsity()
        return self._zeros().double().mean().item()

    @torch.no_grad()
    def _zeros(self) -> Tensor:
        """1 where a pruned weight (or channel) is zero, else 0."""
        weight = self.gated_weight
        return (weight if self.per_weight else weight.flatten(1).abs().amax(1)).eq(0).float()

    def plain(self) -> nn.Module:
        """The ungated layer of PyTorch with the same output in eval mode, on copies of the weights."""
        raise NotImplementedError

    @torch.no_grad()
    def _fill(self, layer: nn.Module) -> nn.Module:
        """Copy weights and biases under the test-time gates into a layer of PyTorch."""
        training = self.training
        weight, bias = self.eval().gated()
        self.train(training)
        assert isinstance(layer, (nn.Linear, nn.Conv2d))
        layer.to(weight.device, weight.dtype).weight.copy_(weight)
        if layer.bias is not None and bias is not None:
            layer.bias.copy_(bias)
        return layer.train(training)

    def forget_gates_(self) -> None:
        """Take the gates away, as pruning does once they are baked in."""
        if self.gate is not None:
            delattr(self, self._gate_name)
            self.register_buffer("baked", torch.tensor(True))

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        if prefix + "baked" in state_dict:
            self.forget_gates_()
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


@gated_tensors.register
def _(module: GatedLayer) -> list[GatedTensor]:
    gate = module.gate
    if gate is None:
        return []
    owner = next(m for m in module.modules() if m._parameters.get("weight") is module.gated_weight)
    if module.per_weight:
        return [GatedTensor(gate, owner, "weight")]
    return [GatedTensor(gate, owner, name, 0) for name in ("weight", "bias")]


@gated_weights.register
def _(module: GatedLayer) -> GatedWeights:
    return GatedWeights(module.gated_weight, module.gate)


def gate_mean(init_sparsity: float) -> float:
    """P(z > 0) at the start from the expected share of gates that start closed.

    Raises:
        ValueError: it is not in (0, 1).
    """
    return 1.0 - check_probability("init_sparsity", init_sparsity)


def reset_(weight: Tensor, bias: Tensor | None, generator: torch.Generator | None) -> None:
    """Kaiming normal weights (fan out) and uniform biases within 1 / sqrt(fan in), as nn.Linear has.

    Args:
        weight: filled in place, at least two-dimensional.
        bias: filled in place.
        generator: source of the noise; PyTorch's default if None.
    """
    nn.init.kaiming_normal_(weight, mode="fan_out", generator=generator)
    if bias is not None:
        bound = weight[0].numel() ** -0.5
        nn.init.uniform_(bias, -bound, bound, generator=generator)
