"""Networks by name, as the configuration group ``model`` names them."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from sparsereg import targets
from sparsereg.data.batches import call, tensor_of
from sparsereg.data.form import Form
from sparsereg.errors import InputError
from sparsereg.penalties import hard_concretes
from sparsereg.settings import keys, read
from sparsereg.zoo.config import HuggingFaceModel, Network, OwnNetwork


def _googlenet(
    form: Form, gated: bool, gates: dict[str, Any], *, gate: str, act: str, sampling: str
) -> nn.Module:
    from sparsereg.model.googlenet import GoogleNet

    return GoogleNet(
        form.num_classes,
        form.image_shape[0],
        gate=gate if gated else "none",
        act=act,
        sampling=sampling,
        **gates,
    )


def _lenet300(form: Form, gated: bool, gates: dict[str, Any], **settings: Any) -> nn.Module:
    from sparsereg.model.lenet import LeNet300

    gate = "units" if gated else "none"
    return LeNet300(form.num_classes, form.image_shape, gate=gate, **_with_rates(settings, gates))


def _lenet5(form: Form, gated: bool, gates: dict[str, Any], **settings: Any) -> nn.Module:
    from sparsereg.model.lenet import LeNet5

    gate = "units" if gated else "none"
    return LeNet5(form.num_classes, form.image_shape, gate=gate, **_with_rates(settings, gates))


def _with_rates(settings: dict[str, Any], gates: dict[str, Any]) -> dict[str, Any]:
    """Let ``model.droprate_init``, one rate for each group of gates, win over the one for all."""
    return gates | {k: v for k, v in settings.items() if k != "droprate_init" or v is not None}


def _sparse_mlp(form: Form, gated: bool, gates: dict[str, Any], **settings: Any) -> nn.Module:
    from sparsereg.model.sparse_mlp import SparseMLP

    gate = "weights" if gated else "none"
    return SparseMLP(form.num_classes, form.image_shape, gate=gate, **settings, **gates)


def _gpt(
    form: Form, gated: bool, gates: dict[str, Any], *, positions: str, tied: bool, **sizes: Any
) -> nn.Module:
    from sparsereg.model.gpt import GPT, TextClassifier
    from sparsereg.model.transformer import Shape

    assert form.vocabulary is not None  # its tasks are those of texts
    read = (form.vocabulary, form.image_shape[0], Shape(**sizes), positions)
    net = GPT(*read, tied) if form.task == "language_model" else TextClassifier(form.num_classes, *read)
    return with_gates(net, form, "model=gpt", gates) if gated else net


def _vit(form: Form, gated: bool, gates: dict[str, Any], *, patch_size: int, **sizes: Any) -> nn.Module:
    from sparsereg.model.transformer import Shape
    from sparsereg.model.vit import ViT

    net = ViT(form.num_classes, form.image_shape, patch_size, Shape(**sizes))
    return with_gates(net, form, "model=vit", gates) if gated else net


def _unet(form: Form, gated: bool, gates: dict[str, Any], *, width: int, depth: int) -> nn.Module:
    from sparsereg.model.unet import UNet

    net = UNet(form.num_classes, form.image_shape[0], width, depth)
    return with_gates(net, form, "model=unet", gates) if gated else net


def _torchvision(
    form: Form, gated: bool, gates: dict[str, Any], *, name: str, weights: str | None, **settings: Any
) -> nn.Module:
    from sparsereg.zoo.torchvision import torchvision_network

    # The file of weights is read where training starts: checkpoints have weights of their own.
    return torchvision_network(
        name,
        form.num_classes,
        form.image_shape,
        gated=gated,
        task=form.task,
        **settings,
        **(gates if gated else {}),
    )


def _timm(
    form: Form,
    gated: bool,
    gates: dict[str, Any],
    *,
    name: str,
    weights: str | None,
    arguments: dict[str, Any],
) -> nn.Module:
    from sparsereg.zoo.timm import timm_network

    said = f"model.name={name}"
    net = timm_network(name, form, arguments)
    check_answer(net, form, said)
    return with_gates(net, form, said, gates) if gated else net


def _huggingface(
    form: Form, gated: bool, gates: dict[str, Any], *, name: str, pretrained: bool, **settings: Any
) -> nn.Module:
    from sparsereg.zoo.huggingface import huggingface_network

    config = settings["described"] or {"model_type": name}
    folder = settings["config"] if pretrained else None
    net = huggingface_network(form, config, settings["arguments"], folder)
    said = f"model=huggingface (of type {config['model_type']})"
    check_answer(net, form, said)
    return with_gates(net, form, said, gates) if gated else net


def resolved(settings: Network) -> Network:
    """Return the settings of a network with what the files that they name hold.

    Raises:
        InputError: a file is missing or wrong, or none is named where one is needed.
    """
    if not isinstance(settings, HuggingFaceModel) or settings.described is not None:
        return settings
    if settings.config is None:
        if not settings.name:
            raise InputError(
                "model=huggingface needs model.config=FILE.json, a local folder, or a type: model.name=bert"
            )
        return settings
    from sparsereg.zoo.huggingface import described

    found = described(settings.config)
    kind = found["model_type"]
    if settings.name not in ("", kind):
        raise InputError(
            f"model.config={settings.config} is of type {kind}, not of model.name={settings.name}"
        )
    return replace(settings, name=kind, described=found)


def _compacted(form: Form, gated: bool, gates: dict[str, Any], **settings: Any) -> nn.Module:
    raise InputError("model=compacted has its structure in its file: give ckpt_path=.../compacted.pt")


def _own(settings: OwnNetwork, form: Form, gated: bool, gates: dict[str, Any]) -> nn.Module:
    """Build the network that the user named; put gates into it if it should have some and has none."""
    said = f"model._target_={settings._target_}"
    offered = {**_offered(form), "gated": gated, **gates}
    net = targets.call(settings.spec, "model", **offered)
    if not isinstance(net, nn.Module):
        raise InputError(f"{said}: expected a torch.nn.Module, it makes a {type(net).__name__}")
    check_answer(net, form, said)
    own_gates = bool(hard_concretes(net))
    if own_gates and not gated:
        raise InputError(
            f"{said}: the network has gates of its own, but none are wanted (without_using_gate=true): take"
            " an argument gated in its constructor, which is false then"
        )
    if own_gates or not gated:
        return net
    return with_gates(net, form, said, gates)


def _offered(form: Form) -> dict[str, Any]:
    """Return what a network of the user's is given, too, where its signature has the names."""
    offered: dict[str, Any] = {"num_classes": form.num_classes, "image_shape": form.image_shape}
    if form.vocabulary is None:
        return {**offered, "in_channels": form.image_shape[0]}
    return {**offered, "vocabulary": form.vocabulary, "context": form.image_shape[0]}


