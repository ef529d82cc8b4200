"""The stages of a run: training, and fine-tuning of what the gates have left, or of each size of a front.

The second is what ``train.py ckpt_path=.../compacted.pt without_using_gate=true`` would do: the gates are
folded into the weights, closed channels leave, and the small network is trained on.

A run ships one network, and ``checkpoints/last.ckpt`` is its newest state at every moment: from the first
epoch of fine-tuning on it is the fine-tuned network. The gated one before has its own name by then,
``checkpoints/gated.ckpt`` (and ``gated_best.ckpt``). Checkpoints of fine-tuning know the configuration of
the run and what the gated network reached, so that a run that was cut off anywhere can be finished.
"""

import contextlib
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.apply_func import move_data_to_device
from pytorch_lightning.loggers import Logger, TensorBoardLogger
from torch import fx, nn

from sparsereg.compression import Accountant, compact, load_compacted, storage
from sparsereg.compression.budget import check_reachable
from sparsereg.compression.compact import ORIGINAL, original_size
from sparsereg.compression.oneshot.inputs import BATCH
from sparsereg.compression.oneshot.leftover import WAYS
from sparsereg.compression.oneshot.ranked import Ranked, opened_
from sparsereg.compression.oneshot.start import NUM_INPUTS, start_in_one_shot_
from sparsereg.compression.running import evaluating, tensors_in
from sparsereg.compression.timing.runtimes import check_runtime, default_runtime
from sparsereg.compression.verify import difference
from sparsereg.data.batches import call, only
from sparsereg.data.own import RunData
from sparsereg.errors import InputError
from sparsereg.files import write_atomically
from sparsereg.settings import plain, shown
from sparsereg.training import build, callback_list, front, resume, trainers
from sparsereg.training import callbacks as ours
from sparsereg.training.accounting import PlainAccountant, accountant_of
from sparsereg.training.checkpoint import Checkpoint, FirstStage, load_all_weights_
from sparsereg.training.config import Logger as NoLogger
from sparsereg.training.config import Training
from sparsereg.training.distillation import Distillation
from sparsereg.training.loggers import build_loggers
from sparsereg.training.module import Learner
from sparsereg.training.optimizers import check_own_code
from sparsereg.training.pick import Pick
from sparsereg.training.results import count_summary, gate_summary, measured, names, target_summary
from sparsereg.training.target import asked_for
from sparsereg.training.tensorboard import METRICS, in_order
from sparsereg.zoo.gated import with_gates
from sparsereg.zoo.kinds.compacted import CompactedModel
from sparsereg.zoo.kinds.own import OwnNetwork

log = logging.getLogger(__name__)

UNDER_GATES = {"last.ckpt": "gated.ckpt", "best.ckpt": "gated_best.ckpt"}
"""Names that the checkpoints of the gated stage get when fine-tuning takes theirs."""
ORDER = "order"
"""Key in the notes of a size of a front: in which order its units went, where one was clearly better."""
ROUNDING = 1e-4
"""Largest difference of answers, as a share of their spread, that rounding explains."""


@dataclass
class Stage:
    """A network, its data and what trains it.

    Attributes:
        cfg: the configuration of this stage.
        data: loaded.
        net: the network.
        accountant: counts it.
        module: trains it.
        trainer: drives that.
        timer: takes the time of the epochs.
        loggers: take the scalars.
        folder: of the run.
        teacher: for distillation, in this stage or in fine-tuning alone.
        resumed: what this stage goes on from; None if it starts.
        before: of fine-tuning, the stage under gates.
        gated: of a front, a copy of the network as it was built, with gates: what a trace has said of it
            holds for any weights.
    """

    cfg: Training
    data: RunData
    net: nn.Module
    accountant: Accountant | PlainAccountant
    module: Learner
    trainer: pl.Trainer
    timer: ours.EpochTimer
    loggers: list[Logger]
    folder: Path
    teacher: Distillation | None
    resumed: Checkpoint | None = None
    before: FirstStage | None = None
    gated: nn.Module | None = None

    @property
    def checkpoints(self) -> Path:
        """Where the checkpoints of the run are."""
        return self.folder / "checkpoints"

    def fit(self) -> None:
        """Train, from the start or from where the checkpoint that is resumed stopped.

        A run that had no epoch left ships what it was resumed from or, of ``trainer.max_epochs=0``, what it
        started from: what follows can then be resumed, too.
        """
        path = None if self.resumed is None else str(self.resumed.path)
        self.trainer.fit(self.module, datamodule=self.data, ckpt_path=path, weights_only=True)
        last = self.checkpoints / "last.ckpt"
        if last.exists() or not self.cfg.trainer.enable_checkpointing:
            return
        if path is not None:
            _copy(self.trainer, Path(path), last)
        elif self.cfg.trainer.max_epochs == 0:
            self.trainer.save_checkpoint(last)

    def test(self) -> dict[str, Any]:
        """Test the checkpoint that ``test_checkpoint`` names; return its figures and where it is."""
        task = self.module.task
        val, tested = callback_list.tested_checkpoint(self.cfg, self.trainer, self.folder, task)
        self.trainer.test(
            self.module, datamodule=self.data, ckpt_path=tested, weights_only=True, verbose=False
        )
        test = measured(self.trainer, "test", task)
        if None in val.values() and self.data.num_val and callback_list.keeps_best(self.cfg):
            self.trainer.validate(self.module, datamodule=self.data, verbose=False)
            val = measured(self.trainer, "val", task)
        return {**val, **test, "checkpoint": tested}


