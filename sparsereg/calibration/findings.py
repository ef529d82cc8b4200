"""What can be known before the run: targets that no weights, or not these weights, can reach.

Every finding is certain, not a guess: it follows from signs, bounds and equal rows. That nothing is found
does not prove that all targets can be reached together.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import scipy.sparse as sp

from sparsereg.calibration.margins import disagreements
from sparsereg.calibration.problem import CalibrationProblem

if TYPE_CHECKING:
    from sparsereg.calibration.solver.exact import Exact

KINDS = {
    "untouchable": "no household touches them",
    "contradictory": "the same total is asked for twice, with different values",
    "out of reach": "no weights that are allowed can reach them",
    "duplicate": "the same total is asked for twice, with the same value",
    "zero": "they are 0, which only weight 0 for every household that they touch can reach",
    "tiny": "one household of average kept weight is more than the whole target",
    "set aside": "all other targets rule them out: the loss leaves them out",
    "gave way": "the others cannot be met together with them",
    "disagreeing levels": "the targets of the parts do not add up to the target of the whole",
    "disagreeing margins": "two sets of targets split the same total and add up to different sums",
}
_SAME_VALUE = 1e-6


@dataclass(frozen=True)
class Finding:
    """Something about one target that its owner should know before the run.

    Args:
        kind: A key of ``KINDS``.
        target: Index of the target.
        name: Its name.
        detail: What is so, with the numbers.

    Example:
        >>> Finding("zero", 3, "farms", "its value is 0").name
        'farms'
    """

    kind: str
    target: int
    name: str
    detail: str


def check(
    problem: CalibrationProblem,
    num_households: int | None = None,
    max_weight_ratio: float | None = None,
    hold_total: bool = False,
    hints: Mapping[int, str] | None = None,
) -> list[Finding]:
    """Find the targets that cannot be reached, contradict each other or hang on one household.

    Args:
        problem: The problem.
        num_households: How many households will be kept; None: not known.
        max_weight_ratio: Largest allowed weight as a multiple of the initial weight; None: any.
        hold_total: Whether the sum of the weights stays what it is.
        hints: Why a target touches no household, by index, as far as known.

    Returns:
        The findings, by kind in the order of ``KINDS``, then by target.

    Example:
        >>> problem = CalibrationProblem(sp.csr_array([[1.0, 1.0], [1.0, 1.0]]), np.array([8.0, 9.0]))
        >>> [finding.kind for finding in check(problem)]
        ['contradictory']
    """
    given, problem = problem, problem.linear
    found = [
        *_untouchable(problem, hints or {}),
        *_equal_rows(problem),
        *_out_of_reach(problem, num_households, max_weight_ratio, hold_total),
        *_small(problem, num_households),
        *_margins(problem),
    ]
    return in_order([_of_ratio(given, f) for f in found])


def in_order(findings: Sequence[Finding]) -> list[Finding]:
    """Sort findings by kind in the order of ``KINDS``, then by target."""
    order = list(KINDS)
    return sorted(findings, key=lambda f: (order.index(f.kind), f.target))


def _of_ratio(problem: CalibrationProblem, finding: Finding) -> Finding:
    """Say what the numbers of a finding mean where the target is a ratio."""
    if not problem.is_ratio[finding.target]:
        return finding
    value = _shown(problem.targets[finding.target])
    return replace(finding, detail=f"of numerator - {value} x denominator: {finding.detail}")


def gave_way(problem: CalibrationProblem, exact: Exact) -> list[Finding]:
    """Return the findings about hard targets that an exact calibration did not meet, with what they cost."""
    estimates, found = problem.estimates(exact.weights), []
    conflicts = {
        i: certificate["targets"] for certificate in exact.certificate for i in certificate["targets"]
    }
    for i in exact.gave_way:
        conflict = conflicts.get(i)
        others = [] if conflict is None else [problem.names[j] for j in conflict[:5] if j != i][:4]
        more = f" and {len(conflict) - 5} more" if conflict is not None and len(conflict) > 5 else ""
        against = f"contradicts {', '.join(others)}{more}; " if others else ""
        if conflict is not None and not others:
            against = "no weights within the bounds reach it; "
        values = f"target {_shown(problem.targets[i])}, reached {_shown(estimates[i])}"
        price = f"its multiplier is {exact.multipliers[i]:.3g}"
        found.append(_finding(problem, "gave way", i, f"{against}{values}; {price}"))
    return found


def set_aside(problem: CalibrationProblem, targets: Sequence[int] | np.ndarray) -> list[Finding]:
    """Return the findings about targets near zero that the loss leaves out."""
    gross = problem.gross
    return [
        _finding(
            problem, "set aside", i, f"target {_shown(problem.targets[i])}, of {_shown(gross[i])} in sum"
        )
        for i in targets
    ]


def summary(findings: Sequence[Finding], most: int = 5) -> list[str]:
    """Return one line per kind of finding, with the first few by name.

    Args:
        findings: What ``check`` returned.
        most: How many to spell out per kind.
    """
    lines = []
    for kind, meaning in KINDS.items():
        some = [f for f in findings if f.kind == kind]
        if some:
            named = "; ".join(f"{f.name} ({f.detail})" for f in some[:most])
            more = f"; and {len(some) - most} more" if len(some) > most else ""
            lines.append(f"{len(some)} {kind}: {meaning}: {named}{more}")
    return lines


def empty_rows(matrix: sp.csr_array) -> np.ndarray:
    """Return the indices of the rows without an entry."""
    return np.flatnonzero(np.diff(matrix.indptr) == 0)


def _finding(problem: CalibrationProblem, kind: str, target: int | np.integer, detail: str) -> Finding:
    return Finding(kind, int(target), problem.names[int(target)], detail)


def _untouchable(problem: CalibrationProblem, hints: Mapping[int, str]) -> Iterator[Finding]:
    for i in empty_rows(problem.matrix):
        reason = hints.get(int(i), "its row of the matrix is all zero")
        yield _finding(problem, "untouchable", i, f"{reason}; target {_shown(problem.targets[i])}")


def _equal_rows(problem: CalibrationProblem) -> Iterator[Finding]:
    """Compare every row with the first one that is equal to it."""
    m = problem.matrix
    first: dict[tuple[int, int], list[int]] = defaultdict(list)
    for i in range(problem.num_targets):
        part = slice(m.indptr[i], m.indptr[i + 1])
        indices, data = m.indices[part], m.data[part]
        if len(data) == 0:
            continue
        candidates = first[(hash(indices.tobytes()), hash(data.tobytes()))]
        for j in candidates:
            other = slice(m.indptr[j], m.indptr[j + 1])
            if np.array_equal(m.indices[other], indices) and np.array_equal(m.data[other], data):
                a, b = problem.targets[j], problem.targets[i]
                same = abs(a - b) <= _SAME_VALUE * max(abs(a), abs(b))
                detail = f"{_shown(b)}, while {problem.names[j]} is {_shown(a)}"
                yield _finding(problem, "duplicate" if same else "contradictory", i, detail)
                break
        else:
            candidates.append(i)


def _out_of_reach(
    problem: CalibrationProblem, num_households: int | None, max_weight_ratio: float | None, hold_total: bool
) -> Iterator[Finding]:
    low, high = reachable(problem, num_households, max_weight_ratio, hold_total)
    slack = 1e-6 * problem.scale + problem.tolerance
    beyond = (problem.targets < low - slack) | (problem.targets > high + slack)
    beyond[empty_rows(problem.matrix)] = False
    for i in np.flatnonzero(beyond):
        detail = f"target {_shown(problem.targets[i])}, reachable {_shown(low[i])} to {_shown(high[i])}"
        yield _finding(problem, "out of reach", i, detail)
    yield from _parts_above_whole(problem, set(np.flatnonzero(beyond).tolist()))


def reachable(
    problem: CalibrationProblem,
    num_households: int | None = None,
    max_weight_ratio: float | None = None,
    hold_total: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the least and the largest value that each total can take on its own, shape (targets,) each.

    Args:
        problem: The problem.
        num_households: At most so many weights are positive; used together with ``max_weight_ratio``.
        max_weight_ratio: Largest allowed weight as a multiple of the initial weight; None: any.
        hold_total: Whether the sum of the weights stays what it is.
    """
    m = problem.matrix
    least, most = _row_range(m)
    touches_all = np.diff(m.indptr) == problem.num_households
    with np.errstate(invalid="ignore"):
        low, high = np.where(least < 0, -np.inf, 0.0), np.where(most > 0, np.inf, 0.0)
    if max_weight_ratio is not None:
        caps = max_weight_ratio * problem.starting_weights
        low, high = _bounded(m, caps, num_households)
    if hold_total:
        total = problem.starting_weights.sum()
        low = np.maximum(low, total * np.where(touches_all, least, np.minimum(least, 0)))
        high = np.minimum(high, total * np.where(touches_all, most, np.maximum(most, 0)))
    return low, high


