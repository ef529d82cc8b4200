"""Repair: what the kept units can say is said again, and shapes stay those of compact()."""

import copy

import pytest
import torch
from torch import nn

from sparsereg.compression import compact, gate
from sparsereg.compression.oneshot.inputs import some_of
from sparsereg.compression.oneshot.least_squares import Sums, solve
from sparsereg.compression.oneshot.origins import OPEN, Origins
from sparsereg.compression.oneshot.readers import readers
from sparsereg.compression.oneshot.repair import enough, repaired
from sparsereg.penalties import hard_concretes
from tests.nets import inputs, make


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


class Addmm(nn.Module):
    """A linear layer that stores its weight the other way round."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs, generator=rng(3)) / inputs**0.5)
        self.bias = nn.Parameter(torch.randn(outputs, generator=rng(4)))

    def forward(self, x):
        return torch.addmm(self.bias, x, self.weight)


def linear():
    return nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 5)), torch.randn(256, 6, generator=rng())


def addmm():
    return nn.Sequential(Addmm(6, 12), nn.Tanh(), Addmm(12, 5)), torch.randn(256, 6, generator=rng())


def convolutions():
    net = nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(12, 6, 3, stride=2, padding=1, padding_mode="reflect", bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 4),
    )
    return net, torch.randn(64, 3, 8, 8, generator=rng())


def series():
    net = nn.Sequential(nn.Conv1d(3, 12, 3), nn.ReLU(), nn.Conv1d(12, 6, 3, dilation=2, padding="same"))
    return net, torch.randn(64, 3, 16, generator=rng())


NETS = {"linear": linear, "addmm": addmm, "convolutions": convolutions, "series": series}


def halved(net, x, twins):
    """A network whose first layer makes 12 units, in pairs of twins or not, and the same without 6."""
    first = net[0]
    with torch.no_grad():
        out = 1 if isinstance(first, Addmm) else 0
        for p in (first.weight, first.bias):
            own = p.movedim(min(out, p.dim() - 1), 0)
            own[6:] = own[:6] if twins else own[6:]
    whole = gate(net.eval(), x[:1])
    with torch.no_grad():
        for g in hard_concretes(whole).values():
            g.log_alpha.fill_(OPEN)
    half = copy.deepcopy(whole)
    first = next(g for g in hard_concretes(half).values() if g.log_alpha.numel() == 12)
    with torch.no_grad():
        first.log_alpha[6:] = -OPEN
    return whole, half


def error(a, b, x):
    with torch.no_grad():
        return float((a(x) - b(x)).square().mean() / b(x).var())


@pytest.fixture(autouse=True)
def weights():
    """The networks' initial weights are drawn from the global generator."""
    torch.manual_seed(0)


@pytest.mark.parametrize("name", NETS)
def test_what_the_kept_units_can_say_is_said_again(name):
    net, x = NETS[name]()
    whole, half = halved(net, x, twins=True)
    bare = error(compact(half, x[:1]), whole, x)
    assert error(repaired(whole, half, x[:1], [x[:40], x[40:]]), whole, x) < 0.01 * bare


@pytest.mark.parametrize("name", NETS)
def test_what_they_cannot_say_is_said_better_to_new_inputs(name):
    net, x = NETS[name]()
    whole, half = halved(net, x, twins=False)
    small = repaired(whole, half, x[:1], [x])
    new = torch.randn(x.shape, generator=rng(1))
    assert error(small, whole, new) < 0.7 * error(compact(half, x[:1]), whole, new)
    shapes = {k: v.shape for k, v in compact(half, x[:1]).state_dict().items()}
    assert {k: v.shape for k, v in small.state_dict().items()} == shapes


