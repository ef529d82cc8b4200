"""A file of 280,005 tax units from end to end, by the command: the whole file, then 15,000 of it.

    pip install taxcalc paramtools behresp bokeh
    python examples/tax_units.py                            all steps, one after the other
    python examples/tax_units.py --step build --step small  these only
    python examples/tax_units.py --data FOLDER              tables there; ./tax_units by default

``build`` writes the table of households from the package taxcalc itself (CC0): its CPS file, with its own
weights of 2022, amounts grown to 2022 by its factors, and the adjusted gross income that it works out. Of
each tax unit: w (weight), fips (state), agi, XTOT (persons), nu06 (children below 6), snap_ben (SNAP
benefits), e00200 (wages), RECID. Beside it go the targets, tax_units_targets.csv.gz of this folder: totals
for 2022 that the IRS, the Census Bureau and the USDA publish (name, value, measure, where, group).
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd

TARGETS = Path(__file__).with_name("tax_units_targets.csv.gz")
YEAR = 2022
COLUMNS = {
    "RECID": "RECID", "s006": "w", "fips": "fips", "c00100": "agi", "XTOT": "XTOT", "nu06": "nu06",
    "snap_ben": "snap_ben", "e00200": "e00200",
}  # fmt: skip
"""Of taxcalc, and as they are called here."""
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


def build(data: Path) -> None:
    """Write both tables: tax units as taxcalc has them in the year, and the targets."""
    try:
        import taxcalc
    except ImportError as error:
        sys.exit(f"{error}: pip install taxcalc paramtools behresp bokeh, in an environment that has pip")
    records = taxcalc.Records.cps_constructor()  # with its weights and factors of growth
    calculator = taxcalc.Calculator(policy=taxcalc.Policy(), records=records, verbose=False)
    calculator.advance_to_year(YEAR)
    calculator.calc_all()
    units = calculator.dataframe(list(COLUMNS)).rename(columns=COLUMNS)
    for name in ("RECID", "fips", "XTOT", "nu06"):
        units[name] = units[name].astype(int)
    data.mkdir(parents=True, exist_ok=True)
    units.round(2).to_csv(data / "tax_units.csv.gz", index=False)
    shutil.copy(TARGETS, data)
    print(f"{len(units):,} tax units of {YEAR}, weights of {units.w.sum():,.0f}, in {data}")


def calibrate(data: Path, step: str) -> Path:
    """Run the command and return the folder that it wrote."""
    households, targets = data / "tax_units.csv.gz", data / TARGETS.name
    if not households.is_file():
        sys.exit(f"no {households}: --step build makes it")
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
    parser.add_argument("--data", type=Path, default=Path("tax_units"))
    parser.add_argument("--step", choices=["build", *STEPS], action="append")
    args = parser.parse_args()
    for step in args.step or ["build", *STEPS]:
        if step == "build":
            build(args.data)
        else:
            tell(calibrate(args.data.resolve(), step))


if __name__ == "__main__":
    main()
