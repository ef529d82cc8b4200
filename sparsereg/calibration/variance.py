"""How sure the estimates of a calibrated sample are: standard errors under its sampling design.

Two ways that agree in large samples. *Linearised*: calibration takes from each value what the targets
explain of it, so the variance of a total is that of the weighted residuals, between the primary sampling
units of each stratum. *Replicates*: the sample is changed as if it had been drawn again (a unit left out,
units drawn with replacement, or as the columns of replicate weights say), every replicate is calibrated
again, and the spread of its estimates is the variance.

Source: Deville and Sarndal, JASA 87 (1992), section 3; Sarndal, Swensson and Wretman, Model Assisted
Survey Sampling (1992), section 6.6; Rao and Wu, JASA 83 (1988) for the bootstrap; R's package survey for
conventions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.sparse as sp
from scipy.stats import t as student

from sparsereg.linalg.threads import in_turns

if TYPE_CHECKING:
    import pandas as pd

METHODS = ("linearized", "jackknife", "bootstrap", "replicates")
STATISTICS = ("total", "mean", "ratio")
_SMALLEST_PIVOT = 1e-12
"""Share of the largest eigenvalue below which a direction of the targets is one too many."""

MOST_CELLS = 1_000_000_000
"""Households times replicates: 8 GB."""

Recalibrate = Callable[[np.ndarray], np.ndarray]
"""From initial weights of a replicate to calibrated ones, shape (households,) both."""


@dataclass(frozen=True, eq=False)
class Design:
    """How the sample was drawn, and how its variance is found.

    Args:
        method: "linearized", "jackknife", "bootstrap" or "replicates".
        strata: A label per household; None: one stratum.
        psu: The primary sampling unit of each household; None: each household is one.
        fpc: Population size (> 1) or sampling fraction (<= 1) of each household's stratum, counted in
            primary sampling units; None: drawn with replacement.
        replicates: For "replicates": initial weights of each, shape (households, replicates).
        scale: For "replicates": what the sum of squared differences is multiplied by, such as 1 / R for
            balanced repeated replication and the bootstrap, (R - 1) / R for the jackknife, 4 / R for
            successive differences. None: 1 / R.
        num_replicates: For "bootstrap".
        seed: For "bootstrap".

    Raises:
        ValueError: shapes differ, a primary sampling unit lies in two strata, a stratum has a single one, or
            a finite population is smaller than its sample.

    Example:
        >>> Design(strata=["a", "a", "b", "b"]).units(np.ones(4)).degrees_of_freedom
        2
    """

    method: str = "linearized"
    strata: Any = None
    psu: Any = None
    fpc: Any = None
    replicates: Any = None
    scale: float | None = None
    num_replicates: int = 500
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"variance must be one of {', '.join(METHODS)}, got {self.method!r}")
        if (self.method == "replicates") != (self.replicates is not None):
            raise ValueError("replicate weights belong to variance='replicates', which needs them")
        if self.num_replicates < 2:
            raise ValueError(f"num_replicates must be an integer >= 2, got {self.num_replicates!r}")

    def units(self, initial: np.ndarray) -> Units:
        """The primary sampling units of a sample; of initial weight 0 is who is not in it.

        Args:
            initial: Initial weights, shape (households,).

        Raises:
            ValueError: see the class.
        """
        num, there = len(initial), np.flatnonzero(initial)
        fpc = None if self.fpc is None else _numbers("fpc", self.fpc, num)
        return Units(
            _labels("strata", self.strata, num, np.zeros(num, dtype=np.int64))[there],
            _labels("psu", self.psu, num, np.arange(num))[there],
            None if fpc is None else fpc[there],
            there,
            num,
        )


@dataclass(frozen=True, eq=False)
class Units:
    """Households of the sample by primary sampling unit, and units by stratum.

    Args:
        strata: A label per household of the sample.
        psu: The same; one label in two strata is refused.
        fpc: See ``Design``, the same.
        there: Indices of the households of the sample, of all.
        num_households: All.
    """

    strata: np.ndarray
    psu: np.ndarray
    fpc: np.ndarray | None
    there: np.ndarray
    num_households: int

    def __post_init__(self) -> None:
        first = np.unique(self.of_household, return_index=True)[1]
        elsewhere = np.flatnonzero(self.of_stratum[first][self.of_household] != self.of_stratum)
        if len(elsewhere):
            here = elsewhere[0]
            unit, one, two = (
                labels[j].item()
                for labels, j in (
                    (self.psu, here),
                    (self.strata, first[self.of_household[here]]),
                    (self.strata, here),
                )
            )
            raise ValueError(
                f"psu {unit!r} lies in two strata, {one!r} and {two!r}: give every primary sampling unit a"
                " name of its own"
            )
        single = np.flatnonzero(self.sizes == 1)
        if len(single):
            label = self.strata[np.flatnonzero(self.of_stratum == single[0])[0]].item()
            where = f"stratum {label!r} has" if len(self.sizes) > 1 else "the sample has"
            raise ValueError(
                f"{where} a single primary sampling unit, which says nothing about the variance: merge strata"
            )
        if self.fpc is not None:
            self._check_fpc()

    def _check_fpc(self) -> None:
        assert self.fpc is not None
        for h in range(len(self.sizes)):
            values = np.unique(self.fpc[self.of_stratum == h])
            label = self.strata[np.flatnonzero(self.of_stratum == h)[0]].item()
            if len(values) > 1 or not values[0] > 0:
                raise ValueError(
                    f"fpc must be one positive number per stratum, got {values[:3].tolist()} in {label!r}"
                )
            if 1 < values[0] < self.sizes[h]:
                raise ValueError(
                    f"fpc: stratum {label!r} has {self.sizes[h]} primary sampling units in the sample, but"
                    f" {values[0]:g} in the population"
                )

    @cached_property
    def of_household(self) -> np.ndarray:
        """Number of the unit of each household of the sample."""
        return np.asarray(np.unique(self.psu, return_inverse=True)[1])

    @cached_property
    def of_stratum(self) -> np.ndarray:
        """Number of the stratum of each household of the sample."""
        return np.asarray(np.unique(self.strata, return_inverse=True)[1])

    @cached_property
    def stratum_of_unit(self) -> np.ndarray:
        """Number of each unit's stratum, shape (units,)."""
        first = np.unique(self.of_household, return_index=True)[1]
        return np.asarray(self.of_stratum[first])

    @cached_property
    def sizes(self) -> np.ndarray:
        """Number of units of each stratum, shape (strata,)."""
        return np.bincount(self.stratum_of_unit)

    @cached_property
    def left_out(self) -> np.ndarray:
        """1 - the share of each stratum's population that is in the sample, shape (strata,)."""
        if self.fpc is None:
            return np.ones(len(self.sizes))
        value = self.fpc[np.unique(self.of_stratum, return_index=True)[1]]
        return 1.0 - np.where(value <= 1, value, self.sizes / np.maximum(value, 1))

    @property
    def degrees_of_freedom(self) -> int:
        """Units less strata."""
        return int(self.sizes.sum() - len(self.sizes))

    def spread(self, factors: np.ndarray) -> np.ndarray:
        """Give each household what its unit has, and 0 to those who are not in the sample.

        Args:
            factors: Shape (units,).

        Returns:
            Shape (households,).
        """
        spread = np.zeros(self.num_households)
        spread[self.there] = factors[self.of_household]
        return spread

    def variance(self, values: np.ndarray) -> np.ndarray:
        """Variance of the totals of values that are weighted already.

        Args:
            values: Shape (households, statistics).

        Returns:
            Shape (statistics,).
        """
        sums = _sums(values[self.there], self.of_household, len(self.stratum_of_unit))
        means = _sums(sums, self.stratum_of_unit, len(self.sizes)) / self.sizes[:, None]
        squares = _sums((sums - means[self.stratum_of_unit]) ** 2, self.stratum_of_unit, len(self.sizes))
        return np.asarray((self.left_out * self.sizes / (self.sizes - 1)) @ squares)


