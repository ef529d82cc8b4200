"""Weights of every district from one national file, beside Clarabel on some of them.

    python -m benchmarks.areas --cps DIR                      436 areas, 215,000 records, 100 targets each
    python -m benchmarks.areas --cps DIR --areas 8 --clarabel 1     the first 8 only, one of them by Clarabel
    python -m benchmarks.areas --cps DIR --joint --areas 40   all levels at once: areas, 51 states, nation
    python -m benchmarks.areas --cps DIR --keep 100000 --records 12000    of 12,000 x 436 clones so many

Records are those of DIR/cps_households.csv.gz with a weight. Targets are counts, persons, incomes, wages and
benefits in 20 classes of income; each area's are made from weights of its own that tilt towards rich or poor,
large or small units and those with benefits, with noise, within the bounds: so they can be met, and the
bounds hold many of the weights. Processor seconds; Clarabel (on PYTHONPATH) solves the same programme.
"""

from __future__ import annotations

import argparse
import resource
import time
from pathlib import Path

import numpy as np
import scipy.sparse as sp
import torch

from sparsereg.calibration.areas import AreaProblem, Placement
from sparsereg.calibration.solver.areas import AreaWeights, calibrate_areas
from sparsereg.calibration.solver.clones import prune_clones
from sparsereg.calibration.solver.joint import calibrate_together

RECORDS, CLASSES, AREAS, STATES = 215_000, 20, 436, 51
WITHIN = (0.55, 1.8)
"""Weights over initial ones that the totals are made from."""
BOUNDS = (0.5, 2.0)


def problem_of(folder: Path, records: int = RECORDS, areas: int = AREAS, seed: int = 0) -> AreaProblem:
    """All areas; totals of states and of the nation are the sums of theirs."""
    import pandas as pd

    table = pd.read_csv(folder / "cps_households.csv.gz")
    table = table[table.w > 0].sample(records, random_state=seed).reset_index(drop=True)
    rank = table.agi.rank(method="first").to_numpy()
    of_class = (rank - 1).astype(np.int64) * CLASSES // len(table)
    columns = [
        np.ones(len(table)),
        *(table[c].to_numpy(float) for c in ("XTOT", "agi", "e00200", "snap_ben")),
    ]
    rows = [np.where(of_class == k, column, 0.0) for column in columns for k in range(CLASSES)]
    names = [
        f"{what} {k}" for what in ("units", "persons", "income", "wages", "benefits") for k in range(CLASSES)
    ]
    measures = sp.csr_array(np.array([row for row in rows if row.any()], dtype=np.float32))
    names = [name for name, row in zip(names, rows, strict=True) if row.any()]
    rng = np.random.default_rng(seed)
    shares = rng.dirichlet(np.full(areas, 20.0))
    weights, persons = table.w.to_numpy(float), table.XTOT.to_numpy(float)
    features = np.array([rank / len(table) - 0.5, persons - persons.mean(), table.snap_ben.to_numpy() > 0])
    targets = []
    for share in shares:
        slopes = rng.normal(0, (1.5, 0.5, 1.0))
        tilt = np.exp(slopes @ features + rng.normal(0, 0.1, len(weights)))
        targets.append(measures @ (weights * share * np.clip(tilt, *WITHIN)))
    labels = tuple(f"area {i:03d}" for i in range(areas))
    groups = tuple(f"state {i:02d}" for i in range(min(STATES, areas)))
    state = np.arange(areas) % len(groups)
    of_states = np.array(
        [sum(t for t, s in zip(targets, state, strict=True) if s == k) for k in range(len(groups))]
    )
    place, measure = np.divmod(np.arange((areas + len(groups) + 1) * len(names)), len(names))
    place = np.where(place == areas + len(groups), -1, place)
    asked = np.concatenate([*targets, of_states.ravel(), of_states.sum(axis=0)])
    called = (*labels, *groups, "nation")
    return AreaProblem(
        measures, weights, Placement(labels, shares), asked, measure, place,
        tuple(f"{called[a]} {names[m]}" for a, m in zip(place, measure, strict=True)), tuple(names),
        table.RECID.to_numpy(), groups, np.append(areas + state, np.full(len(groups), -1)),
    )  # fmt: skip


def objective(area: AreaWeights, weights: np.ndarray) -> float:
    """Half the squared distance from the initial weights, each over its own."""
    return float(0.5 * ((weights - area.initial) ** 2 / area.initial).sum())


def by_clarabel(problem: AreaProblem, area: AreaWeights) -> tuple[float, float]:
    """Processor seconds and objective of Clarabel for the same area, in weights over initial ones."""
    import clarabel

    rows = problem.measures[problem.measure[area.targets]].astype(np.float64) @ sp.diags_array(area.initial)
    wanted = problem.targets[area.targets]
    n, scale = rows.shape[1], 1.0 / np.maximum(np.abs(wanted), 1.0)
    unit = area.initial / area.initial.sum()
    eye = sp.eye_array(n)
    constraints = sp.csc_matrix(sp.vstack([sp.diags_array(scale) @ rows, eye, -eye]))
    right = np.concatenate([wanted * scale, np.full(n, BOUNDS[1]), np.full(n, -BOUNDS[0])])
    settings = clarabel.DefaultSettings()
    settings.verbose = False
    start = time.process_time()
    cones = [clarabel.ZeroConeT(len(wanted)), clarabel.NonnegativeConeT(2 * n)]
    solver = clarabel.DefaultSolver(
        sp.csc_matrix(sp.diags_array(unit)), -unit, constraints, right, cones, settings
    )
    found = solver.solve()
    return time.process_time() - start, objective(area, np.array(found.x) * area.initial)


