"""What training wins back: answers and layers of the network before its gates, and a target in stages.

    python -m benchmarks.won_back --networks lenet5 vit googlenet --seeds 0 1 2

A network is trained without gates on scikit-learn's digits. Then gates remove a share of its parameters, and
what is left is trained further; every way has the same steps:

    none      labels alone
    logits    half of the loss from the answers of the network itself before gates, at a temperature of 2
    layers    the same, and a tenth of the mean squared difference of each layer that feeds gated units (or
              block) to what it gave before, over its variance; channels that are shut do not count
    stages    labels alone; the target is met three times on the way, each time compacted and repaired in
              closed form, and new gates are put in

Accuracy and cross-entropy on the test images. The table grows row by row; a call that is repeated goes on
where it stopped.
"""

import argparse
import copy
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.repair import Data, digits
from benchmarks.rows import append, done
from sparsereg import Sparsifier
from sparsereg.compression import compact
from sparsereg.compression.oneshot.repair import repaired
from sparsereg.model.batch_norm_statistics import estimate_batch_norm_
from sparsereg.model.googlenet import GoogleNet, InceptionBlock
from sparsereg.model.lenet import LeNet5
from sparsereg.model.transformer import Shape
from sparsereg.model.vit import ViT
from sparsereg.penalties import hard_concretes

BATCH, STAGES, TEMPERATURE, SHARE, LAYERS = 64, 3, 2.0, 0.5, 0.1
WAYS = ("none", "logits", "layers", "stages")


@dataclass
class Case:
    """A network, what is removed of it, and how long it is trained without, with and after gates."""

    image_size: int
    network: Callable[[], nn.Module]
    sparsity: float
    lr: float
    steps: tuple[int, int, int]
    layers: Callable[[nn.Module], list[nn.Module]]


CASES = {
    "lenet5": Case(
        16,
        lambda: LeNet5(10, (1, 16, 16), gate="none"),
        0.95,
        2e-3,
        (300, 500, 200),
        lambda net: [net.get_submodule(name) for name in ("conv1", "conv2", "fc1")],
    ),
    "vit": Case(
        16,
        lambda: ViT(10, (1, 16, 16), 4, Shape(width=64, depth=3, heads=4)),
        0.9,
        2e-3,
        (400, 500, 200),
        lambda net: list(net.get_submodule("blocks").children()),
    ),
    "googlenet": Case(
        8,
        lambda: GoogleNet(10, 1, gate="none"),
        0.93,
        4e-3,
        (100, 200, 80),
        lambda net: [m for m in net.modules() if isinstance(m, InceptionBlock)],
    ),
}


class Heard:
    """What layers gave last."""

    def __init__(self, layers: list[nn.Module]) -> None:
        self.outputs: list[Tensor] = [torch.empty(0)] * len(layers)
        for i, layer in enumerate(layers):
            layer.register_forward_hook(lambda _, __, y, i=i: self.outputs.__setitem__(i, y))


def shifted(x: Tensor, generator: torch.Generator) -> Tensor:
    """A batch of images moved by up to a pixel."""
    row, column = torch.randint(3, (2,), generator=generator).tolist()
    size = x.shape[-1]
    padded = F.pad(x, (1, 1, 1, 1), mode="replicate")
    return padded[..., row : row + size, column : column + size]


