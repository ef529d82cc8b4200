"""``method="calibrate"``: targets are met exactly, by the weights closest to the initial ones.

Households that share no target, directly or through others, are calibrated apart. Where the iteration does
not reach the hard targets of a part, a linear programme says whether any weights do. If not, it names the
targets in conflict and those that give way so that the others can be met: these get a price.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import scipy.sparse as sp
from scipy.optimize import linprog

from sparsereg.calibration.problem import CalibrationProblem
from sparsereg.calibration.solver.bounds import Bounds, at_bounds, bounded_weights, ratio_bounds
from sparsereg.calibration.solver.distances import distance_of
from sparsereg.calibration.solver.dual_newton import ROUNDED, Dual, Rows, Slack, Solution, solve
from sparsereg.linalg.threads import in_turns
from sparsereg.shapes import Bool, Float, Int

_log = logging.getLogger(__name__)

_PRICES = (1.0, 10.0)
"""Prices of targets that give way, one after the other; with 10, missing one by 1 % of what goes into it
costs as much as changing all weights by 3 %."""
BAND_STIFFNESS = 1e8
"""Slope of a tolerance over the slope of its target: within it, the multiplier is as good as zero."""
GAVE_WAY = 1e-6
"""Error beyond the tolerance, over the scale, from which a target is not met."""
SMALL_BESIDE_GROSS = 0.01
"""A scale of at most this share of what goes into the total is that of a zero, or of a small difference."""
_CERTIFICATE_SECONDS = 60.0
_MOST_PROGRAMMED = 5000
"""Targets up to which a linear programme names those in conflict, where multipliers prove that there are."""
_MOST_MARKED = 2000
"""Targets of which every pair can be marked."""
_PROOF_STEPS = 8
"""Steps in search of a proof; most are found at the first one."""
_CONFLICT = 1e-7
"""Multiplier in the linear programme, or share of a proof's largest, from which a target is in conflict."""


@dataclass(frozen=True, eq=False)
class Exact:
    """Calibrated weights and what they cost.

    Args:
        weights: Shape (households,), float64.
        multipliers: Shape (targets,): by how much the distance grows per unit that a total is asked to be
            higher; w = d F(q A' multipliers).
        error: Largest error of a hard target beyond its tolerance, over its scale.
        gave_way: Indices of hard targets that are not met.
        certificate: Per part that could not be met: ``feasible`` (None: not known), ``targets`` (indices
            that conflict), ``violation`` (least possible sum of errors over what goes into the targets).
        bounds_hit: How many households are at a bound.
        steps: Newton steps of the domain that took most.
        prices: What each target was solved with in the end, per unit of the sum of the initial weights, shape
            (targets,); infinity: it had to be met.
        totals: What the weights add up to, shape (targets,); of a ratio numerator - target x denominator.
    """

    weights: Float[np.ndarray, "households"]
    multipliers: Float[np.ndarray, "targets"]
    error: float
    gave_way: Int[np.ndarray, "gave_way"]
    certificate: list[dict[str, Any]]
    bounds_hit: int
    steps: int
    prices: Float[np.ndarray, "targets"]
    totals: Float[np.ndarray, "targets"]


@dataclass(frozen=True, eq=False)
class Domain:
    """Some targets and the households they touch, over the targets' scales."""

    targets: Int[np.ndarray, "targets"]
    households: Int[np.ndarray, "households"]
    dual: Dual
    natural: Float[np.ndarray, "targets"]  # weight of an error over its scale where somebody has to give way
    total: float
    start: np.ndarray | None = None  # weights of an earlier calibration


