"""Exact calibration with the households shared out to processes, beside one process on all of them.

    python -m benchmarks.shared                            100,000 households x 500 targets, two processes
    python -m benchmarks.shared --households 300000 --targets 1000 --processes 2
    python -m benchmarks.shared --gates 200        gates and the refit of who is kept, so many epochs

One thread each; of gates one process has as many threads as there are processes. Processor seconds of the
solution without reading, the bytes that a process sends into sums of the group, how many of them, and the
largest difference of weights.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from sparsereg.calibration import CalibrationProblem, calibrate, synthetic_problem
from sparsereg.calibration.config import Settings
from sparsereg.calibration.solver.shared import calibrate_shared
from sparsereg.calibration.solver.shared_selection import select_shared


def problem_of(households: int, targets: int) -> CalibrationProblem:
    """The built-in survey with targets that can be met."""
    p = synthetic_problem(households, targets)
    true = p.starting_weights * np.random.default_rng(0).lognormal(0, 0.2, households)
    return p.with_targets(targets=p.matrix.astype(np.float64) @ true)


def gates(epochs: int) -> Settings:
    """Gates that shut most households."""
    return Settings(lambda_l0=0.3, lambda_scale="mean", epochs=epochs)


def work(rank: int, size: int, households: int, targets: int, folder: str, epochs: int) -> None:
    """What each process does."""
    torch.set_num_threads(1)
    place = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=place, rank=rank, world_size=size)
    p = problem_of(households, targets)
    own = np.array_split(np.arange(households), size)[rank]
    part = CalibrationProblem(p.matrix[:, own], p.targets, p.starting_weights[own])
    sent: list[int] = []
    reduce = dist.all_reduce

    def counted(values: torch.Tensor, *args: object, **how: object) -> object:
        sent.append(values.numel() * values.element_size())
        return reduce(values, *args, **how)  # type: ignore[arg-type]

    dist.all_reduce = counted
    dist.barrier()
    begin, wall = time.process_time(), time.perf_counter()
    if epochs:
        found = select_shared(part, gates(epochs), "hard_concrete")
    else:
        found = calibrate_shared(part, "raking")
    np.savez(
        f"{folder}/{rank}.npz", weights=found.weights, seconds=time.process_time() - begin,
        wall=time.perf_counter() - wall, sent=np.array(sent), steps=found.steps,
    )  # fmt: skip
    dist.destroy_process_group()


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--households", type=int, default=100_000)
    parser.add_argument("--targets", type=int, default=500)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--gates", type=int, default=0, help="epochs of gates instead of exact calibration")
    args = parser.parse_args()
    torch.set_num_threads(args.processes if args.gates else 1)
    p = problem_of(args.households, args.targets)
    calibrate(synthetic_problem(500, 50), method="calibrate")  # compile
    calibrate(synthetic_problem(500, 50), lambda_l0=1e-3, epochs=20)
    begin, wall = time.process_time(), time.perf_counter()
    how = dict(vars(gates(args.gates))) if args.gates else {"method": "calibrate", "distance": "raking"}
    alone = calibrate(p, **how)
    print(
        f"{args.households:,} x {p.num_targets:,}, {p.matrix.nnz:,} entries; one process:"
        f" {time.process_time() - begin:.2f} s processor, {time.perf_counter() - wall:.2f} s on the clock,"
        f" {alone.steps} steps",
        flush=True,
    )
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(
            work, (args.processes, args.households, args.targets, folder, args.gates), nprocs=args.processes
        )
        parts = [np.load(Path(folder) / f"{rank}.npz") for rank in range(args.processes)]
        weights = np.concatenate([part["weights"] for part in parts])
        kept = (weights > 0) & (alone.weights > 0)
        off = np.abs(weights - alone.weights)[kept].max()
        seconds = [float(part["seconds"]) for part in parts]
        sent, steps = parts[0]["sent"] / 1e6, int(parts[0]["steps"])
        print(
            f"{args.processes} processes: {max(seconds):.2f} s processor in the slowest, {sum(seconds):.2f} s"
            f" in all, {max(float(part['wall']) for part in parts):.2f} s on the clock, {steps} steps;"
            f" {sent.sum():.1f} MB in {len(sent)} sums, {sent.sum() / max(steps, 1):.2f} MB a step;"
            f" {np.count_nonzero((weights > 0) != (alone.weights > 0))} of {alone.num_kept:,} kept differ,"
            f" weights by {off / alone.weights.mean():.1e} of the mean"
        )


if __name__ == "__main__":
    main()
