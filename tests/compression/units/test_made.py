"""Weights that are computed from others: what they come to is cut, and written in their place."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import orthogonal, spectral_norm

import sparsereg
from tests.compression.units.test_nonzero import exact, x


class Standardised(nn.Conv2d):
    """Each of its kernels has mean 0 and variance 1, times a gain if there is one."""

    def __init__(self, *sizes, gain, groups=1):
        super().__init__(*sizes, groups=groups)
        self.gain = nn.Parameter(torch.ones(self.out_channels, 1, 1, 1)) if gain else None

    def forward(self, x):
        var, mean = torch.var_mean(self.weight, (1, 2, 3), keepdim=True)
        weight = (self.weight - mean) * (var + 1e-5).rsqrt()
        weight = weight if self.gain is None else self.gain * weight
        return F.conv2d(x, weight, self.bias, groups=self.groups)


class Updated(nn.Module):
    """A matrix with an update of low rank; or a mask on it, from the other side."""

    def __init__(self, ins, outs, masked=False):
        super().__init__()
        self.matrix, self.masked = nn.Parameter(torch.randn(outs, ins) / 3), masked
        self.a, self.b = nn.Parameter(torch.randn(2, ins) / 3), nn.Parameter(torch.randn(outs, 2) / 3)
        self.register_buffer("mask", (torch.rand(ins, outs) < 0.6).double())

    def forward(self, x):
        return x @ (self.matrix.T * self.mask) if self.masked else F.linear(x, self.matrix + self.b @ self.a)


class Mirrored(nn.Module):
    """A parametrisation of symmetric matrices."""

    def forward(self, weight):
        return weight.triu() + weight.triu(1).mT


class Softplus(nn.Module):
    """A parametrisation of positive weights, of which zeros would come to something."""

    def forward(self, weight):
        return F.softplus(weight)


class Again(nn.Module):
    """One layer with a spectral norm, three times."""

    def __init__(self):
        super().__init__()
        self.enter, self.step, self.leave = (
            nn.Linear(6, 12),
            spectral_norm(nn.Linear(12, 12)),
            nn.Linear(12, 2),
        )

    def forward(self, x):
        x = self.enter(x)
        for _ in range(3):
            x = x + self.step(x).relu()
        return self.leave(x)


def parametrised(layer, kind):
    parametrize.register_parametrization(layer, "weight", kind)
    return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), layer, nn.ReLU(), nn.Linear(12, 3))


def spectral(norm=spectral_norm):
    return nn.Sequential(
        *(norm(nn.Conv2d(3, 12, 3)), nn.ReLU(), norm(nn.Conv2d(12, 10, 3)), nn.ReLU()),
        *(nn.Flatten(), norm(nn.Linear(160, 6)), nn.Tanh(), nn.Linear(6, 2)),
    )


def hooked():
    """The older norm, which computes the weight in a hook before each pass."""
    return spectral(nn.utils.spectral_norm)


def standardised():
    return nn.Sequential(
        *(Standardised(3, 12, 3, gain=True), nn.ReLU(), Standardised(12, 10, 3, gain=False), nn.ReLU()),
        *(Standardised(10, 10, 3, groups=10, gain=True), nn.ReLU(), nn.Flatten(), nn.Linear(40, 3)),
    )


def rotated():
    hidden = orthogonal(nn.Linear(16, 12))
    return nn.Sequential(nn.Linear(6, 16), nn.GELU(), hidden, nn.ReLU(), nn.Linear(12, 2))


def updated():
    return nn.Sequential(
        *(Updated(6, 16), nn.GELU(), Updated(16, 12), nn.ReLU(), Updated(12, 8, True), nn.ReLU()),
        nn.Linear(8, 2),
    )


@pytest.mark.parametrize(
    ("make", "example", "sizes"),
    [
        (spectral, (4, 3, 8, 8), [6, 10, 12]),
        (hooked, (4, 3, 8, 8), [6, 10, 12]),
        (standardised, (4, 3, 8, 8), [10, 12]),
        (updated, (4, 6), [8, 12, 16]),
        (lambda: parametrised(nn.Linear(12, 12), Mirrored()), (4, 6), [12, 12]),
        (lambda: parametrised(nn.Linear(12, 12), Softplus()), (4, 6), [12, 12]),
        (rotated, (4, 6), [12, 16]),
        (Again, (4, 6), [1, 12]),
    ],
)  # fmt: skip
def test_rows_and_columns_of_computed_weights_go(make, example, sizes):
    torch.manual_seed(0)
    assert exact(make(), x(*example)) == sizes


@pytest.mark.parametrize("make", [spectral, hooked])
def test_a_layer_under_a_norm_is_written_as_a_plain_one_and_keeps_its_name(make):
    torch.manual_seed(0)
    example = x(4, 3, 8, 8).float()
    smaller = sparsereg.compact(sparsereg.gate(make().eval(), example), example)
    assert type(smaller.get_submodule("0")) is nn.Conv2d
    assert not [name for name, _ in smaller.named_parameters() if "orig" in name]


@pytest.mark.parametrize("make", [spectral, hooked])
def test_gates_behind_a_norm_train_can_be_copied_and_are_found_again(make):
    torch.manual_seed(0)
    example = x(4, 3, 8, 8).float()
    network = sparsereg.gate(make(), example).train()
    network(example).sum().backward()
    assert all(p.grad is not None for p in network.parameters())
    gates = [m for m in network.modules() if isinstance(m, sparsereg.HardConcrete)]
    gates[1].log_alpha.data[::2] = -10.0
    with torch.no_grad():
        network.eval()(example)  # of the older norm PyTorch copies no weight that has a graph
    twin = copy.deepcopy(network)
    other = sparsereg.gate(make(), example)
    other.load_state_dict(network.state_dict())
    assert (
        sparsereg.count(twin, example).compacted_parameters
        == sparsereg.count(other, example).compacted_parameters
    )
    assert torch.allclose(sparsereg.compact(other, example)(example), twin(example), atol=1e-5)


def test_weights_that_nothing_shuts_stay_and_their_columns_go():
    """Of softplus(w) no unit is zero; what reads it reads units that are."""

    class Positive(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(12, 12))

        def forward(self, x):
            return F.linear(x, F.softplus(self.w))

    net = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), Positive(), nn.ReLU(), nn.Linear(12, 3))
    assert exact(net, x(4, 6)) == [12]
    explained = sparsereg.explain(net, x(4, 6)).to_frame()
    assert explained[explained.state == "kept"].reason.str.contains("the weight is computed").any()
