"""A network that gets smaller in anybody's LightningModule: the callback `Sparsify`."""

import inspect
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.utilities.model_helpers import is_overridden
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map

from sparsereg.checks import check_count
from sparsereg.compression.insert import Choice, check_shape
from sparsereg.compression.oneshot.inputs import BATCH
from sparsereg.compression.oneshot.start import NUM_INPUTS
from sparsereg.compression.running import evaluating, first_line
from sparsereg.compression.units.together import draw_anew
from sparsereg.data.batches import call
from sparsereg.device import several_processes
from sparsereg.distributions import TEMPERATURE
from sparsereg.errors import InputError
from sparsereg.loops.asked import Asked
from sparsereg.loops.first_call import first_call
from sparsereg.loops.groups import follow_, gated_weights, keep_rates_, regroup_
from sparsereg.loops.plain import DROPRATE, Sparsifier, saved
from sparsereg.loops.reading import as_inputs, by_rule, few, isolated
from sparsereg.model.batch_norm_statistics import has_statistics
from sparsereg.target_settings import Parts, Target
from sparsereg.training.batch_norm_data import estimation_batches
from sparsereg.training.callbacks import BatchNormEstimation, ReproducibleEpochs
from sparsereg.training.lightning import batches_anew, first_batch, gradient_scale, transferred

log = logging.getLogger(__name__)


MANY = 10_000
"""Steps where their number is not known."""


