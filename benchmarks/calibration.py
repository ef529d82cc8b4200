"""Speed, memory and quality of the calibration, beside l0-python where that is installed.

    python -m benchmarks.calibration epoch              seconds per epoch of gates, small and large
    python -m benchmarks.calibration calls              calibrate() from problem to weights, small and large
    python -m benchmarks.calibration quality            same problem, same number of households, three seeds
    python -m benchmarks.calibration quality --disagreement 0      the same with targets that can all be met
    python -m benchmarks.calibration stress             l0-python's stress test: all at random
    python -m benchmarks.calibration lambda             how many households a price keeps, two sizes
    python -m benchmarks.calibration huge               one million households, sixty million entries
    python -m benchmarks.calibration exact              280,000 households x 520 targets, targets met exactly

l0-python (``pip install l0-python==0.6.2``, in an environment of its own put on PYTHONPATH) is left out
where it is missing. ``OMP_NUM_THREADS=1`` measures one core. Problems are the built-in synthetic survey.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch

from sparsereg.calibration import CalibrationProblem, calibrate, polish, synthetic_problem
from sparsereg.calibration.solver.calibration import Calibration, Settings
from sparsereg.calibration.solver.hard_concrete import GateSolver
from sparsereg.calibration.solver.pruning import PruningSchedule

SIZES = {"small": (30_000, 4_000), "large": (337_704, 27_410)}
LAMBDAS = (0.02, 0.09, 0.6)
"""Prices at which l0-python keeps about 25, 10 and 3 percent of the small problem."""


def l0_model(problem: CalibrationProblem, seed: int, keep: float = 0.999) -> Any | None:
    """l0-python's model as its users run it, or None where it is not installed."""
    try:
        from l0.calibration import SparseCalibrationWeights
    except ImportError:
        return None
    torch.manual_seed(seed)
    return SparseCalibrationWeights(
        problem.num_households, beta=0.65, init_keep_prob=keep, init_weights=problem.starting_weights,
        log_weight_jitter_sd=0.05, log_alpha_jitter_sd=0.01, seed=seed,
    )  # fmt: skip


def seconds(run: Callable[[], Any]) -> float:
    """Wall clock time of a call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def open_share(problem: CalibrationProblem, share: float, seed: int = 0) -> torch.Tensor:
    """Locations of gates of which this share is open for certain, and the rest shut for certain."""
    generator = torch.Generator().manual_seed(seed)
    is_open = torch.rand(problem.num_households, generator=generator) < share
    return torch.where(is_open, 19.0, -19.0)


def bench_epoch(sizes: list[str], repeats: int) -> None:
    """Seconds per epoch, alternating ours and theirs; medians, and the median of the ratios."""
    for size in sizes:
        problem = synthetic_problem(*SIZES[size])
        _ = problem.matrix_t
        for share in (1.0, 0.1):
            ours, theirs = times_per_epoch(problem, open_share(problem, share), repeats)
            line = f"{size:6} {problem.matrix.nnz:>11,} entries, {share:4.0%} open: {median_ms(ours)} ours"
            if theirs:
                ratio = statistics.median(b / a for a, b in zip(ours, theirs, strict=True))
                line += f", {median_ms(theirs)} l0-python, {ratio:.0f} x"
            print(line, flush=True)


def times_per_epoch(
    problem: CalibrationProblem, location: torch.Tensor, repeats: int
) -> tuple[list[float], list[float]]:
    """Seconds per epoch of ours and of l0-python (none where it is missing), taken in turns."""
    solver, model = gate_solver(problem, location), l0_model(problem, 0)
    solver.step(3)
    if model is not None:
        fit_theirs(model, problem, location, 1)
    ours, theirs = [], []
    for _ in range(repeats):
        ours.append(seconds(lambda: solver.step(10)) / 10)
        if model is not None:
            theirs.append(seconds(lambda: fit_theirs(model, problem, location, 2)) / 2)
    return ours, theirs


def gate_solver(problem: CalibrationProblem, location: torch.Tensor) -> GateSolver:
    """A solver of gates at given locations, in the order of households that calibrate() uses."""
    goal = Calibration(problem, settings=Settings(method="hard_concrete", lambda_l0=1e-6)).goal
    start = goal.system.initial_weights.log()
    return GateSolver(goal.system.matrix, goal.loss, start, location, replace(goal.gates, lr=1e-6))


def fit_theirs(model: Any, problem: CalibrationProblem, location: torch.Tensor, epochs: int) -> None:
    """Some epochs of l0-python from these locations."""
    model.log_alpha.data.copy_(location)
    model.fit(problem.matrix, problem.targets, lambda_l0=1e-6, lr=1e-6, epochs=epochs, loss_type="relative")


def median_ms(values: list[float]) -> str:
    """Median in milliseconds."""
    return f"{1e3 * statistics.median(values):8.2f} ms"


def bench_calls(sizes: list[str], repeats: int) -> None:
    """calibrate() by size, method and share kept: wall clock, processor time, error, peak memory."""
    for size in sizes:
        problem = synthetic_problem(*SIZES[size])
        share = 0.1 if size == "small" else 0.05
        number = round(share * problem.num_households)
        calibrate(synthetic_problem(500, 50), 50)  # compile
        for method in ("pruning", "hard_concrete"):
            for _ in range(repeats):
                start = time.process_time()
                result = calibrate(problem, number, method=method)
                report(f"{size} {method}", result, time.process_time() - start)


def report(name: str, result: Any, processor: float) -> None:
    """One line about a result."""
    d = result.diagnostics
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"{name:28} kept {d['kept']:>6,}  mean {d['mean_are']:9.4%}  median {d['median_are']:9.4%}"
        f"  ess {d['ess']:8,.0f}  largest ratio {d['max_ratio'] or 0:7.1f}  {result.seconds:6.1f} s"
        f"  {processor:6.1f} s processor  peak {memory:.2f} GiB",
        flush=True,
    )


def bench_quality(seeds: int, disagreement: float, lambdas: tuple[float, ...]) -> None:
    """l0-python's gated weights, its support refitted, and ours at its number of households."""
    ratios: dict[float, list[tuple[float, float, float]]] = {}
    for seed in range(seeds):
        problem = synthetic_problem(*SIZES["small"], seed=seed, disagreement=disagreement)
        for price in lambdas:
            theirs = fitted(problem, price, seed)
            if theirs is None:
                print("l0-python is not installed")
                return
            print(f"seed {seed} lambda {price:g}:", flush=True)
            ratios.setdefault(price, []).append(compare(problem, theirs, seed))
    for price, rows in ratios.items():
        mean, spread = np.mean(rows, axis=0), np.std(rows, axis=0)
        print(
            f"lambda {price:g}: error {mean[0]:.3f} +- {spread[0]:.3f} of gated,"
            f" {mean[1]:.3f} +- {spread[1]:.3f} of its support refitted,"
            f" sample size {mean[2]:.2f} +- {spread[2]:.2f} of gated"
        )


