"""How near smaller networks come to the ideal, dense time x share of MACs left, by the widths that stay.

    python -m benchmarks.ideal --networks googlenet resnet18 vit --runtimes onnxruntime openvino --batches 32

Gates get random places, and are then set to a sparsity one by one, or in blocks of 8 and 16 of a layer
(``target.round_to``), so that the parameters are the same and the widths are not. Each network is timed in
float32 and, with ``--int8``, as a quantized file, beside the dense one in the same form. Networks take turns
of calls in a row; the time is the median over turns, with one thread the processor's. The table grows row by
row; a call that is repeated goes on where it stopped.
"""

import argparse
import copy
import itertools
import statistics
import tempfile
from pathlib import Path

import torch
from torch import Tensor, fx, nn

from benchmarks.latency_budget import NETWORKS, opened, spread_gates
from benchmarks.rows import append, done
from sparsereg.compression import Accountant, compact, fuse
from sparsereg.compression.budget import meet_
from sparsereg.compression.deploy import write_onnx
from sparsereg.compression.quantization import quantize
from sparsereg.compression.timing.runtimes import Loaded, Loaders, batch_of, torch_threads
from sparsereg.compression.timing.times import seconds_in_a_row
from sparsereg.training.accounting import PlainAccountant

TURNS, SECONDS = 5, 0.3
"""Turns of each network, and how long one takes at least."""


def networks(
    name: str, sparsity: float, blocks: list[int], seed: int
) -> tuple[dict[str, fx.GraphModule], Tensor]:
    """The dense network, and smaller ones of one sparsity by the size of the blocks.

    Args:
        name: of the network.
        sparsity: share of the parameters that go, in (0, 1).
        blocks: gates of a layer that open and shut together.
        seed: of the gates.
    """
    torch.manual_seed(seed)
    net, x = NETWORKS[name]()
    net.eval()
    found = {"dense": fuse(compact(opened(copy.deepcopy(net)), x, check=False))}
    for block in blocks:
        spread_gates(net, seed)
        meet_(Accountant(net, x), "parameters", 1 - sparsity, block)
        found[str(block)] = fuse(compact(net, x, check=False))
    return found, x


def loaded(network: nn.Module, x: Tensor, runtime: str, precision: str) -> Loaded:
    """A network that is ready to run, in floats or in 8-bit integers."""
    loaders = Loaders(x, 1)
    if precision == "float32":
        return loaders.load(network, runtime)
    with tempfile.TemporaryDirectory() as folder:
        path, small = Path(folder) / "n.onnx", Path(folder) / "n.int8.onnx"
        write_onnx(network, x, path)
        noise = torch.randn(64, *x.shape[1:], generator=torch.Generator().manual_seed(0))
        quantize(path, small, noise.split(16))
        return loaders.run_onnx(small.read_bytes(), runtime)


def rows(
    name: str, runtime: str, batch: int, precision: str, given: argparse.Namespace
) -> list[dict[str, str | int | float]]:
    """Time the networks of one kind in one runtime."""
    made, x = networks(name, given.sparsity, given.blocks, given.seed)
    example = batch_of(torch.randn(1, *x.shape[1:], generator=torch.Generator().manual_seed(0)), batch)
    costs = {block: PlainAccountant(network, x) for block, network in made.items()}
    with torch_threads(1), torch.inference_mode():
        ready = {block: loaded(network, x, runtime, precision) for block, network in made.items()}
        inputs = {block: one.prepare(example) for block, one in ready.items()}
        taken: dict[str, list[float]] = {block: [] for block in ready}
        for _, (block, one) in itertools.product(range(TURNS), ready.items()):
            taken[block].append(1e3 * seconds_in_a_row(one, inputs[block], 1, SECONDS))
    median = {block: statistics.median(times) for block, times in taken.items()}
    found: list[dict[str, str | int | float]] = []
    for block, cost in costs.items():
        left = cost.macs / costs["dense"].macs
        found.append(
            {
                "network": name,
                "runtime": runtime,
                "batch": batch,
                "precision": precision,
                "seed": given.seed,
                "blocks_of": block,
                "parameters_left": round(cost.parameters / costs["dense"].parameters, 4),
                "macs_left": round(left, 4),
                "ms": round(median[block], 3),
                "times_faster": round(median["dense"] / median[block], 2),
                "share_of_ideal": round(median["dense"] * left / median[block], 3),
            }
        )
    return found


def main() -> None:
    """Time what is not in the table yet."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=["googlenet", "resnet18", "vit"])
    parser.add_argument("--runtimes", nargs="+", default=["onnxruntime", "openvino"])
    parser.add_argument("--batches", nargs="+", type=int, default=[32])
    parser.add_argument("--blocks", nargs="+", type=int, default=[1, 8, 16])
    parser.add_argument("--sparsity", type=float, default=0.8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--int8", action="store_true", help="quantized files, too")
    parser.add_argument("--out", type=Path, default=Path("ideal.csv"))
    given = parser.parse_args()
    have = {(r["network"], r["runtime"], r["batch"], r["precision"], r["seed"]) for r in done(given.out)}
    precisions = ["float32", *["int8"] * given.int8]
    for one in itertools.product(given.networks, given.runtimes, given.batches, precisions):
        if tuple(str(v) for v in (*one, given.seed)) in have:
            continue
        found = rows(*one, given)
        append(given.out, found)
        for row in found:
            print(*row.values(), flush=True)


if __name__ == "__main__":
    main()
