"""Networks as programs: traces by ``torch.export``, put into one form."""

from __future__ import annotations

import builtins
import dataclasses
import io
import logging
import sys
import traceback
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager, redirect_stderr, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules import transformer

from sparsereg.compression.alike import operations, sizes_told
from sparsereg.compression.running import evaluating, in_order_of, quiet, tensors_in
from sparsereg.compression.units.einsums import in_pairs, outer_as_products, step, with_matrices
from sparsereg.compression.units.program import (
    NUMBER,
    TORCH,
    Program,
    bound,
    module_of,
    name_of,
)
from sparsereg.compression.units.recurrent_shapes import recurrent_in_one
from sparsereg.compression.units.resized import tell_sizes_, with_sizes
from sparsereg.compression.verify import TOLERANCE, difference
from sparsereg.errors import InputError

logger = logging.getLogger(__name__)

_MUTATING = {
    "copy_",
    "index_put_",
    "fill_",
    "zero_",
    "index_copy_",
    "index_add_",
    "scatter_",
    "slice_scatter",
}
"""In-place operations that write into a part of a tensor which others may look at."""


def trace(model: nn.Module, *args: Any, **kwargs: Any) -> Program:
    """Export a network and run it once; see `_traced`.

    A network that was made from a compacted one often runs the same operations, of which it knows the trace.
    Networks that enlarge maps to a size, as those for segmentation do, are followed for maps of any size.
    """
    if isinstance(model, fx.GraphModule) and (before := model.meta.get(BEFORE)) is not None:
        again = _with_other_weights(before.analysis.program, model, args, kwargs)
        if again is not None:
            return again
    program = _traced(model, args, kwargs, maps=False)
    names = {name_of(node) for node in program.calls}
    if not any("upsample" in name for name in names) or names & _FIXED:
        return program
    try:
        return _traced(model, args, kwargs, maps=True)
    except InputError:
        return program


BEFORE = "before"
"""Key in the ``meta`` of a compacted network: the structure of the compacted one that it was made from."""