def begin(cfg: Training, data: RunData, checkpoint: Checkpoint | None, outputs: Path) -> Stage:
    """Build the stage that a run starts with, or that the checkpoint to resume was cut off in.

    Args:
        cfg: the checked configuration.
        data: loaded.
        checkpoint: to start from or to resume.
        outputs: below which the folder of the run is made.

    Raises:
        InputError: something of it cannot be built.
    """
    resumed = checkpoint if cfg.resume_training else None
    before = None if resumed is None else resumed.before
    if resumed is not None:
        resume.check_same_data(resumed.data, data.describe(), resumed.named)
    net = build.build_network(cfg, data, checkpoint)
    if checkpoint is not None and resumed is None:
        build.start_weights(net, checkpoint, cfg)
    elif resumed is not None and resumed.structure is None:
        load_all_weights_(net, resumed)
    if resumed is None:
        _one_shot_(cfg, net, data, checkpoint)
    accountant = gated = None
    if cfg.front:
        check_runtime(cfg.runtime or default_runtime())
        gated = _gated(cfg, data, net)  # so that it is said before anything is trained if nothing can go
        _check_smallest(cfg, data, gated)
        accountant = PlainAccountant(net, build.example_input(data, net))
    structure = None if checkpoint is None else checkpoint.structure
    teacher = build.build_teacher(cfg, data)
    stage_cfg = cfg if before is None else finetuning_config(cfg, cfg.finetune.epochs)
    folder = lambda: trainers.claim_run_folder(outputs)  # noqa: E731
    stage = _assemble(stage_cfg, data, net, structure, teacher, folder, before, resumed, accountant)
    stage.gated = gated
    stage.module.batch_norm_is_current = build.statistics_fit(cfg, net, checkpoint)
    if resumed is not None and cfg.front and resumed.epoch == cfg.trainer.max_epochs:
        front.take_over(stage.folder, resumed.path.parent.parent)  # of the same weights
    if resumed is not None and before is not None:
        for name in UNDER_GATES.values():
            if (beside := resumed.path.with_name(name)).is_file():
                _copy(stage.trainer, beside, stage.checkpoints / name)
    return stage


def _one_shot_(cfg: Training, net: nn.Module, data: RunData, checkpoint: Checkpoint | None) -> None:
    """Take units out of a trained network before training, where that is asked for."""
    if not cfg.target.one_shot:
        return
    brings = any(getattr(cfg.model, key, None) is not None for key in ("weights", "config"))
    if checkpoint is None and not brings and not isinstance(cfg.model, OwnNetwork):
        raise InputError(
            "target.one_shot=true takes units out of a trained network: give ckpt_path=RUN, of a run with"
            " without_using_gate=true"
        )
    cost, kept = asked_for(cfg) or (None, 1.0)
    batches = list(data.estimation_batches(NUM_INPUTS, BATCH))
    example, how = build.example_input(data, net), cfg.target
    start_in_one_shot_(net, example, cost, kept, batches, how.parts, how.round_to, cfg.seed)


