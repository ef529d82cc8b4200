"""How much faster a compacted GoogleNet is, against the dense one and against the ideal.

    python -m benchmarks.compaction [--checkpoint RUN/checkpoints/last.ckpt] [--runtimes eager onnxruntime]

The ideal is (time of the dense network) x (MACs that remain / all MACs). Its share that is reached is
ideal / measured. Gates are shut at random, in every layer the same share, at about 0.4, 0.64 and 0.815
exact sparsity; ``--checkpoint`` adds a trained network. All networks, the dense one too, run in their
fastest form: BatchNorm folded, channels_last, pooling as maxima of shifted maps, memory kept by malloc.
"""

import argparse
import math
import statistics
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from sparsereg.compression import (
    Accountant,
    benchmark,
    compact,
    count,
    fuse,
    shift_pools,
)
from sparsereg.files import write_json
from sparsereg.model.googlenet import GoogleNet
from sparsereg.penalties import hard_concretes

SPARSITIES = (0.4, 0.64, 0.815)


@torch.no_grad()
def shut_at_random_(net: nn.Module, sparsity: float, example: torch.Tensor, seed: int) -> float:
    """Shut the same random share of every layer's gates so that the exact sparsity is as asked.

    Args:
        net: a network with gates, changed in place.
        sparsity: wanted exact sparsity, in (0, 1).
        example: for tracing.
        seed: of the random order in which gates are shut.

    Returns:
        The exact sparsity that was reached.
    """
    generator = torch.Generator().manual_seed(seed)
    gates = list(hard_concretes(net).values())
    ranks = [torch.rand(g.log_alpha.shape, generator=generator).argsort().argsort() for g in gates]
    accountant = Accountant(net, example)
    low, high = 0.0, 1.0
    for _ in range(20):
        share = (low + high) / 2
        for gate, rank in zip(gates, ranks, strict=True):
            gate.log_alpha.copy_(torch.where(rank < share * len(rank), -10.0, 10.0))
        reached = accountant.exact_sparsity()
        low, high = (share, high) if reached < sparsity else (low, share)
    return reached


def patterns(seed: int, example: torch.Tensor) -> dict[str, nn.Module]:
    """Networks with random patterns, by their exact sparsity."""
    nets: dict[str, nn.Module] = {}
    for sparsity in SPARSITIES:
        torch.manual_seed(seed)
        net = GoogleNet(gate="all").eval()
        nets[f"{shut_at_random_(net, sparsity, example, seed):.3f}"] = net
    return nets


def trained(path: Path) -> tuple[nn.Module, nn.Module, torch.Tensor]:
    """The network of a checkpoint of train.py, the same without gates and untrained, and an example.

    Args:
        path: of a network of any kind with gates.
    """
    from sparsereg.training.build import restore
    from sparsereg.training.checkpoint import read
    from sparsereg.zoo.networks import build

    checkpoint = read(path)
    dense = build(checkpoint.config["model"], checkpoint.form, gated=False)
    example = torch.randn(2, *checkpoint.image_shape, generator=torch.Generator().manual_seed(0))
    return restore(checkpoint).eval(), dense.eval(), example


def deployed(net: nn.Module, example: torch.Tensor, runtime: str, round_to: int = 1) -> nn.Module:
    """The compacted network in the form that is fastest in a runtime."""
    fused = fuse(compact(net, example, round_to=round_to))
    if runtime == "onnxruntime":  # it folds and pools as it likes
        return fused
    return shift_pools(fused).to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


def forms(net: nn.Module, example: torch.Tensor, runtime: str) -> dict[str, nn.Module]:
    """The network compacted to the last channel, and with channels rounded up to multiples of 8."""
    made = {"smallest": deployed(net, example, runtime)}
    if hard_concretes(net):
        made["multiples of 8"] = deployed(net, example, runtime, round_to=8)
    return made


