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


def main() -> None:
    """Run the command with the arguments of this process, and leave it."""
    sys.argv[1:] = [spelt_out(argument) for argument in sys.argv[1:]]
    script("calibrate", run)
