"""Calibrate survey weights in one call: choose households, fit their weights, report in float64."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from sparsereg.calibration.config import Settings
from sparsereg.calibration.measures import relative_errors
from sparsereg.calibration.problem import CalibrationProblem, exact_totals
from sparsereg.calibration.solver.bounds import bounded_weights, ratio_bounds
from sparsereg.calibration.solver.exact import GAVE_WAY, Exact, calibrate_exactly, is_hard, near_zero
from sparsereg.calibration.solver.hard_concrete import GateSettings
from sparsereg.calibration.solver.integers import check_whole, whole_weights
from sparsereg.calibration.solver.least_squares import System
from sparsereg.calibration.solver.losses import Quadratic, TargetLoss, group_shares
from sparsereg.calibration.solver.matrix import HouseholdMatrix, compiles, household_matrix
from sparsereg.calibration.solver.nested import NestedMatrix
from sparsereg.calibration.solver.pruning import Pruning, fill
from sparsereg.calibration.solver.recalibration import Recalibration
from sparsereg.calibration.solver.refit import SMALLEST_OF_ALL, SMALLEST_RATIO, TOLERANCE, refit
from sparsereg.calibration.solver.selection import METHODS, STARTED, Fixed, Goal, Selection, method_of
from sparsereg.calibration.variance import (
    Design,
    Replicates,
    Statistics,
    as_columns,
    replicate,
    residuals,
    statistics_frame,
)
from sparsereg.calibration.weight_table import weight_frame
from sparsereg.checks import check_probability
from sparsereg.linalg.nesting import Nesting, find_nesting
from sparsereg.linalg.threads import quiet_threads
from sparsereg.shapes import Float, Int
from sparsereg.summary import in_html, in_lines

if TYPE_CHECKING:
    import pandas as pd

_log = logging.getLogger(__name__)

Callback = Callable[[int, int, float, int, np.ndarray], Any]
"""Called with (epochs done, epochs planned, loss, households kept, totals in float64)."""

_MOST_GROWTH = 100.0
"""Most that the pull is multiplied by where households are far fewer than targets."""
_CHOOSING_PULL = 1e-4
"""Pull towards the initial weights while households are chosen, where none is given."""
FINAL_PULL = 1e-7
"""Pull of the final weights, where none is given: of weights as good as others, even ones are better."""
_SET_ASIDE = 0.25
"""Such a target is set aside if the others leave it wrong by this share of what goes into it."""
_LOOK_SWEEPS = 60
"""Sweeps over everybody to see that."""
_BLOCK = 256
"""Households that stay neighbours in memory."""


@dataclass(frozen=True, eq=False, repr=False)
class CalibrationResult:
    """Weights and what they reach.

    Args:
        problem: What was calibrated.
        weights: Shape (households,), float64, zero where not kept.
        selected: Shape (households,), which are kept.
        estimates: Weighted totals in float64, shape (targets,).
        loss: The loss of the final weights: a mean over the targets by their weights.
        kkt_violation: Largest violation of the optimality conditions by the refit, dimensionless (see
            ``LeastSquares.kkt_violation``); None without refit. For losses of absolute values: of the last
            weighted least-squares problem.
        method: How the households were chosen.
        seconds: Wall clock time.
        history: Per report of the run: epoch, loss, kept, mean_are.
        set_aside: Indices of targets near zero that the loss leaves out, because the others rule them out.
        exact: Of ``method="calibrate"``: what the targets cost, which gave way and why; None for others.
        settings: How it was calibrated.
        steps: Steps of Newton's method that the final weights took, where they were found by it.
        real_weights: With ``weights="integer"`` what was rounded, shape (households,); else None.

    Example:
        >>> matrix = sp.csr_array([[1.0, 1.0, 1.0, 1.0], [1.0, 0.0, 1.0, 0.0]])
        >>> problem = CalibrationProblem(matrix, np.array([8.0, 3.0]), np.full(4, 1.5))
        >>> result = calibrate(problem, method="calibrate")
        >>> result.weights.round(6).tolist(), result.num_kept
        ([1.5, 2.5, 1.5, 2.5], 4)
    """

    problem: CalibrationProblem
    weights: np.ndarray
    selected: np.ndarray
    estimates: np.ndarray
    loss: float
    kkt_violation: float | None
    method: str
    seconds: float
    history: list[dict[str, float]]
    set_aside: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    exact: Exact | None = None
    settings: Settings | None = None
    steps: int | None = None
    real_weights: np.ndarray | None = None

    def of(self, problem: CalibrationProblem) -> CalibrationResult:
        """The same weights as a result of another problem: the one without pseudo-targets.

        Args:
            problem: Its households are this one's, its targets the first ones of this one's.
        """
        own = self.set_aside[self.set_aside < problem.num_targets]
        return replace(self, problem=problem, estimates=problem.estimates(self.weights), set_aside=own)

    def __repr__(self) -> str:
        return in_lines(*self._shown())

    def _repr_html_(self) -> str:
        return in_html(*self._shown())

    def _shown(self) -> tuple[str, dict[str, str]]:
        told = self.diagnostics
        errors = [(name, told[f"{name}_are"]) for name in ("mean", "median", "max")]
        sizes = ", ".join(f"{name} {error:.2%}" for name, error in errors if error is not None)
        unequal = _told(told["weighting_effect"])
        return f"CalibrationResult by {self.method} in {self.seconds:.1f} s", {
            "kept": f"{self.num_kept:,} of {self.problem.num_households:,} households",
            "relative error": sizes or "none: all targets are 0",
            "sample size": f"effective {told['ess']:,.0f}, weighting effect {unequal}",
            "weights": f"median {told['median_weight']:,.6g}, largest {told['max_weight']:,.6g},"
            f" sum {told['total_weight']:,.6g}",
        }

    @property
    def optimality(self) -> float | None:
        """``kkt_violation`` under its old name."""
        return self.kkt_violation

    @property
    def multipliers(self) -> np.ndarray:
        """What each target costs, shape (targets,), see ``exact.Exact``.

        Raises:
            ValueError: the method was not "calibrate".
        """
        if self.exact is None:
            raise ValueError(f"method={self.method!r} has no multipliers: they are of method='calibrate'")
        return self.exact.multipliers

    def replicates(self, design: Design, calibrated: bool = True) -> Replicates:
        """Calibrate replicates of the sample in the same way.

        Args:
            design: With the method "jackknife", "bootstrap" or "replicates".
            calibrated: False leaves them as they are drawn.

        Raises:
            ValueError: the method was not "calibrate", or the design does not fit the households.
        """
        self._check_variance()
        assert self.exact is not None
        again = None
        if calibrated:
            again = Recalibration(self.problem, self.exact, **_exact_settings(self.settings or Settings()))
        return replicate(design, self.problem.starting_weights, again)

    def standard_errors(
        self,
        columns: Any,
        design: Design | Replicates | None = None,
        statistic: str = "total",
        of: Any = None,
        confidence: float = 0.95,
        calibrated: bool = True,
    ) -> pd.DataFrame:
        """Estimates of columns with standard errors, confidence intervals and design effects.

        Args:
            columns: What is estimated: a table, a mapping of names to arrays, or an array of one number per
                household and statistic.
            design: How the sample was drawn, or its replicates; None: households at random, with replacement.
            statistic: "total", "mean", or "ratio" of each column to the one of ``of``.
            of: Denominators, one for all columns or one for each.
            confidence: Of the intervals, in (0, 1).
            calibrated: False for those of the initial weights, to see what the calibration gains.

        Returns:
            One row per column: name, statistic, estimate, se, lower, upper, cv (se over estimate) and
            design_effect (variance over that of a simple random sample of as many households).
            Linearised, targets that must be met explain the columns; those with a price or a tolerance are
            left out, which errs on the side of caution.

        Raises:
            ValueError: the method was not "calibrate", or something does not fit the households.
        """
        self._check_variance()
        check_probability("confidence", confidence)
        num = self.problem.num_households
        names, values = as_columns(columns, num)
        below = None if of is None else np.broadcast_to(as_columns(of, num, "of")[1], values.shape)
        statistics = Statistics(names, values, statistic, below)
        final = self.weights if calibrated else self.problem.starting_weights
        own = statistics.estimate(final)
        if design is None or (isinstance(design, Design) and design.method == "linearized"):
            units = (design or Design()).units(self.problem.starting_weights)
            left = statistics.linearized(final)
            if calibrated:
                factors = self.settings.unit_factor if self.settings is not None else None
                weights = self.problem.starting_weights * (1.0 if factors is None else factors)
                left = residuals(left, self._met_rows(), weights)
            variances, freedom = units.variance(left * final[:, None]), units.degrees_of_freedom
        else:
            replicates = self.replicates(design, calibrated) if isinstance(design, Design) else design
            variances = replicates.variance(statistics.estimate(replicates.weights), own)
            freedom = replicates.degrees_of_freedom
        simple = statistics.simple_variance(final)
        return statistics_frame(names, statistic, own, variances, simple, freedom, confidence)

    def _check_variance(self) -> None:
        if self.exact is None:
            raise ValueError(
                f"standard errors need method='calibrate', not {self.method!r}: households that were chosen"
                " for their fit are no random sample; calibrate the whole file and take its standard errors"
            )

    def _met_rows(self) -> sp.csr_array:
        """Rows of the targets that had to be met and are."""
        assert self.exact is not None
        met = is_hard(self.problem)
        if self.problem.target_tolerances is not None:
            met = met & (self.problem.target_tolerances == 0)
        met[self.exact.gave_way] = False
        return sp.csr_array(self.problem.linear.matrix[np.flatnonzero(met)].astype(np.float64))

    @property
    def num_kept(self) -> int:
        """How many households have a positive weight."""
        return int(self.selected.sum())

    @cached_property
    def diagnostics(self) -> dict[str, Any]:
        """Errors, sample size and weights in numbers; the keys of ``report.measure``."""
        from sparsereg.calibration.measures import measure

        return measure(self.problem, self.weights)

    @property
    def loss_history(self) -> pd.DataFrame:
        """The history as a table: epoch, loss, kept, mean_are."""
        import pandas as pd

        return pd.DataFrame(self.history, columns=["epoch", "loss", "kept", "mean_are"])

    def to_frame(self) -> pd.DataFrame:
        """One row per kept household: id, initial_weight, weight."""
        whole = self.real_weights is not None
        return weight_frame(
            self.problem, self.weights.astype(np.int64) if whole else self.weights, self.selected
        )


class Calibration:
    """A calibration under way: short steps, a state to save, a result at the end.

    Args:
        problem: What is to be calibrated.
        num_households: How many to keep, exactly; None: the method decides.
        settings: How.
        selected: Start from this selection (indices or a mask) and only improve it by swaps.
        start: Weights of an earlier calibration to start from, see ``calibrate``.
        alone: Compute all of it in this process, also in a group of processes.

    Raises:
        ValueError: the number, the method, or the bounds do not fit the problem.

    Example:
        >>> matrix = sp.csr_array([[1.0, 1.0, 1.0, 1.0], [1.0, 0.0, 1.0, 0.0]])
        >>> problem = CalibrationProblem(matrix, np.array([8.0, 3.0]), np.full(4, 1.5))
        >>> run = Calibration(problem)
        >>> while not run.done:
        ...     run.step()
        >>> run.result().estimates.round(3).tolist()
        [8.0, 3.0]
    """

    def __init__(
        self,
        problem: CalibrationProblem,
        num_households: int | None = None,
        settings: Settings | None = None,
        *,
        selected: np.ndarray | None = None,
        start: np.ndarray | None = None,
        alone: bool = False,
    ) -> None:
        self._start = time.perf_counter()
        self.problem, self.settings = problem, settings or Settings()
        given = None if selected is None else _indices(selected, problem.num_households)
        if given is not None:
            num_households = len(given)
        candidates = int((problem.starting_weights > 0).sum())
        self.num_households = _check_number(num_households, candidates, problem.num_households)
        self.method = (
            "polish"
            if given is not None
            else method_of(self.settings.method, self.num_households, self.settings.lambda_l0)
        )
        self._exact: Exact | None = None
        self._steps: int | None = None
        self._given = None if start is None else _checked_start(start, problem, self.method)
        self.set_aside = np.empty(0, dtype=np.int64)
        self.history: list[dict[str, float]] = []
        if self.is_exact:  # everybody at once, and nothing to choose
            self._shares = _target_shares(problem, self.settings)
            self.selection: Selection = Fixed(torch.from_numpy(problem.starting_weights))
            return
        rows = with_aggregates(problem.linear, self.settings.consistency)
        gated = self.method in ("hard_concrete", "hybrid")
        order = visiting_order(rows.by_household, rows.nesting, self.settings.seed, by_length=gated)
        self._order = order[problem.starting_weights[order] > 0]  # of weight zero: not in the survey
        if given is not None:
            _refuse_weightless(problem, given.numpy())
            given = torch.from_numpy(np.flatnonzero(np.isin(self._order, given.numpy())))
        matrix = ordered_matrix(rows, self._order, self.settings, self._order if alone else None)
        self.goal = goal_of(problem, rows, self.num_households, self.settings, self._order, matrix)
        if self._given is not None:
            ahead = torch.from_numpy(self._given[self._order]).to(self.goal.system.initial_weights)
            self.goal = replace(self.goal, start=ahead)
        self.set_aside = self._set_aside()
        self.selection = METHODS[self.method](self.goal) if given is None else _swaps_only(self.goal, given)

    @property
    def is_exact(self) -> bool:
        """Whether targets are hard and everybody stays: ``method="calibrate"``."""
        return self.method == "calibrate"

    def exact(self) -> Exact:
        """Calibrate everybody, on first use.

        Raises:
            ValueError: the bounds are wrong, or targets marked hard contradict each other.
        """
        if self._exact is None:
            s = self.settings
            if s.weights == "integer":
                low, high = self._bounds_of_weights()
                check_whole(self.problem, low, high, self.problem.starting_weights > 0)
            self._exact = calibrate_exactly(
                self.problem, shares=self._shares, start=self._given, **_exact_settings(s)
            )
            self._steps = self._exact.steps
        return self._exact

    @property
    def done(self) -> bool:
        """Whether the selection is made."""
        return self.selection.done

    def _set_aside(self) -> np.ndarray:
        """Leave out of the loss the targets near zero that all others rule out; return their indices.

        A target of zero for what others ask to be large would be met by giving up those others: its scale
        is a thousandth of what goes into it. So it is first judged by the whole of that.
        """
        linear, system, device = self.problem.linear, self.goal.system, self.goal.system.matrix.device
        suspect = near_zero(linear)
        suspect &= system.quadratic.weight[: len(suspect)].cpu().numpy() > 0
        if not suspect.any():
            return np.empty(0, dtype=np.int64)
        whole = torch.from_numpy(np.maximum(linear.scale, linear.gross)).to(device)
        quadratic = Quadratic(self.goal.loss.targets, system.quadratic.weight.clone(), self.goal.loss.scales)
        quadratic.weight[: len(suspect)] = self.goal.loss.shares[: len(suspect)] / whole.square()
        everyone = torch.arange(system.matrix.num_households, device=device)
        with quiet_threads():
            fit = system.with_quadratic(quadratic).of(everyone, self.goal.starting_weights())
            fit.sweep(_LOOK_SWEEPS)
        missed = (fit.totals() - quadratic.targets)[: len(suspect)].abs() / whole
        aside = np.flatnonzero(suspect & (missed.cpu().numpy() > _SET_ASIDE))
        if len(aside):
            self.goal = self.goal.without(torch.from_numpy(aside).to(device))
            names = ", ".join(self.problem.names[i] for i in aside[:5])
            _log.warning("set aside, because all other targets rule them out: %s", names)
        return aside

    def step(self) -> None:
        """Work on the selection for a short while."""
        with nullcontext() if self.is_exact else quiet_threads():
            self.selection.step()

    def report(self, callback: Callback | None = None) -> dict[str, float]:
        """Note loss, error and count of the current weights; tell a callback."""
        with nullcontext() if self.is_exact else quiet_threads():
            row, estimates = self._standing()
        self.history.append(row)
        if callback is not None:
            callback(
                self.selection.epoch, self.selection.num_epochs, row["loss"], int(row["kept"]), estimates
            )
        return row

    def _standing(self) -> tuple[dict[str, float], np.ndarray]:
        """Loss, error and count of the current weights, and what they make of the targets."""
        weights = self.selection.weights()
        if self.is_exact:
            estimates = self.problem.linear.initial_totals
        else:
            estimates = self.goal.system.matrix.totals(weights)[: self.problem.num_targets].cpu().numpy()
        loss = self._loss_of(estimates)
        if self.problem.denominators is not None:
            estimates = self.problem.estimates(self._in_order_of_the_problem(weights))
        errors = np.abs(relative_errors(estimates, self.problem.targets))
        known = errors[~np.isnan(errors)]
        mean_are = float(known.mean()) if len(known) else math.nan
        kept = int((weights > 0).sum())
        return {"epoch": self.selection.epoch, "loss": loss, "kept": kept, "mean_are": mean_are}, estimates

    def _in_order_of_the_problem(self, weights: Tensor) -> np.ndarray:
        """Weights of all households of the problem, float64, zero for those that are not in the survey."""
        if self.is_exact:
            return np.asarray(weights.numpy())
        full = np.zeros(self.problem.num_households)
        full[self._order] = weights.cpu().numpy()
        return full

    def _loss_of(self, totals: np.ndarray) -> float:
        """The loss of linear totals over the problem's own targets, as a weighted mean."""
        if self.is_exact:  # it knows the relative one only
            return float(self._shares @ self.problem.linear.scaled_errors(totals) ** 2 / self._shares.sum())
        return float(self._mean_loss.value(torch.from_numpy(totals).to(self._mean_loss.targets.device)))

    @cached_property
    def _mean_loss(self) -> TargetLoss:
        loss = self.goal.loss.first(self.problem.num_targets)
        return replace(loss, shares=loss.shares / loss.shares.sum())

    def result(self) -> CalibrationResult:
        """Fit the weights of the selection and describe them.

        Raises:
            ValueError: the selection is not finished, lambda_l0 shut every household, or the bounds cannot
                hold the total.
        """
        if not self.done:
            epoch, planned = self.selection.epoch, self.selection.num_epochs
            raise ValueError(f"the selection is not made yet: {epoch} of {planned} epochs are done")
        if self.is_exact:
            return self._described(self.exact().weights, self.exact().error)
        system, weights = self.goal.system, self.selection.weights()
        kept = self.selection.kept()
        if len(kept) == 0:
            raise ValueError(f"lambda_l0={self.settings.price!r} shut every household: choose a smaller one")
        weights, violation = weights[kept], None
        if self.settings.refit:
            with quiet_threads():
                kept, weights, violation = self._refit(kept, weights)
        full = torch.zeros_like(system.initial_weights)
        full[kept] = weights
        return self._described(self._in_order_of_the_problem(full), violation)

    def _bounds_of_weights(self) -> list[np.ndarray]:
        """Smallest and largest weights of an exact calibration."""
        s, initial, how = self.settings, self.problem.starting_weights, _exact_settings(self.settings)
        ratios = ratio_bounds(initial, s.distance, how["bounds"], how["weight_bounds"])
        return bounded_weights(initial, ratios)

    def _rounded(self, real: np.ndarray) -> np.ndarray:
        """Whole weights in the place of real ones, within the same bounds."""
        s, initial = self.settings, self.problem.starting_weights
        if self.is_exact:
            low, high = self._bounds_of_weights()
        else:
            low = np.where(real > 0, float(self.num_households is not None), 0.0)  # of a number nobody leaves
            ratio = s.max_weight_ratio
            high = np.full(len(real), np.inf) if ratio is None else ratio * initial
        return whole_weights(self.problem, real, low, high, s.seed)

    def _described(self, final: np.ndarray, violation: float | None) -> CalibrationResult:
        """The result with these weights."""
        real = None
        if self.settings.weights == "integer":
            real, final = final, self._rounded(final)
        kept, wanted = int((final != 0).sum()), self.num_households or 0
        if kept < wanted:
            _log.warning("%d households are kept, fewer than num_households=%d", kept, wanted)
        if real is None and self._exact is not None:
            totals = self._exact.totals
        else:
            totals = exact_totals(self.problem.linear.matrix, final)
        loss = self._loss_of(totals)
        estimates = totals if self.problem.denominators is None else self.problem.estimates(final)
        return CalibrationResult(
            self.problem, final, final != 0, estimates, loss, violation, self.method,
            time.perf_counter() - self._start, list(self.history), self.set_aside, self._exact,
            self.settings, self._steps, real,
        )  # fmt: skip

    def _refit(self, kept: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, float]:
        """Best weights, nearly without the pull; with a wanted number, nobody of it is left at zero."""
        chi2 = FINAL_PULL if self.settings.chi2 is None else self.settings.chi2
        system = replace(self.goal.system, chi2=chi2)
        exact = self.num_households is not None
        if self.method in ("pruning", "polish", "hard_concrete") and exact:
            kept, fit = fill(self.goal.system, kept, self.goal.system.of(kept, weights))
            weights = fit.weights
        if system.total is not None and float(system.upper[kept].sum()) < system.total * (1 - 1e-12):
            raise ValueError(
                f"max_weight_ratio={self.settings.max_weight_ratio!r} lets the {len(kept)} kept households"
                f" weigh {float(system.upper[kept].sum()):g} at most, hold_total asks for {system.total:g}"
            )
        loss = replace(self.goal.loss, shares=self.goal.loss.shares / self.goal.loss.shares.sum())
        smallest = SMALLEST_RATIO if exact else 0.0
        if self.method == "all" and chi2 > 0:  # without a pull: the plain optimum
            smallest = SMALLEST_OF_ALL
        best = refit(
            system, loss, kept, weights, smallest=smallest, tolerance=TOLERANCE, rows=self._rows(kept),
            hard=self.problem.target_hard, thorough=self.method == "all", warm=self._given is not None,
        )  # fmt: skip
        self._steps = best.steps
        self._tell_missed(kept, best.weights)
        return kept, best.weights, best.kkt_violation

    def _tell_missed(self, kept: Tensor, weights: Tensor) -> None:
        """Warn about targets marked hard that these weights do not meet."""
        hard = self.problem.target_hard
        if hard is None or not hard.any():
            return
        totals = self._rows(kept).T @ weights.cpu().numpy()
        missed = np.abs(self.problem.linear.scaled_errors(totals[: self.problem.num_targets]))
        named = [self.problem.names[i] for i in np.flatnonzero(hard & (missed > GAVE_WAY))]
        if named:
            more = f" and {len(named) - 5} more" if len(named) > 5 else ""
            _log.warning(
                "hard targets that the %d kept households do not meet: %s%s",
                *(len(kept), ", ".join(named[:5]), more),
            )

    def _rows(self, kept: Tensor) -> sp.csr_array:
        """Entries of some households as they were read, households x targets, float64."""
        rows = with_aggregates(self.problem.linear, self.settings.consistency)
        chosen = self._order[kept.cpu().numpy()]
        return sp.csr_array(rows.by_household[chosen].astype(np.float64))

    def state_dict(self) -> dict[str, Any]:
        """Where the calibration stands: plain numbers and tensors."""
        return {
            "method": self.method,
            "selection": self.selection.state_dict(),
            "history": list(self.history),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state of the same problem and settings.

        Raises:
            ValueError: the state is of another method or problem.
        """
        if state["method"] != self.method:
            raise ValueError(
                f"the state is of method={state['method']!r}, this run is method={self.method!r}"
            )
        self.selection.load_state_dict(state["selection"])
        self.history = [dict(row) for row in state["history"]]


def calibrate(
    problem: CalibrationProblem,
    num_households: int | None = None,
    *,
    start: np.ndarray | None = None,
    callback: Callback | None = None,
    progress: bool = False,
    **settings: Any,
) -> CalibrationResult:
    """Choose households and weights so that weighted totals meet their targets.

    Args:
        problem: Matrix, targets, initial weights.
        num_households: How many to keep, exactly; None: all stay, unless ``lambda_l0`` is given or
            ``method="hard_concrete"``: then lambda decides.
        start: Weights of an earlier calibration, of other targets for example, shape (households,), 0 where
            there is none. "calibrate" and "all" start Newton's method at the multipliers that belong to them
            and end at the same weights in fewer steps; "pruning" goes on from the households that they keep
            (prunes more, fills up fewer, then swaps); the gates of "hard_concrete" start at these weights.
        callback: Told (epochs done, epochs planned, loss, kept, totals) after every step.
        progress: Show a progress bar on stderr.
        **settings: Fields of ``Settings``:
            method: "auto" (pruning with a number, hard_concrete with lambda_l0 alone, else all), or a key of
                ``NAMES``.
            loss: "relative", "mse", "mape" or "capped", see ``losses.LOSSES``.
            cap: Largest relative error that counts, for "capped".
            lambda_l0, lambda_l2: Penalties of the gates, >= 0 (None: ``LAMBDA``).
            lambda_scale: "sum" as in l0-python (loss summed over targets + lambda_l0 * expected number
                kept) or "mean" (mean loss + lambda_l0 * expected share kept), which is comparable across
                sizes of problems.
            max_weight_ratio: No weight above this multiple of the initial weight.
            hold_total: Keep the sum of the weights at the sum of the initial weights.
            refit: Best weights for the selection, to optimality.
            chi2: Pull towards the initial weights, >= 0: it evens them out. While households are chosen it
                grows, up to a hundredfold, with fewer households than half the targets. None: 1e-4 while they
                are chosen and 1e-7 for the final weights; a number holds for both.
            consistency: Weight of the squared relative errors of sums of parts (``problem.parent``), relative
                to the weight of all targets.
            normalize_groups, group_multipliers: Weights of the groups of targets.
            epochs, lr, temperature, droprate_init, log_weight_jitter, log_alpha_jitter: Of the gates.
            gate_share: Share of "hybrid" that the gates choose.
            schedule: Work of the pruning.
            seed: Seed of all noise. The same seed gives the same weights.
            device, backend: Where and how to compute, see ``household_matrix``.
            weights: "integer" for whole weights, see ``integers``.
            distance, bounds, weight_bounds, unit_factor: Of ``method="calibrate"``, which meets the targets
                exactly by the weights closest to the initial ones, see ``exact.calibrate_exactly``.

    Returns:
        Weights, estimates, diagnostics.

    Raises:
        ValueError: a setting is wrong or does not fit the problem.

    Example:
        >>> import scipy.sparse as sp
        >>> matrix = sp.csr_array([[1.0, 1.0, 1.0, 1.0], [1.0, 0.0, 1.0, 0.0]])
        >>> problem = CalibrationProblem(matrix, np.array([8.0, 3.0]), np.full(4, 1.5))
        >>> calibrate(problem).estimates.round(3).tolist()
        [8.0, 3.0]
    """
    run = Calibration(problem, num_households, Settings(**settings), start=start)
    return _drive(run, callback, progress)


def polish(
    problem: CalibrationProblem,
    selected: np.ndarray,
    *,
    callback: Callback | None = None,
    progress: bool = False,
    **settings: Any,
) -> CalibrationResult:
    """Improve any selection by swaps and refit; as many households are kept as were given.

    Args:
        problem: Matrix, targets, initial weights.
        selected: Indices of households, a mask over them, or weights of all of them.
        callback: As for ``calibrate``.
        progress: Show a progress bar on stderr.
        **settings: As for ``calibrate``.

    Example:
        >>> matrix = sp.csr_array([[1.0, 1.0, 1.0, 1.0], [1.0, 0.0, 1.0, 0.0]])
        >>> problem = CalibrationProblem(matrix, np.array([8.0, 3.0]), np.full(4, 1.5))
        >>> polish(problem, np.array([0, 1])).num_kept
        2
    """
    run = Calibration(problem, settings=Settings(**settings), selected=selected)
    return _drive(run, callback, progress)


def _drive(run: Calibration, callback: Callback | None, progress: bool) -> CalibrationResult:
    bar = None
    if progress:
        from tqdm import tqdm

        bar = tqdm(total=run.selection.num_epochs, unit="epoch", leave=False)
    while not run.done:
        run.step()
        row = run.report(callback)
        if bar is not None:
            bar.update(run.selection.epoch - bar.n)
            bar.set_postfix(loss=f"{row['loss']:.3g}", error=f"{row['mean_are']:.2%}", kept=row["kept"])
    if bar is not None:
        bar.close()
    return run.result()


def visiting_order(
    by_household: sp.csr_array, nesting: Nesting | None, seed: int, by_length: bool = False
) -> np.ndarray:
    """Order in which sweeps visit the households, at random but with neighbours near each other.

    Sweeps favour the households they visit first, so that must not be a matter of the place in the file.
    Households of one district share their targets, which is fast while those are in the processor's cache:
    so they are sorted by their last target, cut into blocks, and blocks and their members are shuffled. Where
    targets nest, pages and their members are shuffled. Products are half as fast again where members lie by
    their number of entries (``by_length``), since the processor foresees the ends of the loops; sweeps would
    favour the short ones.
    """
    num_households, generator = by_household.shape[0], np.random.default_rng(seed)
    if nesting is not None:
        rank = generator.permutation(int(nesting.page.max()) + 1)[nesting.page]
        length = np.diff(by_household.indptr) if by_length else rank
        return np.lexsort((generator.random(num_households), length, rank))
    ends = np.maximum(by_household.indptr[1:] - 1, 0)
    last = by_household.indices[ends] if by_household.nnz else np.zeros(num_households)
    last = np.where(np.diff(by_household.indptr) > 0, last, -1)
    neighbours = np.lexsort((generator.random(num_households), last))
    blocks = np.arange(num_households) // _BLOCK
    rank = generator.permutation(int(blocks[-1]) + 1)[blocks]
    length = np.diff(by_household.indptr)[neighbours] if by_length else rank
    return neighbours[np.lexsort((generator.random(num_households), length, rank))]


def _exact_settings(s: Settings) -> dict[str, Any]:
    """Arguments of ``calibrate_exactly`` that settings hold."""
    bounds = s.bounds
    if s.max_weight_ratio is not None:
        low, high = s.bounds or (0.0, None)
        bounds = (low, np.minimum(np.inf if high is None else high, s.max_weight_ratio))
    return {
        "distance": s.distance,
        "bounds": bounds,
        "weight_bounds": s.weight_bounds,
        "unit_factor": s.unit_factor,
    }


def _check_number(number: int | None, candidates: int, households: int) -> int | None:
    """Check a number to keep against those with an initial weight > 0."""
    if number is None:
        return None
    if isinstance(number, bool) or int(number) != number or not 1 <= number <= candidates:
        more = "" if candidates == households else f" (of {households}, these have an initial weight > 0)"
        raise ValueError(f"num_households must be an integer from 1 to {candidates}{more}, got {number!r}")
    return int(number)


def _checked_start(start: np.ndarray, problem: CalibrationProblem, method: str) -> np.ndarray:
    """Check weights to start from; those of households outside the survey are left out."""
    if method not in STARTED:
        raise ValueError(
            f"start needs a method that can start from weights ({', '.join(STARTED)}), not {method}:"
            " it chooses without regard to them"
        )
    weights = np.array(start, dtype=np.float64)
    if weights.shape != (problem.num_households,) or not np.isfinite(weights).all():
        raise ValueError(f"start must be {problem.num_households} finite weights, got shape {weights.shape}")
    weights[problem.starting_weights == 0] = 0.0
    if not (weights > 0).any():
        raise ValueError("start must have a weight > 0 for a household of the survey")
    return weights


def _refuse_weightless(problem: CalibrationProblem, selected: np.ndarray) -> None:
    without = selected[problem.starting_weights[selected] == 0]
    if len(without):
        raise ValueError(
            f"selected holds {len(without)} households of initial weight 0, which are not in the survey:"
            f" {problem.household_ids[without[0]]}"
        )


def _indices(selected: np.ndarray, households: int) -> Tensor:
    """Indices from indices, a mask or weights."""
    given = np.asarray(selected)
    if given.dtype == bool or (given.dtype.kind == "f" and given.shape == (households,)):
        if given.shape != (households,):
            raise ValueError(f"selected must be a mask of shape ({households},), got {given.shape}")
        given = np.flatnonzero(given > 0)
    indices = np.unique(given)
    if given.ndim != 1 or given.dtype.kind not in "iu" or len(indices) != len(given) or len(given) == 0:
        raise ValueError("selected must be different indices of households, a mask, or weights; at least one")
    if indices[0] < 0 or indices[-1] >= households:
        raise ValueError(f"selected must lie in [0, {households}), got {indices[0]} to {indices[-1]}")
    return torch.from_numpy(indices.astype(np.int64))


def _target_shares(problem: CalibrationProblem, settings: Settings) -> Float[np.ndarray, "targets"]:
    """Weight of every target in the loss, not normalised."""
    shares = group_shares(
        problem.num_targets,
        problem.target_groups,
        normalize=settings.normalize_groups,
        multipliers=settings.group_multipliers,
        target_weights=problem.target_shares,
    )
    if not shares.any():
        raise ValueError("every target has weight zero")
    return shares


def _target_loss(
    problem: CalibrationProblem,
    settings: Settings,
    device: torch.device,
    again: Int[np.ndarray, "again"] | None = None,
) -> TargetLoss:
    """The loss of the totals that targets are about, and of those that are asked for again."""
    shares = _target_shares(problem, settings)
    linear = problem.linear
    targets, scales, tolerance = linear.targets, linear.scale, linear.tolerance
    if again is not None and len(again):
        shares = np.append(shares, np.full(len(again), settings.consistency * shares.sum() / len(again)))
        targets, scales, tolerance = (np.append(v, v[again]) for v in (targets, scales, tolerance))
    on = [torch.from_numpy(v).to(device) for v in (targets, shares, scales, tolerance)]
    return TargetLoss(on[0], on[1], settings.loss, settings.cap, on[2], on[3] if bool(on[3].any()) else None)


def goal_of(
    problem: CalibrationProblem,
    rows: GivenRows,
    num_kept: int | None,
    settings: Settings,
    order: np.ndarray,
    matrix: HouseholdMatrix,
    number: int | None = None,
) -> Goal:
    """Bring problem and settings into the form that selections work on, the households in this order.

    Args:
        problem: What is calibrated.
        rows: Its rows.
        num_kept: How many households are kept; None: the method decides.
        settings: How.
        order: Places of the households that are in the survey.
        matrix: Of the rows in this order.
        number: How many households there are, in all processes; None: those of the problem.
    """
    device = torch.device(settings.device)
    loss = _target_loss(problem, settings, device, rows.again)
    shares = loss.shares
    mean = replace(loss, shares=shares / shares.sum())
    initial = torch.from_numpy(problem.starting_weights[order]).to(device)
    unbounded = torch.full_like(initial, float("inf"))
    ratio = settings.max_weight_ratio
    upper = unbounded if ratio is None else ratio * initial
    total = float(initial.sum()) if settings.hold_total else None
    chi2 = _CHOOSING_PULL if settings.chi2 is None else settings.chi2
    chi2 *= _pull_growth(problem.num_targets, num_kept)
    system = System(matrix, mean.quadratic(), initial, upper, chi2, total)
    per_household = 1.0
    if settings.lambda_scale == "mean":
        per_household = float(shares.sum()) / (number or problem.num_households)
    gates = GateSettings(
        lambda_l0=settings.price * per_household,
        lambda_l2=settings.lambda_l2 * per_household,
        lr=settings.lr,
        temperature=settings.temperature_at,
        num_epochs=settings.epochs,
    )
    return Goal(
        system, loss, num_kept, gates, settings.droprate_init, settings.schedule,
        settings.gate_share, settings.seed, settings.log_weight_jitter, settings.log_alpha_jitter,
    )  # fmt: skip


def _pull_growth(num_targets: int, num_kept: int | None) -> float:
    """Factor on the pull, 1 from half as many households as targets on.

    Fewer cannot meet the targets, and the larger the remaining errors, the more pull it takes to matter
    beside them. The power makes the effective sample size that of the gated method or more.
    """
    shortage = num_targets / (2.0 * num_kept) if num_kept else 1.0
    return min(_MOST_GROWTH, max(1.0, shortage) ** 6)


@dataclass(frozen=True, eq=False)
class GivenRows:
    """What is calibrated.

    Args:
        by_target: Rows x households, canonical CSR: the targets, then sums of parts.
        by_household: Its transpose.
        again: The target that each of those sums should be at, too.
        nesting: Which rows are sums of others; None where too few are to pay. It decides in which order
            households are visited in any case, so that groups of processes draw the same noise as one.
    """

    by_target: sp.csr_array
    by_household: sp.csr_array
    again: np.ndarray
    nesting: Nesting | None


def with_aggregates(problem: CalibrationProblem, consistency: float) -> GivenRows:
    """Append one row per target with parts: the sum of its parts' rows, at the same target.

    Being rows like all others, they need no treatment of their own by any method.
    """
    if consistency == 0 or problem.parent is None:
        return given_rows(problem)
    part = np.flatnonzero(problem.parent >= 0)
    wholes, position = np.unique(problem.parent[part], return_inverse=True)
    shape = (len(wholes), problem.num_targets)
    sums = sp.csr_array((np.ones(len(part), np.float32), (position, part)), shape=shape)
    both = sp.csr_array(sp.hstack([problem.matrix_t, problem.matrix_t @ sums.T.tocsr()], format="csr"))
    parent = np.append(problem.parent, np.full(len(wholes), -1))
    by_target = sp.csr_array(both.T.tocsr())
    return GivenRows(by_target, both, wholes, find_nesting(by_target, both, parent))


def given_rows(problem: CalibrationProblem) -> GivenRows:
    """The targets alone."""
    return GivenRows(problem.matrix, problem.matrix_t, np.empty(0, dtype=np.int64), problem.nesting)


def ordered_matrix(
    rows: GivenRows, order: np.ndarray, settings: Settings, keys: np.ndarray | None = None
) -> HouseholdMatrix:
    """The matrix in the order in which households are visited, without rows that are sums of others.

    Args:
        rows: What is calibrated.
        order: Places of the households.
        settings: Where and how to compute.
        keys: Of their noise, in a group of processes that each have some of the households; None: the order,
            and in a group each process takes some of the targets.
    """
    local, keys = keys is not None, order if keys is None else keys
    device, backend = settings.device, settings.backend
    if rows.nesting is None or not compiles(device, backend, local=local):
        return household_matrix(rows.by_household[order], device, backend, local=local, keys=keys)
    stored = sp.csr_array(rows.by_target[rows.nesting.stored].T.tocsr())
    return NestedMatrix(stored[order], rows.nesting, rows.nesting.page[order], keys)


def _swaps_only(goal: Goal, kept: Tensor) -> Selection:
    """Swaps from a given selection, whose weights start in proportion to the initial ones."""
    kept = kept.to(goal.system.matrix.device)
    start = goal.starting_weights()
    share = start.sum() / start[kept].sum().clamp(min=1e-300)
    return Pruning(goal.system, start * share, len(kept), goal.schedule, kept)


def _told(number: float | None) -> str:
    return "-" if number is None else f"{number:.3g}"
