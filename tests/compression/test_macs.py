"""Multiply-accumulate operations of every kind of product, against counts by hand."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sparsereg.compression import compact, count


class Calls(nn.Module):
    """A layer, or a function of the input and a parameter."""

    def __init__(self, layer=None, function=None, shape=(1,)):
        super().__init__()
        self.layer = layer
        self.function = function
        self.weight = nn.Parameter(torch.randn(shape))

    def forward(self, x):
        if self.function is not None:
            return self.function(x, self.weight)
        y = self.layer(x)
        return y[0] if isinstance(self.layer, nn.RNNBase) else y


def recurrent(gates, inputs, hidden, directions=1, layers=1, proj=0):
    """Gates times (input + state) for each layer and direction, and the projection."""
    total, state = 0, proj or hidden
    for layer in range(layers):
        read = inputs if layer == 0 else directions * state
        total += directions * (gates * hidden * (read + state) + hidden * proj)
    return total


T, D, H = 5, 8, 6
RECURRENT = {
    "lstm": (lambda: nn.LSTM(D, H, batch_first=True), recurrent(4, D, H)),
    "lstm, time first": (lambda: nn.LSTM(D, H), recurrent(4, D, H)),
    "lstm, both ways": (
        lambda: nn.LSTM(D, H, 2, batch_first=True, bidirectional=True),
        recurrent(4, D, H, 2, 2),
    ),
    "lstm, no bias": (lambda: nn.LSTM(D, H, 3, bias=False, batch_first=True), recurrent(4, D, H, 1, 3)),
    "gru": (lambda: nn.GRU(D, H, 2, batch_first=True), recurrent(3, D, H, 1, 2)),
    "gru, both ways": (lambda: nn.GRU(D, H, batch_first=True, bidirectional=True), recurrent(3, D, H, 2)),
    "rnn": (lambda: nn.RNN(D, H, batch_first=True), recurrent(1, D, H)),
}


@pytest.mark.costly
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", RECURRENT)
def test_recurrent_layers(name, batch):
    build, each_step = RECURRENT[name]
    torch.manual_seed(0)
    network = Calls(build()).eval()
    counted = count(network, torch.randn(batch, T, D))
    assert counted.macs == counted.compacted_macs == T * each_step
    assert counted.layers[0].macs == T * each_step


@pytest.mark.filterwarnings("ignore:LSTM with projections")
def test_recurrent_layer_with_projection():
    network = Calls(nn.LSTM(D, H, 2, batch_first=True, bidirectional=True, proj_size=3)).eval()
    x = torch.randn(2, T, D)
    assert count(network, x).macs == T * recurrent(4, D, H, 2, 2, 3)
    compact(network, x)


def attention(x, _):
    q = x.unsqueeze(1)
    return F.scaled_dot_product_attention(q, q, q)


PRODUCTS = {
    "attention": (attention, (1,), 2 * T * T * D),
    "matmul": (torch.matmul, (D, 4), T * D * 4),
    "@": (lambda x, w: x @ w, (D, 4), T * D * 4),
    "matmul with a vector": (torch.matmul, (D,), T * D),
    "bmm": (lambda x, w: torch.bmm(x, x.transpose(1, 2)), (1,), T * T * D),
    "einsum": (lambda x, w: torch.einsum("btd,de->bte", x, w), (D, 4), T * D * 4),
    "einsum of pairs": (lambda x, w: torch.einsum("btd,bsd->bts", x, x), (1,), T * T * D),
    "bilinear": (lambda x, w: F.bilinear(x, x, w), (3, D, D), T * 3 * D * D),
    "linear": (F.linear, (4, D), T * D * 4),
    "inner": (torch.inner, (4, D), T * D * 4),
}


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", PRODUCTS)
def test_functions(name, batch):
    function, shape, macs = PRODUCTS[name]
    network = Calls(function=function, shape=shape).eval()
    counted = count(network, torch.randn(batch, T, D))
    assert counted.macs == counted.compacted_macs == macs


LAYERS = {
    "attention": (
        lambda: Attends(nn.MultiheadAttention(D, 2, batch_first=True)),
        (T, D),
        4 * T * D * D + 2 * T * T * D,
    ),
    "attention, weights": (
        lambda: Attends(nn.MultiheadAttention(D, 2, batch_first=True), True),
        (T, D),
        4 * T * D * D + 2 * T * T * D,
    ),
    "transformer": (
        lambda: nn.Sequential(nn.TransformerEncoderLayer(D, 2, 16, batch_first=True)),
        (T, D),
        4 * T * D * D + 2 * T * T * D + 2 * T * D * 16,
    ),
    "bilinear": (lambda: Pairs(nn.Bilinear(D, D, 3)), (D,), 3 * D * D),
    "lstm cell": (lambda: Cell(nn.LSTMCell(D, H)), (D,), 4 * H * (D + H)),
    "transposed": (lambda: nn.Sequential(nn.ConvTranspose1d(T, 4, 3)), (T, D), T * D * 4 * 3),
}


class Attends(nn.Module):
    def __init__(self, layer, weights=False):
        super().__init__()
        self.layer = layer
        self.weights = weights

    def forward(self, x):
        return self.layer(x, x, x, need_weights=self.weights)[0]


class Pairs(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x, x)


class Cell(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)[0]


@pytest.mark.costly
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", LAYERS)
def test_layers(name, batch):
    build, shape, macs = LAYERS[name]
    fused = torch.backends.mha.get_fastpath_enabled()
    counted = count(build().eval(), torch.randn(batch, *shape))
    assert counted.macs == counted.compacted_macs == macs
    assert torch.backends.mha.get_fastpath_enabled() == fused


def test_matrix_and_vector_products_without_a_batch():
    from sparsereg.compression.macs import counting

    matrix, vector = torch.randn(4, 7), torch.randn(7)
    with counting() as counter:
        torch.mv(matrix, vector)
        torch.dot(vector, vector)
        torch.addmv(torch.zeros(4), matrix, vector)
        torch.addbmm(torch.zeros(2, 3), torch.randn(5, 2, 4), torch.randn(5, 4, 3))
    assert counter.get_total_flops() == 2 * (28 + 7 + 28 + 5 * 2 * 4 * 3)
