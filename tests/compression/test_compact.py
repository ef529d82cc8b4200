import copy
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from sparsereg import gate
from sparsereg.compression import Accountant, compact, count, load_compacted, save_compacted
from sparsereg.compression.compact import twin
from sparsereg.compression.units import structure
from sparsereg.compression.units.steps.norms import Norm
from sparsereg.compression.units.steps.single import Single
from sparsereg.compression.verify import difference
from sparsereg.distributions import HardConcrete
from sparsereg.errors import InputError
from sparsereg.model.basic_l0_blocks import L0Gate
from sparsereg.model.googlenet import GoogleNet
from sparsereg.penalties import hard_concretes
from tests.compression.networks import NETWORKS, PATTERNS, make, set_gates

LARGE = ("resnet18", "mobilenet_v2", "mobilenet_v3")
PATTERNS_OF = {
    n: ((0, "mixed"), (0, "one open")) if n in LARGE else tuple(enumerate(PATTERNS)) for n in NETWORKS
}


class Pair(NamedTuple):
    left: torch.Tensor
    right: torch.Tensor


@dataclass
class Both:
    left: torch.Tensor
    right: torch.Tensor


def size(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


@torch.no_grad()
def check(network: nn.Module, x: torch.Tensor, wide: nn.Module | None = None) -> nn.Module:
    """Same answers in both precisions, the counted size and MACs, no gate, another memory."""
    counted = count(network, x)
    smaller = compact(network, x, check=False)
    assert difference(network(x), smaller(x)) < 1e-5
    assert smaller(x).shape == network(x).shape
    assert size(smaller) == counted.compacted_parameters
    assert not any(type(m).__module__.startswith("sparsereg") for m in smaller.modules())
    own = {p.data_ptr() for p in network.parameters()}
    assert not any(p.data_ptr() in own for p in smaller.parameters() if p.numel())
    with torch.enable_grad(), FlopCounterMode(display=False) as flops:
        smaller(x[:1])
    assert flops.get_total_flops() == 2 * counted.compacted_macs
    wide, y = copy.deepcopy(network).double() if wide is None else wide, x.double()
    wide.load_state_dict(network.state_dict())
    assert difference(wide(y), compact(wide, y, check=False)(y)) < 1e-9
    assert sum(row.kept_parameters for row in counted.layers) == counted.compacted_parameters
    assert sum(row.kept_macs for row in counted.layers) == counted.compacted_macs
    return smaller


@pytest.mark.costly
@pytest.mark.parametrize("name", PATTERNS_OF)
def test_same_answers_and_counted_size(name):
    network, _ = make(name)
    wide = copy.deepcopy(network).double()
    for seed, pattern in PATTERNS_OF[name]:
        fresh, x = make(name, seed)
        network.load_state_dict(fresh.state_dict())
        set_gates(network, pattern, seed)
        check(network, x, wide)


@pytest.mark.costly
@pytest.mark.parametrize("name", NETWORKS)
def test_nothing_goes_where_all_is_open(name):
    network, x = make(name)
    set_gates(network, "all open")
    gates = sum(g.log_alpha.numel() for g in network.modules() if isinstance(g, HardConcrete))
    counted = count(network, x)
    assert counted.parameters == size(network) - gates
    assert counted.compacted_parameters == counted.parameters
    assert counted.exact_sparsity == 0
    assert counted.open_gates == counted.gates == gates


def test_float32_check_passes_and_network_is_left_alone():
    network, x = make("googlenet")
    set_gates(network, "mixed")
    network.train()
    network.blocks[0].eval()
    modes = [m.training for m in network.modules()]
    state = {k: v.clone() for k, v in network.state_dict().items()}
    network.stem.conv.weight.grad = torch.ones_like(network.stem.conv.weight)
    random = torch.get_rng_state()
    Accountant(network, x).count()
    compact(network, x)
    assert [m.training for m in network.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    for key, value in network.state_dict().items():
        assert torch.equal(value, state[key])
        assert value.dtype == state[key].dtype
    assert network.stem.conv.weight.grad.dtype == torch.float32


@pytest.mark.costly
def test_check_leaves_gates_that_are_shared_alone():
    network, x = make("resnet18")
    set_gates(network, "mixed")
    compact(network, x)
    assert all(p.dtype == torch.float32 for p in network.parameters())


def test_check_refuses_other_answers(monkeypatch):
    network, x = make("mlp")
    set_gates(network, "mixed")
    monkeypatch.setattr(
        Single, "write", lambda step, fold: fold.read(step, 0, everything(step, fold), exact=True)[0]
    )
    with pytest.raises(RuntimeError, match="other answers"):
        compact(network, x)


def everything(step, fold):
    return fold.channels.kept[step.out]


class InFloat32(nn.Module):
    """Goes to float32 by itself, as norms and one-hot inputs of many networks do."""

    def __init__(self):
        super().__init__()
        self.first, self.gate, self.last = nn.Linear(6, 8), L0Gate(8), nn.Linear(8, 3)

    def forward(self, x):
        y = self.gate(torch.relu(self.first(x))).to(torch.float32)
        return self.last((y / y.square().mean(-1, keepdim=True).add(1).sqrt()).to(self.last.weight.dtype))


class OfItsOwn(InFloat32):
    """Makes a tensor of a size, whose type of numbers is the default."""

    def forward(self, x):
        return super().forward(torch.zeros(x.shape).index_add(0, torch.arange(len(x)), x))


@pytest.mark.parametrize("kind", [InFloat32, OfItsOwn])
def test_a_network_that_goes_to_float32_is_compared_in_float64(kind, monkeypatch):
    network = kind().eval()
    set_gates(network, "mixed")
    x = torch.randn(4, 6)
    compared = []

    def seen(a, b):
        compared.append((a.dtype, difference(a, b)))
        return compared[-1][1]

    monkeypatch.setattr("sparsereg.compression.verify.difference", seen)
    compact(network, x)
    exact = [d for dtype, d in compared if dtype is torch.float64]
    assert exact
    assert max(exact) < 1e-12


class Drawn(nn.Module):
    """Draws random numbers in eval mode."""

    def __init__(self):
        super().__init__()
        self.first, self.gate, self.last = nn.Linear(6, 8), L0Gate(8), nn.Linear(8, 3)

    def forward(self, x):
        y = self.gate(torch.relu(self.first(x)))
        return self.last(y + torch.randn_like(y))


def test_random_numbers_in_eval_mode_are_the_users_to_mend():
    network = Drawn().eval()
    set_gates(network, "mixed")
    with pytest.raises(InputError, match="Drawn answers differently when it is called twice"):
        compact(network, torch.randn(4, 6))


@pytest.mark.costly
def test_dead_branch_leaves_the_concatenation():
    network, x = make("googlenet")
    set_gates(network, "all open")
    for module in network.blocks[0].branch5x5.modules():
        if isinstance(module, HardConcrete):
            module.log_alpha.data.fill_(-9)
    smaller = check(network, x)
    assert not any("branch5x5" in n for n, _ in smaller.get_submodule("blocks.0").named_modules())
    assert smaller.get_submodule("blocks.0.branch1x1.conv").in_channels == 64


def test_closed_inputs_are_selected_inside_and_the_signature_stays():
    network, x = make("lenet300")
    set_gates(network, "half")
    smaller = check(network, x)
    open_inputs = int((network.input_gate.gates.median() > 0).sum())
    assert smaller.fc1.in_features == open_inputs


def test_constants_move_into_the_bias_or_stay_where_padding_would_show_them():
    def net(padding):
        torch.manual_seed(0)
        first = [nn.Conv2d(2, 3, 1), nn.ReLU(), L0Gate(3)]
        rest = [nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 3, padding=padding), nn.Flatten()]
        network = nn.Sequential(*first, *rest).eval()
        network[2].gates.log_alpha.data.fill_(-9)
        network[3].bias.data.fill_(0.5)
        return network

    x = torch.randn(2, 2, 3, 3)
    constant = check(net(0), x)
    assert size(constant) == 2  # what the last bias became
    padded = check(net(1), x)
    assert size(padded) == 4 + 4 * 2 * 9 + 2


def test_bias_is_made_only_where_no_batchnorm_can_take_it():
    def net(norm):
        torch.manual_seed(0)
        depthwise = nn.Conv2d(4, 4, 3, padding=1, groups=4)
        network = nn.Sequential(nn.Conv2d(1, 4, 1), L0Gate(4), depthwise, nn.Conv2d(4, 5, 1, bias=False))
        if norm:
            network.append(nn.BatchNorm2d(5))
        network[1].gates.log_alpha.data.copy_(torch.tensor([9.0, -9, 9, -9]))
        return network.eval()

    x = torch.randn(2, 1, 4, 4)
    rest = 2 * 2 + 2 * 10 + 2 * 5
    assert size(check(net(False), x)) == rest + 5
    assert size(check(net(True), x)) == rest + 2 * 5


@pytest.mark.costly
def test_hand_count():
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        L0Gate(6),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 4, 3),
        nn.Flatten(),
        L0Gate(16),
        nn.Linear(16, 3),
    ).eval()
    network[3].gates.log_alpha.data.copy_(torch.tensor([9.0, -9, -9, 9, 9, -9]))
    open_units = torch.zeros(16)
    open_units[[0, 1, 4]] = 1  # two positions of channel 0, one of channel 1
    network[7].gates.log_alpha.data.copy_(18 * open_units - 9)
    x = torch.randn(2, 3, 8, 8)
    counted = count(network, x)
    assert counted.parameters == (6 * 27 + 6) + 12 + (4 * 54 + 4) + (48 + 3)
    assert counted.compacted_parameters == (3 * 27 + 3) + 6 + (2 * 27 + 2) + (3 * 3 + 3)
    assert counted.macs == 64 * 6 * 27 + 4 * 4 * 54 + 48
    assert counted.compacted_macs == 64 * 3 * 27 + 4 * 2 * 27 + 9
    assert counted.exact_sparsity == pytest.approx(1 - counted.compacted_parameters / counted.parameters)
    assert (counted.gates, counted.open_gates) == (22, 6)
    assert [row.kept_channels for row in counted.layers] == [3, 3, 2, 3]
    assert list(counted.to_frame()["name"]) == ["0", "1", "5", "8"]
    check(network, x)


