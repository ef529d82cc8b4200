"""Networks, data, optimizers, loggers and callbacks of the user: named by them, never by a checkpoint."""

import json
import textwrap

import pytest
import torch

from sparsereg import own_code
from sparsereg.errors import InputError

from .conftest import ROOT

QUICK = ["trainer=cpu", "trainer.max_epochs=1", "trainer.enable_progress_bar=false", "logger=none"]
NET = "model._target_=own_nets.Net"
SMALL = ["data=digits", "data.image_size=8", "data.limit_train_images=200"]


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Files of the user's in the folder where they stand."""
    (tmp_path / "own_nets.py").write_text(
        textwrap.dedent("""
        import torch
        from torch import nn
        from sparsereg import L0Linear

        LOOKED_UP = True
        NUMBER = 3

        class Net(nn.Sequential):
            def __init__(self, hidden=20, num_classes=10, image_shape=(1, 8, 8), act=None):
                super().__init__(
                    nn.Flatten(), nn.Linear(image_shape[1] * image_shape[2], hidden), nn.BatchNorm1d(hidden),
                    act or nn.ReLU(), nn.Linear(hidden, num_classes),
                )

        class Gated(nn.Sequential):
            def __init__(self, image_shape, num_classes):
                super().__init__(nn.Flatten(), L0Linear(image_shape[1] * image_shape[2], num_classes))

        class Masked(Net):
            def __init__(self, image_shape, num_classes):
                super().__init__(8, num_classes, image_shape)
                self.register_buffer("mask", torch.full((num_classes,), -float("inf")).where(
                    torch.arange(num_classes) > 7, 0.0))

            def forward(self, images):
                return super().forward(images) + self.mask.clamp(min=-9.0)

        class Wrong(nn.Flatten):
            pass

        class Breaks(nn.Module):
            def __init__(self):
                raise KeyError("my fault")

        def text():
            return "no network"
        """)
    )
    (tmp_path / "own_broken.py").write_text("import no_such_package\n")
    monkeypatch.setattr("sys.path", list(__import__("sys").path))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    yield tmp_path
    for name in ("own_nets", "own_broken"):
        __import__("sys").modules.pop(name, None)


@pytest.mark.costly
def test_network_is_gated_and_gets_what_its_signature_names(run, own):
    trained = run("train", *QUICK, *SMALL, NET, "model.hidden=24")
    assert trained.code == 0, trained.err
    assert trained.results["gates"] == 24
    assert trained.results["parameters"] == 64 * 24 + 24 + 48 + 24 * 10 + 10
    stored = torch.load(trained.last, weights_only=True)["sparsereg"]["config"]["model"]
    assert stored == {"_target_": "own_nets.Net", "hidden": 24}

    refused = run("test", f"ckpt_path={trained.last}")
    assert refused.code == 2
    assert "add model._target_=own_nets.Net to the command line" in refused.err
    tested = run("test", f"ckpt_path={trained.last}", NET, "compact=true", "trainer=cpu")
    assert tested.code == 0, tested.err
    assert tested.results["test_acc"] == trained.results["test_acc"]
    small = run("test", f"ckpt_path={tested.results['compacted']}", "trainer=cpu")  # needs no code
    assert small.results["test_acc"] == pytest.approx(tested.results["test_acc"], abs=0.01)

    resume = ["train", *QUICK, "trainer.max_epochs=2", f"ckpt_path={trained.last}", "resume_training=true"]
    assert "add model._target_=own_nets.Net" in run(*resume).err
    resumed = run(*resume, NET)
    assert resumed.code == 0, resumed.err
    assert resumed.results["epochs"] == 2
    changed = run(*resume, NET, "model.hidden=30")
    assert "cannot be resumed with other settings: model.hidden was 24, is 30" in changed.err


def test_network_whose_mask_holds_infinity_is_found_again(run, own):
    trained = run("train", *QUICK, *SMALL, "model._target_=own_nets.Masked", "without_using_gate=true")
    assert trained.code == 0, trained.err
    assert trained.weights()["net.mask"].isinf().sum() == 2
    tested = run("test", f"ckpt_path={trained.last}", "model._target_=own_nets.Masked", "trainer=cpu")
    assert tested.code == 0, tested.err
    assert tested.results["test_acc"] == trained.results["test_acc"]


