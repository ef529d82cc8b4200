"""The keys of ``target:``, what a network may cost in the end and how fast it gets there."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from sparsereg.checks import check_positive
from sparsereg.errors import InputError
from sparsereg.settings import NOT_NEGATIVE, Settings, count, setting, within

MILLISECONDS = "milliseconds"
"""The cost of a target that is about time."""
FAMILIES = {
    "channels": "channels of convolutions",
    "units": "units of hidden layers",
    "heads": "attention heads",
    "head_dims": "places in the vectors of heads",
    "kv_groups": "keys and values with the heads that share them",
    "width": "the residual stream, over which norms take means",
    "inputs": "features of the inputs, where asked for",
    "blocks": "whole branches of residual blocks",
    "experts": "whole experts of a mixture, which a router weighs",
}
"""What can go, by name: the families of gates."""
SHAPES = ("free", "uniform")
"""Whether layers that are alike may come to differ in size."""


@dataclass(frozen=True)
class Target(Settings):
    """How a target is reached, and targets of parts; docs/choosing-lambda.md, docs/any-network.md."""

    params: str | tuple[str, ...] | None = setting(
        None,
        "shares of the parameters to remove from parts, e.g. blocks.*.mlp:0.5, heads:0.25, or a list of such",
    )
    macs: str | tuple[str, ...] | None = setting(
        None, "shares of the multiply-accumulate operations of parts to keep, in the same way"
    )
    one_shot: bool = setting(
        False,
        "the network is trained already: units go before the first epoch, what reads them is repaired, and"
        " all epochs train what is left; docs/one-shot.md",
    )
    ramp: float = setting(
        0.6, "share of the epochs over which the target falls geometrically", within("(0, 1]", "a share")
    )
    proportional_gain: float = setting(
        10.0, "multiplier for each unit of log(expected cost / target)", NOT_NEGATIVE
    )
    integral_gain: float = setting(0.01, "what it grows by in each step for each unit", NOT_NEGATIVE)
    round_to: int = setting(
        1,
        "at the end gates of a layer open and shut so many at a time: multiples of 8 or 16 run faster",
        count(),
    )
    every_n_steps: int = setting(5, "the expected cost is differentiated anew every so many steps", count())

    def check(self) -> None:
        """Targets of parts can be read."""
        _ = self.parts

    @property
    def parts(self) -> "tuple[Share, ...]":
        """What parts of the network may cost."""
        return part_goals(self.params, self.macs, ("target.params", "target.macs"))


@dataclass(frozen=True)
class Share:
    """What a part of a network may cost.

    Attributes:
        where: a pattern of names of modules, or a family of gates.
        cost: one of ``budget.COSTS``.
        kept: share of the part's cost that may stay, in (0, 1).
        said: as the user gave it.
    """

    where: str
    cost: str
    kept: float
    said: str


Parts = str | Sequence[str] | Mapping[str, float]
"""Shares of parts: ``NAME:SHARE``, several with commas between or as a list, or a dictionary."""


def part_goals(
    params: Parts | None, macs: Parts | None, keys: tuple[str, str] = ("target_params", "target_part_macs")
) -> tuple[Share, ...]:
    """Return what parts of a network may cost.

    Args:
        params: for each part the share of its parameters to remove, in (0, 1).
        macs: for each part the share of its multiply-accumulate operations to keep, in (0, 1).
        keys: what the user calls these two, for messages.

    Raises:
        InputError: something else than a name and a share.

    Example:
        >>> [(part.where, part.cost, part.kept) for part in part_goals("heads:0.25,blocks.*.mlp:0.5", None)]
        [('heads', 'parameters', 0.75), ('blocks.*.mlp', 'parameters', 0.5)]
    """
    found = []
    for given, cost, key in ((params, "parameters", keys[0]), (macs, "macs", keys[1])):
        for where, value in _pairs(given, key):
            said = f"{key}={where}:{value}" if where else f"{key}={value}"
            try:
                share = float(str(value))
            except ValueError:
                share = math.nan
            if not where or not 0 < share < 1:
                raise InputError(f"{said}: expected a name and a share in (0, 1), such as blocks.*.mlp:0.5")
            found.append(Share(where, cost, 1 - share if cost == "parameters" else share, said))
    return tuple(found)


def _pairs(given: Parts | None, key: str) -> Iterator[tuple[str, object]]:
    if given is None:
        return
    if isinstance(given, Mapping):
        yield from given.items()
        return
    for text in [given] if isinstance(given, str) else given:
        for part in str(text).split(","):
            where, _, value = part.strip().rpartition(":")
            yield where, value


def falling(kept: float, progress: float) -> float:
    """Share of the cost that is allowed while it falls geometrically from 1 to ``kept``.

    Args:
        kept: in (0, 1).
        progress: from 0, where the whole network is allowed, to 1; what is outside counts as the nearest.

    Example:
        >>> [falling(0.25, progress) for progress in (-1, 0, 0.5, 1, 2)]
        [1.0, 1.0, 0.5, 0.25, 0.25]
    """
    return math.pow(kept, min(max(progress, 0.0), 1.0))


def goal(
    target_sparsity: float | None, target_macs: float | None, target_latency_ms: float | None = None
) -> tuple[str, float]:
    """Return which cost a target is about, and how much of it may stay.

    Args:
        target_sparsity: share of the parameters to remove, in (0, 1).
        target_macs: share of the multiply-accumulate operations to keep, in (0, 1).
        target_latency_ms: milliseconds that one call may take, > 0.

    Returns:
        One of ``budget.COSTS`` and a share of it, or ``MILLISECONDS`` and their number.

    Raises:
        ValueError: none of them is given, or several, or one that is outside its range.

    Example:
        >>> goal(target_sparsity=0.75, target_macs=None)
        ('parameters', 0.25)
    """
    given = {
        "target_sparsity": target_sparsity,
        "target_macs": target_macs,
        "target_latency_ms": target_latency_ms,
    }
    named = [name for name, value in given.items() if value is not None]
    if len(named) != 1:
        said = " and ".join(named) or "none"
        raise ValueError(f"give one of target_sparsity, target_macs and target_latency_ms, got {said}")
    if target_latency_ms is not None:
        return MILLISECONDS, check_positive("target_latency_ms", target_latency_ms)
    value = given[named[0]]
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1:
        raise ValueError(f"{named[0]} must be a share in (0, 1), got {value!r}")
    return ("parameters", 1 - value) if target_macs is None else ("macs", float(value))
