"""Two networks are compared in float64, whatever a network keeps of its passes."""

import torch
from torch import nn

import sparsereg
from sparsereg.compression import compact
from sparsereg.compression.verify import in_float64


class Remembers(nn.Module):
    """Keeps its table of positions in eval mode until a mode is set, as EfficientViT of timm."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 3)
        self.positions = nn.Parameter(torch.randn(5, 5))
        self.kept, self.newest = {}, None

    def train(self, mode=True):
        self.kept.clear()
        return super().train(mode)

    def table(self):
        if self.training:
            return self.positions[:, torch.arange(5)]
        if "table" not in self.kept:
            self.kept["table"] = self.positions[:, torch.arange(5)]
        return self.kept["table"]

    def forward(self, x):
        self.newest = self.table() @ self.first(x).relu()
        return self.last(self.newest)


def test_what_a_network_keeps_of_a_pass_is_of_the_precision_of_the_next():
    net, x = Remembers().eval(), torch.randn(2, 5, 8)
    with torch.no_grad():
        net(x)
        kept, table = net.kept, net.kept["table"]
        exact = in_float64(net, (x,), {})
        assert exact.dtype == torch.float64
        assert net.kept is kept
        assert kept["table"] is table
        kept.clear()
        assert torch.equal(in_float64(net, (x,), {}), exact)
        assert not kept
        assert net(x).dtype == torch.float32
    gated = sparsereg.gate(net, x)
    compact(gated, x)
    assert gated(x).dtype == torch.float32
