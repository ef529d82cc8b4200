"""Seconds per training step of GoogleNet on 32 x 32 images: ours against a plain implementation.

    python -m benchmarks.train_step [--batch-size 128] [--steps 12] [--rounds 3] [--data F.npz]

Everything included (data, augmentation, steps, logging): a Lightning run of the plain version of this file
against train.py's, in processes that take turns, so that a drift of the machine's speed hits both. The plain
version is what the tutorial that the network comes from does: PIL images, torchvision transforms, a
DataLoader with worker processes, gates drawn for each image and multiplied to the activations, a log entry
per step. What gates alone cost says ``benchmarks.gate_step``.

Prints a table. Without --data the images are random bytes, which take the same time.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

WARM_UP = 3


class PlainGate(nn.Module):
    """A Hard Concrete gate as the predecessor has it: drawn for each image, times the activations."""

    def __init__(self, channels: int, temperature: float = 2 / 3) -> None:
        super().__init__()
        self.log_alpha = nn.Parameter(torch.zeros(channels))
        self.temperature = temperature

    def forward(self, x: Tensor) -> Tensor:
        """Gate a map (batch, channels, height, width)."""
        u = torch.rand(x.shape[0], x.shape[1], device=x.device).clamp(1e-6, 1 - 1e-6)
        s = torch.sigmoid((torch.log(u) - torch.log(1 - u) + self.log_alpha) / self.temperature)
        z = torch.clamp(s * 1.2 - 0.1, 0, 1)
        return x * z.view(*z.shape, 1, 1)


class PlainClassifier(pl.LightningModule):
    """The plain version: GoogleNet with PlainGates, cross-entropy + lambda * L_C0, AdamW."""

    def __init__(self) -> None:
        super().__init__()
        from sparsereg.model.basic_l0_blocks import ConvBlock
        from sparsereg.model.googlenet import GoogleNet, InceptionBlock

        self.net = GoogleNet(gate="none")
        for block in self.net.modules():
            if isinstance(block, InceptionBlock):
                for branch in (block.branch1x1, block.branch3x3, block.branch5x5, block.branch_pool):
                    last = branch if isinstance(branch, ConvBlock) else branch[-1]
                    last.gate = PlainGate(last.norm.num_features)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """One step, logged."""
        images, labels = batch
        logits = self.net(images)
        gates = [m for m in self.modules() if isinstance(m, PlainGate)]
        active = torch.cat([torch.sigmoid(g.log_alpha + 1.6) for g in gates]).mean()
        acc_loss = F.cross_entropy(logits, labels)
        loss = acc_loss + active
        self.log("train_acc", (logits.argmax(1) == labels).float().mean(), on_step=False, on_epoch=True)
        self.log_dict({"train_loss": loss, "acc_loss": acc_loss, "L_C0": active})
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW as in the tutorial."""
        return torch.optim.AdamW(self.parameters(), lr=1e-3, weight_decay=1e-4)


class Clock(pl.Callback):
    """Seconds from the end of one step to the end of the next: data, augmentation, step, logging."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_batch_end(self, *args: Any) -> None:
        """Note the time."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())

    def seconds(self) -> float:
        """Median seconds per step after the warm-up."""
        return statistics.median(np.diff(self.ends)[WARM_UP:].tolist())


def plain_run(images: np.ndarray, labels: np.ndarray, batch_size: int, steps: int, folder: Path) -> float:
    """Train the plain version and return its seconds per step."""
    from PIL import Image
    from torch.utils.data import DataLoader, Dataset
    from torchvision import transforms

    transform = transforms.Compose(
        [
            transforms.RandomHorizontalFlip(),
            transforms.RandomResizedCrop((32, 32), scale=(0.8, 1.0), ratio=(0.9, 1.1)),
            transforms.ToTensor(),
            transforms.Normalize([0.49, 0.48, 0.45], [0.25, 0.24, 0.26]),
        ]
    )

    class Images(Dataset):
        def __len__(self) -> int:
            return len(images)

        def __getitem__(self, i: int) -> tuple[Tensor, int]:
            return transform(Image.fromarray(images[i])), int(labels[i])

    loader = DataLoader(
        Images(), batch_size, shuffle=True, drop_last=True, num_workers=4, persistent_workers=True
    )
    return fit(PlainClassifier(), {"train_dataloaders": loader}, steps, folder)


