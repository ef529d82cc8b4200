"""Checkpoints: reading them safely, saying what is wrong with them, starting another run from them."""

import json
import logging
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sparsereg import own_code
from sparsereg.archives import load_torch, not_finite
from sparsereg.compression import storage
from sparsereg.data.config import CONFIGS as SOURCES
from sparsereg.data.form import Form, is_described
from sparsereg.data.kind import source_of
from sparsereg.distributions import HardConcrete
from sparsereg.errors import DamagedFile, InputError
from sparsereg.training.tasks.config import CONFIGS as TASKS
from sparsereg.training.tasks.config import FIGURES, task_of
from sparsereg.zoo.config import CONFIGS as NETWORKS
from sparsereg.zoo.network import group_of

log = logging.getLogger(__name__)

COMPACTED = "compacted"
"""Name of the model whose structure is in its file and not in the configuration."""
FOLDER, RESULTS = "checkpoints", "results.json"
"""Of a run."""


@dataclass(frozen=True)
class FirstStage:
    """The stage of a run under gates, when its compacted network is fine-tuned.

    Attributes:
        config: resolved configuration of the run.
        results: what of results.json it decides.
    """

    config: dict[str, Any]
    results: dict[str, Any]


@dataclass(frozen=True)
class Checkpoint:
    """A training checkpoint.

    Attributes:
        named: the setting and the file, ``ckpt_path=F``, for messages.
        path: the file.
        weights: state dict of the network.
        config: resolved configuration of the run that wrote it.
        form: what its network was built for.
        gated: whether its network has gates.
        epoch: number of finished epochs.
        content: everything in the file.
        structure: of a compacted network, see ``sparsereg.compression.storage.describe``; else None.
        batch_norm_is_current: whether its BatchNorm statistics were taken for exactly these weights.
        before: of a network that is being fine-tuned, the run's stage under gates; else None.
        data: description of the data that it was trained on.
        version: of sparsereg that wrote it; "" for one that did not say.
        changed: of a run that is resumed, the settings that are honoured from here on: (was, is).
    """

    named: str
    path: Path
    weights: dict[str, Tensor]
    config: dict[str, Any]
    form: Form
    gated: bool
    epoch: int
    content: dict[str, Any]
    structure: str | None = None
    batch_norm_is_current: bool = True
    before: FirstStage | None = None
    data: dict[str, Any] = field(default_factory=dict)
    version: str = ""
    changed: dict[str, tuple[Any, Any]] = field(default_factory=dict)

    @property
    def run_config(self) -> dict[str, Any]:
        """Resolved configuration of the whole run, of which fine-tuning is the second stage."""
        return self.config if self.before is None else self.before.config

    @property
    def run_gated(self) -> bool:
        """Whether the run has gates, or had until it was fine-tuned."""
        return self.gated or self.before is not None

    @property
    def run_finished(self) -> bool:
        """Whether the run that wrote it has come to its end: its results are beside it."""
        return self.path.parent.name == FOLDER and (self.path.parent.parent / RESULTS).is_file()


def _is_count(value: Any, least: int = 0) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_mapping(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(key, str) for key in value)


def _are_weights(value: Any) -> bool:
    """Whether something is a state dict, without NaN; a mask of the network's may hold infinity."""
    if not _is_mapping(value) or not all(isinstance(v, Tensor) for v in value.values()):
        return False
    return not_finite(value, ()) is None


@dataclass(frozen=True)
class Part:
    """What a part of a checkpoint must be.

    Attributes:
        fits: whether a value is that.
        expected: the same in words.
        optional: may be missing or null.
        unless: may be missing beside this key.
    """

    fits: Callable[[Any], bool]
    expected: str
    optional: bool = False
    unless: str = ""


_MAPPING = Part(_is_mapping, "settings by name")
_TEXT = Part(lambda v: isinstance(v, str), "a name")
_NAME = Part(_TEXT.fits, "a name", unless=own_code.TARGET)
_SWITCH = Part(lambda v: isinstance(v, bool), "true or false")
_WEIGHTS = Part(_are_weights, "tensors by name, without NaN")
_COUNT = Part(_is_count, "an integer >= 0")
_SHARE = Part(lambda v: v is None or (isinstance(v, int | float) and 0 <= v <= 1), "a share in [0, 1]")
_FIGURE = Part(
    lambda v: isinstance(v, int | float) and not isinstance(v, bool) and 0 <= v < math.inf,
    "a number >= 0",
    optional=True,
)
_LIST = Part(lambda v: isinstance(v, list) and all(map(_is_mapping, v)), "a list of states")

