"""Which gates a network's own class can hold, found before anything is trained.

Some places behind each gate are taken out, and ``restore_class`` looks for the arguments with which the class
has that shape: first gate by gate, since one argument may tie two of them, then for all together, with the
same answers; of very large networks the shapes have to do. Which places is drawn, so that what is left is no
multiple of anything.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from sparsereg.compression.restore import Restorer, recipe_of, weights_left
from sparsereg.compression.units.cut import Cut
from sparsereg.compression.units.emit import Emitter
from sparsereg.compression.units.structure import Analysis
from sparsereg.errors import InputError

log = logging.getLogger(__name__)

Key = TypeVar("Key", bound=Hashable)
ANSWERING = 2e8
"""Parameters up to which a network's class is made, and asked for its answers, in float64."""


@torch.random.fork_rng()  # a class draws its weights
def not_held(
    model: nn.Module,
    analysis: Analysis,
    gates: Mapping[Key, Sequence[Sequence[int]]],
    example: Any,
) -> dict[Key, str]:
    """Say of which gates the class of a network cannot hold the shapes, and why.

    Args:
        model: without gates; left as it is.
        analysis: of the network.
        gates: for each gate the choices of its places, (places, layers that share it).
        example: one batch as the network takes it.

    Returns:
        The reasons, by gate; nothing where it is not known how the network was made.
    """
    try:
        tried = _Tried(model, analysis, example)
    except InputError as error:
        log.info("whether %s can hold the shape is not known: %s", type(model).__name__, error)
        return {}
    some = {key: _some(places) for key, places in gates.items()}
    reasons = {key: why for key, own in some.items() if (why := tried.refused(own))}
    held = [key for key in some if key not in reasons]
    if tried.refused({c for key in held for c in some[key]}):
        gone: set[int] = set()
        for key in sorted(held, key=lambda key: tried.left(some[key])):
            why = tried.refused(gone | some[key])
            if why:
                reasons[key] = why
            else:
                gone |= some[key]
    return reasons


def _some(places: Sequence[Sequence[int]]) -> set[int]:
    """The choices of a third of the places, of one at least; of none if there is but one."""
    number = max(1, len(places) // 3) if len(places) > 1 else 0
    return {choice for own in random.Random(0).sample(list(places), number) for choice in own}


class _Tried:
    """Looks whether a class can hold what is left of a network.

    Args:
        model: the whole network.
        analysis: of it.
        example: one batch as it takes it.

    Raises:
        InputError: how it was made is not known.
    """

    def __init__(self, model: nn.Module, analysis: Analysis, example: Any) -> None:
        self.model, self.analysis, self.example = model, analysis, example
        own = dict(model.named_parameters(remove_duplicate=False))
        self.restorer = Restorer(model, recipe_of(model, None), {n: p.detach() for n, p in own.items()})
        self.answers = sum(p.numel() for p in model.parameters()) <= ANSWERING
        self._shapes = [(node, weight.to("meta")) for node, weight in analysis.program.weights.items()]
        if self.answers:
            self.restorer.built({})

    def refused(self, gone: set[int]) -> str:
        """Why the class cannot be without some choices; empty if it can."""
        if not gone:
            return ""
        try:
            self.restorer.of(self._left(gone)).arguments()
            if not self.answers:
                return ""
            smaller = Emitter(Cut(self.analysis.units, gone), self.model).module()
            self.restorer.of(weights_left(smaller, self.model)).restored(smaller, self.example)
        except InputError as error:
            return str(error).removeprefix("restore_class: ").partition(" now; train with")[0]
        return ""

    def left(self, gone: set[int]) -> int:
        """How many parameters there are without some choices."""
        return Cut(self.analysis.units, gone, self._shapes).num_parameters

    def _left(self, gone: set[int]) -> dict[str, Tensor]:
        """What is left of each parameter, under all of its names; without memory."""
        cut = Cut(self.analysis.units, gone, self._shapes)
        named = dict(self.model.named_parameters(remove_duplicate=False))
        names = self.analysis.program.names.items()
        left = {id(named[name]): cut.weights[node] for node, name in names if name in named}
        return {name: left.get(id(p), p.detach()) for name, p in named.items()}