@dataclass(frozen=True, eq=False)
class Replicates:
    """Calibrated weights of each replicate, and how their estimates add up to a variance.

    Args:
        weights: Shape (households, replicates).
        factors: Of each replicate's squared difference, shape (replicates,).
        center: Differences are taken from the mean of the replicates, or from the sample's own estimate.
        degrees_of_freedom: Of a confidence interval.
    """

    weights: np.ndarray
    factors: np.ndarray
    center: bool
    degrees_of_freedom: int

    def variance(self, estimates: np.ndarray, own: np.ndarray) -> np.ndarray:
        """Variance of estimates.

        Args:
            estimates: Shape (replicates, statistics).
            own: Those of the whole sample, shape (statistics,).
        """
        middle = estimates.mean(axis=0) if self.center else own
        return np.asarray(self.factors @ (estimates - middle) ** 2)


def replicate(design: Design, initial: np.ndarray, recalibrate: Recalibrate | None = None) -> Replicates:
    """Change the sample as the design says and calibrate each replicate again, in threads.

    Args:
        design: Not "linearized".
        initial: Initial weights, shape (households,).
        recalibrate: From a replicate's initial weights to calibrated ones; None: they stay as they are.

    Raises:
        ValueError: the design does not fit the households, or the replicates would not fit into memory.
    """
    drawn = _drawn(design, initial)
    num = len(drawn.factors)
    if num * len(initial) > MOST_CELLS:
        raise ValueError(
            f"{num:,} replicates of {len(initial):,} households are more than fit into memory: take"
            " variance='linearized', fewer replicates of the bootstrap, or larger units (psu)"
        )
    weights = np.empty((num, len(initial)))

    def fill(r: int) -> None:
        weights[r] = drawn.initial(r) if recalibrate is None else recalibrate(drawn.initial(r))

    in_turns(fill, [(r,) for r in range(num)])
    return Replicates(weights.T, drawn.factors, drawn.center, drawn.degrees_of_freedom)


