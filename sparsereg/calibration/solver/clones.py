"""Clone and prune: exactly K pairs of area and household, and no household for more than a few areas.

All levels are calibrated together first, over everybody. From those weights every household draws the few
areas that it may be kept for; the pairs that were drawn are then pruned to K as households are. Whatever is
kept of them fits, so that pruning needs no rule of its own.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import scipy.sparse as sp

from sparsereg.calibration.areas import AreaProblem
from sparsereg.calibration.problem import CalibrationProblem
from sparsereg.calibration.solver.areas import AreaWeights, of_all, reached
from sparsereg.calibration.solver.calibration import calibrate
from sparsereg.calibration.solver.joint import Joint
from sparsereg.shapes import Float, Int

_log = logging.getLogger(__name__)

_SURPLUS = 8
"""Pairs among which one is kept, at most: more choice gains little and takes memory."""
_POWER = 0.5
"""Small areas are drawn more often than in proportion to their weight: its power that counts."""


@dataclass(frozen=True, eq=False)
class Pairs:
    """Pairs of an area and a household, by area, then household; arrays of shape (pairs,).

    Args:
        area: Index of the area.
        household: Index of the household.
        weights: Weight of the pair.
    """

    area: Int[np.ndarray, "pairs"]
    household: Int[np.ndarray, "pairs"]
    weights: Float[np.ndarray, "pairs"]


def prune_clones(
    problem: AreaProblem, keep: int, most: int, distance: str = "linear", price: float = 100.0, seed: int = 0
) -> Iterator[AreaWeights]:
    """Keep exactly some pairs of area and household, with weights that are near the targets of all levels.

    Args:
        problem: Measures, targets and who may stand for which area.
        keep: How many pairs.
        most: For how many areas a household is kept at most.
        distance: Of the calibration over everybody.
        price: Of its targets, see ``Joint``.
        seed: Of the draw and of the pruning.

    Raises:
        ValueError: there are not so many pairs to keep, or fewer than areas with targets.
    """
    asked = int(sum(len(problem.by_area[area]) > 0 for area in range(problem.num_areas)))
    if keep < asked:
        raise ValueError(
            f"keep={keep:,}: {asked:,} areas have targets, and each needs a household of its own"
        )
    joint, there = Joint(problem, distance, None, price), _most_pairs(problem, most)
    if keep > there:
        raise ValueError(
            f"keep={keep:,}: there are {there:,} pairs of area and household to keep, each household in"
            f" {most} areas at most"
        )
    return _pruned(joint, keep, most, seed)


def _most_pairs(problem: AreaProblem, most: int) -> int:
    """How many pairs there are if no household is in more areas than that."""
    if problem.placement.is_uniform:
        return problem.num_households * min(most, problem.num_areas)
    assert isinstance(problem.placement.shares, sp.csr_array)
    areas = np.bincount(problem.placement.shares.indices, minlength=problem.num_households)
    return int(np.minimum(areas, most).sum())


def _pruned(joint: Joint, keep: int, most: int, seed: int) -> Iterator[AreaWeights]:
    started, problem = time.perf_counter(), joint.problem
    joint.solve()
    drawn = _drawn(joint, most, _SURPLUS * keep, seed)
    _log.info("%s of the pairs of area and household are looked at", f"{len(drawn.area):,}")
    # The few targets of the nation count as much together as the many of the areas.
    kept = calibrate(_problem_of(problem, drawn), keep, seed=seed, normalize_groups=True).weights
    seconds = time.perf_counter() - started
    for area in range(problem.num_areas):
        yield _weights_of(problem, replace(drawn, weights=kept), area, joint.steps, seconds)


def _drawn(joint: Joint, most: int, number: int, seed: int) -> Pairs:
    """Draw areas of each household, at most so many, and at most so many pairs.

    A pair's chance grows with its weight over the weight of its area to a power, so that small areas keep
    support. Pairs arrive after independent exponential times; the earliest are drawn, and each stands for its
    weight over its chance to be earlier than the first that is not.

    Sources: Bankier, Power allocations: determining sample sizes for subnational areas, The American
    Statistician 42 (1988); Cohen and Kaplan, Summarizing data using bottom-k sketches, PODC (2007).
    """
    p, rng = joint.problem, np.random.default_rng(seed)
    earliest = np.full((p.num_households, most + 1), np.inf)
    place = np.full(earliest.shape, -1, dtype=np.int32)
    weight, rate = np.zeros(earliest.shape), np.zeros(earliest.shape)
    for made in joint.weights():
        there = np.flatnonzero(made.weights > 0)
        households, w = made.households[there], made.weights[there]
        speed = w / max(float(w.sum()), np.finfo(np.float64).tiny) ** _POWER
        arrival = rng.exponential(size=len(w)) / speed
        last = earliest[households].argmax(axis=1)
        sooner = arrival < earliest[households, last]
        at = households[sooner], last[sooner]
        earliest[at], place[at], weight[at], rate[at] = arrival[sooner], made.area, w[sooner], speed[sooner]
    until = earliest.max(axis=1)  # the first that is not drawn; never, where fewer may stand for an area
    household, slot = np.nonzero(earliest < until[:, None])
    arrival = earliest[household, slot]
    if len(arrival) > number:
        order = np.argpartition(arrival, number)
        until = np.minimum(until, arrival[order[number]])
        household, slot = household[order[:number]], slot[order[:number]]
    area = place[household, slot].astype(np.int64)
    order = np.lexsort((household, area))
    household, slot, area = household[order], slot[order], area[order]
    chance = -np.expm1(-rate[household, slot] * until[household])
    return Pairs(area, household, weight[household, slot] / chance)


def _problem_of(problem: AreaProblem, pairs: Pairs) -> CalibrationProblem:
    """Targets of all levels over pairs, soft, in groups by how deep they stand."""
    columns = sp.csr_array(problem.measures.T.tocsr())
    starts = np.searchsorted(pairs.area, np.arange(problem.num_areas + 1))
    data, targets, places = [], [], []
    for area in range(problem.num_areas):
        mine = slice(*starts[area : area + 2])
        part = sp.coo_array(columns[pairs.household[mine]])
        at, measure = part.coords
        for place in problem.chain(area):
            own = problem.by_place[place]
            target_of = np.full(problem.measures.shape[0], -1)
            target_of[problem.measure[own]] = own
            there = target_of[measure] >= 0
            targets.append(target_of[measure][there])
            places.append(at[there] + starts[area])
            data.append(part.data[there])
    shape = (len(problem.targets), len(pairs.area))
    entries = (np.concatenate(data), (np.concatenate(targets), np.concatenate(places)))
    return CalibrationProblem(
        sp.csr_array(sp.coo_array(entries, shape=shape).tocsr()), problem.targets, pairs.weights,
        target_names=tuple(f"{name!r} of {problem.place_name(i)!r}" for i, name in enumerate(problem.names)),
        target_weights=problem.prices,
        target_groups=np.where(problem.is_of_area, "areas", problem.depth[problem.area].astype(str)),
    )  # fmt: skip


def _weights_of(problem: AreaProblem, pairs: Pairs, area: int, steps: int, seconds: float) -> AreaWeights:
    """What is kept for an area, among all that may stand for it."""
    households, shares = problem.placement.of(area, problem.num_households)
    initial = problem.initial_weights[households] * shares
    first, last = np.searchsorted(pairs.area, [area, area + 1])
    weights = np.zeros(len(households))
    weights[np.searchsorted(households, pairs.household[first:last])] = pairs.weights[first:last]
    targets = problem.by_area[area]
    rows = abs(problem.measures[problem.measure[targets]].astype(np.float64))
    gross = np.asarray(rows @ of_all(problem, households, initial))
    estimates, errors = reached(problem, area, households, weights, gross)
    return AreaWeights(
        area, households, initial, weights, targets, estimates, errors, np.full(len(targets), np.nan),
        np.empty(0, dtype=np.int64), 0, steps, seconds,
    )  # fmt: skip
