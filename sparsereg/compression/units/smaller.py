"""Compaction of a network whose gates ``sparsereg.gate`` has put in."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from sparsereg.compression.running import copied
from sparsereg.compression.sizes import of_size
from sparsereg.compression.units.cut import Cut
from sparsereg.compression.units.emit import Emitter
from sparsereg.compression.units.entrances import axis_of_features
from sparsereg.compression.units.gating import take_gates_off
from sparsereg.compression.units.lengths import Sizes
from sparsereg.compression.units.lines import Bools
from sparsereg.compression.units.precision import precision_of
from sparsereg.compression.units.recorded import same_calls
from sparsereg.compression.units.structure import Structure, plain_module
from sparsereg.compression.units.tracing import (
    at_least_two,
    has_one_batch_size,
    same_operations,
    takes_any_batch,
)


def smaller(
    model: nn.Module,
    structure: Structure,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    round_to: int,
    dtypes: Sequence[torch.dtype | None],
) -> list[fx.GraphModule]:
    """Build what is left of a network, in each of some precisions.

    Args:
        model: with gates; left as it is.
        structure: of the network.
        args: positional inputs of an example.
        kwargs: inputs by name.
        round_to: see ``compact``.
        dtypes: of the weights; None: their own.
    """
    stays = rounded(structure, structure.stays(model), round_to)
    units = structure.analysis.units
    cut = Cut(units, structure.gone(stays), ())
    if structure.fixed is None:
        structure.fixed = fixed_sizes(model, structure, args, kwargs)
    program = structure.analysis.program
    if not program.precision:
        program.precision.append(precision_of(_bare(model), program, args, kwargs))
    made = []
    for dtype in dtypes:
        cut.use(structure.weights(model, dtype))
        made.append(Emitter(cut, model, structure.fixed, program.precision[0]).module())
        made[-1].meta["unread_inputs"] = structure.unread(stays)
    return made


def rounded(structure: Structure, stays: Bools, multiple: int) -> Bools:
    """Keep units that are shut where that makes the number behind a gate a multiple of a number.

    A norm takes no means over units that are shut, so that these go whatever their number is.
    """
    if multiple == 1:
        return stays
    stays = stays.copy()
    axes = structure.analysis.units.labeller.axes
    lines = (*axes.averaged, *axes.averaged_by_groups)
    averaged = {c for line in lines for s in structure.analysis.sets_of(line).ravel() for c in s}
    choices = structure.analysis.costs.choices
    for path in structure.paths:
        own = [i for i, c in enumerate(choices) if structure.gates.get(c, ("", 0))[0] == path]
        alive = int(stays[own].sum())
        spare = [i for i in own if not stays[i] and choices[i] not in averaged]
        if alive:
            stays[spare[: -alive % multiple]] = True
    return stays


def fixed_sizes(
    model: nn.Module, structure: Structure, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[int, Sizes]:
    """The sizes that the inputs of the smaller network may have, by the input's position."""
    program = structure.analysis.program
    known = _known_sizes(model)
    if known is not None:
        return known
    free = _free_positions(model, structure, args, kwargs)
    tensors = {n: v for n in program.inputs if isinstance(v := program.values[n], Tensor) and v.dim()}
    any_batch = not any(map(has_one_batch_size, tensors)) or takes_any_batch(_bare(model), program)
    found = {}
    for node, value in tensors.items():
        sizes = Sizes.of(node.meta["val"].shape, value.shape)
        if any_batch or not has_one_batch_size(node):
            sizes.free(0)
        features = axis_of_features(program, node)
        for axis in range(1, value.dim()):
            if axis == features or (value.dim() > 3 and (axis == 1 or free)):
                sizes.free(axis)
        found[program.inputs.index(node)] = sizes
    return found


def _known_sizes(model: nn.Module) -> dict[int, Sizes] | None:
    """The sizes that a network says itself, which has been compacted before; None of any other."""
    if not isinstance(model, fx.GraphModule) or "unread_inputs" not in model.meta:
        return None
    inputs = [node for node in model.graph.nodes if node.op == "placeholder"]
    said = {n.args[0]: Sizes.said(*n.args[1:]) for n in model.graph.nodes if n.target is of_size}
    if not set(said) <= set(inputs):  # parts of what it is given as one
        return None
    return {place: said[node] for place, node in enumerate(inputs) if node in said}


def _free_positions(
    model: nn.Module, structure: Structure, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> bool:
    """Whether a network does the same with maps of another size: whether its operations say no size."""
    if not any(
        isinstance(x, Tensor) and x.dim() > 3 for x in torch.utils._pytree.tree_leaves((args, kwargs))
    ):
        return True
    bare, program = _bare(model), structure.analysis.program
    given = torch.utils._pytree.tree_map(at_least_two, (args, dict(kwargs)))

    def same(size: Callable[[int], int]) -> bool | None:
        changed = torch.utils._pytree.tree_map(lambda x: _resized(x, size), given)
        return same_calls(bare, given, changed) or same_operations(bare, program, *changed)

    # Larger by what most networks halve, and smaller by what they do not: maps may be filled up, for example.
    return bool(same(lambda n: n + 32)) and same(lambda n: n // 2 + 1) is not False


def _bare(model: nn.Module) -> nn.Module:
    """A network without its gates, whose weights it shares."""
    tensors = (*model.parameters(), *model.buffers())
    bare = copied(model, {id(t): t for t in tensors})
    take_gates_off(bare, plain_module)
    return bare


def _resized(x: Any, size: Callable[[int], int]) -> Any:
    """The same on maps of other sizes."""
    if not isinstance(x, Tensor) or x.dim() < 4:
        return x
    for axis in range(2, x.dim()):
        index = torch.arange(size(x.shape[axis]), device=x.device) % x.shape[axis]
        x = x.index_select(axis, index)
    return x
