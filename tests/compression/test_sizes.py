"""Compacted networks take every size that their network takes, and refuse the others in one line."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from sparsereg.compression import compact, count, export, gate, load_compacted, save_compacted
from sparsereg.compression.verify import difference
from sparsereg.distributions import HardConcrete
from sparsereg.model.basic_l0_blocks import L0Gate
from tests.compression.networks import make, set_gates


class Base(nn.Module):
    """Two convolutions with gates; what comes between them is each network's own."""

    def __init__(self, width=8):
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, padding=1)
        self.gate = L0Gate(width)
        self.last = nn.Conv2d(width, 4, 3, padding=1)

    def middle(self, x):
        return x

    def forward(self, x):
        return self.last(self.middle(self.gate(F.relu(self.conv(x)))))


class Views(Base):
    """Positions side by side and back, by sizes that are taken from the tensor."""

    def middle(self, x):
        b, c, h, w = x.shape
        y = x.view(b, c, h * w).softmax(-1) * 3
        return y.reshape((x.size(0), c, x.shape[2:][0], -1))


class SizeOfAnother(Base):
    """A map of half the size comes back to the size of the first one."""

    def middle(self, x):
        y = F.max_pool2d(x, 2)
        return x + F.interpolate(y, size=x.shape[-2:], mode="bilinear", align_corners=False)


class Whole(Base):
    def middle(self, x):
        return x.reshape(x.size()) + x.view(x.shape).expand(x.size(0), -1, x.shape[2], x.size(dim=-1))


class Half(Base):
    """Slices by a computed size."""

    def middle(self, x):
        return x[:, :, : x.shape[2] // 2] * (1 + x.shape[3] % 2)


class Squeezes(Base):
    """A squeeze without a dimension must not take a channel that is left alone."""

    def middle(self, x):
        y = torch.sigmoid(x.mean((2, 3), keepdim=True).squeeze().unsqueeze(-1).unsqueeze(-1))
        return x * y


class Constants(Base):
    """What a dead convolution leaves is a constant, and the next one pads it with zeros."""

    def __init__(self):
        super().__init__()
        self.dead = nn.Conv2d(8, 8, 1)
        self.dead_gate = L0Gate(8)
        self.then = nn.Conv2d(8, 8, 1)

    def middle(self, x):
        return torch.sigmoid(self.then(self.dead_gate(self.dead(x))))


class DeadSkip(nn.Module):
    """The size comes from a tensor that goes."""

    def __init__(self, pool):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1, stride=2)
        self.gate = L0Gate(8)
        self.skip = nn.Conv2d(8, 8, 3, padding=1)
        self.dead_gate = L0Gate(8)
        self.pool = pool
        self.last = nn.Conv2d(8, 4, 1)

    def forward(self, x):
        x = self.gate(F.relu(self.first(x)))
        skip = self.pool(F.relu(self.dead_gate(self.skip(x))))
        x = F.interpolate(F.avg_pool2d(x, 2), size=skip.shape[2:])
        return self.last(x + skip)


class Sums(Base):
    """A constant, summed over all positions, depends on their number."""

    def middle(self, x):
        return x * 0.1 + torch.sigmoid(x).sum((2, 3), keepdim=True) * 1e-2


class Borders(Base):
    """The mean over a border of zeros, which a map of one position does not tell from a constant."""

    def middle(self, x):
        return F.avg_pool2d(torch.sigmoid(x), 3, stride=1, padding=1)


