"""The configuration in a checkpoint is data: it is not looked up, not obeyed beyond need, and checked."""

import pytest
import torch

from .test_resume import assert_same_weights

NETWORK = ["model=lenet300", "trainer.max_epochs=1"]


@pytest.fixture
def trained(trained_once, tiny):
    return trained_once(*tiny, *NETWORK)


def changed(path, change):
    """Write a checkpoint anew with other settings in it."""
    content = torch.load(path, weights_only=True)
    change(content["sparsereg"]["config"])
    torch.save(content, path)
    return path


def errors(outcome) -> list[str]:
    return [line for line in outcome.err.splitlines() if line.startswith("error: ")]


COMMANDS = [
    ("test",),
    ("train", "trainer.max_epochs=1"),
    ("train", "resume_training=true", "trainer.max_epochs=2"),
]


@pytest.mark.costly
@pytest.mark.parametrize("command", COMMANDS, ids=["test", "start", "resume"])
@pytest.mark.parametrize(
    "place",
    [
        lambda c: c["data"],
        lambda c: c["model"],
        lambda c: c["trainer"],
        lambda c: c,
        lambda c: c["optimizer"],
    ],
)
def test_nothing_is_looked_up_for_a_checkpoint(run, trained, monkeypatch, command, place):
    monkeypatch.setenv("SECRET_OF_MINE", "swordfish")

    def change(config):
        key = next(k for k, v in place(config).items() if isinstance(v, str))
        place(config)[key] = "${oc.env:SECRET_OF_MINE}"

    name, *arguments = command
    refused = run(name, f"ckpt_path={changed(trained.last, change)}", *arguments)
    assert refused.code == 2, refused.err
    assert "swordfish" not in refused.err + refused.out
    (line,) = refused.err.strip().splitlines()
    assert line.startswith("error: ")


@pytest.mark.costly
def test_a_resumed_run_takes_numbers_from_the_trainer_settings_and_nothing_else(run, trained, tiny, tmp_path):
    hostile = {
        "profiler": "advanced",
        "strategy": "ddp",
        "devices": 7,
        "num_nodes": 2,
        "fast_dev_run": True,
        "callbacks": ["sparsereg.nothing"],
        "logger": True,
        "plugins": ["async_checkpoint"],
        "default_root_dir": str(tmp_path / "hostile"),
        "enable_checkpointing": False,
        "detect_anomaly": True,
        "max_time": "00:00:00:00",
    }
    expected = run("train", *tiny, *NETWORK, "trainer.max_epochs=2")
    path = changed(trained.last, lambda c: c["trainer"].update(hostile))
    resumed = run("train", f"ckpt_path={path}", "resume_training=true", "trainer.max_epochs=2")
    assert resumed.code == 0, resumed.err
    assert_same_weights(expected.weights(), resumed.weights())
    assert not (tmp_path / "hostile").exists()
    assert "trainer.devices was 7, is 1" in resumed.err


@pytest.mark.costly
def test_a_checkpoint_names_no_class(run, trained, tmp_path):
    evil = {"_target_": "pathlib.Path.touch", "self": str(tmp_path / "touched")}
    for group in ("model", "data", "optimizer", "temperature", "trainer", "callbacks", "logger"):
        content = torch.load(trained.last, weights_only=True)
        content["sparsereg"]["config"][group] = {**content["sparsereg"]["config"][group], **evil}
        path = tmp_path / "evil.ckpt"
        torch.save(content, path)
        for name, *arguments in COMMANDS:
            outcome = run(name, f"ckpt_path={path}", *arguments)
            assert outcome.code in (0, 2), outcome.err
            assert len(errors(outcome)) == (outcome.code == 2)
            assert not list(tmp_path.glob("touched*"))
    content = torch.load(trained.last, weights_only=True)
    content["sparsereg"]["config"]["callbacks"]["mine"] = evil
    torch.save(content, path)
    resumed = run("train", f"ckpt_path={path}", "resume_training=true", "trainer.max_epochs=2")
    assert resumed.code == 0, resumed.err
    assert not list(tmp_path.glob("touched*"))


@pytest.mark.costly
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(lambda_l0="many"), "lambda_l0=many: expected a number"),
        (lambda c: c.update(lambda_l0=-1.0), "lambda_l0=-1.0: expected a number >= 0"),
        (lambda c: c.update(seed=[1]), "seed=[1]: expected an integer"),
        (lambda c: c.update(surprise=1), "surprise"),
        (lambda c: c["data"].update(batch_size="x"), "data.batch_size=x: expected an integer"),
        (lambda c: c["data"].update(surprise=1), "surprise"),
        (lambda c: c["data"].update(name="../../x"), "data=../../x"),
        (lambda c: c["model"].update(name="npz hydra.run.dir=x"), "model=npz hydra.run.dir=x"),
        (lambda c: c["trainer"].update(max_epochs="x"), "trainer.max_epochs=x: expected an integer"),
        (lambda c: c["optimizer"].update(lr=None), "optimizer.lr=null: expected a number"),
        (lambda c: c.pop("seed"), "its settings lack seed"),
        (lambda c: c["optimizer"].pop("lr"), "its settings lack optimizer.lr"),
        (lambda c: c.pop("optimizer"), "optimizer is missing"),
        (lambda c: c.pop("temperature"), "temperature"),
        (lambda c: c["model"].update(dropout="x"), "model.dropout=x: expected"),
        (lambda c: c.pop("model"), "model"),
        (lambda c: c.pop("data"), "data"),
        (lambda c: c.pop("trainer"), "trainer"),
        (lambda c: c.update(model=3), "model"),
        (lambda c: c.update(data=None), "data"),
        (lambda c: c.update(trainer=[1]), "trainer"),
        (lambda c: c.update(callbacks="x"), "callbacks"),
    ],
)
def test_settings_of_a_wrong_kind_are_refused_by_the_name_of_the_checkpoint(run, trained, change, message):
    path = changed(trained.last, change)
    for name, *arguments in COMMANDS:
        refused = run(name, f"ckpt_path={path}", *arguments)
        assert refused.code == 2, (name, refused.err)
        (line,) = errors(refused)
        assert line.startswith(f"error: ckpt_path={path}")
        assert message in line


@pytest.mark.costly
def test_data_of_a_checkpoint_are_only_read_and_named_when_missing(run, trained, tmp_path, monkeypatch):
    gone = tmp_path / "gone" / "images.npz"
    path = changed(trained.last, lambda c: c["data"].update(path=str(gone)))
    for name, *arguments in COMMANDS:
        refused = run(name, f"ckpt_path={path}", *arguments)
        assert refused.code == 2
        assert f"data.path={gone}" in refused.err
        assert f"(named by ckpt_path={path})" in refused.err
    from torchvision import datasets

    def fetching(root, train, download):
        assert not download, "a path from a checkpoint is written to"
        raise RuntimeError("not there")

    monkeypatch.setattr(datasets, "MNIST", fetching)
    path = changed(
        trained.last,
        lambda c: c["data"].pop("path") and c["data"].update(name="mnist", root=str(tmp_path / "planted")),
    )
    refused = run("test", f"ckpt_path={path}")
    assert refused.code == 2, refused.err
    assert f"data.root={tmp_path / 'planted'}" in refused.err
