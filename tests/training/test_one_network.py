"""A run ships one network, whatever names it, and a run that was cut off anywhere can be finished."""

import json
import shutil

import pytest
import torch

from sparsereg.training import stages
from sparsereg.training.module import Learner

from .test_resume import assert_same_weights

STORY = ["trainer.max_epochs=2", "finetune.epochs=2", "model.gate=all", "droprate_init=0.3", "lambda_l0=5"]


@pytest.fixture
def tuned(trained_once, tiny):
    return trained_once(*tiny, *STORY)


@pytest.mark.costly
def test_a_run_is_found_by_its_folder_its_last_checkpoint_and_its_results(run, tuned):
    assert tuned.code == 0, tuned.err
    results = tuned.results
    assert results["checkpoint"] == str(tuned.last)
    for name in (tuned.folder, tuned.last, results["checkpoint"]):
        tested = run("test", f"ckpt_path={name}")
        assert tested.code == 0, tested.err
        for key in ("test_acc", "val_acc", "checkpoint"):
            assert tested.results[key] == results[key], key
        assert tested.results["parameters"] == results["compacted_parameters"]
    assert not (tuned.folder / "finetune" / "checkpoints").exists()


def test_the_gated_network_keeps_a_name_of_its_own(run, tuned):
    before = tuned.results["before_finetuning"]
    assert before["checkpoint"] == str(tuned.folder / "checkpoints" / "gated.ckpt")
    tested = run("test", f"ckpt_path={before['checkpoint']}")
    assert tested.results["test_acc"] == before["test_acc"]
    assert tested.results["val_acc"] == before["val_acc"]
    assert tested.results["gates"] == tuned.results["gates"] > 0


@pytest.mark.slow
def test_the_best_gated_network_is_the_one_that_was_tuned_when_asked_for(run, tiny):
    best = run("train", *tiny, *STORY, "test_checkpoint=best")
    assert best.code == 0, best.err
    assert best.results["before_finetuning"]["checkpoint"].endswith("checkpoints/gated_best.ckpt")
    for name in (best.folder, best.results["checkpoint"]):
        tested = run("test", f"ckpt_path={name}")
        assert tested.results["test_acc"] == best.results["test_acc"]
        assert tested.results["checkpoint"] == best.results["checkpoint"]


@pytest.mark.costly
def test_a_folder_serves_wherever_a_checkpoint_does(run, tiny, tuned, tmp_path):
    moved = tmp_path / "elsewhere"
    shutil.copytree(tuned.folder, moved)
    shutil.rmtree(tuned.folder)
    compacted = run("test", f"ckpt_path={moved}", "compact=true")
    assert compacted.code == 0, compacted.err
    assert compacted.results["compacted"] == str(moved / "checkpoints" / "compacted.pt")
    assert compacted.results["compacted_test_acc"] == compacted.results["test_acc"]
    further = run(
        "train", f"ckpt_path={moved}", "without_using_gate=true", "trainer.max_epochs=1", "trainer=cpu"
    )
    assert further.code == 0, further.err
    taught = run("train", *tiny, f"distill.ckpt_path={moved}", "trainer.max_epochs=1")
    assert taught.code == 0, taught.err


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "has no checkpoints/last.ckpt"), ("{", "does not name a checkpoint"), ("[]", "does not name")],
)
def test_folders_that_are_no_runs(run, tmp_path, content, message):
    folder = tmp_path / "folder"
    folder.mkdir()
    if content is not None:
        (folder / "results.json").write_text(content)
    for script in ("train", "test"):
        refused = run(script, f"ckpt_path={folder}")
        assert refused.code == 2
        assert message in refused.err
        assert len(refused.err.strip().splitlines()) == 1


def test_a_name_in_results_cannot_lead_out_of_the_run(run, tuned):
    results = {**tuned.results, "checkpoint": "../../../../etc/passwd"}
    (tuned.folder / "results.json").write_text(json.dumps(results))
    refused = run("test", f"ckpt_path={tuned.folder}")
    assert refused.code == 2
    assert "has no checkpoints/passwd" in refused.err