def _with_other_weights(
    program: Program, model: fx.GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Program | None:
    """The program of a network that runs the operations of another one; None if it runs others.

    Args:
        program: of the other one.
        model: the network.
        args: positional inputs of one example batch.
        kwargs: inputs by name.
    """
    pair = torch.utils._pytree.tree_map(at_least_two, (args, kwargs))
    flat = torch.utils._pytree.tree_leaves(pair)
    own = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    shapes = [
        [(x.shape, x.dtype) if isinstance(x, Tensor) else x for x in e] for e in (flat, program.example)
    ]
    names = set(program.names.values()) == set(own)  # none stands for several
    if program.made or not names or shapes[0] != shapes[1]:
        return None
    made, said = program, operations(model)
    if program.said != said:
        if program.alike is None or program.alike != operations(model, sizes=False):
            return None
        made = with_sizes(program, sizes_told(model.graph, model))
    weights = {node: own[name].detach() for node, name in made.names.items()}
    made = dataclasses.replace(made, weights=weights, values={}, example=tuple(flat), said=said)
    try:
        with evaluating(model):
            answers = tensors_in(model(*pair[0], **pair[1]))
            made.run_on_example()
    except RuntimeError as error:  # a size that a trace has written into an operation
        logger.debug("the trace of the network before does not serve: %s", error)
        return None
    found = tensors_in(made.values_of_output)
    same = all(map(torch.equal, answers, found))
    return made if same and (made.graph is program.graph or tell_sizes_(made, program)) else None


def trace_any_size(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Program:
    """Export a network for inputs of any size, as far as it takes them, and run it once; see `_traced`."""
    for maps in (None, False):
        try:
            return _traced(model, args, kwargs, maps)
        except Exception as error:
            if maps is False:
                raise
            logger.info("%s takes inputs of one size only: %s", type(model).__name__, error)
    raise AssertionError("unreachable")


_TRACERS = ("torch._subclasses.fake_tensor", "torch.fx.experimental.symbolic_shapes", "torch.export")
"""Loggers that tell at length of sizes which are tried and do not serve."""
_FIXED = {"softmax", "scaled_dot_product_attention", "roll"}
"""Operations of networks that cut maps into windows or tokens, whose sizes are not followed."""


def _traced(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], maps: bool | None) -> Program:
    """Export a network and run it once.

    Args:
        model: left as it is.
        args: positional inputs of one example batch.
        kwargs: inputs by name.
        maps: follow the sizes of maps, too; None: all sizes.

    Raises:
        InputError: the network fails on the example, or its path depends on the data; the line is named.
    """
    with evaluating(model):
        exported, args, kwargs = _export(model, args, kwargs, maps)
    _unwrap(model, exported)
    signature = exported.graph_signature
    _check_constant(model, signature)
    named = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }
    tensors = {**exported.state_dict, **exported.constants}
    placeholders = [n for n in exported.graph.nodes if n.op == "placeholder"]
    weights = _once(exported, {n: tensors[named[n.name]] for n in placeholders if n.name in named})
    placeholders = [n for n in exported.graph.nodes if n.op == "placeholder"]
    flat = list(torch.utils._pytree.tree_leaves((args, kwargs)))
    inputs = [n for n in placeholders if n not in weights]
    program = Program(
        exported.graph,
        weights,
        {n: named[n.name] for n in weights},
        {n for n in weights if n.name in signature.inputs_to_parameters},
        {},
        inputs,
        tuple(flat),
        exported.call_spec.out_spec,
        exported.call_spec.in_spec,
        **(_said(model, exported.graph) if isinstance(model, fx.GraphModule) else {}),
        constants=frozenset(n for n in weights if n.name in signature.inputs_to_lifted_tensor_constants),
    )
    for number, node in enumerate((*program.calls, program.output)):
        node.meta[NUMBER] = number
        read: list[fx.Node] = []
        fx.node.map_arg((node.args, dict(node.kwargs)), read.append)
        program.traced.append((name_of(node), [n.meta.get(NUMBER, n.name) for n in read]))
    try:
        program.run_on_example()
    except Exception as error:
        raise _refused(model, args, kwargs, error) from error
    _check_faithful(model, program, args, kwargs)
    return program


def _said(model: fx.GraphModule, graph: fx.Graph) -> dict[str, Any]:
    """What a compacted network says itself of its operations, for the program of its trace."""
    same = sizes_told(model.graph, model) == sizes_told(graph, model)
    return {"said": operations(model), "alike": operations(model, sizes=False) if same else None}


@torch.no_grad()
def _check_faithful(model: nn.Module, program: Program, args: Any, kwargs: Any) -> None:
    """Raise if a network that answers alike in two calls answers otherwise when it is traced."""
    flat = list(program.values_of_output)
    with evaluating(model):
        answer = model(*args, **kwargs)
        again = model(*args, **kwargs) if _apart(answer, _put_together(program, flat)) else answer
    if _apart(answer, again) or not _apart(answer, _put_together(program, flat)):
        return
    raise InputError(
        f"{type(model).__name__} answers otherwise when torch.export traces it, as where it asks whether"
        " it is being traced or compiled: what is made smaller would answer so, too; let it take the same"
        " path (of transformers: give it all of its masks and token_type_ids, or attn_implementation='eager')"
    )


_FAITHFUL = 2.5e-3
"""Share of the spread up to which operations in another order may give other answers."""


def _put_together(program: Program, flat: list[Any]) -> Any:
    return torch.utils._pytree.tree_unflatten(flat, program.returns)


def _apart(answer: Any, other: Any) -> bool:
    """Whether two answers differ by more than rounding explains."""
    pairs = list(zip(tensors_in(answer), tensors_in(in_order_of(answer, other)), strict=False))
    return any(difference(a, b) > max(TOLERANCE.get(a.dtype, 0.0), _FAITHFUL) for a, b in pairs)


