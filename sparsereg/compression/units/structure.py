"""A network with gates as units: which gate decides on which choice, and what is left as they are now."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from sparsereg.compression.running import check_network, copied, in_double
from sparsereg.compression.units.constants import labelled
from sparsereg.compression.units.costs import Costs
from sparsereg.compression.units.gating import (
    GatedModule,
    SharedGates,
    shared_gate_of,
    take_gates_off,
    ungate_,
)
from sparsereg.compression.units.labels import Ints
from sparsereg.compression.units.lengths import Sizes
from sparsereg.compression.units.lines import Bools
from sparsereg.compression.units.made import followed, gate_names
from sparsereg.compression.units.program import Program, module_of
from sparsereg.compression.units.sites import WHOLE, Sites
from sparsereg.compression.units.solve import Units, solve
from sparsereg.distributions import HardConcrete, gate_median
from sparsereg.errors import InputError
from sparsereg.model.basic_l0_blocks import L0Gate

ATTRIBUTE = "_units"
"""Where a network that ``gate`` made keeps its structure."""
BRANCH_GATES, INPUT_GATE = ("gate_blocks", "gate_experts"), "gate_inputs"
"""What modules call the gates of whole branches, and that of features of an input."""
Place = tuple[str, int]
"""Path of a gate in a network, and a place in it."""


@dataclass(frozen=True)
class Analysis:
    """What is known about a network without gates.

    Attributes:
        units: which choices there are.
        sites: which weights take their gates.
        costs: what they cost.
    """

    units: Units
    sites: Sites
    costs: Costs

    @property
    def program(self) -> Program:
        """The network as operations."""
        return self.units.labeller.program

    def choices_along(self, weight: fx.Node, columns: bool = False) -> np.ndarray:
        """The choices that can go of each place where a weight takes gates, an array of sets.

        Its shape is that of the weight along the axis of its gates; of the whole weight for an axis of -1.

        Args:
            weight: one that takes gates.
            columns: along the axis of the columns that it reads with instead.
        """
        axes = self.units.labeller.axes
        if columns:
            read = axes.weight_axes[weight][self.sites.columns[weight]]
            assert read is not None
            return self.sets_of(read)
        axis = self.sites.axis[weight]
        whole = frozenset(b.choice for b in self.units.branches.found if weight in b.makers)
        if axis == WHOLE or (weight not in axes.of and weight not in axes.weight_axes):
            return _filled((1,) * min(1, self.program.values[weight].dim()), whole)
        raw = axes.of.get(weight)
        line = raw.numpy().astype(np.int64) if isinstance(raw, Tensor) else None
        if line is None:
            own = axes.weight_axes[weight][max(axis, 0)]
            line = (
                np.zeros(self.program.values[weight].shape[max(axis, 0)], dtype=np.int64)
                if own is None
                else own
            )
        sets = self.sets_of(line)
        if weight in self.sites.part:
            first, last = self.sites.part[weight]
            sets[:first] = sets[last:] = frozenset()
        return _with(sets, whole) if whole else sets

    def sides(self, weight: fx.Node) -> list[bool]:
        """Whether a weight takes gates on what it makes (False), and on columns that it reads (True)."""
        makes, reads = (weight in axes for axes in (self.sites.axis, self.sites.columns))
        if makes and reads and self.sites.axis[weight] in (-1, self.sites.columns[weight]):
            return [False]  # a table of embeddings that is that of the last layer, too
        return [side for side in (False, True) if (reads if side else makes)]

    def shape_along(self, weight: fx.Node, columns: bool = False, name: str = "") -> tuple[int, ...]:
        """The shape in which what ``choices_along`` holds multiplies the weight.

        Args:
            weight: one that takes gates.
            columns: along the axis of the columns that it reads with instead.
            name: the parameter that takes them, where the weight is computed.
        """
        sets = self.choices_along(weight, columns)
        own = gate_names(self.program, weight).get(name)
        if own is not None:
            return own if sets.size > 1 else (1,) * len(own)
        rank = self.program.values[weight].dim()
        if sets.ndim == rank:
            return tuple(sets.shape)
        axis = self.axis_of(weight, columns)
        return tuple(sets.size if d == axis else 1 for d in range(rank))

    def axis_of(self, weight: fx.Node, columns: bool = False) -> int:
        """The axis of a weight along which ``choices_along`` lies."""
        return self.sites.columns[weight] if columns else max(self.sites.axis[weight], 0)

    def module_of(self, node: fx.Node) -> str:
        """Path of the module that holds a weight, or for an operation that of its weight or where it runs."""
        weights = [n for n in (node, *node.all_input_nodes) if n in self.program.parameters]
        name = self.program.names[weights[0]] if weights else ""
        return name.rpartition(".")[0] if weights else module_of(node)

    def width(self, path: str, stays: Bools) -> tuple[int, int]:
        """Outputs of a module with weights, and how many of them stay; 0 for one without."""
        axes = self.units.labeller.axes
        for node, name in self.program.names.items():
            if name.rpartition(".")[0] != path or node not in self.program.parameters:
                continue
            shape = self.program.values[node].shape or (1,)
            axis = max(self.sites.axis.get(node, 0), 0)
            line = axes.weight_axes[node][axis] if axes.weight_axes.get(node) else None
            if line is None:
                return int(shape[axis]), int(shape[axis])
            place = {c: i for i, c in enumerate(self.costs.choices)}
            sets = self.sets_of(line)
            return len(line), sum(all(stays[place[c]] for c in s if c in place) for s in sets)
        return 0, 0

    def sets_of(self, units: Ints) -> np.ndarray:
        """The choices that can go of an array of units, an array of sets of its shape."""
        roots = self.units.roots[units]
        found, inverse = np.unique(roots, return_inverse=True)
        sets = np.empty(len(found), dtype=object)
        for i, root in enumerate(found.tolist()):
            sets[i] = frozenset(c for c in self.units.of(root) if root > 1 and c not in self.units.fixed)
        return sets[inverse].reshape(units.shape)


def analyse(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    inputs: bool = False,
    even: bool = False,
) -> Analysis:
    """Find the units of a network without gates, and where gates for them would sit.

    Args:
        model: left as it is.
        args: positional inputs of one example batch.
        kwargs: inputs by name.
        inputs: whether features of the inputs can go, too.
        even: whether the groups of a norm lose the same places, so that they stay equally large.

    Raises:
        InputError: the network cannot be traced.
    """
    labeller = labelled(followed(model, args, kwargs), inputs, even)
    sites = Sites(labeller)
    units = solve(labeller)
    for branch in units.branches.found:
        for maker in branch.makers:
            sites.axis.setdefault(maker, WHOLE)
    analysis = Analysis(units, sites, Costs(units))
    labeller.program.forget()
    return analysis


def _filled(shape: tuple[int, ...], choices: frozenset[int]) -> np.ndarray:
    sets = np.empty(shape, dtype=object)
    sets[...] = choices
    return sets


def _with(sets: np.ndarray, more: frozenset[int]) -> np.ndarray:
    """Sets of choices with some more of them in each."""
    known = {s: s | more for s in set(sets.flat)}
    found = np.empty(sets.shape, dtype=object)
    for place in np.ndindex(sets.shape):
        found[place] = known[sets[place]]
    return found


class Structure:
    """The units of a network, and the gates that decide on them. Copies of the network share it.

    Args:
        analysis: of the network without gates.
        gates: the gate and the place in it that decides on each choice that has one.
        traced: what the network was traced for.
    """

    def __init__(self, analysis: Analysis, gates: Mapping[int, Place], traced: list[tuple[Any, ...]]) -> None:
        self.analysis = analysis
        self.gates = dict(gates)
        self.traced = traced
        self.fixed: dict[int, Sizes] | None = None
        """Sizes that the inputs of smaller networks may have, by position; None until somebody asks."""
        self.paths = list(dict.fromkeys(path for path, _ in self.gates.values()))
        by_gate: dict[str, list[tuple[int, int]]] = {path: [] for path in self.paths}
        for i, choice in enumerate(analysis.costs.choices):
            if choice in self.gates:
                path, place = self.gates[choice]
                by_gate[path].append((i, place))
        self._by_gate = {
            path: np.array(pairs, dtype=np.int64).reshape(-1, 2).T for path, pairs in by_gate.items()
        }

    def __deepcopy__(self, memo: Any) -> Structure:
        return self

    def __reduce__(self) -> Any:
        return _nothing, ()  # found again from the gates themselves

    def unread(self, stays: Bools) -> dict[str, list[int]]:
        """Features that nothing reads any more, by the name of the input."""
        units = self.analysis.units
        alive = units.alive(self.gone(stays))
        found = {}
        for node, _, own in units.labeller.axes.inputs:
            entrance = units.labeller.entrances[node]
            found[entrance.source.name] = entrance.unread(alive[own])
        return found

    def stays(self, model: nn.Module) -> Bools:
        """Which choices stay with a network's gates as they are, (choices,); of each axis something does."""
        stays = np.ones(len(self.analysis.costs.choices), dtype=bool)
        medians = self._medians(model)
        for path, (choices, places) in self._by_gate.items():
            stays[choices] = medians[path][places] != 0
        return self.analysis.costs.revived(stays)

    def gone(self, stays: Bools) -> set[int]:
        """The choices that do not stay."""
        return {c for c, here in zip(self.analysis.costs.choices, stays, strict=True) if not here}

    def p_active(self, model: nn.Module) -> Tensor:
        """P(z > 0) of each choice, differentiable, (choices,), float64; 1 without a gate."""
        device = next(model.parameters()).device
        p = torch.ones(len(self.analysis.costs.choices), dtype=torch.float64, device=device)
        for path, (choices, places) in self._by_gate.items():
            own = self._gate(model, path).p_active().double()
            at = torch.from_numpy(choices).to(device)
            p = p.index_copy(0, at, own[torch.from_numpy(places).to(device)])
        return p

    def hard_concretes(self, model: nn.Module) -> list[HardConcrete]:
        """The gates of a network."""
        return [self._gate(model, path) for path in self.paths]

    def _gate(self, model: nn.Module, path: str) -> HardConcrete:
        gate = model.get_submodule(path)
        assert isinstance(gate, HardConcrete)
        return gate

    @torch.no_grad()
    def _medians(self, model: nn.Module) -> dict[str, np.ndarray]:
        """The medians of all gates; those of one shape at once, since there can be hundreds of small ones."""
        alike: dict[tuple[Any, ...], dict[str, Tensor]] = {}
        for path in self.paths:
            gate = self._gate(model, path)
            key = (gate.temperature, gate.gamma, gate.zeta, gate.log_alpha.dtype)
            alike.setdefault(key, {})[path] = gate.log_alpha
        found: dict[str, np.ndarray] = {}
        for (*shape, _), own in alike.items():
            medians = gate_median(torch.cat([a.flatten() for a in own.values()]), *shape).cpu()
            parts = medians.split([a.numel() for a in own.values()])
            found |= {path: part.numpy() for path, part in zip(own, parts, strict=True)}
        return found

    def weights(self, model: nn.Module, dtype: torch.dtype | None = None) -> Iterator[tuple[fx.Node, Tensor]]:
        """The network's weights with its gates multiplied in, as eval mode has them, one after another.

        Args:
            model: a network of this structure.
            dtype: of floating-point weights; their own if None.
        """
        program = self.analysis.program
        tensors = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
        tensors |= {name: value for name, value in constants_of(program).items() if name not in tensors}
        open_ = self._open(model)
        for node, name in program.names.items():
            if node in program.made:
                sources = {n: tensors[n] for n in program.made[node].sources.values() if n in tensors}
                own = {n: _in(t.detach(), dtype) for n, t in sources.items()}
                yield node, self._made(open_, node, own)
                continue
            value = _in(tensors[name].detach(), dtype)
            for columns in self.analysis.sides(node):
                factor = self._factor(open_, node, value, columns)
                value = value * factor
                if added := program.added_to(node):
                    value = value + added * (factor - 1)
            yield node, value

    def _made(self, open_: Mapping[int, float], node: fx.Node, tensors: dict[str, Tensor]) -> Tensor:
        """What a weight comes to that is computed from others, some of which take its gates."""
        made = self.analysis.program.made[node]
        for columns in self.analysis.sides(node):
            for name in made.sources_of_gates:
                tensors[name] = tensors[name] * self._factor(open_, node, tensors[name], columns, name)
        found: Tensor = made.value(tensors)
        for columns in [] if made.sources_of_gates else self.analysis.sides(node):
            for name in made.gates:
                found = found * self._factor(open_, node, found, columns, name)
        return found

    def _factor(
        self, open_: Mapping[int, float], node: fx.Node, value: Tensor, columns: bool, name: str = ""
    ) -> Tensor:
        """What the gates multiply a weight by, of a shape that is broadcast to it."""
        sets = self.analysis.choices_along(node, columns)
        products = {s: math.prod(open_.get(choice, 1.0) for choice in s) for s in set(sets.flat)}
        factor = torch.tensor([products[s] for s in sets.flat], dtype=torch.float64)
        return factor.to(value).view(self.analysis.shape_along(node, columns, name))

    @torch.no_grad()
    def _open(self, model: nn.Module) -> dict[int, float]:
        """How far each choice is open, in [0, 1], in float64."""
        found = {}
        for path in self.paths:
            gate = self._gate(model, path)
            shape = (gate.temperature, gate.gamma, gate.zeta)
            found[path] = gate_median(gate.log_alpha.double(), *shape).tolist()
        return {choice: found[path][place] for choice, (path, place) in self.gates.items()}


