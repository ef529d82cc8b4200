"""LeNets and the sparse perceptron for images: sizes, gates, arguments."""

import pytest
import torch
from torch import fx, nn

from sparsereg.compression import compact
from sparsereg.layers import L0Linear
from sparsereg.model.basic_l0_blocks import L0Gate
from sparsereg.model.lenet import LeNet5, LeNet300
from sparsereg.model.sparse_mlp import SparseMLP
from sparsereg.penalties import hard_concretes, l_c0


def sizes(net: nn.Module) -> list[int]:
    return [g.log_alpha.numel() for g in hard_concretes(net).values()]


def test_lenet300_is_that_of_the_paper():
    net = LeNet300()
    assert sizes(net) == [784, 300, 100]
    gates = sum(sizes(net))
    assert sum(p.numel() for p in net.parameters()) - gates == 784 * 300 + 300 + 300 * 100 + 100 + 1010
    assert net(torch.randn(2, 1, 28, 28)).shape == (2, 10)


def test_lenet5_is_that_of_caffe():
    net = LeNet5()
    assert sizes(net) == [20, 50, 800, 500]
    gates = sum(sizes(net))
    assert sum(p.numel() for p in net.parameters()) - gates == 520 + 25_050 + 400_500 + 5010
    assert net(torch.randn(2, 1, 28, 28)).shape == (2, 10)


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 32, 32), (1, 16, 20), (2, 4, 4)])
@pytest.mark.parametrize("cls", [LeNet300, LeNet5, SparseMLP])
@pytest.mark.parametrize("gated", [True, False])
def test_image_shapes_and_classes(cls, shape, gated):
    net = cls(7, shape) if gated else cls(7, shape, "none")
    x = torch.randn(3, *shape)
    output = net(x.to(memory_format=torch.channels_last))
    assert output.shape == (3, 7)
    output.sum().backward()
    assert bool(hard_concretes(net)) == gated


def test_a_filters_gate_may_stand_behind_pooling():
    """relu and max-pooling let a factor >= 0 through, so the place of the gate makes no difference."""
    net = LeNet5().eval()
    with torch.no_grad():
        net.conv_gate1.gates.log_alpha.normal_(0, 2)
    x = torch.randn(2, 1, 28, 28)
    late = net.conv_gate1(net.act1(net.pool1(net.conv1(x))))
    early = net.pool1(net.act1(net.conv_gate1(net.conv1(x))))
    torch.testing.assert_close(late, early)


@pytest.mark.parametrize("cls", [LeNet300, LeNet5])
def test_closed_units_are_gone(cls):
    net = cls().eval()
    with torch.no_grad():
        for gate in hard_concretes(net).values():
            gate.log_alpha.fill_(-30.0)
    x = torch.randn(2, 1, 28, 28)
    assert torch.equal(net(x)[0], net(x)[1])
    assert l_c0(net).item() == pytest.approx(0, abs=1e-9)


def test_one_rate_for_each_group():
    net = LeNet300(droprate_init=(0.2, 0.5, 0.5), jitter=0.0, temperature=2 / 3)
    alpha = [torch.sigmoid(g.log_alpha).mean().item() for g in hard_concretes(net).values()]
    assert alpha == pytest.approx([0.8, 0.5, 0.5])
    assert all(m.gates.temperature == 2 / 3 for m in net.modules() if isinstance(m, L0Gate))
    mlp = SparseMLP(droprate_init=0.2, jitter=0.0)
    assert torch.sigmoid(mlp.layers[1].weight_gates.log_alpha).mean().item() == pytest.approx(0.8)


@pytest.mark.costly
@pytest.mark.parametrize(("cls", "rates"), [(LeNet300, (0.5, 0.0, 0.25)), (LeNet5, (0.0, 0.5, 0.0, 0.25))])
def test_dropout_acts_in_training_only_and_stays_in_the_compacted_network(cls, rates):
    torch.manual_seed(0)
    net = cls(droprate_init=0.4, dropout=rates)
    plain = cls(droprate_init=0.4)
    plain.load_state_dict(net.state_dict())
    x = torch.rand(4, 1, 28, 28)
    assert torch.equal(net.eval()(x), plain.eval()(x))
    small = compact(net, x)
    assert [m.p for m in small.modules() if isinstance(m, nn.Dropout)] == [rate for rate in rates if rate]
    torch.testing.assert_close(small.eval()(x), net(x))
    small.train()
    assert not torch.equal(small(x), small(x))
    assert not any(isinstance(m, nn.Dropout) for m in plain.modules())


def test_per_example_gates():
    net = LeNet300(sampling="example").train()
    x = torch.randn(1, 1, 28, 28).expand(4, 1, 28, 28)
    assert not torch.equal(net(x)[0], net(x)[1])


class Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, qualified_name: str) -> bool:
        return isinstance(m, (L0Gate, L0Linear)) or super().is_leaf_module(m, qualified_name)


@pytest.mark.parametrize("cls", [LeNet300, LeNet5, SparseMLP])
def test_the_graph_consists_of_modules(cls):
    graph = Tracer().trace(cls())
    assert {node.op for node in graph.nodes} == {"placeholder", "call_module", "output"}


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: LeNet300(1), "num_classes"),
        (lambda: LeNet300(gate="all"), "gate must be one of units, none"),
        (lambda: SparseMLP(gate="units"), "gate must be one of weights, none"),
        (lambda: LeNet300(image_shape=(28, 28)), "image_shape"),
        (lambda: LeNet5(image_shape=(1, 3, 28)), "image_shape"),
        (lambda: LeNet300(droprate_init=(0.1, 0.2)), "droprate_init"),
        (lambda: LeNet5(droprate_init=(0.1, 0.2, 0.3)), "droprate_init"),
        (lambda: LeNet300(droprate_init=1.0), "droprate_init"),
        (lambda: LeNet300(droprate_init="abc"), "droprate_init must be one rate or 3, .* got 'abc'"),
        (lambda: LeNet300(dropout=None), "dropout must be one rate or 3"),
        (lambda: LeNet300(dropout=(0.1, "x", 0)), "dropout must be one rate or 3"),
        (lambda: LeNet5(dropout=(0.1, 0.2, 0.3)), "dropout must be one rate or 4"),
        (lambda: LeNet5(dropout=1.0), r"dropout must be a number in \[0, 1\)"),
        (lambda: LeNet5(dropout=True), r"dropout must be a number in \[0, 1\)"),
        (lambda: SparseMLP(droprate_init=0.0), "droprate_init"),
        (lambda: SparseMLP(sampling="example"), "sampling"),
        (lambda: SparseMLP(temperature=0.0), "temperature"),
        (lambda: SparseMLP(hidden_sizes=(0,)), "hidden_sizes"),
        (lambda: SparseMLP(hidden_sizes=3), "hidden_sizes must be a list"),
        (lambda: SparseMLP(hidden_sizes="abc"), "hidden_sizes must be a list"),
        (lambda: SparseMLP(gate="none", hidden_sizes=(0,)), "hidden_sizes"),
    ],
)
def test_wrong_arguments_are_named(call, name):
    with pytest.raises(ValueError, match=name):
        call()
