"""From a configuration to the objects of a run: data, network, LightningModule, Trainer."""

import ctypes
import inspect
import logging
import os
import platform
import warnings
from collections.abc import Iterator, Sequence, Set
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning.callbacks import LearningRateMonitor
from pytorch_lightning.loggers import Logger
from torch import nn

import sparsereg
from sparsereg import data as data_sources
from sparsereg import own_code
from sparsereg.compression import Accountant, storage
from sparsereg.data import ImageDataModule
from sparsereg.data.batches import only
from sparsereg.data.cifar10 import Cifar10
from sparsereg.data.form import Form
from sparsereg.data.mnist import Mnist
from sparsereg.data.own import RunData
from sparsereg.errors import InputError, nearest
from sparsereg.files import new_version
from sparsereg.model.basic_l0_blocks import synchronise_batch_norm
from sparsereg.model.batch_norm_statistics import estimate_batch_norm_
from sparsereg.penalties import hard_concretes
from sparsereg.settings import declared, flat, plain, read, shown, value_at, with_value
from sparsereg.temperature import update_temperatures
from sparsereg.training import callbacks as ours
from sparsereg.training import checkpoint as checkpoints
from sparsereg.training import resume
from sparsereg.training.accounting import PlainAccountant
from sparsereg.training.averaging import WeightAverage
from sparsereg.training.checkpoint import Checkpoint, FirstStage
from sparsereg.training.checkpoint_io import WholeCheckpoints
from sparsereg.training.compaction import Compaction
from sparsereg.training.config import TIMING, Callbacks, Evaluation, Training, check_pair, two_ways
from sparsereg.training.distillation import Distillation
from sparsereg.training.ending import EndsTogether
from sparsereg.training.module import Learner, RunNotes
from sparsereg.training.progress_bar import ProgressBar
from sparsereg.training.results import measured, names
from sparsereg.training.target import SparsityTarget, TargetSettings, asked_for, measured_budget
from sparsereg.training.tasks import registry
from sparsereg.training.tasks.config import CONFIGS as TASKS
from sparsereg.training.tasks.task import Task
from sparsereg.zoo import networks
from sparsereg.zoo.config import weights_file
from sparsereg.zoo.network import Network
from sparsereg.zoo.torchvision import load_weights_file_

log = logging.getLogger(__name__)

RUN_FOLDER = "SPARSEREG_RUN_FOLDER"
"""Environment variable by which the first process tells the others of a DDP run its folder."""
OWN_TRAINER_KEYS = ("compile", "channels_last", "sync_batchnorm")
INHERITED = ("model", "data", "task")
NEVER_INHERITED = ("ckpt_path", "resume_training", "without_using_gate", "rerun", "objective")


def tune_process() -> None:
    """Set what makes training on a CPU faster and changes no result beyond denormal numbers.

    Denormals are flushed to zero. glibc is told to keep freed memory: it otherwise returns each
    activation to the system and faults it in again, a third of the time of a small network's step.
    """
    torch.set_flush_denormal(True)
    if platform.system() == "Linux" and platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of malloc.h
        libc.mallopt(mmap_threshold, 1 << 30)
        libc.mallopt(trim_threshold, (1 << 31) - 1)


def quieten_lightning() -> None:
    """Leave out what Lightning says about hardware and products, and a deprecation inside of it.

    Fine-tuning writes into the folder of the gated stage's checkpoints on purpose, and a resumed run that
    does not validate any more has no use for the state of the best checkpoint.
    """
    logging.getLogger("pytorch_lightning.utilities.rank_zero").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*LeafSpec.*", module="pytorch_lightning")
    for said in (
        "Checkpoint directory .* exists and is not empty",
        "Be aware that when using `ckpt_path`",
        "You requested to overfit but enabled .* dataloader shuffling",  # ours have a fixed order then
    ):
        warnings.filterwarnings("ignore", message=said)


