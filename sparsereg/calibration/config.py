"""The settings of a calibration and the keys of calibrate.py: each with its type, range, default and meaning.

Nothing here imports PyTorch: the command line is checked before anything slow is loaded.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

from sparsereg.calibration.solver.distances import DISTANCES
from sparsereg.errors import InputError
from sparsereg.settings import (
    NOT_NEGATIVE,
    POSITIVE,
    RATE,
    SEED,
    SHARE,
    Contradiction,
    above,
    again,
    check_objective,
    count,
    declared,
    one_of,
    setting,
    within,
)
from sparsereg.settings import Settings as Group
from sparsereg.temperature import Temperature, TemperatureScheduler

METHODS = ("auto", "pruning", "hard_concrete", "hybrid", "random", "pps", "all", "calibrate")
"""Ways to choose; auto: pruning with num_households, hard_concrete with lambda_l0 alone, else all."""
LOSSES = ("relative", "mse", "mape", "capped")
"""Of one target, relative: squared error over its scale squared; mse: squared error; mape: absolute error
over its scale, which is the target itself only where that is its size; capped: the same, at most ``cap``.
What is minimised is their mean; ``SparseCalibrationWeights`` takes their sum."""
LAMBDA_SCALES = ("sum", "mean")
"""sum: sum of the targets' losses + lambda_l0 * expected number kept, as l0-python. mean: both are means."""
LAMBDA = 0.01
"""lambda_l0 of ``method="hard_concrete"`` where none is given: l0-python's own."""
CAP = 1.0
"""Largest contribution of one target to the capped loss: being wrong by 100 % (and all beyond)."""
WEIGHT_FORMATS = ("csv", "parquet", "dta")
WEIGHTS = ("real", "integer")
UNTOUCHABLE = ("error", "drop", "keep")
PSEUDO_TARGETS = ("auto", "none", "own_columns")
MISSING_VALUES = ("error", "zero", "drop")
DECIMALS = ("point", "comma")
RECONCILE = ("none", "proportional", "standard_errors")
AREA_MODES = ("independent", "joint", "prune")
VARIANCES = ("linearized", "jackknife", "bootstrap", "replicates")
"""How standard errors are found; see variance.py."""
REPLICATE_TYPES = ("brr", "fay", "jk1", "acs")
REPLICATE_FORMATS = ("parquet", "csv")


@dataclass(frozen=True)
class PruningSchedule(Group):
    """How much work the selection does."""

    stages: int = setting(40, "times that households are dropped", count())
    sweeps: int = setting(25, "sweeps over the households before each of them", count())
    first_sweeps: int = setting(40, "sweeps over everybody before the first", count())
    power: float = setting(
        3.0, "shape of the descent from N to K: log(kept / K) falls as (1 - stage / stages)^power", POSITIVE
    )
    swap_rounds: int = setting(40, "most rounds of swaps; 0 for none", count(0))
    swap_share: float = setting(
        0.3, "share of the households exchanged in the first round", within("(0, 1]", "a share")
    )
    swap_shrink: float = setting(0.85, "factor on that share after a round that failed", within("(0, 1)"))
    swap_sweeps: int = setting(48, "sweeps after an exchange", count())
    swap_parts: int = setting(8, "parts in which households are added", count())
    swap_surplus: float = setting(
        1.0, "surplus that is added and pruned again, as a share of those exchanged", NOT_NEGATIVE
    )


