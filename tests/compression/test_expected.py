"""Expected costs: exact at gates that are surely open or shut, right on average, differentiable."""

import pytest
import torch
from torch import nn

from sparsereg.compression import Accountant
from sparsereg.distributions import HardConcrete
from sparsereg.model.basic_l0_blocks import L0Gate
from tests.compression.networks import NETWORKS, make, set_gates

# Groups that are kept equally large and constants that padding keeps are not in the expectation.
EXACT = [n for n in NETWORKS if n not in ("grouped", "mobilenet_v3", "layers")]


@pytest.mark.costly
@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("seed", [0, 1])
def test_equals_the_exact_count_in_the_limit(name, seed):
    network, x = make(name, seed)
    set_gates(network, "half", seed)
    counted = Accountant(network, x).count()
    assert counted.expected_parameters == pytest.approx(counted.compacted_parameters, rel=1e-5)
    assert counted.expected_macs == pytest.approx(counted.compacted_macs, rel=1e-5)


def test_closed_branch_and_closed_network_in_the_limit():
    network, x = make("googlenet")
    accountant = Accountant(network, x)
    set_gates(network, "all open")
    for module in network.blocks[0].branch5x5.modules():
        if isinstance(module, HardConcrete):
            module.log_alpha.data.fill_(-30)
    counted = accountant.count()
    assert counted.expected_parameters == pytest.approx(counted.compacted_parameters, rel=1e-6)
    for module in network.modules():
        if isinstance(module, HardConcrete):
            module.log_alpha.data.fill_(-30)
    assert accountant.count().expected_parameters == pytest.approx(10, abs=1e-3)  # the last bias


def test_product_of_neighbours():
    network = nn.Sequential(nn.Linear(5, 4), L0Gate(4), nn.Linear(4, 3)).double()
    gate = network[1].gates
    p = gate.p_active()
    accountant = Accountant(network, torch.zeros(2, 5).double())
    reads = 1 - (1 - p).prod()
    # Rows and bias of the first layer, columns of the second; its bias is there in any case. The inputs
    # are read unless all units are shut.
    wanted = p.sum() * 5 * reads + p.sum() + 3 * p.sum() + 3
    assert accountant.expected_parameters().item() == pytest.approx(wanted.item(), rel=1e-12)


def test_gradient_is_the_slope():
    network, x = make("residual")
    network, x = network.double(), x.double()
    set_gates(network, "mixed")
    accountant = Accountant(network, x)
    accountant.expected_macs().backward()
    gate = network.gate.gates
    slope, h = gate.log_alpha.grad[2].item(), 1e-5
    values = []
    for step in (h, -h):
        with torch.no_grad():
            gate.log_alpha[2] += step
            values.append(accountant.expected_macs().item())
            gate.log_alpha[2] -= step
    assert slope == pytest.approx((values[0] - values[1]) / (2 * h), rel=1e-6)
    assert all(g.log_alpha.grad is not None for g in network.modules() if isinstance(g, HardConcrete))


def test_a_gate_that_is_shared_counts_once():
    """On a residual stream p of a tied gate is the chance of a channel, not 1 - (1 - p)^blocks."""
    network, x = make("resnet18")
    set_gates(network, "all open")
    accountant = Accountant(network, x)
    full = accountant.count()
    shared = network.bn1.gate.gates
    assert network.layer1[1].bn2.gate.gates is shared
    p = 0.7
    from sparsereg.distributions import log_alpha_at

    shared.log_alpha.data.fill_(log_alpha_at(p, shared.temperature))
    conv = 9 * 64 * 64
    stem = 64 * 3 * 49 + 2 * 64
    blocks = 4 * conv + 2 * (2 * 64)  # and 64 open channels inside each block, 2 * 2 * 64 of norms
    first_of_layer2 = 9 * 64 * 128 + 64 * 128
    lost = (1 - p) * (stem + blocks + first_of_layer2)
    assert accountant.expected_parameters().item() == pytest.approx(full.parameters - lost, rel=1e-6)


@pytest.mark.costly
@pytest.mark.parametrize("name", ["lenet5", "functional"])
def test_right_on_average(name):
    """The mean over random patterns of sure gates, drawn with P(z > 0)."""
    network, x = make(name)
    set_gates(network, "mixed")
    accountant = Accountant(network, x)
    expected = accountant.expected_parameters().item()
    gates = [m for m in network.modules() if isinstance(m, HardConcrete)]
    chances = [g.p_active().detach() for g in gates]
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(100):
        for g, p in zip(gates, chances, strict=True):
            drawn = torch.rand(p.shape, generator=generator) < p
            g.log_alpha.data.copy_(torch.where(drawn, 20.0, -20.0))
        found.append(accountant.count().compacted_parameters)
    found = torch.tensor(found, dtype=torch.float64)
    error = found.std().item() / 10
    assert expected == pytest.approx(found.mean().item(), abs=4 * error + 0.02 * expected)