class Tokens(nn.Module):
    """Words: the sequence's length is dimension 1."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.places = nn.Embedding(64, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 6)
        self.gate = L0Gate(6)
        self.last = nn.Linear(6, 3)

    def forward(self, x):
        y = self.embed(x) + self.places(torch.arange(x.shape[1]))
        z = self.norm(y + self.attention(y, y, y, need_weights=False)[0])
        return self.last(self.gate(F.relu(self.head(z.mean(1)))))


IMAGES = {
    "views": Views,
    "size of another": SizeOfAnother,
    "whole shapes": Whole,
    "half": Half,
    "squeezes": Squeezes,
    "constants": Constants,
    "sums": Sums,
    "borders": Borders,
    "dead skip": lambda: DeadSkip(nn.Identity()),
    "dead skip, pool": lambda: DeadSkip(nn.MaxPool2d(3, 1, 1)),
}


def shut(network, names):
    for name, module in network.named_modules():
        if isinstance(module, HardConcrete) and any(n in name for n in names):
            module.log_alpha.data.fill_(-9)


def agree(network, smaller, x):
    with torch.no_grad():
        wanted = network(x)
        assert difference(wanted, smaller(x)) < 1e-5


@pytest.mark.costly
@pytest.mark.parametrize("pattern", ["mixed", "all shut", "one open"])
@pytest.mark.parametrize("name", IMAGES)
def test_other_sizes_give_the_same_answers(name, pattern, tmp_path):
    torch.manual_seed(0)
    network = IMAGES[name]().eval()
    set_gates(network, pattern)
    shut(network, ["dead_gate"])
    for size in ((8, 8), (1, 1)) if name in ("views", "borders", "constants") else ((8, 8),):
        smaller = compact(network, torch.randn(2, 3, *size))
        for other in (smaller, load_compacted(save_compacted(smaller, tmp_path / "c.pt"))):
            for shape in ((2, 3, *size), (1, 3, 16, 16), (5, 3, 9, 14)):
                agree(network, other, torch.randn(shape))


def test_sequences_of_other_lengths(tmp_path):
    torch.manual_seed(0)
    network = Tokens().eval()
    set_gates(network, "half")
    smaller = compact(network, torch.randint(11, (2, 5)))
    assert smaller.head.out_features < 6
    for shape in ((2, 5), (3, 9), (1, 2)):
        agree(network, smaller, torch.randint(11, shape))


def test_an_image_of_another_size_keeps_the_answers_of_googlenet():
    network, x = make("googlenet")
    set_gates(network, "few open")
    smaller = compact(network, x)
    agree(network, smaller, torch.randn(2, 3, 32, 32))


@pytest.mark.costly
@pytest.mark.parametrize("name", ["lenet5", "lenet300", "mlp", "functional"])
def test_sizes_that_the_network_depends_on_are_checked(name, tmp_path):
    """Units that are picked by number would be others in a larger image."""
    network, x = make(name)
    set_gates(network, "half")
    smaller = compact(network, x)
    again = compact(copy.deepcopy(smaller), x)
    loaded = load_compacted(save_compacted(smaller, tmp_path / "c.pt"))
    for small in (smaller, loaded, pickle.loads(pickle.dumps(smaller)), again):
        agree(network, small, torch.randn(5, *x.shape[1:]))
        wrong = torch.randn(2, 3, 16, 16)
        if name == "functional":  # its pooling makes every size one
            agree(network, small, wrong)
            continue
        with pytest.raises(RuntimeError, match="shape|size"):
            network(wrong)
        with pytest.raises(ValueError, match=r"for inputs of shape \[-1, 3, 8, 8\].*got \[2, 3, 16, 16\]"):
            small(wrong)


def test_sizes_that_are_checked_do_not_hinder_exports(tmp_path):
    network, x = make("lenet300")
    set_gates(network, "half")
    smaller = compact(network, x)
    assert "of_size" in smaller.code
    path = export(network, x, tmp_path / "n.pt2")
    found = torch.export.load(path).module()
    assert difference(network(x), found(x)) < 1e-5
    compiled = torch.compile(smaller, backend="eager")
    assert difference(network(x), compiled(x)) < 1e-5


@pytest.mark.costly
@pytest.mark.filterwarnings("ignore")  # TorchScript is deprecated
@pytest.mark.parametrize("name", ["size of another", "dead skip", "constants"])
def test_sizes_stay_dynamic_in_torchscript_and_the_compiler(name):
    torch.manual_seed(0)
    network = IMAGES[name]().eval()
    set_gates(network, "mixed")
    shut(network, ["dead_gate"])
    smaller = compact(network, torch.randn(2, 3, 8, 8))
    x = torch.randn(1, 3, 16, 14)
    assert difference(network(x), torch.jit.script(smaller)(x)) < 1e-5
    assert difference(network(x), torch.compile(smaller, backend="eager", dynamic=True)(x)) < 1e-5


def test_number_of_channels_is_checked_where_unread_ones_are_left_out():
    network = nn.Sequential(L0Gate(3), nn.Conv2d(3, 4, 3)).eval()
    network[0].gates.log_alpha.data.copy_(torch.tensor([9.0, -9.0, 9.0]))
    smaller = compact(network, torch.randn(2, 3, 8, 8))
    agree(network, smaller, torch.randn(1, 3, 9, 9))
    with pytest.raises(ValueError, match=r"\[-1, 3, -3, -3\]"):
        smaller(torch.randn(1, 4, 8, 8))


SEGMENTATION = {
    "lraspp_mobilenet_v3_large": {},
    "deeplabv3_mobilenet_v3_large": {"aux_loss": True},
    "fcn_resnet50": {"aux_loss": True},
}


@pytest.mark.costly
@pytest.mark.parametrize("name", SEGMENTATION)
def test_segmentation_networks_are_gated_compacted_and_counted(name, tmp_path):
    """Their last step brings the map to the image's size, and their answer is a dictionary."""
    torch.manual_seed(0)
    builder = getattr(torchvision.models.segmentation, name)
    network = builder(weights=None, weights_backbone=None, num_classes=4, **SEGMENTATION[name]).eval()
    for m in network.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.bias.data.normal_(0, 0.3)
    x = torch.randn(1, 3, 32, 32)
    network = gate(network, x)
    set_gates(network, "mixed")
    smaller = compact(network, x, check=name.startswith("lraspp"))
    counted = count(network, x)
    assert sum(p.numel() for p in smaller.parameters()) == counted.compacted_parameters
    assert counted.compacted_parameters < 0.5 * counted.parameters
    with FlopCounterMode(display=False) as flops:
        smaller(x)
    assert flops.get_total_flops() == 2 * counted.compacted_macs
    loaded = load_compacted(save_compacted(smaller, tmp_path / "c.pt"))
    with torch.no_grad():
        for size in ((32, 32), (48, 40)):
            image = torch.randn(2, 3, *size)
            wanted, found, read = network(image), smaller(image), loaded(image)
            assert found.keys() == wanted.keys()
            for key, value in wanted.items():
                assert value.std() > 0
                assert difference(value, found[key]) < 1e-4
                assert torch.equal(found[key], read[key])


