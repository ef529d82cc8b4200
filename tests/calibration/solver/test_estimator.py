import numpy as np
import pytest
import scipy.sparse as sp
import torch

from sparsereg.calibration.solver.estimator import SparseCalibrationWeights


def data(seed=0, targets=20, features=200):
    rng = np.random.default_rng(seed)
    matrix = sp.random(targets, features, density=0.3, format="csr", random_state=seed)
    return matrix, matrix @ rng.lognormal(size=features)


def test_fit_meets_targets_and_is_sparse():
    matrix, y = data()
    model = SparseCalibrationWeights(200, beta=0.5, init_keep_prob=0.9, log_weight_jitter_sd=0.05, seed=1)
    assert model.fit(matrix, y, lambda_l0=1e-2, lr=0.1, epochs=600, loss_type="relative") is model
    assert 0.3 < model.get_sparsity() < 1
    active = model.get_active_weights()
    assert active["count"] == len(active["indices"]) == len(active["values"])
    predicted = model.predict(matrix)
    assert predicted.dtype == torch.float32
    assert np.abs(predicted.numpy() / y - 1).mean() < 0.1


def test_seeds_are_repeatable_whatever_happens_to_the_global_generator():
    matrix, y = data()
    fitted = []
    for other in (1, 2):
        torch.manual_seed(other)
        model = SparseCalibrationWeights(200, seed=7, log_weight_jitter_sd=0.1)
        model.fit(matrix, y, epochs=30, lr=0.1)
        fitted.append(model.get_weights(deterministic=True))
    assert torch.equal(fitted[0], fitted[1])
    state = torch.random.get_rng_state()
    model.fit(matrix, y, epochs=3)
    assert torch.equal(state, torch.random.get_rng_state())


def test_other_values_in_the_same_places_are_another_matrix():
    matrix, _ = data()
    model = SparseCalibrationWeights(200, seed=0)
    first = model.predict(matrix)
    torch.testing.assert_close(model.predict(2 * matrix), 2 * first)
    matrix.data[:] = 0.5
    again = model.predict(matrix)
    expected = matrix @ model.get_weights(deterministic=True).detach().double().numpy()
    np.testing.assert_allclose(again.numpy(), expected, rtol=1e-5)


def test_target_of_minus_one_is_not_nan():
    matrix, y = data()
    y[:2] = [-1.0, 0.0]
    model = SparseCalibrationWeights(200, seed=0).fit(matrix, y, epochs=20, loss_type="relative")
    assert torch.isfinite(model.log_weight).all()
    assert torch.isfinite(model.log_alpha).all()


def test_unknown_loss_is_refused():
    matrix, y = data()
    with pytest.raises(ValueError, match="relative, mse, mape, capped"):
        SparseCalibrationWeights(200).fit(matrix, y, loss_type="relativ")


def test_forward_is_differentiable():
    matrix, _ = data()
    model = SparseCalibrationWeights(200, seed=0)
    model(matrix, deterministic=True).square().sum().backward()
    weights = model.get_weights(deterministic=True)
    dense = torch.from_numpy(matrix.toarray()).float()
    expected = torch.autograd.grad((dense @ weights).square().sum(), [model.log_weight, model.log_alpha])
    torch.testing.assert_close(model.log_weight.grad, expected[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.log_alpha.grad, expected[1], rtol=1e-4, atol=1e-5)
    assert model.get_l0_penalty().requires_grad
    assert model.get_l2_penalty().requires_grad


def test_arrays_scalars_and_state():
    keep = np.linspace(0, 1, 200)
    model = SparseCalibrationWeights(200, init_keep_prob=keep, init_weights=np.arange(200.0), seed=0)
    assert torch.isfinite(model.log_alpha).all()
    np.testing.assert_allclose(model.log_weight.exp().detach(), np.arange(200), rtol=1e-4, atol=1e-6)
    other = SparseCalibrationWeights(200, init_weights=2, seed=1)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.get_weights(True), model.get_weights(True))
    with pytest.raises(ValueError, match=r"init_weights array must have shape \(200,\)"):
        SparseCalibrationWeights(200, init_weights=np.ones(3))
    with pytest.raises(ValueError, match="init_keep_prob"):
        SparseCalibrationWeights(200, init_keep_prob=1.5)
    with pytest.raises(ValueError, match="200 columns"):
        model.predict(np.ones((3, 5)))
    plain = SparseCalibrationWeights(200, use_gates=False)
    assert torch.equal(plain.get_weights(), plain.log_weight.exp())


def test_groups(caplog):
    matrix, y = data()
    groups = np.array([0] * 18 + [1] * 2)
    y[-2:] *= 5
    errors = []
    for multipliers in (None, {1: 100.0}):
        model = SparseCalibrationWeights(200, use_gates=False, seed=0)
        model.fit(matrix, y, epochs=100, lr=0.02, loss_type="relative", target_groups=groups,
                  group_multipliers=multipliers, lambda_l2=1e-2, verbose=True)  # fmt: skip
        errors.append(np.abs(model.predict(matrix).detach().numpy() / y - 1)[-2:].mean())
    assert errors[1] < errors[0]
    assert "mean_error" in caplog.text
    with pytest.raises(ValueError, match="requires target_groups"):
        model.fit(matrix, y, group_multipliers={1: 2.0})


def test_same_kept_number_as_l0_python():
    l0 = pytest.importorskip("l0.calibration")
    matrix, y = data(targets=40, features=400)
    counts = []
    for kind in (l0.SparseCalibrationWeights, SparseCalibrationWeights):
        torch.manual_seed(0)
        model = kind(400, beta=0.65, init_keep_prob=0.9, seed=0)
        model.fit(matrix, y, lambda_l0=0.002, lr=0.1, epochs=300, loss_type="relative")
        counts.append(model.get_active_weights()["count"])
    assert counts[1] == pytest.approx(counts[0], rel=0.15, abs=5)
