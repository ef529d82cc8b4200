"""A callback of your own, from the command line.

python train.py +callbacks.mine._target_=examples.own_callback.Diary
"""

from pathlib import Path

import pytorch_lightning as pl


class Diary(pl.Callback):
    """Writes a line for each epoch.

    Args:
        path: the file.
    """

    def __init__(self, path: str = "diary.txt") -> None:
        self.path = Path(path)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note the epoch and what has been logged."""
        logged = {name: round(float(value), 4) for name, value in trainer.callback_metrics.items()}
        with self.path.open("a") as file:
            file.write(f"epoch {trainer.current_epoch}: {logged}\n")
