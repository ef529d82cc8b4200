"""Asked so many milliseconds, got so many: budgets of networks in runtimes, measured again afterwards.

    python -m benchmarks.latency_budget --networks googlenet resnet18 --runtimes onnxruntime --batches 1 32

Gates get random places, as different as training makes them, and are then set so that the compacted
network takes a share of what lies between the smallest and the whole network. What ``meet`` measured is
compared with the target, and so is a second measurement: plain medians of calls in a row, in new sessions.
The whole network is measured again, too: how far it is off then is the machine's doing, and how far single
sessions scatter is what one measurement is worth. With one thread all times are the processor's. The table
grows row by row; a call that is repeated goes on where it stopped.
"""

import argparse
import contextlib
import itertools
import math
import statistics
import time
from pathlib import Path

import torch
from torch import Tensor, nn

import sparsereg
from benchmarks.rows import append, done
from sparsereg.compression import Accountant, compact, fuse
from sparsereg.compression.timing.measured import MeasuredBudget, Milliseconds
from sparsereg.compression.timing.runtimes import Loaders, batch_of, torch_threads
from sparsereg.compression.timing.times import seconds_in_a_row
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


SESSIONS = 10
"""New sessions of the second measurement."""
NETWORKS = {"googlenet": googlenet, "resnet18": resnet18, "vit": vit, "lenet5": lenet5}


@torch.no_grad()
def spread_gates(net: nn.Module, seed: int) -> None:
    """Give gates random places."""
    generator = torch.Generator().manual_seed(seed)
    for gate in hard_concretes(net).values():
        gate.log_alpha.copy_(2 * torch.randn(gate.log_alpha.shape, generator=generator))


class Once(Milliseconds):
    """Measures the whole network and the smallest one once, however many budgets are made with it."""

    def fit(self, whole: nn.Module, smallest: nn.Module) -> None:
        """Measure them, unless that was done."""
        if math.isnan(self.full):
            super().fit(whole, smallest)


def case(
    name: str, runtime: str, batch: int, share: float, threads: int, seed: int
) -> dict[str, str | int | float]:
    """Meet a budget of one network in one runtime.

    Args:
        name: of the network.
        runtime: where it runs.
        batch: examples in a call.
        share: of the time between the smallest and the whole network.
        threads: that may compute.
        seed: of the gates.
    """
    torch.manual_seed(seed)
    net, x = NETWORKS[name]()
    net.eval()
    spread_gates(net, seed)
    accountant = Accountant(net, x)
    start = time.process_time()
    cost = Once(accountant, x, runtime, threads, batch)
    with contextlib.suppress(InputError):  # it says what the smallest network takes
        MeasuredBudget(accountant, cost, 1e-9, x)
    asked = cost.floor + share * (cost.full - cost.floor)
    budget = MeasuredBudget(accountant, cost, asked, x)
    budget.meet()
    seconds = time.process_time() - start
    small = fuse(compact(net, x))
    left = 1 - accountant.exact_sparsity()
    whole = fuse(compact(opened(net), x, check=False))
    again, reference = (sessions(network, x, runtime, threads, batch) for network in (small, whole))
    got = budget.reached
    assert got is not None
    return {
        "network": name,
        "runtime": runtime,
        "batch": batch,
        "share": share,
        "threads": threads,
        "seed": seed,
        "whole_ms": round(cost.full, 3),
        "smallest_ms": round(cost.floor, 3),
        "asked_ms": round(asked, 3),
        "got_ms": round(got, 3),
        "miss": round(got / asked - 1, 4),
        "again_ms": round(statistics.median(again), 3),
        "again_miss": round(statistics.median(again) / asked - 1, 4),
        "whole_again": round(statistics.median(reference) / cost.full - 1, 4),
        "scatter": round(statistics.stdev(again) / statistics.mean(again), 4),
        "whole_scatter": round(statistics.stdev(reference) / statistics.mean(reference), 4),
        "parameters_left": round(left, 4),
        "cpu_seconds": round(seconds, 1),
    }


@torch.no_grad()
def opened(net: nn.Module) -> nn.Module:
    """The network with all gates open, in place."""
    for gate in hard_concretes(net).values():
        gate.log_alpha.fill_(20.0)
    return net


def sessions(
    network: nn.Module, example: Tensor, runtime: str, threads: int, batch: int, seconds: float = 0.5
) -> list[float]:
    """Plain medians of calls in a row, in milliseconds, in new sessions that all stay alive."""
    x = batch_of(example, batch)
    found, alive = [], []
    loaders = Loaders(example, threads)
    with torch_threads(threads), torch.inference_mode():
        for _ in range(SESSIONS):
            alive.append(loaders.anew(network, runtime))
            given = alive[-1].prepare(x)
            found.append(1e3 * seconds_in_a_row(alive[-1], given, threads, seconds))
    return found


def main() -> None:
    """Run the cases that are not in the table yet, and write each as soon as it is measured."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--runtimes", nargs="+", default=["onnxruntime"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 32])
    parser.add_argument("--shares", nargs="+", type=float, default=[0.3, 0.6])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("latency_budget.csv"))
    given = parser.parse_args()
    key = ("network", "runtime", "batch", "share", "threads", "seed")
    have = {tuple(row[k] for k in key) for row in done(given.out)}
    asked = itertools.product(given.networks, given.runtimes, given.batches, given.shares)
    for one in asked:
        if tuple(str(v) for v in (*one, given.threads, given.seed)) in have:
            continue
        row = case(*one, given.threads, given.seed)
        print(row, flush=True)
        append(given.out, [row])


if __name__ == "__main__":
    main()
