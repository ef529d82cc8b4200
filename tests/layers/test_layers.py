"""Layers: their outputs, their initial gates, and the ways people move and run them."""

import copy
import multiprocessing
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sparsereg.layers import GatedLayer, L0Conv2d, L0DepthwiseConv2d, L0Linear, SparseMLP, prune_model
from sparsereg.penalties import hard_concretes, update_temperatures
from tests.nets import LAYERS, NETS, inputs, make


def test_linear_is_a_product_with_gated_weights():
    layer = make("linear").eval()
    x = inputs("linear")
    want = F.linear(x, layer.weight * layer.weight_gates(), layer.bias)
    torch.testing.assert_close(layer(x), want)
    stacked = x.expand(4, 3, 12)
    torch.testing.assert_close(layer(stacked)[2], want)


def test_convolution_is_one_with_gated_weights():
    layer = make("conv").eval()
    x = inputs("conv")
    weight = layer.weight * layer.weight_gates().view(layer.weight.shape)
    torch.testing.assert_close(layer(x), F.conv2d(x, weight, layer.bias, padding=1))


@pytest.mark.parametrize("name", ["structured", "structured_no_bias", "depthwise"])
def test_channel_gates_multiply_the_output(name):
    layer = make(name).eval()
    x = inputs(name)
    z = layer.channel_gates()
    plain = layer.plain()
    with torch.no_grad():
        layer.channel_gates.log_alpha.fill_(30.0)
    torch.testing.assert_close(plain(x), layer(x) * z.view(1, -1, 1, 1))


@pytest.mark.parametrize("layer", [L0Conv2d(3, 4, 3, structured=True), L0DepthwiseConv2d(3, 3)])
def test_a_closed_channel_emits_exactly_zero(layer):
    with torch.no_grad():
        layer.gate.log_alpha[1] = -50.0
    x = torch.randn(2, 3, 8, 8)
    for mode in (True, False):
        assert (layer.train(mode)(x)[:, 1] == 0).all()


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.95])
def test_init_sparsity_is_the_expected_share_of_closed_gates(sparsity):
    for layer in (
        L0Linear(30, 20, init_sparsity=sparsity),
        L0Conv2d(3, 4, 3, init_sparsity=sparsity),
        L0Conv2d(3, 4, 3, init_sparsity=sparsity, structured=True),
        L0DepthwiseConv2d(5, 3, init_sparsity=sparsity),
    ):
        assert layer.get_sparsity() == pytest.approx(sparsity, abs=1e-6)
        num = layer.gate.log_alpha.numel()
        assert layer.get_l0_penalty().item() == pytest.approx((1 - sparsity) * num, rel=1e-5)


def test_l2_penalty_only_if_asked_for():
    on, off = L0Linear(4, 3, use_l2=True), L0Linear(4, 3)
    assert on.get_l2_penalty().item() == pytest.approx(on.weight.square().sum().item())
    assert off.get_l2_penalty().item() == 0
    assert SparseMLP(4, 3, 2, use_l2=True).get_l2_loss() > 0
    assert SparseMLP(4, 3, 2).get_l2_loss() == 0


@pytest.mark.parametrize("name", LAYERS)
def test_training_reaches_weights_and_gates(name):
    net = make(name)
    update_temperatures(net, 1.0)  # most draws lie inside (0, 1), where they have a slope
    for _ in range(20):
        net(inputs(name)).square().sum().backward()
    for parameter_name, parameter in net.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert torch.isfinite(parameter.grad).all()
    assert any(g.log_alpha.grad.abs().sum() > 0 for g in hard_concretes(net).values())


@pytest.mark.costly
def test_mean_output_over_draws_is_that_of_the_mean_gate():
    torch.manual_seed(0)  # the layer draws from PyTorch's own generator
    layer = make("linear").double()
    x = inputs("linear").double()
    generator = torch.Generator().manual_seed(0)
    z = layer.weight_gates.sample((20_000,), generator=generator).mean(0)
    drawn = torch.stack([layer(x) for _ in range(4_000)])
    error = (drawn.mean(0) - F.linear(x, layer.weight * z, layer.bias)).abs()
    assert (error < 6 * drawn.std(0) / 4_000**0.5 + 1e-3).all()


def test_eval_output_follows_the_temperature():
    net = make("nested").eval()
    x = inputs("nested")
    before = net(x)
    update_temperatures(net, 0.1)
    assert {g.temperature for g in hard_concretes(net).values()} == {0.1}
    assert not torch.equal(net(x), before)


