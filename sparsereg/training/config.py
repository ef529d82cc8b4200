"""The settings of train.py and test.py: every key with its type, range, default and meaning.

Nothing here imports PyTorch: the command line is checked before anything slow is loaded.
"""

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from sparsereg.data.config import CONFIGS as SOURCES
from sparsereg.data.kind import Data
from sparsereg.data.kinds.cifar10 import Cifar10Data
from sparsereg.errors import InputError, nearest
from sparsereg.own_code import Own, is_own
from sparsereg.settings import (
    NOT_NEGATIVE,
    POSITIVE,
    RATE,
    SEED,
    SHARE,
    Contradiction,
    Rule,
    Settings,
    again,
    at_least,
    check_objective,
    count,
    declared,
    keys,
    setting,
    shown,
    within,
)
from sparsereg.target_settings import SHAPES, Target
from sparsereg.temperature import Temperature
from sparsereg.training.pick import Pick
from sparsereg.training.schedules import SCHEDULES
from sparsereg.training.tasks.config import FIGURES, OwnTask, TaskSettings
from sparsereg.zoo.config import CONFIGS as NETWORKS
from sparsereg.zoo.kinds.googlenet import GoogleNetModel
from sparsereg.zoo.kinds.own import OwnNetwork
from sparsereg.zoo.kinds.torchvision import TorchvisionModel
from sparsereg.zoo.network import Network


@dataclass(frozen=True)
class Optimizer(Settings):
    """AdamW, linear warm-up, then a cosine to zero over schedule_epochs, whatever trainer.max_epochs is.

    So a run of 2 epochs that is resumed to 4 equals a run of 4.
    """

    name: str = setting("adamw", "the optimizer", choices=("adamw", "sgd"))
    lr: float = setting(0.002, "peak learning rate of the weights", POSITIVE)
    weight_decay: float = setting(0.05, "of the weights: decoupled with adamw, L2 with sgd", NOT_NEGATIVE)
    decay_all: bool = setting(False, "false: no weight decay on BatchNorm and biases")
    gate_lr_ratio: float = setting(
        10.0, "learning rate of the gates over that of the weights; gates are never decayed", POSITIVE
    )
    betas: tuple[float, float] = setting((0.9, 0.999), "used by adamw", within("[0, 1)"))
    momentum: float = setting(0.9, "used by sgd", within("[0, 1)"))
    schedule: str | Mapping[str, Any] = setting(
        "cosine", "of the learning rate over the epochs, or schedule._target_=your own", choices=SCHEDULES
    )
    schedule_epochs: int = setting(30, "length of the schedule", count())
    schedule_interval: str = setting(
        "epoch", "what a schedule of torch.optim.lr_scheduler counts", choices=("epoch", "step")
    )
    warmup_epochs: float = setting(1.0, "epochs of linear increase; not with your own", NOT_NEGATIVE)
    final_lr_ratio: float = setting(0.0, "learning rate at the end over the peak", NOT_NEGATIVE)
    milestones: tuple[float, ...] = setting((), "epochs, used by multistep", NOT_NEGATIVE, empty=True)
    gamma: float = setting(0.1, "factor at each of them", POSITIVE)

    @classmethod
    def kind_of(cls, given: Mapping[str, Any], where: str) -> type[Settings]:
        """Your own with ``_target_``."""
        return OwnOptimizer if is_own(given) else cls

    def check(self) -> None:
        """A schedule of steps has some, and one that is no name is code of the user's."""
        if not isinstance(self.schedule, str) and not is_own(self.schedule):
            raise Contradiction(
                f"{{}}schedule={shown(self.schedule)}: expected one of {', '.join(SCHEDULES)}, or your own as"
                " {}schedule._target_=my_module.my_schedule"
            )
        if self.schedule == "multistep" and not self.milestones:
            raise Contradiction("{}schedule=multistep needs the epochs of its steps: give {}milestones=[...]")


