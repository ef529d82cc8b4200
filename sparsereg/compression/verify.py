"""Whether two networks give the same answers: what every compaction and every exported file is checked by."""

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

from sparsereg.compression.running import (
    check_steady,
    doubled,
    evaluating,
    in_double,
    in_order_of,
    tensors_in,
)
from sparsereg.errors import InputError

log = logging.getLogger(__name__)

FLOAT64_TOLERANCE = 1e-7
"""Largest difference in float64, as a share of the output's spread. Not tighter: a float32 location on
the very edge of closing may be open by 1e-8 when it is read in float64."""
ROUNDED_TOLERANCE = 1e-5
"""The same where the network itself computes parts in float32, whatever its weights are."""
TOLERANCE = {torch.float64: 1e-7, torch.float32: 1e-3, torch.float16: 1e-1, torch.bfloat16: 5e-1}
"""The same in the model's own precision, where rounding alone makes two sound networks differ."""
NO_NOISE = "%s takes no noise in place of the example: %s"
ROUNDINGS = 16
"""How many times as far as a network's own rounding takes it another one's may."""


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
        InputError: the original answers differently in two calls, or by no number that could be compared.
        RuntimeError: the answers differ.
    """
    own = (args, dict(kwargs))
    _widen(wide)
    tolerance_64 = ROUNDED_TOLERANCE if _rounds(smaller) else FLOAT64_TOLERANCE
    tolerance = max(TOLERANCE.get(_precision(model), 1e-3), tolerance_64)
    name = type(model).__name__
    with evaluating(model):
        for i, (given, named) in enumerate([own, *_noise_for(model, own)]):
            try:
                exact, answer = exactly(model, given, named), model(*given, **named)
            except Exception as error:  # all kinds, of the user's code
                if i == 0:
                    raise
                log.debug(NO_NOISE, name, error)
                continue
            if i == 0:
                _check_says_something(model, answer)
            try:
                _compare(answer, smaller(*given, **named), name, tolerance, exact)
                if exact is not None:
                    wider, wider_named = doubled((given, named))
                    with float64_by_default():
                        answer_64 = wide(*wider, **wider_named)
                    _compare(exact, answer_64, name, tolerance_64)
            except RuntimeError:
                check_steady(model, answer, model(*given, **named))
                raise


def check_numbers(model: nn.Module) -> None:
    """Raise InputError for a network with weights that are no numbers, as where training has diverged."""
    for name, parameter in model.named_parameters():
        lost = int(parameter.isnan().sum())
        if lost:
            raise InputError(
                f"{name} of {type(model).__name__} is nan in {lost:,} of {parameter.numel():,} places: what"
                " is made of it says nothing; take weights from before training diverged"
            )


def _check_says_something(model: nn.Module, answer: Any) -> None:
    numbers = [x for x in tensors_in(answer) if x.is_floating_point() and x.numel()]
    if numbers and not any(bool(x.isfinite().any()) for x in numbers):
        raise InputError(
            f"{type(model).__name__} answers the example by nan or infinity alone, so that nothing can be"
            " compared: give an example of finite numbers"
        )


_WIDER = {
    **dict.fromkeys((torch.float16, torch.bfloat16, torch.float32), torch.float64),
    torch.complex64: torch.complex128,
}


def _wider(leaf: Any) -> Any:
    return _WIDER.get(leaf, leaf) if isinstance(leaf, torch.dtype) else leaf


def _widen(wide: nn.Module) -> None:
    """Let a network in float64 stay there where the original, as it was traced, goes to less."""
    if isinstance(wide, fx.GraphModule):
        for node in wide.graph.nodes:
            node.args = fx.node.map_aggregate(node.args, _wider)
            node.kwargs = fx.node.map_aggregate(node.kwargs, _wider)
        wide.recompile()


class Float64(TorchDispatchMode):
    """Stays in float64 where a network goes to less by itself, as many norms and one-hot inputs do."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call an operation, with float64 where less is asked for."""
        return func(*args, **{name: _wider(value) for name, value in (kwargs or {}).items()})


def _rounds(smaller: nn.Module) -> bool:
    """Whether a network goes to float32 by itself, as many norms of transformers do."""
    nodes = smaller.graph.nodes if isinstance(smaller, fx.GraphModule) else ()
    return any(torch.float32 in (*node.args, *node.kwargs.values()) for node in nodes)