def our_run(file: Path, batch_size: int, steps: int, folder: Path) -> float:
    """Train as train.py does and return its seconds per step."""
    from hydra import compose, initialize_config_dir

    from sparsereg.cli import CONFIGS, settings_of
    from sparsereg.training import build, trainers
    from sparsereg.training.config import Training

    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        augment = ["data.augment.flip=true", "data.augment.crop_scale=[0.8,1.0]"]
        size = [f"data.batch_size={batch_size}", "data.val_size=0.1"]
        composed = compose("train", ["data=npz", f"data.path={file}", *size, *augment])
    cfg = settings_of(Training, composed)
    trainers.tune_process()
    data = build.build_data(cfg)
    module = build.build_module(cfg, build.build_network(cfg, data), data)
    return fit(module, {"datamodule": data}, steps, folder)


def fit(module: pl.LightningModule, data: dict[str, Any], steps: int, folder: Path) -> float:
    """Run Lightning's Trainer with TensorBoard for some steps."""
    from pytorch_lightning.loggers import TensorBoardLogger

    clock = Clock()
    trainer = pl.Trainer(
        max_steps=steps + WARM_UP + 1,
        limit_val_batches=0,
        callbacks=[clock],
        logger=TensorBoardLogger(str(folder)),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1 if isinstance(module, PlainClassifier) else 50,
        accelerator="gpu" if torch.cuda.is_available() else "cpu",
        devices=1,
    )
    trainer.fit(module, **data)
    return clock.seconds()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--steps", type=int, default=12, help="measured steps of each kind in each round")
    parser.add_argument("--rounds", type=int, default=3, help="times that plain and ours take turns")
    parser.add_argument("--data", type=Path, help="an npz as data=npz reads it; default: random bytes")
    parser.add_argument("--only", choices=["plain", "ours"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if args.only:
            print(json.dumps(one(args, Path(folder))))
            return
        file = args.data or random_images(Path(folder), args.batch_size * (args.steps + 8))
        seconds: dict[str, list[float]] = {"plain": [], "ours": []}
        for _ in range(args.rounds):
            for kind in seconds:
                command = [sys.executable, "-m", "benchmarks.train_step", "--only", kind, "--data", str(file)]
                command += ["--batch-size", str(args.batch_size), "--steps", str(args.steps)]
                out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                seconds[kind].append(json.loads(out.strip().splitlines()[-1]))
    device = (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"CPU, {torch.get_num_threads()} threads"
    )
    print(f"{device}, Python {platform.python_version()}, torch {torch.__version__}, batch {args.batch_size}")
    print(f"\n{'a training step, everything included':38s} {'s/step (median)':>16s} {'min':>8s} {'max':>8s}")
    for kind, values in seconds.items():
        print(f"{kind:38s} {statistics.median(values):16.3f} {min(values):8.3f} {max(values):8.3f}")
    ratio = statistics.median(p / o for p, o in zip(seconds["plain"], seconds["ours"], strict=True))
    print(f"{'plain / ours, median of rounds':38s} {ratio:16.2f}")


def one(args: argparse.Namespace, folder: Path) -> float:
    """Measure one kind in this process."""
    if args.only == "ours":
        return our_run(args.data, args.batch_size, args.steps, folder)
    arrays = np.load(args.data)
    return plain_run(arrays["train_images"], arrays["train_labels"], args.batch_size, args.steps, folder)


def random_images(folder: Path, count: int) -> Path:
    """Write random images of CIFAR-10's shape."""
    rng = np.random.default_rng(0)
    arrays = {}
    for part, n in (("train", int(count * 1.2)), ("test", 100)):
        arrays[f"{part}_images"] = rng.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)
        arrays[f"{part}_labels"] = np.arange(n, dtype=np.uint8) % 10
    np.savez(folder / "random.npz", **arrays)
    return folder / "random.npz"


if __name__ == "__main__":
    main()
