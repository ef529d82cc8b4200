"""Say of every parameter what can go, with what it is tied, or which operation keeps it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from sparsereg.compression.running import check_network
from sparsereg.compression.units.branches import Branch
from sparsereg.compression.units.constants import labelled
from sparsereg.compression.units.labels import FIRST, Ints
from sparsereg.compression.units.made import followed
from sparsereg.compression.units.program import module_of, name_of, place_of
from sparsereg.compression.units.rules import RULES
from sparsereg.compression.units.rules.table import PICKS
from sparsereg.compression.units.sites import Sites
from sparsereg.compression.units.solve import Units, solve
from sparsereg.summary import in_html, in_lines
from sparsereg.target_settings import FAMILIES

if TYPE_CHECKING:
    import pandas as pd

STATES = ("can go", "tied", "kept")


@dataclass(frozen=True)
class Row:
    """One axis of one parameter, as far as one family is concerned.

    Attributes:
        parameter: its name.
        axis: of the parameter, from 0.
        size: positions of the axis, or for heads and their places: how many there are.
        family: a key of ``FAMILIES``; empty where nothing can go.
        state: ``can go``, ``tied`` (goes with another parameter's) or ``kept``.
        reason: with what, or because of which operation in which line.
    """

    parameter: str
    axis: int
    size: int
    family: str
    state: str
    reason: str


@dataclass(frozen=True, repr=False)
class Explanation:
    """What of a network can go. Print it, or look at ``rows``.

    Attributes:
        network: name of its class.
        rows: one or more for each axis of each parameter that has units.
        parameters: number of parameters.
        removable: number of those that go with some unit that can go.
        unknown: operations without a rule, with the place where they are first called.
        staying: for each parameter, how many of its numbers go with nothing that can go.

    Example:
        >>> from torch import nn, ones
        >>> explain(nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 2)), ones(1, 6)).parameters
        38
    """

    network: str
    rows: tuple[Row, ...]
    parameters: int
    removable: int
    unknown: Mapping[str, str]
    staying: Mapping[str, int]

    @property
    def share(self) -> float:
        """Share of the parameters that go with some unit that can go, in [0, 1]."""
        return self.removable / self.parameters if self.parameters else 0.0

    def to_frame(self) -> pd.DataFrame:
        """A table with a row for each of ``rows``: parameter, axis, size, family, state, reason."""
        import pandas as pd

        columns = ["parameter", "axis", "size", "family", "state", "reason"]
        return pd.DataFrame([[getattr(row, c) for c in columns] for row in self.rows], columns=columns)

    def __repr__(self) -> str:
        return in_lines(*self._shown())

    def _repr_html_(self) -> str:
        return in_html(*self._shown())

    def _shown(self) -> tuple[str, dict[str, str]]:
        free = Counter[str]()
        for row in self.rows:
            free[row.family] += row.size if row.state == "can go" else 0
        kept = sum(row.state == "kept" for row in self.rows)
        return f"Explanation of {self.network}: print it for a line on each axis", {
            "parameters": f"{self.parameters:,}, {self.removable:,} ({self.share:.0%}) can go",
            "can go": ", ".join(f"{n:,} {family}" for family, n in free.items() if n) or "nothing",
            "kept": f"{kept:,} axes",
            "without a rule": ", ".join(self.unknown) or "no operation",
        }

    def __str__(self) -> str:
        lines = [
            f"{self.network}: {self.parameters:,} parameters, {self.removable:,} ({self.share:.0%}) can go"
        ]
        free = [row for row in self.rows if row.state == "can go"]
        counts = Counter[str]()
        for row in free:
            counts[row.family] += row.size
        lines += [f"  {family:10s}{n:9,}  {FAMILIES[family]}" for family, n in counts.items()]
        kept = Counter(row.reason for row in self.rows if row.state == "kept")
        if kept:
            lines.append("kept, because")
            lines += [f"  {reason} ({n} {'axes' if n > 1 else 'axis'})" for reason, n in kept.most_common()]
        if self.unknown:
            lines.append("operations without a rule, which keep what they touch")
            lines += [f"  {name} at {place}" for name, place in self.unknown.items()]
        width = max((len(row.parameter) for row in self.rows), default=0)
        lines.append(f"{'parameter':{width}s} axis    size  family     state   with or because")
        lines += [
            f"{r.parameter:{width}s} {r.axis:4d} {r.size:7,}  {r.family:10s} {r.state:7s} {r.reason}"
            for r in self.rows
        ]
        return "\n".join(lines)


def explain(model: nn.Module, example: Any, inputs: bool = False) -> Explanation:
    """Say of every parameter of a network what can go, with what, or what keeps it.

    Args:
        model: any network; left as it is.
        example: one batch as the network takes it: a tensor, a tuple of positional inputs, or a dictionary
            of inputs by name.
        inputs: whether features of the inputs could go, too.

    Raises:
        InputError: the network fails on the example, or its path depends on the data.

    Example:
        >>> from torch import nn, ones
        >>> str(explain(nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 2)), ones(1, 6))) != ""
        True
    """
    check_network(model)
    args, kwargs = inputs_of(example)
    labeller = labelled(followed(model, args, kwargs), inputs)
    Sites(labeller)  # the labeller learns what no gates can shut
    return explanation(type(model).__name__, solve(labeller))


def inputs_of(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional inputs and inputs by name of an example."""
    if isinstance(example, Tensor):
        return (example,), {}
    if isinstance(example, Mapping):
        return (), dict(example)
    if isinstance(example, tuple | list):
        return tuple(example), {}
    raise ValueError(
        "example_input must be a tensor, a tuple of inputs or a dictionary of them,"
        f" got {type(example).__name__}"
    )


