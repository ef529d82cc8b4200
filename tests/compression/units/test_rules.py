"""Each kind of operation in a small network of its own: what goes, and that what is left is exact."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_leaves

import sparsereg
from benchmarks.coverage_checks import difference
from sparsereg.compression.units.constants import labelled
from sparsereg.compression.units.cut import Cut
from sparsereg.compression.units.labels import FIRST, stored
from sparsereg.compression.units.solve import solve
from sparsereg.compression.units.tracing import trace
from sparsereg.errors import InputError
from sparsereg.penalties import hard_concretes


def random_half(units, seed):
    """Half of all choices, but never all of those along one axis of a weight or of a tensor."""
    generator = np.random.default_rng(seed)
    choices = units.removable
    gone = set(generator.permutation(choices)[: len(choices) // 2].tolist())
    axes = units.labeller.axes
    lines = [line for along in axes.weight_axes.values() for line in along if line is not None]
    lines += [stored(part).numpy() for part in axes.of.values() if isinstance(part, torch.Tensor)]
    lines = [np.unique(units.roots[line]) for line in lines]
    lines = [line[line >= FIRST] for line in lines if (line >= FIRST).any()]
    while True:
        alive = units.alive(gone)
        lines = [line for line in lines if not alive[line].any()]
        if not lines:
            return gone
        for line in lines:
            gone -= units.of(int(line[0]))


@torch.no_grad()
def halved(network, *example):
    """Largest difference of the network without half of its choices to the masked one."""
    network, example = (
        network.double().eval(),
        [e.double() if e.is_floating_point() else e for e in example],
    )
    program = trace(network, *example)
    assert difference(tree_leaves(program.values_of_output), tree_leaves(network(*example))) < 1e-12
    units = solve(labelled(program))
    gone = random_half(units, 0)
    assert gone
    cut = Cut(units, gone)
    smaller = tree_leaves(cut.run(*example))
    assert cut.num_parameters < sum(p.numel() for p in network.parameters())
    return difference(smaller, tree_leaves(cut.masked(*example)))


def free(network, *example):
    """Sizes of what can go, by parameter and axis."""
    table = sparsereg.explain(network, example).to_frame()
    table = table[table.state == "can go"]
    return {(r.parameter, r.axis): r.size for r in table.itertuples()}


class Positions(nn.Module):
    """A table of twenty places of which a sequence reads as many as it has tokens."""

    def __init__(self):
        super().__init__()
        self.tokens, self.places = nn.Embedding(9, 12), nn.Parameter(torch.randn(20, 12))
        self.norm, self.head = nn.LayerNorm(12), nn.Linear(12, 3)

    def forward(self, ids):
        here = self.places[torch.arange(ids.shape[1]) + 2]
        return self.head(self.norm(self.tokens(ids) + here))


def test_a_table_of_which_a_part_is_read_goes_by_its_columns():
    ids = torch.randint(0, 9, (2, 7))
    assert free(Positions(), ids) == {("places", 1): 12}  # and with it all that writes the stream
    assert halved(Positions(), ids) < 1e-12


class Turned(nn.Module):
    """Products with matrices of weights, as they are and turned around."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(8, 5)), nn.Parameter(torch.randn(8, 6))
        self.c = nn.Parameter(torch.randn(3, 6))

    def forward(self, x):
        return torch.relu(torch.relu(x @ self.a.T) @ self.b) @ self.c.transpose(0, 1)


def test_products_with_turned_weights_are_layers():
    x = torch.randn(2, 4, 5)
    assert free(Turned(), x) == {("a", 0): 8, ("b", 1): 6}
    assert halved(Turned(), x) < 1e-12


@pytest.mark.parametrize("dimensions", [1, 2])
def test_weight_norms_do_not_see_what_is_gone(dimensions):
    convolution = nn.Conv1d if dimensions == 1 else nn.Conv2d

    def net():
        normed = nn.utils.parametrizations.weight_norm(convolution(6, 8, 3))
        return nn.Sequential(convolution(2, 6, 3), nn.ReLU(), normed, nn.ReLU(), convolution(8, 3, 3))

    x = torch.randn(2, 2, *[12] * dimensions)
    assert set(free(net(), x).values()) == {6, 8}
    assert halved(net(), x) < 1e-12


