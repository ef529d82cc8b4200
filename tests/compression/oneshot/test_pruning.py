"""One shot: the budget is met exactly, whatever the data come in, and what is worth nothing goes first."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import sparsereg
from sparsereg.compression import compact, count, is_compacted, load_compacted, original_size, save_compacted
from sparsereg.compression.oneshot import pruning
from sparsereg.compression.oneshot.inputs import AT_ONCE, NUMBERS, read_inputs, together
from sparsereg.compression.oneshot.leftover import leftover
from sparsereg.compression.oneshot.ranked import Ranked, _Found, opened_
from sparsereg.compression.oneshot.repair import Student
from sparsereg.compression.timing.measured import MeasuredBudget, Megabytes, peak_megabytes
from sparsereg.compression.units.structure import structure_of
from sparsereg.errors import InputError
from sparsereg.model.transformer import Shape
from sparsereg.model.vit import ViT
from sparsereg.penalties import hard_concretes
from sparsereg.training.accounting import PlainAccountant
from tests.nets import inputs, make


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 40), nn.ReLU(), nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 3)).eval()


X = torch.randn(200, 8, generator=torch.Generator().manual_seed(1))


class Named(nn.Module):
    """Inputs by name, answers in a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.body = net()

    def forward(self, values, scale=None):
        return {"logits": self.body(values if scale is None else values * scale)}


DATA = {
    "a tensor": lambda: (net(), X),
    "an example": lambda: (net(), X[:1]),
    "batches": lambda: (net(), [X[:50], X[50:]]),
    "a generator with labels": lambda: (net(), ((x, torch.zeros(len(x))) for x in X.split(30))),
    "a loader": lambda: (net(), DataLoader(TensorDataset(X, torch.zeros(200)), 32)),
    "by name": lambda: (Named().eval(), {"values": X, "labels": torch.zeros(200)}),
    "batches by name": lambda: (Named().eval(), [{"values": x, "scale": x} for x in X.split(30)]),
}


@pytest.mark.parametrize("data", DATA)
def test_the_budget_is_met_whatever_the_data_come_in(data):
    model, given = DATA[data]()
    before = copy.deepcopy(model.state_dict())
    small = sparsereg.shrink(model, given, target_macs=0.5)
    example = {"values": X[:1]} if isinstance(model, Named) else X[:1]
    if data == "batches by name":
        example["scale"] = X[:1]
    whole = PlainAccountant(model, example).macs
    assert 0.47 * whole <= PlainAccountant(small, example).macs <= 0.5 * whole
    assert not hard_concretes(small)
    assert original_size(small)["macs"] == whole
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_answers_without_derivatives():
    class Class(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = net()

        def forward(self, x):
            return self.body(x).argmax(1)

    small = sparsereg.shrink(Class().eval(), X, target_macs=0.5)
    assert float((small(X) == net()(X).argmax(1)).double().mean()) > 0.9


@pytest.mark.parametrize("importance", ["leftover", "gradient", "magnitude", "taylor"])
def test_what_is_worth_nothing_goes_first(importance):
    model = net()
    with torch.no_grad():
        for at, (first, second) in {7: (model[0], model[2]), 3: (model[2], model[4])}.items():
            first.weight[at:] = 0
            first.bias[at:] = 0
            second.weight[:, at:] = 0
    small = sparsereg.shrink(model, X, target_sparsity=0.85, importance=importance, repair=False)
    torch.testing.assert_close(small(X), model(X), rtol=1e-4, atol=1e-5)


class Blocks(nn.Module):
    """Two residual blocks that hold nearly all parameters and add next to nothing."""

    def __init__(self):
        super().__init__()
        self.into, self.out = nn.Linear(8, 12), nn.Linear(12, 3)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(12, 60), nn.ReLU(), nn.Linear(60, 12)) for _ in range(2)
        )
        for block in self.blocks:
            block[2].weight.data *= 1e-3

    def forward(self, x):
        x = self.into(x).relu()
        for block in self.blocks:
            x = x + block(x)
        return self.out(x)


@pytest.mark.parametrize("importance", ["magnitude", "taylor", "gradient", "leftover"])
@pytest.mark.parametrize("target", [0.3, 0.6])
def test_blocks_that_are_larger_than_what_may_go_are_passed_over(importance, target):
    torch.manual_seed(0)
    small = sparsereg.shrink(Blocks().eval(), X, target_sparsity=target, importance=importance)
    left = sum(p.numel() for p in small.parameters()) / sum(p.numel() for p in Blocks().parameters())
    assert 0.95 * (1 - target) < left <= 1 - target


