"""Compiled loops over the gates: one pass over the households where torch makes a dozen.

Like ``kernels``: each works on one range of households, and the first call on a machine compiles. All numbers
are float32. Exponentials and logarithms are polynomials, good to two units in the last place, since calls of
the C library keep a loop from using vector registers.

Source of the polynomials: Moshier, Cephes mathematical library, expf and logf (1989).
"""

import numpy as np

from sparsereg.extras import missing
from sparsereg.linalg.adam import BETA1, BETA2, EPSILON

try:
    import numba
except ModuleNotFoundError as error:
    raise missing(error) from error

# Division by zero raises nothing, since a check would keep a loop from using vector registers; sums that are
# split in two to be exact are not put together again.
_compile = numba.njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract", "nsz"})
_compile_sum = numba.njit(
    nogil=True, cache=True, error_model="numpy", fastmath={"reassoc", "contract", "nsz"}
)
_f = np.float32
_ONE, _HALF, _ZERO = _f(1.0), _f(0.5), _f(0.0)
_LOWEST, _HIGHEST = _f(-87.0), _f(88.0)
_PER_LN2, _LN2_HIGH, _LN2_LOW = _f(1.44269504), _f(0.693359375), _f(-2.12194440e-4)
_E0, _E1, _E2, _E3, _E4 = (
    _f(1.9875691500e-4), _f(1.3981999507e-3), _f(8.3334519073e-3), _f(4.1665795894e-2), _f(1.6666665459e-1),
)  # fmt: skip
_L0, _L1, _L2, _L3, _L4, _L5, _L6, _L7, _L8 = (
    _f(7.0376836292e-2), _f(-1.1514610310e-1), _f(1.1676998740e-1), _f(-1.2420140846e-1), _f(1.4249322787e-1),
    _f(-1.6668057665e-1), _f(2.0000714765e-1), _f(-2.4999993993e-1), _f(3.3333331174e-1),
)  # fmt: skip
_SMALLEST, _ROOT_HALF = _f(1.17549435e-38), _f(0.70710678)
_FIRST, _SECOND = _f(1.0 - BETA1), _f(1.0 - BETA2)
_KEEP, _TINY = _f(BETA2), _f(EPSILON)


@_compile
def exponential(x):  # type: ignore[no-untyped-def]
    """e^x, x within [-87, 88] or at its end."""
    x = min(max(x, _LOWEST), _HIGHEST)
    n = np.floor(x * _PER_LN2 + _HALF)
    r = x - n * _LN2_HIGH - n * _LN2_LOW
    p = ((((_E0 * r + _E1) * r + _E2) * r + _E3) * r + _E4) * r + _HALF
    return (p * r * r + r + _ONE) * np.int32((np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)


@_compile
def logarithm(x):  # type: ignore[no-untyped-def]
    """log(x), -87 for 0."""
    bits = _f(max(x, _SMALLEST)).view(np.int32)
    m = np.int32((bits & np.int32(0x007FFFFF)) | np.int32(0x3F000000)).view(np.float32)
    n = _f((bits >> np.int32(23)) - np.int32(126))
    is_low = m < _ROOT_HALF
    n = n - _ONE if is_low else n
    r = m + m - _ONE if is_low else m - _ONE
    z = r * r
    p = (((((((_L0 * r + _L1) * r + _L2) * r + _L3) * r + _L4) * r + _L5) * r + _L6) * r + _L7) * r + _L8
    return p * r * z + n * _LN2_LOW - _HALF * z + r + n * _LN2_HIGH


@_compile
def sigmoid(x):  # type: ignore[no-untyped-def]
    """1 / (1 + e^-x)."""
    return _ONE / (_ONE + exponential(-x))


@_compile
def draw(levels, log_weight, log_alpha, weight, along, per_beta, low, high):  # type: ignore[no-untyped-def]
    """Gates z at these levels: weight = e^log_weight z, along = e^log_weight dz / dlog_alpha."""
    width = high - low
    for j in range(weight.shape[0]):
        u = levels[j]
        s = sigmoid((logarithm(u / (_ONE - u)) + log_alpha[j]) * per_beta)
        gate = s * width + low
        positive = exponential(log_weight[j])
        weight[j] = min(max(gate, _ZERO), _ONE) * positive
        inside = (gate > _ZERO) & (gate < _ONE)
        along[j] = positive * (s - s * s) * (width * per_beta) if inside else _ZERO


@_compile_sum
def expected(log_alpha, shift):  # type: ignore[no-untyped-def]
    """Sum of P(z > 0), float64."""
    total = 0.0
    for j in range(log_alpha.shape[0]):
        total += sigmoid(log_alpha[j] - shift)
    return total


@_compile
def _adam(value, first, second, j, slope, rate, per_root):  # type: ignore[no-untyped-def]
    """One step of ``linalg.adam`` for one number."""
    m = first[j] + (slope - first[j]) * _FIRST
    v = second[j] * _KEEP + slope * slope * _SECOND
    first[j], second[j] = m, v
    value[j] -= rate * m / (np.sqrt(v) * per_root + _TINY)


@_compile
def move_weights(  # type: ignore[no-untyped-def]
    gradient, weight, log_weight, first, second, lambda_l2, rate, per_root
):
    """Adam on log_weight, with the gradient of lambda_l2 e^(2 log_weight)."""
    twice = lambda_l2 + lambda_l2
    for j in range(log_weight.shape[0]):
        slope = _f(gradient[j]) * weight[j]
        if lambda_l2 > _ZERO:
            positive = exponential(log_weight[j])
            slope += twice * positive * positive
        _adam(log_weight, first, second, j, slope, rate, per_root)


@_compile
def move(  # type: ignore[no-untyped-def]
    gradient, weight, along, log_weight, log_alpha, first, second, first_alpha, second_alpha, lambda_l2,
    price, shift, rate, per_root
):  # fmt: skip
    """``move_weights``, and Adam on log_alpha with the gradient of price P(z > 0)."""
    move_weights(gradient, weight, log_weight, first, second, lambda_l2, rate, per_root)
    for j in range(log_alpha.shape[0]):
        p = sigmoid(log_alpha[j] - shift)
        slope = _f(gradient[j]) * along[j] + price * (p - p * p)
        _adam(log_alpha, first_alpha, second_alpha, j, slope, rate, per_root)