@dataclass(frozen=True)
class OwnOptimizer(Own, Optimizer):
    """An optimizer of yours or any of PyTorch's: optimizer._target_=torch.optim.RMSprop optimizer.KEY=VALUE.

    Its first argument is the list of groups of parameters, each with its lr and weight_decay; the gates are
    one of them. All other keys are its arguments.
    """

    GROUP: ClassVar[str] = "optimizer"
    OTHERS: ClassVar[str | None] = "arguments"

    name: str = again(Optimizer, "name", "adamw", key=False)
    lr: float = again(Optimizer, "lr", 0.001)
    weight_decay: float = again(Optimizer, "weight_decay", 0.0, "of the weights")
    betas: tuple[float, float] = again(Optimizer, "betas", (0.9, 0.999), key=False)
    momentum: float = again(Optimizer, "momentum", 0.9, key=False)
    schedule: str | Mapping[str, Any] = again(Optimizer, "schedule", "constant")
    warmup_epochs: float = again(Optimizer, "warmup_epochs", 0.0)
    _target_: str | None = setting(None, "package.module.Class, of a torch.optim.Optimizer")
    arguments: Mapping[str, Any] = setting(dict, "of that class")


@dataclass(frozen=True)
class BatchNorm(Settings):
    """How BatchNorm statistics for the test-time gates are estimated."""

    num_images: int = setting(
        4096,
        "training images without augmentation that they are taken from; 0: never",
        Rule("an integer >= 2, or 0 for never", lambda n: n == 0 or n >= 2),
    )
    batch_size: int = setting(256, "images per batch of that", count(2))


@dataclass(frozen=True)
class Callbacks(Settings):
    """What happens beside the steps of training; +callbacks.NAME._target_=my.Callback adds your own."""

    OTHERS: ClassVar[str | None] = "others"

    batch_norm: BatchNorm = setting(BatchNorm, "statistics for the test-time gates")
    histogram_every_n_epochs: int = setting(1, "of log_alpha and P(z > 0) in TensorBoard; 0: never", count(0))
    penalty_warmup_epochs: float = setting(0.0, "lambda_l0 grows linearly over so many epochs", NOT_NEGATIVE)
    compact_every_n_epochs: int = setting(
        0, "> 0: channels that are shut for good leave at every n-th epoch; 0: never", count(0)
    )
    compact_below: float = setting(
        0.02, "a gate with P(z > 0) below this is shut for good", within("(0, 0.5)", "a probability")
    )
    others: Mapping[str, Any] = setting(dict, "callbacks of yours, by any name")

    def check(self) -> None:
        """What is no key of ours is a callback of the user's."""
        _check_own(self.others, "callbacks", list(keys(Callbacks)))


@dataclass(frozen=True)
class Finetune(Settings):
    """After training the gates are folded and the compacted network is trained further."""

    epochs: int = setting(0, "0: leave that out", count(0))
    lr: float = setting(0.002, "peak learning rate, falls along a cosine", POSITIVE)


@dataclass(frozen=True)
class Distill(Settings):
    """Learn from a trained network, too."""

    ckpt_path: str | None = setting(None, "its checkpoint, or the folder of its run")
    weight: float = setting(0.5, "of the teacher's answers; the labels get the rest", SHARE)
    temperature: float = setting(2.0, "by which logits are divided", POSITIVE)
    only_finetuning: bool = setting(
        False, "the stage under gates, or before a front, learns from the labels alone"
    )


@dataclass(frozen=True)
class Logger(Settings):
    """Where scalars go: logger=tensorboard, csv, wandb, mlflow, none, or several of them, logger=[csv,wandb].

    logger._target_=my_module.Logger takes your own.
    """

    OTHERS: ClassVar[str | None] = "others"

    tensorboard: Mapping[str, Any] | None = setting(
        None, "TensorBoard events: arguments of Lightning's logger"
    )
    csv: Mapping[str, Any] | None = setting(None, "csv/metrics.csv in the run's folder: likewise")
    wandb: Mapping[str, Any] | None = setting(None, "Weights & Biases: likewise")
    mlflow: Mapping[str, Any] | None = setting(None, "MLflow: likewise")
    others: Mapping[str, Any] = setting(dict, "your own")

    def check(self) -> None:
        """What is no key of ours is a logger of the user's."""
        _check_own({} if is_own(self.others) else self.others, "logger", list(keys(Logger)))