def calibrate_exactly(
    problem: CalibrationProblem,
    distance: str = "linear",
    bounds: Bounds | None = None,
    weight_bounds: Bounds | None = None,
    unit_factor: np.ndarray | None = None,
    shares: np.ndarray | None = None,
    start: np.ndarray | None = None,
) -> Exact:
    """Find the weights closest to the initial ones that meet the targets.

    Args:
        problem: Its targets are hard unless they have a weight (``target_hard``, ``target_weights``); a
            tolerance widens them. A weight is a price: with 1, missing the target by 1 % of its scale
            costs as much as changing all weights by 1 %.
        distance: "linear", "raking" or "logit".
        bounds: Smallest and largest weight over initial weight, numbers or one per household; None: 0 and
            infinity. Linear weights may become negative where the smallest is negative.
        weight_bounds: Smallest and largest weight itself, as well.
        unit_factor: q > 0 per household: those of a large one are changed first. None: 1.
        shares: Prices to use instead of the problem's weights.
        start: Weights of an earlier calibration to start from, shape (households,), 0 where there is none.

    Raises:
        ValueError: an argument is wrong, or targets marked ``hard`` contradict each other.
    """
    linear = problem.linear
    initial = linear.starting_weights
    low, high = ratio_bounds(initial, distance, bounds, weight_bounds)
    factors = unit_factors(unit_factor, problem.num_households)
    prices = np.where(is_hard(problem), np.inf, problem.target_shares if shares is None else shares)
    weights, multipliers, final = initial.copy(), np.zeros(linear.num_targets), prices.copy()
    parts = list(domains(linear, distance, low, high, factors, prices))
    if start is not None:
        parts = [replace(domain, start=start[domain.households]) for domain in parts]
    ends = in_turns(solve_domain, [(domain,) for domain in parts])
    certificates, steps = [], 0
    for domain, (end, slack, certificate) in zip(parts, ends, strict=True):
        weights[domain.households] = end.weights
        multipliers[domain.targets] = end.multipliers / linear.scale[domain.targets]
        final[domain.targets] = slack.price / domain.total
        steps = max(steps, end.steps)
        if certificate is not None:
            certificates.append(certificate)
    limits = bounded_weights(initial, (low, high))
    weights = np.clip(weights, *limits)
    return _described(problem, weights, multipliers, (prices, final), certificates, limits, steps)


def _described(
    problem: CalibrationProblem,
    weights: np.ndarray,
    multipliers: np.ndarray,
    prices: tuple[np.ndarray, np.ndarray],
    certificates: list[dict[str, Any]],
    limits: list[Float[np.ndarray, "households"]],
    steps: int,
) -> Exact:
    linear = problem.linear
    totals = linear.estimates(weights)
    beyond = np.abs(linear.scaled_errors(totals))
    given, final = prices
    is_hard_here = np.isinf(given)
    gave_way = np.flatnonzero(is_hard_here & (beyond > GAVE_WAY))
    empty = np.flatnonzero(is_hard_here & (np.diff(linear.matrix.indptr) == 0) & (beyond > GAVE_WAY))
    certificates += [{"feasible": False, "targets": [int(i)], "violation": 1.0} for i in empty]
    refuse_contradiction(problem, gave_way, certificates)
    initial = linear.starting_weights
    low, high = limits
    at_bound = at_bounds(weights, low, high)
    worst = float(beyond[is_hard_here].max()) if is_hard_here.any() else 0.0
    hit = int((at_bound & (initial > 0)).sum())
    return Exact(weights, multipliers, worst, gave_way, certificates, hit, steps, final, totals)


def refuse_contradiction(
    problem: CalibrationProblem, gave_way: Int[np.ndarray, "gave_way"], certificates: list[dict[str, Any]]
) -> None:
    """Refuse that targets marked hard give way where it is proven that they contradict each other.

    Args:
        problem: With the marks.
        gave_way: Hard targets that are not met.
        certificates: What is known, see ``Exact``.

    Raises:
        ValueError: they do.
    """
    refused = gave_way[:0] if problem.target_hard is None else gave_way[problem.target_hard[gave_way]]
    if len(refused) and any(c["feasible"] is False for c in certificates):
        raise ValueError(_contradiction(problem, refused, certificates))


