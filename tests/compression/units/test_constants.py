"""Rotary positions whose frequencies the network computes itself, and other vectors of plain numbers."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sparsereg
from tests.compression.units.test_nonzero import exact

HEAD = 8


def frequencies(x):
    return 1.0 / (100 ** (torch.arange(0, HEAD, 2).to(x) / HEAD))


POSITIONS = {
    "outer": lambda places, x: torch.outer(places, frequencies(x)),
    "ger": lambda places, x: torch.ger(places, frequencies(x)),
    "einsum": lambda places, x: torch.einsum("i,j->ij", places, frequencies(x)),
    "column": lambda places, x: places[:, None] * torch.exp(-torch.arange(HEAD // 2).to(x)),
    "product": lambda places, x: places[:, None] @ frequencies(x)[None],
}


class Attention(nn.Module):
    """Four query heads of two groups, which are turned by their positions."""

    def __init__(self, kind, width=20):
        super().__init__()
        self.kind = kind
        self.q, self.o = nn.Linear(width, 4 * HEAD), nn.Linear(4 * HEAD, width)
        self.k, self.v = nn.Linear(width, 2 * HEAD), nn.Linear(width, 2 * HEAD)

    def turned(self, x):
        angles = POSITIONS[self.kind](torch.arange(x.shape[-2]).to(x), x)
        cos, sin = (f(torch.cat([angles, angles], -1)) for f in (torch.cos, torch.sin))
        one, two = x.chunk(2, -1)
        return x * cos + torch.cat([-two, one], -1) * sin

    def forward(self, x):
        q, k, v = (f(x).unflatten(-1, (-1, HEAD)).transpose(1, 2) for f in (self.q, self.k, self.v))
        q, k = self.turned(q), self.turned(k)
        k, v = (y.repeat_interleave(2, 1) for y in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.o(y.transpose(1, 2).flatten(2))


class OfTokens(nn.Module):
    """A text of any length."""

    def __init__(self, kind):
        super().__init__()
        self.embed, self.attention, self.head = nn.Embedding(17, 20), Attention(kind), nn.Linear(20, 17)

    def forward(self, tokens):
        return self.head(self.attention(self.embed(tokens)))


class OfImages(nn.Module):
    """An image of one size, whose places are as well known as the frequencies."""

    def __init__(self, kind):
        super().__init__()
        self.embed, self.attention, self.head = nn.Conv2d(3, 20, 4, 4), Attention(kind), nn.Linear(20, 5)

    def forward(self, image):
        return self.head(self.attention(self.embed(image).flatten(2).transpose(1, 2)).mean(1))


GATES = [2, 4, 4, 8, 20]
"""Groups, query heads, pairs of places in vectors of queries and keys, places in those of values, width."""


@pytest.mark.parametrize("kind", POSITIONS)
def test_heads_that_are_turned_by_computed_frequencies_go(kind):
    tokens = torch.randint(17, (2, 12), generator=torch.Generator().manual_seed(0))
    assert sorted(n for n in exact(OfTokens(kind), tokens) if n > 1) == GATES


@pytest.mark.parametrize("kind", ["outer", "column"])
def test_heads_of_images_are_turned_likewise(kind):
    image = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)).double()
    assert sorted(n for n in exact(OfImages(kind), image) if n > 1) == GATES


@torch.no_grad()
def test_a_smaller_network_takes_other_lengths_and_types():
    tokens = torch.randint(17, (2, 12), generator=torch.Generator().manual_seed(0))
    gated = sparsereg.gate(OfTokens("outer").eval(), tokens)
    for gate in sparsereg.penalties.hard_concretes(gated).values():
        gate.log_alpha.data[::2] = -10.0
    smaller = sparsereg.compact(gated, tokens)
    longer = torch.cat([tokens, tokens], 1)[:1]
    assert torch.allclose(gated(longer), smaller(longer), atol=1e-5)
    assert smaller.to(torch.bfloat16)(longer).dtype == torch.bfloat16


class Steps(nn.Module):
    """A diffusion step as sines, beside heads that are turned: its vector is read by a layer as it is."""

    def __init__(self):
        super().__init__()
        self.step, self.attention, self.head = nn.Linear(6, 20), Attention("outer"), nn.Linear(20, 3)

    def forward(self, x, step):
        angles = step[:, None] * torch.exp(-torch.arange(3).to(x))
        told = self.step(torch.cat([angles.sin(), angles.cos()], 1))
        return self.head(self.attention(x + told[:, None]))


def test_places_of_a_vector_that_a_layer_reads_go_with_its_columns():
    example = (torch.randn(2, 7, 20).double(), torch.rand(2).double())
    assert sorted(n for n in exact(Steps(), example) if n > 1) == [2, 3, 4, 4, 8]
