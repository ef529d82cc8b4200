"""Whether a network does the same with maps of another size is seen in two runs where they tell it."""

import numpy as np
import pytest
import torch
from torch import nn

from sparsereg.compression import compact, gate
from sparsereg.compression.units import recorded, smaller
from sparsereg.compression.units.recorded import same_calls


class Net(nn.Module):
    def __init__(self, behind):
        super().__init__()
        self.conv, self.behind = nn.Conv2d(1, 4, 3, padding=1), behind

    def forward(self, x):
        return self.behind(self.conv(x))


def mean(x):
    return x.mean((2, 3))


@pytest.mark.parametrize(
    ("behind", "same"),
    [
        (mean, True),
        (lambda x: mean(torch.nn.functional.max_pool2d(x.relu(), 2)), True),
        (lambda x: mean(x) * torch.tensor(3.0), True),
        (lambda x: mean(x) * torch.tensor(float(x.shape[2])), False),  # a number inside of a tensor
        (lambda x: mean(x) * torch.from_numpy(np.full(1, x.shape[2], "f")), False),
        (lambda x: mean(x) * x.shape[2], False),
        (lambda x: mean(x + torch.arange(x.shape[3])), False),
        (lambda x: x.flatten(1), False),
        (lambda x: mean(x) if x.shape[2] < 7 else mean(x).relu(), False),
        (lambda x: mean(x) if float(x.sum()) else mean(x).relu(), False),
        (lambda x: x.view(len(x), 4 * 6 * 6), False),  # fails on the other size
    ],
)
@pytest.mark.parametrize("computed", [True, False])
def test_what_differs_between_sizes_is_seen(monkeypatch, behind, same, computed):
    monkeypatch.setattr(recorded, "SMALL", 2**20 if computed else 0)
    sizes = [((torch.ones(2, 1, n, n),), {}) for n in (6, 9)]
    assert same_calls(Net(behind), *sizes) is same


class Enlarged(nn.Module):
    """Reads the size of its maps, which traces follow."""

    def forward(self, x):
        return nn.functional.interpolate(x, size=(x.shape[2] * 2, x.shape[3] * 2))


@pytest.mark.parametrize("kept", [nn.ReLU(), Enlarged()])
def test_sizes_of_maps_are_as_free_as_a_trace_says(monkeypatch, kept):
    first, last = nn.Conv2d(1, 8, 3, padding=1), nn.Linear(4, 2)
    net = nn.Sequential(first, kept, nn.Conv2d(8, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), last)
    x = torch.randn(1, 1, 8, 8)
    small = [compact(gate(net, x, droprate_init=0.01).eval(), x)]
    monkeypatch.setattr(smaller, "same_calls", lambda *args: False)
    small.append(compact(gate(net, x, droprate_init=0.01).eval(), x))
    others = torch.randn(2, 1, 11, 11)
    torch.testing.assert_close(small[0](others), small[1](others), rtol=0, atol=0.01)  # gates are drawn


def test_a_network_of_plain_layers_is_not_traced_for_other_sizes(monkeypatch):
    net = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    x = torch.randn(1, 1, 8, 8)
    gated = gate(net, x).eval()
    monkeypatch.setattr(smaller, "same_operations", None)
    small = compact(gated, x)
    others = torch.randn(2, 1, 20, 17)
    torch.testing.assert_close(small(others), gated(others))