@dataclass(frozen=True)
class Settings(Group):
    """How to calibrate.

    Example:
        >>> Settings(epochs=50).epochs
        50
    """

    lambda_l0: float | None = setting(
        None, "price of keeping one household; decides where num_households does not", NOT_NEGATIVE
    )
    lambda_l2: float = setting(0.0, "hard_concrete: price of large weights", NOT_NEGATIVE)
    lambda_scale: str = setting(
        "sum",
        "sum: as in l0-python; mean: prices per share of the households, comparable across sizes",
        choices=LAMBDA_SCALES,
    )
    loss: str = setting(
        "relative",
        "of an error e and its scale s, relative: (e / s)^2; mape: |e| / s, a percentage only where s is the"
        " target; capped: that, at most cap; mse: e^2, in the targets' units",
        choices=LOSSES,
    )
    cap: float = setting(CAP, "capped: the largest relative error that counts", above(0, "a relative error"))
    method: str = setting(
        "auto",
        "auto (pruning with num_households, hard_concrete with lambda_l0 alone, else all), ...",
        choices=METHODS,
    )
    max_weight_ratio: float | None = setting(
        None, "no weight above this multiple of the initial weight; null: no limit", POSITIVE
    )
    hold_total: bool = setting(False, "keep the sum of the weights at the sum of the initial weights")
    refit: bool = setting(True, "the best weights for the chosen households, to optimality")
    chi2: float | None = setting(
        None,
        "pull towards the initial weights, evens them out; null: 1e-4 while households are chosen, 1e-7 for"
        " the final weights",
        NOT_NEGATIVE,
    )
    consistency: float = setting(
        0.0, "nested targets: weight of parts that should add up to the whole", NOT_NEGATIVE
    )
    normalize_groups: bool = setting(
        False, "every group of targets counts the same, however many targets it has"
    )
    group_multipliers: Mapping[Any, float] | None = setting(
        dict, "how much single groups count, e.g. +group_multipliers.income=2"
    )
    gate_share: float = setting(
        0.25, "hybrid: share of the kept households that the gates choose; the others are drawn", SHARE
    )
    epochs: int = setting(1000, "gates: passes over the matrix", count())
    lr: float = setting(0.15, "gates: learning rate", POSITIVE)
    droprate_init: float = setting(0.001, "gates: initial dropout rate", RATE)
    temperature: float | Temperature | TemperatureScheduler = setting(0.65, "gates: beta", POSITIVE)
    log_weight_jitter: float = setting(
        0.05, "gates: standard deviation of the noise on initial weights", NOT_NEGATIVE, key=False
    )
    log_alpha_jitter: float = setting(
        0.01, "gates: standard deviation of the noise on their location", NOT_NEGATIVE, key=False
    )
    schedule: PruningSchedule = setting(PruningSchedule, "work of the pruning", key=False)
    distance: str = setting(
        "linear", "calibrate: how far weights are from the initial ones", choices=DISTANCES
    )
    bounds: Any = setting(
        None, "calibrate: [low, high] of weight over initial weight, numbers, null or columns"
    )
    weight_bounds: Any = setting(None, "calibrate: [low, high] of the weight itself, likewise")
    unit_factor: Any = setting(
        None, "calibrate: a column of numbers > 0; weights of a large one are changed first"
    )
    weights: str = setting(
        "real", "integer: whole weights, by systematic rounding and swaps; totals are kept", choices=WEIGHTS
    )
    seed: int = setting(0, "of all noise: the same seed gives the same weights", SEED)
    device: str = setting("cpu", "auto, cpu, cuda or cuda:N")
    backend: str = setting("auto", "how to compute, see household_matrix", key=False)

    def check(self) -> None:
        """Bounds are kept by the refit; method=calibrate has settings of its own."""
        self._check_exact()
        for name in ("max_weight_ratio", "hold_total"):
            if getattr(self, name) and not self.refit:
                raise Contradiction(
                    f"{{}}{name} is kept by the refit: it cannot be combined with {{}}refit=false"
                )

    def _check_exact(self) -> None:
        """Refuse settings of method=calibrate elsewhere, and others with it."""
        if self.method != "calibrate":
            given = [n for n in ("bounds", "weight_bounds", "unit_factor") if getattr(self, n) is not None]
            given += ["distance"] if self.distance != "linear" else []
            if given:
                raise Contradiction(
                    f"{{}}{given[0]} needs {{}}method=calibrate, got {{}}method={self.method}"
                )
            return
        for name, usual in (("loss", "relative"), ("hold_total", False), ("refit", True), ("consistency", 0)):
            if getattr(self, name) != usual:
                raise Contradiction(
                    f"{{}}method=calibrate does not know {{}}{name}: its targets are hard, or priced by their"
                    " weight; a total to hold is a target"
                )
        if self.distance == "logit" and self.bounds is None and self.weight_bounds is None:
            raise Contradiction("{}distance=logit needs {}bounds=[low,high], for example [0.3,3]")

    @property
    def price(self) -> float:
        """Lambda of the gates: as it was given, else ``LAMBDA``."""
        return LAMBDA if self.lambda_l0 is None else self.lambda_l0

    def temperature_at(self, epoch: float) -> float:
        """Beta of the gates at an epoch."""
        t = self.temperature
        if isinstance(t, Temperature):
            t = t.scheduler()
        return t.get_temperature(epoch) if isinstance(t, TemperatureScheduler) else t