def test_repair_helps_on_new_inputs():
    model, new = net(), torch.randn(500, 8, generator=torch.Generator().manual_seed(2))
    bare, small = (sparsereg.shrink(model, X, target_macs=0.5, repair=r) for r in (False, True))
    with torch.no_grad():
        error = [float((other(new) - model(new)).square().mean()) for other in (small, bare)]
    assert error[0] < 0.5 * error[1]


@pytest.mark.costly
@pytest.mark.parametrize("name", ["lenet5", pytest.param("googlenet", marks=pytest.mark.slow), "mlp"])
def test_networks_with_gates_shrink_from_what_they_are(name):
    model, x = make(name).eval(), inputs(name, 16)
    x = x.flatten(1) if name == "mlp" else x
    now = count(model, x[:1]).compacted_parameters
    small = sparsereg.shrink(model, x, target_sparsity=0.4)
    assert 0.5 * now <= count(small, x[:1]).parameters <= 0.6 * now


@pytest.mark.slow
def test_a_transformer_and_its_file(tmp_path):
    torch.manual_seed(0)
    model = ViT(4, (1, 8, 8), 4).eval()
    x = torch.randn(32, 1, 8, 8)
    small = sparsereg.shrink(model, x, target_macs=0.6)
    path = save_compacted(small, tmp_path / "small.pt")
    assert is_compacted(path)
    assert torch.equal(load_compacted(path)(x), small(x))
    smaller = sparsereg.shrink(small, x, target_macs=0.5)
    assert count(smaller, x[:1]).macs <= 0.3 * count(model, x[:1]).macs


def test_units_of_one_example_have_an_order_where_the_processor_takes_tiny_numbers_for_zero():
    torch.set_flush_denormal(True)
    try:
        small = sparsereg.shrink(net(), X[:1], target_macs=0.5)
        small(X[:2])
    finally:
        torch.set_flush_denormal(False)


def test_small_batches_are_put_together_and_others_stay():
    small = list(torch.arange(24.0 * AT_ONCE).view(-1, 8).split(64))
    found = together(small)
    assert torch.equal(torch.cat(found), torch.cat(small))
    assert [len(x) for x in found[:-1]] == [AT_ONCE] * (len(found) - 1)
    for alike in (torch.zeros(2, NUMBERS), torch.zeros(4, 8).long(), (torch.zeros(4, 8),)):
        assert len(together([alike, alike])) == 2
    assert len(together([torch.zeros(4, 8), torch.zeros(4, 9)])) == 2


class Two(nn.Module):
    """Two layers that read the same; what the second one says is most of the answers' spread."""

    def __init__(self):
        super().__init__()
        self.body, self.one, self.two = nn.Linear(8, 12), nn.Linear(12, 3), nn.Linear(12, 2)

    def forward(self, x):
        h = self.body(x).relu()
        return torch.cat([self.one(h), 3 * self.two(h)], 1)


def orders_of(model):
    network = opened_(sparsereg.gate(model, X[:1]).eval())
    structure, small = structure_of(network, (X[:1],), {}), compact(network, X[:1])
    slopes = {p: torch.ones_like(g.log_alpha) for p, g in hard_concretes(network).items()}
    return [torch.cat(list(o.values())) for o in leftover(small, structure, [X], [X], slopes)[0]]


def test_layers_that_read_the_same_say_together_which_unit_they_or_the_answers_miss_least():
    torch.manual_seed(3)
    model = Two().eval()
    with torch.no_grad():
        h = model.body(X).relu().double()
        shares, moves = torch.zeros(2, 12, dtype=torch.float64)
        for unit in range(12):
            rest = torch.cat([h[:, torch.arange(12) != unit], torch.ones(len(X), 1)], 1)
            for layer, times in ((model.one, 1), (model.two, 3)):
                y = h @ layer.weight.double().T
                left = (y - rest @ torch.linalg.lstsq(rest, y).solution).square().sum()
                shares[unit] += left / (y - y.mean(0)).square().sum()
                moves[unit] += times**2 * left
    by_shares, by_answers = orders_of(model)
    assert int(by_shares.argmin()) == int(shares.argmin())
    assert int(by_answers.argmin()) == int(moves.argmin())
    assert shares.argmin() != moves.argmin()


