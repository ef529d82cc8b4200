"""A network that gets smaller in a training loop of your own: `Sparsifier`."""

import itertools
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from sparsereg.checks import check_count, check_positive
from sparsereg.compression.budget import Constraint
from sparsereg.compression.compact import compact
from sparsereg.compression.count import Accountant
from sparsereg.compression.insert import Choice, gate_
from sparsereg.compression.oneshot.inputs import BATCH, read_inputs
from sparsereg.compression.oneshot.start import NUM_INPUTS, start_in_one_shot_
from sparsereg.compression.running import copied
from sparsereg.compression.storage import save_compacted
from sparsereg.data.batches import moved
from sparsereg.device import several_processes
from sparsereg.distributions import TEMPERATURE
from sparsereg.errors import InputError
from sparsereg.loops.asked import Asked
from sparsereg.loops.reading import check_example, device_of, isolated, like
from sparsereg.model.batch_norm_statistics import estimate_batch_norm_
from sparsereg.progress import showing
from sparsereg.target_settings import Parts, Target

log = logging.getLogger(__name__)

LR_RATIO, ACROSS = 10.0, 22.0
"""Learning rate of the gates over that of the weights, and at least so much over the number of steps: with it
a gate gets from open to shut in a fifth of them where, as under Adam, a step is as long as the rate."""
DROPRATE = 0.05
"""Gates start open: the network may have been trained before."""