@dataclass(frozen=True)
class Holdout(Group):
    """Which targets are left out to see how the weights do on targets that they were not made for."""

    groups: str | tuple[str, ...] | None = setting(
        "auto", "groups of targets to leave out: auto (a fifth, on problems of moderate size), null or [a,b]"
    )
    folds: int | None = setting(
        None, "instead: share all groups out to so many folds and leave out each in turn", count(2)
    )

    def check(self) -> None:
        """One way to share out the groups."""
        if self.folds is not None and self.groups not in (None, "auto"):
            raise Contradiction("{}groups and {}folds contradict each other: give one of them")


@dataclass(frozen=True)
class Require(Group):
    """What a run has to reach; one that falls short ends with exit code 3, its files written."""

    max_error: float | None = setting(
        None, "largest error of a target beyond its tolerance, over its scale: 0.01 is 1 %", NOT_NEGATIVE
    )
    mean_error: float | None = setting(None, "mean absolute relative error", NOT_NEGATIVE)
    median_error: float | None = setting(None, "median absolute relative error", NOT_NEGATIVE)
    within_1pct: float | None = setting(None, "least share of the targets within 1 %", SHARE)
    within_10pct: float | None = setting(None, "least share of the targets within 10 %", SHARE)
    held_out_error: float | None = setting(
        None, "mean absolute relative error of the targets that are held out", NOT_NEGATIVE
    )
    max_cv: float | None = setting(
        None, "largest standard error over its estimate, of report.variables: 0.05 is 5 %", NOT_NEGATIVE
    )
    ess: float | None = setting(None, "least effective sample size", NOT_NEGATIVE)
    weighting_effect: float | None = setting(None, "largest kept / ess", NOT_NEGATIVE)
    design_effect: float | None = setting(None, "weighting_effect under its old name", NOT_NEGATIVE)
    max_ratio: float | None = setting(None, "largest weight over initial weight", NOT_NEGATIVE)
    max_weight: float | None = setting(None, "largest weight", NOT_NEGATIVE)
    bounds_hit: int | None = setting(None, "most weights at a bound", count(0))
    gave_way: int | None = setting(None, "calibrate: most targets that gave way", count(0))
    untouched_targets: int | None = setting(None, "most targets that no kept household touches", count(0))


@dataclass(frozen=True)
class Replicates(Group):
    """Replicate weights: those that came with the file, and those that are written."""

    columns: tuple[str, ...] | None = setting(
        None, "variance=replicates: the columns of the replicate weights, instead of a pattern"
    )
    type: str | None = setting(
        None, "how they were made, which says their scale: brr, fay, jk1 or acs", choices=REPLICATE_TYPES
    )
    fay: float = setting(0.5, "type=fay: by how much weights were changed", within("[0, 1)"))
    scale: float | None = setting(
        None, "instead of type: what the sum of squared differences is multiplied by; null: 1 / R", POSITIVE
    )
    format: str = setting("parquet", "of replicate_weights: parquet or csv", choices=REPLICATE_FORMATS)

    def check(self) -> None:
        """One thing says the scale."""
        if self.scale is not None and self.type is not None:
            raise Contradiction("{}scale and {}type contradict each other: give one of them")

    def factor(self, num_replicates: int) -> float | None:
        """What the sum of squared differences of so many replicates is multiplied by; None: 1 / R."""
        n = num_replicates
        known = {"brr": 1 / n, "fay": 1 / (n * (1 - self.fay) ** 2), "jk1": (n - 1) / n, "acs": 4 / n}
        return self.scale if self.type is None else known[self.type]


