"""Asked so many milliseconds, got so many: budgets of networks in runtimes, measured again afterwards.

    python -m benchmarks.latency_budget --networks googlenet resnet18 --runtimes onnxruntime --batches 1 32

Gates get random places, as different as training makes them, and are then set so that the compacted
network takes a share of what lies between the smallest and the whole network. What ``meet`` measured is
compared with the target, and so is a second measurement with new sessions: plain medians of calls in turns
with the whole network. With one thread all times are the processor's.
"""

import argparse
import csv
import itertools
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn

import sparsereg
from sparsereg.compression import Accountant, compact, fuse
from sparsereg.compression.timing.measured import MeasuredBudget, Milliseconds
from sparsereg.compression.timing.runtimes import Loaders, batch_of, torch_threads
from sparsereg.compression.timing.times import seconds_of
from sparsereg.errors import InputError
from sparsereg.penalties import hard_concretes


def googlenet() -> tuple[nn.Module, Tensor]:
    """The GoogleNet of this package, a gate on every branch's channels, 32 x 32 pixels."""
    from sparsereg.model.googlenet import GoogleNet

    return GoogleNet(gate="all"), torch.zeros(1, 3, 32, 32)


def resnet18() -> tuple[nn.Module, Tensor]:
    """torchvision's, gated, 64 x 64 pixels."""
    import torchvision

    x = torch.zeros(1, 3, 64, 64)
    return sparsereg.gate(torchvision.models.resnet18(num_classes=10).eval(), x), x


def vit() -> tuple[nn.Module, Tensor]:
    """The vision transformer of this package, gated, 32 x 32 pixels in patches of 4."""
    from sparsereg.model.transformer import Shape
    from sparsereg.model.vit import ViT

    x = torch.zeros(1, 3, 32, 32)
    return sparsereg.gate(ViT(10, (3, 32, 32), 4, Shape(width=192, depth=6, heads=6)).eval(), x), x


def lenet5() -> tuple[nn.Module, Tensor]:
    """LeNet-5-Caffe, gated on its units."""
    from sparsereg.model.lenet import LeNet5

    return LeNet5(10, (1, 28, 28), gate="units"), torch.zeros(1, 1, 28, 28)


NETWORKS = {"googlenet": googlenet, "resnet18": resnet18, "vit": vit, "lenet5": lenet5}


@torch.no_grad()
def spread_gates(net: nn.Module, seed: int) -> None:
    """Give gates random places."""
    generator = torch.Generator().manual_seed(seed)
    for gate in hard_concretes(net).values():
        gate.log_alpha.copy_(2 * torch.randn(gate.log_alpha.shape, generator=generator))


def cases(
    name: str, runtime: str, batch: int, shares: list[float], threads: int, seed: int
) -> list[dict[str, object]]:
    """Meet budgets of one network in one runtime.

    Args:
        name: of the network.
        runtime: where it runs.
        batch: examples in a call.
        shares: of the time between the smallest and the whole network.
        threads: that may compute.
        seed: of the gates.
    """
    torch.manual_seed(seed)
    net, x = NETWORKS[name]()
    net.eval()
    spread_gates(net, seed)
    accountant = Accountant(net, x)
    cost = Milliseconds(accountant, x, runtime, threads, batch)
    try:
        MeasuredBudget(accountant, cost, 1e-9, x)  # says what the smallest network takes
    except InputError as error:
        print(f"# {name}, {runtime}: {error}", flush=True)
    whole = fuse(compact(opened(net), x, check=False))
    rows = []
    for share in shares:
        spread_gates(net, seed)
        asked = cost.floor + share * (cost.full - cost.floor)
        start = time.perf_counter()
        budget = MeasuredBudget(accountant, cost, asked, x)
        budget.meet()
        seconds = time.perf_counter() - start
        small = fuse(compact(net, x))
        again = median_ms([whole, small], x, runtime, threads, batch)[1]
        assert budget.reached is not None
        rows.append(
            {
                "network": name,
                "runtime": runtime,
                "batch": batch,
                "threads": threads,
                "whole_ms": round(cost.full, 3),
                "smallest_ms": round(cost.floor, 3),
                "asked_ms": round(asked, 3),
                "got_ms": round(budget.reached, 3),
                "miss": round(budget.reached / asked - 1, 4),
                "again_ms": round(again, 3),
                "again_miss": round(again / asked - 1, 4),
                "parameters_left": round(1 - accountant.exact_sparsity(), 4),
                "seconds": round(seconds, 1),
            }
        )
        print(rows[-1], flush=True)
    return rows


@torch.no_grad()
def opened(net: nn.Module) -> nn.Module:
    """The network with all gates open, in place."""
    for gate in hard_concretes(net).values():
        gate.log_alpha.fill_(20.0)
    return net


def median_ms(
    networks: list[nn.Module], example: Tensor, runtime: str, threads: int, batch: int, seconds: float = 8.0
) -> list[float]:
    """Plain medians of calls in turns, in sessions of their own."""
    x = batch_of(example, batch)
    with torch_threads(threads), torch.inference_mode():
        loaded = [Loaders(example, threads).load(network, runtime) for network in networks]
        given = [one.prepare(x) for one in loaded]
        taken: list[list[float]] = [[] for _ in networks]
        end = time.perf_counter() + seconds
        while len(taken[0]) < 33 or time.perf_counter() < end:
            for one, inputs, times in zip(loaded, given, taken, strict=True):
                times.append(seconds_of(one, inputs, threads))
    return [statistics.median(times[3:]) * 1e3 for times in taken]


def main() -> None:
    """Run all cases and write them as a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--runtimes", nargs="+", default=["onnxruntime"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 32])
    parser.add_argument("--shares", nargs="+", type=float, default=[0.3, 0.6])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    rows = []
    for name, runtime, batch in itertools.product(given.networks, given.runtimes, given.batches):
        rows += cases(name, runtime, batch, given.shares, given.threads, given.seed)
    with given.out.open("w", newline="") if given.out else sys.stdout as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
