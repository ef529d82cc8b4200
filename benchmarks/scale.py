"""Operations, bytes and time of an entry with and without nesting, beside torch's CSR and l0-python.

    python -m benchmarks.scale                        products and epochs of gates on four problems
    python -m benchmarks.scale --problems cps --cps DIR   DIR/cps_households.csv.gz and cps_targets.csv.gz
    python -m benchmarks.scale --calls                calibrate() from problem to weights as well

One thread for products and epochs, processor time; ratios are of the same run. ``calibrate()`` uses the
threads it is given (OMP_NUM_THREADS). l0-python (0.6.2, on PYTHONPATH) is left out where it is missing.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch

from benchmarks.calibration import fit_theirs, gate_solver, l0_model, open_share, report
from sparsereg.calibration import CalibrationProblem, calibrate, synthetic_problem
from sparsereg.calibration.solver.matrix import household_matrix


def survey(households: int, targets: int) -> CalibrationProblem:
    """The built-in synthetic survey."""
    return synthetic_problem(households, targets)


def cps(folder: Path) -> CalibrationProblem:
    """US tax units with published totals."""
    import pandas as pd

    from sparsereg.calibration.reading.households import build, target_table

    households = pd.read_csv(folder / "cps_households.csv.gz")
    targets = pd.read_csv(folder / "cps_targets.csv.gz", keep_default_na=False)
    return build(households, target_table(targets), weight="w", id="RECID").problem


def random_problem(households: int = 100_000, targets: int = 4_000, each: int = 50) -> CalibrationProblem:
    """A matrix in which nothing nests."""
    rng = np.random.default_rng(0)
    indices = rng.integers(0, targets, households * each, dtype=np.int32)
    data = rng.lognormal(size=len(indices)).astype(np.float32)
    indptr = np.arange(0, len(indices) + 1, each)
    matrix = sp.csr_array(sp.csr_array((data, indices, indptr), shape=(households, targets)).T.tocsr())
    return CalibrationProblem(matrix, matrix.astype(np.float64) @ rng.lognormal(size=households))


def all_stored(problem: CalibrationProblem) -> CalibrationProblem:
    """The same problem, told that nothing nests."""
    other = replace(problem)
    other.__dict__["nesting"] = None
    return other


def processor_seconds(repeats: int, run: Callable[..., Any], *arguments: Any) -> float:
    """The fastest of some calls, processor time: what other work on the machine disturbs least."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        run(*arguments)
        times.append(time.process_time() - start)
    return min(times)


def bench_products(name: str, problem: CalibrationProblem, repeats: int) -> None:
    """Totals and gradient: operations and bytes an entry, nanoseconds an entry of the whole matrix."""
    start = time.process_time()
    nesting, entries = problem.nesting, problem.matrix.nnz
    searched = time.process_time() - start
    stored = entries if nesting is None else int(np.diff(problem.matrix.indptr)[nesting.stored].sum())
    sums = 0 if nesting is None else nesting.parts.nnz
    size = f"{problem.num_households:,} x {problem.num_targets:,}"
    print(
        f"{name}: {size}, {entries:,} entries, {stored:,} stored"
        f" and {sums:,} of sums:\n  {(stored + sums) / entries:.2f} operations and {6 * stored / entries:.1f}"
        f" of 6 bytes an entry; found in {searched:.2f} s",
        flush=True,
    )
    location = open_share(problem, 1.0)
    nested, plain = (gate_solver(p, location).products for p in (problem, all_stored(problem)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = household_matrix(problem.matrix_t, backend="torch")
    weights = torch.rand(problem.num_households, dtype=torch.float64)
    residual = torch.randn(problem.num_targets, dtype=torch.float64)
    for what, argument in (("totals", weights), ("gradient", residual)):
        ns = [
            processor_seconds(repeats, getattr(m, what), argument) / entries * 1e9
            for m in (nested, plain, theirs)
        ]
        print(
            f"  {what:8} {ns[0]:.2f} ns an entry, all stored {ns[1]:.2f} ({ns[1] / ns[0]:.1f} x),"
            f" torch CSR float64 {ns[2]:.2f} ({ns[2] / ns[0]:.1f} x)",
            flush=True,
        )


def bench_epochs(problem: CalibrationProblem, repeats: int) -> None:
    """An epoch of gates, all open and a tenth open."""
    for share in (1.0, 0.1):
        location = open_share(problem, share)
        solvers = [gate_solver(p, location) for p in (problem, all_stored(problem))]
        for solver in solvers:
            solver.step(3)
        ms = [100 * processor_seconds(repeats, s.step, 10) for s in solvers]
        line = f"  epoch, {share:4.0%} open: {ms[0]:.2f} ms, all stored {ms[1]:.2f} ({ms[1] / ms[0]:.1f} x)"
        model = l0_model(problem, 0)
        if model is not None:
            fit_theirs(model, problem, location, 1)
            few = max(2, repeats // 4)
            theirs = 500 * processor_seconds(few, fit_theirs, model, problem, location, 2)
            line += f", l0-python {theirs:.0f} ({theirs / ms[0]:.0f} x)"
        print(line, flush=True)


def bench_call(name: str, problem: CalibrationProblem) -> None:
    """calibrate() to a twentieth of the households, a tenth of a small problem."""
    number = problem.num_households // (10 if problem.num_households < 50_000 else 20)
    for p, how in ((problem, "nested"), (all_stored(problem), "all stored")):
        _ = p.matrix_t
        start = time.process_time()
        result = calibrate(p, number)
        report(f"  {name} {how}", result, time.process_time() - start)


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = ["small", "large", "cps", "random"]
    parser.add_argument("--problems", nargs="+", choices=names, default=["small", "large", "random"])
    parser.add_argument("--cps", type=Path, default=Path(), help="folder of cps_households.csv.gz")
    parser.add_argument("--repeats", type=int, default=8)
    parser.add_argument("--calls", action="store_true")
    args = parser.parse_args()
    makers = {
        "small": lambda: survey(30_000, 4_000),
        "large": lambda: survey(337_704, 27_410),
        "cps": lambda: cps(args.cps),
        "random": random_problem,
    }
    threads = torch.get_num_threads()
    print(f"torch {torch.__version__}, numpy {np.__version__}", flush=True)
    calibrate(synthetic_problem(500, 50), 50)  # compile
    for name in args.problems:
        problem = makers[name]()
        torch.set_num_threads(1)
        bench_products(name, problem, args.repeats)
        bench_epochs(problem, args.repeats)
        torch.set_num_threads(threads)
        if args.calls:
            bench_call(name, problem)


if __name__ == "__main__":
    main()
