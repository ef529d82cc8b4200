"""Which experts there are: rows of tables of weights that a router picks.

An expert is a row of each of several tables, which are read at the same places: W[i] for the numbers i that
a router finds largest. Its gate sits on rows with which what it makes is zero, however the router weighs it.
The router keeps all of its own rows, so that it picks as before. The smaller tables have the rows that stay;
where another one is picked, one of them is read, and what comes of it is replaced by zeros.
"""

from __future__ import annotations

import heapq
import itertools
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from sparsereg.compression.running import can_train
from sparsereg.compression.units.labels import Experts
from sparsereg.compression.units.program import Call, Program, bound, name_of
from sparsereg.compression.units.rules.elementwise import ELEMENTS, PRODUCTS, ZERO_STAYS
from sparsereg.compression.units.rules.moves import COPIES
from sparsereg.compression.units.rules.stacked import letters_of
from sparsereg.compression.units.rules.table import BEFORE, CATS, SPLITS, TURNS, Labeller, picked

_RANKINGS = {"topk": 1, "sort": 1, "max": 1, "min": 1, "argsort": None, "argmax": None, "argmin": None}
"""Operations that say where numbers stand in an order, with the place of that in what they return."""
_OF_INDICES = (
    *COPIES,
    *TURNS,
    *SPLITS,
    *"""
    getitem view reshape _unsafe_view flatten unflatten unsqueeze squeeze expand slice select unbind movedim
    """.split(),  # noqa: SIM905
)
"""Operations that only move indices."""
_VIEWS = (
    "view",
    "reshape",
    "_unsafe_view",
    "flatten",
    "unflatten",
    "squeeze",
    "unsqueeze",
    "expand",
)
_MATRICES = ("matmul", "bmm", "einsum")
_MEANS = ("mean", "sum")
_MANY = 8
"""More tables than the experts of one layer have, each choice of which is tried."""


@dataclass(frozen=True)
class _Pick:
    """Rows of a table that a tensor of indices names."""

    node: fx.Node
    table: fx.Node
    index: fx.Node


@dataclass(frozen=True)
class _State:
    """What a tensor has to do with the experts that were picked, one for each place along its first axes.

    Attributes:
        index: which were picked.
        zero: whether it is zero where the rows of the makers are; else it is anything there.
        weighed: whether it has been multiplied by something that depends on what the router found.
    """

    index: fx.Node
    zero: bool
    weighed: bool


class _Escaped(Exception):
    """What comes of a row that is gone may reach the result."""

    def __init__(self, why: str, node: fx.Node) -> None:
        super().__init__(why)
        self.why, self.node = why, node


def find(x: Labeller) -> None:
    """Note the experts of a network, and why others cannot go."""
    picks, refused = _picks(x.program, x.depends)
    x.kept_rows.update(refused)
    for bank in _banks(picks):
        if not any(_is_matrix(x.program, p) for p in bank):
            continue  # numbers that are looked up, as of tokens or of a memory, are no experts
        tables = tuple(dict.fromkeys(p.table for p in bank))
        found = _Bank(x.program, bank).experts()
        if isinstance(found, _Escaped):
            x.kept_rows.update(dict.fromkeys(tables, (found.why, found.node)))
            continue
        makers, hidden = found
        size = int(x.program.values[tables[0]].shape[0])
        units = x.axes.fresh(size, makers[-1], 0)
        for table in tables:
            x.axes.weight_axes[table] = [units, *[None] * (x.program.values[table].dim() - 1)]
        x.axes.experts.append(Experts(units, tables, makers, {p.node: p.index for p in bank}, hidden))


BEFORE.append(find)


def _picks(program: Program, depends: set[fx.Node]) -> tuple[list[_Pick], dict[fx.Node, tuple[str, fx.Node]]]:
    """Picks of tables that a router makes; and tables of which something else is read, too, with why."""
    found, refused = [], {}
    for table in program.parameters:
        if table in program.made or not can_train(program.weights[table]):
            continue
        own = {user: _pick(program, user, table) for user in table.users}
        routed = [p for p in own.values() if p is not None and _routers(program, p.index)]
        others = [user for user, p in own.items() if p not in routed]
        matrices = program.values[table].dim() < 3 or all(_is_matrices(program, p) for p in routed)
        if routed and not others and matrices:
            found += routed
        elif others and any(p is not None and p.index in depends for p in own.values()):
            refused[table] = ("its rows are read otherwise than by what a router picks", others[0])
    return found, refused


