"""From a network with gates to a smaller one without: the same answers, plain torch.nn modules."""

import torch
from torch import fx, nn

from sparsereg.compression.running import Example, copied
from sparsereg.compression.units.explain import inputs_of
from sparsereg.compression.units.flow import ATTRIBUTE as FLOW
from sparsereg.compression.units.flow import flow_of
from sparsereg.compression.units.fold import folded
from sparsereg.compression.units.smaller import smaller
from sparsereg.compression.units.structure import ATTRIBUTE as UNITS
from sparsereg.compression.units.structure import structure_of
from sparsereg.compression.units.tracing import BEFORE
from sparsereg.compression.verify import check_numbers, verify
from sparsereg.progress import doing

ORIGINAL = "original"
"""Key in the ``meta`` of a compacted network: the size of the network that it was made from."""


def compact(
    model: nn.Module, example_input: Example, *, round_to: int = 1, check: bool = True
) -> fx.GraphModule:
    """Return a physically smaller network without gates that gives the same answers in eval mode.

    Closed channels go, with all that depends on them; constants move into biases where that is exact;
    open gates are folded into weights. The result consists of torch.nn modules under their old names, shares
    no memory with the model, is in eval mode, and can be trained further.

    Args:
        model: the network; left as it is.
        example_input: one batch as the network takes it: a tensor, a tuple of positional inputs, or a
            dictionary of inputs by name.
        round_to: keep closed channels where that makes the number of channels behind a gate a multiple of
            this; odd numbers can be slower than the next multiple of 8.
        check: compare both networks on the example and on noise like it, in the model's own precision and
            in float64.

    Returns:
        The network as a torch.fx.GraphModule: its ``code`` shows the forward pass, and ``meta["original"]``
        holds ``parameters`` and ``macs`` of the network that was compacted (of the first one, where a
        compacted network is compacted again).

    Raises:
        InputError: the network cannot be traced, or has weights or answers that are no numbers.
        ValueError: ``round_to`` is less than 1.
        RuntimeError: the compacted network gives other answers.

    Example:
        >>> import torch
        >>> from sparsereg import SparseMLP
        >>> net = SparseMLP(6, 8, 3).eval()
        >>> x = torch.ones(1, 6)
        >>> torch.allclose(compact(net, x)(x), net(x), atol=1e-5)
        True
    """
    if isinstance(round_to, bool) or not isinstance(round_to, int) or round_to < 1:
        raise ValueError(f"round_to must be an integer >= 1, got {round_to!r}")
    with doing(f"compacting {type(model).__name__}"):
        return _compacted(model, example_input, round_to, check)


def _compacted(model: nn.Module, example_input: Example, round_to: int, check: bool) -> fx.GraphModule:
    args, kwargs = inputs_of(example_input)
    structure = structure_of(model, args, kwargs)
    check_numbers(model)
    if structure is not None:
        dtypes = (None, torch.float64) if check else (None,)
        made, *wide = smaller(model, structure, args, kwargs, round_to, dtypes)
        full = structure.analysis.costs.full
    else:
        flow = flow_of(model, args, kwargs)
        made, *wide = folded(model, flow, round_to)
        full = flow.full
    if check:
        verify(model, made, wide[0], args, kwargs)
    if structure is not None and isinstance(model, fx.GraphModule):
        made.meta[BEFORE] = structure
    made.meta[ORIGINAL] = original_size(model) or {"parameters": full[0], "macs": full[1]}
    return made


def original_size(model: nn.Module) -> dict[str, int]:
    """Return ``parameters`` and ``macs`` of the network that a compacted one was made from; else nothing.

    Example:
        >>> import torch
        >>> from sparsereg import SparseMLP
        >>> original_size(compact(SparseMLP(6, 8, 3), torch.ones(1, 6)))["parameters"]
        155
    """
    found: dict[str, int] = model.meta.get(ORIGINAL, {}) if isinstance(model, fx.GraphModule) else {}
    return found


def twin(model: nn.Module) -> nn.Module:
    """Return a copy of a network with gates that knows what compacting the network has found out.

    Copies of traced networks forget it otherwise.
    """
    made = copied(model)
    known = {key: model.__dict__[key] for key in (UNITS, FLOW) if key in model.__dict__}
    made.__dict__.update(known)
    return made