PARTS: dict[str, Part] = {
    "state_dict": _WEIGHTS,
    "epoch": _COUNT,
    "sparsereg": _MAPPING,
    "sparsereg.config": _MAPPING,
    "sparsereg.config.model": _MAPPING,
    "sparsereg.config.model.name": _NAME,
    "sparsereg.config.data": _MAPPING,
    "sparsereg.config.data.name": _NAME,
    **{f"sparsereg.config.{group}": _MAPPING for group in ("trainer", "optimizer", "callbacks")},
    "sparsereg.num_classes": Part(lambda v: _is_count(v, 1), "an integer >= 1"),
    "sparsereg.image_shape": Part(
        lambda v: isinstance(v, list) and 1 <= len(v) <= 3 and all(_is_count(n, 1) for n in v),
        "one to three integers >= 1",
    ),
    "sparsereg.config.task": Part(_is_mapping, "settings by name", optional=True),
    "sparsereg.vocabulary": Part(lambda v: _is_count(v, 1), "an integer >= 1 or null", optional=True),
    "sparsereg.inputs": Part(is_described, "types and shapes of inputs by name", optional=True),
    "sparsereg.gated": _SWITCH,
    "sparsereg.batch_norm_is_current": _SWITCH,
    "sparsereg.structure": Part(_TEXT.fits, "a network's structure or null", optional=True),
    "sparsereg.data": Part(_is_mapping, "a description of the data", optional=True),
    "sparsereg.version": Part(_TEXT.fits, "a version", optional=True),
    "sparsereg.before": Part(_is_mapping, "the stage under gates or null", optional=True),
}
"""What every checkpoint has, by dotted name."""
BEFORE: dict[str, Part] = {
    "config": _MAPPING,
    "config.model": _MAPPING,
    "config.model.name": _NAME,
    "config.data": _MAPPING,
    "config.data.name": _NAME,
    "results": _MAPPING,
    "results.checkpoint": Part(_TEXT.fits, "a file", optional=True),
    **{f"results.{stage}_{name}": _FIGURE for stage in ("val", "test") for name in FIGURES},
    **{f"results.{key}": _SHARE for key in ("L_C0", "expected_sparsity", "exact_sparsity")},
    **{
        f"results.{key}": _COUNT
        for key in (
            "gates",
            "open_gates",
            "parameters",
            "compacted_parameters",
            "macs",
            "compacted_macs",
            "seed",
            "epochs",
        )
    },
}
"""What the stage before fine-tuning has."""
RESUMED: dict[str, Part] = {
    "global_step": _COUNT,
    "pytorch-lightning_version": Part(
        lambda v: isinstance(v, str) and re.fullmatch(r"\d+(\.\w+)+", v) is not None, "a version"
    ),
    "loops": _MAPPING,
    "callbacks": _MAPPING,
    "optimizer_states": _LIST,
    "lr_schedulers": _LIST,
    "current_model_state": Part(_are_weights, _WEIGHTS.expected, optional=True),
    "averaging_state": Part(_are_weights, _WEIGHTS.expected, optional=True),
}
"""What a checkpoint has besides, from which a run is resumed."""


def check_parts(content: dict[str, Any], parts: dict[str, Part], named: str, within: str = "") -> None:
    """Check that a checkpoint has its parts and that each is what it must be.

    Args:
        content: of the file, or of a part of it.
        parts: by dotted name; a part comes behind the one that holds it.
        named: the setting and the file, for messages.
        within: the dotted name of ``content`` and a dot.

    Raises:
        InputError: one is missing or something else.
    """
    for path, part in parts.items():
        *above, key = path.split(".")
        holder: Any = content
        for name in above:
            holder = holder[name]
        if (part.optional and holder.get(key) is None) or (part.unless and part.unless in holder):
            continue
        if key not in holder:
            raise InputError(f"{named}: not a whole checkpoint, {within}{path} is missing from it")
        if not part.fits(holder[key]):
            raise InputError(f"{named}: {within}{path} in it is not {part.expected}")


def locate(path: str | Path, key: str = "ckpt_path", resume: bool = False) -> Path:
    """Return the file that a path means: itself, or the checkpoint that a run's folder ships.

    That is the checkpoint that its results.json names (by the file's name: folders may be moved), and
    last.ckpt while the run has not come to its end, or if it is to be resumed.

    Args:
        path: a checkpoint, or the folder of a run.
        key: the setting that names it.
        resume: whether the run is to be resumed.

    Raises:
        InputError: the folder is not that of a run, or has no checkpoint.
    """
    path = Path(path)
    if not path.is_dir():
        return path
    file = path / FOLDER / _shipped(path, key, resume)
    if not file.is_file():
        raise InputError(
            f"{key}={path}: the folder has no {file.relative_to(path)}; expected the folder of a run, such "
            "as outputs/train/tblog/lightning_logs/version_0, or a checkpoint"
        )
    return file


