"""Networks that shrink in place: the same answers and gradients, and everything back where it was."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from sparsereg.compression import Accountant
from sparsereg.compression.shrink import (
    SHUT,
    Live,
    is_shut,
    plan,
    removable_gates,
    shrink_,
    shut_for_good_,
    shut_useless_,
)
from sparsereg.errors import InputError
from sparsereg.model.googlenet import GoogleNet
from sparsereg.model.sparse_mlp import SparseMLP
from sparsereg.penalties import hard_concretes, l_c0

from .networks import NETWORKS, make

# One has gates on single weights; another writes over what its backward pass needs.
SHRINK = sorted(set(NETWORKS) - {"sparse_mlp", "functional", "densenet"})


def shut_at_random_(net: nn.Module, seed: int) -> int:
    """Shut half of the gates for good, and every fifth tensor of them altogether."""
    generator = torch.Generator().manual_seed(seed)
    gates = list(hard_concretes(net).values())
    with torch.no_grad():
        for i, gate in enumerate(gates):
            shut = torch.rand(gate.log_alpha.shape, generator=generator) < (1.0 if i % 5 == 3 else 0.5)
            gate.log_alpha.masked_fill_(shut, -9.0)
    return shut_for_good_(gates, 0.02)


def live_of(net: nn.Module, x: torch.Tensor) -> Live:
    return Live(Accountant(net, x).flow, net)


def loss_of(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return net(x).square().sum() + l_c0(net)


@pytest.mark.costly
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", SHRINK)
def test_answers_gradients_and_steps_of_the_original(name, seed):
    net, x = make(name, seed, one_kind=True)
    net, x = net.double().eval(), x.double()
    live = live_of(net, x)
    shut_at_random_(net, seed)
    stay = plan(live)
    shut_useless_(live, stay)
    assert all(stay[step.out].any() for step in live.steps)
    twin = copy.deepcopy(net)
    optimizers = [torch.optim.SGD(n.parameters(), lr=1e-4, momentum=0.9) for n in (net, twin)]
    for _ in range(2):
        for n, optimizer in zip((net, twin), optimizers, strict=True):
            optimizer.zero_grad()
            shrunk = shrink_(live, stay, [optimizer]) if n is net else None
            loss_of(n, x).backward()
            optimizer.step()
            if shrunk is not None:
                shrunk.expand_()
    assert all(gate.kept is None and gate.num_removed == 0 for gate in hard_concretes(net).values())
    with torch.no_grad():
        torch.testing.assert_close(net(x), twin(x), rtol=1e-7, atol=1e-9)
    for key, value in twin.state_dict().items():
        assert net.state_dict()[key].shape == value.shape, key


@pytest.mark.costly
@pytest.mark.parametrize("name", ["googlenet", "lenet300", "resnet18"])
def test_what_is_cut_off_comes_back_untouched(name):
    net, x = make(name, 0, one_kind=True)
    live = live_of(net, x)
    shut_at_random_(net, 0)
    stay = plan(live)
    optimizer = torch.optim.AdamW(net.parameters())
    net.train()
    loss_of(net, x).backward()
    optimizer.step()
    net.zero_grad()
    before = copy.deepcopy(net.state_dict())
    moments = copy.deepcopy(optimizer.state_dict()["state"])
    full = sum(p.numel() for p in net.parameters())
    parameters = {id(p) for p in net.parameters()}
    shrunk = shrink_(live, stay, [optimizer])
    assert sum(p.numel() for p in net.parameters()) < 0.75 * full
    assert {id(p) for p in net.parameters()} == parameters
    assert all(v["exp_avg"].shape == p.shape for p, v in optimizer.state.items())
    shrunk.expand_()
    assert before.keys() == net.state_dict().keys()
    for key, value in before.items():
        assert torch.equal(net.state_dict()[key], value), key
    for key, state in optimizer.state_dict()["state"].items():
        assert all(torch.equal(v, moments[key][k]) for k, v in state.items())


def test_penalties_count_gates_that_have_left():
    net, x = make("lenet300", 0)
    accountant = Accountant(net, x)
    live = Live(accountant.flow, net)
    shut_at_random_(net, 0)
    stay = plan(live)
    shut_useless_(live, stay)
    penalty, expected = l_c0(net).item(), accountant.expected_parameters().item()
    shrunk = shrink_(live, stay)
    assert sum(g.num_removed for g in hard_concretes(net).values()) > 200
    assert l_c0(net).item() == pytest.approx(penalty, abs=1e-6)
    assert accountant.expected_parameters().item() == pytest.approx(expected, rel=1e-4)
    assert torch.autograd.grad(accountant.expected_parameters(), net.input_gate.gates.log_alpha)[0].any()
    shrunk.expand_()


def test_one_gate_of_each_tensor_stays_open_to_change():
    net, x = make("lenet300", 0)
    gate = net.hidden_gate1.gates
    with torch.no_grad():
        gate.log_alpha.fill_(-9.0)
        gate.log_alpha[7] = -8.0
    shut_for_good_([gate], 0.02)
    assert (~is_shut(gate)).nonzero().flatten().tolist() == [7]
    assert gate.log_alpha[8] == SHUT
    live = live_of(net, x)
    (fc1,) = [s for s in live.steps if live.flow.path(s) == "fc1"]
    assert np.flatnonzero(plan(live)[fc1.out]).tolist() == [7]


def test_gates_on_single_weights_cannot_leave():
    net = SparseMLP(3, (1, 4, 4), hidden_sizes=[5])
    assert removable_gates(live_of(net, torch.zeros(1, 1, 4, 4))) == []


@pytest.mark.costly
def test_the_memory_format_survives():
    # A convolution of one input channel and 1x1 kernels look alike in both formats.
    net = GoogleNet(in_channels=1, gate="all").to(memory_format=torch.channels_last)
    x = torch.randn(2, 1, 8, 8)
    live = live_of(net, x)
    shut_at_random_(net, 0)
    seen = []
    net.blocks[1].register_forward_hook(lambda module, args, out: seen.append(out))
    for stay in (None, plan(live)):
        shrunk = shrink_(live, stay) if stay is not None else None
        net(x)
        if shrunk:
            shrunk.expand_()
    assert seen[1].shape[1] < seen[0].shape[1]
    assert all(out.is_contiguous(memory_format=torch.channels_last) for out in seen)


def test_layers_with_several_gates_say_that_nothing_of_them_leaves_in_training():
    net, x = make("densenet", 0)
    with pytest.raises(InputError, match=r"gates of several kinds, 'features.*compact_every_n_epochs=0"):
        live_of(net, x)
