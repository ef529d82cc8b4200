"""A compacted network as one file: its structure as JSON, its weights as tensors.

The file loads with ``torch.load(weights_only=True)``. It names classes of torch.nn and functions of a
fixed list, so that loading it runs no code that it brings along, and needs no training configuration.
"""

import inspect
import json
import operator
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from sparsereg.compression import graph as rules
from sparsereg.compression.compact import ORIGINAL
from sparsereg.errors import InputError
from sparsereg.files import write_atomically

FORMAT = "sparsereg.compacted"
VERSION = 1

_HOMES: tuple[tuple[str, Any], ...] = (("operator", operator), ("F", F), ("torch", torch))
_FURTHER = """
    operator.getitem operator.add operator.sub operator.mul operator.truediv operator.floordiv operator.neg
    operator.matmul operator.pow
    torch.index_select torch.mul torch.add torch.sub torch.neg torch.div torch.cat torch.stack torch.flatten
    torch.reshape torch.matmul torch.bmm torch.transpose torch.permute torch.chunk torch.split torch.softmax
    torch.exp torch.log torch.sqrt torch.square torch.pow torch.squeeze torch.unsqueeze torch.roll
    torch.maximum torch.minimum torch.where torch.einsum
    F.linear F.conv1d F.conv2d F.conv3d F.softmax F.log_softmax F.layer_norm F.group_norm F.normalize F.pad
    F.scaled_dot_product_attention F.batch_norm F.pixel_shuffle F.glu
""".split()  # noqa: SIM905
"""Functions that a file may name, besides those that compaction has rules for."""
_METHODS = """
    expand size view reshape permute transpose contiguous flatten mean sum amax squeeze unsqueeze chunk split
    softmax log_softmax add sub mul div neg pow exp sqrt matmul bmm relu sigmoid tanh clamp clone abs t
    index_select unflatten type_as float to
""".split()  # noqa: SIM905
"""Tensor methods that a file may name."""


def _known_functions() -> dict[str, Callable[..., Any]]:
    homes = dict(_HOMES)
    known: dict[str, Callable[..., Any]] = {}
    for name in _FURTHER:
        home, _, attribute = name.partition(".")
        known[name] = getattr(homes[home], attribute)
    for function in rules.FUNCTIONS:
        if callable(function):
            for home, module in _HOMES:
                name = getattr(function, "__name__", "")
                if getattr(module, name, None) is function:
                    known[f"{home}.{name}"] = function  # type: ignore[assignment]
    return known


FUNCTIONS = _known_functions()
"""Functions that a file may name."""


def save_compacted(module: fx.GraphModule, path: str | Path, notes: dict[str, Any] | None = None) -> Path:
    """Write a compacted network to a file, whole or not at all.

    Args:
        module: what :func:`~sparsereg.compression.compact` returned, trained further or not.
        path: the file; an existing one is replaced.
        notes: anything JSON-able to keep with it, such as class names; found again in
            ``load_compacted(path).meta["notes"]``.

    Raises:
        InputError: the network holds an operation that the format has no word for.
        ValueError: the module is not a torch.fx.GraphModule.
    """
    if not isinstance(module, fx.GraphModule):
        raise ValueError(f"module must be a torch.fx.GraphModule from compact(), got {type(module).__name__}")
    content = {
        "format": FORMAT,
        "version": VERSION,
        "plan": json.dumps(_plan(module)),
        "notes": json.dumps(notes or {}),
        "weights": {name: value.detach().cpu() for name, value in module.state_dict().items()},
    }
    path = Path(path)
    write_atomically(path, lambda beside: torch.save(content, beside))
    return path


