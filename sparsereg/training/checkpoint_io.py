"""How Lightning's checkpoints reach the disk: whole or not at all, and read after every byte was checked."""

from pathlib import Path
from typing import Any

from lightning_fabric.plugins import TorchCheckpointIO

from sparsereg.archives import load_torch, save_torch
from sparsereg.errors import DamagedFile, InputError


class WholeCheckpoints(TorchCheckpointIO):
    """Writes a checkpoint beside its place and renames it; the one before stays until then.

    Lightning's own way fills a file in the folder of temporary files and moves it, which is no single step
    where that is another disk.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        """Write a checkpoint.

        Args:
            checkpoint: what Lightning gathered.
            path: the file.
            storage_options: none is known.
        """
        if storage_options is not None:
            raise TypeError(f"{type(self).__name__} takes no storage_options")
        save_torch(Path(path), checkpoint)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint; only data are ever loaded.

        Args:
            path: the file.
            map_location: of ``torch.load``.
            weights_only: not asked: it is.

        Raises:
            InputError: the file is damaged or something else.
        """
        try:
            content: dict[str, Any] = load_torch(path, map_location)
        except DamagedFile as error:
            raise InputError(f"{path}: cannot be read as a checkpoint: {error}") from error
        return content