def with_gates(net: nn.Module, form: Form, said: str, gates: dict[str, Any]) -> nn.Module:
    """Return a network with gates on what can go.

    Args:
        net: without gates.
        form: what it reads.
        said: setting that names it, for messages.
        gates: their settings.

    Raises:
        InputError: nothing of it can be gated, or it cannot be traced.
    """
    from sparsereg.compression import gate

    try:
        return gate(net, form.taken_by(net).example(), **gates)
    except (ValueError, TypeError) as error:
        raise InputError(
            f"{said}: cannot be gated: {error}; without_using_gate=true trains it without gates"
        ) from error


def check_answer(net: nn.Module, form: Form, said: str) -> None:
    """Raise an InputError unless a network answers to an example of the data as the task expects it."""
    training = net.training
    try:
        with torch.no_grad():
            answer = tensor_of(call(net.eval(), form.taken_by(net).example(2)))
    except InputError as error:
        raise InputError(f"{said}: {error}") from error
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise InputError(f"{said}: cannot read {_read(form)}: {reason}") from error
    finally:
        net.train(training)
    if form.answer_shape is None:
        return
    expected = (2, *form.answer_shape)
    if not isinstance(answer, Tensor) or not _fits(tuple(answer.shape), expected, form.task):
        found = f"shape {tuple(answer.shape)}" if isinstance(answer, Tensor) else f"a {type(answer).__name__}"
        raise InputError(
            f"{said}: expected logits of shape {expected} for two {_noun(form)}, as task={form.task} needs"
            f" them, got {found}"
        )
    if form.task == "language_model":
        _check_causal(net, form, said)


