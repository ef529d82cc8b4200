"""Layers along one axis that take what lies along others one by one: channels behind a layer along tokens."""

import pytest
import torch
from torch import nn

from sparsereg.compression import Accountant, compact, gate
from sparsereg.penalties import hard_concretes
from tests.compression.units.test_rules import difference, free, halved

TOKENS = 6


class Turned(nn.Linear):
    """A linear layer along the axis before the last."""

    def forward(self, x):
        return super().forward(x.transpose(-1, -2)).transpose(-1, -2)


class Product(nn.Module):
    """A product with a matrix along the axis before the last."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(TOKENS, TOKENS))

    def forward(self, x):
        return (x.mT @ self.weight).mT


class SpatialGate(nn.Module):
    """u * layer(norm(v)), with a layer along the tokens."""

    def __init__(self, units, layer):
        super().__init__()
        self.norm, self.layer = nn.LayerNorm(units), layer

    def forward(self, x):
        u, v = x.chunk(2, dim=-1)
        return u * self.layer(self.norm(v))


class GMlp(nn.Module):
    """A block of gMLP. Source: Liu et al. 2021, "Pay attention to MLPs", figure 1."""

    def __init__(self, width, units, layer):
        super().__init__()
        self.norm, self.up = nn.LayerNorm(width), nn.Linear(width, 2 * units)
        self.gate, self.down = SpatialGate(units, layer), nn.Linear(units, width)

    def forward(self, x):
        return x + self.down(self.gate(nn.functional.gelu(self.up(self.norm(x)))))


def gmlp(layer):
    torch.manual_seed(0)
    blocks = [GMlp(8, 10, layer()) for _ in range(2)]
    return nn.Sequential(nn.Linear(5, 8), *blocks, nn.LayerNorm(8), nn.Linear(8, 3))


class Axial(nn.Module):
    """A convolution along the tokens of (batch, tokens, channels), which a kernel of size 1 leaves alone."""

    def __init__(self, kernel=(3, 1), padding=(1, 0), stride=1):
        super().__init__()
        self.up, self.down = nn.Linear(5, 12), nn.Linear(12, 3)
        self.along = nn.Conv2d(1, 1, kernel, padding=padding, stride=stride)

    def forward(self, x):
        x = self.up(x).relu()
        return self.down(x * self.along(x.unsqueeze(1)).squeeze(1))


class Mixer(nn.Module):
    """An MLP along the tokens and one along the channels, each added to the stream.

    Source: Tolstikhin et al. 2021, "MLP-Mixer: an all-MLP architecture for vision", equation 1.
    """

    def __init__(self, hidden, width=8):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), Turned(TOKENS, hidden), Turned(hidden, TOKENS)
        self.second, self.wide, self.narrow = nn.LayerNorm(width), nn.Linear(width, 14), nn.Linear(14, width)

    def forward(self, x):
        x = x + self.down(nn.functional.gelu(self.up(self.norm(x))))
        return x + self.narrow(nn.functional.gelu(self.wide(self.second(x))))


LAYERS = {
    "conv": lambda: nn.Conv1d(TOKENS, TOKENS, 1),
    "no bias": lambda: nn.Conv1d(TOKENS, TOKENS, 1, bias=False),
    "groups": lambda: nn.Conv1d(TOKENS, TOKENS, 1, groups=3),
    "transposed": lambda: nn.ConvTranspose1d(TOKENS, TOKENS, 1),
    "linear": lambda: Turned(TOKENS, TOKENS),
    "product": Product,
}


@pytest.mark.costly
@pytest.mark.parametrize("layer", LAYERS)
def test_channels_of_a_spatial_gate_go_one_by_one(layer):
    network, x = gmlp(LAYERS[layer]), torch.randn(2, TOKENS, 5)
    own = free(network, x)
    assert own[("1.up.weight", 0)] == own[("2.up.weight", 0)] == 10
    assert halved(network, x) < 1e-12


def test_an_axis_with_a_kernel_of_one_is_left_as_it_is():
    x = torch.randn(2, TOKENS, 5)
    assert free(Axial(), x)[("up.weight", 0)] == 12
    assert halved(Axial(), x) < 1e-12


@pytest.mark.parametrize(("kernel", "padding"), [((3, 3), 1), ((1, 3), (0, 1))])
def test_an_axis_along_which_a_kernel_adds_up_is_tied(kernel, padding):
    assert free(Axial(kernel, padding), torch.randn(2, TOKENS, 5)).get(("up.weight", 0), 0) <= 1


@pytest.mark.costly
def test_of_two_axes_the_longer_one_goes():
    x = torch.randn(2, TOKENS, 5)
    for hidden, expected in ((7, {"0.weight": 8}), (9, {"0.weight": 1, "1.up.weight": 9})):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(5, 8), Mixer(hidden), nn.LayerNorm(8), nn.Linear(8, 3))
        own = free(network, x)
        assert {name: own[(name, 0)] for name in expected} == expected
        assert halved(network, x) < 1e-12


@pytest.mark.costly
@torch.no_grad()
@pytest.mark.parametrize("layer", ["conv", "linear", "product"])
def test_what_is_left_of_a_gmlp_is_counted_and_gives_the_same_answers(layer):
    network, x = gmlp(LAYERS[layer]).double().eval(), torch.randn(3, TOKENS, 5, dtype=torch.float64)
    gated = gate(network, x, families=["width", "units"], jitter=0.0).eval()
    for gates in hard_concretes(gated).values():
        gates.log_alpha[::2] = -10.0
        gates.log_alpha[1::2] = 10.0
    small = compact(gated, x)
    assert difference(small(x), gated(x)) < 1e-12
    # width 4 of 8, units 5 of 10 in both halves of the gate; the layers along the tokens stay
    along = TOKENS**2 + (0 if layer == "product" else TOKENS)
    block = 2 * 4 + (4 * 10 + 10) + 2 * 5 + along + (5 * 4 + 4)
    by_hand = (5 * 4 + 4) + 2 * block + 2 * 4 + (4 * 3 + 3)
    assert sum(p.numel() for p in small.parameters()) == by_hand
    accountant = Accountant(gated, x)
    assert accountant.count().compacted_parameters == by_hand
    assert accountant.exact_macs() == TOKENS * (5 * 4 + 2 * (4 * 10 + TOKENS * 5 + 5 * 4) + 4 * 3)
