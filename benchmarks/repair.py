"""What one shot costs and how much of it a repair without labels wins back, on five small networks.

    python -m benchmarks.repair [--networks lenet300 lenet5 googlenet vit gpt] [--kept 0.5] [--mnist FILE.npz]

Each network is trained without gates, shrunk to a share of its multiply-accumulates with and without the
repair, and tested on images (or text) that neither saw. Won back is (repaired - not repaired) / (dense - not
repaired). MNIST as arrays train_images, train_labels, test_images, test_labels; the digits are
scikit-learn's, the text is the source of Python's standard library.
"""

import argparse
import sysconfig
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsereg import shrink
from sparsereg.data.digits import Digits
from sparsereg.model.googlenet import GoogleNet
from sparsereg.model.gpt import GPT
from sparsereg.model.lenet import LeNet5, LeNet300
from sparsereg.model.transformer import Shape
from sparsereg.model.vit import ViT

CONTEXT = 64


@dataclass
class Data:
    """Inputs and answers; (examples, ...)."""

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def digits(size: int) -> Data:
    """Digits of 8 x 8 pixels, enlarged."""
    d = Digits(size).load()
    mean, std = d.train_images.float().mean(), d.train_images.float().std()
    return Data(
        ((d.train_images.float() - mean) / std, d.train_labels),
        ((d.test_images.float() - mean) / std, d.test_labels),
    )


def mnist(path: Path) -> Data:
    """Handwritten digits of 28 x 28 pixels."""
    raw = np.load(path)
    parts = []
    for part in ("train", "test"):
        images = torch.from_numpy(raw[f"{part}_images"]).float()[:, None] / 255
        parts.append(((images - 0.1307) / 0.3081, torch.from_numpy(raw[f"{part}_labels"]).long()))
    return Data(*parts)


def text() -> Data:
    """Windows of bytes, and the byte that follows each; the last files of the list are for the test."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    parts = []
    for some in (files[: -len(files) // 5], files[-len(files) // 5 :]):
        data = torch.frombuffer(bytearray(b"".join(f.read_bytes() for f in some)), dtype=torch.uint8).long()
        windows = data[: len(data) // (CONTEXT + 1) * (CONTEXT + 1)].view(-1, CONTEXT + 1)
        parts.append((windows[:, :-1].contiguous(), windows[:, 1:].contiguous()))
    test = tuple(x[:: max(1, len(x) // 1000)] for x in parts[1])
    return Data(parts[0], (test[0], test[1]))


@dataclass
class Case:
    """A network, its data and how long it is trained."""

    data: Callable[[], Data]
    network: Callable[[], nn.Module]
    steps: int
    batch: int


def cases(mnist_file: Path) -> dict[str, Case]:
    """The networks by name."""
    return {
        "lenet300": Case(lambda: mnist(mnist_file), lambda: LeNet300(gate="none"), 1400, 128),
        "lenet5": Case(lambda: mnist(mnist_file), lambda: LeNet5(gate="none"), 500, 128),
        "googlenet": Case(lambda: digits(16), lambda: GoogleNet(10, 1, gate="none"), 60, 64),
        "vit": Case(
            lambda: digits(16),
            lambda: ViT(10, (1, 16, 16), 4, Shape(width=64, depth=3, heads=4)),
            500,
            64,
        ),
        "gpt": Case(text, lambda: GPT(256, CONTEXT, Shape(width=96, depth=3, heads=4), tied=False), 700, 32),
    }


def train(net: nn.Module, case: Case, data: Data, seed: int) -> nn.Module:
    """Train with Adam, whose rate falls along a cosine."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(net.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=case.steps)
    x, y = data.train
    net.train()
    for _ in range(case.steps):
        chosen = torch.randint(len(x), (case.batch,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(net(x[chosen]).flatten(0, -2), y[chosen].flatten()).backward()
        optimizer.step()
        schedule.step()
    return net.eval()


@torch.no_grad()
def figure(net: nn.Module, data: Data) -> float:
    """Share of right answers; of bytes for a text."""
    x, y = data.test
    right = [
        (net(a).argmax(-1) == b).double().mean() for a, b in zip(x.split(500), y.split(500), strict=True)
    ]
    weights = torch.tensor([len(a) for a in x.split(500)], dtype=torch.float64)
    return float((torch.stack(right) * weights).sum() / weights.sum())


def main() -> None:
    """Print a row for each network."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", nargs="+", default=["lenet300", "lenet5", "googlenet", "vit", "gpt"])
    parser.add_argument("--kept", type=float, default=0.5)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--importance", default="leftover")
    parser.add_argument("--mnist", type=Path, default=Path("mnist.npz"))
    given = parser.parse_args()
    print(
        f"{'network':10s} {'seed':>4s} {'dense':>7s} {'shrunk':>7s} {'repaired':>8s} {'won back':>8s} seconds"
    )
    for name in given.networks:
        case = cases(given.mnist)[name]
        for seed in given.seeds:
            torch.manual_seed(seed)
            data = case.data()
            net = train(case.network(), case, data, seed)
            dense = figure(net, data)
            found, seconds = [], 0.0
            for repair in (False, True):
                start = time.perf_counter()
                small = shrink(
                    net, data.train[0], given.kept, repair=repair, importance=given.importance, progress=False
                )
                seconds = time.perf_counter() - start
                found.append(figure(small, data))
            back = (found[1] - found[0]) / (dense - found[0]) if dense != found[0] else 1.0
            figures = f"{dense:7.4f} {found[0]:7.4f} {found[1]:8.4f} {back:8.0%} {seconds:7.1f}"
            print(f"{name:10s} {seed:4d} {figures}", flush=True)


if __name__ == "__main__":
    main()