_OTHERWISE = {
    torch.ops.aten.max.other: torch.ops.aten.maximum.default,
    torch.ops.aten.min.other: torch.ops.aten.minimum.default,
    torch.ops.aten.where.default: torch.ops.aten.nonzero_numpy.default,
    torch.ops.aten.broadcast_to.default: torch.ops.aten.expand.default,
}
"""Operations under the name of another one, or under a second name, with what they do."""
_STACKS = {"hstack": (1, 1), "vstack": (2, 0), "dstack": (3, 2), "column_stack": (2, 1)}
"""Operations that join tensors of at least so many axes along one of these."""
_INNER = {
    "addcmul": (torch.ops.aten.mul.Tensor, "tensor1", "tensor2", "value"),
    "addcdiv": (torch.ops.aten.div.Tensor, "tensor1", "tensor2", "value"),
    "addmm": (torch.ops.aten.mm.default, "mat1", "mat2", "alpha"),
    "baddbmm": (torch.ops.aten.bmm.default, "batch1", "batch2", "alpha"),
}
"""Operations that add what another one gives of two tensors, with what they call these and its factor."""


def _check_constant(model: nn.Module, signature: torch.export.ExportGraphSignature) -> None:
    """Raise if a network changes itself in a call, which one that is smaller would not."""
    written = [*signature.buffers_to_mutate.values(), *signature.parameters_to_mutate.values()]
    if written:
        raise InputError(
            f"{type(model).__name__} cannot be traced: it writes into {', '.join(written)} in eval mode, as"
            " an embedding with max_norm does; leave that out there (where self.training is False)"
        )


def _unwrap(model: nn.Module, exported: torch.export.ExportedProgram) -> None:
    """Put the operations of blocks without gradients, or without autocast, where the blocks stand."""
    graph = exported.graph
    for node in [n for n in graph.nodes if str(n.target).startswith("wrap_with_")]:
        at = next(i for i, a in enumerate(node.args) if isinstance(a, fx.Node) and a.op == "get_attr")
        if str(node.target) == "wrap_with_autocast" and node.args[2]:
            raise InputError(
                f"{type(model).__name__} cannot be traced: autocast is switched on inside of "
                f"{module_of(node) or 'it'}; switch it on outside, around the whole network"
            )
        inside = getattr(exported.graph_module, node.args[at].target).graph
        places = [n for n in inside.nodes if n.op == "placeholder"]
        copied = dict(zip(places, node.args[at + 1 :], strict=True))
        with graph.inserting_before(node):
            made = graph.graph_copy(inside, copied)
        for user in list(node.users):  # it returns a tuple, whose parts are taken
            user.replace_all_uses_with(made[user.args[1]])
            graph.erase_node(user)
        graph.erase_node(node)
    for node in list(graph.nodes):
        if not node.users and (node.op == "get_attr" or name_of(node) == "_assert_tensor_metadata"):
            graph.erase_node(node)


def _once(exported: torch.export.ExportedProgram, tensors: dict[fx.Node, Tensor]) -> dict[fx.Node, Tensor]:
    """Each weight once: one that the network knows by several names is that of the first."""
    weights: dict[fx.Node, Tensor] = {}
    seen: dict[tuple[Any, ...], fx.Node] = {}
    for node, tensor in tensors.items():
        key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype) if tensor.numel() else (node,)
        first = seen.setdefault(key, node)
        if first is node:
            weights[node] = tensor.detach()
        else:
            node.replace_all_uses_with(first)
            exported.graph.erase_node(node)
    return weights


@contextmanager
def _in_silence() -> Iterator[None]:
    """Keep what torch.export says of attempts that fail, and the graphs it prints then, from the user."""
    with quiet(_TRACERS, logging.CRITICAL), redirect_stderr(io.StringIO()):
        yield


