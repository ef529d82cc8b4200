"""Gates on feature maps: folded is multiplied, shut is zero, sampling is what it says."""

import copy

import pytest
import torch
from torch import nn

from sparsereg.distributions import draw_together, gate_median
from sparsereg.model.basic_l0_blocks import (
    ConvBlock,
    GatedBatchNorm2d,
    GateFactory,
    L0Gate,
    synchronise_batch_norm,
)
from sparsereg.model.googlenet import GoogleNet
from sparsereg.model.synchronised_batch_norm import batch_norm_over_processes
from sparsereg.penalties import hard_concretes, l_c0


def spread(gate: L0Gate) -> None:
    """Locations with shut, partly open and open gates among them."""
    with torch.no_grad():
        gate.gates.log_alpha.copy_(torch.linspace(-4, 4, gate.gates.log_alpha.numel()))


@pytest.mark.parametrize("act", [nn.ReLU(), nn.LeakyReLU(0.1), nn.Identity()])
@pytest.mark.parametrize("training", [True, False])
def test_a_gate_folded_into_batch_norm_is_a_gate_behind_the_activation(act, training):
    torch.manual_seed(0)
    gate = L0Gate(12)
    spread(gate)
    folded = GatedBatchNorm2d(12, gate).double()
    plain = nn.BatchNorm2d(12).double()
    with torch.no_grad():
        for p in (folded.weight, folded.bias):
            p.uniform_(-1, 1)
    plain.load_state_dict({k: v for k, v in folded.state_dict().items() if "gate" not in k})
    folded.train(training)
    plain.train(training)
    x = torch.randn(5, 12, 3, 4, dtype=torch.float64)
    outputs, gradients = [], []
    for way in ("folded", "behind"):
        torch.manual_seed(1)
        folded.zero_grad()
        source = x.clone().requires_grad_()
        y = act(folded(source)) if way == "folded" else folded.gate(act(plain(source)))
        (y * torch.arange(y.numel()).view_as(y)).sum().backward()
        outputs.append(y.detach())
        gradients.append((source.grad, folded.gate.gates.log_alpha.grad.clone()))
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-12, atol=1e-12)
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-8)
    torch.testing.assert_close(folded.running_var, plain.running_var)


def test_a_shut_channel_is_exactly_zero_bias_included():
    gate = L0Gate(4)
    norm = GatedBatchNorm2d(4, gate).eval()
    with torch.no_grad():
        norm.bias.fill_(3.0)
        gate.gates.log_alpha.copy_(torch.tensor([-9.0, 9.0, -9.0, 9.0]))
    y = norm(torch.randn(2, 4, 3, 3))
    assert torch.count_nonzero(y[:, [0, 2]]) == 0
    assert torch.all(y[:, [1, 3]] != 0)


def test_sampling_per_example_draws_for_each_row_and_per_batch_once():
    x = torch.ones(64, 8)
    each = L0Gate(8, sampling="example").train()(x)
    assert len(torch.unique(each, dim=0)) > 1
    once = L0Gate(8, sampling="batch").train()(x)
    assert len(torch.unique(once, dim=0)) == 1


def test_sampling_per_example_in_a_conv_block():
    block = ConvBlock(3, 6, 3, gate=GateFactory(sampling="example")).train()
    y = block(torch.ones(32, 3, 4, 4))
    shut = (y == 0).all(dim=(2, 3))
    assert len(torch.unique(shut, dim=0)) > 1
    y.sum().backward()
    assert block.norm.gate.gates.log_alpha.grad is not None


def test_droprate_init_is_that_of_the_paper():
    gate = L0Gate(100_000, droprate_init=0.05)
    assert gate.gates.log_alpha.mean().item() == pytest.approx(2.944439, abs=1e-3)
    assert gate.gates.log_alpha.std().item() == pytest.approx(0.01, rel=0.02)


@pytest.mark.parametrize("act", ["relu", "gelu", "tanh", "leaky_relu"])
@pytest.mark.parametrize("gate", ["branches", "all"])
def test_googlenet_with_open_gates_is_googlenet(act, gate):
    torch.manual_seed(0)
    plain = GoogleNet(gate="none", act=act).eval()
    gated = GoogleNet(gate=gate, act=act, droprate_init=1e-6).eval()
    missing, unexpected = gated.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected
    assert all(".gates." in key for key in missing)
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(gated(x), plain(x))


