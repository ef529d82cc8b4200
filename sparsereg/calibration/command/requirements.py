"""What a run has to reach (``require.KEY=VALUE``), and where it falls short."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sparsereg.calibration.config import Require
from sparsereg.settings import declared, value_at


@dataclass(frozen=True)
class Requirement:
    """A limit on a figure of results.json.

    Args:
        figure: its dotted key.
        least: whether the figure must be at least the limit; else at most.
    """

    figure: str
    least: bool = False

    def holds(self, reached: float, limit: float) -> bool:
        """Whether a figure is within the limit."""
        return reached >= limit if self.least else reached <= limit


REQUIREMENTS = {
    "max_error": Requirement("max_abs_scaled_error"),
    "mean_error": Requirement("mean_are"),
    "median_error": Requirement("median_are"),
    "within_1pct": Requirement("within_1pct", least=True),
    "within_10pct": Requirement("within_10pct", least=True),
    "held_out_error": Requirement("holdout.mean_are"),
    "max_cv": Requirement("max_cv"),
    "ess": Requirement("ess", least=True),
    "weighting_effect": Requirement("weighting_effect"),
    "design_effect": Requirement("weighting_effect"),
    "max_ratio": Requirement("max_ratio"),
    "max_weight": Requirement("max_weight"),
    "bounds_hit": Requirement("bounds_hit"),
    "gave_way": Requirement("gave_way"),
    "untouched_targets": Requirement("untouched_targets"),
}
"""By key of ``require``."""


def given(require: Require) -> dict[str, float]:
    """Return the limits that were set, by key."""
    limits = {name: getattr(require, name) for name in declared(Require)}
    return {name: limit for name, limit in limits.items() if limit is not None}


def judged(require: Require, results: dict[str, Any]) -> list[dict[str, Any]]:
    """Hold the results against every limit that was set.

    Args:
        require: the limits.
        results: of the run, as results.json has them.

    Returns:
        For each: key, figure, limit, reached (None: there is no such figure), met and a text of one line. A
        figure that there is not was not reached.
    """
    rows = []
    for key, limit in given(require).items():
        wanted = REQUIREMENTS[key]
        reached = value_at(results, wanted.figure)
        met = reached is not None and wanted.holds(reached, limit)
        side = "at least" if wanted.least else "at most"
        text = f"{wanted.figure} is {_shown(reached)}; require.{key}={limit:.10g} asks for {side} that"
        row = {"key": key, "figure": wanted.figure, "limit": limit, "reached": reached, "met": met}
        rows.append({**row, "text": text})
    return rows


def _shown(reached: float | None) -> str:
    return "not known" if reached is None else f"{reached:.6g}"