def peak() -> float:
    """GiB that this process has used at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def by_area(problem: AreaProblem, args: argparse.Namespace) -> None:
    """Each area by itself, some by Clarabel, too."""
    begin, wall = time.process_time(), time.perf_counter()
    kept: list[AreaWeights] = []
    worst, steps, number, hit = 0.0, 0, 0, 0
    for area in calibrate_areas(problem, args.distance, BOUNDS):
        worst, steps, number = max(worst, float(area.errors.max())), max(steps, area.steps), number + 1
        hit += area.bounds_hit
        kept += [area] if len(kept) < args.clarabel else []
        if number >= args.areas:
            break
    each = (time.process_time() - begin) / number
    print(
        f"{number} areas: {each:.2f} s processor each, {time.perf_counter() - wall:.0f} s on the clock,"
        f" largest error {worst:.1e}, at most {steps} steps, {hit / number / problem.num_households:.1%} of"
        f" the weights at a bound, peak {peak():.2f} GiB",
        flush=True,
    )
    for area in kept if args.distance == "linear" else []:
        seconds, theirs = by_clarabel(problem, area)
        ours = objective(area, area.weights)
        print(
            f"{problem.placement.areas[area.area]}: Clarabel {seconds:.1f} s ({seconds / each:.0f} x),"
            f" objective {theirs:.9g}, ours {ours:.9g} ({ours / theirs - 1:+.1e}),"
            f" {area.bounds_hit / len(area.weights):.1%} at a bound",
            flush=True,
        )


def by_level(problem: AreaProblem, args: argparse.Namespace) -> None:
    """All levels at once: error by level, support, and the sum of the areas against the nation."""
    begin, wall, total = time.process_time(), time.perf_counter(), np.zeros(problem.num_households)
    made = (
        prune_clones(problem, args.keep, args.most)
        if args.keep
        else calibrate_together(problem, args.distance, BOUNDS)
    )
    areas, errors, ess, least, pairs, hit, steps = 0, [], [], problem.num_households, 0, 0, 0
    places = np.zeros(problem.num_households, dtype=np.int64)
    sums = np.zeros((len(problem.groups), len(problem.measure_names)))
    for area in made:
        full = np.zeros(problem.num_households)
        full[area.households] = area.weights
        total += full
        sums[problem.above[area.area] - problem.num_areas] += problem.measures @ full
        there = int((area.weights > 0).sum())
        places[area.households] += area.weights > 0
        areas, pairs, least, hit = areas + 1, pairs + there, min(least, there), hit + area.bounds_hit
        errors.append(area.errors)
        ess.append(area.weights.sum() ** 2 / (area.weights @ area.weights))
        steps = area.steps
    print(
        f"{areas} areas: {time.process_time() - begin:.0f} s processor, {time.perf_counter() - wall:.0f} s on"
        f" the clock, {steps} steps, {hit / max(pairs, 1):.1%} at a bound, peak {peak():.2f} GiB\n"
        f"  {pairs:,} pairs, one household in {places.max()} areas at most; an area has {least} households or"
        f" more, effective {min(ess):.0f} or more"
    )
    asked = problem.targets.reshape(-1, len(problem.measure_names))
    levels = {
        "areas": np.concatenate(errors),
        "states": np.abs(sums / asked[problem.num_areas : -1] - 1).ravel(),
        "nation": np.abs(problem.measures @ total / asked[-1] - 1),
    }
    for level, error in levels.items():
        print(
            f"  {level}: median error {np.median(error):.2e}, mean {error.mean():.2e},"
            f" largest {error.max():.2e}"
        )


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cps", type=Path, required=True)
    parser.add_argument("--areas", type=int, default=AREAS, help="stop after so many")
    parser.add_argument("--clarabel", type=int, default=3, help="of these by Clarabel, too")
    parser.add_argument("--distance", default="linear")
    parser.add_argument("--records", type=int, default=RECORDS)
    parser.add_argument("--joint", action="store_true", help="areas, states and the nation at once, soft")
    parser.add_argument("--keep", type=int, help="clone and prune: so many pairs")
    parser.add_argument("--most", type=int, default=10, help="areas a household is kept for")
    args = parser.parse_args()
    together = args.joint or args.keep
    problem = problem_of(args.cps, args.records, args.areas if together else AREAS)
    print(
        f"{problem.num_households:,} records, {len(problem.measure_names)} targets an area,"
        f" {problem.measures.nnz:,} entries; {torch.get_num_threads()} threads",
        flush=True,
    )
    if together:
        by_level(problem, args)
    else:
        by_area(problem, args)


if __name__ == "__main__":
    main()