def _is_matrices(program: Program, pick: _Pick) -> bool:
    """Whether a pick is one of matrices for products, or one along which no units are known."""
    return picked(program, pick.node) or name_of(pick.node) == "gather"


def _is_matrix(program: Program, pick: _Pick) -> bool:
    """Whether what is picked is a matrix, or is made one."""
    views = [_rank(user) for user in pick.node.users if name_of(user) in _VIEWS]
    rank = program.values[pick.table].dim()
    return rank > 2 or any(n > _rank(pick.index) + 1 for n in views)


def _pick(program: Program, node: fx.Node, table: fx.Node) -> _Pick | None:
    """Whole rows of a table by indices; None if a node is something else."""
    name, a = (name_of(node), bound(node)) if node.op == "call_function" else ("", {})
    index: Any = None
    if name == "index" and node.args[0] is table:
        index = a["indices"][0] if len(a["indices"]) == 1 else None
    elif name == "index_select" and node.args[0] is table and a["dim"] == 0:
        index = a["index"]
    elif name == "embedding" and a["weight"] is table:
        index = a["indices"]
    elif name == "gather" and node.args[0] is table and a["dim"] == 0:
        index = _repeated(program, a["index"])
    while isinstance(index, fx.Node) and index.op == "call_function" and _takes_all(index):
        index = index.args[0]
    return _Pick(node, table, index) if isinstance(index, fx.Node) else None


def _repeated(program: Program, index: Any) -> fx.Node | None:
    """What an index is that is the same along all axes but the first, with that axis alone."""
    names = ["expand"]
    while index.op == "call_function" and name_of(index) in names:
        names, index = ["unsqueeze", "view", "reshape"], index.args[0]
        if program.values[index].shape[1:].numel() != 1:
            return None
    return index if program.values[index].dim() == 1 else None


def _routers(program: Program, index: fx.Node) -> list[fx.Node]:
    """The operations that find the best of several numbers, if an index is their places; none otherwise.

    So each index is one of the rows: none is negative, or counts from the end.
    """
    place: Any = None
    while index.op == "call_function" and name_of(index) in _OF_INDICES:
        if name_of(index) == "getitem":
            place = index.args[1]
        index = index.args[0]  # type: ignore[assignment]
    if index.op != "call_function":
        return []
    if name_of(index) in CATS:
        parts = [_routers(program, part) for part in index.args[0]]  # type: ignore[union-attr, arg-type]
        return [router for part in parts for router in part] if all(parts) else []
    if name_of(index) not in _RANKINGS:
        return []
    scores = program.values[index.args[0]]  # type: ignore[index]
    of_places = place == _RANKINGS[name_of(index)] or _RANKINGS[name_of(index)] is None
    return [index] if of_places and scores.is_floating_point() and len(index.args) > 1 else []


def _banks(picks: list[_Pick]) -> Iterator[list[_Pick]]:
    """Picks with the same indices, or of the same tables, together."""
    while picks:
        bank, rest = [picks[0]], picks[1:]
        while more := [p for p in rest if any(p.table is q.table or p.index is q.index for q in bank)]:
            bank += more
            rest = [p for p in rest if p not in more]
        yield bank
        picks = rest