def test_googlenet_has_260650_weights():
    for which in ("all", "branches", "none"):
        assert count(GoogleNet(gate=which), torch.zeros(1, 3, 32, 32)).parameters == 260_650


@pytest.mark.costly
def test_accountant_follows_gates_weights_and_devices():
    network, x = make("googlenet")
    accountant = Accountant(network, x)
    for seed in range(3):
        set_gates(network, "mixed", seed)
        fresh = make("googlenet", seed)[0]
        network.load_state_dict({**fresh.state_dict(), **_gates_of(network)})
        counted = accountant.count()
        assert counted.compacted_parameters == size(compact(network, x, check=False))
        assert accountant.exact_sparsity() == counted.exact_sparsity
        assert accountant.exact_macs() == counted.compacted_macs
    network.double()
    assert accountant.count().compacted_parameters == counted.compacted_parameters


def _gates_of(network):
    return {k: v for k, v in network.state_dict().items() if "log_alpha" in k or "_extra_state" in k}


def test_compacted_network_trains():
    network, x = make("functional")
    set_gates(network, "mixed")
    smaller = compact(network, x)
    assert not smaller.training
    assert any(isinstance(m, nn.Dropout) for m in smaller.modules())
    smaller.train()
    optimizer = torch.optim.SGD(smaller.parameters(), 0.01)
    before = smaller(x).square().mean()
    before.backward()
    assert all(p.grad is not None for p in smaller.parameters())
    optimizer.step()


