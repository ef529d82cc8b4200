"""Branches that can go as a whole: one of the terms of a sum, such as f(x) in x + f(x).

A sum is taken with all of its terms, however its additions nest. Its skip is the term that another one is
computed from, or else the one with the fewest weights of its own (a projection); the other terms are
branches. One can go if the weights that make it can take a gate: with these zero it is zero, and what is
left of the sum is the other terms. What serves nothing but a branch goes with it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

from torch import Tensor, fx

from sparsereg.compression.running import can_train
from sparsereg.compression.units.program import Program, bound, name_of
from sparsereg.compression.units.rules.elementwise import PRODUCTS, QUOTIENTS, ZERO_STAYS
from sparsereg.compression.units.rules.mixing import MAKERS, MATRICES
from sparsereg.compression.units.rules.reductions import POOLS
from sparsereg.compression.units.rules.table import MOVING, ZEROS

Edge = tuple[fx.Node, fx.Node]
"""A term and the addition that takes it."""
Ways = frozenset[frozenset[int]]
"""Sets of choices of which one has to stay whole: the ways from an operation to the output."""
ALWAYS: Ways = frozenset([frozenset()])

_KEEPS_ZERO = {*ZERO_STAYS, *MOVING, *POOLS, "pad", "mean", "sum", "nansum", "cumsum", "glu"}
_NORMS = ("layer_norm", "rms_norm", "group_norm", "native_layer_norm")
"""Without weights of their own they leave a tensor of zeros as it is."""


@dataclass(frozen=True)
class Branch:
    """Terms of sums that go together, because the same weights make them.

    Attributes:
        choice: the number of the choice that decides on them.
        edges: the terms.
        makers: the weights which make them.
        expert: whether they are terms of a mixture, each weighed by something that the network computes.
    """

    choice: int
    edges: frozenset[Edge]
    makers: tuple[fx.Node, ...]
    expert: bool = False


@dataclass(frozen=True)
class _Term:
    """A term that could go: the weights that make it, and the operations between them and the sum."""

    edge: Edge
    makers: frozenset[fx.Node]
    path: frozenset[fx.Node]


class Branches:
    """The branches of a network.

    Args:
        program: the network.
        first: number of the first choice.

    Attributes:
        found: all branches, in the order of their choices.
        alternatives: choices of which one has to stay each: all terms of a sum that has no skip.
        choice_of: the choice of each term that can go.
    """

    def __init__(self, program: Program, first: int) -> None:
        self.program = program
        self._bit, self._before = _ancestors(program)
        self._floats = sum(self._bit[n] for n in program.calls if _is_floating(program, n))
        self._floats |= sum(self._bit[n] for n in program.inputs if _is_floating(program, n))
        terms: list[_Term] = []
        wholes: list[list[Edge]] = []
        for total in program.calls:
            if _is_sum(program, total) and not _is_inner(program, total):
                edges, able = self._of_sum(total)
                terms += able
                wholes += [edges] if len(able) == len(edges) else []
        self.found = [replace(b, expert=self._is_expert(b)) for b in _grouped(terms, wholes, first)]
        self.choice_of = {edge: branch.choice for branch in self.found for edge in branch.edges}
        self.alternatives = [
            tuple(self.choice_of[edge] for edge in edges)
            for edges in wholes
            if all(edge in self.choice_of for edge in edges)
        ]

    def _is_expert(self, branch: Branch) -> bool:
        """Whether its sums have other terms, too, that are weighed: what two of them have in common."""
        return all(
            sum(self._is_weighed(t) for t, _ in _terms(self.program, self._outermost(total))) > 1
            and self._is_weighed(term)
            for term, total in branch.edges
        )

    def _outermost(self, total: fx.Node) -> fx.Node:
        """The addition that takes all terms of a sum."""
        while _is_inner(self.program, total):
            (total,) = _users(total)
        return total

    def _is_weighed(self, term: fx.Node) -> bool:
        """Whether a term is a product of tensors that are both computed, or a function of one."""
        while term.op == "call_function" and len(term.all_input_nodes) == 1:
            (term,) = term.all_input_nodes
        if term.op != "call_function" or name_of(term).rstrip("_") not in PRODUCTS:
            return False
        factors = [n for n in term.args[:2] if isinstance(n, fx.Node) and n.op == "call_function"]
        return len(factors) == 2 and all(self._before[n] & self._floats for n in factors)

    def _of_sum(self, total: fx.Node) -> tuple[list[Edge], list[_Term]]:
        """All terms of a sum, and those that could go."""
        edges = list(_terms(self.program, total))
        skip = edges[0] if name_of(total).startswith("sub") else self._skip(edges)
        return edges, [t for edge in edges if edge != skip and (t := self._term(edge, edges)) is not None]

    def _skip(self, edges: list[Edge]) -> Edge | None:
        """The term that others are computed from, or the only one with the fewest weights of its own."""
        behind = [sum(bool(self._bit[t] & self._before[other]) for other, _ in edges) for t, _ in edges]
        if any(behind):
            return edges[behind.index(max(behind))]
        common = reduce(int.__and__, (self._before[t] for t, _ in edges))
        costs = [self._weight(self._before[t] & ~common) for t, _ in edges]
        return edges[costs.index(min(costs))] if costs.count(min(costs)) == 1 else None

    def _weight(self, bits: int) -> int:
        return sum(w.numel() for n, w in self.program.weights.items() if self._bit[n] & bits)

    def _term(self, edge: Edge, edges: list[Edge]) -> _Term | None:
        """A term with what makes it; None if it cannot go by itself."""
        term, total = edge
        others = [t for t, _ in edges if t is not term]
        if not any(self._before[term] & (self._before[o] | self._bit[o]) & self._floats for o in others):
            return None
        shared = reduce(int.__or__, (self._before[o] | self._bit[o] for o in others))
        path: set[fx.Node] = set()
        makers = self._makers(term, shared, path)
        if not makers or any(not set(_users(n)) <= path | {total} for n in path):
            return None
        return _Term(edge, frozenset(makers), frozenset(path))

    def _makers(self, node: Any, shared: int, path: set[fx.Node]) -> set[fx.Node] | None:
        """Weights with which a tensor is zero; None if there are none that nothing else is made by."""
        if not isinstance(node, fx.Node):
            return set() if node is None or node == 0 else None
        if node in self.program.weights:
            learnt = node in self.program.parameters  # a table that is none, as of angles, makes no branch
            if node in self.program.made and not self.program.made[node].gates:
                return None
            return {node} if learnt and can_train(self.program.weights[node]) else None
        if node in path:
            return set()
        if node.op != "call_function" or self._bit[node] & shared:
            return None
        path.add(node)
        name = name_of(node).rstrip("_")
        if name in (*PRODUCTS, *MATRICES):
            return self._any(_factors(self.program, node), shared, path)
        if name in ZEROS:
            return set()
        needed = _needed(node, name)
        if needed is None:
            return None
        found = self._all(needed, shared, path)
        under = node.args[1] if name in QUOTIENTS else None
        if found and isinstance(under, fx.Node) and any(self._bit[m] & self._before[under] for m in found):
            return None
        return found

    def _all(self, nodes: Iterable[Any], shared: int, path: set[fx.Node]) -> set[fx.Node] | None:
        found: set[fx.Node] = set()
        for node in nodes:
            makers = self._makers(node, shared, path)
            if makers is None:
                return None
            found |= makers
        return found

    def _any(self, nodes: Iterable[Any], shared: int, path: set[fx.Node]) -> set[fx.Node] | None:
        for node in nodes:
            trial = set(path)
            found = self._makers(node, shared, trial)
            if found:
                path |= trial
                return found
        return None

    def ways(self) -> dict[fx.Node, Ways]:
        """For each operation and weight its ways to the output; it serves nobody with none of them whole."""
        found: dict[fx.Node, Ways] = {self.program.output: ALWAYS}
        for node in reversed(self.program.graph.nodes):
            if node not in found:
                found[node] = _least(
                    way | ({self.choice_of[node, user]} if (node, user) in self.choice_of else set())
                    for user in node.users
                    for way in found[user]
                )
        return found

    def passed(self, gone: set[int]) -> dict[fx.Node, fx.Node | None]:
        """Additions of which a term is gone, with the other one; None if both are.

        Args:
            gone: choices.
        """
        found: dict[fx.Node, fx.Node | None] = {}
        for node in self.program.calls:
            if not _is_sum(self.program, node):
                continue
            left = [t for t in node.args[:2] if self._stays(t, node, gone, found)]
            if len(left) < 2:
                found[node] = found.get(left[0], left[0]) if left else None  # type: ignore[arg-type]
        return found

    def _stays(self, term: Any, total: fx.Node, gone: set[int], passed: Mapping[fx.Node, Any]) -> bool:
        return self.choice_of.get((term, total)) not in gone and passed.get(term, term) is not None


def _ancestors(program: Program) -> tuple[dict[fx.Node, int], dict[fx.Node, int]]:
    """A bit for each node, and the bits of all that each is computed from."""
    bit = {node: 1 << i for i, node in enumerate(program.graph.nodes)}
    before: dict[fx.Node, int] = {}
    for node in program.graph.nodes:
        before[node] = 0
        for source in node.all_input_nodes:
            before[node] |= before[source] | bit[source]
    return bit, before


def _is_floating(program: Program, node: fx.Node) -> bool:
    value = program.values[node]
    return isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 0


def _is_sum(program: Program, node: fx.Node) -> bool:
    """Whether a node adds two different tensors of its own shape."""
    if node.op != "call_function" or name_of(node).rstrip("_") not in ("add", "sub"):
        return False
    left, right = bound(node).get("self"), bound(node).get("other")
    if not isinstance(left, fx.Node) or not isinstance(right, fx.Node) or left is right:
        return False
    if bound(node).get("alpha", 1) != 1 or not all(_is_floating(program, n) for n in (left, right, node)):
        return False
    shape, kind = program.values[node].shape, program.values[node].dtype
    return all(program.values[n].shape == shape and program.values[n].dtype == kind for n in (left, right))


def _is_inner(program: Program, node: fx.Node) -> bool:
    """Whether an addition is read by another addition only."""
    users = _users(node)
    if len(users) != 1 or not name_of(node).startswith("add") or users[0].op != "call_function":
        return False
    return _is_sum(program, users[0]) and name_of(users[0]).startswith("add")


def _users(node: fx.Node) -> list[fx.Node]:
    """Who reads a node; parts that nobody takes aside."""
    return [u for u in node.users if u.users or u.op == "output"]


def _terms(program: Program, total: fx.Node) -> Iterator[Edge]:
    for term in total.args[:2]:
        assert isinstance(term, fx.Node)
        if name_of(total).startswith("add") and _is_sum(program, term) and _is_inner(program, term):
            yield from _terms(program, term)
        else:
            yield term, total


def _factors(program: Program, node: fx.Node) -> list[fx.Node]:
    """The factors of a product of which one has to be zero, parameters first, other weights last."""
    if name_of(node) == "scaled_dot_product_attention":
        return [bound(node)["value"]]

    def rank(n: fx.Node) -> int:
        return 0 if n in program.parameters else 2 if n in program.weights else 1

    return sorted(node.all_input_nodes, key=rank)


def _needed(node: fx.Node, name: str) -> list[Any] | None:
    """What has to be zero so that the result of an operation is; None if nothing makes it that."""
    a = bound(node)
    if name in MAKERS:
        made = [a.get(key) for key in MAKERS[name]]
        if isinstance(made[0], fx.Node):
            return [m for m in made if m is not None]
        return [node.args[0]] if name in _NORMS and made[1] is None else None
    if name in ("add", "sub", "where"):
        return list(node.args[-2:] if name == "where" else node.args[:2])
    if name in QUOTIENTS:
        return [node.args[0]]
    if name == "_weight_norm":
        return [a["g"]]
    if name == "masked_fill":
        return [node.args[0], a["value"]]
    if name not in _KEEPS_ZERO or (name == "pad" and a.get("value")):
        return None
    first = node.args[0]
    return list(first) if isinstance(first, list | tuple) else [first]


def _least(ways: Iterable[frozenset[int]]) -> Ways:
    """The same ways without those that hold another one."""
    found = set(ways)
    return frozenset(w for w in found if not any(other < w for other in found))


def _grouped(terms: list[_Term], wholes: list[list[Edge]], first: int) -> list[Branch]:
    """Terms that the same weights make go together, unless the weights also make something else."""
    groups: list[tuple[set[Edge], set[fx.Node], set[fx.Node]]] = []
    for term in terms:
        edges, makers, path = {term.edge}, set(term.makers), set(term.path)
        for group in [g for g in groups if g[1] & makers]:
            groups.remove(group)
            edges, makers, path = edges | group[0], makers | group[1], path | group[2]
        groups.append((edges, makers, path))
    able = [
        (edges, makers)
        for edges, makers, path in groups
        if all(set(_users(maker)) <= path for maker in makers)
        and not any(set(whole) <= edges for whole in wholes)
    ]
    return [
        Branch(first + i, frozenset(edges), tuple(sorted(makers, key=lambda n: n.name)))
        for i, (edges, makers) in enumerate(able)
    ]