def test_another_order_is_taken_only_where_it_is_clearly_better(monkeypatch):
    network = opened_(sparsereg.gate(net(), X[:1]).eval())
    ranked = Ranked(network, X[:1], "parameters", [X])
    cases = [
        (0.5, 0.46, 0, None),
        (0.5, 0.45, 1, 1),
        (0.45, 0.5, 0, 0),
        (0.0, 0.0, 0, None),
        (0.1, 0.0, 1, 1),
    ]
    for *left, taken, known in cases:
        monkeypatch.setattr("sparsereg.compression.oneshot.ranked.unexplained", lambda *_, left=left: [*left])
        assert ranked._nearest(found_by(network, 0, 1)) == taken
        assert ranked.order == known
    spared = [
        ((0, 0, 1, 1), (0.5, 0.48, 0.3, 0.2), 3, 1),
        ((0, 0, 1, 1), (0.5, 0.2, 0.3, 0.28), 1, 0),
        ((0, 0, 1), (0.5, 0.2, 0.21), 1, None),
        ((1, 1), (0.5, 0.2), 1, None),
    ]
    for ways, left, taken, known in spared:
        monkeypatch.setattr("sparsereg.compression.oneshot.ranked.unexplained", lambda *_, left=left: [*left])
        assert ranked._nearest(found_by(network, *ways)) == taken
        assert ranked.order == known


def found_by(network, *ways):
    """What was found in some orders, all of it the same network."""
    return [_Found(way, 0.5, [], Student(network, {})) for way in ways]


@pytest.mark.costly
def test_units_that_no_layer_sums_over_stay_where_the_answers_say_so(monkeypatch):
    torch.manual_seed(0)
    model = ViT(4, (1, 8, 8), 4, Shape(width=16, depth=3, heads=2)).eval()
    images = torch.randn(64, 1, 8, 8)
    ranked = Ranked(opened_(sparsereg.gate(model, images[:1])), images[:1], "parameters", [images], order=0)
    unseen = torch.cat(list(ranked._unseen))
    assert 0 < int(unseen.sum()) < len(unseen)
    gone = []
    for second in (2.0, 0.5):
        monkeypatch.setattr(
            "sparsereg.compression.oneshot.ranked.unexplained", lambda *_, second=second: [1.0, second]
        )
        network, small = ranked.smaller(0.3)
        shut = torch.cat([g.log_alpha.flatten() < 0 for g in hard_concretes(network).values()])
        gone.append(int((shut & unseen).sum()))
        assert sum(p.numel() for p in small.parameters()) <= 0.3 * ranked.sizes["parameters"]
    assert gone[0] > gone[1]


@pytest.mark.parametrize("order", [0, 1])
def test_an_order_that_is_known_to_be_better_is_the_only_one(order):
    network = opened_(sparsereg.gate(net(), X[:1]).eval())
    both = Ranked(network, X[:1], "parameters", [X])
    one = Ranked(network, X[:1], "parameters", [X], order=order)
    assert len(both._orders) == 2
    assert len(one._orders) == 1
    assert all(map(torch.equal, one._orders[0], both._orders[order]))
    one.smaller(0.5)
    assert one.order == order


@pytest.mark.costly
@pytest.mark.parametrize("repair", [True, False])
def test_of_two_orders_the_one_is_taken_whose_answers_are_nearer(monkeypatch, repair):
    model, found = net(), {}
    for name in ("both", "turned", "first", "second"):

        def some(*given, name=name):
            (first, second), _ = leftover(*given)
            second = {path: -order for path, order in second.items()}  # what is missed most goes first
            kinds = {"both": [first, second], "turned": [second, first], "first": [first], "second": [second]}
            return kinds[name], None

        monkeypatch.setattr("sparsereg.compression.oneshot.ranked.leftover", some)
        found[name] = sparsereg.shrink(model, X, target_macs=0.5, repair=repair)(X).detach()
    assert torch.equal(found["both"], found["first"])
    assert torch.equal(found["turned"], found["first"])
    errors = [(found[name] - model(X).detach()).square().mean() for name in ("first", "second")]
    assert errors[0] < 0.5 * errors[1]


def test_inputs_are_spread_over_sorted_data():
    data = torch.arange(1000.0).view(-1, 1)
    for given in (data, DataLoader(TensorDataset(data, data), 7)):
        batches = read_inputs(nn.Linear(1, 1), given, 100, 64)
        assert torch.cat(batches).flatten().tolist() == list(range(0, 1000, 10))
        assert max(len(b) for b in batches) <= 64


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "give one of target_sparsity, target_macs and target_latency_ms, got none"),
        ({"target_macs": 0.5, "target_sparsity": 0.5}, "got target_sparsity and target_macs"),
        ({"target_macs": 0.5, "num_inputs": 0}, "num_inputs must be an integer >= 1, got 0"),
        ({"target_macs": 0.5, "batch": 8}, "batch=8 says how target_latency_ms is measured: give that, too"),
        ({"target_latency_ms": 1, "runtime": "tvm"}, "got 'tvm'"),
        ({"target_latency_ms": 1, "runtime": "eager", "round_to": 8}, "leave round_to out"),
        ({"target_macs": 1.5}, r"target_macs must be a share in \(0, 1\), got 1.5"),
        ({"target_macs": True}, "must be a share"),
        ({"target_macs": 0.5, "importance": "gradiant"}, "importance must be one of"),
        ({"target_macs": 0.5, "families": "heads"}, "nothing of heads"),
    ],
)
def test_wrong_arguments(settings, said):
    with pytest.raises(ValueError, match=said):
        sparsereg.shrink(net(), X, **settings)


