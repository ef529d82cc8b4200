"""Units that are not zero where they are summed, and units met in ways that are not those of a layer."""

from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sparsereg
from sparsereg.compression import load_compacted, save_compacted
from sparsereg.compression.macs import counting
from sparsereg.penalties import hard_concretes

weight_norm = nn.utils.parametrizations.weight_norm


def gated(network, example):
    """Put gates into a network, and shut half of each."""
    network = network.double().eval()
    for parameter in network.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    found = sparsereg.gate(network, example).double()
    for gate in hard_concretes(found).values():
        places = gate.log_alpha.numel()
        gate.log_alpha.data.uniform_(-0.5, 3.0)
        gate.log_alpha.data[torch.randperm(places)[: places // 2]] = -10
    return found


def loaded(smaller):
    """What a file keeps of a smaller network."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "compacted.pt"
        save_compacted(smaller, path)
        return load_compacted(path)


@torch.no_grad()
def exact(network, example):
    """Assert that what is left of a network gives the same; return the sizes of its gates, sorted."""
    torch.manual_seed(0)
    found = gated(network, example)
    smaller = loaded(sparsereg.compact(found, example))
    example = example if isinstance(example, tuple) else (example,)
    before, after = found(*example), smaller(*example)
    before, after = (x if isinstance(x, tuple) else (x,) for x in (before, after))
    for one, two in zip(before, after, strict=True):
        assert one.std() > 1e-6
        assert (one - two).abs().max() < 1e-12 * one.abs().max()
    smaller.requires_grad_(False)  # PyTorch's counter fails on views of parameters
    with counting() as counter:
        smaller(*example)
    left, sizes = sum(p.numel() for p in smaller.parameters()), sparsereg.count(found, example)
    assert left == sizes.compacted_parameters
    assert counter.get_total_flops() / 2 / len(example[0]) == sizes.compacted_macs
    assert left < sum(p.numel() for p in network.parameters())
    return sorted(gate.log_alpha.numel() for gate in hard_concretes(found).values())


def x(*shape):
    torch.manual_seed(1)
    return torch.randn(*shape, dtype=torch.float64)


class Deep(nn.Module):
    """Two hidden layers, one of them maps, with any function behind each."""

    def __init__(self, function, padding=0):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 10, 3, padding=padding), nn.Conv2d(10, 8, 3, padding=padding)
        self.c, self.d, self.function = nn.Linear(8, 6), nn.Linear(6, 3), function

    def forward(self, x):
        x = self.function(self.b(self.function(self.a(x))))
        return self.d(self.function(self.c(x.mean((2, 3)))))


@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("function", [torch.sigmoid, torch.cos, F.softplus, lambda x: F.relu(x) * 1.3 + 0.2])
def test_where_zero_becomes_something_else_the_columns_that_read_it_take_the_gates(function, padding):
    assert exact(Deep(function, padding), x(2, 3, 7, 7)) == [6, 8, 10]


class Stream(nn.Module):
    """Sigmoids that are added up, before a norm if there is one."""

    def __init__(self, norm):
        super().__init__()
        self.enter, self.leave, self.norm = nn.Linear(6, 12), nn.Linear(12, 3), norm
        self.layers = nn.ModuleList(nn.Linear(12, 12) for _ in range(2))

    def forward(self, x):
        x = torch.sigmoid(self.enter(x))
        for layer in self.layers:
            x = x + F.softplus(layer(self.norm(x)))
        return self.leave(self.norm(x))


@pytest.mark.parametrize("norm", [nn.Identity(), nn.LayerNorm(12), nn.RMSNorm(12)])
def test_a_stream_that_is_never_zero(norm):
    assert exact(Stream(norm), x(4, 6)) == [12]


class Tied(nn.Module):
    """A table of embeddings that is the last layer's, which reads what is not zero."""

    def __init__(self):
        super().__init__()
        self.table, self.hidden = nn.Embedding(20, 12), nn.Linear(12, 12)
        self.head = nn.Linear(12, 20, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids):
        return self.head(torch.sigmoid(self.hidden(self.table(ids))))


def test_a_weight_that_makes_and_reads_along_one_axis_takes_its_gates_once():
    assert exact(Tied(), torch.randint(0, 20, (3, 4))) == [12]


class Encoder(nn.Module):
    """An autoencoder that decodes with the encoder's weight turned around."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(10, 8))

    def forward(self, x):
        return F.linear(torch.sigmoid(F.linear(x, self.weight)), self.weight.t())


def test_a_linear_layer_reads_a_turned_weight():
    assert exact(Encoder(), x(4, 8)) == [10]


def test_gates_on_columns_are_found_again_in_a_state_dict():
    network, example = Stream(nn.Identity()).double().eval(), x(4, 6)
    one = gated(network, example)
    two = sparsereg.gate(network, example).double()
    two.load_state_dict(one.state_dict())
    for name in [name for name in two.__dict__ if name == "_units"]:
        del two.__dict__[name]
    smaller = sparsereg.compact(two, x(2, 6))
    assert (smaller(example) - one(example)).abs().max() < 1e-12


class Meeting(nn.Module):
    """Maps that meet one map of a single channel."""

    def __init__(self, meet):
        super().__init__()
        self.a, self.one, self.b = nn.Conv2d(3, 12, 3), nn.Conv2d(3, 1, 3), nn.Conv2d(12, 4, 1)
        self.meet = meet

    def forward(self, x):
        return self.b(self.meet(self.a(x), self.one(x))).mean((2, 3))


@pytest.mark.parametrize(
    "meet",
    [
        lambda h, m: h + m,
        lambda h, m: h * torch.sigmoid(m),
        lambda h, m: torch.sigmoid(h) * m,
        lambda h, m: m - h,
        lambda h, m: m / (h.abs() + 1),
        lambda h, m: torch.maximum(h, m),
        lambda h, m: torch.where(m > 0, h, m),
    ],
)
def test_one_map_for_all_channels_ties_none_of_them(meet):
    assert exact(Meeting(meet), x(2, 3, 6, 6)) == [12]


class Over(nn.Module):
    """A figure over all channels, which weighs them."""

    def __init__(self, figure):
        super().__init__()
        self.a, self.b, self.figure = nn.Conv2d(3, 12, 3), nn.Conv2d(12, 4, 3), figure

    def forward(self, x):
        x = self.a(x)
        return self.b(x * torch.sigmoid(self.figure(x))).mean((2, 3))


@pytest.mark.costly
@pytest.mark.parametrize(
    "figure",
    [
        lambda h: h.mean(1, keepdim=True),
        lambda h: h.max(1, keepdim=True)[0],
        lambda h: h.min(1, keepdim=True)[0],
        lambda h: h.amax(1, True) + h.mean((1, 2, 3), keepdim=True),
        lambda h: h.norm(dim=1, keepdim=True),
        lambda h: F.normalize(h, dim=1),
    ],
)
def test_figures_over_channels_count_what_is_gone_as_zeros(figure):
    assert exact(Over(figure), x(2, 3, 8, 8)) == [12]


class Normed(nn.Module):
    """Functions without modules of their own: RMS norm, and the response norm of ConvNeXt V2."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 12), nn.Linear(12, 12), nn.Linear(12, 3)
        self.scale, self.factor = nn.Parameter(torch.ones(12)), nn.Parameter(torch.ones(12))

    def forward(self, x):
        x = self.a(x)
        x = x + self.b(x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.scale)
        size = x.norm(dim=1, keepdim=True)
        return self.c((x + self.factor * x * size / (size.mean(-1, keepdim=True) + 1e-6)).mean(1))


def test_norms_that_are_no_modules():
    assert 12 in exact(Normed(), x(2, 5, 6))


class Points(nn.Module):
    """The largest of each feature over all points."""

    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = nn.Conv1d(3, 16, 1), nn.BatchNorm1d(16), nn.Conv1d(16, 12, 1)
        self.c = nn.Linear(12, 3)

    def forward(self, x):
        return self.c(self.b(F.relu(self.norm(self.a(x)))).max(2)[0])


def test_a_largest_over_positions_leaves_zeros_zero():
    assert exact(Points(), x(4, 3, 9)) == [12, 16]


class Pairs(nn.Module):
    """Products of all pairs of features, as recommenders take them, and similarities of two towers."""

    def __init__(self):
        super().__init__()
        self.dense, self.table = nn.Linear(5, 8), nn.Embedding(10, 8)
        self.one, self.two = nn.Linear(5, 6), nn.Linear(5, 6)

    def forward(self, x, ids):
        together = torch.stack([self.dense(x), self.table(ids)], 1)
        pairs = (together @ together.mT)[:, 0, 1]
        one, two = self.one(x), self.two(x)
        return pairs, F.cosine_similarity(one, two), torch.cdist(one, two)


def test_products_of_pairs_lose_what_neither_has():
    assert exact(Pairs(), (x(4, 5), torch.randint(0, 10, (4,)))) == [6, 8]


class Waves(nn.Module):
    """Normed weights, as networks for sound have them."""

    def __init__(self, dim, function):
        super().__init__()
        self.a = weight_norm(nn.Conv1d(4, 12, 3), dim=dim)
        self.b = weight_norm(nn.ConvTranspose1d(12, 10, 4, 2), dim=dim)
        self.c, self.d = weight_norm(nn.Linear(10, 8, bias=False), dim=min(dim, 1)), nn.Linear(8, 3)
        self.function = function

    def forward(self, x):
        x = self.function(self.b(self.function(self.a(x))))
        return self.d(self.function(self.c(x.mean(-1))))


class Added(nn.Module):
    """A branch whose weights are normed."""

    def __init__(self, dim):
        super().__init__()
        self.a, self.c = nn.Conv1d(3, 8, 1), nn.Conv1d(8, 2, 1)
        self.b = weight_norm(nn.Conv1d(8, 8, 3, padding=1), dim=dim)

    def forward(self, x):
        x = self.a(x)
        return self.c(x + torch.tanh(self.b(x)))


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_normed_weights_of_which_all_are_shut_are_zero(dim):
    found = sparsereg.gate(Added(dim).double(), x(2, 3, 9))
    for gates in hard_concretes(found).values():
        gates.log_alpha.data.fill_(-10)
    found.train()(x(2, 3, 9)).sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in found.parameters())
    hard_concretes(found)["b.parametrizations.weight.gate_blocks.gates"].log_alpha.data.fill_(10)
    smaller = sparsereg.compact(found.eval(), x(2, 3, 9))
    assert torch.equal(smaller(x(2, 3, 9)), found(x(2, 3, 9)))
    assert exact(Added(dim), x(2, 3, 9)) == [1, 8]


@pytest.mark.parametrize("function", [F.leaky_relu, torch.sigmoid])
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_the_size_of_normed_weights_makes_up_for_those_that_are_gone(dim, function):
    assert exact(Waves(dim, function), x(2, 4, 9)) == [8, 10, 12]


class Otherwise(nn.Module):
    """Two hidden layers that meet in a function of the caller's."""

    def __init__(self, function):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 2)
        self.table, self.function = 1 + torch.rand(6, dtype=torch.float64), function  # no buffer

    def forward(self, x):
        return self.c(self.function(self.a(x), self.b(x), self.table))