def _shipped(run: Path, key: str, resume: bool) -> str:
    results = run / RESULTS
    if resume or not results.is_file():
        return "last.ckpt"
    try:
        name = Path(json.loads(results.read_text())["checkpoint"]).name
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{key}={run}: {RESULTS} there does not name a checkpoint ({type(error).__name__}); name the "
            f"file, such as {run / FOLDER / 'last.ckpt'}"
        ) from error
    return name


def read(path: str | Path, key: str = "ckpt_path", resume: bool = False) -> Checkpoint:
    """Read a checkpoint; only tensors, numbers, strings and containers of them are ever loaded.

    Args:
        path: the file, or the folder of a run, see ``locate``.
        key: the setting that names it.
        resume: whether the run is to be resumed.

    Raises:
        InputError: the file is missing, truncated, or not a checkpoint of train.py.
    """
    path = locate(path, key, resume)
    named = f"{key}={path}"
    if not path.is_file():
        raise InputError(f"{named}: no such file; expected a checkpoint such as RUN/checkpoints/last.ckpt")
    try:
        content = load_torch(path)
    except (DamagedFile, OSError) as error:
        raise InputError(f"{named}: cannot be read as a checkpoint: {error}") from error
    if isinstance(content, dict) and content.get("format") == storage.FORMAT:
        return _compacted(path, named)
    if not isinstance(content, dict) or "sparsereg" not in content or "state_dict" not in content:
        raise InputError(f"{named}: not a checkpoint that train.py wrote")
    check_parts(content, {**PARTS, **(RESUMED if resume else {})}, named)
    foreign = [k for k in content["state_dict"] if not k.startswith("net.")]
    if foreign:
        raise InputError(f"{named}: state_dict in it has {_some(foreign)}, which train.py does not write")
    ours = content["sparsereg"]
    before = None
    if ours.get("before") is not None:
        check_parts(ours["before"], BEFORE, named, "sparsereg.before.")
        before = FirstStage(ours["before"]["config"], ours["before"]["results"])
    prefix = "net."
    return Checkpoint(
        named=named,
        path=path,
        weights={k[len(prefix) :]: v for k, v in content["state_dict"].items() if k.startswith(prefix)},
        config=ours["config"],
        form=Form.read(ours, task_of(ours["config"].get("task"))),
        gated=ours["gated"],
        # Lightning counts from 0, and before the first step none is over.
        epoch=int(content["epoch"]) + (content.get("global_step") != 0),
        content=content,
        structure=ours.get("structure"),
        batch_norm_is_current=bool(ours["batch_norm_is_current"]),
        before=before,
        data=ours.get("data") or {},
        version=ours.get("version") or "",
    )


def _compacted(path: Path, named: str) -> Checkpoint:
    """Read a file that test.py wrote with compact=true."""
    net = storage.load_compacted(path)
    notes = net.meta["notes"]
    if not isinstance(notes, dict) or "config" not in notes:
        raise InputError(f"{named}: a compacted network, but not one that test.py wrote")
    parts = {k: p for k, p in PARTS.items() if k.startswith("sparsereg.")}
    ours = {"gated": False, "batch_norm_is_current": True, **notes}
    check_parts({"sparsereg": ours}, parts, named)
    return Checkpoint(
        named=named,
        path=path,
        weights=net.state_dict(),
        config={**notes["config"], "model": {"name": COMPACTED}},
        form=Form.read(notes, task_of(notes["config"].get("task"))),
        gated=False,
        epoch=0,
        content={},
        structure=storage.describe(net),
    )