class Written(nn.Module):
    """Einsums with dots, without a result, and of more than two factors."""

    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(6, 10), nn.Linear(9, 3)
        self.w, self.v = nn.Parameter(torch.randn(10, 8)), nn.Parameter(torch.randn(10, 4))
        self.three = nn.Parameter(torch.randn(4, 4, 5))

    def forward(self, x):
        h = torch.relu(self.first(x))
        y, z = torch.einsum("...i, ij -> ...j", h, self.w), torch.einsum("abi,ij", h, self.v)
        among = torch.einsum("bni,bmi", y, y)
        mixed = torch.einsum("bni,ijk,bnj->bnk", torch.einsum("nbi->bni", z.transpose(0, 1)), self.three, z)
        seen = torch.einsum("...nm,...mj->...nj", among, z) + torch.einsum("bnj->b", mixed)[:, None, None]
        return self.head(torch.cat([seen, mixed], -1))


@pytest.mark.costly
def test_an_einsum_is_followed_however_it_is_written():
    x = torch.randn(2, 5, 6)
    assert sorted(free(Written(), x).values()) == [4, 8, 10]
    assert halved(Written(), x) < 1e-9


class Graph(nn.Module):
    """Attention over a graph: one weight for all heads makes what the vectors of each of them read."""

    def __init__(self):
        super().__init__()
        self.w, self.head = nn.Parameter(torch.randn(3, 6, 8)), nn.Linear(24, 4)
        self.one, self.two = nn.Parameter(torch.randn(3, 8)), nn.Parameter(torch.randn(3, 8))

    def forward(self, x):
        h = torch.einsum("bni,hio->bhno", x, self.w)
        one, two = (torch.einsum("bhno,ho->bhn", h, v) for v in (self.one, self.two))
        shares = (one[..., None] + two[..., None, :]).tanh().softmax(-1)
        return self.head(torch.einsum("bhnm,bhmo->bnho", shares, h).flatten(2))


def test_heads_go_where_one_weight_makes_them_all():
    x = torch.randn(2, 5, 6)
    assert {3, 8} <= set(free(Graph(), x).values())
    assert halved(Graph(), x) < 1e-9


class Looked(nn.Module):
    """Scores by relative distance: an index that is the same for all heads."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(12, 12) for _ in range(3))
        self.distances, self.head = nn.Linear(12, 12), nn.Linear(12, 2)
        self.register_buffer("between", torch.randn(9, 12))

    def heads(self, x):
        return x.unflatten(-1, (3, 4)).transpose(-3, -2)

    def forward(self, x):
        q, k, v = (self.heads(f(x)) for f in (self.q, self.k, self.v))
        by_distance = q @ self.heads(self.distances(self.between)).transpose(-1, -2)
        places = torch.arange(5)
        index = (places[:, None] - places[None] + 4).expand(x.shape[0], 3, 5, 5)
        scores = q @ k.transpose(-1, -2) + torch.gather(by_distance, -1, index)
        return self.head((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


def test_an_index_that_heads_share_is_read_by_those_that_stay():
    x = torch.randn(2, 5, 12)
    found = sparsereg.explain(Looked(), x).to_frame().query("state == 'can go'")
    assert 3 in found[found.family == "heads"]["size"].to_list()
    assert halved(Looked(), x) < 1e-12


def test_a_norm_of_one_group_is_over_all_channels_that_stay():
    def net():
        return nn.Sequential(nn.Conv2d(3, 10, 3), nn.GroupNorm(1, 10), nn.ReLU(), nn.Conv2d(10, 2, 1))

    x = torch.randn(2, 3, 6, 6)
    assert 10 in free(net(), x).values()
    assert halved(net(), x) < 1e-12


class States(nn.Module):
    """Tokens are gathered into a few states, a layer goes over each, and they are handed out again."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv1d(3, 12, 1), nn.Conv1d(12, 3, 1)
        self.ways, self.layer = nn.Conv1d(12, 10, 1), nn.Conv1d(12, 12, 1)

    def forward(self, x):
        x = self.first(x).relu()
        into, back = self.ways(x).chunk(2, 1)
        states = self.layer(x @ into.transpose(1, 2))
        return self.last(x + states.tanh() @ back)


def test_states_that_a_layer_goes_over_one_by_one_stay():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 7)
    assert ("ways.weight", 0) not in free(States(), x)
    assert free(States(), x)["first.weight", 0] == 12
    gated = sparsereg.gate(States().double().eval(), x.double(), jitter=0.0)
    for seed in range(3):
        for i, gates in enumerate(hard_concretes(gated).values()):
            generator = torch.Generator().manual_seed(10 * seed + i)
            gates.log_alpha.data = 3 * torch.randn(gates.gate_size, generator=generator).double()
        with torch.no_grad():
            answers, left = gated(x.double()), sparsereg.compact(gated, x.double())(x.double())
        assert difference([answers], [left]) < 1e-12


