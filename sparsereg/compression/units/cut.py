"""Run a network on what is left of it: weights without what is gone, sizes as they are then."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from sparsereg.compression.units.labels import BLANK, Labels, along
from sparsereg.compression.units.program import Call, Program, bound, name_of, plain_call
from sparsereg.compression.units.rules.experts import calls_without
from sparsereg.compression.units.rules.table import normed_by_lines, read_by_rows, rule_of
from sparsereg.compression.units.solve import Units


class Cut:
    """A network from which some choices are gone.

    Args:
        units: of the network.
        gone: choices.
        weights: what is cut, one after another; the network's own if None.
    """

    def __init__(
        self, units: Units, gone: Iterable[int], weights: Iterable[tuple[fx.Node, Tensor]] | None = None
    ) -> None:
        self.units = units
        self.program: Program = units.labeller.program
        self.gone = set(gone)
        self.stays = torch.from_numpy(units.alive(self.gone))
        self.passed = units.branches.passed(self.gone)
        self.serving = self._serving()
        hidden = {n for one in units.labeller.axes.experts for n in one.hidden if self.passed.get(n)}
        self.instead = {n: other for n in hidden if (other := self.passed.pop(n)) is not None}
        self.entrances = self._entrances()
        self.labels: dict[Any, Any] = {n: v for n, v in units.labeller.axes.of.items() if v is not None}
        self.labels |= self._rows()
        self.use(self.program.weights.items() if weights is None else weights)

    def use(self, weights: Iterable[tuple[fx.Node, Tensor]]) -> None:
        """Cut other weights, such as those with gates multiplied in."""
        normed = {bound(n)["v"]: n for n in self.program.calls if normed_by_lines(n)}
        sizes: dict[fx.Node, Tensor] = {}
        self.weights = {}
        for node, value in weights:
            self.weights[node] = self._weight(node, value)
            if node in normed:
                sizes[normed[node]] = _size(value, _normed_over(normed[node], value))
        for node, whole in sizes.items():
            self._resize(node, whole)

    def _resize(self, node: fx.Node, whole: Tensor) -> None:
        """Let the size of normed weights make up for those that are gone from under their norm."""
        g, v = bound(node)["g"], bound(node)["v"]
        over = _normed_over(node, whole)
        axis = next((d for d in range(whole.dim()) if d not in over), 0)
        along = self.units.labeller.axes.weight_axes.get(v, [None] * whole.dim())[axis]
        if along is not None:
            whole = whole.index_select(axis, torch.from_numpy(np.flatnonzero(self.stays.numpy()[along])))
        left = _size(self.weights[v], over)
        self.weights[g] = self.weights[g] * torch.where(whole > 0, left / whole, 0).to(whole.dtype)
        self.weights[v] = torch.where(left > 0, self.weights[v], 1)  # of nothing but zeros the norm is 0 / 0

    def run(self, *inputs: Any) -> Any:
        """What the smaller network gives."""
        return self.program.run(
            self.weights,
            *inputs,
            calls=self.calls,
            passed=self.passed,
            serving=self.serving,
            entrances=self.entrances,
        )

    def _entrances(self) -> dict[fx.Node, tuple[int, Tensor]]:
        """Tensors of features, and vectors, of which only some are read: the axis, and which."""
        found = {}
        axes = self.units.labeller.axes
        for node, axis, units in (*axes.inputs, *axes.vectors):
            alive = self.stays[torch.from_numpy(units)]
            if not bool(alive.all()):
                found[node] = (axis, alive.nonzero().flatten())
        return found

    def _rows(self) -> dict[fx.Node, Labels]:
        """Labels of matrices of which some rows are read alone."""
        lines = self.units.labeller.axes.weight_axes
        found = {}
        for weight in self.program.weights:
            rows = lines.get(weight, [None])[0]
            if rows is not None and read_by_rows(self.program, weight):
                found[weight] = along(rows, 0, self.program.values[weight].shape)
        return found

    def _serving(self) -> set[fx.Node]:
        """Operations and weights that lead to the output when branches are gone."""
        found: set[fx.Node] = set()
        waiting = [self.program.output]
        while waiting:
            node = waiting.pop()
            if node in found:
                continue
            found.add(node)
            instead = self.passed.get(node)
            waiting += node.all_input_nodes if instead is None else [instead]
        return found

    @cached_property
    def calls(self) -> dict[fx.Node, Call]:
        """How each operation is called that has to be called in another way."""
        found = {}
        for node in self.program.calls:
            rule = rule_of(node)
            wanted = node in self.serving and node in self.labels and node not in self.entrances
            if wanted and rule is not None and rule.call is not None:
                found[node] = rule.call(self, node, self.program.arguments(node))
        experts = self.units.labeller.axes.experts
        return found | calls_without(self.program, experts, self.stays, found, self.instead)

    def alive_along(self, labels: Labels, axis: int) -> Tensor:
        """Which positions along an axis are left, (size,); all where they are alike."""
        if labels.stride(axis) == 0 and labels.shape[axis] > 1:
            return torch.ones(labels.shape[axis], dtype=torch.bool)
        for other in range(labels.dim()):
            if other != axis and labels.stride(other) == 0 and labels.shape[other]:
                labels = labels.narrow(other, 0, 1)
        if not labels.numel():
            return torch.ones(labels.shape[axis], dtype=torch.bool)
        flat = labels.movedim(axis, 0).reshape(labels.shape[axis], -1).long()
        stays = self.stays[flat] & (flat != BLANK)
        return stays.any(1) | (flat == BLANK).all(1)

    def left(self, labels: Labels, axis: int) -> int:
        """How many positions along an axis are left."""
        return int(self.alive_along(labels, axis).sum())

    def is_of_all(self, node: fx.Node) -> bool:
        """Whether a mean counts what is gone as zeros."""
        return node in self.units.labeller.axes.means_of_all

    def _weight(self, node: fx.Node, value: Tensor) -> Tensor:
        axes = self.units.labeller.axes
        raw = axes.of.get(node)
        if isinstance(raw, Tensor):
            for axis in range(value.dim()):
                value = value.index_select(axis, self.alive_along(raw, axis).nonzero().flatten())
            return value
        for axis, units in enumerate(axes.weight_axes.get(node, [])):
            if units is not None:
                kept = torch.from_numpy(np.flatnonzero(self.stays.numpy()[units]))
                value = value.index_select(axis, kept)
        return value

    def masked(self, *inputs: Any) -> Any:
        """What the whole network gives when what is gone makes zeros, and means are over what stays.

        This is what a smaller network has to equal.
        """
        zeroed = {node: self._zeroed(node, value) for node, value in self.program.weights.items()}
        normed = {bound(node)["v"] for node in self.program.calls if normed_by_lines(node)}
        zeroed |= {v: self.program.weights[v] for v in normed}
        for branch in self.units.branches.found:
            if branch.choice in self.gone:
                zeroed |= {maker: torch.zeros_like(zeroed[maker]) for maker in branch.makers}
        return self.program.run(zeroed, *inputs, call=self._masked_call)

    def _zeroed(self, node: fx.Node, value: Tensor) -> Tensor:
        axes = self.units.labeller.axes
        raw = axes.of.get(node)
        value = value.clone()
        if isinstance(raw, Tensor):
            return value.masked_fill(~self.stays[raw.long()], 0)
        for axis, units in enumerate(axes.weight_axes.get(node, [])):
            if units is not None:
                value.movedim(axis, 0)[~self.stays[torch.from_numpy(units)]] = 0
        return value

    def _masked_call(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        """A mean, or a norm, over the units that stay; of normed weights, zeros where units are gone."""
        if normed_by_lines(node):
            return self._zeroed(bound(node)["v"], plain_call(node, args, kwargs))
        dims = [] if self.is_of_all(node) else averages(node)
        labels = self.labels.get(node.args[0]) if dims else None
        kept = {d: self.alive_along(labels, d) for d in dims} if isinstance(labels, Tensor) else {}
        kept = {d: alive for d, alive in kept.items() if not bool(alive.all())}
        if not kept:
            return plain_call(node, args, kwargs)
        if name_of(node) == "group_norm":
            return _normed_by_groups(node, args, kwargs, kept[1])
        inside = args[0]
        for d, alive in kept.items():
            inside = inside.index_select(d, alive.nonzero().flatten())
        if not name_of(node).endswith("_norm"):
            return plain_call(node, (inside, *args[1:]), kwargs)
        ((d, alive),) = kept.items()
        rest = [w[alive] if isinstance(w, Tensor) else w for w in args[2:]]
        found = plain_call(node, (inside, [inside.shape[d]], *rest), kwargs)
        return torch.zeros_like(args[0]).index_copy(d, alive.nonzero().flatten(), found)

    @property
    def num_parameters(self) -> int:
        """Parameters that are left."""
        return sum(self.weights[n].numel() for n in self.program.parameters & self.serving)


def _normed_by_groups(node: fx.Node, args: Any, kwargs: Any, alive: Tensor) -> Tensor:
    """A group norm over the channels that stay, group by group; zeros where channels are gone."""
    x, groups, *affine = args
    made = torch.zeros_like(x)
    for channels in torch.arange(len(alive)).view(groups, -1):
        left = channels[alive[channels]]
        if len(left):
            own = [w[left] if isinstance(w, Tensor) else w for w in affine]
            made[:, left] = plain_call(node, (x[:, left], 1, *own), kwargs)
    return made


def _size(weight: Tensor, over: list[int]) -> Tensor:
    found: Tensor = torch.linalg.vector_norm(weight, dim=over, keepdim=True)
    return found


def _normed_over(node: fx.Node, weight: Tensor) -> list[int]:
    """The axes over which a weight norm takes its norm."""
    return [d for d in range(weight.dim()) if d != bound(node)["dim"] % weight.dim()]


def averages(node: fx.Node) -> list[int]:
    """Axes over which an operation takes a mean."""
    name = name_of(node)
    if name not in ("layer_norm", "rms_norm", "group_norm", "mean", "var", "std"):
        return []
    rank = node.args[0].meta["val"].dim()  # type: ignore[union-attr]
    if name == "group_norm":
        return [1]
    if name in ("layer_norm", "rms_norm"):
        return list(range(rank - len(bound(node)["normalized_shape"]), rank))
    dims = bound(node).get("dim")
    dims = list(range(rank)) if dims is None else [dims] if isinstance(dims, int) else dims
    return [d % rank for d in dims]
