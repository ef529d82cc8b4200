"""Weighted least squares for non-negative household weights: the problem every selection solves.

Minimise sum_i q_i (total_i - target_i)^2 + sum_j p_j (w_j - c_j)^2 over lower <= w <= upper, optionally
with the sum of the weights held at a number. Curvature differs between households by many orders of
magnitude, so all steps are scaled by it.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from sparsereg.calibration.solver.interior_point import BoxQuadratic, InteriorPoint
from sparsereg.calibration.solver.losses import Quadratic
from sparsereg.calibration.solver.matrix import CompiledMatrix, Descending, Descent, HouseholdMatrix
from sparsereg.calibration.solver.nested import NestedMatrix
from sparsereg.calibration.solver.page_factors import PageBlocks
from sparsereg.shapes import Float, Int, Shaped

_log = logging.getLogger(__name__)

_HELD_SHARE = 1.0
"""Weight of the held sum while its multiplier is found, in weights of all targets together."""
_WORTH_OF_SIZE = 30.0
"""Weight of w_j itself in a bounded household's contribution, in weights of all targets together."""
_FEWEST_STEPS, _MOST_STEPS = 20, 1280
"""Range of the number of conjugate gradient steps between two calls of the sweeps."""
_MOST_DENSE = 2500
"""Households or targets, whichever are fewer, up to which dense systems are solved (about 0.2 s each)."""
_STEPS_PER_SWEEP = 4
"""Accelerated gradient steps that stand for one sweep over the households where loops are not compiled."""


@dataclass(frozen=True, eq=False)
class System:
    """The least-squares problem over all households, of which a selection takes some.

    Args:
        matrix: All households.
        quadratic: Targets and their weights.
        initial_weights: Weights the survey came with, >= 0, float64.
        upper: Largest weight of each household, >= 0; infinity for none.
        chi2: Factor >= 0 of the pull towards the initial weights: the mean, weighted by initial weight, of
            (w / (r w0) - 1)^2, with r such that r w0 of the selected households adds up to the sum of all w0.
        total: What the weights must add up to, or None.
        whole: Sum of the initial weights of all, where these are some of them; None: they are all.
    """

    matrix: HouseholdMatrix
    quadratic: Quadratic
    initial_weights: Float[Tensor, "households"]
    upper: Float[Tensor, "households"]
    chi2: float = 0.0
    total: float | None = None
    whole: float | None = None

    def take(self, households: Int[Tensor, "some"]) -> System:
        """Return the problem of choosing among some households only."""
        some = replace(
            self, matrix=self.matrix.take(households), initial_weights=self.initial_weights[households],
            upper=self.upper[households], whole=self.all_initial,
        )  # fmt: skip
        some.__dict__["curvature"] = self.curvature[households]
        return some

    @cached_property
    def all_initial(self) -> float:
        """Sum of the initial weights of all households."""
        return float(self.initial_weights.sum()) if self.whole is None else self.whole

    def of(
        self,
        households: Int[Tensor, "selected"],
        weights: Float[Tensor, "selected"],
        lower: Float[Tensor, "selected"] | None = None,
        by_totals: Float[Tensor, "targets"] | None = None,
    ) -> LeastSquares:
        """Return the problem of some households, starting from these weights of theirs.

        Args:
            households: Indices.
            weights: Starting weights, one for each of them.
            lower: Smallest weight of each of them, >= 0; None: 0.
            by_totals: Half of the quadratic's gradient with respect to the totals there, where it is known.
        """
        everyone = len(households) == self.matrix.num_households
        matrix = self.matrix if everyone else self.matrix.take(households)
        initial = self.initial_weights[households]
        pull, center = torch.zeros_like(initial), torch.zeros_like(initial)
        if self.chi2 > 0 and initial.sum() > 0:
            center = initial * (self.all_initial / initial.sum())
            pull = torch.where(center > 0, self.chi2 / (center * self.all_initial), pull)
        lower = torch.zeros_like(initial) if lower is None else lower
        known = self.__dict__.get("curvature")
        return LeastSquares(
            matrix, self.quadratic, weights, lower, self.upper[households], pull, center, self.total,
            None if known is None else known[households], by_totals,
        )  # fmt: skip

    @cached_property
    def curvature(self) -> Float[Tensor, "households"]:
        """Half the second derivative of the quadratic along each household, shape (households,)."""
        return self.matrix.squared_norms(self.quadratic.weight)

    @cached_property
    def _stretch(self) -> Tensor:
        """One over the curvature; 0 for households that touch nothing."""
        return torch.where(self.curvature > 0, 1.0 / self.curvature, torch.zeros_like(self.curvature))

    @cached_property
    def _is_bounded(self) -> bool:
        return bool(torch.isfinite(self.upper).any())

    def with_quadratic(self, quadratic: Quadratic) -> System:
        """Return the same problem with other weights of the targets."""
        return replace(self, quadratic=quadratic)

    def gains(self, by_totals: Float[Tensor, "targets"]) -> Float[Tensor, "households"]:
        """How much the objective falls when the best step is taken along one unused household alone.

        Args:
            by_totals: Half of the quadratic's gradient with respect to the totals.

        Returns:
            Decreases >= 0, shape (households,).
        """
        slope = self.matrix.gradient(by_totals).clamp_(max=0.0)
        if not self._is_bounded:
            return slope.square_().mul_(self._stretch)
        step = torch.minimum(slope * -self._stretch, self.upper)
        return slope.mul_(2.0).addcmul_(self.curvature, step).mul_(step).neg_()


