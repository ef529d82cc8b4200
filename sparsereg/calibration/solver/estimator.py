"""``SparseCalibrationWeights``: the gated method behind the interface of l0-python."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor, nn

from sparsereg.calibration.solver.hard_concrete import GateSettings, GateSolver
from sparsereg.calibration.solver.losses import TargetLoss, check_loss, group_shares
from sparsereg.calibration.solver.matrix import HouseholdMatrix, household_matrix
from sparsereg.checks import check_count, check_finite, check_not_negative, check_positive, check_probability
from sparsereg.device import usable_device
from sparsereg.distributions import GAMMA, ZETA, gate_median, p_active, quantile
from sparsereg.linalg.checked import as_csr

_log = logging.getLogger(__name__)


class SparseCalibrationWeights(nn.Module):
    """Non-negative weights exp(log_weight) times Hard Concrete gates, fitted to weighted totals.

    Args:
        n_features: Number of weights (households), >= 1.
        beta: Temperature of the gates, > 0.
        gamma: Lower end of the stretch interval, < 0.
        zeta: Upper end of the stretch interval, > 1.
        init_keep_prob: sigmoid of the initial locations: one number in (0, 1), or one per weight in [0, 1],
            taken as at least 1e-6 and at most 1 - 1e-6.
        init_weights: Initial weights, >= 0: one number, one per weight, or None for ones.
        log_weight_jitter_sd: Standard deviation of noise added to ``log_weight`` when a fit starts, >= 0.
        log_alpha_jitter_sd: Standard deviation of noise on the initial locations, >= 0.
        device: Where to compute; without CUDA the CPU instead of it, with a warning.
        use_gates: False: plain positive weights.
        seed: Seed of all noise: of the initial locations, the start of a fit, and every draw of the gates.
            None: the seed itself is drawn from PyTorch's default generator.

    Raises:
        ValueError: An argument is outside its range.

    Example:
        >>> SparseCalibrationWeights(n_features=6, seed=0).get_weights().shape
        torch.Size([6])
    """

    def __init__(
        self,
        n_features: int,
        beta: float = 2 / 3,
        gamma: float = GAMMA,
        zeta: float = ZETA,
        init_keep_prob: float | np.ndarray = 0.5,
        init_weights: float | np.ndarray | None = None,
        log_weight_jitter_sd: float = 0.0,
        log_alpha_jitter_sd: float = 0.01,
        device: str | torch.device = "cpu",
        use_gates: bool = True,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        n_features = check_count("n_features", n_features)
        check_positive("beta", beta)
        if check_finite("gamma", gamma) >= 0 or check_finite("zeta", zeta) <= 1:
            raise ValueError(f"gamma must be < 0 and zeta > 1, got {gamma!r} and {zeta!r}")
        check_not_negative("log_weight_jitter_sd", log_weight_jitter_sd)
        check_not_negative("log_alpha_jitter_sd", log_alpha_jitter_sd)
        device = usable_device(device)
        self.n_features, self.beta, self.gamma, self.zeta = n_features, beta, gamma, zeta
        self.log_weight_jitter_sd, self.log_alpha_jitter_sd = log_weight_jitter_sd, log_alpha_jitter_sd
        self.use_gates, self.seed = use_gates, seed
        first = int(torch.randint(2**62, ()).item()) if seed is None else int(seed)
        self._generator = torch.Generator().manual_seed(first)
        weights = _per_feature("init_weights", 1.0 if init_weights is None else init_weights, n_features)
        if not ((weights >= 0) & (weights < torch.inf)).all():
            raise ValueError("init_weights must be finite numbers >= 0")
        # Arrays are often data, with zeros and ones in them; l0-python clamps them, too.
        keep = _per_feature("init_keep_prob", init_keep_prob, n_features)
        if np.ndim(init_keep_prob) == 0:
            check_probability("init_keep_prob", init_keep_prob)
        elif not ((keep >= 0) & (keep <= 1)).all():
            raise ValueError("init_keep_prob must hold probabilities in [0, 1]")
        location = torch.logit(keep.clamp(1e-6, 1 - 1e-6)) + log_alpha_jitter_sd * self._noise()
        # The small number keeps the logarithm of a weight of zero finite.
        self.log_weight = nn.Parameter(torch.log(weights + 1e-8).to(device))
        self.log_alpha = nn.Parameter(location.to(device))
        self._matrix: tuple[sp.csr_array, HouseholdMatrix] | None = None

    def _noise(self) -> Tensor:
        return torch.randn(self.n_features, generator=self._generator)

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.log_weight.device

    def get_deterministic_gates(self) -> Tensor:
        """Test-time gates, the medians."""
        return gate_median(self.log_alpha, self.beta, self.gamma, self.zeta)

    def get_weights(self, deterministic: bool = False) -> Tensor:
        """Weights times gates, shape (n_features,), differentiable.

        Args:
            deterministic: Use the medians of the gates instead of a draw.
        """
        if not self.use_gates:
            return self.log_weight.exp()
        if deterministic:
            gates = self.get_deterministic_gates()
        else:
            u = torch.rand(self.n_features, generator=self._generator).to(self.device)
            gates = quantile(self.log_alpha, u, self.beta, self.gamma, self.zeta)
        return self.log_weight.exp() * gates

    def forward(self, M: Any, deterministic: bool = False) -> Tensor:
        """Weighted sums ``M @ weights``, shape (n_targets,), differentiable.

        Args:
            M: Targets x features, any scipy sparse matrix or a dense array.
            deterministic: Use the medians of the gates instead of a draw.
        """
        weights = self.get_weights(deterministic=deterministic)
        totals: Tensor = _Totals.apply(weights, self._household_matrix(M))
        return totals.to(weights.dtype)

    def get_l0_penalty(self) -> Tensor:
        """Expected number of weights that are not zero, differentiable."""
        return p_active(self.log_alpha, self.beta, self.gamma, self.zeta).sum()

    def get_l2_penalty(self) -> Tensor:
        """Sum of the squared weights before the gates, differentiable."""
        return self.log_weight.exp().square().sum()

    @torch.no_grad()
    def get_sparsity(self) -> float:
        """Exact share of weights that are zero at test time: 1 - count / n_features of the active ones."""
        return float((self.get_deterministic_gates() == 0).double().mean())

    @torch.no_grad()
    def get_active_weights(self) -> dict[str, Any]:
        """Indices, values and count of the weights that are not zero at test time."""
        weights = self.get_weights(deterministic=True)
        active = weights > 0
        return {
            "indices": torch.where(active)[0],
            "values": weights[active],
            "count": int(active.sum().item()),
        }

    def fit(
        self,
        M: Any,
        y: np.ndarray,
        lambda_l0: float = 0.01,
        lambda_l2: float = 0.0,
        lr: float = 0.01,
        epochs: int = 1000,
        loss_type: str = "mse",
        verbose: bool = False,
        verbose_freq: int = 100,
        target_groups: np.ndarray | None = None,
        normalize_groups: bool = True,
        group_multipliers: dict[Any, float] | None = None,
    ) -> SparseCalibrationWeights:
        """Minimise loss + lambda_l0 * expected count + lambda_l2 * sum of squares, by Adam.

        Args:
            M: Targets x features, any scipy sparse matrix or a dense array.
            y: Targets, shape (targets,), finite.
            lambda_l0: Price of a weight that is not zero, >= 0.
            lambda_l2: Price of squared weights, >= 0.
            lr: Learning rate, > 0.
            epochs: Number of steps, >= 0.
            loss_type: "mse", "relative", "mape" or "capped"; summed over the targets.
            verbose: Log progress.
            verbose_freq: Every so many epochs, >= 1.
            target_groups: Group of each target; None: no groups.
            normalize_groups: Each group counts once.
            group_multipliers: Factors of groups.

        Returns:
            Itself.

        Raises:
            ValueError: An argument is outside its range, or shapes do not fit.
        """
        check_loss(loss_type)
        for name, value in (("lambda_l0", lambda_l0), ("lambda_l2", lambda_l2), ("epochs", epochs)):
            check_not_negative(name, value)
        check_positive("lr", lr)
        check_count("verbose_freq", verbose_freq)
        targets = torch.as_tensor(np.asarray(y, dtype=np.float64), device=self.device)
        matrix = self._household_matrix(M)
        if targets.shape != (matrix.num_targets,) or not torch.isfinite(targets).all():
            shape = tuple(targets.shape)
            raise ValueError(f"y must be {matrix.num_targets} finite numbers, got shape {shape}")
        shares = group_shares(
            matrix.num_targets, target_groups, normalize=normalize_groups, multipliers=group_multipliers
        )
        loss = TargetLoss(targets, torch.as_tensor(shares, device=self.device), loss_type)
        solver = self._solver(matrix, loss, GateSettings(
            lambda_l0=lambda_l0, lambda_l2=lambda_l2, lr=lr, temperature=lambda epoch: self.beta,
            num_epochs=epochs, gamma=self.gamma, zeta=self.zeta, use_gates=self.use_gates,
        ))  # fmt: skip
        with _shown(verbose):
            for done in range(0, epochs, verbose_freq if verbose else max(1, epochs)):
                solver.step(min(verbose_freq if verbose else epochs, epochs - done))
                if verbose:
                    self._log_progress(solver, matrix, targets)
        with torch.no_grad():
            self.log_weight.copy_(solver.log_weight)
            self.log_alpha.copy_(solver.log_alpha)
        return self

    def _solver(self, matrix: HouseholdMatrix, loss: TargetLoss, settings: GateSettings) -> GateSolver:
        noise = self._noise().to(self.device)
        log_weight = self.log_weight.detach() + self.log_weight_jitter_sd * noise
        seed = int(torch.randint(2**62, (), generator=self._generator).item())
        return GateSolver(matrix, loss, log_weight, self.log_alpha.detach(), settings, seed)

    def _log_progress(self, solver: GateSolver, matrix: HouseholdMatrix, targets: Tensor) -> None:
        weights = solver.weights()
        errors = (matrix.totals(weights) - targets).abs() / (targets.abs() + 1.0)
        _log.info(
            "Epoch %4d: mean_error=%.4f%%, max_error=%.1f%%, data_loss=%.6g, active=%d/%d",
            solver.epoch, 100 * float(errors.mean()), 100 * float(errors.max()), solver.last_loss,
            int((weights > 0).sum()), self.n_features,
        )  # fmt: skip

    @torch.no_grad()
    def predict(self, M: Any) -> Tensor:
        """Weighted sums with the test-time gates, shape (targets,).

        Args:
            M: Targets x features, any scipy sparse matrix or a dense array.
        """
        return self.forward(M, deterministic=True)

    def _household_matrix(self, matrix: Any) -> HouseholdMatrix:
        """Prepare a matrix, or take the prepared one if it has the same values; refuse NaN and infinity."""
        with np.errstate(over="ignore"):  # what overflows float32 is refused below
            csr = as_csr(matrix).astype(np.float32, copy=False)
        if csr.shape[1] != self.n_features:
            raise ValueError(f"M must have {self.n_features} columns, got shape {csr.shape}")
        if not np.isfinite(csr.data.sum(dtype=np.float64)) and not np.isfinite(csr.data).all():
            raise ValueError("M must be finite in float32, got NaN or infinity")
        if self._matrix is None or not _equal(self._matrix[0], csr):
            own = csr.copy()
            own.sum_duplicates()
            by_household = sp.csr_array(own.T.tocsr())
            self._matrix = (csr.copy(), household_matrix(by_household, self.device))
        elif self._matrix[1].device != self.device:
            by_household = sp.csr_array(self._matrix[0].T.tocsr())
            self._matrix = (self._matrix[0], household_matrix(by_household, self.device))
        return self._matrix[1]


class _Totals(torch.autograd.Function):
    """Weighted totals with their gradient, through a prepared matrix."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, matrix: HouseholdMatrix) -> Tensor:
        ctx.matrix, ctx.dtype = matrix, weights.dtype
        return matrix.totals(weights.detach())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.matrix.gradient(gradients[0].double()).to(ctx.dtype), None


