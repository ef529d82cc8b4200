"""Networks that run the same operations: what is made for one serves the other with its own weights."""

import copy
from typing import Any

import pytest
import torch
from torch import fx, nn

import sparsereg
from sparsereg.compression import compact, fuse, refill
from sparsereg.compression.alike import alike, operations
from sparsereg.compression.deploy import TOLERANCE
from sparsereg.compression.oneshot.ranked import opened_
from sparsereg.compression.timing.runtimes import Loaders
from sparsereg.compression.units import tracing
from sparsereg.compression.verify import difference
from sparsereg.model.gpt import GPT
from sparsereg.model.transformer import Shape
from sparsereg.model.vit import ViT
from sparsereg.penalties import hard_concretes

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def network(width: int, **settings) -> fx.GraphModule:
    convolution = nn.Conv2d(3, width, 3, padding=1, **settings)
    layers = convolution, nn.BatchNorm2d(width), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    return fx.symbolic_trace(nn.Sequential(*layers, nn.Linear(width, 4)).eval())


class Folded(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, x):
        return x.reshape(-1, 2, self.width // 2).transpose(1, 2).reshape(-1, self.width)


def test_only_sizes_of_weights_may_differ():
    assert alike(network(6), network(5))
    assert alike(network(6), copy.deepcopy(network(6)))
    assert not alike(network(6), network(6, stride=2))
    assert not alike(network(6), network(6, bias=False))
    assert not alike(network(6), network(6).double())


@pytest.mark.parametrize("told", [nn.LayerNorm, nn.RMSNorm, Folded], ids=lambda layer: layer.__name__)
def test_sizes_that_operations_are_told_may_differ_in_files_and_not_in_traces(told):
    one, other = (
        compact(nn.Sequential(nn.Linear(3, n), told(n), nn.Linear(n, 2)).eval(), torch.randn(2, 3))
        for n in (4, 6)
    )
    assert alike(one, other)
    assert operations(one) != operations(other)
    assert operations(one) == operations(copy.deepcopy(one))


def smaller(model: nn.Module, shut: int) -> fx.GraphModule:
    """What is left when so many gates of each layer are shut."""
    gated = opened_(sparsereg.gate(model, X[:1]).eval())
    with torch.no_grad():
        for gates in hard_concretes(gated).values():
            gates.log_alpha[:shut] = -10.0
    return compact(gated, X[:1])


def small_vit() -> tuple[nn.Module, torch.Tensor]:
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return sparsereg.gate(ViT(3, (1, 8, 8), 4, Shape(width=16, depth=2, heads=2)).eval(), x), x


def small_gpt() -> tuple[nn.Module, torch.Tensor]:
    x = torch.randint(0, 20, (2, 6), generator=torch.Generator().manual_seed(0))
    return sparsereg.gate(GPT(20, 6, Shape(width=16, depth=2, heads=2)).eval(), x), x


def shaken_(gated: nn.Module, shut: int) -> nn.Module:
    """Other weights, as training brings, and so many units shut in each group but of heads and blocks."""
    generator = torch.Generator().manual_seed(shut)
    with torch.no_grad():
        for weight in gated.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator) / 4)
        for gates in hard_concretes(gated).values():
            gates.log_alpha.fill_(20.0)[: shut if len(gates.log_alpha) > 2 else 0] = -20.0
    return gated


def plain() -> nn.Sequential:
    torch.manual_seed(0)
    one, two = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 10, 3)
    middle = nn.ReLU(), two, nn.BatchNorm2d(10), nn.ReLU(), nn.MaxPool2d(6)
    # Of one place only: what pools it to one place is a table of channels if nobody takes care.
    last = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(10, 4)
    return nn.Sequential(one, nn.BatchNorm2d(12), *middle, *last).eval()


def test_a_network_from_a_compacted_one_is_not_traced_again(monkeypatch):
    traced = []
    export = tracing._export
    monkeypatch.setattr(tracing, "_export", lambda *given: traced.append(1) or export(*given))
    first = smaller(plain(), 3)
    second = smaller(first, 2)
    traced.clear()
    with torch.no_grad():
        for weight in second.parameters():
            weight.mul_(1.5)  # as training changes them
    third = smaller(second, 2)
    assert not traced
    del second.meta[tracing.BEFORE]
    anew = smaller(second, 2)
    assert traced
    assert sum(p.numel() for p in third.parameters()) < sum(p.numel() for p in second.parameters())
    assert third.code == anew.code
    assert torch.equal(third(X), anew(X))


TRANSFORMERS = {
    "vit": (lambda: ViT(4, (3, 8, 8), 4, Shape(width=24, depth=2, heads=2)), X),
    "gpt": (lambda: GPT(16, 8, Shape(width=24, depth=2, heads=2)), torch.arange(16).view(2, 8)),
    "rms": (lambda: GPT(16, 8, Shape(width=24, depth=2, heads=2, norm="rms")), torch.arange(16).view(2, 8)),
}


