"""Ten million households x 21,000 targets: build from Parquet parts, gates, prune to one in a hundred, refit.

    OMP_NUM_THREADS=2 python -m benchmarks.nation --folder DIR             five hundred million entries
    OMP_NUM_THREADS=2 python -m benchmarks.nation --folder DIR --households 1000000

Households live in 436 districts of 51 states. 43 measures of them (counts and amounts, about 17 of a
household are not zero) are asked for by district, state and nation. Only districts' rows are stored, which
the levels say beforehand. Parts of DIR that are there already are used; each step is told when it is done,
with the seconds since the start (clock, processor) and the most memory so far.
"""

from __future__ import annotations

import argparse
import resource
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import scipy.sparse as sp
import torch

from sparsereg.calibration.config import Settings
from sparsereg.calibration.measures import error_summary
from sparsereg.calibration.solver.hard_concrete import GateSettings
from sparsereg.calibration.solver.least_squares import System
from sparsereg.calibration.solver.losses import TargetLoss
from sparsereg.calibration.solver.nested import NestedMatrix
from sparsereg.calibration.solver.refit import refit
from sparsereg.calibration.solver.selection import METHODS, Goal, gates_of
from sparsereg.linalg.nesting import Nesting
from sparsereg.linalg.threads import quiet_threads

DISTRICTS, STATES, PARTS = 436, 51, 20
CLASSES, AGES, SIZES, AMOUNTS = 8, 6, 6, 14
MEASURES = 1 + 2 * CLASSES + AGES + SIZES + AMOUNTS
_BEGUN = time.perf_counter()


