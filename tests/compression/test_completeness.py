"""Every kind of operation has all its parts, or stands here as lacking one."""

import inspect
from functools import cache

import pytest
import torch
from torch import nn

from sparsereg.compression import compact, expected, graph, load_compacted, ops, save_compacted, shrink
from sparsereg.compression import vocabulary as words
from sparsereg.compression.compact import _BUILD
from sparsereg.compression.verify import difference
from sparsereg.layers import GatedLayer
from sparsereg.model.basic_l0_blocks import L0Gate
from tests.compression.networks import NETWORKS, make, set_gates


def kinds(cls=ops.Op):
    yield cls
    for kind in cls.__subclasses__():
        yield from kinds(kind)


KINDS = tuple(kinds())
KEEPS_ALL = {ops.Op, ops.Output}
"""What has no rule: constants end there, and everything in front of it is needed."""
SOURCES = {ops.Input, ops.Attribute}
"""What reads nothing."""
LACKING = {
    "constants": KEEPS_ALL | SOURCES,
    "needs": KEEPS_ALL | SOURCES,
    "rebuild": {ops.Input},  # made as a placeholder, before any other
    "shrinking": KEEPS_ALL | SOURCES,
}


def test_no_kind_is_unknown_to_this_test():
    names = " ".join(sorted(kind.__name__ for kind in KINDS))
    assert names == "Add Attribute Cat Gate Input Mixing Mul Norm Op Output PerChannel Reshape Slopes"
    assert len({kind.kind for kind in KINDS}) == len(KINDS)


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.__name__)
def test_every_kind_has_all_its_parts(kind):
    parts = {
        "constants": kind.forward is not ops.Op.forward,
        "needs": kind.needs is not ops.Op.needs,
        "rebuild": kind in _BUILD,
        "shrinking": kind in shrinks(),
    }
    for part, there in parts.items():
        assert there != (kind in LACKING[part]), f"{kind.__name__}: {part}"
    assert kind in expected._ALIVE
    assert kind in expected._ASK
    assert issubclass(kind, ops.Op)
    for cost in ("num_parameters", "num_macs", "num_constants"):
        assert callable(getattr(kind, cost))


@cache
def traced():
    """All operations of all networks of the tests."""
    return [
        op for name in sorted(set(NETWORKS) - {"densenet"}) for op in graph.trace(*make(name)).ops.values()
    ]


def shrinks():
    """Kinds of which some are cut down while training."""
    return {type(op) for op in traced() if not shrink._fixed(op)}


def test_the_networks_of_the_tests_have_every_kind():
    found = {type(op) for op in traced()}
    assert set(KINDS) - found <= {ops.Attribute, ops.Op}


def test_every_module_with_a_rule_can_be_kept_in_a_file():
    ours = (GatedLayer, L0Gate)
    for cls in graph.MODULES:
        if not issubclass(cls, ours):
            assert cls.__name__ in words.CLASSES, cls


def test_every_function_with_a_rule_can_be_kept_in_a_file():
    known = set(words.FUNCTIONS.values())
    for function in graph.FUNCTIONS:
        if isinstance(function, str):
            assert function in words.METHODS, function
        else:
            assert function in known, function


def test_what_replaces_writing_in_place_has_the_rule_of_what_it_replaces():
    for new in graph.IN_PLACE.values():
        assert new in graph.FUNCTIONS, new


def test_every_dropout_function_has_its_module():
    for function, module in graph.DROPOUT_FUNCTIONS.items():
        assert function in graph.FUNCTIONS
        assert module in graph.DROPOUT


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
    for cls in (*graph.HOMOGENEOUS, *graph.ELEMENTWISE, *graph.DROPOUT):
        name = cls.__name__
        rank = int(name[-2]) if name[-1] == "d" and name[-2].isdigit() else 2
        yield pytest.param(cls, arguments.get(name, ()), rank, id=name)


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
