"""What ``import sparsereg`` offers and what it does not load; and that its names are l0-python's."""

import importlib
import inspect
import subprocess
import sys

import pytest
import torch
from torch import nn

import sparsereg

HEAVY = ("pytorch_lightning", "sklearn", "torchvision", "hydra", "pandas", "matplotlib", "numba")
MODULES = ("distributions", "layers", "gates", "penalties", "sparse", "calibration")


def test_import_is_light():
    code = (
        "import sys, sparsereg; assert 'torch' not in sys.modules; sparsereg.L0Linear; sparsereg.SampleGate;"
        "sparsereg.compute_l0_penalty; sparsereg.SparseL0Linear;"
        f"print([name for name in {HEAVY} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_exported_name_exists():
    for name in sparsereg.__all__:
        assert getattr(sparsereg, name).__name__ == name
        assert name in dir(sparsereg)
    assert sparsereg.layers.L0Linear is sparsereg.L0Linear
    with pytest.raises(AttributeError, match="no attribute 'L0Liner'"):
        sparsereg.L0Liner  # noqa: B018


SIGNATURES = {
    "HardConcrete": ["temperature", "stretch", "init_mean", "n_items", "input_dim", "output_dim"],
    "L0Linear": ["in_features", "out_features", "bias", "temperature", "init_sparsity", "use_l2"],
    "L0Conv2d": [
        *("in_channels", "out_channels", "kernel_size", "stride", "padding", "bias", "temperature"),
        *("init_sparsity", "structured", "use_l2"),
    ],
    "L0DepthwiseConv2d": [
        *("in_channels", "kernel_size", "stride", "padding", "bias", "temperature", "init_sparsity"),
    ],
    "SparseMLP": ["input_dim", "hidden_dim", "output_dim", "init_sparsity", "temperature", "use_l2"],
    "L0Gate": ["size", "temperature", "init_mean"],
    "SampleGate": ["n_samples", "target_samples", "temperature"],
    "FeatureGate": ["n_features", "max_features", "temperature"],
    "HybridGate": ["n_items", "l0_fraction", "random_fraction", "target_items", "temperature"],
    "TemperatureScheduler": ["initial_temp", "final_temp", "anneal_epochs", "schedule"],
    "SparseL0Linear": [
        *("n_features", "fit_intercept", "beta", "gamma", "zeta", "init_keep_prob", "device", "seed"),
    ],
    "compute_l0l2_penalty": ["model", "l0_lambda", "l2_lambda"],
    "prune_model": ["model", "threshold"],
}
"""Arguments that published programs use, in their order."""


@pytest.mark.parametrize("name", SIGNATURES)
def test_arguments_in_their_order(name):
    arguments = list(inspect.signature(getattr(sparsereg, name)).parameters)
    if name == "HardConcrete":
        assert set(SIGNATURES[name]) <= set(arguments)
    else:
        assert arguments[: len(SIGNATURES[name])] == SIGNATURES[name]


@pytest.fixture(scope="module")
def original():
    return pytest.importorskip("l0")


@pytest.mark.parametrize("module", MODULES)
def test_public_names_of_the_original(original, module):
    theirs = importlib.import_module(f"l0.{module}")
    ours = importlib.import_module(f"sparsereg.{module}")
    names = [
        n
        for n, value in vars(theirs).items()
        if getattr(value, "__module__", None) == theirs.__name__ and not n.startswith("_")
    ]
    assert names
    for name in names:
        a, b = getattr(theirs, name), getattr(ours, name)
        if inspect.isclass(a):
            public = {n for n in vars(a) if not n.startswith("_") and not n.isupper()}
            assert public <= set(dir(b)), f"{name}: {public - set(dir(b))}"
            a, b = a.__init__, b.__init__
        given = set(inspect.signature(a).parameters)
        assert given <= set(inspect.signature(b).parameters), name


def test_all_of_the_original_is_exported(original):
    assert set(original.__all__) <= set(sparsereg.__all__)


def test_outputs_are_those_of_the_original(original):
    """State dicts load, and where the original is right the eval outputs agree."""
    pairs = [
        (original.L0Linear(9, 4), sparsereg.L0Linear(9, 4), (9,)),
        (original.L0Conv2d(2, 3, 3, padding=1), sparsereg.L0Conv2d(2, 3, 3, padding=1), (2, 6, 6)),
        (
            original.L0Conv2d(2, 3, 3, bias=False, structured=True),
            sparsereg.L0Conv2d(2, 3, 3, bias=False, structured=True),
            (2, 6, 6),
        ),
        (
            original.L0DepthwiseConv2d(3, 3, bias=False),
            sparsereg.L0DepthwiseConv2d(3, 3, bias=False),
            (3, 6, 6),
        ),
        (original.SparseMLP(12, 5, 3), sparsereg.SparseMLP(12, 5, 3), (12,)),
    ]
    for theirs, ours, shape in pairs:
        with torch.no_grad():
            for name, parameter in theirs.named_parameters():
                if name.endswith("qz_logits"):
                    parameter.normal_(0, 2)
        ours.load_state_dict(theirs.state_dict())
        x = torch.randn(4, *shape)
        torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(
            sparsereg.compute_l0_penalty(ours), original.compute_l0_penalty(theirs), rtol=1e-5, atol=1e-5
        )


def test_temperatures_are_those_of_the_original(original):
    for schedule in ("linear", "exponential", "cosine"):
        theirs = original.TemperatureScheduler(2.0, 0.1, 50, schedule)
        ours = sparsereg.TemperatureScheduler(2.0, 0.1, 50, schedule)
        for epoch in (0, 1, 25, 49, 50, 99):
            assert ours.get_temperature(epoch) == pytest.approx(theirs.get_temperature(epoch))


def test_the_defects_are_in_the_original(original):
    """What test_sparse and test_gates rule out here is really there: else this list should be shorter."""
    gate = original.SampleGate(100, 10).eval()
    assert len(gate.select_samples(torch.zeros(100, 2))[1]) in (0, 100)
    net = original.L0Conv2d(1, 2, 3, structured=True)
    with torch.no_grad():
        net.bias.fill_(1.0)
        net.channel_gates.qz_logits.fill_(-30)
    assert (net.eval()(torch.zeros(1, 1, 3, 3)) == 1).all()
    assert original.penalties.compute_l0_penalty(nn.Linear(2, 2, device="meta")).device.type == "cpu"
