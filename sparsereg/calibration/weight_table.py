"""The table of weights, as weights.csv holds it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import pandas as pd

    from sparsereg.calibration.problem import CalibrationProblem


def weight_frame(
    problem: CalibrationProblem, weights: np.ndarray, selected: np.ndarray | None = None
) -> pd.DataFrame:
    """Return one row per kept household: id, initial_weight, weight.

    Args:
        problem: The problem.
        weights: Final weights, shape (households,).
        selected: Which households are kept, bool (households,); None: those whose weight is not zero.
    """
    import pandas as pd

    kept = np.flatnonzero(np.asarray(weights) if selected is None else selected)
    return pd.DataFrame(
        {
            "id": problem.household_ids[kept],
            "initial_weight": problem.starting_weights[kept],
            "weight": np.asarray(weights)[kept],
        }
    )