class _Bank:
    """The tables that hold some experts.

    Args:
        program: the network.
        picks: all that is read of them.
    """

    def __init__(self, program: Program, picks: list[_Pick]) -> None:
        self.program = program
        self.place = {node: i for i, node in enumerate(program.graph.nodes)}
        self.picks = sorted(picks, key=lambda p: self.place[p.node])
        self.tables = list(dict.fromkeys(p.table for p in self.picks))
        self.behind = {index: self._behind(index) for index in {p.index for p in self.picks}}
        self.sizes = {index: tuple(program.values[index].shape) for index in self.behind}

    def experts(self) -> tuple[tuple[fx.Node, ...], dict[fx.Node, fx.Node]] | _Escaped:
        """The tables that take the gates, the fewest and last, and what is zero then; or why none can."""
        rows = {int(self.program.values[t].shape[0]) for t in self.tables}
        if len(rows) > 1 or len(self.tables) > _MANY:
            return _Escaped("tables of different lengths are read at the same places", self.picks[0].node)
        numbers = range(1, len(self.tables) + 1)
        trials = (itertools.combinations(reversed(self.tables), n) for n in numbers)
        for makers in itertools.chain.from_iterable(trials):
            try:
                return makers, self._hidden(set(makers))
            except _Escaped as escaped:
                last = escaped
        return last

    def _behind(self, index: fx.Node) -> set[fx.Node]:
        """All that depends on what the router compared."""
        found: set[Any] = {router.args[0] for router in _routers(self.program, index)}
        for node in self.program.calls:
            if any(n in found for n in node.all_input_nodes):
                found.add(node)
        return found

    def _hidden(self, makers: set[fx.Node]) -> dict[fx.Node, fx.Node]:
        """Follow what is picked until it has met zeros; the tensors that are zero, with their indices.

        Args:
            makers: tables whose rows are zero.

        Raises:
            _Escaped: a row of another table would reach the result, or a router weighs what is not zero.
        """
        hidden: dict[fx.Node, fx.Node] = {}
        states = {p.node: _State(p.index, p.table in makers, False) for p in self.picks}
        waiting = [self.place[node] for node in states]
        nodes = list(self.place)
        heapq.heapify(waiting)
        while waiting:
            node = nodes[heapq.heappop(waiting)]
            if node not in states:
                known = {n: states[n] for n in node.all_input_nodes if n in states}
                state = self._next(node, known)
                fresh = [n for n, s in known.items() if s.zero and not s.weighed]
                if state is None:
                    hidden |= {n: known[n].index for n in fresh}
                    continue
                if state.zero and state.weighed and fresh:
                    hidden[node] = state.index
                states[node] = state
            for user in node.users:
                if user not in states and self.place[user] not in waiting:
                    heapq.heappush(waiting, self.place[user])
        return hidden

    def _next(self, node: fx.Node, known: dict[fx.Node, _State]) -> _State | None:
        """What an operation makes of what was picked; None if nothing of that is left in its result."""
        first = next(iter(known.values()))
        name = name_of(node).rstrip("_") if node.op == "call_function" else node.op
        product = name in (*PRODUCTS, *_MATRICES)
        weighs = product and any(
            n in self.behind[first.index] for n in node.all_input_nodes if n not in known
        )
        weighed = [weighs or s.weighed for s in known.values()]
        zero = [s.zero for s in known.values()]
        together = len({s.index for s in known.values()}) == 1
        follows, is_zero = self._follows(node, name, known) if together else (False, False)
        if follows and (is_zero or not (all(zero) and all(weighed))):
            return _State(first.index, is_zero, any(weighed) if product or not is_zero else all(weighed))
        if (all(zero) and all(weighed)) or (product and is_zero and any(weighed)):
            return None
        if all(zero):
            raise _Escaped(f"what an expert makes meets {name} before what picks it weighs it", node)
        raise _Escaped("what comes of an expert that is gone would not be zero", node)

    def _follows(self, node: fx.Node, name: str, known: dict[fx.Node, _State]) -> tuple[bool, bool]:
        """Whether the first axes of a result are those of what was picked, and it is zero where rows are."""
        places = len(self.sizes[next(iter(known.values())).index])
        zero = all(s.zero for s in known.values())
        if name in _MATRICES:
            read = letters_of(self.program, node)
            firsts = {w[:places] for n, w in read[:2] if n in known} if read else set()
            if read is None or len(firsts) > 1:
                return False, False
            return firsts == {read[2][:places]}, any(s.zero for s in known.values())
        if not self._leads(node, known):
            return False, False
        if name in ELEMENTS:
            return True, self._zero_of_elements(node, name, known)
        if name in (*COPIES, *_VIEWS, "getitem") or _takes_all(node):
            return True, zero and node.args[0] in known
        dims = _axes_of(name, bound(node), self.program.values[node.args[0]].dim())  # type: ignore[index]
        if len(known) > 1 or node.args[0] not in known or dims is None or min(dims) < places:
            return False, False
        return True, zero and bound(node).get("bias") is None

    def _zero_of_elements(self, node: fx.Node, name: str, known: dict[fx.Node, _State]) -> bool:
        """Whether a function of single elements is zero where rows are."""
        if name in PRODUCTS:
            return any(s.zero for s in known.values())
        operands: list[Any] = list(node.args[:2]) if name in ("add", "sub") else list(node.args[:1])
        able = name in (*ZERO_STAYS, "add", "sub") or (name == "div" and len(known) == 1)
        return able and all(known[n].zero if n in known else n == 0 for n in operands)

    def _leads(self, node: fx.Node, known: dict[fx.Node, _State]) -> bool:
        """Whether the first axes of a result are those of what was picked, as they are for other sizes."""
        sizes = self.sizes[next(iter(known.values())).index]
        values = self.program.values.get(node)
        for value in values if isinstance(values, list | tuple) else [values]:
            if not isinstance(value, Tensor) or tuple(value.shape[: len(sizes)]) != sizes:
                return False
        if name_of(node).rstrip("_") in ELEMENTS:
            return {self.program.values[n].dim() for n in known} == {_rank(node)}
        source: Any = node.args[0]
        if name_of(node) not in _VIEWS or source not in known:
            return name_of(node) not in _VIEWS
        same = [[str(n) for n in part.meta["val"].shape[: len(sizes)]] for part in (source, node)]
        return same[0] == same[1] and (name_of(node) != "expand" or _rank(source) == _rank(node))


