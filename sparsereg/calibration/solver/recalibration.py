"""The same calibration from other initial weights: replicates of a sample, hundreds of times.

What replicates share is found once: the matrix in the forms that products need, domains, which targets are
sums of others, and which gave way: these have their price from the start, so that no linear programme is
asked again. From the sample's own multipliers it takes Newton's method a few steps.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from sparsereg.calibration.problem import CalibrationProblem
from sparsereg.calibration.solver.bounds import Bounds, bounded_weights, ratio_bounds
from sparsereg.calibration.solver.dual_newton import Dual, Solution, independent, solve
from sparsereg.calibration.solver.exact import (
    Domain,
    Exact,
    domains,
    soften,
    unit_factors,
)

_TOLERANCE = 1e-12
"""Largest error of a total of a replicate, over its scale."""
_MOST_STEPS = 50


@dataclass(frozen=True, eq=False)
class _Part:
    """A domain of the sample, of its targets those that are not sums of others.

    Args:
        domain: As it was solved first.
        dual: Its problem, with the prices of the end.
        multipliers: Of the sample.
    """

    domain: Domain
    dual: Dual
    multipliers: np.ndarray


class Recalibration:
    """Calibrates the households of a problem again from other initial weights.

    Args:
        problem: What was calibrated.
        exact: What came of it.
        distance: As in ``calibrate_exactly``.
        bounds: The same.
        weight_bounds: The same. They become bounds of the ratio: a household that stands for two in a
            replicate may have twice the weight.
        unit_factor: The same.
    """

    def __init__(
        self,
        problem: CalibrationProblem,
        exact: Exact,
        distance: str = "linear",
        bounds: Bounds | None = None,
        weight_bounds: Bounds | None = None,
        unit_factor: np.ndarray | None = None,
    ) -> None:
        linear = problem.linear
        self._total = float(linear.starting_weights.sum())
        self._ratios = ratio_bounds(linear.starting_weights, distance, bounds, weight_bounds)
        factors = unit_factors(unit_factor, problem.num_households)
        parts = domains(linear, distance, *self._ratios, factors, exact.prices)
        self._parts = [_part(domain, exact.multipliers * linear.scale) for domain in parts]

    def __call__(self, initial: np.ndarray) -> np.ndarray:
        """Return calibrated weights, as close to the targets as they can be where they cannot meet them.

        Args:
            initial: Initial weights of a replicate, >= 0, shape (households,).
        """
        weights, share = initial.copy(), float(initial.sum()) / self._total
        for part in self._parts:
            weights[part.domain.households] = _solve(part, initial[part.domain.households], share).weights
        return np.clip(weights, *bounded_weights(initial, self._ratios))


def _part(domain: Domain, multipliers: np.ndarray) -> _Part:
    chosen = independent(domain.dual)
    domain = replace(domain, natural=domain.natural[chosen], targets=domain.targets[chosen])
    return _Part(domain, domain.dual.take(chosen), multipliers[domain.targets])


def _solve(part: _Part, initial: np.ndarray, share: float) -> Solution:
    """Solve one domain of a replicate, whose weights sum to this share of the sample's."""
    slack = replace(part.dual.slack, price=part.dual.slack.price * share)
    dual = replace(part.dual, weights=initial, slack=slack)
    domain, start = replace(part.domain, total=part.domain.total * share), part.multipliers
    there = np.flatnonzero(dual.rows.squares(initial) > 0)
    if len(there) < len(dual.targets):  # nobody is left for the others
        dual, start = dual.take(there), start[there]
        domain = replace(domain, natural=domain.natural[there], targets=domain.targets[there])
    everything = np.arange(len(dual.targets))
    found = solve(dual, start, chosen=everything, tolerance=_TOLERANCE, most_steps=_MOST_STEPS)
    if found.converged:
        return found
    return soften(domain, dual, np.isinf(dual.slack.price), found)[0]
