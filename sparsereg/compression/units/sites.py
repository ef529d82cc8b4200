"""Where gates have to sit: on which weights, so that what they shut is zero wherever it is summed over.

From every operation that sums over units the way goes back to the weights that make these: through
functions of single elements and moves, both sides of a sum, one factor of a product. A unit whose weights
there are zero contributes nothing, so that it can go.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from sparsereg.compression.running import can_train
from sparsereg.compression.units.cut import averages
from sparsereg.compression.units.labels import FIRST, Ints, stored, varying
from sparsereg.compression.units.program import Program, bound, module_of, name_of
from sparsereg.compression.units.rules.cells import CELLS, rows_of_cell
from sparsereg.compression.units.rules.elementwise import PRODUCTS, QUOTIENTS
from sparsereg.compression.units.rules.mixing import MAKERS, MATRICES, product_with_weight
from sparsereg.compression.units.rules.norms import go_by_whole_groups
from sparsereg.compression.units.rules.recurrent import BLOCKS, candidate_rows, passes
from sparsereg.compression.units.rules.stacked import stack_of
from sparsereg.compression.units.rules.table import MOVING, Dead, Labeller, behind, out_axis, picked, scaled

WHOLE = -2
"""In place of an axis: all of a weight takes the same gates."""
_OUT_AXIS = {"addmm": 1, "embedding": 1, "embedding_bag": 1}


@dataclass(frozen=True)
class Norm:
    """A normalisation over units, which has to leave out those that are gone.

    Attributes:
        node: the operation that takes the mean.
        module: path of the innermost module around it.
        axis: of what goes into that module, along which the units lie; negative ones count from the end.
        units: along it.
        groups: so many runs of units of one size, each with a mean of its own.
        centred: whether a mean is subtracted.
        weights: the weights behind it, if there are some.
        factor: name of the one that can undo what the input is enlarged by; empty if none can.
    """

    node: fx.Node
    module: str
    axis: int
    units: Ints
    groups: int
    centred: bool
    weights: tuple[fx.Node, ...]
    factor: str


class Sites:
    """Which weights take gates.

    Args:
        labeller: of the network; learns of units that no gates can shut.

    Attributes:
        axis: for each weight, the axis along which its gates lie; -1: along any; or ``WHOLE``.
        norms: normalisations over units that can leave some out.
        part: for weights of which only some rows take gates, the first of these and the one behind them.
        columns: for weights that read features of inputs, or what is not zero when it is gone, the axis along
            which these lie.
    """

    def __init__(self, labeller: Labeller) -> None:
        self.labeller = labeller
        self.program: Program = labeller.program
        self.axis: dict[fx.Node, int] = {}
        self.part: dict[fx.Node, tuple[int, int]] = {}
        self.columns = labeller.columns
        self.norms: list[Norm] = []
        self._seen: set[fx.Node] = set()
        for sources in labeller.reads:
            if len(sources) == 1:
                self._ask(sources[0])
            else:
                self._ask_one(sources)
        for node in self.program.calls:
            self._mean(node)
        self._experts()

    def _experts(self) -> None:
        """Gates of experts that a router picks lie across those of what the same weights make."""
        for one in self.labeller.axes.experts:
            taken = [maker for maker in one.makers if self.columns.get(maker, 0) != 0]
            if taken:
                why = "the weights that make what it gives have their gates on columns"
                self.labeller.axes.fix(one.units, why, taken[0])
            else:
                self.columns.update(dict.fromkeys(one.makers, 0))

    def _recurrent(self, node: fx.Node) -> None:
        """The rows of the candidates, and of the projections behind them."""
        for one in passes(node):
            for weight in one.rows:
                self.axis[weight] = 0
                self.part[weight] = candidate_rows(name_of(node), self.program.values[weight].shape[0])
            if one.projection is not None:
                self.axis[one.projection] = 0

    def _ask(self, source: Any) -> None:
        """The units of a tensor have to be zero when they are shut."""
        waiting = [source]
        while waiting:
            node = waiting.pop()
            if not isinstance(node, fx.Node) or node in self._seen or not self._labelled(node):
                continue
            self._seen.add(node)
            waiting += self._before(node)

    def _labelled(self, node: fx.Node) -> bool:
        labels = self.labeller.axes.of.get(node)
        parts = labels if isinstance(labels, tuple) else (labels,)
        return node in self.program.weights or any(p is not None and bool((p >= FIRST).any()) for p in parts)

    def _before(self, node: fx.Node) -> list[Any]:
        """Note the weights that make a tensor, or return the tensors that it is made from."""
        if node in self.program.weights:
            if can_train(self.program.weights[node]):  # no index
                self.axis.setdefault(node, -1)
            return []
        if node in self.labeller.through:
            return list(self.labeller.through[node])
        stack = stack_of(self.program, node)
        if stack is not None:
            self._take(stack.weight, stack.made)
            return []
        name = name_of(node).rstrip("_")
        if self.labeller.axes.picks_experts(node) and name != "embedding":
            if self.program.values[node.args[0]].dim() == 2:  # type: ignore[index]
                self.axis.setdefault(node.args[0], 1)  # type: ignore[arg-type]
            return []
        if name == "linear" and picked(self.program, bound(node)["weight"]):
            self._take(*behind(self.program, bound(node)["weight"], 0))
            return [bound(node)["bias"]]
        layer = product_with_weight(self.labeller, node) if name in ("matmul", "mm") else None
        if layer is not None:
            self._take(*layer[:2])
            return []
        if name in MAKERS:
            out = out_axis(node, 1 if "transpose" in name else _OUT_AXIS.get(name, 0))
            made = [scaled(bound(node).get(key), out) for key in MAKERS[name]]
            found = [w for w in made if w in self.program.weights]
            if self._blurs(node, found):
                return [node.args[0]]
            for weight in found:
                axis = out if self.program.values[weight].dim() > 1 else 0
                why = self._takes_none(weight)
                if why:
                    self.labeller.fix_along(weight, axis, why, node)
                else:
                    self._take(weight, axis)
            return self._computed(made) if found else [node.args[0]]
        if name in BLOCKS:
            self._recurrent(node)
            return []
        if name in CELLS:
            for weight in rows_of_cell(node):
                self.axis[weight] = 0
                self.part[weight] = candidate_rows(CELLS[name], self.program.values[weight].shape[0])
            states: Any = bound(node)["hx"]  # of which a part is handed on
            return list(states) if isinstance(states, list | tuple) else [states]
        if name in (*PRODUCTS, *MATRICES):
            return [self._one_of(node)]
        if name in QUOTIENTS:
            return [node.args[0]]
        return list(node.all_input_nodes)

    def _blurs(self, node: fx.Node, weights: list[fx.Node]) -> bool:
        """Whether a convolution takes each channel by itself, with kernels that are no weights of its own.

        Where a channel is zero it makes zeros, so that whatever makes the channel takes the gates.
        """
        if len(weights) != 1 or not name_of(node).startswith("conv") or not self._takes_none(weights[0]):
            return False
        kernels, bias = self.program.values[weights[0]], bound(node)["bias"]
        each = bound(node)["groups"] == len(kernels) and kernels.shape[1] == 1
        return each and bias is None and isinstance(node.args[0], fx.Node) and self._zero(node.args[0])

    def _takes_none(self, weight: fx.Node) -> str:
        """Why a weight can take no gates; empty if it can."""
        if weight in self.program.constants:
            return "it is made by a tensor that is no parameter and no buffer"
        made = self.program.made.get(weight)
        return "the weight is computed" if made is not None and not made.gates else ""

    def _take(self, weight: fx.Node, axis: int) -> None:
        """Let a weight take gates along an axis; along a second one where two layers read it each its way."""
        known = self.axis.get(weight, -1)
        if known in (-1, axis):
            self.axis[weight] = axis
        elif weight in self.program.made or self.columns.setdefault(weight, axis) != axis:
            self.labeller.fix_along(weight, axis, "its weight makes units along two of its axes", weight)

    def _computed(self, made: list[Any]) -> list[fx.Node]:
        """Of what makes units, vectors that are put together from others, as a bias of three parts."""
        nodes = [m for m in made if isinstance(m, fx.Node) and m not in self.program.weights]
        return [m for m in nodes if self.program.values[m].dim() == 1]

    def _one_of(self, node: fx.Node) -> Any:
        """The factor of a product that is to be zero: a weight if there is one, else the largest tensor."""
        if name_of(node) == "scaled_dot_product_attention":
            return bound(node)["value"]
        out = self.labeller.axes.of.get(node)
        wanted = varying(out) if isinstance(out, Tensor) else set()
        units = self._units(out)
        able = [n for n in node.all_input_nodes if self._zero(n)]
        if not able:
            return None

        def rank(n: fx.Node) -> tuple[bool, bool, bool, int]:
            value = self.program.values[n]
            own, covers = units <= self._units(self.labeller.labels(n)), self._covers(n, wanted)
            return own, covers, n in self.program.weights, int(value.numel())

        return max(able, key=rank)

    def _zero(self, node: fx.Node) -> bool:
        weight = node in self.program.weights and can_train(self.program.weights[node])
        weight = weight and node not in self.program.constants
        zero = self.labeller.dead.get(node, Dead.ZERO) is Dead.ZERO
        return self._labelled(node) and (weight or zero)

    def _units(self, labels: Any) -> set[int]:
        """The units of a tensor, one number for those that are equal."""
        if not isinstance(labels, Tensor):
            return set()
        roots = self.labeller.axes.sets.find(np.unique(stored(labels).numpy()))
        return set(roots[roots >= FIRST].tolist())

    def _covers(self, node: fx.Node, wanted: set[int]) -> bool:
        labels = self.labeller.labels(node)
        return len(varying(labels)) >= len(wanted)

    def _ask_one(self, sources: tuple[Any, ...]) -> None:
        able = [s for s in sources if isinstance(s, fx.Node) and self._zero(s)]
        if able:
            self._ask(able[0])

    def _mean(self, node: fx.Node) -> None:
        """Note a mean over units, or why its units cannot be gated."""
        source = node.args[0] if node.args else None
        if not isinstance(source, fx.Node):
            return
        labels = self.labeller.axes.of.get(source)
        dims = averages(node)
        if not isinstance(labels, Tensor) or not set(dims) & varying(labels):
            return
        roots = self._roots(source)
        if roots is None or not set(dims) & varying(roots):  # all of it goes, or nothing
            return
        units = np.unique(labels.numpy()).astype(np.int64)
        found = self._norm(node)
        if found is None and name_of(node) == "mean" and self._zero(source):
            self.labeller.axes.means_of_all.add(node)
            self._ask(source)
        elif found is None and _groups(node) > 1:
            go_by_whole_groups(self.labeller, node)
        elif found is None:
            self.labeller.axes.fix(units, f"{name_of(node)} is taken over it in a way of its own", node)
        elif all(n.module != found.module for n in self.norms):
            self.norms.append(found)
            for weight in found.weights:  # they undo what the norm's input is enlarged by
                raw = weight not in self.labeller.axes.weight_axes
                self.axis.setdefault(weight, -1 if raw else 0)

    def _roots(self, node: fx.Node) -> Tensor | None:
        """Labels of a tensor, the same for units that are equal."""
        labels = self.labeller.axes.of[node]
        if not isinstance(labels, Tensor):
            return None
        return torch.from_numpy(self.labeller.axes.sets.find(labels.numpy())).int()

    def _norm(self, node: fx.Node) -> Norm | None:
        """A normalisation that fills a module of its own; None if it is not one that is known."""
        path = module_of(node)
        inside = [n for n in self.program.calls if module_of(n) == path] if path else []
        sources = {
            n
            for part in inside
            for n in part.all_input_nodes
            if n not in self.program.weights and module_of(n) != path and self._labelled(n)
        }
        weights = tuple(
            dict.fromkeys(
                w
                for part in inside
                for w in part.all_input_nodes
                if w in self.program.weights and self.program.weights[w].is_floating_point()
            )
        )
        if not sources or not (weights or _norms_alone(inside)):
            return None
        places = [self._place(source) for source in sorted(sources, key=lambda n: n.name)]
        first = places[0]
        if first is None or any(p is None or p[0] != first[0] for p in places):
            return None
        if any(not np.array_equal(p[1], first[1]) for p in places if p is not None):
            return None
        axis, units = first
        means = [n for n in inside if averages(n)]
        kinds = {name_of(n) for n in means}
        by_hand = _centred_by_hand(means)
        if len(kinds) != 1 and not by_hand:
            return None
        within = f"{path}."
        if any(module_of(n).startswith(within) for n in sources) or not _only_normed(sources, inside, kinds):
            return None
        centred = by_hand or kinds <= {"layer_norm", "group_norm", "native_layer_norm"}
        if not centred and kinds != {"rms_norm"} and not _mean_of_squares(node):
            return None
        if name_of(node) == "group_norm" or (centred and len(averages(node)) > 1):
            axis = axis + self.program.values[next(iter(sources))].dim()
            if axis != 1 or averages(node)[0] != 1:  # its mean is over all that lies behind the batch
                return None
        able = all(_factor(weight, inside) for weight in weights)
        multiply = [weight for weight in weights if not _adds(weight, inside)]
        alone = len(weights) == len(multiply) == 1
        if weights and not (multiply and (able or alone)):
            return None
        factor = self.program.names[multiply[0]].rpartition(".")[2] if weights and able else ""
        return Norm(node, path, axis, units, _groups(node), centred, weights, factor)

    def _place(self, source: fx.Node) -> tuple[int, Ints] | None:
        """The axis along which units lie, from the end, and the units; None if it is not one axis."""
        labels = self._roots(source)
        along = sorted(varying(labels)) if labels is not None else []
        if labels is None or len(along) != 1:
            return None
        others = [d for d in range(labels.dim()) if d != along[0]]
        units = (labels.amax(others) if others else labels).numpy().astype(np.int64)
        return along[0] - labels.dim(), units


def _groups(node: fx.Node) -> int:
    """The groups of channels over which a normalisation takes means."""
    return int(bound(node)["num_groups"]) if name_of(node) == "group_norm" else 1


def _only_normed(sources: set[fx.Node], inside: list[fx.Node], kinds: set[str]) -> bool:
    """Whether a module whose norms are whole operations does nothing else with its input."""
    whole = all(kind.endswith("_norm") for kind in kinds)
    users = [user for source in sources for user in source.users if user in inside]
    return not whole or all(name_of(user) in kinds | MOVING for user in users)


def _norms_alone(inside: list[fx.Node]) -> bool:
    """Whether a module does nothing but norm what it is given, so that a factor behind it is one of that."""
    whole = [n for n in inside if averages(n)]
    moves = [n for n in inside if n not in whole]
    sources: list[Any] = [n.args[0] for n in whole]
    alone = all(name_of(n).endswith("_norm") for n in whole) and not set(sources) & set(whole)
    return alone and all(name_of(n) in (*MOVING, "to") for n in moves)


def _centred_by_hand(means: list[fx.Node]) -> bool:
    """Whether means are those of a layer norm that is written out: a mean, and a variance over all."""
    spreads = [n for n in means if _mean_of_squares(n) or _variance(n)]
    others = [n for n in means if n not in spreads]
    return bool(spreads and others) and all(name_of(n) == "mean" for n in others)


def _variance(node: fx.Node) -> bool:
    """Whether an operation is a variance that divides by all that there are, not by one less."""
    if name_of(node) != "var":
        return False
    a = bound(node)
    return a.get("correction", a.get("unbiased", True)) in (0, False)


def _mean_of_squares(node: fx.Node) -> bool:
    """Whether a mean is one of squares."""
    source = node.args[0]
    if name_of(node) != "mean" or not isinstance(source, fx.Node):
        return False
    if name_of(source) == "square":
        return True
    if name_of(source) == "pow":
        return bool(source.args[1] == 2)
    return name_of(source) == "mul" and source.args[0] is source.args[1]


def _adds(weight: fx.Node, inside: list[fx.Node]) -> bool:
    """Whether a module adds a weight to what it has normalised."""
    for user in weight.users:
        if user not in inside:
            continue
        name = name_of(user)
        if name.rstrip("_") in ("add", "sub") and user.all_input_nodes != [weight]:
            return True
        if name.endswith("_norm") and bound(user).get("bias") is weight:
            return True
        if name in MOVING and _adds(user, inside):
            return True
    return False


def _factor(weight: fx.Node, inside: list[fx.Node]) -> bool:
    """Whether a module multiplies by a weight, or adds it to what is normalised: not 1 + weight, say."""
    for user in weight.users:
        name = name_of(user)
        if user not in inside:
            continue
        if name.rstrip("_") == "add" and user.all_input_nodes == [weight]:
            return False
        if name in MOVING and not _factor(user, inside):
            return False
    return True