@dataclass(frozen=True, eq=False)
class _Drawn:
    """Replicates before they are calibrated, one made at a time.

    Args:
        initial: From the number of a replicate to its initial weights, shape (households,).
        factors: See ``Replicates``.
        center: The same.
        degrees_of_freedom: The same.
    """

    initial: Callable[[int], np.ndarray]
    factors: np.ndarray
    center: bool
    degrees_of_freedom: int


def _drawn(design: Design, initial: np.ndarray) -> _Drawn:
    if design.method == "replicates":
        given = _given_replicates(design, initial)
        num = given.shape[1]
        scale = 1.0 / num if design.scale is None else design.scale
        return _Drawn(lambda r: np.where(initial > 0, given[:, r], 0.0), np.full(num, scale), False, num - 1)
    units = design.units(initial)
    freedom = units.degrees_of_freedom
    if design.method == "jackknife":
        scale = (units.left_out * (units.sizes - 1) / units.sizes)[units.stratum_of_unit]
        return _Drawn(lambda r: units.spread(_without(units, r)) * initial, scale, True, freedom)
    times = _drawn_factors(units, design.num_replicates, design.seed)
    scale = np.full(design.num_replicates, 1.0 / design.num_replicates)
    return _Drawn(lambda r: units.spread(times[:, r]) * initial, scale, True, freedom)


def _given_replicates(design: Design, initial: np.ndarray) -> np.ndarray:
    given = np.asarray(design.replicates, dtype=np.float64)
    if given.ndim != 2 or given.shape[0] != len(initial) or given.shape[1] < 2:
        raise ValueError(
            f"replicate weights must have {len(initial)} rows, one per household, and at least 2"
            f" columns, got shape {given.shape}"
        )
    if not np.isfinite(given).all() or (given < 0).any():
        raise ValueError("replicate weights must be finite numbers >= 0")
    return given


