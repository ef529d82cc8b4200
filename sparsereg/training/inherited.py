"""What a run takes over from a checkpoint, and what the command may change of it."""

import logging
from collections.abc import Set
from dataclasses import replace
from typing import Any

import sparsereg
from sparsereg import own_code
from sparsereg.errors import InputError
from sparsereg.settings import declared, flat, plain, read, shown, value_at, with_value
from sparsereg.training import checkpoint as checkpoints
from sparsereg.training import resume
from sparsereg.training.checkpoint import Checkpoint
from sparsereg.training.config import TIMING, Callbacks, Evaluation, Training, two_ways
from sparsereg.zoo.config import weights_file
from sparsereg.zoo.network import Network

log = logging.getLogger(__name__)

INHERITED = ("model", "data", "task")
NEVER_INHERITED = ("ckpt_path", "resume_training", "without_using_gate", "rerun", "objective")

USED_BY = {
    "runtime": ("target_latency_ms", "front"),
    "threads": ("target_latency_ms", "front"),
    "batch": ("target_latency_ms", "front", "target_memory_mb"),
}
"""Settings of measurements, and what is measured so."""


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
    for key, used_by in USED_BY.items():
        if key in named and not cfg.resume_training and not any(getattr(cfg, t) for t in used_by):
            raise InputError(
                f"{key}={shown(getattr(cfg, key))} is of measurements: give {' or '.join(used_by)}"
            )
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