@contextmanager
def _masks_as_given() -> Iterator[None]:
    """Within this context torch.nn.Transformer does not look whether a mask is causal.

    It does to compute less, not to answer otherwise; a trace, which knows no values, could not go on.
    """
    looks = transformer._detect_is_causal_mask
    transformer._detect_is_causal_mask = lambda mask, is_causal=None, size=None: is_causal is True
    try:
        yield
    finally:
        transformer._detect_is_causal_mask = looks


@contextmanager
def _modules_as_they_are() -> Iterator[None]:
    """Within this context ``module.to`` leaves modules alone that are there already.

    Routers ask for it in each call; a trace takes it for a change of their weights.
    """
    move = nn.Module.to

    def to(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        device, dtype, _, form = torch._C._nn._parse_to(*args, **kwargs)
        tensors = [*self.parameters(), *self.buffers()]
        here = device is None or all(t.device == torch.device(device) for t in tensors)
        alike = dtype is None or all(t.dtype is dtype for t in tensors if t.is_floating_point())
        return self if here and alike and form is None else move(self, *args, **kwargs)

    nn.Module.to = to  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.to = move  # type: ignore[method-assign]


@_in_silence()
@recurrent_in_one()
@_masks_as_given()
@_modules_as_they_are()
def _export(
    model: nn.Module, args: Any, kwargs: Any, maps: bool | None = False
) -> tuple[torch.export.ExportedProgram, Any, Any]:
    """Export a network for any batch size and length of sequences, or else for those of the example."""
    # A size of one cannot be told from no size.
    pair = torch.utils._pytree.tree_map(at_least_two, (args, kwargs))
    wide = torch.utils._pytree.tree_map(_two_places, pair) if maps is None else pair

    def of_any_size() -> torch.export.ExportedProgram:
        sizes = _any_size(wide, maps)
        return torch.export.export(model, wide[0], wide[1] or None, dynamic_shapes=sizes, strict=False)

    try:
        exported = of_any_size()
        if any(map(has_one_batch_size, _inputs(exported))):
            with suppress(Exception), _lengths_as_sizes():
                exported = of_any_size()
    except Exception:
        pair = (args, kwargs)
        try:
            if _made_known(model, args, kwargs):
                return _export(model, args, kwargs, maps)
            exported = torch.export.export(model, args, kwargs or None, strict=False)
        except InputError:
            raise
        except Exception as error:
            raise _refused(model, args, kwargs, error) from error
    if _maps(exported.graph) or _writes_into_what_others_read(exported.graph):
        exported = exported.run_decompositions({})
    _let_write_anew(exported.graph)
    in_pairs(exported.graph)
    outer_as_products(exported.graph)
    with_matrices(exported.graph, exported.graph_signature.inputs_to_parameters)
    _in_steps(exported.graph)
    _let_slice(exported.graph, exported.graph_signature.inputs_to_parameters)
    _without_detours(exported.graph)
    return exported, *pair


def _made_known(model: nn.Module, args: Any, kwargs: Any) -> bool:
    """Make dataclasses known to PyTorch in which a network returns several tensors; whether there are any."""
    kinds = {
        type(leaf)
        for leaf in torch.utils._pytree.tree_leaves(model(*args, **kwargs))
        if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type)
    }
    for kind in kinds:
        torch.export.register_dataclass(kind)
    return bool(kinds)


def _in_steps(graph: fx.Graph) -> None:
    """Let operations that are several at once, or have another name, be those for which there are rules."""
    for node in [n for n in graph.nodes if n.op == "call_function"]:
        node.target = _OTHERWISE.get(node.target, node.target)
        if name_of(node) in _STACKS:
            _let_cat(graph, node)
        if name_of(node) in ("view_as", "reshape_as"):
            _let_view(graph, node)
        inner = _INNER.get(name_of(node).rstrip("_"))
        if inner is None or _is_layer(node):
            continue
        a = bound(node)
        target, one, two, factor = inner
        with graph.inserting_before(node):
            term = _times(graph, node, step(graph, node, target, a[one], a[two]), a[factor])
            if (share := a.get("beta", 1)) != 0:  # of what is not a number nothing is left then
                given = _times(graph, node, a["self"], share)
                term = step(graph, node, torch.ops.aten.add.Tensor, given, term)
        node.replace_all_uses_with(term)
        graph.erase_node(node)