@pytest.mark.costly
def test_compacted_network_learns_as_the_gated_one_would():
    """With gates that are fully open or shut, BatchNorm and all: one step of training agrees."""
    network, x = make("googlenet", batch=8)
    set_gates(network, "half")
    wide = network.double()
    smaller = compact(wide, x.double()).train()
    wide.train()
    with torch.no_grad():
        for g in wide.modules():
            if isinstance(g, HardConcrete):
                g.eval()
    assert difference(wide(x.double()), smaller(x.double())) < 1e-9


@pytest.mark.costly
def test_rounding_keeps_the_answers_and_makes_multiples():
    network, x = make("googlenet")
    set_gates(network, "half")
    plain, rounded = compact(network, x), compact(network, x, round_to=8)
    assert difference(plain(x), rounded(x)) < 1e-5
    assert size(plain) <= size(rounded) <= size(network)
    widths = [m.out_channels for m in rounded.modules() if isinstance(m, nn.Conv2d)]
    full = {n: m.out_channels for n, m in network.named_modules() if isinstance(m, nn.Conv2d)}
    assert all(w % 8 == 0 or w in full.values() for w in widths)
    with pytest.raises(ValueError, match="round_to"):
        compact(network, x, round_to=0)


def test_half_precision():
    network, x = make("mlp")
    set_gates(network, "half")
    smaller = compact(network.bfloat16(), x.bfloat16())
    assert all(p.dtype == torch.bfloat16 for p in smaller.parameters())


