"""Sets of targets that split the same total in different ways: their values must have the same sum.

Age groups, household sizes and districts of one population each add up to all of it. Where the rows of two
sets of targets have the same sum, household by household, no weights can give the sums of their targets
different values. Which sets are looked at is a matter of search; that a pair found has equal sums is not.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from sparsereg.calibration.problem import CalibrationProblem, exact_totals

DIFFERENCE = 1e-3
"""Relative difference of two sums that is worth a word; statistics are rounded."""
_SAME = 1e-11
"""Relative difference of the probes of equal sums: of rounding in float64."""


@dataclass(frozen=True)
class Margin:
    """A set of targets.

    Args:
        targets: Their indices, ascending.
        label: What to call it.
        parent: The target that all of them are part of, or -1.
    """

    targets: tuple[int, ...]
    label: str
    parent: int = -1


def disagreements(problem: CalibrationProblem) -> Iterator[tuple[Margin, Margin]]:
    """Find pairs of sets whose rows have the same sum and whose targets do not.

    Args:
        problem: Totals only.

    Yields:
        A set and the one that it is compared with: the whole that both split if that is a target, else the
        set with the fewest targets.
    """
    probes = _probes(problem)
    margins = list(_candidates(problem, probes))
    sums = np.array([probes[list(m.targets)].sum(axis=0) for m in margins])
    sizes = np.array([np.abs(probes[list(m.targets)]).sum(axis=0) for m in margins])
    for members in _equal(sums, sizes):
        known = min(members, key=lambda i: (len(margins[i].targets), margins[i].targets))
        told: set[tuple[int, ...]] = {margins[known].targets}
        for i in members:
            margin, other = margins[i], margins[known]
            if (
                margin.targets in told or len(margin.targets) == 1
            ):  # single rows that are equal: contradictory
                continue
            told.add(margin.targets)
            one, two = (float(problem.targets[list(m.targets)].sum()) for m in (margin, other))
            if abs(one - two) > DIFFERENCE * max(abs(one), abs(two)):
                yield margin, other


def _probes(problem: CalibrationProblem) -> np.ndarray:
    """Totals with two sets of random weights, shape (targets, 2): equal rows have equal ones."""
    random = np.random.default_rng(0).random((2, problem.num_households)) + 0.5
    return np.stack([exact_totals(problem.matrix, weights) for weights in random], axis=1)


def _candidates(problem: CalibrationProblem, probes: np.ndarray) -> Iterator[Margin]:
    """Yield every target alone, the targets of each parent and group, and runs of them without overlap."""
    touched = np.flatnonzero(np.diff(problem.matrix.indptr))
    for i in touched.tolist():
        yield Margin((i,), f"{problem.names[i]!r}")
    groups = problem.target_groups
    labels = np.full(problem.num_targets, "") if groups is None else groups.astype(str)
    above = np.full(problem.num_targets, -1) if problem.parent is None else problem.parent
    families: dict[tuple[int, str], list[int]] = defaultdict(list)
    by_group: dict[str, list[int]] = defaultdict(list)
    by_parent: dict[int, list[int]] = defaultdict(list)
    for i in touched.tolist():
        parent, label = int(above[i]), str(labels[i])
        families[parent, label].append(i)
        by_group[label].append(i)
        by_parent[parent].append(i)
    for (parent, label), members in families.items():
        called = f"group {label!r}" if groups is not None else ""
        part = f" of {problem.names[parent]!r}" if parent >= 0 else ""
        if len(members) > 1 and (groups is not None or parent >= 0):
            yield Margin(tuple(members), f"{called}{part}".strip() or _named(problem, members), parent)
        for run in _runs(problem, members):
            if 1 < len(run) < len(members) or groups is None:
                yield Margin(tuple(run), f"{_named(problem, run)}{part}", parent)
    for label, members in by_group.items():
        if groups is not None and len(members) > 1:
            yield Margin(tuple(members), f"group {label!r}")
    for parent, members in by_parent.items():
        if parent >= 0 and len(members) > 1:
            yield Margin(tuple(members), f"the parts of {problem.names[parent]!r}", parent)


def _named(problem: CalibrationProblem, members: list[int]) -> str:
    return f"{problem.names[members[0]]!r} to {problem.names[members[-1]]!r}"


def _runs(problem: CalibrationProblem, members: list[int]) -> Iterator[list[int]]:
    """Cut targets, in the order of the file, where one touches a household that its run has already.

    Who writes one margin after the other gets one run for each.
    """
    m = problem.matrix
    seen = np.full(problem.num_households, -1)
    run: list[int] = []
    number = 0
    for i in members:
        touched = m.indices[m.indptr[i] : m.indptr[i + 1]]
        if (seen[touched] == number).any():
            yield run
            run, number = [], number + 1
        seen[touched] = number
        run.append(i)
    if run:
        yield run


def _equal(sums: np.ndarray, sizes: np.ndarray) -> Iterator[list[int]]:
    """Yield the indices of sets with equal sums, by two probes, where there are more than one."""
    order = np.lexsort(sums.T[::-1])
    members = [int(order[0])] if len(order) else []
    for before, i in zip(order[:-1].tolist(), order[1:].tolist(), strict=True):
        if (np.abs(sums[i] - sums[before]) <= _SAME * np.maximum(sizes[i], sizes[before])).all():
            members.append(i)
        else:
            if len(members) > 1:
                yield sorted(members)
            members = [i]
    if len(members) > 1:
        yield sorted(members)
