"""Parameters and multiply-accumulate operations of a network: full, expected and compacted."""

from dataclasses import dataclass, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from sparsereg.compression.parts import Selected, matched
from sparsereg.compression.units.explain import families, inputs_of
from sparsereg.compression.units.flow import Flow, flow_of
from sparsereg.compression.units.gating import GatedModule
from sparsereg.compression.units.lines import Bools
from sparsereg.compression.units.structure import Structure, structure_of
from sparsereg.errors import InputError
from sparsereg.summary import in_html, in_lines
from sparsereg.target_settings import FAMILIES

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True)
class LayerCount:
    """One layer of a network.

    Attributes:
        name: the layer's name in the network.
        kind: its class.
        channels: output channels or units.
        kept_channels: those that stay.
        parameters: its weights, without locations of gates.
        kept_parameters: those that stay.
        macs: multiply-accumulate operations for one example.
        kept_macs: those that stay.

    Example:
        >>> from sparsereg import SparseMLP
        >>> net, x = SparseMLP(6, 8, 3), torch.ones(1, 6)
        >>> [layer.parameters for layer in count(net, x).layers]
        [56, 72, 27]
    """

    name: str
    kind: str
    channels: int
    kept_channels: int
    parameters: int
    kept_parameters: int
    macs: int
    kept_macs: int


@dataclass(frozen=True, repr=False)
class Count:
    """What a network costs now, and what is left of it after compaction.

    A multiply-accumulate operation (MAC) is two floating-point operations; convolutions, linear layers
    and matrix products are counted, for one example, as torch.utils.flop_counter does.

    Attributes:
        model: the network.
        parameters: weights of the network without the locations of its gates. Parts that the network
            does not use in eval mode (auxiliary classifiers) are not counted.
        compacted_parameters: weights of the compacted network.
        expected_parameters: expectation of the weights that stay, with independent gates. An
            approximation: a channel stays with the probability of its gates, layer by layer, also
            where a whole branch goes; it is exact where every gate is surely open or surely shut.
        macs: multiply-accumulate operations of the network for one example.
        compacted_macs: those of the compacted network.
        expected_macs: expectation of those that stay, with the same approximation.
        exact_sparsity: 1 - compacted_parameters / parameters.
        gates: number of gates.
        open_gates: gates whose median is not zero.
        layers: one row for each layer with weights.

    Example:
        >>> from sparsereg import SparseMLP
        >>> net, x = SparseMLP(6, 8, 3), torch.ones(1, 6)
        >>> count(net, x).parameters
        155
    """

    parameters: int
    compacted_parameters: int
    expected_parameters: float
    macs: int
    compacted_macs: int
    expected_macs: float
    exact_sparsity: float
    gates: int
    open_gates: int
    layers: tuple[LayerCount, ...]

    def __repr__(self) -> str:
        return in_lines(*self._shown())

    def _repr_html_(self) -> str:
        return in_html(*self._shown())

    def _shown(self) -> tuple[str, dict[str, str]]:
        return f"Count of {len(self.layers)} layers with weights", {
            "parameters": f"{self.parameters:,} -> {self.compacted_parameters:,}",
            "multiply-accumulates": f"{self.macs:,} -> {self.compacted_macs:,} for one example",
            "exact sparsity": f"{self.exact_sparsity:.2%}",
            "gates": f"{self.gates:,}, {self.open_gates:,} of them open",
        }

    def to_frame(self) -> "pandas.DataFrame":
        """The layers as a pandas data frame."""
        import pandas

        columns = [field.name for field in fields(LayerCount)]
        return pandas.DataFrame([[getattr(row, c) for c in columns] for row in self.layers], columns=columns)


