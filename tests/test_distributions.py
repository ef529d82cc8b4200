"""The Hard Concrete against quadrature of its density, at every precision, and its state."""

import copy
import itertools
import math
import pickle

import pytest
import torch
from scipy import integrate, optimize

from sparsereg import distributions as hc
from sparsereg.distributions import HardConcrete

SETTINGS = [
    (log_alpha, temperature, stretch)
    for log_alpha in (-4.0, -1.5, 0.0, 0.7, 3.0)
    for temperature in (0.25, 2 / 3, 1.0, 2.0)
    for stretch in (0.1, 0.4)
]


def integral(f, log_alpha: float, beta: float, low: float, kinks=()) -> float:
    """Integral over s in (low, 1) of f(s) times the density of the binary concrete variable.

    beta logit(s) - log_alpha is a standard logistic variable (equation 10), whose density is
    1 / (4 cosh^2(t / 2)); integrating over t keeps the integrand smooth but for the kinks of f.
    """

    def at(s: float) -> float:
        return beta * (math.log(s) - math.log1p(-s)) - log_alpha

    def integrand(t: float) -> float:
        s = 1 / (1 + math.exp(-(t + log_alpha) / beta))
        return f(s) / (4 * math.cosh(t / 2) ** 2)

    begin = -50.0 if low <= 0 else min(50.0, max(-50.0, at(low)))
    ends = sorted([begin, 0.0, 50.0, *(at(s) for s in kinks)])
    ends = [t for t in ends if begin <= t <= 50]
    return sum(integrate.quad(integrand, a, b, limit=200)[0] for a, b in itertools.pairwise(ends))


def tensor(x: float) -> torch.Tensor:
    return torch.tensor([x], dtype=torch.float64)


@pytest.mark.parametrize(("log_alpha", "beta", "stretch"), SETTINGS)
def test_p_active_is_the_mass_above_zero(log_alpha, beta, stretch):
    zero_at = stretch / (1 + 2 * stretch)
    mass = integral(lambda s: 1.0, log_alpha, beta, zero_at)
    found = hc.p_active(tensor(log_alpha), beta, -stretch, 1 + stretch)
    assert found.item() == pytest.approx(mass, abs=1e-9)
    assert hc.log_alpha_at(found.item(), beta, -stretch, 1 + stretch) == pytest.approx(log_alpha, abs=1e-9)
    assert hc.log_alpha_at(found, beta, -stretch, 1 + stretch).item() == pytest.approx(log_alpha, abs=1e-9)


@pytest.mark.parametrize(("log_alpha", "beta", "stretch"), SETTINGS)
def test_median_halves_the_mass(log_alpha, beta, stretch):
    half = optimize.brentq(
        lambda x: integral(lambda s: 1.0, log_alpha, beta, 1 / (1 + math.exp(-x))) - 0.5, -30, 30
    )
    s = 1 / (1 + math.exp(-half))
    truth = min(1.0, max(0.0, s * (1 + 2 * stretch) - stretch))
    shape = (beta, -stretch, 1 + stretch)
    assert hc.gate_median(tensor(log_alpha), *shape).item() == pytest.approx(truth, abs=1e-7)
    assert hc.quantile(tensor(log_alpha), 0.5, *shape).item() == pytest.approx(truth, abs=1e-7)


@pytest.mark.parametrize(("log_alpha", "beta", "stretch"), SETTINGS)
def test_mean_of_draws_is_the_integral(log_alpha, beta, stretch):
    width = 1 + 2 * stretch
    kinks = (stretch / width, (1 + stretch) / width)
    truth = integral(lambda s: min(1.0, max(0.0, s * width - stretch)), log_alpha, beta, 0.0, kinks)
    shape = (beta, -stretch, 1 + stretch)
    u = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    assert hc.quantile(tensor(log_alpha), u, *shape).mean().item() == pytest.approx(truth, abs=1e-5)
    generator = torch.Generator().manual_seed(0)
    drawn = hc.sample(tensor(log_alpha), *shape, batch_shape=(40_000,), generator=generator)
    assert drawn.mean().item() == pytest.approx(truth, abs=0.01)
    active = hc.p_active(tensor(log_alpha), *shape).item()
    assert (drawn > 0).double().mean().item() == pytest.approx(active, abs=0.012)


def test_without_the_temperature_it_is_no_median():
    """The formula of some codes, sigmoid(log_alpha) stretched, disagrees with P(z > 0) <= 1/2."""
    log_alpha, beta = torch.linspace(-2, 2, 41, dtype=torch.float64), 0.25
    without = (torch.sigmoid(log_alpha) * 1.2 - 0.1).clamp(0, 1)
    shut = hc.p_active(log_alpha, beta) <= 0.5
    assert not torch.equal(without == 0, shut)
    assert torch.equal(hc.gate_median(log_alpha, beta) == 0, shut)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("temperature", [0.05, 0.1, 0.5, 2 / 3, 1.0, 3.0])