def load_compacted(path: str | Path) -> fx.GraphModule:
    """Load a compacted network; it is in eval mode, on the CPU, and can be trained further.

    Args:
        path: a file that :func:`save_compacted` wrote.

    Raises:
        InputError: the file is missing, damaged, or something else.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"there is no file {path}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # torch.load raises many kinds of errors on a damaged file.
        raise InputError(
            f"{path} cannot be read as a compacted network: it is damaged or another kind of file"
        ) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise InputError(f"{path} is no compacted network; test.py with compact=true writes one")
    if content.get("version") != VERSION:
        raise InputError(
            f"{path} has version {content.get('version')} of the format; this is version {VERSION}"
        )
    module = _build(json.loads(content["plan"]), content["weights"])
    module.meta["notes"] = json.loads(content["notes"])
    return module


def describe(module: fx.GraphModule) -> str:
    """Return the structure of a compacted network as JSON, without its weights; see :func:`rebuild`."""
    return json.dumps(_plan(module))


def rebuild(description: str, weights: dict[str, torch.Tensor]) -> fx.GraphModule:
    """Build a compacted network from :func:`describe` and a state dict; in eval mode, on the CPU."""
    return _build(json.loads(description), weights)


def is_compacted(path: str | Path) -> bool:
    """Whether a file holds a compacted network (and not, say, a checkpoint of training)."""
    try:
        content = torch.load(path, map_location="meta", weights_only=True, mmap=True)
    except Exception:
        return False
    return isinstance(content, dict) and content.get("format") == FORMAT


def _plan(module: fx.GraphModule) -> dict[str, Any]:
    """The structure of a network in terms of JSON."""
    modules: dict[str, Any] = {}
    nodes = []
    for node in module.graph.nodes:
        target = node.target
        if node.op == "call_module":
            modules[target] = _module_plan(module.get_submodule(target), target)
        elif node.op == "call_function":
            target = next((name for name, f in FUNCTIONS.items() if f is target), None)
        if target is None or (node.op == "call_method" and target not in _METHODS):
            raise InputError(f"compacted networks with {node.target} cannot be saved yet; export() can")
        nodes.append([node.op, node.name, target, _encode(node.args), _encode(dict(node.kwargs))])
    parameters = {name: p.requires_grad for name, p in module.named_parameters()}
    return {
        "name": type(module).__name__,
        "modules": modules,
        "nodes": nodes,
        "parameters": parameters,
        ORIGINAL: module.meta.get(ORIGINAL),
    }


def _module_plan(module: nn.Module, path: str) -> dict[str, Any]:
    cls = next((c for c in type(module).__mro__ if getattr(nn, c.__name__, None) is c), None)
    if cls is None or cls is nn.Module:
        raise InputError(f"{type(module).__name__} {path!r} is no module of torch.nn and cannot be saved")
    settings: dict[str, Any] = {}
    for name, argument in inspect.signature(cls).parameters.items():
        if name in ("device", "dtype") or argument.kind in (
            inspect.Parameter.VAR_POSITIONAL,
            inspect.Parameter.VAR_KEYWORD,
        ):
            continue
        if name == "bias":
            own_name = "in_proj_bias" if isinstance(module, nn.MultiheadAttention) else "bias"
            settings[name] = getattr(module, own_name, None) is not None
        elif hasattr(module, name):
            settings[name] = _encode(getattr(module, name))
        elif argument.default is not inspect.Parameter.empty:
            settings[name] = _encode(argument.default)
        else:
            raise InputError(f"{cls.__name__} {path!r} does not tell its {name!r}, so it cannot be saved")
    described = {"class": cls.__name__, "settings": settings}
    if _build_module(described, path).state_dict().keys() != module.state_dict().keys():
        raise InputError(f"{cls.__name__} {path!r} holds more than its settings tell, so it cannot be saved")
    return described


def _encode(value: Any) -> Any:
    """Arguments as JSON; what JSON does not have is an object with one key."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, slice):
        return {"slice": [_encode(v) for v in (value.start, value.stop, value.step)]}
    if isinstance(value, list):
        return {"list": [_encode(v) for v in value]}
    if isinstance(value, tuple):
        return {"tuple": [_encode(v) for v in value]}
    if isinstance(value, dict):
        return {"dict": [[_encode(k), _encode(v)] for k, v in value.items()]}
    raise InputError(f"an argument of type {type(value).__name__} cannot be saved: {value!r}")


def _decode(value: Any, nodes: dict[str, fx.Node]) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "node":
        return nodes[content]
    if kind == "dtype":
        return getattr(torch, content)
    parts = [_decode(v, nodes) for v in content] if kind != "dict" else content
    if kind == "dict":
        return {_decode(k, nodes): _decode(v, nodes) for k, v in parts}
    made: dict[str, Callable[[list[Any]], Any]] = {"list": list, "tuple": tuple, "slice": lambda p: slice(*p)}
    return made[kind](parts)


def _build(plan: dict[str, Any], weights: dict[str, torch.Tensor]) -> fx.GraphModule:
    root = nn.Module()
    for path, described in plan["modules"].items():
        _put(root, path, _build_module(described, path))
    own = {n for n, _ in root.named_parameters()} | {n for n, _ in root.named_buffers()}
    for name in weights.keys() - own:
        if name in plan["parameters"]:
            root.register_parameter(name, nn.Parameter(weights[name]))
        else:
            root.register_buffer(name, weights[name])
    root.load_state_dict(weights, assign=True)
    for name, parameter in root.named_parameters():
        parameter.requires_grad_(plan["parameters"].get(name, True))
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}
    for op, name, target, args, kwargs in plan["nodes"]:
        if op == "call_function":
            if target not in FUNCTIONS:
                raise InputError(f"the file names the function {target!r}, which is not on the list")
            target = FUNCTIONS[target]
        elif op == "call_method" and target not in _METHODS:
            raise InputError(f"the file names the tensor method {target!r}, which is not on the list")
        made = graph.create_node(op, target, _decode(args, nodes), _decode(kwargs, nodes), name)
        nodes[name] = made
    module = fx.GraphModule(root, graph, class_name=plan["name"])
    if plan.get(ORIGINAL):  # files of before this was kept lack it
        module.meta[ORIGINAL] = plan[ORIGINAL]
    return module.eval()  # type: ignore[return-value]


def _build_module(described: dict[str, Any], path: str) -> nn.Module:
    cls = getattr(nn, described["class"], None)
    if not (inspect.isclass(cls) and issubclass(cls, nn.Module) and cls is not nn.Module):
        raise InputError(
            f"the file names the class {described['class']!r} for {path!r}, which torch.nn lacks"
        )
    settings = {name: _decode(value, {}) for name, value in described["settings"].items()}
    with torch.device("meta"):
        return cls(**settings)


def _put(root: nn.Module, path: str, module: nn.Module) -> None:
    """Put a module at a dotted path, with empty modules on the way."""
    *parents, last = path.split(".")
    for parent in parents:
        if parent not in root._modules:
            root.add_module(parent, nn.Module())
        root = root.get_submodule(parent)
    root.add_module(last, module)