def _per_feature(name: str, values: Any, number: int) -> Tensor:
    """One float32 number per feature from a number or an array."""
    tensor = torch.as_tensor(np.asarray(values, dtype=np.float32))
    if tensor.dim() == 0:
        return tensor.repeat(number)
    if tensor.shape != (number,):
        raise ValueError(f"{name} array must have shape ({number},), got {tuple(tensor.shape)}")
    return tensor.clone()


def _equal(one: sp.csr_array, other: sp.csr_array) -> bool:
    """Whether two matrices hold the same numbers in the same places, values included."""
    return (
        one.shape == other.shape
        and one.nnz == other.nnz
        and np.array_equal(one.indptr, other.indptr)
        and np.array_equal(one.indices, other.indices)
        and np.array_equal(one.data, other.data)
    )


@contextmanager
def _shown(verbose: bool) -> Iterator[None]:
    """Show this module's log on stderr meanwhile, if nobody has set up logging."""
    if not verbose:
        yield
        return
    level, handler = _log.level, None
    _log.setLevel(logging.INFO)
    if not _log.hasHandlers():
        handler = logging.StreamHandler()
        _log.addHandler(handler)
    try:
        yield
    finally:
        _log.setLevel(level)
        if handler is not None:
            _log.removeHandler(handler)
