"""From settings to the objects of a run: data, network, LightningModule."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor, nn

from sparsereg import data as data_sources
from sparsereg import own_code
from sparsereg.compression import storage
from sparsereg.data import ImageDataModule
from sparsereg.data.batches import only
from sparsereg.data.cifar10 import Cifar10
from sparsereg.data.form import Form
from sparsereg.data.mnist import Mnist
from sparsereg.data.own import RunData
from sparsereg.errors import InputError
from sparsereg.model.batch_norm_statistics import estimate_batch_norm_
from sparsereg.penalties import hard_concretes
from sparsereg.settings import declared, plain, read
from sparsereg.temperature import update_temperatures
from sparsereg.training import checkpoint as checkpoints
from sparsereg.training.checkpoint import Checkpoint, FirstStage
from sparsereg.training.config import Training, check_pair
from sparsereg.training.distillation import Distillation
from sparsereg.training.module import Learner, RunNotes
from sparsereg.training.tasks import registry
from sparsereg.training.tasks.config import CONFIGS as TASKS
from sparsereg.zoo import networks
from sparsereg.zoo.config import weights_file
from sparsereg.zoo.network import Network
from sparsereg.zoo.torchvision import load_weights_file_

log = logging.getLogger(__name__)


def build_data(cfg: Training, checkpoint: Checkpoint | None = None) -> RunData:
    """Build the data module and load the data, so that everything wrong with it shows before training.

    A place that a checkpoint names is only read: nothing is fetched into it.
    """
    module = data_sources.build(cfg.data, seed=cfg.seed, channels_last=cfg.trainer.channels_last)
    said = _place_named_by(cfg, checkpoint)
    if said and isinstance(module, ImageDataModule) and isinstance(module.source, Cifar10 | Mnist):
        module.source = replace(module.source, fetch=False)
    try:
        module.prepare_data()
    except InputError as error:
        raise InputError(f"{error}{said}") from error
    module.setup()
    return module


def _place_named_by(cfg: Training, checkpoint: Checkpoint | None) -> str:
    """Say for messages that the place of the data comes from the checkpoint; empty if it does not."""
    if checkpoint is None:
        return ""
    mine, theirs, settings = plain(cfg.data), checkpoint.run_config["data"], declared(type(cfg.data))
    for key in ("path", "root"):
        value = mine.get(key) if key in settings else None
        if value is not None and value == theirs.get(key) and value != settings[key].default:
            return f" (named by {checkpoint.named}); where the data are elsewhere, name them with data.{key}"
    return ""


@contextmanager
def _made_from(checkpoint: Checkpoint | None) -> Iterator[None]:
    """Within this context a network is built from what a checkpoint says: what fails is its fault."""
    try:
        yield
    except InputError as error:
        if checkpoint is None or error.args[0].startswith(checkpoint.named):
            raise
        raise InputError(f"{checkpoint.named}: its network cannot be read: {error}") from error
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RuntimeError) as error:
        if checkpoint is None:
            raise
        said = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise InputError(f"{checkpoint.named}: its network cannot be read: {said}") from error


def build_network(cfg: Training, data: RunData, checkpoint: Checkpoint | None = None) -> nn.Module:
    """Build the network with gates at ``droprate_init``, or without any.

    Args:
        cfg: the configuration.
        data: loaded.
        checkpoint: has the structure of a compacted network.
    """
    torch.manual_seed(cfg.seed)  # the initial weights
    if checkpoint is not None and checkpoint.structure is not None:
        _check_data(checkpoint, data)
        return in_memory_format(cfg, restore(checkpoint).train())
    with _made_from(checkpoint):
        net = networks.build(
            cfg.model,
            form_of(cfg, data),
            gated=cfg.gated,
            pretrained=checkpoint is None,
            shape=cfg.shape,
            droprate_init=cfg.droprate_init,
            temperature=cfg.temperature.initial,
        )
    weights = weights_file(cfg.model)
    if checkpoint is None and weights is not None:
        load_weights_file_(net, weights)
    return in_memory_format(cfg, net)


def in_memory_format(cfg: Training, net: nn.Module) -> nn.Module:
    """Lay a network's convolutions out in memory as ``trainer.channels_last`` says."""
    return net.to(memory_format=torch.channels_last) if cfg.trainer.channels_last else net


def form_of(cfg: Training, data: RunData) -> Form:
    """Return what a network for these data and this task is built for."""
    return replace(data.form, task=cfg.task.name)