def test_median_is_zero_iff_p_active_is_at_most_half_at_every_rounding(dtype, temperature):
    edge = torch.tensor(hc.shift(temperature), dtype=torch.float64)
    around = edge + torch.linspace(-40, 40, 161, dtype=torch.float64) * torch.finfo(torch.float32).eps
    wide = torch.linspace(-6, 6, 10_001, dtype=torch.float64)
    log_alpha = torch.cat([around, wide]).to(dtype)
    closed = hc.gate_median(log_alpha, temperature) == 0
    assert torch.equal(closed, hc.p_active(log_alpha, temperature) <= 0.5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_single(dtype):
    log_alpha = torch.linspace(-30, 30, 301).to(dtype).requires_grad_()
    for value in (hc.p_active(log_alpha, 0.1), hc.gate_median(log_alpha, 0.1), hc.sample(log_alpha, 0.1)):
        assert value.dtype == torch.float32
        assert torch.isfinite(value).all()
        (grad,) = torch.autograd.grad(value.sum(), log_alpha)
        assert grad.dtype == dtype
        assert torch.isfinite(grad).all()


@pytest.mark.parametrize("u", [0.0, 1e-30, 1 - 2**-24])
def test_extreme_noise_has_a_finite_gradient(u):
    log_alpha = torch.tensor([-50.0, 0.0, 50.0], requires_grad=True)
    z = hc.quantile(log_alpha, torch.full((3,), u), 0.1)
    assert ((z >= 0) & (z <= 1)).all()
    z.sum().backward()
    assert torch.isfinite(log_alpha.grad).all()


def test_gradients_are_the_derivatives():
    log_alpha = torch.tensor([-1.0, 0.1, 0.9, 4.0], dtype=torch.float64, requires_grad=True)
    u = torch.tensor([0.7, 0.4, 0.6, 0.5], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda a: hc.quantile(a, u, 0.7), log_alpha)
    assert torch.autograd.gradcheck(lambda a: hc.p_active(a, 0.7), log_alpha)
    assert torch.autograd.gradcheck(lambda a: hc.gate_median(a, 0.7), log_alpha)


def product(weight, log_alpha, gamma=-0.1):
    generator = torch.Generator().manual_seed(3)
    return hc.gated_product(weight, log_alpha, 0.6, gamma, generator=generator)


@pytest.mark.parametrize("gamma", [-0.1, -0.3])
def test_gated_product_has_first_and_second_derivatives(gamma):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3, 4, dtype=torch.float64, generator=generator).requires_grad_()
    log_alpha = torch.randn(3, 4, dtype=torch.float64, generator=generator).requires_grad_()
    assert torch.autograd.gradcheck(product, (weight, log_alpha, gamma))
    assert torch.autograd.gradgradcheck(product, (weight, log_alpha, gamma))


@pytest.mark.parametrize("size", [(5, 7), (700, 301)])
def test_gated_product_is_weight_times_sample(size):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(size, generator=generator).requires_grad_()
    log_alpha = torch.randn(size, generator=generator).requires_grad_()
    fast = product(weight, log_alpha)
    # The blocks are drawn one after another, so the noise is that of one draw.
    z = hc.sample(log_alpha, 0.6, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(fast, weight * z, rtol=1e-5, atol=1e-6)
    upstream = torch.randn(size, generator=generator)
    got = torch.autograd.grad(fast, (weight, log_alpha), upstream)
    want = torch.autograd.grad(weight * z, (weight, log_alpha), upstream)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [(5, 7), (700, 301)])
def test_test_time_product_is_weight_times_median(size):
    gate = HardConcrete(*size, jitter=2.0, generator=torch.Generator().manual_seed(0)).eval()
    weight = torch.randn(size, generator=torch.Generator().manual_seed(1))
    want = weight * gate.median()
    assert torch.equal(gate.times(weight), want)
    with torch.no_grad():
        assert torch.equal(gate.times(weight), want)
    (grad,) = torch.autograd.grad(gate.times(weight).sum(), gate.log_alpha)
    assert grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_gated_product_keeps_the_dtype_of_the_weight(dtype):
    out = hc.gated_product(torch.ones(4, dtype=dtype), torch.zeros(4))
    assert out.dtype == dtype


def test_gated_product_of_frozen_weights_trains_the_gates():
    weight, log_alpha = torch.ones(50), torch.zeros(50, requires_grad=True)
    hc.gated_product(weight, log_alpha).sum().backward()
    assert log_alpha.grad.abs().sum() > 0
    assert weight.grad is None


