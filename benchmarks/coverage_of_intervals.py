"""How often confidence intervals cover the truth: samples of a population whose truth is known.

    python -m benchmarks.coverage_of_intervals                          1,000 samples of each design
    python -m benchmarks.coverage_of_intervals --samples 200 --variance jackknife
    python -m benchmarks.coverage_of_intervals --samples 50 --first 50 --rows R.csv     go on, from R.csv on
    python -m benchmarks.coverage_of_intervals --population made-up     without the package svy

The population is the census of 57,867 households that the package ``svy`` 0.35 ships (World Bank, synthetic
data 2023; ``pip install svy``, or ``--census FILE`` for its hld_pop_wb_2023.parquet); where that is missing,
the built-in synthetic survey taken as a population. Designs:

- stratified: households at random, without replacement, in each region x urban or rural
- clusters: enumeration areas drawn in proportion to their size, with replacement, in each region; then
  households at random within each

Each sample is calibrated to the numbers of households by region, by urban or rural and by size, and to the
number of persons; 95 % intervals before and after that are compared with the census.
"""

from __future__ import annotations

import argparse
import importlib.util
import time
from pathlib import Path

import numpy as np
import pandas as pd

from sparsereg.calibration import CalibrationProblem, Design, calibrate
from sparsereg.calibration.reading.synthetic import synthetic_tables

CENSUS = "datasets/_bundled/hld_pop_wb_2023.parquet"
SIZES = (0, 1, 2, 3, 4, 6, 8, 100)
"""Classes of household size end here."""
STATISTICS = (
    ("total", "expenditure", None),
    ("mean", "expenditure", None),
    ("ratio", "food", "expenditure"),
    ("mean", "rooms", None),
    ("mean", "electricity", None),
)


def census(file: Path) -> pd.DataFrame:
    """The census in the columns that are used here."""
    t = pd.read_parquet(file)
    return pd.DataFrame(
        {
            "region": t.geo1.astype(str),
            "urban": t.urbrur.astype(str),
            "area": t.ea.astype(str),
            "size": t.hhsize.astype(float),
            "expenditure": t.tot_exp.astype(float),
            "food": t.tot_food.astype(float),
            "rooms": t.rooms.astype(float),
            "electricity": (t.electricity == "Yes").astype(float),
        }
    )


