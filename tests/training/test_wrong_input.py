"""Wrong input: one line that says what, where and what to do; exit code 2; nothing written."""

import numpy as np
import pytest

from .conftest import write_images


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("lamda_l0=1", "did you mean 'lambda_l0'"),
        ("trainer.max_epoch=1", "did you mean 'trainer.max_epochs'"),
        ("data.batchsize=1", "did you mean 'data.batch_size'"),
        ("+lamda_l0=1", "did you mean 'lambda_l0'"),
        ("model=googlnet", "did you mean 'googlenet'"),
        ("optimizer.schedule=cosin", "expected one of"),
        ("lambda_l0=-1", "lambda_l0=-1: expected a number >= 0"),
        ("lambda_l2=-1", "lambda_l2=-1: expected a number >= 0"),
        ("lambda_l0=abc", "lambda_l0=abc: expected a number"),
        ("seed=1.5", "seed=1.5: expected an integer"),
        ("finetune.epochs=2.5", "finetune.epochs=2.5: expected an integer"),
        ("rerun=maybe", "rerun=maybe: expected true or false"),
        ("data.batch_size=abc", "data.batch_size=abc: expected an integer"),
        ("data.val_size=x", "data.val_size=x: expected a count"),
        ("trainer.max_epochs=x", "trainer.max_epochs=x: expected an integer"),
        ("trainer.max_epochs=2.5", "trainer.max_epochs=2.5: expected an integer"),
        ("trainer.limit_train_batches=x", "trainer.limit_train_batches=x: expected a number of batches"),
        ("trainer.limit_train_batches=1e-9", "less than one of the 5 batches"),
        ("trainer.overfit_batches=1e-9", "less than one of the 5 batches"),
        ("trainer.val_check_interval=99", "trainer.val_check_interval=99: expected 5 at most"),
        ("+trainer.max_epoch=3", "unknown key 'trainer.max_epoch': did you mean 'trainer.max_epochs'"),
        ("lambda_l0=nan", "lambda_l0=nan"),
        ("lambda_l0=1,2", "lambda_l0"),
        ("droprate_init=0", "droprate_init=0: expected a rate in (0, 1)"),
        ("droprate_init=1", "expected a rate in (0, 1)"),
        ("droprate_init=1.5", "expected a rate in (0, 1)"),
        ("temperature.final=0", "temperature.final=0: expected a number >= 1e-06"),
        ("seed=-1", "seed=-1"),
        ("optimizer.lr=0", "optimizer.lr"),
        ("model.gate=some", "model.gate=some: expected one of branches, all, none"),
        ("trainer=gpu", "no GPU"),
        ("trainer.precision=12", "trainer"),
        ("data.batch_size=0", "batch_size"),
        ("data.val_size=1000000", "val_size"),
        ("experiment=no_such", "experiment"),
    ],
)
def test_wrong_values(run, tiny, tmp_path, argument, message):
    outcome = run("train", *tiny, argument)
    assert outcome.code == 2, outcome.err
    errors = [line for line in outcome.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, outcome.err
    assert message in errors[0]
    assert "Traceback" not in outcome.err
    assert not (tmp_path / "outputs" / "train" / "tblog").exists()


def test_ddp_below_a_sweep_is_refused(run, tiny):
    outcome = run("train", "-m", *tiny, "trainer=ddp", "lambda_l0=0,1")
    assert outcome.code == 2
    assert "do not work together" in outcome.err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.pop("test_labels"), "test_labels"),
        (lambda a: a.update(train_labels=a["train_labels"][:-1]), "train_labels"),
        (lambda a: a.update(train_images=a["train_images"].astype(float)), "uint8"),
        (lambda a: a.update(train_images=a["train_images"][..., 0].reshape(96, -1)), "train_images"),
        (lambda a: a.update(test_images=a["test_images"][:, :4]), "test_images"),
    ],
)
def test_wrong_arrays(run, tiny, images, tmp_path, change, message):
    arrays = dict(np.load(images))
    change(arrays)
    np.savez(tmp_path / "wrong.npz", **arrays)
    outcome = run("train", *tiny, f"data.path={tmp_path / 'wrong.npz'}")
    assert outcome.code == 2, outcome.err
    assert message in outcome.err


def test_outputs_that_cannot_be_written(run, tiny, tmp_path):
    (tmp_path / "outputs").write_text("in the way")
    outcome = run("train", *tiny)
    assert outcome.code == 2, outcome.err
    assert "outputs" in outcome.err
    assert (tmp_path / "outputs").read_text() == "in the way"


def test_an_internal_failure_leaves_its_traceback_in_a_log(run, tiny, monkeypatch, tmp_path):
    from sparsereg.training import module

    def broken(*args):
        raise RuntimeError("something of ours")

    monkeypatch.setattr(module.Learner, "training_step", broken)
    outcome = run("train", *tiny)
    assert outcome.code == 1
    assert "something of ours" in outcome.err
    (log,) = (tmp_path / "outputs" / "failures").iterdir()
    assert str(log.name) in outcome.err
    assert "Traceback" in log.read_text()


@pytest.mark.costly
def test_a_loss_that_is_not_a_number_stops_and_keeps_the_last_good_checkpoint(run, tiny):
    good = run("train", *tiny, "trainer.max_epochs=1")
    bad = run(
        "train", f"ckpt_path={good.last}", "resume_training=true", "trainer.max_epochs=3", "lambda_l0=1e39"
    )
    assert bad.code == 2
    assert "error: the loss is not a finite number" in bad.err
    assert not (good.folder.parent / "version_1" / "results.json").exists()


@pytest.mark.costly
def test_small_images_of_another_shape_train(run, tmp_path, tiny):
    grey = write_images(tmp_path / "grey.npz", channels=1, size=12)
    outcome = run("train", *tiny, f"data.path={grey}", "trainer.max_epochs=1")
    assert outcome.code == 0, outcome.err
