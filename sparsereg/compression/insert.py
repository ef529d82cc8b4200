"""Gates for networks that have none: what can go is read off the network's operations."""

from __future__ import annotations

import difflib
import fnmatch
import itertools
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from sparsereg.compression.holdable import not_held
from sparsereg.compression.running import check_network, copied
from sparsereg.compression.units.explain import explanation, inputs_of
from sparsereg.compression.units.explain import families as kinds
from sparsereg.compression.units.gating import GATED, NormKind, gate_layer_, put_gate, shared_gate
from sparsereg.compression.units.made import gate_names
from sparsereg.compression.units.program import module_of
from sparsereg.compression.units.sites import WHOLE, Norm
from sparsereg.compression.units.structure import ATTRIBUTE, Analysis, Structure, analyse, traced_for
from sparsereg.compression.units.together import Together, draw_anew
from sparsereg.distributions import HardConcrete
from sparsereg.model.basic_l0_blocks import GateFactory, L0Gate
from sparsereg.penalties import hard_concretes
from sparsereg.progress import doing
from sparsereg.target_settings import FAMILIES, SHAPES

DEFAULT = tuple(family for family in FAMILIES if family != "inputs")
"""What is gated if nothing is asked for; columns of the data have to be."""
logger = logging.getLogger(__name__)

Choice = str | Sequence[str] | Callable[[str, nn.Module], bool]


def gate(
    model: nn.Module,
    example_input: Any,
    layers: Choice | None = None,
    *,
    families: str | Sequence[str] | None = None,
    residual: bool = True,
    shape: str = "free",
    **gate_settings: object,
) -> nn.Module:
    """Return a copy of a network with gates on all that can go: channels, hidden units, heads, width.

    What can go is read off the network's operations; ``sparsereg.explain`` says it in words. Gates multiply
    the last weights that make what they shut: the affine of a normalisation, or the rows of a layer. A norm
    over units that can go (LayerNorm, RMSNorm) takes its means over the open ones. What is tied, such as
    tensors that are added, shares its gates.

    Args:
        model: a network without gates; left as it is. Its state dict fits the result but for the gates' keys,
            which end in ``gates.log_alpha`` and ``gates._extra_state``.
        example_input: one batch as the network takes it: a tensor, a tuple of positional inputs, or a
            dictionary of inputs by name.
        layers: which layers to gate: a pattern such as ``layer3.*``, several, or a function of name and
            module. One of several layers that share a gate is enough. All if None.
        families: kinds of gates (``channels units heads head_dims kv_groups width blocks experts inputs``);
            all but the features of the inputs if None, and with ``shape="uniform"`` all but those and blocks.
        residual: whether what several layers write together gets a gate, too.
        shape: ``free``, or ``uniform``: layers that are alike share their gates, so that they stay equally
            large and the network's own class can hold the result (``restore_class``). What it cannot hold
            gets no gates, with a warning, if neither families nor layers are named.
        **gate_settings: keyword arguments of L0Gate, such as ``droprate_init`` and ``temperature``.

    Raises:
        InputError: the network cannot be traced.
        ValueError: no layer, family or shape has that name, or nothing can be gated.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 3))
        >>> gate(net, torch.ones(1, 3, 6, 6))(torch.ones(1, 3, 6, 6)).shape
        torch.Size([1, 2, 2, 2])
    """
    _check_plain(model)
    gated = copied(model)
    gate_(gated, example_input, layers, families=families, residual=residual, shape=shape, **gate_settings)
    return gated


