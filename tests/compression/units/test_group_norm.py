"""Networks with group norms: channels go one by one, and each group takes its means over those that stay."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sparsereg
from sparsereg.compression import compact, export, gate, load_compacted, save_compacted
from sparsereg.compression.units.structure import ATTRIBUTE
from sparsereg.compression.verify import difference
from sparsereg.penalties import hard_concretes


class Rectified(nn.GroupNorm):
    """A group norm with a forward pass of its own, as libraries have them."""

    def forward(self, x):
        return F.relu(F.group_norm(x, self.num_groups, self.weight, self.bias, self.eps))


class Net(nn.Module):
    """A residual block: groups of the same norm lose different numbers of channels."""

    def __init__(self):
        super().__init__()
        self.stem, self.first = nn.Conv2d(3, 12, 3, padding=1), nn.GroupNorm(3, 12)
        self.inner, self.second = nn.Conv2d(12, 20, 3), Rectified(4, 20)
        self.outer, self.third = nn.ConvTranspose2d(20, 12, 3), nn.GroupNorm(3, 12)
        self.head = nn.Linear(12, 3)

    def forward(self, x):
        x = self.first(self.stem(x)).relu()
        x = x + self.third(self.outer(self.second(self.inner(x))))
        return self.head(x.relu().mean((2, 3)))


def flat():
    return nn.Sequential(nn.Linear(6, 12), nn.GroupNorm(3, 12), nn.Tanh(), nn.Linear(12, 3))


def line():
    return nn.Sequential(nn.Conv1d(3, 12, 3), nn.GroupNorm(2, 12), nn.Tanh(), nn.Flatten(), nn.Linear(48, 3))


class Function(nn.Module):
    """A group norm that is no module: nobody can tell it what is shut."""

    def __init__(self, affine):
        super().__init__()
        self.into, self.out = nn.Conv2d(3, 12, 3), nn.Conv2d(12, 2, 3)
        self.weight = nn.Parameter(torch.rand(12)) if affine else None
        self.bias = nn.Parameter(torch.rand(12)) if affine else None

    def forward(self, x):
        return self.out(F.group_norm(self.into(x), 4, self.weight, self.bias).relu())


@torch.no_grad()
def prepared(network, x, **settings):
    """Gated, in float64, with gates that are shut, a little open or wide open, and weights that differ."""
    torch.manual_seed(0)
    for p in network.parameters():
        p.add_(0.3 * torch.randn_like(p))
    gated = gate(network.double(), x, jitter=0.0, **settings).eval()
    for gates in hard_concretes(gated).values():
        gates.log_alpha.normal_(0, 3)
    return gated


MAPS = torch.randn(2, 3, 7, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
EXAMPLES = [(Net, MAPS), (flat, torch.randn(4, 6).double()), (line, torch.randn(2, 3, 6).double())]


def sizes(network):
    return {name: p.shape[0] for name, p in network.named_parameters() if p.dim() > 1}


@pytest.mark.parametrize(("make", "x"), EXAMPLES)
@pytest.mark.parametrize("shape", ["free", "uniform"])
def test_channels_go_one_by_one_with_the_same_answers(make, x, shape, tmp_path):
    network = prepared(make(), x, shape=shape)
    smaller = compact(network, x)
    assert sum(p.numel() for p in smaller.parameters()) < sum(p.numel() for p in make().parameters())
    other = torch.cat([x, 2 * x - 1])
    assert difference(network(other), smaller(other)) < 1e-12
    norms = [m for m in smaller.modules() if isinstance(m, nn.GroupNorm)]
    groups = [m for m in make().modules() if isinstance(m, nn.GroupNorm)]
    # Groups that differ in size are written out; the class of the network can hold those that do not.
    assert len(norms) == len(groups) if shape == "uniform" else len(norms) < len(groups)
    save_compacted(smaller, tmp_path / "small.pt")
    assert torch.equal(load_compacted(tmp_path / "small.pt")(other), smaller(other))


@pytest.mark.parametrize("shape", ["free", "uniform"])
def test_gates_are_found_again_without_what_gate_knew(shape):
    network = prepared(Net(), MAPS, shape=shape)
    expected = compact(network, MAPS)
    del network.__dict__[ATTRIBUTE]
    found = compact(network, MAPS)
    assert sizes(found) == sizes(expected)
    assert difference(found(MAPS), expected(MAPS)) < 1e-14


@pytest.mark.parametrize("make", [Net, flat])
def test_a_gated_norm_has_the_gradients_of_the_smaller_one(make):
    """In training, with all gates drawn at once, and where a module is called by itself."""
    x = MAPS if make is Net else torch.randn(4, 6).double()
    network = prepared(make(), x)
    for gates in hard_concretes(network).values():
        gates.log_alpha.data = gates.log_alpha.data.sign() * 30
    smaller = compact(network, x)

    def gradient(model):
        inputs = x.clone().requires_grad_()
        model(inputs).sin().sum().backward()
        return inputs.grad

    wanted = gradient(smaller)
    assert difference(gradient(network), wanted) < 1e-12
    assert difference(gradient(network.train()), wanted) < 1e-12
    inputs = x.clone().requires_grad_()
    state = {name: p.detach() for name, p in network.named_parameters()}
    by_func = torch.func.grad(lambda i: torch.func.functional_call(network.eval(), state, (i,)).sin().sum())(
        inputs
    )
    assert difference(by_func, wanted) < 1e-12


def test_a_norm_alone_has_the_derivatives_that_differences_give():
    network = prepared(
        nn.Sequential(nn.Conv1d(2, 8, 1), nn.GroupNorm(2, 8), nn.Conv1d(8, 1, 1)), MAPS[:, :2, 0]
    )
    x = MAPS[:, :2, 0].clone().requires_grad_()
    assert torch.autograd.gradcheck(network, (x,))
    assert torch.autograd.gradgradcheck(network, (x,))


@pytest.mark.parametrize("affine", [True, False])
def test_a_norm_that_no_gates_can_tell_what_is_shut_goes_by_whole_groups(affine):
    torch.manual_seed(0)
    network = gate(Function(affine).double(), MAPS, jitter=0.0).eval()
    (gates,) = hard_concretes(network).values()
    assert gates.gate_size == (4,)
    gates.log_alpha.data = torch.tensor([9.0, -9.0, 9.0, -9.0], dtype=torch.float64)
    smaller = compact(network, MAPS)
    assert sizes(smaller)["into.weight"] == 6
    assert difference(network(MAPS), smaller(MAPS)) < 1e-13


def test_what_can_go_is_said_channel_by_channel():
    table = sparsereg.explain(Net(), MAPS.float()).to_frame()
    table = table[table.family == "channels"]
    assert dict(table[table.state == "can go"][["parameter", "size"]].values) == {
        "stem.weight": 12,
        "inner.weight": 20,
    }
    assert set(table.state) == {"can go", "tied"}


def test_rounding_brings_back_no_channel_over_which_a_mean_would_be_taken():
    network = prepared(Net(), MAPS)
    assert sizes(compact(network, MAPS, round_to=4)) == sizes(compact(network, MAPS))


def test_a_group_of_which_all_is_shut_is_gone():
    network = prepared(flat(), EXAMPLES[1][1])
    (gates,) = hard_concretes(network).values()
    gates.log_alpha.data = torch.tensor([-9.0] * 4 + [9.0] * 2 + [-9.0] + [9.0] * 5, dtype=torch.float64)
    smaller = compact(network, EXAMPLES[1][1])
    assert sizes(smaller) == {"0.weight": 7, "3.weight": 3}
    assert difference(network(EXAMPLES[1][1]), smaller(EXAMPLES[1][1])) < 1e-13


def test_means_are_taken_under_autocast():
    network = prepared(Net(), MAPS).float()
    x = MAPS.float()
    with torch.autocast("cpu", torch.bfloat16):
        rounded = network(x)
    assert difference(network(x), rounded) < 0.05


@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
def test_files_for_runtimes_take_any_number_of_maps(suffix, tmp_path):
    """``export`` compares answers at other numbers of examples."""
    network = copy.deepcopy(prepared(Net(), MAPS)).float()
    assert export(network, MAPS.float(), tmp_path / f"net{suffix}").exists()