def group_choices(arguments: list[str]) -> list[str]:
    """Return the choices ``model=``, ``data=`` and ``task=`` of the checkpoint that the arguments name.

    Args:
        arguments: of train.py or test.py, such as ``ckpt_path=F``.

    Raises:
        InputError: the checkpoint cannot be read.
    """
    paths = [a.partition("=")[2].strip("'\"") for a in arguments if a.startswith("ckpt_path=")]
    informative = any(a in ("-h", "--help", "--hydra-help", "--info", "-i") for a in arguments)
    experiment = any(a.startswith("experiment=") for a in arguments)
    if not paths or paths[-1] in ("", "null") or "," in paths[-1] or informative or experiment:
        return []
    resume = [a.partition("=")[2].lower() for a in arguments if a.startswith("resume_training=")]
    checkpoint = read(paths[-1], resume=resume[-1:] == ["true"])
    config = checkpoint.run_config if resume[-1:] == ["true"] else checkpoint.config
    chosen = {"model": group_of(config["model"]), "data": source_of(config["data"])}
    if config.get("task") is not None:
        chosen["task"] = task_of(config["task"])
    given = {a.lstrip("+").partition("=")[0] for a in arguments}
    stored = {
        f"{key}.{name}": value
        for key in chosen
        if key not in given
        for name, value in own_code.code_in(config[key]).items()
    }
    own_code.check_repeated(stored, dict.fromkeys(given), checkpoint.named)
    for key, known in (("model", NETWORKS), ("data", SOURCES), ("task", TASKS)):
        if key in chosen and chosen[key] not in known:
            raise InputError(
                f"{checkpoint.named} is of {key}={chosen[key]}, which is none of {', '.join(known)}"
            )
    return [f"{key}={choice}" for key, choice in chosen.items()]


def check_values(node: Any, path: str = "") -> None:
    """Check that a configuration holds plain values only, none of which asks to be looked up elsewhere.

    Raises:
        InputError: it does not.
    """
    if isinstance(node, dict):
        for key, value in node.items():
            if not isinstance(key, str):
                raise InputError(f"{path or 'a setting'} has a key that is no text")
            check_values(value, f"{path}.{key}" if path else key)
    elif isinstance(node, list | tuple):
        for value in node:
            check_values(value, path)
    elif isinstance(node, str) and "${" in node:
        raise InputError(f"{path} holds an interpolation; a checkpoint has values only")
    elif not (node is None or isinstance(node, bool | int | float | str)):
        raise InputError(f"{path} is of type {type(node).__name__}; a checkpoint has plain values only")


def gate_keys(net: nn.Module) -> set[str]:
    """Return the keys of a network's state dict that belong to its gates, shared ones under every name."""
    return {
        f"{name}.{key}" if name else key
        for name, gate in net.named_modules(remove_duplicate=False)
        if isinstance(gate, HardConcrete)
        for key in gate.state_dict()
    }


def load_weights_(net: nn.Module, checkpoint: Checkpoint) -> tuple[str, ...]:
    """Start a network from a checkpoint: everything must fit but the gates, which may be new.

    Args:
        net: changed in place.
        checkpoint: of the same network, with or without gates.

    Returns:
        The keys that the checkpoint does not have: gates, which stay as they were initialised.

    Raises:
        InputError: a key is missing, left over or of another shape.
    """
    own = net.state_dict()
    gates = gate_keys(net)
    absent = [k for k in own if k not in checkpoint.weights]
    new = tuple(k for k in absent if k in gates)
    problems = {
        "missing in it": [k for k in absent if k not in gates],
        "unknown here": [k for k in checkpoint.weights if k not in own],
        "of another shape": [
            f"{k} {tuple(v.shape)} for {tuple(own[k].shape)}"
            for k, v in checkpoint.weights.items()
            if k in own and v.shape != own[k].shape
        ],
        "of another type": [
            f"{k} {v.dtype} for {own[k].dtype}"
            for k, v in checkpoint.weights.items()
            if k in own and v.is_floating_point() != own[k].is_floating_point()
        ],
        "not finite": [k] if (k := not_finite(checkpoint.weights, _parameters(net))) else [],
    }
    found = [f"{what}: {_some(keys)}" for what, keys in problems.items() if keys]
    if 0 < len(new) < len(gates):
        found.append(f"it has only some of the gates; missing: {_some(list(new))}")
    if found:
        raise InputError(f"{checkpoint.named} does not fit this network: {'; '.join(found)}")
    net.load_state_dict({**{k: own[k] for k in new}, **checkpoint.weights})
    return new


def _parameters(net: nn.Module) -> set[str]:
    """Return the names of what is trained, shared parameters under every name."""
    return {name for name, _ in net.named_parameters(remove_duplicate=False)}


def load_all_weights_(net: nn.Module, checkpoint: Checkpoint) -> None:
    """Load a checkpoint that has everything, gates included.

    Raises:
        InputError: something is missing, left over or of another shape.
    """
    new = load_weights_(net, checkpoint)
    if new:
        raise InputError(f"{checkpoint.named} does not fit this network: missing in it: {_some(list(new))}")


def _some(keys: list[str], most: int = 4) -> str:
    more = f" and {len(keys) - most} more" if len(keys) > most else ""
    return ", ".join(keys[:most]) + more