def test_it_does_the_same_with_little_memory(monkeypatch):
    net, x = convolutions()
    whole, half = halved(net, x, twins=False)
    kept = repaired(whole, half, x[:1], [x[:32], x[32:]])
    monkeypatch.setattr("sparsereg.compression.oneshot.repair.MEMORY", 0)
    anew = repaired(whole, half, x[:1], [x[:32], x[32:]])
    for a, b in zip(kept.state_dict().values(), anew.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.costly
@pytest.mark.parametrize("name", ["lenet300", "lenet5", pytest.param("googlenet", marks=pytest.mark.slow)])
def test_gates_of_the_author_s_own(name):
    before, x = make(name).eval(), inputs(name, 48)
    with torch.no_grad():
        for g in hard_concretes(before).values():
            g.log_alpha.fill_(OPEN)
    after = copy.deepcopy(before)
    with torch.no_grad():
        for g in hard_concretes(after).values():
            g.log_alpha[torch.rand(g.log_alpha.shape, generator=rng()) < 0.3] = -OPEN
    small, bare = repaired(before, after, x[:1], [x]), compact(after, x[:1])
    assert error(small, before, x) < 0.5 * error(bare, before, x)


def test_too_few_inputs_change_nothing(caplog):
    net, x = linear()
    whole, half = halved(net, x, twins=False)
    assert torch.equal(repaired(whole, half, x[:1], [x[:7]])(x), compact(half, x[:1])(x))
    assert "8 inputs or more" in caplog.text


def test_weights_that_two_layers_share_are_left_alone():
    net = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2))
    net[2] = net[0]
    found = readers(compact(net.eval(), torch.ones(1, 6)))
    assert [reader.weight for reader in found] == ["4.weight"]


def test_origins_are_the_open_gates():
    net, x = linear()
    whole, half = halved(net, x, twins=False)
    first = next(g for g in hard_concretes(half).values() if g.log_alpha.numel() == 12)
    with torch.no_grad():
        first.log_alpha[torch.tensor([0, 3, 7])] *= -1
    found = Origins(half, x[:1]).of(half)
    left = [1, 2, 4, 5, 7]
    assert found["0.weight"][0].tolist() == left
    assert found["2.weight"][1].tolist() == left
    assert found["2.weight"][0].tolist() == list(range(5))


def test_the_normal_equations_are_those_of_all_rows():
    x, w = torch.randn(1, 400, 7, generator=rng()).double(), torch.randn(1, 7, 3, generator=rng(1)).double()
    x[..., -1] = 1
    y = x @ w
    train, held = (Sums.none(1, 7, 3, x.device) for _ in range(2))
    train.add_(x[:, :200], y[:, :200])
    train.add_(x[:, 200:300], y[:, 200:300])
    held.add_(x[:, 300:], y[:, 300:])
    found = solve(train, held, torch.zeros_like(w), constant=True)
    torch.testing.assert_close(found, w, rtol=1e-4, atol=1e-4)
    assert held.error(w) == pytest.approx(0, abs=1e-9)
    assert solve(train, held, w, constant=True) is None  # nothing is better


def test_texts_need_fewer_examples_than_vectors():
    """Each of 64 tokens is a row, of a classifier's answer each example is one."""
    tokens, vectors = torch.randn(32, 64, 6, generator=rng()), torch.randn(32, 6, generator=rng())
    net, _ = linear()
    of_texts = enough(compact(net.eval(), tokens[:1]), [tokens] * 40)
    assert sum(map(len, of_texts)) == 2 * 8192 // 64
    assert len(enough(compact(net, vectors[:1]), [vectors] * 40)) == 40


def test_one_layer_that_sees_a_row_of_each_example_asks_for_all():
    net, x = convolutions()
    small = compact(net.eval(), x[:1])
    assert len(enough(small, [x] * 40)) == 40
    without_head = compact(net[:3], x[:1])
    assert sum(map(len, enough(without_head, [x] * 40))) == 2 * 8192 // 16


def test_some_batches_lie_among_all_of_them():
    """Data are often sorted by class: the first batches would be of the first ones."""
    batches = [torch.full((4, 2), float(i)) for i in range(10)]
    assert [int(b[0, 0]) for b in some_of(batches, 16)] == [0, 2, 5, 7]
    assert [int(b[0, 0]) for b in some_of(batches, 17)] == [0, 2, 4, 6, 8]
    assert len(some_of(batches, 1000)) == 10