def gate_(
    model: nn.Module,
    example_input: Any,
    layers: Choice | None = None,
    *,
    families: str | Sequence[str] | None = None,
    residual: bool = True,
    shape: str = "free",
    **gate_settings: object,
) -> None:
    """Put gates into a network itself, see ``gate``; where that raises, nothing has been changed.

    Parameters stay the same objects, so that what refers to them goes on doing so.
    """
    _check_plain(model)
    check_shape(shape)
    args, kwargs = inputs_of(example_input)
    factory = GateFactory(**gate_settings)
    wanted = _wanted(families, shape)
    with doing(f"looking for what can go of {type(model).__name__}"):
        analysis = analyse(model, args, kwargs, inputs="inputs" in wanted, even=shape == "uniform")
    vectors = _vectors(analysis, model, wanted, layers, residual)
    if not vectors:
        raise ValueError(
            "none of these layers has channels that can go, so there is nothing to gate:\n"
            + str(explanation(type(model).__name__, analysis.units))
        )
    gates = _gates(analysis, vectors, factory, shape)
    if shape == "uniform":
        vectors = _holdable(model, analysis, vectors, gates, example_input, families is layers is None)
    _Inserter(model, analysis, vectors, gates).insert()
    for encoder in (m for m in model.modules() if isinstance(m, nn.TransformerEncoder)):
        encoder.use_nested_tensor = False  # sequences without their padding, which no norm with gates takes
    paths = {id(m): name for name, m in model.named_modules() if isinstance(m, HardConcrete)}
    places = {
        choice: (paths[id(gates[id(v)].gates)], place)
        for v in vectors
        for place, choice in enumerate(v.choices)
    }
    model.__dict__[ATTRIBUTE] = Structure(analysis, places, traced_for(model, args, kwargs))
    model.register_forward_pre_hook(draw_anew)
    Together.of(model).forget()
    _declare_shared(model)
    count, groups = len(set(places.values())), len({id(gates[id(v)]) for v in vectors})
    logger.info("%d gates in %d groups of %s now", count, groups, type(model).__name__)


def _declare_shared(model: nn.Module) -> None:
    """Tell Hugging Face which names stand for one gate, so that its files hold each once."""
    if not hasattr(model, "_tied_weights_keys"):
        return
    known: Any = model._tied_weights_keys
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name.endswith(".log_alpha"):
            names.setdefault(id(parameter), []).append(name)
    tied = {other: last for *others, last in map(sorted, names.values()) for other in others}
    model.__dict__["_tied_weights_keys"] = {**(known or {}), **tied}


def _gates(analysis: Analysis, vectors: list[Vector], factory: GateFactory, shape: str) -> dict[int, L0Gate]:
    """The gate of each tensor of choices, by its identity; layers that are alike share one if asked to."""
    made: dict[Any, L0Gate] = {}
    found = {}
    # A factor of float32 in a network of float64 would be another one than what is folded into it.
    weights = analysis.program.weights
    precise = any(weights[node].dtype is torch.float64 for node in analysis.program.parameters)
    for vector in vectors:
        names = tuple(re.sub(r"\d+", "*", analysis.program.names[w]) for w in vector.sites)
        alike = shape == "uniform" and vector.family not in ("blocks", "experts")
        key = (vector.family, len(vector.choices), names) if alike else id(vector)
        if key not in made:
            gate = shared_gate(factory, len(vector.choices))
            made[key] = gate.double() if precise else gate
        found[id(vector)] = made[key]
    return found


def _holdable(
    model: nn.Module,
    analysis: Analysis,
    vectors: list[Vector],
    gates: Mapping[int, L0Gate],
    example: Any,
    leave_out: bool,
) -> list[Vector]:
    """The choices whose shapes the network's class can hold, or all if it can hold none; says what it cannot.

    Args:
        model: without gates.
        analysis: of it.
        vectors: all choices.
        gates: of each vector, by its identity.
        example: as ``gate`` got it.
        leave_out: whether those that the class cannot hold get no gates.
    """
    sharing: dict[int, list[Vector]] = {}
    for vector in vectors:
        sharing.setdefault(id(gates[id(vector)]), []).append(vector)
    places = {key: list(zip(*(v.choices for v in own), strict=True)) for key, own in sharing.items()}
    reasons = not_held(model, analysis, places, example)
    if not reasons:
        return vectors
    held = [own[0] for key, own in sharing.items() if key not in reasons]
    leave_out = leave_out and any(len(vector.choices) > 1 for vector in held)  # of one place nothing goes
    names = analysis.program.names
    first = {key: sharing[key][0] for key in reasons}
    said = [f"{first[key].family} of {names[first[key].sites[0]]}: {why}" for key, why in reasons.items()]
    logger.warning(
        "%s cannot hold what %d of %d gates would leave%s:\n%s",
        type(model).__name__,
        len(reasons),
        len(sharing),
        ", which get none" if leave_out else "; restore_class will refuse it",
        "\n".join(said),
    )
    return [v for v in vectors if id(gates[id(v)]) not in reasons] if leave_out else vectors


