"""What becomes of households whose value in a measured column is missing."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from sparsereg.calibration.config import MISSING_VALUES
from sparsereg.calibration.reading.cells import row
from sparsereg.errors import InputError, did_you_mean

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Missing:
    """How missing values in measures are treated; in conditions they stay unknown.

    Args:
        policy: "error": they are refused; "zero": they add nothing; "drop": such households leave the survey.
        by_column: The policy of single columns, where it is another one.
    """

    policy: str = "error"
    by_column: Mapping[str, str] = field(default_factory=dict)

    def columns(self, policy: str, measures: Collection[str]) -> list[str]:
        """Return which of these columns are treated so."""
        return [m for m in dict.fromkeys(measures) if self.by_column.get(m, self.policy) == policy]

    def check(self, measures: Collection[str]) -> None:
        """Raise an InputError for an unknown policy, or a column that no target measures."""
        for column, policy in self.by_column.items():
            if policy not in MISSING_VALUES:
                hint = did_you_mean(str(policy), list(MISSING_VALUES))
                raise InputError(f"missing_in.{column}={policy}: expected {', '.join(MISSING_VALUES)}{hint}")
            if column not in measures:
                hint = did_you_mean(column, list(dict.fromkeys(measures)))
                raise InputError(f"missing_in.{column}: no target measures the column {column!r}{hint}")

    def staying(
        self, households: pd.DataFrame, measures: Collection[str], file: str, unit: str = "household"
    ) -> np.ndarray:
        """Return a mask of the households, or other units, that stay in the survey."""
        known = [m for m in self.columns("drop", measures) if m in households.columns]
        absent = households[known].isna()
        gone: np.ndarray = absent.any(axis=1).to_numpy(dtype=bool)
        if not gone.any():
            return ~gone
        named = ", ".join(f"{m} ({int(n)})" for m, n in absent.sum().items() if n)
        if gone.all():
            raise InputError(f"{file}: every {unit} has a missing value: {named}")
        log.warning(
            "%s: %s of %s %ss are left out for missing values in %s; the first is in row %d",
            *(file, f"{int(gone.sum()):,}", f"{len(gone):,}", unit, named, row(int(gone.argmax()))),
        )
        return ~gone


REFUSED = Missing()
"""Missing values in measures are errors."""
