"""Exact calibration with the households shared out to processes, beside one process on all of them.

    python -m benchmarks.shared                            100,000 households x 500 targets, two processes
    python -m benchmarks.shared --households 300000 --targets 1000 --processes 2
    python -m benchmarks.shared --gates 200        gates and the refit of who is kept, so many epochs
    python -m benchmarks.shared --areas 24 --cps DIR --households 50000    areas of benchmarks.areas
    python -m benchmarks.shared --areas 24 --cps DIR --joint    all levels at once

One thread each; of gates and areas one process has as many threads as there are processes. Processor seconds
of the solution without reading, the bytes that a process sends into sums of the group, how many of them, and
the largest difference of weights.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from benchmarks.areas import BOUNDS
from benchmarks.areas import problem_of as areas_of
from sparsereg.calibration import CalibrationProblem, calibrate, synthetic_problem
from sparsereg.calibration.config import Settings
from sparsereg.calibration.solver.areas import calibrate_areas
from sparsereg.calibration.solver.joint import calibrate_together
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


@dataclass(frozen=True)
class Task:
    """What is solved, by one process and by several."""

    households: int
    targets: int
    epochs: int
    areas: int
    joint: bool
    cps: Path

    def solve(self, rank: int, size: int) -> tuple[Callable[[], tuple[np.ndarray, int]], int]:
        """Make the problem and return what finds a process's weights and how many steps it took."""
        if self.areas:
            return self._areas(rank, size)
        p = problem_of(self.households, self.targets)
        if size == 1:
            how: dict[str, Any] = {"method": "calibrate", "distance": "raking"}
            how = dict(vars(gates(self.epochs))) if self.epochs else how
            return lambda: _found(calibrate(p, **how)), p.matrix.nnz
        own = np.array_split(np.arange(self.households), size)[rank]
        part = CalibrationProblem(p.matrix[:, own], p.targets, p.starting_weights[own])
        if self.epochs:
            return lambda: _found(select_shared(part, gates(self.epochs), "hard_concrete")), part.matrix.nnz
        return lambda: _found(calibrate_shared(part, "raking")), part.matrix.nnz

    def warm_up(self) -> None:
        """Solve a small one, which compiles and loads what is needed."""
        replace(
            self, households=2_000, targets=50, epochs=min(self.epochs, 20), areas=min(self.areas, 2)
        ).solve(0, 1)[0]()

    def _areas(self, rank: int, size: int) -> tuple[Callable[[], tuple[np.ndarray, int]], int]:
        p = areas_of(self.cps, self.households, self.areas)
        own = p.placement.shared_out(size)[rank]

        def found() -> tuple[np.ndarray, int]:
            if self.joint:
                made = list(calibrate_together(p, "linear", BOUNDS, areas=own))
            else:
                made = list(calibrate_areas(p, "linear", BOUNDS, own))
            return np.concatenate([area.weights for area in made]), max(area.steps for area in made)

        return found, p.measures.nnz * len(own)


def _found(result: Any) -> tuple[np.ndarray, int]:
    return result.weights, int(result.steps or 0)


def work(rank: int, size: int, task: Task, folder: str) -> None:
    """What each process does."""
    torch.set_num_threads(1)
    task.warm_up()
    place = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=place, rank=rank, world_size=size)
    solve, _ = task.solve(rank, size)
    sent: list[int] = []
    reduce = dist.all_reduce

    def counted(values: torch.Tensor, *args: object, **how: object) -> object:
        sent.append(values.numel() * values.element_size())
        return reduce(values, *args, **how)  # type: ignore[arg-type]

    dist.all_reduce = counted
    dist.barrier()
    begin, wall = time.process_time(), time.perf_counter()
    weights, steps = solve()
    np.savez(
        f"{folder}/{rank}.npz", weights=weights, seconds=time.process_time() - begin,
        wall=time.perf_counter() - wall, sent=np.array(sent), steps=steps,
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
    parser.add_argument("--areas", type=int, default=0, help="so many areas instead")
    parser.add_argument("--joint", action="store_true", help="areas, states and the nation at once, soft")
    parser.add_argument("--cps", type=Path, default=Path(), help="folder of cps_households.csv.gz")
    args = parser.parse_args()
    task = Task(args.households, args.targets, args.gates, args.areas, args.joint, args.cps)
    torch.set_num_threads(args.processes if args.gates or args.areas else 1)
    task.warm_up()
    solve, entries = task.solve(0, 1)
    begin, wall = time.process_time(), time.perf_counter()
    alone, steps = solve()
    one = time.process_time() - begin
    print(
        f"{entries:,} entries; one process, {torch.get_num_threads()} threads:"
        f" {one:.2f} s processor, {time.perf_counter() - wall:.2f} s on the clock, {steps} steps",
        flush=True,
    )
    os.environ["OMP_NUM_THREADS"] = "1"  # of BLAS in the processes, as torchrun sets it
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(work, (args.processes, task, folder), nprocs=args.processes)
        parts = [np.load(Path(folder) / f"{rank}.npz") for rank in range(args.processes)]
    weights = np.concatenate([part["weights"] for part in parts])
    kept = (weights > 0) & (alone > 0)
    off = np.abs(weights - alone)[kept].max()
    seconds = [float(part["seconds"]) for part in parts]
    sent, steps = parts[0]["sent"] / 1e6, int(parts[0]["steps"])
    print(
        f"{args.processes} processes: {max(seconds):.2f} s processor in the slowest, {sum(seconds):.2f} s"
        f" in all ({sum(seconds) / one:.2f} x), {max(float(part['wall']) for part in parts):.2f} s on the"
        f" clock, {steps} steps; {sent.sum():.1f} MB in {len(sent)} sums, {sent.sum() / max(steps, 1):.2f} MB"
        f" a step; {np.count_nonzero((weights > 0) != (alone > 0))} of {np.count_nonzero(alone):,} kept"
        f" differ, weights by {off / alone.mean():.1e} of the mean"
    )


if __name__ == "__main__":
    main()
