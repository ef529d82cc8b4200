"""What a calibration reached, in numbers and in files that open in a spreadsheet."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sparsereg.calibration.checks import Finding
from sparsereg.calibration.problem import CalibrationProblem
from sparsereg.files import write_atomically

if TYPE_CHECKING:
    import pandas as pd

WEIGHT_FORMATS = ("csv", "parquet")
_LOG_ROWS = 200_000


def relative_errors(estimates: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Return (estimate - target) / |target|, NaN where the target is 0 and no relative error exists.

    Args:
        estimates: Weighted totals, float64, shape (targets,).
        targets: What they should be, shape (targets,).
    """
    size = np.abs(targets)
    return np.divide(estimates - targets, size, out=np.full(len(targets), np.nan), where=size > 0)


def measure(problem: CalibrationProblem, weights: np.ndarray) -> dict[str, Any]:
    """Measure weights in float64: errors over the targets that are not 0, counts, sizes.

    Args:
        problem: The problem.
        weights: Shape (households,), >= 0; households with a positive weight are kept.

    Returns:
        The keys of results.json that follow from the weights; absolute relative errors are called ``are``,
        ``within_10pct`` is a share in [0, 1], ``ess`` is Kish's effective sample size (sum w)^2 / sum w^2,
        ``design_effect`` is kept / ess, ``untouched_targets`` counts those that no kept household touches.
    """
    w = np.asarray(weights, dtype=np.float64)
    kept = w > 0
    estimates = problem.estimates(w)
    errors = np.abs(relative_errors(estimates, problem.targets))
    touched = problem.estimates(kept.astype(np.float64)) if (problem.matrix.data >= 0).all() else None
    initial = problem.starting_weights
    ratio = w[kept & (initial > 0)] / initial[kept & (initial > 0)]
    ess = float(w.sum() ** 2 / (w @ w)) if kept.any() else 0.0
    return {
        "households": problem.num_households,
        "kept": int(kept.sum()),
        "targets": problem.num_targets,
        **error_summary(errors),
        "zero_targets": int((problem.targets == 0).sum()),
        "untouched_targets": int((touched == 0).sum()) if touched is not None else _untouched(problem, kept),
        "ess": ess,
        "design_effect": int(kept.sum()) / ess if ess else None,
        "total_weight": float(w.sum()),
        "initial_total_weight": float(initial.sum()),
        "max_weight": float(w.max()),
        "median_weight": float(np.median(w[kept])) if kept.any() else 0.0,
        "max_ratio": float(ratio.max()) if len(ratio) else None,
    }


def error_summary(errors: np.ndarray) -> dict[str, float | None]:
    """Summarise absolute relative errors, leaving out NaN (targets of 0); None where nothing is left.

    Args:
        errors: Shape (targets,).
    """
    known = errors[~np.isnan(errors)]
    if len(known) == 0:
        names = ("mean_are", "median_are", "p90_are", "p99_are", "max_are", "within_1pct", "within_10pct")
        return dict.fromkeys(names)
    p90, p99 = np.quantile(known, [0.9, 0.99])
    return {
        "mean_are": float(known.mean()),
        "median_are": float(np.median(known)),
        "p90_are": float(p90),
        "p99_are": float(p99),
        "max_are": float(known.max()),
        "within_1pct": float((known <= 0.01).mean()),
        "within_10pct": float((known <= 0.10).mean()),
    }


def _untouched(problem: CalibrationProblem, kept: np.ndarray) -> int:
    return int((np.diff(problem.matrix[:, np.flatnonzero(kept)].tocsr().indptr) == 0).sum())


def target_frame(problem: CalibrationProblem, weights: np.ndarray) -> pd.DataFrame:
    """Return one row per target: name, group, target, initial, estimate, relative_error.

    Args:
        problem: The problem.
        weights: Final weights, shape (households,).
    """
    import pandas as pd

    estimates = problem.estimates(weights)
    return pd.DataFrame(
        {
            "name": problem.names,
            "group": "" if problem.target_groups is None else problem.target_groups,
            "target": problem.targets,
            "initial": problem.estimates(problem.starting_weights),
            "estimate": estimates,
            "relative_error": relative_errors(estimates, problem.targets),
        }
    )


def weight_frame(problem: CalibrationProblem, weights: np.ndarray) -> pd.DataFrame:
    """Return one row per kept household: id, initial_weight, weight.

    Args:
        problem: The problem.
        weights: Final weights, shape (households,).
    """
    import pandas as pd

    kept = np.flatnonzero(np.asarray(weights) > 0)
    return pd.DataFrame(
        {
            "id": problem.household_ids[kept],
            "initial_weight": problem.starting_weights[kept],
            "weight": np.asarray(weights, dtype=np.float64)[kept],
        }
    )


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


def write_table(path: Path, table: pd.DataFrame) -> None:
    """Write a table whole or not at all, as CSV or Parquet by the name of the file.

    Args:
        path: Ends in .csv or .parquet.
        table: What to write; missing values become empty cells.
    """
    if path.suffix == ".parquet":
        write_atomically(path, lambda p: table.to_parquet(p, index=False))
    else:
        write_atomically(path, lambda p: table.to_csv(p, index=False))


def worst_targets(targets: pd.DataFrame, most: int = 5) -> list[dict[str, Any]]:
    """Return the targets with the largest absolute relative errors, the worst first.

    Args:
        targets: As ``target_frame`` returns it.
        most: How many.
    """
    worst = targets.loc[targets.relative_error.abs().sort_values(ascending=False, na_position="last").index]
    columns = ["name", "target", "estimate", "relative_error"]
    return [{str(k): v for k, v in row.items()} for row in worst.head(most)[columns].to_dict("records")]


def group_frame(targets: pd.DataFrame) -> pd.DataFrame:
    """Return one row per group: targets, mean absolute relative error at first and now, the worst target.

    Args:
        targets: As ``target_frame`` returns it.
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
    return pd.DataFrame(
        {
            "targets": by.size(),
            "initial_mean_are": by.before.mean(),
            "mean_are": by.after.mean(),
            "max_are": by.after.max(),
        }
    ).reset_index()