def resolved(cfg: Training, data: RunData) -> Training:
    """Return the settings with what their files hold, and with the task of the data where none is named.

    Raises:
        InputError: network, data and task do not go together.
    """
    if cfg.task.name == "auto":
        if data.form.task not in registry.TASKS:
            raise InputError(
                f"{cfg.data.said}: its labels are of none of the tasks {', '.join(registry.TASKS)}: name one,"
                " or your own with task._target_=my_module.Task"
            )
        cfg = replace(cfg, task=TASKS[data.form.task]())
    elif isinstance(data, ImageDataModule):
        check_pair(cfg.data.said, (data.form.task,), cfg.task, "labels")
    check_pair(cfg.model.said, cfg.model.TASKS, cfg.task, "a network")
    return replace(cfg, model=networks.resolved(cfg.model))


def _check_data(checkpoint: Checkpoint, data: RunData) -> None:
    """Raise an InputError unless the data have the classes and the shape that the network was made for."""
    have, made = data.form, checkpoint.form
    same = all(
        getattr(have, key) == getattr(made, key) for key in ("num_classes", "image_shape", "vocabulary")
    )
    if not same or not set(made.inputs or ()) <= set(have.inputs or ()):
        raise InputError(
            f"the data have {_in_words(have)}, but {checkpoint.named} was trained on {_in_words(made)}"
        )


def _in_words(form: Form) -> str:
    noun = "images" if form.vocabulary is None else f"texts of {form.vocabulary} tokens,"
    by_name = "" if form.inputs is None else f" by name, {', '.join(form.inputs)}"
    return f"{form.num_classes} classes of {noun} {tuple(form.image_shape)}{by_name}"


def build_module(
    cfg: Training,
    net: nn.Module,
    data: RunData,
    structure: str | None = None,
    distillation: Distillation | None = None,
    before: FirstStage | None = None,
) -> Learner:
    """Build the LightningModule around a network.

    Args:
        cfg: the configuration.
        net: the network.
        data: loaded.
        structure: of a compacted network.
        distillation: a teacher, see ``build_teacher``.
        before: of fine-tuning, the stage under gates.
    """
    form = form_of(cfg, data).taken_by(net)
    task = registry.build(cfg.task, form)
    if cfg.label_smoothing and not task.smooths:
        raise InputError(
            f"label_smoothing={cfg.label_smoothing:g}: the loss of {cfg.task.said} takes no label_smoothing; "
            "leave it out"
        )
    notes = RunNotes(
        config=plain(cfg),
        form=form,
        gated=bool(hard_concretes(net)),
        structure=structure,
        before=None if before is None else asdict(before),
        data=data.describe(),
    )
    module = Learner(
        net,
        task,
        0.0 if cfg.lambda_l0 is None or cfg.has_target else cfg.lambda_l0,
        cfg.optimizer,
        notes,
        cfg.lambda_l2,
        cfg.trainer.compile,
        cfg.penalty,
        distillation,
        cfg.label_smoothing,
        steady_gates=cfg.has_target,
    )
    if cfg.trainer.compile:
        net.compile()  # in place: torch.compile(net) would rename the keys of the state dict
    return module


def build_teacher(cfg: Training, data: RunData) -> Distillation | None:
    """Build the network that ``distill.ckpt_path`` names, if it names one.

    Raises:
        InputError: it cannot be read, or was trained on other classes or shapes of images.
    """
    d = cfg.distill
    if d.ckpt_path is None:
        return None
    checkpoint = checkpoints.read(d.ckpt_path, "distill.ckpt_path")
    _check_data(checkpoint, data)
    teacher = in_memory_format(cfg, restore(checkpoint, _teacher_of_own_code(cfg, checkpoint)))
    if not checkpoint.batch_norm_is_current:  # it teaches as the network that test.py would test
        settings = checkpoint.config.get("callbacks", {}).get("batch_norm", plain(cfg.callbacks.batch_norm))
        if settings["num_images"]:
            taken = form_of(cfg, data).taken_by(teacher).inputs
            estimate_batch_norm_(teacher, (only(x, taken) for x in data.estimation_batches(**settings)))
    return Distillation(teacher, d.weight, d.temperature, unchanging(data))


_KEPT_BYTES = 2**28
"""Memory that a teacher's answers to all training images may take."""


