"""Weights of every district from one national file, beside Clarabel on some of them.

    python -m benchmarks.areas --cps DIR                      436 areas, 215,000 records, 100 targets each
    python -m benchmarks.areas --cps DIR --areas 8 --clarabel 1     the first 8 only, one of them by Clarabel

Records are those of DIR/cps_households.csv.gz with a weight. Targets are counts, persons, incomes, wages and
benefits in 20 classes of income; each area's are made from weights of its own that tilt towards rich or poor,
with noise, so that they can be met. Processor seconds; Clarabel (on PYTHONPATH) solves the same programme.
"""

from __future__ import annotations

import argparse
import resource
import time
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch

from sparsereg.calibration.areas import AreaProblem, Placement
from sparsereg.calibration.solver.areas import AreaWeights, calibrate_areas

RECORDS, CLASSES, AREAS = 215_000, 20, 436
BOUNDS = (0.05, 20.0)


def problem_of(folder: Path, seed: int = 0) -> AreaProblem:
    """All areas."""
    import pandas as pd

    table = pd.read_csv(folder / "cps_households.csv.gz")
    table = table[table.w > 0].sample(RECORDS, random_state=seed).reset_index(drop=True)
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
    shares = rng.dirichlet(np.full(AREAS, 20.0))
    weights, height = table.w.to_numpy(float), (rank / len(table) - 0.5)
    targets = [
        measures @ (weights * share * np.exp(rng.normal(0, 2.0) * height + rng.normal(0, 0.1, len(weights))))
        for share in shares
    ]
    area, measure = np.divmod(np.arange(AREAS * len(names)), len(names))
    labels = tuple(f"area {i:03d}" for i in range(AREAS))
    return AreaProblem(
        measures, weights, Placement(labels, shares), np.concatenate(targets), measure, area,
        tuple(f"{labels[a]} {names[m]}" for a, m in zip(area, measure, strict=True)), tuple(names),
        table.RECID.to_numpy(),
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


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cps", type=Path, required=True)
    parser.add_argument("--areas", type=int, default=AREAS, help="stop after so many")
    parser.add_argument("--clarabel", type=int, default=3, help="of these by Clarabel, too")
    parser.add_argument("--distance", default="linear")
    args = parser.parse_args()
    problem = problem_of(args.cps)
    print(
        f"{problem.num_households:,} records, {len(problem.measure_names)} targets an area,"
        f" {problem.measures.nnz:,} entries; {torch.get_num_threads()} threads",
        flush=True,
    )
    begin, wall = time.process_time(), time.perf_counter()
    kept: list[Any] = []
    worst, steps, number = 0.0, 0, 0
    for area in calibrate_areas(problem, args.distance, BOUNDS):
        worst, steps, number = max(worst, float(area.errors.max())), max(steps, area.steps), number + 1
        kept += [area] if len(kept) < args.clarabel else []
        if number >= args.areas:
            break
    each = (time.process_time() - begin) / number
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"{number} areas: {each:.2f} s processor each, {time.perf_counter() - wall:.0f} s on the clock,"
        f" largest error {worst:.1e}, at most {steps} steps, peak {peak:.2f} GiB",
        flush=True,
    )
    for area in kept if args.distance == "linear" else []:
        seconds, theirs = by_clarabel(problem, area)
        ours = objective(area, area.weights)
        print(
            f"{problem.placement.areas[area.area]}: Clarabel {seconds:.1f} s ({seconds / each:.0f} x),"
            f" objective {theirs:.9g}, ours {ours:.9g} ({ours / theirs - 1:+.1e})",
            flush=True,
        )


if __name__ == "__main__":
    main()
