"""One clear ValueError for each kind of wrong argument, in every public class that takes one of the kind."""

import math

import numpy as np
import pytest
import torch
from scipy import sparse

from sparsereg import (
    FeatureGate,
    HardConcrete,
    HybridGate,
    L0Conv2d,
    L0DepthwiseConv2d,
    L0Gate,
    L0Linear,
    SampleGate,
    SparseCalibrationWeights,
    SparseL0Linear,
    SparseMLP,
    TemperatureScheduler,
    prune_model,
    update_temperatures,
)

SIZES = {
    "HardConcrete": (HardConcrete, "the gate size"),
    "HardConcrete by name": (lambda v: HardConcrete(n_items=v), "gate size"),
    "L0Linear, in": (lambda v: L0Linear(v, 3), "in_features"),
    "L0Linear, out": (lambda v: L0Linear(3, v), "out_features"),
    "L0Conv2d, in": (lambda v: L0Conv2d(v, 3, 3), "in_channels"),
    "L0Conv2d, out": (lambda v: L0Conv2d(3, v, 3), "out_channels"),
    "L0Conv2d, kernel": (lambda v: L0Conv2d(3, 3, v), "kernel_size"),
    "L0Conv2d, stride": (lambda v: L0Conv2d(3, 3, 3, stride=v), "stride"),
    "L0DepthwiseConv2d": (lambda v: L0DepthwiseConv2d(v, 3), "in_channels"),
    "L0DepthwiseConv2d, kernel": (lambda v: L0DepthwiseConv2d(3, v), "kernel_size"),
    "L0DepthwiseConv2d, stride": (lambda v: L0DepthwiseConv2d(3, 3, stride=(1, v)), "stride"),
    "SparseMLP, in": (SparseMLP, "in_features"),
    "SparseMLP, hidden": (lambda v: SparseMLP(4, v), "out_features"),
    "SparseMLP, out": (lambda v: SparseMLP(4, 4, v), "out_features"),
    "L0Gate": (L0Gate, "size"),
    "SampleGate": (lambda v: SampleGate(v, 1), "n_samples"),
    "SampleGate, target": (lambda v: SampleGate(10, v), "target_samples"),
    "FeatureGate": (lambda v: FeatureGate(v, 1), "n_features"),
    "FeatureGate, target": (lambda v: FeatureGate(10, v), "max_features"),
    "HybridGate": (HybridGate, "n_items"),
    "HybridGate, target": (lambda v: HybridGate(10, target_items=0 if v is None else v), "target_items"),
    "SparseL0Linear": (SparseL0Linear, "n_features"),
    "SparseCalibrationWeights": (SparseCalibrationWeights, "n_features"),
    "TemperatureScheduler": (lambda v: TemperatureScheduler(anneal_epochs=v or 0), "anneal_epochs"),
}
PROBABILITIES = {
    "HardConcrete": (lambda v: HardConcrete(3, init_mean=v), "init_mean"),
    "L0Gate": (lambda v: L0Gate(3, init_mean=v), "init_mean"),
    "L0Linear": (lambda v: L0Linear(3, 3, init_sparsity=v), "init_sparsity"),
    "L0Conv2d": (lambda v: L0Conv2d(3, 3, 3, init_sparsity=v), "init_sparsity"),
    "L0DepthwiseConv2d": (lambda v: L0DepthwiseConv2d(3, 3, init_sparsity=v), "init_sparsity"),
    "SparseMLP": (lambda v: SparseMLP(4, 4, 4, init_sparsity=v), "init_sparsity"),
    "SparseL0Linear": (lambda v: SparseL0Linear(3, init_keep_prob=v), "init_keep_prob"),
    "SparseCalibrationWeights": (lambda v: SparseCalibrationWeights(3, init_keep_prob=v), "init_keep_prob"),
}
POSITIVES = {
    "HardConcrete": (lambda v: HardConcrete(3, temperature=v), "temperature"),
    "HardConcrete, stretch": (lambda v: HardConcrete(3, stretch=v), "stretch"),
    "L0Gate": (lambda v: L0Gate(3, v), "temperature"),
    "L0Linear": (lambda v: L0Linear(3, 3, temperature=v), "temperature"),
    "L0Conv2d": (lambda v: L0Conv2d(3, 3, 3, temperature=v), "temperature"),
    "L0DepthwiseConv2d": (lambda v: L0DepthwiseConv2d(3, 3, temperature=v), "temperature"),
    "SparseMLP": (lambda v: SparseMLP(4, 4, 4, temperature=v), "temperature"),
    "SampleGate": (lambda v: SampleGate(3, 1, v), "temperature"),
    "FeatureGate": (lambda v: FeatureGate(3, 1, v), "temperature"),
    "HybridGate": (lambda v: HybridGate(10, temperature=v), "temperature"),
    "SparseL0Linear": (lambda v: SparseL0Linear(3, beta=v), "beta"),
    "SparseCalibrationWeights": (lambda v: SparseCalibrationWeights(3, beta=v), "beta"),
    "TemperatureScheduler": (TemperatureScheduler, "initial_temp"),
    "TemperatureScheduler, final": (lambda v: TemperatureScheduler(1.0, v), "final_temp"),
    "update_temperatures": (lambda v: update_temperatures(L0Linear(2, 2), v), "temperature"),
    "update_temperatures, no gates": (lambda v: update_temperatures(torch.nn.ReLU(), v), "temperature"),
}