class Sparsifier:
    """Puts gates into a network, holds its cost below a target that falls while you train, and compacts it.

    The loss gets the penalty of the constraint (``loss``), the gates a learning rate of their own
    (``parameter_groups``), and ``step`` says that the optimizer has made a step.

    Args:
        model: any network without gates; it is copied, see ``inplace``.
        example: one batch as it takes it: a tensor, a tuple of inputs, or a dictionary of inputs by name.
        steps: of the optimizer that you will make, >= 1.
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
        families: kinds of gates, see ``sparsereg.gate``; all that serve if None.
        layers: which layers get gates, see ``sparsereg.gate``; all if None.
        gate_lr: learning rate of the gates, > 0; if None ten times that of the weights, or more in a short
            training.
        ramp: share of the steps over which the target falls geometrically, in (0, 1].
        droprate_init: initial dropout rate of the gates, in (0, 1); small ones start open.
        temperature: of the gates, > 0.
        seed: of the small noise on the gates' initial locations.
        inplace: put the gates into ``model`` itself, whose parameters stay the same objects.
        data: inputs of a trained network, a loader or batches, labels behind them or not: the network starts
            where ``sparsereg.shrink`` leaves it, in place, and all steps train what is handed over. Gates
            learn what goes if None.
        progress: show on a terminal what takes its time: looking for gates, timing, one shot, compaction.

    Attributes:
        model: the network with gates: what you train.
        budget: what it may cost, and the multiplier.
        shown: whether long work is shown.

    Raises:
        InputError: the network cannot be called with the example or traced, answers differently in two
            calls in eval mode, or the target is below what gates cannot take.
        ValueError: an argument is outside its range, or nothing can be gated.

    Example:
        >>> net = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 2))
        >>> x, y = torch.randn(64, 6), torch.randint(2, (64,))
        >>> sparsifier = Sparsifier(net, x[:2], target_macs=0.5, steps=20)
        >>> optimizer = torch.optim.Adam(sparsifier.parameter_groups(lr=1e-2))
        >>> for _ in range(20):
        ...     loss = sparsifier.loss(nn.functional.cross_entropy(sparsifier.model(x), y))
        ...     optimizer.zero_grad()
        ...     loss.backward()
        ...     optimizer.step()
        ...     sparsifier.step()
        >>> small = sparsifier.finish()
        >>> small(x).shape, sum(p.numel() for p in small.parameters()) <= 0.55 * 290
        (torch.Size([64, 2]), True)
    """

    def __init__(
        self,
        model: nn.Module,
        example: Any,
        *,
        steps: int,
        target_sparsity: float | None = None,
        target_macs: float | None = None,
        target_latency_ms: float | None = None,
        runtime: str | None = None,
        threads: int = 1,
        batch: int = 1,
        target_params: Parts | None = None,
        target_part_macs: Parts | None = None,
        shape: str = "free",
        families: str | Sequence[str] | None = None,
        layers: Choice | None = None,
        gate_lr: float | None = None,
        ramp: float = Target.ramp,
        droprate_init: float = DROPRATE,
        temperature: float = TEMPERATURE,
        seed: int = 0,
        inplace: bool = False,
        data: Any = None,
        progress: bool = True,
    ) -> None:
        self.steps = check_count("steps", steps)
        self.gate_lr = gate_lr if gate_lr is None else check_positive("gate_lr", gate_lr)
        self.how = Target(ramp=ramp)
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
        self.example = check_example(model, example)
        self.model = model if inplace else copied(model)
        self.shown = progress
        with showing(self.shown):
            gate_(
                self.model,
                self.example,
                layers,
                families=families,
                shape=shape,
                droprate_init=droprate_init,
                temperature=temperature,
                generator=torch.Generator().manual_seed(seed),
            )
            self.budget = asked.budget(Accountant(self.model, self.example), self.example, self.how)
        self.num_steps = 0
        self.progress = 0.0
        self._measured = False
        self._met_with: Tensor | None = None
        self.asked = asked
        self.seed = seed
        if data is not None:
            self.decide(data)

    def decide(self, data: Any) -> None:
        """Shut the gates that one shot would, repair what reads them, and leave the rest open for good.

        Args:
            data: inputs of the network, whose weights are trained; see ``sparsereg.shrink``.

        Raises:
            InputError: there are no inputs, or the target is in milliseconds.
        """
        cost, kept = self.asked.of_one_shot()
        shares = self.asked.shares
        with isolated(), showing(self.shown):
            batches = read_inputs(self.model, data, NUM_INPUTS, BATCH)
            start_in_one_shot_(self.model, self.example, cost, kept, batches, shares, seed=self.seed)
        self.budget.constraint = None
        self._measured = False
        if several_processes():  # each has seen other inputs
            for value in itertools.chain(self.model.parameters(), self.model.buffers()):
                torch.distributed.broadcast(value.detach(), 0)

    @property
    def gates(self) -> list[nn.Parameter]:
        """The locations of all gates, which are parameters of the network."""
        return [gate.log_alpha for gate in self.budget.accountant.gates]

    def parameter_groups(self, lr: float, **options: Any) -> list[dict[str, Any]]:
        """Return the parameters for an optimizer: those of the network, and the gates.

        The gates learn faster and have no weight decay. Where a schedule lets the learning rate of the
        weights fall, leave theirs as it is, so that the target can be met at the end.

        Args:
            lr: of the weights.
            **options: of the weights' group, such as ``weight_decay``.
        """
        gates = self.gates
        own = {id(p) for p in gates}
        weights = [p for p in self.model.parameters() if p.requires_grad and id(p) not in own]
        return [
            {"params": weights, "lr": lr, **options},
            {"params": gates, **options, "lr": self.gate_rate(lr), "weight_decay": 0.0},
        ]

    def gate_rate(self, lr: float) -> float:
        """Return the learning rate of the gates.

        Args:
            lr: of the weights.
        """
        return max(LR_RATIO * lr, ACROSS / self.steps) if self.gate_lr is None else self.gate_lr

    def loss(self, task_loss: Tensor) -> Tensor:
        """Return the loss with the penalty of the constraint.

        Where a step takes the gradients of several batches together, divide what this returns, so that the
        penalty counts once in each step.

        Args:
            task_loss: a scalar.
        """
        constraint = self._hold()
        return task_loss + constraint.penalty().to(task_loss.dtype)

    def add_gradient_(self, optimizer: torch.optim.Optimizer | None = None, scale: float = 1.0) -> bool:
        """Add the gradient of the penalty to the gates, where the loss is out of reach; instead of ``loss``.

        Args:
            optimizer: only to gates that it moves; to all if None.
            scale: of the gradients, which mixed precision enlarges.

        Returns:
            Whether there were any.
        """
        return self._hold().add_gradient_(optimizer, scale)

    def _hold(self) -> Constraint:
        if not self._measured or self.budget.constraint is None:
            self._measured = True
            self.budget.measure(self.progress / self.how.ramp, self.how.every_n_steps)
        assert self.budget.constraint is not None
        return self.budget.constraint

    def at(self, progress: float) -> None:
        """Say how far training is, where it is not counted in steps.

        Args:
            progress: in [0, 1].
        """
        self.progress = progress

    def step(self) -> None:
        """Say that the optimizer has made a step."""
        self.num_steps += 1
        self.progress = self.num_steps / self.steps
        self.budget.met = False
        if self.num_steps % self.how.every_n_steps == 0:
            self._measured = False

    def meet(self) -> None:
        """Open or shut the gates nearest to the boundary until the exact cost meets the target."""
        now = torch.cat([location.detach().flatten() for location in self.gates])
        if not self.budget.met or self._met_with is None or not torch.equal(now, self._met_with):
            with showing(self.shown):
                self.budget.meet()
            self._met_with = torch.cat([location.detach().flatten() for location in self.gates])

    def finish(self, batches: Iterable[Any] | None = None) -> fx.GraphModule:
        """Meet the target exactly and return the smaller network, in eval mode, without gates.

        Few gates change, those nearest to the boundary. The network with gates stays as it is in all else.

        Args:
            batches: as the network takes them, labels behind them or not; from them BatchNorm statistics
                are taken anew, which training gathers under sampled gates. As training left them if None.
        """
        self.meet()
        if batches is not None:
            device = device_of(self.model)
            estimate_batch_norm_(self.model, (moved(like(self.example, b), device) for b in batches))
        with showing(self.shown):
            return compact(self.model, moved(self.example, device_of(self.model)))

    def state_dict(self) -> dict[str, Any]:
        """What goes into a checkpoint beside the state of the network, which holds the gates.

        Plain numbers and tensors: it loads with ``torch.load(weights_only=True)``.
        """
        return {"num_steps": self.num_steps, "measured": self._measured, "budget": self.budget.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on exactly from what ``state_dict`` returned.

        Args:
            state: of a sparsifier of the same network.

        Raises:
            ValueError: it is of other gates.
        """
        try:
            self.budget.load_state_dict(state["budget"])
            self.num_steps, self._measured = int(state["num_steps"]), bool(state["measured"])
            self.progress = self.num_steps / self.steps
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not the state of a Sparsifier: {error!r} in it") from error


def saved(compacted: fx.GraphModule, folder: Path) -> Path | None:
    """Write ``compacted.pt`` into a folder and return its path; None where the format has no word for it.

    Args:
        compacted: the smaller network.
        folder: made if it is not there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        path = save_compacted(compacted, folder / "compacted.pt")
    except InputError as error:  # nothing is lost: the network itself is there
        log.warning("compacted.pt is not written: %s", error)
        return None
    log.info("the compacted network: %s", path)
    return path
