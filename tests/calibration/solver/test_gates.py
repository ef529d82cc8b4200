import numpy as np
import pytest
import scipy.sparse as sp
import torch

from sparsereg.calibration.solver.hard_concrete import GateSettings, GateSolver
from sparsereg.calibration.solver.losses import TargetLoss
from sparsereg.calibration.solver.matrix import household_matrix
from sparsereg.distributions import p_active, quantile


def parts(seed=0, targets=15, households=60, backend="compiled", loss="relative"):
    rng = np.random.default_rng(seed)
    a = (rng.lognormal(size=(targets, households)) * (rng.random((targets, households)) < 0.4)).astype(
        np.float32
    )
    t = torch.from_numpy(a.astype(np.float64) @ rng.lognormal(size=households))
    matrix = household_matrix(sp.csr_array(a.T), backend=backend)
    return a, matrix, TargetLoss(t, torch.ones_like(t), loss)


def solver(settings, backend="compiled", loss="relative", seed=3, location=1.0):
    _, matrix, target_loss = parts(backend=backend, loss=loss)
    generator = torch.Generator().manual_seed(1)
    start = 0.1 * torch.randn(60, generator=generator)
    return GateSolver(matrix, target_loss, start, torch.full((60,), location), settings, seed)


@pytest.mark.parametrize("loss", ["relative", "mse", "mape", "capped"])
@pytest.mark.parametrize("backend", ["compiled", "torch"])
def test_equals_autograd_and_torch_adam(loss, backend):
    """The hand-written step against autograd through distributions.quantile and torch.optim.Adam."""
    settings = GateSettings(
        lambda_l0=0.02, lambda_l2=0.001, lr=0.1, temperature=lambda e: 0.5 + 0.1 / (1 + e)
    )
    a, _, target_loss = parts(loss=loss)
    ours = solver(settings, backend, loss)
    log_weight, log_alpha = ours.log_weight.clone().requires_grad_(), ours.log_alpha.clone().requires_grad_()
    adam = torch.optim.Adam([log_weight, log_alpha], lr=0.1)
    dense = torch.from_numpy(a.astype(np.float64))
    for epoch in range(12):
        beta = settings.temperature(epoch)
        u = ours.matrix.noise(3, epoch)
        weights = log_weight.exp() * quantile(log_alpha, u, beta)
        value = target_loss.value(dense @ weights.double())
        penalty = 0.02 * p_active(log_alpha, beta).sum() + 0.001 * log_weight.exp().square().sum()
        adam.zero_grad()
        (value + penalty).backward()
        adam.step()
        ours.step()
        assert ours.last_loss == pytest.approx(float(value.detach()), rel=1e-4)
    torch.testing.assert_close(ours.log_weight, log_weight.detach(), rtol=2e-3, atol=2e-4)
    torch.testing.assert_close(ours.log_alpha, log_alpha.detach(), rtol=2e-3, atol=2e-4)


def test_resume_changes_nothing():
    settings = GateSettings(lambda_l0=0.3, num_epochs=80)
    whole, first, second = solver(settings), solver(settings), solver(settings)
    whole.step(80)
    first.step(33)
    second.load_state_dict(first.state_dict())
    second.step(47)
    assert torch.equal(whole.log_weight, second.log_weight)
    assert torch.equal(whole.log_alpha, second.log_alpha)
    assert whole.last_loss == second.last_loss


@pytest.mark.parametrize("backend", ["compiled", "torch"])
def test_noise_is_uniform_and_repeatable(backend):
    matrix = household_matrix(sp.csr_array((200_000, 1), dtype=np.float32), backend=backend)
    one, two, other, later = (matrix.noise(s, e) for s, e in ((1, 0), (1, 0), (2, 0), (1, 1)))
    assert torch.equal(one, two)
    for different in (other, later):
        assert abs(float(torch.corrcoef(torch.stack([one, different]))[0, 1])) < 0.01
    assert 0 <= float(one.min()) < 1e-4
    assert 1 - 1e-4 < float(one.max()) < 1
    counts = torch.histc(one, 100, 0, 1)
    assert float(((counts - 2000) ** 2 / 2000).sum()) < 160  # chi-squared with 99 degrees of freedom


def test_steering_meets_the_number():
    settings = GateSettings(lr=0.15, num_epochs=600, num_open=20)
    run = solver(settings, location=6.0)
    run.step(600)
    assert 14 <= run.expected_kept() <= 26


def test_without_gates_all_weights_stay():
    run = solver(GateSettings(use_gates=False, lr=0.05))
    run.step(300)
    assert (run.weights() > 0).all()
    assert run.last_loss < 0.01


def test_state_of_another_size_is_refused():
    run = solver(GateSettings())
    state = run.state_dict()
    state["log_weight"] = state["log_weight"][:5]
    with pytest.raises(ValueError, match="5 households, the problem has 60"):
        run.load_state_dict(state)
