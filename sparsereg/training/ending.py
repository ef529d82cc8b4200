"""How training ends when the process is asked to: all processes of the run together, and how to continue."""

import signal
from pathlib import Path

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback

from sparsereg import interruption


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
        launcher = trainer.strategy.launcher
        if launcher is None or not isinstance(exception, interruption.Interrupted):
            return
        launcher.kill(signal.SIGKILL if hasattr(signal, "SIGKILL") else signal.SIGTERM)
        procs = getattr(launcher, "procs", None)
        if isinstance(procs, list):
            procs.clear()  # else a thread of Lightning's kills this process because they have ended


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