def carry_out(cfg: Training, stage: Stage, named: Sequence[str] = ()) -> dict[str, Any]:
    """Train, test and fine-tune; return what goes into results.json.

    Args:
        cfg: the configuration of the run.
        stage: that it begins with.
        named: dotted keys that the user named, what was swept first; TensorBoard shows them in this order.
    """
    resumed, loggers = stage.resumed, stage.loggers
    stage.fit()
    if stage.before is None:
        results = _first_results(stage)
        if cfg.front:
            results |= _front(stage, results)
        elif cfg.finetune.epochs:
            stage = finetuning(stage, results)
            stage.fit()
            results = _second_results(stage)
    else:
        loggers = build_loggers(cfg.logger, stage.folder)
        results = _second_results(stage)
    if resumed is not None:
        changed = {key: list(pair) for key, pair in resumed.changed.items()}
        results["resumed"] = {"checkpoint": str(resumed.path), "epoch": resumed.epoch, "changed": changed}
    log_results(cfg, loggers, results, named)
    return results


def _first_results(stage: Stage) -> dict[str, Any]:
    return {
        **stage.test(),
        **gate_summary(stage.net),
        **count_summary(stage.accountant.count(), stage.net),
        **target_summary(stage.cfg, stage.trainer, stage.accountant),
        "seed": stage.cfg.seed,
        "epochs": stage.trainer.current_epoch,
        "seconds_per_epoch": stage.timer.seconds_per_epoch,
        "task": stage.cfg.task.name,
        "objective": f"val_{stage.module.task.figure}",
        "data": stage.data.describe(),
    }


def _second_results(stage: Stage) -> dict[str, Any]:
    assert stage.before is not None
    before = stage.before.results
    task = stage.module.task
    gated = {key: before.get(key) for key in (*names("val", task), *names("test", task), "checkpoint")}
    if gated["checkpoint"] is not None:
        kept = stage.checkpoints / Path(gated["checkpoint"]).name
        gated["checkpoint"] = str(kept) if kept.is_file() else None
    epochs = {"finetune_epochs": stage.trainer.current_epoch}
    return {**before, **stage.test(), **epochs, "before_finetuning": gated}


def finetuning(first: Stage, results: dict[str, Any]) -> Stage:
    """Compact the network of a finished stage and build what trains it further.

    Args:
        first: under gates, with the tested weights in place.
        results: of it.
    """
    for name, kept in UNDER_GATES.items():
        if (first.checkpoints / name).is_file():
            _copy(first.trainer, first.checkpoints / name, first.checkpoints / kept)
    if results["checkpoint"] is not None:
        tested = Path(results["checkpoint"])
        results = {**results, "checkpoint": str(tested.with_name(UNDER_GATES[tested.name]))}
    device = first.module.device
    gated = first.net.cpu().eval()
    small = compact(gated, build.example_input(first.data, gated))
    net = build.in_memory_format(first.cfg, small).to(device).train()
    before = FirstStage(plain(first.cfg), results)
    cfg, structure = finetuning_config(first.cfg, first.cfg.finetune.epochs), storage.describe(small)
    stage = _assemble(cfg, first.data, net, structure, first.teacher, lambda: first.folder, before)
    stage.module.batch_norm_is_current = first.module.batch_norm_is_current
    return stage


def _check_smallest(cfg: Training, data: RunData, gated: nn.Module) -> None:
    """Refuse a front whose smallest size leaves less than what no unit can take."""
    try:
        accountant = Accountant(gated, build.example_input(data, gated))
        check_reachable(accountant, cfg.front_cost, 1 - cfg.front[-1])
    except InputError as error:
        raise InputError(f"front={shown(cfg.front)}: its last size as {error}") from error


def _check_pick(pick: Pick, cfg: Training, data: RunData) -> None:
    """Refuse a bound on what is not measured, before anything is trained."""
    validated = data.num_val > 0 and cfg.trainer.limit_val_batches != 0
    pick.check({"val": validated, "test": cfg.trainer.limit_test_batches != 0})


def _front(first: Stage, dense: Mapping[str, Any]) -> dict[str, Any]:
    """Make the sizes of the front that are missing, each from the one before; return what they are.

    Args:
        first: trained, with the tested weights in place.
        dense: results of it.
    """
    cfg, task = first.cfg, first.module.task
    net: nn.Module = first.net
    left, made = front.missing(first.folder, cfg.front), {}
    for size in cfg.front:
        if size in left:
            log.info("front: size %g", size)
            net = made[size] = _size(first, size, net.eval())
        elif left:
            net = load_compacted(front.place_of(first.folder, size) / "compacted.pt")
    front.time_(first.folder, made, build.example_input(first.data, net.cpu().eval()), cfg)
    pick = None if cfg.pick is None else Pick.read(cfg.pick, task.figures)
    return front.finished(first.folder, task, pick, dense)