@pytest.mark.parametrize(("into", "groups", "out"), [(12, 12, 12), (12, 12, 24), (12, 3, 18), (12, 4, 4)])
def test_of_a_grouped_transposed_convolution_whole_groups_go(into, groups, out):
    def net():
        upward = nn.ConvTranspose2d(into, out, 4, 2, 1, groups=groups)
        layers = (
            nn.Conv2d(3, into, 3),
            nn.ReLU(),
            upward,
            nn.BatchNorm2d(out),
            nn.ReLU(),
            nn.Conv2d(out, 2, 1),
        )
        return nn.Sequential(*layers)

    x = torch.randn(2, 3, 6, 6)
    assert free(net(), x)["0.weight", 0] == groups
    gated = sparsereg.gate(net(), x)
    (gates,) = hard_concretes(gated).values()
    assert gates.gate_size == (groups,)
    assert halved(net(), x) < 1e-12


class InParts(nn.Module):
    """Zeros of a size of their own into which layers write, part by part."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.a, self.b = kind, nn.Conv2d(3, 12, 3), nn.Conv2d(3, 12, 3)
        self.narrow, self.out = nn.Conv2d(3, 6, 3), nn.Conv2d(12, 2, 1)

    def forward(self, x):
        height, width = x.shape[2] - 2, x.shape[3] - 2
        if self.kind == "columns in turn":
            y = x.new_zeros(len(x), 12, height, 2 * width)
            y[..., ::2], y[..., 1::2] = self.a(x), self.b(x).relu()
        elif self.kind == "a window":
            y = torch.zeros(len(x), 12, height + 2, width + 2, dtype=x.dtype)
            y[:, :, 1:-1, 1:-1] = self.a(x) + self.b(x)
        elif self.kind == "rows from each other":
            y = torch.zeros(len(x), 12, height + 1, width, dtype=x.dtype)
            y[:, :, 1:] = self.a(x)
            y[:, :, 0] = y[:, :, 1].tanh()
        else:
            y = torch.zeros(len(x), 12, height, width, dtype=x.dtype)
            y[:, :6], y[:, 6:] = self.narrow(x), self.narrow(x.flip(1)).relu()
        return self.out(y)


@pytest.mark.parametrize("kind", ["columns in turn", "a window", "rows from each other", "halves"])
def test_what_is_written_into_zeros_goes_from_them_too(kind):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 6, 6)
    name, size = ("narrow", 6) if kind == "halves" else ("a", 12)
    assert free(InParts(kind), x)[f"{name}.weight", 0] == size
    assert halved(InParts(kind), x) < 1e-12


class InPlace(nn.Module):
    """What is written in place is read later, through another name."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.a, self.b, self.c = kind, nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x):
        x = self.a(x)
        if self.kind == "view":
            x[:, :3].mul_(2)
        elif self.kind == "before":
            y = self.b(F.relu(x, inplace=True))
            return self.c(x + y)
        elif self.kind == "forgotten":
            x.add_(1)
        else:
            half = x.view(-1, 2, 4)
            x.mul_(3)
            return self.c(self.b(half.flatten(1)))
        return self.c(self.b(x))


@pytest.mark.parametrize("kind", ["view", "before", "forgotten", "through a view"])
def test_what_is_written_in_place_is_seen_by_all_that_read_it(kind):
    torch.manual_seed(0)
    assert halved(InPlace(kind), torch.randn(3, 4)) < 1e-12


def test_a_weight_with_two_names_counts_once():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens, self.head = nn.Embedding(9, 6), nn.Linear(6, 9, bias=False)
            self.norm = nn.LayerNorm(6)
            self.head.weight = self.tokens.weight

        def forward(self, ids):
            return self.head(self.norm(self.tokens(ids)))

    ids = torch.randint(0, 9, (2, 4))
    explanation = sparsereg.explain(Tied(), ids)
    assert explanation.parameters == 9 * 6 + 12
    assert set(explanation.to_frame().parameter) == {"tokens.weight", "norm.weight", "norm.bias"}
    assert halved(Tied(), ids) < 1e-12


class Blocks(nn.Module):
    """Blocks without gradients and without autocast, as code that minds its precision has them."""

    def __init__(self, on):
        super().__init__()
        self.on, self.a, self.b = on, nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x):
        with torch.no_grad():
            x = x - x.mean()
        with torch.autocast("cpu", enabled=self.on):
            x, y = torch.relu(self.a(x)), x
        return self.b(x) + y.sum()


