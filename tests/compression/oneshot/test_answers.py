"""What other answers leave unexplained: a share of the variance, up to a line for each number of them."""

import math

import pytest
import torch
from torch import nn

from sparsereg.compression.oneshot import answers
from sparsereg.compression.oneshot.answers import unexplained


class Says(nn.Module):
    """Sets of answers beside what is none: inputs with noise, times a factor, and a shift."""

    def __init__(self, noise=0.0, factor=1.0, shift=0.0, masked=None):
        super().__init__()
        self.noise, self.factor, self.shift, self.masked = noise, factor, shift, masked

    def forward(self, x):
        second = self.factor * (100 * x[:, 1:] + self.noise * 100 * x[:, :1].sin()) + self.shift
        if self.masked is not None:
            second[:, -1] = self.masked
        return {"a": x[:, 0] + self.shift, "b": (second, x.argmax(1)), "loss": x.mean()}


X = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
BATCHES = list(X.split(20))


def test_the_share_is_that_of_regressions_and_lines_cost_nothing(monkeypatch):
    noisy = X[:, 1:].double() + 0.5 * X[:, :1].double().sin()
    left = 0.0
    for wanted, given in zip(X[:, 1:].double().T, noisy.T, strict=True):
        line = torch.stack([given, torch.ones(64)], 1)
        left += float(
            (wanted - line @ torch.linalg.lstsq(line, wanted[:, None]).solution[:, 0]).square().sum()
        )
    share = left / float((X[:, 1:] - X[:, 1:].mean(0)).double().square().sum()) / 2  # of two sets
    for at_once in (answers.AT_ONCE, 7):
        monkeypatch.setattr(answers, "AT_ONCE", at_once)
        others = [Says(), Says(0.5), Says(0.5, 3.0), Says(0.5, -1.0, 50.0), Says(factor=0.0)]
        expected = [0.0, share, share, share, 0.5]
        assert unexplained(Says(), others, BATCHES) == pytest.approx(expected, rel=1e-4, abs=1e-9)


def test_inputs_of_several_sizes():
    network, other = nn.Sequential(nn.Identity()), nn.Sequential(nn.Hardtanh())
    batches = [X, X[:, :2]]
    each = [unexplained(network, [other], [batch])[0] for batch in batches]
    assert each[0] > 0
    assert unexplained(network, [other], batches) == pytest.approx([sum(each) / 2])


def test_answers_that_are_not_finite():
    masked = Says(masked=-math.inf)
    assert unexplained(masked, [masked, Says(masked=0.0)], BATCHES) == [0.0, 0.0]
    missing = unexplained(Says(), [masked, Says(masked=math.nan)], BATCHES)
    last = X[:, -1].double().var() / X[:, 1:].double().var(0).sum() / 2
    assert missing == pytest.approx([float(last)] * 2, rel=1e-4)


def test_constant_answers_one_example_and_none():
    class Constant(Says):
        def forward(self, x):
            return torch.full((len(x),), 2.1)

    class Class(Says):
        def forward(self, x):
            return x.argmax(1)

    assert unexplained(Constant(), [Constant()], BATCHES) == [0.0]
    assert unexplained(Says(), [Says(2.0)], [X[:1]]) == [0.0]
    assert unexplained(Class(), [Class(), Class()], BATCHES) == [0.0, 0.0]


def test_modes_are_put_back():
    networks = nn.Dropout(0.5).train(), nn.Dropout(0.5).train()
    assert unexplained(networks[0], [networks[1]], BATCHES) == pytest.approx([0.0])
    assert all(n.training for n in networks)
