"""Whether two networks give the same answers: what every compaction and every exported file is checked by."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from sparsereg.compression.running import doubled, evaluating, tensors_in

log = logging.getLogger(__name__)

FLOAT64_TOLERANCE = 1e-7
"""Largest difference in float64, as a share of the output's spread. Not tighter: a float32 location on
the very edge of closing may be open by 1e-8 when it is read in float64."""
ROUNDED_TOLERANCE = 1e-5
"""The same where the network itself computes parts in float32, whatever its weights are."""
TOLERANCE = {torch.float64: 1e-7, torch.float32: 1e-3, torch.float16: 1e-1, torch.bfloat16: 5e-1}
"""The same in the model's own precision, where rounding alone makes two sound networks differ."""


def verify(
    model: nn.Module, smaller: nn.Module, wide: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> None:
    """Compare two networks on inputs and on noise like them, in their own precision and in float64.

    Args:
        model: the original; left as it is.
        smaller: what has to give the same answers.
        wide: the same in float64.
        args: positional inputs of a batch.
        kwargs: inputs by name.

    Raises:
        RuntimeError: the answers differ.
    """
    own = (args, dict(kwargs))
    _widen(wide, _precision(model))
    tolerance_64 = ROUNDED_TOLERANCE if _rounds(smaller) else FLOAT64_TOLERANCE
    tolerance = max(TOLERANCE.get(_precision(model), 1e-3), tolerance_64)
    with evaluating(model):
        batches = [own, *_noise_for(model, own)]
        for given, named in batches:
            _compare(model(*given, **named), smaller(*given, **named), type(model).__name__, tolerance)
            leaves = [x for x in torch.utils._pytree.tree_leaves((given, named)) if isinstance(x, Tensor)]
            if not all(_supports_float64(x) for x in leaves):
                continue
            given, named = doubled((given, named))
            with _in_float64(model):
                answers = model(*given, **named)
            _compare(answers, wide(*given, **named), type(model).__name__, tolerance_64)


def _widen(wide: nn.Module, own: torch.dtype) -> None:
    """Let a network in float64 go there where the original, as it was traced, goes to its own precision."""
    if not isinstance(wide, fx.GraphModule) or own is torch.float64:
        return

    def widened(leaf: Any) -> Any:
        return torch.float64 if leaf is own else leaf

    for node in wide.graph.nodes:
        node.args = fx.node.map_aggregate(node.args, widened)
        node.kwargs = fx.node.map_aggregate(node.kwargs, widened)
    wide.recompile()


def _rounds(smaller: nn.Module) -> bool:
    """Whether a network goes to float32 by itself, as many norms of transformers do."""
    nodes = smaller.graph.nodes if isinstance(smaller, fx.GraphModule) else ()
    return any(torch.float32 in (*node.args, *node.kwargs.values()) for node in nodes)


def _precision(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


@contextmanager
def _in_float64(model: nn.Module) -> Iterator[None]:
    """Give a network float64 weights for a while; afterwards it has the very tensors that it had."""
    weights = [(p, p.data) for p in model.parameters() if p.is_floating_point()]
    buffers = [
        (m, name, b)
        for m in model.modules()
        for name, b in m._buffers.items()
        if b is not None and b.is_floating_point()
    ]
    try:
        for parameter, data in weights:
            parameter.data = data.double()
        for module, name, buffer in buffers:
            module._buffers[name] = buffer.double()
        yield
    finally:
        for parameter, data in weights:
            parameter.data = data
        for module, name, buffer in buffers:
            module._buffers[name] = buffer


def _supports_float64(x: Tensor) -> bool:
    return x.device.type in ("cpu", "cuda")


def _noise_for(model: nn.Module, inputs: Any) -> Iterator[Any]:
    """Noise that a network takes; whole numbers as they are where it refuses them turned round."""
    if all(x.is_floating_point() for x in tensors_in(inputs)):
        yield _noise_like(inputs)
        return
    for turned in (True, False):
        made = _noise_like(inputs, turned)
        try:
            model(*made[0], **made[1])
        except Exception as error:  # all kinds, of the user's code, which took the example itself
            log.debug("%s takes no noise in place of the example: %s", type(model).__name__, error)
        else:
            yield made
            return


def _noise_like(inputs: Any, turned: bool = True) -> Any:
    """Normal noise with the mean and spread of each input; whole numbers are turned round, or stay."""
    generator = torch.Generator().manual_seed(0)

    def noise(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        if not x.is_floating_point():
            return x.flip(0) if turned and x.dim() else x
        made = torch.randn(x.shape, generator=generator)
        spread = x.std(correction=0) if x.numel() > 1 else torch.ones(())
        return made.to(x) * torch.where(spread > 0, spread, 1.0).to(x) + x.mean()

    return torch.utils._pytree.tree_map(noise, inputs)


def _compare(answers: Any, others: Any, name: str, tolerance: float) -> None:
    found: list[tuple[Tensor, ...]] = [tensors_in(answers), tensors_in(others)]
    for a, b in zip(*found, strict=True):
        error = difference(a, b)
        if not error <= tolerance:
            raise RuntimeError(
                f"the compacted {name} gives other answers: they differ by {error:.2g} of the output's"
                " spread; please report the network"
            )


def difference(a: Tensor, b: Tensor) -> float:
    """Largest difference of two answers as a share of the first one's spread.

    Answers that are all alike have no spread; then it is a share of their magnitude. What is infinite or not
    a number must be so in both.
    """
    if a.shape != b.shape:
        return float("inf")
    if not a.numel():
        return 0.0
    a, b = a.double(), b.double()
    finite = a.isfinite() & b.isfinite()
    alike = (a == b) | (a.isnan() & b.isnan())
    if not (finite | alike).all():
        return float("inf")
    if not finite.any():
        return 0.0
    a, b = a[finite], b[finite]
    magnitude = a.abs().max().item()
    spread = (a.max() - a.min()).item()
    size = spread if spread > 1e-6 * magnitude else magnitude
    return (a - b).abs().max().item() / (size or 1.0)