def test_blocks_without_gradients_or_autocast_are_unwrapped():
    x = torch.randn(3, 4)
    assert free(Blocks(False), x) == {("a.weight", 0): 6}
    assert halved(Blocks(False), x) < 1e-12
    with pytest.raises(InputError, match="Blocks cannot be traced: autocast is switched on inside of it"):
        sparsereg.explain(Blocks(True), x)


class Joined(nn.Module):
    """One layer whose bias is made of three parts, one of which is constant."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(12, 5))
        self.one, self.two = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(4))
        self.register_buffer("zero", torch.zeros(4))
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        x = F.linear(x, self.weight, torch.cat([self.one, self.zero, self.two]))
        return self.head(sum(x.chunk(3, -1)))


def test_a_bias_that_is_put_together_goes_with_the_units():
    x = torch.randn(3, 5)
    assert free(Joined(), x) == {("weight", 0): 4}
    assert halved(Joined(), x) < 1e-12


class Scalars(nn.Module):
    """A factor, or a summand, that is one number for all channels."""

    def __init__(self, adds):
        super().__init__()
        self.adds, self.a, self.b = adds, nn.Linear(4, 6), nn.Linear(6, 2)
        self.number = nn.Parameter(torch.tensor([1.5]))

    def forward(self, x):
        x = torch.relu(self.a(x))
        return self.b(x + self.number if self.adds else x * self.number)


def test_one_number_for_all_channels_ties_none():
    x = torch.randn(3, 4)
    assert free(Scalars(False), x) == {("a.weight", 0): 6}
    assert halved(Scalars(False), x) < 1e-12
    assert free(Scalars(True), x) == {("a.weight", 0): 6}  # the next layer's columns take the gates
    assert halved(Scalars(True), x) < 1e-12


class Bags(nn.Module):
    """Sums of rows of a table, between offsets where these are given, and layers behind them."""

    def __init__(self, *, mode="sum", norm=False, **settings):
        super().__init__()
        self.bags = nn.EmbeddingBag(20, 8, mode=mode, **settings)
        self.norm = nn.LayerNorm(8) if norm else nn.Identity()
        self.hidden, self.head = nn.Linear(8, 10), nn.Linear(10, 3)

    def forward(self, ids, offsets=None, weights=None):
        return self.head(torch.relu(self.hidden(self.norm(self.bags(ids, offsets, weights)))))


IDS = torch.arange(24).reshape(4, 6) % 17
OFFSETS = torch.tensor([0, 5, 6, 6, 17])


@pytest.mark.parametrize(
    ("network", "example"),
    [
        (Bags(), (IDS,)),
        (Bags(mode="mean", norm=True), (IDS,)),
        (Bags(mode="max", padding_idx=3), (IDS,)),
        (Bags(mode="mean"), (IDS.flatten(), OFFSETS)),
        (Bags(include_last_offset=True), (IDS.flatten(), torch.tensor([0, 5, 6, 24]))),
    ],
)
def test_bags_of_a_table_go_by_its_columns(network, example):
    names = {("bags.weight", 1): 8, ("hidden.weight", 0): 10}
    assert free(network, *example) == names
    assert halved(network, *example) < 1e-12


class Scores(nn.Module):
    """Attention whose scores are, in part or wholly, not those of queries and keys of one head."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.stem, self.queries, self.values = nn.Linear(5, 24), nn.Linear(24, 24), nn.Linear(24, 24)
        self.out, self.head = nn.Linear(24, 24), nn.Linear(24, 2)
        self.scores, self.places = nn.Parameter(torch.randn(3, 6, 6)), nn.Parameter(torch.randn(6, 8))

    def forward(self, x):
        y = torch.relu(self.stem(x))
        values, queries = (
            part(y).reshape(-1, 6, 3, 8).transpose(1, 2) for part in (self.values, self.queries)
        )
        products = queries @ queries.transpose(-1, -2)
        if self.kind == "learnt":
            products = self.scores
        elif self.kind == "learnt for each example":
            products = self.scores.expand(len(x), 3, 6, 6)
        elif self.kind == "one bias for all heads":  # heads and examples along one axis
            flat = queries.reshape(-1, 6, 8)
            products = flat @ flat.transpose(-1, -2) + flat @ self.places.T
            mixed = products.softmax(-1) @ values.reshape(-1, 6, 8)
            return self.head(self.out(mixed.reshape(-1, 3, 6, 8).transpose(1, 2).reshape(-1, 6, 24)))
        elif self.kind == "mixed":
            products = torch.einsum("bhij,hg->bgij", products, self.scores[:, :3, 0])
        return self.head(self.out((products.softmax(-1) @ values).transpose(1, 2).reshape(-1, 6, 24)))


