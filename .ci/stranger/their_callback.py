"""A callback that sparsereg does not know."""

from pathlib import Path

import pytorch_lightning as pl


class Notes(pl.Callback):
    """Writes what was reached at the end of the training into the run's folder."""

    def __init__(self, name: str) -> None:
        self.name = name

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write ``epochs val_acc``."""
        reached = f"{trainer.current_epoch} {float(trainer.callback_metrics['val_acc']):.4f}\n"
        Path(trainer.default_root_dir, self.name).write_text(reached)