@dataclass(frozen=True)
class Targets(Group):
    """Which rows of the table of targets count."""

    year: int | tuple[int, ...] | None = setting(
        None,
        "the column value_YEAR, or the rows of this year; [2025,2026]: weights for each, one after the other",
        within("[1, 999999]", "a year"),
    )
    include: str | tuple[str, ...] | None = setting(
        None, "conditions over the columns of the table: a target that fulfils none of them is left out"
    )
    exclude: str | tuple[str, ...] | None = setting(
        None, "conditions likewise: a target that fulfils one of them is left out"
    )

    @property
    def years(self) -> tuple[int, ...]:
        """The years that are asked for; none: the column value."""
        return () if self.year is None else (self.year,) if isinstance(self.year, int) else self.year

    @property
    def rules(self) -> dict[str, tuple[str, ...]]:
        """Conditions of both kinds, as ``book.Book`` takes them."""
        given = {"include": self.include, "exclude": self.exclude}
        return {key: (v,) if isinstance(v, str) else tuple(v or ()) for key, v in given.items()}

    @property
    def is_given(self) -> bool:
        """Whether there is anything that a table of targets has to be read for."""
        return any(getattr(self, name) is not None for name in ("year", "include", "exclude"))

    def check(self) -> None:
        """Each year once."""
        if len(set(self.years)) < len(self.years):
            raise InputError(f"targets.year: a year is there twice: {list(self.years)}")


@dataclass(frozen=True)
class Area(Group):
    """Weights of its own for every area that the column ``area`` of the targets names."""

    column: str | None = setting(None, "column of the households that says in which area each lives")
    clones: int | None = setting(
        None,
        "each household stands for so many areas, drawn in proportion to their size, in equal parts",
        count(),
    )
    crosswalk: str | None = setting(
        None,
        "FILE with area,share and optionally id: which areas a household may stand for; shares add up to 1",
    )
    groups: str | None = setting(
        None, "FILE with area,parent: groups of areas, such as states, that have targets, too"
    )
    mode: str = setting(
        "independent",
        "independent: each area exactly, by itself; joint: all levels at once, soft; prune: few clones kept",
        choices=AREA_MODES,
    )
    price: float = setting(
        100.0,
        "joint: what it costs to miss a target by 1 % of its size, beside changing all its weights by 1 %",
        POSITIVE,
    )
    keep: int | None = setting(None, "prune: how many pairs of area and household are kept, exactly", count())
    most: int = setting(10, "prune: for how many areas one household may be kept", count())
    reconcile: str = setting(
        "none",
        "targets that do not add up: none leaves them, proportional multiplies parts to their whole,"
        " standard_errors moves each by the column standard_error",
        choices=RECONCILE,
    )
    files: bool = setting(False, "also write the weights of each area to a file of its own")

    @property
    def is_given(self) -> bool:
        """Whether areas are to be calibrated."""
        return any(getattr(self, name) is not None for name in ("column", "clones", "crosswalk"))

    def check(self) -> None:
        """One thing says who stands for which area."""
        given = [n for n in ("column", "clones", "crosswalk") if getattr(self, n) is not None]
        if len(given) > 1:
            raise Contradiction(f"{{}}{given[0]} and {{}}{given[1]} contradict each other: give one of them")
        if not given and (
            self.files or self.reconcile != "none" or self.mode != "independent" or self.groups
        ):
            raise Contradiction(
                "{}files and {}reconcile need {}column, {}clones or {}crosswalk; so do {}mode and {}groups"
            )
        for name, usual, mode in (("price", 100.0, "independent"), ("most", 10, "joint")):
            if getattr(self, name) != usual and self.mode in ("independent", mode):
                needed = "joint or prune" if name == "price" else "prune"
                raise Contradiction(f"{{}}{name} needs {{}}mode={needed}, got {{}}mode={self.mode}")
        if (self.mode == "prune") != (self.keep is not None):
            raise Contradiction("{}mode=prune and {}keep=K need each other")


