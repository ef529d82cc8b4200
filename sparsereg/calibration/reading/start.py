"""``start=weights.csv``, or the folder of a run: weights of an earlier calibration to start from."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sparsereg.calibration.config import WEIGHT_FORMATS
from sparsereg.calibration.reading.cells import numbers, shown
from sparsereg.calibration.reading.levels import positions
from sparsereg.calibration.reading.tables import read_table, unique_ids
from sparsereg.calibration.reading.unknown_column import require_column
from sparsereg.errors import InputError

if TYPE_CHECKING:
    from sparsereg.calibration.problem import CalibrationProblem

log = logging.getLogger(__name__)


def start_file(path: str | Path) -> Path:
    """Return the table of weights that ``start`` names: the file, or that of a run's folder.

    Raises:
        InputError: the folder holds none.
    """
    place = Path(path)
    if not place.is_dir():
        return place
    files = [place / f"weights.{suffix}" for suffix in WEIGHT_FORMATS]
    found = next((file for file in files if file.is_file()), None)
    if found is None:
        raise InputError(f"start={place} has no {files[0].name}: give the folder of a run that has finished")
    return found


def read_start(path: str | Path, problem: CalibrationProblem) -> np.ndarray:
    """Return the weights of an earlier calibration, shape (households,), 0 where there is none.

    Args:
        path: A table with id and weight, or the folder of a run.
        problem: Whose households they are, by id.

    Raises:
        InputError: there is no such table, or none of its ids is one of the households.
    """
    import pandas as pd

    file = start_file(path)
    table = read_table(file, id="id")
    for column, what in (("id", "which household"), ("weight", "its weight")):
        require_column(table, column, file, f"start needs it: {what}")
    unique_ids(table, "id", str(file))
    weights = numbers(table, "weight", file)
    at = positions(table["id"], pd.Series(problem.household_ids))
    lost = np.flatnonzero(at < 0)
    if len(lost) == len(table):
        known = shown(problem.household_ids[:1].tolist()[0])
        raise InputError(
            f"{file}: none of its {len(table):,} ids is that of a household, {shown(table['id'].iloc[0])} for"
            f" one; the households have ids such as {known} (problem.id=COLUMN)"
        )
    if len(lost):
        log.warning(
            "%s: %s of %s households are not there any more: %s for one",
            *(file, f"{len(lost):,}", f"{len(table):,}", shown(table["id"].iloc[int(lost[0])])),
        )
    start = np.zeros(problem.num_households)
    start[at[at >= 0]] = weights[at >= 0]
    return start
