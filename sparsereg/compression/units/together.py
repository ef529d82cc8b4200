"""What gates give in one training pass of a network: drawn together and multiplied together.

A network of many small vectors of gates would pay dozens of small operations for each weight. Here all gates
are drawn in one operation of each kind, and one gather makes what all weights are multiplied by.
"""

from __future__ import annotations

import itertools
import math
import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sparsereg.compression.units.gating import (
    GatedModule,
    Given,
    SharedGates,
    Spread,
    check_no_gradient_is_under_way,
    once,
    serves,
)
from sparsereg.distributions import sample
from sparsereg.model.basic_l0_blocks import L0Gate


def draw_anew(network: nn.Module, args: Any) -> None:
    """Draw gates for a pass, in training; forget the draws of the last one. A hook before each pass."""
    Together.of(network).draw()


class _Slot(NamedTuple):
    """What one parameter of a module, or the input of a normalisation, is multiplied by.

    Attributes:
        module: whose it is.
        name: of the parameter; empty for an input.
        shape: of the factor, which is broadcast to the parameter.
        columns: for each element of the factor the places of its gates among all, from first to last.
    """

    module: GatedModule
    name: str
    shape: torch.Size
    columns: list[Tensor]


class Together:
    """All gates that modules of a network read their weights through.

    Args:
        network: with gates; parts of it may live longer.

    Attributes:
        drawn: what all gates were drawn as; None if that is to be done.
        apart: whether each vector of gates is drawn by itself.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = weakref.ref(network)
        self.drawn: Tensor | None = None
        self.apart = False
        self.gates = [m for m in network.modules() if isinstance(m, SharedGates)]
        self.modules = [m for m in network.modules() if isinstance(m, GatedModule)]
        self.first = [next(c for c in m.children() if isinstance(c, L0Gate)) for m in self.modules]
        self.state = self._state()
        self.lengths = [g.log_alpha.numel() for g in self.gates]
        starts = itertools.accumulate(self.lengths, initial=0)
        self.start = dict(zip(map(id, self.gates), starts, strict=False))
        weights = [p.dtype for m in self.modules for p in m.parameters()]
        self.dtype = torch.float64 if torch.float64 in weights else torch.float32
        self.number = sum(self.lengths)
        self.slots = [s for m in self.modules for name in m._gated_sites for s in self._slots(m, name)]
        self.sizes = [math.prod(slot.shape) for slot in self.slots]
        depth = max((len(slot.columns) for slot in self.slots), default=0)
        self.index = [self._row(n) for n in range(depth)]
        self._norms()

    @classmethod
    def of(cls, network: nn.Module) -> Together:
        """Those of a network; found anew if it is no longer what it was."""
        known = network.__dict__.get("_together")
        if not isinstance(known, cls) or not known.fits():
            known = network.__dict__["_together"] = cls(network)
        return known

    def __reduce__(self) -> Any:
        return type(None), ()  # copies of a network find their own

    def _state(self) -> list[Any]:
        """What all of this depends on."""
        gates = [(g.log_alpha.numel(), g.log_alpha.device, g.log_alpha.dtype) for g in self.gates]
        return [*gates, *(getattr(m, "_gated_sites", None) is not None for m in self.modules)]

    def fits(self) -> bool:
        """Whether the network still is what it was."""
        return self._state() == self.state

    def _slots(self, module: GatedModule, name: str) -> list[_Slot]:
        """What a parameter is multiplied by; factors of which one covers the others are one."""
        found: dict[torch.Size, list[Tensor]] = {}
        for gate, index in module._gated_sites[name]:
            own, places = module._modules[gate].gates, module._buffers[index]  # type: ignore[union-attr]
            assert isinstance(own, SharedGates)
            assert places is not None
            moved = (places + self.start[id(own)]).masked_fill(places >= own.log_alpha.numel(), self.number)
            found.setdefault(places.shape, []).append(moved)
        whole = torch.broadcast_shapes(*found)
        parameter = module._parameters.get(name)
        if parameter is not None and parameter.dim() == 1:
            whole = parameter.shape
        if whole not in found and not (parameter is not None and whole == parameter.shape):
            return [_Slot(module, name, s, [c.flatten() for c in found[s]]) for s in found]
        columns = [c.expand(whole).flatten() for group in found.values() for c in group]
        return [_Slot(module, name, whole, columns)]

    def _row(self, n: int) -> Tensor:
        """The n-th gate of each place of all parameters; one that is open where there is none."""
        columns = [slot.columns for slot in self.slots]
        rows = [c[n] if n < len(c) else torch.full_like(c[0], self.number) for c in columns]
        return torch.cat(rows)

    def _norms(self) -> None:
        """Which slots are inputs of normalisations; equal ones are one group, with the places of each."""
        splits = [index.split(self.sizes) for index in self.index]
        known: dict[tuple[Any, ...], int] = {}
        self.group: dict[int, int] = {}
        places: list[Tensor] = []
        parts: list[int] = []  # groups of channels with means of their own
        for i, (module, name, *_) in enumerate(self.slots):
            if name:
                continue
            columns = [split[i] for split in splits]
            assert module._gated_norm is not None
            groups = module._gated_norm.groups
            key = (groups, *(tuple(c.tolist()) for c in columns))
            if key not in known:
                known[key] = len(known)
                places.append(torch.stack(columns))
                parts.append(groups)
            self.group[id(module)] = known[key]
        self.group_sizes = [p.shape[1] for p in places]
        self.undone = [
            (i, self.group[id(m)])
            for i, (m, name, *_) in enumerate(self.slots)
            if name and m._gated_undoes(name)
        ]
        if places:
            self._parts(places, parts)

    def _parts(self, places: list[Tensor], parts: list[int]) -> None:
        """Which mean each place of the normalisations counts for, and which one enlarges each factor."""
        device = places[0].device
        self.places = torch.cat(places, 1)
        self.parts = parts
        lengths = [size // n for size, n in zip(self.group_sizes, parts, strict=True) for _ in range(n)]
        self.part_sizes = torch.tensor(lengths, device=device)
        numbers = torch.arange(len(lengths), device=device)
        self.member = numbers.repeat_interleave(self.part_sizes)
        of_norm = self.member.split(self.group_sizes)
        owner: list[Tensor] = [numbers.new_tensor([len(lengths)]) for _ in self.sizes]
        for i, norm in self.undone:
            owner[i] = of_norm[norm][:1] if parts[norm] == 1 else of_norm[norm]
        self.scaled = torch.cat([own.expand(size) for own, size in zip(owner, self.sizes, strict=True)])

    def draw(self) -> None:
        """Draw all gates and hand them out, in training; else take back what was handed out."""
        self.forget()
        devices = {gate.log_alpha.device for gate in self.gates}
        self.apart = len(devices) != 1 or not all(gate.training for gate in self.gates)
        if self.apart:
            return
        self.drawn = z = self._sample()
        once(z, self, Together.forget)
        if self.slots:
            self._hand_out(torch.cat([z, z.new_ones(1)]).to(self.dtype))

    def forget(self) -> None:
        """Take back what was handed out; gates that are asked before the next pass are drawn anew then."""
        self.drawn, self.apart = None, False
        for gate in self.gates:
            gate.__dict__.update(_held=None, _together=self)  # past nn.Module, which looks for parameters
        for module in self.modules:
            module.__dict__["_gated_given"] = None

    def hold(self, asked: SharedGates) -> None:
        """Give each vector of gates its draw, for modules that ask by themselves; draw if that is to be done.

        Args:
            asked: gates that are asked for.
        """
        known: Together = self
        if not serves(self.drawn, asked) and not self.apart:
            check_no_gradient_is_under_way()
            network = self.network()
            known = self if network is None else Together.of(network)
            if known.fits():
                known.draw()
        if known.drawn is None:
            return
        for gate, part in zip(known.gates, known.drawn.split(known.lengths), strict=True):
            gate.__dict__["_held"] = part.to(gate.log_alpha.dtype)

    def _sample(self) -> Tensor:
        shapes = {gate._shape for gate in self.gates}
        if len(shapes) == 1:
            return sample(torch.cat([gate.log_alpha for gate in self.gates]), *shapes.pop())
        return torch.cat([sample(gate.log_alpha, *gate._shape) for gate in self.gates])

    def _hand_out(self, z: Tensor) -> None:
        spreads, stretches = self._spreads(z.detach())
        factors = z.index_select(0, self.index[0])
        for index in self.index[1:]:
            factors = factors * z.index_select(0, index)
        if self.undone:
            factors = factors / stretches.index_select(0, self.scaled)
        given = {
            id(m): Given({}, spreads.get(self.group.get(id(m), -1)), gate, z)
            for m, gate in zip(self.modules, self.first, strict=True)
        }
        for slot, part in zip(self.slots, factors.split(self.sizes), strict=True):
            if slot.name:
                factor = part if len(slot.shape) == 1 else part.view(slot.shape)
                given[id(slot.module)].factors.setdefault(slot.name, []).append(factor)
        for module in self.modules:
            module.__dict__["_gated_given"] = given[id(module)]

    def _spreads(self, z: Tensor) -> tuple[dict[int, Spread], Tensor]:
        """What each group of normalisations has to know, and how much each mean enlarges; 1 behind them."""
        if not self.group_sizes:
            return {}, z
        mask = (z[self.places] > 0).all(0).to(z.dtype)
        sizes = self.part_sizes.to(mask.dtype)
        num_open = mask.new_zeros(len(sizes)).index_add(0, self.member, mask).clamp(min=1)
        stretch = (sizes / num_open).sqrt()
        each = stretch[self.member]
        far = mask * each
        fewer = (1 / num_open - 1 / sizes)[self.member]
        own = (far, mask / num_open[self.member], mask, each, fewer)
        spreads = {}
        for i, found in enumerate(zip(*(part.split(self.group_sizes) for part in own), strict=True)):
            spread = Spread(*found)
            if self.parts[i] == 1:
                spread = spread._replace(stretch=spread.stretch[0], fewer=spread.fewer[0])
            spreads[i] = spread
        return spreads, torch.cat([stretch, stretch.new_ones(1)])