def _contradiction(
    problem: CalibrationProblem, refused: Int[np.ndarray, "refused"], certificates: list[dict[str, Any]]
) -> str:
    conflict = sorted({i for c in certificates if c["feasible"] is False for i in c["targets"]})
    named = ", ".join(problem.names[i] for i in conflict[:8])
    more = f" and {len(conflict) - 8} more" if len(conflict) > 8 else ""
    violation = sum(c["violation"] for c in certificates if c["feasible"] is False)
    return (
        f"hard targets contradict each other, {problem.names[refused[0]]!r} for one: no weights within the"
        f" bounds meet {named}{more} together (a linear programme proves it: they stay {violation:.3g} of"
        " their size apart); widen the bounds, give some a tolerance or a weight, or leave hard empty"
    )


def near_zero(linear: CalibrationProblem) -> Bool[np.ndarray, "targets={linear.num_targets}"]:
    """Which totals are asked to be so small beside what goes into them that their scale says nothing.

    Where such a target contradicts others, it is judged by all that goes into it.
    """
    return np.asarray(linear.scale <= SMALL_BESIDE_GROSS * linear.gross)


def is_hard(problem: CalibrationProblem) -> Bool[np.ndarray, "targets={problem.num_targets}"]:
    """Which targets must be met: those marked so, else those without a weight."""
    if problem.target_hard is not None:
        return problem.target_hard
    if problem.target_weights is None:
        return np.ones(problem.num_targets, dtype=bool)
    return np.asarray(np.isnan(problem.target_weights))


def unit_factors(factors: Any, households: int) -> Float[np.ndarray, "households={households}"]:
    """Factors q of the households, ones where none are given.

    Raises:
        ValueError: they are not one number > 0 per household.
    """
    if factors is None:
        return np.ones(households)
    values = np.asarray(factors, dtype=np.float64)
    if values.shape != (households,):
        raise ValueError(
            f"unit_factor must have shape ({households},), one per household, got {values.shape}"
        )
    wrong = np.flatnonzero(~(np.isfinite(values) & (values > 0)))
    if len(wrong):
        raise ValueError(f"unit_factor must be > 0, got {values[wrong[0]]:g} for household {wrong[0]}")
    return values


def domains(
    linear: CalibrationProblem,
    distance: str,
    low: Float[np.ndarray, "households"],
    high: Float[np.ndarray, "households"],
    factors: Float[np.ndarray, "households"],
    prices: Float[np.ndarray, "targets"],
) -> Iterator[Domain]:
    """Cut a problem into parts that share neither targets nor households, without what nothing touches."""
    initial, scale = linear.starting_weights, linear.scale
    total = float(initial.sum())
    natural = np.where(near_zero(linear), scale / np.maximum(scale, linear.gross), 1.0)
    for targets, households, part in blocks(linear.matrix, initial > 0, lambda: linear.matrix_t):
        rows = Rows(part, scale[targets])
        if part is linear.matrix and not rows.are_full:
            rows = replace(rows, turned=linear.matrix_t)
        own = distance_of(distance, low[households], high[households])
        price = np.maximum(prices[targets] * total, np.finfo(np.float64).tiny)
        slack = Slack(price, linear.tolerance[targets] / scale[targets], np.zeros(len(targets)))
        dual = Dual(
            rows, linear.targets[targets] / scale[targets], initial[households],
            factors[households], own, slack,
        )  # fmt: skip
        if slack.band.any():
            dual = replace(dual, slack=replace(slack, stiffness=BAND_STIFFNESS * dual.diagonal))
        yield Domain(targets, households, dual, natural[targets], total)