@pytest.mark.costly
def test_compacting_twice_changes_nothing():
    network, x = make("mobilenet_v3")
    set_gates(network, "few open")
    once = compact(network, x)
    twice = compact(once, x)
    assert size(once) == size(twice)
    assert difference(once(x), twice(x)) < 1e-6


def test_several_inputs_and_outputs():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(3, 6)
            self.gate = L0Gate(6)

        def forward(self, x, y):
            h = self.gate(torch.relu(self.a(x) + self.b(y)))
            return {"h": h, "pair": (h[:, :2], x)}

    torch.manual_seed(0)
    network = Two().eval()
    set_gates(network, "half")
    inputs = (torch.randn(2, 4), torch.randn(2, 3))
    smaller = compact(network, inputs)
    found = smaller(*inputs)
    assert torch.allclose(found["h"], network(*inputs)["h"])
    assert torch.equal(found["pair"][1], inputs[0])
    with pytest.raises(InputError, match="Two cannot be traced.*one batch as the network takes it"):
        compact(network, inputs[0])


def test_writing_in_place_is_followed():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            self.gate = L0Gate(4)
            self.relu = nn.ReLU(inplace=True)

        def forward(self, x):
            y = self.gate(self.a(x))
            self.relu(y)
            return self.b(y) + y

    torch.manual_seed(0)
    network = InPlace().eval()
    set_gates(network, "mixed")
    check(network, torch.randn(5, 4))


def test_what_cannot_be_traced_is_named():
    class Branches(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Branches()

        def forward(self, x):
            return self.inner(x)

    with pytest.raises(
        InputError, match=r"Outer cannot be traced at test_compact.py:\d+ .*its path depends on the data"
    ) as raised:
        compact(Outer(), torch.randn(2, 3))
    assert "expert" not in str(raised.value)
    with pytest.raises(InputError, match="Sequential cannot be traced.*the example must be one batch"):
        compact(nn.Sequential(nn.Linear(3, 2)), torch.randn(2, 4))
    with pytest.raises(ValueError, match="example_input must be a tensor"):
        compact(nn.Linear(3, 2), 5)

    class Leaves(nn.Module):
        def forward(self, x):
            return torch.from_numpy(np.abs(x.numpy()))

    with pytest.raises(InputError, match=r"Leaves cannot be traced at .*np.abs.*the network runs, but"):
        compact(Leaves(), torch.randn(2, 3))

    class AlwaysDrops(nn.Module):
        def forward(self, x):
            return nn.functional.dropout(x)

    with pytest.raises(InputError, match=r"also drops in eval mode; pass training=self\.training"):
        compact(AlwaysDrops(), torch.randn(2, 3))

    class OwnGate(nn.Module):
        def __init__(self):
            super().__init__()
            self.z = HardConcrete(3)
            self.layer = nn.Linear(3, 3)

        def forward(self, x):
            return nn.functional.linear(x, self.layer.weight - self.z())

    with pytest.raises(InputError, match="no rule for the gates 'z'"):
        compact(OwnGate(), torch.randn(2, 3))


def test_gates_of_a_users_own_on_any_dimension():
    class Own(nn.Module):
        """Gates that a network multiplies by itself, on tokens' features and on hidden units."""

        def __init__(self):
            super().__init__()
            self.z, self.gate = HardConcrete(5), L0Gate(4, dim=2)
            self.a, self.b, self.c = nn.Linear(4, 5), nn.Linear(5, 6), nn.Linear(6, 2)
            self.rows = HardConcrete(6)

        def forward(self, x):
            x = torch.tanh(self.a(self.gate(x))) * self.z()
            return self.c(
                nn.functional.linear(x, self.b.weight * self.rows()[:, None], self.b.bias * self.rows())
            )

    torch.manual_seed(0)
    network, x = Own().eval(), torch.randn(2, 3, 4)
    set_gates(network, "mixed")
    smaller = check(network, x)
    assert smaller.a.in_features == int((network.gate.gates.median() > 0).sum()) < 4
    assert smaller.b.in_features == int((network.z.median() > 0).sum()) < 5
    assert smaller.c.in_features == int((network.rows.median() > 0).sum()) < 6


def test_operations_without_a_rule_keep_their_inputs():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(6, 8)
            self.gate = L0Gate(8)
            self.norm = nn.LayerNorm(8)
            self.shift = nn.Parameter(torch.randn(8))
            self.b = nn.Linear(8, 3)

        def forward(self, x):
            return self.b(self.norm(self.gate(torch.tanh(self.a(x))) + self.shift))

    torch.manual_seed(0)
    network = Odd().eval()
    set_gates(network, "mixed")
    smaller = check(network, torch.randn(4, 6))
    assert smaller.a.out_features == 8


def test_layers_may_have_the_names_of_what_a_traced_network_has(tmp_path):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.graph, self.code = nn.Linear(4, 6), nn.Sequential(nn.Linear(6, 3))
            self.gate = L0Gate(6)
            self.meta = nn.Parameter(torch.randn(3))

        def forward(self, x):
            return self.code(self.gate(self.graph(x))) * self.meta

    torch.manual_seed(0)
    network = Odd().eval()
    set_gates(network, "half")
    x = torch.randn(5, 4)
    smaller = check(network, x)
    assert torch.equal(load_compacted(save_compacted(smaller, tmp_path / "c.pt"))(x), smaller(x))


def test_answers_in_a_dataclass_or_a_named_tuple(tmp_path):
    class Wraps(nn.Module):
        def __init__(self, kind):
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)
            self.gate = L0Gate(6)
            self.kind = kind

        def forward(self, x):
            return self.kind(self.b(self.gate(self.a(x))), x)

    for kind in (Pair, Both):
        torch.manual_seed(0)
        network, x = Wraps(kind).eval(), torch.randn(3, 4)
        set_gates(network, "half")
        smaller = compact(network, x)
        assert smaller.a.out_features < 6
        assert isinstance(smaller(x), kind)
        assert difference(network(x).left, smaller(x).left) < 1e-5
    with pytest.raises(InputError, match="Both cannot be saved yet"):
        save_compacted(smaller, tmp_path / "c.pt")


