"""Train or fine-tune a network with L0 gates: `python train.py --help`."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from sparsereg import interruption
from sparsereg.cli import first_keys, first_overrides, named, script, settings_of
from sparsereg.errors import FellShort, wrong_input

if TYPE_CHECKING:
    from sparsereg.training.config import Training
    from sparsereg.training.stages import Stage

log = logging.getLogger(__name__)


def run(composed: DictConfig) -> Path:
    """Compose, build, train, fine-tune, test, write results.json; return its path."""
    from sparsereg.progress import showing
    from sparsereg.training.config import Training

    given = settings_of(Training, composed)
    with showing(given.trainer.enable_progress_bar):
        return trained(given)


def trained(given: "Training") -> Path:
    """Do what the settings of the command say; return the path of results.json."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    from sparsereg.files import write_text
    from sparsereg.provenance import Provenance
    from sparsereg.settings import plain
    from sparsereg.sweep import note_checkpoint
    from sparsereg.training import build, inherited, stages, trainers
    from sparsereg.training.ending import continuation
    from sparsereg.training.page.page import PACKAGES
    from sparsereg.training.start_line import start_line
    from sparsereg.training.tensorboard import name_by_overrides

    hydra = HydraConfig.get()
    with wrong_input():
        trainers.tune_process()
        trainers.quieten_lightning()
        cfg, checkpoint = inherited.start_from(given, named())
        trainers.check_trainer(cfg, multirun=hydra.mode == RunMode.MULTIRUN)
        data = build.build_data(cfg, checkpoint)
        cfg = build.resolved(cfg, data)
        trainers.check_shares(cfg, data)
        read = [] if checkpoint is None else [("ckpt_path", checkpoint.path)]
        came_from = Provenance.of(read, PACKAGES)
        stage = stages.begin(cfg, data, checkpoint, Path("outputs"))

    if stage.trainer.is_global_zero:
        device = stage.trainer.strategy.root_device
        log.info(start_line(cfg.model.group, stage.net, data, device, stage.folder))
        name_by_overrides(stage.folder, first_overrides())
        write_text(stage.folder / "config.yaml", OmegaConf.to_yaml(plain(cfg)))
        data.save_split(stage.folder / "split.npz")
    last = stage.folder / "checkpoints" / "last.ckpt"
    if stage.trainer.is_global_zero:
        note_checkpoint(last)
    interruption.continue_with(lambda given: continuation(last, cfg.without_using_gate))
    results = stages.carry_out(cfg, stage, first_keys())
    if stage.trainer.is_global_zero:
        results |= {"provenance": came_from.to_dict()}
        report(stage, cfg, results)
    if results.get("pick_short"):
        raise FellShort(stage.folder / "results.json", [results["pick_short"]])
    return stage.folder / "results.json"


def report(stage: "Stage", cfg: "Training", results: dict[str, Any]) -> None:
    """Write results.json and report.html of a finished run, and print its end: what to ship.

    Args:
        stage: that it ended with.
        cfg: of the run.
        results: of it; gets what the files and the table hold besides.
    """
    from sparsereg.files import write_json
    from sparsereg.settings import plain
    from sparsereg.training import artefacts
    from sparsereg.training.page.page import write_page
    from sparsereg.training.results import headline

    task, folder = stage.module.task, stage.folder
    made = artefacts.of_run(results, task)
    described = artefacts.examples_in_words(stage.data.describe(), cfg.trainer.limit_test_batches)
    results["artefacts"] = [a.to_dict() for a in made]
    results |= {"measured_on": described, "ship": artefacts.to_ship(made, task, results)}
    write_page(folder / "report.html", "Training report", results, made, plain(cfg), task)
    write_json(folder / "results.json", results)
    print(headline(results, task))
    print(artefacts.table(made, task, results))


def choices(arguments: list[str]) -> list[str]:
    """Take model, data and task from the checkpoint, if one is named; else what goes with what is named."""
    if not any(a.startswith("ckpt_path=") for a in arguments):
        from sparsereg.training.config import that_go_with

        return that_go_with(arguments)  # and PyTorch need not be loaded to print a help text
    from sparsereg.training.checkpoint import group_choices

    return group_choices(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Run the command with these arguments, or those of the process, and leave the process."""
    script("train", run, choices, arguments=arguments)
