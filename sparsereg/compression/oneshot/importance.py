"""What units are worth to a network: read off a few batches at gates that are all open, without labels."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparsereg.compression.oneshot.inputs import split
from sparsereg.compression.units.explain import inputs_of
from sparsereg.compression.units.gating import GatedModule, shared_gate_of
from sparsereg.distributions import HardConcrete

DRAWS = 4
"""Directions of the answers that are drawn for each batch, each for a part of it: the more there are, the
less noise is in what they say, and the fewer examples each goes through, the less they cost."""

Gates = Sequence[HardConcrete]
Importance = Callable[[nn.Module, Gates, Sequence[Any], torch.Generator], list[Tensor]]


def gradient(
    network: nn.Module, gates: Gates, batches: Sequence[Any], generator: torch.Generator
) -> list[Tensor]:
    """How much the answers change without a unit: the mean square of their derivative by its gate.

    That is the curvature of the squared change of the answers, each set of them in units of its spread: what
    a unit costs a network that is compared with itself. It is estimated without bias by the derivatives of
    random sums of all answers of a batch, whose mixed terms cancel.

    Args:
        network: with gates, which are all nearly open, in eval mode.
        gates: of it.
        batches: of inputs.
        generator: on the CPU; draws the sums.

    Returns:
        For each tensor of gates what each of them is worth, >= 0, float64.
    """
    return _mean(gates, (d.square() for d in _derivatives(network, gates, batches, generator)))


def taylor(
    network: nn.Module, gates: Gates, batches: Sequence[Any], generator: torch.Generator
) -> list[Tensor]:
    """The same with the mean size of the derivatives in place of their squares; see ``gradient``.

    Source: P. Molchanov et al., "Pruning convolutional neural networks for resource efficient inference",
    2017, there of a loss with labels.
    """
    return _mean(gates, (d.abs() for d in _derivatives(network, gates, batches, generator)))


def magnitude(
    network: nn.Module, gates: Gates, batches: Sequence[Any], generator: torch.Generator
) -> list[Tensor]:
    """The squares of the weights behind each gate, over their mean in the same tensor of gates.

    Source: H. Li et al., "Pruning filters for efficient ConvNets", 2017.
    """
    total = torch.zeros((), dtype=torch.float64, device=gates[0].log_alpha.device)
    for module in network.modules():
        for weight in _through_gates(module):
            total = total + weight.double().square().sum()
    squares = torch.autograd.grad(total, [g.log_alpha for g in gates], allow_unused=True)
    found = [torch.zeros_like(g.log_alpha) if s is None else s for g, s in zip(gates, squares, strict=True)]
    return [
        s.double() / s.double().mean() if float(s.sum()) > 0 else torch.ones_like(s).double() for s in found
    ]


IMPORTANCE: dict[str, Importance] = {"gradient": gradient, "magnitude": magnitude, "taylor": taylor}
"""Ways to find what units are worth, by name."""


def _through_gates(module: nn.Module) -> list[Tensor]:
    """The weights of a module as its gates leave them."""
    if isinstance(module, GatedModule):
        return [module._gated_value(name) for name in module._gated_sites if name in module._parameters]
    gates = shared_gate_of(module)
    if gates is None:
        return []
    z = gates()
    return [w * z.view(-1, *(1,) * (w.dim() - 1)) for w in module.parameters(recurse=False)]


def _mean(gates: Gates, found: Iterator[Tensor]) -> list[Tensor]:
    total = torch.stack(list(found)).mean(0)
    return [
        t.view_as(g.log_alpha)
        for t, g in zip(total.split([g.log_alpha.numel() for g in gates]), gates, strict=True)
    ]


def _derivatives(
    network: nn.Module, gates: Gates, batches: Sequence[Any], generator: torch.Generator
) -> Iterator[Tensor]:
    """Derivatives of random sums of answers by all gates end to end, float64."""
    locations = [g.log_alpha for g in gates]
    parts = [(part, -(-DRAWS // len(own))) for own in (split(b, DRAWS) for b in batches) for part in own]
    for part, draws in parts:
        args, kwargs = inputs_of(part)
        answers = torch.utils._pytree.tree_leaves(network(*args, **kwargs))
        answers = [a for a in answers if isinstance(a, Tensor) and a.requires_grad]
        for draw in range(draws):
            total = torch.stack([random_sum(a, generator) for a in answers]).sum()
            slopes = torch.autograd.grad(total, locations, retain_graph=draw + 1 < draws, allow_unused=True)
            known = [torch.zeros_like(a) if s is None else s for a, s in zip(locations, slopes, strict=True)]
            yield torch.cat([s.flatten() for s in known]).double()


def random_sum(answers: Tensor, generator: torch.Generator) -> Tensor:
    """A sum of answers with random signs, over their spread.

    Args:
        answers: a set of them, of a batch.
        generator: on the CPU; draws the signs.
    """
    signs = torch.randint(2, answers.shape, generator=generator).to(answers) * 2 - 1
    spread = answers.detach().double().std(correction=0).clamp(min=1e-12)
    return ((answers * signs).sum() / spread.to(answers)).double()
