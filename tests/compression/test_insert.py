import pytest
import torch
import torchvision
from torch import nn

from sparsereg.compression import compact, count, gate
from sparsereg.compression.verify import difference
from sparsereg.distributions import HardConcrete
from sparsereg.model.basic_l0_blocks import L0Gate
from sparsereg.penalties import hard_concretes
from tests.compression.networks import dense, make, set_gates

X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def resnet():
    return torchvision.models.resnet18(num_classes=5).eval()


@pytest.mark.costly
def test_original_weights_load_and_open_gates_change_nothing():
    original = resnet()
    gated = gate(original, X)
    assert not hard_concretes(original)
    found = gated.load_state_dict(original.state_dict(), strict=False)
    assert not found.unexpected_keys
    assert all(k.endswith(("gates.log_alpha", "gates._extra_state")) for k in found.missing_keys)
    set_gates(gated, "all open")
    assert difference(original(X), gated(X)) < 1e-6
    assert not gated.training


@pytest.mark.costly
def test_residual_sums_share_a_gate():
    gated = gate(resnet(), X)
    stage = gated.layer1
    assert gated.bn1.gate is stage[0].bn2.gate is stage[1].bn2.gate
    assert stage[0].bn1.gate is not stage[1].bn1.gate
    assert gated.layer2[0].downsample[1].gate is gated.layer2[0].bn2.gate is gated.layer2[1].bn2.gate
    assert sum(name.endswith("gate.gates") for name in hard_concretes(gated)) == 12
    assert sum(name.endswith("gate_blocks.gates") for name in hard_concretes(gated)) == 8
    inner = gate(resnet(), X, residual=False, families="channels")
    assert len(hard_concretes(inner)) == 8


@pytest.mark.costly
def test_every_closed_channel_goes():
    """With half of all gates shut, half of every layer that can go goes, also before residual sums."""
    gated = gate(resnet(), X)
    with torch.no_grad():
        for g in hard_concretes(gated).values():
            g.log_alpha[::2], g.log_alpha[1::2] = 30.0, -30.0
    smaller = compact(gated, X)
    convs = {n: m for n, m in gated.named_modules() if isinstance(m, nn.Conv2d)}
    for name, conv in convs.items():
        assert smaller.get_submodule(name).out_channels == conv.out_channels // 2
    assert smaller.fc.in_features == 256


@pytest.mark.costly
def test_depthwise_and_excitation_get_one_gate_for_their_channels():
    gated = gate(torchvision.models.mobilenet_v3_small(num_classes=5).eval(), X)
    block = gated.features[4].block  # expand, depthwise, squeeze-and-excitation, project
    assert not hasattr(block[0][1], "gate")
    assert isinstance(block[1][1].gate, L0Gate)
    assert not hasattr(block[2].fc2, "gate")
    with torch.no_grad():
        block[1][1].gate.gates.log_alpha[:7] = -30.0
    smaller = compact(gated, X)
    width = block[0][0].out_channels - 7
    for name in ("block.0.0", "block.1.0", "block.2.fc2"):
        assert smaller.get_submodule(f"features.4.{name}").out_channels == width


@pytest.mark.costly
def test_layers_by_pattern_list_and_function():
    def gates(layers):
        return set(hard_concretes(gate(resnet(), X, layers)))

    assert gates("layer3.?.conv1") == {"layer3.0.bn1.gate.gates", "layer3.1.bn1.gate.gates"}
    assert gates(["layer3.0.conv1", "layer2.1.conv1"]) == {
        "layer3.0.bn1.gate.gates",
        "layer2.1.bn1.gate.gates",
    }
    assert gates(lambda name, m: isinstance(m, nn.Conv2d) and name.endswith("4.1.conv1")) == {
        "layer4.1.bn1.gate.gates"
    }
    with pytest.raises(ValueError, match=r"'layr3\.\*'; there are layer"):
        gates("layr3.*")
    with pytest.raises(ValueError, match="nothing to gate"):
        gates("fc")
    with pytest.raises(ValueError, match="already has gates"):
        gate(gate(resnet(), X), X)


@pytest.mark.costly
def test_settings_reach_the_gates():
    gated = gate(resnet(), X, droprate_init=0.05, temperature=0.5, jitter=0.0, sampling="example")
    g = gated.bn1.gate
    assert g.sampling == "example"
    assert g.gates.temperature == 0.5
    assert torch.sigmoid(g.gates.log_alpha)[0].item() == pytest.approx(0.95)


