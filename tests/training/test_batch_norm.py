"""Re-estimated BatchNorm statistics are the averages over the batches, under test-time gates."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from sparsereg.model.basic_l0_blocks import GatedBatchNorm2d, L0Gate
from sparsereg.model.batch_norm_statistics import estimate_batch_norm_
from sparsereg.training.callbacks import BatchNormEstimation


def network() -> nn.Sequential:
    gate = L0Gate(6)
    with torch.no_grad():
        gate.gates.log_alpha.copy_(torch.linspace(-3, 3, 6))
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), GatedBatchNorm2d(6, gate), nn.ReLU(), nn.Conv2d(6, 4, 1), nn.BatchNorm2d(4)
    )


def test_statistics_are_the_averages_under_the_medians_of_the_gates():
    torch.manual_seed(0)
    net = network().train()
    batches = [torch.randn(8, 3, 6, 6) * 2 + 1 for _ in range(3)]
    assert estimate_batch_norm_(net, iter(batches)) == 3
    conv, norm, act, last, second = net
    with torch.no_grad():
        before = [conv(x) for x in batches]
        torch.testing.assert_close(
            norm.running_mean, torch.stack([x.mean((0, 2, 3)) for x in before]).mean(0)
        )
        torch.testing.assert_close(norm.running_var, torch.stack([x.var((0, 2, 3)) for x in before]).mean(0))
        z = norm.gate.gates.median()
        hidden = [
            last(act(nn.functional.batch_norm(x, None, None, norm.weight * z, norm.bias * z, training=True)))
            for x in before
        ]
        torch.testing.assert_close(
            second.running_mean, torch.stack([x.mean((0, 2, 3)) for x in hidden]).mean(0)
        )
    assert all(m.training for m in net.modules())
    assert norm.momentum == second.momentum == 0.1


def test_it_is_repeatable_and_draws_no_noise():
    net = network().eval()
    batches = [torch.randn(8, 3, 6, 6)]
    state = torch.get_rng_state()
    estimate_batch_norm_(net, batches)
    assert torch.equal(torch.get_rng_state(), state)
    first = {k: v.clone() for k, v in net.state_dict().items()}
    estimate_batch_norm_(net, batches)
    assert all(torch.equal(v, first[k]) for k, v in net.state_dict().items())
    assert not any(m.training for m in net.modules())


def test_no_batches_and_no_norms():
    with pytest.raises(ValueError, match="no batches"):
        estimate_batch_norm_(network(), [])
    assert estimate_batch_norm_(nn.Linear(2, 2), []) == 0


@pytest.mark.costly
@pytest.mark.parametrize("kind", [[], ["without_using_gate=true"]], ids=["gated", "plain"])
def test_training_estimates_them_unless_told_not_to(run, tiny, kind):
    for num_images, batches_seen in ((32, 2), (0, 5)):  # of 16 images; an epoch has 72 training images
        trained = run(
            "train", *tiny, *kind, "trainer.max_epochs=1", f"callbacks.batch_norm.num_images={num_images}"
        )
        assert trained.code == 0, trained.err
        assert batches_of(trained.weights()) == {batches_seen}
        tested = run("test", f"ckpt_path={trained.last}")
        assert tested.results["test_acc"] == trained.results["test_acc"]
        assert tested.results["val_acc"] == trained.results["val_acc"]
    refused = run("train", *tiny, "callbacks.batch_norm.num_images=1")
    assert refused.code == 2
    assert "an integer >= 2, or 0 for never" in refused.err


def without(arguments: list[str], settings: list[str]) -> list[str]:
    """The arguments whose key is not set anew."""
    keys = {s.partition("=")[0] for s in settings}
    return [a for a in arguments if a.partition("=")[0] not in keys]


def batches_of(weights: dict[str, torch.Tensor]) -> set[int]:
    """From how many batches the statistics of each BatchNorm are."""
    return {int(n) for key, n in weights.items() if key.endswith("num_batches_tracked")}


@pytest.mark.costly
@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(["finetune.epochs=1"], marks=pytest.mark.slow),
        ["data.val_size=0"],
        pytest.param(["data.val_size=0", "ema_decay=0.5"], marks=pytest.mark.slow),
        ["ema_decay=0.5"],
    ],
    ids=["finetuned", "no validation", "averaged without validation", "averaged"],
)
def test_what_is_saved_has_the_statistics_of_its_weights(run, tiny, settings):
    trained = run("train", *without(tiny, settings), *settings, "trainer.max_epochs=1")
    assert trained.code == 0, trained.err
    shipped = torch.load(trained.results["checkpoint"], weights_only=True)
    assert shipped["sparsereg"]["batch_norm_is_current"]
    assert batches_of(shipped["state_dict"]) == {2}
    tested = run("test", f"ckpt_path={trained.results['checkpoint']}")
    assert tested.results["test_acc"] == trained.results["test_acc"]
    assert tested.results["val_acc"] == trained.results["val_acc"]


def test_where_nothing_is_saved_statistics_are_taken_at_the_end_alone(monkeypatch):
    for each_epoch, wanted in ((True, [0, 1, 2]), (False, [2])):
        estimation, taken = BatchNormEstimation(8, each_epoch=each_epoch), []
        monkeypatch.setattr(estimation, "_estimate", lambda at, _, to=taken: to.append(at.current_epoch))
        for epoch in range(3):
            estimation.on_train_epoch_end(SimpleNamespace(current_epoch=epoch, max_epochs=3), None)
        assert taken == wanted


@pytest.mark.costly
def test_statistics_that_lag_behind_do_not_spoil_the_accuracy(run, tiny):
    """A momentum of 0.01 has seen a twentieth of the way after five steps."""
    network = ["model=torchvision", "model.name=mobilenet_v3_small", "model.small_images=true"]
    trained = run("train", *tiny, *network, "without_using_gate=true", "trainer.max_epochs=1")
    assert trained.code == 0, trained.err
    left = run("test", f"ckpt_path={trained.last}", "callbacks.batch_norm.num_images=0")
    assert left.results["test_acc"] == trained.results["test_acc"]
    assert batches_of(trained.weights()) == {2}


@pytest.mark.costly
def test_weights_that_nothing_trained_keep_their_statistics(run, tiny):
    trained = run("train", *tiny, "without_using_gate=true", "trainer.max_epochs=1")
    common = [f"ckpt_path={trained.last}", "trainer.max_epochs=0", "trainer=cpu"]
    more_images = ["callbacks.batch_norm.num_images=48", "callbacks.batch_norm.batch_size=16"]
    kept = run("train", *common, "without_using_gate=true", *more_images)
    assert kept.results["test_acc"] == trained.results["test_acc"]


@pytest.mark.costly
def test_a_teacher_has_the_statistics_of_its_weights(run, tiny, monkeypatch):
    from sparsereg.training import build

    teachers = []
    estimate = build.estimate_batch_norm_

    def noted(net, batches):
        teachers.append(net)
        return estimate(net, batches)

    monkeypatch.setattr(build, "estimate_batch_norm_", noted)
    trained = run("train", *tiny, "without_using_gate=true", "trainer.max_epochs=1")
    content = torch.load(trained.last, weights_only=True)
    content["sparsereg"]["batch_norm_is_current"] = False
    torch.save(content, trained.last)
    taught = run("train", *tiny, f"distill.ckpt_path={trained.last}", "trainer.max_epochs=1")
    assert taught.code == 0, taught.err
    (teacher,) = teachers
    assert batches_of(teacher.state_dict()) == {2}
