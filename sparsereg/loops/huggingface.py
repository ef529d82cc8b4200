"""A network that gets smaller in a Trainer of Hugging Face's: `SparsifyTrainer`."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, fx, nn
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState

from sparsereg.compression.insert import Choice
from sparsereg.compression.oneshot.inputs import BATCH
from sparsereg.compression.oneshot.start import NUM_INPUTS
from sparsereg.data.batches import LABELS, moved
from sparsereg.data.form import arguments_of
from sparsereg.distributions import TEMPERATURE
from sparsereg.errors import InputError
from sparsereg.loops.groups import gated_weights, keep_rates_, regroup_
from sparsereg.loops.plain import DROPRATE, Sparsifier, saved
from sparsereg.loops.reading import ROWS, by_rule, device_of, isolated
from sparsereg.model.batch_norm_statistics import estimate_batch_norm_, has_statistics
from sparsereg.target_settings import Parts, Target

STATE = "SparsifyTrainer"
"""Key in the state of a Trainer: the name of the class, as the Trainer stores it."""


class SparsifyTrainer(TrainerCallback, ExportableState):  # type: ignore[misc, unused-ignore]
    """Makes the model of a Hugging Face Trainer smaller while it trains; to be made before ``train()``.

    Gates are put into ``trainer.model`` itself and get a group of their own in its optimizer, whose
    learning rate stays as it is. Before each step the gradient of the constraint is added to theirs; the
    cost that is allowed falls to the target, which is met exactly at the last step. Then the model is
    compacted: ``compacted``, and ``compacted.pt`` in ``output_dir``. ``train(resume_from_checkpoint=...)``
    goes on with gates, which are among the weights of a checkpoint, and multiplier, in trainer_state.json.

    Args:
        trainer: with its model, arguments and training data; given this callback.
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
        example: one batch as the model takes it, without labels; the first of the training data if None.
        families: kinds of gates, see ``sparsereg.gate``; all that serve if None.
        layers: which layers get gates, see ``sparsereg.gate``; all if None.
        gate_lr: learning rate of the gates, > 0; if None ten times that of the weights, or more in a short
            training.
        ramp: share of the steps over which the target falls geometrically, in (0, 1].
        droprate_init: initial dropout rate of the gates, in (0, 1); small ones start open.
        temperature: of the gates, > 0.
        num_images: training examples that BatchNorm statistics are taken from at the end, if there are any;
            0 leaves those of training.
        one_shot: the network is trained already: units go before the first step, as in ``sparsereg.shrink``,
            what reads them is repaired, and all steps train what is handed over. Gates learn what goes if
            False.
        save: whether ``compacted.pt`` is written.

    Attributes:
        compacted: the smaller model, in eval mode, without gates; None before the end of training.
        path: where it was written; None if it was not.
        sparsifier: the gates and their budget.

    Raises:
        InputError: see ``Sparsifier``, or there are no training data to take an example from.
        ValueError: an argument is outside its range, or nothing can be gated.

    Example:
        >>> issubclass(SparsifyTrainer, TrainerCallback)
        True
    """

    def __init__(
        self,
        trainer: Trainer,
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
        families: str | Sequence[str] | None = None,
        layers: Choice | None = None,
        gate_lr: float | None = None,
        ramp: float = Target.ramp,
        droprate_init: float = DROPRATE,
        temperature: float = TEMPERATURE,
        num_images: int = 4096,
        one_shot: bool = False,
        save: bool = True,
    ) -> None:
        self.trainer = _with_its_parts(trainer)
        self.num_images = num_images
        self.save = save
        self.one_shot = one_shot
        self.compacted: fx.GraphModule | None = None
        self.path: Path | None = None
        with isolated():
            example = next(self._batches(ROWS, ROWS), None) if example is None else example
        self.sparsifier = Sparsifier(
            self.trainer.model,
            example,
            steps=1,
            target_sparsity=target_sparsity,
            target_macs=target_macs,
            target_latency_ms=target_latency_ms,
            runtime=runtime,
            threads=threads,
            batch=batch,
            target_params=target_params,
            target_part_macs=target_part_macs,
            shape=shape,
            families=families,
            layers=layers,
            gate_lr=gate_lr,
            ramp=ramp,
            droprate_init=droprate_init,
            temperature=temperature,
            seed=trainer.args.seed,
            inplace=True,
            progress=not trainer.args.disable_tqdm and trainer.is_world_process_zero(),
        )
        if one_shot:
            self.sparsifier.asked.of_one_shot()  # refuses milliseconds
        self._make = trainer.create_optimizer
        self.trainer.create_optimizer = self._create_optimizer
        trainer.add_callback(self)

    @property
    def model(self) -> nn.Module:
        """The model with gates."""
        return self.sparsifier.model

    def _create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Let the Trainer make its optimizer, and give the gates a group of their own."""
        fresh = self.trainer.optimizer is None
        made = self._make(*args, **kwargs)
        optimizer = self.trainer.optimizer
        own = {id(location) for location in self.sparsifier.gates}
        moved_already = {id(p) for group in optimizer.param_groups for p in group["params"]} & own
        if fresh or not moved_already:
            self.sparsifier.steps = max(self._steps(), 1)
            regroup_([optimizer], gated_weights(self.model), self.sparsifier.gate_rate)
        return made

    def _steps(self) -> int:
        return int(self.trainer.state.max_steps or self.trainer.args.max_steps)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take units out in one shot, if that is asked for, or go on with the multiplier of a checkpoint."""
        if self.one_shot and not state.global_step:
            with _plainly_called(self.model), isolated():
                self.sparsifier.decide(self._batches(BATCH, NUM_INPUTS))
        kept = state.stateful_callbacks.get(STATE)
        if state.global_step and isinstance(kept, Mapping):
            self.sparsifier.load_state_dict(kept["attributes"]["sparsifier"])

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any
    ) -> None:
        """Add the gradient of the constraint to that of the gates."""
        self.sparsifier.at(state.global_step / max(state.max_steps, 1))
        keep_rates_(optimizer)
        self.sparsifier.add_gradient_()
        self.sparsifier.step()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After the last step, before it is saved, meet the target; statistics fit what is saved."""
        if state.global_step >= state.max_steps:
            self._meet()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Compact, however training has ended and whichever weights it has left."""
        self._meet()
        with _plainly_called(self.model):
            self.compacted = self.sparsifier.finish()
        if self.save and args.should_save:
            self.path = saved(self.compacted, Path(args.output_dir))

    def _meet(self) -> None:
        with _plainly_called(self.model):
            self.sparsifier.meet()
        if self.num_images and has_statistics(self.model):
            size = max(self.trainer.args.per_device_train_batch_size, 2)
            device = device_of(self.model)
            with isolated():
                estimate_batch_norm_(
                    self.model, (moved(b, device) for b in self._batches(size, self.num_images))
                )

    def state(self) -> dict[str, Any]:
        """What the Trainer writes into trainer_state.json."""
        return {"args": {}, "attributes": {"sparsifier": _in_json(self.sparsifier.state_dict())}}

    def _batches(self, size: int, most: int) -> Iterator[Any]:
        """What the model reads of the training data, in their order, without labels."""
        data, collate = self.trainer.train_dataset, self.trainer.data_collator
        if data is None:
            raise InputError("the Trainer has no train_dataset to take an example from: give example=...")
        known = arguments_of(self.trainer.model)
        names = None if known is None else known | set(LABELS) | {"label_ids", *self.trainer.label_names}
        rows = (data[i] for i in range(len(data))) if hasattr(data, "__len__") else iter(data)
        taken = (_known(row, names) for row in itertools.islice(rows, most))
        while len(batch := list(itertools.islice(taken, size))) >= min(size, ROWS):
            yield by_rule(self.trainer.model, dict(collate(batch)))


def _with_its_parts(trainer: Any) -> Any:
    """A Trainer whose model is there, and whose methods can be replaced, which its type does not say."""
    return trainer


@contextmanager
def _plainly_called(model: nn.Module) -> Iterator[None]:
    """Call a model in its own precision for a while, where accelerate has put a cast around it."""
    cast = model.__dict__.pop("forward", None) if "_original_forward" in model.__dict__ else None
    try:
        yield
    finally:
        if cast is not None:
            model.__dict__["forward"] = cast


def _known(row: Any, names: set[str] | None) -> Any:
    if names is None or not isinstance(row, Mapping):
        return row
    return {name: value for name, value in row.items() if name in names}


def _in_json(value: Any) -> Any:
    """Tensors as lists, keys as text."""
    if isinstance(value, Mapping):
        return {str(key): _in_json(part) for key, part in value.items()}
    return value.tolist() if isinstance(value, Tensor) else value