@dataclass(frozen=True)
class Report(Group):
    """What is told besides the targets."""

    variables: tuple[str, ...] | str | None = setting(
        None,
        "columns whose totals and means are estimated, [income,rent], A/B for a ratio; or a table, V.csv"
        " with name and optionally measure,where,of,of_where",
    )


@dataclass(frozen=True)
class Problem(Group):
    """What is calibrated."""

    NUM_HOUSEHOLDS: ClassVar[int | None] = None
    """num_households where nothing else is said."""
    NEEDED: ClassVar[tuple[str, ...]] = ()
    """Keys that have to be given."""

    kind: str = setting("", "")

    @property
    def unit(self) -> str:
        """What one of those that get a weight is called."""
        return "household"

    @classmethod
    def kind_of(cls, given: Mapping[str, Any], where: str) -> type[Group]:
        """The kind that ``kind`` names."""
        if "kind" not in given:
            raise InputError(f"{where}.kind is missing: expected one of {', '.join(PROBLEMS)}")
        one_of(given["kind"], f"{where}.kind", list(PROBLEMS))
        return PROBLEMS[given["kind"]]

    def check(self) -> None:
        """Everything needed is there."""
        for key in self.NEEDED:
            if getattr(self, key) is None:
                raise Contradiction(f"problem={self.kind} needs {{}}{key}=FILE")


@dataclass(frozen=True)
class SyntheticProblem(Problem):
    """A made-up national survey; nothing to bring. Up to 337,704 households and 32,633 targets."""

    NUM_HOUSEHOLDS = 2000

    kind: str = setting("synthetic", "", choices=("synthetic",))
    households: int = setting(20000, "how many", count(100))
    targets: int = setting(2000, "how many", count())
    disagreement: float = setting(
        0.01,
        "standard deviation of the relative errors of the sources of the targets; 0: consistent",
        within("[0, 0.5)"),
    )
    seed: int = setting(0, "of the survey; the seed of the calibration is the key seed", SEED)
    tables: str | None = setting(
        None, "a folder: write the survey there as households.csv and targets.csv, as an example"
    )


@dataclass(frozen=True)
class MatrixProblem(Problem):
    """A matrix, targets x households, written with scipy.sparse.save_npz, and a table of targets."""

    NEEDED = ("matrix", "targets")

    kind: str = setting("matrix", "", choices=("matrix",))
    matrix: str | None = setting(None, "M.npz")
    targets: str | None = setting(
        None, "T.csv: name,value and optionally group,weight,parent; row i is row i of the matrix"
    )
    weights: str | None = setting(
        None, "W.csv: weight and optionally id; row i is column i of the matrix; null: all ones"
    )
    decimal: str = setting("point", "the sign in numbers of CSV files, point or comma", choices=DECIMALS)
    encoding: str | None = setting(None, "of CSV files, e.g. cp1252; null: UTF-8, or UTF-16 if they say so")


