"""Running a network for what it tells, without disturbing it."""

import copy
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import is_dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn

from sparsereg.errors import InputError

Example = Tensor | tuple[Tensor, ...]
Network = TypeVar("Network", bound=nn.Module)


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; every module's own mode is put back afterwards.

    Decoders of transformers do not hand out their keys and values meanwhile (``config.use_cache``), and
    encoders of PyTorch compute what stands in place of padding, as they do where they learn.
    """
    modes = [(m, m.training) for model in models for m in model.modules()]
    caching = _caching(models)
    try:
        for config in caching:
            config.use_cache = False
        for model in models:
            model.eval()
        with torch.no_grad(), without_fused_attention():
            yield
    finally:
        for module, training in modes:
            module.training = training
        for config in caching:
            config.use_cache = True


def copied(model: Network, known: Mapping[int, Any] | None = None) -> Network:
    """A copy of a network. What its modules keep of a pass, as attention maps, is copied without its graph.

    Args:
        model: left as it is.
        known: what takes the place of some objects in it, by their ``id``.
    """
    kept = [torch.utils._pytree.tree_leaves(list(m.__dict__.values())) for m in model.modules()]
    computed = [x for leaves in kept for x in leaves if isinstance(x, Tensor) and not x.is_leaf]
    return copy.deepcopy(model, {**{id(x): x.detach().clone() for x in computed}, **(known or {})})


def check_network(model: object) -> None:
    """Raise ValueError for what is no network, such as a function, and for one that cannot be looked into."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a torch.nn.Module, got a {type(model).__name__}")
    for path, module in model.named_modules():
        what, advice = _closed(module)
        if what:
            where = f"{path}, a {type(module).__name__}," if path else f"the {type(module).__name__}"
            raise InputError(f"{where} {what}: {advice}")
    empty = next((name for name, p in model.named_parameters() if p.is_meta), None)
    if empty is not None:
        raise InputError(f"{empty} is on the device meta, without numbers: give the network weights first")


_QUANTIZED = ("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized", "torch.ao.nn.sparse.quantized")
"""Packages of PyTorch whose layers have quantized weights."""


def _closed(module: nn.Module) -> tuple[str, str]:
    """Why a module cannot be looked into, and what to do; empty if it can."""
    if isinstance(module, torch.jit.ScriptModule):
        return "runs as TorchScript", "give the network from before torch.jit.script or torch.jit.trace"
    if isinstance(module, nn.parallel.DistributedDataParallel):
        return "shares its batches out to processes", "give its .module, and wrap what you train afterwards"
    if type(module).__module__.startswith(_QUANTIZED):
        return "has quantized weights", "compact the network from before, and quantize the smaller one"
    return "", ""


@contextmanager
def without_fused_attention() -> Iterator[None]:
    """Let no layer of ``torch.nn.TransformerEncoder`` be one operation, which leaves padding out."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _caching(models: tuple[nn.Module, ...]) -> list[Any]:
    """Configurations of modules, each once, that ask for keys and values beside the answers."""
    configs = [getattr(m, "config", None) for model in models for m in model.modules()]
    return [c for c in {id(c): c for c in configs}.values() if getattr(c, "use_cache", None) is True]


@contextmanager
def quiet(names: tuple[str, ...], level: int) -> Iterator[None]:
    """Keep notes of a library to its own developers away from the user: warnings, loggers below a level."""
    levels = {name: logging.getLogger(name).level for name in names}
    try:
        for name in names:
            logging.getLogger(name).setLevel(level)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, before in levels.items():
            logging.getLogger(name).setLevel(before)


def doubled(inputs: Any) -> Any:
    """Inputs, nested as they may be, with floating-point tensors in float64, complex ones in complex128."""
    return torch.utils._pytree.tree_map_only(Tensor, in_double, inputs)


def in_double(x: Tensor) -> Tensor:
    """A tensor in float64, or complex128; one of whole numbers as it is."""
    if x.is_complex():
        return x.to(torch.complex128)
    return x.double() if x.is_floating_point() else x


def can_train(x: Tensor) -> bool:
    """Whether a tensor is of real or complex numbers, and not of whole ones or truth values."""
    return x.is_floating_point() or x.is_complex()


def check_steady(model: nn.Module, first: Any, second: Any) -> None:
    """Raise if a network gave different answers in two calls in eval mode with the same example.

    Raises:
        InputError: it did.
    """
    pairs = zip(tensors_in(first), tensors_in(in_order_of(first, second)), strict=False)
    if not all(a.shape == b.shape and torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in pairs):
        raise InputError(
            f"{type(model).__name__} answers differently when it is called twice in eval mode with the same"
            " example: it draws random numbers there or changes its own state, so that nothing smaller can be"
            " proved equal to it; leave that out in eval mode (where self.training is False)"
        )


def first_line(error: Exception) -> str:
    """What an error says, on one line."""
    text = str(error).strip()
    line = text.splitlines()[0] if text else ""
    return line if " " in line else f"{type(error).__name__} {line}".strip()


def in_order_of(first: Any, other: Any) -> Any:
    """Answers with their dictionaries in the order of those of others, which have the same names."""
    if isinstance(first, Mapping) and isinstance(other, Mapping):
        names = [*(name for name in first if name in other), *(name for name in other if name not in first)]
        return {name: in_order_of(first.get(name), other[name]) for name in names}
    if isinstance(first, list | tuple) and isinstance(other, list | tuple) and len(first) == len(other):
        return [in_order_of(a, b) for a, b in zip(first, other, strict=True)]
    return other


def tensors_in(result: Any) -> tuple[Tensor, ...]:
    """All tensors in what a network or an operation returns: lists, tuples, dictionaries, dataclasses."""
    found: list[Tensor] = []

    def collect(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif is_dataclass(leaf) and not isinstance(leaf, type):
            found.extend(tensors_in(dict(vars(leaf))))
        return leaf

    fx.node.map_aggregate(result, collect)
    return tuple(found)
