"""What gates cost in a training step, of networks of several kinds and sizes.

    python -m benchmarks.gate_step [--networks vit_small gpt ...] [--steps 12] [--threads 1]

A network as it is, and the same with its own gates (the GoogleNet of this package) or with all that
``sparsereg.gate`` finds, and their penalty, make the same step in one process: forward, loss, backward,
AdamW. They take turns, and the median of the ratios of neighbours is given, so that a drift of the machine's
speed hits both. Without a GPU it is processor time.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sparsereg
from sparsereg.distributions import draw_together
from sparsereg.penalties import hard_concretes, l_c0

WARM_UP = 2


@dataclass(frozen=True)
class Case:
    """A network and a batch of it.

    Attributes:
        network: without gates.
        batch: its positional inputs.
        logits: what of its result the loss is of, (predictions, classes).
        sizes: of the batch, in words.
        gated: the same network with gates of its own; None takes those of ``sparsereg.gate``.
        together: whether all gates are drawn at once, as ``train.py`` draws those of its own networks.
    """

    network: nn.Module
    batch: tuple[Tensor, ...]
    logits: Callable[[Any], Tensor]
    sizes: str
    gated: nn.Module | None = None
    together: bool = False


def images(network: nn.Module, batch_size: int, size: int) -> Case:
    """A classifier of square images of three channels."""
    return Case(
        network, (torch.randn(batch_size, 3, size, size),), lambda out: out, f"{batch_size} x {size} x {size}"
    )


def tokens(network: nn.Module, batch_size: int, length: int, logits: Callable[[Any], Tensor]) -> Case:
    """A network that reads tokens and says something of each."""
    batch = torch.randint(0, 256, (batch_size, length))
    return Case(network, (batch,), lambda out: logits(out).flatten(0, 1), f"{batch_size} x {length}")


def _timm(name: str, batch_size: int, size: int) -> Case:
    import timm

    sized = {"img_size": size} if name.startswith(("vit", "swin")) else {}
    return images(timm.create_model(name, num_classes=10, **sized), batch_size, size)


def _torchvision(name: str, batch_size: int, size: int) -> Case:
    import torchvision

    return images(torchvision.models.get_model(name, num_classes=10), batch_size, size)


def _googlenet(**gates: str) -> Case:
    from sparsereg.model.googlenet import GoogleNet

    case = images(GoogleNet(gate="none"), 128, 32)
    return replace(case, gated=GoogleNet(**gates), together="sampling" not in gates)  # type: ignore[arg-type]


def _own_gpt() -> Case:
    from sparsereg.model.gpt import GPT
    from sparsereg.model.transformer import Shape

    return tokens(GPT(256, 128, Shape(width=128, depth=4, heads=4)), 8, 128, lambda out: out)


def _gpt2(batch_size: int, length: int) -> Case:
    from transformers import GPT2Config, GPT2LMHeadModel

    network = GPT2LMHeadModel(
        GPT2Config(vocab_size=256, n_layer=6, use_cache=False, bos_token_id=None, eos_token_id=None)
    )
    return tokens(network, batch_size, length, lambda out: out.logits)


def _bert(batch_size: int, length: int) -> Case:
    from transformers import BertConfig, BertForTokenClassification

    network = BertForTokenClassification(BertConfig(vocab_size=256, num_hidden_layers=6, num_labels=10))
    return tokens(network, batch_size, length, lambda out: out.logits)


CASES: dict[str, Callable[[], Case]] = {
    "googlenet": lambda: _googlenet(gate="all"),
    "googlenet_branches": lambda: _googlenet(gate="branches"),
    "googlenet_each_image": lambda: _googlenet(gate="branches", sampling="example"),
    "resnet18": lambda: _torchvision("resnet18", 32, 64),
    "resnet50": lambda: _torchvision("resnet50", 8, 224),
    "convnext_tiny": lambda: _timm("convnext_tiny", 8, 224),
    "vit_tiny": lambda: _timm("vit_tiny_patch16_224", 8, 224),
    "vit_small": lambda: _timm("vit_small_patch16_224", 8, 224),
    "gpt2": lambda: _gpt2(4, 256),
    "bert": lambda: _bert(4, 256),
    "gpt": _own_gpt,
}


def stepper(case: Case, network: nn.Module, device: torch.device) -> Callable[[], float]:
    """Return what makes one training step and says how many seconds it took."""
    network = network.to(device).train()
    batch = tuple(part.to(device) for part in case.batch)
    optimizer = torch.optim.AdamW(network.parameters(), 1e-4, fused=True)
    gates = list(hard_concretes(network).values())
    drawn = gates if case.together else []
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    with torch.no_grad():
        logits = case.logits(network(*batch))
    labels = torch.randint(0, logits.shape[1], logits.shape[:1], device=device)

    def step() -> float:
        start = clock()
        draw_together(drawn)
        loss = F.cross_entropy(case.logits(network(*batch)), labels)
        if gates:
            loss = loss + l_c0(network)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return clock() - start

    return step


def measured(name: str, steps: int, device: torch.device) -> str:
    """One row of the table."""
    torch.manual_seed(0)
    case = CASES[name]()
    gated = case.gated
    if gated is None:
        gated = sparsereg.gate(case.network.eval(), tuple(part[:2] for part in case.batch))
    num_gates = sum(gate.log_alpha.numel() for gate in hard_concretes(gated).values())
    turns = [stepper(case, network, device) for network in (case.network, gated)]
    seconds: list[list[float]] = [[], []]
    for turn in range(steps + WARM_UP):
        for kind in (0, 1) if turn % 2 else (1, 0):
            seconds[kind].append(turns[kind]())
    plain, ours = (values[WARM_UP:] for values in seconds)
    ratio = statistics.median(b / a for a, b in zip(plain, ours, strict=True))
    parameters = sum(p.numel() for p in case.network.parameters())
    cells = [name, f"{parameters:,}", case.sizes, f"{num_gates:,}"]
    cells += [f"{statistics.median(values):.3f}" for values in (plain, ours)]
    return f"| {' | '.join(cells)} | {ratio:.3f} |"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--steps", type=int, default=12, help="measured steps of each kind")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    from sparsereg.training.trainers import tune_process

    tune_process()
    torch.set_num_threads(args.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {args.threads} threads"
    print(f"{where}, Python {platform.python_version()}, torch {torch.__version__}\n")
    print("| network | parameters | batch | gates | s a step without gates | with gates | ratio |")
    print("| --- | ---: | --- | ---: | ---: | ---: | ---: |", flush=True)
    for name in args.networks:
        print(measured(name, args.steps, device), flush=True)


if __name__ == "__main__":
    main()