class Accountant:
    """Counts a network again and again while its gates move; traces it once.

    It neither changes the network nor keeps a copy of its weights.

    Args:
        model: the network.
        example_input: one batch as the network takes it: a tensor, a tuple of positional inputs, or a
            dictionary of inputs by name.

    Attributes:
        model: the network.
        parameters: weights of the network without the locations of its gates.
        macs: multiply-accumulate operations of the network for one example.
        gates: its gates.

    Raises:
        InputError: the network cannot be traced.

    Example:
        >>> from sparsereg import SparseMLP
        >>> net, x = SparseMLP(6, 8, 3), torch.ones(1, 6)
        >>> accountant = Accountant(net, x)
        >>> accountant.expected_parameters().backward()  # differentiable in every log_alpha
        >>> 0 <= accountant.exact_sparsity() <= 1
        True
    """

    def __init__(self, model: nn.Module, example_input: Any) -> None:
        self._example = inputs_of(example_input)
        structure = structure_of(model, *self._example)
        self.model = model
        self._counted: _Channels | _Units = (
            _Channels(model, flow_of(model, *self._example))
            if structure is None
            else _Units(model, structure)
        )
        self.parameters, self.macs = self._counted.parameters, self._counted.macs
        self.gates = self._counted.gates

    @cached_property
    def flow(self) -> Flow:
        """The network as operations on channels.

        Raises:
            InputError: a layer has gates of several kinds.
        """
        several = next((n for n, m in self.model.named_modules() if isinstance(m, GatedModule)), None)
        if several is not None:
            raise InputError(
                f"{type(self.model).__name__} has a layer with gates of several kinds, {several!r}:"
                " it is counted and compacted, but its channels cannot leave while it trains:"
                " compact_every_n_epochs=0, or gates without families=blocks"
            )
        counted = self._counted
        return counted.flow if isinstance(counted, _Channels) else flow_of(self.model, *self._example)

    def count(self) -> Count:
        """Count with the gates and weights as they are now."""
        rows = self._counted.rows()
        compacted = sum(row.kept_parameters for row in rows)
        with torch.no_grad():
            expected_parameters, expected_macs = (float(cost) for cost in self._counted.expected())
        num_gates = sum(g.log_alpha.numel() for g in self.gates)
        return Count(
            parameters=self.parameters,
            compacted_parameters=compacted,
            expected_parameters=expected_parameters,
            macs=self.macs,
            compacted_macs=sum(row.kept_macs for row in rows),
            expected_macs=expected_macs,
            exact_sparsity=1.0 - compacted / self.parameters if self.parameters else 0.0,
            gates=num_gates,
            open_gates=sum(gate.get_num_active() for gate in self.gates),
            layers=tuple(row for row in rows if row.parameters or row.macs or row.kept_parameters),
        )

    def exact_sparsity(self) -> float:
        """Share of the weights that compaction removes now; cheaper than a whole count."""
        return 1.0 - self._counted.kept_parameters() / self.parameters if self.parameters else 0.0

    def exact_macs(self) -> int:
        """MACs that compaction leaves now for one example; cheaper than a whole count."""
        return self._counted.kept_macs()

    def expected_parameters(self) -> Tensor:
        """Expected weights that stay, differentiable in every log_alpha; a scalar in float32 or wider."""
        return self._counted.expected()[0]

    def expected_macs(self) -> Tensor:
        """Expected MACs that stay for one example, differentiable in every log_alpha; a scalar."""
        return self._counted.expected()[1]

    def paths(self) -> list[str]:
        """Modules that hold weights or compute products."""
        return list(dict.fromkeys(row.name for row in self._counted.rows()))

    def select(self, where: str, cost: str) -> Selected:
        """What belongs to a part of the network.

        Args:
            where: a pattern of names of modules, or a family of gates.
            cost: parameters or macs.
        """
        return self._counted.select(where, cost)