def inherit(given: Training, settings: dict[str, Any], named: Set[str], source: str) -> Training:
    """Take settings over from a checkpoint; what the user named on the command line wins.

    Where a resumed run names a group with the choice that the settings have (``data=npz``), its other keys
    are taken over; another choice is taken as it is.

    Args:
        given: as the user gave them.
        settings: plain values, by top-level key.
        named: dotted keys that the user named, such as ``data.batch_size``.
        source: the checkpoint, for messages.

    Raises:
        InputError: they do not go together.
    """
    if "experiment" in named:
        return given
    own = plain(given)
    same = {k for k in INHERITED if given.resume_training and _same_choice(own[k], settings.get(k, {}))}
    merged = own | {k: v for k, v in settings.items() if k not in named or k in same}
    for path in named:
        if path.partition(".")[0] in settings and "." in path:
            merged = with_value(merged, path, value_at(own, path))
    own_code.check_repeated(_strange(merged, own), {}, source)
    try:
        return read(Training, merged)
    except InputError as error:
        raise InputError(f"with what {source} holds: {error}") from error


def _strange(merged: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """Return the names of code, by dotted key, that are not those which the user gave."""
    given = own_code.code_in(own)
    return {key: code for key, code in own_code.code_in(merged).items() if given.get(key) != code}


def _same_choice(mine: dict[str, Any], theirs: dict[str, Any]) -> bool:
    """Whether two groups are the same choice of ``model`` or ``data``."""
    return all(mine.get(k) == theirs.get(k) for k in ("source", "name", own_code.TARGET))


def resumed_settings(given: Training, config: dict[str, Any], named: Set[str]) -> dict[str, Any]:
    """Return what a resumed run takes over: of the Trainer's keys only what makes the numbers.

    A run that was told to stay on the CPU stays there; where else it runs is this command's affair.

    Args:
        given: as the user gave them.
        config: plain configuration of the run.
        named: dotted keys that the user named.
    """
    settings = {k: v for k, v in config.items() if k not in (*NEVER_INHERITED, "trainer", "logger")}
    settings["callbacks"] = own_callbacks(config)
    for key in sorted(config["callbacks"].keys() - settings["callbacks"].keys()):
        log.warning("callbacks.%s of the run is not taken from its checkpoint: name it again", key)
    theirs = config["trainer"]
    taken = {k: theirs[k] for k in resume.NUMBERS if k in theirs}
    if theirs.get("accelerator") == "cpu" and not {"trainer", "trainer.accelerator"} & named:
        taken["accelerator"] = "cpu"
    return {**settings, "trainer": {**plain(given.trainer), **taken}}


def own_callbacks(config: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of our own callbacks; those that a user added are code: no checkpoint brings it."""
    return {k: v for k, v in config["callbacks"].items() if k in declared(Callbacks)}


def start_from(cfg: Training, named: Set[str]) -> tuple[Training, Checkpoint | None]:
    """Read the checkpoint, if one is given, check it against the command, and take over what it knows.

    Args:
        cfg: as the user gave it.
        named: dotted keys that the user named.

    Raises:
        InputError: it cannot be read, or the command asks for what it cannot give.
    """
    if cfg.has_target and cfg.lambda_l0 is not None and "lambda_l0" in named:
        raise two_ways(cfg)
    if cfg.front and cfg.lambda_l0 is not None and "lambda_l0" in named:
        raise InputError(
            f"front={shown(cfg.front)} takes units out of a trained network, lambda_l0={cfg.lambda_l0:g}"
            " while it trains: give one of them"
        )
    if cfg.ckpt_path is None:
        return cfg, None
    checkpoint = checkpoints.read(cfg.ckpt_path, resume=cfg.resume_training)
    if cfg.resume_training:
        _check_resumable(cfg, checkpoint)
    else:
        _check_usable(cfg, checkpoint)
    check_stored(checkpoint)
    if cfg.resume_training:
        settings = resumed_settings(cfg, checkpoint.run_config, named)
    else:
        settings = {k: checkpoint.config[k] for k in INHERITED if k in checkpoint.config}
    cfg = inherit(cfg, settings, named - {"trainer"}, checkpoint.named)
    _check_same_model(cfg, checkpoint)
    if cfg.resume_training:
        _check_left(cfg, checkpoint)
        checkpoint = replace(checkpoint, changed=_check_changes(cfg, checkpoint))
    elif checkpoint.gated and "droprate_init" in named:
        log.warning("droprate_init has no effect: the checkpoint has its own gates")
    return cfg, checkpoint


def _check_changes(cfg: Training, checkpoint: Checkpoint) -> dict[str, tuple[Any, Any]]:
    """Refuse or say what a resumed run changes of its settings; return what was said.

    Raises:
        InputError: it would be another run.
    """
    first_over = checkpoint.before is not None or not _is_left(cfg.trainer.max_epochs, checkpoint.epoch)
    tuned = 0 if checkpoint.before is None else checkpoint.epoch
    epochs_left = not first_over or cfg.finetune.epochs > tuned
    return resume.check_changes(
        checkpoint.run_config, plain(cfg), checkpoint.named, first_over=first_over, epochs_left=epochs_left
    )


def _is_left(limit: int | None, done: int) -> bool:
    return limit is None or limit < 0 or limit > done


def check_stored(checkpoint: Checkpoint) -> None:
    """Check that the configuration in a checkpoint is one that train.py could have had.

    It is data: never interpolated, of the types and ranges of a configuration, and complete. Of one that
    another version wrote the keys may lack that came later.

    Raises:
        InputError: it is not.
    """
    for config in (checkpoint.config, checkpoint.run_config):
        try:
            checkpoints.check_values(config)
            own = {
                "callbacks": own_callbacks(config),
                "ckpt_path": None,
                "resume_training": False,
                "logger": {},
            }
            complete = flat(plain(read(Training, {**config, **own})))
        except InputError as error:
            raise InputError(f"{checkpoint.named}: the settings in it cannot be used: {error}") from error
        lacking = [k for k in complete if k not in flat(config) and not k.startswith("logger.")]
        if lacking and checkpoint.version == sparsereg.__version__:
            raise InputError(f"{checkpoint.named}: not a whole checkpoint, its settings lack {lacking[0]}")


def _check_usable(cfg: Training, checkpoint: Checkpoint) -> None:
    """Raise an InputError unless a new run can start from the checkpoint."""
    if checkpoint.gated and not cfg.gated:
        raise InputError(
            f"{checkpoint.named} has gates, but {_without_gates(cfg)}: leave that out, or start from a "
            "checkpoint without gates"
        )
    if checkpoint.structure is not None and cfg.front:
        raise InputError(
            f"{checkpoint.named} is a compacted network: front={shown(cfg.front)} starts from a whole one"
        )
    if checkpoint.structure is not None and not cfg.without_using_gate:
        raise InputError(
            f"{checkpoint.named} is a compacted network without gates: give without_using_gate=true"
        )


def _without_gates(cfg: Training) -> str:
    """Say which setting lets a run train without gates."""
    return f"front={shown(cfg.front)}" if cfg.front else "without_using_gate=true"


def _check_resumable(cfg: Training, checkpoint: Checkpoint) -> None:
    """Raise an InputError unless the run of the checkpoint can be resumed, with gates if it had some."""
    if checkpoint.epoch == 0 and checkpoint.structure is not None:
        raise InputError(
            f"{checkpoint.named} is a compacted network, which has no run to resume; to train it further "
            "give resume_training=false"
        )
    if checkpoint.run_gated and not cfg.gated:
        raise InputError(
            f"{checkpoint.named} is of a run with gates, but {_without_gates(cfg)}: leave that out, or "
            "start from a checkpoint without gates"
        )
    if not checkpoint.run_gated and cfg.gated and not checkpoint.run_config.get("front"):
        raise InputError(
            f"{checkpoint.named} has no gates, so its run can only be resumed with without_using_gate=true; "
            "to fine-tune it with gates give resume_training=false"
        )


def _check_left(cfg: Training, checkpoint: Checkpoint) -> None:
    """Raise an InputError unless the run has something left to do: epochs, fine-tuning, or its results."""
    tuned = checkpoint.before is not None
    key = "finetune.epochs" if tuned else "trainer.max_epochs"
    limit = cfg.finetune.epochs if tuned else cfg.trainer.max_epochs
    if limit is None or _is_left(limit, checkpoint.epoch):
        return
    done = f"{checkpoint.named} has finished {checkpoint.epoch} epochs"
    if limit < checkpoint.epoch:
        raise InputError(f"{done}, more than {key}={limit}; give a larger {key}")
    before = checkpoint.run_config.get("finetune", {}).get("epochs", 0)
    if checkpoint.run_finished and (tuned or cfg.finetune.epochs == before):
        raise InputError(f"nothing is left to train: {done} and {key}={limit}; give a larger {key}")


def _check_same_model(cfg: Training, checkpoint: Checkpoint) -> None:
    """Raise an InputError unless the checkpoint is of the network that is asked for."""
    config = checkpoint.run_config if cfg.resume_training else checkpoint.config
    mine, theirs = cfg.model, read(Network, config["model"], f"{checkpoint.named}: model")
    for wanted, found in ((mine.group, theirs.group), (mine.name, theirs.name)):
        if wanted != found:
            raise InputError(f"ckpt_path={checkpoint.path} is of model={found}, not of model={wanted}")
    weights = weights_file(mine)
    if weights not in (None, weights_file(theirs)):
        raise InputError(
            f"ckpt_path={checkpoint.path} and model.weights={weights} are both to start from: "
            "give one of them"
        )


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
    return Distillation(teacher, d.weight, d.temperature)


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


def claim_run_folder(outputs: Path) -> Path:
    """Make the run's folder; the other processes of a DDP run take the first one's."""
    folder = os.environ.get(RUN_FOLDER) if int(os.environ.get("LOCAL_RANK", "0")) else None
    if folder is None:
        folder = str(new_version(outputs / "train" / "tblog" / "lightning_logs"))
        os.environ[RUN_FOLDER] = folder
    return Path(folder)


def check_trainer(cfg: Training, multirun: bool) -> None:
    """Refuse what cannot work before anything is loaded.

    Raises:
        InputError: a GPU where there is none; DDP by subprocesses below a sweep; what Lightning refuses.
    """
    trainer = cfg.trainer
    if trainer.accelerator in ("gpu", "cuda") and not torch.cuda.is_available():
        raise InputError(
            f"trainer.accelerator={trainer.accelerator}: this machine has no GPU; use trainer=cpu"
        )
    strategy = trainer.strategy
    if multirun and strategy.startswith("ddp") and strategy not in ("ddp_fork", "ddp_spawn", "ddp_notebook"):
        raise InputError(
            "-m and trainer=ddp do not work together: every process would start the whole sweep again; "
            "give trainer.strategy=ddp_fork, or one run at a time"
        )
    known = [f"trainer.{name}" for name in (*inspect.signature(pl.Trainer).parameters, *OWN_TRAINER_KEYS)]
    for key in (f"trainer.{name}" for name in trainer.others):
        if key not in known:
            raise InputError(f"unknown key {key!r}{nearest(key, known)}")
    build_trainer(cfg, [])


def build_trainer(
    cfg: Training,
    callbacks: list[pl.Callback],
    loggers: Sequence[Logger] = (),
    folder: Path | None = None,
    num_batches: int | None = None,
    without_validation: bool = False,
) -> pl.Trainer:
    """Build Lightning's Trainer from the keys that are not null.

    Args:
        cfg: the configuration.
        callbacks: besides the progress bar.
        loggers: none switch logging off.
        folder: the run's.
        num_batches: training batches of an epoch; logs are written at least once in each.
        without_validation: there are no validation images.
    """
    keys = {k: v for k, v in plain(cfg.trainer).items() if v is not None and k not in OWN_TRAINER_KEYS}
    if without_validation:
        keys["limit_val_batches"] = 0
    if num_batches is not None:
        keys["log_every_n_steps"] = max(1, min(keys.get("log_every_n_steps", 50), num_batches))
    bar = [ProgressBar()] if keys.get("enable_progress_bar", True) else []
    plugins = [*(keys.pop("plugins", None) or []), WholeCheckpoints()]
    try:
        return pl.Trainer(
            **keys,
            logger=list(loggers) or False,
            callbacks=[*callbacks, *bar, EndsTogether()],
            plugins=plugins,
            default_root_dir=None if folder is None else str(folder),
        )
    except (MisconfigurationException, TypeError, RuntimeError, ValueError, ImportError) as error:
        raise InputError(f"trainer: {error}") from error


def check_shares(cfg: Training, data: RunData) -> None:
    """Refuse shares of the batches that are less than one batch, and a validation that never comes.

    Raises:
        InputError: naming the key.
    """
    train = len(data.train_dataloader())
    batches = {"overfit_batches": train, "limit_train_batches": train, "val_check_interval": train}
    batches["limit_val_batches"] = len(data.val_dataloader()) if data.num_val else 0
    batches["limit_test_batches"] = len(data.test_dataloader())
    for key, number in batches.items():
        share = getattr(cfg.trainer, key)
        if number and isinstance(share, float) and 0 < share * number < 1:
            raise InputError(
                f"trainer.{key}={share:g}: less than one of the {number} batches; give {1 / number:.3g} or"
                " more"
            )
    within, each = cfg.trainer.val_check_interval, batches_per_epoch(cfg, data)
    if isinstance(within, int) and within > each and cfg.trainer.check_val_every_n_epoch is not None:
        raise InputError(
            f"trainer.val_check_interval={within}: expected {each} at most, the batches of an epoch"
        )


def batches_per_epoch(cfg: Training, data: RunData) -> int:
    """Return the number of training batches of an epoch, at most ``trainer.limit_train_batches``."""
    batches = len(data.train_dataloader())
    limit = cfg.trainer.limit_train_batches
    if limit is None:
        return batches
    return min(batches, limit if isinstance(limit, int) else int(batches * limit))


def build_callbacks(
    cfg: Training,
    data: RunData,
    task: Task,
    accountant: Accountant | PlainAccountant,
    folder: Path,
    logging_on: bool,
    resumed: Path | None = None,
) -> "tuple[list[pl.Callback], ours.EpochTimer]":
    """Build the callbacks of a training run; the order matters.

    Averaged weights are put in place before gates are brought to a target, then BatchNorm statistics are
    taken, then everything is counted and logged; checkpoints come last.

    Args:
        cfg: the configuration.
        data: for the number of validation examples.
        task: whose main figure tells which epoch is the best.
        accountant: counts the network.
        folder: of the run.
        logging_on: whether there is a logger.
        resumed: the checkpoint that is resumed, if one is.
    """
    timer = ours.EpochTimer()
    callbacks: list[pl.Callback] = [
        timer,
        ours.ReproducibleEpochs(cfg.seed),
        ours.FiniteLoss(),
    ]
    traced = accountant if isinstance(accountant, Accountant) else None  # as every network with gates is
    if cfg.compacts:  # in front of all that looks at the network: it then has its original size
        every = cfg.callbacks.compact_every_n_epochs
        assert traced is not None
        callbacks.append(Compaction(traced, every, cfg.callbacks.compact_below))
    average = WeightAverage(cfg.ema_decay) if cfg.ema_decay is not None else None
    if average is not None:
        callbacks.append(average)
    if cfg.has_target:
        assert traced is not None
        callbacks.append(_target(cfg, traced, data, average))
    callbacks.append(batch_norm_estimation(cfg, average))
    if cfg.gated:
        assert traced is not None
        callbacks += [
            ours.TemperatureSchedule(cfg.temperature.scheduler()),
            ours.SparsityMonitor(traced, cfg.callbacks.histogram_every_n_epochs),
        ]
        if cfg.callbacks.penalty_warmup_epochs > 0:
            callbacks.append(ours.PenaltyWarmUp(cfg.callbacks.penalty_warmup_epochs))
    callbacks += own(cfg.callbacks)
    if logging_on:
        callbacks.append(LearningRateMonitor(logging_interval="step"))
    if cfg.trainer.enable_checkpointing:
        if data.num_val and keeps_best(cfg):
            best = ours.BestCheckpoint(
                folder / "checkpoints", resumed, f"val_{task.figure}", task.larger_is_better
            )
            callbacks.append(best)
        callbacks.append(ours.LastCheckpoint(folder / "checkpoints"))
    return callbacks, timer


def _target(
    cfg: Training, accountant: Accountant, data: RunData, average: WeightAverage | None
) -> SparsityTarget:
    asked = asked_for(cfg)
    if asked is not None or cfg.target_key is None:
        return SparsityTarget(accountant, target_settings(cfg, *(asked or (None, None))), average)
    budget = measured_budget(cfg, accountant, example_input(data, accountant.model))
    assert budget is not None
    return SparsityTarget(accountant, target_settings(cfg, budget.cost, budget.kept), average, budget)


def own(settings: Callbacks) -> list[pl.Callback]:
    """Make the callbacks that the user added.

    Raises:
        InputError: one of them is none.
    """
    made = {name: own_code.call(spec, f"callbacks.{name}") for name, spec in settings.others.items()}
    for name, callback in made.items():
        if not isinstance(callback, pl.Callback):
            raise InputError(
                f"callbacks.{name}._target_={settings.others[name][own_code.TARGET]}: expected a Lightning "
                f"Callback, it makes a {type(callback).__name__}"
            )
    return list(made.values())


def target_settings(cfg: Training, cost: str | None, kept: float | None) -> TargetSettings:
    """Return how a target is reached in the epochs that the run has."""
    epochs = cfg.trainer.max_epochs
    assert epochs is not None  # checked with the target
    start = min(cfg.callbacks.penalty_warmup_epochs, epochs - 1)
    ramp_epochs = cfg.target.ramp * (epochs - start)
    return TargetSettings(
        **vars(cfg.target), cost=cost, kept=kept, start_epoch=start, ramp_epochs=ramp_epochs
    )


def keeps_best(cfg: Training) -> bool:
    """Whether validation runs at all, so that there is a best checkpoint."""
    return cfg.trainer.limit_val_batches != 0


def batch_norm_estimation(cfg: Training, average: WeightAverage | None = None) -> ours.BatchNormEstimation:
    """Build the callback that re-estimates BatchNorm statistics, of averaged weights if there are any."""
    b = cfg.callbacks.batch_norm
    return ours.BatchNormEstimation(b.num_images, b.batch_size, average)


def statistics_fit(cfg: Training, net: nn.Module, checkpoint: Checkpoint | None) -> bool:
    """Whether the BatchNorm statistics that a network starts with are those of its weights.

    They are where they come with the weights: from a checkpoint that says so, or from a file of weights.
    New gates change the activations, and the statistics of a network that starts anew are no statistics.
    """
    if checkpoint is None:
        return weights_file(cfg.model) is not None and not hard_concretes(net)
    return checkpoint.batch_norm_is_current and checkpoint.gated == bool(hard_concretes(net))


def tested_checkpoint(
    cfg: Training, trainer: pl.Trainer, folder: Path, task: Task
) -> tuple[dict[str, float | None], str | None]:
    """Return what validation measured of the checkpoint to test, and its path if one was written."""
    written = folder / "checkpoints"
    best = [c for c in trainer.checkpoint_callbacks if isinstance(c, ours.BestCheckpoint)]
    if cfg.test_checkpoint == "best" and best and best[0].best_model_score is not None:
        score = float(f"{float(best[0].best_model_score):.7g}")
        known: dict[str, float | None] = dict.fromkeys(names("val", task))
        path = str(written / Path(best[0].best_model_path).name)
        return {**known, f"val_{task.figure}": score}, path
    last = written / "last.ckpt"
    return measured(trainer, "val", task), str(last) if last.is_file() else None


def rebuild(given: Evaluation, named: Set[str]) -> tuple[Training, Checkpoint]:
    """Return the settings of the checkpoint that test.py is given; what the user named wins."""
    checkpoint = checkpoints.read(str(given.ckpt_path))
    check_stored(checkpoint)
    shared = {
        k: v for k, v in plain(given).items() if k in declared(Training) and k not in ("ckpt_path", *TIMING)
    }
    left_out = ("trainer", "logger", *NEVER_INHERITED)
    settings = {k: v for k, v in checkpoint.config.items() if k not in left_out}
    settings["callbacks"] = own_callbacks(checkpoint.config)
    if own_code.code_in(settings.get("optimizer")):
        del settings["optimizer"]  # nothing is trained here
    return inherit(read(Training, shared), settings, named, checkpoint.named), checkpoint


def rebuild_network(cfg: Training, checkpoint: Checkpoint, data: RunData) -> nn.Module:
    """Build the network of a checkpoint with its weights, gates and temperatures.

    Raises:
        InputError: the checkpoint does not fit the network, or the data do not fit the checkpoint.
    """
    _check_data(checkpoint, data)
    return in_memory_format(cfg, restore(checkpoint, cfg.model))


def synchronise(cfg: Training, net: nn.Module) -> nn.Module:
    """Let BatchNorm see all processes if ``trainer.sync_batchnorm`` asks for it."""
    return synchronise_batch_norm(net) if cfg.trainer.sync_batchnorm else net


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