def _let_cat(graph: fx.Graph, node: fx.Node) -> None:
    """Let tensors be joined along an axis that is named, with the axes of one that they get before."""
    rank, axis = _STACKS[name_of(node)]
    parts: Any = node.args[0]
    ranks = [part.meta["val"].dim() for part in parts]
    if rank == 1 and max(ranks) == 1:
        axis = 0
    front = 1 if name_of(node) == "vstack" else 0
    with graph.inserting_before(node):
        for place, part in enumerate(parts):
            for lies in range(ranks[place], rank):
                # Rows become 1 x n; columns n x 1; in depth n is 1 x n x 1.
                at = 0 if lies == 1 and (front or rank == 3) else lies
                part = step(graph, node, torch.ops.aten.unsqueeze.default, part, at)
            parts = [*parts[:place], part, *parts[place + 1 :]]
    node.target, node.args, node.kwargs = torch.ops.aten.cat.default, (parts, axis), {}


def _let_view(graph: fx.Graph, node: fx.Node) -> None:
    """Let a tensor be viewed in sizes that are said, in place of those of another one."""
    source, other = node.args
    assert isinstance(other, fx.Node)
    with graph.inserting_before(node):
        sizes = [
            size if isinstance(size, int) else step(graph, node, torch.ops.aten.sym_size.int, other, axis)
            for axis, size in enumerate(other.meta["val"].shape)
        ]
    node.target, node.args, node.kwargs = torch.ops.aten.reshape.default, (source, sizes), {}


_IN_ORDER = ("view", "reshape", "_unsafe_view", "squeeze", "unsqueeze", "flatten", "unflatten")
"""Operations that leave all elements in their order."""


def _without_detours(graph: fx.Graph) -> None:
    """Let weights that come back to the shape that they had, as by squeeze and unsqueeze, be themselves."""
    for node in [n for n in graph.nodes if n.op == "call_function" and name_of(n) in _IN_ORDER]:
        source: Any = node
        while source.op == "call_function" and name_of(source) in _IN_ORDER:
            source = source.args[0]
        shapes = [getattr(n.meta.get("val"), "shape", None) for n in (node, source)]
        if source.op == "placeholder" and shapes[0] is not None and _is_static(shapes[0]):
            dtypes = [n.meta["val"].dtype for n in (node, source)]
            if shapes[0] == shapes[1] and dtypes[0] == dtypes[1]:
                node.replace_all_uses_with(source)
    for node in reversed(list(graph.nodes)):
        if node.op == "call_function" and name_of(node) in _IN_ORDER and not node.users:
            graph.erase_node(node)


def _let_slice(graph: fx.Graph, weights: Collection[str]) -> None:
    """Let parts that are picked from a weight, whose first axis is viewed as two for it, be slices of it."""
    for view in [n for n in graph.nodes if n.op == "call_function" and name_of(n) in (*_IN_ORDER, "unbind")]:
        stack = view.args[0] if name_of(view) == "unbind" else view
        whole: Any = stack.args[0] if stack.op == "call_function" and name_of(stack) in _IN_ORDER else None
        if not isinstance(whole, fx.Node) or whole.name not in weights:
            continue
        shape, own = stack.meta["val"].shape, whole.meta["val"].shape
        if len(shape) != len(own) + 1 or shape[2:] != own[1:]:
            continue
        for part in [p for p in view.users if _picks_first(p, view)]:
            first = part.args[-1] % shape[0] * shape[1]
            with graph.inserting_before(part):
                rows = step(graph, part, torch.ops.aten.slice.Tensor, whole, 0, first, first + shape[1])
            part.replace_all_uses_with(rows)
            graph.erase_node(part)
        if name_of(view) == "unbind" and not view.users:
            graph.erase_node(view)


