"""Gates that a network's author has placed: what they multiply, read off the network's operations.

A network is traced with its gates as parameters of their own. Whatever is computed of parameters and gates
alone, such as a weight times its gates, becomes one weight that remembers how it was made and which of its
elements which gate multiplies.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from sparsereg.compression.running import copied
from sparsereg.compression.units.labels import Ints
from sparsereg.compression.units.program import Call, Program, called, module_of, name_of
from sparsereg.compression.units.rules.moves import COPIES
from sparsereg.compression.units.rules.table import MOVING
from sparsereg.compression.units.tracing import trace_any_size
from sparsereg.distributions import HardConcrete
from sparsereg.errors import InputError


class _Leaf(HardConcrete):
    """Gates that return their parameter: how a copy of a network holds them while it is traced."""

    def median(self) -> Tensor:
        return self.log_alpha

    def times(self, weight: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return weight * self.log_alpha.to(weight.dtype)


@dataclass(frozen=True)
class GatesOf:
    """The gates of one tensor that multiply a weight.

    Attributes:
        gate: position in ``Placed.gates``.
        places: for each element of the weight its place in the gates, of the weight's shape.
    """

    gate: int
    places: Ints


@dataclass(frozen=True)
class Made:
    """A weight that is computed of parameters and gates.

    Attributes:
        call: how its last operation was called, on nodes that ``Placed.calls`` or weights know.
        gates: what multiplies it.
        parameter: the parameter that it stands for; None if it is made of gates alone.
    """

    call: fx.Node
    gates: tuple[GatesOf, ...]
    parameter: fx.Node | None


@dataclass
class Placed:
    """A network as operations, with weights that gates multiply.

    Attributes:
        program: the operations; a computed weight is a placeholder.
        gates: paths of the tensors of gates that are used.
        of_gate: the placeholder that stands for each of them.
        made: how the computed weights come about.
        calls: the operations on parameters and gates that were taken out, in order.
    """

    program: Program
    gates: list[str]
    of_gate: dict[fx.Node, int]
    made: dict[fx.Node, Made] = field(default_factory=dict)
    calls: dict[fx.Node, Call] = field(default_factory=dict)

    @cached_property
    def first(self) -> list[int]:
        """Where the places of each tensor of gates begin, if all lie end to end."""
        sizes = {gate: self.program.values[node].numel() for node, gate in self.of_gate.items()}
        return [0, *np.cumsum([sizes[i] for i in range(len(self.gates))]).tolist()]

    def gate(self, model: nn.Module, number: int) -> HardConcrete:
        """A tensor of gates of a network."""
        found = model.get_submodule(self.gates[number])
        assert isinstance(found, HardConcrete)
        return found

    def places(self, weight: fx.Node) -> list[Ints]:
        """Places of the gates that multiply a weight, all gates lying end to end, of the weight's shape."""
        made = self.made.get(weight)
        return [np.array(g.places + self.first[g.gate]) for g in made.gates] if made is not None else []

    def value(self, model: nn.Module, weight: fx.Node) -> Tensor:
        """A parameter, buffer or constant of a network as it is; for a computed one its parameter."""
        made = self.made.get(weight)
        node = weight if made is None or made.parameter is None else made.parameter
        owner, _, name = self.program.names[node].rpartition(".")
        try:
            found = getattr(model.get_submodule(owner), name)
        except AttributeError:
            found = self.program.weights[node]  # a tensor that is written into the network's code
        return found if isinstance(found, Tensor) else self.program.weights[node]


