"""Selection by gates, and the best weights of everybody, with the households shared out to processes.

Each process draws and moves the gates of its own households; per epoch the group sums up the totals, once.
The noise of a household depends on its place in the whole table, so that one process and many draw the same
numbers. Final weights are found in the dual, whose multipliers are the same in every process.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import scipy.sparse as sp
import torch.distributed as dist
from torch import Tensor

from sparsereg.calibration.config import Settings
from sparsereg.calibration.problem import CalibrationProblem
from sparsereg.calibration.solver.bounds import at_bounds
from sparsereg.calibration.solver.calibration import (
    FINAL_PULL,
    given_rows,
    goal_of,
    ordered_matrix,
    visiting_order,
)
from sparsereg.calibration.solver.distances.linear import Linear
from sparsereg.calibration.solver.dual_newton import Dual, Slack, solve
from sparsereg.calibration.solver.exact import BAND_STIFFNESS
from sparsereg.calibration.solver.losses import Quadratic
from sparsereg.calibration.solver.matrix import Descending, Descent, HouseholdMatrix
from sparsereg.calibration.solver.refit import SMALLEST_OF_ALL
from sparsereg.calibration.solver.selection import Goal, gates_of
from sparsereg.calibration.solver.shared import (
    SharedRows,
    SharedWeights,
    largest,
    shared_scale,
    summed,
)
from sparsereg.calibration.solver.shared_pruning import prune_shared, summed_before
from sparsereg.device import several_processes
from sparsereg.shapes import Bool, Float, Int, Shaped

METHODS = ("all", "hard_concrete", "pruning")
"""What ``select_shared`` knows; ``calibrate_shared`` is for "calibrate"."""


class SharedMatrix:
    """Some households of a matrix in each process of a group; totals are those of all of them.

    Args:
        local: The households of this process, with compiled loops.
    """

    def __init__(self, local: HouseholdMatrix) -> None:
        self._local = local
        self.num_households, self.num_targets = local.num_households, local.num_targets
        self.num_entries, self.device, self.is_compiled = local.num_entries, local.device, local.is_compiled

    def totals(
        self, weights: Float[Tensor, "households={self.num_households}"]
    ) -> Float[Tensor, "targets={self.num_targets}"]:
        """See ``HouseholdMatrix``."""
        totals = self._local.totals(weights)
        if several_processes():
            dist.all_reduce(totals)
        return totals

    def gradient(
        self,
        by_totals: Float[Tensor, "targets={self.num_targets}"],
        where: Shaped[Tensor, "households={self.num_households}"] | None = None,
    ) -> Float[Tensor, "households={self.num_households}"]:
        """See ``HouseholdMatrix``."""
        return self._local.gradient(by_totals, where)

    def squared_norms(
        self, row_weights: Float[Tensor, "targets={self.num_targets}"]
    ) -> Float[Tensor, "households={self.num_households}"]:
        """See ``HouseholdMatrix``."""
        return self._local.squared_norms(row_weights)

    def noise(self, seed: int, epoch: int) -> Float[Tensor, "households={self.num_households}"]:
        """See ``HouseholdMatrix``."""
        return self._local.noise(seed, epoch)

    def take(self, households: Int[Tensor, "selected"]) -> SharedMatrix:
        """See ``HouseholdMatrix``."""
        return SharedMatrix(self._local.take(households))

    def descend(self, at: Descent, sweeps: int) -> None:
        """See ``Descending``: each process expects the others to move totals as far as it does itself."""
        local, size = self._local, dist.get_world_size() if several_processes() else 1
        assert isinstance(local, Descending), "households are shared out where loops are compiled"
        steep = at.curvature + (size - 1) * (at.curvature - at.pull)
        for _ in range(sweeps):
            moved = at.by_totals.clone()
            own = at._replace(row_weights=size * at.row_weights, by_totals=moved, curvature=steep)
            local.descend(own, 1)
            moved.sub_(at.by_totals).div_(size)
            if size > 1:
                dist.all_reduce(moved)
            at.by_totals.add_(moved)

    def arranged(self, often: Int[Tensor, "often"] | None) -> SharedMatrix:
        """See ``HouseholdMatrix``."""
        return SharedMatrix(self._local.arranged(often))


def select_shared(
    part: CalibrationProblem, settings: Settings, method: str, num_kept: int | None = None
) -> SharedWeights:
    """Find the weights of this process's households; every process of the group calls it at the same time.

    Args:
        part: All targets, and the households of this process, in the order of the whole table. Totals only.
        settings: Of the loss, the gates, the pruning and the pull. Not known are held totals, consistency and
            losses of absolute values.
        method: "hard_concrete", where lambda decides who is kept, "pruning" or "all".
        num_kept: How many households are kept in all processes, for "pruning" alone.

    Raises:
        ValueError: a setting is not known here, a target is a ratio, or lambda_l0 shut every household.
    """
    _check(part, settings, method, num_kept)
    scale, _ = shared_scale(part)
    part = replace(part, target_scales=scale)
    initial = part.starting_weights
    order = visiting_order(part.matrix_t, part.nesting, settings.seed, by_length=method == "hard_concrete")
    order = order[initial[order] > 0]
    rows = given_rows(part)
    matrix = SharedMatrix(ordered_matrix(rows, order, settings, int(summed_before(len(initial))) + order))
    goal = goal_of(part, rows, num_kept, settings, order, matrix, int(summed(float(len(initial)))))
    if num_kept is not None:
        return _pruned(part, goal, order, num_kept, settings)
    weights, kept = np.zeros(len(initial)), initial > 0
    if method == "hard_concrete":
        gates = gates_of(goal, goal.gates, largest(float(initial.max(initial=0.0))))
        gates.step(settings.epochs)
        weights[order] = gates.weights().numpy()
        kept = weights > 0
    if summed(float(kept.sum())) == 0:
        raise ValueError(f"lambda_l0={settings.price!r} shut every household: choose a smaller one")
    low, high, steps = np.zeros(len(initial)), np.full(len(initial), np.inf), 0
    if settings.max_weight_ratio is not None:
        high = settings.max_weight_ratio * initial
    if settings.refit:
        smallest = SMALLEST_OF_ALL if method == "all" else 0.0
        low = np.where(kept, smallest * np.minimum(initial, high), 0.0)
        chi2 = FINAL_PULL if settings.chi2 is None else settings.chi2
        weights, steps = _refitted(part, goal.system.quadratic, kept, (low, high), chi2)
    before, after = (summed(part.matrix.astype(np.float64) @ w) for w in (initial, weights))
    hit = at_bounds(weights, low, high) & kept & (np.isfinite(high) | (low > 0))
    return SharedWeights(
        weights, after, before, scale, part.scaled_errors(after), None, np.empty(0, dtype=np.int64),
        int(summed(float(hit.sum()))), steps,
    )  # fmt: skip


def _pruned(
    part: CalibrationProblem, goal: Goal, order: np.ndarray, num_kept: int, settings: Settings
) -> SharedWeights:
    """A wanted number of households, and what they reach."""
    initial = part.starting_weights
    # Each process pulls its own households, by its share of all.
    share = float(initial.sum()) / float(summed(initial.sum()))
    goal = replace(goal, system=replace(goal.system, chi2=goal.system.chi2 * share))
    weights, result = prune_shared(part, goal, order, num_kept, settings)
    before, after = (summed(part.matrix.astype(np.float64) @ w) for w in (initial, weights))
    hit = 0
    if settings.max_weight_ratio is not None:
        high = settings.max_weight_ratio * initial
        hit = int(summed(float((at_bounds(weights, np.zeros(len(initial)), high) & (weights > 0)).sum())))
    none = np.empty(0, dtype=np.int64)
    return SharedWeights(
        weights, after, before, part.scale, part.scaled_errors(after), None, none, hit, result.steps or 0
    )


def _check(part: CalibrationProblem, settings: Settings, method: str, num_kept: int | None) -> None:
    if method not in METHODS:
        known = ", ".join(METHODS)
        raise ValueError(f"method must be one of {known} in a group of processes, got {method!r}")
    if (method == "pruning") != (num_kept is not None):
        raise ValueError(
            f"method={method!r}: num_households belongs to method='pruning' in a group of processes"
        )
    if part.denominators is not None:
        raise ValueError(
            "a group of processes calibrates totals only: make ratios totals, SharedRatios.linear"
        )
    if settings.loss not in ("relative", "mse"):
        raise ValueError(f"loss must be relative or mse in a group of processes, got {settings.loss!r}")
    if settings.hold_total or settings.consistency:
        raise ValueError("hold_total and consistency are not known in a group of processes")
    if settings.refit and settings.chi2 == 0:
        raise ValueError("chi2 must be > 0 in a group of processes: final weights are found by their pull")


def _refitted(
    part: CalibrationProblem,
    quadratic: Quadratic,
    kept: Bool[np.ndarray, "households"],
    bounds: tuple[Float[np.ndarray, "households"], Float[np.ndarray, "households"]],
    chi2: float,
) -> tuple[Float[np.ndarray, "households"], int]:
    """Best weights of the kept, near their initial ones times one factor, as ``refit.by_dual`` finds them.

    Returns:
        Weights of all households of this process, and Newton's steps.
    """
    initial = part.starting_weights
    whole, own = summed([initial.sum(), initial[kept].sum()])
    center, places = initial[kept] * (whole / own), np.flatnonzero(kept)
    scales = part.scale
    price = quadratic.weight.numpy() * scales**2 * (whole / chi2)
    if part.target_hard is not None:
        price[part.target_hard] = np.inf
    matrix = sp.csr_array(part.matrix[:, places].astype(np.float64))
    counts = np.flatnonzero((price > 0) & (summed(np.diff(matrix.indptr).astype(np.float64)) > 0))
    low, high = (bound[kept] / center for bound in bounds)
    none = np.zeros(len(counts))
    dual = Dual(
        SharedRows(sp.csr_array(matrix[counts]), scales[counts]),
        part.targets[counts] / scales[counts], center, np.ones(len(center)), Linear(low, high),
        Slack(price[counts], part.tolerance[counts] / scales[counts], none),
    )  # fmt: skip
    if dual.slack.band.any():
        dual = replace(dual, slack=replace(dual.slack, stiffness=BAND_STIFFNESS * dual.diagonal))
    found = solve(dual)
    weights = np.zeros(len(initial))
    weights[places] = found.weights
    return weights, found.steps
