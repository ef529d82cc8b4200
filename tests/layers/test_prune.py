"""Pruning: the gates go, the eval output stays, the files shrink."""

import copy

import pytest
import torch
from torch import nn

from sparsereg.distributions import HardConcrete
from sparsereg.gates import SampleGate
from sparsereg.layers import GatedLayer, L0Conv2d, L0Linear, load_csr, prune_model, save_csr
from sparsereg.model.basic_l0_blocks import GatedBatchNorm2d, L0Gate
from sparsereg.model.googlenet import GoogleNet
from sparsereg.penalties import get_active_parameter_count, get_sparsity_stats, hard_concretes
from tests.nets import LAYERS, NETS, inputs, make


@pytest.mark.costly
@pytest.mark.parametrize("threshold", [0.0, 0.05, 0.5])
@pytest.mark.parametrize("name", NETS)
def test_eval_output_stays_without_gates(name, threshold):
    net = make(name).double().eval()
    x = inputs(name).double()
    net.train()(x)  # running statistics that are not those of a fresh network
    before, count = net.eval()(x), get_active_parameter_count(net)
    pruned = prune_model(net, threshold)
    assert pruned is net
    assert not pruned.training
    assert not hard_concretes(pruned)
    assert not any(isinstance(m, (L0Gate, GatedBatchNorm2d)) for m in pruned.modules())
    torch.testing.assert_close(pruned(x), before, rtol=0, atol=1e-6)
    torch.testing.assert_close(pruned.train()(x), before, rtol=0, atol=1e-6) if name in LAYERS else None
    assert get_active_parameter_count(pruned) == count


def test_a_dead_weight_is_zero_even_if_it_was_infinite():
    layer = L0Linear(2, 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[float("inf"), 2.0]]))
        layer.weight_gates.log_alpha.copy_(torch.tensor([[-9.0, 9.0]]))
    prune_model(layer)
    assert layer.weight.tolist() == [[0.0, 2.0]]


def test_a_partly_open_gate_is_folded_not_rounded():
    layer = L0Linear(1, 1, bias=False)
    with torch.no_grad():
        layer.weight.fill_(2.0)
        layer.weight_gates.log_alpha.fill_(0.0)
    z = layer.weight_gates.median().item()
    assert 0 < z < 1
    assert prune_model(layer).weight.item() == pytest.approx(2 * z)


def test_a_higher_threshold_removes_more():
    layer = make("linear")
    p = layer.weight_gates.p_active()
    expected = int((p > 0.9).sum())
    assert 0 < expected < int((p > 0.5).sum())
    assert int(torch.count_nonzero(prune_model(layer, 0.9).weight)) == expected


@pytest.mark.parametrize("name", LAYERS)
def test_pruned_state_loads_into_a_gated_network(name, tmp_path):
    pruned = prune_model(make(name))
    torch.save({"model_state_dict": pruned.state_dict()}, tmp_path / "net.pt")
    other = NETS[name]()
    other.load_state_dict(torch.load(tmp_path / "net.pt")["model_state_dict"])
    assert not hard_concretes(other)
    assert torch.equal(other.eval()(inputs(name)), pruned(inputs(name)))


def test_ungated_state_is_refused_with_the_keys_that_are_missing():
    plain = nn.Linear(12, 5)
    with pytest.raises(RuntimeError, match=r"weight_gates\.log_alpha"):
        L0Linear(12, 5).load_state_dict(plain.state_dict())
    gated = L0Linear(12, 5).state_dict()
    with pytest.raises(RuntimeError, match="baked"):
        prune_model(L0Linear(12, 5)).load_state_dict(gated)


def test_a_shared_module_is_pruned_once():
    layer = make("linear")
    square = L0Linear(5, 12)
    net = nn.Sequential(layer, square, layer).eval()
    x = inputs("linear")
    before = net(x)
    torch.testing.assert_close(prune_model(net)(x), before)


def test_a_tied_weight_is_untied_before_it_is_multiplied():
    a, b, plain = make("linear", 0), make("linear", 1), nn.Linear(12, 5)
    b.weight = a.weight
    plain.weight = a.weight
    net = nn.ModuleList([a, b, plain]).eval()
    x = inputs("linear")
    before = [m(x) for m in net]
    prune_model(net)
    for module, want in zip(net, before, strict=True):
        torch.testing.assert_close(module(x), want)


def test_frozen_networks_are_pruned_and_stay_frozen():
    net = make("nested").requires_grad_(False).eval()
    before = net(inputs("nested"))
    prune_model(net)
    torch.testing.assert_close(net(inputs("nested")), before)
    assert not any(p.requires_grad for p in net.parameters())


@pytest.mark.parametrize(
    "net",
    [
        SampleGate(5, 2),
        HardConcrete(4),
        nn.Sequential(nn.Linear(3, 4), L0Gate(4)),
        GoogleNet(10, 1, act="gelu"),
    ],
)
def test_gates_that_belong_to_no_parameter_are_refused(net):
    with pytest.raises(ValueError, match=r"sparsereg\.compression\.compact"):
        prune_model(net)


def test_one_refused_gate_leaves_the_network_as_it_was():
    net = nn.Sequential(make("linear"), L0Gate(5))
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match="cannot prune"):
        prune_model(net)
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())


@pytest.mark.parametrize("threshold", [-0.1, 1.0, float("nan")])
def test_wrong_threshold(threshold):
    with pytest.raises(ValueError, match="threshold"):
        prune_model(L0Linear(2, 2), threshold)


def test_statistics_of_a_pruned_layer_are_what_is_left():
    layer = make("structured")
    num_open = layer.channel_gates.get_num_active()
    assert 0 < num_open < 6
    prune_model(layer)
    assert layer.get_l0_penalty().item() == num_open
    assert layer.get_sparsity() == pytest.approx(1 - num_open / 6)
    stats = get_sparsity_stats(layer)[""]
    assert stats["active_params"] == num_open * 15
    assert stats["total_params"] == 90
    assert isinstance(layer, GatedLayer)
    assert layer.gate is None


@pytest.mark.parametrize("name", ["mlp", "nested", "lenet5"])
def test_storage_is_measured_and_read_back(name, tmp_path):
    net = make(name)
    with torch.no_grad():
        for gate in hard_concretes(net).values():
            gate.log_alpha.sub_(3.0)
    prune_model(net)
    path = tmp_path / "net.csr"
    storage = save_csr(net, path)
    loaded = load_csr(path)
    assert loaded.keys() == net.state_dict().keys()
    for key, value in net.state_dict().items():
        assert torch.equal(loaded[key], value)
        assert loaded[key].dtype == value.dtype
    assert storage.stored_bytes == path.stat().st_size
    assert storage.num_nonzero < 0.25 * storage.num_weights
    if name != "lenet5":
        assert storage.ratio > 1.5
    assert list(tmp_path.iterdir()) == [path]


def test_storage_of_a_dense_network_is_no_larger_than_dense(tmp_path):
    net = nn.Linear(300, 300)
    storage = save_csr(net, tmp_path / "net.csr")
    assert storage.dense_bytes <= storage.stored_bytes < storage.dense_bytes + 4096


def test_plain_layers_need_no_gate_in_training_mode_either():
    layer = prune_model(L0Conv2d(1, 3, 3)).train()
    x = torch.randn(1, 1, 5, 5)
    assert torch.equal(layer(x), layer(x))