LOGGERS = ("tensorboard", "csv", "wandb", "mlflow")


def _check_own(given: Mapping[str, Any], group: str, known: list[str]) -> None:
    for name, value in given.items():
        if not is_own(value):
            hint = nearest(f"{group}.{name}", [f"{group}.{k}" for k in known])
            raise InputError(
                f"unknown key '{group}.{name}'{hint or f'; one of your own is {group}.{name}._target_=CLASS'}"
            )


_LIMIT = Rule(
    "a number of batches >= 0, or a share in [0.0, 1.0]",
    lambda v: 0 <= v <= 1 if isinstance(v, float) else v >= 0,
)
_INTERVAL = Rule(
    "a number of batches >= 1, or a share in (0, 1]",
    lambda v: 0 < v <= 1 if isinstance(v, float) else v >= 1,
)
_ENDLESS = Rule("an integer >= 0, or -1 for no limit", lambda v: v >= -1)


@dataclass(frozen=True)
class Trainer(Settings):
    """Any key of Lightning's Trainer; null leaves Lightning's default."""

    OTHERS: ClassVar[str | None] = "others"

    accelerator: str = setting("auto", "auto, cpu, gpu, ...")
    strategy: str = setting("auto", "auto, ddp, ...")
    devices: int | str | tuple[int, ...] = setting(1, "how many, auto, or a list of their numbers")
    num_nodes: int = setting(1, "machines", count())
    precision: int | str | None = setting(None, "32-true, 16-mixed, bf16-mixed, ...")
    max_epochs: int | None = setting(30, "epochs of the run; -1: no limit", _ENDLESS)
    min_epochs: int | None = setting(None, "at least so many", count(0))
    max_steps: int = setting(-1, "at most so many steps; -1: no limit", _ENDLESS)
    min_steps: int | None = setting(None, "at least so many steps", count(0))
    max_time: str | Mapping[str, float] | None = setting(None, "e.g. 00:12:00:00, days to seconds")
    fast_dev_run: bool | int = setting(False, "true or so many batches: try everything once", count(0))
    limit_train_batches: int | float | None = setting(None, "batches of an epoch, or a share", _LIMIT)
    limit_val_batches: int | float | None = setting(None, "the same for validation", _LIMIT)
    limit_test_batches: int | float | None = setting(None, "the same for the test", _LIMIT)
    overfit_batches: int | float = setting(0.0, "train and validate on these only; 0: off", _LIMIT)
    val_check_interval: int | float | None = setting(None, "validate within an epoch, too", _INTERVAL)
    check_val_every_n_epoch: int | None = setting(1, "validate every so many epochs", count())
    num_sanity_val_steps: int = setting(
        0, "validation batches before training; -1: all", at_least(-1, "an integer")
    )
    log_every_n_steps: int = setting(50, "steps between logged values", count())
    enable_checkpointing: bool = setting(True, "write checkpoints")
    enable_progress_bar: bool = setting(True, "show one")
    enable_model_summary: bool = setting(False, "print one")
    accumulate_grad_batches: int = setting(1, "batches for each step", count())
    gradient_clip_val: int | float | None = setting(None, "largest gradient", NOT_NEGATIVE)
    gradient_clip_algorithm: str | None = setting(None, "of what", choices=("norm", "value"))
    deterministic: bool | str | None = setting(None, "true, false or warn", choices=("warn",))
    benchmark: bool | None = setting(None, "let cuDNN choose the fastest algorithms")
    inference_mode: bool = setting(True, "no gradients in validation and test")
    profiler: str | None = setting(None, "simple, advanced or pytorch")
    detect_anomaly: bool = setting(False, "find the operation that makes a NaN")
    sync_batchnorm: bool = setting(False, "BatchNorm statistics over all processes, on CPU too")
    compile: bool = setting(False, "ours, not Lightning's: torch.compile of the network")
    channels_last: bool = setting(True, "ours, too: memory format of images and convolutions")
    others: Mapping[str, Any] = setting(dict, "any other key of Lightning's Trainer: +trainer.KEY=VALUE")

    def check(self) -> None:
        """Least and most agree."""
        for least, most in (("min_epochs", "max_epochs"), ("min_steps", "max_steps")):
            low, high = getattr(self, least), getattr(self, most)
            if low is not None and high is not None and 0 <= high < low:
                raise Contradiction(f"{{}}{least}={low} is more than {{}}{most}={high}")