def unchanging(data: RunData) -> Callable[[], Iterator[Tensor]] | None:
    """Give batches of all training images if each epoch shows them as they are and has few classes."""
    if not isinstance(data, ImageDataModule) or data.form.task != "classification":
        return None
    changed = data.augmentation is not None and not data.augmentation.identity
    if changed or 4 * data.num_train * data.num_classes > _KEPT_BYTES:
        return None
    return lambda: data.estimation_batches(data.num_train)


def _teacher_of_own_code(cfg: Training, checkpoint: Checkpoint) -> Network | None:
    """Return the settings of a teacher of the user's code, whose class is the pupil's; None for other ones.

    Raises:
        InputError: its class is another one, which nobody but a file has named.
    """
    stored = checkpoint.config["model"]
    if checkpoint.structure is not None or not own_code.is_own(stored):
        return None
    if own_code.code_in(stored) != own_code.code_in(plain(cfg.model)):
        raise InputError(
            f"{checkpoint.named} is a network of your own code, model._target_={stored[own_code.TARGET]}, "
            "and not of the class that is trained: give the compacted.pt that test.py compact=true makes"
        )
    return read(Network, stored, "model")


def restore(checkpoint: Checkpoint, settings: Network | None = None) -> nn.Module:
    """Build the network of a checkpoint with its weights, gates and temperatures.

    Args:
        checkpoint: of a gated, plain or compacted network.
        settings: of the model, where the user changed some; those of the checkpoint if None.

    Raises:
        InputError: the checkpoint does not fit the network.
    """
    with _made_from(checkpoint):
        if checkpoint.structure is not None:
            return storage.rebuild(checkpoint.structure, checkpoint.weights)
        net = networks.build(
            checkpoint.config["model"] if settings is None else settings,
            checkpoint.form,
            gated=checkpoint.gated,
            shape=str(checkpoint.config.get("shape", "free")),
        )
    checkpoints.load_all_weights_(net, checkpoint)
    return net


def start_weights(net: nn.Module, checkpoint: Checkpoint, cfg: Training) -> None:
    """Load the weights of a checkpoint for a new run, and say what they did not have."""
    log.info("weights: from %s", checkpoint.path)
    if checkpoint.structure is not None:
        return  # it was built with them
    new = checkpoints.load_weights_(net, checkpoint)
    if new:
        parameters = [k for k in new if not k.endswith("_extra_state")]
        log.info("initialised anew at droprate_init=%g: %s", cfg.droprate_init, ", ".join(parameters))
        update_temperatures(net, cfg.temperature.initial)
    elif checkpoint.gated:
        log.info("the gates continue from the checkpoint")


def statistics_fit(cfg: Training, net: nn.Module, checkpoint: Checkpoint | None) -> bool:
    """Whether the BatchNorm statistics that a network starts with are those of its weights.

    They are where they come with the weights: from a checkpoint that says so, or from a file of weights.
    New gates change the activations, and the statistics of a network that starts anew are no statistics.
    """
    if checkpoint is None:
        return weights_file(cfg.model) is not None and not hard_concretes(net)
    return checkpoint.batch_norm_is_current and checkpoint.gated == bool(hard_concretes(net))


def rebuild_network(cfg: Training, checkpoint: Checkpoint, data: RunData) -> nn.Module:
    """Build the network of a checkpoint with its weights, gates and temperatures.

    Raises:
        InputError: the checkpoint does not fit the network, or the data do not fit the checkpoint.
    """
    _check_data(checkpoint, data)
    return in_memory_format(cfg, restore(checkpoint, cfg.model))


def example_input(data: RunData, net: nn.Module) -> Any:
    """Return one example of zeros where a network is and of its type, for tracing."""
    like = next(p for p in net.parameters() if p.is_floating_point())
    return data.form.taken_by(net).example(1, like.device, like.dtype)


def hyperparameters(config: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that TensorBoard's HParams tab compares runs by, as flat numbers and strings."""
    flat: dict[str, Any] = {}

    def walk(node: dict[str, Any], prefix: str) -> None:
        for key, value in node.items():
            if isinstance(value, dict):
                walk(value, f"{prefix}{key}/")
            elif isinstance(value, bool | str):
                flat[f"{prefix}{key}"] = str(value)
            elif isinstance(value, int | float):
                flat[f"{prefix}{key}"] = value

    left_out = ("callbacks", "logger", "trainer", "rerun", "objective")
    walk({k: config[k] for k in config if k not in left_out}, "")
    flat["max_epochs"] = config["trainer"]["max_epochs"]
    return flat
