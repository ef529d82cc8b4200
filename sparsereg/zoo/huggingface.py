"""Networks of Hugging Face's transformers: from a configuration or a local folder, never from the network."""

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparsereg.data.form import Form
from sparsereg.errors import InputError, nearest
from sparsereg.extras import need

log = logging.getLogger(__name__)

FILE = "config.json"
WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY")
"""Switches that keep transformers from the network."""
LEFT_OUT = ("auto_map", "_name_or_path", "architectures", "transformers_version", "quantization_config")
"""What of a configuration is not used: names of code, places on the hub."""
AUTO = {
    "classification": "AutoModelForImageClassification",
    "segmentation": "AutoModelForSemanticSegmentation",
    "language_model": "AutoModelForCausalLM",
    "text_classification": "AutoModelForSequenceClassification",
}
"""The class that finds the network of each task; of a task of the user's ``AutoModel``."""
_LARGEST = 2**22


def described(config: str) -> dict[str, Any]:
    """Return what a configuration holds.

    Args:
        config: a file, or a folder with ``config.json`` in it.

    Raises:
        InputError: there is no such file, or it is no configuration.
    """
    path = Path(config).expanduser()
    said = f"model.config={config}"
    if not path.exists():
        raise InputError(
            f"{said}: no such file or folder; names on the Hugging Face hub are not looked up, nothing is "
            "fetched: give a config.json, a local folder, or a type with model.name=bert"
        )
    file = path / FILE if path.is_dir() else path
    if not file.is_file():
        raise InputError(f"{said}: expected a file, or a folder with {FILE} in it")
    try:
        if file.stat().st_size > _LARGEST:
            raise ValueError("it is too large for a configuration")
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{said}: cannot be read as JSON: {str(error)[:200]}") from error
    if not isinstance(found, dict) or not isinstance(found.get("model_type"), str):
        raise InputError(f"{said}: expected a configuration of transformers, with a model_type")
    if "${" in json.dumps(found):
        raise InputError(f"{said}: holds an interpolation; a configuration has values only")
    return {key: value for key, value in found.items() if key not in LEFT_OUT}


def huggingface_network(
    form: Form, settings: Mapping[str, Any], changes: Mapping[str, Any], folder: str | None = None
) -> nn.Module:
    """Build a network with random weights, or with those of a local folder.

    Vocabulary, classes, channels and size of the images become those of the data.

    Args:
        form: what it is built for.
        settings: of its configuration, ``model_type`` among them.
        changes: the user's, which win.
        folder: with weights; None, or one without any: they are random.

    Raises:
        InputError: there is no such type, it has no network for the task, or a setting does not fit.
        MissingExtra: transformers is not installed.
    """
    need("huggingface", "transformers")
    for switch in OFFLINE:
        os.environ[switch] = "1"
    import huggingface_hub
    import transformers

    huggingface_hub.constants.HF_HUB_OFFLINE = True  # also where somebody has imported it before
    messages: Any = transformers.utils.logging
    messages.set_verbosity_error()
    messages.disable_progress_bar()
    kind = str(settings["model_type"])
    said = f"model=huggingface (of type {kind})"
    weights = _with_weights(folder)
    config = _config(transformers, {**settings, **changes}, kind)
    _fit_(config, form, changes, pretrained=weights is not None)
    auto = getattr(transformers, AUTO.get(form.task, "AutoModel"))
    try:
        if weights is None:
            made: nn.Module = auto.from_config(config, dtype=torch.float32)
        else:
            log.info("weights: from %s", weights)
            made = auto.from_pretrained(
                weights,
                config=config,
                dtype=torch.float32,
                local_files_only=True,
                use_safetensors=True,
                ignore_mismatched_sizes=True,
            )
    except (ValueError, TypeError, OSError, RuntimeError, ImportError, LookupError, AttributeError) as error:
        text = str(error)
        reason = (
            f"transformers has no network of this type for task={form.task}"
            if "Unrecognized configuration class" in text
            else f"{type(error).__name__}: {text.partition(chr(10))[0][:300]}"
        )
        raise InputError(f"{said}: {reason}") from error
    return made.train()


def _with_weights(folder: str | None) -> str | None:
    """Return a folder if it has weights in a format that holds nothing but tensors."""
    if folder is None:
        return None
    path = Path(folder).expanduser()
    if any((path / name).is_file() for name in WEIGHTS):
        return str(path)
    if (path / "pytorch_model.bin").is_file():
        raise InputError(
            f"model.config={folder}: its weights are a pickle, pytorch_model.bin, which is not read: convert "
            "them to model.safetensors"
        )
    return None


def _config(transformers: Any, settings: Mapping[str, Any], kind: str) -> Any:
    known = sorted(transformers.CONFIG_MAPPING.keys())
    if kind not in known:
        raise InputError(
            f"model.name={kind}: transformers has no type of that name{nearest(kind, known)}; names on the "
            "Hugging Face hub are not looked up"
        )
    rest = {key: value for key, value in settings.items() if key != "model_type"}
    try:
        config = transformers.AutoConfig.for_model(kind, **rest)
    except Exception as error:  # its classes raise what their checks do
        text = str(error).partition("\n")[0][:300]
        raise InputError(f"model=huggingface (of type {kind}): its configuration: {text}") from error
    return config


def _fit_(config: Any, form: Form, changes: Mapping[str, Any], pretrained: bool) -> None:
    """Let a configuration have the vocabulary, classes, channels and image size of the data.

    Args:
        config: changed in place.
        form: of the data.
        changes: the user's own settings, which stay.
        pretrained: whether weights of its sizes are to be read.
    """
    wanted: dict[str, Any] = {"use_cache": False}
    if form.task in ("classification", "segmentation", "text_classification"):
        config.num_labels = form.num_classes
    if form.task == "language_model":
        wanted["is_decoder"] = True
    if form.vocabulary is not None:
        if pretrained and config.vocab_size < form.vocabulary:
            raise InputError(
                f"model.config: its vocabulary of {config.vocab_size} is smaller than the {form.vocabulary} "
                "tokens of the data"
            )
        if not pretrained:
            wanted["vocab_size"] = form.vocabulary
        size = config.vocab_size if pretrained else form.vocabulary
        _tokens_(config, size)
    elif not pretrained and len(form.image_shape) == 3:
        channels, height, width = form.image_shape
        wanted |= {"num_channels": channels, "image_size": height if height == width else [height, width]}
    for key, value in wanted.items():
        if hasattr(config, key) and key not in changes:
            setattr(config, key, value)


def _tokens_(config: Any, vocabulary: int) -> None:
    """Let tokens with a meaning of their own be among the vocabulary: padding is 0 where it is not."""
    for key, instead in (("pad_token_id", 0), ("bos_token_id", None), ("eos_token_id", None)):
        token = getattr(config, key, None)
        if token is None or not isinstance(token, int) or not 0 <= token < vocabulary:
            setattr(config, key, instead)