def _nothing() -> None:
    return None


def constants_of(program: Program) -> dict[str, Tensor]:
    """The weights of a program by their names."""
    return {name: program.weights[node] for node, name in program.names.items()}


def _in(value: Tensor, dtype: torch.dtype | None) -> Tensor:
    if value.is_complex():
        return in_double(value) if dtype is torch.float64 else value
    return value.to(dtype) if dtype is not None and value.is_floating_point() else value


def structure_of(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Structure | None:
    """The structure of a network whose gates ``gate`` has put in; None if it has none of these.

    Raises:
        InputError: the network cannot be traced, or its gates belong to something else.
    """
    check_network(model)
    if not any(_gated(m) for m in model.modules()):
        return None
    known = model.__dict__.get(ATTRIBUTE)
    traced = traced_for(model, args, kwargs)
    if isinstance(known, Structure) and known.traced == traced:
        return known
    bare = copied(model)
    found = sited(bare)
    take_gates_off(bare, plain_module)
    sizes = {name: m.gate_size[0] for name, m in model.named_modules() if isinstance(m, SharedGates)}
    inputs = any(INPUT_GATE in path for path in sizes)
    for even in (False, True):
        analysis = analyse(bare, args, kwargs, inputs, even)
        matched = _matched(analysis, found, sizes)
        known_places = set(matched.values())
        lost = [(p, i) for p, n in sizes.items() for i in range(n) if (p, i) not in known_places]
        if not (lost and analysis.units.labeller.axes.averaged_by_groups):
            break
    if lost:
        raise InputError(
            f"gate {lost[0][1]} of {lost[0][0]} belongs to no unit of {type(model).__name__} with this"
            " example: give one of the shape that gate() was given"
        )
    structure = Structure(analysis, matched, traced)
    model.__dict__[ATTRIBUTE] = structure
    return structure


def traced_for(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[tuple[Any, ...]]:
    """What a network was traced for: its type of numbers, and the shapes of an example but for the batch."""
    leaves = torch.utils._pytree.tree_leaves((args, dict(kwargs)))
    dtype = next((str(p.dtype) for p in model.parameters() if p.is_floating_point()), "")
    return [(dtype,), *(tuple(x.shape[1:]) if isinstance(x, Tensor) else (repr(x),) for x in leaves)]


def _gated(module: nn.Module) -> bool:
    return isinstance(module, GatedModule) or shared_gate_of(module) is not None


def plain_module(module: nn.Module) -> None:
    """Take the gate off a layer of PyTorch that carries one for all that it makes."""
    if shared_gate_of(module) is not None:
        ungate_(module)


def sited(model: nn.Module) -> dict[str, list[tuple[str, Tensor]]]:
    """For each parameter with gates: paths of these, and for each element (or place) its place in them."""
    paths: dict[int, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, HardConcrete):
            paths.setdefault(id(module), name)
    found: dict[str, list[tuple[str, Tensor]]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for name, gate, index in _sites_of(module):
            full = f"{path}.{name}" if path else name
            found.setdefault(full, []).append((paths[id(gate)], index))
    return found


def _sites_of(module: nn.Module) -> Iterator[tuple[str, HardConcrete, Tensor]]:
    if isinstance(module, GatedModule):
        for name, sites in module._gated_sites.items():
            for gate, index in sites if name else ():
                own, places = module._modules[gate], module._buffers[index]
                assert isinstance(own, L0Gate)
                assert places is not None
                yield name, own.gates, places.cpu()
        return
    gates = shared_gate_of(module)
    if gates is not None:
        for name, value in module._parameters.items():
            if value is not None:
                yield name, gates, torch.arange(gates.gate_size[0])


def _matched(
    analysis: Analysis, found: Mapping[str, list[tuple[str, Tensor]]], sizes: Mapping[str, int]
) -> dict[int, Place]:
    """Find which choice each place of each gate decides on: the one of the same elements of a weight.

    Args:
        analysis: of the network without gates.
        found: what `sited` returned.
        sizes: places of each gate; a place behind the last one stands for what it leaves alone.
    """
    matched: dict[int, Place] = {}
    wholes = {branch.choice for branch in analysis.units.branches.found} | analysis.units.experts
    features = analysis.units.features
    program = analysis.program
    names = {name: node for node in program.names for name in gate_names(program, node)}
    for name, sites in found.items():
        node = names.get(name)
        if node is None or node not in analysis.sites.axis | analysis.sites.columns:
            continue
        for columns in analysis.sides(node):
            by_elements = _by_elements(analysis, node, columns)
            shape = analysis.shape_along(node, columns, name)
            for path, index in sites:
                if index.dim() == len(shape) and tuple(index.shape) != shape:
                    continue  # gates along another axis
                places = index.flatten().numpy()
                whole = any(name in path for name in BRANCH_GATES)
                for place in np.unique(places[places < sizes[path]]).tolist():
                    for choice in by_elements.get(tuple(np.flatnonzero(places == place).tolist()), ()):
                        if (choice in wholes) is whole and (choice in features) is (INPUT_GATE in path):
                            matched.setdefault(choice, (path, place))
    return matched


def _by_elements(analysis: Analysis, weight: fx.Node, columns: bool) -> dict[tuple[int, ...], list[int]]:
    """The choices that decide on the same elements of a weight, by the places of these."""
    elements: dict[int, list[int]] = {}
    for i, choices in enumerate(analysis.choices_along(weight, columns).ravel()):
        for choice in choices:
            elements.setdefault(choice, []).append(i)
    found: dict[tuple[int, ...], list[int]] = {}
    for choice, where in elements.items():
        found.setdefault(tuple(where), []).append(choice)
    return found