def measure(
    networks: Mapping[str, nn.Module],
    plain: nn.Module,
    example: torch.Tensor,
    runtime: str,
    batches: list[int],
    repeats: int,
) -> list[dict[str, object]]:
    """Time the network without gates and compacted ones in turn and compare with the ideal."""
    dense = deployed(plain, example, runtime)
    total = count(dense, example).macs
    models: dict[str, nn.Module] = {"dense": dense}
    for sparsity, net in networks.items():
        models |= {f"{sparsity}, {form}": m for form, m in forms(net, example, runtime).items()}
    channels_last = runtime != "onnxruntime"
    rows: list[dict[str, object]] = []
    timings = benchmark(
        models,
        example,
        batch_sizes=batches,
        runtimes=(runtime,),
        repeats=repeats,
        seconds=3600.0,
        channels_last=channels_last,
    )
    for row in timings.rows:
        smallest = models[row.model.replace("multiples of 8", "smallest")]
        macs = count(smallest, example).macs
        rows.append(
            {
                "network": row.model,
                "runtime": runtime,
                "batch": row.batch,
                "milliseconds": round(row.seconds * 1e3, 3),
                "macs": macs / total,
                "speedup": round(row.speedup, 3),
                "ideal": round(total / macs, 3) if macs else math.inf,
                "share_of_ideal": round(row.speedup * macs / total, 3),
            }
        )
    return rows


def main() -> None:
    """Run the benchmark and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--checkpoint", type=Path, help="a trained network, too")
    parser.add_argument("--runtimes", nargs="+", default=["eager", "onnxruntime"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 128])
    parser.add_argument("--seeds", type=int, default=3, help="random patterns for each sparsity; may be 0")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument(
        "--threads", type=int, help="threads of PyTorch and onnxruntime; all cores if not given"
    )
    parser.add_argument("--json", type=Path, help="write the rows there")
    options = parser.parse_args()
    from sparsereg.training.trainers import tune_process

    tune_process()
    if options.threads:
        torch.set_num_threads(options.threads)
    example = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    rows: list[dict[str, object]] = []
    for seed in range(options.seeds):
        networks = patterns(seed, example)
        for runtime in options.runtimes:
            plain = GoogleNet(gate="none").eval()
            found = measure(networks, plain, example, runtime, options.batches, options.repeats)
            rows += [{**row, "seed": seed} for row in found]
    if options.checkpoint:
        net, plain, example = trained(options.checkpoint)
        for runtime in options.runtimes:
            found = measure({"trained": net}, plain, example, runtime, options.batches, options.repeats)
            rows += [{**row, "network": f"{row['network']} (checkpoint)"} for row in found]
    print(table(rows))
    if options.json:
        write_json(
            options.json, {"rows": rows, "torch": torch.__version__, "threads": torch.get_num_threads()}
        )


def table(rows: list[dict[str, object]]) -> str:
    """Medians over the seeds, one line for each network, runtime and batch."""
    groups: dict[tuple[object, ...], list[dict[str, object]]] = {}
    for row in rows:
        name = str(row["network"])
        head, _, form = name.partition(", ")
        label = f"{float(head):.2f}, {form}" if head.replace(".", "").isdigit() else name
        groups.setdefault((row["runtime"], row["batch"], label), []).append(row)
    head = f"{'runtime':12s}{'batch':>6s}  {'network':24s}"
    lines = [head + "".join(f"{name:>9s}" for name in ("ms", "MACs", "speedup", "ideal", "share"))]
    for (runtime, batch, label), members in groups.items():
        ms, macs, speedup, ideal, share = (
            statistics.median(float(str(m[key])) for m in members)
            for key in ("milliseconds", "macs", "speedup", "ideal", "share_of_ideal")
        )
        verdict = "" if label.startswith("dense") or speedup > 1.02 else "  not faster"
        lines.append(
            f"{runtime:12s}{batch:6d}  {label:24s}"
            f"{ms:9.2f}{macs:9.2f}{speedup:9.2f}{ideal:9.2f}{share:9.0%}{verdict}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