def blocks(
    matrix: sp.csr_array,
    there: Bool[np.ndarray, "households"],
    by_household: Callable[[], sp.csr_array] | None = None,
) -> Iterator[tuple[np.ndarray, np.ndarray, sp.csr_array]]:
    """Targets, households and rows of each connected part of a matrix with an entry.

    Args:
        matrix: Targets x households, canonical.
        there: Whom to take.
        by_household: Gives the same matrix by household, where that can be spared another time.
    """
    columns, num_targets = np.flatnonzero(there), matrix.shape[0]
    if len(columns) < len(there):
        matrix, by_household = sp.csr_array(matrix[:, columns]), None
    lengths = np.diff(matrix.indptr)
    if lengths.min() > 0 and lengths.max() == len(columns):  # somebody in each target, all of them in one
        yield np.arange(num_targets), columns, matrix
        return
    of_target, of_column = _connected(by_household() if by_household else sp.csr_array(matrix.T.tocsr()))
    filled = np.flatnonzero(lengths)
    if len(filled) == num_targets and (of_target == of_target[0]).all() and (of_column == of_target[0]).all():
        yield filled, columns, matrix
        return
    count = int(of_target.max()) + 1
    by_target, by_column = np.argsort(of_target, kind="stable"), np.argsort(of_column, kind="stable")
    place = np.empty(len(columns), dtype=np.int64)
    place[by_column] = np.arange(len(columns))
    ordered = sp.csr_array(matrix[by_target])
    ordered.indices = place[ordered.indices]
    starts = [
        np.searchsorted(of[by], np.arange(count + 1))
        for of, by in ((of_target, by_target), (of_column, by_column))
    ]
    for k in range(count):
        (first, last), (left, right) = (start[k : k + 2] for start in starts)
        if first == last or left == right:
            continue
        indptr = ordered.indptr[first : last + 1]
        part = slice(indptr[0], indptr[-1])
        rows = sp.csr_array(
            (ordered.data[part], ordered.indices[part] - left, indptr - indptr[0]),
            shape=(last - first, right - left),
        )
        rows.sort_indices()
        yield by_target[first:last], columns[by_column[left:right]], rows


def _connected(
    by_household: sp.csr_array,
) -> tuple[Int[np.ndarray, "targets"], Int[np.ndarray, "households"]]:
    """Number of the part that each target belongs to, and each household; of those without targets: one more.

    Two targets are connected if somebody has both, so each household connects its first one to all others.
    """
    households, num_targets = by_household.shape
    lengths = np.diff(by_household.indptr)
    filled = np.flatnonzero(lengths)
    first = by_household.indices[by_household.indptr[filled]].astype(np.int64)
    pairs = np.repeat(first * num_targets, lengths[filled]) + by_household.indices
    if num_targets <= _MOST_MARKED:
        mark = np.zeros(num_targets**2, dtype=bool)
        mark[pairs] = True
        pairs = np.flatnonzero(mark)
    else:
        pairs = np.unique(pairs)
    of_target = _labels(num_targets, *np.divmod(pairs, num_targets))
    of_household = np.full(households, int(of_target.max()) + 1)
    of_household[filled] = of_target[first]
    return of_target, of_household


def _labels(
    num: int, one: Int[np.ndarray, "pairs"], other: Int[np.ndarray, "pairs"]
) -> Int[np.ndarray, "num={num}"]:
    """Number of the connected part that each of so many nodes belongs to: the least one goes around."""
    least = np.arange(num)
    while True:
        before = least.copy()
        np.minimum.at(least, one, before[other])
        np.minimum.at(least, other, before[one])
        least = least[least]
        if np.array_equal(least, before):
            return np.asarray(np.unique(least, return_inverse=True)[1])


Certificate = tuple[dict[str, Any], Bool[np.ndarray, "targets"]]
"""What is known about a domain whose hard targets are not met, and which of them give way."""


def solve_domain(
    domain: Domain, certified: Callable[[Domain, Solution], Certificate] | None = None
) -> tuple[Solution, Slack, dict[str, Any] | None]:
    """Solve one domain; where hard targets cannot be met, let as few as possible give way.

    Args:
        domain: What is solved.
        certified: What finds out whether they can be met; None: ``certify``.
    """
    end = solve(domain.dual, weights=domain.start)
    if end.converged:
        return end, domain.dual.slack, None
    return give_way(domain, end, certified or certify)


def give_way(
    domain: Domain, end: Solution, certified: Callable[[Domain, Solution], Certificate]
) -> tuple[Solution, Slack, dict[str, Any] | None]:
    """Solve with prices for the targets that give way: those that a certificate names, else all.

    Args:
        domain: What is solved.
        end: Where the iteration ended without.
        certified: What finds out which do.
    """
    certificate, gives_way = certified(domain, end)
    hard = domain.dual.hard
    found, slack = end, domain.dual.slack
    for softened in (gives_way, hard) if gives_way.any() else (hard,):
        found, slack = soften(domain, domain.dual, softened, end)
        if found.converged:
            break
    return found, slack, certificate