PENALTIES = ("gates", "weights")
"""What lambda_l0 is the price of: L_C0, or the share of the weights with an open gate."""


OBJECTIVES = (
    *(f"{stage}_{figure}" for figure in FIGURES for stage in ("val", "test")),
    *("L_C0", "expected_sparsity", "exact_sparsity", "parameters", "macs"),
    *("compacted_parameters", "compacted_macs", "gates", "open_gates", "seconds_per_epoch"),
)
"""Numbers of results.json that a sweeper can be given, besides the figures of a task of yours."""


def check_pair(said: str, tasks: tuple[str, ...], task: TaskSettings, noun: str) -> None:
    """Raise an InputError unless a network or data serve a task.

    Args:
        said: setting that names them.
        tasks: that they serve; () for any.
        task: to be learnt.
        noun: what they are, for the message.
    """
    if tasks and task.name not in ("auto", "own", *tasks):
        raise InputError(
            f"{said} has {noun} for task={' or '.join(tasks)}, not for {task.said}: change one of them"
        )


def that_go_with(arguments: list[str]) -> list[str]:
    """Return the choices of network and data that go with what the arguments name of model, data and task.

    Args:
        arguments: of train.py.
    """
    given = dict(a.lstrip("+").partition("=")[::2] for a in arguments)
    own = {key.partition(".")[0] for key in given if key.endswith("._target_")}
    if "experiment" in given:
        return []
    task = given.get("task", "")
    data, model = given.get("data"), given.get("model")
    found: list[str] = []
    if data is None and "data" not in own:
        network = NETWORKS.get(model or "")
        found += network.DATA if network is not None and network.DATA else DATA_OF.get(task, ())
        data = next((f.partition("=")[2] for f in found), None)
    if model is None and "model" not in own:
        source = SOURCES.get(data or "")
        found += MODEL_OF.get(task, source.MODEL if source is not None else ())
    return [choice for choice in found if choice.partition("=")[0] not in given]


DATA_OF: dict[str, tuple[str, ...]] = {"language_model": ("data=text",)}
"""The data of a task where the user names none."""
MODEL_OF: dict[str, tuple[str, ...]] = {
    "language_model": ("model=gpt",),
    "text_classification": ("model=gpt",),
    "segmentation": ("model=unet",),
}
"""The network of a task where the user names none."""


RUNTIMES = ("eager", "compiled", "onnxruntime", "openvino")
"""Where a network can run; ``sparsereg.compression.timing.runtimes`` has what each needs."""
TARGETS = ("target_sparsity", "target_macs", "target_latency_ms", "target_memory_mb")
"""Settings that say what a network may cost."""
MEASURED = ("target_latency_ms", "target_memory_mb")
"""Those that are about the compacted network as it runs."""
TIMING = ("runtime", "threads", "batch")
"""How it runs; each command has its own."""