def _takes_all(node: fx.Node) -> bool:
    """Whether a slice leaves nothing out."""
    if name_of(node) != "slice":
        return False
    a = bound(node)
    return not a["start"] and a["step"] == 1 and (a["end"] is None or a["end"] == sys.maxsize)


def _rank(node: fx.Node) -> int:
    return len(node.meta["val"].shape)


def _axes_of(name: str, a: dict[str, Any], rank: int) -> list[int] | None:
    """The axes along which an operation moves, cuts, reads or adds up; None if it is not one of these."""
    dims: Any = None
    if name in ("transpose", "swapaxes", "swapdims"):
        dims = list(a.values())[1:3]
    elif name in ("mT", "linear"):
        dims = [-2, -1] if name == "mT" else [-1]
    elif name == "permute":
        dims = [i for i, d in enumerate(a["dims"]) if d % rank != i]
    elif name in (*SPLITS, "slice", "select", "unbind", "narrow", "glu"):
        dims = [a.get("dim") or 0]
    elif name in _MEANS:
        dims = a.get("dim")
    return [d % rank for d in ([dims] if isinstance(dims, int) else dims)] if dims else None


# --- what is left ---------------------------------------------------------------------------------------


def rows_at(table: Tensor, index: Tensor, new: Tensor) -> Tensor:
    """Rows of what is left of a table, by their numbers in the whole one."""
    places = torch.ops.aten.index.Tensor(new, [index])
    return torch.ops.aten.index.Tensor(table, [places])  # type: ignore[no-any-return]


def without_gone(target: Any, args: Any, kwargs: Any, index: Tensor, gone: Tensor, more: int) -> Tensor:
    """What an operation gives, and zeros where experts were picked that are gone.

    Args:
        target: the operation.
        args: of it.
        kwargs: of it.
        index: which experts were picked.
        gone: which are gone, (experts,).
        more: axes of the result behind those of the index.
    """
    hidden = torch.ops.aten.index.Tensor(gone, [index])
    for _ in range(more):
        hidden = torch.ops.aten.unsqueeze.default(hidden, -1)
    return torch.ops.aten.masked_fill.Scalar(target(*args, **kwargs), hidden, 0)  # type: ignore[no-any-return]


def calls_without(
    program: Program,
    experts: Iterable[Experts],
    stays: Tensor,
    calls: dict[fx.Node, Call],
    instead: dict[fx.Node, fx.Node],
) -> dict[fx.Node, Call]:
    """How operations are called where experts are gone.

    Args:
        program: the network.
        experts: of it.
        stays: which units stay, (units,).
        calls: how its operations are called already.
        instead: what hidden sums hand on of which other terms are gone.
    """
    found = {node: Call(torch.ops.aten.clone.default, (other,)) for node, other in instead.items()}
    for one in experts:
        alive = stays[torch.from_numpy(one.units)]
        if bool(alive.all()):
            continue
        new = (alive.long().cumsum(0) - 1).clamp(min=0)
        for node, index in one.picks.items():
            source = bound(node)["weight" if name_of(node) == "embedding" else "self"]
            found[node] = Call(rows_at, (source, index, new))
        for node, index in one.hidden.items():
            call = found.get(node) or calls.get(node) or Call(node.target, node.args, node.kwargs)
            more = program.values[node].dim() - program.values[index].dim()
            inside = (call.target, call.args, call.kwargs)
            found[node] = Call(without_gone, (*inside, index, ~alive, more))
    return found
