"""Gates under a target beside CoFi's way and one-shot pruning: a byte-level GPT and a ViT, three seeds.

    python -m benchmarks.against --mnist FILE.npz [--networks gpt vit] [--methods ...] [--seeds 0 1 2]
    python -m benchmarks.against --table                 what is in the table so far, as Markdown

For each seed a network is trained dense. Every method starts from it and makes the same number of steps
with the same batches, the same optimizer and the same gates (all families), for the same share of the
parameters to remove:

    sparsereg     `Sparsifier(data=...)`: one shot by what a repair leaves over, repaired in closed form on
                  inputs without labels, then all steps are fine-tuning
    gates         `Sparsifier` without data: gates learn what goes in a fifth of the steps, then the compacted
                  network trains on
    cofi          as Xia et al. 2022 (CoFi): two learnt multipliers of an equality constraint on the expected
                  size, a target that falls linearly, locations clamped, in the end as many of each tensor of
                  gates as are expected to be open, by rank; then the compacted network trains on
    magnitude     one shot by the size of weights (Li et al. 2017), then all steps are fine-tuning
    taylor        one shot by the derivative of the training loss (Molchanov et al. 2019), likewise

Both one-shot ways rank by worth over cost. Text: the source of Python's standard library, bits per byte on
files that no training saw; images: MNIST. Settings were chosen on validation data of seed 0, and the learning
rate, which all methods share, at each target for Taylor's way; test data are only written down. A row of the
table is a run; those that are there are not repeated.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsereg import Sparsifier, compact, gate
from sparsereg.compression.budget import meet_all_
from sparsereg.compression.count import Accountant
from sparsereg.compression.oneshot.importance import IMPORTANCE
from sparsereg.data.corpus import TextSource
from sparsereg.distributions import HardConcrete, shift
from sparsereg.files import write_atomically
from sparsereg.model.gpt import GPT
from sparsereg.model.transformer import Shape
from sparsereg.model.vit import ViT
from sparsereg.penalties import hard_concretes

COLUMNS = [
    *("network", "seed", "method", "target", "reached", "validation", "test"),
    *("dense_validation", "dense_test", "steps", "cpu_seconds"),
]
SPARSITIES = (0.5, 0.8, 0.95)
GATED_SHARE, COFI_SHARE = 0.2, 0.6
"""Of the steps, those under gates; in the others the compacted network trains on."""
REPAIRED_ON = 1024
"""Inputs, without labels, that one shot and its repair see."""
OPEN, NEARLY_OPEN = 8.0, 0.99
"""Location of a gate that is open, and the median at which worth is measured."""


@dataclass(frozen=True)
class Task:
    """A network, its data and how long it trains.

    Attributes:
        network: makes it.
        train: draws a batch of inputs and answers.
        validation: batches.
        test: batches.
        unit: of the figure: bits per byte (small is good) or accuracy.
        dense_steps: of the training before anything is removed.
        steps: of each method.
        rates: for each target the largest learning rate of a method.
    """

    network: Callable[[], nn.Module]
    train: Callable[[np.random.Generator], tuple[Tensor, Tensor]]
    validation: list[tuple[Tensor, Tensor]]
    test: list[tuple[Tensor, Tensor]]
    unit: str
    dense_steps: int
    steps: int
    rates: Mapping[float, float]

    @property
    def example(self) -> Tensor:
        """Two inputs."""
        return self.validation[0][0][:2]


# ---- networks and data


def text(context: int, batch: int, windows: int) -> dict[str, object]:
    """Bytes of the standard library's source: windows that are drawn, and others side by side."""
    corpus = TextSource().load(0.05, 0.05, 0, context)

    def pairs(found: np.ndarray) -> tuple[Tensor, Tensor]:
        ids = torch.from_numpy(found.astype(np.int64))
        return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    def train(generator: np.random.Generator) -> tuple[Tensor, Tensor]:
        return pairs(corpus.train.windows(corpus.train.drawn(batch, context, generator), context))

    parts = {}
    for name, part in (("validation", corpus.val), ("test", corpus.test)):
        starts = part.in_turn(windows, context)
        parts[name] = [pairs(part.windows(s, context)) for s in np.array_split(starts, -(-len(starts) // 32))]
    return {"train": train, **parts}


def images(path: Path, batch: int, validating: int) -> dict[str, object]:
    """MNIST's: some of the training images, drawn once, validate."""
    raw = np.load(path)

    def part(name: str) -> tuple[Tensor, Tensor]:
        shown = torch.from_numpy(raw[f"{name}_images"]).float()[:, None] / 255
        return (shown - 0.1307) / 0.3081, torch.from_numpy(raw[f"{name}_labels"]).long()

    def batches(x: Tensor, y: Tensor) -> list[tuple[Tensor, Tensor]]:
        return list(zip(x.split(500), y.split(500), strict=True))

    x, y = part("train")
    order = torch.from_numpy(
        np.random.default_rng(0).permutation(len(x))
    )  # archives may be in order of classes
    x, y = x[order], y[order]

    def train(generator: np.random.Generator) -> tuple[Tensor, Tensor]:
        at = torch.from_numpy(generator.integers(0, len(x) - validating, batch))
        return x[at], y[at]

    return {
        "train": train,
        "validation": batches(x[-validating:], y[-validating:]),
        "test": batches(*part("test")),
    }


def gpt(mnist: Path) -> Task:
    """1.3 million parameters."""
    shape = Shape(width=160, depth=4, heads=4)
    return Task(
        lambda: GPT(256, 128, shape),
        **text(128, 8, 256),  # type: ignore[arg-type]
        unit="bits",
        dense_steps=600,
        steps=150,
        rates={0.5: 1e-3, 0.8: 2e-3, 0.95: 4e-3},
    )


def vit(mnist: Path) -> Task:
    """0.2 million parameters, 16 patches."""
    shape = Shape(width=64, depth=4, heads=4)
    return Task(
        lambda: ViT(10, (1, 28, 28), 7, shape),
        **images(mnist, 64, 5000),  # type: ignore[arg-type]
        unit="accuracy",
        dense_steps=1600,
        steps=300,
        rates={0.5: 1e-3, 0.8: 4e-3, 0.95: 8e-3},
    )


NETWORKS: dict[str, Callable[[Path], Task]] = {"gpt": gpt, "vit": vit}

# ---- training


def loss_of(network: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Cross entropy in nats, of all answers of a batch."""
    answers: Tensor = network(batch[0])
    return F.cross_entropy(answers.flatten(0, -2), batch[1].flatten())


def rise_and_fall(step: int, steps: int) -> float:
    """Factor of the learning rate: up over a twentieth of the steps, then a cosine down to zero."""
    up = max(1, steps // 20)
    return min((step + 1) / up, 0.5 + 0.5 * math.cos(math.pi * max(0, step - up) / max(1, steps - up)))


def rise(step: int, steps: int) -> float:
    """The same without the fall."""
    return min(1.0, (step + 1) / max(1, steps // 20))


def fit(
    network: nn.Module,
    task: Task,
    steps: int,
    draws: np.random.Generator,
    lr: float,
    factor: Callable[[int, int], float] = rise_and_fall,
) -> nn.Module:
    """Train the network as it is."""
    optimizer = torch.optim.AdamW(network.parameters(), lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: factor(step, steps))
    network.train()
    for _ in range(steps):
        loss = loss_of(network, task.train(draws))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return network.eval()


@torch.no_grad()
def figure(network: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], unit: str) -> float:
    """Bits for each byte, or the share of right answers, as a mean in float64."""
    total, number = 0.0, 0
    for x, y in batches:
        answers = network(x).double()
        if unit == "bits":
            nats = F.cross_entropy(answers.flatten(0, -2), y.flatten(), reduction="sum")
            total += float(nats) / math.log(2)
        else:
            total += float((answers.argmax(-1) == y).sum())
        number += y.numel()
    return total / number


# ---- methods: each makes task.steps steps from a dense network and returns a smaller one

Method = Callable[[nn.Module, Task, float, int], nn.Module]


def _phases(task: Task, share: float) -> tuple[int, int]:
    gated = round(share * task.steps)
    return gated, task.steps - gated


def ours(dense: nn.Module, task: Task, target: float, seed: int) -> nn.Module:
    """`Sparsifier` of a trained network as it stands in docs/any-network.md."""
    torch.manual_seed(seed)
    draws = np.random.default_rng(seed)
    size = len(task.train(np.random.default_rng(seed))[0])
    inputs = [task.train(draws)[0] for _ in range(REPAIRED_ON // size)]
    sparsifier = Sparsifier(
        dense, task.example, target_sparsity=target, steps=task.steps, seed=seed, data=inputs
    )
    return fit(sparsifier.finish(), task, task.steps, draws, task.rates[target])


def learnt(dense: nn.Module, task: Task, target: float, seed: int) -> nn.Module:
    """`Sparsifier` whose gates learn what goes."""
    torch.manual_seed(seed)
    draws = np.random.default_rng(seed)
    steps, rest = _phases(task, GATED_SHARE)
    sparsifier = Sparsifier(dense, task.example, target_sparsity=target, steps=steps, seed=seed)
    optimizer = torch.optim.AdamW(sparsifier.parameter_groups(task.rates[target], weight_decay=0.01))
    network = sparsifier.model.train()
    own = {id(p) for p in sparsifier.gates}
    weights = [p for p in network.parameters() if id(p) not in own]
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda s: rise(s, steps), lambda s: 1.0])
    for _ in range(steps):
        loss = sparsifier.loss(loss_of(network, task.train(draws)))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        sparsifier.step()
    return fit(sparsifier.finish(), task, rest, draws, task.rates[target])


@dataclass(frozen=True)
class CoFi:
    """Settings of CoFi's way, whose own are for runs of some 10,000 steps.

    Attributes:
        droprate_init: of the masks, in (0, 1).
        rate: of the locations, times the number of steps.
        multiplier_rate: of the two multipliers.
        ramp: share of the steps in which the target falls.
        clamp: of locations.
        temperature: of the masks.
        sharpness: of the masks in the end, what CoFi's code calls its magical number.
    """

    droprate_init: float = 0.5
    rate: float = 22.0
    multiplier_rate: float = 0.1
    ramp: float = 0.6
    clamp: tuple[float, float] = (math.log(1e-2), math.log(1e2))
    temperature: float = 2 / 3
    sharpness: float = 0.8

    def __call__(self, dense: nn.Module, task: Task, target: float, seed: int) -> nn.Module:
        """Learn masks for a part of the steps, decide, and train on."""
        torch.manual_seed(seed)
        draws = np.random.default_rng(seed)
        steps, rest = _phases(task, COFI_SHARE)
        network = gate(
            dense,
            task.example,
            droprate_init=self.droprate_init,
            temperature=self.temperature,
            generator=torch.Generator().manual_seed(seed),
        ).train()
        self._learn_(network, task, target, steps, draws)
        decide_(list(hard_concretes(network).values()), self.sharpness)
        return fit(compact(network, task.example), task, rest, draws, task.rates[target])

    def _learn_(
        self, network: nn.Module, task: Task, target: float, steps: int, draws: np.random.Generator
    ) -> None:
        accountant = Accountant(network, task.example)
        gates = [g.log_alpha for g in accountant.gates]
        own = {id(p) for p in gates}
        weights = [p for p in network.parameters() if id(p) not in own]
        multipliers = [nn.Parameter(torch.zeros(())) for _ in range(2)]
        groups = [
            {"params": weights, "lr": task.rates[target], "weight_decay": 0.01},
            {"params": gates, "lr": self.rate / steps, "weight_decay": 0.0},
            {"params": multipliers, "lr": self.multiplier_rate, "weight_decay": 0.0, "maximize": True},
        ]
        optimizer = torch.optim.AdamW(groups)
        still = [lambda s: rise(s, steps), lambda s: 1.0, lambda s: 1.0]
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, still)
        for step in range(steps):
            wanted = target * min(1.0, step / (self.ramp * steps))
            over = 1 - accountant.expected_parameters() / accountant.parameters - wanted
            penalty = multipliers[0] * over + multipliers[1] * over.square()
            optimizer.zero_grad()
            (loss_of(network, task.train(draws)) + penalty).backward()
            nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                for location in gates:
                    location.clamp_(*self.clamp)


@torch.no_grad()
def decide_(gates: list[HardConcrete], sharpness: float) -> None:
    """Of each tensor of gates shut as many as are expected to be shut, those with the smallest locations.

    Single gates, each of a whole branch, are one tensor. What stays is a factor sigmoid(sharpness *
    location / temperature).
    """
    single = [g for g in gates if g.log_alpha.numel() == 1]
    for members in [single, *([g] for g in gates if g.log_alpha.numel() > 1)]:
        if not members:
            continue
        locations = torch.cat([g.log_alpha.flatten() for g in members]).double()
        first = members[0]
        odds = locations - shift(first.temperature, first.gamma, first.zeta)
        num_shut = round(len(locations) - float(odds.sigmoid().sum()))
        soft = (sharpness * locations / first.temperature).sigmoid()
        inside = (soft - first.gamma) / (first.zeta - first.gamma)
        decided = first.temperature * inside.logit()
        decided[locations.argsort()[:num_shut]] = -OPEN * 10
        for g, own in zip(members, decided.split([g.log_alpha.numel() for g in members]), strict=True):
            g.log_alpha.copy_(own.view_as(g.log_alpha))


def one_shot(kind: str) -> Method:
    """Shut what is worth least for what it costs, and let the rest train."""

    def run(dense: nn.Module, task: Task, target: float, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        draws = np.random.default_rng(seed)
        network = gate(dense, task.example).eval()
        accountant = Accountant(network, task.example)
        gates = accountant.gates
        _place_(gates, NEARLY_OPEN)
        costs = torch.autograd.grad(accountant.expected_parameters(), [g.log_alpha for g in gates])
        worth = IMPORTANCE[kind](network, gates, [], torch.Generator()) if kind == "magnitude" else None
        if worth is None:
            worth = _taylor(network, gates, [task.train(draws) for _ in range(16)])
        order = torch.cat(
            [(w / c.double().clamp(min=1e-12)).flatten() for w, c in zip(worth, costs, strict=True)]
        )
        rank = torch.empty_like(order)
        rank[order.argsort()] = torch.linspace(-OPEN, OPEN, len(order), dtype=order.dtype)
        with torch.no_grad():
            for g, own in zip(gates, rank.split([g.log_alpha.numel() for g in gates]), strict=True):
                g.log_alpha.copy_(own.view_as(g.log_alpha) + shift(g.temperature, g.gamma, g.zeta))
            meet_all_(accountant, "parameters", 1 - target, [], pass_over=True)
            for g in gates:
                g.log_alpha.copy_(torch.where(g.median() > 0, OPEN, -OPEN))
        return fit(compact(network, task.example), task, task.steps, draws, task.rates[target])

    return run


@torch.no_grad()
def _place_(gates: list[HardConcrete], median: float) -> None:
    for g in gates:
        inside = (median - g.gamma) / (g.zeta - g.gamma)
        g.log_alpha.fill_(g.temperature * math.log(inside / (1 - inside)))


def _taylor(
    network: nn.Module, gates: list[HardConcrete], batches: list[tuple[Tensor, Tensor]]
) -> list[Tensor]:
    """Squared derivative of the loss by each gate, a mean over batches."""
    found = [torch.zeros_like(g.log_alpha, dtype=torch.float64) for g in gates]
    for batch in batches:
        slopes = torch.autograd.grad(loss_of(network, batch), [g.log_alpha for g in gates])
        for total, slope in zip(found, slopes, strict=True):
            total += slope.double().square() / len(batches)
    return found


METHODS: dict[str, Method] = {
    "sparsereg": ours,
    "gates": learnt,
    "cofi": CoFi(),
    "magnitude": one_shot("magnitude"),
    "taylor": one_shot("taylor"),
}

# ---- runs

Row = dict[str, str]


def dense_network(name: str, task: Task, seed: int, folder: Path) -> nn.Module:
    """The network that all methods of a seed start from, trained once."""
    path = folder / f"{name}-{seed}.pt"
    torch.manual_seed(seed)
    network = task.network()
    if path.is_file():
        network.load_state_dict(torch.load(path, weights_only=True))
        return network.eval()
    fit(network, task, task.dense_steps, np.random.default_rng(1000 + seed), 2e-3)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda beside: torch.save(network.state_dict(), beside))
    return network


def run(name: str, task: Task, method: str, target: float, seed: int, folder: Path) -> Row:
    """One row of the table."""
    dense = dense_network(name, task, seed, folder)
    start = time.process_time()
    small = METHODS[method](dense, task, target, seed)
    seconds = time.process_time() - start
    whole, left = (sum(p.numel() for p in n.parameters()) for n in (dense, small))
    figures = [figure(n, part, task.unit) for n in (small, dense) for part in (task.validation, task.test)]
    shown = [f"{1 - left / whole:.5f}", *(f"{value:.5f}" for value in figures)]
    cells = [name, seed, method, target, *shown, task.steps, f"{seconds:.0f}"]
    return dict(zip(COLUMNS, map(str, cells), strict=True))


def read(path: Path) -> list[Row]:
    """Rows of a table that need not be there."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write(path: Path, rows: list[Row]) -> None:
    """Write the table, whole or not at all."""

    def into(beside: Path) -> None:
        with beside.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)

    write_atomically(path, into)


def table(rows: list[Row]) -> str:
    """Mean and range over the seeds for each network and target, as Markdown."""
    lines = []
    for name in dict.fromkeys(row["network"] for row in rows):
        own = [row for row in rows if row["network"] == name]
        methods = [m for m in METHODS if any(row["method"] == m for row in own)]
        dense = {row["seed"]: float(row["dense_test"]) for row in own}
        lines += [
            f"| {name}, dense {_spread(list(dense.values()))} | " + " | ".join(methods) + " |",
            "| --- |" + " --- |" * len(methods),
        ]
        for target in sorted({float(row["target"]) for row in own}):
            cells = [
                _cell([r for r in own if float(r["target"]) == target and r["method"] == m]) for m in methods
            ]
            lines.append(f"| {target:g} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def _spread(values: list[float]) -> str:
    return f"{np.mean(values):.4f} ({min(values):.4f} to {max(values):.4f}, {len(values)})"


def _cell(rows: list[Row]) -> str:
    if not rows:
        return ""
    reached = np.mean([float(row["reached"]) for row in rows])
    return f"{_spread([float(row['test']) for row in rows])} at {reached:.3f}"


def main() -> None:
    """Make the runs that are not in the table yet."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--sparsities", nargs="+", type=float, default=list(SPARSITIES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--mnist", type=Path, default=Path("mnist.npz"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/against.csv"), help="the table")
    parser.add_argument(
        "--dense", type=Path, default=Path("outputs/against"), help="folder of dense networks"
    )
    parser.add_argument("--runs", type=int, default=None, help="at most so many new ones")
    parser.add_argument("--table", action="store_true", help="print it, run nothing")
    given = parser.parse_args()
    if not given.table:
        run_all(given)
    print(table(read(given.out)))


def run_all(given: argparse.Namespace) -> None:
    """Go through the grid, one seed after the other."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    tasks = {name: NETWORKS[name](given.mnist) for name in given.networks}
    made = 0
    for seed, name, target, method in itertools.product(
        given.seeds, given.networks, given.sparsities, given.methods
    ):
        rows = read(given.out)
        key = (name, str(seed), method, str(target))
        if any((r["network"], r["seed"], r["method"], r["target"]) == key for r in rows):
            continue
        found = run(name, tasks[name], method, target, seed, given.dense)
        print(" ".join(f"{k}={v}" for k, v in found.items()), flush=True)
        write(given.out, [*read(given.out), found])
        made += 1
        if made == given.runs:
            return


if __name__ == "__main__":
    main()