def _without(units: Units, left_out: int) -> np.ndarray:
    """Factor of each unit in the replicate of the jackknife that leaves this one out, shape (units,)."""
    stratum = units.stratum_of_unit
    size = units.sizes[stratum[left_out]]
    factors = np.where(stratum == stratum[left_out], size / (size - 1), 1.0)
    factors[left_out] = 0.0
    return factors


def _drawn_factors(units: Units, num_replicates: int, seed: int) -> np.ndarray:
    """Factor of each unit in each replicate of the bootstrap: n - 1 of n drawn, with replacement."""
    generator = np.random.default_rng(seed)
    factors = np.empty((len(units.stratum_of_unit), num_replicates))
    for h, size in enumerate(units.sizes):
        times = generator.multinomial(size - 1, np.full(size, 1.0 / size), num_replicates).T
        spread = np.sqrt(units.left_out[h])
        factors[units.stratum_of_unit == h] = 1 - spread + spread * times * size / (size - 1)
    return factors


def residuals(values: np.ndarray, rows: sp.csr_array, weights: np.ndarray) -> np.ndarray:
    """What the targets do not explain of values, by least squares with the initial weights.

    Args:
        values: Shape (households, statistics).
        rows: Targets x households.
        weights: Of the households in the regression, >= 0.
    """
    scaled = sp.csr_array(rows.multiply(weights[None]))
    square = np.asarray((scaled @ rows.T).todense(), dtype=np.float64)
    if not len(square):
        return values
    size = np.sqrt(np.maximum(np.diag(square), np.finfo(np.float64).tiny))
    eigenvalues, vectors = np.linalg.eigh(square / size[:, None] / size)
    good = eigenvalues > _SMALLEST_PIVOT * max(eigenvalues[-1], 0.0)
    right = vectors[:, good].T @ ((scaled @ values) / size[:, None])
    coefficients = vectors[:, good] @ (right / eigenvalues[good][:, None]) / size[:, None]
    return np.asarray(values - rows.T @ coefficients)


def statistics_frame(
    names: list[str],
    statistic: str,
    estimates: np.ndarray,
    variances: np.ndarray,
    simple: np.ndarray,
    degrees_of_freedom: int,
    confidence: float,
) -> pd.DataFrame:
    """One row per statistic: name, statistic, estimate, se, lower, upper, cv, design_effect.

    Args:
        names: Of the statistics.
        statistic: "total", "mean" or "ratio".
        estimates: Shape (statistics,).
        variances: Shape (statistics,).
        simple: Variances of the same statistics in a simple random sample drawn with replacement.
        degrees_of_freedom: Of Student's distribution.
        confidence: Of the intervals, in (0, 1).
    """
    import pandas as pd

    errors = np.sqrt(variances)
    reach = student.ppf(0.5 + confidence / 2, max(degrees_of_freedom, 1)) * errors
    with np.errstate(divide="ignore", invalid="ignore"):
        return pd.DataFrame(
            {
                "name": names,
                "statistic": statistic,
                "estimate": estimates,
                "se": errors,
                "lower": estimates - reach,
                "upper": estimates + reach,
                "cv": np.where(estimates != 0, errors / np.abs(estimates), np.nan),
                "design_effect": np.where(simple > 0, variances / simple, np.nan),
            }
        )