def test_channels_that_meet_a_batchnorm_later_are_left_alone():
    gated = gate(dense().eval(), X)
    names = {n for n, m in gated.named_modules() if isinstance(m, L0Gate)}
    assert names
    assert not any("conv2" in n or "conv0" in n for n in names)


def test_networks_without_batchnorm_get_gates_on_rows():
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 900, 6), nn.BatchNorm1d(6), nn.Tanh(),
        nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2),
    )  # fmt: skip
    gated = gate(network, X)
    assert [type(gated[i]).__name__ for i in (0, 3, 4, 6, 8)] == [
        "GatedConv2d", "Linear", "GatedBatchNorm1d", "GatedLinear", "Linear",
    ]  # fmt: skip
    gated.train()(X).sum().backward()
    assert all(g.log_alpha.grad is not None for g in hard_concretes(gated).values())
    gated.eval()
    set_gates(gated, "mixed")
    z = gated[0].gate.gates.median()
    assert torch.allclose(gated[:1](X), network[:1](X) * z.view(1, -1, 1, 1), atol=1e-6)
    smaller = compact(gated, X)
    assert sum(p.numel() for p in smaller.parameters()) == count(gated, X).compacted_parameters


def test_sampling_for_each_example():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 200), nn.ReLU(), nn.Linear(200, 2))
    gated = gate(network, torch.randn(2, 4), sampling="example").train()
    same = torch.ones(2, 4)
    hidden = gated[:2](same)
    assert not torch.equal(hidden[0], hidden[1])
    gated[0].gate.sampling = "batch"
    hidden = gated[:2](same)
    assert torch.equal(hidden[0], hidden[1])


def test_gated_network_closes_under_its_own_penalty():
    torch.manual_seed(0)
    gated = gate(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1)), torch.randn(2, 4))
    optimizer = torch.optim.Adam(gated.parameters(), 0.1)
    for _ in range(60):
        optimizer.zero_grad()
        sum(g.get_penalty() for g in gated.modules() if isinstance(g, HardConcrete)).backward()
        optimizer.step()
    assert count(gated, torch.randn(2, 4)).open_gates == 0


@pytest.mark.costly
def test_make_is_reproducible():
    a, b = make("resnet18")[0], make("resnet18")[0]
    assert all(
        torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("dim", [0, 1])
def test_weights_that_a_hook_computes_take_gates_where_they_are_computed_from(dim):
    network = nn.Sequential(
        nn.utils.weight_norm(nn.Linear(4, 6), dim=dim), nn.ReLU(), nn.Linear(6, 2)
    ).double()
    x = torch.randn(3, 4, dtype=torch.float64)
    network(x)  # from here on it holds a weight that belongs to the graph of this call
    gated = gate(network, x).eval()
    (gates,) = hard_concretes(gated).values()
    gates.log_alpha.data[::2] = -10
    gated(x).sum().backward()
    smaller = compact(gated, x)
    assert smaller.get_submodule("2").in_features == 3
    assert (smaller(x) - gated(x)).abs().max() < 1e-12


class Keeping(nn.Module):
    """Keeps what it has made, as attention maps are kept for a look at them."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.seen = nn.Linear(4, 6), nn.Linear(6, 2), []

    def forward(self, x):
        self.last = torch.relu(self.a(x))
        self.seen.append(self.last)
        return self.b(self.last)


def test_what_modules_keep_of_a_pass_is_copied_without_its_graph():
    network, x = Keeping(), torch.randn(3, 4)
    network(x)
    gated = gate(network, x)
    gated(x).sum().backward()
    assert compact(gated, x)(x).shape == (3, 2)
    assert network.last.requires_grad


def test_the_log_counts_a_shared_gate_once(caplog):
    layers = [nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4), nn.ReLU()) for _ in range(3)]
    with caplog.at_level("INFO"):
        net = gate(nn.Sequential(*layers), torch.ones(1, 4), families="units", shape="uniform")
    count = sum(g.log_alpha.numel() for g in hard_concretes(net).values())
    assert f"{count} gates in {len(hard_concretes(net))} groups of Sequential now" in caplog.text