@pytest.mark.parametrize(
    "function",
    [
        lambda a, b, t: torch.max(a, b),
        lambda a, b, t: b[:, torch.where(t > 0)[0]],
        lambda a, b, t: a.unsqueeze(1).broadcast_to(3, 2, 6).sum(1),
    ],
)
def test_overloads_that_do_something_else_than_their_name(function):
    exact(Otherwise(function), x(3, 4))


@pytest.mark.parametrize(
    "function",
    [
        lambda a, b, t: torch.tanh(a + t),
        lambda a, b, t: a * t + b,
        lambda a, b, t: torch.addcmul(a, t, t, value=0.5),
        lambda a, b, t: torch.addcdiv(a, t, t),
        lambda a, b, t: torch.lerp(a, t, 0.3),
    ],
)
def test_tensors_that_are_no_buffers_take_no_gates(function):
    assert 6 in exact(Otherwise(function), x(3, 4))


class Products(nn.Module):
    """Matrices of weights that inputs are multiplied by, turned around or as they are."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(8, 5)), nn.Parameter(torch.randn(8, 6))
        self.c = nn.Parameter(torch.randn(3, 6))

    def forward(self, x):
        return torch.relu(torch.sigmoid(x @ self.a.T) @ self.b) @ self.c.transpose(0, 1)


def test_matrices_that_are_no_layers_take_gates():
    assert exact(Products(), x(2, 4, 5)) == [14]  # all of them on one matrix: its columns, and its rows


class Cross(nn.Module):
    """Attention from one stream to another, whose layers read rows of one matrix."""

    def __init__(self, module):
        super().__init__()
        self.one, self.two, self.leave = nn.Linear(4, 12), nn.Linear(5, 12), nn.Linear(12, 2)
        self.attention = nn.MultiheadAttention(12, 3, batch_first=True) if module else None
        self.weight = None if module else nn.Parameter(torch.randn(36, 12))

    def forward(self, x, y):
        x, y = self.one(x), self.two(y)
        if self.attention is not None:
            return self.leave(self.attention(x, y, y, need_weights=False)[0])
        q, k, v = (
            F.linear(x, self.weight[:12]),
            F.linear(y, self.weight[12:24]),
            F.linear(y, self.weight[24:]),
        )
        q, k, v = (t.unflatten(-1, (3, 4)).transpose(1, 2) for t in (q, k, v))
        return self.leave(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


@pytest.mark.costly
@pytest.mark.parametrize("module", [False, True])
def test_rows_of_one_matrix_are_layers_of_their_own(module):
    assert 3 in exact(Cross(module), (x(2, 7, 4), x(2, 5, 5)))  # heads


class Steps(nn.Module):
    """Recurrent cells in a loop of the network's own, from zeros in a precision that it names."""

    def __init__(self):
        super().__init__()
        self.table, self.leave = nn.Embedding(20, 8), nn.Linear(6, 3)
        self.gru, self.lstm, self.plain = nn.GRUCell(8, 12), nn.LSTMCell(12, 10), nn.RNNCell(10, 6)

    def forward(self, ids):
        x = self.table(ids)
        state = torch.zeros(len(ids), 12, dtype=x.dtype)
        cell, found = None, []
        for step in range(ids.shape[1]):
            state = self.gru(x[:, step], state)
            cell = self.lstm(state, cell)
            found.append(self.leave(self.plain(cell[0])))
        return torch.stack(found, 1)