class _Units:
    """Counts a network whose gates ``gate`` has put in."""

    def __init__(self, model: nn.Module, structure: Structure) -> None:
        self.model = model
        self.structure = structure
        self.costs = structure.analysis.costs
        self.parameters, self.macs = self.costs.full
        self.gates = structure.hard_concretes(model)

    def kept_parameters(self) -> int:
        """Parameters of the compacted network."""
        return int(self.costs.exact(self.structure.stays(self.model))[0].sum())

    def kept_macs(self) -> int:
        """MACs of the compacted network for one example."""
        return int(self.costs.exact(self.structure.stays(self.model))[1].sum())

    def expected(self) -> tuple[Tensor, Tensor]:
        """Expected parameters and MACs that stay."""
        return self.costs.expected(self.structure.p_active(self.model))

    def select(self, where: str, cost: str) -> Selected:
        """See ``Accountant.select``."""
        at = ("parameters", "macs").index(cost)
        terms, others = (self.costs.parameters, self.costs.macs)[at], self._others(where)
        everything = np.ones(len(self.costs.choices), dtype=bool)
        if where in FAMILIES:
            counted = self.costs.exact(others)[at] < self.costs.exact(everything)[at]
            members = frozenset([where]) if counted.any() else frozenset[str]()
        else:
            paths = [self._path(term.node) for term in terms]
            members = matched(paths, where)
            counted = np.array([path in members for path in paths], dtype=bool)

        def expected() -> Tensor:
            p = self.structure.p_active(self.model)
            free = torch.from_numpy(others).to(p.device)
            found = self.costs.expected_terms(torch.where(free, torch.ones_like(p), p))[at]
            return found[torch.from_numpy(counted).to(p.device)].sum()

        def exact() -> int:
            return int(self.costs.exact(self.structure.stays(self.model) | others)[at][counted].sum())

        full = int(self.costs.exact(everything)[at][counted].sum())
        return Selected(full, members, exact, expected)

    def _others(self, where: str) -> Bools:
        """For a family the choices that its gates do not decide on; for modules none."""
        others = np.zeros(len(self.costs.choices), dtype=bool)
        if where in FAMILIES:
            kinds = families(self.structure.analysis.units)
            others[:] = [kinds.get(c) != where or c not in self.structure.gates for c in self.costs.choices]
        return others

    def rows(self) -> list[LayerCount]:
        """A row for each module that holds weights or computes products."""
        everything = np.ones(len(self.costs.choices), dtype=bool)
        stays = self.structure.stays(self.model)
        found: dict[str, dict[str, int]] = {}
        for kept, now in (("", everything), ("kept_", stays)):
            for terms, costs, what in zip(
                (self.costs.parameters, self.costs.macs),
                self.costs.exact(now),
                ("parameters", "macs"),
                strict=True,
            ):
                for term, cost in zip(terms, costs.tolist(), strict=True):
                    row = found.setdefault(self._path(term.node), {})
                    row[kept + what] = row.get(kept + what, 0) + cost
        return [self._row(path, row, stays) for path, row in found.items()]

    def _path(self, node: fx.Node) -> str:
        return self.structure.analysis.module_of(node)

    def _row(self, path: str, row: dict[str, int], stays: Bools) -> LayerCount:
        channels, kept = self.structure.analysis.width(path, stays)
        cost = {key: row.get(key, 0) for key in ("parameters", "kept_parameters", "macs", "kept_macs")}
        module = self.model.get_submodule(path) if path else self.model
        return LayerCount(
            name=path, kind=type(module).__name__, channels=channels, kept_channels=kept, **cost
        )


class _Channels:
    """Counts a network whose gates its author has put in."""

    def __init__(self, model: nn.Module, flow: Flow) -> None:
        self.model = model
        self.flow = flow
        self.parameters, self.macs = flow.full
        self.gates = flow.gates(model)

    def kept_parameters(self) -> int:
        """Parameters of the compacted network."""
        return self.flow.kept_parameters(self.flow.analyse(self.model))

    def kept_macs(self) -> int:
        """MACs of the compacted network for one example."""
        return self.flow.kept_macs(self.flow.analyse(self.model))

    def expected(self) -> tuple[Tensor, Tensor]:
        """Expected parameters and MACs that stay."""
        return self.flow.expected(self.model)

    def select(self, where: str, cost: str) -> Selected:
        """See ``Accountant.select``; gates of an author's own have no families."""
        at = ("parameters", "macs").index(cost)
        rows = self.flow.rows(self.flow.analyse(self.model))
        members = matched((path for path, _ in rows), where)
        own = [(path, row) for path, row in rows if path in members]

        def exact() -> int:
            now = self.flow.rows(self.flow.analyse(self.model))
            return sum(row[f"kept_{cost}"] for path, row in now if path in members)

        return Selected(
            sum(row[cost] for _, row in own),
            frozenset(path for path, _ in own),
            exact,
            lambda: self.flow.expected(self.model, lambda path: path in members)[at],
        )

    def rows(self) -> list[LayerCount]:
        """A row for each module that holds weights or computes products."""
        found: dict[str, dict[str, int]] = {}
        for path, costs in self.flow.rows(self.flow.analyse(self.model)):
            row = found.setdefault(path, dict.fromkeys(costs, 0))
            for key, cost in costs.items():
                row[key] = max(row[key], cost) if key.endswith("channels") else row[key] + cost
        return [self._row(path, row) for path, row in found.items()]

    def _row(self, path: str, row: dict[str, int]) -> LayerCount:
        module = self.model.get_submodule(path) if path else self.model
        return LayerCount(name=path, kind=type(module).__name__, **row)


def count(model: nn.Module, example_input: Any) -> Count:
    """Count parameters and MACs of a network with gates, full, expected and compacted.

    Args:
        model: the network; one without gates is counted as it is.
        example_input: one batch as the network takes it, see ``Accountant``.

    Raises:
        InputError: the network cannot be traced.

    Example:
        >>> from sparsereg import SparseMLP
        >>> sizes = count(SparseMLP(6, 8, 3), torch.ones(1, 6))
        >>> sizes.compacted_parameters <= sizes.parameters
        True
    """
    return Accountant(model, example_input).count()