def _precision(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def exactly(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any | None:
    """What a network answers in float64; None if it, or the device, cannot go there."""
    if not all(_supports_float64(x) for x in tensors_in((args, dict(kwargs)))):
        return None
    try:
        return in_float64(model, args, kwargs)
    except (RuntimeError, TypeError) as error:
        log.debug("%s does not run in float64: %s", type(model).__name__, error)
        return None


def in_float64(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """What a network answers in float64; it and the inputs stay as they are."""
    given, named = doubled((args, dict(kwargs)))
    with _with_float64_weights(model), _with_float64_memory(model), Float64(), float64_by_default():  # type: ignore[no-untyped-call]
        return model(*given, **named)


@contextmanager
def float64_by_default() -> Iterator[None]:
    """Within this context tensors that a network makes of a size or of numbers, as states, are float64."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def _with_float64_weights(model: nn.Module) -> Iterator[None]:
    """Give a network float64 weights for a while; afterwards it has the very tensors that it had."""
    weights = [(p, p.data) for p in model.parameters()]
    buffers = [(m, name, b) for m in model.modules() for name, b in m._buffers.items() if b is not None]
    try:
        for parameter, data in weights:
            parameter.data = in_double(data)
        for module, name, buffer in buffers:
            module._buffers[name] = in_double(buffer)
        yield
    finally:
        for parameter, data in weights:
            parameter.data = data
        for module, name, buffer in buffers:
            module._buffers[name] = buffer


_OWN = frozenset(nn.Module().__dict__)
"""What every module has: its parameters, buffers, parts, hooks."""


@contextmanager
def _with_float64_memory(model: nn.Module) -> Iterator[None]:
    """Let what modules keep of a pass for the next one, as tables of positions, be float64 for a while.

    Afterwards they hold what they held, and nothing that was made meanwhile.
    """
    before = [(module, _memory(module)) for module in model.modules()]
    try:
        for module, kept in before:
            _remember(module, {name: doubled(value) for name, value in kept.items()})
        yield
    finally:
        for module, kept in before:
            for name in _memory(module).keys() - kept.keys():
                del module.__dict__[name]
            _remember(module, kept)


def _memory(module: nn.Module) -> dict[str, Any]:
    """Tensors that a module holds besides its parameters and buffers, alone or in lists and dictionaries."""
    found = {}
    for name, value in module.__dict__.items():
        if isinstance(value, Tensor):
            found[name] = value
        elif name not in _OWN and type(value) in (dict, list):
            parts = list(value.values()) if isinstance(value, dict) else value
            if all(isinstance(part, Tensor) for part in parts):
                found[name] = type(value)(value)  # as it is now
    return found


def _remember(module: nn.Module, kept: Mapping[str, Any]) -> None:
    """Let a module hold such tensors; its lists and dictionaries stay the same objects."""
    for name, value in kept.items():
        there = module.__dict__.get(name)
        if isinstance(value, dict) and isinstance(there, dict):
            there.clear()
            there.update(value)
        elif isinstance(value, list) and isinstance(there, list):
            there[:] = value
        else:
            module.__dict__[name] = value


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
            log.debug(NO_NOISE, type(model).__name__, error)
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


def _compare(answers: Any, others: Any, name: str, tolerance: float, exact: Any = None) -> None:
    others, exact = in_order_of(answers, others), in_order_of(answers, exact)
    error = apart(tensors_in(answers), tensors_in(others), tolerance, lambda: tensors_in(exact))
    if error:
        raise RuntimeError(
            f"the compacted {name} gives other answers: they differ by {error:.2g} of the output's"
            " spread; please report the network"
        )


def apart(
    answers: tuple[Tensor, ...],
    others: tuple[Tensor, ...],
    tolerance: float,
    exact: Callable[[], tuple[Tensor, ...]],
) -> float:
    """Largest difference of two answers, as a share of the first one's spread; 0 if none is too large.

    Outputs that hardly spread around what they have in common differ by much of their spread because they are
    rounded. So what is less than ``ROUNDINGS`` times the rounding of the first answer is none.

    Args:
        answers: of the network itself.
        others: of what has to give the same.
        tolerance: largest difference that rounding need not explain.
        exact: makes the network's answers in float64, if they are asked for; nothing if they are not known.
    """
    errors = [difference(a, b) for a, b in zip(answers, others, strict=True)]
    if all(error <= tolerance for error in errors):
        return 0.0
    rounded = [difference(a, b) for a, b in zip(answers, exact(), strict=False)] or [0.0] * len(errors)
    explained = [ROUNDINGS * r if r < math.inf else 0.0 for r in rounded]
    return max((e for e, r in zip(errors, explained, strict=True) if not e <= max(tolerance, r)), default=0.0)


def difference(a: Tensor, b: Tensor) -> float:
    """Largest difference of two answers as a share of the first one's spread.

    Answers that are all alike have no spread; then it is a share of their magnitude. What is infinite or not
    a number must be so in both.
    """
    if a.shape != b.shape:
        return float("inf")
    if not a.numel():
        return 0.0
    a, b = (torch.view_as_real(x.resolve_conj()) if x.is_complex() else x for x in (a, b))
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