def narrower(model: nn.Module, x: torch.Tensor) -> fx.GraphModule:
    """A network with fewer places in heads, hidden units and width."""
    gated = opened_(sparsereg.gate(model, x[:1], families=("units", "width", "head_dims")).eval())
    for gate in hard_concretes(gated).values():
        nn.init.constant_(gate.log_alpha[:2], -10.0)
    return compact(gated, x[:1])


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_a_transformer_from_a_compacted_one_is_not_traced_again(monkeypatch, name):
    torch.manual_seed(0)
    make, x = TRANSFORMERS[name]
    traced = []
    export = tracing._export
    monkeypatch.setattr(tracing, "_export", lambda *given: traced.append(1) or export(*given))
    second = narrower(narrower(make().eval(), x), x)
    before = second.meta[tracing.BEFORE].analysis.program
    assert before.said != operations(second)
    traced.clear()
    third = narrower(second, x)
    assert not traced
    told = third.meta[tracing.BEFORE].analysis.program
    del second.meta[tracing.BEFORE]
    anew = narrower(second, x)
    assert traced
    own = anew.meta[tracing.BEFORE].analysis.program
    assert third.code == anew.code
    assert torch.equal(third(x), anew(x))
    for mine, theirs in zip(told.graph.nodes, own.graph.nodes, strict=True):
        sizes = [[str(v.shape) for v in values_of(node)] for node in (mine, theirs)]
        assert sizes[0] == sizes[1]
        assert mine.target == theirs.target or mine.op == "placeholder"
    fourth = narrower(third, x)  # from a program that was made so itself
    assert sum(p.numel() for p in fourth.parameters()) < sum(p.numel() for p in third.parameters())
    torch.testing.assert_close(fourth(x), narrower(anew, x)(x))


def values_of(node: fx.Node) -> list[torch.Tensor]:
    leaves = torch.utils._pytree.tree_leaves(node.meta.get("val"))
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


@pytest.mark.parametrize("change", ["alike", "known"])
def test_sizes_that_do_not_follow_one_by_one_are_traced_anew(monkeypatch, change):
    torch.manual_seed(0)
    make, x = TRANSFORMERS["vit"]
    second = narrower(narrower(make().eval(), x), x)
    before = second.meta[tracing.BEFORE].analysis.program
    given = (before, second, (x[:1],), {})
    assert tracing._with_other_weights(*given) is not None
    if change == "alike":
        before.alike = None
    else:
        monkeypatch.setattr(tracing, "tell_sizes_", lambda *programs: False)
    assert tracing._with_other_weights(*given) is None


@pytest.mark.costly
@pytest.mark.parametrize("change", ["operation", "example"])
def test_another_network_is_traced_anew(monkeypatch, change):
    second = smaller(smaller(plain(), 3), 2)
    before = second.meta[tracing.BEFORE].analysis.program
    assert tracing._with_other_weights(before, second, (X[:1],), {}) is not None
    if change == "operation":
        second.get_submodule("1").eps = 0.1
        assert tracing._with_other_weights(before, second, (X[:1],), {}) is None
    else:
        assert tracing._with_other_weights(before, second, (X[:1, :, :7],), {}) is None


@pytest.fixture
def written(monkeypatch) -> list[Any]:
    """One entry for each file that is written and not made from another one."""
    pytest.importorskip("onnxruntime")
    written: list[Any] = []
    write = refill.write_onnx
    monkeypatch.setattr(refill, "write_onnx", lambda *given: written.append(given) or write(*given))
    return written


def runs_as(network: nn.Module, loaders: Loaders, x: torch.Tensor) -> bool:
    """Whether the file that is timed answers as the network."""
    loaded = loaders.load(network, "onnxruntime")
    (answer,) = loaded.tensors(loaded.run(loaded.prepare(x)))
    return difference(network(x), answer) < TOLERANCE


@pytest.mark.costly
def test_one_file_is_written_for_networks_that_are_alike(written):
    loaders = Loaders(X[:1], threads=1)
    first = smaller(plain(), 3)
    for net in (first, smaller(first, 2), network(7, stride=2)):
        assert runs_as(fuse(net), loaders, X)
    assert len(written) == 2  # the last one runs other operations


@pytest.mark.costly
@pytest.mark.parametrize("build", [small_vit, small_gpt])
def test_one_file_is_written_for_transformers_of_several_sizes(written, build, capfd):
    gated, x = build()
    loaders, before = Loaders(x[:1], threads=1), None
    for shut in (1, 2, 3):
        net = fuse(compact(shaken_(gated, shut), x))
        assert runs_as(net, loaders, x)
        if before is not None:
            loaders.forget(before)  # the next one is made of one that was made of another one
        before = net
    assert len(written) == 1
    assert "initializer" not in capfd.readouterr().err  # a runtime's warning about what nobody reads


@pytest.mark.costly
@pytest.mark.parametrize("wrong", ["_take_weights", "_take_sizes"])
def test_a_file_with_something_of_the_other_network_is_not_taken(written, monkeypatch, wrong):
    monkeypatch.setattr(refill, wrong, lambda *_: None)
    gated, x = small_vit()
    loaders = Loaders(x[:1], threads=1)
    for shut in (1, 2):
        assert runs_as(fuse(compact(shaken_(gated, shut), x)), loaders, x)
    assert len(written) == 2


@pytest.mark.costly
def test_files_are_also_written_of_numbers_that_numpy_does_not_know():
    pytest.importorskip("onnxscript")
    net = fx.symbolic_trace(nn.Sequential(nn.Linear(4, 3))).bfloat16().eval()
    assert refill.write(net, torch.ones(2, 4, 4, dtype=torch.bfloat16), any_length=False).content


@pytest.mark.costly
def test_a_file_that_gives_other_answers_is_written_anew(monkeypatch):
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(refill, "alike", lambda *_: True)
    loaders = Loaders(X[:1], threads=1)
    for net in (network(6), network(6, padding_mode="reflect")):
        assert runs_as(fuse(net), loaders, X)
