"""Parameters and multiply-accumulate operations of a network: full, expected and compacted."""

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from sparsereg.compression.expected import expected_costs
from sparsereg.compression.graph import Analysis, Example, Network, trace
from sparsereg.compression.ops import Mask, Op
from sparsereg.summary import in_html, in_lines

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
        example_input: a batch of examples, or a tuple of batches for several inputs.

    Raises:
        InputError: the network cannot be traced.
    """

    def __init__(self, model: nn.Module, example_input: Example) -> None:
        self.network: Network = trace(model, example_input)
        self._full = full_costs(self.network)
        self.parameters = sum(parameters for parameters, _ in self._full.values())
        self.macs = sum(macs for _, macs in self._full.values())

    def count(self) -> Count:
        """Count with the gates and weights as they are now."""
        analysis = self.network.analyse()
        rows = [self._row(op, analysis) for op in self.network.ops.values()]
        compacted = sum(row.kept_parameters for row in rows)
        expected_parameters, expected_macs = self._expected()
        gates = self.network.gates
        shut = [(analysis.values.gate([g], g.log_alpha.numel()) == 0).sum() for g in gates]
        num_gates = sum(g.log_alpha.numel() for g in gates)
        return Count(
            parameters=self.parameters,
            compacted_parameters=compacted,
            expected_parameters=expected_parameters,
            macs=self.macs,
            compacted_macs=sum(row.kept_macs for row in rows),
            expected_macs=expected_macs,
            exact_sparsity=1.0 - compacted / self.parameters if self.parameters else 0.0,
            gates=num_gates,
            open_gates=num_gates - int(sum(shut)),
            layers=tuple(row for row in rows if row.parameters or row.macs or row.kept_parameters),
        )

    def exact_sparsity(self) -> float:
        """Share of the weights that compaction removes now; cheaper than a whole count."""
        analysis = self.network.analyse()
        compacted = sum(self.network.parameters_of(op, analysis) for op in self.network.ops.values())
        return 1.0 - compacted / self.parameters if self.parameters else 0.0

    def expected_parameters(self) -> Tensor:
        """Expected weights that stay, differentiable in every log_alpha; a scalar in float32 or wider."""
        return expected_costs(self.network)[0]

    def expected_macs(self) -> Tensor:
        """Expected MACs that stay for one example, differentiable in every log_alpha; a scalar."""
        return expected_costs(self.network)[1]

    def _expected(self) -> tuple[float, float]:
        with torch.no_grad():
            parameters, macs = expected_costs(self.network)
        return float(parameters), float(macs)

    def _row(self, op: Op, analysis: Analysis) -> LayerCount:
        parameters, macs = self._full[op.name]
        kept = analysis.kept.get(op.name)
        return LayerCount(
            name=op.path or op.name,
            kind=type(op.module).__name__ if op.module is not None else op.kind,
            channels=op.width,
            kept_channels=0 if kept is None else int(kept.sum()),
            parameters=parameters,
            kept_parameters=self.network.parameters_of(op, analysis),
            macs=macs,
            kept_macs=self.network.macs_of(op, analysis),
        )


def count(model: nn.Module, example_input: Example) -> Count:
    """Count parameters and MACs of a network with gates, full, expected and compacted.

    Args:
        model: the network; one without gates is counted as it is.
        example_input: a batch of examples, or a tuple of batches for several inputs.

    Raises:
        InputError: the network cannot be traced.

    Example:
        >>> from sparsereg import SparseMLP
        >>> sizes = count(SparseMLP(6, 8, 3), torch.ones(1, 6))
        >>> sizes.compacted_parameters <= sizes.parameters
        True
    """
    return Accountant(model, example_input).count()


def full_costs(network: Network) -> dict[str, tuple[int, int]]:
    """Return parameters and MACs of each operation with all its channels."""
    return {
        name: (op.num_parameters([_all(w) for w in op.input_widths], _all(op.width)), op.macs)
        for name, op in network.ops.items()
    }


def _all(width: int) -> Mask:
    return np.ones(width, dtype=bool)