def refused(make, name, value):
    with pytest.raises(ValueError, match=name) as caught:
        make(value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [0, -1, 2.5, math.nan, True, "3", None])
@pytest.mark.parametrize("case", SIZES)
def test_sizes(case, value):
    refused(*SIZES[case], value)


@pytest.mark.parametrize("value", [0, 1, -0.1, 1.5, math.nan])
@pytest.mark.parametrize("case", PROBABILITIES)
def test_probabilities(case, value):
    refused(*PROBABILITIES[case], value)


@pytest.mark.parametrize("value", ["half", None])
@pytest.mark.parametrize("case", [case for case in PROBABILITIES if case != "SparseCalibrationWeights"])
def test_probabilities_are_numbers(case, value):
    refused(*PROBABILITIES[case], value)


@pytest.mark.parametrize("value", [0, -1.0, math.nan, math.inf, True, "hot", None])
@pytest.mark.parametrize("case", POSITIVES)
def test_temperatures_and_stretches(case, value):
    refused(*POSITIVES[case], value)


@pytest.mark.parametrize("value", [-0.1, 1.1, math.nan, "all", None])
@pytest.mark.parametrize("name", ["l0_fraction", "random_fraction"])
def test_shares(name, value):
    shares = {"l0_fraction": 0.1, "random_fraction": 0.0, name: value}
    refused(lambda v: HybridGate(10, **shares), name, value)


@pytest.mark.parametrize("value", [-0.1, 1.0, math.nan, "half", None])
@pytest.mark.parametrize(
    "call",
    [
        lambda v: prune_model(L0Linear(2, 2), v),
        lambda v: SparseL0Linear(3).get_selected_features(v),
        lambda v: SparseL0Linear(3).get_coefficients(v),
        lambda v: L0Gate(3).get_active_indices(v),
    ],
)
def test_thresholds(call, value):
    refused(call, "threshold", value)


@pytest.mark.parametrize("padding", [-1, (1, -1), 0.5, (1, 1, 1), "sam", None])
@pytest.mark.parametrize(
    "make", [lambda p: L0Conv2d(3, 3, 3, padding=p), lambda p: L0DepthwiseConv2d(3, 3, padding=p)]
)
def test_paddings(make, padding):
    refused(make, "padding", padding)


@pytest.mark.parametrize("padding", [0, 1, (1, 0), "same", "valid"])
def test_paddings_of_torch_are_taken(padding):
    x = torch.randn(1, 3, 6, 6)
    for layer in (L0Conv2d(3, 3, 3, padding=padding), L0DepthwiseConv2d(3, 3, padding=padding)):
        plain = torch.nn.Conv2d(3, 3, 3, padding=padding)
        assert layer(x).shape == plain(x).shape == layer.plain()(x).shape


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_locations(value):
    refused(lambda v: HardConcrete(3, log_alpha_init=v), "log_alpha_init", value)
    refused(lambda v: HardConcrete(3, jitter=v), "jitter", value)


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e300])
def test_matrices_of_calibration_weights_are_finite(value):
    dense = np.ones((4, 3))
    dense[1, 2] = value
    for matrix in (dense, sparse.csr_matrix(dense), sparse.coo_array(dense)):
        refused(
            lambda m: SparseCalibrationWeights(3).fit(m, np.ones(4), epochs=2), "M must be finite", matrix
        )
        refused(SparseCalibrationWeights(3).predict, "M must be finite", matrix)


@pytest.mark.parametrize("name", ["lambda_l0", "lambda_l2", "lr", "verbose_freq"])
@pytest.mark.parametrize("value", [-1, math.nan, None])
def test_settings_of_a_fit_of_calibration_weights(name, value):
    model = SparseCalibrationWeights(3)
    refused(lambda v: model.fit(np.ones((4, 3)), np.ones(4), **{name: v}), name, value)


@pytest.mark.parametrize("weights", [math.nan, math.inf, -1.0])
def test_initial_weights(weights):
    refused(lambda v: SparseCalibrationWeights(3, init_weights=[1.0, v, 1.0]), "init_weights", weights)


def test_a_keep_probability_next_to_one_is_one_of_float64():
    keep = SparseCalibrationWeights(3, init_keep_prob=1 - 1e-12)
    assert torch.isfinite(keep.log_alpha).all()


def test_weights_of_samples_are_a_vector():
    """(n, 1) times the gates would be (n, n), and nobody would know."""
    gate = SampleGate(10, 3)
    with pytest.raises(ValueError, match=r"weights must have shape \(10,\), got \(10, 1\)"):
        gate.select_weighted_samples(torch.ones(10, 2), torch.ones(10, 1))