def _row_range(m: sp.csr_array) -> tuple[np.ndarray, np.ndarray]:
    """Return the smallest and the largest entry of each row, 0 for an empty one."""
    least, most = np.zeros(m.shape[0]), np.zeros(m.shape[0])
    filled = np.flatnonzero(np.diff(m.indptr))
    if len(filled):
        starts = m.indptr[filled]
        least[filled] = np.minimum.reduceat(m.data, starts)
        most[filled] = np.maximum.reduceat(m.data, starts)
    return least, most


def _bounded(m: sp.csr_array, caps: np.ndarray, num_households: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Return the least and the largest total when no weight exceeds its cap and only so many are positive."""
    num_targets = m.shape[0]
    low, high = np.zeros(num_targets), np.zeros(num_targets)
    for i in range(num_targets):
        part = slice(m.indptr[i], m.indptr[i + 1])
        most = m.data[part] * caps[m.indices[part]]
        if num_households is not None and len(most) > num_households:
            most = np.partition(most, (num_households - 1, len(most) - num_households))
            low[i] = np.minimum(most[:num_households], 0).sum()
            high[i] = np.maximum(most[-num_households:], 0).sum()
        else:
            low[i], high[i] = np.minimum(most, 0).sum(), np.maximum(most, 0).sum()
    return low, high


def _parts_above_whole(problem: CalibrationProblem, known: set[int]) -> Iterator[Finding]:
    """Find nested targets larger than the whole, although no household adds less to the whole."""
    if problem.parent is None:
        return
    parent = problem.parent
    nested = np.flatnonzero(parent >= 0)
    above = nested[problem.targets[nested] > problem.targets[parent[nested]] * (1 + _SAME_VALUE)]
    for i in above:
        part, whole = problem.matrix[[int(i)]], problem.matrix[[int(parent[i])]]
        if i not in known and (part.data >= 0).all() and (part - whole).max() <= 0:
            detail = f"{_shown(problem.targets[i])} is more than {problem.names[parent[i]]},"
            yield _finding(problem, "out of reach", i, f"{detail} {_shown(problem.targets[parent[i]])}")


def _small(problem: CalibrationProblem, num_households: int | None) -> Iterator[Finding]:
    """Find targets of zero, and targets that one household of average weight overshoots."""
    m = problem.matrix
    least, most = _row_range(m)
    kept = num_households or int((problem.starting_weights > 0).sum())
    average = problem.starting_weights.sum() / kept
    size = np.abs(problem.targets)
    largest = np.maximum(np.abs(least), np.abs(most))
    for i in np.flatnonzero((size == 0) & (largest > 0) & ((least >= 0) | (most <= 0))):
        yield _finding(problem, "zero", i, f"{m.indptr[i + 1] - m.indptr[i]} households touch it")
    for i in np.flatnonzero((size > 0) & (largest * average > size)):
        usual = float(np.median(np.abs(m.data[m.indptr[i] : m.indptr[i + 1]]))) * average
        if usual > size[i]:
            detail = f"target {_shown(problem.targets[i])}, one household adds {_shown(usual)}"
            yield _finding(problem, "tiny", i, detail)


def _margins(problem: CalibrationProblem) -> Iterator[Finding]:
    """Find sets of targets that split the same total and add up to different sums."""
    for margin, other in disagreements(problem):
        one, two = (float(problem.targets[list(m.targets)].sum()) for m in (margin, other))
        share = f", {one / two - 1:+.2%}" if two else ""
        whole = len(other.targets) == 1 and other.targets[0] == margin.parent
        if whole:
            said = f"its {len(margin.targets)} parts ({margin.label}) add up to {_shown(one)}{share}"
            yield _finding(problem, "disagreeing levels", other.targets[0], said)
            continue
        many = f"{len(other.targets)} targets add" if len(other.targets) > 1 else "is one target and adds"
        detail = (
            f"{margin.label}: {len(margin.targets)} targets add up to {_shown(one)};"
            f" {other.label}: {many} up to {_shown(two)}{share}"
        )
        yield _finding(problem, "disagreeing margins", margin.targets[0], detail)


def _shown(value: float) -> str:
    return f"{value:,.0f}" if 1e6 <= abs(value) < 1e15 else f"{value:,.6g}"