@pytest.mark.costly
def test_networks_with_gates_and_without(run, own):
    gated = run("train", *QUICK, *SMALL, "model._target_=own_nets.Gated")
    assert gated.code == 0, gated.err
    assert gated.results["gates"] == 640
    refused = run("train", *QUICK, *SMALL, "model._target_=own_nets.Gated", "without_using_gate=true")
    assert refused.code == 2
    assert "has gates of its own" in refused.err
    plain = run("train", *QUICK, *SMALL, NET, "without_using_gate=true")
    assert plain.results["gates"] == 0
    tuned = run("train", *QUICK, f"ckpt_path={plain.last}", NET, "droprate_init=0.05", "finetune.epochs=1")
    assert tuned.code == 0, tuned.err
    assert (
        run("test", f"ckpt_path={tuned.folder}", "trainer=cpu").code == 0
    )  # what was compacted needs no code
    nested = run("train", *QUICK, *SMALL, NET, "model.act._target_=torch.nn.GELU")
    assert nested.code == 0, nested.err
    again = run("test", f"ckpt_path={nested.last}", NET)
    assert again.code == 2
    assert "add model.act._target_=torch.nn.GELU" in again.err


NETWORKS = [
    ("no_such.Net", "model._target_=no_such.Net: there is no module 'no_such' in "),
    ("own_nets.Nett", "has no 'Nett': did you mean 'Net'?"),
    ("own_nets.NUMBER", "expected a class or a function, it is of type int"),
    ("own_nets.Net.forward.x", "own_nets.Net.forward ("),
    ("Net", "expected module.Class, such as my_module.Net"),
    ("3", "model._target_=3: expected the name of a class"),
    ("null", "model._target_=null: expected the name of a class"),
    ("own_broken.Net", "own_broken cannot be imported: No module named 'no_such_package' ("),
    ("own_nets.Breaks", "KeyError: 'my fault' ("),
    ("own_nets.text", "expected a torch.nn.Module, it makes a str"),
    (
        "own_nets.Wrong",
        "own_nets.Wrong: expected logits of shape (2, 10) for two images,"
        " as task=classification needs them, got shape (2, 64)",
    ),
]
OTHERS = [
    ("model=own", "model._target_=null: expected the name of a class"),
    (f"{NET} model.hiden=3", "got an unexpected keyword argument 'hiden'; its arguments are (hidden=20, "),
    (f"{NET} penalty=weights", "the gates of a network of yours"),
    ("optimizer._target_=torch.optim.Addam", "has no 'Addam': did you mean 'Adam'?"),
    ("optimizer._target_=torch.optim.LBFGS", "optimizer._target_=torch.optim.LBFGS: ValueError: LBFGS"),
    ("optimizer._target_=own_nets.Net", "optimizer._target_=own_nets.Net: "),
    (
        "+callbacks.mine._target_=own_nets.text",
        "own_nets.text: expected a Lightning Callback, it makes",
    ),
    ("+callbacks.mine=3", "unknown key 'callbacks.mine'"),
    ("+callbacks.compact_belo=0.1", "'callbacks.compact_belo': did you mean 'callbacks.compact_below'?"),
    ("logger._target_=own_nets.text", "logger._target_=own_nets.text: expected a Lightning Logger"),
    ("logger=tensorbord", "did you mean 'tensorboard'"),
    ("logger=csv +logger.csv.no_such=1", "logger.csv: "),
    ("data._target_=own_nets.text", "data._target_=own_nets.text: expected a LightningDataModule"),
]


@pytest.mark.parametrize(("given", "message"), [(f"model._target_={n}", m) for n, m in NETWORKS] + OTHERS)
def test_wrong_targets_are_one_line(run, own, given, message):
    quick = [a for a in QUICK if a != "logger=none" or "logger" not in given]
    network = [] if "model" in given else [NET]
    data = [] if "data." in given else SMALL
    outcome = run("train", *quick, *data, *network, *given.split())
    assert outcome.code == 2, outcome.err
    assert message in outcome.err
    assert outcome.err.startswith("error: ")
    assert outcome.err.count("\n") == 1
    assert not list(own.glob("outputs/train/tblog/*/version_*"))


