"""Calibration of survey weights: few households, many targets, the best weights there are.

Names are imported on first use, so that ``import sparsereg.calibration`` costs nothing.
"""

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparsereg.calibration.calibrate import Calibration, CalibrationResult, Settings, calibrate, polish
    from sparsereg.calibration.checks import Finding, check
    from sparsereg.calibration.estimator import SparseCalibrationWeights
    from sparsereg.calibration.households import build, target_table
    from sparsereg.calibration.problem import CalibrationProblem
    from sparsereg.calibration.synthetic import synthetic_problem

_HOMES = {
    "Calibration": "calibrate",
    "CalibrationProblem": "problem",
    "CalibrationResult": "calibrate",
    "Finding": "checks",
    "Settings": "calibrate",
    "SparseCalibrationWeights": "estimator",
    "build": "households",
    "calibrate": "calibrate",
    "check": "checks",
    "polish": "calibrate",
    "synthetic_problem": "synthetic",
    "target_table": "households",
}

__all__ = [
    "Calibration",
    "CalibrationProblem",
    "CalibrationResult",
    "Finding",
    "Settings",
    "SparseCalibrationWeights",
    "build",
    "calibrate",
    "check",
    "polish",
    "synthetic_problem",
    "target_table",
]


class _Package(types.ModuleType):
    """The package: a function that shares its name with its module, as ``calibrate``, is not hidden by it."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _HOMES and isinstance(value, types.ModuleType):
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
