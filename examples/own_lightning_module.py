"""Gates in a LightningModule of your own: three lines are added, nothing else changes.

    python examples/own_lightning_module.py

The module below is anybody's: its own loss, optimizer and data. The lines marked (1) to (3) put gates into
its network and train it so that a share of its parameters can go; what is left is smaller and plain.
"""

import pytorch_lightning as pl
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import sparsereg
from sparsereg.compression import Accountant, compact
from sparsereg.training.callbacks import BatchNormEstimation, SparsityMonitor
from sparsereg.training.target import SparsityTarget, TargetSettings


class Mine(pl.LightningModule):
    """A small convolutional network for images of 8 x 8 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            *(nn.Conv2d(1, 16, 3), nn.BatchNorm2d(16), nn.ReLU()),
            *(nn.Conv2d(16, 32, 3), nn.BatchNorm2d(32), nn.ReLU()),
            *(nn.Flatten(), nn.Linear(32 * 16, 64), nn.ReLU(), nn.Linear(64, 10)),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits."""
        return self.net(images)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Return the loss."""
        images, labels = batch
        return functional.cross_entropy(self(images), labels)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """Log the accuracy."""
        images, labels = batch
        self.log("accuracy", (self(images).argmax(1) == labels).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Gates learn faster than weights."""
        gates = [p for name, p in self.named_parameters() if name.endswith("log_alpha")]
        weights = [p for name, p in self.named_parameters() if not name.endswith("log_alpha")]
        return torch.optim.Adam([{"params": weights, "lr": 2e-3}, {"params": gates, "lr": 2e-2}])


def loaders() -> tuple[DataLoader[tuple[Tensor, ...]], DataLoader[tuple[Tensor, ...]]]:
    """Return training and validation images of scikit-learn's digits."""
    digits = load_digits()
    images = torch.tensor(digits.images[:, None] / 16, dtype=torch.float32)
    labels = torch.tensor(digits.target)
    parts = [TensorDataset(images[part], labels[part]) for part in (slice(0, 1437), slice(1437, None))]
    return DataLoader(parts[0], 64, shuffle=True), DataLoader(parts[1], 360)


def main(epochs: int = 10) -> dict[str, float]:
    """Train, compact, and return what was reached."""
    pl.seed_everything(0, verbose=False)
    module, example = Mine(), torch.zeros(1, 1, 8, 8)

    module.net = sparsereg.gate(module.net, example)  # (1) gates
    accountant = Accountant(module.net, example)  # (2) what the network costs, as its gates are
    target = TargetSettings(cost="parameters", kept=0.4, start_epoch=0, ramp_epochs=0.6 * epochs)

    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        log_every_n_steps=10,
        callbacks=[  # (3) the target is met, statistics fit what is measured, sparsity is logged
            SparsityTarget(accountant, target),
            BatchNormEstimation(num_images=1437),
            SparsityMonitor(accountant),
        ],
    )
    trainer.fit(module, *loaders())

    small = compact(module.net.eval(), example)
    return {
        "accuracy": float(trainer.callback_metrics["accuracy"]),
        "exact_sparsity": float(trainer.callback_metrics["exact_sparsity"]),
        "parameters": sum(p.numel() for p in small.parameters()),
    }


if __name__ == "__main__":
    print(main())
