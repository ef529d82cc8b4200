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
from sparsereg import compact, count
from sparsereg.compression.insert import gate_
from sparsereg.compression.macs import counting
from sparsereg.compression.units.explain import Explanation, explanation
from sparsereg.compression.units.program import Program, bound, name_of, plain_call
from sparsereg.compression.units.structure import structure_of
from sparsereg.compression.units.tracing import trace
from sparsereg.compression.verify import Float64, float64_by_default, in_float64
from sparsereg.penalties import hard_concretes

LIMIT = 1e-9
"""Largest difference, as a share of the output's spread, of results that count as equal."""

DRAWS, SPEAKS = 20, 1e-6
"""Halves that are tried, until examples still have different answers: by this share of what they had."""


@float64_by_default()
@torch.no_grad()
def examined(case: Case) -> dict[str, Any]:
    """Gate a network, shut half of each of its gates, compact it; compare answers and sizes."""
    network, args, kwargs = case.build()
    example = args or kwargs
    found: dict[str, Any] = {"input": "x".join(map(str, tree_leaves(example)[0].shape))}
    wanted = tree_leaves(in_float64(network, args, kwargs))
    start = time.process_time()
    gate_(network, example)  # itself: large ones are not copied
    found["gated_seconds"] = f"{time.process_time() - start:.2f}"
    gated = network.eval()
    structure = structure_of(gated, args, kwargs)
    assert structure is not None
    known = explanation(case.name, structure.analysis.units)
    gone = sorted({row.family for row in known.rows if row.state != "kept"})
    found.update(parameters=known.parameters, share=f"{known.share:.4f}", families=" ".join(gone))
    found["kept"] = kept(known)
    set_(gated, None)
    same = difference(tree_leaves(in_float64(gated, args, kwargs)), wanted)
    if not same <= LIMIT:
        return {**found, "difference": f"{same:.1e}", "why": f"with its gates open it differs by {same:.1e}"}
    masked = halve_(gated, args, kwargs, wanted)
    if masked is None:
        return {**found, "why": f"its answers say nothing of its inputs in any of {DRAWS} halves of it"}
    start = time.process_time()
    smaller = compact(gated, example, check=False)
    found["compacted_seconds"] = f"{time.process_time() - start:.2f}"
    most = difference(tree_leaves(in_float64(smaller, args, kwargs)), masked)
    found["difference"] = f"{most:.1e}"
    why = "" if most <= LIMIT else f"compacted it differs from the masked network by {most:.1e}"
    counted = count(gated, example)
    there = sum(p.numel() for p in smaller.parameters()), operations(smaller, args, kwargs)
    found["removed"] = f"{1 - there[0] / known.parameters:.4f}"
    said = counted.compacted_parameters, counted.compacted_macs
    return {**found, "why": why or ("" if there == said else f"counted {said}, there are {there}")}


def halve_(
    gated: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], whole: list[Any]
) -> list[Any] | None:
    """Shut a random half of the gates; return the answers, which still have to depend on the inputs.

    Where branches are shut by a coin, nothing may be left between inputs and answers, and any two networks
    that give constants are alike: then another half is drawn.

    Args:
        gated: a network in eval mode.
        args: positional inputs, of two examples or more.
        kwargs: inputs by name.
        whole: answers with all gates open.

    Returns:
        The answers; None if they depend on the inputs in none of ``DRAWS`` halves.
    """
    least = SPEAKS * spoken(whole)
    for seed in range(DRAWS):
        set_(gated, seed)
        answers = tree_leaves(in_float64(gated, args, kwargs))
        if spoken(answers) >= least:
            return answers
    return None


def spoken(answers: list[Any]) -> float:
    """The largest difference between the first example's answers and another's."""
    tensors = [
        a for a in answers if isinstance(a, Tensor) and a.is_floating_point() and a.dim() and len(a) > 1
    ]
    return max((float((a[1:] - a[:1]).abs().nan_to_num().max()) for a in tensors if a.numel()), default=0.0)


def set_(gated: nn.Module, seed: int | None) -> None:
    """Open all gates, or shut a random half of each tensor of them; single ones, of a branch, by a coin."""
    generator = np.random.default_rng(seed)
    for gates in hard_concretes(gated).values():
        number = gates.log_alpha.numel()
        shut = generator.permutation(number)[: (number + int(generator.integers(2))) // 2]
        location = torch.full((number,), 10.0)
        if seed is not None:
            location[torch.from_numpy(shut)] = -10.0
        gates.log_alpha.copy_(location.view_as(gates.log_alpha))
    gated.train().eval()  # what a network keeps from one pass to the next, it forgets when it trains


def operations(network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Multiply-accumulates for one example as torch.utils.flop_counter sees them."""
    batch = tree_leaves((args, kwargs))[0].shape[0]
    network.requires_grad_(False)  # the counter puts hooks on what does, also on views, which take none
    with counting() as counter:
        network(*args, **kwargs)
    return int(counter.get_total_flops()) // (2 * batch)


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


def kept(known: Explanation) -> str:
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
    results = tree_leaves(in_float64(smaller, args, kwargs))
    if not removed:
        return {**found, "runs": "no", "why": "it removes nothing"}
    assert len(results) == wanted
    program = trace(network, *args, **kwargs)
    with Float64():
        masked = _masked(program, masks, tree_leaves((args, kwargs)))
    most = difference(results, tree_leaves(masked))
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