def told(text: str) -> None:
    """One line with seconds and memory."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    print(
        f"{time.perf_counter() - _BEGUN:7.0f} s  {used.ru_utime + used.ru_stime:7.0f} s processor "
        f" {used.ru_maxrss / 2**20:5.2f} GiB  {text}",
        flush=True,
    )


def written(folder: Path, households: int) -> None:
    """Write the parts that are missing."""
    folder.mkdir(parents=True, exist_ok=True)
    each = np.array_split(np.arange(households), PARTS)
    districts = np.sort(np.random.default_rng(0).integers(0, DISTRICTS, households).astype(np.int16))
    for number, rows in enumerate(each):
        file = folder / f"part-{number:05d}.parquet"
        if file.exists():
            continue
        rng, n = np.random.default_rng(number + 1), len(rows)
        columns = {
            "district": districts[rows],
            "w": rng.lognormal(2.5, 0.4, n).astype(np.float32),
            "income": rng.lognormal(10.5, 1.0, n).astype(np.float32),
            "age": rng.integers(0, AGES, n).astype(np.int8),
            "size": rng.integers(0, SIZES, n).astype(np.int8),
        }
        for k in range(AMOUNTS):
            columns[f"amount_{k}"] = (rng.lognormal(7, 1, n) * (rng.random(n) < 0.85)).astype(np.float32)
        partly = file.with_suffix(".partly")
        pq.write_table(pa.table(columns), partly)
        partly.rename(file)


def entries(file: Path) -> tuple[sp.csr_array, np.ndarray, np.ndarray]:
    """Households x targets of districts, weights, and districts of one part."""
    table = pq.read_table(file)
    column = {name: table.column(name).to_numpy() for name in table.column_names}
    n, district = table.num_rows, column["district"].astype(np.int32)
    of_class = np.searchsorted(np.exp(np.linspace(9, 12, CLASSES - 1)), column["income"])
    ones, start = np.ones(n, np.float32), 1 + 2 * CLASSES
    parts = [(np.zeros(n, np.int32), ones), (1 + of_class, ones), (1 + CLASSES + of_class, column["income"]),
             (start + column["age"], ones), (start + AGES + column["size"], ones)]  # fmt: skip
    first = start + AGES + SIZES
    parts += [(np.full(n, first + k), column[f"amount_{k}"]) for k in range(AMOUNTS)]
    indices = np.stack([place for place, _ in parts], axis=1).astype(np.int32) + district[:, None] * MEASURES
    data = np.stack([values for _, values in parts], axis=1)
    there = data != 0
    indptr = np.append(0, np.cumsum(there.sum(axis=1)))
    shape = (n, DISTRICTS * MEASURES)
    return sp.csr_array((data[there], indices[there], indptr), shape=shape), column["w"], district


def nesting_of(entries_of_all: int, district: np.ndarray) -> Nesting:
    """Targets of states, then of the nation, as sums of those of districts, which come first."""
    stored = DISTRICTS * MEASURES
    sums = (STATES + 1) * MEASURES
    row = np.arange(stored)
    place, measure = row // MEASURES, row % MEASURES
    of_state, of_nation = (place % STATES) * MEASURES + measure, STATES * MEASURES + measure
    ones = np.ones(2 * stored)
    parts = sp.csr_array((ones, (np.append(of_state, of_nation), np.append(row, row))), shape=(sums, stored))
    parts.sort_indices()
    return Nesting(stored + sums, row, stored + np.arange(sums), parts, 3 * entries_of_all, district)


def problem_of(folder: Path, seed: int) -> tuple[NestedMatrix, np.ndarray, torch.Tensor]:
    """The matrix in the order in which households are visited, their weights, and the targets."""
    rows, weights, district = zip(*(entries(f) for f in sorted(folder.glob("part-*.parquet"))), strict=True)
    whole, w, of = sp.vstack(rows, format="csr"), np.concatenate(weights), np.concatenate(district)
    del rows
    told(f"read {whole.nnz:,} stored entries of {3 * whole.nnz:,}")
    rng = np.random.default_rng(seed)
    order = np.lexsort((rng.random(len(of)), np.diff(whole.indptr), rng.permutation(DISTRICTS)[of]))
    ordered = sp.csr_array(whole[order])
    del whole
    nesting = nesting_of(ordered.nnz, of)
    matrix = NestedMatrix(ordered, nesting, of[order], order)
    w = w[order].astype(np.float64)
    tilt = rng.lognormal(0, 0.3, len(w)) * np.exp(0.2 * rng.normal(size=DISTRICTS))[of[order]]
    return matrix, w, matrix.totals(torch.from_numpy(w * tilt))


def goal_of(matrix: NestedMatrix, weights: np.ndarray, targets: torch.Tensor, epochs: int) -> Goal:
    """Relative errors, gates as ``calibrate`` sets them, one household in a hundred."""
    settings = Settings(epochs=epochs)
    shares, scales = torch.ones_like(targets), targets.abs().clamp(min=1e-9)
    loss = TargetLoss(targets, shares, scales=scales)
    mean = TargetLoss(targets, shares / len(targets), scales=scales)
    initial = torch.from_numpy(weights)
    system = System(matrix, mean.quadratic(), initial, torch.full_like(initial, torch.inf), 1e-4)
    gates = GateSettings(
        settings.price, lr=settings.lr, temperature=settings.temperature_at, num_epochs=epochs
    )
    return Goal(system, loss, matrix.num_households // 100, gates, settings.droprate_init)


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True, help="of the Parquet parts")
    parser.add_argument("--households", type=int, default=10_000_000)
    parser.add_argument("--epochs", type=int, default=100)
    args = parser.parse_args()
    print(f"torch {torch.__version__}, numpy {np.__version__}, {torch.get_num_threads()} threads", flush=True)
    written(args.folder, args.households)
    told(f"wrote {PARTS} parts of {args.households:,} households")
    matrix, weights, targets = problem_of(args.folder, 0)
    told(f"built {matrix.num_households:,} x {matrix.num_targets:,}")
    goal = goal_of(matrix, weights, targets, args.epochs)
    with quiet_threads():
        gates = gates_of(goal, goal.gates)
        while gates.epoch < args.epochs:
            gates.step(min(20, args.epochs - gates.epoch))
            told(f"{gates.epoch} epochs of gates, mean squared error {gates.last_loss / len(targets):.3g}")
        del gates
        selection = METHODS["pruning"](goal)
        while not selection.done:
            selection.step()
            now = len(selection.kept())
            told(f"{selection.epoch} of {selection.num_epochs} steps of pruning, {now:,} kept")
        kept = selection.kept()
        best = refit(goal.system, goal.loss, kept, selection.weights()[kept])
    final = torch.zeros(matrix.num_households, dtype=torch.float64)
    final[kept] = best.weights
    errors = (matrix.totals(final) / targets - 1).abs().numpy()
    summary = ", ".join(f"{name} {value:.3g}" for name, value in error_summary(errors).items())
    told(f"refitted: {summary}, optimal to {best.kkt_violation:.1e}")


if __name__ == "__main__":
    main()