@pytest.mark.costly
@pytest.mark.parametrize(
    "kind", ["learnt", "learnt for each example", "one bias for all heads", "mixed", "own"]
)
def test_values_of_a_head_stay_where_its_scores_do(kind):
    assert halved(Scores(kind), torch.randn(2, 6, 5)) < 1e-12


def test_sizes_that_do_not_serve_are_tried_in_silence(capfd):
    class Mixer(nn.Module):
        """A layer along the tokens, whose number cannot vary."""

        def __init__(self):
            super().__init__()
            self.patches, self.tokens, self.head = nn.Conv2d(3, 8, 4, 4), nn.Linear(16, 16), nn.Linear(8, 2)

        def forward(self, x):
            x = self.patches(x).flatten(2)
            return self.head((x + torch.relu(self.tokens(x))).mean(2))

    class Branch(nn.Linear):
        """Its way depends on the numbers."""

        def forward(self, x):
            return super().forward(x if x.nonzero().sum().item() > 3 else -x)

    assert ("patches.weight", 0) in free(Mixer(), torch.randn(2, 3, 16, 16))
    with pytest.raises(InputError, match="depends on the data"):
        free(Branch(3, 2), torch.randn(2, 3))
    assert capfd.readouterr() == ("", "")


class Filled(nn.Module):
    """Rows of a table of its own are written one after another, as caches and scans do."""

    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(6, 10), nn.Linear(10, 3)

    def forward(self, x):
        h = torch.relu(self.first(x))
        made = torch.empty_like(h)
        for place in range(x.shape[1]):
            made[:, place] = h[:, : place + 1].mean(1)
        return self.head(made)


def test_what_is_written_in_place_trains_when_it_is_compacted():
    gated = sparsereg.gate(Filled(), x := torch.randn(2, 4, 6)).eval()
    with torch.no_grad():
        next(m for m in gated.modules() if isinstance(m, sparsereg.HardConcrete)).log_alpha[:4] = -10
    smaller = sparsereg.compact(gated, x)
    smaller(x).sum().backward()
    assert smaller.first.weight.grad.shape == (6, 6)


class Curves(nn.Module):
    """A sum over features and over what each is spread to, as of networks of curves (KAN)."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Parameter(torch.randn(6, 16, 5)), nn.Parameter(torch.randn(16, 3, 5))
        self.register_buffer("knots", torch.linspace(-2, 2, 5))

    def forward(self, x):
        for weight in (self.first, self.last):
            x = torch.einsum("bik,iok->bo", (x[..., None] - self.knots).square().neg().exp(), weight)
        return x


def test_a_sum_over_two_axes_of_a_weight_costs_what_it_takes():
    assert sparsereg.count(Curves(), torch.randn(4, 6)).macs == 6 * 16 * 5 + 16 * 3 * 5


JOINS = {
    "hstack": lambda a, b: torch.hstack([a, b]),
    "vstack": lambda a, b: torch.vstack([a, b]).unflatten(0, (2, -1)).transpose(0, 1).flatten(1),
    "dstack": lambda a, b: torch.dstack([a, b]).flatten(1),
    "column_stack": lambda a, b: torch.column_stack([a, b]),
    "view_as": lambda a, b: torch.cat([a.view(-1, 3, 4), b.view_as(a.view(-1, 3, 4))], 1).flatten(1),
}


@pytest.mark.parametrize("way", JOINS)
def test_units_go_past_tensors_that_are_joined(way):
    class Joined(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two, self.out = nn.Linear(5, 12), nn.Linear(5, 12), nn.Linear(24, 3)

        def forward(self, x):
            return self.out(JOINS[way](self.one(x).relu(), self.two(x).relu()))

    example = torch.randn(4, 5)
    assert sparsereg.explain(Joined(), example).share > 0.98
    assert halved(Joined(), example) < 1e-12


@pytest.mark.parametrize("order", [-1.0, -math.inf])
def test_what_a_norm_of_a_negative_order_runs_over_stays(order):
    class Smallest(nn.Module):
        def __init__(self):
            super().__init__()
            self.inside, self.out = nn.Linear(5, 12), nn.Linear(12, 3)

        def forward(self, x):
            x = self.inside(x)
            return self.out(x / (1 + torch.linalg.vector_norm(x, order, -1, keepdim=True)))

    assert "negative order" in str(sparsereg.explain(Smallest(), torch.randn(4, 5)))