class Maps(nn.Module):
    """A recurrent cell of convolutions, written out."""

    def __init__(self):
        super().__init__()
        self.inner, self.leave = nn.Conv2d(2 + 6, 24, 3, padding=1), nn.Conv2d(6, 1, 1)

    def forward(self, x):
        state = cell = x.new_zeros(len(x), 6, *x.shape[3:])
        for step in range(x.shape[1]):
            i, f, o, g = self.inner(torch.cat([x[:, step], state], 1)).chunk(4, 1)
            cell = torch.sigmoid(f) * cell + torch.sigmoid(i) * torch.tanh(g)
            state = torch.sigmoid(o) * torch.tanh(cell)
        return self.leave(state)


@pytest.mark.costly
def test_cells_lose_hidden_units_when_they_start_from_zeros():
    assert exact(Steps(), torch.randint(0, 20, (3, 4))) == [6, 8, 10, 12]
    assert exact(Maps(), x(2, 3, 2, 6, 6)) == [6]


@torch.no_grad()
def test_a_network_that_names_its_precision_is_compared_in_float64_too():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x):
            x = F.relu(self.a(x)).to(torch.float32).sqrt().to(self.b.weight.dtype)
            return self.b(x) + torch.zeros(2, dtype=self.b.weight.dtype)

    network = sparsereg.gate(Named().eval(), example := torch.randn(3, 4))
    for gate in hard_concretes(network).values():
        gate.log_alpha.copy_(torch.tensor([-10.0, 3.0]).repeat(4))
    assert len(sparsereg.compact(network, example).a.weight) == 4
    wide = network.double()  # traced again
    assert len(sparsereg.compact(wide, example.double()).a.weight) == 4


