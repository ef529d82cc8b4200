"""Choose few survey households and weights that meet population targets: `python calibrate.py --help`."""

import re
import sys
from pathlib import Path

from omegaconf import DictConfig

from sparsereg.cli import script


def run(cfg: DictConfig) -> Path:
    """Read, check, calibrate, hold out, write results.json; return its path."""
    from sparsereg.calibration.command import run  # NumPy and pandas need not be loaded to print a help text

    return run.run(cfg)


def spelt_out(argument: str) -> str:
    """Write ``temperature=NUMBER`` in full: temperature is a group, and Hydra takes no number for a group."""
    return re.sub(r"^(\+*temperature)=(?=[-+.\d])", r"\1.initial=", argument)


def main() -> None:
    """Run the command with the arguments of this process, and leave it."""
    sys.argv[1:] = [spelt_out(argument) for argument in sys.argv[1:]]
    script("calibrate", run)
