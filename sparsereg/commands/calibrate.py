"""Choose few survey households and weights that meet population targets: `python calibrate.py --help`."""

import re
import sys
from pathlib import Path

from omegaconf import DictConfig

from sparsereg.cli import script, settings_of


def run(composed: DictConfig) -> Path:
    """Read, check, calibrate, hold out, write results.json; return its path."""
    from sparsereg.calibration.config import CalibrationRun

    settings = settings_of(CalibrationRun, composed)
    from sparsereg.calibration.command import run  # slow to load: NumPy, pandas, PyTorch

    return run.run(settings)


def spelt_out(argument: str) -> str:
    """Write ``temperature=NUMBER`` in full: temperature is a group, and Hydra takes no number for a group."""
    return re.sub(r"^(\+*temperature)=(?=[-+.\d])", r"\1.initial=", argument)


def main(arguments: list[str] | None = None) -> None:
    """Run the command with these arguments, or those of the process, and leave the process."""
    given = sys.argv[1:] if arguments is None else arguments
    script("calibrate", run, arguments=[spelt_out(argument) for argument in given])