@dataclass(frozen=True)
class Training(Settings):
    """Train or fine-tune a network with L0 gates. `python train.py --help` explains the keys."""

    lambda_l0: float | None = setting(1.0, "loss = acc_loss + lambda_l0 * L_C0", NOT_NEGATIVE)
    lambda_l2: float = setting(
        0.0, "weight of half the expected squared weights under their gates (L2 inside L0)", NOT_NEGATIVE
    )
    droprate_init: float = setting(
        0.5, "initial dropout rate of the gates; 0.05 starts open, for fine-tuning", RATE
    )
    shape: str = setting(
        "free",
        "uniform: layers that are alike stay equally large, so that the network's own class can hold the"
        " result; docs/any-network.md",
        choices=SHAPES,
    )
    target_sparsity: float | None = setting(
        None, "share of the parameters to remove, instead of lambda_l0", within("(0, 1)", "a share")
    )
    target_macs: float | None = setting(
        None,
        "share of the multiply-accumulate operations to keep, instead of lambda_l0",
        within("(0, 1)", "a share"),
    )
    target_latency_ms: float | None = setting(
        None,
        "milliseconds that one call of the compacted network may take, measured; instead of lambda_l0",
        POSITIVE,
    )
    target_memory_mb: float | None = setting(
        None,
        "10^6 bytes that its weights and the peak of its activations may take; instead of lambda_l0",
        POSITIVE,
    )
    runtime: str | None = setting(
        None,
        "where target_latency_ms and fronts are measured; null: onnxruntime if it is installed, else eager",
        choices=RUNTIMES,
    )
    threads: int = setting(1, "that may compute in such a call", count())
    batch: int = setting(1, "examples in such a call", count())
    penalty: str = setting(
        "gates",
        "what lambda_l0 is the price of: gates (L_C0) or weights (as in the paper)",
        choices=PENALTIES,
    )
    ckpt_path: str | None = setting(None, "a checkpoint, or the folder of a run, to start from or to resume")
    resume_training: bool = setting(False, "continue that run exactly: optimizer, schedules, epoch, gates")
    without_using_gate: bool = setting(False, "train the plain network, with no gates and no penalty")
    seed: int = setting(0, "initial weights, order and augmentation of the images, noise of the gates", SEED)
    test_checkpoint: str = setting("last", "which checkpoint is tested at the end", choices=("last", "best"))
    label_smoothing: float = setting(
        0.0, "share of each label that is spread over all classes", within("[0, 1)", "a share")
    )
    ema_decay: float | None = setting(
        None,
        "e.g. 0.999: measure and save an exponential moving average of the weights",
        within("(0, 1)"),
    )
    target: Target = setting(Target, "how target_sparsity or target_macs is reached; docs/choosing-lambda.md")
    front: tuple[float, ...] = setting(
        (),
        "shares to remove, rising, e.g. [0.5,0.7,0.9]: trains without gates, then makes each size from the"
        " one before in one shot, repaired and fine-tuned; docs/one-shot.md",
        within("(0, 1)", "a share"),
        empty=True,
    )
    front_epochs: int | None = setting(
        None,
        "of fine-tuning at each size of the front; null: finetune.epochs, or a quarter of the run's for each"
        " time that a size is half of the one before",
        count(0),
    )
    pick: str | None = setting(
        None, "a bound on a column of front.csv, such as 'latency_ms<=3': the best that fits is handed over"
    )
    finetune: Finetune = setting(
        Finetune, "then the gates are folded and the compacted network is trained further"
    )
    distill: Distill = setting(Distill, "learn from a trained network, too")
    objective: str | tuple[str, ...] | None = setting(
        None,
        "in a sweep: the number of results.json that Hydra's sweeper gets, or a list of them; null: the main"
        " figure of validation",
        empty=False,
    )
    rerun: bool = setting(False, "in a sweep (-m): do jobs again that finished in an earlier sweep")
    model: Network = setting(GoogleNetModel, "the network")
    data: Data = setting(Cifar10Data, "what it learns from")
    task: TaskSettings = setting(TaskSettings, "what it learns: that of the data unless you name it")
    temperature: Temperature = setting(Temperature, "beta of the gates")
    optimizer: Optimizer = setting(Optimizer, "optimizer and learning rate")
    trainer: Trainer = setting(Trainer, "any key of Lightning's Trainer")
    logger: Logger = setting(Logger, "where scalars go")
    callbacks: Callbacks = setting(Callbacks, "what happens beside the steps")

    @property
    def target_key(self) -> str | None:
        """Which of ``TARGETS`` is given, if any."""
        return next((k for k in TARGETS if getattr(self, k) is not None), None)

    @property
    def target_said(self) -> str:
        """The target as the user gives it."""
        key = self.target_key
        return self.target.parts[0].said if key is None else f"{key}={getattr(self, key):g}"

    @property
    def has_target(self) -> bool:
        """Whether gates are trained to a target of the network, or of a part of it."""
        return not self.front and (self.target_key is not None or bool(self.target.parts))

    @property
    def gated(self) -> bool:
        """Whether the network has gates while it trains."""
        return not self.without_using_gate and not self.front

    @property
    def gains(self) -> tuple[float, float]:
        """Proportional and integral gain of the target's multiplier: as given, of a loss on labels.

        A teacher's part of the loss is multiplied by the square of its temperature, and what a unit is worth
        with it; else the gates would fall behind their target.
        """
        d, scale = self.distill, 1.0
        if d.ckpt_path is not None and not d.only_finetuning:
            scale += d.weight * (max(1.0, d.temperature**2) - 1)
        return scale * self.target.proportional_gain, scale * self.target.integral_gain

    @property
    def front_cost(self) -> str:
        """What the sizes of a front are shares of."""
        return "parameters" if self.target_macs is None else "macs"

    @property
    def epochs_of_sizes(self) -> dict[float, int]:
        """Of fine-tuning at each size of a front.

        Where nothing is said, a quarter of the run's for each time that a size is half of the one before.
        """
        said = self.finetune.epochs or None if self.front_epochs is None else self.front_epochs
        if said is not None:
            return dict.fromkeys(self.front, said)
        quarter = (self.trainer.max_epochs or 0) / 4
        steps = itertools.pairwise((0.0, *self.front))
        return {size: max(1, round(quarter * math.log2((1 - last) / (1 - size)))) for last, size in steps}

    @property
    def compacts(self) -> bool:
        """Whether channels leave while the network is trained."""
        return self.callbacks.compact_every_n_epochs > 0 and self.gated

    def check(self) -> None:
        """Settings that stand in each other's way."""
        if self.resume_training and self.ckpt_path is None:
            raise InputError(
                "resume_training=true needs a checkpoint: give ckpt_path=RUN/checkpoints/last.ckpt"
            )
        if self.objective is not None and self.task.name != "own":
            check_objective(self.objective, OBJECTIVES)
        self._check_pairs()
        if self.penalty == "weights" and isinstance(self.model, TorchvisionModel | OwnNetwork):
            whose = "torchvision network" if isinstance(self.model, TorchvisionModel) else "network of yours"
            raise InputError(
                f"penalty=weights does not know which weights the gates of a {whose} stand for: "
                "give penalty=gates, or a target"
            )
        if self.finetune.epochs and self.without_using_gate and not self.front:
            raise InputError(
                "finetune.epochs trains what gates have left, but without_using_gate=true: leave one of them"
                " out"
            )
        self._check_distill()
        self._check_front()
        self._check_target()
        self._check_shape()
        if self.compacts:
            self._check_compaction()

    def _check_pairs(self) -> None:
        """Network, data and task go together, as far as their names tell."""
        for said, tasks, noun in (
            (self.data.said, self.data.TASKS, "labels"),
            (self.model.said, self.model.TASKS, "a network"),
        ):
            check_pair(said, tasks, self.task, noun)
        data, model = self.data.TASKS, self.model.TASKS
        if data and model and not set(data) & set(model):
            raise InputError(
                f"{self.model.said} is for task={' or '.join(model)}, {self.data.said} for task="
                f"{' or '.join(data)}: change one of them"
            )

    def _check_distill(self) -> None:
        if not self.distill.only_finetuning:
            return
        if self.distill.ckpt_path is None:
            raise InputError("distill.only_finetuning=true needs a teacher: give distill.ckpt_path")
        if not (self.finetune.epochs or self.front):
            raise InputError("distill.only_finetuning=true needs fine-tuning: give finetune.epochs or front")

    def _check_front(self) -> None:
        if not self.front:
            for key in ("pick", "front_epochs"):
                if getattr(self, key) is not None:
                    raise InputError(f"{key}={getattr(self, key)} needs a front: give front=[0.5,0.7,0.9]")
            return
        said = f"front={shown(self.front)}"
        if any(b <= a for a, b in itertools.pairwise(self.front)):
            raise InputError(f"{said}: expected shares to remove that rise, such as [0.5,0.7,0.9]")
        removed = self.target_sparsity if self.target_macs is None else 1 - self.target_macs
        if self.target_key not in (None, "target_sparsity", "target_macs") or (
            removed is not None and abs(removed - self.front[-1]) > 1e-9
        ):
            raise InputError(
                f"{said} ends at target_sparsity={self.front[-1]:g}: leave the target out, or give"
                f" that, or target_macs={1 - self.front[-1]:g} for a front of multiply-accumulates"
            )
        if self.target.parts:
            raise InputError(f"{said} and {self.target.parts[0].said} exclude each other: give one of them")
        if self.trainer.strategy != "auto" or self.trainer.devices not in (1, "1", "auto"):
            raise InputError(f"{said} is made by one process: give trainer.devices=1 and no trainer.strategy")
        if self.pick is not None:
            Pick.read(self.pick, None if isinstance(self.task, OwnTask) else self.task.FIGURES or FIGURES)

    def _check_target(self) -> None:
        key = self.target_key
        self._check_one_shot()
        both = [k for k in TARGETS if getattr(self, k) is not None]
        if len(both) > 1:
            raise InputError(f"{both[0]} and {both[1]} exclude each other: give one of them")
        if not self.has_target:
            if self.lambda_l0 is None and not self.front:
                raise InputError(
                    "lambda_l0=null leaves open how many gates close: give target_sparsity, or a number"
                )
            return
        given = self.target_said
        if key in MEASURED and (
            self.trainer.strategy != "auto" or self.trainer.devices not in (1, "1", "auto")
        ):
            raise InputError(
                f"{given} is measured by one process: give trainer.devices=1 and no trainer.strategy"
            )
        if self.without_using_gate:
            raise InputError(f"{given} needs gates, but without_using_gate=true: leave one of them out")
        if self.lambda_l0 not in (None, declared(Training)["lambda_l0"].default):
            raise two_ways(self)
        if self.trainer.max_epochs is None or self.trainer.max_epochs < 1:
            raise InputError(f"{given} needs to know when training ends: give trainer.max_epochs")
        if self.test_checkpoint == "best":
            raise InputError(
                f"{given} is met at the end of the run, but test_checkpoint=best: give test_checkpoint=last"
            )

    def _check_one_shot(self) -> None:
        """Before training no clock is asked; a front starts so by itself."""
        if not self.target.one_shot:
            return
        if self.front:
            raise InputError(
                f"front={shown(self.front)} makes each size in one shot by itself: leave target.one_shot out"
            )
        if self.target_key in MEASURED:
            raise InputError(
                f"target.one_shot=true and {self.target_said} exclude each other: give target_sparsity or"
                " target_macs"
            )
        if not self.has_target:
            raise InputError("target.one_shot=true needs a target: give target_sparsity or target_macs")

    def _check_shape(self) -> None:
        if self.shape == "free":
            return
        if self.without_using_gate:
            raise InputError(
                f"shape={self.shape} is one of gates, but without_using_gate=true: leave one out"
            )
        if self.model.OWN_GATES:
            raise InputError(
                f"shape={self.shape} needs a network that gets its gates by its operations, not"
                f" {self.model.said}, which has gates of its own: leave it out"
            )

    def _check_compaction(self) -> None:
        """Some things need the network at its original size."""
        trainer, every = self.trainer, self.callbacks.compact_every_n_epochs
        for excluded, given in (
            ("penalty=weights", self.penalty == "weights"),
            (f"ema_decay={self.ema_decay}", self.ema_decay is not None),
            ("trainer.compile=true", trainer.compile),
            (f"trainer.strategy={trainer.strategy}", trainer.strategy != "auto"),
            (f"trainer.devices={shown(trainer.devices)}", trainer.devices not in (1, "1", "auto")),
        ):
            if given:
                raise InputError(
                    f"callbacks.compact_every_n_epochs={every} and {excluded} do not go together: leave one"
                    " of them out"
                )


