"""The Hard Concrete distribution: the only place that holds its mathematics.

A gate z = min(1, max(0, s (zeta - gamma) + gamma)) is a binary concrete variable s that is stretched
to (gamma, zeta) and clipped to [0, 1], so that it is exactly 0 and exactly 1 with finite probability
and still differentiable in its location ``log_alpha`` in between.

The mathematics are pure functions of tensors; ``HardConcrete`` is the state (``log_alpha`` and a
temperature). Image gates, weight gates, selectors and the survey calibration all call these functions.

Source: Louizos, Welling, Kingma, "Learning Sparse Neural Networks through L0 Regularization",
ICLR 2018, https://arxiv.org/abs/1712.01312 (equation numbers below refer to it).
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparsereg.checks import check_count, check_finite, check_not_negative, check_positive, check_probability
from sparsereg.shapes import Float

GAMMA = -0.1
"""Lower end of the stretch interval (section 4.1 of the paper)."""
ZETA = 1.1
"""Upper end of the stretch interval (section 4.1 of the paper)."""
TEMPERATURE = 2 / 3
"""beta of the binary concrete distribution (section 4.1 of the paper)."""


def shift(temperature: float, gamma: float = GAMMA, zeta: float = ZETA) -> float:
    """Return beta * log(-gamma / zeta), the distance between log_alpha and the logit of P(z > 0).

    Args:
        temperature: beta > 0.
        gamma: lower end of the stretch interval, < 0.
        zeta: upper end of the stretch interval, > 1.
    """
    return temperature * math.log(-gamma / zeta)


def p_active(
    log_alpha: Float[Tensor, "*gates"],
    temperature: float = TEMPERATURE,
    gamma: float = GAMMA,
    zeta: float = ZETA,
) -> Float[Tensor, "*gates"]:
    """Probability that a gate is not zero, P(z > 0) = sigmoid(log_alpha - beta log(-gamma / zeta)).

    Args:
        log_alpha: locations, any shape.
        temperature: beta > 0.
        gamma: lower end of the stretch interval, < 0.
        zeta: upper end of the stretch interval, > 1.

    Returns:
        Probabilities in float32 or wider, of the shape of ``log_alpha``.

    Source: equation 12.
    """
    return torch.sigmoid(_wide(log_alpha) - shift(temperature, gamma, zeta))


def log_alpha_at(
    p: float | Float[Tensor, "..."],
    temperature: float = TEMPERATURE,
    gamma: float = GAMMA,
    zeta: float = ZETA,
) -> Any:
    """Location at which P(z > 0) equals ``p``: the inverse of ``p_active``.

    Args:
        p: probability in (0, 1), a number or a tensor.
        temperature: beta > 0.
        gamma: lower end of the stretch interval, < 0.
        zeta: upper end of the stretch interval, > 1.

    Returns:
        A number for a number, a tensor for a tensor.
    """
    if isinstance(p, Tensor):
        return torch.logit(p) + shift(temperature, gamma, zeta)
    return math.log(p) - math.log1p(-p) + shift(temperature, gamma, zeta)


def quantile(
    log_alpha: Float[Tensor, "*#gates"],
    u: Float[Tensor, "*#gates"] | float,
    temperature: float = TEMPERATURE,
    gamma: float = GAMMA,
    zeta: float = ZETA,
) -> Float[Tensor, "*gates"]:
    """Quantile function of the Hard Concrete: the z with P(Z <= z) = u. Sampling is u ~ Uniform(0, 1).

    Args:
        log_alpha: locations, any shape.
        u: levels in [0, 1]; 0 gives exactly 0, and its gradient is zero, not NaN.
        temperature: beta > 0.
        gamma: lower end of the stretch interval, < 0.
        zeta: upper end of the stretch interval, > 1.

    Returns:
        Gates in [0, 1] in float32 or wider, differentiable in ``log_alpha``; the broadcast shape.

    Source: equations 10 and 11.
    """
    location = _wide(log_alpha)
    noise = _logit(torch.as_tensor(u, dtype=location.dtype, device=location.device))
    s = torch.sigmoid((location + noise) / temperature)
    return torch.clamp(s * (zeta - gamma) + gamma, 0.0, 1.0)


def _logit(u: Float[Tensor, "*levels"]) -> Float[Tensor, "*levels"]:
    """log(u / (1 - u)) of noise; levels below half the machine precision count as 0.

    As accurate and as fast as torch.logit, which however splits even three numbers over all threads:
    where those have other work to do, waiting for them takes longer than a training step.
    """
    return torch.atanh(2.0 * u - 1.0).mul_(2.0)


def gate_median(
    log_alpha: Float[Tensor, "*gates"],
    temperature: float = TEMPERATURE,
    gamma: float = GAMMA,
    zeta: float = ZETA,
) -> Float[Tensor, "*gates"]:
    """Median of the Hard Concrete, the gate used at test time.

    clip(sigmoid(log_alpha / beta) (zeta - gamma) + gamma, 0, 1) is the quantile at u = 1/2. It is zero
    exactly when P(z > 0) <= 1/2. (Codes that leave the temperature out have neither property.)

    Args:
        log_alpha: locations, any shape.
        temperature: beta > 0.
        gamma: lower end of the stretch interval, < 0.
        zeta: upper end of the stretch interval, > 1.

    Returns:
        Gates in [0, 1] in float32 or wider, of the shape of ``log_alpha``.

    Source: equation 13, with the temperature of equation 10.
    """
    s = torch.sigmoid(_wide(log_alpha) / temperature)
    # Rounding must not let the test-time gate disagree with P(z > 0) <= 1/2 at the boundary: an open
    # gate is at least the smallest positive number, and p_active itself decides which are shut.
    z = torch.clamp(s * (zeta - gamma) + gamma, torch.finfo(s.dtype).tiny, 1.0)
    is_open = p_active(log_alpha, temperature, gamma, zeta) > 0.5
    return torch.where(is_open, z, torch.zeros_like(z))


def sample(
    log_alpha: Float[Tensor, "*gates"],
    temperature: float = TEMPERATURE,
    gamma: float = GAMMA,
    zeta: float = ZETA,
    *,
    batch_shape: Sequence[int] = (),
    generator: torch.Generator | None = None,
) -> Float[Tensor, "..."]:
    """Draw gates. The noise is drawn on the device of ``log_alpha``, in float32 or wider.

    ``log_alpha`` is not clamped: a clamp would keep shut gates opening at random for ever.

    Args:
        log_alpha: locations, any shape.
        temperature: beta > 0.
        gamma: lower end of the stretch interval, < 0.
        zeta: upper end of the stretch interval, > 1.
        batch_shape: draw that many independent copies, in leading dimensions.
        generator: source of the noise, on the device of ``log_alpha``; PyTorch's default if None.

    Returns:
        Gates in [0, 1] of shape (\\*batch_shape, \\*log_alpha.shape), float32 or wider.
    """
    u = torch.rand(
        (*batch_shape, *log_alpha.shape),
        dtype=_wide_dtype(log_alpha.dtype),
        device=log_alpha.device,
        generator=generator,
    )
    return quantile(log_alpha, u, temperature, gamma, zeta)


def gated_product(
    weight: Float[Tensor, "*gates"],
    log_alpha: Float[Tensor, "*gates"],
    temperature: float = TEMPERATURE,
    gamma: float = GAMMA,
    zeta: float = ZETA,
    *,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "*gates"]:
    """Return weight * z for a fresh draw z: ``sample`` and a product in one pass over memory.

    A matrix with a gate on every weight is far larger than its activations, and each temporary of
    its size costs as much as the layer's matrix product. This makes two of them forward (z and the
    product) and two backward (the gradients), with the arithmetic done in blocks that fit the cache.

    Args:
        weight: weights, of the shape of ``log_alpha``.
        log_alpha: locations.
        temperature: beta > 0.
        gamma: lower end of the stretch interval, < 0.
        zeta: upper end of the stretch interval, > 1.
        generator: source of the noise, on the device of ``log_alpha``; PyTorch's default if None.

    Returns:
        The product in the dtype of ``weight``, differentiable (also twice) in both.
    """
    if not _in_blocks(weight, log_alpha):
        z = sample(log_alpha, temperature, gamma, zeta, generator=generator)
        return weight * z.to(weight.dtype)
    product: Tensor = _GatedProduct.apply(weight, log_alpha, (temperature, gamma, zeta), generator)[0]
    return product


BLOCK = 32_000
"""Elements that ``gated_product`` works on at once. A handful of such blocks fit a core's cache, and
PyTorch does not split less than 32,768 over threads: waiting for each other costs threads more than it
saves here, above all on a machine with other work to do."""


class _GatedProduct(torch.autograd.Function):
    """(weight * z, z) with dz/dlog_alpha from z alone: s = (z - gamma) / (zeta - gamma) inside (0, 1)."""

    @staticmethod
    def forward(
        weight: Tensor,
        log_alpha: Tensor,
        shape: tuple[float, float, float],
        generator: torch.Generator | None,
    ) -> tuple[Tensor, Tensor]:
        temperature, gamma, zeta = shape
        z = torch.empty_like(log_alpha)
        low = z.new_tensor(gamma)
        for a, out in _blocks(log_alpha, z):
            out.uniform_(-1.0, 1.0, generator=generator).atanh_()  # half of _logit, see there
            torch.add(a, out, alpha=2.0, out=out).mul_(1.0 / temperature).sigmoid_()
            torch.add(low, out, alpha=zeta - gamma, out=out).clamp_(0.0, 1.0)
        # The first touch of fresh memory is slow; that is worth all threads.
        return weight * z, z

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.shape = inputs[2]
        ctx.save_for_backward(inputs[0], output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        grad, grad_z = grads
        weight, z = ctx.saved_tensors
        grad = torch.zeros_like(z) if grad is None else grad.contiguous()
        # Blocks are written in place, which a second derivative could not follow.
        if torch.is_grad_enabled() or grad_z is not None or not all(ctx.needs_input_grad[:2]):
            upstream = grad * weight if grad_z is None else grad * weight + grad_z
            return grad * z, upstream * _slope(z, *ctx.shape), None, None
        grad_a = grad * weight
        for gate, out in _blocks(z, grad_a):
            out.mul_(_slope(gate, *ctx.shape))
        return grad * z, grad_a, None, None


def _in_blocks(weight: Tensor, log_alpha: Tensor) -> bool:
    """Whether weight * z can be computed in blocks. A compiler fuses the plain expression by itself."""
    tracing = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    if torch.compiler.is_compiling() or tracing:
        return False
    same = weight.dtype == log_alpha.dtype == _wide_dtype(log_alpha.dtype)
    return same and weight.shape == log_alpha.shape and weight.is_contiguous() and log_alpha.is_contiguous()


def _slope(
    z: Float[Tensor, "*gates"], temperature: float, gamma: float, zeta: float
) -> Float[Tensor, "*gates"]:
    """dz / dlog_alpha as a function of z: (z - gamma)(zeta - z) / (beta (zeta - gamma)), 0 at 0 and 1."""
    # With t = z (1 - z), which is 0 at both ends, the product is t + (zeta + gamma - 1) z - gamma zeta.
    t = torch.addcmul(z, z, z, value=-1.0)
    inside = t.sign()
    product = t.add(inside, alpha=-gamma * zeta)
    if zeta + gamma != 1.0:
        product = product + (zeta + gamma - 1.0) * z * inside
    return product * (1.0 / (temperature * (zeta - gamma)))


def _blocks(*tensors: Tensor) -> Iterable[tuple[Tensor, ...]]:
    """Walk over contiguous tensors of one size in blocks that fit the cache; on a GPU all at once."""
    flat = [t.detach().view(-1) for t in tensors]
    size = BLOCK if flat[0].device.type == "cpu" else flat[0].numel()
    return zip(*(t.split(max(size, 1)) for t in flat), strict=True)


def _wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 stays float64; everything narrower than float32 is computed in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _wide(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    return x.to(_wide_dtype(x.dtype))


class HardConcrete(nn.Module):
    """A tensor of Hard Concrete gates: holds ``log_alpha`` and the temperature, draws z.

    In training mode a call draws gates; in eval mode it returns their medians (``gate_median``).
    The temperature is part of the state dict (as extra state), since the eval output depends on it.

    Args:
        *gate_size: shape of the gate tensor, each >= 1.
        n_items: the same for a vector of gates, by name.
        input_dim: first dimension, by name.
        output_dim: second dimension, by name.
        temperature: beta > 0.
        stretch: the interval is (-stretch, 1 + stretch); > 0.
        interval: (gamma, zeta) with gamma < 0 and zeta > 1, where it is not symmetric; instead of
            ``stretch``, which is then unused.
        init_mean: initial P(z > 0), in (0, 1). (``l0-python`` uses this number for sigmoid(log_alpha),
            which is not the probability of being active.)
        log_alpha_init: initial location; instead of ``init_mean``.
        jitter: standard deviation of normal noise on the initial location, >= 0.
        generator: source of the jitter; PyTorch's default if None.

    Raises:
        ValueError: an argument is outside its range.

    Example:
        >>> gates = HardConcrete(4, temperature=0.5).eval()
        >>> gates().shape
        torch.Size([4])
    """

    gamma: float
    zeta: float
    log_alpha: nn.Parameter
    kept: Tensor | None = None
    """Positions of the gates that are left while others have left the network; see compression.shrink."""
    num_removed: int = 0
    """Number of gates that have left; their P(z > 0) is zero."""

    def __init__(
        self,
        *gate_size: int,
        n_items: int | None = None,
        input_dim: int | None = None,
        output_dim: int | None = None,
        temperature: float = 0.5,
        stretch: float = 0.1,
        interval: tuple[float, float] | None = None,
        init_mean: float = 0.5,
        log_alpha_init: float | None = None,
        jitter: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.gate_size = _gate_size(gate_size, n_items, input_dim, output_dim)
        self.stretch = check_positive("stretch", stretch)
        self.gamma, self.zeta = interval or (-self.stretch, 1.0 + self.stretch)
        if not (-math.inf < self.gamma < 0 and 1 < self.zeta < math.inf):
            raise ValueError(f"interval must be (gamma < 0, zeta > 1), got {interval!r}")
        self.temperature = temperature
        self.init_mean = init_mean
        if log_alpha_init is None:
            check_probability("init_mean", init_mean)
        else:
            check_finite("log_alpha_init", log_alpha_init)
        self.log_alpha_init = log_alpha_init
        self.jitter = check_not_negative("jitter", jitter)
        self.log_alpha = nn.Parameter(torch.empty(self.gate_size))
        self._drawn: Tensor | None = None
        self.reset_parameters(generator)

    @property
    def temperature(self) -> float:
        """beta > 0; setting it changes what the next call returns, in training and in eval mode."""
        return self._temperature

    @temperature.setter
    def temperature(self, value: float) -> None:
        self._temperature = check_positive("temperature", value)

    @property
    def qz_logits(self) -> nn.Parameter:
        """``log_alpha`` under the name that l0-python uses."""
        return self.log_alpha

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Set every location to its initial value, with jitter if there is any."""
        location = self.log_alpha_init
        if location is None:
            location = log_alpha_at(self.init_mean, self.temperature, self.gamma, self.zeta)
        self.log_alpha.fill_(location)
        if self.jitter > 0:
            noise = torch.randn(self.gate_size, generator=generator)
            self.log_alpha.add_(noise.to(self.log_alpha), alpha=self.jitter)

    def forward(
        self, input_shape: Sequence[int] | None = None, generator: torch.Generator | None = None
    ) -> Float[Tensor, "..."]:
        """Return the gates: a draw in training mode, the medians in eval mode.

        Args:
            input_shape: shape of a tensor that the gates will multiply from the left; dimensions of
                size one are appended until the gates have as many dimensions.
            generator: source of the noise of a draw.

        Returns:
            Gates in [0, 1], in the dtype of ``log_alpha``.
        """
        if not self.training:
            z = self.median()
        elif self._drawn is not None and generator is None:
            z, self._drawn = self._drawn, None
        else:
            z = self.sample(generator=generator)
        z = z.to(self.log_alpha.dtype)
        if input_shape is not None and len(input_shape) > z.dim():
            z = z.reshape(*z.shape, *(1,) * (len(input_shape) - z.dim()))
        return z

    def sample(
        self, batch_shape: Sequence[int] = (), generator: torch.Generator | None = None
    ) -> Float[Tensor, "..."]:
        """Draw gates of shape (\\*batch_shape, \\*gate_size), whatever the mode. See ``sample``."""
        return sample(self.log_alpha, *self._shape, batch_shape=batch_shape, generator=generator)

    def times(
        self, weight: Float[Tensor, "*gates"], generator: torch.Generator | None = None
    ) -> Float[Tensor, "*gates"]:
        """Multiply weights of the shape of the gates by them, as ``weight * self()`` but faster.

        Args:
            weight: shape ``gate_size``.
            generator: source of the noise of a draw.

        Returns:
            The product in the dtype of ``weight``.
        """
        if self.training and (self._drawn is None or generator is not None):
            return gated_product(weight, self.log_alpha, *self._shape, generator=generator)
        if not self.training and _in_blocks(weight, self.log_alpha) and not torch.is_grad_enabled():
            product = torch.empty_like(weight)
            for w, a, out in _blocks(weight, self.log_alpha, product):
                torch.mul(w, gate_median(a, *self._shape), out=out)
            return product
        gated: Tensor = weight * self(generator=generator).to(weight.dtype)
        return gated

    def median(self) -> Float[Tensor, "*gates"]:
        """Test-time gates. See ``gate_median``."""
        return gate_median(self.log_alpha, *self._shape)

    def p_active(self) -> Float[Tensor, "*gates"]:
        """P(z > 0) of every gate, differentiable. See ``p_active``."""
        return p_active(self.log_alpha, *self._shape)

    get_active_prob = p_active
    """``p_active`` under the name that l0-python uses."""

    def get_penalty(self) -> Float[Tensor, ""]:
        """Expected number of gates that are not zero: the sum of P(z > 0), a scalar."""
        return self.p_active().sum()

    @torch.no_grad()
    def get_sparsity(self) -> float:
        """Expected share of gates that are zero, 1 - mean P(z > 0), accumulated in float64."""
        return 1.0 - self.p_active().double().mean().item()

    @torch.no_grad()
    def get_num_active(self) -> int:
        """Number of gates whose median is not zero, i.e. with P(z > 0) > 1/2."""
        return int(torch.count_nonzero(self.median()).item())

    @property
    def _shape(self) -> tuple[float, float, float]:
        return self.temperature, self.gamma, self.zeta

    def train(self, mode: bool = True) -> "HardConcrete":
        """Set the mode; a draw of ``draw_together`` that was not used is forgotten."""
        self._drawn = None
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        # A draw belongs to one forward pass and its graph: copies and pickles go without it.
        return {**self.__dict__, "_drawn": None}

    def get_extra_state(self) -> Float[Tensor, ""]:
        """The temperature as a float64 scalar, for the state dict."""
        return torch.tensor(self.temperature, dtype=torch.float64)

    def set_extra_state(self, state: Any) -> None:
        """Take the temperature from a state dict."""
        self.temperature = float(state)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        # State dicts of l0-python call the locations qz_logits and have no temperature.
        if prefix + "qz_logits" in state_dict:
            state_dict[prefix + "log_alpha"] = state_dict.pop(prefix + "qz_logits")
            state_dict.setdefault(prefix + "_extra_state", self.get_extra_state())
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        """What print(module) shows."""
        size = ", ".join(str(n) for n in self.gate_size)
        return f"{size}, temperature={self.temperature:g}, stretch={self.stretch:g}"