def _picks_first(part: fx.Node, stack: fx.Node) -> bool:
    """Whether an operation picks one of what lies along the first axis."""
    if name_of(stack) == "unbind":
        return name_of(part) == "getitem" and bound(stack)["dim"] == 0
    return name_of(part) == "select" and bound(part)["dim"] == 0


def _is_static(shape: torch.Size) -> bool:
    return all(isinstance(size, int) for size in shape)


def _is_layer(node: fx.Node) -> bool:
    """Whether an operation is a linear layer: a vector is added, and nothing is multiplied by numbers."""
    a = bound(node)
    return name_of(node) == "addmm" and a["self"].meta["val"].dim() == 1 and a["beta"] == a["alpha"] == 1


def _times(graph: fx.Graph, node: fx.Node, term: fx.Node, number: Any) -> fx.Node:
    return term if number == 1 else step(graph, node, torch.ops.aten.mul.Scalar, term, number)


def _inputs(exported: torch.export.ExportedProgram) -> list[fx.Node]:
    """The tensors that a call gives to an exported network."""
    named = set(exported.graph_signature.user_inputs)
    return [n for n in exported.graph.nodes if n.name in named and isinstance(n.meta.get("val"), Tensor)]


@contextmanager
def _lengths_as_sizes() -> Iterator[None]:
    """Within this context ``len(x)`` of a tensor is the size that it is traced with.

    Python itself makes a number of a length, which is the example's for all calls then.
    """
    length = builtins.len

    def size(x: Any) -> Any:
        return x.shape[0] if isinstance(x, Tensor) and x.dim() else length(x)

    builtins.len = size
    try:
        yield
    finally:
        builtins.len = length


def _maps(graph: fx.Graph) -> bool:
    """Whether ``torch.vmap`` is entered and left in steps of the graph, which are one operation together."""
    return any(node.op == "call_function" and "_vmap_" in name_of(node) for node in graph.nodes)


def _writes_into_what_others_read(graph: fx.Graph) -> bool:
    """Whether running every operation that writes in place on a copy would change what comes out."""
    place = {node: i for i, node in enumerate(graph.nodes)}
    same: dict[fx.Node, fx.Node] = {}  # the tensor whose memory a view looks at
    readers: dict[fx.Node, list[int]] = {}
    writers: list[tuple[int, fx.Node, bool]] = []
    for node in graph.nodes:
        for source in node.all_input_nodes:
            readers.setdefault(same.get(source, source), []).append(place[node])
        first = node.args[0] if node.op == "call_function" and node.args else None
        if not isinstance(first, fx.Node) or not isinstance(first.meta.get("val"), Tensor):
            continue
        inplace = name_of(node).endswith("_") and not name_of(node).endswith("__")
        if inplace:
            writers.append((place[node], same.get(first, first), first in same or name_of(node) in _MUTATING))
        elif _is_view(node):
            same[node] = same.get(first, first)
    return any(part or any(i > at for i in readers[base]) for at, base, part in writers)