def cut_off(monkeypatch, when: str) -> None:
    """Let the next run end as if it had been killed at some moment."""

    class Killed(RuntimeError):
        pass

    def die(*args, **kwargs):
        raise Killed

    if when == "before the test":
        monkeypatch.setattr(stages.Stage, "test", die)
    elif when == "before fine-tuning":
        monkeypatch.setattr(stages, "compact", die)
    elif when == "before the second test":
        test = stages.Stage.test
        monkeypatch.setattr(stages.Stage, "test", lambda s: test(s) if s.before is None else die())
    else:
        epoch = {"in the first epoch of fine-tuning": 0, "in the second epoch of fine-tuning": 1}[when]
        step = Learner.training_step

        def training_step(self, batch, batch_idx):
            if self.notes.structure is not None and self.current_epoch == epoch and batch_idx == 2:
                die()
            return step(self, batch, batch_idx)

        monkeypatch.setattr(Learner, "training_step", training_step)


MOMENTS = [
    "before the test",
    "before fine-tuning",
    "in the first epoch of fine-tuning",
    "in the second epoch of fine-tuning",
    "before the second test",
]


@pytest.mark.costly
@pytest.mark.parametrize(
    ("settings", "moments"),
    [
        ([], MOMENTS[2:3]),
        pytest.param([], MOMENTS, marks=pytest.mark.slow),
        pytest.param(["test_checkpoint=best"], MOMENTS, marks=pytest.mark.slow),
        pytest.param(["ema_decay=0.5"], MOMENTS, marks=pytest.mark.slow),
    ],
    ids=["tuning", "last", "best", "averaged"],
)
def test_a_run_that_was_cut_off_is_finished(run, tiny, monkeypatch, settings, moments):
    whole = run("train", *tiny, *STORY, *settings)
    assert whole.code == 0, whole.err
    for number, moment in enumerate(moments):
        folder = whole.folder.with_name(f"version_{2 * number + 1}")
        with monkeypatch.context() as patch:
            cut_off(patch, moment)
            assert run("train", *tiny, *STORY, *settings).code == 1, moment
        assert not (folder / "results.json").exists()
        resumed = run("train", f"ckpt_path={folder}", "resume_training=true")
        assert resumed.code == 0, (moment, resumed.err)
        assert resumed.folder != folder
        assert_same_run(whole, resumed)


def assert_same_run(whole, resumed) -> None:
    """The same networks under the same names, and the same results but for where and when."""
    for name in ("last.ckpt", "gated.ckpt", "best.ckpt", "gated_best.ckpt"):
        one, other = (
            torch.load(o.folder / "checkpoints" / name, weights_only=True)["state_dict"]
            for o in (whole, resumed)
        )
        assert_same_weights(one, other)
    expected, found = (
        json.loads(json.dumps(o.results).replace(f"/{o.folder.name}/", "/RUN/")) for o in (whole, resumed)
    )
    assert found.pop("resumed")["epoch"] in (1, 2)
    for own in ("seconds_per_epoch", "provenance"):
        found[own] = expected[own]
    assert found == expected


@pytest.mark.slow
def test_a_target_that_was_cut_off_reports_the_multiplier_it_found(run, tiny, monkeypatch):
    story = [*tiny, "trainer.max_epochs=2", "target_sparsity=0.5", "model.gate=all"]
    whole = run("train", *story)
    with monkeypatch.context() as patch:
        cut_off(patch, "before the test")
        run("train", *story)
    resumed = run("train", f"ckpt_path={whole.folder.with_name('version_1')}", "resume_training=true")
    assert resumed.code == 0, resumed.err
    assert resumed.results["lambda_target"] == whole.results["lambda_target"] is not None
    assert_same_weights(whole.weights(), resumed.weights())


@pytest.mark.slow
def test_what_has_finished_says_so_and_may_be_given_more(run, tuned):
    refused = run("train", f"ckpt_path={tuned.folder}", "resume_training=true")
    assert refused.code == 2
    assert "nothing is left to train" in refused.err
    assert "give a larger finetune.epochs" in refused.err
    more = run("train", f"ckpt_path={tuned.folder}", "resume_training=true", "finetune.epochs=3")
    assert more.code == 0, more.err
    assert more.results["finetune_epochs"] == 3
    gated = tuned.folder / "checkpoints" / "gated.ckpt"
    longer = run("train", f"ckpt_path={gated}", "resume_training=true", "trainer.max_epochs=3")
    assert longer.code == 0, longer.err
    assert longer.results["epochs"] == 3


@pytest.mark.costly
def test_a_finished_run_may_be_fine_tuned_later(run, tiny, tuned):
    gated = run("train", *tiny, *STORY, "finetune.epochs=0")
    later = run("train", f"ckpt_path={gated.folder}", "resume_training=true", "finetune.epochs=2")
    assert later.code == 0, later.err
    assert_same_weights(tuned.weights(), later.weights())