class Scaled(nn.Module):
    """Cannot do without its second input."""

    def __init__(self) -> None:
        super().__init__()
        self.body = net()

    def forward(self, x, scale):
        return self.body(x * scale)


SAME = {
    "an array": lambda: (net(), X.numpy()),
    "an array of double precision": lambda: (net(), X.double().numpy()),
    "arrays with labels": lambda: (net(), (X.numpy(), torch.zeros(200).long().numpy())),
    "a dataset": lambda: (net(), TensorDataset(X, torch.zeros(200))),
    "a list of a batch and its labels": lambda: (net(), [X, torch.zeros(200).long()]),
}


@pytest.mark.parametrize("data", SAME)
def test_arrays_and_datasets_are_what_tensors_are(data):
    model, given = SAME[data]()
    assert torch.equal(torch.cat(read_inputs(model, given, 300, 64)), X)


@pytest.mark.parametrize("wrap", [lambda x, y: [x, y], lambda x, y: [[x, y]], TensorDataset])
def test_what_forward_cannot_do_without_is_an_input(wrap):
    batches = read_inputs(Scaled(), wrap(X, X + 1), 300, 300)
    assert [tuple(map(torch.Tensor.tolist, b)) for b in batches] == [(X.tolist(), (X + 1).tolist())]


@pytest.mark.parametrize(("second", "said"), [(X, True), (torch.zeros(200).long(), False)])
def test_numbers_that_forward_might_take_are_said_to_be_left_out(second, said, caplog):
    assert torch.equal(torch.cat(read_inputs(Named(), [[X, second]], 300, 300)), X)
    assert ("if it is scale of forward" in caplog.text) == said


@pytest.mark.costly
def test_milliseconds_are_met_by_measuring(monkeypatch):
    told = {}

    def budget(accountant, example, target, **how):
        told.update(how, target=target)
        cost = Megabytes(accountant, example, batch=1)  # counted: the same each time
        return MeasuredBudget(accountant, cost, target, example)

    monkeypatch.setattr(pruning, "latency_budget", budget)
    how = {"runtime": "eager", "threads": 2, "batch": 3}
    small = sparsereg.shrink(net(), X, target_latency_ms=0.004, **how)
    assert told == {**how, "target": 0.004, "shares": ()}
    left = 4e-6 * sum(p.numel() for p in small.parameters()) + peak_megabytes(small, X[:1])
    assert 0.96 * 0.004 <= left <= 0.004  # a unit is up to 3 % of it
    # Repaired as ever: other weights than those that the network has.
    assert not torch.isin(small.get_parameter("4.weight"), net().get_parameter("4.weight")).all()


def test_next_to_nothing_left_is_said(caplog):
    sparsereg.shrink(net(), X, target_macs=0.5)
    assert "keeps little" not in caplog.text
    sparsereg.shrink(net(), X, target_macs=0.02)
    assert "keeps little of what the network says" in caplog.text


@pytest.mark.parametrize("asked", [{"target_macs": 0.001}, {"target_sparsity": 0.999}])
def test_less_than_what_units_leave_is_refused(asked):
    with pytest.raises(InputError, match="cannot be met: with every gate shut"):
        sparsereg.shrink(net(), X, **asked)


@pytest.mark.parametrize(("data", "said"), [([], "no inputs"), (3, "got a int"), (["a"], "got a str")])
def test_wrong_data(data, said):
    with pytest.raises(InputError, match=said):
        sparsereg.shrink(net(), data, target_macs=0.5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_inputs_that_give_no_numbers_are_named(bad):
    broken = X.clone()
    broken[150, 2] = bad
    with pytest.raises(InputError, match="answers NaN to batch 0 of the inputs"):
        sparsereg.shrink(net(), broken, target_macs=0.5)


@pytest.mark.parametrize("other", [torch.randn(9, 7), {"x": X[:9]}])
def test_a_batch_that_the_network_does_not_take_is_named(other):
    with pytest.raises(
        InputError, match="Sequential does not take batch 1, whose shapes or types are not those"
    ):
        sparsereg.shrink(net(), [X[:9], other], target_macs=0.5)