class LeastSquares:
    """Bounded least squares over the households of one matrix, with its current weights.

    Args:
        matrix: The households in question.
        quadratic: Targets and their weights.
        weights: Where to start, float64, one per household; moved into the bounds.
        lower: Smallest weights, >= 0.
        upper: Largest weights, >= lower; infinity for none.
        pull: Factor of (w - center)^2 per household, >= 0.
        center: Where the pull goes.
        total: What the weights must add up to, or None.
        norms: Half the second derivative of the quadratic along each household, where it is known.
        by_totals: Half of the quadratic's gradient with respect to the totals, where it is known.
    """

    def __init__(
        self,
        matrix: HouseholdMatrix,
        quadratic: Quadratic,
        weights: Float[Tensor, "households"],
        lower: Float[Tensor, "households"],
        upper: Float[Tensor, "households"],
        pull: Float[Tensor, "households"],
        center: Float[Tensor, "households"],
        total: float | None = None,
        norms: Float[Tensor, "households"] | None = None,
        by_totals: Float[Tensor, "targets"] | None = None,
    ) -> None:
        self.matrix, self.quadratic = matrix, quadratic
        self.lower, self.upper, self.pull, self.center = lower, upper, pull, center
        self.weights = torch.minimum(torch.maximum(weights.double().clone(), lower), upper)
        self.size = quadratic.size
        self._held_weight = 0.0 if total is None else self._weight_of_sum(total)
        self._held = torch.tensor([0.0, total or 0.0, self._held_weight, 0.0], dtype=torch.float64)
        norms = matrix.squared_norms(quadratic.weight) if norms is None else norms
        self.curvature = norms + pull + self._held_weight
        if by_totals is None:
            self.refresh()
        else:
            self._held[0], self._by_totals = self.weights.sum(), by_totals.clone()

    def _weight_of_sum(self, total: float) -> float:
        return _HELD_SHARE * self.size**2 / max(total, 1e-300) ** 2

    def refresh(self) -> None:
        """Compute totals and their gradient anew from the weights, without what rounding has piled up."""
        self._held[0] = self.weights.sum()
        self._by_totals = self.quadratic.half_gradient_by_totals(self.matrix.totals(self.weights))

    @property
    def by_totals(self) -> Float[Tensor, "targets"]:
        """Half of the quadratic's gradient with respect to the totals."""
        return self._by_totals

    def totals(self) -> Float[Tensor, "targets"]:
        """Weighted totals, computed anew."""
        return self.matrix.totals(self.weights)

    def value(self) -> float:
        """The objective (without the held sum), computed anew."""
        pulled = (self.pull * (self.weights - self.center).square()).sum()
        return float(self.quadratic.value(self.totals()) + pulled)

    def penalized_value(self) -> float:
        """The objective with the held sum's error as a penalty: to compare fits that have not settled it."""
        return self.value() + self._held_weight * float(self.weights.sum() - self._held[1]) ** 2

    def slope(self) -> Float[Tensor, "households"]:
        """Half of the gradient with respect to the weights, held sum and multiplier included."""
        held = self._held[2] * (self._held[0] - self._held[1]) + self._held[3]
        return self.matrix.gradient(self._by_totals) + self.pull * (self.weights - self.center) + held

    def contributions(self, total: float | None = None) -> Float[Tensor, "households"]:
        """w_j times the norm of household j: the root of what leaving it out costs, others unchanged.

        With an upper bound the others may be unable to take over the weight of a large household, so that
        its weight counts too.

        Args:
            total: Sum of the weights, in all processes; None: of these.
        """
        norm = self.curvature
        if bool(torch.isfinite(self.upper).any()):
            total = float(self.weights.sum()) if total is None else total
            norm = norm + _WORTH_OF_SIZE * (self.size / max(total, 1e-300)) ** 2
        return self.weights * norm.sqrt()

    def sweep(self, count: int = 1) -> None:
        """Improve the weights by ``count`` rounds over the households."""
        if isinstance(self.matrix, Descending):
            at = Descent(
                self.quadratic.weight, self._by_totals, self.weights, self.lower, self.upper,
                self.curvature, self.pull, self.center, self._held,
            )  # fmt: skip
            self.matrix.descend(at, count)
        else:
            self.accelerate(count * _STEPS_PER_SWEEP)

    def kkt_violation(self) -> float:
        """Largest violation of the optimality conditions, dimensionless; 0 at the exact minimum.

        With households scaled to unit norm, how far a step down the slope leads within the bounds, relative
        to the size of the targets. With a held sum, at least the sum's relative error.
        """
        norm = self.curvature.clamp(min=torch.finfo(torch.float64).tiny).sqrt()
        contribution = self.weights * norm
        ahead = contribution - self.slope() / norm
        step = torch.minimum(torch.maximum(ahead, self.lower * norm), self.upper * norm) - contribution
        violation = torch.where(self.curvature > 0, step.abs(), torch.zeros_like(step))
        worst = float(violation.max()) / self.size if len(violation) else 0.0
        return max(worst, self._error_of_sum())

    def _error_of_sum(self) -> float:
        if self._held_weight == 0:
            return 0.0
        return abs(float(self._held[0] - self._held[1])) / max(abs(float(self._held[1])), 1e-300)

    def solve(
        self, tolerance: float = 1e-9, max_rounds: int = 60, sweeps: int = 20, enough: float = 0.0
    ) -> float:
        """Improve until optimal: sweeps find which bounds hold, conjugate gradients solve for the rest.

        Args:
            tolerance: ``kkt_violation`` to reach.
            max_rounds: Give up after so many rounds.
            sweeps: Sweeps in each round.
            enough: Give up, too, when ten rounds have lowered the objective by less than this share of it.

        Returns:
            The violation reached.
        """
        worst, steps, before = float("inf"), _FEWEST_STEPS, float("inf")
        for number in range(max_rounds):
            self.sweep(sweeps)
            inside = True
            while inside:
                self.refresh()
                self._held[3] += self._held[2] * (self._held[0] - self._held[1])
                worst = self.kkt_violation()
                if worst <= tolerance:
                    return worst
                inside = self._conjugate_gradients(steps, tolerance) and steps < _MOST_STEPS
                # Long solves pay once the bounds that hold have been found.
                steps = min(4 * steps, _MOST_STEPS) if inside else max(steps // 2, _FEWEST_STEPS)
            if enough > 0 and number % 10 == 9:
                now = self.penalized_value()
                if before - now < enough * now:
                    break
                before = now
        return self.kkt_violation()

    @property
    def is_small(self) -> bool:
        """Whether ``solve_densely`` is quick."""
        if not isinstance(self.matrix, CompiledMatrix | NestedMatrix):
            return False
        few = min(self.matrix.num_households, self.matrix.num_targets) <= _MOST_DENSE
        return few or self.has_pages

    @property
    def has_pages(self) -> bool:
        """Whether ``solve_densely`` goes page by page, which is quick and good for any number."""
        return self._blocks is not None

    @cached_property
    def _movable(self) -> Int[Tensor, "some"]:
        """Households whose weights may change."""
        return torch.nonzero((self.curvature > 0) & (self.upper > self.lower)).flatten()

    @cached_property
    def _blocks(self) -> PageBlocks | None:
        """Normal equations of these in contributions w_j norm_j, page by page, where that is quick."""
        if not isinstance(self.matrix, NestedMatrix):
            return None
        norm = self.curvature[self._movable].sqrt()
        return self.matrix.blocks(self._movable, norm, self.quadratic.weight)

    def solve_densely(self, tolerance: float = 1e-9, max_steps: int = 60) -> float:
        """Improve until optimal by an interior-point method, for some thousands of households or targets.

        Args:
            tolerance: ``kkt_violation`` to reach.
            max_steps: Give up after so many steps; the weights are then the best there were.

        Returns:
            The violation reached.
        """
        free = self._movable
        best, best_weights, best_multiplier = self.kkt_violation(), self.weights, float(self._held[3])
        if best <= tolerance or len(free) == 0:
            return best
        norm = self.curvature[free].sqrt()
        point = InteriorPoint(self._scaled(free, norm), (self.weights[free] * norm).numpy())
        for _ in range(max_steps):
            try:
                point.step()
            except np.linalg.LinAlgError:  # rounding has made the system indefinite
                break
            weights = self.weights.clone()
            weights[free] = torch.from_numpy(point.u) / norm
            self._take_over(weights, point.multiplier)
            now = self.kkt_violation()
            if now < best:
                best, best_weights, best_multiplier = now, self.weights, point.multiplier
            if best <= tolerance:
                break
        self._take_over(best_weights, best_multiplier)
        return best

    def _take_over(self, weights: Float[Tensor, "households"], multiplier: float) -> None:
        self.weights = torch.minimum(torch.maximum(weights, self.lower), self.upper)
        self._held[3] = multiplier
        self.refresh()

    def _scaled(self, free: Int[Tensor, "free"], norm: Float[Tensor, "free"]) -> BoxQuadratic:
        """The problem of some households in contributions w_j norm_j; the others stay where they are."""
        assert isinstance(self.matrix, CompiledMatrix | NestedMatrix)
        root = self.quadratic.weight.sqrt().numpy()
        rest = self.weights.index_fill(0, free, 0.0)
        missing = (self.quadratic.targets - self.matrix.totals(rest)).numpy()
        part = self.matrix.take(free).by_household()
        held = self._held_weight > 0
        return BoxQuadratic(
            rows=sp.csr_array(sp.diags_array(1.0 / norm.numpy()) @ part @ sp.diags_array(root)),
            targets=root * missing,
            lower=(self.lower[free] * norm).numpy(),
            upper=(self.upper[free] * norm).numpy(),
            pull=(self.pull[free] / norm.square()).numpy(),
            center=(self.center[free] * norm).numpy(),
            sum_of=(1.0 / norm).numpy() if held else None,
            total=float(self._held[1] - rest.sum()),
            blocks=self._blocks,
        )

    def _curve(
        self, direction: Float[Tensor, "households"], where: Shaped[Tensor, "households"] | None = None
    ) -> Float[Tensor, "households"]:
        """Half of the second derivative times a direction of weights."""
        product = self.quadratic.weight * self.matrix.totals(direction)
        held = self._held[2] * direction.sum()
        return self.matrix.gradient(product, where) + self.pull * direction + held

    def _conjugate_gradients(self, max_steps: int, tolerance: float) -> bool:
        """Solve for the households between their bounds, then step as far towards it as bounds allow.

        Returns:
            Whether the step hit no bound.
        """
        free = (self.weights > self.lower) & (self.weights < self.upper) & (self.curvature > 0)
        scale = torch.where(free, 1.0 / self.curvature.clamp(min=1e-300), torch.zeros_like(self.weights))
        remaining = torch.where(free, -self.slope(), torch.zeros_like(self.weights))
        solution = torch.zeros_like(self.weights)
        conditioned = scale * remaining
        direction, old = conditioned.clone(), float((remaining * conditioned).sum())
        stop = old * 1e-6
        mask = free.to(torch.uint8)
        for _ in range(max_steps):
            if old <= max(stop, (tolerance * self.size) ** 2 * 1e-4):
                break
            curved = torch.where(free, self._curve(direction, mask), torch.zeros_like(direction))
            length = old / max(float((direction * curved).sum()), 1e-300)
            solution += length * direction
            remaining -= length * curved
            conditioned = scale * remaining
            new = float((remaining * conditioned).sum())
            direction = conditioned + (new / old) * direction
            old = new
        return self._step_towards(solution)

    def _step_towards(self, step: Float[Tensor, "households"]) -> bool:
        """Take the largest of the projected steps 1, 1/2, 1/4 ... that pays, or up to the first bound.

        Returns:
            Whether the whole step lies within the bounds.
        """
        slope, before = self.slope(), self.weights
        room = torch.where(step > 0, self.upper - before, self.lower - before)
        ratio = torch.where(step != 0, room / step, torch.full_like(step, float("inf")))
        longest = min(1.0, float(ratio.min())) if len(step) else 0.0
        for length in (1.0, 0.5, 0.25, 0.1, longest):
            candidate = torch.minimum(torch.maximum(before + length * step, self.lower), self.upper)
            change = candidate - before
            if float((change * (2.0 * slope + self._curve(change))).sum()) <= 0:
                self.weights = candidate
                break
        self.refresh()
        return longest >= 1.0

    def accelerate(self, steps: int) -> None:
        """Accelerated projected gradient with restart, on any device; two products with the matrix a step."""
        scale = torch.where(self.curvature > 0, 1.0 / self.curvature, torch.zeros_like(self.curvature))
        largest = self._largest_curvature(scale)
        ahead, momentum = self.weights.clone(), 1.0
        self._by_totals = self.quadratic.half_gradient_by_totals(self.matrix.totals(ahead))
        for _ in range(steps):
            before, point = self.weights, ahead
            self.weights, self._held[0] = point, point.sum()
            slope = self.slope()
            self.weights = torch.minimum(
                torch.maximum(point - scale * slope / largest, self.lower), self.upper
            )
            change = self.weights - before
            if float((slope * change).sum()) > 0:
                momentum = 1.0
            new_momentum = (1.0 + (1.0 + 4.0 * momentum**2) ** 0.5) / 2.0
            ahead = self.weights + (momentum - 1.0) / new_momentum * change
            momentum = new_momentum
            self._by_totals = self.quadratic.half_gradient_by_totals(self.matrix.totals(ahead))
        self.refresh()

    def _largest_curvature(self, scale: Float[Tensor, "households"]) -> float:
        """Largest eigenvalue of the scaled second derivative, by power iteration; kept after the first time.

        Entries may have both signs, so the start is not constant; it is fixed, so that runs repeat.
        """
        if not hasattr(self, "_largest"):
            root = scale.sqrt()
            n = len(root)
            vector = 1.0 + torch.sin(torch.arange(n, dtype=torch.float64, device=root.device))
            size = 1.0
            for _ in range(30):
                vector = root * self._curve(root * (vector / vector.norm().clamp(min=1e-300)))
                size = float(vector.norm())
            self._largest = max(1.05 * size, 1e-300)
        return self._largest
