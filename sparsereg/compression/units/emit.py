"""A smaller network from what is left of one: modules of torch.nn under their old names, and functions."""

from __future__ import annotations

import inspect
import operator
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, fx, nn

from sparsereg.compression.named import is_named, kind_of, named
from sparsereg.compression.running import can_train
from sparsereg.compression.sizes import of_size
from sparsereg.compression.units.cut import Cut
from sparsereg.compression.units.lengths import Sizes
from sparsereg.compression.units.precision import CASTS, Precision, place_in_trace
from sparsereg.compression.units.program import (
    NUMBER,
    Call,
    Ready,
    Scaled,
    Selected,
    bound,
    module_of,
    op_name,
)
from sparsereg.compression.units.rules.recurrent import (
    BLOCKS,
    KINDS,
    Pass,
    apart,
    goes_by_units,
    last_states,
    passes,
)
from sparsereg.compression.vocabulary import reserved
from sparsereg.errors import InputError
from sparsereg.penalties import hard_concretes

_PLACES = ("device", "layout", "pin_memory", "memory_format", "non_blocking", "copy")
_VIEWS = ("view", "_unsafe_view")
"""Written as a reshape: what is left need not lie in memory as the whole did."""
_CHECKS = ("_assert_tensor_metadata", "_assert_scalar", "sym_constrain_range", "sym_constrain_range_for_size")
_DROPOUTS: dict[str, Any] = {
    "dropout": nn.Dropout,
    "feature_dropout": nn.Dropout2d,
    "alpha_dropout": nn.AlphaDropout,
    "feature_alpha_dropout": nn.FeatureAlphaDropout,
}
"""Operations that hand on their input in eval mode, and the modules that drop in training."""