@pytest.mark.costly
def test_experiment_file_of_the_user(run, own, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    configs = f"--config-dir={ROOT / 'examples' / 'configs'}"
    arguments = ["experiment=own", *QUICK, "logger=csv"]
    trained = run("train", configs, *[a for a in arguments if a != "logger=none"])
    assert trained.code == 0, trained.err
    assert (own / "diary.txt").read_text().startswith("epoch 0: {")
    assert "val_acc" in (trained.folder / "csv" / "metrics.csv").read_text().splitlines()[0]
    config = torch.load(trained.last, weights_only=True)["sparsereg"]["config"]
    assert config["model"] == {"_target_": "examples.own_model.Net", "width": 12}
    assert config["data"] == {"_target_": "examples.own_data.Digits", "batch_size": 100}
    assert config["optimizer"]["betas"] == [0.9, 0.99]
    groups = torch.load(trained.last, weights_only=True)["optimizer_states"][0]["param_groups"]
    assert [g["name"] for g in groups] == ["weights", "norms_and_biases", "gates"]
    assert trained.results["data"]["num_train"] == 1200

    resume = [*QUICK, f"ckpt_path={trained.last}", "resume_training=true", "trainer.max_epochs=2"]
    refused = run("train", *resume)
    assert (
        "add model._target_=examples.own_model.Net data._target_=examples.own_data.Digits to" in refused.err
    )
    named = ["model._target_=examples.own_model.Net", "data._target_=examples.own_data.Digits"]
    refused = run("train", *resume, *named)
    assert "add optimizer._target_=torch.optim.NAdam" in refused.err
    resumed = run("train", *resume, *named, "optimizer._target_=torch.optim.NAdam")
    assert resumed.code == 0, resumed.err
    assert "callbacks.diary of the run is not taken from its checkpoint" in resumed.out + resumed.err
    pytest.importorskip("onnxscript")
    tested = run("test", f"ckpt_path={resumed.folder}", *named, "export=onnx", "compact=true", "trainer=cpu")
    assert tested.code == 0, tested.err


@pytest.mark.costly
def test_nothing_of_a_checkpoint_is_looked_up(run, own, monkeypatch):
    """Each place of a configuration names code: nothing is imported, and the user is told."""
    trained = run("train", *QUICK, *SMALL, "model=lenet300", "optimizer=sgd_cosine")
    (own / "evil.py").write_text("from pathlib import Path\nPath('ran').touch()\nclass Net: pass\n")
    evil = {"_target_": "evil.Net"}
    monkeypatch.setattr(own_code, "locate", lambda *a: pytest.fail("looked up"))
    places = {
        "model": evil, "data": evil, "optimizer": evil, "temperature": evil, "trainer": {"plugins": [evil]},
        "callbacks": {"mine": evil}, "logger": evil, "distill": evil, "finetune": evil, "target": evil,
    }  # fmt: skip
    for group, value in places.items():
        content = torch.load(trained.last, weights_only=True)
        content["sparsereg"]["config"][group] |= value
        torch.save(content, own / "evil.ckpt")
        for command in (["test"], ["train", *QUICK, "resume_training=true", "trainer.max_epochs=2"]):
            outcome = run(*command, f"ckpt_path={own / 'evil.ckpt'}")
            assert outcome.code in (0, 2), (group, outcome.err)
            assert group not in ("model", "data") or "evil.Net" in outcome.err
        teacher = run("train", *QUICK, *SMALL, "model=lenet300", f"distill.ckpt_path={own / 'evil.ckpt'}")
        assert teacher.code == 2 or group != "model", group
    assert not (own / "ran").exists()


def test_calls():
    made = own_code.call({"_target_": "datetime.date", "_args_": [2026, 1], "day": 3}, "key")
    assert made.isoformat() == "2026-01-03"
    half = own_code.call({"_target_": "datetime.date", "_partial_": True, "year": 2026}, "key")
    assert half(month=1, day=3) == made
    code = own_code.code_in({"a": {"_target_": "x.Y", "b": [{"_target_": "z.W"}], "c": 1}})
    assert code == {"a._target_": "x.Y", "a.b": [{"_target_": "z.W"}]}
    with pytest.raises(InputError, match="add a.b="):
        own_code.check_repeated(code, {"a._target_": "x.Y"}, "F")


@pytest.mark.costly
def test_sweep_knows_when_own_code_has_changed(run, own):
    sweep = ["train", "-m", *QUICK, *SMALL, NET, "model.hidden=8,12"]
    assert run(*sweep).code == 0
    again = run(*sweep)
    assert again.out.count("finished before") == 2
    (own / "own_nets.py").write_text((own / "own_nets.py").read_text() + "\n# changed\n")
    assert "finished before" not in run(*sweep).out
    assert json.loads((run(*sweep).path.parent / "0" / "job.json").read_text())["status"] == "skipped"


# ---- a schedule of the learning rate

SCHEDULE = "optimizer.schedule._target_=own_schedules.Triangle"
BATCHES = 2  # of an epoch: 200 images, 100 at a time


@pytest.fixture
def schedules(own):
    (own / "own_schedules.py").write_text(
        textwrap.dedent("""
        class Triangle:
            def __init__(self, period=2.0, epochs=None):
                self.period, self.epochs = period, epochs

            def __call__(self, epoch):
                return abs(epoch / self.period % 2 - 1)

        def halves(optimizer, every):
            from torch.optim import lr_scheduler
            return lr_scheduler.StepLR(optimizer, every, 0.5)

        def text():
            return "no schedule"

        def negative():
            return lambda epoch: 1 - epoch

        def breaks():
            return lambda epoch: 1 / (2 - epoch)

        def another():
            import torch
            model = torch.optim.SGD([torch.zeros(1)], lr=1.0)
            return torch.optim.lr_scheduler.StepLR(model, 1)
        """)
    )
    yield own
    __import__("sys").modules.pop("own_schedules", None)


def rates(run, folder) -> list[float]:
    """Learning rate of the weights in each step of a run, from its metrics.csv."""
    lines = [line.split(",") for line in (folder / "csv" / "metrics.csv").read_text().splitlines()]
    column = next(i for i, name in enumerate(lines[0]) if name.startswith("lr-") and name.endswith("weights"))
    return [float(line[column]) for line in lines[1:] if line[column]]


STEPS = ["data=digits", "data.image_size=8", "data.limit_train_images=200", "data.batch_size=100"]
STEPS += ["model=lenet300", "trainer=cpu", "trainer.enable_progress_bar=false", "logger=csv"]
STEPS += ["trainer.log_every_n_steps=1", "optimizer.lr=0.004"]
ONE_CYCLE = "optimizer.schedule._target_=torch.optim.lr_scheduler.OneCycleLR"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (SCHEDULE, [1, 0.75, 0.5, 0.25, 0, 0.25]),
        (f"{SCHEDULE} optimizer.schedule.period=1", [1, 0.5, 0, 0.5, 1, 0.5]),
        (
            "optimizer.schedule._target_=own_schedules.halves optimizer.schedule.every=2",
            [1, 1, 1, 1, 0.5, 0.5],
        ),
        (
            "optimizer.schedule._target_=torch.optim.lr_scheduler.ExponentialLR optimizer.schedule.gamma=0.5"
            " optimizer.schedule_interval=step",
            [1, 0.5, 0.25, 0.125, 0.0625, 0.03125],
        ),
    ],
)
def test_own_schedules(run, schedules, given, expected):
    trained = run("train", *STEPS, "trainer.max_epochs=3", *given.split())
    assert trained.code == 0, trained.err
    assert rates(run, trained.folder) == pytest.approx([0.004 * f for f in expected], rel=1e-6)