class Highway(nn.Module):
    """Two terms of which one at least has to stay."""

    def __init__(self):
        super().__init__()
        self.enter, self.carry, self.change, self.leave = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x):
        x = self.enter(x)
        share = torch.sigmoid(self.carry(x))
        return self.leave(share * F.relu(self.change(x)) + (1 - share) * x)


@torch.no_grad()
def test_gates_of_terms_are_found_again_without_what_gate_knew():
    example = x(4, 8)
    network = gated(Highway(), example)
    assert any("gate_experts" in name for name in hard_concretes(network))
    del network.__dict__["_units"]
    assert (sparsereg.compact(network, example)(example) - network(example)).abs().max() < 1e-12


class WrittenOut(nn.Module):
    """A layer norm without an operation of its own."""

    def __init__(self, variance):
        super().__init__()
        self.g, self.b, self.variance = nn.Parameter(torch.ones(12)), nn.Parameter(torch.zeros(12)), variance

    def forward(self, x):
        mean = x.mean(-1, keepdim=True)
        return self.g * (x - mean) / torch.sqrt(self.variance(x, mean) + 1e-5) + self.b


class OfWidth(nn.Module):
    """A residual stream with norms of any kind."""

    def __init__(self, variance):
        super().__init__()
        self.enter, self.up, self.down, self.leave = (
            nn.Linear(*n) for n in ((5, 12), (12, 16), (16, 12), (12, 3))
        )
        self.one, self.two = WrittenOut(variance), WrittenOut(variance)

    def forward(self, x):
        x = self.enter(x)
        return self.leave(self.two(x + self.down(F.relu(self.up(self.one(x))))))


VARIANCES = {
    "deviations": lambda x, mean: ((x - mean) ** 2).mean(-1, keepdim=True),
    "squares": lambda x, mean: (x * x).mean(-1, keepdim=True) - mean * mean,
    "var": lambda x, mean: x.var(-1, unbiased=False, keepdim=True),
    "correction": lambda x, mean: torch.var(x, -1, correction=0, keepdim=True),
}


@pytest.mark.parametrize("variance", VARIANCES.values(), ids=list(VARIANCES))
def test_a_layer_norm_that_is_written_out_is_over_the_width_that_stays(variance):
    assert exact(OfWidth(variance), x(4, 5)) == [1, 12, 16]


def test_a_variance_over_one_less_keeps_the_width():
    assert exact(OfWidth(lambda x, mean: x.var(-1, keepdim=True)), x(4, 5)) == [1, 16]


class AlongTokens(nn.Module):
    """Attention to a few mixtures of tokens."""

    def __init__(self):
        super().__init__()
        self.qkv, self.mix = nn.Linear(12, 36), nn.Parameter(torch.randn(7, 3))
        self.o = nn.Linear(12, 3)

    def forward(self, x):
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 3, 4).permute(2, 0, 3, 1, 4)
        k, v = (torch.einsum("bhtd,tk->bhkd", part, self.mix) for part in (k, v))
        made = (q @ k.transpose(-1, -2) / 2).softmax(-1) @ v
        return self.o(made.transpose(1, 2).flatten(2))


def test_what_is_mixed_along_tokens_leaves_heads_free():
    assert exact(AlongTokens(), x(2, 7, 12)) == [3, 4]