class Emitter:
    """Writes what is left of a network as a torch.fx.GraphModule.

    Args:
        cut: what is left.
        model: the network, for settings that only its modules know.
        fixed: for each input, by position, the sizes that it may have.
        precision: which types follow that of the weights; None: it is not known.
    """

    def __init__(
        self,
        cut: Cut,
        model: nn.Module,
        fixed: Mapping[int, Sizes] | None = None,
        precision: Precision | None = None,
    ) -> None:
        self.cut = cut
        self.program = cut.program
        self.model = model
        self.fixed = fixed or {}
        self.graph = fx.Graph()
        self.root = nn.Module()
        self.made: dict[fx.Node, Any] = {}
        self.layers: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {}
        self.parameters: dict[fx.Node, nn.Parameter | Tensor] = {}
        self.attributes: dict[fx.Node, str] = {}
        self.indices: dict[int, tuple[Tensor, Any]] = {}
        gates = {id(p) for m in hard_concretes(model).values() for p in m.parameters()}
        own = model.named_parameters(remove_duplicate=False)
        self.learns = {name: p.requires_grad for name, p in own if id(p) not in gates}
        self._device: fx.Node | None = None
        self.precision = precision
        self._weight_of_type: fx.Node | None = None
        self._at = -1
        """Number of the operation that is written."""

    def module(self) -> fx.GraphModule:
        """The smaller network, in eval mode."""
        self._inputs()
        for node in self.program.calls:
            if node not in self.cut.serving:
                continue
            if node in self.cut.passed:
                self._at = node.meta.get(NUMBER, -1)
                self.made[node] = self._value(self.cut.passed[node])
            elif op_name(node.target) not in _CHECKS:
                self.made[node] = self._entered(node, self._operation(node))
        self.graph.output(self._result())
        self._without_dead_code()
        name = f"Compacted{type(self.model).__name__.removeprefix('Gated').removeprefix('Compacted')}"
        made = fx.GraphModule(self.root, self.graph, class_name=name)
        return made.eval()

    # --- inputs and the result --------------------------------------------------------------------------

    def _inputs(self) -> None:
        tree = torch.utils._pytree.tree_unflatten(self.program.inputs, self.program.takes)
        given = _by_name(self.model, *tree)
        several, optional = [], False
        for name, value in given:
            plain = self.program.values[value] if isinstance(value, fx.Node) else None
            optional |= isinstance(value, fx.Node) and not isinstance(plain, Tensor)
            # Python takes no argument without a default behind one that has one.
            default = {"default_value": None if isinstance(plain, Tensor) else plain} if optional else {}
            if isinstance(value, fx.Node):
                self.made[value] = self.graph.placeholder(value.name, **default)
            else:
                several.append((self.graph.placeholder(name, **default), value))
        for whole, parts in several:
            self._unpack(whole, parts)
        for position, sizes in self.fixed.items():
            node = self.program.inputs[position]
            if sizes.arguments:
                self.made[node] = self.graph.call_function(of_size, (self.made[node], *sizes.arguments))
        for node in self.program.inputs:
            self.made[node] = self._entered(node, self.made[node])

    def _unpack(self, whole: fx.Node, parts: Any) -> None:
        """Take the tensors out of a list, tuple or dictionary that is one input of the network."""
        if isinstance(parts, fx.Node):
            self.made[parts] = whole
            return
        if not isinstance(parts, Mapping | list | tuple):
            raise InputError(
                f"{type(self.model).__name__} is given a {type(parts).__name__}: a smaller network takes"
                " tensors, and lists, tuples and dictionaries of them"
            )
        for key, part in parts.items() if isinstance(parts, Mapping) else enumerate(parts):
            self._unpack(self.graph.call_function(operator.getitem, (whole, key)), part)

    def _entered(self, node: fx.Node, made: Any) -> Any:
        """The features of an input that are read, of all that come in; likewise of a computed vector."""
        if node not in self.cut.entrances:
            return made
        axis, kept = self.cut.entrances[node]
        entrance = self.cut.units.labeller.entrances.get(node)
        if entrance is not None and entrance.picked is not None:
            made, kept = made.args[0], entrance.picked[kept]
        index = self._buffer("read", kept)
        return self.graph.call_function(torch.ops.aten.index_select.default, (made, axis, index))

    def _result(self) -> Any:
        self._at = len(self.program.traced) - 1
        return self._unflattened([self._value(leaf) for leaf in self.program.output.args[0]])  # type: ignore[union-attr]

    def _unflattened(self, flat: list[Any]) -> Any:
        """The results put together as the network returns them."""
        result = torch.utils._pytree.tree_unflatten(flat, self.program.returns)
        return self._plain(result)

    def _plain(self, value: Any) -> Any:
        """Lists, tuples and plain dictionaries in place of what a library makes of them."""
        if isinstance(value, Mapping):
            parts = {key: self._plain(v) for key, v in value.items() if v is not None}
            return self.graph.call_function(named, (kind_of(value), parts)) if is_named(value) else parts
        if is_dataclass(value) and not isinstance(value, type):
            parts = {key: self._plain(v) for key, v in vars(value).items()}
            return self.graph.call_function(type(value), (), parts)
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return type(value)(*(self._plain(v) for v in value))
        if isinstance(value, list | tuple):
            return type(value)(self._plain(v) for v in value)
        return value

    def _without_dead_code(self) -> None:
        if self._weight_of_type is not None:
            # A norm may be folded into the layer before it.
            named = sorted(self.root.named_parameters(), key=lambda one: one[1].dim() < 2)
            self._weight_of_type.target = next(n for n, p in named if p.is_floating_point())
        for node in reversed(list(self.graph.nodes)):
            if not node.users and node.op in ("call_function", "call_module", "get_attr"):
                self.graph.erase_node(node)
        used = {node.target for node in self.graph.nodes if node.op in ("call_module", "get_attr")}
        for path in [p for p in self.layers if not any(u == p or u.startswith(f"{p}.") for u in used)]:
            parent, _, last = path.rpartition(".")
            del self.root.get_submodule(parent)._modules[last]
        for name in [n for n in (*self.root._parameters, *self.root._buffers) if n not in used]:
            delattr(self.root, name)

    # --- operations -------------------------------------------------------------------------------------

    def _operation(self, node: fx.Node) -> Any:
        self._at = node.meta.get(NUMBER, -1)
        if op_name(node.target) in BLOCKS and goes_by_units(node):
            return self._recurrent(node)
        call = self.cut.calls.get(node) or Call(node.target, node.args, node.kwargs)
        name = op_name(call.target)
        if name == "type_as":  # tracing takes x.float() of a tensor in float32 for the tensor itself
            call = Call(call.target, (call.args[0], _uncast(call.args[1])), call.kwargs)
        if call.target is operator.getitem and isinstance(call.args[0], fx.Node):
            several = self.made.get(call.args[0])
            if isinstance(several, list):
                return several[call.args[1]]
        if name in _DROPOUTS:
            return self._dropout(node, _DROPOUTS[name])
        layer = self._layer(node, call, name.rstrip("_"))
        if layer is not None:
            return layer
        args, kwargs = self._arguments(call)
        if isinstance(call.target, FunctionType) and call.target.__module__.startswith(__package__):
            return self._inlined(call.target, args)
        views = name in _VIEWS and not isinstance(args[-1], torch.dtype)
        target = torch.ops.aten.reshape.default if views else call.target
        return self.graph.call_function(target, args, kwargs)

    def _inlined(self, function: FunctionType, args: tuple[Any, ...]) -> Any:
        """The operations of a function of the rules."""
        tracer = fx.proxy.GraphAppendingTracer(self.graph)
        proxies: Any = fx.node.map_arg(args, lambda node: fx.Proxy(node, tracer))  # type: ignore[arg-type, return-value]
        found = function(*proxies)
        return [part.node for part in found] if isinstance(found, tuple) else found.node

    def _arguments(self, call: Call) -> tuple[tuple[Any, ...], dict[str, Any]]:
        args = tuple(fx.node.map_aggregate(tuple(call.args), self._value))
        given = {
            k: v for k, v in call.kwargs.items() if k not in _PLACES or (k == "device" and v is not None)
        }
        kwargs: dict[str, Any] = fx.node.map_aggregate(given, self._value)
        return args, kwargs

    def _value(self, leaf: Any) -> Any:
        if isinstance(leaf, Scaled):
            whole = self.graph.call_function(operator.mul, (self.made[leaf.node], leaf.left))
            return self.graph.call_function(operator.floordiv, (whole, leaf.whole))
        if isinstance(leaf, Ready):
            return leaf.node
        if isinstance(leaf, Selected):
            index = self._buffer("heads", leaf.index)
            return self._call(torch.ops.aten.index_select.default, self._value(leaf.node), leaf.axis, index)
        if isinstance(leaf, fx.Node):
            return self._weight(leaf) if leaf in self.program.weights else self._as_read(leaf)
        if isinstance(leaf, torch.dtype):
            return self._type(leaf, self._at)
        if isinstance(leaf, Tensor):
            return self._index(leaf)
        if isinstance(leaf, torch.device):
            return self._where()
        return None if leaf == sys.maxsize else leaf  # the end of a slice that has none

    def _as_read(self, source: fx.Node) -> Any:
        """What an operation reads; in the types to which that goes where the weights are of another type."""
        read = (
            self.precision.reads.get((self._at, place_in_trace(source)))
            if self.precision is not None
            else None
        )
        place, casts = read or (place_in_trace(source), ())
        found = source
        while (
            place_in_trace(found) != place
            and op_name(found.target) in CASTS
            and found not in self.cut.entrances
        ):
            found = found.args[0]  # type: ignore[assignment]
        if place_in_trace(found) != place or found not in self.made:
            return self.made[source]
        made = self.made[found]
        for dtype in casts:
            made = self._call(torch.ops.aten.to.dtype, made, self._weights_type() if dtype is None else dtype)
        return made

    def _type(self, dtype: torch.dtype, number: int) -> Any:
        """A type that an operation says; that of the weights, whatever it is, where it follows them."""
        known = self.precision
        follows = known is not None and dtype is known.own and number in known.following
        return self._weights_type() if follows else dtype

    def _weights_type(self) -> fx.Node:
        """The type of the weights; of which one is known when all of them are written."""
        if self._weight_of_type is None:
            self._weight_of_type = self.graph.get_attr("")
        return self._call(getattr, self._weight_of_type, "dtype")

    def _where(self) -> fx.Node:
        """The device of the first input, in place of the one on which the network was traced."""
        if self._device is None:
            first = next(n for n in self.program.inputs if isinstance(self.program.values[n], Tensor))
            self._device = self.graph.call_function(getattr, (self.made[first], "device"))
        return self._device

    def _weight(self, node: fx.Node) -> fx.Node:
        """A weight that is read as it is."""
        if node not in self.attributes:
            path, _, name = self.program.names[node].rpartition(".")
            inside = self._path(path) in self.layers and self.parameters.get(node) is not None
            self.attributes[node] = f"{self._path(path)}.{name}" if inside else self._register(node)
        made = self.graph.get_attr(self.attributes[node])
        for way, by in zip(
            self.program.read_as.get(node, ()), self.program.cast_by.get(node, ()), strict=True
        ):
            if isinstance(way, torch.dtype):
                made = self._call(torch.ops.aten.to.dtype, made, self._type(way, by))
            else:
                made = self._call(torch.ops.aten.add.Tensor, made, way)
        return made

    def _register(self, node: fx.Node) -> str:
        name = self.program.names[node].replace(".", "_")
        name = self._free(name if name.isidentifier() else f"weight_{name}")
        value = self._tensor(node)
        if isinstance(value, nn.Parameter):
            self.root.register_parameter(name, value)
        else:
            self.root.register_buffer(name, value)
        return name

    def _buffer(self, name: str, value: Tensor) -> fx.Node:
        free = self._free(name)
        like = next(self.model.parameters(), value)
        self.root.register_buffer(free, value.to(like.device))
        return self.graph.get_attr(free)

    def _index(self, value: Tensor) -> fx.Node:
        """A tensor of indices, once for all operations that read it."""
        if id(value) not in self.indices:
            self.indices[id(value)] = value, self._buffer("index", value).target
        return self.graph.get_attr(self.indices[id(value)][1])

    def _free(self, name: str) -> str:
        taken = {*self.root._modules, *self.root._parameters, *self.root._buffers, *reserved(fx.GraphModule)}
        taken |= {path.split(".")[0] for path in self.program.names.values()} - {name}
        number, free = 0, name
        while free in taken:
            number += 1
            free = f"{name}_{number}"
        return free

    def _tensor(self, node: fx.Node) -> nn.Parameter | Tensor:
        """What is left of a weight: the same object wherever it is used, so that tied weights stay tied."""
        if node not in self.parameters:
            value = self.cut.weights[node].clone()
            trains = can_train(value) and self._trains(node)
            self.parameters[node] = nn.Parameter(value, trains) if node in self.program.parameters else value
        return self.parameters[node]

    def _trains(self, node: fx.Node) -> bool:
        """Whether a weight is to be trained: all are, but what is frozen beside others that are not."""
        made = self.program.made.get(node)
        names = [self.program.names[node]] if made is None else list(made.sources.values())
        known = [self.learns[name] for name in names if name in self.learns]
        return not known or any(known) or not any(self.learns.values())

    # --- recurrent layers -----------------------------------------------------------------------------------

    def _recurrent(self, node: fx.Node) -> list[Any]:
        """One module of torch.nn for layers of one size, or else one for each layer and direction."""
        a, parts = bound(node), list(passes(node))
        x = self._value(node.args[0])
        if len({(self._rows(p.rows[0]), self._rows(p.projection)) for p in parts}) == 1:
            own = [w for p in parts for w in p.all]
            out, states = self._module_of_layers(node, x, own, parts[0], "", len(parts))
            return [out, *states]
        time = 1 if a["batch_first"] else 0
        lasts = []
        for layer in range(int(a["num_layers"])):
            outs = []
            for one in (p for p in parts if p.layer == layer):
                source = self._call(torch.ops.aten.flip.default, x, [time]) if one.reverse else x
                out, states = self._module_of_layers(node, source, list(one.all), one, _place_of(one), 1)
                outs.append(self._call(torch.ops.aten.flip.default, out, [time]) if one.reverse else out)
                lasts.append([self._call(torch.ops.aten.select.int, s, 0, 0) for s in states])
            x = self._call(torch.ops.aten.cat.default, outs, -1) if len(outs) > 1 else outs[0]
            if a["dropout"] and layer + 1 < int(a["num_layers"]):
                x = self._dropped(float(a["dropout"]), x)
        whole = {state.args[1] for state in last_states(node) if not apart(state)}
        states = [list(part) for part in zip(*lasts, strict=True)]
        stack = torch.ops.aten.stack.default
        return [x, *(self._call(stack, s) if i in whole else s for i, s in enumerate(states, 1))]

    def _call(self, target: Any, *args: Any) -> fx.Node:
        return self.graph.call_function(target, args)

    def _dropped(self, p: float, x: Any) -> fx.Node:
        path = self._free("dropout")
        self._put(path, nn.Dropout(p), nn.Dropout, {"p": p})
        return self.graph.call_module(path, (x,))

    def _rows(self, weight: fx.Node | None) -> int:
        return 0 if weight is None else int(self.cut.weights[weight].shape[0])

    def _module_of_layers(
        self, node: fx.Node, x: Any, weights: list[fx.Node], one: Pass, inside: str, runs: int
    ) -> tuple[Any, list[Any]]:
        """Call a recurrent module; return what it gives at all steps, and its last states."""
        a, name = bound(node), op_name(node.target)
        both = bool(a["bidirectional"]) and runs > 1
        settings: dict[str, Any] = {
            "input_size": int(self.cut.weights[one.rows[0]].shape[1]),
            "hidden_size": self._rows(one.rows[0]) // BLOCKS[name],
            "num_layers": runs // (2 if both else 1),
            "bias": bool(a["has_biases"]),
            "batch_first": bool(a["batch_first"]),
            "dropout": float(a["dropout"]) if runs > 1 else 0.0,
            "bidirectional": both,
        }
        if name == "lstm":
            settings["proj_size"] = self._rows(one.projection)
        elif name.startswith("rnn"):
            settings["nonlinearity"] = name.removeprefix("rnn_")
        with torch.device("meta"):
            names = list(KINDS[name](**settings)._parameters)
        path = self._path(self.program.names[weights[0]].rpartition(".")[0]) or name
        place = f"{path}.{inside}" if inside else path
        if not self._make(place, KINDS[name], settings, dict(zip(names, weights, strict=True))):
            place = self._free(name)
            assert self._make(place, KINDS[name], settings, dict(zip(names, weights, strict=True)))
        made = self.graph.call_module(place, (x,))
        states = self._call(operator.getitem, made, 1)
        each = [self._call(operator.getitem, states, i) for i in range(2)] if name == "lstm" else [states]
        return self._call(operator.getitem, made, 0), each

    # --- layers -----------------------------------------------------------------------------------------

    def _dropout(self, node: fx.Node, cls: type[nn.Module]) -> fx.Node:
        p = float(bound(node)["p"])
        if cls is nn.Dropout2d:  # PyTorch has one operation for all
            rank = bound(node)["input"].meta["val"].dim()
            cls = {3: nn.Dropout1d, 5: nn.Dropout3d}.get(rank, cls)
        path = self._path(module_of(node)) or "dropout"
        if path in self.layers or self._taken(path):
            path = self._free("dropout")
        self._put(path, cls(p), cls, {"p": p})
        return self.graph.call_module(path, (self._value(node.args[0]),))

    def _layer(self, node: fx.Node, call: Call, name: str) -> fx.Node | None:
        """Call a module of torch.nn for an operation whose weights belong to one."""
        if name not in _LAYERS:
            return None
        a = _named(call)
        weight, bias = a.get("weight"), a.get("bias")
        if not isinstance(weight, fx.Node) or not self.program.names.get(weight, "").endswith(".weight"):
            return None
        path = self.program.names[weight].rpartition(".")[0]
        own = {
            key: a[key] for key in ("bias", "running_mean", "running_var") if isinstance(a.get(key), fx.Node)
        }
        if any(self.program.names.get(n) != f"{path}.{key}" for key, n in own.items()):
            return None
        if any(n in self.program.read_as for n in (weight, *own.values())):
            return None
        given = self.program.arguments(node)
        a = {k: given.get(k, v) if isinstance(v, fx.Node | Ready) else v for k, v in a.items()}
        cls, settings = _LAYERS[name](a, self.cut.weights[weight], isinstance(bias, fx.Node))
        place = self._path(path)
        named = {"weight": weight, **own}
        if any(self.attributes.get(n, f"{place}.{key}") != f"{place}.{key}" for key, n in named.items()):
            return None  # it was read as it is before, and lies there
        if cls is None or not self._make(place, cls, settings, named):
            return None
        source = next(v for v in call.args if isinstance(v, fx.Node | Ready) and v is not weight)
        return self.graph.call_module(place, (self._value(source),))

    def _make(
        self, path: str, cls: type[nn.Module], settings: dict[str, Any], own: dict[str, fx.Node]
    ) -> bool:
        """Put a layer at its place, unless the same is there; False if something else is."""
        if path in self.layers:
            return self.layers[path] == (cls, settings)
        if self._taken(path):
            return False
        with torch.device("meta"):
            made = cls(**settings)
        for key, node in own.items():
            value = self._tensor(node)
            if isinstance(value, nn.Parameter):
                made.register_parameter(key, value)
            else:
                made.register_buffer(key, value)
        if "num_batches_tracked" in made._buffers:
            made.num_batches_tracked = self._batches(path)
        if isinstance(made, nn.RNNBase):
            made._init_flat_weights()
        if any(t.device.type == "meta" for t in (*made.parameters(), *made.buffers())):
            return False
        self._put(path, made, cls, settings)
        return True

    def _batches(self, path: str) -> Tensor:
        try:
            found = self.model.get_submodule(path).num_batches_tracked
        except AttributeError:
            found = None
        return found.detach().clone() if isinstance(found, Tensor) else torch.tensor(0)

    def _path(self, path: str) -> str:
        """A module's place in the smaller network: its own, unless that is a name which all have."""
        first = path.split(".")[0]
        return f"{first}_{path.removeprefix(first)}" if first in reserved(fx.GraphModule) else path

    def _taken(self, path: str) -> bool:
        """Whether another layer lies at, above or below a place."""
        if not path or path in self.root._parameters or path in self.root._buffers:
            return True
        return any(p.startswith(f"{path}.") or path.startswith(f"{p}.") for p in self.layers)

    def _put(self, path: str, module: nn.Module, cls: type[nn.Module], settings: dict[str, Any]) -> None:
        self.layers[path] = (cls, settings)
        owner: nn.Module = self.root
        *parents, last = path.split(".")
        for parent in parents:
            if parent not in owner._modules:
                owner.add_module(parent, nn.Module())
            owner = owner.get_submodule(parent)
        owner.add_module(last, module)