def test_one_cycle_knows_how_long_it_is(run, schedules):
    cycle = [ONE_CYCLE, "optimizer.schedule.max_lr=0.01", "optimizer.schedule.cycle_momentum=false"]
    cycle += ["optimizer.schedule_interval=step", "optimizer.schedule_epochs=3"]
    trained = run("train", *STEPS, "trainer.max_epochs=3", *cycle)
    assert trained.code == 0, trained.err
    model = torch.optim.SGD([torch.zeros(1)], lr=0.004)
    ours = torch.optim.lr_scheduler.OneCycleLR(model, 0.01, 3 * BATCHES, cycle_momentum=False)
    expected = []
    for _ in range(3 * BATCHES):
        expected.append(ours.get_last_lr()[0])
        model.step()
        ours.step()
    assert rates(run, trained.folder) == pytest.approx(expected, rel=1e-6)
    longer = run("train", *STEPS, "trainer.max_epochs=5", *cycle)
    assert longer.code == 2
    assert "Tried to step 7 times" in longer.err
    momentum = run("train", *STEPS, "trainer.max_epochs=3", *cycle[:2], *cycle[3:])
    assert "it moves the momentum, too" in momentum.err


@pytest.mark.costly
@pytest.mark.parametrize("optimizer", [[], ["optimizer._target_=torch.optim.NAdam"]])
def test_a_run_with_its_own_schedule_is_resumed(run, schedules, optimizer):
    """2 + 2 epochs are 4, with the schedule named again; no checkpoint names it."""
    own = [*optimizer, SCHEDULE, "optimizer.schedule.period=4"]
    whole = run("train", *STEPS, "trainer.max_epochs=4", *own)
    half = run("train", *STEPS, "trainer.max_epochs=2", *own)
    assert half.code == 0, half.err
    stored = torch.load(half.last, weights_only=True)["sparsereg"]["config"]["optimizer"]
    assert stored["schedule"] == {"_target_": "own_schedules.Triangle", "period": 4}
    resume = [f"ckpt_path={half.last}", "resume_training=true", "trainer.max_epochs=4", "logger=csv"]
    resume += ["trainer.enable_progress_bar=false", *optimizer]
    refused = run("train", *resume)
    assert refused.code == 2
    assert "add optimizer.schedule._target_=own_schedules.Triangle to the command line" in refused.err
    resumed = run("train", *resume, SCHEDULE)
    assert resumed.code == 0, resumed.err
    one, other = (torch.load(r.last, weights_only=True)["state_dict"] for r in (whole, resumed))
    assert all(torch.equal(one[key], other[key]) for key in one)
    changed = run("train", *resume, SCHEDULE, "optimizer.schedule.period=8")
    assert changed.code == 0, changed.err
    assert "optimizer.schedule.period was 4, is 8 from here on" in changed.err + changed.out
    usual = run("train", *resume, "optimizer.schedule=constant")
    assert usual.code == 0, usual.err
    tested = run("test", f"ckpt_path={half.last}", "trainer=cpu")  # nothing is trained: no schedule is needed
    assert tested.code == 0, tested.err