class Masked(nn.Module):
    """Attention whose mask has a place for each head, as T5's from a decoder to its encoder."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(12, 24) for _ in range(3))
        self.out, self.leave = nn.Linear(24, 12), nn.Linear(12, 3)

    def forward(self, x):
        b, n, _ = x.shape
        q, k, v = (f(x).view(b, n, 4, 6).transpose(1, 2) for f in (self.q, self.k, self.v))
        slopes = torch.arange(4, dtype=x.dtype)[:, None, None]
        mask = torch.zeros(1, 4, n, n, dtype=x.dtype) + x.mean(-1)[:, None, None] * slopes
        y = F.scaled_dot_product_attention(q, k, v, mask)
        return self.leave(x + self.out(y.transpose(1, 2).reshape(b, n, 24)))


def test_heads_go_from_under_a_mask_of_their_own():
    assert exact(Masked(), x(2, 5, 12)) == [1, 4, 6, 6]


class Linear(nn.Module):
    """Attention without a softmax, q (k^T v), by matrix products or by sums over named axes."""

    def __init__(self, function, named=False, normed=False):
        super().__init__()
        self.enter, self.leave = nn.Linear(5, 12), nn.Linear(12, 3)
        self.q, self.k, self.v, self.out = (nn.Linear(*s) for s in ((12, 12), (12, 12), (12, 24), (24, 12)))
        self.function, self.named, self.normed = function, named, normed

    def forward(self, x):
        x = self.enter(x)
        b, n, _ = x.shape
        q, k, v = (f(x).view(b, n, 3, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        q, k = self.function(q), self.function(k)
        size = 1 + q @ k.sum(2).unsqueeze(-1) if self.normed else None
        if self.named:
            states = torch.einsum("bhnd,bhne->bhde", k, v)
            if size is None:
                y = torch.einsum("bhnd,bhde->bhne", q, states)
            else:
                y = torch.einsum("...nd, ...de, ...n -> ...ne", q, states, 1 / size.squeeze(-1))
        else:
            y = q @ (k.transpose(-1, -2) @ v)
            y = y if size is None else y / size
        return self.leave(x + self.out(y.transpose(1, 2).reshape(b, n, 24)))


@pytest.mark.costly
@pytest.mark.parametrize("settings", [{}, {"named": True}, {"normed": True}, {"named": True, "normed": True}])
def test_products_with_units_along_axes_of_both_factors(settings):
    assert exact(Linear(F.relu, **settings), x(2, 5, 5)) == [1, 3, 4, 8, 12]


def test_where_keys_are_not_zero_linear_attention_goes_by_heads():
    assert exact(Linear(lambda t: F.elu(t) + 1, normed=True), x(2, 5, 5)) == [1, 3, 8, 12]


class Selective(nn.Module):
    """Two branches that share each channel, as selective kernels do."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 10, 3, padding=1), nn.Conv2d(3, 10, 5, padding=2)
        self.squeeze, self.choose, self.leave = nn.Linear(10, 6), nn.Linear(6, 20), nn.Conv2d(10, 4, 1)

    def forward(self, x):
        parts = torch.stack([self.a(x).relu(), self.b(x).relu()], 1)
        shares = self.choose(self.squeeze(parts.sum(1).mean((2, 3))).relu()).view(len(x), 2, -1).softmax(1)
        return self.leave((parts * shares[..., None, None]).sum(1)).mean((2, 3))


def test_branches_that_share_each_channel_lose_it_together():
    assert exact(Selective(), x(2, 3, 7, 7)) == [6, 10]


class Three(nn.Module):
    """Queries, keys and values by one matrix, with a bias that is put together from two vectors and zeros."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out, self.leave = nn.Linear(12, 36, bias=False), nn.Linear(12, 12), nn.Linear(12, 3)
        self.q, self.v = nn.Parameter(torch.randn(12)), nn.Parameter(torch.randn(12))
        self.register_buffer("k", torch.zeros(12))

    def forward(self, x):
        b, n, _ = x.shape
        y = F.linear(x, self.qkv.weight, torch.cat([self.q, self.k, self.v]))
        q, k, v = y.view(b, n, 3, 3, 4).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, 12)
        return self.leave(x + self.out(y))


def test_biases_that_are_put_together_take_gates():
    assert exact(Three(), x(2, 5, 12)) == [1, 3, 4]


class HeadsInTheBatch(nn.Module):
    """Attention whose heads are put one behind the other in the batch, from learnt queries."""

    def __init__(self):
        super().__init__()
        self.seeds = nn.Parameter(torch.randn(1, 2, 8))
        self.q, self.k, self.v, self.leave = (nn.Linear(*s) for s in ((8, 8), (5, 8), (5, 8), (8, 3)))

    def forward(self, x):
        q, k, v = self.q(self.seeds.expand(len(x), -1, -1)), self.k(x), self.v(x)
        q, k, v = (torch.cat(part.split(4, 2), 0) for part in (q, k, v))
        made = (q @ k.transpose(1, 2) / 2).softmax(2) @ v
        return self.leave(torch.cat(made.split(len(x), 0), 2))


@pytest.mark.costly
def test_heads_in_the_batch_lose_the_same_places():
    assert exact(HeadsInTheBatch(), x(3, 6, 5)) == [4, 4, 8]


class NormedHeads(nn.Module):
    """Attention that norms queries, keys and answers head by head, behind a token that is put in front."""

    def __init__(self, norm):
        super().__init__()
        self.norm = norm
        self.token = nn.Parameter(torch.randn(1, 1, 12))
        self.front = nn.LayerNorm(12)
        self.q, self.k, self.v, self.o = (nn.Linear(12, 12) for _ in range(4))
        self.scale = nn.Parameter(torch.rand(4) + 0.5)
        self.leave = nn.Linear(12, 3)

    def forward(self, x):
        x = torch.cat([self.token.expand(len(x), -1, -1), torch.tanh(x)], 1)
        y = self.front(x)
        q, k, v = (p(y).view(*x.shape[:2], 3, 4).transpose(1, 2) for p in (self.q, self.k, self.v))
        q, k = self.norm(q, (4,), self.scale), self.norm(k, (4,))
        y = F.rms_norm(F.scaled_dot_product_attention(q, k, v), (4,), self.scale)
        return self.leave(self.o(y.transpose(1, 2).reshape(x.shape)))


@pytest.mark.costly
@pytest.mark.parametrize("norm", [F.rms_norm, F.layer_norm])
def test_heads_go_whose_queries_and_keys_are_normed(norm):
    assert exact(NormedHeads(norm), x(2, 5, 12)) == [3, 12]


class MapsOfTheirOwn(nn.Module):
    """Channels that are normed over their maps, each by itself."""

    def __init__(self):
        super().__init__()
        self.into, self.out = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 2, 1)

    def forward(self, x):
        return self.out(F.layer_norm(self.into(x), x.shape[-2:]).relu())


def test_channels_go_that_are_normed_over_their_maps():
    assert exact(MapsOfTheirOwn(), x(2, 3, 6, 6)) == [8]


class Picks(nn.Module):
    """The three tokens with the largest scores, looked up in one of the usual ways."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.inside, self.score, self.head = nn.Linear(5, 8), nn.Linear(8, 1), nn.Linear(8, 3)

    def forward(self, x):
        x = self.inside(x)
        index = self.score(x).squeeze(-1).topk(3, 1).indices
        return self.head(F.relu(PICKS[self.how](x, index)))


