"""Gates that multiply the weights of any module, and normalisations that leave out what is shut.

A module keeps its parameters, its forward pass and its state dict; it only changes its class, to one whose
weights are read through their gates. So subclasses of layers and layers of a user's own can take gates, at
the cost of one product of the size of the weights.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import _WeightNorm
from torch.nn.utils.parametrize import ParametrizationList

from sparsereg.distributions import HardConcrete
from sparsereg.model.basic_l0_blocks import GatedBatchNorm2d, GateFactory, L0Gate
from sparsereg.penalties import GatedTensor, gated_tensors


class GatedConv2d(nn.Conv2d):
    """Convolution with gates on its output channels, bias included, folded into weight and bias.

    Its state dict is that of nn.Conv2d plus ``gate.*``. Made by ``gate``.
    """

    gate: L0Gate

    def forward(self, input: Tensor) -> Tensor:
        """Convolve and gate a map of shape (batch, in_channels, height, width)."""
        if self.gate.per_example:
            return self.gate(super().forward(input))  # type: ignore[no-any-return]
        z = self.gate.gates().to(self.weight.dtype)
        bias = None if self.bias is None else self.bias * z
        gated: Tensor = self._conv_forward(input, self.weight * z.view(-1, 1, 1, 1), bias)
        return gated


class GatedLinear(nn.Linear):
    """Linear layer with gates on its output units, bias included, folded into weight and bias.

    Its state dict is that of nn.Linear plus ``gate.*``. Made by ``gate``.
    """

    gate: L0Gate

    def forward(self, input: Tensor) -> Tensor:
        """Map (batch, in_features) to (batch, out_features) and gate it."""
        if self.gate.per_example:
            return self.gate(super().forward(input))  # type: ignore[no-any-return]
        z = self.gate.gates().to(self.weight.dtype)
        return F.linear(input, self.weight * z.view(-1, 1), None if self.bias is None else self.bias * z)


class GatedBatchNorm1d(nn.BatchNorm1d):
    """BatchNorm of units with gates behind it. Its state dict is that of nn.BatchNorm1d plus ``gate.*``."""

    gate: L0Gate

    def forward(self, input: Tensor) -> Tensor:
        """Normalise and gate units of shape (batch, num_features) or (batch, num_features, length)."""
        return self.gate(super().forward(input))  # type: ignore[no-any-return]


GATED: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv2d: GatedConv2d,
    nn.Linear: GatedLinear,
    nn.BatchNorm1d: GatedBatchNorm1d,
    nn.BatchNorm2d: GatedBatchNorm2d,
}
"""The class with gates for each class that can get some."""


class SharedGates(HardConcrete):
    """Gates that several layers share: in training all of them get one draw in each pass of the network.

    A draw ends with the next pass of the network, or when a gradient has gone through it, so that parts of a
    network may be called one by one.
    """

    _held: Tensor | None = None
    _together: Any = None
    """Draws all gates of the network."""

    def forward(self, input_shape: Any = None, generator: torch.Generator | None = None) -> Tensor:
        """See `HardConcrete.forward`."""
        if not self.training or generator is not None or input_shape is not None:
            return super().forward(input_shape, generator)
        if not serves(self._held, self) and self._together is not None:
            self._together.hold(self)
        if self._held is None or not serves(self._held, self):
            check_no_gradient_is_under_way()
            self._held = super().forward()
            once(self._held, self, SharedGates._forget)
        return self._held

    def _forget(self) -> None:
        self._held = None

    def __getstate__(self) -> dict[str, Any]:
        # A draw belongs to one pass and its graph.
        return {**super().__getstate__(), "_held": None, "_together": None}


def serves(draw: Tensor | None, gates: HardConcrete) -> bool:
    """Whether a draw gives a gradient to the locations of gates, if one is wanted."""
    if draw is None:
        return False
    return draw.requires_grad or not torch.is_grad_enabled() or not gates.log_alpha.requires_grad


def check_no_gradient_is_under_way() -> None:
    """Refuse to draw gates in a backward pass, which would compute a part of the network with other gates.

    Raises:
        RuntimeError: a checkpoint that nests backward passes computes the part.
    """
    if torch._C._current_graph_task_id() != -1:
        raise RuntimeError(
            "the gates of this pass are gone, since a gradient went through them, and a part of the network"
            " is computed again in the backward pass: use torch.utils.checkpoint with use_reentrant=False"
        )


T = TypeVar("T")


def once(draw: Tensor, owner: T, forget: Callable[[T], None]) -> None:
    """Let gates be forgotten when a gradient has gone through their draw, whose graph is gone then.

    Args:
        draw: of the gates.
        owner: of the draw; not kept alive.
        forget: is given the owner.
    """
    if not draw.requires_grad or torch.compiler.is_compiling():
        return
    known = weakref.ref(owner)

    def spent(grad: Tensor) -> None:
        found = known()
        if found is not None:
            forget(found)

    draw.register_hook(spent)


def shared_gate(factory: GateFactory, size: int) -> L0Gate:
    """A gate of so many places that several layers can share."""
    gate = factory(size)
    gate.gates.__class__ = SharedGates
    return gate


class NormKind(NamedTuple):
    """What a normalisation with gates needs to know.

    Attributes:
        axis: of its input, along which the units lie; negative ones count from the end.
        groups: so many runs of units of one size, each with a mean of its own.
        centred: whether it subtracts a mean.
        undone_by: name of the weight that undoes what its input is enlarged by; empty if none does.
    """

    axis: int
    groups: int
    centred: bool
    undone_by: str


class Spread(NamedTuple):
    """The open places of a normalisation's input, (units,) each; of one group, the last two are scalars.

    Attributes:
        far: what the input is multiplied by: 0 where it is shut, else ``stretch``.
        share: weights of the mean over what is open.
        mask: 1 where it is open, else 0.
        stretch: by how much the input is enlarged, so that its variance is that of the rest.
        fewer: 1 / places that are open - 1 / all places, of the group.
    """

    far: Tensor
    share: Tensor
    mask: Tensor
    stretch: Tensor
    fewer: Tensor


def spread_of(mask: Tensor, groups: int) -> Spread:
    """What follows from which places are open.

    Args:
        mask: 1 where a place is open, else 0; (units,).
        groups: of units, with means of their own.
    """
    size = mask.numel() // groups
    num_open = mask.view(groups, size).sum(1).clamp(min=1)
    num_open = num_open[0] if groups == 1 else num_open.repeat_interleave(size)
    stretch = (size / num_open).sqrt()
    far = mask * stretch
    return Spread(far, mask / num_open, mask, stretch, 1 / num_open - 1 / size)


class Given(NamedTuple):
    """What gates give to a module in one pass.

    Attributes:
        factors: for each parameter what multiplies it, of shapes that are broadcast to it.
        spread: what its input is enlarged by, if it is a normalisation.
        gate: one of its gates.
        draw: of all gates.
    """

    factors: dict[str, list[Tensor]]
    spread: Spread | None
    gate: L0Gate
    draw: Tensor


def _of_channels(x: Tensor) -> Tensor:
    """Means of what lies behind the channels, (batch, channels)."""
    return x.flatten(2).mean(2) if x.dim() > 2 else x


def _over_groups(each: Tensor, groups: int) -> Tensor:
    """Sums over groups of channels, for each channel that of its group, (batch, channels)."""
    if groups == 1:
        return each.sum(1, keepdim=True)
    sums: Tensor = each.unflatten(1, (groups, -1)).sum(2)
    return sums.repeat_interleave(each.shape[1] // groups, 1)


def _enlarged(x: Tensor, far: Tensor, share: Tensor, axis: int, groups: int) -> Tensor:
    # Two operations of two tensors are faster than one of three.
    if axis < 0:
        lines = x.movedim(axis, -1)
        return (lines - (lines @ share).unsqueeze(-1)).mul_(far).movedim(-1, axis)
    behind = [1] * (x.dim() - 2)
    mean = _over_groups(_of_channels(x) * share, groups)
    return (x - mean.view(*mean.shape, *behind)).mul_(far.view(1, -1, *behind))


def enlarged(x: Tensor, spread: Spread, axis: int, groups: int = 1) -> Tensor:
    """The input of a normalisation without its mean, enlarged where it is open; see `_Enlarged`.

    Transforms of torch.func take no function with a gradient of its own, but the expression.
    """
    if torch._C._are_functorch_transforms_active():
        return _enlarged(x, spread.far.to(x.dtype), spread.share.to(x.dtype), axis, groups)
    return _Enlarged.apply(x, spread, axis, groups)  # type: ignore[no-any-return]


class _Enlarged(torch.autograd.Function):
    """The input of a normalisation without its mean, enlarged where it is open, along one axis.

    What lies behind the axis is averaged, too. As an expression of PyTorch's, the gradient takes more passes.
    (With ``setup_context`` each call inspects signatures.)
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, spread: Spread, axis: int, groups: int) -> Tensor:
        far, share = (part.to(x.dtype) for part in spread[:2])
        ctx.axis, ctx.groups = axis, groups
        ctx.save_for_backward(far, share)
        return _enlarged(x, far, share, axis, groups)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        far, share = ctx.saved_tensors
        grad, axis = grads[0], ctx.axis
        if axis < 0:
            lines = grad.movedim(axis, -1)
            made = (lines * far).addcmul_((lines @ far).unsqueeze(-1), share, value=-1).movedim(-1, axis)
        else:
            behind = [1] * (grad.dim() - 2)
            taken = _over_groups(_of_channels(grad) * far, ctx.groups) * share
            made = (grad * far.view(1, -1, *behind)).sub_(taken.view(*taken.shape, *behind))
        return made, None, None, None