def test_inputs_without_names():
    class Variable(nn.Module):
        def forward(self, *inputs):
            return inputs[0] * inputs[1]

    x, y = torch.randn(2, 3), torch.randn(2, 3)
    assert torch.equal(compact(Variable(), (x, y))(x, y), x * y)


def test_what_cannot_be_rebuilt_is_named(monkeypatch):
    """Whatever goes wrong inside of one operation, its user gets one line that names it."""

    def breaks(step, fold):
        raise TypeError("int() argument must be a string")

    network, x = make("mlp")
    set_gates(network, "half")
    monkeypatch.setattr(Norm, "write", breaks)
    with pytest.raises(InputError, match=r"^Sequential cannot be compacted, at '6' \(batch_norm\): int"):
        compact(network, x)


def test_infinite_answers_must_be_infinite_on_both_sides():
    inf, nan = float("inf"), float("nan")
    a = torch.tensor([0.0, 10.0, inf, -inf, nan])
    assert difference(a, a) == 0
    assert difference(a, a + 1) == pytest.approx(0.1)
    assert difference(a, torch.zeros(5)) == inf
    assert difference(a, a.flip(0)) == inf


def test_differences_are_relative():
    a = torch.tensor([0.0, 10.0])
    assert difference(a, a + 1) == pytest.approx(0.1)
    assert difference(torch.full((3,), 4.0), torch.full((3,), 5.0)) == pytest.approx(0.25)
    assert difference(a, torch.zeros(3)) == float("inf")
    assert np.isfinite(difference(torch.zeros(2), torch.zeros(2)))


@pytest.mark.costly
def test_a_compacted_network_that_enlarges_maps_is_compacted_again():
    class Enlarged(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 2, 1)

        def forward(self, x):
            x = nn.functional.interpolate(
                self.a(x).relu(), scale_factor=2, mode="bilinear", align_corners=False
            )
            return self.b(nn.functional.interpolate(x, size=(9, 9), mode="nearest"))

    example = torch.randn(2, 3, 6, 6)
    gated = gate(Enlarged().eval(), example)
    ((_, gates),) = hard_concretes(gated).items()
    gates.log_alpha.data.copy_(torch.tensor([-10.0, 3.0]).repeat(4))
    once = compact(gated, example)
    twice = compact(once, example)
    assert len(twice.a.weight) == 4
    assert (once(example) - twice(example)).abs().max() < 1e-6


