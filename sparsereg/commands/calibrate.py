"""Choose few survey households and weights that meet population targets: `python calibrate.py --help`."""

import re
import sys
from pathlib import Path

from omegaconf import DictConfig

from sparsereg.cli import script, settings_of

OUTPUTS = Path("outputs") / "calibrate"


def run(composed: DictConfig) -> Path:
    """Read, check, calibrate, hold out, write results.json; return its path."""
    from sparsereg.calibration.config import CalibrationRun

    settings = settings_of(CalibrationRun, composed)
    if settings.compare is not None:
        from sparsereg.calibration.command.compare import compare

        return compare(*map(Path, settings.compare))
    # slow to load: NumPy, pandas, PyTorch
    from sparsereg.calibration.command import areas, processes, run, shared, years

    if processes.in_processes():
        with processes.group():
            job = areas.run if settings.area.is_given else shared.run
            return job(settings, OUTPUTS)
    if settings.area.is_given:
        return areas.run(settings, OUTPUTS)
    if len(settings.targets.years) > 1:
        return years.run(settings, OUTPUTS)
    return run.run(settings, OUTPUTS)


def spelt_out(argument: str) -> str:
    """Write ``temperature=NUMBER`` and ``compare=A,B`` as Hydra has them: a key of a group, and a list."""
    key, _, value = argument.partition("=")
    if key == "compare" and not value.startswith("[") and value != "null":
        runs = (run.replace("\\", "\\\\").replace("'", "\\'") for run in value.split(","))
        return "compare=[" + ",".join(f"'{run}'" for run in runs) + "]"
    return re.sub(r"^(\+*temperature)=(?=[-+.\d])", r"\1.initial=", argument)


def choices(arguments: list[str]) -> list[str]:
    """A method that keeps everybody takes no number, also where the problem brings one."""
    everybody = {"method=all", "method=calibrate"}.intersection(arguments)
    return ["num_households=null"] if everybody else []


def main(arguments: list[str] | None = None) -> None:
    """Run the command with these arguments, or those of the process, and leave the process."""
    given = sys.argv[1:] if arguments is None else arguments
    script("calibrate", run, choices, arguments=[spelt_out(argument) for argument in given])