PICKS = {
    "expand": lambda x, index: x.gather(1, index[..., None].expand(-1, -1, x.shape[-1])),
    "number": lambda x, index: x.gather(1, index[..., None].expand(-1, -1, 8)),
    "repeat": lambda x, index: x.gather(1, index[..., None].repeat(1, 1, x.shape[-1])),
    "take": lambda x, index: torch.take_along_dim(x, index[..., None], 1),
    "index": lambda x, index: x[torch.arange(len(x))[:, None], index],
}


@pytest.mark.parametrize("how", PICKS)
def test_tokens_that_are_picked_lose_what_all_lose(how):
    assert exact(Picks(how), torch.randn(2, 7, 5, generator=torch.Generator().manual_seed(0)).double()) == [8]


class Latents(nn.Module):
    """A table of queries, which a norm reads before anything else does."""

    def __init__(self):
        super().__init__()
        self.queries, self.inside = nn.Parameter(torch.randn(4, 12)), nn.Linear(5, 12)
        self.norm, self.q, self.kv, self.out = (
            nn.LayerNorm(12),
            nn.Linear(12, 6),
            nn.Linear(12, 12),
            nn.Linear(6, 12),
        )
        self.head = nn.Linear(12, 2)

    def forward(self, x):
        queries = self.queries.expand(len(x), -1, -1)
        k, v = self.kv(self.norm(self.inside(x))).chunk(2, -1)
        y = F.scaled_dot_product_attention(self.q(self.norm(queries)), k, v)
        return self.head(self.norm(queries + self.out(y)).mean(1))


def test_a_norm_over_a_table_of_queries_leaves_their_width_alone():
    assert exact(Latents(), torch.randn(2, 7, 5).double()) == [1, 6, 6, 12]


class OneHead(nn.Module):
    """Attention without an axis for heads, or with one of size one."""

    def __init__(self, axis):
        super().__init__()
        self.axis, self.inside = axis, nn.Linear(5, 12)
        self.q, self.k, self.v = nn.Linear(12, 6), nn.Linear(12, 6), nn.Linear(12, 9)
        self.out, self.head = nn.Linear(9, 12), nn.Linear(12, 2)

    def forward(self, x):
        x = self.inside(x)
        parts = (layer(x) for layer in (self.q, self.k, self.v))
        q, k, v = (y.unsqueeze(1) if self.axis else y for y in parts)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.head((x + self.out(y.squeeze(1) if self.axis else y)).mean(1))


@pytest.mark.parametrize("axis", [False, True])
def test_places_of_a_single_head_go_one_by_one(axis):
    assert exact(OneHead(axis), torch.randn(2, 7, 5).double()) == [1, 6, 9, 12]


class Unforeseen(nn.Module):
    """An operation called in a way that its rule does not know."""

    def __init__(self, how):
        super().__init__()
        self.how, self.inside, self.out, self.head = how, nn.Linear(5, 8), nn.Linear(8, 6), nn.Linear(6, 3)
        self.vector = nn.Parameter(torch.randn(8))

    def forward(self, x):
        return self.head(F.relu(self.out(UNFORESEEN[self.how](self, self.inside(x)))))


UNFORESEEN = {
    "linear by a vector": lambda net, x: x + F.linear(x, net.vector)[:, None],
    "bits": lambda net, x: x.view(torch.int64).view(torch.float64),
}


@pytest.mark.parametrize("how", UNFORESEEN)
def test_what_meets_an_unforeseen_call_stays(how):
    assert exact(Unforeseen(how), torch.randn(4, 5).double()) == [6]


class TwoPlaces(nn.Module):
    """Each place is made two, of outputs of their own, and there is an empty one; a layer reads all alike."""

    def __init__(self):
        super().__init__()
        self.inside, self.wide, self.head = nn.Linear(5, 12), nn.Linear(12, 24), nn.Linear(12, 3)
        self.last = nn.Linear(3, 2)

    def forward(self, x):
        y = F.gelu(self.wide(self.inside(x)))
        y = F.pad(y.reshape(len(x), -1, 2, 12).flatten(1, 2), (0, 0, 0, 1))
        return self.last(self.head(y).mean(1))


