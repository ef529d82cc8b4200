"""How well a small file does on totals that it was not fitted to, with own columns and without.

    python -m benchmarks.held_out --data FOLDER                  samples of 40,000; a quarter and a tenth kept
    python -m benchmarks.held_out --data FOLDER --units 14793 --seeds 2,3 --noise 0.1

FOLDER holds cps_households.csv.gz (w, fips, agi, XTOT, nu06, snap_ben, e00200: 280,005 US tax units) and
cps_targets.csv.gz, published totals by state. The whole file, calibrated to 1,071 of them (tax units and
income by state and class of income, population by state), is the population, so that the truth of everything
is known. A sample is drawn from it with chances that depend on income, children and state and is weighted as
if they did not; it is fitted to those totals, off by ``--noise`` each as sources are, and judged by 714
others: fourteen families by state.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from sparsereg.calibration import CalibrationProblem, calibrate, problem_from_frames
from sparsereg.calibration.config import Settings
from sparsereg.calibration.holdout import LARGE_CELL
from sparsereg.calibration.measures import relative_errors
from sparsereg.calibration.pseudo_targets import extended, full_calibration, own_columns, selecting

FITTED = ("agi count", "agi amount", "population")
FAMILIES = (
    ("nu06", ""), ("", "nu06 > 0"), ("snap_ben", ""), ("", "snap_ben > 0"), ("e00200", ""),
    ("", "e00200 > 0"), ("", "XTOT == 1"), ("", "XTOT >= 4"), ("XTOT", "nu06 > 0"), ("XTOT", "agi < 25000"),
    ("nu06", "agi < 50000"), ("snap_ben", "nu06 > 0"), ("e00200", "XTOT >= 3"),
    ("", "snap_ben > 0 and agi >= 10000"),
)  # fmt: skip
"""Measure and condition of the totals that are held out, each by state."""


@dataclass(frozen=True, eq=False)
class Population:
    """The whole file.

    Args:
        table: One row per tax unit.
        weights: That meet the published totals, shape (units,).
        targets: The totals that are fitted, as a table of targets.
        held_out: Those that are held out, with their true values.
    """

    table: pd.DataFrame
    weights: np.ndarray
    targets: pd.DataFrame
    held_out: pd.DataFrame

    @classmethod
    def read(cls, folder: Path) -> Population:
        """Read the file and calibrate it."""
        table = pd.read_csv(folder / "cps_households.csv.gz")
        targets = pd.read_csv(folder / "cps_targets.csv.gz")
        targets = targets[targets.group.isin(FITTED)].reset_index(drop=True)
        problem = problem_from_frames(table, targets, weight="w", id="RECID")
        w = np.round(calibrate(problem, method="all", chi2=1e-4).weights, 6)
        held_out = held_out_targets(np.unique(table.fips))
        truth = problem_from_frames(table, held_out, weight="w", id="RECID").estimates(w)
        return cls(table, w, targets.assign(value=problem.estimates(w)), held_out.assign(value=truth))

    def sample(self, units: int, seed: int) -> pd.DataFrame:
        """Draw a sample with chances that its equal weights do not know."""
        generator = np.random.default_rng(seed)
        t = self.table
        state = generator.normal(0, 0.25, t.fips.max() + 1)[t.fips]
        income = 0.35 * np.log1p(np.clip(t.agi, 0, 1e6) / 30_000)
        chance = self.weights * np.exp(income + 0.3 * (t.nu06 > 0) - 0.3 * (t.snap_ben > 0) + state)
        at = np.sort(generator.choice(len(t), units, replace=False, p=chance / chance.sum()))
        return t.iloc[at].reset_index(drop=True).assign(w=self.weights.sum() / units)

    def published(self, noise: float, seed: int) -> pd.DataFrame:
        """The totals that are fitted, each off by about so much, and a third of that by family."""
        generator = np.random.default_rng(100 + seed)
        own = generator.normal(size=len(self.targets))
        common = self.targets.group.map(dict(zip(FITTED, generator.normal(size=3), strict=True)))
        return self.targets.assign(value=self.targets.value * np.exp(noise * (own + common / 3)))


def held_out_targets(states: np.ndarray) -> pd.DataFrame:
    """The families, by state, without values."""
    rows = [
        {
            "name": f"{measure or 'units'} {where} {state}", "value": 1.0, "measure": measure,
            "where": f"fips == {state}" + (f" and {where}" if where else ""), "group": f"{measure} {where}",
        }
        for measure, where in FAMILIES
        for state in states
    ]  # fmt: skip
    return pd.DataFrame(rows)


def problem_of(sample: pd.DataFrame, targets: pd.DataFrame) -> CalibrationProblem:
    """Those of the targets that a unit of the sample touches."""
    problem = problem_from_frames(sample, targets, weight="w", id="RECID")
    return problem.subset(np.diff(problem.matrix.indptr) > 0)


def by_default(sample: pd.DataFrame, problem: CalibrationProblem, count: int) -> np.ndarray:
    """The selection as it is without own columns."""
    return calibrate(problem, num_households=count).weights


def by_own_columns(sample: pd.DataFrame, problem: CalibrationProblem, count: int) -> np.ndarray:
    """What ``pseudo_targets=own_columns`` does."""
    own = own_columns(sample, ["w", "RECID"])
    full, _ = full_calibration(problem, everybody, Settings().seed)
    settings = selecting({"chi2": None, "max_weight_ratio": None}, count / len(sample))
    return calibrate(extended(problem, own, full), num_households=count, **settings).weights


def everybody(problem: CalibrationProblem, pull: float) -> np.ndarray:
    """A full calibration."""
    return calibrate(problem, method="all", chi2=pull).weights


METHODS: dict[str, Callable[[pd.DataFrame, CalibrationProblem, int], np.ndarray]] = {
    "initial weights": lambda sample, problem, count: problem.starting_weights,
    "whole file": lambda sample, problem, count: full_calibration(problem, everybody, 0)[0],
    "default": by_default,
    "own columns": by_own_columns,
}


def judge(fitted: CalibrationProblem, held_out: CalibrationProblem, weights: np.ndarray) -> dict[str, float]:
    """Errors of the totals that were fitted and of those that were not, in per cent."""
    inside, outside = (np.abs(relative_errors(p.estimates(weights), p.targets)) for p in (fitted, held_out))
    large = np.diff(held_out.matrix.indptr) >= LARGE_CELL
    told = {"fitted mean": np.nanmean(inside), "fitted median": np.nanmedian(inside)}
    told |= {"held-out mean": outside.mean(), "median": np.median(outside), "large": outside[large].mean()}
    return {k: 100 * float(v) for k, v in told.items()} | {"ess": weights.sum() ** 2 / (weights @ weights)}


def main() -> None:
    """Draw samples, keep a part of each, print errors."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--units", type=int, default=40_000, help="of a sample")
    parser.add_argument("--shares", default="0.25,0.1", help="of them that are kept")
    parser.add_argument("--seeds", default="1,2,3,4", help="of the samples")
    parser.add_argument("--noise", type=float, default=0.0, help="of the fitted totals: 0.1 is ten per cent")
    args = parser.parse_args()
    population, rows = Population.read(args.data), []
    for seed in map(int, args.seeds.split(",")):
        sample = population.sample(args.units, seed)
        fitted = problem_of(sample, population.published(args.noise, seed))
        held_out = problem_of(sample, population.held_out)
        for share in map(float, args.shares.split(",")):
            for method, solve in METHODS.items():
                start = time.process_time()
                found = judge(fitted, held_out, solve(sample, fitted, round(share * args.units)))
                spent = time.process_time() - start
                rows.append({"kept": share, "method": method, "seed": seed, **found, "CPU s": spent})
                print(" ".join(f"{v:.2f}" if isinstance(v, float) else str(v) for v in rows[-1].values()))
    table = pd.DataFrame(rows).groupby(["kept", "method"], sort=False).mean()
    print(table.drop(columns="seed").to_string(float_format=lambda v: f"{v:.2f}"), flush=True)


if __name__ == "__main__":
    main()
