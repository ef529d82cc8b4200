"""What is used of Lightning and PyTorch beyond their public interfaces stands in one file, and is there."""

import ast
import inspect
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EMAWeightAveraging
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from sparsereg.training import lightning

PACKAGE = Path(lightning.__file__).parents[1]
USERS = [*(PACKAGE / "training").glob("*.py"), *(PACKAGE / "commands").glob("*.py")]
USERS += [*(PACKAGE / "loops").glob("*.py")]
USERS += [*(PACKAGE / "data").glob("*.py"), PACKAGE / "calibration" / "solver" / "module.py"]
SEMI_PUBLIC = {"setup_data", "fit_loop", "launcher", "procs"}
"""Names without an underscore that Lightning's documentation does not know."""


def trainer() -> pl.Trainer:
    return pl.Trainer(
        logger=False, enable_checkpointing=False, accelerator="cpu", enable_progress_bar=False, max_epochs=1
    )


def schedule() -> LambdaLR:
    return LambdaLR(torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0), lambda step: 1.0)


def launchers() -> list[type]:
    from pytorch_lightning.strategies import launchers

    return [launchers._MultiProcessingLauncher, launchers._SubprocessScriptLauncher]


NAMES = {
    "Trainer._logger_connector.should_update_logs": lambda: trainer()._logger_connector.should_update_logs,
    "Trainer.fit_loop.setup_data": lambda: trainer().fit_loop.setup_data,
    "Trainer.num_training_batches": lambda: trainer().num_training_batches,
    "Trainer.strategy.launcher": lambda: [trainer().strategy.launcher],
    "launcher.kill": lambda: [one.kill for one in launchers()],
    "Trainer.fit_loop._data_source": lambda: trainer().fit_loop._data_source.dataloader,
    "Trainer.fit_loop._data_fetcher": lambda: [trainer().fit_loop._data_fetcher],
    "LightningModule._on_before_batch_transfer": lambda: pl.LightningModule._on_before_batch_transfer,
    "LightningModule._apply_batch_transfer_handler": lambda: pl.LightningModule._apply_batch_transfer_handler,
    "EMAWeightAveraging._swap_models": lambda: EMAWeightAveraging._swap_models,
    "EMAWeightAveraging._average_model": lambda: [EMAWeightAveraging()._average_model],
    "LRScheduler._last_lr": lambda: schedule()._last_lr,
    "DataLoader._iterator": lambda: [DataLoader([1])._iterator],
}


@pytest.mark.parametrize("name", NAMES)
def test_the_name_is_still_there(name):
    try:
        NAMES[name]()
    except AttributeError as error:
        pytest.fail(f"{name} has gone: mend sparsereg/training/lightning.py ({error})")


def test_launchers_list_their_processes():
    for launcher in launchers():
        assert "self.procs" in inspect.getsource(launcher.__init__)


def test_rates_are_shown_and_loaders_start_anew():
    one = schedule()
    lightning.show_learning_rates_(one, [0.25])
    assert one.get_last_lr() == [0.25]
    loader = DataLoader([1, 2])
    loader._iterator = object()  # as of workers that persist
    copied = lightning.with_own_workers(loader)
    assert list(copied) == [1, 2]
    assert copied._iterator is None
    assert loader._iterator is not None


def private(node: ast.AST) -> str | None:
    """Name of an attribute or an import with an underscore."""
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.name if isinstance(node, ast.alias) else None


def own_names() -> set[str]:
    """Names that our code gives: functions, classes, and attributes of self."""
    names: set[str] = set()
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            match node:
                case (
                    ast.FunctionDef(name=name) | ast.ClassDef(name=name) | ast.Name(id=name, ctx=ast.Store())
                ):
                    names.add(name)
                case ast.Attribute(value=ast.Name(id="self"), attr=name, ctx=ast.Store()):
                    names.add(name)
    return names


def foreign(file: Path, ours: set[str]) -> dict[str, int]:
    """Private names of others, and the lines where they are used."""
    found: dict[str, Any] = {}
    for node in ast.walk(ast.parse(file.read_text())):
        name = private(node)
        if name is None or name.startswith("__") or name in ours:
            continue
        if name.startswith("_") or name in SEMI_PUBLIC:
            found[name] = getattr(node, "lineno", 0)
        module = getattr(node, "module", None) or ""
        assert "connectors" not in module, (file, module)
        assert "._" not in module, (file, module)
    return found


NOT_OF_TRAINERS = {"_BatchNorm", "_exit"}
"""PyTorch's base class of all BatchNorms; os._exit."""


@pytest.mark.costly
def test_only_one_file_uses_private_names():
    ours = own_names()
    for file in USERS:
        if file.name != "lightning.py" or file.parent.name != "training":
            assert foreign(file, ours).keys() <= NOT_OF_TRAINERS, (file, foreign(file, ours))
    assert {"_logger_connector", "_swap_models"} <= foreign(Path(lightning.__file__), ours).keys()


def test_gradients_are_enlarged_where_an_optimizer_undoes_the_scaler_itself():
    from pytorch_lightning.plugins import MixedPrecision

    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaled = pl.Trainer(
        plugins=[MixedPrecision("16-mixed", "cpu", scaler)], logger=False, accelerator="cpu", max_epochs=1,
        enable_checkpointing=False, enable_progress_bar=False,
    )  # fmt: skip
    weight = [nn.Parameter(torch.ones(2))]
    fused, plain = torch.optim.Adam(weight, fused=True), torch.optim.Adam(weight)
    assert lightning.gradient_scale(scaled, fused) == 8.0
    assert lightning.gradient_scale(scaled, plain) == lightning.gradient_scale(trainer(), fused) == 1.0
