"""What a resumed run takes from its checkpoint, what it may change, and what it says about that."""

import fnmatch

import pytest
import torch
from omegaconf import OmegaConf

from sparsereg.settings import all_keys
from sparsereg.training import resume
from sparsereg.training.config import Training

from .test_resume import assert_same_weights

NETWORK = ["model=lenet300", "droprate_init=0.3", "lambda_l0=2"]


def test_every_exception_is_one_of_a_key():
    """What is no exception is honoured and said: a new key needs no rule."""
    known = [key for key, d in all_keys(Training).items() if d.group is None]
    assert len(known) > 80
    assert [p for p in resume.CHANGES if not fnmatch.filter(known, p) and p != "data.augment"] == []
    assert [k for k in resume.NUMBERS if f"trainer.{k}" not in known] == []
    assert resume.rule("a_new_key") is resume.TOLD
    assert not resume.rule("model.act").honoured
    assert resume.rule("data.num_workers").silent


def test_differences_are_found_below_groups_that_are_null():
    was, now = {"a": {"b": {"c": 1}}, "d": 1, "e": [1]}, {"a": {"b": None}, "d": 1.0, "e": (1,), "new": 3}
    assert resume.differences(was, now) == {"a.b.c": (1, None)}
    assert resume.differences(now, was) == {"a.b.c": (None, 1)}


REFUSED = [
    ("data.split_seed=1", "data.split_seed was 42, is 1 (other images would train and validate)"),
    ("data.val_size=12", "data.val_size was 24, is 12"),
    ("data.limit_train_images=40", "data.limit_train_images was null, is 40"),
    ("droprate_init=0.7", "droprate_init was 0.3, is 0.7 (the gates are in the checkpoint)"),
    ("model.sampling=example", "model.sampling was batch, is example"),
    ("model=lenet5", "is of model=lenet300, not of model=lenet5"),
    ("optimizer.name=sgd", "optimizer.name was adamw, is sgd"),
    ("optimizer=sgd_cosine", "optimizer.name was adamw, is sgd"),
    ("optimizer.decay_all=true", "optimizer.decay_all was false, is true"),
    ("ema_decay=0.9", "ema_decay was null, is 0.9"),
    ("target_sparsity=0.5 lambda_l0=null", "target_sparsity was null, is 0.5"),
]


@pytest.mark.costly
def test_what_would_be_another_run_is_refused(run, tiny):
    done = run("train", *tiny, *NETWORK, "trainer.max_epochs=1")
    command = [f"ckpt_path={done.folder}", "resume_training=true", "trainer.max_epochs=2"]
    for argument, message in REFUSED:
        refused = run("train", *command, *argument.split())
        assert refused.code == 2, argument
        (line,) = refused.err.strip().splitlines()
        assert line.startswith("error: ")
        assert message in line
    assert len(list(done.folder.parent.iterdir())) == 1


def test_other_images_in_the_same_place_are_refused(run, tiny, images):
    from .conftest import write_images

    done = run("train", *tiny, *NETWORK, "trainer.max_epochs=1")
    write_images(images, num=99)
    refused = run("train", f"ckpt_path={done.folder}", "resume_training=true", "trainer.max_epochs=2")
    assert refused.code == 2
    assert "cannot be resumed with other data: num_train was 72, is 75" in refused.err


def test_what_is_honoured_is_said_used_and_recorded(run, tiny):
    done = run("train", *tiny, *NETWORK, "trainer.max_epochs=1", "optimizer.schedule=constant")
    command = [f"ckpt_path={done.folder}", "resume_training=true", "trainer.max_epochs=2"]
    same = run("train", *command)
    changes = ["optimizer.lr=0.1", "optimizer.weight_decay=0.0", "optimizer.betas=[0.8,0.9]", "lambda_l0=3"]
    other = run("train", *command, *changes)
    assert other.code == 0, other.err
    for said in ("optimizer.lr was 0.002, is 0.1", "lambda_l0 was 2.0, is 3.0", "betas was [0.9, 0.999]"):
        assert said in other.err
        assert said not in same.err
    assert other.results["resumed"]["changed"]["optimizer.lr"] == [0.002, 0.1]
    assert other.results["lambda_l0"] == 3.0
    state = torch.load(other.last, weights_only=True)
    groups = state["optimizer_states"][0]["param_groups"]
    assert [g["lr"] for g in groups] == pytest.approx([0.1, 0.1, 1.0])
    assert groups[0]["weight_decay"] == 0.0
    assert groups[0]["betas"] == (0.8, 0.9)
    assert OmegaConf.load(other.folder / "config.yaml").optimizer.lr == 0.1
    assert not torch.equal(other.weights()["net.fc1.weight"], same.weights()["net.fc1.weight"])


def test_the_place_in_the_schedule_is_that_of_the_epoch_when_batches_change(run, tiny):
    done = run("train", *tiny, *NETWORK, "trainer.max_epochs=2", "optimizer.schedule_epochs=4")
    command = [f"ckpt_path={done.folder}", "resume_training=true", "trainer.max_epochs=3"]
    rates = []
    for arguments in ([], ["data.batch_size=24"]):
        resumed = run("train", *command, *arguments)
        assert resumed.code == 0, resumed.err
        state = torch.load(resumed.last, weights_only=True)
        rates.append(state["lr_schedulers"][0]["_last_lr"][0])
    assert rates[0] == pytest.approx(rates[1])


def test_naming_the_same_choice_keeps_the_settings_of_the_run(run, tiny):
    whole = run("train", *tiny, *NETWORK, "trainer.max_epochs=2")
    half = run("train", *tiny, *NETWORK, "trainer.max_epochs=1")
    named = ["model=lenet300", *tiny[:2], "trainer=cpu", "trainer.max_epochs=2"]
    resumed = run("train", f"ckpt_path={half.folder}", "resume_training=true", *named)
    assert resumed.code == 0, resumed.err
    assert_same_weights(whole.weights(), resumed.weights())
    assert "lambda_l0 was" not in resumed.err


@pytest.mark.costly
def test_what_has_no_effect_any_more_is_refused(run, tiny):
    done = run("train", *tiny, *NETWORK, "trainer.max_epochs=1", "finetune.epochs=1")
    command = [f"ckpt_path={done.folder}", "resume_training=true", "finetune.epochs=2"]
    for argument in ("lambda_l0=9", "trainer.max_epochs=3", "temperature.initial=0.5", "optimizer.lr=0.1"):
        refused = run("train", *command, argument)
        assert refused.code == 2, argument
        assert "only fine-tuning is left" in refused.err
    tuned = run("train", *command, "finetune.lr=0.01")
    assert tuned.code == 0, tuned.err
    assert "finetune.lr was 0.002, is 0.01" in tuned.err
