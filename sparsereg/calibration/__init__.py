"""Calibration of survey weights: few households, many targets, the best weights there are.

Names are imported on first use, so that ``import sparsereg.calibration`` costs nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparsereg.calibration.config import Settings
    from sparsereg.calibration.findings import Finding, check
    from sparsereg.calibration.problem import CalibrationProblem
    from sparsereg.calibration.reading.frames import problem_from_frames
    from sparsereg.calibration.reading.households import build, target_table
    from sparsereg.calibration.reading.synthetic import synthetic_problem
    from sparsereg.calibration.solver.calibration import (
        Calibration,
        CalibrationResult,
        calibrate,
        polish,
    )
    from sparsereg.calibration.solver.estimator import SparseCalibrationWeights
    from sparsereg.calibration.variance import Design

_HOMES = {
    "Calibration": "solver.calibration",
    "CalibrationProblem": "problem",
    "CalibrationResult": "solver.calibration",
    "Design": "variance",
    "Finding": "findings",
    "Settings": "config",
    "SparseCalibrationWeights": "solver.estimator",
    "build": "reading.households",
    "calibrate": "solver.calibration",
    "check": "findings",
    "polish": "solver.calibration",
    "problem_from_frames": "reading.frames",
    "synthetic_problem": "reading.synthetic",
    "target_table": "reading.households",
}

__all__ = [
    "Calibration",
    "CalibrationProblem",
    "CalibrationResult",
    "Design",
    "Finding",
    "Settings",
    "SparseCalibrationWeights",
    "build",
    "calibrate",
    "check",
    "polish",
    "problem_from_frames",
    "synthetic_problem",
    "target_table",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