def test_what_a_layer_reads_is_counted_where_its_places_are_made_by_other_units():
    assert exact(TwoPlaces(), torch.randn(2, 7, 5).double()) == [3, 12, 12]


class Mirror(nn.Module):
    """A decoder with the weight of the encoder, turned around."""

    def __init__(self, how):
        super().__init__()
        self.how, self.inside, self.code, self.out = how, nn.Linear(5, 8), nn.Linear(8, 6), nn.Linear(8, 3)
        self.before = nn.Linear(5, 6)

    def forward(self, x):
        first = F.relu(self.before(x)) @ self.code.weight if self.how == "product" else 0
        code = torch.tanh(self.code(F.relu(self.inside(x))))
        if self.how == "linear":
            return self.out(F.relu(F.linear(code, self.code.weight.t())))
        return self.out(F.relu(first + code @ self.code.weight))


@pytest.mark.parametrize("how", ["linear", "product"])
def test_a_weight_that_two_layers_read_each_its_way_takes_gates_along_both_axes(how):
    assert exact(Mirror(how), torch.randn(4, 5).double()) == [6, 8]  # a file keeps it as one


class Plus(nn.Module):
    """Products of matrices to which something is added in the same operation."""

    def __init__(self, how):
        super().__init__()
        self.how, self.inside, self.out, self.head = how, nn.Linear(5, 8), nn.Linear(8, 6), nn.Linear(6, 3)
        self.other, self.last = nn.Linear(5, 6), nn.Linear(5, 6)
        self.matrix, self.stack = nn.Parameter(torch.randn(8, 6)), nn.Parameter(torch.randn(2, 8, 6))

    def forward(self, x):
        y = F.relu(self.inside(x))
        if self.how == "matrix":
            return self.head(torch.addmm(self.other(x), y, self.matrix, beta=0.5, alpha=2))
        if self.how == "stack":
            added = self.other(x).expand(2, *x.shape[:1], 6)
            return self.head(torch.baddbmm(added, y.expand(2, *y.shape), self.stack, alpha=0.5).sum(0))
        nothing = x.new_full((1, 1, 1), float("nan"))
        scores = torch.baddbmm(nothing, y[None], y[None].mT, beta=0)
        return self.head(F.relu(self.last(x) + torch.bmm(scores.softmax(-1), self.other(x)[None])[0]))


@pytest.mark.parametrize(("how", "gates"), [("matrix", [1, 6, 8]), ("stack", [1, 6, 8]), ("none", [1, 6, 8])])
def test_what_is_added_to_a_product_of_matrices_loses_what_that_loses(how, gates):
    assert exact(Plus(how), torch.randn(4, 5).double()) == gates


class Left(nn.Module):
    """A layer that is written as a weight times what it reads, as the step of a state space model is."""

    def __init__(self, how):
        super().__init__()
        self.how, self.inside, self.out = how, nn.Linear(5, 8), nn.Linear(6, 3)
        self.weight = nn.Parameter(torch.randn(8, 6) if how == "turned" else torch.randn(6, 8))
        self.bias = nn.Parameter(torch.randn(6, 1))

    def forward(self, x):
        weight = self.weight.t() if self.how == "turned" else self.weight
        x = F.relu(self.inside(x)).mT
        return self.out(F.relu(weight @ x + self.bias).mT)


@pytest.mark.parametrize("how", ["as it is", "turned"])
def test_a_weight_may_come_before_what_it_reads(how):
    assert exact(Left(how), torch.randn(2, 4, 5).double()) == [6, 8]


class Fixed(nn.Module):
    """Layers whose weights are tensors that the network just holds, as filters are."""

    def __init__(self, how):
        super().__init__()
        self.how, self.inside, self.out = how, nn.Linear(5, 4), nn.Linear(4, 3)
        self.matrix, self.vector = torch.randn(4, 4).double(), torch.rand(4).double()
        self.blur, self.kernels = torch.rand(4, 1, 3).double(), torch.randn(4, 4, 1).double()
        self.stack = torch.randn(4, 4, 4).double()

    def forward(self, x):
        return self.out(F.relu(FIXED[self.how](self, F.relu(self.inside(x)))))


FIXED = {
    "linear": lambda net, x: F.linear(x, net.matrix),
    "bias": lambda net, x: F.linear(x, net.matrix, net.vector),
    "conv": lambda net, x: F.conv1d(x.mT, net.kernels).mT,
    "batch norm": lambda net, x: F.batch_norm(x.mT, net.vector, net.vector, net.vector, net.vector).mT + x,
    "bilinear": lambda net, x: F.bilinear(x, x, net.stack),
    "blur": lambda net, x: F.conv1d(x.mT, net.blur, groups=4).mT,
}


@pytest.mark.parametrize("how", ["linear", "bias", "conv", "bilinear"])
def test_what_is_made_by_tensors_that_are_no_buffers_stays(how):
    assert exact(Fixed(how), torch.randn(2, 6, 5).double()) == [4]  # of what it is made from units go