def check_shape(shape: str) -> str:
    """Return the name of a shape.

    Raises:
        ValueError: it is unknown.
    """
    if shape not in SHAPES:
        raise ValueError(f"shape: unknown {shape!r}; known are {', '.join(SHAPES)}")
    return shape


def _check_plain(model: nn.Module) -> None:
    check_network(model)
    if hard_concretes(model):
        raise ValueError(f"{type(model).__name__} already has gates; gate() takes a network without")


@dataclass(frozen=True)
class Vector:
    """Choices of one family that lie along the same weights, and get one tensor of gates.

    Attributes:
        family: a key of ``FAMILIES``.
        choices: in order.
        sites: the weights that take their gates.
    """

    family: str
    choices: tuple[int, ...]
    sites: tuple[fx.Node, ...]


def _wanted(families: str | Sequence[str] | None, shape: str) -> set[str]:
    default = [family for family in DEFAULT if shape == "free" or family != "blocks"]  # layers stay alike
    asked = [families] if isinstance(families, str) else list(families or default)
    for family in asked:
        if family not in FAMILIES:
            raise ValueError(f"families: unknown {family!r}; known are {', '.join(FAMILIES)}")
    return set(asked)


def _vectors(
    analysis: Analysis, model: nn.Module, wanted: set[str], layers: Choice | None, residual: bool
) -> list[Vector]:
    """Group the choices that can go into tensors of gates."""
    family = kinds(analysis.units)
    sites: dict[int, list[fx.Node]] = {}
    met: dict[int, set[int]] = {}  # choices that decide on the same units: one tensor cannot hold both
    groups: dict[tuple[str, tuple[fx.Node, ...], int], list[int]] = {}
    taking_gates = dict.fromkeys([*analysis.sites.axis, *analysis.sites.columns])
    for weight, columns in [(w, side) for w in taking_gates for side in analysis.sides(w)]:
        sets = analysis.choices_along(weight, columns).ravel()
        for choice in dict.fromkeys(c for s in sets for c in sorted(s)):
            taking = sites.setdefault(choice, [])
            taking += [weight] if weight not in taking else []
        for together in {s for s in sets if s}:
            for choice in together:
                met.setdefault(choice, set()).update(together - {choice})
    for choice, taking in sites.items():
        kind, own = family.get(choice, "units"), tuple(taking)
        layer = next(n for n in itertools.count() if not met[choice] & set(groups.get((kind, own, n), ())))
        groups.setdefault((kind, own, layer), []).append(choice)
    chosen = _chooser(layers, _layers(analysis, model))
    makers = _makers(analysis)
    found = []
    for (kind, weights, _), choices in groups.items():
        owners = {_module_path(analysis.program.names[w]) for w in weights}
        producers = {path for c in choices for path in makers.get(c, ())}
        if kind not in wanted or (len(owners) > 1 and not residual):
            continue
        if any(chosen(path, model.get_submodule(path)) for path in sorted(owners | producers)):
            found.append(Vector(kind, tuple(choices), weights))
    if wanted != set(DEFAULT) and not found:
        there = sorted({kind for kind, _, _ in groups if kind} - wanted) or ["none"]
        raise ValueError(
            f"families: the network has nothing of {', '.join(sorted(wanted))} that can go;"
            f" it has {', '.join(there)}"
        )
    return found


