"""Calibration of survey weights: few households, many targets."""

from sparsereg.calibration.problem import CalibrationProblem

__all__ = ["CalibrationProblem"]
