"""Networks that run the same operations: what is made for one serves the other with its own weights."""

import copy

import pytest
import torch
from torch import fx, nn

import sparsereg
from sparsereg.compression import compact, fuse
from sparsereg.compression.alike import alike
from sparsereg.compression.deploy import TOLERANCE
from sparsereg.compression.oneshot.ranked import opened_
from sparsereg.compression.timing.runtimes import Loaders
from sparsereg.compression.units import program as programs
from sparsereg.compression.verify import difference
from sparsereg.penalties import hard_concretes

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def network(width: int, **settings) -> fx.GraphModule:
    convolution = nn.Conv2d(3, width, 3, padding=1, **settings)
    layers = convolution, nn.BatchNorm2d(width), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    return fx.symbolic_trace(nn.Sequential(*layers, nn.Linear(width, 4)).eval())


class Reshaped(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.width, self.one, self.two = width, nn.Linear(6, width), nn.Linear(width, 2)

    def forward(self, x):
        return self.two(self.one(x).reshape(-1, self.width))


def test_only_sizes_of_weights_may_differ():
    assert alike(network(6), network(5))
    assert alike(network(6), copy.deepcopy(network(6)))
    assert not alike(network(6), network(6, stride=2))
    assert not alike(network(6), network(6, bias=False))
    assert not alike(network(6), network(6).double())
    # A width that an operation is told is no size of a weight alone.
    assert not alike(*(fx.symbolic_trace(Reshaped(width)) for width in (4, 3)))
    assert alike(*(fx.symbolic_trace(Reshaped(4)) for _ in range(2)))
    norms = (fx.symbolic_trace(nn.Sequential(nn.Linear(3, n), nn.LayerNorm(n))) for n in (4, 5))
    assert not alike(*norms)


def smaller(model: nn.Module, shut: int) -> fx.GraphModule:
    """What is left when so many gates of each layer are shut."""
    gated = opened_(sparsereg.gate(model, X[:1]).eval())
    with torch.no_grad():
        for gates in hard_concretes(gated).values():
            gates.log_alpha[:shut] = -10.0
    return compact(gated, X[:1])


def plain() -> nn.Sequential:
    torch.manual_seed(0)
    one, two = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 10, 3)
    middle = nn.ReLU(), two, nn.BatchNorm2d(10), nn.ReLU(), nn.MaxPool2d(6)
    # Of one place only: what pools it to one place is a table of channels if nobody takes care.
    last = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(10, 4)
    return nn.Sequential(one, nn.BatchNorm2d(12), *middle, *last).eval()


def test_a_network_from_a_compacted_one_is_not_traced_again(monkeypatch):
    traced = []
    export = programs._export
    monkeypatch.setattr(programs, "_export", lambda *given: traced.append(1) or export(*given))
    first = smaller(plain(), 3)
    second = smaller(first, 2)
    traced.clear()
    with torch.no_grad():
        for weight in second.parameters():
            weight.mul_(1.5)  # as training changes them
    third = smaller(second, 2)
    assert not traced
    del second.meta[programs.BEFORE]
    anew = smaller(second, 2)
    assert traced
    assert sum(p.numel() for p in third.parameters()) < sum(p.numel() for p in second.parameters())
    assert third.code == anew.code
    assert torch.equal(third(X), anew(X))


@pytest.mark.costly
@pytest.mark.parametrize("change", ["operation", "example"])
def test_another_network_is_traced_anew(monkeypatch, change):
    second = smaller(smaller(plain(), 3), 2)
    before = second.meta[programs.BEFORE].analysis.program
    assert programs._with_other_weights(before, second, (X[:1],), {}) is not None
    if change == "operation":
        second.get_submodule("1").eps = 0.1
        assert programs._with_other_weights(before, second, (X[:1],), {}) is None
    else:
        assert programs._with_other_weights(before, second, (X[:1, :, :7],), {}) is None


@pytest.mark.costly
def test_one_file_is_written_for_networks_that_are_alike(monkeypatch):
    pytest.importorskip("onnxruntime")
    written = []
    write = Loaders.onnx.__globals__["write_onnx"]
    monkeypatch.setitem(Loaders.onnx.__globals__, "write_onnx", lambda *a: written.append(1) or write(*a))
    loaders = Loaders(X[:1], threads=1)
    first = smaller(plain(), 3)
    for net in (first, smaller(first, 2), network(7, stride=2)):
        loaded = loaders.load(fused := fuse(net), "onnxruntime")
        (answer,) = loaded.tensors(loaded.run(loaded.prepare(X)))
        assert difference(fused(X), answer) < TOLERANCE
    assert len(written) == 2  # the last one runs other operations


@pytest.mark.costly
def test_a_file_that_gives_other_answers_is_written_anew(monkeypatch):
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr("sparsereg.compression.timing.runtimes.alike", lambda *_: True)
    loaders = Loaders(X[:1], threads=1)
    for net in (network(6), network(6, padding_mode="reflect")):
        loaded = loaders.load(fuse(net), "onnxruntime")
        (answer,) = loaded.tensors(loaded.run(loaded.prepare(X)))
        assert difference(net(X), answer) < TOLERANCE
