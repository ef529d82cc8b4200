"""Messages that are summed at the nodes of a graph, by an index."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.compression.units.test_nonzero import exact


def expanded(index, like):
    return index[:, None].expand(-1, like.shape[1])


WAYS = {
    "index_add": lambda zeros, x, ends, sent: zeros.index_add(0, ends, sent),
    "index_add in place": lambda zeros, x, ends, sent: zeros.index_add_(0, ends, sent),
    "index_copy": lambda zeros, x, ends, sent: x.index_copy(0, ends[:3], sent[:3]),
    "scatter_add": lambda zeros, x, ends, sent: zeros.scatter_add(0, expanded(ends, sent), sent),
    "expand_as": lambda zeros, x, ends, sent: zeros.scatter_add(0, ends[:, None].expand_as(sent), sent),
    "to another": lambda zeros, x, ends, sent: x.scatter_add(0, ends[:, None].repeat(1, 8), sent),
    "largest": lambda zeros, x, ends, sent: zeros.scatter_reduce(0, expanded(ends, sent), sent, "amax"),
    "two axes": lambda zeros, x, ends, sent: (
        x.new_zeros(len(x), 4, 2)
        .scatter_add(0, ends[:, None, None].expand(-1, 4, 2), sent.view(-1, 4, 2))
        .flatten(1)
    ),
}


class Graph(nn.Module):
    """One round of messages along edges."""

    def __init__(self, way):
        super().__init__()
        self.way, self.inside, self.message = way, nn.Linear(5, 8), nn.Linear(8, 8)
        self.out = nn.Linear(8, 3)

    def forward(self, x, starts, ends):
        x = F.relu(self.inside(x))
        sent = F.relu(self.message(x))[starts]
        return self.out(WAYS[self.way](torch.zeros(len(x), 8, dtype=x.dtype), x, ends, sent))


@pytest.mark.parametrize("way", WAYS)
def test_units_of_messages_go(way):
    starts, ends = torch.randint(7, (2, 12))
    ends[:3] = torch.tensor([4, 1, 2])
    alone = way not in ("index_copy", "to another")  # else they are added to those of the nodes
    gates = exact(Graph(way), (torch.randn(7, 5).double(), starts, ends))
    assert gates == {"two axes": [2, 4, 8]}.get(way, [8, 8] if alone else [8])