def made_up(num_households: int = 50_000) -> pd.DataFrame:
    """A population of the same columns, its areas of 300 households that have something in common."""
    t = synthetic_tables(num_households, 100, 0, 0.0)[0]
    generator = np.random.default_rng(0)
    area = np.arange(num_households) // 300
    common = generator.normal(0, 0.2, area.max() + 1)[area]
    size = generator.integers(1, 8, num_households).astype(float)
    spent = np.exp(8 + 0.5 * np.log(size) + common + generator.normal(0, 0.5, num_households))
    region = (area * 4 // (area.max() + 1)).astype(str)
    return pd.DataFrame(
        {
            "region": region,
            "urban": np.where(area % 3 == 0, "rural", "urban"),
            "area": area.astype(str),
            "size": size,
            "expenditure": spent,
            "food": spent * generator.beta(4, 6, num_households),
            "rooms": 1.0 + generator.poisson(size / 2),
            "electricity": (generator.random(num_households) < 0.6 + common).astype(float),
        },
        index=t.index,
    )


def target_rows(t: pd.DataFrame) -> np.ndarray:
    """What each household adds to the targets, shape (targets, households)."""
    classes = pd.cut(t["size"], SIZES).astype(str)
    counted = [pd.get_dummies(c, dtype=float).to_numpy().T for c in (t.region, t.urban, classes)]
    return np.vstack([*counted, t["size"].to_numpy()[None]])


def stratified(t: pd.DataFrame, generator: np.random.Generator, num: int = 1500) -> tuple:
    """Rows of a stratified sample, their weights, and its design."""
    strata = (t.region + " " + t.urban).to_numpy()
    chosen, weights, sizes = [], [], []
    for label in np.unique(strata):
        inside = np.flatnonzero(strata == label)
        n = max(40, round(num * len(inside) / len(t)))
        chosen.append(generator.choice(inside, n, replace=False))
        weights.append(np.full(n, len(inside) / n))
        sizes.append(np.full(n, len(inside)))
    rows = np.concatenate(chosen)
    return rows, np.concatenate(weights), {"strata": strata[rows], "fpc": np.concatenate(sizes)}


def clusters(t: pd.DataFrame, generator: np.random.Generator, num: int = 96, within: int = 12) -> tuple:
    """Rows of a sample in two stages, their weights, and its design."""
    region, area = t.region.to_numpy(), t.area.to_numpy()
    chosen, weights, psu = [], [], []
    for label in np.unique(region):
        inside = np.flatnonzero(region == label)
        n = max(12, round(num * len(inside) / len(t)))
        names, counts = np.unique(area[inside], return_counts=True)
        for name in generator.choice(names, n, p=counts / counts.sum()):
            members = inside[area[inside] == name]
            chosen.append(generator.choice(members, within, replace=False))
            weights.append(np.full(within, len(inside) / (n * within)))
            psu.append(np.full(within, len(psu)))
    rows = np.concatenate(chosen)
    return rows, np.concatenate(weights), {"strata": region[rows], "psu": np.concatenate(psu)}


def intervals(t: pd.DataFrame, draw, seeds: range, variance: str) -> pd.DataFrame:
    """Estimates and intervals of each statistic, one row per sample and statistic, before and after."""
    rows, found = target_rows(t), []
    totals = rows.sum(axis=1)
    for seed in seeds:
        at, weights, design = draw(t, np.random.default_rng(seed))
        sample = t.iloc[at]
        result = calibrate(CalibrationProblem(rows[:, at], totals, weights), method="calibrate")
        replicates = Design(variance, **design, num_replicates=200, seed=seed)
        ways = {
            calibrated: replicates if variance == "linearized" else result.replicates(replicates, calibrated)
            for calibrated in (False, True)
        }
        for calibrated, way in ways.items():
            for statistic, column, of in STATISTICS:
                below = None if of is None else sample[[of]]
                one = result.standard_errors(
                    sample[[column]], way, statistic, of=below, calibrated=calibrated
                )
                truth = (
                    t[column].sum()
                    if statistic == "total"
                    else t[column].sum() / (t[of].sum() if of else len(t))
                )
                name = f"{statistic} of {column}" + (f" to {of}" if of else "")
                told = one.iloc[0][["estimate", "se", "lower", "upper"]]
                found.append((draw.__name__, variance, seed, name, calibrated, truth, *told))
    columns = [
        "design",
        "variance",
        "seed",
        "name",
        "calibrated",
        "truth",
        "estimate",
        "se",
        "lower",
        "upper",
    ]
    return pd.DataFrame(found, columns=columns)


def measure(table: pd.DataFrame) -> pd.DataFrame:
    """Coverage, bias and standard errors of each statistic over many samples."""
    table["covered"] = (table.lower <= table.truth) & (table.truth <= table.upper)
    group = table.groupby(["name", "calibrated"], sort=False)
    return pd.DataFrame(
        {
            "coverage": group.covered.mean(),
            "bias / truth": group.estimate.mean() / group.truth.mean() - 1,
            "sd / truth": group.estimate.std() / group.truth.mean(),
            "mean se / truth": group.se.mean() / group.truth.mean(),
        }
    )


def population(args: argparse.Namespace) -> pd.DataFrame:
    """The census, or the made-up one."""
    if args.population == "made-up":
        return made_up()
    package = importlib.util.find_spec("svy")
    file = args.census or (package and Path(str(package.origin)).parent / CENSUS)
    if file is None or not Path(file).is_file():
        print("no census: pip install svy, or --census FILE; a made-up population is taken")
        return made_up()
    return census(Path(file))


def main() -> None:
    """Draw samples, print coverage."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0, help="seed of the first sample")
    parser.add_argument("--rows", type=Path, help="a CSV of earlier samples, which gets these ones, too")
    parser.add_argument("--variance", default="linearized", choices=["linearized", "jackknife", "bootstrap"])
    parser.add_argument("--population", default="census", choices=["census", "made-up"])
    parser.add_argument("--census", type=Path, help="hld_pop_wb_2023.parquet")
    parser.add_argument("--design", default="both", choices=["both", "stratified", "clusters"])
    args = parser.parse_args()
    t = population(args)
    print(f"{len(t):,} households, {args.samples:,} samples, {args.variance}")
    for draw in (stratified, clusters):
        if args.design in ("both", draw.__name__):
            start = time.process_time()
            seeds = range(args.first, args.first + args.samples)
            table = intervals(t, draw, seeds, args.variance)
            if args.rows:
                table.to_csv(args.rows, mode="a", index=False, header=not args.rows.exists())
                table = pd.read_csv(args.rows)
                table = table[(table.design == draw.__name__) & (table.variance == args.variance)]
            size, samples = len(draw(t, np.random.default_rng(0))[0]), table.seed.nunique()
            seconds = time.process_time() - start
            print(f"\n{draw.__name__}: {size:,} households, {samples:,} samples, {seconds:.0f} s of CPU")
            print(measure(table.copy()).to_string(float_format=lambda v: f"{v:.4f}"), flush=True)


if __name__ == "__main__":
    main()
