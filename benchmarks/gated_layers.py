"""Time of gated layers and sparse regression, beside l0-python where that is installed.

    python -m benchmarks.gated_layers [--rounds 15] [--threads 2] [--large]

Prints one Markdown table: medians of forward + backward in milliseconds (for SparseL0Linear of five
epochs of fit), and the median over rounds of the ratio of the two, timed one right after the other.
``--large`` adds 10^6 rows x 10^4 columns with 10^8 non-zeros, for sparsereg alone, with the peak memory.
"""

import argparse
import os
import platform
import resource
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import torch
from scipy import sparse
from torch import Tensor, nn

import sparsereg

try:
    import l0
except ImportError:
    l0 = None


EPOCHS = 5
"""Epochs of sparse regression in one measurement."""


@dataclass
class Case:
    """One row: how to make a step of either library.

    Attributes:
        name: what is timed.
        make: library to a function that does one step.
        repeats: steps for each measurement.
    """

    name: str
    make: Callable[[ModuleType], Callable[[], object]]
    repeats: int = 1


def step(layer: nn.Module, x: Tensor, penalty: bool = False) -> Callable[[], object]:
    """Forward and backward of a layer, with the L0 penalty in the loss if asked for."""
    upstream = torch.randn_like(layer(x))

    def run() -> None:
        layer.zero_grad(set_to_none=True)
        output = layer(x)
        if penalty:
            loss = (output * upstream).sum() + 1e-3 * layer.get_l0_penalty()
            loss.backward()
        else:
            output.backward(upstream)

    return run


def fit(library: ModuleType, x: sparse.csr_matrix, y: Tensor) -> Callable[[], object]:
    """Epochs of sparse regression; the first call of fit, with what it prepares once, is not timed."""
    model = library.SparseL0Linear(x.shape[1])
    model.fit(x, y, epochs=1)
    return lambda: model.fit(x, y, epochs=EPOCHS)


def sparse_problem(rows: int, columns: int, each: int) -> tuple[sparse.csr_matrix, Tensor]:
    """A matrix with ``each`` standard normal values in every row, and a target that 20 columns make."""
    rng = np.random.default_rng(0)
    indices = rng.integers(0, columns, (rows, each), dtype=np.int32)
    indices.sort(axis=1)
    values = rng.standard_normal(rows * each, dtype=np.float32)
    pointer = np.arange(0, rows * each + 1, each, dtype=np.int32)
    x = sparse.csr_matrix((values, indices.reshape(-1), pointer), shape=(rows, columns))
    x.has_canonical_format = True
    b = np.zeros(columns, dtype=np.float32)
    b[rng.choice(columns, 20, replace=False)] = rng.choice([-3, -2, -1, 1, 2, 3], 20)
    return x, torch.from_numpy((x @ b + 0.1 * rng.standard_normal(rows)).astype(np.float32))


def cases() -> list[Case]:
    """All rows of the table."""
    narrow, wide = sparse_problem(50_000, 1000, 100), sparse_problem(500_000, 10_000, 10)
    images = torch.randn(32, 64, 28, 28)

    def linear(n_in: int, n_out: int, batch: int, penalty: bool = False) -> Callable[[ModuleType], Any]:
        return lambda m: step(m.L0Linear(n_in, n_out), torch.randn(batch, n_in), penalty)

    rows: list[tuple[str, Callable[[ModuleType], Callable[[], object]], int]] = [
        ("L0Linear 784 x 256, batch 128", linear(784, 256, 128), 20),
        ("the same with the penalty", linear(784, 256, 128, True), 20),
        ("L0Linear 4096 x 4096, batch 64", linear(4096, 4096, 64), 1),
        ("the same with the penalty", linear(4096, 4096, 64, True), 1),
        ("L0Conv2d 64 to 128, 3 x 3, 28 x 28, batch 32", lambda m: step(m.L0Conv2d(64, 128, 3), images), 1),
        ("the same, structured", lambda m: step(m.L0Conv2d(64, 128, 3, structured=True), images), 1),
        ("L0DepthwiseConv2d 64, 3 x 3", lambda m: step(m.L0DepthwiseConv2d(64, 3), images), 1),
        ("SparseMLP 784-256-256-10, batch 128", lambda m: step(m.SparseMLP(), torch.randn(128, 784)), 10),
        (f"SparseL0Linear, {EPOCHS} epochs, 50,000 x 1,000, 5 M non-zeros", lambda m: fit(m, *narrow), 1),
        (f"SparseL0Linear, {EPOCHS} epochs, 500,000 x 10,000, 5 M non-zeros", lambda m: fit(m, *wide), 1),
    ]
    return [Case(*row) for row in rows]


def milliseconds(run: Callable[[], object], repeats: int) -> float:
    """Time of one run, the mean over ``repeats``."""
    begin = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - begin) / repeats * 1e3


def compare(case: Case, rounds: int) -> str:
    """One row of the table."""
    ours = case.make(sparsereg)
    theirs = case.make(l0) if l0 is not None else None
    milliseconds(ours, 1)
    times: list[tuple[float, float]] = []
    for _ in range(rounds):
        a = milliseconds(ours, case.repeats)
        times.append((a, milliseconds(theirs, case.repeats) if theirs else float("nan")))
    mine, other = (statistics.median(column) for column in zip(*times, strict=True))
    ratio = statistics.median(b / a for a, b in times)
    if theirs is None:
        return f"| {case.name} | {mine:.2f} | | |"
    return f"| {case.name} | {mine:.2f} | {other:.2f} | {ratio:.1f} |"


def large() -> str:
    """Sparse regression with 10^8 non-zeros: seconds for each epoch and peak memory."""
    x, y = sparse_problem(1_000_000, 10_000, 100)
    model = sparsereg.SparseL0Linear(x.shape[1], seed=0)
    model.fit(x, y, epochs=1)
    seconds = milliseconds(lambda: model.fit(x, y, epochs=10), 1) / 1e4
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return f"10^6 x 10^4, 10^8 non-zeros: {seconds:.3f} s for each epoch, peak memory {peak:.1f} GiB"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--large", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    warnings.simplefilter("ignore")  # l0-python's sparse tensors warn on every call
    machine = f"{platform.machine()}, {options.threads} threads"
    print(f"torch {torch.__version__}, {machine}, {options.rounds} rounds")
    print("\n| forward + backward | sparsereg, ms | l0-python, ms | times faster |")
    print("| --- | --- | --- | --- |")
    for case in cases():
        print(compare(case, options.rounds), flush=True)
    if l0 is None:
        print("\nl0-python is not installed: its columns are empty.")
    if options.large:
        print("\n" + large())


if __name__ == "__main__":
    main()
