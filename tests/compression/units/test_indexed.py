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


class Images(nn.Module):
    """Vectors of images take the places that a mask names among those of tokens."""

    def __init__(self, narrow):
        super().__init__()
        self.narrow, self.tokens, self.images = narrow, nn.Embedding(7, 12), nn.Linear(5, 12)
        self.out = nn.Linear(12, 3)

    def forward(self, ids, images):
        tokens, mask = self.tokens(ids), (ids == 3)[..., None]
        mask = mask if self.narrow else mask.expand_as(tokens)
        return self.out(tokens.masked_scatter(mask, self.images(images)).tanh())


@pytest.mark.parametrize("narrow", [True, False])
def test_the_width_of_what_a_mask_fills_in_goes(narrow):
    ids = torch.tensor([[3, 1, 3, 2], [0, 3, 5, 3]])
    assert exact(Images(narrow), (ids, torch.randn(4, 5).double())) == [12]


WHERE = {
    "for each": lambda x: torch.take_along_dim(x, torch.zeros_like(x).long() + 1, 0),
    "for all": lambda x: torch.take_along_dim(x, torch.tensor([[2], [0], [1]]), 0),
    "spread": lambda x: torch.take_along_dim(x, torch.tensor([[2], [0], [1]]).expand(3, 12), 0),
}


@pytest.mark.parametrize("way", WHERE)
def test_units_go_past_an_index_along_another_axis(way):
    class Along(nn.Module):
        def __init__(self):
            super().__init__()
            self.inside, self.out = nn.Linear(5, 12), nn.Linear(12, 3)

        def forward(self, x):
            return self.out(WHERE[way](self.inside(x).relu()))

    assert exact(Along(), torch.randn(3, 5).double()) == [12]
