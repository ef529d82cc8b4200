"""A segmentation network with GroupNorm, in a LightningModule of your own, cut to half of its operations.

    python examples/segmentation_unet.py

The module and its data are anybody's. The lines marked (1) to (3) are all that is added: the target is met
exactly, the smaller network lies beside the checkpoints, and a run that was killed goes on bitwise with
``python examples/segmentation_unet.py FOLDER``.
"""

import sys
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import sparsereg  # (1)


def block(inputs: int, outputs: int) -> nn.Sequential:
    """Two convolutions."""
    return nn.Sequential(
        *(nn.Conv2d(inputs, outputs, 3, padding=1), nn.GroupNorm(4, outputs), nn.SiLU()),
        *(nn.Conv2d(outputs, outputs, 3, padding=1), nn.GroupNorm(4, outputs), nn.SiLU()),
    )


class Segmenter(pl.LightningModule):
    """A U-Net that tells discs and squares from the ground."""

    def __init__(self, width: int = 16, epochs: int = 8) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.down1 = block(1, width)
        self.down2 = block(width, 2 * width)
        self.middle = block(2 * width, 4 * width)
        self.up2 = nn.ConvTranspose2d(4 * width, 2 * width, 2, stride=2)
        self.merge2 = block(4 * width, 2 * width)
        self.up1 = nn.ConvTranspose2d(2 * width, width, 2, stride=2)
        self.merge1 = block(2 * width, width)
        self.head = nn.Conv2d(width, 3, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits for each pixel."""
        fine = self.down1(images)
        coarse = self.down2(functional.max_pool2d(fine, 2))
        x = self.up2(self.middle(functional.max_pool2d(coarse, 2)))
        x = self.up1(self.merge2(torch.cat([x, coarse], 1)))
        return self.head(self.merge1(torch.cat([x, fine], 1)))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Return the loss."""
        images, masks = batch
        loss = functional.cross_entropy(self(images), masks)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """Log the share of pixels that are right."""
        images, masks = batch
        self.log("accuracy", (self(images).argmax(1) == masks).float().mean())

    def configure_optimizers(self) -> Any:
        """AdamW along a cosine."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=2e-3)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.hparams["epochs"])
        return {"optimizer": optimizer, "lr_scheduler": schedule}


def shapes(number: int, seed: int, size: int = 32) -> TensorDataset:
    """Return noisy pictures of a disc and a square, and which pixel is what."""
    draws = torch.Generator().manual_seed(seed)
    images = 0.3 * torch.rand(number, 1, size, size, generator=draws)
    masks = torch.zeros(number, size, size, dtype=torch.long)
    rows, columns = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    for image, mask in zip(images, masks, strict=True):
        y, x, v, u = torch.randint(6, size - 6, (4,), generator=draws)
        radius = int(torch.randint(3, 6, (1,), generator=draws))
        disc = (rows - y) ** 2 + (columns - x) ** 2 < radius**2
        square = ((rows - v).abs() < radius) & ((columns - u).abs() < radius)
        for label, (shape, bright) in enumerate(((disc, 0.6), (square, 0.4)), 1):
            image[0][shape] += bright
            mask[shape] = label
    return TensorDataset(images, masks)


def main(folder: Path, epochs: int = 8, images: int = 512, width: int = 16) -> dict[str, float]:
    """Train in a folder, from its last checkpoint if there is one, and return what was reached."""
    pl.seed_everything(0, verbose=False)
    module = Segmenter(width, epochs)
    last = folder / "last.ckpt"
    sparsify = sparsereg.Sparsify(target_macs=0.5)  # (2)
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=10,
        callbacks=[ModelCheckpoint(folder, save_last=True), sparsify],  # (3)
    )
    train = DataLoader(shapes(images, 0), 16, shuffle=True)
    trainer.fit(module, train, DataLoader(shapes(64, 1), 32), ckpt_path=last if last.exists() else None)
    counted = sparsereg.count(sparsify.network, torch.zeros(1, 1, 32, 32))
    return {
        "accuracy": float(trainer.callback_metrics["accuracy"]),
        "macs_left": counted.compacted_macs / counted.macs,
        "parameters": sum(p.numel() for p in sparsify.compacted.parameters()),
    }


if __name__ == "__main__":
    print(main(Path(sys.argv[1] if len(sys.argv) > 1 else "outputs/segmentation_unet")))
