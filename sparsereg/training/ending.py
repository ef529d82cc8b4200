"""How training ends when the process is asked to: all processes of the run together, and how to continue."""

from pathlib import Path

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback

from sparsereg import interruption
from sparsereg.training.lightning import kill_other_processes


class EndsTogether(Callback):
    """Lets signals end training as ``sparsereg.interruption`` says, and its other processes with it.

    Lightning takes SIGTERM for itself when it starts to run, and then ends as if all had been done.
    """

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the signals back."""
        interruption.install()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the signals back."""
        interruption.install()

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the signals back."""
        interruption.install()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """End the other processes, which wait for this one and would not hear a milder signal."""
        if isinstance(exception, interruption.Interrupted):
            kill_other_processes(trainer)


def continuation(last: Path, without_using_gate: bool) -> list[str] | None:
    """Return the arguments of train.py that continue a run from its last finished epoch.

    Args:
        last: its last checkpoint, if an epoch has finished; all settings are in it.
        without_using_gate: of the run.
    """
    if not last.is_file():
        return None
    plain = ["without_using_gate=true"] if without_using_gate else []
    return [f"ckpt_path={last}", "resume_training=true", *plain]
