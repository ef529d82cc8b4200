"""Linear regression on sparse data with a gate on every coefficient."""

import logging
import math
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sparsereg.checks import (
    check_below_one,
    check_count,
    check_not_negative,
    check_positive,
    check_probability,
)
from sparsereg.device import usable_device
from sparsereg.distributions import HardConcrete
from sparsereg.linalg.adam import adam_step
from sparsereg.linalg.csr import CsrMatrix, Matrix, TorchMatrix, mean_squared_error, multiply
from sparsereg.linalg.threads import quiet_threads
from sparsereg.shapes import Float, Int

logger = logging.getLogger(__name__)

KEEP_PROB = 0.5
"""sigmoid(log_alpha) of a new gate (as in l0-python)."""
JITTER = 0.01
"""Standard deviation of the noise on the initial locations of the gates (as in the paper's code)."""
WEIGHT_SD = 0.1
"""Standard deviation of the initial weights (as in l0-python)."""


class SparseL0Linear(nn.Module):
    """y = X (w * z) + b for a scipy.sparse X, with a Hard Concrete gate on every coefficient.

    X is used where it lies: nothing of its size is copied or kept, so that a matrix that changes is
    read anew.

    Args:
        n_features: number of columns of X, >= 1.
        fit_intercept: whether there is a b.
        beta: temperature > 0.
        gamma: lower end of the stretch interval, < 0.
        zeta: upper end of the stretch interval, > 1.
        init_keep_prob: sigmoid of the initial locations, in (0, 1), as in l0-python: 0.5 gives
            log_alpha = 0, gates of 1/2 at test time, and P(z > 0) = 0.83.
        device: of the parameters and of the work; without CUDA the CPU instead of it, with a warning.
        seed: makes the initial parameters and every ``fit`` repeatable, without PyTorch's global
            generator; None draws from that one.
        init_mean: initial P(z > 0), in (0, 1), as for ``HardConcrete``; instead of ``init_keep_prob``.

    Raises:
        ValueError: an argument is outside its range, or both ``init_keep_prob`` and ``init_mean`` are given.

    Example:
        >>> SparseL0Linear(n_features=5, seed=0).get_sparsity() >= 0
        True
    """

    _first_log_alpha: Tensor

    def __init__(
        self,
        n_features: int,
        fit_intercept: bool = True,
        beta: float = 2 / 3,
        gamma: float = -0.1,
        zeta: float = 1.1,
        init_keep_prob: float = KEEP_PROB,
        device: str | torch.device = "cpu",
        seed: int | None = None,
        *,
        init_mean: float | None = None,
    ) -> None:
        super().__init__()
        self.n_features = check_count("n_features", n_features)
        self.fit_intercept = fit_intercept
        self.init_keep_prob = check_probability("init_keep_prob", init_keep_prob)
        self.seed = seed
        self.weight = nn.Parameter(torch.zeros(self.n_features))
        self.bias = nn.Parameter(torch.zeros(1)) if fit_intercept else None
        self.gates = HardConcrete(
            self.n_features,
            temperature=check_positive("beta", beta),
            interval=(gamma, zeta),
            **self._location(init_mean),
            jitter=JITTER,
            generator=self._seeded("cpu"),
        )
        # A fit starts from here: drawing anew would take l0-python's programs to other draws.
        self.register_buffer("_first_log_alpha", self.gates.log_alpha.detach().clone(), persistent=False)
        self.to(usable_device(device))

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.weight.device

    @property
    def log_alpha(self) -> nn.Parameter:
        """Locations of the gates, (n_features,)."""
        return self.gates.log_alpha

    @property
    def beta(self) -> float:
        """Temperature of the gates."""
        return self.gates.temperature

    @property
    def gamma(self) -> float:
        """Lower end of the stretch interval."""
        return self.gates.gamma

    @property
    def zeta(self) -> float:
        """Upper end of the stretch interval."""
        return self.gates.zeta

    def _location(self, init_mean: float | None) -> dict[str, Any]:
        """Where the gates start, as arguments of HardConcrete."""
        if init_mean is None:
            return {"log_alpha_init": math.log(self.init_keep_prob / (1 - self.init_keep_prob))}
        if self.init_keep_prob != KEEP_PROB:
            raise ValueError(
                f"init_keep_prob={self.init_keep_prob:g} and init_mean={init_mean!r} say the same in two "
                "scales: give one of them"
            )
        return {"init_mean": init_mean}

    def _seeded(self, device: str | torch.device) -> torch.Generator | None:
        return None if self.seed is None else torch.Generator(device=device).manual_seed(self.seed)

    def get_deterministic_gates(self) -> Float[Tensor, "features={self.n_features}"]:
        """Test-time gates, the medians, (n_features,)."""
        return self.gates.median()

    def forward(
        self, X: Any, deterministic: bool = False, generator: torch.Generator | None = None
    ) -> Float[Tensor, "rows"]:
        """Predict, differentiably.

        Args:
            X: (rows, n_features), scipy sparse, NumPy, or torch (dense or sparse).
            deterministic: use the medians of the gates instead of a draw; eval mode always does.
            generator: source of the noise of a draw.

        Returns:
            Predictions, (rows,).

        Raises:
            ValueError: X has another number of columns, or NaN or infinity.
        """
        matrix = self._matrix(X)
        if deterministic or not self.training:
            z = self.get_deterministic_gates()
        else:
            z = self.gates.sample(generator=generator)
        y = multiply(self.weight * z, matrix)
        return y if self.bias is None else y + self.bias

    def _matrix(self, X: Any) -> Matrix:
        compiled = self.device.type == "cpu" and find_spec("numba") is not None
        matrix = CsrMatrix(X) if compiled else TorchMatrix(X, self.device)
        if matrix.shape[1] != self.n_features:
            raise ValueError(f"X must have n_features = {self.n_features} columns, got {matrix.shape[1]}")
        return matrix

    def get_l0_penalty(self) -> Float[Tensor, ""]:
        """Expected number of coefficients that are not zero: the sum of P(z > 0), differentiable."""
        return self.gates.get_penalty()

    def get_sparsity(self) -> float:
        """Expected share of closed gates, 1 - mean P(z > 0)."""
        return self.gates.get_sparsity()

    @torch.no_grad()
    def get_selected_features(self, threshold: float = 0.01) -> Int[Tensor, "selected"]:
        """Indices of the features whose test-time gate is above a threshold.

        Args:
            threshold: gate value in [0, 1).

        Raises:
            ValueError: the threshold is outside its range.
        """
        least = check_below_one("threshold", threshold)
        return torch.nonzero(self.get_deterministic_gates() > least).flatten()

    @torch.no_grad()
    def get_coefficients(self, threshold: float = 0.0) -> Float[Tensor, "features={self.n_features}"]:
        """Coefficients w * z at test time, (n_features,), zero where the gate is not above a threshold.

        Args:
            threshold: gate value in [0, 1).

        Raises:
            ValueError: the threshold is outside its range.
        """
        least = check_below_one("threshold", threshold)
        z = self.get_deterministic_gates()
        return torch.where(z > least, self.weight * z, 0.0)

    def fit(
        self,
        X_sparse: Any,
        y: Any,
        lambda_reg: float = 0.01,
        lr: float = 0.01,
        epochs: int = 1000,
        verbose: bool = False,
        verbose_freq: int = 100,
        *,
        lambda_l0: float | None = None,
        warm_start: bool = False,
    ) -> "SparseL0Linear":
        """Minimise the mean squared error plus lambda_reg times the expected number of coefficients.

        Adam on the whole matrix, one draw of the gates for each epoch.

        Args:
            X_sparse: (rows, n_features), scipy sparse, NumPy, or torch (dense or sparse), finite.
            y: (rows,), finite.
            lambda_reg: price of a coefficient in units of squared error, >= 0.
            lr: learning rate of Adam, > 0.
            epochs: passes over the matrix, >= 1.
            verbose: log the progress (at level INFO).
            verbose_freq: epochs between two lines, >= 1.
            lambda_l0: another name of ``lambda_reg``; wins over it.
            warm_start: go on from the present parameters instead of afresh.

        Returns:
            The model itself.

        Raises:
            ValueError: an argument is outside its range, or X or y is wrong.
        """
        price = check_not_negative("lambda_reg", lambda_reg if lambda_l0 is None else lambda_l0)
        check_positive("lr", lr)
        check_count("epochs", epochs)
        check_count("verbose_freq", verbose_freq)
        matrix = self._matrix(X_sparse)
        target = self._target(y, matrix.shape[0])
        generator = self._seeded(self.device)
        if not warm_start:
            self._start(target)
        moments = [(p, torch.zeros_like(p), torch.zeros_like(p)) for p in self.parameters()]
        with quiet_threads():
            for epoch in range(1, epochs + 1):
                z = self.gates.sample(generator=generator)
                error = mean_squared_error(self.weight * z, self.bias, matrix, target)
                penalty = self.get_l0_penalty()
                self.zero_grad(set_to_none=True)
                (error + price * penalty).backward()
                for p, first, second in moments:
                    assert p.grad is not None
                    adam_step(p, p.grad, first, second, epoch, lr)
                if verbose and epoch % verbose_freq == 0:
                    self._tell(epoch, error, penalty)
        return self

    def _tell(self, epoch: int, error: Tensor, penalty: Tensor) -> None:
        num_open = self.gates.get_num_active()
        logger.info("epoch %d: mse %.4g, L0 %.2f, open %d", epoch, error.item(), penalty.item(), num_open)

    def _target(self, y: Any, rows: int) -> Float[Tensor, "rows={rows}"]:
        target = torch.as_tensor(y).detach().to(self.device, self.weight.dtype)
        # A finite sum means that every term is finite, and is found on one thread.
        total = float(target.cpu().numpy().sum(dtype=np.float64))
        if not math.isfinite(total) and not torch.isfinite(target).all():
            raise ValueError("y must be finite, got NaN or infinity")
        if target.shape not in ((rows,), (rows, 1)):
            raise ValueError(f"y must have {rows} values, one for each row of X, got {tuple(target.shape)}")
        return target.reshape(-1)

    @torch.no_grad()
    def _start(self, target: Float[Tensor, "rows"]) -> None:
        """Small random weights, the mean as intercept, gates as in the constructor."""
        self.gates.log_alpha.copy_(self._first_log_alpha)
        generator = self._seeded("cpu")
        if generator is not None:
            torch.randn(self.n_features, generator=generator)  # the gates' jitter, drawn in the constructor
        noise = torch.randn(self.n_features, generator=generator)
        self.weight.copy_(WEIGHT_SD * noise)
        if self.bias is not None:
            self.bias.fill_(target.double().mean().item())

    @torch.no_grad()
    def predict(self, X_sparse: Any) -> Float[Tensor, "rows"]:
        """Predict with the test-time gates.

        Args:
            X_sparse: (rows, n_features), scipy sparse, NumPy, or torch (dense or sparse).

        Returns:
            Predictions, (rows,).
        """
        prediction: Tensor = self(X_sparse, deterministic=True)
        return prediction

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        # l0-python holds the locations themselves.
        if prefix + "log_alpha" in state_dict:
            state_dict[prefix + "gates.log_alpha"] = state_dict.pop(prefix + "log_alpha")
            state_dict.setdefault(prefix + "gates._extra_state", self.gates.get_extra_state())
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