def test_copies_of_traced_networks_know_what_was_found_out(monkeypatch):
    example = torch.randn(2, 4)
    once = compact(gate(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)).eval(), example), example)
    gated = gate(once, example)
    monkeypatch.setattr(structure, "analyse", None)  # what would trace it
    with pytest.raises(TypeError):
        compact(copy.deepcopy(gated), example)
    copied = twin(gated)
    next(iter(hard_concretes(copied).values())).log_alpha.data[:3] = -10.0
    assert sum(p.numel() for p in compact(copied, example).parameters()) == 4 * 3 + 3 + 3 * 2 + 2
    assert sum(p.numel() for p in compact(gated, example).parameters()) == size(once)


def small():
    """A network with gates, four of the eight of which are shut."""
    network = gate(nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(4, 3)).eval()
    next(iter(hard_concretes(network).values())).log_alpha.data[:4] = -10
    return network


@pytest.mark.parametrize("name", ["2.weight", "gates.log_alpha"])
def test_weights_that_are_no_numbers_are_refused(name):
    network = small()
    next(p for n, p in network.named_parameters() if n.endswith(name)).data.view(-1)[0] = float("nan")
    with pytest.raises(InputError, match=f"{name} of Sequential is nan in 1 of "):
        compact(network, torch.randn(4, 3))


def test_answers_that_are_no_numbers_prove_nothing():
    with pytest.raises(InputError, match="answers the example by nan or infinity alone"):
        compact(small(), torch.full((4, 3), float("inf")))


def test_what_is_frozen_beside_what_trains_stays_frozen():
    network = small()
    network[0].requires_grad_(False)
    trains = {n: p.requires_grad for n, p in compact(network, torch.randn(4, 3)).named_parameters()}
    assert trains == {"0.weight": False, "0.bias": False, "2.weight": True, "2.bias": True}
    network[2].requires_grad_(False)  # gates alone have been trained
    assert all(p.requires_grad for p in compact(network, torch.randn(4, 3)).parameters())


def test_a_layer_that_is_asked_to_be_of_its_own_type_is_traced():
    class Asks(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x):
            self.a = self.a.to(x.dtype)
            return self.b(self.a(x).relu())

    x = torch.randn(3, 4)
    network = gate(Asks(), x).eval()
    torch.testing.assert_close(compact(network, x)(x), network(x))


class Maps(nn.Module):
    """Attention with a mask that ``torch.vmap`` makes of a function of two places."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x):
        def may_see(i, j):
            return (i >= j) | (j < 2)

        places = torch.arange(x.shape[1], device=x.device)
        mask = torch.vmap(torch.vmap(may_see, (None, 0)), (0, None))(places, places)
        return self.out(nn.functional.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x), mask))


def test_a_mask_that_is_made_by_a_map():
    x = torch.randn(2, 5, 8)
    network = gate(Maps(), x).eval()
    set_gates(network, "half")
    small, longer = compact(network, x), torch.randn(3, 7, 8)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in Maps().parameters())
    torch.testing.assert_close(small(longer), network(longer))
    assert torch.randn(3).shape == (3,)  # no map is left open


def test_a_network_that_answers_otherwise_when_it_is_traced_is_refused():
    class Asks(nn.Sequential):
        def forward(self, x):
            return super().forward(x if torch.compiler.is_compiling() else x.abs())

    with pytest.raises(InputError, match="Asks answers otherwise when torch.export traces it"):
        gate(Asks(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)), torch.randn(3, 4))


class Picks(nn.Module):
    """Takes whole numbers as floats, and refuses others, as boxes with the number of their image."""

    def __init__(self):
        super().__init__()
        self.enter, self.out = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x, which):
        return self.out(self.enter(x).relu()[which.long()])


def test_a_network_that_takes_no_noise_is_compared_on_the_example():
    example = (torch.randn(3, 4), torch.tensor([0.0, 2.0] * 20))
    network = gate(Picks().eval(), example)
    assert difference(network(*example), compact(network, example)(*example)) < 1e-5
