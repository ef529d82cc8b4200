"""Train or fine-tune a network with L0 gates: `python train.py --help`."""

from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from sparsereg.cli import script, user_overrides, wrong_input


def run(cfg: DictConfig) -> Path:
    """Compose, build, train, test the checkpoint, write results.json; return its path."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    from sparsereg.compression import Accountant
    from sparsereg.config import checked, plain
    from sparsereg.files import write_atomically, write_json
    from sparsereg.training import build
    from sparsereg.training.results import count_summary, gate_summary, metric

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
        net = build.build_network(cfg, data, checkpoint)
        if checkpoint is not None and not cfg.resume_training:
            build.start_weights(net, checkpoint, cfg, overrides)
        net = build.synchronise(cfg, net)
        accountant = Accountant(net, build.example_input(data))
        module = build.build_module(cfg, net, data, checkpoint)
        folder = build.claim_run_folder(Path("outputs"))
        logger = build.build_logger(cfg.logger.name, folder)
        num_batches = build.batches_per_epoch(cfg, data)
        callbacks, timer = build.build_callbacks(cfg, data, accountant, folder, logging_on=bool(logger))
        trainer = build.build_trainer(cfg, callbacks, logger, folder, num_batches, data.num_val == 0)

    if trainer.is_global_zero:
        write_atomically(folder / "config.yaml", lambda p: p.write_text(OmegaConf.to_yaml(cfg, resolve=True)))
        data.save_split(folder / "split.npz")
    trainer.fit(module, datamodule=data, ckpt_path=cfg.ckpt_path if cfg.resume_training else None)
    epochs = trainer.current_epoch
    val_acc, tested = build.tested_checkpoint(cfg, trainer, folder)
    trainer.test(module, datamodule=data, ckpt_path=tested, verbose=False)
    results = {
        "val_acc": val_acc,
        "test_acc": metric(trainer, "test_acc"),
        **gate_summary(net),
        **count_summary(accountant.count()),
        "lambda_l0": None if cfg.without_using_gate else cfg.lambda_l0,
        "seed": cfg.seed,
        "epochs": epochs,
        "seconds_per_epoch": timer.seconds_per_epoch,
        "checkpoint": tested,
        "data": data.describe(),
    }
    if trainer.is_global_zero:
        if not isinstance(logger, bool):
            metrics = {k: results[k] for k in ("val_acc", "test_acc", "expected_sparsity", "exact_sparsity")}
            metrics = {f"final/{k}": v for k, v in metrics.items() if v is not None}
            logger.log_hyperparams(build.hyperparameters(plain(cfg)), metrics)
            logger.finalize("success")
        write_json(folder / "results.json", results)
        for key in ("val_acc", "test_acc", "L_C0", "expected_sparsity", "exact_sparsity"):
            if results[key] is not None:
                print(f"{key:18s} {results[key]:.4f}")
    return folder / "results.json"


def choices(arguments: list[str]) -> list[str]:
    """Take model and data from the checkpoint, if one is named."""
    if not any(a.startswith("ckpt_path=") for a in arguments):
        return []  # and PyTorch need not be loaded to print a help text
    from sparsereg.training.checkpoint import group_choices

    return group_choices(arguments)


if __name__ == "__main__":
    script("train", run, choices)