class Sparsify(Callback):
    """Makes the network of any LightningModule smaller while it trains: one argument of the Trainer.

    When training begins, gates are put into the network: that which ``training_step`` calls, or the module
    itself. They get a group of their own in the optimizer that moves the weights they gate, whose learning
    rate stays as it is. Before each step of the optimizer the gradient of the constraint is added to theirs;
    over the first part of the run the cost that is allowed falls to the target. In the last epoch, before it
    is validated and saved, the target is met exactly; BatchNorm statistics are taken anew wherever the
    network is measured or saved. At the end the network is compacted: ``compacted``, and ``compacted.pt``
    beside the checkpoints.

    A run that is resumed from a checkpoint at the end of an epoch goes on exactly: gates, multiplier and
    noise are in it (``trainer.fit(..., ckpt_path="last.ckpt")`` with the same callback). For that all
    generators (PyTorch's, NumPy's, Python's) are seeded at the start of each epoch, by ``seed`` and epoch.

    Args:
        target_sparsity: share of the parameters to remove, in (0, 1); or
        target_macs: share of the multiply-accumulate operations to keep, in (0, 1); or
        target_latency_ms: milliseconds that one call of the compacted network may take, > 0, measured.
        runtime: where that is measured: eager, compiled, onnxruntime or openvino; onnxruntime, or eager where
            that is not installed, if None.
        threads: that may compute in such a call.
        batch: examples in such a call.
        target_params: shares of the parameters to remove from parts: modules by a pattern of names, or
            families of gates; ``{"blocks.*.mlp": 0.5}`` or ``"blocks.*.mlp:0.5,heads:0.25"``. Beside the
            target of the whole network, or alone.
        target_part_macs: shares of the multiply-accumulate operations of parts to keep, in the same way.
        shape: ``free`` or ``uniform``, see ``sparsereg.gate``.
        example: one batch as the network takes it: a tensor, a tuple of inputs, or a dictionary of inputs
            by name. If None, what ``training_step`` calls the network with on the first batch.
        module: name of the network in the LightningModule, such as ``net`` or ``model.backbone``.
        families: kinds of gates, see ``sparsereg.gate``; all that serve if None.
        layers: which layers get gates, see ``sparsereg.gate``; all if None.
        gate_lr: learning rate of the gates, > 0; if None ten times that of the weights, or more in a short
            training.
        ramp: share of the run over which the target falls geometrically, in (0, 1].
        droprate_init: initial dropout rate of the gates, in (0, 1); small ones start open.
        temperature: of the gates, > 0.
        num_images: training examples that BatchNorm statistics are taken from; 0 leaves those of training.
        seed: of the noise in each epoch; the one that PyTorch started with if None.
        one_shot: the network is trained already: units go before the first step, as in ``sparsereg.shrink``,
            what reads them is repaired, and all steps train what is handed over. Gates learn what goes if
            False.
        save: whether ``compacted.pt`` is written.

    Attributes:
        compacted: the smaller network, in eval mode, without gates; None before the end of training.
        path: where it was written; None if it was not.
        sparsifier: the gates and their budget; None before training.

    Raises:
        ValueError: an argument is outside its range.

    Example:
        >>> Sparsify(target_macs=0.5).compacted is None
        True
    """

    def __init__(
        self,
        target_sparsity: float | None = None,
        target_macs: float | None = None,
        target_latency_ms: float | None = None,
        *,
        runtime: str | None = None,
        threads: int = 1,
        batch: int = 1,
        target_params: Parts | None = None,
        target_part_macs: Parts | None = None,
        shape: str = "free",
        example: Any = None,
        module: str | None = None,
        families: str | Sequence[str] | None = None,
        layers: Choice | None = None,
        gate_lr: float | None = None,
        ramp: float = Target.ramp,
        droprate_init: float = DROPRATE,
        temperature: float = TEMPERATURE,
        num_images: int = 4096,
        seed: int | None = None,
        one_shot: bool = False,
        save: bool = True,
    ) -> None:
        asked = Asked(
            target_sparsity,
            target_macs,
            target_latency_ms,
            runtime,
            threads,
            batch,
            target_params,
            target_part_macs,
        )
        self.settings: dict[str, Any] = {
            **vars(asked),
            **{"families": families, "layers": layers, "shape": check_shape(shape)},
            **{"gate_lr": gate_lr, "ramp": Target(ramp=ramp).ramp},
            **{"droprate_init": droprate_init, "temperature": temperature},
        }
        self.example = example
        self.module = module
        self.seed = seed if seed is None else check_count("seed", seed + 1) - 1
        self.one_shot = one_shot
        if one_shot:
            asked.of_one_shot()  # refuses milliseconds before anything is made
        self.save = save
        self.sparsifier: Sparsifier | None = None
        self.compacted: fx.GraphModule | None = None
        self.path: Path | None = None
        self._statistics = BatchNormEstimation(num_images, read=self._read, called=lambda: self.network)
        self._name = ""
        self._module: pl.LightningModule | None = None
        self._batches = 0
        self._resumed = False

    @property
    def network(self) -> nn.Module:
        """The network with gates."""
        return self._found.model

    @property
    def _found(self) -> Sparsifier:
        if self.sparsifier is None:
            raise RuntimeError("Sparsify puts gates into the network when the Trainer starts")
        return self.sparsifier

    # ---- before training

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Put the gates in, when the module has made its network."""
        if self._module is pl_module:
            return
        self._module = pl_module
        self.seed = torch.initial_seed() % 2**31 if self.seed is None else self.seed
        last = next((n for n in ("configure_model", "setup") if is_overridden(n, pl_module)), None)
        if last is None:
            self._insert(trainer, pl_module)
        else:
            _after(pl_module, last, lambda: self._insert(trainer, pl_module))

    def _insert(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        name, example = self.module, self.example
        with isolated():
            if example is None or (name is None and not is_overridden("forward", module)):
                batch = first_batch(trainer, module)
                found, inputs = what_is_called(module, name, batch)
                name, example = found, inputs if example is None else example
        self._name = name or ""
        network = named(module, self._name)
        self._check_statistics(trainer, module, network)
        assert self.seed is not None
        self.sparsifier = Sparsifier(
            network,
            few(network, example),
            steps=1,
            seed=self.seed,
            inplace=True,
            progress=shows_bars(trainer),
            **self.settings,
        )
        gates = sum(location.numel() for location in self.sparsifier.gates)
        log.info("%d gates in %s", gates, self._name or type(module).__name__)

    def _check_statistics(self, trainer: pl.Trainer, module: pl.LightningModule, network: nn.Module) -> None:
        """Leave BatchNorm statistics alone where the batches do not hold what the network reads."""
        if not self._statistics.num_images or not has_statistics(network):
            return
        try:
            with isolated(), evaluating(network):
                call(network, what_is_called(module, self._name, first_batch(trainer, module))[1])
        except Exception as error:
            self._statistics.num_images = 0
            log.warning(
                "BatchNorm statistics stay those of training: %s cannot be called with what the batches hold"
                " (%s)",
                type(network).__name__,
                first_line(error),
            )

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Give the gates a group of their own in the optimizers, before their state is restored."""
        progress(trainer, 0)
        steps = trainer.estimated_stepping_batches
        self._found.steps = int(steps) if 0 < steps < math.inf else MANY
        try:
            regroup_(trainer.optimizers, gated_weights(self.network), self._found.gate_rate)
        except InputError as error:
            raise InputError(f"{type(pl_module).__name__}.configure_optimizers: {error}") from error
        follow_(c.scheduler for c in trainer.lr_scheduler_configs)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Where units go in one shot, take them out; a run that is resumed has done so."""
        if not self.one_shot or self._resumed:
            return
        with isolated():
            batches = estimation_batches(trainer, pl_module, NUM_INPUTS, BATCH, self._read)
            self._found.decide([] if batches is None else batches)

    # ---- while it trains

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Seed the noise of the epoch; a resumed run draws the order of its batches anew."""
        assert self.seed is not None
        ReproducibleEpochs(self.seed).on_train_epoch_start(trainer, pl_module)
        self._batches = 0
        if self._resumed:
            batches_anew(trainer)
        self._resumed = False

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """New gates for each batch, also where parts of the network are called one by one."""
        draw_anew(self.network, None)
        self._batches = batch_idx
        self._statistics.on_train_batch_start(trainer, pl_module, batch, batch_idx)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Add the gradient of the constraint to that of the gates that this optimizer moves."""
        found = self._found
        found.at(progress(trainer, self._batches))
        keep_rates_(optimizer)
        if found.add_gradient_(optimizer, gradient_scale(trainer, optimizer)):
            found.step()
            assert found.budget.constraint is not None
            pl_module.log_dict(found.budget.constraint.scalars, sync_dist=several_processes())

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count what has been done."""
        self._batches = batch_idx + 1

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """What is measured and saved meets the target at the end, and has statistics that fit."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._meet(trainer)
        self._statistics.on_validation_start(trainer, pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The same where there was no validation."""
        self._meet(trainer)
        self._statistics.on_train_epoch_end(trainer, pl_module)

    def _meet(self, trainer: pl.Trainer) -> None:
        if progress(trainer, self._batches) >= 1:
            self._found.meet()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Compact, however training has ended."""
        self._found.meet()
        self._statistics.on_train_epoch_end(trainer, pl_module)
        self.compacted = self._found.finish()
        if self.save and trainer.is_global_zero:
            self.path = saved(self.compacted, folder(trainer))

    # ---- what a checkpoint keeps

    def state_dict(self) -> dict[str, Any]:
        """The multiplier and what was measured last, and the seed."""
        return {} if self.sparsifier is None else {"seed": self.seed, "sparsifier": self._found.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        if state_dict and self.sparsifier is not None:
            self.seed = int(state_dict["seed"])
            self._found.load_state_dict(state_dict["sparsifier"])
            self._resumed = True

    def _read(self, batch: Any) -> Any:
        assert self._module is not None
        return what_is_called(self._module, self._name, transferred(self._module, batch))[1]


def named(module: pl.LightningModule, name: str) -> nn.Module:
    """Return a part of a LightningModule; itself without a name.

    Raises:
        InputError: it has no such part.
    """
    try:
        return module.get_submodule(name)
    except AttributeError as error:
        there = ", ".join(n for n, child in module.named_children() if _weighty(child)) or "none"
        raise InputError(
            f"module={name!r}: {type(module).__name__} has no module of that name; there are {there}"
        ) from error


def what_is_called(module: pl.LightningModule, name: str | None, batch: Any) -> tuple[str, Any]:
    """Return which network ``training_step`` calls for a batch, and with what; it is left at that call.

    Args:
        module: attached to a Trainer.
        name: of the network; empty for the module itself; None to find out.
        batch: where the module is.

    Raises:
        InputError: it is not to be found out.
    """
    network = named(module, name or "")
    if not module.automatic_optimization:  # its step would move weights
        if name is None and not is_overridden("forward", module):
            raise InputError(_which(module))
        return name or "", by_rule(network, batch)
    parts: dict[str, nn.Module] = {name: network} if name is not None else _parts(module)
    try:
        with _quiet(module):
            reached = first_call(parts, lambda: _training_step(module, batch))
    except Exception as error:  # of the user's code, which needs more of training than there is yet
        log.debug("training_step cannot be asked: %r", error)
        reached = None
    if reached is None:
        if name is None and not is_overridden("forward", module):
            raise InputError(_which(module))
        return name or "", by_rule(network, batch)
    inputs = as_inputs(parts[reached.name], reached.args_given, reached.kwargs_given)
    if name is None and not _is_all(module, parts[reached.name]):
        if not is_overridden("forward", module):
            raise InputError(_which(module))
        return "", by_rule(module, batch)
    return reached.name, tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, inputs)


def _which(module: pl.LightningModule) -> str:
    there = ", ".join(n for n, child in module.named_children() if _weighty(child))
    return (
        f"Sparsify cannot tell which network of {type(module).__name__} is meant: give module= one of"
        f" {there or 'its attributes'}, or the module a forward that calls all of it"
    )


def _weighty(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters())


def _parts(module: pl.LightningModule) -> dict[str, nn.Module]:
    return {name: part for name, part in module.named_modules() if name == "" or _weighty(part)}


def _is_all(module: pl.LightningModule, part: nn.Module) -> bool:
    """Whether a part holds all weights of a module."""
    inside = {id(p) for p in part.parameters()}
    return all(id(p) in inside for p in module.parameters() if p.requires_grad)


def _training_step(module: pl.LightningModule, batch: Any) -> Any:
    """Call a step as Lightning does: with the number of the batch where it takes one, by whatever name."""
    try:
        inspect.signature(module.training_step).bind(batch, 0)
    except TypeError:
        return module.training_step(batch)
    return module.training_step(batch, 0)


@contextmanager
def _quiet(module: pl.LightningModule) -> Iterator[None]:
    """Let a module log nothing, for a while in eval mode."""
    modes = [(m, m.training) for m in module.modules()]
    module.eval()
    said = ("log", "log_dict")
    before = {name: module.__dict__[name] for name in said if name in module.__dict__}
    for name in said:
        module.__dict__[name] = lambda *args, **kwargs: None
    try:
        yield
    finally:
        for name in said:
            del module.__dict__[name]
        module.__dict__.update(before)
        for part, mode in modes:
            part.training = mode


def _after(module: pl.LightningModule, name: str, then: Callable[[], None]) -> None:
    """Run something once after the next call of a hook of a module."""
    hook = getattr(module, name)

    def both(*args: Any, **kwargs: Any) -> Any:
        module.__dict__.pop(name, None)
        result = hook(*args, **kwargs)
        then()
        return result

    module.__dict__[name] = both


def progress(trainer: pl.Trainer, batches: int) -> float:
    """Share of the training that is done, in [0, 1]: by epochs or by steps, whichever ends first.

    Args:
        trainer: that trains.
        batches: of this epoch that are done.

    Raises:
        InputError: it has no end.
    """
    shares = []
    if trainer.max_steps is not None and trainer.max_steps > 0:
        shares.append(trainer.global_step / trainer.max_steps)
    if trainer.max_epochs is not None and trainer.max_epochs > 0:
        length = float(trainer.num_training_batches)
        part = batches / length if 0 < length < math.inf else 0.0
        shares.append((trainer.current_epoch + part) / trainer.max_epochs)
    if not shares:
        raise InputError(
            "Sparsify needs to know when training ends: give the Trainer max_epochs or max_steps"
        )
    return min(max(shares), 1.0)


def shows_bars(trainer: pl.Trainer) -> bool:
    """Whether a Trainer shows a bar.

    Args:
        trainer: whose callbacks are known.
    """
    bar = trainer.progress_bar_callback
    return bar is not None and bool(getattr(bar, "is_enabled", True)) and trainer.is_global_zero


def folder(trainer: pl.Trainer) -> Path:
    """Where the checkpoints of a run are written; its own folder without any."""
    written = (getattr(callback, "dirpath", None) for callback in trainer.checkpoint_callbacks)
    return Path(next((path for path in written if path), trainer.log_dir or trainer.default_root_dir))