def test_a_norm_by_tensors_that_are_no_buffers_keeps_its_channels():
    with pytest.raises(ValueError, match="it is made by a tensor that is no parameter and no buffer"):
        sparsereg.gate(Fixed("batch norm").double(), torch.randn(2, 6, 5).double())


def test_channels_go_through_filters_that_are_no_buffers():
    assert exact(Fixed("blur"), torch.randn(2, 6, 5).double()) == [4]


class Figures(nn.Module):
    """Reads what a norm found beside what it normed."""

    def __init__(self):
        super().__init__()
        self.inside, self.norm, self.out = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 6, 3)
        self.head = nn.Linear(6, 2)

    def forward(self, x):
        affine = self.norm.weight, self.norm.bias
        x, mean, _ = torch.native_batch_norm(self.inside(x), *affine, None, None, True, 0.1, 1e-5)
        return self.head(F.relu(self.out(F.relu(x))).mean((2, 3))) + mean.square().sum()


def test_channels_stay_whose_figures_are_read():
    assert exact(Figures(), x(2, 3, 8, 8)) == [6]


class Detour(nn.Module):
    """Hands the kernels of a convolution on without their axis of one, as Mamba does."""

    def __init__(self):
        super().__init__()
        self.inside, self.each, self.out = nn.Linear(5, 8), nn.Conv1d(8, 8, 3, groups=8), nn.Linear(8, 3)

    def forward(self, x):
        kernels = self.each.weight.squeeze(1)
        return self.out(
            F.relu(F.conv1d(self.inside(x).mT, kernels.unsqueeze(1), self.each.bias, groups=8)).mT
        )


def test_weights_that_come_back_to_their_shape_are_themselves():
    assert exact(Detour(), torch.randn(2, 6, 5).double()) == [8]


class Features(nn.Module):
    """Tokens of features, each of which multiplies a vector of its own; and of a table, behind them."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = (nn.Parameter(torch.randn(5, 12)) for _ in range(2))
        self.table, self.out = nn.Embedding(7, 12), nn.Linear(12, 3)

    def forward(self, x):
        tokens = torch.cat(
            [self.weight * x.unsqueeze(-1) + self.bias, self.table.weight.expand(len(x), -1, -1)], 1
        )
        return self.out(tokens.relu()).mean(1)


class Chosen(nn.Module):
    """A sum of what layers make, weighed by shares that come of all of it."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(1, 12) for _ in range(4))
        self.shares, self.out = nn.Linear(48, 4), nn.Linear(12, 3)

    def forward(self, x):
        each = torch.stack([layer(x[:, i : i + 1]) for i, layer in enumerate(self.layers)], -2)
        return self.out((each * self.shares(each.flatten(-2)).softmax(-1).unsqueeze(-1)).sum(-2))


@pytest.mark.parametrize("network", [Features, Chosen])
def test_places_in_vectors_go_that_features_multiply(network):
    assert exact(network(), x(6, 5)) == [12]


class Projected(nn.Module):
    """Attention to fewer keys and values than there are tokens, which a weight along the tokens makes."""

    def __init__(self):
        super().__init__()
        self.q, self.kv, self.out = nn.Linear(6, 12), nn.Linear(6, 24), nn.Linear(12, 3)
        self.along = nn.ParameterList(torch.randn(5, 4) for _ in range(2))

    def forward(self, x):
        pair = zip(self.kv(x).chunk(2, -1), self.along, strict=True)
        tensors = (self.q(x), *(torch.einsum("bnd,nk->bkd", t, along) for t, along in pair))
        q, k, v = (t.unflatten(-1, (3, 4)).transpose(1, 2) for t in tensors)
        return self.out(((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2))


class Slots(nn.Module):
    """A cell whose state is a parameter, which a norm reads before."""

    def __init__(self):
        super().__init__()
        self.start, self.norm = nn.Parameter(torch.randn(1, 12)), nn.LayerNorm(12)
        self.read, self.cell, self.out = nn.Linear(12, 8), nn.GRUCell(8, 12), nn.Linear(12, 3)

    def forward(self, x):
        state = self.start.expand(len(x), -1)
        for _ in range(2):
            state = self.cell(self.read(self.norm(state) * x[:, :1]).relu(), state)
        return self.out(state)


class Stacked(nn.Module):
    """Heads that are laid one behind the other, and side by side again."""

    def __init__(self):
        super().__init__()
        self.enter, self.out = nn.Linear(6, 12), nn.Linear(12, 3)

    def forward(self, x):
        heads = torch.stack(self.enter(x).split(6, -1)).relu()
        return self.out(torch.cat(list(heads.unbind()), -1))


def test_what_makes_the_units_of_a_product_takes_their_gates():
    assert exact(Projected(), x(2, 5, 6)) == [3, 4, 4]


def test_states_of_cells_that_are_parameters_take_gates():
    assert exact(Slots(), x(6, 5)) == [8, 12]


def test_a_network_is_saved_in_which_a_head_is_gone_of_those_that_are_laid_side_by_side():
    assert exact(Stacked(), x(5, 6)) == [2, 6]
