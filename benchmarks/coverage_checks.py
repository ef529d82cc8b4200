"""What ``benchmarks.coverage`` does with each network: halve it, and compare with the masked one."""

from __future__ import annotations

import copy
import time
from collections import Counter
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from benchmarks.coverage_cases import Case
from sparsereg.compression.units.cut import Cut
from sparsereg.compression.units.explain import Explanation, explanation
from sparsereg.compression.units.labels import FIRST, stored
from sparsereg.compression.units.program import Program, bound, name_of, plain_call, trace
from sparsereg.compression.units.rules.table import Labeller
from sparsereg.compression.units.solve import Units, solve

LIMIT = 1e-9
"""Largest difference, as a share of the output's spread, of results that count as equal."""


@torch.no_grad()
def examined(case: Case) -> dict[str, Any]:
    """Trace and label a network, cut half of its choices, compare with the masked network."""
    network, args, kwargs = case.build()
    leaves = tree_leaves((args, kwargs))
    found: dict[str, Any] = {"input": "x".join(map(str, leaves[0].shape))}
    wanted = tree_leaves(network(*args, **kwargs))
    start = time.process_time()
    program = trace(network, *args, **kwargs)
    found["traced_seconds"] = f"{time.process_time() - start:.2f}"
    start = time.process_time()
    units = solve(Labeller(program))
    found["labelled_seconds"] = f"{time.process_time() - start:.2f}"
    known = explanation(case.name, units)
    found.update(parameters=known.parameters, share=f"{known.share:.4f}", kept=kept(known, units))
    same = difference(tree_leaves(program.values_of_output), wanted)
    if not same <= LIMIT:
        return {**found, "difference": f"{same:.1e}", "why": f"the traced network differs by {same:.1e}"}
    gone = random_half(units, 0)
    if not gone:
        return {**found, "why": "nothing can go"}
    keep_float64_(program)
    cut = Cut(units, gone)
    smaller = tree_leaves(cut.run(*leaves))
    most = difference(smaller, tree_leaves(cut.masked(*leaves)))
    found["difference"] = f"{most:.1e}"
    found["why"] = "" if most <= LIMIT else f"it differs from the masked network by {most:.1e}"
    return found


def keep_float64_(program: Program) -> None:
    """Where a network goes to float32 in some of its operations, go on in float64: rounding hides nothing."""
    for node in program.calls:
        if name_of(node) in ("to", "_to_copy"):
            node.args = tuple(torch.float64 if a is torch.float32 else a for a in node.args)
            node.kwargs = {k: torch.float64 if a is torch.float32 else a for k, a in node.kwargs.items()}


def difference(found: list[Any], wanted: list[Any]) -> float:
    """Largest difference of two results, as a share of the spread of each tensor of the second."""
    if len(found) != len(wanted):
        return float("inf")
    worst = 0.0
    for one, two in zip(found, wanted, strict=True):
        if not isinstance(two, Tensor) or not two.is_floating_point() or two.numel() == 0:
            continue
        if one.shape != two.shape:
            return float("inf")
        spread = float(two.std()) if two.numel() > 1 else float(two.abs().max())
        off = float((one - two).abs().max()) / (spread or 1.0)
        worst = max(worst, off if off == off else float("inf"))
    return worst


