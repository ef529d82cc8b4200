"""Re-estimated BatchNorm statistics are the averages over the batches, under test-time gates."""

import pytest
import torch
from torch import nn

from sparsereg.model.basic_l0_blocks import GatedBatchNorm2d, L0Gate
from sparsereg.training.batch_norm import estimate_batch_norm_


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


def test_training_estimates_them_unless_told_not_to(run, tiny):
    for num_images, batches_seen in ((32, 2), (0, 5)):  # of 16 images; an epoch has 72 training images
        trained = run("train", *tiny, "trainer.max_epochs=1", f"callbacks.batch_norm.num_images={num_images}")
        assert trained.code == 0, trained.err
        seen = [v for k, v in trained.weights().items() if k.endswith("num_batches_tracked")]
        assert seen
        assert all(int(n) == batches_seen for n in seen)
        tested = run("test", f"ckpt_path={trained.last}")
        assert tested.results["test_acc"] == trained.results["test_acc"]
    refused = run("train", *tiny, "callbacks.batch_norm.num_images=1")
    assert refused.code == 2
    assert "an integer >= 2, or 0 for never" in refused.err
