"""Train or fine-tune a network with L0 gates: `python train.py --help`."""

from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from sparsereg.cli import script, user_overrides, wrong_input


def run(cfg: DictConfig) -> Path:
    """Compose, build, train, fine-tune, test, write results.json; return its path."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    from sparsereg.config import checked
    from sparsereg.files import write_json, write_text
    from sparsereg.training import build, stages
    from sparsereg.training.results import headline

    hydra = HydraConfig.get()
    overrides = user_overrides()
    with wrong_input():
        build.tune_process()
        build.quieten_lightning()
        checked(cfg)
        cfg, checkpoint = build.start_from(cfg, overrides)
        cfg = checked(cfg)
        build.check_trainer(cfg, multirun=hydra.mode == RunMode.MULTIRUN)
        data = build.build_data(cfg)
        stage = stages.begin(cfg, data, checkpoint, overrides, Path("outputs"))

    if stage.trainer.is_global_zero:
        write_text(stage.folder / "config.yaml", OmegaConf.to_yaml(cfg, resolve=True))
        data.save_split(stage.folder / "split.npz")
    results = stages.carry_out(cfg, stage)
    if stage.trainer.is_global_zero:
        write_json(stage.folder / "results.json", results)
        print(headline(results))
    return stage.folder / "results.json"


def choices(arguments: list[str]) -> list[str]:
    """Take model and data from the checkpoint, if one is named."""
    if not any(a.startswith("ckpt_path=") for a in arguments):
        return []  # and PyTorch need not be loaded to print a help text
    from sparsereg.training.checkpoint import group_choices

    return group_choices(arguments)


def main() -> None:
    """Run the command with the arguments of this process, and leave it."""
    script("train", run, choices)
