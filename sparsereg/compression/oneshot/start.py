"""A gated network that starts where one shot leaves it: units shut, what reads them repaired, in place."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from sparsereg.compression.budget import SURE
from sparsereg.compression.compact import compact
from sparsereg.compression.oneshot.origins import Places
from sparsereg.compression.oneshot.ranked import Ranked, opened_
from sparsereg.compression.oneshot.readers import readers
from sparsereg.distributions import HardConcrete
from sparsereg.penalties import hard_concretes
from sparsereg.target_settings import Share

NUM_INPUTS = 1024
"""How many inputs are looked at."""


def start_in_one_shot_(
    network: nn.Module,
    example: Any,
    cost: str | None,
    kept: float,
    batches: Sequence[Any],
    shares: Sequence[Share] = (),
    round_to: int = 1,
    seed: int = 0,
) -> None:
    """Shut the gates of what ``shrink`` would take out, and give the rest the weights of its repair.

    Parameters stay the same objects of the same shapes; ``compact`` returns what ``shrink`` would. All gates
    are so surely open or shut that training draws nothing else: it trains the network that is left.

    Args:
        network: with gates; changed in place.
        example: see ``compact``.
        cost: parameters or macs; None where only parts have budgets.
        kept: share of it that may stay.
        batches: of inputs, without labels.
        shares: what parts of the network may cost.
        round_to: widths are multiples of it, see ``meet_``.
        seed: of what is drawn.
    """
    ranked = Ranked(opened_(network), example, cost, batches, seed=seed, shares=shares)
    after, small = ranked.smaller(kept, round_to)
    cut = compact(after, example, check=False)
    _put_back_(network, cut, small, ranked.origins.of(after))
    left = {path: SURE * (2 * g.median().sign() - 1) for path, g in hard_concretes(after).items()}
    _set_(network, left)


@torch.no_grad()
def _set_(network: nn.Module, locations: dict[str, Tensor]) -> None:
    gates: dict[str, HardConcrete] = hard_concretes(network)
    for path, location in locations.items():
        gates[path].log_alpha.copy_(location)


@torch.no_grad()
def _put_back_(network: nn.Module, cut: fx.GraphModule, small: fx.GraphModule, places: Places) -> None:
    """Add what a repair has changed to the weights of the whole network.

    Args:
        network: changed in place.
        cut: the compacted network before its repair.
        small: the same after it.
        places: of its weights in those of the whole.
    """
    for reader in readers(small):
        if reader.weight not in places:
            continue
        rows, columns = (p.to(small.get_parameter(reader.weight).device) for p in places[reader.weight])
        change = small.get_parameter(reader.weight) - cut.get_parameter(reader.weight)
        whole = _raw(network, reader.weight)
        there = (rows >= 0).nonzero().flatten(), (columns >= 0).nonzero().flatten()
        at = torch.meshgrid(rows[there[0]], columns[there[1]], indexing="ij")
        whole[at] += change[there[0]][:, there[1]].to(whole)
        outputs = (rows, columns)[reader.axis]
        constants = [name for name in (reader.bias, reader.norm and f"{reader.norm}.running_mean") if name]
        for name in constants:
            change = _raw(small, name) - _raw(cut, name)
            _raw(network, name)[outputs[outputs >= 0]] += change[outputs >= 0]


def _raw(network: nn.Module, name: str) -> Tensor:
    """A parameter or buffer as it is stored, not as gates leave it."""
    path, _, last = name.rpartition(".")
    module = network.get_submodule(path)
    value = module._parameters.get(last) if last in module._parameters else module._buffers.get(last)
    assert value is not None
    return value