class Reads(nn.Module):
    """Sequences of numbers of words; what becomes of them depends on how many there are."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.words, self.hidden, self.head = nn.Embedding(20, 6), nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        if self.kind == "long ones are thinned" and x.shape[1] > 32:
            x = x[:, ::2]
        if self.kind == "odd ones lose their last" and x.shape[1] % 2 != 0:
            x = x[:, :-1]
        h = self.words(x)
        if self.kind.startswith("in fours"):
            if x.shape[1] % 4:
                h = F.pad(h, (0, 0, 0, 4 - x.shape[1] % 4))
            h = h.view(h.shape[0], h.shape[1] // 4, 4, 6).mean(2)
        return self.head(F.relu(self.hidden(h)))


@pytest.mark.costly
@pytest.mark.parametrize(
    ("kind", "length", "fits", "refused"),
    [
        ("long ones are thinned", 24, [2, 31, 32], [33, 40]),
        ("in fours", 24, [4, 40], [23, 41]),
        ("in fours, filled up", 23, [23], [24, 28]),
        ("odd ones lose their last", 23, [5, 23], [24, 4]),
    ],
)
def test_lengths_of_another_path_are_refused(kind, length, fits, refused, tmp_path):
    """A network is followed along the path of its example, which others may leave."""
    torch.manual_seed(0)
    network = Reads(kind).eval()
    gated = gate(network, torch.randint(0, 20, (2, length)), droprate_init=0.05).eval()
    example = torch.randint(0, 20, (2, length))
    smaller = compact(gated, example)
    again = compact(smaller, example)
    loaded = load_compacted(save_compacted(smaller, tmp_path / "c.pt"))
    for small in (smaller, again, loaded):
        for n in fits:
            x = torch.randint(0, 20, (3, n))
            assert difference(gated(x), small(x)) < 1e-5
        for n in refused:
            with pytest.raises(ValueError, match=rf"compacted for inputs of shape .*got \[3, {n}\]"):
                small(torch.randint(0, 20, (3, n)))


class Windows(nn.Module):
    """What comes of a length decides on the path: whether one position is left, or an even number of them."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.head = kind, nn.Linear(8, 3)
        self.first, self.second = nn.Conv1d(2, 8, 3, 3, 1), nn.Conv1d(8, 8, 3, 2)

    def forward(self, x):
        y = F.relu(self.second(F.relu(self.first(x))))
        if self.kind == "squeezed":
            y = y.squeeze()
            return self.head(y if y.dim() == 2 else y.transpose(1, 2))
        other = y.shape[2] == 1 if self.kind == "one left" else y.shape[2] % 2 == 1
        return self.head(y.mean(2)) if other else 2 * self.head(y.amax(2))


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "length", "refused"),
    [("squeezed", 9, [15, 30]), ("one left", 9, [15, 30]), ("even", 19, [25, 40])],
)
def test_lengths_of_which_something_else_comes_are_refused(kind, length, refused):
    network = gate(Windows(kind).eval(), torch.randn(2, 2, length), droprate_init=0.05).eval()
    smaller = compact(network, torch.randn(2, 2, length))
    torch.testing.assert_close(smaller(x := torch.randn(3, 2, length)), network(x))
    for n in refused:
        with pytest.raises(ValueError, match=rf"compacted for inputs of shape .*got \[3, 2, {n}\]"):
            smaller(torch.randn(3, 2, n))