def test_googlenet_has_the_sizes_of_the_predecessor():
    plain, branches, everything = (GoogleNet(gate=g) for g in ("none", "branches", "all"))
    assert sum(p.numel() for p in plain.parameters()) == 260_650
    for net, gates in ((plain, 0), (branches, 832), (everything, 1312)):
        assert sum(h.log_alpha.numel() for h in hard_concretes(net).values()) == gates
    assert sum(m.out_channels for m in plain.modules() if isinstance(m, nn.Conv2d)) == 1312


def test_drawing_together_reaches_every_gate_once():
    net = GoogleNet(gate="all").train()
    gates = list(hard_concretes(net).values())
    draw_together(gates, torch.Generator().manual_seed(5))
    drawn = [g._drawn.clone() for g in gates]
    handed = [g() for g in gates]
    assert all(torch.equal(a, b) for a, b in zip(drawn, handed, strict=True))
    assert all(g._drawn is None for g in gates)
    draw_together(gates, torch.Generator().manual_seed(5))
    (sum(g().sum() for g in gates)).backward()
    assert all(g.log_alpha.grad is not None for g in gates)


def test_l_c0_is_the_mean_over_all_gates():
    net = GoogleNet(gate="all")
    values = torch.cat([h.p_active().flatten().double() for h in hard_concretes(net).values()])
    assert l_c0(net).item() == pytest.approx(values.mean().item(), rel=1e-6)
    with pytest.raises(ValueError, match="no gates"):
        l_c0(GoogleNet(gate="none"))


def test_eval_output_follows_the_temperature_and_the_state_dict_carries_it():
    gate = L0Gate(5).eval()
    with torch.no_grad():
        gate.gates.log_alpha.copy_(torch.linspace(-0.5, 0.5, 5))
    before = gate(torch.ones(1, 5))
    gate.gates.temperature = 0.2
    after = gate(torch.ones(1, 5))
    assert not torch.equal(before, after)
    torch.testing.assert_close(after[0], gate_median(gate.gates.log_alpha, 0.2))
    other = L0Gate(5)
    other.load_state_dict(gate.state_dict())
    assert other.gates.temperature == 0.2


def test_deepcopy_after_a_step():
    net = GoogleNet(gate="all").train()
    draw_together(hard_concretes(net).values())
    net(torch.randn(2, 3, 8, 8)).sum().backward()
    copy.deepcopy(net)


def test_synchronising_keeps_gates_names_and_results():
    torch.manual_seed(0)
    net = GoogleNet(gate="branches").eval()
    x = torch.randn(2, 3, 8, 8)
    expected = net(x)
    keys = list(net.state_dict())
    net = synchronise_batch_norm(net).eval()
    assert list(net.state_dict()) == keys
    torch.testing.assert_close(net(x), expected)


def test_batch_norm_over_one_process_is_batch_norm(monkeypatch):
    monkeypatch.setattr("sparsereg.model.synchronised_batch_norm.sum_over_processes", lambda tensor: tensor)
    torch.manual_seed(0)
    x = (torch.randn(6, 5, 4, 4) * 3 + 20).requires_grad_()
    norm, own = nn.BatchNorm2d(5), nn.BatchNorm2d(5)
    for _ in range(2):
        expected = norm(x)
        y = batch_norm_over_processes(x, own.weight, own.bias, own, 0.1)
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    weight = torch.randn_like(expected)
    (grad,) = torch.autograd.grad((expected * weight).sum(), x)
    (own_grad,) = torch.autograd.grad((y * weight).sum(), x)
    torch.testing.assert_close(own_grad, grad, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(own.running_mean, norm.running_mean)
    torch.testing.assert_close(own.running_var, norm.running_var, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mask_dim": 0}, "gate size"),
        ({"mask_dim": 3, "droprate_init": 0.0}, "droprate_init"),
        ({"mask_dim": 3, "droprate_init": 1.0}, "droprate_init"),
        ({"mask_dim": 3, "droprate_init": float("nan")}, "droprate_init"),
        ({"mask_dim": 3, "temperature": 0.0}, "temperature"),
        ({"mask_dim": 3, "stretch": 0.0}, "stretch"),
        ({"mask_dim": 3, "sampling": "row"}, "batch, example"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        L0Gate(**arguments)
