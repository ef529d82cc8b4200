"""Hidden units of recurrent layers, each layer and direction by itself; features of inputs."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_leaves

import sparsereg
from sparsereg.compression import compact, count, gate, load_compacted, save_compacted
from sparsereg.compression.macs import counting
from sparsereg.compression.verify import difference
from sparsereg.errors import InputError
from sparsereg.penalties import hard_concretes

SEQUENCES = torch.randn(3, 6, 5, generator=torch.Generator().manual_seed(0))


class Tagger(nn.Module):
    """Two layers in both directions, and a GRU on top whose last state is read."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(5, 7, 2, batch_first=True, bidirectional=True, dropout=0.3)
        self.gru, self.tags, self.all = nn.GRU(14, 6), nn.Linear(14, 4), nn.Linear(6, 2)

    def forward(self, x):
        y, _ = self.lstm(x)
        _, last = self.gru(y.transpose(0, 1))
        return self.tags(y), self.all(last[-1])


class LastStates(nn.Module):
    """A classifier that reads the last states of both directions of the last layer, and the cells."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(5, 8, 2, batch_first=True, bidirectional=True)
        self.head, self.cells = nn.Linear(16, 3), nn.Linear(8, 3)

    def forward(self, x):
        _, (h, c) = self.lstm(x)
        return self.head(torch.cat([h[-2], h[-1]], -1)) + self.cells(c[0])


class AllStates(nn.Module):
    """The states of all layers in one tensor."""

    def __init__(self):
        super().__init__()
        self.gru, self.head = nn.GRU(5, 6, 2, batch_first=True), nn.Linear(12, 3)

    def forward(self, x):
        _, h = self.gru(x)
        return self.head(h.transpose(0, 1).flatten(1))


class Projected(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(5, 9, 2, proj_size=4, bias=False)
        self.rnn, self.head = nn.RNN(4, 6, nonlinearity="relu"), nn.Linear(6, 2)

    def forward(self, x):
        return self.head(self.rnn(self.lstm(x)[0])[0]).mean(0)


class GivenStates(nn.Module):
    """A layer that starts from states that are an input."""

    def __init__(self):
        super().__init__()
        self.gru, self.head = nn.GRU(5, 6, batch_first=True), nn.Linear(6, 2)

    def forward(self, x, h):
        return self.head(F.relu(self.gru(x, h)[0]))


NETWORKS = {"tagger": Tagger, "last states": LastStates, "all states": AllStates, "projected": Projected}


def made(name):
    torch.manual_seed(0)
    return NETWORKS[name]().eval()


@torch.no_grad()
def shuffle_(network, seed):
    generator = torch.Generator().manual_seed(seed)
    for gates in hard_concretes(network).values():
        gates.log_alpha.copy_(3 * torch.randn(gates.log_alpha.shape, generator=generator))


@pytest.mark.costly
@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", NETWORKS)
def test_smaller_layers_give_the_same_answers_and_have_the_counted_size(name, seed, tmp_path):
    network = gate(made(name), SEQUENCES, jitter=0.0)
    shuffle_(network, seed)
    sizes = count(network, SEQUENCES)
    smaller = compact(network, SEQUENCES)  # compares in float64, too
    assert sizes.compacted_parameters == sum(p.numel() for p in smaller.parameters()) < sizes.parameters
    with counting() as counter, torch.no_grad():  # in float64: fused kernels hide their products
        copy.deepcopy(smaller).double()(SEQUENCES.double())
    batch = 3
    assert sizes.compacted_macs == pytest.approx(counter.get_total_flops() / 2 / batch)
    again = load_compacted(save_compacted(smaller, tmp_path / "compacted.pt"))
    other = torch.randn(4, 9, 5)
    with torch.no_grad():
        for x in (SEQUENCES, other):
            for a, b in zip(tree_leaves(network(x)), tree_leaves(again(x)), strict=True):
                assert difference(a, b) < 1e-5


def test_layers_and_directions_have_gates_of_their_own():
    network = gate(made("tagger"), SEQUENCES)
    assert sorted(g.log_alpha.numel() for g in hard_concretes(network).values()) == [6, 7, 7, 7, 7]
    network.train()(SEQUENCES)[0].square().mean().backward()
    gates = [g for n, g in hard_concretes(network).items() if n.startswith("lstm")]
    assert all((g.log_alpha.grad != 0).any() for g in gates)


def test_a_recurrent_network_trains_on_after_compaction():
    network = gate(made("tagger"), SEQUENCES, jitter=0.0)
    shuffle_(network, 0)
    smaller = compact(network, SEQUENCES).train()
    assert any(isinstance(m, nn.Dropout) or getattr(m, "dropout", 0) for m in smaller.modules())
    sum(part.sum() for part in smaller(SEQUENCES)).backward()
    assert all(p.grad is not None for p in smaller.parameters())


class Projected(nn.Module):
    """Projections of two directions, whose last states are read as one tensor."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(5, 16, 2, proj_size=6, bidirectional=True, batch_first=True)
        self.head = nn.Linear(12, 3)

    def forward(self, x):
        out, (last, _) = self.lstm(x)
        return self.head(out), last


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("left", [10, 3])
def test_last_states_stay_one_tensor_and_hidden_units_more_than_their_projections(left):
    network = gate(Projected().eval(), SEQUENCES, jitter=0.0)
    hidden = [g for g in hard_concretes(network).values() if g.log_alpha.numel() == 16]
    for i, gates in enumerate(hidden):
        gates.log_alpha.data[left + i :] = -10.0
    smaller = compact(network, SEQUENCES)
    assert smaller(SEQUENCES)[1].shape == (4, 3, 6)
    assert count(network, SEQUENCES).compacted_parameters == sum(p.numel() for p in smaller.parameters())
    for one, two in zip(network(SEQUENCES), smaller(SEQUENCES), strict=True):
        assert difference(one, two) < 1e-5


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_recurrent_weights_that_are_computed_stay():
    gru = nn.utils.weight_norm(nn.GRU(5, 6, batch_first=True), "weight_hh_l0")
    explanation = sparsereg.explain(gru, SEQUENCES)
    assert "or its weights are computed" in str(explanation)
    assert not explanation.removable