class Waveform(nn.Module):
    """Frames of a waveform, put together by their number, as speech models do."""

    def __init__(self, fixed=False):
        super().__init__()
        self.frames, self.head, self.fixed = nn.Conv1d(1, 12, 4, 4), nn.Linear(12, 3), fixed

    def forward(self, x):
        y = F.relu(self.frames(x.unsqueeze(1))).transpose(1, 2)
        number = int(y.shape[1]) if self.fixed else y.shape[1]
        return self.head(y.reshape(x.shape[0] * number, 12)).view(-1, number, 3) + x[:, :number, None]


@torch.no_grad()
def test_waveforms_may_be_longer_or_are_refused_in_one_line():
    for fixed in (False, True):
        network = gate(Waveform(fixed).eval(), torch.randn(2, 32))
        next(m for m in network.modules() if isinstance(m, HardConcrete)).log_alpha[::2] = -10
        smaller, longer = compact(network, torch.randn(2, 32)), torch.randn(3, 48)
        assert smaller.head.in_features == 6
        if fixed:
            with pytest.raises(ValueError, match=r"of shape \[-1, 32\]"):
                smaller(longer)
        else:
            torch.testing.assert_close(smaller(longer), network(longer))


@torch.no_grad()
def test_layers_of_features_take_them_with_any_number_of_axes_before():
    network = gate(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2)).eval(), torch.randn(4, 6))
    next(m for m in network.modules() if isinstance(m, HardConcrete)).log_alpha[::2] = -10
    smaller, more = compact(network, torch.randn(4, 6)), torch.randn(2, 5, 6)
    torch.testing.assert_close(smaller(more), network(more))


class Batch(nn.Module):
    """Asks for the number of examples, as the token of a class or the first state of a cell do."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.token = nn.Parameter(torch.randn(1, 1, 4))
        self.layer, self.cell, self.head = nn.Linear(4, 8), nn.Linear(12, 8), nn.Linear(8, 2)

    def forward(self, x):
        if self.kind == "token":
            x = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
        if self.kind == "state":
            state = x.new_zeros(x.shape[0], 8)
            for step in range(3):
                state = torch.tanh(self.cell(torch.cat([x[:, step], state], 1)))
            return self.head(state)
        if self.kind == "one by one":  # which Python unrolls
            return torch.stack([self.head(F.relu(self.layer(example))) for example in x]).sum(1)
        if self.kind == "number":
            return self.head(F.relu(self.layer(x)).sum(1) / float(len(x)))
        if self.kind == "tensor":
            return self.head(F.relu(self.layer(x)).sum(1) / torch.tensor(float(len(x))))
        return self.head(F.relu(self.layer(F.pad(x, (0, 0, 0, 1)))).sum(1))


@pytest.mark.costly
@torch.no_grad()
@pytest.mark.parametrize("kind", ["token", "state", "plain"])
def test_any_number_of_examples_is_taken(kind):
    torch.manual_seed(0)
    x = torch.randn(5, 3, 4)
    network = gate(Batch(kind).eval(), x[:2]).eval()
    set_gates(network, "random")
    smaller = compact(network, x[:2])
    for n in (1, 2, 5):
        torch.testing.assert_close(smaller(x[:n]), network(x[:n]))


@pytest.mark.costly
@torch.no_grad()
@pytest.mark.parametrize("kind", ["one by one", "number", "tensor"])
def test_another_number_of_examples_than_the_network_was_followed_for_is_refused(kind):
    x = torch.randn(5, 3, 4)
    network = gate(Batch(kind).eval(), x[:2]).eval()
    set_gates(network, "random")
    smaller = compact(network, x[:2])
    torch.testing.assert_close(smaller(x[:2]), network(x[:2]))
    with pytest.raises(ValueError, match=r"compacted for inputs of shape \[2, .*got \[5, 3, 4\]"):
        smaller(x)


class Maps(nn.Module):
    """Fills maps up, or divides by their size."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.conv, self.head = kind, nn.Conv2d(2, 8, 3, padding=1), nn.Linear(8, 3)

    def forward(self, x):
        if self.kind == "filled up":
            x = F.pad(x, (0, -x.shape[3] % 8, 0, -x.shape[2] % 8), value=1.0)
        y = self.head(F.relu(self.conv(x)).sum((2, 3)))
        return y / torch.tensor(float(x.shape[2])) if self.kind == "divided" else y


@torch.no_grad()
@pytest.mark.parametrize(("kind", "sizes"), [("filled up", [19, 41]), ("divided", [8, 48])])
def test_maps_that_decide_on_numbers_have_one_size(kind, sizes):
    x = torch.randn(2, 2, 16, 16)
    network = gate(Maps(kind).eval(), x).eval()
    smaller = compact(network, x)
    torch.testing.assert_close(smaller(x), network(x))
    for n in sizes:
        with pytest.raises(ValueError, match=rf"compacted for inputs of shape .*got \[2, 2, {n}, {n}\]"):
            smaller(torch.randn(2, 2, n, n))