def _module_path(name: str) -> str:
    return name.rpartition(".")[0]


def _layers(analysis: Analysis, model: nn.Module) -> dict[str, nn.Module]:
    """The modules that hold weights which make units."""
    owners = (node for _, node, _ in analysis.units.labeller.axes.owner)
    names = [_module_path(analysis.program.names[n]) for n in owners if n in analysis.program.names]
    return {path: model.get_submodule(path) for path in dict.fromkeys(names)}


def _makers(analysis: Analysis) -> dict[int, set[str]]:
    """For each choice the modules whose weights make what it decides on."""
    program, values = analysis.program, analysis.program.values
    found: dict[int, set[str]] = {}
    for first, node, axis in analysis.units.labeller.axes.owner:
        if node not in program.names:
            continue
        size = values[node].numel() if axis == -1 else values[node].shape[axis]
        for choices in analysis.sets_of(np.arange(first, first + size)):
            for choice in choices:
                found.setdefault(choice, set()).add(_module_path(program.names[node]))
    return found


def _chooser(layers: Choice | None, known: Mapping[str, nn.Module]) -> Callable[[str, nn.Module], bool]:
    if layers is None:
        return lambda name, module: True
    if callable(layers):
        return layers
    patterns = [layers] if isinstance(layers, str) else list(layers)
    for i, pattern in enumerate(patterns):
        if not fnmatch.filter(known, pattern):
            patterns[i] = f"*.{pattern}"  # as the names of modules may end
        if not fnmatch.filter(known, patterns[i]):
            own = [name for name in known if name]  # not the network itself
            near = difflib.get_close_matches(pattern, own, 3, 0.4) or own[:3]
            raise ValueError(f"layers: no layer is called {pattern!r}; there are {', '.join(near)}")
    return lambda name, module: any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


