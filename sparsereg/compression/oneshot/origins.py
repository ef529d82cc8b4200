"""Where the weights of a compacted network come from: which rows and columns of the original's they are."""

import torch
from torch import Tensor, nn

from sparsereg.compression.compact import compact
from sparsereg.compression.running import Example, copied, doubled
from sparsereg.compression.units.explain import inputs_of
from sparsereg.compression.units.smaller import fixed_sizes, smaller
from sparsereg.compression.units.structure import structure_of
from sparsereg.penalties import hard_concretes

_BITS = 20
"""For each of two places in one whole number that float64 holds exactly."""
_WIDEST = 2**_BITS - 1
OPEN = 10.0
"""Location of a gate whose median is exactly 1; minus that, exactly 0."""


Places = dict[str, tuple[Tensor, Tensor]]
"""By a weight's name in a compacted network, places along its first two axes in the original."""


class Origins:
    """For each weight of ``compact(model)``, the places along two axes of the original's that stayed.

    A copy whose weights say where they stand is compacted: with gates that are all surely open or shut, each
    number of the result is one of its own. It is traced once, for any state of the gates.

    Args:
        model: left as it is.
        example_input: see ``compact``.
    """

    def __init__(self, model: nn.Module, example_input: Example) -> None:
        self._told = copied(model).double()
        self._example, given = example_input, inputs_of(example_input)
        self._structure = structure_of(model, *given)
        if self._structure is not None and self._structure.fixed is None:
            self._structure.fixed = fixed_sizes(model, self._structure, *given)
        self._gates = hard_concretes(self._told)
        locations = {id(gate.log_alpha) for gate in self._gates.values()}
        with torch.no_grad():
            for weight in self._told.parameters():
                if weight.dim() > 1 and id(weight) not in locations and max(weight.shape[:2]) < _WIDEST:
                    weight.copy_(_tags(weight))

    def of(self, model: nn.Module, round_to: int = 1) -> Places:
        """Return the places that stayed in a network; weights with gates on single numbers are left out.

        Args:
            model: the network, with gates as they are now.
            round_to: see ``compact``.
        """
        with torch.no_grad():
            for path, gate in hard_concretes(model).items():
                self._gates[path].log_alpha.copy_(torch.where(gate.median() > 0, OPEN, -OPEN))
        if self._structure is None:
            small = compact(self._told, doubled(self._example), round_to=round_to, check=False)
        else:
            given = inputs_of(self._example)
            (small,) = smaller(self._told, self._structure, *given, round_to, (None,))
        found = {name: _read(value) for name, value in small.named_parameters() if value.dim() > 1}
        return {name: places for name, places in found.items() if places is not None}


def _tags(weight: Tensor) -> Tensor:
    """A number for each place along the first two axes, in (0, 1]; the same along the others."""
    first, second = (
        torch.arange(1, n + 1, dtype=torch.float64, device=weight.device) for n in weight.shape[:2]
    )
    tags: Tensor = (first[:, None] * 2**_BITS + second) / 4**_BITS
    return tags.view(*tags.shape, *(1,) * (weight.dim() - 2)).expand_as(weight)


def _read(value: Tensor) -> tuple[Tensor, Tensor] | None:
    """Places along both axes; None if the numbers are not those of whole rows and columns."""
    tags = (
        (value.detach() * 4**_BITS).flatten(2).select(2, 0) if value.dim() > 2 else value.detach() * 4**_BITS
    )
    if not tags.numel() or not bool((tags == tags.round()).all()):
        return None
    codes = tags.long()
    first, second = codes[:, 0] >> _BITS, codes[0] & _WIDEST
    whole = torch.equal(codes, (first[:, None] << _BITS) + second)
    return (first - 1, second - 1) if whole and bool((first > 0).all()) and bool((second > 0).all()) else None