@dataclass(frozen=True, eq=False)
class Statistics:
    """Totals, means or ratios of columns, as functions of weights.

    Args:
        names: Of the columns.
        values: Shape (households, statistics).
        statistic: "total", "mean" or "ratio".
        denominators: For "ratio", shape (households, statistics).

    Raises:
        ValueError: the statistic is unknown, or a ratio has no denominator.
    """

    names: list[str]
    values: np.ndarray
    statistic: str
    denominators: np.ndarray | None = None

    def __post_init__(self) -> None:
        if self.statistic not in STATISTICS:
            raise ValueError(f"statistic must be one of {', '.join(STATISTICS)}, got {self.statistic!r}")
        if (self.statistic == "ratio") != (self.denominators is not None):
            raise ValueError("a denominator belongs to statistic='ratio', which needs one: of=COLUMNS")

    def estimate(self, weights: np.ndarray) -> np.ndarray:
        """Statistics of some weights, (statistics,), or of the columns of a matrix, (columns, statistics)."""
        totals = weights.T @ self.values
        if self.statistic == "total":
            return np.asarray(totals)
        below = weights.sum(axis=0)[..., None] if self.denominators is None else weights.T @ self.denominators
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.asarray(totals / below)

    def linearized(self, weights: np.ndarray) -> np.ndarray:
        """Values whose weighted total varies as the statistic does, shape (households, statistics)."""
        if self.statistic == "total":
            return self.values
        below = np.ones_like(self.values) if self.denominators is None else self.denominators
        return np.asarray((self.values - self.estimate(weights) * below) / (weights @ below))

    def simple_variance(self, weights: np.ndarray) -> np.ndarray:
        """Variance in a simple random sample of as many households, drawn with replacement."""
        kept = weights > 0
        w, u = weights[kept], self.linearized(weights)[kept] * weights.sum()
        n = len(w)
        mean = w @ u / w.sum()
        spread = w @ (u - mean) ** 2 / w.sum() * n / max(n - 1, 1)
        return np.asarray(spread / n)


def as_columns(columns: Any, num_households: int, what: str = "columns") -> tuple[list[str], np.ndarray]:
    """Names and numbers of columns: a table, a mapping of names to arrays, or an array.

    Raises:
        ValueError: not one number per household.
    """
    if hasattr(columns, "columns") and hasattr(columns, "to_numpy"):
        names, parts = [str(c) for c in columns.columns], [columns[c].to_numpy() for c in columns.columns]
    elif isinstance(columns, Mapping):
        names, parts = [str(c) for c in columns], list(columns.values())
    else:
        array = np.asarray(columns)
        array = array[:, None] if array.ndim == 1 else array
        if array.ndim != 2:
            raise ValueError(f"{what} must be a table or an array of one or two dimensions")
        names = [f"column_{i}" for i in range(array.shape[1])]
        parts = list(array.T)
    if not parts:
        raise ValueError(f"{what} must hold at least one column")
    return names, np.stack(
        [_numbers(f"{what}: {n}", p, num_households) for n, p in zip(names, parts, strict=True)], 1
    )


def _numbers(name: str, values: Any, length: int) -> np.ndarray:
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be numbers") from None
    if array.shape != (length,):
        raise ValueError(f"{name} must have one number per household, {length}, got shape {array.shape}")
    wrong = np.flatnonzero(~np.isfinite(array))
    if len(wrong):
        raise ValueError(f"{name} must be finite, got {array[wrong[0]]} for household {wrong[0]}")
    return array


def _labels(name: str, values: Any, length: int, default: np.ndarray) -> np.ndarray:
    if values is None:
        return default
    array = np.asarray(values)
    if array.shape != (length,):
        raise ValueError(f"{name} must have one label per household, {length}, got shape {array.shape}")
    import pandas as pd

    missing = np.asarray(pd.isna(array))
    if missing.any():
        raise ValueError(f"{name} is missing for household {int(np.flatnonzero(missing)[0])}")
    return array if array.dtype.kind in "iufU" else array.astype(str)


def _sums(values: np.ndarray, group: np.ndarray, size: int) -> np.ndarray:
    """Sums of rows by group, float64, shape (size, columns)."""
    gather = sp.csr_array((np.ones(len(group)), (group, np.arange(len(group)))), shape=(size, len(group)))
    return np.asarray(gather @ values)
