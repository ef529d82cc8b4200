"""Every kind of operation has all its parts, or stands here as lacking one."""

import inspect
from functools import cache

import pytest
import torch
from torch import nn

from sparsereg.compression import compact, load_compacted, save_compacted
from sparsereg.compression import vocabulary as words
from sparsereg.compression.shrink import Live
from sparsereg.compression.units.flow import flow_of
from sparsereg.compression.units.rules import RULES
from sparsereg.compression.units.steps import follow, pairs, table
from sparsereg.compression.units.steps.single import Take
from sparsereg.compression.verify import difference
from sparsereg.model.basic_l0_blocks import L0Gate
from tests.compression.networks import NETWORKS, make, set_gates


def kinds(cls=table.Step):
    yield cls
    for kind in cls.__subclasses__():
        yield from kinds(kind)


KINDS = set(kinds()) - {table.Step, table.Along, pairs.Pair}
KEEPS_ALL = {table.Whole, table.Result}
"""What has no rule: constants end there, and everything in front of it is needed."""
LACKING = {
    "constants": KEEPS_ALL | {table.Source},
    "needs": KEEPS_ALL | {table.Source},
    "chances": KEEPS_ALL | {table.Source},
    "writing": KEEPS_ALL | {table.Source, Take},  # a choice of positions is written where they are read
    "shrinking": KEEPS_ALL | {table.Source, pairs.Over},
}


def test_no_kind_is_unknown_to_this_test():
    names = " ".join(sorted(kind.__name__ for kind in KINDS))
    assert names == "Add Gate Mixing Mul Norm Over Result Single Slopes Source Take Whole"


@pytest.mark.parametrize("kind", sorted(KINDS, key=lambda k: k.__name__), ids=lambda k: k.__name__)
def test_every_kind_has_all_its_parts(kind):
    parts = {
        "constants": kind.forward is not table.Step.forward,
        "needs": kind.needs is not table.Step.needs,
        "chances": kind.alive is not table.Step.alive,
        "writing": kind.write is not table.Step.write,
        "shrinking": kind in shrinks(),
    }
    for part, there in parts.items():
        assert there != (kind in LACKING[part]), f"{kind.__name__}: {part}"


@cache
def traced():
    """All operations of all networks of the tests that a network's author has put gates into."""
    found = []
    for name in ("googlenet", "lenet5", "mlp", "layers", "functional", "residual", "grouped"):
        network, x = make(name)
        found.append(Live(flow_of(network, (x,), {}), network))
    return found


def shrinks():
    """Kinds of which some are cut down while training."""
    return {type(step) for live in traced() for step in live.steps if step.number not in live.fixed}


def test_the_networks_of_the_tests_have_every_kind():
    found = {type(step) for live in traced() for step in live.steps}
    assert KINDS - found <= {pairs.Over}
    assert set(NETWORKS) >= {"googlenet", "functional", "residual", "grouped"}


def test_every_operation_that_is_followed_can_be_kept_in_a_file():
    known = {name.split(".")[1] for name in words.FUNCTIONS if name.startswith("aten.")}
    for name in follow.FOLLOW:
        if hasattr(torch.ops.aten, name):
            assert name in known, name


def test_operations_without_rules_are_operations_that_nothing_else_lists():
    for name in words._WITHOUT_RULES:
        assert f"aten.{name}" in {function.rpartition(".")[0] for function in words.FUNCTIONS}, name
        assert name not in RULES
        assert name not in words._MAKERS
    assert len(set(words._WITHOUT_RULES)) == len(words._WITHOUT_RULES)


def test_every_move_has_its_rule():
    for name, kind in follow.FOLLOW.items():
        assert kind is not follow.move or name in RULES, name


CHANNELWISE = (
    *(nn.ReLU, nn.LeakyReLU, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d),
    *(nn.AvgPool3d, nn.LPPool1d, nn.LPPool2d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d),
    *(nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d, nn.Upsample),
    *(nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d, nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d),
    *(nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReLU6),
    *(nn.Hardtanh, nn.GELU, nn.Tanh, nn.Sigmoid, nn.SiLU, nn.ELU, nn.CELU, nn.SELU, nn.Mish, nn.Softplus),
    *(nn.Softsign, nn.Softshrink, nn.Hardshrink, nn.Hardswish, nn.Hardsigmoid, nn.LogSigmoid),
    *(nn.Tanhshrink, nn.Threshold, nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d, nn.Identity),
    *(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout),
)
"""Modules that treat channels apart."""
BORDERED = (nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d)


def channelwise():
    """One example of each module that treats channels apart, with the dimensions that it takes."""
    arguments = {
        **{f"{pool}Pool{d}d": (2,) for pool in ("Max", "Avg") for d in (1, 2, 3)},
        **{f"LPPool{d}d": (2, 2) for d in (1, 2)},
        **{f"Adaptive{pool}Pool{d}d": (2,) for pool in ("Avg", "Max") for d in (1, 2, 3)},
        **{f"{pad}Pad{d}d": (1,) for pad in ("Zero", "Reflection", "Replication") for d in (1, 2, 3)},
        **{f"ConstantPad{d}d": (1, 0.5) for d in (1, 2, 3)},
        **dict.fromkeys(("Upsample", "UpsamplingNearest2d", "UpsamplingBilinear2d"), (None, 2)),
        "Threshold": (0.1, 0.2),
    }
    for cls in CHANNELWISE:
        name = cls.__name__
        rank = int(name[-2]) if name[-1] == "d" and name[-2].isdigit() else 2
        yield pytest.param(cls, arguments.get(name, ()), rank, id=name)


@pytest.mark.costly
@pytest.mark.parametrize(("cls", "arguments", "rank"), list(channelwise()))
def test_every_module_on_channels_is_compacted_and_kept_in_a_file(cls, arguments, rank, tmp_path):
    torch.manual_seed(0)
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1]
    network = nn.Sequential(conv(2, 6, 1), L0Gate(6), cls(*arguments), conv(6, 2, 1)).eval()
    set_gates(network, "mixed")
    x = torch.randn(2, 2, *(4,) * rank)
    smaller = compact(network, x)
    # A border of another number shows that a channel is closed, so it stays.
    assert (smaller.get_submodule("3").in_channels < 6) != (cls in BORDERED)
    assert difference(network(x), smaller(x)) < 1e-5
    loaded = load_compacted(save_compacted(smaller, tmp_path / "c.pt"))
    assert torch.equal(loaded(x), smaller(x))


def test_every_argument_of_the_functions_and_layers_on_the_lists_has_a_name_on_the_list():
    known = words.KEYWORDS | {"self"}
    for name, function in words.FUNCTIONS.items():
        try:
            signature = inspect.signature(function)
        except ValueError:  # most built-in functions tell none
            continue
        assert named(signature) <= known | {"out", "x"}, name
    for name in words.CLASSES:
        assert named(inspect.signature(getattr(nn, name).forward)) <= known | {"x"}, name


def named(signature):
    """Arguments that can be given by name."""
    return {p.name for p in signature.parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD}