def _is_view(node: fx.Node) -> bool:
    """Whether an operation returns the memory of its first argument."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or not schema.arguments:
        return False
    alias = schema.arguments[0].alias_info
    return alias is not None and not alias.is_write


def _exported(model: nn.Module, args: Any, kwargs: Any) -> torch.export.ExportedProgram | None:
    """A network as it is exported on an example; None if it cannot be traced."""
    with evaluating(model), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return _export(model, args, kwargs)[0]
        except InputError:
            return None


def exported_anew(model: nn.Module, args: Any, kwargs: Any) -> fx.Graph | None:
    """The operations of a network on an example; None if it cannot be traced."""
    exported = _exported(model, args, kwargs)
    if exported is None:
        return None
    _unwrap(model, exported)
    graph: fx.Graph = exported.graph
    return graph


def has_one_batch_size(node: fx.Node) -> bool:
    """Whether an input was traced for the number of examples that it had."""
    shape = node.meta["val"].shape
    return len(shape) > 0 and (isinstance(shape[0], int) or not shape[0].node.expr.free_symbols)


def same_operations(model: nn.Module, program: Program, args: Any, kwargs: Any) -> bool | None:
    """Whether a network calls the same operations, with the same numbers, on other inputs.

    Args:
        model: that was traced.
        program: what was traced.
        args: other positional inputs.
        kwargs: other inputs by name.

    Returns:
        None if the network cannot be traced on them, since it does not take them, say.
    """
    exported = _exported(model, args, kwargs)
    if exported is None:
        return None
    own = [n for n in program.graph.nodes if n.op == "call_function"]
    others = [n for n in exported.graph.nodes if n.op == "call_function"]
    if len(own) != len(others) or not all(map(_same_call, own, others)):
        return False
    # A number that was written into a tensor.
    known = {name: program.weights[n] for n, name in program.names.items() if name in exported.constants}
    return all(torch.equal(known[name], exported.constants[name].to(known[name])) for name in known)


def _same_call(a: fx.Node, b: fx.Node) -> bool:
    def numbers(node: fx.Node) -> Any:
        return fx.node.map_arg((node.args, node.kwargs), lambda n: None)

    return a.target == b.target and bool(numbers(a) == numbers(b))


def takes_any_batch(model: nn.Module, program: Program) -> bool:
    """Whether a network takes any number of examples, though it was traced for that of its example."""
    args, kwargs = torch.utils._pytree.tree_unflatten(list(program.example), program.takes)
    doubled = torch.utils._pytree.tree_map(_doubled, (args, kwargs))
    return bool(same_operations(model, program, *doubled))


def _doubled(x: Any) -> Any:
    return torch.cat([x, x]) if isinstance(x, Tensor) and x.dim() else x


def _let_write_anew(graph: fx.Graph) -> None:
    """Let operations that write in place, into what nobody else reads, make new tensors."""
    for node in graph.nodes:
        name = name_of(node) if node.op == "call_function" else ""
        if name.endswith("_") and not name.endswith("__") and hasattr(node.target, "_schema"):
            plain = getattr(torch.ops.aten, name[:-1], None)
            node.target = getattr(plain, node.target._overloadname or "default", node.target)
        if name in ("copy", "copy_"):
            _let_copy(graph, node)
        if name == "slice_scatter" and node.meta["val"].is_complex():
            _let_join(graph, node)


def _let_copy(graph: fx.Graph, node: fx.Node) -> None:
    """Let a copy be what is copied in the size and type of what it is copied to: ``copy`` has no gradient."""
    whole, source = node.args[:2]
    with graph.inserting_before(node):
        alike = graph.call_function(torch.ops.aten.type_as.default, (source, whole))
    alike.meta.update(node.meta)
    node.target, node.args, node.kwargs = torch.ops.aten.expand_as.default, (alike, whole), {}


def _let_join(graph: fx.Graph, node: fx.Node) -> None:
    """Put a complex tensor together of what is written into it and the rest: the write has no gradient."""
    whole, source, dim, start, end, step = bound(node).values()
    if step != 1:
        return
    before = [(0, start)] if start not in (0, None) else []
    behind = [(end, sys.maxsize)] if end not in (sys.maxsize, None) else []
    with graph.inserting_before(node):
        parts = [graph.call_function(torch.ops.aten.slice.Tensor, (whole, dim, *e)) for e in before + behind]
    for part in parts:
        part.meta.update(node.meta)
        ends = (_size_of(a) for a in part.args[1:])
        part.meta["val"] = torch.ops.aten.slice.Tensor(whole.meta["val"], *ends)
    parts.insert(len(before), source)
    node.target, node.args, node.kwargs = torch.ops.aten.cat.default, (parts, dim), {}


def _size_of(size: Any) -> Any:
    return size.meta["val"] if isinstance(size, fx.Node) else size


def at_least_two(x: Any) -> Any:
    """Two examples in place of one, which would be taken for a fixed size."""
    return torch.cat([x, x]) if isinstance(x, Tensor) and x.dim() and x.shape[0] == 1 else x


def _two_places(x: Any) -> Any:
    """Maps of two places where they have one."""
    for axis in range(2, x.dim() if isinstance(x, Tensor) and x.dim() > 3 else 0):
        x = torch.cat([x, x], axis) if x.shape[axis] == 1 else x
    return x


def _any_size(example: Any, maps: bool | None) -> torch.export.ShapesCollection:
    """The sizes that may differ from call to call: of the batch, and the length of sequences."""
    sizes = torch.export.ShapesCollection()
    for x in torch.utils._pytree.tree_leaves(example):
        if isinstance(x, Tensor) and x.dim():
            all_ = maps is None or x.dim() < 4  # a number of features turns out to be one by itself
            dims = tuple(range(x.dim())) if all_ else (0, *(range(2, x.dim()) if maps else ()))
            # A size of one is taken as it is in any case, which torch.export would say on stderr.
            sizes[x] = dict.fromkeys((d for d in dims if x.shape[d] > 1), torch.export.Dim.AUTO)
    return sizes


def _packs(error: Exception) -> bool:
    """Whether an error comes from a packed sequence, or from packing one."""
    frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
    return any(
        frame.f_code.co_filename == nn.utils.rnn.__file__
        or any(isinstance(value, nn.utils.rnn.PackedSequence) for value in frame.f_locals.values())
        for frame in frames
    )


def _is_own(file: str) -> bool:
    """Whether a file is neither PyTorch's, nor of this folder, nor made up, such as a trace's."""
    return not file.startswith("<") and not {TORCH, Path(__file__).parent} & {*Path(file).parents}


def _refused(model: nn.Module, args: Any, kwargs: Any, error: Exception) -> InputError:
    """What to say of an example that cannot be traced: the network's own words, if it does not take it."""
    try:
        with evaluating(model):
            model(*args, **kwargs)
    except Exception as own:  # all kinds, of the user's code
        return InputError(_why(model, own, runs=False))
    return InputError(_why(model, error, runs=True))


