"""Operations that move what a layer makes to other places: what is left of it is moved to where it was."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sparsereg
from sparsereg.penalties import hard_concretes
from tests.compression.units.test_nonzero import exact, gated, x

MASK = torch.tensor([1, 0, 1, 1, 0, 0, 1, 0, 1, 1, 0, 1]).bool()
TABLE = torch.tensor([[5, 1, 0], [2, 11, 1]])


class Moved(nn.Module):
    """Twelve units, moved, in front of a layer."""

    def __init__(self, move, size):
        super().__init__()
        self.a, self.move, self.b = nn.Linear(5, 12), move, nn.Linear(size, 3)
        self.register_buffer("mask", MASK.clone())
        self.register_buffer("table", TABLE.clone())

    def forward(self, x):
        return self.b(self.move(F.relu(self.a(x)), self))


def taken_apart(h, _):
    parts = h.unbind(-1)
    return torch.stack([parts[7], parts[2], parts[3], parts[9]], -1)


def rows_in_a_list(h, _):
    return torch.stack([row * 2 for row in h.view(-1, 3, 4).transpose(0, 1)][1:], 0).sum(0)


MOVES = {
    "rolled": (lambda h, _: h.roll(-5, -1), 12),
    "rolled twice": (lambda h, _: h.view(-1, 3, 4).roll((1, 2), (1, 2)).flatten(1), 12),
    "one by one": (taken_apart, 4),
    "rows in a list": (rows_in_a_list, 4),
    "narrowed": (lambda h, _: h.narrow(-1, 3, 6), 6),
    "masked": (lambda h, net: h[:, net.mask], 7),
    "table of places": (lambda h, net: h[:, net.table].flatten(1), 6),
    "stacked": (lambda h, _: torch.stack([h[:, :6], h[:, 6:]], -1).flatten(1), 12),
    "outer": (lambda h, _: torch.einsum("bi,bj->bij", h[:, :3], h[:, 3:7]).flatten(1), 12),
}


@pytest.mark.parametrize("name", MOVES)
def test_what_is_moved_is_exact(name):
    move, size = MOVES[name]
    assert exact(Moved(move, size), x(4, 5))


WHOLE = {
    "tril": (lambda h, _: h.view(-1, 3, 4).tril().flatten(1), 12),
    "diagonal": (lambda h, _: h.view(-1, 3, 4).diagonal(0, 1, 2), 3),
    "take_along_dim": (lambda h, net: h.take_along_dim(net.table[:1].expand(len(h), -1), -1), 3),
    "unfold": (lambda h, _: h.unfold(-1, 4, 2).amax(-1), 5),
    "pad": (lambda h, _: F.pad(h, (-2, -4)), 6),
    "index": (lambda h, net: h.view(-1, 3, 4)[:, net.mask.view(3, 4)], 7),
    "upsample_nearest1d": (lambda h, _: F.interpolate(h[:, None], scale_factor=2)[:, 0], 24),
}


@pytest.mark.parametrize("name", WHOLE)
def test_places_that_are_not_treated_alike_stay_and_are_named(name):
    move, size = WHOLE[name]
    reasons = sparsereg.explain(Moved(move, size).double().eval(), x(4, 5)).to_frame()
    own = reasons[reasons.parameter == "a.weight"]
    assert list(own.state) == ["kept"]
    assert own.reason.iloc[0].startswith(name)


@pytest.mark.parametrize("shuffle", [F.pixel_shuffle, F.channel_shuffle, F.pixel_unshuffle])
def test_shuffled_maps_that_are_read_place_by_place(shuffle):
    factor = 4 if shuffle is F.channel_shuffle else 2

    class Shuffled(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 16, 3, padding=1), nn.Linear(256, 3)

        def forward(self, maps):
            return self.b(shuffle(F.relu(self.a(maps)), factor).flatten(1))

    assert exact(Shuffled(), x(2, 3, 4, 4))


GROUPED = {
    "groups of the input": nn.Sequential(nn.Conv2d(4, 12, 3, groups=2), nn.ReLU(), nn.Conv2d(12, 3, 1)),
    "each channel of the input": nn.Sequential(nn.Conv2d(4, 16, 3, groups=4), nn.ReLU(), nn.Conv2d(16, 3, 1)),
    "turned around": nn.Sequential(
        nn.Conv2d(4, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 8, 2, 2, groups=8), nn.ReLU(), nn.Conv2d(8, 3, 1)
    ),
}


@pytest.mark.parametrize("name", GROUPED)
def test_groups_of_channels_that_cannot_go_stay(name):
    assert exact(GROUPED[name], x(2, 4, 7, 7))


def test_a_layer_norm_over_whole_maps_is_over_the_channels_that_stay():
    network = nn.Sequential(nn.Conv2d(3, 12, 1), nn.LayerNorm([12, 4, 4]), nn.ReLU(), nn.Conv2d(12, 3, 1))
    assert exact(network, x(2, 3, 4, 4)) == [12]


def test_a_layer_norm_over_tokens_and_width_keeps_the_width():
    network = nn.Sequential(nn.Linear(3, 12), nn.LayerNorm([7, 12]), nn.ReLU(), nn.Linear(12, 3))
    with pytest.raises(ValueError, match="layer_norm is taken over it in a way of its own"):
        sparsereg.gate(network.double(), x(2, 7, 3))


def test_deformable_convolutions_lose_channels_and_keep_where_they_read():
    ops = pytest.importorskip("torchvision.ops")

    class Deformable(nn.Module):
        def __init__(self, groups, masked, bias):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 12, 3, padding=1), ops.DeformConv2d(12, 16, 3, padding=1, bias=bias)
            self.places, self.c = nn.Conv2d(12, 18 * groups, 3, padding=1), nn.Linear(16, 3)
            self.mask = nn.Conv2d(12, 9 * groups, 3, padding=1) if masked else None

        def forward(self, maps):
            h = F.relu(self.a(maps))
            mask = None if self.mask is None else self.mask(h).sigmoid()
            return self.c(F.relu(self.b(h, 0.3 * self.places(h), mask)).mean((2, 3)))

    for groups, masked, bias, sizes in (
        (1, True, True, [12, 16]),
        (1, False, False, [12, 16]),
        (2, True, True, [16]),
    ):
        network = Deformable(groups, masked, bias)
        assert compared(network, x(2, 3, 6, 6)) == sizes
    network = Deformable(1, False, True).double().eval()
    counted = sparsereg.count(network, x(2, 3, 6, 6))
    assert counted.macs == 36 * 9 * (3 * 12 + 12 * 18 + 12 * 16) + 16 * 3
    reasons = set(sparsereg.explain(Deformable(2, True, True).double(), x(2, 3, 6, 6)).to_frame().reason)
    assert any(r.startswith("deform_conv2d reads its offset") for r in reasons)
    assert any(r.startswith("deform_conv2d has groups") for r in reasons)


def compared(network, example):
    """As ``exact``, for what cannot be saved."""
    torch.manual_seed(0)
    found = gated(network, example)
    smaller = sparsereg.compact(found, example)
    with torch.no_grad():
        one, two = found(example), smaller(example)
    assert (one - two).abs().max() < 1e-12 * one.abs().max()
    counted = sparsereg.count(found, example)
    assert counted.compacted_macs == sparsereg.count(smaller, example).macs < counted.macs
    return sorted(gate.log_alpha.numel() for gate in hard_concretes(found).values())