def fitted(problem: CalibrationProblem, price: float, seed: int) -> dict[str, Any] | None:
    """Fit l0-python as its users do and measure it; None where it is not installed."""
    model = l0_model(problem, seed)
    if model is None:
        return None
    start = time.process_time()
    model.fit(problem.matrix, problem.targets, lambda_l0=price, lr=0.15, epochs=1000,
              loss_type="relative")  # fmt: skip
    return gated(problem, model, time.process_time() - start)


def compare(problem: CalibrationProblem, theirs: dict[str, Any], seed: int) -> tuple[float, float, float]:
    """Print theirs, theirs refitted and ours at the same number; return the ratios of pruning to theirs."""
    print(f"  {theirs['line']}", flush=True)
    number = int((theirs["weights"] > 0).sum())
    refitted = polish(problem, theirs["weights"] > 0, schedule=PruningSchedule(swap_rounds=0))
    report("  its support, refitted", refitted, refitted.seconds)
    ours = {}
    choices: dict[str, dict[str, Any]] = {
        "pruning": {},
        "hard_concrete": {"method": "hard_concrete"},
        "pruning, absolute loss": {"loss": "mape"},
    }
    for name, choice in choices.items():
        start = time.process_time()
        result = calibrate(problem, number, seed=seed, **choice)
        report(f"  {name}", result, time.process_time() - start)
        ours[name] = result.diagnostics
    error, ess = ours["pruning"]["mean_are"], ours["pruning"]["ess"]
    return error / theirs["mean_are"], error / refitted.diagnostics["mean_are"], ess / theirs["ess"]