def place(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Placed:
    """Trace a network and find what its gates multiply.

    Raises:
        InputError: the network cannot be traced, or a gate does something else than multiply.
    """
    bare = copied(model)
    for module in bare.modules():
        if isinstance(module, HardConcrete):
            module.__class__ = _Leaf
            module.log_alpha.data.fill_(1.0)
    program = trace_any_size(bare, args, dict(kwargs))
    _refuse_what_drops(model, program)
    paths: dict[int, str] = {}
    known = {}
    for path, module in bare.named_modules(remove_duplicate=False):
        if isinstance(module, HardConcrete):
            known[f"{path}.log_alpha".removeprefix(".")] = paths.setdefault(id(module), path)
    gates = list(dict.fromkeys(known[n] for n in program.names.values() if n in known))
    of_gate = {n: gates.index(known[name]) for n, name in program.names.items() if name in known}
    program.parameters -= set(of_gate)
    placed = Placed(program, gates, of_gate)
    _Folder(placed, model).fold()
    program.forget()
    return placed


def _refuse_what_drops(model: nn.Module, program: Program) -> None:
    for node in program.calls:
        if "dropout" in name_of(node) and len(node.args) > 2 and node.args[2] is True:
            where = module_of(node) or type(model).__name__
            raise InputError(
                f"{where!r} ({name_of(node)}) also drops in eval mode; pass training=self.training"
            )


def _copies(node: fx.Node) -> bool:
    return name_of(node) in COPIES


class _Folder:
    """Takes what is computed of parameters and gates out of a program."""

    def __init__(self, placed: Placed, model: nn.Module) -> None:
        self.placed = placed
        self.program = placed.program
        self.model = model
        self.gates: dict[fx.Node, tuple[GatesOf, ...]] = {}
        self.keys: dict[fx.Node, Any] = {}
        for node, gate in placed.of_gate.items():
            shape = self.program.values[node].shape
            self.gates[node] = (GatesOf(gate, np.arange(shape.numel()).reshape(tuple(shape))),)

    def fold(self) -> None:
        """Replace each weight that others read by a placeholder."""
        graph = self.program.graph
        for node in list(self.program.calls):
            if self._is_made(node):
                self.placed.calls[node] = Call(node.target, node.args, dict(node.kwargs))
                if any(n in self.gates for n in node.all_input_nodes):
                    self.gates[node] = self._through(node)
        inside = dict.fromkeys(self.gates)
        first = next(iter(self.program.calls), None)
        known: dict[Any, fx.Node] = {}
        for node in inside:
            users = [
                u for u in node.users if u not in inside and name_of_user(u) != "_assert_tensor_metadata"
            ]
            if not users:
                continue
            key = self._key(node)
            if key not in known:
                assert first is not None
                with graph.inserting_before(first):
                    known[key] = graph.placeholder(f"made_{node.name}")
                self._note(known[key], node)
            for user in users:
                user.replace_input_with(node, known[key])
        for node in reversed(list(graph.nodes)):
            unread = node in self.placed.calls and not node.users
            if unread or name_of_user(node) == "_assert_tensor_metadata":
                graph.erase_node(node)

    def _is_made(self, node: fx.Node) -> bool:
        sources = node.all_input_nodes
        if not sources or name_of(node) == "_assert_tensor_metadata":
            return False
        return all(n in self.program.weights or n in self.placed.calls for n in sources)

    def _through(self, node: fx.Node) -> tuple[GatesOf, ...]:
        """Gates that multiply the result of an operation on weights and gates."""
        name, shape = name_of(node), tuple(self.program.values[node].shape)
        if name in ("mul", "multiply"):
            return tuple(
                GatesOf(g.gate, np.broadcast_to(g.places, shape))
                for source in node.args[:2]
                for g in self.gates.get(source, ())  # type: ignore[arg-type]
            )
        first = node.args[0]
        if (name not in MOVING and name not in COPIES) or first not in self.gates:
            path = self.placed.gates[
                next(g for n in node.all_input_nodes for g in self.gates.get(n, ())).gate
            ]
            owner = path.rpartition(".")[0]
            holder = self.model.get_submodule(owner)
            what = f"the gates {path!r} in {type(holder).__name__} {owner!r}"
            raise InputError(f"no rule for {what}: {name} does not multiply")
        found = []
        for g in self.gates[first]:  # type: ignore[index]
            places = torch.from_numpy(np.array(g.places))
            moved = places if name in COPIES else called(node.target, (places, *node.args[1:]), node.kwargs)
            found.append(GatesOf(g.gate, moved.numpy()))
        return tuple(found)

    def _key(self, leaf: Any) -> Any:
        """The same for two nodes that compute the same."""
        if not isinstance(leaf, fx.Node) or leaf not in self.placed.calls:
            return leaf
        if leaf not in self.keys:
            call = self.placed.calls[leaf]
            if _copies(leaf):
                self.keys[leaf] = self._key(call.args[0])
            else:
                parts = [self._key(a) if isinstance(a, fx.Node) else repr(a) for a in call.args]
                self.keys[leaf] = (call.target, *parts)
        return self.keys[leaf]

    def _note(self, made: fx.Node, node: fx.Node) -> None:
        program, value = self.program, self.program.values[node]
        sources = {n for n in self._ancestors(node) if n in program.parameters}
        alike = [n for n in sources if program.values[n].numel() == value.numel()]
        parameter = alike[0] if len(alike) == 1 else None
        if sources and parameter is None:
            raise InputError(
                f"no rule for a weight that is made of {sorted(program.names[n] for n in sources)}"
            )
        self.placed.made[made] = Made(node, self.gates[node], parameter)
        path = self.placed.gates[self.gates[node][0].gate]
        program.names[made] = f"{path}_z" if parameter is None else program.names[parameter]
        program.weights[made] = program.values[made] = value
        made.meta["val"] = node.meta.get("val")
        if parameter is not None:
            program.parameters.add(made)

    def _ancestors(self, node: fx.Node) -> set[fx.Node]:
        found, todo = set(), [node]
        while todo:
            here = todo.pop()
            if here not in found:
                found.add(here)
                todo += [n for n in self._inputs(here) if n not in found]
        return found

    def _inputs(self, node: fx.Node) -> list[fx.Node]:
        found: list[fx.Node] = []
        if node in self.placed.calls:
            call = self.placed.calls[node]
            fx.node.map_arg((call.args, dict(call.kwargs)), lambda n: found.append(n) or n)  # type: ignore[func-returns-value]
        return found


def name_of_user(node: fx.Node) -> str:
    """Name of a node's operation; empty for inputs and the output."""
    return name_of(node) if node.op == "call_function" else ""