@dataclass(frozen=True)
class HouseholdsProblem(Problem):
    """A table of households and a table of targets with measure and where."""

    NEEDED = ("households", "targets")

    kind: str = setting("households", "", choices=("households",))
    households: str | None = setting(
        None, "H.csv, .parquet, .dta, .sav, .sas7bdat, .xlsx::SHEET, .duckdb::TABLE or .sqlite::TABLE"
    )
    targets: str | None = setting(
        None, "T.csv, or T.xlsx ...: name,value and optionally group,weight,measure,where,parent"
    )
    persons: str | None = setting(
        None, "P.csv, P.parquet ...: persons in the households, whom targets with unit=person count and sum"
    )
    household_id: str | None = setting(
        None, "column of the persons, and of the households, that says which household; null: as id"
    )
    person_id: str | None = setting(None, "column that names the persons; null: they have no names")
    unit_names: tuple[str, str] = setting(
        ("household", "person"), "what unit in T.csv calls rows of the two tables, e.g. [school,pupil]"
    )
    weight: str | None = setting(None, "column of the initial weights; null: all ones")
    id: str | None = setting(None, "column that names the households; null: numbered from 0")
    decimal: str = setting("point", "the sign in numbers of CSV files, point or comma", choices=DECIMALS)
    encoding: str | None = setting(None, "of CSV files, e.g. cp1252; null: UTF-8, or UTF-16 if they say so")

    @property
    def unit(self) -> str:
        """See ``Problem``."""
        return self.unit_names[0]

    def check(self) -> None:
        """Persons are in households."""
        super().check()
        if self.persons is None and (self.household_id or self.person_id):
            raise Contradiction("{}household_id and {}person_id need {}persons=P.csv")
        if self.persons is not None and self.household_id is None and self.id is None:
            raise Contradiction("{}persons needs {}household_id=COLUMN: which household each is in")
        if self.unit_names[0] == self.unit_names[1]:
            raise InputError("unit_names: expected two different names")


PROBLEMS: dict[str, type[Problem]] = {
    "synthetic": SyntheticProblem,
    "matrix": MatrixProblem,
    "households": HouseholdsProblem,
}
"""Settings of each ``problem=NAME``."""
DEVICES = ("auto", "cpu", "cuda")
Bounds: TypeAlias = tuple[float | str | None, float | str | None] | None
"""Lowest and highest: a number, a column of the households, or null for no limit."""


OBJECTIVES = (
    *("mean_are", "median_are", "max_are", "within_10pct", "loss", "kept", "ess", "max_weight", "seconds"),
    *("held_out_mean", "held_out_median", "max_abs_scaled_error"),
)
"""Numbers of results.json that a sweeper can be given."""


