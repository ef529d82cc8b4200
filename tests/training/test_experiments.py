"""Every experiment file runs: one batch of training, validation and test."""

from pathlib import Path

import pandas as pd
import pytest
from omegaconf import OmegaConf

from sparsereg.choices import choices

from .conftest import ROOT, write_images

FILES = sorted((ROOT / "configs" / "experiment").glob("*.yaml"))
TABLES = {p.stem for p in FILES if "sweeper:" in p.read_text()}
"""Experiments that are a run for each of several rows."""
EXPERIMENTS = sorted({p.stem for p in FILES} - TABLES)


def test_there_are_experiments():
    assert EXPERIMENTS


def one_batch(name: str, tmp_path: Path) -> list[str]:
    """Arguments of a run of an experiment that takes a batch of training, validation and test."""
    data = []
    if "digits" not in name and "gpt" not in name:  # those that would be downloaded
        images = write_images(tmp_path / "images.npz", size=16)
        data = ["data=npz", f"data.path={images}", "data.val_size=8"]
    return [
        f"experiment={name}",
        *data,
        "data.batch_size=4",
        "trainer=cpu",
        "trainer.max_epochs=1",
        "trainer.limit_train_batches=1",
        "trainer.limit_val_batches=1",
        "trainer.limit_test_batches=1",
        "trainer.enable_progress_bar=false",
        "callbacks.batch_norm.num_images=8",
        "callbacks.batch_norm.batch_size=4",
    ]


@pytest.mark.costly
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiment_runs_one_batch(run, tmp_path, name):
    outcome = run("train", *one_batch(name, tmp_path))
    assert outcome.code == 0, outcome.err
    assert outcome.results["epochs"] == 1
    assert outcome.results["test_acc"] is not None


@pytest.mark.slow
def test_table_runs_one_batch_of_each_row(run, tmp_path):
    outcome = run("train", *one_batch("cifar10_small", tmp_path), "data.limit_train_images=null")
    assert outcome.code == 0, outcome.err
    table = pd.read_csv(outcome.path)
    assert (table["status"] == "finished").all()
    rows = table.set_index(table["overrides"].str.extract(r"row=(\w+)")[0])
    assert rows.loc["baseline", "exact_sparsity"] == rows.loc["continued", "exact_sparsity"] == 0
    for row, share in {"target_39": 0.39, "target_64": 0.64, "target_815": 0.815}.items():
        assert share <= rows.loc[row, "exact_sparsity"] < share + 0.02
    start = (Path(rows.loc["target_39", "results"]).parent / "config.yaml").read_text()
    assert f"ckpt_path: {Path(rows.loc['baseline', 'results']).parent}/checkpoints/last.ckpt" in start


def test_tables_name_rows_that_there_are():
    assert {"cifar10_small", "cifar10_table"} <= TABLES
    known = set(choices([ROOT / "configs"], "row"))
    named = set()
    for table in TABLES:
        rows = OmegaConf.load(ROOT / "configs" / "experiment" / f"{table}.yaml").hydra.sweeper.params.row
        assert rows.startswith("baseline,")  # others start from it
        named |= set(rows.split(","))
    assert named == known


@pytest.mark.costly
def test_row_without_its_first_row_is_refused_in_one_line(run, tmp_path):
    arguments = one_batch("cifar10_table", tmp_path)
    outcome = run("train", *arguments, "row=target_10,target_39")
    assert outcome.code == 2
    assert "starts from job 0 of its sweep, which has not finished" in outcome.err
    assert "Traceback" not in outcome.err
    alone = run("train", *arguments, "row=target_10", "hydra.mode=RUN")
    assert alone.code == 2
    assert alone.err == "error: this run starts from job 0 of a sweep: give -m\n"
    assert not Path("outputs/train/tblog").exists()


@pytest.mark.costly
@pytest.mark.parametrize("name", sorted(p.stem for p in (ROOT / "configs" / "debug").glob("*.yaml")))
def test_debug_runs(run, tiny, name):
    short = ["trainer.max_epochs=1"] if name == "overfit" else []
    outcome = run("train", *tiny, f"debug={name}", *short)
    assert outcome.code == 0, outcome.err
    assert outcome.results["epochs"] == (2 if name == "limit" else 1)
    assert ("Profiler Report" in outcome.out + outcome.err) == (name == "profiler")
    assert bool(list(outcome.folder.glob("events.out.*"))) == (name != "one_batch")