def soften(
    domain: Domain, dual: Dual, gives_way: Bool[np.ndarray, "targets"], otherwise: Solution
) -> tuple[Solution, Slack]:
    """Solve with a price for the targets that give way; the highest with which the iteration ends well.

    Args:
        domain: What is solved.
        dual: Its problem, the whole sample's or a replicate's.
        gives_way: Mask of targets.
        otherwise: What has been found without.

    Returns:
        The solution, and the prices it was found with.
    """
    found, slack, start = otherwise, dual.slack, None
    for price in _PRICES:
        prices = np.where(gives_way, price * domain.total * domain.natural**2, dual.slack.price)
        trial = replace(dual.slack, price=prices)
        tried = solve(replace(dual, slack=trial), start)
        start = tried.multipliers
        if tried.error < max(ROUNDED, found.error):
            found, slack = tried, trial
    return found, slack


def certify(domain: Domain, end: Solution) -> Certificate:
    """Find out whether the hard targets of a domain can be met together, and which give way if not.

    Of up to a few thousand targets a linear programme tells, which minimises the sum of what is missing, over
    what goes into each target. Beyond, and where it takes too long, the multipliers do at which the iteration
    ended, if they prove that no weights exist: what they prove to be missing is a lower bound of that sum.

    Returns:
        The certificate, see ``Exact``; a mask of the targets that the programme's solution misses.
    """
    nobody = np.zeros(len(domain.targets), dtype=bool)
    many = int(domain.dual.hard.sum()) > _MOST_PROGRAMMED
    found = None if many and end.proof is not None else _programme(domain)
    if found is not None:
        return found
    proof = end.proof
    if proof is None:
        proof = solve(domain.dual, chosen=np.arange(len(domain.targets)), most_steps=_PROOF_STEPS).proof
    if proof is None:
        return {"feasible": None, "targets": [], "violation": None}, nobody
    return proven(domain, proof), nobody


def proven(domain: Domain, proof: Float[np.ndarray, "targets"]) -> dict[str, Any]:
    """The certificate that multipliers are."""
    share = np.where(domain.dual.hard, np.abs(proof), 0.0)
    size = float((share / domain.natural).max())
    conflict = domain.targets[share > _CONFLICT * share.max()]
    missing = domain.dual.excludes(proof) * float(share.max()) / size
    return {"feasible": False, "targets": sorted(int(i) for i in conflict), "violation": missing}


def _programme(domain: Domain) -> Certificate | None:
    """Ask a linear programme; None where it takes too long."""
    dual, names = domain.dual, domain.targets
    hard = np.flatnonzero(dual.hard)
    count, households = len(hard), len(dual.weights)
    eye, band = sp.eye_array(count), dual.slack.band[hard]
    rows = sp.hstack([dual.rows.by_target[hard] @ sp.diags_array(dual.weights), eye, -eye, eye], format="csc")
    cost = np.concatenate([np.zeros(households), domain.natural[hard], domain.natural[hard], np.zeros(count)])
    low = np.concatenate([dual.distance.low, np.zeros(2 * count), -band])
    high = np.concatenate([dual.distance.high, np.full(2 * count, np.inf), band])
    found = linprog(
        cost, A_eq=rows, b_eq=dual.targets[hard], bounds=np.column_stack([low, high]), method="highs",
        options={"time_limit": _CERTIFICATE_SECONDS},
    )  # fmt: skip
    if found.status != 0:
        return None
    gives_way = np.zeros(len(names), dtype=bool)
    conflict = hard[np.abs(found.eqlin.marginals) > _CONFLICT]
    feasible = bool(found.fun <= GAVE_WAY * max(1, count))
    missed = found.x[households : households + count] + found.x[households + count : households + 2 * count]
    gives_way[hard] = (missed > GAVE_WAY) & (not feasible)
    certificate = {
        "feasible": feasible,
        "targets": [] if feasible else sorted(int(names[i]) for i in conflict),
        "violation": float(found.fun),
    }
    return certificate, gives_way