def random_half(units: Units, seed: int) -> set[int]:
    """Half of all choices, but never all of those along one axis of a weight or of a tensor."""
    generator = np.random.default_rng(seed)
    choices = units.removable
    gone = set(generator.permutation(choices)[: len(choices) // 2].tolist())
    axes = units.labeller.axes
    lines = [line for along in axes.weight_axes.values() for line in along if line is not None]
    lines += [stored(part).numpy() for part in axes.of.values() if isinstance(part, Tensor)]
    lines = [np.unique(units.roots[line]) for line in lines]
    lines = [line[line >= FIRST] for line in lines if (line >= FIRST).any()]
    while True:
        alive = units.alive(gone)
        lines = [line for line in lines if not alive[line].any()]
        if not lines:
            return gone
        for line in lines:
            gone -= units.of(int(line[0]))


def kept(known: Explanation, units: Units) -> str:
    """What keeps most of the parameters that cannot go: reasons with their shares of all parameters."""
    reasons: dict[str, str] = {}
    for row in known.rows:
        if row.state == "kept":
            reasons.setdefault(row.parameter, row.reason)
    lost = Counter[str]()
    for name, staying in known.staying.items():
        if staying:
            lost[reasons.get(name, "an operation keeps it")] += staying
    shown = [
        f"{n / known.parameters:.0%} {reason}"
        for reason, n in lost.most_common(2)
        if n > 0.02 * known.parameters
    ]
    return "; ".join(shown)


# ---- Torch-Pruning


@torch.no_grad()
def halved_by_torch_pruning(case: Case) -> dict[str, Any]:
    """Halve a network with Torch-Pruning; compare with the whole one in which the same weights are zero.

    Its pruner runs as its documentation shows it, with random importance; the layers that make the output
    stay, and it is told the heads of modules that have ``qkv`` and ``num_heads``. What it removed is read
    off a second copy, halved in the same way, whose every parameter holds its own position.
    """
    network, args, kwargs = case.build()
    example = args or kwargs
    wanted = len(tree_leaves(network(*args, **kwargs)))
    places = copy.deepcopy(network)
    smaller = _pruned(copy.deepcopy(network), example)
    for parameter in places.parameters():
        parameter.copy_(torch.arange(parameter.numel()).view(parameter.shape) + 1)
    whole = {n: p.shape for n, p in network.named_parameters()}
    staying = dict(_pruned(places, example).named_parameters())
    masks = {
        name: _mask(staying[name].flatten(), shape)
        if name in staying
        else torch.zeros(shape, dtype=torch.bool)
        for name, shape in whole.items()
    }
    removed = 1 - sum(int(m.sum()) for m in masks.values()) / sum(m.numel() for m in masks.values())
    found = {"runs": "yes", "removed": f"{removed:.4f}"}
    results = tree_leaves(smaller(*args, **kwargs))
    if not removed:
        return {**found, "runs": "no", "why": "it removes nothing"}
    assert len(results) == wanted
    program = trace(network, *args, **kwargs)
    most = difference(results, tree_leaves(_masked(program, masks, tree_leaves((args, kwargs)))))
    why = "" if most <= LIMIT else "its result is not that of the masked network"
    return {**found, "difference": f"{most:.1e}", "why": why}


def _mask(places: Tensor, shape: torch.Size) -> Tensor:
    mask = torch.zeros(shape, dtype=torch.bool)
    mask.view(-1)[places.round().long() - 1] = True
    return mask


def _pruned(network: nn.Module, example: Any) -> nn.Module:
    import random

    import torch_pruning

    random.seed(0)
    torch.manual_seed(0)
    np.random.seed(0)
    heads = {
        m.qkv: m.num_heads
        for m in network.modules()
        if isinstance(getattr(m, "qkv", None), nn.Linear) and isinstance(getattr(m, "num_heads", None), int)
    }
    network.requires_grad_(True)
    with torch.enable_grad():
        pruner = torch_pruning.pruner.BasePruner(
            network,
            example if isinstance(example, dict) else tuple(example),
            importance=torch_pruning.importance.RandomImportance(),
            pruning_ratio=0.5,
            ignored_layers=_last_layers(network, example),
            num_heads=heads,
        )
        pruner.step()
    return network.eval()


def _last_layers(network: nn.Module, example: Any) -> list[nn.Module]:
    """Layers whose output is the network's: of the class scores, as the documentation asks for."""
    made: dict[int, nn.Module] = {}

    def note(module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            made[output.shape[1 if isinstance(module, nn.Conv2d) else -1]] = module

    layers = [m for m in network.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    hooks = [m.register_forward_hook(note) for m in layers]
    out = tree_leaves(network(**example) if isinstance(example, dict) else network(*example))
    for hook in hooks:
        hook.remove()
    sizes = {o.shape[d] for o in out if isinstance(o, Tensor) for d in (1, -1) if o.dim() > 1}
    return [module for size, module in made.items() if size in sizes]


def _masked(program: Program, masks: dict[str, Tensor], inputs: list[Any]) -> Any:
    """The whole network with zeros, in which norms take means over the units whose weights stay."""
    weights = dict(program.weights)
    for node in program.parameters:
        mask = masks.get(program.names[node])
        if mask is not None:
            weights[node] = program.weights[node] * mask

    def call(node: Any, args: Any, kwargs: Any) -> Any:
        if name_of(node) not in ("layer_norm", "rms_norm"):
            return plain_call(node, args, kwargs)
        mask = masks.get(program.names.get(bound(node).get("weight"), ""))
        if mask is None or bool(mask.all()) or mask.dim() != 1:
            return plain_call(node, args, kwargs)
        index = mask.nonzero().flatten()
        inside = args[0].index_select(-1, index)
        rest = [w[index] if isinstance(w, Tensor) else w for w in args[2:]]
        result = plain_call(node, (inside, [len(index)], *rest), kwargs)
        return torch.zeros_like(args[0]).index_copy(-1, index, result)

    return program.run(weights, *inputs, call=call)
