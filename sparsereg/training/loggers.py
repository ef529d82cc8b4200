"""Where scalars go: Lightning's loggers, each into the folder of the run, and the user's own."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import CSVLogger, Logger

from sparsereg import own_code
from sparsereg.errors import InputError
from sparsereg.extras import need
from sparsereg.training import config
from sparsereg.training.tensorboard import TensorBoard


def _tensorboard(folder: Path, **arguments: Any) -> Logger:
    place = {"save_dir": str(folder.parent.parent), "name": folder.parent.name, "version": folder.name}
    return TensorBoard(**(place | arguments))


def _csv(folder: Path, **arguments: Any) -> Logger:
    return CSVLogger(**({"save_dir": str(folder), "name": "", "version": "csv"} | arguments))


def _wandb(folder: Path, **arguments: Any) -> Logger:
    need("track", "wandb")
    from pytorch_lightning.loggers import WandbLogger

    return WandbLogger(**({"save_dir": str(folder), "name": folder.name} | arguments))


def _mlflow(folder: Path, **arguments: Any) -> Logger:
    need("track", "mlflow")
    from pytorch_lightning.loggers import MLFlowLogger

    outputs = next((p for p in folder.parents if p.name == "tblog"), folder).parent
    place = {"run_name": folder.name, "tracking_uri": (outputs / "mlruns").resolve().as_uri()}
    return MLFlowLogger(**(place | {k: v for k, v in arguments.items() if v is not None}))


LOGGERS: dict[str, Callable[..., Logger]] = {
    "tensorboard": _tensorboard,
    "csv": _csv,
    "wandb": _wandb,
    "mlflow": _mlflow,
}
"""Name to builder(folder of the run, **arguments of Lightning's logger)."""


def build_loggers(settings: config.Logger, folder: Path | None) -> list[Logger]:
    """Build the loggers that the configuration group ``logger`` names; none without a folder.

    Args:
        settings: of the group.
        folder: of the run.

    Raises:
        InputError: an argument is not one of the logger's, or its package is not installed.
    """
    if folder is None:
        return []
    built = []
    for name, make in LOGGERS.items():
        if (arguments := getattr(settings, name)) is not None:
            try:
                built.append(make(folder, **arguments))
            except ModuleNotFoundError as error:
                raise InputError(f"logger={name}: {error}") from error
            except (TypeError, ValueError) as error:
                raise InputError(f"logger.{name}: {error}") from error
    return built + _own(settings.others, folder)


def _own(others: Mapping[str, Any], folder: Path) -> list[Logger]:
    """Make the user's loggers; one alone stands in the group itself."""
    specs = {"logger": others} if own_code.is_own(others) else {f"logger.{k}": v for k, v in others.items()}
    built = []
    for key, spec in specs.items():
        logger = own_code.call(spec, key, save_dir=str(folder))
        if not isinstance(logger, Logger):
            raise InputError(
                f"{key}._target_={spec['_target_']}: expected a Lightning Logger, it makes a "
                f"{type(logger).__name__}"
            )
        built.append(logger)
    return built