def _gated(cfg: Training, data: RunData, net: nn.Module) -> nn.Module:
    """Return a copy of a network with gates on what may go.

    Raises:
        InputError: nothing of it can.
    """
    form = build.form_of(cfg, data)
    return with_gates(net, form, cfg.model.said, {"shape": cfg.shape, **cfg.model.limits})


def _with_gates(first: Stage, net: nn.Module) -> nn.Module:
    """The network of a run, or what is left of it, with gates."""
    known = first.gated
    if known is not None and net is first.net and _takes_over_(known, net):
        example = build.example_input(first.data, net)
        with torch.no_grad(), evaluating(net, known):
            wanted, found = (tensors_in(call(n, example)) for n in (net, opened_(known)))
        # Anything but tensors that training has changed, such as numbers, is not known there.
        if all(difference(a, b) <= ROUNDING for a, b in zip(wanted, found, strict=True)):
            return known
    return _gated(first.cfg, first.data, net)


@torch.no_grad()
def _takes_over_(known: nn.Module, net: nn.Module) -> bool:
    """Give a copy with gates the tensors of a network; False if it has others."""
    theirs = {**dict(known.named_parameters()), **dict(known.named_buffers())}
    for name, value in (*net.named_parameters(), *net.named_buffers()):
        if name not in theirs or theirs[name].shape != value.shape:
            return False
        theirs[name].copy_(value)
    return True


def _smaller(first: Stage, net: nn.Module, size: float) -> fx.GraphModule:
    """Take units out of a network in one shot, until a share of what the first one cost is gone.

    Args:
        first: of the run.
        net: in eval mode, without gates.
        size: the share.
    """
    cfg, device = first.cfg, first.module.device
    whole = opened_(_with_gates(first, net.cpu()).eval()).to(device)
    example = build.example_input(first.data, whole)
    inputs = first.data.estimation_batches(NUM_INPUTS, BATCH)
    batches = [only(move_data_to_device(x, device), example) for x in inputs]
    known = net if net is not first.net and isinstance(net, fx.GraphModule) else None
    better = None if known is None else _order(known)
    ranked = Ranked(whole, example, cfg.front_cost, batches, seed=cfg.seed, order=better, plain=known)
    original = original_size(net) or ranked.sizes
    left = (1 - size) * original[cfg.front_cost] / ranked.sizes[cfg.front_cost]
    _, small = ranked.smaller(left, cfg.target.round_to)
    small.meta |= {ORIGINAL: original, "notes": {ORDER: ranked.order}}
    return small


def _order(net: fx.GraphModule) -> int | None:
    """The order in which units of a size of a front went; None where none was clearly better."""
    notes = net.meta.get("notes")
    known = notes.get(ORDER) if isinstance(notes, dict) else None
    return next((order for order in range(WAYS) if order == known), None)


def _tuned(first: Stage, size: float, small: fx.GraphModule) -> Stage:
    """Fine-tune the network of a size; return the stage that did.

    Args:
        first: of the run.
        size: share of the cost that is gone.
        small: on the CPU.
    """
    cfg = finetuning_config(first.cfg, first.cfg.epochs_of_sizes[size])
    trainer = replace(cfg.trainer, enable_checkpointing=False)
    if not cfg.callbacks.others and trainer.check_val_every_n_epoch and not trainer.val_check_interval:
        # Nobody asks what is measured before the end.
        trainer = replace(trainer, check_val_every_n_epoch=max(1, cfg.trainer.max_epochs or 1))
    cfg = replace(cfg, trainer=trainer, logger=NoLogger())
    net, place = build.in_memory_format(cfg, small).train(), front.place_of(first.folder, size)
    accountant = PlainAccountant(net, build.example_input(first.data, net))
    structure = storage.describe(small) if cfg.callbacks.others else None  # only they write checkpoints
    stage = _assemble(cfg, first.data, net, structure, first.teacher, lambda: place, accountant=accountant)
    stage.fit()
    return stage


def _size(first: Stage, size: float, net: nn.Module) -> fx.GraphModule:
    """Make, fine-tune, test and keep the network of one size; return it.

    Args:
        first: of the run.
        size: share of the cost that is gone.
        net: that of the size before, or the whole one, in eval mode.
    """
    small = _smaller(first, net, size)
    stage = _tuned(first, size, small)
    figures, accountant = stage.test(), stage.accountant
    small.cpu().eval()
    costs = {
        "sparsity": 1 - accountant.parameters / original_size(small)["parameters"],
        "parameters": accountant.parameters,
        "macs": accountant.macs,
    }
    own = (*names("val", stage.module.task), *names("test", stage.module.task))
    row = {**costs, **{key: figures.get(key) for key in own}}
    notes = {
        "config": plain(first.cfg),
        **stage.module.notes.form.taken_by(small).described(),
        "data": first.data.describe(),
        "checkpoint": str(first.checkpoints / "last.ckpt"),
        **small.meta["notes"],
    }
    front.keep(first.folder, size, small, row, notes)
    return small