def explanation(network: str, units: Units) -> Explanation:
    """Say of every parameter what can go, from the solved structure of a network of that name."""
    program = units.labeller.program
    family = families(units)
    rows: list[Row] = []
    first: dict[frozenset[int], str] = {}
    able = _able(units)
    staying: dict[str, int] = {}
    total = 0
    ways = units.branches.ways()
    for node in program.weights:
        if node not in program.parameters:
            continue
        name, value = program.names[node], program.weights[node]
        lines = _axes_of(units, node, value)
        for axis, line in lines:
            rows += _rows(units, name, axis, line, family, first)
        rows += _branches(units, node, name)
        if not lines:
            rows.append(Row(name, 0, value.numel(), "", "kept", _untouched(units, node)))
        total += value.numel()
        staying[name] = (
            0 if frozenset() not in ways[node] else value.numel() - _removable(units, node, value, able)
        )
    unknown = {op: _place(node) for op, node in units.labeller.unknown.items()}
    return Explanation(network, tuple(rows), total, total - sum(staying.values()), unknown, staying)


def _axes_of(units: Units, node: fx.Node, value: Tensor) -> list[tuple[int, Ints]]:
    """Units along each axis of a parameter that has some."""
    axes = units.labeller.axes
    raw = axes.of.get(node)
    if isinstance(raw, Tensor):
        roots = units.roots[raw.numpy()]
        found = []
        for axis in range(value.dim()):
            line = np.moveaxis(roots, axis, 0).reshape(value.shape[axis], -1)
            if value.shape[axis] > 1 and len(np.unique(line[:, 0])) > 1:
                found.append((axis, line[:, 0].astype(np.int64)))
        return found
    along = axes.weight_axes.get(node, [])
    return [(axis, line) for axis, line in enumerate(along) if line is not None and (line >= FIRST).any()]


def _rows(
    units: Units, name: str, axis: int, line: Ints, family: dict[int, str], first: dict[frozenset[int], str]
) -> list[Row]:
    found: dict[tuple[str, bool], set[int]] = {}
    for unit in np.unique(line[line >= FIRST]).tolist():
        for choice in units.of(unit):
            kind = family.get(choice, "units")
            if kind:
                found.setdefault((kind, choice in units.fixed), set()).add(choice)
    rows = []
    for (kind, fixed), choices in sorted(found.items()):
        if fixed:
            reason = _because(units, min(choices))
            rows.append(Row(name, axis, len(choices), kind, "kept", reason))
            continue
        key = frozenset(choices)
        here = f"{name} axis {axis}"
        other = first.setdefault(key, here)
        state, reason = ("can go", "") if other == here else ("tied", f"with {other}")
        rows.append(Row(name, axis, len(choices), kind, state, reason))
    return rows


