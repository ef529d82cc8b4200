"""Walks: max pools see the quick layout and give the same numbers."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from sparsereg.compression import compact
from sparsereg.compression.walk import Route, Running


class Pools(nn.Module):
    """Max pools as modules and as functions, of a map that is read again."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3)
        self.pool = nn.MaxPool2d(3, 2, 1, ceil_mode=True)
        self.last = nn.Conv2d(12, 4, 1)

    def forward(self, x):
        x = self.pool(self.first(x))
        return self.last(torch.cat([nn.functional.max_pool2d(x, 3, 1, 1), x], 1)).relu()


class Layouts(TorchDispatchMode):
    """Whether the channels of what max pools read lie last."""

    def __init__(self):
        super().__init__()
        self.last = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "max_pool2d" in str(func):
            self.last.append(args[0].is_contiguous(memory_format=torch.channels_last))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def network():
    torch.manual_seed(0)
    x = torch.randn(4, 3, 11, 11)
    x[0, 0, 5, 5] = torch.nan
    return compact(Pools().eval(), torch.ones(1, 3, 11, 11)), x


def test_max_pools_read_channels_last_and_give_the_same_numbers(network):
    net, x = network
    with Layouts() as plain, torch.no_grad():
        wanted = net(x)
    with Layouts() as quick:
        given = Route(net).start(x).answer()
    assert plain.last == [False, False]
    assert quick.last == [True, True]
    assert wanted.isnan().any()
    torch.testing.assert_close(given, wanted, rtol=0, atol=0, equal_nan=True)
    assert given.stride() == wanted.stride()


def test_derivatives_go_through_them(network):
    net, x = network
    x = x.nan_to_num()
    own, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    net(own).square().sum().backward()
    Running(net).run(other).square().sum().backward()
    assert torch.equal(own.grad, other.grad)


def test_a_map_whose_channels_lie_last_stays(network):
    net, x = network
    net.to(memory_format=torch.channels_last)
    with torch.no_grad():
        wanted = net(x.to(memory_format=torch.channels_last))
    given = Route(net).start(x.to(memory_format=torch.channels_last)).answer()
    torch.testing.assert_close(given, wanted, rtol=0, atol=0, equal_nan=True)
    assert given.stride() == wanted.stride()