@torch.no_grad()
def _check_causal(net: nn.Module, form: Form, said: str) -> None:
    """Raise an InputError if a language model's answers depend on the tokens that it is to predict."""
    inputs = form.taken_by(net).example(2)
    tokens = inputs if isinstance(inputs, Tensor) else next(v for k, v in inputs.items() if "mask" not in k)
    if tokens.shape[1] < 2 or not form.vocabulary or form.vocabulary < 2:
        return
    tokens[1, -1] = 1
    training = net.training
    first, second = tensor_of(call(net.eval(), inputs))[:, :-1]
    net.train(training)
    if not torch.allclose(first, second, rtol=1e-3, atol=1e-5):
        raise InputError(
            f"{said}: its answer at a place depends on tokens behind it, which task=language_model lets it "
            "predict: its attention has to be causal"
        )


def _fits(found: tuple[int, ...], expected: tuple[int, ...], task: str) -> bool:
    """Whether an answer has the right shape; masks may be answered on a coarser grid."""
    if task == "segmentation":
        return len(found) == len(expected) and found[:2] == expected[:2]
    return found == expected


def _noun(form: Form) -> str:
    return "texts" if form.vocabulary is not None else "images"


def _read(form: Form) -> str:
    if form.inputs is not None:
        return f"inputs by name, {', '.join(form.inputs)}"
    return f"{_noun(form)} of shape {form.image_shape}"


NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "googlenet": _googlenet,
    "lenet300": _lenet300,
    "lenet5": _lenet5,
    "sparse_mlp": _sparse_mlp,
    "gpt": _gpt,
    "vit": _vit,
    "unet": _unet,
    "torchvision": _torchvision,
    "timm": _timm,
    "huggingface": _huggingface,
    "compacted": _compacted,
}
"""Name to builder(form, gated, gate settings, **the other keys of the group)."""


def build(
    settings: Network | Mapping[str, Any], form: Form, gated: bool, pretrained: bool = False, **gates: Any
) -> nn.Module:
    """Build the network that the configuration group ``model`` describes.

    Args:
        settings: of the network, or its keys with ``name`` among them; see ``sparsereg.zoo.config``.
        form: what the data look like, and the task.
        gated: False leaves every gate out.
        pretrained: whether weights are read that a folder of the settings has.
        **gates: settings of the gates, e.g. droprate_init and temperature.

    Raises:
        InputError: unknown name or unknown key.
        ValueError: a value is outside its range.
    """
    chosen = settings if isinstance(settings, Network) else read(Network, settings, "model")
    if isinstance(chosen, OwnNetwork):
        if chosen is not settings:
            raise InputError(f"model._target_={chosen._target_} comes from a file, which is data")
        return _own(chosen, form, gated, gates)
    values = {name: getattr(chosen, name) for name in keys(type(chosen))}
    values.pop("source" if "source" in values else "name")
    if chosen.OTHERS is not None:
        values[chosen.OTHERS] = dict(getattr(chosen, chosen.OTHERS))
    if isinstance(chosen, HuggingFaceModel):
        values["pretrained"] = pretrained
    return NETWORKS[chosen.group](form, gated, gates, **values)