def two_ways(settings: Training) -> InputError:
    """Return the error that says that a target and lambda_l0 are both given."""
    return InputError(
        f"{settings.target_said} and lambda_l0={settings.lambda_l0:g} exclude each other: with a"
        " target, lambda is found while training; give one of them, or lambda_l0=null"
    )


EXPORTS = ("onnx", "openvino", "pt2")
AUTO = "auto"


@dataclass(frozen=True)
class Evaluation(Settings):
    """Test a checkpoint. `python test.py --help` explains the keys."""

    ckpt_path: str | None = setting(None, "a checkpoint that train.py wrote, or the folder of a run")
    seed: int = setting(0, "of everything drawn", SEED)
    compact: bool = setting(False, "write compacted.pt beside the checkpoint and test it, too")
    export: str | None = setting(
        None, "onnx, openvino or pt2: write the compacted network for deployment", choices=EXPORTS
    )
    quantize: str | None = setting(
        None, "int8: write it in 8-bit integers, too; with export=onnx", choices=("int8",)
    )
    round_to: int | str = setting(
        1,
        "keep closed channels up to multiples of this; auto: the fastest of 1, 4, 8, 16",
        count(),
        choices=(AUTO,),
    )
    benchmark: bool = setting(False, "time dense against gated against compacted, and the files")
    runtime: str | tuple[str, ...] | None = setting(
        None,
        "where to time: one or a list; null: onnxruntime where it is installed, else eager",
        choices=RUNTIMES,
        empty=False,
    )
    batch: int | tuple[int, ...] = setting((1, 32), "examples in the batches that are timed", count())
    threads: int | None = setting(None, "that may compute while timing; null: those of PyTorch", count())
    benchmark_seconds: float = setting(
        40.0, "for all timings, without what loads or compiles the networks", POSITIVE
    )
    shrink: float | None = setting(
        None,
        "share of the multiply-accumulate operations to keep: shrink in one shot, without training; write and"
        " test that, too",
        within("(0, 1)", "a share"),
    )
    model: Network = setting(GoogleNetModel, "the network; that of the checkpoint unless you name another")
    data: Data = setting(Cifar10Data, "the data; those of the checkpoint unless you name others")
    task: TaskSettings = setting(TaskSettings, "the task; that of the checkpoint unless you name another")
    trainer: Trainer = setting(Trainer, "any key of Lightning's Trainer")
    callbacks: Callbacks = setting(Callbacks, "only batch_norm matters here")

    def check(self) -> None:
        """There is something to test."""
        if self.ckpt_path is None:
            raise InputError("give the checkpoint to test: ckpt_path=RUN/checkpoints/last.ckpt")
        if self.quantize is not None and self.export != "onnx":
            raise InputError(f"quantize={self.quantize} works on an ONNX file: give export=onnx, too")
        timed = self.benchmark or self.quantize is not None or self.round_to == AUTO
        for key in ("runtime", "batch", "threads", "benchmark_seconds"):
            value = getattr(self, key)
            if value != declared(Evaluation)[key].default and not timed:
                raise InputError(f"{key}={shown(value)} is of timings: give benchmark=true, too")
        if self.round_to != 1 and not (self.compact or self.export or self.benchmark):
            raise InputError(f"round_to={self.round_to} is of what is written: give export=onnx, too")
        if self.shrink is not None and self.round_to != 1:
            raise InputError("shrink and round_to exclude each other: give one of them")