@dataclass(frozen=True)
class CalibrationRun(Settings):
    """Choose few survey households and weights so that totals meet targets. `python calibrate.py --help`."""

    temperature: Temperature = setting(
        lambda: Temperature(initial=0.65, anneal_epochs=1000),
        "gates: a number (temperature=0.5) or a schedule (temperature=exponential)",
    )
    bounds: Bounds = again(Settings, "bounds", None)
    weight_bounds: Bounds = again(Settings, "weight_bounds", None)
    unit_factor: str | None = again(Settings, "unit_factor", None)
    device: str = again(Settings, "device", "auto")
    num_households: int | None = setting(
        SyntheticProblem.NUM_HOUSEHOLDS,
        "how many to keep, exactly; null: all, or as many as lambda_l0 leaves",
        count(),
    )
    pseudo_targets: str = setting(
        "auto",
        "own_columns: totals of the household table's own columns, of the whole file, as soft targets; auto:"
        " where every target has a tolerance, and within it",
        choices=PSEUDO_TARGETS,
    )
    untouchable: str = setting(
        "error",
        "targets that no household touches: error, drop (calibrate without) or keep",
        choices=UNTOUCHABLE,
    )
    missing: str = setting(
        "error",
        "missing values in measures: error, zero (they add nothing) or drop (such households leave)",
        choices=MISSING_VALUES,
    )
    missing_in: Mapping[str, str] = setting(dict, "the same for single columns, e.g. +missing_in.income=zero")
    variance: str | None = setting(
        None,
        "calibrate: standard errors by linearized, jackknife, bootstrap or replicates:PATTERN, where PATTERN"
        " names the columns of replicate weights (wt* or a prefix)",
    )
    strata: str | None = setting(None, "variance: column of the strata of the sample")
    psu: str | None = setting(
        None, "variance: column of the primary sampling units; null: each household is one"
    )
    fpc: str | None = setting(
        None, "variance: column of the size of each stratum's population in units, or the share in the sample"
    )
    num_replicates: int = setting(500, "variance=bootstrap: how many", count(2))
    replicates: Replicates = setting(Replicates, "weights of replicates of the sample")
    report: Report = setting(Report, "what is told besides the targets")
    targets: Targets = setting(Targets, "which rows of the table of targets count")
    area: Area = setting(Area, "weights for every area")
    compare: tuple[str, ...] | None = setting(
        None, "instead of a calibration: the folders of two runs, compare=RUN1,RUN2"
    )
    start: str | None = setting(
        None, "weights of an earlier calibration to start from: a table with id and weight, or a run's folder"
    )
    ckpt_path: str | None = setting(None, "the checkpoint of an interrupted run, to continue it")
    checkpoint_seconds: float = setting(30.0, "seconds between checkpoints", NOT_NEGATIVE)
    weights_format: str = setting("csv", "csv, parquet or dta (Stata)", choices=WEIGHT_FORMATS)
    plots: bool = setting(True, "draw them")
    tensorboard: bool = setting(True, "write its events")
    log_moments: int = setting(10, "how many moments of the run calibration_log.csv shows", count(2))
    objective: str | tuple[str, ...] = setting(
        "mean_are",
        "in a sweep: the number of results.json that Hydra's sweeper gets, or a list of them",
    )
    rerun: bool = setting(False, "in a sweep (-m): do jobs again that finished in an earlier sweep")
    holdout: Holdout = setting(Holdout, "left out to see how the weights do on other targets")
    require: Require = setting(Require, "what must be reached: a run that falls short ends with exit code 3")
    problem: Problem = setting(SyntheticProblem, "what is calibrated")

    def check(self) -> None:
        """A place to compute, and something that decides how many households stay."""
        super().check()
        one_of(self.device.partition(":")[0], "device", DEVICES)
        check_objective(self.objective, OBJECTIVES)
        if (self.missing != "error" or self.missing_in) and not isinstance(self.problem, HouseholdsProblem):
            raise Contradiction("{}missing needs {}problem=households: nothing is missing elsewhere")
        if self.compare is not None and len(self.compare) != 2:
            raise Contradiction(f"{{}}compare needs the folders of two runs, got {len(self.compare)}")
        if self.require.max_cv is not None and (self.variance is None or self.report.variables is None):
            raise Contradiction("{}require.max_cv needs {}variance=linearized and {}report.variables=[...]")
        if self.require.held_out_error is not None and self.holdout.groups is None and not self.holdout.folds:
            raise Contradiction("{}require.held_out_error needs a hold-out: {}holdout.folds=5, for example")
        self._check_variance()
        self._check_targets()
        self._check_area()
        if self.pseudo_targets == "own_columns":
            if isinstance(self.problem, MatrixProblem):
                raise Contradiction("{}pseudo_targets needs the households' columns: {}problem=households")
            if self.num_households is None:
                raise Contradiction("{}pseudo_targets needs {}num_households=K: it is for a selection")
        for name in ("bounds", "weight_bounds"):
            low, high = getattr(self, name) or (None, None)
            if isinstance(low, float) and isinstance(high, float) and low > high:
                raise InputError(f"{name}=[{low:g}, {high:g}]: expected the smaller one first")

    def _check_targets(self) -> None:
        """A book of targets is a table that somebody brings."""
        if self.targets.is_given and isinstance(self.problem, SyntheticProblem):
            raise Contradiction("{}targets.year, include and exclude need {}problem=households or matrix")

    def _check_area(self) -> None:
        """Areas are calibrated exactly, from households, with what belongs to that."""
        if not self.area.is_given:
            return
        if self.method != "calibrate" or not isinstance(self.problem, HouseholdsProblem):
            raise Contradiction(
                "{}area.column, clones or crosswalk need {}method=calibrate problem=households"
            )
        if self.area.mode == "prune" and self.bounds is not None:
            raise Contradiction("{}bounds are for areas that keep everybody, not for {}area.mode=prune")
        if any(isinstance(side, str) for side in self.bounds or ()):
            raise Contradiction("areas know bounds that are numbers: {}bounds=[low,high]")
        strange = [*self.of_whole_runs, *(["weight_bounds"] if self.weight_bounds is not None else [])]
        if strange:
            raise Contradiction(f"{{}}{strange[0]} is not known where areas have weights of their own")
        if self.missing == "drop" or "drop" in self.missing_in.values():
            raise Contradiction("areas know {}missing=error and {}missing=zero")
        if self.weights_format not in ("csv", "parquet"):
            raise Contradiction("areas write {}weights_format=csv or parquet")

    @property
    def of_whole_runs(self) -> list[str]:
        """What is given that only one process with one weight per household knows."""
        usual = {"untouchable": "error", "normalize_groups": False, "pseudo_targets": "auto"}
        others = ("variance", "unit_factor", "start", "ckpt_path", "max_weight_ratio")
        given = [name for name, v in (usual | dict.fromkeys(others)).items() if getattr(self, name) != v]
        given += ["group_multipliers"] if self.group_multipliers else []
        given += ["a list of years as targets.year"] if len(self.targets.years) > 1 else []
        persons = isinstance(self.problem, HouseholdsProblem) and self.problem.persons is not None
        given += ["problem.persons"] if persons else []
        given += ["report.variables"] if self.report.variables is not None else []
        return given + (["holdout.folds"] if self.holdout.folds is not None else [])

    @property
    def variance_method(self) -> str | None:
        """How standard errors are found, without the columns of replicates:PATTERN."""
        return None if self.variance is None else self.variance.partition(":")[0]

    @property
    def replicate_pattern(self) -> str | None:
        """PATTERN of variance=replicates:PATTERN."""
        return None if self.variance is None else self.variance.partition(":")[2] or None

    def _check_variance(self) -> None:
        """A sampling design belongs to a variance, and that to a calibration of everybody."""
        method, pattern = self.variance_method, self.replicate_pattern
        design = [n for n in ("strata", "psu", "fpc") if getattr(self, n) is not None]
        own = [f"replicates.{n}" for n in ("columns", "type", "scale") if getattr(self.replicates, n)]
        if method is None:
            if design or own:
                raise Contradiction(f"{{}}{(design + own)[0]} needs {{}}variance={'|'.join(VARIANCES)}")
            return
        one_of(method, "variance", VARIANCES)
        if self.method != "calibrate":
            raise Contradiction(
                f"{{}}variance needs {{}}method=calibrate, got {{}}method={self.method}: households chosen"
                " for their fit are no random sample; calibrate the whole file and take its standard errors"
            )
        if method != "replicates" and (pattern or own):
            what = f"variance={self.variance}" if pattern else own[0]
            raise Contradiction(
                f"{{}}{what}: columns of replicate weights need {{}}variance=replicates:PATTERN"
            )
        if method == "replicates" and design:
            raise Contradiction(
                f"{{}}variance=replicates knows the design from its columns: leave {{}}{design[0]} out"
            )
        if (
            method != "bootstrap"
            and self.num_replicates != declared(CalibrationRun)["num_replicates"].default
        ):
            raise Contradiction(
                f"{{}}num_replicates is how many {{}}variance=bootstrap draws: leave it out with"
                f" {{}}variance={method}"
            )
        if method == "replicates" and (pattern is None) == (self.replicates.columns is None):
            raise Contradiction(
                "{}variance=replicates needs {}variance=replicates:PATTERN or {}replicates.columns=[...]"
            )

    def solver(self, groups: Collection[str] | None = None) -> Settings:
        """Return the part that the solver needs.

        Args:
            groups: of a problem with some of the groups only: multipliers of others are left out.
        """
        values = {name: getattr(self, name) for name in declared(Settings)}
        if groups is not None:
            given = values["group_multipliers"] or {}
            values["group_multipliers"] = {k: v for k, v in given.items() if k in groups}
        return Settings(**values)