def _copy(trainer: pl.Trainer, source: Path, target: Path) -> None:
    """Copy a checkpoint, whole or not at all; the first of several processes does."""
    if trainer.is_global_zero:
        write_atomically(target, lambda beside: shutil.copyfile(source, beside))


def finetuning_config(cfg: Training, epochs: int) -> Training:
    """Return the settings of fine-tuning: those of a plain run on a compacted network.

    Args:
        cfg: of the run.
        epochs: of fine-tuning.
    """
    return replace(
        cfg,
        model=CompactedModel(),
        ckpt_path=None,
        resume_training=False,
        without_using_gate=True,
        target_sparsity=None,
        front=(),
        front_epochs=None,
        pick=None,
        target_macs=None,
        target_latency_ms=None,
        target_memory_mb=None,
        target=replace(cfg.target, params=None, macs=None),
        lambda_l0=cfg.lambda_l0 or 0.0,
        lambda_l2=0.0,
        finetune=replace(cfg.finetune, epochs=0),
        distill=replace(cfg.distill, only_finetuning=False),
        trainer=replace(cfg.trainer, max_epochs=epochs, min_epochs=None),
        optimizer=replace(
            cfg.optimizer,
            lr=cfg.finetune.lr,
            schedule="cosine",
            schedule_epochs=max(1, epochs),
            warmup_epochs=0.0,
            final_lr_ratio=0.0,
        ),
    )


def log_results(
    cfg: Training, loggers: Sequence[Logger], results: dict[str, Any], named: Sequence[str]
) -> None:
    """Write settings and results into every logger (TensorBoard's HParams tab), once, at the end."""
    compared = sorted(name for name in results if name.startswith(("test_", "val_")))
    metrics = {f"final/{k}": results[k] for k in (*compared, *METRICS) if results.get(k) is not None}
    settings = in_order(build.hyperparameters(plain(cfg)), named)
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.log_hyperparams(settings, metrics)
        else:
            logger.log_hyperparams(settings)
            logger.log_metrics(metrics)
        logger.finalize("success")


def _assemble(
    cfg: Training,
    data: RunData,
    net: nn.Module,
    structure: str | None,
    teacher: Distillation | None,
    make_folder: Callable[[], Path],
    before: FirstStage | None = None,
    resumed: Checkpoint | None = None,
    accountant: Accountant | PlainAccountant | None = None,
) -> Stage:
    net = trainers.synchronise(cfg, net)
    accountant = accountant or accountant_of(net, build.example_input(data, net))
    teaching = None if cfg.distill.only_finetuning else teacher
    module = build.build_module(cfg, net, data, structure, teaching, before)
    if cfg.pick is not None:
        _check_pick(Pick.read(cfg.pick, module.task.figures), cfg, data)
    path = None if resumed is None else resumed.path
    if resumed is not None:
        callbacks, _ = callback_list.build_callbacks(
            cfg, data, module.task, accountant, Path("unused"), False, path
        )
        resume.check_state(resumed, net, cfg.optimizer, trainers.build_trainer(cfg, []), callbacks)
    num_batches = trainers.batches_per_epoch(cfg, data)
    steps = max(num_batches / cfg.trainer.accumulate_grad_batches, 1.0)
    check_own_code(net, cfg.optimizer, cfg.trainer.max_epochs, steps)
    folder = make_folder()  # last of what can fail, so that a wrong input leaves none
    try:
        loggers = build_loggers(cfg.logger, folder if before is None else folder / "finetune")
        callbacks, timer = callback_list.build_callbacks(
            cfg, data, module.task, accountant, folder, bool(loggers), path
        )
        trainer = trainers.build_trainer(cfg, callbacks, loggers, folder, num_batches, data.num_val == 0)
    except InputError:
        with contextlib.suppress(OSError):
            folder.rmdir()  # if nothing is in it
        raise
    return Stage(
        cfg, data, net, accountant, module, trainer, timer, loggers, folder, teacher, resumed, before
    )
