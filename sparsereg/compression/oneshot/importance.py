"""What units are worth to a network: read off a few batches at gates that are all open, without labels."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from sparsereg.compression.oneshot.inputs import split
from sparsereg.compression.units.explain import inputs_of
from sparsereg.compression.units.gating import GatedModule, shared_gate_of
from sparsereg.compression.units.structure import Structure
from sparsereg.distributions import HardConcrete

_NEARLY = 0.01
"""Share of a weight that gates which are nearly open take of it at most."""
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


def parts_of(batch: Any) -> tuple[list[Any], int]:
    """The parts of a batch through which random sums are derived, and how many sums of each."""
    own = split(batch, DRAWS)
    return own, -(-DRAWS // len(own))


def _derivatives(
    network: nn.Module, gates: Gates, batches: Sequence[Any], generator: torch.Generator
) -> Iterator[Tensor]:
    """Derivatives of random sums of answers by all gates end to end, float64."""
    locations = [g.log_alpha for g in gates]
    for part, draws in ((part, draws) for own, draws in map(parts_of, batches) for part in own):
        args, kwargs = inputs_of(part)
        answers = torch.utils._pytree.tree_leaves(network(*args, **kwargs))
        answers = [a for a in answers if isinstance(a, Tensor) and a.requires_grad]
        for draw in range(draws):
            total = torch.stack([random_sum(a, generator) for a in answers]).sum()
            slopes = torch.autograd.grad(total, locations, retain_graph=draw + 1 < draws, allow_unused=True)
            known = [torch.zeros_like(a) if s is None else s for a, s in zip(locations, slopes, strict=True)]
            yield torch.cat([s.flatten() for s in known]).double()


class ThroughWeights:
    """Derivatives by gates, read off those by the weights that the gates multiply, gates being all open.

    Args:
        found: of each weight, where its gates multiply it: the shape, of one place for each of them, the
            places that have gates, and these gates' numbers.
        number: of all gates.
    """

    def __init__(self, found: list[tuple[Tensor, tuple[int, ...], Tensor, Tensor]], number: int) -> None:
        self._found, self._number = found, number
        self.weights = [weight for weight, *_ in found]

    @classmethod
    def of(
        cls, small: fx.GraphModule, structure: Structure, model: nn.Module, sizes: Mapping[str, int]
    ) -> ThroughWeights | None:
        """Those of a network; None if not all weights with gates are those of the compacted network.

        Args:
            small: the network, compacted with its gates open.
            structure: of the network.
            model: the network with gates.
            sizes: how many gates there are at each path, in order.
        """
        analysis, program = structure.analysis, structure.analysis.program
        own = {**dict(small.named_parameters()), **dict(small.named_buffers())}
        starts = dict(zip(sizes, itertools.accumulate(sizes.values(), initial=0), strict=False))
        numbers = sum(p.numel() for p in small.parameters())
        if program.made or numbers != sum(program.values[node].numel() for node in program.parameters):
            return None
        found = []
        for node, value in structure.weights(model):
            weight = own.get(program.names[node])
            for side in analysis.sides(node):
                sets = analysis.choices_along(node, side)
                gates = [
                    (i, structure.gates[c])
                    for i, s in enumerate(sets.flat)
                    for c in s & structure.gates.keys()
                ]
                if not gates:
                    continue
                if weight is None or not _alike(weight, value):
                    return None
                places = torch.tensor([i for i, _ in gates], device=weight.device)
                at = torch.tensor([starts[path] + place for _, (path, place) in gates], device=weight.device)
                found.append((weight, analysis.shape_along(node, side), places, at))
        return cls(found, sum(sizes.values()))

    def by_gates(self, slopes: Sequence[Tensor]) -> Tensor:
        """Derivatives by all gates, (gates,), float64.

        Args:
            slopes: those by ``weights``.
        """
        total = slopes[0].new_zeros(self._number, dtype=torch.float64)
        for slope, (weight, shape, places, gates) in zip(slopes, self._found, strict=True):
            each = (slope.double() * weight.detach().double()).sum_to_size(shape).flatten()
            total.index_add_(0, gates, each[places])
        return total


def _alike(weight: Tensor, value: Tensor) -> bool:
    """Whether a weight is one with gates, which are nearly open."""
    same = weight.shape == value.shape and weight.dtype == value.dtype and weight.is_floating_point()
    return same and torch.allclose(weight, value, rtol=_NEARLY, atol=1e-6)


def random_sum(answers: Tensor, generator: torch.Generator) -> Tensor:
    """A sum of answers with random signs, over their spread.

    Args:
        answers: a set of them, of a batch.
        generator: on the CPU; draws the signs.
    """
    signs = torch.randint(2, answers.shape, generator=generator).to(answers) * 2 - 1
    spread = answers.detach().double().std(correction=0).clamp(min=1e-12)
    return ((answers * signs).sum() / spread.to(answers)).double()
