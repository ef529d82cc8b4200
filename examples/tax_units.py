"""A file of 280,005 tax units from end to end, by the command: the whole file, then 15,000 of it.

    python examples/tax_units.py --data FOLDER              all steps, one after the other
    python examples/tax_units.py --data FOLDER --step small

FOLDER holds cps_households.csv.gz, one row per tax unit of the CPS file of the package taxcalc (CC0) with
w, fips, agi, XTOT (persons), nu06 (children below 6), snap_ben, e00200 (wages), RECID; and
cps_targets.csv.gz, totals that the IRS, the Census Bureau and the USDA publish (name, value, measure,
where, group).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pandas as pd

VARIABLES = "report.variables=[e00200,agi,snap_ben,nu06]"
STEPS = {
    "whole": [
        "method=calibrate", "variance=bootstrap", "strata=fips", "num_replicates=50", "holdout.groups=null",
    ],
    "small": ["num_households=15000", "holdout.groups=[snap,children]"],
    "small_own": ["num_households=15000", "holdout.groups=[snap,children]", "pseudo_targets=own_columns"],
}  # fmt: skip
FIGURES = (
    "households", "kept", "targets", "mean_are", "median_are", "max_are", "within_1pct", "within_10pct",
    "max_abs_scaled_error", "gave_way", "ess", "max_ratio", "held_out_mean", "held_out_median", "seconds",
)  # fmt: skip


def calibrate(data: Path, step: str) -> Path:
    """Run the command and return the folder that it wrote."""
    households, targets = (data / f"cps_{name}.csv.gz" for name in ("households", "targets"))
    command = [
        sys.executable, "-m", "sparsereg", "calibrate", "problem=households",
        f"problem.households={households}", f"problem.targets={targets}", "problem.weight=w",
        "problem.id=RECID", "untouchable=drop", VARIABLES, *STEPS[step],
    ]  # fmt: skip
    print("\n$ sparsereg " + " ".join(command[3:]), flush=True)
    done = subprocess.run(command, text=True, stdout=subprocess.PIPE, check=True)
    print(done.stdout, flush=True)
    return Path(done.stdout.strip().rsplit("results: ", 1)[1]).parent


def tell(folder: Path) -> None:
    """Print what the page shows of a run."""
    results = json.loads((folder / "results.json").read_text())
    for key in FIGURES:
        if results.get(key) is not None:
            print(f"{key:22} {results[key]:.6g}")
    groups = pd.read_csv(folder / "groups.csv")
    print(groups.to_string(index=False))
    for name in ("holdout.csv", "standard_errors.csv", "variables.csv", "findings.csv"):
        if (folder / name).is_file():
            print(f"\n{name}\n{pd.read_csv(folder / name).head(12).to_string(index=False)}")


def main() -> None:
    """Run the steps."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--step", choices=list(STEPS), action="append")
    args = parser.parse_args()
    for step in args.step or STEPS:
        tell(calibrate(args.data.resolve(), step))


if __name__ == "__main__":
    main()