def stress_problem(seed: int) -> CalibrationProblem:
    """2,000 targets met by half of 20,000 households, a tenth of the entries non-zero, all at random."""
    rng = np.random.default_rng(seed)
    shape = (2_000, 20_000)
    dense = rng.lognormal(1.5, 0.25, shape).astype(np.float32) * (rng.random(shape) < 0.1)
    matrix = sp.csr_array(dense)
    truth = rng.lognormal(2.0, 1.0, shape[1])
    truth[rng.permutation(shape[1])[: shape[1] // 2]] = 0.0
    return CalibrationProblem(matrix, matrix.astype(np.float64) @ truth)


def bench_stress(seeds: int, prices: tuple[float, ...]) -> None:
    """The distributions of l0-python's own stress test, its model as its users run it, ours at its number."""
    for seed in range(seeds):
        problem = stress_problem(seed)
        for price in prices:
            theirs = fitted(problem, price, seed)
            if theirs is None:
                print("l0-python is not installed")
                return
            print(f"stress, seed {seed}, lambda {price:g}:", flush=True)
            compare(problem, theirs, seed)


def gated(problem: CalibrationProblem, model: Any, processor: float) -> dict[str, Any]:
    """Measure l0-python's weights in float64."""
    from sparsereg.calibration.measures import measure

    with torch.no_grad():
        weights = model.get_weights(deterministic=True).double().numpy()
    d = measure(problem, weights)
    line = (
        f"l0-python kept {d['kept']:,}  mean {d['mean_are']:.4%}  median {d['median_are']:.4%}"
        f"  ess {d['ess']:,.0f}  {processor:.1f} s processor"
    )
    return {**d, "weights": weights, "line": line}


def bench_lambda(prices: tuple[float, ...]) -> None:
    """Households that gates keep at a price, lambda_scale="mean", and pruning told the same number."""
    for households, targets in ((5_000, 600), (20_000, 2_000)):
        problem = synthetic_problem(households, targets)
        for price in prices:
            gates = calibrate(problem, lambda_l0=price, lambda_scale="mean")
            told = calibrate(problem, gates.num_kept)
            print(
                f"{households:>6,} x {targets:>5,}  mean {price:<6g} sum {price * targets / households:<8.3g}"
                f" kept {gates.num_kept:>6,} {gates.num_kept / households:6.1%}"
                f"  error {gates.diagnostics['mean_are']:8.3%}  pruning {told.diagnostics['mean_are']:8.3%}",
                flush=True,
            )


def bench_huge() -> None:
    """One million households, sixty million entries: a random matrix, to see time and memory."""
    rng = np.random.default_rng(0)
    households, targets, per_household = 1_000_000, 30_000, 60
    indices = rng.integers(0, targets, households * per_household, dtype=np.int32)
    data = rng.lognormal(size=len(indices)).astype(np.float32)
    indptr = np.arange(0, len(indices) + 1, per_household, dtype=np.int32)
    by_household = sp.csr_array((data, indices, indptr), shape=(households, targets))
    matrix = sp.csr_array(by_household.T.tocsr())
    del by_household, indices, data
    truth = rng.lognormal(size=households)
    problem = CalibrationProblem(matrix, matrix.astype(np.float64) @ truth)
    result = calibrate(problem, 50_000)
    report("huge pruning", result, result.seconds)


def bench_exact(repeats: int) -> None:
    """``method="calibrate"`` by distance: processor seconds, worst error over the scale, Newton's steps."""
    problem = synthetic_problem(280_000, 520, disagreement=0.0)
    calibrate(synthetic_problem(500, 50, disagreement=0.0), method="calibrate")  # compile
    _ = problem.matrix_t, problem.scale
    for distance, bounds in (("linear", None), ("raking", None), ("logit", (0.05, 10.0))):
        times = []
        for _ in range(repeats):
            start = time.process_time()
            result = calibrate(problem, method="calibrate", distance=distance, bounds=bounds)
            times.append(time.process_time() - start)
        assert result.exact is not None
        error, steps = result.exact.error, result.exact.steps
        print(f"{distance}: {statistics.median(times):.2f} s, error {error:.1e}, {steps} steps", flush=True)


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["epoch", "calls", "quality", "stress", "lambda", "huge", "exact"])
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--disagreement", type=float, default=0.01)
    parser.add_argument("--lambdas", nargs="+", type=float, default=list(LAMBDAS))
    args = parser.parse_args()
    print(f"torch {torch.__version__}, numpy {np.__version__}, {torch.get_num_threads()} threads", flush=True)
    if args.what == "exact":
        bench_exact(args.repeats)
    elif args.what == "epoch":
        bench_epoch(args.sizes, args.repeats)
    elif args.what == "calls":
        bench_calls(args.sizes, args.repeats)
    elif args.what == "quality":
        bench_quality(args.seeds, args.disagreement, tuple(args.lambdas))
    elif args.what == "stress":
        bench_stress(args.seeds, tuple(args.lambdas))
    elif args.what == "lambda":
        bench_lambda((0.01, 0.1, 0.3, 1.0, 3.0))
    else:
        bench_huge()


if __name__ == "__main__":
    main()