def _branches(units: Units, node: fx.Node, name: str) -> list[Row]:
    """Branches of which a weight is one of the makers: the first of each, which is named."""
    rows = []
    for branch in units.branches.found:
        if node in branch.makers:
            first = units.labeller.program.names[branch.makers[0]]
            total = min((total for _, total in branch.edges), key=lambda n: n.name)
            state = "can go" if name == first else "tied"
            reason = f"all of a branch of the sum{_where(total)}" if name == first else f"with {first}"
            rows.append(Row(name, 0, 1, _kind(branch), state, reason))
    return rows


def _because(units: Units, choice: int) -> str:
    why, node = units.fixed[choice]
    if not isinstance(node, fx.Node):
        return why
    return f"{why}{_where(node)}"


def _where(node: fx.Node) -> str:
    if node.op == "output":
        return ""
    module = module_of(node)
    return f" ({name_of(node)}{' in ' + module if module else ''}, {_place(node)})"


def _place(node: fx.Node) -> str:
    return place_of(node) or "an unknown line"


def _untouched(units: Units, node: fx.Node) -> str:
    users = [user for user in node.users if user.op == "call_function"]
    if not users:
        return "nothing reads it"
    without = [user for user in users if name_of(user) not in RULES]
    user = (without or users)[0]
    why, by = units.labeller.axes.whole.get(node, ("", user))
    if why and not without:
        return f"{why}{_where(by)}"
    if without:
        return f"no rule for {name_of(user)}{_where(user)}"
    return f"it has no axis along which anything could go{_where(user)}"


def _removable(units: Units, node: fx.Node, value: Tensor, able: Tensor) -> int:
    """Elements of a parameter that go with some unit that can go, ``able`` as `_able` returns it."""
    goes = torch.zeros(value.shape, dtype=torch.bool)
    raw = units.labeller.axes.of.get(node)
    if isinstance(raw, Tensor):
        goes |= able[raw.long()]
    for axis, line in enumerate(units.labeller.axes.weight_axes.get(node, [])):
        if line is not None:
            view = [1] * value.dim()
            view[axis] = -1
            goes |= able[torch.from_numpy(line)].view(view)
    return int(goes.sum())


def _able(units: Units) -> Tensor:
    """Which units have a choice that is free, bool (units,)."""
    free = np.ones(len(units.roots), dtype=bool)
    free[:FIRST] = False
    free[[c for c in units.fixed if c < len(free)]] = False
    able = free.copy()
    for root, choices in units.split.items():
        able[root] = any(c not in units.fixed for c in choices)
    return torch.from_numpy(able[units.roots])


def families(units: Units) -> dict[int, str]:
    """Name the family of each choice that has a special one, or that of its weight."""
    axes, program = units.labeller.axes, units.labeller.program
    found: dict[int, str] = {}
    for start, node, axis in axes.owner:
        value = program.values[node]
        stack = any(name_of(u) in (*PICKS, "matmul", "bmm", "einsum") for u in node.users)
        kind = "channels" if value.dim() > 2 and axis >= 0 and not stack else "units"
        size = value.shape[axis] if axis >= 0 else value.numel()
        for unit in range(start, start + int(size)):
            for choice in units.of(unit):
                found.setdefault(choice, kind)
    for line in axes.averaged:
        for unit in np.unique(line[line >= FIRST]).tolist():
            for choice in units.of(unit):
                found[choice] = "width"
    _name_heads(units, found)
    found.update(dict.fromkeys(units.features, "inputs"))
    found.update(dict.fromkeys(units.experts, "experts"))
    for table in units.labeller.kept_rows:
        rows = axes.weight_axes.get(table, [None])[0]
        found.update((c, "experts") for unit in (() if rows is None else rows) for c in units.of(int(unit)))
    found.update((branch.choice, _kind(branch)) for branch in units.branches.found)
    return found


def _kind(branch: Branch) -> str:
    return "experts" if branch.expert else "blocks"


def _name_heads(units: Units, found: dict[int, str]) -> None:
    of_rows: set[int] = set()
    for rows, shared in units.labeller.axes.heads:
        sets = [units.of(int(row)) for row in rows]
        common = frozenset.intersection(*sets)
        if len(sets) > 1:  # all of it goes with its branch, or head by head
            found.update(dict.fromkeys(common, ""))
        for choices in sets:
            own = choices - common
            of_rows |= own
            found.update(dict.fromkeys(own, "kv_groups" if shared else "heads"))
    for choices in units.split.values():
        if choices & of_rows:
            places = {c for c in choices - of_rows if found.get(c) != ""}
            found.update(dict.fromkeys(places, "head_dims"))