def _by_name(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The inputs of a network with the names under which its forward pass has them."""
    names = []
    for parameter in inspect.signature(model.forward).parameters.values():
        several = parameter.kind is inspect.Parameter.VAR_POSITIONAL
        names += [f"{parameter.name}_{i}" for i in range(len(args))] if several else [parameter.name]
    names += [f"input_{i}" for i in range(len(names), len(args))]
    return zip((*names[: len(args)], *kwargs), (*args, *kwargs.values()), strict=True)


def _place_of(one: Pass) -> str:
    return f"l{one.layer}{'_reverse' if one.reverse else ''}"


def _named(call: Call) -> dict[str, Any]:
    """Arguments of a call by their names, defaults filled in."""
    found: dict[str, Any] = {}
    for i, argument in enumerate(call.target._schema.arguments):
        default = argument.default_value if argument.has_default_value() else None
        found[argument.name] = call.args[i] if i < len(call.args) else call.kwargs.get(argument.name, default)
    return found


Made = tuple["type[nn.Module] | None", dict[str, Any]]


def _linear(a: dict[str, Any], w: Tensor, bias: bool) -> Made:
    return nn.Linear, {"in_features": w.shape[1], "out_features": w.shape[0], "bias": bias}


def _convolution(rank: int, transposed: bool) -> Any:
    def make(a: dict[str, Any], w: Tensor, bias: bool) -> Made:
        kind = "ConvTranspose" if transposed else "Conv"
        groups = int(a["groups"])
        ins, outs = (w.shape[0], w.shape[1] * groups) if transposed else (w.shape[1] * groups, w.shape[0])
        settings = {
            "in_channels": ins,
            "out_channels": outs,
            "kernel_size": tuple(w.shape[2:]),
            "stride": _each(a["stride"], rank),
            "padding": a["padding"] if isinstance(a["padding"], str) else _each(a["padding"], rank),
            "dilation": _each(a["dilation"], rank),
            "groups": groups,
            "bias": bias,
        }
        if transposed:
            settings["output_padding"] = _each(a["output_padding"], rank)
        return getattr(nn, f"{kind}{rank}d"), settings

    return make


def _each(value: Any, rank: int) -> tuple[int, ...]:
    parts = [value] if isinstance(value, int) else list(value)
    return tuple(parts * rank if len(parts) == 1 else parts)


def _batch_norm(a: dict[str, Any], w: Tensor, bias: bool) -> Made:
    if not isinstance(a.get("running_mean"), fx.Node) or not bias or a.get("training"):
        return None, {}
    rank = a["input"].meta["val"].dim()
    cls = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}.get(rank)
    # Cumulative averages reach the operation as a momentum of 0.
    return cls, {"num_features": w.shape[0], "eps": a["eps"], "momentum": a["momentum"] or None}


def _layer_norm(a: dict[str, Any], w: Tensor, bias: bool) -> Made:
    return nn.LayerNorm, {"normalized_shape": tuple(w.shape), "eps": a["eps"], "bias": bias}


def _rms_norm(a: dict[str, Any], w: Tensor, bias: bool) -> Made:
    return nn.RMSNorm, {"normalized_shape": tuple(w.shape), "eps": a["eps"]}


def _group_norm(a: dict[str, Any], w: Tensor, bias: bool) -> Made:
    settings = {"num_groups": int(a["num_groups"]), "num_channels": w.shape[0], "eps": a["eps"]}
    return (nn.GroupNorm if bias else None), settings


def _slopes(a: dict[str, Any], w: Tensor, bias: bool) -> Made:
    return nn.PReLU, {"num_parameters": w.numel()}


def _embedding(a: dict[str, Any], w: Tensor, bias: bool) -> Made:
    padding = a["padding_idx"]
    settings = {"num_embeddings": w.shape[0], "embedding_dim": w.shape[1]}
    return nn.Embedding, settings if padding is None or padding < 0 else {**settings, "padding_idx": padding}


_LAYERS: dict[str, Any] = {
    "linear": _linear,
    "batch_norm": _batch_norm,
    "layer_norm": _layer_norm,
    "rms_norm": _rms_norm,
    "group_norm": _group_norm,
    "embedding": _embedding,
    "prelu": _slopes,
    **{f"conv{rank}d": _convolution(rank, False) for rank in (1, 2, 3)},
    **{f"conv_transpose{rank}d": _convolution(rank, True) for rank in (1, 2, 3)},
}
"""For each operation with weights: class and settings of the module of torch.nn that does the same."""


def _uncast(node: Any) -> Any:
    """The tensor behind casts that changed nothing where the network was traced."""
    while isinstance(node, fx.Node) and op_name(node.target) in ("to", "_to_copy"):
        source = node.args[0]
        if not isinstance(source, fx.Node) or source.meta["val"].dtype != node.meta["val"].dtype:
            break
        node = source
    return node
