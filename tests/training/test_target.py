"""Sparsity on demand: the target is met on the exact count, and everything around it."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import sparsereg
from sparsereg.compression import Accountant, count, load_compacted
from sparsereg.compression.budget import Constraint, Multiplier, exact_share, meet_, meet_all_
from sparsereg.data import build as data_of
from sparsereg.data.form import Form
from sparsereg.distributions import shift
from sparsereg.penalties import expected_l0, hard_concretes
from sparsereg.target_settings import falling
from sparsereg.training.build import unchanging
from sparsereg.training.callback_list import target_settings
from sparsereg.training.config import Distill, Finetune, Trainer, Training
from sparsereg.training.distillation import Distillation
from sparsereg.training.target import TargetSettings
from sparsereg.zoo.networks import build

LENET = {"name": "lenet300", "sampling": "batch"}


def settings(**changes: object) -> TargetSettings:
    usual = {"cost": "parameters", "kept": 0.1, "start_epoch": 2.0, "ramp_epochs": 4.0}
    return TargetSettings(**(usual | changes))


def test_ramp_is_geometric_between_its_ends():
    s = settings()
    assert [falling(s.kept, s.progress_at(e)) for e in (0, 2, 4, 6, 9)] == pytest.approx(
        [1, 1, math.sqrt(0.1), 0.1, 0.1]
    )


@pytest.mark.parametrize(
    "wrong",
    [{"cost": "weights"}, {"kept": 0.0}, {"kept": 1.0}, {"ramp_epochs": 0}, {"start_epoch": -1},
     {"every_n_steps": 0}, {"integral_gain": -1}, {"kept": math.nan}],
)  # fmt: skip
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong)).partition("_")[0]):
        settings(**wrong)


def test_multiplier_restarts_when_the_constraint_holds():
    m = Multiplier(proportional_gain=10.0, integral_gain=0.01)
    assert m.update(0.5, steps=2) == pytest.approx(5.0 + 0.01)
    assert m.update(0.5, steps=2) == pytest.approx(5.0 + 0.02)
    assert m.update(-0.1) == 0.0
    assert m.integral == 0.0


def test_multiplier_solves_a_constrained_problem():
    """min (x - 3)^2 subject to log(x / 2) <= 0 has x = 2 and the multiplier 2 * (3 - 2) * 2 = 4."""
    x = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    m = Multiplier(proportional_gain=10.0, integral_gain=0.05)
    optimizer = torch.optim.SGD([x], lr=0.01)
    found = []
    for _ in range(4000):
        g = torch.log(x / 2)
        found.append(m.update(float(g.detach())))
        optimizer.zero_grad()
        ((x - 3) ** 2 + found[-1] * g).backward()
        optimizer.step()
    assert float(x.detach()) == pytest.approx(2.0, abs=0.05)
    assert sum(found[-1000:]) / 1000 == pytest.approx(4.0, rel=0.1)


@pytest.mark.parametrize(
    ("teaching", "scale"),
    [({}, 1.0), ({"ckpt_path": "a.ckpt"}, 1 + 0.9 * 15), ({"ckpt_path": "a.ckpt", "temperature": 0.5}, 1.0),
     ({"ckpt_path": "a.ckpt", "only_finetuning": True}, 1.0)],
)  # fmt: skip
def test_the_multiplier_goes_with_what_a_teacher_makes_of_the_loss(teaching, scale):
    distill = Distill(**({"weight": 0.9, "temperature": 4.0} | teaching))
    trainer, finetune = Trainer(max_epochs=3), Finetune(epochs=1)
    cfg = Training(target_sparsity=0.9, distill=distill, trainer=trainer, finetune=finetune)
    found = target_settings(cfg, "parameters", 0.1)
    assert (found.proportional_gain, found.integral_gain) == pytest.approx((10 * scale, 0.01 * scale))


@pytest.mark.costly
@pytest.mark.parametrize("cost", ["parameters", "macs"])
@pytest.mark.parametrize("kept", [0.7, 0.3, 0.05])
@pytest.mark.parametrize("model", [LENET, {"name": "lenet5", "sampling": "batch"}])
def test_exact_count_meets_the_target_from_below(model, kept, cost):
    net = build(model, Form(10, (1, 28, 28)), gated=True)
    for seed, gate in enumerate(hard_concretes(net).values()):
        noise = torch.randn(gate.log_alpha.shape, generator=torch.Generator().manual_seed(seed))
        gate.log_alpha.data.copy_(2 * noise)
    accountant = Accountant(net, torch.zeros(1, 1, 28, 28))
    ranks = torch.cat([g.p_active().flatten() for g in hard_concretes(net).values()]).argsort()
    share = meet_(accountant, cost, kept)
    assert share == exact_share(accountant, cost)
    assert 0.99 * kept <= share <= kept
    counted = count(net, torch.zeros(1, 1, 28, 28))
    full, left = (
        (counted.parameters, counted.compacted_parameters)
        if cost == "parameters"
        else (counted.macs, counted.compacted_macs)
    )
    assert left / full == pytest.approx(share)
    # The likeliest gates are the open ones, but for a few that fill what is left below the target.
    is_open = torch.cat([(g.median() > 0).flatten() for g in hard_concretes(net).values()])[ranks]
    first_unlike = is_open.long().flip(0).argmin()  # from the likeliest on, the first that is shut
    assert is_open.sum() - first_unlike < 60


@pytest.mark.costly
@pytest.mark.parametrize("round_to", [8, 16])
def test_widths_are_multiples_where_gates_open_together(round_to):
    net = build({"name": "googlenet", "gate": "all"}, Form(10, (1, 8, 8)), gated=True).eval()
    for seed, gate in enumerate(hard_concretes(net).values()):
        noise = torch.randn(gate.log_alpha.shape, generator=torch.Generator().manual_seed(seed))
        gate.log_alpha.data.copy_(2 * noise)
    before = {path: gate.log_alpha.clone() for path, gate in hard_concretes(net).items()}
    accountant = Accountant(net, torch.zeros(1, 1, 8, 8))
    share = meet_(accountant, "parameters", 0.3, round_to)
    assert share == exact_share(accountant, "parameters")
    assert 0.28 <= share <= 0.3
    for path, gate in hard_concretes(net).items():
        is_open = gate.median() > 0
        whole = len(is_open)
        assert int(is_open.sum()) in {*range(0, whole, round_to), whole}
        if 0 < is_open.sum() < whole:  # within a layer the likeliest stay
            assert before[path][is_open].min() >= before[path][~is_open].max()


class Branch(nn.Module):
    """Nearly all of it is one branch of a sum."""

    def __init__(self):
        super().__init__()
        self.into, self.out = nn.Linear(6, 10), nn.Linear(10, 3)
        self.branch = nn.Sequential(nn.Linear(10, 80), nn.ReLU(), nn.Linear(80, 10))

    def forward(self, x):
        x = self.into(x).relu()
        return self.out(x + self.branch(x))


@pytest.mark.parametrize(("odds", "stays"), [(0.4, True), (-0.4, False)])
def test_a_block_that_training_left_open_stays_where_without_it_too_little_would(odds, stays):
    """It is the first to go, and all units behind it are wide open."""
    torch.manual_seed(0)
    network = sparsereg.gate(Branch().eval(), torch.randn(4, 6))
    for name, gates in hard_concretes(network).items():
        middle = shift(gates.temperature, gates.gamma, gates.zeta)
        places = torch.linspace(1, 5, gates.gate_size[0])
        gates.log_alpha.data = middle + (torch.tensor([odds]) if "blocks" in name else places)
    accountant = Accountant(network, torch.randn(4, 6))
    reached = meet_all_(accountant, "parameters", 0.5, [])
    assert (0.475 < reached <= 0.5) is stays
    assert (reached < 0.2) is not stays


def test_meeting_the_target_hardly_changes_the_output():
    net = build(LENET, Form(10, (1, 28, 28)), gated=True).eval()
    for gate in hard_concretes(net).values():
        polarised = torch.where(torch.arange(gate.log_alpha.numel()) % 3 == 0, 8.0, -8.0)
        gate.log_alpha.data.copy_(polarised + 0.01 * torch.arange(gate.log_alpha.numel()))
    images = torch.randn(16, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    accountant = Accountant(net, images[:1])
    with torch.no_grad():
        before = net(images)
        meet_(accountant, "parameters", 1.2 * exact_share(accountant, "parameters"))
        assert (net(images) - before).abs().max() < 0.02 * before.abs().max()


def test_gates_that_are_surely_open_are_still_ranked():
    net = build(LENET, Form(10, (1, 28, 28)), gated=True)
    for seed, gate in enumerate(hard_concretes(net).values()):
        noise = torch.randn(gate.log_alpha.shape, generator=torch.Generator().manual_seed(seed))
        gate.log_alpha.data.copy_(30 + noise)
        assert (gate.p_active() == 1).all()
    accountant = Accountant(net, torch.zeros(1, 1, 28, 28))
    assert 0.29 <= meet_(accountant, "parameters", 0.3) <= 0.3


def test_penalty_has_the_value_and_the_gradient_of_the_lagrangian():
    log_alpha = torch.tensor([0.5, -0.2], requires_grad=True)
    gradient = torch.tensor([0.3, 0.1])
    penalty = Constraint(2.0, 0.7, [(log_alpha, gradient)], {}).penalty()
    assert penalty.item() == pytest.approx(1.4)
    penalty.backward()
    assert torch.allclose(log_alpha.grad, 2.0 * gradient)


def test_expected_l0_weighs_gates_by_their_weights():
    net = build(LENET, Form(10, (1, 28, 28)), gated=True)
    sizes = {"input_gate": 784 * 300, "hidden_gate1": 300 * 100, "hidden_gate2": 100 * 10}
    total = sum(
        getattr(net, name).gates.p_active().double().mean() * size for name, size in sizes.items()
    ) / sum(sizes.values())
    assert expected_l0(net).item() == pytest.approx(total.item(), rel=1e-6)


def test_distillation_is_cross_entropy_or_divergence_at_its_ends():
    teacher, pupil = nn.Linear(4, 3), nn.Linear(4, 3)
    x, labels = torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])
    logits = pupil(x)
    loss = nn.functional.cross_entropy(logits, labels)
    assert torch.equal(Distillation(teacher, 0.0, 4.0).mixed(loss, logits, teacher(x)), loss)
    same = Distillation(teacher, 1.0, 4.0).mixed(loss, teacher(x), teacher(x))
    assert same.abs() < 1e-6
    p, q = (teacher(x) / 2).softmax(1), (logits / 2).softmax(1)
    expected = 4 * (p * (p.log() - q.log())).sum(1).mean()
    assert torch.allclose(
        Distillation(teacher, 1.0, 2.0).mixed(loss, logits, teacher(x)), expected, atol=1e-6
    )
    assert not any(p.requires_grad for p in teacher.parameters())


class _Asked(nn.Linear):
    times = 0

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        self.times += len(input)
        return super().forward(input)


def test_a_teacher_is_asked_once_about_images_that_do_not_change():
    teacher, images = _Asked(4, 3), torch.randn(6, 4)
    taught = Distillation(teacher, 1.0, 2.0, lambda: iter(images.split(4)))
    for order in torch.randperm(6).split(3):
        assert torch.equal(
            taught.answer(images[order]), nn.functional.linear(images, *teacher.parameters())[order]
        )
    assert teacher.times == 6
    other = torch.randn(3, 4)
    assert torch.equal(taught.answer(other), teacher(other))
    teacher.to(torch.bfloat16)
    assert taught.answer(other.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("translate", [0.0, 1.0])
def test_only_images_that_do_not_change_are_asked_about_once(translate: float):
    data = data_of({"name": "digits", "augment": {"translate": translate}})
    data.setup()
    batches = unchanging(data)
    assert (batches is None) == (translate > 0)
    if batches is not None:
        assert sum(map(len, batches())) == data.num_train


RECIPE = ["model=lenet300", "trainer.max_epochs=3", "optimizer.gate_lr_ratio=20"]


def test_target_sparsity_is_met_and_found_again(run, tiny):
    done = run("train", *tiny, *RECIPE, "target_sparsity=0.9")
    assert done.code == 0, done.err
    assert 0.9 <= done.results["exact_sparsity"] < 0.91
    assert done.results["lambda_l0"] is None
    assert done.results["target_sparsity"] == 0.9
    tested = run("test", f"ckpt_path={done.last}", "trainer.accelerator=cpu")
    assert tested.results["exact_sparsity"] == done.results["exact_sparsity"]
    assert tested.results["test_acc"] == done.results["test_acc"]


def test_gates_that_had_no_time_are_said_to_have_had_none(run, tiny):
    short = run("train", *tiny, "model=lenet300", "trainer.max_epochs=1", "target_sparsity=0.9")
    assert short.code == 0, short.err
    assert 0.9 <= short.results["exact_sparsity"] < 0.91
    assert "the gates have not come near the target" in short.err


@pytest.mark.costly
def test_gates_keep_their_learning_rate_under_a_target(run, tiny):
    schedule = ["trainer.max_epochs=4", "optimizer.schedule_epochs=4", "optimizer.warmup_epochs=0"]
    for target, falls in (("target_sparsity=0.5", False), ("lambda_l0=2", True)):
        done = run("train", *tiny, "model=lenet300", *schedule, target)
        groups = torch.load(done.last, weights_only=True)["optimizer_states"][0]["param_groups"]
        rates = {g["name"]: (g["lr"], g["initial_lr"]) for g in groups}
        assert rates["weights"][0] < 0.01 * rates["weights"][1]
        assert (rates["gates"][0] < 0.01 * rates["gates"][1]) == falls


@pytest.mark.costly
def test_target_macs_of_a_network_with_concatenations(run, tiny):
    done = run("train", *tiny, "model.gate=all", "trainer.max_epochs=2", "target_macs=0.4")
    assert done.code == 0, done.err
    kept = done.results["compacted_macs"] / done.results["macs"]
    assert 0.39 <= kept <= 0.4


@pytest.mark.costly
def test_without_validation_images_and_with_averaged_weights(run, tiny):
    for more in (["data.val_size=0"], ["ema_decay=0.9"], ["ema_decay=0.9", "data.val_size=0"]):
        done = run("train", *tiny, *RECIPE, "target_sparsity=0.9", *more)
        assert done.code == 0, done.err
        assert 0.9 <= done.results["exact_sparsity"] < 0.91, more
        tested = run("test", f"ckpt_path={done.last}", "trainer.accelerator=cpu")
        assert tested.results["test_acc"] == done.results["test_acc"]
        assert tested.results["exact_sparsity"] == done.results["exact_sparsity"]


@pytest.mark.costly
def test_finetuning_trains_the_compacted_network(run, tiny):
    done = run("train", *tiny, *RECIPE, "target_sparsity=0.9", "finetune.epochs=2")
    assert done.code == 0, done.err
    assert 0.9 <= done.results["exact_sparsity"] < 0.91
    assert done.results["checkpoint"].endswith("checkpoints/last.ckpt")
    small = torch.load(done.results["checkpoint"], weights_only=True)
    weights = sum(v.numel() for k, v in small["state_dict"].items() if v.is_floating_point())
    assert weights == done.results["compacted_parameters"]
    assert not any("log_alpha" in key for key in small["state_dict"])
    tested = run("test", f"ckpt_path={done.results['checkpoint']}", "trainer.accelerator=cpu")
    assert tested.code == 0, tested.err
    assert tested.results["test_acc"] == done.results["test_acc"]
    resumed = run("train", f"ckpt_path={done.last}", "resume_training=true", "finetune.epochs=3")
    assert resumed.code == 0, resumed.err
    assert resumed.results["finetune_epochs"] == 3
    assert resumed.results["epochs"] == done.results["epochs"]


@pytest.mark.costly
def test_teacher_shapes_the_pupil_and_stays_out_of_its_checkpoint(run, tiny):
    teacher = run("train", *tiny, "model=lenet300", "without_using_gate=true", "trainer.max_epochs=1")
    command = [*tiny, *RECIPE, f"distill.ckpt_path={teacher.last}"]
    taught = run("train", *command, "distill.weight=1")
    untaught = run("train", *command, "distill.weight=0")
    assert taught.code == 0, taught.err
    assert taught.weights().keys() == untaught.weights().keys()
    assert not torch.equal(taught.weights()["net.fc1.weight"], untaught.weights()["net.fc1.weight"])


@pytest.mark.costly
def test_a_teacher_of_fine_tuning_alone_leaves_the_gates_to_the_labels(run, tiny):
    teacher = run("train", *tiny, "model=lenet300", "without_using_gate=true", "trainer.max_epochs=1")
    command = [*tiny, *RECIPE, "target_sparsity=0.9", "finetune.epochs=1"]
    taught = run("train", *command, f"distill.ckpt_path={teacher.last}", "distill.only_finetuning=true")
    untaught = run("train", *command)
    assert taught.code == 0, taught.err
    gated = [
        torch.load(done.last.with_name("gated.ckpt"), weights_only=True)["state_dict"]
        for done in (taught, untaught)
    ]
    assert all(torch.equal(value, gated[1][key]) for key, value in gated[0].items())
    assert not torch.equal(taught.weights()["net.fc1.weight"], untaught.weights()["net.fc1.weight"])
    resumed = run("train", f"ckpt_path={taught.last}", "resume_training=true", "finetune.epochs=2")
    assert resumed.code == 0, resumed.err
    alone = run("train", *command[:-1], f"distill.ckpt_path={teacher.last}", "distill.only_finetuning=true")
    assert "error: distill.only_finetuning=true needs fine-tuning: give finetune.epochs" in alone.err
    untold = run("train", *command, "distill.only_finetuning=true")
    assert "error: distill.only_finetuning=true needs a teacher: give distill.ckpt_path" in untold.err


@pytest.mark.costly
def test_averaged_weights_differ_from_the_last_and_resume(run, tiny):
    settings = [*tiny, "model=lenet300", "ema_decay=0.9", "temperature=linear"]
    four = run("train", *settings, "trainer.max_epochs=4")
    content = torch.load(four.last, weights_only=True)
    key = "net.fc1.weight"
    assert not torch.equal(content["state_dict"][key], content["current_model_state"][key])
    temperature = {float(v) for k, v in content["state_dict"].items() if k.endswith("_extra_state")}
    assert len(temperature) == 1
    two = run("train", *settings, "trainer.max_epochs=2")
    resumed = run("train", f"ckpt_path={two.last}", "resume_training=true", "trainer.max_epochs=4")
    assert resumed.code == 0, resumed.err
    for name, value in four.weights().items():
        assert torch.equal(value, resumed.weights()[name]), name


@pytest.mark.costly
@pytest.mark.parametrize("model", [["model=lenet300"], ["model=vit", "model.width=24", "model.depth=2"]])
def test_one_shot_takes_units_out_before_the_first_epoch(run, tiny, model):
    plain = run("train", *tiny, *model, "without_using_gate=true", "trainer.max_epochs=2")
    asked = ["target_sparsity=0.6", "target.one_shot=true", "trainer.max_epochs=1"]
    done = run("train", f"ckpt_path={plain.last}", *asked, *tiny[6:])
    assert done.code == 0, done.err
    assert 0.6 <= done.results["exact_sparsity"] < 0.65
    weights = done.weights()
    places = torch.cat([value.flatten() for name, value in weights.items() if name.endswith("log_alpha")])
    assert bool((places.abs() == 20).all())
    resumed = run("train", f"ckpt_path={done.last}", "resume_training=true", "trainer.max_epochs=2")
    assert resumed.code == 0, resumed.err
    assert resumed.results["exact_sparsity"] == done.results["exact_sparsity"]
    assert resumed.results["epochs"] == 2


@pytest.mark.costly
@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (["target.one_shot=true"], "target.one_shot=true needs a target"),
        (["target.one_shot=true", "target_sparsity=0.5"], "of a trained network: give ckpt_path=RUN"),
        (["target.one_shot=true", "target_latency_ms=3"], "one_shot=true and target_latency_ms=3 exclude"),
        (
            ["target.one_shot=true", "front=[0.5,0.7]"],
            "makes each size in one shot by itself",
        ),
        (["target_sparsity=1.2"], "target_sparsity"),
        (["target_sparsity=0.5", "target_macs=0.5"], "exclude each other"),
        (["target_sparsity=0.5", "lambda_l0=1.0"], "lambda_l0"),
        (["target_sparsity=0.5", "lambda_l0=20"], "lambda_l0"),
        (["target_macs=0.5", "without_using_gate=true"], "without_using_gate"),
        (["target_macs=0.5", "target_latency_ms=3"], "target_macs and target_latency_ms exclude each other"),
        (["target_memory_mb=0"], "> 0"),
        (
            ["target_macs=0.5", "runtime=eager"],
            "runtime=eager is of measurements: give target",
        ),
        (
            ["target_memory_mb=1", "threads=2"],
            "threads=2 is of measurements: give target",
        ),
        (["batch=8"], "batch=8 is of measurements"),
        (["target_latency_ms=3", "runtime=tvm"], "one of eager, compiled, onnxruntime, openvino"),
        (["target_latency_ms=3", "trainer.devices=2"], "is measured by one process"),
        (["target_sparsity=0.5", "test_checkpoint=best"], "test_checkpoint"),
        (["target_sparsity=0.5", "trainer.max_epochs=-1"], "trainer.max_epochs"),
        (["target.ramp=0", "target_sparsity=0.5"], "target.ramp"),
        (["finetune.epochs=-1"], "finetune.epochs"),
        (["finetune.epochs=1", "without_using_gate=true"], "finetune.epochs"),
        (["distill.ckpt_path=nowhere.ckpt"], "error: distill.ckpt_path=nowhere.ckpt: no such file"),
        (["distill.weight=2"], "distill.weight"),
        (["ema_decay=1"], "ema_decay"),
        (["label_smoothing=1"], "label_smoothing"),
        (["lambda_l0=null"], "lambda_l0"),
        (["target.params=inception4a"], "target.params=inception4a: expected a name and a share in (0, 1)"),
        (["target.params=inception4a:1.5"], "expected a name and a share in (0, 1), such as"),
        (["target.macs=inception4a:0.5", "lambda_l0=2"], "target.macs=inception4a:0.5 and lambda_l0=2"),
        (["target.params=a:0.5", "front=[0.5,0.7]"], "and target.params=a:0.5 exclude each other"),
        (["shape=uniform"], "shape=uniform needs a network that gets its gates by its operations"),
        (["shape=uniform", "model=vit", "without_using_gate=true"], "shape=uniform is one of gates"),
        (["model=vit", "model.gate=head"], "model.gate=head: expected one of channels, units, heads"),
        (["penalty=channels"], "penalty"),
        (["penalty=weights", "model=torchvision"], "penalty"),
    ],
)
def test_wrong_recipes_are_refused_in_one_line(run, tiny, wrong, says):
    refused = run("train", *tiny, *wrong)
    assert refused.code == 2
    line = refused.err.strip().splitlines()[-1]
    assert line.startswith("error:")
    assert says in line
    assert not Path("outputs/train/tblog").exists()


def test_parts_that_are_not_there(run, tiny, tmp_path):
    refused = run("train", *tiny, "model=lenet5", "target.params=heads:0.5")
    assert refused.code == 2
    assert "target.params=heads:0.5: no gates of the family heads are there" in refused.err
    refused = run("train", *tiny, "model=lenet5", "target.params=no_such:0.5")
    assert "error: target.params=no_such:0.5: no module with weights is called no_such" in refused.err
    assert not list(tmp_path.glob("outputs/train/tblog/lightning_logs/version_0/*"))


VIT = ["model=vit", "model.width=24", "model.depth=2", "trainer.max_epochs=3", "optimizer.gate_lr_ratio=20"]


def test_a_target_below_what_no_gate_can_take_is_refused_before_training(run, tiny, tmp_path):
    refused = run("train", *tiny, *VIT, "target_sparsity=0.9999")
    assert refused.code == 2
    assert "error: target_sparsity=0.9999 cannot be met: with every gate shut 0." in refused.err
    assert not list(tmp_path.glob("outputs/train/tblog/lightning_logs/version_0/*"))


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        (
            ["model=vit", "model.gate=kv_groups"],
            "nothing of kv_groups that can go; it has blocks",
        ),
        (["model=vit", "model.gate_layers=stem"], "no layer is called 'stem'; there are patches, blocks.0."),
        (
            ["model=torchvision", "model.small_images=true", "model.gate=heads"],
            "model.name=resnet18: cannot be gated: families: the network has nothing of heads",
        ),
    ],
)
def test_gates_that_a_network_has_no_place_for(run, tiny, asked, says):
    refused = run("train", *tiny, *asked)
    assert refused.code == 2
    assert says in refused.err.strip().splitlines()[-1]


@pytest.mark.parametrize("way", [["target_sparsity=0.2"], ["front=[0.2,0.3]", "front_epochs=1"]])
def test_only_what_is_asked_for_gets_gates(run, tiny, way):
    asked = ["model.gate=[heads,units]", "model.gate_layers=[blocks.1.*,blocks.0.mlp.*]"]
    done = run("train", *tiny, *VIT, *asked, *way)
    assert done.code == 0, done.err
    if "front" in done.results:
        small = load_compacted(done.results["front"][0]["file"])
    else:
        small = load_compacted(run("test", f"ckpt_path={done.folder}", "compact=true").results["compacted"])
    shapes = {name: tuple(p.shape) for name, p in small.named_parameters()}
    assert shapes["blocks.0.attention.qkv.weight"] == (72, 24)  # all of its heads, and the whole width
    assert sum(math.prod(shape) for shape in shapes.values()) <= 0.8 * done.results["parameters"]


@pytest.mark.costly
def test_parts_of_a_network_have_targets_of_their_own(run, tiny):
    parts = ["target.params=[blocks.*.mlp:0.5,heads:0.25]", "target_macs=0.6"]
    done = run("train", *tiny, *VIT, *parts)
    assert done.code == 0, done.err
    assert done.results["compacted_macs"] / done.results["macs"] <= 0.6
    rows = {row["part"]: row for row in done.results["target_parts"]}
    assert set(rows) == {"blocks.*.mlp", "heads"}
    assert all(row["stays"] <= row["may_stay"] for row in rows.values())
    assert rows["blocks.*.mlp"]["stays"] > 0.3
    resumed = run("train", f"ckpt_path={done.last}", "resume_training=true", "trainer.max_epochs=4")
    assert resumed.code == 0, resumed.err
    assert {row["part"] for row in resumed.results["target_parts"]} == set(rows)


@pytest.mark.costly
def test_a_part_alone_and_one_shape_for_all_layers(run, tiny):
    done = run("train", *tiny, *VIT, "target.params=blocks.*.mlp:0.5", "shape=uniform")
    assert done.code == 0, done.err
    assert done.results["lambda_l0"] is None
    assert done.results["target_parts"][0]["stays"] <= 0.5
    tested = run("test", f"ckpt_path={done.folder}", "compact=true")
    assert tested.results["test_acc"] == done.results["test_acc"]
    small = load_compacted(tested.results["compacted"])
    sizes = {tuple(p.shape) for n, p in small.named_parameters() if n.endswith("mlp.up.weight")}
    assert len(sizes) == 1


def test_a_part_with_rounded_widths_while_channels_leave(run, tiny):
    more = ["target.params=fc2:0.8", "target.round_to=8", "callbacks.compact_every_n_epochs=1"]
    done = run("train", *tiny, *RECIPE, "target_sparsity=0.6", *more)
    assert done.code == 0, done.err
    (part,) = done.results["target_parts"]
    assert 0.1 < part["stays"] <= part["may_stay"] == pytest.approx(0.2)
    assert done.results["exact_sparsity"] >= 0.6
    weights = done.weights()
    opened = [int((g > math.log(0.1 / 1.1) * 2 / 3).sum()) for n, g in weights.items() if "log_alpha" in n]
    assert all(n % 8 == 0 for n, whole in zip(opened, (784, 300, 100), strict=True) if n < whole)
    resumed = run("train", f"ckpt_path={done.last}", "resume_training=true", "trainer.max_epochs=4")
    assert resumed.code == 0, resumed.err
    assert resumed.results["target_parts"][0]["stays"] <= 0.2


def test_scalars_of_the_constraint_are_logged(run, tiny):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    done = run("train", *tiny, *RECIPE, "target_sparsity=0.9")
    events = EventAccumulator(str(done.folder)).Reload()
    tags = set(events.Tags()["scalars"])
    assert {"target/lambda_target", "target/target_kept", "target/expected_kept"} <= tags
    assert events.Scalars("target/target_kept")[-1].value == pytest.approx(0.1)
    assert json.loads((done.path).read_text())["lambda_target"] is not None


@pytest.mark.costly
def test_megabytes_of_the_compacted_network(run, tiny):
    settings = ["model=lenet5", "trainer.max_epochs=2", "optimizer.warmup_epochs=0", "batch=2"]

    def takes(asked):
        refused = run("train", *tiny, *settings, f"target_memory_mb={asked}")
        assert refused.code == 2
        return float(re.search(r"takes (\S+) MB \(batch 2\): ask for", refused.err).group(1))

    smallest, whole = takes(1e-9), takes(1e9)
    asked = round((smallest + whole) / 3, 4)
    done = run("train", *tiny, *settings, f"target_memory_mb={asked}", "finetune.epochs=1")
    assert done.code == 0, done.err
    results = done.results
    assert results["target_memory_mb"] == asked
    assert results["measured_with"] == "batch 2"
    assert results["measured_memory_mb"] == pytest.approx(asked, rel=0.02)
    assert results["measured_memory_mb_smallest"] == pytest.approx(smallest, rel=0.01)
    assert results["measured_memory_mb_whole"] == pytest.approx(whole, rel=0.01)
    tested = run("test", f"ckpt_path={done.folder}", "compact=true")
    small = load_compacted(tested.results["compacted"])
    assert sum(t.numel() * t.element_size() for t in small.state_dict().values()) / 1e6 < asked


def test_milliseconds_that_no_network_takes(run, tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("SPARSEREG_CACHE", str(tmp_path / "cache"))
    settings = ["model=lenet300", "trainer.max_epochs=2", "runtime=eager"]
    done = run("train", *tiny, *settings, "target_latency_ms=1e-6")
    assert done.code == 2
    assert "target_latency_ms=1e-06: with one unit left in each place the network still takes" in done.err
    assert "(eager, 1 thread, batch 1): ask for more" in done.err
    assert not list(tmp_path.glob("outputs/train/tblog/lightning_logs/version_0/*"))