def test_states_that_are_given_keep_a_layer_whole():
    example = (SEQUENCES, torch.randn(1, 3, 6))
    explanation = sparsereg.explain(GivenStates(), example)
    assert "gru starts from states that are not zeros" in str(explanation)
    assert not explanation.removable


# ---- features of inputs


class Scaled(nn.Module):
    """Features that are normed by themselves before two layers read them."""

    def __init__(self):
        super().__init__()
        self.norm, self.one, self.two = nn.BatchNorm1d(6), nn.Linear(6, 8), nn.Linear(6, 3)

    def forward(self, x):
        x = torch.sigmoid(self.norm(x))
        return self.two(x) + F.relu(self.one(x))[:, :3]


class Flat(nn.Module):
    """Pixels that a layer reads one by one."""

    def __init__(self):
        super().__init__()
        self.into, self.out = nn.Linear(48, 9), nn.Linear(9, 2)

    def forward(self, images):
        return self.out(F.gelu(self.into(images.flatten(1))))


def convolution():
    return nn.Sequential(nn.Conv2d(5, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 2, 1))


INPUTS = {
    "scaled": (Scaled, torch.randn(4, 6), 6),
    "flat": (Flat, torch.randn(2, 3, 4, 4), 48),
    "convolution": (convolution, torch.randn(2, 5, 7, 7), 5),
    "recurrent": (LastStates, SEQUENCES, 5),
}


