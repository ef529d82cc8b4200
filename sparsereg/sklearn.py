"""Feature selection by gates, as a scikit-learn transformer."""

from numbers import Integral, Real
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sparsereg.distributions import HardConcrete
from sparsereg.extras import missing

try:
    from sklearn.base import BaseEstimator
    from sklearn.feature_selection import SelectorMixin
    from sklearn.utils import check_random_state
    from sklearn.utils._param_validation import Interval, StrOptions
    from sklearn.utils.multiclass import check_classification_targets, type_of_target
    from sklearn.utils.validation import check_is_fitted, validate_data
except ModuleNotFoundError as error:
    raise missing(error) from error


class L0FeatureSelector(SelectorMixin, BaseEstimator):  # type: ignore[misc]
    """Selects the columns that a linear or logistic model with gated inputs keeps.

    Columns are standardised, and so is a numeric target; then the model and a Hard Concrete gate for
    each column are trained together. A column whose loss of predictive power costs less than
    ``lambda_l0`` loses its gate.

    Args:
        max_features: largest number of columns to select, >= 1; None: as many as are worth their price.
        loss: ``linear`` (squared error), ``logistic`` (cross-entropy), or ``auto``: logistic for class
            labels, linear for numbers.
        lambda_l0: price of a column, >= 0: in shares of the target's variance, or in nats.
        epochs: steps of Adam on all rows, >= 1.
        lr: its learning rate, > 0.
        temperature: beta > 0 of the gates.
        init_mean: initial P(z > 0), in (0, 1).
        random_state: seed or numpy.random.RandomState of the draws.

    Attributes:
        scores_: P(z > 0) of each column, (columns,).
        log_alpha_: locations of the gates, (columns,): the order of ``scores_`` where those round to 1.
        coef_: coefficients of the model on standardised columns, (outputs, columns).
        n_features_in_: number of columns.
        feature_names_in_: their names, if the data had any.
        classes_: class labels, for the logistic loss.
        n_iter_: steps taken.
    """

    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        "max_features": [Interval(Integral, 1, None, closed="left"), None],
        "loss": [StrOptions({"auto", "linear", "logistic"})],
        "lambda_l0": [Interval(Real, 0, None, closed="left")],
        "epochs": [Interval(Integral, 1, None, closed="left")],
        "lr": [Interval(Real, 0, None, closed="neither")],
        "temperature": [Interval(Real, 0, None, closed="neither")],
        "init_mean": [Interval(Real, 0, 1, closed="neither")],
        "random_state": ["random_state"],
    }

    def __init__(
        self,
        max_features: int | None = None,
        *,
        loss: str = "auto",
        lambda_l0: float = 0.01,
        epochs: int = 300,
        lr: float = 0.05,
        temperature: float = 0.5,
        init_mean: float = 0.9,
        random_state: Any = None,
    ) -> None:
        self.max_features = max_features
        self.loss = loss
        self.lambda_l0 = lambda_l0
        self.epochs = epochs
        self.lr = lr
        self.temperature = temperature
        self.init_mean = init_mean
        self.random_state = random_state

    def fit(self, X: Any, y: Any) -> "L0FeatureSelector":
        """Train the gates.

        Args:
            X: (rows, columns), finite numbers.
            y: (rows,) numbers or class labels.

        Returns:
            The selector itself.

        Raises:
            ValueError: an argument is outside its range, or X or y is wrong.
        """
        self._validate_params()
        X, y = validate_data(self, X, y, dtype=[np.float64, np.float32], ensure_min_samples=2)
        if self.max_features is not None and self.max_features > X.shape[1]:
            raise ValueError(f"max_features must be at most {X.shape[1]} columns, got {self.max_features}")
        target, num_outputs = self._target(y)
        inputs = torch.from_numpy(_standardised(X))
        seed = int(check_random_state(self.random_state).randint(np.iinfo(np.int32).max))
        gates, weight = self._train(inputs, target, num_outputs, seed)
        with torch.no_grad():
            self.log_alpha_ = gates.log_alpha.numpy().copy()
            self.scores_ = gates.p_active().numpy()
            self.coef_ = (weight * gates.median()).numpy()
        self.n_iter_ = self.epochs
        return self

    def _target(self, y: Any) -> tuple[Tensor, int]:
        """The target as a tensor, and the number of outputs of the model."""
        labels = type_of_target(y) in ("binary", "multiclass") and self.loss != "linear"
        if self.loss == "logistic":
            check_classification_targets(y)
        if not labels:
            number = np.asarray(y, dtype=np.float64).reshape(-1, 1)
            return torch.from_numpy(_standardised(number)), 1
        self.classes_, codes = np.unique(y, return_inverse=True)
        return torch.from_numpy(codes.reshape(-1)), len(self.classes_)

    def _train(
        self, inputs: Tensor, target: Tensor, num_outputs: int, seed: int
    ) -> tuple[HardConcrete, Tensor]:
        """Adam on all rows; one draw of the gates in each step."""
        generator = torch.Generator().manual_seed(seed)
        gates = HardConcrete(inputs.shape[1], temperature=self.temperature, init_mean=self.init_mean)
        weight = torch.zeros(num_outputs, inputs.shape[1], requires_grad=True)
        bias = torch.zeros(num_outputs, requires_grad=True)
        optimizer = torch.optim.Adam([weight, bias, *gates.parameters()], lr=self.lr)
        loss = F.cross_entropy if target.dtype == torch.int64 else F.mse_loss
        for _ in range(self.epochs):
            output = F.linear(inputs, weight * gates(generator=generator), bias)
            total = loss(output, target) + self.lambda_l0 * gates.get_penalty()
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
        return gates, weight.detach()

    def _get_support_mask(self) -> np.ndarray:
        """The open gates, at most ``max_features`` of them and at least one."""
        check_is_fitted(self)
        num_open = int((self.scores_ > 0.5).sum())
        k = max(1, min(num_open, self.max_features or num_open))
        mask = np.zeros(len(self.scores_), dtype=bool)
        mask[np.argsort(-self.log_alpha_, kind="stable")[:k]] = True
        return mask

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.required = True
        return tags


def _standardised(x: np.ndarray) -> np.ndarray:
    """Columns with mean 0 and standard deviation 1 in float32; constant ones become 0."""
    centred = x.astype(np.float64) - x.mean(0, dtype=np.float64)
    deviation = centred.std(0)
    tiny = deviation <= 10 * np.finfo(x.dtype).eps * np.abs(x).max(0)
    scaled: np.ndarray = (centred / np.where(tiny, 1.0, deviation) * ~tiny).astype(np.float32)
    return scaled