def batch(data: Data, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random images and their labels."""
    chosen = torch.randint(len(data.train[0]), (BATCH,), generator=generator)
    return shifted(data.train[0][chosen], generator), data.train[1][chosen]


def divergence(learned: Tensor, taught: Tensor) -> Tensor:
    """T^2 KL(teacher || pupil)."""
    a, b = (F.log_softmax(x / TEMPERATURE, 1) for x in (learned, taught))
    return TEMPERATURE**2 * F.kl_div(a, b, reduction="batchmean", log_target=True)


def difference(mine: list[Tensor], theirs: list[Tensor]) -> Tensor:
    """Mean over layers of what open channels differ by, over the variance of the teacher's."""
    parts = []
    for s, t in zip(mine, theirs, strict=True):
        axis = 1 if s.dim() == 4 else s.dim() - 1
        others = [d for d in range(s.dim()) if d != axis]
        alive = (s.detach().abs().amax(others) > 0).to(s)
        error = ((s - t) ** 2).mean(others)
        variance = t.var(others).mean() + 1e-6
        parts.append((error * alive).sum() / alive.sum().clamp(min=1) / variance)
    return torch.stack(parts).mean()


def loss_of(answers: Tensor, y: Tensor, x: Tensor, teacher: nn.Module | None) -> Tensor:
    """Cross-entropy of the labels, and beside it a teacher's answers where there is one."""
    loss = F.cross_entropy(answers, y)
    if teacher is None:
        return loss
    with torch.no_grad():
        taught = teacher(x)
    return (1 - SHARE) * loss + SHARE * divergence(answers, taught)


def plain(
    net: nn.Module, data: Data, steps: int, lr: float, generator: torch.Generator, teacher: nn.Module | None
) -> nn.Module:
    """Train a network without gates."""
    optimizer = torch.optim.AdamW(net.parameters(), lr, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    net.train()
    for _ in range(steps):
        x, y = batch(data, generator)
        loss = loss_of(net(x), y, x, teacher)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return net.eval()


def under_gates(
    net: nn.Module,
    case: Case,
    data: Data,
    steps: int,
    sparsity: float,
    seed: int,
    generator: torch.Generator,
    teacher: nn.Module | None = None,
    layers: bool = False,
) -> nn.Module:
    """Put gates in, train, and meet the target; BatchNorm as at test time."""
    start = Sparsifier(net, data.train[0][:2], steps=steps, target_sparsity=sparsity, seed=seed)
    model = start.model.train()
    if layers:
        assert teacher is not None
        mine, theirs = Heard(case.layers(model)), Heard(case.layers(teacher))
    optimizer = torch.optim.AdamW(start.parameter_groups(case.lr, weight_decay=1e-2))
    for _ in range(steps):
        x, y = batch(data, generator)
        loss = loss_of(model(x), y, x, teacher)
        if layers:
            loss = loss + LAYERS * difference(mine.outputs, theirs.outputs)
        optimizer.zero_grad()
        start.loss(loss).backward()
        optimizer.step()
        start.step()
    start.meet()
    estimate_batch_norm_(model.eval(), data.train[0].split(BATCH))
    return model.eval()


def in_stages(net: nn.Module, case: Case, data: Data, seed: int, generator: torch.Generator) -> nn.Module:
    """Meet the target in stages, repaired in closed form in between."""
    whole = sum(p.numel() for p in net.parameters())
    for stage in range(1, STAGES + 1):
        now = sum(p.numel() for p in net.parameters())
        sparsity = 1 - (1 - case.sparsity) ** (stage / STAGES) * whole / now
        after = under_gates(net, case, data, case.steps[1] // STAGES, sparsity, seed, generator)
        before = copy.deepcopy(after)
        with torch.no_grad():
            for gate in hard_concretes(before).values():
                gate.log_alpha.fill_(20.0)
        net = repaired(before, after, data.train[0][:2], data.train[0].split(BATCH), progress=False)
    return net


@torch.no_grad()
def tested(net: nn.Module, data: Data) -> tuple[float, float]:
    """Accuracy and cross-entropy on the test images."""
    x, y = data.test
    answers = net.eval()(x).double()
    return float((answers.argmax(1) == y).double().mean()), float(F.cross_entropy(answers, y))


def row(name: str, seed: int, way: str) -> dict[str, object]:
    """Train a network, remove a part of it in one of the ways, and test it."""
    case = CASES[name]
    data = digits(case.image_size)
    torch.manual_seed(seed)
    first = torch.Generator().manual_seed(seed)
    dense = plain(case.network(), data, case.steps[0], case.lr, first, None)
    teacher = copy.deepcopy(dense).requires_grad_(False) if way in ("logits", "layers") else None
    generator = torch.Generator().manual_seed(100 + seed)
    torch.manual_seed(seed)
    start = time.process_time()
    if way == "stages":
        small = in_stages(copy.deepcopy(dense), case, data, seed, generator)
    else:
        fresh, layers = copy.deepcopy(dense), way == "layers"
        model = under_gates(fresh, case, data, case.steps[1], case.sparsity, seed, generator, teacher, layers)
        small = compact(model, data.train[0][:2])
    untuned = tested(small, data)
    small = plain(small, data, case.steps[2], case.lr, generator, teacher)
    estimate_batch_norm_(small, data.train[0].split(BATCH))
    return {
        "network": name,
        "seed": seed,
        "way": way,
        "parameters": sum(p.numel() for p in small.parameters()),
        "dense": round(tested(dense, data)[0], 4),
        "before_tuning": round(untuned[0], 4),
        "accuracy": round(tested(small, data)[0], 4),
        "cross_entropy": round(tested(small, data)[1], 4),
        "cpu_seconds": round(time.process_time() - start, 1),
    }


def main() -> None:
    """Make what is not in the table yet."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("won_back.csv"))
    given = parser.parse_args()
    have = {(r["network"], r["seed"], r["way"]) for r in done(given.out)}
    for name, seed, way in itertools.product(given.networks, given.seeds, given.ways):
        if (name, str(seed), way) in have:
            continue
        made = row(name, seed, way)
        append(given.out, [made])
        print(*made.values(), flush=True)


if __name__ == "__main__":
    main()
