"""Every experiment file runs: one batch of training, validation and test."""

import pytest

from .conftest import ROOT, write_images

EXPERIMENTS = sorted(p.stem for p in (ROOT / "configs" / "experiment").glob("*.yaml"))


def test_there_are_experiments():
    assert EXPERIMENTS


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiment_runs_one_batch(run, tmp_path, name):
    data = []
    if "digits" not in name:  # those that would be downloaded
        images = write_images(tmp_path / "images.npz", size=16)
        data = ["data=npz", f"data.path={images}", "data.val_size=8"]
    outcome = run(
        "train",
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
    )
    assert outcome.code == 0, outcome.err
    assert outcome.results["epochs"] == 1
    assert outcome.results["test_acc"] is not None