class _OpenLayerNorm(torch.autograd.Function):
    """The layer norm of what is open, along the last axis: `_Enlarged` and the norm behind it in one.

    With g the gradient by the answer, w the weight, which counts where the input is open and holds the factor
    1 / stretch, m and r mean and reciprocal deviation, n of N places open, and y = (x - m) r stretch:
    dx = r stretch (g w - sum(g w) / n - y sum(g w y) / N) where x is open. PyTorch's own gradient has N in
    both sums. Only the input is saved, as of a norm without gates.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, spread: Spread, eps: float
    ) -> Tensor:
        mean = (x @ spread.share).unsqueeze(-1)
        filled = (x - mean).mul_(spread.far)
        out, _, scale = torch.native_layer_norm(filled, weight.shape, weight, bias, eps)
        ctx.eps, ctx.spread = eps, spread
        ctx.save_for_backward(x, weight, bias, mean, scale * spread.stretch)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, weight, bias, mean, scale = ctx.saved_tensors
        spread, grad = ctx.spread, grads[0].contiguous()
        if torch.is_grad_enabled():  # somebody wants second derivatives
            answer = F.layer_norm(_Enlarged.apply(x, spread, -1, 1), weight.shape, weight, bias, ctx.eps)
            wanted = [v for v in (x, weight, bias) if v is not None and v.requires_grad]
            found = iter(torch.autograd.grad(answer, wanted, grad, create_graph=True))
            asked = [v is not None and v.requires_grad for v in (x, weight, bias)]
            return *(next(found) if a else None for a in asked), None, None
        weight = weight * spread.mask
        made, by_weight, by_bias = torch.ops.aten.native_layer_norm_backward.default(
            grad, x, weight.shape, mean, scale, weight, bias, ctx.needs_input_grad[:3]
        )
        if made is not None:
            fewer = (grad @ (weight * spread.fewer)).unsqueeze(-1)
            made.sub_(fewer * scale).mul_(spread.mask)
        return made, None if by_weight is None else by_weight * spread.mask, by_bias, None, None


LARGE = 2**17
"""Elements from which a product of rows is taken as a batch norm on a CPU; below, its call costs more."""


def times(weight: Tensor, factor: Tensor) -> Tensor:
    """A weight times a factor that is broadcast to it.

    On a CPU, rows of a large one are multiplied by the batch norm that has mean 0 and variance 1: its
    gradients are one fused kernel, where those of a product write three tensors of the size of the weight.
    """
    large = weight.device.type == "cpu" and weight.numel() >= LARGE and weight.is_contiguous()
    large = large and weight.is_floating_point()
    if not large or factor.shape != (len(weight), *[1] * (weight.dim() - 1)):
        return weight * factor
    z = factor.flatten()
    zero, one = torch.zeros_like(z), torch.ones_like(z)
    scaled = F.batch_norm(weight.view(1, len(z), -1), zero, one, z, training=False, eps=0.0)
    return scaled.view(weight.shape)


class GatedModule(nn.Module):
    """What is added to the class of a module that takes gates.

    Attributes:
        _gated_sites: for each parameter, the names of its gates, each with that of its index.
        _gated_norm: what it is as a normalisation, if it is one.
        _gated_added: the number that the module adds to a parameter where it reads it, for those with one;
            the sum is what the gates multiply.
    """

    _gated_sites: dict[str, list[tuple[str, str]]]
    _gated_norm: NormKind | None
    _gated_added: dict[str, float]
    _gated_given: Given | None = None

    def _gated_drawn(self) -> Given | None:
        """What the gates gave in this pass of the whole network; None where they are asked one by one."""
        given = self._gated_given
        if given is None or not given.gate.training:
            return None
        return given if serves(given.draw, given.gate.gates) else None

    def _gated_factors(self, name: str) -> list[Tensor]:
        """What the gates multiply a parameter by, of shapes that are broadcast to it."""
        given = self._gated_drawn()
        if given is not None and name in given.factors:
            return given.factors[name]
        factor = None
        for gate, index in self._gated_sites.get(name, ()):
            z = opened(self._modules[gate], self._buffers[index])
            factor = z if factor is None else factor * z
        if factor is not None and self._gated_undoes(name):
            stretch = self._gated_spread().stretch
            factor = factor.to(stretch.dtype) / stretch
        return [] if factor is None else [factor]

    def _gated_undoes(self, name: str) -> bool:
        """Whether a parameter takes back what the input of a normalisation is enlarged by."""
        return self._gated_norm is not None and bool(name) and name == self._gated_norm.undone_by

    def _gated_value(self, name: str) -> Any:
        """A parameter (or buffer) times its gates; with what is added where it is read, if something is."""
        raw: Any = self._gated_raw(name)
        for factor in () if raw is None else self._gated_factors(name):
            own = factor if factor.dtype == raw.dtype else factor.to(raw.dtype)
            raw = times(raw, own)
            if name in self._gated_added:
                raw = raw + self._gated_added[name] * (own - 1)
        return raw

    def _gated_raw(self, name: str) -> Any:
        """A parameter or buffer without gates, or what parametrisations or hooks compute in its place."""
        for own in (self._parameters, self._buffers, self.__dict__):
            if name in own:
                return own[name]
        return getattr(type(self)._made_of[0], name).fget(self)  # type: ignore[attr-defined]

    def _gated_spread(self) -> Spread:
        """What a normalisation has to know of the places of its input that are open."""
        given = self._gated_drawn()
        if given is not None and given.spread is not None:
            return given.spread
        assert self._gated_norm is not None
        open_ = [opened(self._modules[g], self._buffers[i]).detach() > 0 for g, i in self._gated_sites[""]]
        mask = torch.stack(open_).all(0).to(next(self.parameters()).dtype)
        return spread_of(mask, self._gated_norm.groups)

    def _gated_input(self, x: Tensor) -> Tensor:
        """The input of a normalisation without its mean, zero where it is shut and enlarged elsewhere.

        Its variance over all places is that over the open ones then.
        """
        assert self._gated_norm is not None
        axis, groups, centred, _ = self._gated_norm
        spread = self._gated_spread()
        if centred:
            with torch.autocast(x.device.type, enabled=False):  # which takes products in bfloat16
                return enlarged(x, spread, axis, groups)
        shape = [1] * x.dim()
        shape[axis] = -1
        return x * spread.far.to(x.dtype).view(shape)

    def _gated_whole(self) -> bool:
        """Whether the module is a layer norm along the last axis, which takes its means by itself."""
        norm, base = self._gated_norm, type(self)._made_of[0]  # type: ignore[attr-defined]
        if norm is None or base.forward is not nn.LayerNorm.forward:
            return False
        return norm.axis == -1 and norm.undone_by == "weight" and len(self.normalized_shape) == 1  # type: ignore[arg-type]

    def __reduce_ex__(self, protocol: Any) -> Any:
        base, names = type(self)._made_of  # type: ignore[attr-defined]
        return _blank, (base, names), {**self.__dict__, "_gated_given": None}  # a draw belongs to one pass


def enlarge(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Before a normalisation: take what is shut out of its input. A hook, which turns fused kernels off."""
    assert isinstance(module, GatedModule)
    return args if module._gated_whole() else (module._gated_input(args[0]), *args[1:])