def test_the_same_generator_gives_the_same_layer():
    a, b = (L0Linear(9, 4, generator=torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(a.weight, b.weight)
    assert torch.equal(a.bias, b.bias)


@pytest.mark.parametrize("name", NETS)
def test_state_dict_round_trip(name, tmp_path):
    net, other = make(name).eval(), NETS[name]()
    update_temperatures(net, 0.37)
    torch.save(net.state_dict(), tmp_path / "net.pt")
    other.load_state_dict(torch.load(tmp_path / "net.pt"))
    assert torch.equal(other.eval()(inputs(name)), net(inputs(name)))


@pytest.mark.parametrize("name", NETS)
def test_copies_and_pickles_are_equal_and_independent(name):
    net = make(name).eval()
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert torch.equal(twin(inputs(name)), net(inputs(name)))
        with torch.no_grad():
            next(iter(hard_concretes(twin).values())).log_alpha.fill_(9.0)
        assert not torch.equal(twin(inputs(name)), net(inputs(name)))


def answer(payload: bytes) -> list[float]:
    """In another process: the eval output, after a step of training there."""
    torch.set_num_threads(1)
    net = pickle.loads(payload)
    output = net.eval()(inputs("mlp"))
    net.train()(inputs("mlp")).sum().backward()
    return output.flatten().tolist()


@pytest.mark.costly
def test_a_network_travels_to_other_processes():
    net = make("mlp")
    context = multiprocessing.get_context("spawn")
    with context.Pool(2) as pool:
        answers = pool.map(answer, [pickle.dumps(net)] * 2)
    want = net.eval()(inputs("mlp")).flatten()
    for found in answers:
        torch.testing.assert_close(torch.tensor(found), want)


@pytest.mark.parametrize("name", ["nested", "mlp", "lenet5"])
@pytest.mark.parametrize("training", [True, False])
def test_autocast_in_bfloat16(name, training):
    net = make(name).train(training)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = net(inputs(name))
    assert output.dtype == torch.bfloat16
    output.float().sum().backward()
    for parameter in net.parameters():
        if parameter.grad is not None:
            assert parameter.grad.dtype == torch.float32
            assert torch.isfinite(parameter.grad).all()
    if not training:
        torch.testing.assert_close(output.float(), net(inputs(name)), atol=0.1, rtol=0.1)


def test_half_precision_networks():
    net = make("mlp").to(torch.bfloat16)
    output = net(inputs("mlp").to(torch.bfloat16))
    assert output.dtype == torch.bfloat16
    output.sum().backward()
    assert net.fc1.weight_gates.log_alpha.grad.dtype == torch.bfloat16


@pytest.mark.costly
@pytest.mark.usefixtures("unchecked_arrays")
@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")
@pytest.mark.parametrize("name", ["nested", "mlp"])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_networks(name, backend):
    net = make(name)
    compiled = torch.compile(net, backend=backend, fullgraph=True)
    compiled(inputs(name)).sum().backward()
    assert all(p.grad is not None for p in net.parameters())
    net.eval()
    torch.testing.assert_close(compiled(inputs(name)), net(inputs(name)))
    prune_model(net)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(net, backend=backend)(inputs(name)), net(inputs(name)))
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked_arrays")
@pytest.mark.filterwarnings("ignore")
def test_compiled_by_inductor():
    net = make("mlp")
    compiled = torch.compile(net)
    compiled(inputs("mlp")).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in net.parameters())
    net.eval()
    torch.testing.assert_close(compiled(inputs("mlp")), net(inputs("mlp")), atol=1e-5, rtol=1e-5)
    torch._dynamo.reset()


@pytest.mark.parametrize("name", LAYERS)
def test_export_of_a_pruned_network(name, tmp_path):
    net = prune_model(make(name))
    program = torch.export.export(net, (inputs(name),))
    torch.export.save(program, tmp_path / "net.pt2")
    loaded = torch.export.load(tmp_path / "net.pt2").module()
    torch.testing.assert_close(loaded(inputs(name)), net(inputs(name)))


@pytest.mark.parametrize("name", [name for name in LAYERS if name not in ("nested", "mlp")])
def test_plain_layer_is_the_gated_one_in_eval_mode(name):
    layer = make(name)
    plain = layer.plain()
    assert isinstance(plain, (nn.Linear, nn.Conv2d))
    assert not isinstance(plain, GatedLayer)
    torch.testing.assert_close(plain.eval()(inputs(name)), layer.eval()(inputs(name)))
    assert sum(p.numel() for p in plain.parameters()) + layer.gate.log_alpha.numel() == sum(
        p.numel() for p in layer.parameters()
    )


@pytest.mark.parametrize(
    ("make_layer", "name"),
    [
        (lambda: L0Linear(0, 3), "in_features"),
        (lambda: L0Linear(3, -1), "out_features"),
        (lambda: L0Linear(3, 2.0), "out_features"),
        (lambda: L0Linear(3, 3, init_sparsity=0.0), "init_sparsity"),
        (lambda: L0Linear(3, 3, init_sparsity=1.0), "init_sparsity"),
        (lambda: L0Linear(3, 3, init_sparsity=float("nan")), "init_sparsity"),
        (lambda: L0Linear(3, 3, temperature=0.0), "temperature"),
        (lambda: L0Conv2d(0, 3, 3), "in_channels"),
        (lambda: L0Conv2d(3, 0, 3), "out_channels"),
        (lambda: L0Conv2d(3, 3, 0), "kernel_size"),
        (lambda: L0Conv2d(3, 3, (3, 0)), "kernel_size"),
        (lambda: L0Conv2d(3, 3, (3, 3, 3)), "kernel_size"),
        (lambda: L0Conv2d(3, 3, 3, init_sparsity=2.0), "init_sparsity"),
        (lambda: L0DepthwiseConv2d(0, 3), "in_channels"),
        (lambda: SparseMLP(hidden_dim=0), "out_features"),
    ],
)
def test_wrong_arguments_are_named(make_layer, name):
    with pytest.raises(ValueError, match=name):
        make_layer()
