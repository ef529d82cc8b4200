"""From two tables in memory, households and targets, to a problem."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparsereg.calibration.problem import CalibrationProblem

if TYPE_CHECKING:
    import pandas as pd


def problem_from_frames(
    households: pd.DataFrame, targets: pd.DataFrame, weight: str | None = None, id: str | None = None
) -> CalibrationProblem:
    """Build the problem of two DataFrames, as ``calibrate.py problem=households`` does of two files.

    Args:
        households: One row per household.
        targets: Columns ``name`` and ``value``; optionally ``measure`` (a column of the households to sum;
            empty: count them), ``where`` (a condition such as ``state == 'CA' and age >= 65``), ``group``,
            ``weight``, ``tolerance`` and the others of a file of targets.
        weight: Column of the initial weights; None: all ones.
        id: Column that names the households; None: their position, from 0.

    Raises:
        InputError: A column is unknown, a condition is none, a value is missing; the message names the place.

    Example:
        >>> import pandas as pd
        >>> households = pd.DataFrame({"state": ["CA", "TX", "CA"], "weight": [2.0, 1.0, 1.0]})
        >>> targets = pd.DataFrame({"name": ["all", "CA"], "value": [5.0, 3.0]})
        >>> targets["where"] = ["", "state == 'CA'"]
        >>> problem_from_frames(households, targets, weight="weight").matrix.toarray().tolist()
        [[1.0, 1.0, 1.0], [1.0, 0.0, 1.0]]
    """
    from sparsereg.calibration.reading.households import build, target_table

    return build(households, target_table(targets), weight, id).problem