@pytest.mark.costly
@pytest.mark.parametrize("name", INPUTS)
def test_features_that_nobody_reads_leave_at_the_entrance(name, tmp_path):
    torch.manual_seed(0)
    build, x, size = INPUTS[name]
    network = build().eval()
    gated = gate(network, x, families=["inputs", "units", "channels"], jitter=0.0)
    ((path, gates),) = [(n, g) for n, g in hard_concretes(gated).items() if "gate_inputs" in n]
    assert gates.log_alpha.numel() == size, path
    shuffle_(gated, 1)
    with torch.no_grad():
        gates.log_alpha[:2] = torch.tensor([-10.0, 10.0])
    shut = set(torch.nonzero(gates.median() == 0).flatten().tolist())
    smaller = compact(gated, x)
    assert set(next(iter(smaller.meta["unread_inputs"].values()))) == shut
    assert count(gated, x).compacted_parameters == sum(p.numel() for p in smaller.parameters())
    again = load_compacted(save_compacted(smaller, tmp_path / "compacted.pt"))
    with torch.no_grad():
        assert difference(gated(x), again(x)) < 1e-5
    gated.__dict__["_units"] = None
    assert count(gated, x).compacted_parameters == sum(p.numel() for p in smaller.parameters())
    twice = gate(smaller, x, families="inputs", jitter=0.0)
    ((_, more),) = hard_concretes(twice).items()
    assert more.log_alpha.numel() == size - len(shut)
    with torch.no_grad():
        more.log_alpha[0] = -10.0
    smallest = compact(twice, x)
    left = sorted(set(range(size)) - shut)[1:]
    assert set(range(size)) - set(next(iter(smallest.meta["unread_inputs"].values()))) == set(left)
    assert sum(node.target is torch.ops.aten.index_select.default for node in smallest.graph.nodes) == 1


class Added(nn.Module):
    """A residual connection from the input itself."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.out = nn.Linear(6, 8), nn.Linear(8, 6), nn.Linear(6, 2)

    def forward(self, x):
        return self.out(x + self.b(F.relu(self.a(x))))


class Packed(nn.Module):
    """Packs its sequences, as many networks of texts do."""

    def __init__(self):
        super().__init__()
        self.lstm, self.out = nn.LSTM(5, 8, batch_first=True), nn.Linear(8, 2)

    def forward(self, x, lengths):
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return self.out(self.lstm(packed)[1][0][-1])


@pytest.mark.parametrize("lengths", [torch.tensor([6, 4, 2]), [6, 4, 2]])
def test_packed_sequences_are_refused_in_one_line(lengths):
    with pytest.raises(InputError, match=r"Packed cannot be traced at .*: packed sequences are as long"):
        gate(Packed().eval(), (torch.randn(3, 6, 5), lengths))


def test_inputs_are_explained_and_gated_when_they_are_asked_for():
    x = torch.randn(4, 6)
    table = sparsereg.explain(Scaled(), x, inputs=True).to_frame()
    assert (table.query("family == 'inputs'")["size"] == 6).all()
    assert "inputs" not in set(sparsereg.explain(Scaled(), x).to_frame().family)
    assert not any("inputs" in name for name in hard_concretes(gate(Scaled().eval(), x, families=None)))
    with pytest.raises(ValueError, match="nothing of inputs that can go"):
        gate(Added().eval(), x, families="inputs")


def test_recurrent_layers_are_traced_without_their_steps(monkeypatch):
    """In one operation, over any number of steps; what PyTorch does otherwise is back afterwards."""
    kernels = {op: dict(op.py_kernels) for op in (torch.ops.aten.lstm.input, torch.ops.aten.gru.input)}
    monkeypatch.setattr("torch._decomp.decompositions.one_layer_lstm", None)
    monkeypatch.setattr("torch._decomp.decompositions.gru_cell", None)
    network, x = Tagger().eval(), torch.randn(2, 40, 5)
    gated = gate(network, x, droprate_init=0.05).eval()
    gates = hard_concretes(gated)
    with torch.no_grad():
        for hc in gates.values():
            hc.log_alpha.copy_(torch.where(torch.arange(hc.log_alpha.numel()) % 2 == 0, 10.0, -10.0))
    smaller = compact(gated, x)
    for steps in (40, 7):
        other = torch.randn(3, steps, 5)
        for a, b in zip(gated(other), smaller(other), strict=True):
            assert difference(a, b) < 1e-5
    assert all(dict(op.py_kernels) == before for op, before in kernels.items())