def undo(module: nn.Module, args: tuple[Any, ...], result: Tensor) -> Tensor:
    """Behind a normalisation whose weight cannot undo what its input is enlarged by. A hook."""
    assert isinstance(module, GatedModule)
    assert module._gated_norm is not None
    stretch = module._gated_spread().stretch.to(result.dtype)
    if stretch.dim():
        stretch = stretch.view(-1, *[1] * (result.dim() - module._gated_norm.axis - 1))
    return result / stretch


def opened(gate: nn.Module | None, index: Tensor | None) -> Tensor:
    """Gates at places, in the shape of ``index``; a place behind the last one is open."""
    assert isinstance(gate, L0Gate)
    assert index is not None
    z = gate.gates()
    return torch.cat([z, z.new_ones(1)])[index]


def _blank(base: type[nn.Module], names: tuple[str, ...]) -> nn.Module:
    cls = gated_class(base, names)
    return cls.__new__(cls)


_CLASSES: dict[tuple[type[nn.Module], tuple[str, ...]], type[nn.Module]] = {}


def gated_class(base: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    """A module's class with gates on some of its parameters; the same one whenever it is asked for.

    Args:
        base: the class.
        names: of the parameters; an empty one if its input is that of a normalisation.
    """
    if (base, names) not in _CLASSES:
        _CLASSES[base, names] = _class(base, names)
    return _CLASSES[base, names]


def _flat_weights(self: nn.RNNBase) -> list[Tensor]:
    return [getattr(self, name) for name in self._flat_weights_names]


def _as_they_are(self: nn.RNNBase, *weights: Any) -> None:
    """The weights are read anew in each pass, so that none are kept."""


_RECURRENT = {
    "_flat_weights": property(_flat_weights, _as_they_are),
    "flatten_parameters": _as_they_are,
    "_update_flat_weights": _as_they_are,
    "_init_flat_weights": _as_they_are,
}


def _layer_norm(self: Any, input: Tensor) -> Tensor:
    """Forward of a layer norm that leaves out what is shut; means are taken in float32 or wider."""
    if not self._gated_whole():
        return type(self)._made_of[0].forward(self, input)  # type: ignore[no-any-return]
    kind = input.device.type
    if not torch.is_autocast_enabled(kind):
        return _open_layer_norm(self, input).to(input.dtype)
    with torch.autocast(kind, enabled=False):  # which takes products in bfloat16
        return _open_layer_norm(self, input)


def _open_layer_norm(module: Any, x: Tensor) -> Tensor:
    dtype = torch.float32 if x.dtype in (torch.bfloat16, torch.float16) else x.dtype
    spread, weight, bias = module._gated_spread(), module.weight, module.bias
    if spread.far.dtype != dtype:
        spread = Spread(*(part.to(dtype) for part in spread))
    bias = None if bias is None else bias.to(dtype)
    if torch._C._are_functorch_transforms_active():
        filled = enlarged(x.to(dtype), spread, -1)
        return F.layer_norm(filled, weight.shape, weight.to(dtype), bias, module.eps)
    return _OpenLayerNorm.apply(x.to(dtype), weight.to(dtype), bias, spread, module.eps)  # type: ignore[no-any-return]


def _normed_weight(self: Any) -> Tensor:
    """Forward of parametrisations: of a weight norm under which all is shut come zeros, not 0 / 0."""
    base, _ = type(self)._made_of
    if not isinstance(self[0], _WeightNorm) or hasattr(self, "1"):  # others behind it
        return base.forward(self)  # type: ignore[no-any-return]
    value = self.original1
    over = [d for d in range(value.dim()) if d != self[0].dim]
    shut = (value == 0).all(over[0], keepdim=True)
    for d in over[1:]:
        shut = shut.all(d, keepdim=True)
    made = self[0](self.original0, torch.where(shut, self._gated_raw("original1"), value))
    return made.masked_fill(shut, 0)  # type: ignore[no-any-return]


def _copied(self: Any, memo: dict[int, Any]) -> nn.Module:
    base, names = type(self)._made_of
    made = memo[id(self)] = _blank(base, names)
    made.__dict__ = copy.deepcopy({**self.__dict__, "_gated_given": None}, memo)
    return made


def _class(base: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    def reader(name: str) -> property:
        def keep(self: Any, value: Any) -> None:  # what a hook computes before each pass
            self.__dict__[name] = value

        known = getattr(base, name, None)
        setter = known.fset if isinstance(known, property) else keep
        return property(lambda self: self._gated_value(name), setter)

    body: dict[str, Any] = {name: reader(name) for name in names if name}
    body["_made_of"] = (base, names)
    if issubclass(base, nn.RNNBase):
        body |= _RECURRENT
    if base.forward is nn.LayerNorm.forward:
        body["forward"] = _layer_norm
    if issubclass(base, ParametrizationList):
        body["forward"] = _normed_weight
    if hasattr(base, "__deepcopy__"):  # of a class with parametrisations, which would copy draws, too
        body["__deepcopy__"] = _copied
    body["__doc__"] = f"{base.__name__} whose weights are read through gates."
    return type(f"Gated{base.__name__}", (GatedModule, base), body)


def put_gate(
    module: nn.Module,
    name: str,
    gate: L0Gate,
    index: Tensor,
    label: str,
    norm: NormKind | None = None,
    added: float = 0.0,
) -> None:
    """Let a module read one of its parameters through a gate.

    Args:
        module: changed in place; its class becomes one of `gated_class`.
        name: of the parameter; empty for the input of a normalisation.
        gate: may be shared with other modules.
        index: for each element of the parameter (or a shape that is broadcast to it) its place in the gate.
        label: a name for the gate in the module, if it has not got it yet.
        norm: what the module is as a normalisation.
        added: the number that the module adds to the parameter wherever it reads it.
    """
    if not isinstance(module, GatedModule):
        module._gated_sites, module._gated_added, module._gated_norm = {}, {}, None  # type: ignore[assignment]
    known = next((n for n, child in module._modules.items() if child is gate), None)
    if known is None:
        known = _free(module, label)
        module.add_module(known, gate)
    index_name = _free(module, f"_places_{known}_{name or 'input'}")
    module.register_buffer(index_name, index, persistent=False)
    module._gated_sites.setdefault(name, []).append((known, index_name))  # type: ignore[union-attr, operator]
    if added:
        module._gated_added[name] = added  # type: ignore[operator, index]
    if norm is not None:
        module._gated_norm = norm  # type: ignore[assignment]
        if enlarge not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(enlarge)
            if not norm.undone_by:
                module.register_forward_hook(undo)
    base, _ = getattr(type(module), "_made_of", (type(module), ()))
    sites = module._gated_sites
    assert isinstance(sites, dict)
    module.__class__ = gated_class(base, tuple(sorted(sites)))


def _free(module: nn.Module, label: str) -> str:
    number, name = 1, label
    while hasattr(module, name):
        number += 1
        name = f"{label}_{number}"
    return name


def take_gates_off(network: nn.Module, plain: Callable[[nn.Module], nn.Module | None]) -> None:
    """Give every module of a network its own class back, without gates.

    Args:
        network: changed in place.
        plain: makes the plain module of other kinds of gated modules; None for those without gates.
    """
    for module in list(network.modules()):
        if isinstance(module, GatedModule):
            gates = {gate for sites in module._gated_sites.values() for gate, _ in sites}
            buffers = {index for sites in module._gated_sites.values() for _, index in sites}
            for gate in gates:
                del module._modules[gate]
            for index in buffers:
                del module._buffers[index]
                module._non_persistent_buffers_set.discard(index)
            for hooks in (module._forward_pre_hooks, module._forward_hooks):
                for key in [key for key, hook in hooks.items() if hook in (enlarge, undo)]:
                    del hooks[key]
            for name in ("_gated_sites", "_gated_added", "_gated_norm"):
                del module.__dict__[name]
            module.__dict__.pop("_gated_given", None)
            module.__class__ = type(module)._made_of[0]  # type: ignore[attr-defined]
            if isinstance(module, nn.RNNBase):
                module._init_flat_weights()
        else:
            plain(module)


def gate_layer_(layer: nn.Module, gate: L0Gate) -> None:
    """Let a layer of PyTorch carry a gate for each of its outputs: the same settings, weights and mode.

    Args:
        layer: of a class in ``GATED``; changed in place, and its class with it.
        gate: may be shared with other layers.
    """
    weight = layer.weight
    assert isinstance(weight, Tensor)
    layer.__class__ = GATED[type(layer)]
    if isinstance(layer, GatedBatchNorm2d):
        layer.synchronised = False
    layer.gate = gate.to(weight.device)
    gate.train(layer.training)


def ungate_(layer: nn.Module) -> None:
    """Take the gate off a layer that carries one for each of its outputs; changed in place."""
    plain = {made: base for base, made in GATED.items()}
    del layer.gate
    layer.__class__ = plain[type(layer)]


def shared_gate_of(layer: nn.Module) -> SharedGates | None:
    """The gates that a layer of PyTorch carries for all of its outputs; None if it has none of this kind."""
    gates = getattr(layer._modules.get("gate"), "gates", None)
    return gates if isinstance(gates, SharedGates) and type(layer) in GATED.values() else None


@gated_tensors.register
def _(module: GatedModule) -> list[GatedTensor]:
    found = []
    for name, sites in module._gated_sites.items():
        value = module._parameters.get(name) if name else None
        for gate, index in sites if value is not None and len(sites) == 1 else ():
            places = module.get_buffer(index)
            gates = module.get_submodule(gate).gates
            assert isinstance(gates, HardConcrete)
            (size,) = gates.gate_size
            axis = next((d for d in range(places.dim()) if places.shape[d] > 1), 0)
            whole = torch.equal(places.flatten(), torch.arange(size, device=places.device))
            if whole and places.numel() == places.shape[axis] == size:
                found.append(GatedTensor(gates, module, name, axis))
    return found
