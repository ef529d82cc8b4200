"""What a calibration reached, in numbers and in files that open in a spreadsheet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.sparse as sp

from sparsereg.calibration.findings import Finding
from sparsereg.calibration.measures import relative_errors
from sparsereg.calibration.problem import CalibrationProblem, exact_totals

if TYPE_CHECKING:
    import pandas as pd

_LOG_ROWS = 200_000


def target_frame(
    problem: CalibrationProblem, weights: np.ndarray, multipliers: np.ndarray | None = None
) -> pd.DataFrame:
    """Return one row per target: name, group, target, initial, estimate, relative_error and other errors.

    ``error`` is estimate - target; ``scaled_error`` is what of it lies beyond the tolerance, over ``scale``.

    Args:
        problem: The problem.
        weights: Final weights, shape (households,).
        multipliers: What each target costs, as a column more.
    """
    import pandas as pd

    estimates = problem.estimates(weights)
    frame = pd.DataFrame(
        {
            "name": problem.names,
            "group": "" if problem.target_groups is None else problem.target_groups,
            "target": problem.targets,
            "initial": problem.estimates(problem.starting_weights),
            "estimate": estimates,
            "relative_error": relative_errors(estimates, problem.targets),
            "error": estimates - problem.targets,
            "scale": problem.scale,
            "scaled_error": problem.scaled_errors(estimates),
            **_reach(problem, weights),
        }
    )
    return frame if multipliers is None else frame.assign(multiplier=multipliers)


def _reach(problem: CalibrationProblem, weights: np.ndarray) -> dict[str, np.ndarray]:
    """Return how many kept households each target counts, and how many of equal weight they are worth."""
    m = problem.matrix
    counted = sp.csr_array((np.ones(m.nnz, dtype=np.float32), m.indices, m.indptr), shape=m.shape)
    w = np.asarray(weights, dtype=np.float64)
    sums, squares = exact_totals(counted, w), exact_totals(counted, w**2)
    ess = np.divide(sums**2, squares, out=np.zeros(len(sums)), where=squares > 0)
    return {"households": exact_totals(counted, (w != 0).astype(np.float64)).astype(np.int64), "ess": ess}


def log_frame(problem: CalibrationProblem, moments: Sequence[tuple[int, float, np.ndarray]]) -> pd.DataFrame:
    """Return the totals at some epochs, one row per epoch and target, as dashboards of calibrations read it.

    Args:
        problem: The problem.
        moments: Epoch, loss and totals of shape (targets,) at some moments, in order. Of too many for
            200,000 rows, evenly spaced ones are taken, the first and the last always.
    """
    import pandas as pd

    most = max(2, _LOG_ROWS // problem.num_targets)
    if len(moments) > most:
        moments = [moments[i] for i in np.unique(np.linspace(0, len(moments) - 1, most).round().astype(int))]
    parts = []
    for epoch, loss, totals in moments:
        error = totals - problem.targets
        parts.append(
            pd.DataFrame(
                {
                    "epoch": epoch,
                    "loss": loss,
                    "target_name": problem.names,
                    "target": problem.targets,
                    "estimate": totals,
                    "error": error,
                    "abs_error": np.abs(error),
                    "rel_abs_error": np.abs(relative_errors(totals, problem.targets)),
                }
            )
        )
    return pd.concat(parts, ignore_index=True)


def finding_frame(findings: Sequence[Finding]) -> pd.DataFrame:
    """Return one row per finding of the checks: kind, name, detail."""
    import pandas as pd

    return pd.DataFrame([(f.kind, f.name, f.detail) for f in findings], columns=["kind", "name", "detail"])


def worst_targets(targets: pd.DataFrame, most: int = 5) -> list[dict[str, Any]]:
    """Return the targets with the largest errors beyond their tolerance over their scale, the worst first.

    Args:
        targets: As ``target_frame`` returns it.
        most: How many.
    """
    worst = targets.loc[targets.scaled_error.abs().sort_values(ascending=False, na_position="first").index]
    columns = ["name", "target", "estimate", "relative_error", "scaled_error"]
    rows = worst.head(most)[columns].astype(object)
    rows = rows.where(rows.notna(), None)  # a target of 0 has no relative error
    return [{str(k): v for k, v in row.items()} for row in rows.to_dict("records")]


def group_frame(
    targets: pd.DataFrame, problem: CalibrationProblem | None = None, weights: np.ndarray | None = None
) -> pd.DataFrame:
    """Return one row per group: targets, mean absolute relative error at first and now, the worst target.

    Args:
        targets: As ``target_frame`` returns it.
        problem: For ``households``, how many different kept ones the targets of the group count, and
            ``ess``, how many of equal weight they are worth.
        weights: Likewise, shape (households,).
    """
    import pandas as pd

    size = targets.target.abs().where(targets.target != 0)
    frame = pd.DataFrame(
        {
            "group": targets.group,
            "before": (targets.initial - targets.target).abs() / size,
            "after": targets.relative_error.abs(),
        }
    )
    by = frame.groupby("group", sort=True)
    table = pd.DataFrame(
        {
            "targets": by.size(),
            "initial_mean_are": by.before.mean(),
            "mean_are": by.after.mean(),
            "max_are": by.after.max(),
        }
    ).reset_index()
    if problem is None or weights is None:
        return table
    reached = [_distinct(problem, weights, np.asarray(by.indices[group])) for group in table.group]
    return table.assign(households=[n for n, _ in reached], ess=[ess for _, ess in reached])


def _distinct(problem: CalibrationProblem, weights: np.ndarray, rows: np.ndarray) -> tuple[int, float]:
    """Return how many different kept households some targets count, and their effective sample size."""
    w = np.asarray(weights, dtype=np.float64)[np.unique(problem.matrix[rows].indices)]
    squares = float(w @ w)
    return int((w != 0).sum()), float(w.sum() ** 2 / squares) if squares else 0.0