def test_draw_together_has_the_distribution_of_single_draws():
    settings = ((0.3, 0.5), (0.9, 0.5), (0.6, 1.0))
    gates = [HardConcrete(30_000, init_mean=p, temperature=t) for p, t in settings]
    gates.append(HardConcrete(5).eval())
    hc.draw_together(gates, torch.Generator().manual_seed(0))
    for gate in gates[:3]:
        together, alone = gate(), gate.sample(generator=torch.Generator().manual_seed(1))
        levels = torch.linspace(0.05, 0.95, 10)
        assert (together > 0).float().mean().item() == pytest.approx(gate.init_mean, abs=0.012)
        torch.testing.assert_close(together.quantile(levels), alone.quantile(levels), atol=0.03, rtol=0)
        assert not torch.equal(together, gate()), "a draw is handed out once"
    assert gates[3]._drawn is None


def test_a_draw_that_was_not_used_is_no_part_of_copies_and_ends_with_the_mode():
    gate = HardConcrete(5)
    hc.draw_together([gate])
    for twin in (copy.deepcopy(gate), pickle.loads(pickle.dumps(gate))):
        assert twin._drawn is None
    assert gate._drawn is not None
    assert gate.eval().train()._drawn is None


def test_draws_of_shut_gates_do_not_open():
    """A clamp of log_alpha (as in other codes) would let a shut gate open at random for ever."""
    gate = HardConcrete(100_000, log_alpha_init=-60.0)
    assert gate.sample().count_nonzero() == 0


@pytest.mark.parametrize("temperature", [0.1, 0.5, 2.0])
@pytest.mark.parametrize("p", [0.001, 0.05, 0.5, 0.999])
def test_init_mean_is_the_probability_of_being_active(p, temperature):
    gate = HardConcrete(4, 3, temperature=temperature, init_mean=p)
    torch.testing.assert_close(gate.get_active_prob(), torch.full((4, 3), p), rtol=1e-5, atol=0)
    assert gate.get_penalty().item() == pytest.approx(12 * p, rel=1e-5)
    assert gate.get_sparsity() == pytest.approx(1 - p, abs=1e-6)
    assert gate.get_num_active() == int((gate.get_active_prob() > 0.5).sum())


def test_eval_output_follows_the_temperature():
    gate = HardConcrete(5, log_alpha_init=0.3).eval()
    before = gate().clone()
    gate.temperature = 0.1
    assert not torch.equal(gate(), before)


def test_state_dict_pickle_and_copy_keep_the_temperature():
    gate = HardConcrete(6, temperature=0.5, jitter=1.0)
    gate.temperature = 0.2
    other = HardConcrete(6)
    other.load_state_dict(gate.state_dict())
    for twin in (other, pickle.loads(pickle.dumps(gate)), copy.deepcopy(gate)):
        assert twin.temperature == 0.2
        assert torch.equal(twin.eval()(), gate.eval()())


def test_state_dict_of_the_other_library_loads():
    gate = HardConcrete(3, temperature=0.3)
    gate.load_state_dict({"qz_logits": torch.tensor([1.0, 2.0, 3.0])})
    assert gate.qz_logits.tolist() == [1.0, 2.0, 3.0]
    assert gate.temperature == 0.3


def test_gate_sizes_in_all_spellings():
    assert HardConcrete(5).gate_size == (5,)
    assert HardConcrete(n_items=5).gate_size == (5,)
    assert HardConcrete(5, 3).gate_size == (5, 3)
    assert HardConcrete(2, 3, 4, 5).gate_size == (2, 3, 4, 5)
    assert HardConcrete(input_dim=5, output_dim=3).gate_size == (5, 3)
    assert HardConcrete(5, output_dim=3).gate_size == (5, 3)
    assert HardConcrete(5)(input_shape=(5, 1, 1)).shape == (5, 1, 1)


def test_an_interval_need_not_be_symmetric():
    gate = HardConcrete(2, interval=(-0.2, 1.05), init_mean=0.3)
    assert (gate.gamma, gate.zeta) == (-0.2, 1.05)
    torch.testing.assert_close(gate.p_active(), torch.full((2,), 0.3))


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"n_items": 0}, "gate size"),
        ({"n_items": 2.5}, "gate size"),
        ({"n_items": True}, "gate size"),
        ({}, "gate size"),
        ({"n_items": 3, "input_dim": 3}, "n_items"),
        ({"n_items": 3, "temperature": 0.0}, "temperature"),
        ({"n_items": 3, "temperature": -1.0}, "temperature"),
        ({"n_items": 3, "temperature": math.nan}, "temperature"),
        ({"n_items": 3, "temperature": math.inf}, "temperature"),
        ({"n_items": 3, "stretch": 0.0}, "stretch"),
        ({"n_items": 3, "stretch": -0.1}, "stretch"),
        ({"n_items": 3, "interval": (0.1, 1.1)}, "interval"),
        ({"n_items": 3, "init_mean": 0.0}, "init_mean"),
        ({"n_items": 3, "init_mean": 1.0}, "init_mean"),
        ({"n_items": 3, "init_mean": math.nan}, "init_mean"),
        ({"n_items": 3, "jitter": -1.0}, "jitter"),
    ],
)
def test_wrong_arguments_are_named(arguments, name):
    with pytest.raises(ValueError, match=name):
        HardConcrete(**arguments)
