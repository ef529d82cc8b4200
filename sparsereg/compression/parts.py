"""Parts of a network that have a cost of their own: modules by their names, or what a family of gates shuts.

The cost of modules is that of their weights, or of the products that they compute, with all gates as they
are. The cost of a family is that of all weights which it could take, with all other gates open: half of the
heads is half of what attention costs, whatever the width is. So budgets of families never contradict each
other.
"""

from __future__ import annotations

import difflib
import fnmatch
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from sparsereg.distributions import HardConcrete, log_alpha_at
from sparsereg.errors import InputError
from sparsereg.target_settings import FAMILIES, Share


def inside(path: str, pattern: str) -> bool:
    """Whether a module, or one that it lies in, has a name of a pattern.

    Example:
        >>> inside("blocks.3.mlp.fc1", "blocks.*.mlp"), inside("blocks.3.attn", "blocks.*.mlp")
        (True, False)
    """
    names = itertools.accumulate(path.split("."), "{}.{}".format)
    return any(fnmatch.fnmatchcase(name, pattern) for name in names)


def matched(paths: Iterable[str], pattern: str) -> frozenset[str]:
    """The modules whose names a pattern knows, or if there are none, the ends of whose names it knows.

    Example:
        >>> sorted(matched(["decoder.blocks.0.mlp.fc1", "decoder.blocks.0.attn"], "blocks.*.mlp"))
        ['decoder.blocks.0.mlp.fc1']
    """
    known = list(paths)
    whole = frozenset(path for path in known if inside(path, pattern))
    return whole or frozenset(path for path in known if inside(path, f"*.{pattern}"))


@dataclass(frozen=True)
class Selected:
    """What belongs to a part.

    Attributes:
        full: what it costs with all gates open.
        members: paths of its modules; for a family its name.
        exact: what is left of it now.
        expected: what is expected to be left, a differentiable scalar.
    """

    full: int
    members: frozenset[str]
    exact: Callable[[], int]
    expected: Callable[[], Tensor]


class Counts(Protocol):
    """What counts a network."""

    gates: list[HardConcrete]
    parameters: int
    macs: int

    def expected_parameters(self) -> Tensor:
        """Expected parameters that stay."""

    def expected_macs(self) -> Tensor:
        """Expected multiply-accumulates that stay."""

    def paths(self) -> list[str]:
        """Modules that cost something."""

    def select(self, where: str, cost: str) -> Selected:
        """What belongs to a part."""


class Part:
    """A part of a network, and how much of it may stay.

    Args:
        accountant: of the network.
        share: what the part may cost.

    Raises:
        InputError: there is no such part, or nothing of it can go.
    """

    def __init__(self, accountant: Counts, share: Share) -> None:
        self.accountant = accountant
        self.share = share
        self.selected = accountant.select(share.where, share.cost)
        if not self.selected.members:
            raise InputError(f"{share.said}: {_near(share.where, accountant.paths())}")
        if not self.selected.full:
            raise InputError(f"{share.said}: the modules of that name have no {share.cost}")

    @property
    def is_family(self) -> bool:
        """Whether it is that of a family of gates."""
        return self.share.where in FAMILIES

    def exact(self) -> float:
        """The share of its cost that compaction leaves now."""
        return self.selected.exact() / self.selected.full

    def expected(self) -> Tensor:
        """The share of its cost that is expected to stay, a differentiable scalar."""
        return self.selected.expected() / self.selected.full

    @cached_property
    def own(self) -> list[Tensor]:
        """Which places of each gate take more from the part than from the rest, for what each costs."""
        macs = self.share.cost == "macs"
        cost = self.accountant.expected_macs if macs else self.accountant.expected_parameters
        full = self.accountant.macs if macs else self.accountant.parameters
        wholes = self._slopes if self.is_family else self._differentiated(cost)
        rest = max(full - self.selected.full, 1)
        return [
            (part > 0) & (part / self.selected.full >= OWN * (whole - part).clamp(min=0) / rest)
            for part, whole in zip(self._slopes, wholes, strict=True)
        ]

    @cached_property
    def touched(self) -> list[Tensor]:
        """Which places of each gate the cost of the part depends on noticeably."""
        most = max((float(slope.max()) for slope in self._slopes), default=0.0)
        return [slope > NOTICEABLE * most for slope in self._slopes]

    @cached_property
    def _slopes(self) -> list[Tensor]:
        return self._differentiated(self.selected.expected)

    def _differentiated(self, cost: Callable[[], Tensor]) -> list[Tensor]:
        """Slopes of a cost where all gates are half open, so that none of them is flat."""
        gates = self.accountant.gates
        before = [gate.log_alpha.detach().clone() for gate in gates]
        _set_(gates, (log_alpha_at(0.5, g.temperature, g.gamma, g.zeta) for g in gates))
        try:
            with torch.inference_mode(False), torch.enable_grad():
                slopes = torch.autograd.grad(cost(), [g.log_alpha for g in gates], allow_unused=True)
        finally:
            _set_(gates, before)
        return [torch.zeros_like(b) if s is None else s for s, b in zip(slopes, before, strict=True)]


OWN = 2.0
"""A gate belongs to a part if it takes so many times the share of its cost than of that of the rest."""
NOTICEABLE = 1e-3
"""Slopes of a cost, as shares of the largest one, above which it depends on a gate."""


@torch.no_grad()
def _set_(gates: Sequence[HardConcrete], values: Iterable[Tensor | float]) -> None:
    for gate, value in zip(gates, values, strict=True):
        gate.log_alpha.copy_(torch.as_tensor(value))


def parts_of(accountant: Counts, shares: Sequence[Share]) -> list[Part]:
    """Find parts of a network; families first.

    Raises:
        InputError: there is no such part, nothing of it can go, or two of them share a module.
    """
    parts = sorted((Part(accountant, share) for share in shares), key=lambda part: not part.is_family)
    for one, two in itertools.combinations(parts, 2):
        common = one.selected.members & two.selected.members
        if common and one.share.cost == two.share.cost:
            raise InputError(
                f"{one.share.said} and {two.share.said} overlap in {min(common)}: give patterns that share no"
                " module"
            )
    return parts


def _near(where: str, known: Sequence[str]) -> str:
    """Why there is no part of a name."""
    if where in FAMILIES:
        return f"no gates of the family {where} are there"
    names = list(dict.fromkeys(p for path in known for p in (path, path.rpartition(".")[0]) if p))
    near = difflib.get_close_matches(where, names, 3, 0.4) or names[:3]
    there = ", ".join(near) or "none"
    return f"no module with weights is called {where}; there are {there}, and families {' '.join(FAMILIES)}"