def draw_together(gates: Iterable[HardConcrete], generator: torch.Generator | None = None) -> None:
    """Draw the gates of many modules in a handful of operations; each hands out its part once.

    A network of small gate vectors pays some ten kernel launches for each of them. This pays them
    once for all modules that share a temperature, before the forward pass. A module that was not
    drawn for, or is called again, draws for itself: results differ only in the order of the noise.

    Args:
        gates: modules in training mode, on one device.
        generator: source of the noise; PyTorch's default if None.
    """
    groups: dict[tuple[float, float, float], list[HardConcrete]] = {}
    for gate in gates:
        if gate.training:
            groups.setdefault(gate._shape, []).append(gate)
    for shape, members in groups.items():
        z = sample(torch.cat([g.log_alpha.reshape(-1) for g in members]), *shape, generator=generator)
        parts = z.split([g.log_alpha.numel() for g in members])
        for gate, part in zip(members, parts, strict=True):
            gate._drawn = part.view(gate.gate_size)


def _gate_size(
    sizes: tuple[int, ...], n_items: int | None, input_dim: int | None, output_dim: int | None
) -> tuple[int, ...]:
    named = {"n_items": n_items, "input_dim": input_dim, "output_dim": output_dim}
    given = tuple(v for v in named.values() if v is not None)
    if n_items is not None and (input_dim is not None or output_dim is not None):
        raise ValueError("n_items and input_dim/output_dim name the same thing; give one of them")
    # l0-python allows HardConcrete(3, output_dim=4).
    size = tuple(n for n in sizes if n is not None) + given
    if not size or (sizes and (n_items is not None or input_dim is not None)):
        raise ValueError(f"give the gate size once, as in HardConcrete(256, 128), got {sizes} {named}")
    return tuple(check_count("the gate size", n) for n in size)