def _why(model: nn.Module, error: Exception, runs: bool) -> str:
    """One line on why a network cannot be exported, with the user's own line of code.

    Args:
        model: the network.
        error: what it, or the exporter, said.
        runs: whether the network itself takes the example.
    """
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if _is_own(f.filename)]
    where = (
        f" at {Path(own[-1].filename).name}:{own[-1].lineno} ({(own[-1].line or '').strip()})" if own else ""
    )
    text = str(error).strip().partition("\n")[0] or type(error).__name__
    depends = "data-dependent" in str(error) or "GuardOnDataDependent" in type(error).__name__
    if _packs(error):
        return (
            f"{type(model).__name__} cannot be traced{where}: packed sequences are as long as the data say;"
            " give its recurrent layers padded sequences, and mask what lies behind their ends"
        )
    return f"{type(model).__name__} cannot be traced{where}: {text}; {_advice(model, runs, depends)}"


def _advice(model: nn.Module, runs: bool, depends: bool) -> str:
    """What can be done about a network that cannot be exported."""
    if not runs:
        return "the example must be one batch as the network takes it"
    if not depends:
        return (
            "the network runs, but torch.export cannot follow this line: write it in another way, or gate"
            " the part of the network around it"
        )
    advice = (
        "its path depends on the data: replace the branch, for instance by torch.where, and a size that comes"
        " from a tensor by one that Python computes (x.shape[1] // 2)"
    )
    if any("expert" in name.lower() for name, _ in model.named_modules()):
        advice += (
            "; experts that tokens are sent to have to be computed for all, or picked by products (of"
            " transformers: config._experts_implementation='batched_mm')"
        )
    return advice