class _Inserter:
    """Puts gates into the modules of a network.

    Args:
        network: changed in place.
        analysis: of the network without gates.
        vectors: the gates that there are to be.
        gates: a gate for each vector, by its identity.
    """

    def __init__(
        self, network: nn.Module, analysis: Analysis, vectors: list[Vector], gates: Mapping[int, L0Gate]
    ) -> None:
        self.network = network
        self.analysis = analysis
        self.vectors = vectors
        self.gates = gates
        self.chosen = {choice for vector in vectors for choice in vector.choices}
        self.of_site: dict[fx.Node, list[Vector]] = {}
        for vector in vectors:
            for site in vector.sites:
                self.of_site.setdefault(site, []).append(vector)
        self.holders: dict[int, list[tuple[str, str]]] = {}
        self.first: dict[str, str] = {}
        """For each path of a module the first one that leads to it."""
        of: dict[int, str] = {}
        for path, module in network.named_modules(remove_duplicate=False):
            self.first[path] = of.setdefault(id(module), path)
            for name, value in {**module._parameters, **module._buffers}.items():
                if value is not None and self.first[path] == path:
                    self.holders.setdefault(id(value), []).append((path, name))

    def insert(self) -> None:
        """Give all modules their gates."""
        simple = self._simple()
        for path, vector in simple.items():
            gate_layer_(self.network.get_submodule(path), self.gates[id(vector)])
        for site, vectors in self.of_site.items():
            for path, name in self._holders(site):
                if path not in simple:
                    self._put(path, name, site, vectors)
        for norm in self.analysis.sites.norms:
            self._norm(norm)

    def _holders(self, site: fx.Node) -> list[tuple[str, str]]:
        """The modules that hold a weight, and what they call it."""
        found: list[tuple[str, str]] = []
        for full in gate_names(self.analysis.program, site):
            path, _, name = full.rpartition(".")
            module = self.network.get_submodule(path)
            value = module._parameters.get(name) if name in module._parameters else module._buffers.get(name)
            found += self.holders.get(id(value), [(self.first[path], name)])
        return list(dict.fromkeys(found))

    def _simple(self) -> dict[str, Vector]:
        """Layers of PyTorch with one gate for each of their outputs, in order."""
        per_module: dict[str, list[tuple[fx.Node, list[Vector]]]] = {}
        computed = set()  # their weights, from others that take the gates; or read by others than the layer
        for site, vectors in self.of_site.items():
            for path, name in self._holders(site):
                per_module.setdefault(path, []).append((site, vectors))
                if name not in ("weight", "bias") or self._is_read_outside(site, path):
                    computed.add(path)
        normed = {self.first[norm.module] for norm in self.analysis.sites.norms}
        fused = self._fused()
        found = {}
        for path, sites in per_module.items():
            module = self.network.get_submodule(path)
            alike = all(len(v) == 1 and v[0] is sites[0][1][0] for _, v in sites)
            whole = type(module) in GATED and path not in normed | fused | computed and alike
            if whole and all(self._in_order(site, sites[0][1][0]) for site, _ in sites):
                found[path] = sites[0][1][0]
        return found

    def _is_read_outside(self, site: fx.Node, path: str) -> bool:
        """Whether something else than a layer itself reads its weight, which then has to bear the gates."""
        return any(self.first.get(module_of(user)) != path for user in site.users)

    def _fused(self) -> set[str]:
        """Layers inside of modules that read their weights in place of calling them."""
        outer = (nn.TransformerEncoderLayer, nn.MultiheadAttention)
        modules = self.network.named_modules(remove_duplicate=False)
        inside = [(p, q) for p, m in modules if isinstance(m, outer) for q, _ in m.named_modules() if q]
        return {self.first[f"{p}.{q}"] for p, q in inside}

    def _in_order(self, site: fx.Node, vector: Vector) -> bool:
        if self.analysis.sites.axis.get(site, WHOLE) not in (0, -1) or site in self.analysis.sites.columns:
            return False  # such as columns of an embedding whose table is that of a linear layer, too
        sets = self.analysis.choices_along(site)  # families that were not asked for are among them
        return [set(s) & self.chosen for s in sets.ravel()] == [{c} for c in vector.choices]

    def _put(self, path: str, name: str, site: fx.Node, vectors: list[Vector]) -> None:
        module = self.network.get_submodule(path)
        for columns, vector in itertools.product(self.analysis.sides(site), vectors):
            index = _places(self.analysis.choices_along(site, columns), vector.choices)
            if bool((index < len(vector.choices)).any()):
                full = f"{path}.{name}" if path else name
                index = index.view(self.analysis.shape_along(site, columns, full))
                added = self.analysis.program.added_to(site)
                put_gate(module, name, self._on(module, vector), index, _label(vector), added=added)

    def _on(self, module: nn.Module, vector: Vector) -> L0Gate:
        gate = self.gates[id(vector)]
        here = next((p for p in module.parameters()), None)
        gate.train(module.training)
        return gate if here is None else gate.to(here.device)

    def _norm(self, norm: Norm) -> None:
        sets = self.analysis.sets_of(norm.units)
        here = frozenset().union(*sets)
        module = self.network.get_submodule(norm.module)
        for vector in self.vectors:
            if here & set(vector.choices):
                index = _places(sets, vector.choices)
                kind = NormKind(norm.axis, norm.groups, norm.centred, norm.factor)
                put_gate(module, "", self._on(module, vector), index, _label(vector), kind)


def _label(vector: Vector) -> str:
    return "gate" if vector.family in ("channels", "units", "width") else f"gate_{vector.family}"


def _places(sets: np.ndarray, choices: Sequence[int]) -> Tensor:
    """For each set the place of the one of some choices that it holds, or one behind the last."""
    place = {choice: i for i, choice in enumerate(choices)}
    flat = [next((place[c] for c in s if c in place), len(choices)) for s in sets.ravel()]
    return torch.tensor(flat, dtype=torch.long).view(sets.shape)
