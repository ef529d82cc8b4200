"""Say what a trained network is worth, and hand over a smaller one: `python test.py --help`."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from sparsereg.cli import named, script, settings_of
from sparsereg.errors import wrong_input

if TYPE_CHECKING:
    from sparsereg.commands.deployment import HandOver
    from sparsereg.training.config import Evaluation

log = logging.getLogger(__name__)


def run(composed: DictConfig) -> Path:
    """Rebuild the network of a checkpoint, test it, compact, export and time it; write results.json."""
    from sparsereg.progress import showing
    from sparsereg.training.config import Evaluation

    given = settings_of(Evaluation, composed)
    with showing(given.trainer.enable_progress_bar):
        return tested(given)


def tested(given: "Evaluation") -> Path:
    """Do what the settings of the command say; return the path of results.json."""
    from sparsereg.commands import deployment
    from sparsereg.files import new_version
    from sparsereg.provenance import Provenance
    from sparsereg.training import build, callback_list, inherited, trainers
    from sparsereg.training.accounting import accountant_of
    from sparsereg.training.page.page import PACKAGES
    from sparsereg.training.results import block_table, count_summary, gate_summary, measured, names
    from sparsereg.training.start_line import start_line

    with wrong_input():
        trainers.tune_process()
        trainers.quieten_lightning()
        deployment.check(given)
        cfg, checkpoint = inherited.rebuild(given, named())
        came_from = Provenance.of([("ckpt_path", checkpoint.path)], PACKAGES)
        trainers.check_trainer(cfg, multirun=False)
        data = build.build_data(cfg, checkpoint)
        cfg = build.resolved(cfg, data)
        trainers.check_shares(cfg, data)
        net = build.rebuild_network(cfg, checkpoint, data)
        module = build.build_module(cfg, net, data, checkpoint.structure)
        module.batch_norm_is_current = checkpoint.batch_norm_is_current
        trainer = trainers.build_trainer(
            cfg, [callback_list.batch_norm_estimation(cfg), *callback_list.own(cfg.callbacks)]
        )
        folder = new_version(Path("outputs") / "test")
        log.info(start_line(cfg.model.group, net, data, trainer.strategy.root_device, folder))

    task = module.task
    val: dict[str, float | None] = dict.fromkeys(names("val", task))
    if data.num_val:
        trainer.validate(module, datamodule=data, verbose=False)
        val = measured(trainer, "val", task)
    trainer.test(module, datamodule=data, verbose=False)
    net.cpu()
    example = build.example_input(data, net)
    count = accountant_of(net, example).count()
    results = {
        **val,
        **measured(trainer, "test", task),
        **gate_summary(net),
        **count_summary(count, net),
        "lambda_l0": checkpoint.config.get("lambda_l0") if checkpoint.gated else None,
        "seed": checkpoint.config.get("seed"),
        "epochs": checkpoint.epoch,
        "seconds_per_epoch": None,
        "checkpoint": str(checkpoint.path),
        "task": cfg.task.name,
        "objective": f"val_{task.figure}",
        "data": data.describe(),
    }
    device = trainer.strategy.root_device
    figures = {name: results[name] for name in names("test", task)}
    sizes = (count.parameters, count.macs)
    handed = deployment.HandOver(given, cfg, checkpoint, net, example, data, task, device, figures, sizes)
    results |= {**handed.run(folder), "provenance": came_from.to_dict()}
    return report(folder, results, handed, block_table(count, net))


def report(folder: Path, results: dict[str, Any], handed: "HandOver", blocks: str) -> Path:
    """Write report.html and results.json, and print what was found: return the path of the second.

    Args:
        folder: of the test.
        results: all of them.
        handed: what was made of the checkpoint.
        blocks: the table of blocks.
    """
    from sparsereg.files import write_json
    from sparsereg.settings import plain
    from sparsereg.training import artefacts
    from sparsereg.training.page.page import write_page
    from sparsereg.training.results import headline

    settings, task = {**plain(handed.given), **plain(handed.cfg)}, handed.task
    write_page(folder / "report.html", "Test report", results, handed.artefacts, settings, task, blocks)
    write_json(folder / "results.json", results)
    print(blocks)
    print(headline(results, task))
    print(artefacts.table(handed.artefacts, task, results))
    return folder / "results.json"


def choices(arguments: list[str]) -> list[str]:
    """Take model and data from the checkpoint."""
    if not any(a.startswith("ckpt_path=") for a in arguments):
        return []
    from sparsereg.training.checkpoint import group_choices

    return group_choices(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Run the command with these arguments, or those of the process, and leave the process."""
    script("test", run, choices, arguments=arguments)