@pytest.mark.costly
@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            "own_schedules.text",
            "own_schedules.text: expected a function of the epoch, or a torch.optim.lr_sch",
        ),
        ("own_schedules.negative", "own_schedules.negative at epoch 2: expected a number >= 0"),
        ("own_schedules.breaks", "own_schedules.breaks at epoch 2: ZeroDivisionError: "),
        ("own_schedules.another", "expected a scheduler of the argument 'optimizer' that it is given"),
        ("own_schedules.no", "has no 'no'"),
        ("torch.optim.lr_scheduler.ReduceLROnPlateau", "it waits for a metric"),
        ("torch.optim.lr_scheduler.StepLR", "missing a required argument: 'step_size'"),
        ("null", "optimizer.schedule._target_=null: expected the name of a class"),
    ],
)
def test_wrong_schedules_are_one_line(run, schedules, given, message):
    outcome = run("train", *STEPS, "trainer.max_epochs=3", f"optimizer.schedule._target_={given}")
    assert outcome.code == 2, outcome.err
    assert message in outcome.err
    assert outcome.err.count("\n") == 1
    assert not list(schedules.glob("outputs/train/tblog/*/version_*"))


def test_a_schedule_without_a_name_is_refused(run, schedules):
    refused = run("train", *STEPS, "optimizer.schedule={period: 3}")
    assert refused.code == 2
    assert (
        "optimizer.schedule={period: 3}: expected one of constant, cosine, multistep, or your own"
        in refused.err
    )
