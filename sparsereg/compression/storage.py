"""A compacted network as one file: its structure as JSON, its weights as tensors.

The file loads with ``torch.load(weights_only=True)``. Its structure is data: every name, operation, class
and number in it is checked against ``sparsereg.compression.vocabulary`` before anything is made of it,
so that loading runs no code that the file brings along, and needs no training configuration.
"""

import inspect
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from sparsereg.archives import load_torch, not_finite, save_torch
from sparsereg.compression import vocabulary
from sparsereg.compression.compact import ORIGINAL
from sparsereg.compression.running import can_train
from sparsereg.compression.vocabulary import check_name, check_path, short
from sparsereg.errors import DamagedFile, InputError

FORMAT = "sparsereg.compacted"
VERSION = 1
LONGEST = 2**26
"""Characters of JSON that are read."""


def save_compacted(module: fx.GraphModule, path: str | Path, notes: dict[str, Any] | None = None) -> Path:
    """Write a compacted network to a file, whole or not at all.

    Args:
        module: what ``sparsereg.compression.compact`` returned, trained further or not.
        path: the file; an existing one is replaced.
        notes: anything JSON-able to keep with it, such as class names; found again in
            ``load_compacted(path).meta["notes"]``.

    Raises:
        InputError: the network holds an operation that the format has no word for.
        ValueError: the module is not a torch.fx.GraphModule.

    Example:
        >>> import tempfile
        >>> from sparsereg import SparseMLP
        >>> from sparsereg.compression import compact
        >>> small = compact(SparseMLP(6, 8, 3), torch.ones(1, 6))
        >>> path = Path(tempfile.mkdtemp()) / "small.pt"
        >>> path = save_compacted(small, path, notes={"classes": ["a", "b", "c"]})
        >>> load_compacted(path).meta["notes"]
        {'classes': ['a', 'b', 'c']}
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
    save_torch(path, content)
    return path


def load_compacted(path: str | Path) -> fx.GraphModule:
    """Load a compacted network; it is in eval mode, on the CPU, and can be trained further.

    Args:
        path: a file that ``save_compacted`` wrote.

    Raises:
        InputError: the file is missing, damaged, or something else.

    Example:
        >>> import tempfile
        >>> from sparsereg import SparseMLP
        >>> from sparsereg.compression import compact
        >>> small = compact(SparseMLP(6, 8, 3), torch.ones(1, 6))
        >>> path = save_compacted(small, Path(tempfile.mkdtemp()) / "small.pt")
        >>> torch.equal(load_compacted(path)(torch.ones(1, 6)), small(torch.ones(1, 6)))
        True
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"there is no file {path}")
    try:
        content = load_torch(path)
    except (DamagedFile, OSError) as error:
        raise InputError(f"{path} cannot be read as a compacted network: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise InputError(f"{path} is no compacted network; test.py with compact=true writes one")
    if content.get("version") != VERSION:
        raise InputError(
            f"{path} has version {short(content.get('version'))} of the format; this is version {VERSION}"
        )
    try:
        module = rebuild(content.get("plan"), content.get("weights"))
        module.meta["notes"] = _parse(content.get("notes"), "the notes")
    except InputError as error:
        raise InputError(f"{path} is no network that this version can read: {error}") from error
    return module


def describe(module: fx.GraphModule) -> str:
    """Return the structure of a compacted network as JSON, without its weights; see ``rebuild``."""
    return json.dumps(_plan(module))


def rebuild(description: Any, weights: Any) -> fx.GraphModule:
    """Build a compacted network from ``describe`` and a state dict; in eval mode, on the CPU.

    Args:
        description: from a file; nothing about it is trusted.
        weights: likewise; they become the network's own without being copied.

    Raises:
        InputError: they describe no network.
    """
    plan = _parse(description, "the structure")
    weights = vocabulary.check_weights(weights)
    try:
        return _Reader(plan, weights).module()
    except InputError:
        raise
    except Exception as error:
        # Whatever torch says about parts that do not fit together, their user gets one line.
        raise InputError(f"its parts do not fit together: {short(error)}") from error


def _parse(text: Any, what: str) -> dict[str, Any]:
    """JSON from a file as a dictionary."""
    if not isinstance(text, str) or len(text) > LONGEST:
        raise InputError(f"{what} is missing or longer than {LONGEST} characters")
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{what} is not JSON: {short(error)}") from error
    if not isinstance(parsed, dict):
        raise InputError(f"{what} is not a JSON object but {short(parsed)}")
    return parsed


def is_compacted(path: str | Path) -> bool:
    """Whether a file holds a compacted network (and not, say, a checkpoint of training).

    Example:
        >>> import tempfile
        >>> from sparsereg import SparseMLP
        >>> from sparsereg.compression import compact
        >>> small = compact(SparseMLP(6, 8, 3), torch.ones(1, 6))
        >>> path = save_compacted(small, Path(tempfile.mkdtemp()) / "small.pt")
        >>> is_compacted(path)
        True
    """
    try:
        content = torch.load(path, map_location="meta", weights_only=True, mmap=True)
    except Exception:
        return False
    return isinstance(content, dict) and content.get("format") == FORMAT


def _plan(module: fx.GraphModule) -> dict[str, Any]:
    """The structure of a network in terms of JSON, which the reader takes.

    Raises:
        InputError: it would not.
    """
    names = {f: name for name, f in vocabulary.FUNCTIONS.items()}
    modules: dict[str, Any] = {}
    nodes = []
    for node in module.graph.nodes:
        target = node.target
        if node.op == "call_module":
            modules[target] = _module_plan(module.get_submodule(target), target)
        elif node.op == "call_function":
            target = names.get(target)
        if target is None or (node.op == "call_method" and target not in vocabulary.METHODS):
            what = getattr(node.target, "__name__", node.target)
            raise InputError(f"compacted networks with {what} cannot be saved yet; export() can")
        nodes.append([node.op, node.name, target, _encode(node.args), _encode(dict(node.kwargs))])
    parameters = {name: p.requires_grad for name, p in module.named_parameters()}
    plan = {
        "name": type(module).__name__,
        "modules": modules,
        "nodes": nodes,
        "parameters": parameters,
        ORIGINAL: module.meta.get(ORIGINAL),
    }
    try:
        _Reader(plan, vocabulary.check_weights(module.state_dict())).check()
    except InputError as error:
        raise InputError(f"this network cannot be saved yet, export() can: {error}") from error
    return plan


def _module_plan(module: nn.Module, path: str) -> dict[str, Any]:
    cls = next((c for c in type(module).__mro__ if getattr(nn, c.__name__, None) is c), None)
    if cls is None or cls.__name__ not in vocabulary.CLASSES:
        raise InputError(
            f"{type(module).__name__} {path!r} is none of the layers that can be saved yet; export() can"
        )
    settings: dict[str, Any] = {}
    defaults = inspect.signature(cls).parameters
    for name in vocabulary.CLASSES[cls.__name__]:
        if name == "bias":
            own_name = {nn.MultiheadAttention: "in_proj_bias"}.get(cls, "bias")
            bias = getattr(module, own_name, None)
            settings[name] = bias if isinstance(bias, bool) else bias is not None
        elif hasattr(module, name):
            settings[name] = _encode(getattr(module, name))
        elif name in defaults and defaults[name].default is not inspect.Parameter.empty:
            settings[name] = _encode(defaults[name].default)
        else:
            raise InputError(f"{cls.__name__} {path!r} does not tell its {name!r}, so it cannot be saved")
    made = vocabulary.make_module(cls.__name__, _Reader({}, {}).settings(settings, path), path)
    if made.state_dict().keys() != module.state_dict().keys():
        raise InputError(f"{cls.__name__} {path!r} holds more than its settings tell, so it cannot be saved")
    return {"class": cls.__name__, "settings": settings}


def _encode(value: Any) -> Any:
    """Arguments as JSON; what JSON does not have is an object with one key."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, slice):
        return {"slice": [_encode(v) for v in (value.start, value.stop, value.step)]}
    if isinstance(value, list):
        return {"list": [_encode(v) for v in value]}
    if isinstance(value, tuple):
        return {"tuple": [_encode(v) for v in value]}
    if isinstance(value, dict):
        return {"dict": [[_encode(k), _encode(v)] for k, v in value.items()]}
    raise InputError(f"an argument of type {type(value).__name__} cannot be saved: {value!r}")


class _Reader:
    """Makes a network of a structure, checking every part of it first.

    Args:
        plan: the structure.
        weights: the tensors, checked.
    """

    def __init__(self, plan: dict[str, Any], weights: dict[str, Tensor]) -> None:
        self.plan = plan
        self.weights = weights
        self.root = nn.Module()
        self.graph = fx.Graph()
        self.nodes: dict[str, fx.Node] = {}

    def check(self) -> None:
        """Check that the structure is one.

        Raises:
            InputError: it is not.
        """
        check_name(self._part("name", str), "the network")
        self._add_modules()
        self._add_tensors()
        self._add_steps()

    def module(self) -> fx.GraphModule:
        """The network, in eval mode."""
        self.check()
        trains = self._part("parameters", dict)
        if (wrong := not_finite(self.weights, trains)) is not None:
            raise InputError(f"{wrong!r} holds numbers that are not finite")
        self.root.load_state_dict(self.weights, assign=True)
        for name, parameter in self.root.named_parameters():
            parameter.requires_grad_(bool(trains.get(name, True)))
        module = fx.GraphModule(self.root, self.graph, class_name=self.plan["name"])
        if self.plan.get(ORIGINAL):  # files of before this was kept lack it
            module.meta[ORIGINAL] = self._original()
        return module.eval()

    def _add_steps(self) -> None:
        steps = self._part("nodes", list)
        for position, step in enumerate(steps):
            if not isinstance(step, list) or len(step) != 5:
                raise InputError(f"an operation is {short(step)} and not five parts")
            if (step[0] == "output") != (position == len(steps) - 1):
                raise InputError("the result must be the last operation, and the only one of its kind")
            self._add_step(*step)
        if not self.nodes:
            raise InputError("there are no operations")

    def _part(self, key: str, kind: type) -> Any:
        value = self.plan.get(key)
        if not isinstance(value, kind):
            raise InputError(f"its {key!r} should be a {kind.__name__}, and is {short(value)}")
        return value

    def _original(self) -> dict[str, int]:
        original: dict[str, int] = self._part(ORIGINAL, dict)
        if set(original) != {"parameters", "macs"} or any(type(v) is not int for v in original.values()):
            raise InputError(f"its {ORIGINAL!r} should be parameters and macs, and is {short(original)}")
        return original

    def _add_modules(self) -> None:
        for path, described in self._part("modules", dict).items():
            check_path(path, "a layer")
            if not isinstance(described, dict) or set(described) != {"class", "settings"}:
                raise InputError(f"the layer {path!r} is {short(described)} and not class and settings")
            settings = self.settings(described["settings"], path)
            _put(self.root, path, vocabulary.make_module(described["class"], settings, path))

    def settings(self, settings: Any, path: str) -> dict[str, Any]:
        """Arguments of a layer's constructor."""
        if not isinstance(settings, dict):
            raise InputError(f"the layer {path!r} has no settings but {short(settings)}")
        return {key: self._decode(value, path) for key, value in settings.items()}

    def _add_tensors(self) -> None:
        """Compare the tensors with the layers, which take no memory yet, and put those of no layer beside."""
        trains = self._part("parameters", dict)
        own = self.root.state_dict()
        for name, value in self.weights.items():
            if name not in own:
                check_name(name, "a tensor of the network")
                if name in trains:
                    self.root.register_parameter(name, nn.Parameter(value, can_train(value)))
                else:
                    self.root.register_buffer(name, value)
            elif value.shape != own[name].shape or value.is_floating_point() != own[name].is_floating_point():
                raise InputError(
                    f"{name!r} is {value.dtype} {tuple(value.shape)}, and its layer takes"
                    f" {own[name].dtype} {tuple(own[name].shape)}"
                )
        missing = sorted(own.keys() - self.weights.keys())
        if missing:
            raise InputError(f"it lacks the weights {', '.join(missing[:4])}")

    def _add_step(self, op: Any, name: Any, target: Any, args: Any, kwargs: Any) -> None:
        check_name(name, "an operation")
        if name in self.nodes:
            raise InputError(f"two operations are called {name!r}")
        given, by_name = self._decode(args, name), self._decode(kwargs, name)
        if not isinstance(given, tuple) or not isinstance(by_name, dict):
            raise InputError(f"{name!r} has no arguments but {short(args)} and {short(kwargs)}")
        check: dict[str, Callable[[Any, Any, Any], str | Callable[..., Any]]] = {
            "placeholder": self._check_placeholder,
            "output": self._check_output,
            "get_attr": self._check_attribute,
            "call_module": self._check_layer,
            "call_function": self._check_function,
            "call_method": self._check_method,
        }
        if not isinstance(op, str) or op not in check:
            raise InputError(f"{name!r} is {short(op)}, which is no kind of operation")
        found = check[op](target, given, by_name)
        self.nodes[name] = self.graph.create_node(op, found, given, by_name, name)

    def _check_placeholder(self, target: Any, args: Any, kwargs: Any) -> str:
        if len(args) > 1 or kwargs or any(node.op != "placeholder" for node in self.nodes.values()):
            raise InputError("the inputs must be the first operations and have one default at most")
        if any(not isinstance(default, bool | int | float | None) for default in args):
            raise InputError(f"the default of {short(target)} is no number")
        if any(node.target == target for node in self.nodes.values()):
            raise InputError(f"two inputs are called {short(target)}")
        return check_name(target, "an input")

    def _check_output(self, target: Any, args: Any, kwargs: Any) -> str:
        if target != "output" or len(args) != 1 or kwargs:
            raise InputError(f"the result is {short(target)} with {len(args)} parts, and not one")
        vocabulary.check_result(args[0])
        return "output"

    def _check_attribute(self, target: Any, args: Any, kwargs: Any) -> str:
        own = self.root.state_dict().keys()  # of layers, too: tied weights are read where they lie
        if not isinstance(target, str) or target not in own or args or kwargs:
            raise InputError(f"there is no tensor {short(target)}")
        return target

    def _check_layer(self, target: Any, args: Any, kwargs: Any) -> str:
        if not isinstance(target, str) or target not in self.plan["modules"]:
            raise InputError(f"there is no layer {short(target)}")
        vocabulary.check_call("call_module", target, args, kwargs)
        return target

    def _check_function(self, target: Any, args: Any, kwargs: Any) -> Callable[..., Any]:
        if not isinstance(target, str) or target not in vocabulary.FUNCTIONS:
            raise InputError(f"the function {short(target)} is not on the list")
        vocabulary.check_call("call_function", target, args, kwargs)
        return vocabulary.FUNCTIONS[target]

    def _check_method(self, target: Any, args: Any, kwargs: Any) -> str:
        if not isinstance(target, str) or target not in vocabulary.METHODS:
            raise InputError(f"the tensor method {short(target)} is not on the list")
        vocabulary.check_call("call_method", target, args, kwargs)
        return target

    def _decode(self, value: Any, where: str, depth: int = vocabulary.DEEPEST + 2) -> Any:
        """Arguments from JSON; see ``_encode``."""
        if not isinstance(value, dict | list):
            return value
        if depth == 0 or not isinstance(value, dict) or len(value) != 1:
            raise InputError(f"{where!r} has the argument {short(value)}, which is none")
        ((kind, content),) = value.items()
        if kind in ("node", "dtype"):
            known: Mapping[str, Any] = self.nodes if kind == "node" else vocabulary.DTYPES
            if not isinstance(content, str) or content not in known:
                raise InputError(f"{where!r} reads {short(content)}, which is no earlier operation or type")
            return known[content]
        if not isinstance(content, list) or kind not in _MAKE:
            raise InputError(f"{where!r} has the argument {short(value)}, which is none")
        if kind == "dict":
            pairs = [[self._decode(v, where, depth - 1) for v in p] for p in content if isinstance(p, list)]
            if len(pairs) != len(content) or any(len(p) != 2 for p in pairs):
                raise InputError(f"{where!r} has the argument {short(value)}, which is none")
            if any(not isinstance(key, str | int) for key, _ in pairs):
                raise InputError(f"{where!r} has the argument {short(value)}, whose keys are no names")
            return dict(pairs)
        if kind == "complex" and not (len(content) == 2 and all(isinstance(v, float) for v in content)):
            raise InputError(f"{where!r} has a complex number of {short(content)}")
        if kind == "slice" and len(content) != 3:
            raise InputError(f"{where!r} has a slice of {len(content)} parts")
        return _MAKE[kind]([self._decode(v, where, depth - 1) for v in content])


_MAKE: dict[str, Callable[[Any], Any]] = {
    "list": list,
    "tuple": tuple,
    "complex": lambda parts: complex(*parts),
    "slice": lambda parts: slice(*parts),
    "dict": dict,
}


def _put(root: nn.Module, path: str, module: nn.Module) -> None:
    """Put a module at a dotted path, with empty modules on the way."""
    *parents, last = path.split(".")
    for parent in parents:
        if parent not in root._modules:
            root.add_module(parent, nn.Module())
        root = root.get_submodule(parent)
        if type(root) is not nn.Module:
            raise InputError(f"the layer {path!r} lies inside of another one")
    if last in root._modules:
        raise InputError(f"two layers lie at {path!r}")
    root.add_module(last, module)
