"""A made-up national survey with the difficulties of a real one.

Households in districts in states, with demographics, lognormal incomes, benefits and taxes. They were drawn
with unequal probabilities and some did not answer, so that the survey's own weights miss the targets by some
ten per cent. The targets come from sources that disagree a little: each level (nation, state, district) and
each family of targets has its own error.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from sparsereg.calibration.problem import CalibrationProblem, exact_totals
from sparsereg.calibration.reading.households import BuiltProblem, build, target_matrix, target_table

if TYPE_CHECKING:
    import pandas as pd

MAX_STATES = 51
DISTRICTS_PER_STATE = 8.5
_AGE_BANDS = (0, 5, 15, 18, 25, 35, 45, 55, 65, 75)
_INCOME_BANDS = (0, 10_000, 20_000, 30_000, 50_000, 75_000, 100_000, 150_000, 250_000)


@dataclass(frozen=True)
class Family:
    """The same total in every area, e.g. households that rent.

    Args:
        group: The families that one source publishes together, e.g. "tenure".
        label: What tells it from the others of its group.
        measure: The column that is summed; "" counts households.
        where: Condition apart from the area; "" is every household of the area.
    """

    group: str
    label: str
    measure: str
    where: str


def synthetic_problem(
    households: int = 20_000,
    targets: int = 2_000,
    seed: int = 0,
    disagreement: float = 0.01,
    min_households: int = 5,
) -> CalibrationProblem:
    """Make a problem from the tables of ``synthetic_tables``.

    Args:
        households: How many.
        targets: How many.
        seed: Of everything drawn.
        disagreement: See ``synthetic_tables``.
        min_households: See ``synthetic_tables``.

    Raises:
        ValueError: Fewer than ``targets`` totals are touched by enough households.

    Example:
        >>> synthetic_problem(households=300, targets=40).num_households
        300
    """
    return _built(*synthetic_tables(households, targets, seed, disagreement, min_households)).problem


def synthetic_tables(
    households: int = 20_000,
    targets: int = 2_000,
    seed: int = 0,
    disagreement: float = 0.01,
    min_households: int = 5,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Make a table of households and a table of targets, as a user would bring them.

    Args:
        households: How many, at least 100; columns household_id, weight (the survey's own), state, district
            and what the targets need.
        targets: How many, at least 1; the nation first, then states, then districts.
        seed: Of everything drawn.
        disagreement: Standard deviation of the relative errors of the sources, >= 0. Half of the variance is
            common to a family at a level, half is each target's own. 0: one set of weights meets all targets.
        min_households: Leave out totals that fewer households touch.

    Raises:
        ValueError: An argument is out of range, or fewer than ``targets`` totals are touched by enough
            households.
    """
    import pandas as pd

    if households < 100:
        raise ValueError(f"households must be >= 100, got {households}")
    if targets < 1:
        raise ValueError(f"targets must be >= 1, got {targets}")
    if not 0 <= disagreement < 0.5:
        raise ValueError(f"disagreement must lie in [0, 0.5), got {disagreement}")
    rng = np.random.default_rng(seed)
    families = tuple(_families())
    num_states, num_districts = _areas(targets, len(families))
    table, true_weights = _households(households, num_states, num_districts, rng)
    specs = pd.DataFrame(
        _specs(families, num_states, table), columns=["name", "group", "measure", "where", "parent"]
    )
    matrix, _ = target_matrix(table, target_table(specs.assign(value=0.0)))
    enough = np.flatnonzero(np.diff(matrix.indptr) >= min_households)[:targets]
    if len(enough) < targets:
        raise ValueError(
            f"targets must be at most {len(enough)} for {households} households"
            f" (totals that {min_households} or more of them touch), got {targets}"
        )
    chosen = specs.iloc[enough].reset_index(drop=True)
    truth = exact_totals(matrix[enough], true_weights)
    noise = disagreement * np.sqrt(0.5) * (_source_errors(chosen, rng) + rng.standard_normal(targets))
    chosen.insert(1, "value", truth * np.exp(noise))
    chosen["parent"] = chosen.parent.where(chosen.parent.isin(set(chosen.name)), "")
    return table, chosen


def _built(households: pd.DataFrame, targets: pd.DataFrame) -> BuiltProblem:
    checked = target_table(targets, "the synthetic targets")
    return build(households, checked, weight="weight", id="household_id", file="the synthetic survey")


def _areas(targets: int, num_families: int) -> tuple[int, int]:
    """Return how many states and districts give that many targets, with some to spare for rare totals."""
    areas = int(np.ceil(targets / (0.85 * num_families)))
    num_states = int(np.clip(round(areas / (1 + DISTRICTS_PER_STATE)), 2, MAX_STATES))
    return num_states, max(areas - 1 - num_states, 2 * num_states)


def _households(
    n: int, num_states: int, num_districts: int, rng: np.random.Generator
) -> tuple[pd.DataFrame, np.ndarray]:
    """Return the households, and the weights that they stand for in truth (the table's miss them)."""
    import pandas as pd

    state_of = np.sort(
        rng.integers(0, num_states, num_districts - num_states).tolist() + list(range(num_states))
    )
    size = rng.lognormal(0, 0.4, num_districts)
    district = np.sort(rng.choice(num_districts, n, p=size / size.sum()))
    wealth = rng.normal(0, 0.15, num_districts)[district]
    columns: dict[str, np.ndarray] = {
        "household_id": rng.permutation(n) + 1_000_001,
        "state": state_of[district],
        "district": district,
    }
    columns |= _demographics(n, rng)
    columns |= _money(columns, wealth, rng)
    truth, weight = _weights(columns, num_districts, rng)
    frame = pd.DataFrame(columns)
    for area, digits in (("state", 2), ("district", 3)):
        names = np.array([f"{area[0].upper()}{i:0{digits}d}" for i in range(max(num_states, num_districts))])
        frame[area] = names[frame[area]]
    frame.insert(1, "weight", weight)
    return frame, truth


def _demographics(n: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    age = np.clip(rng.gamma(9, 5.6, n), 18, 95).astype(np.int16)
    single = rng.random(n) < 0.3 + 0.15 * (age > 65)
    expected = np.where((age > 22) & (age < 52), 1.1, 0.1) * np.where(single, 0.35, 1.0)
    children = np.minimum(rng.poisson(expected), 6)
    adults = np.where(single, 1, 2 + (rng.random(n) < 0.12))
    people: dict[str, np.ndarray] = {
        "age_head": age,
        "household_size": (children + adults).astype(np.int16),
        "children": children.astype(np.int16),
        "education": np.array(["school", "college", "bachelor", "graduate"])[
            np.searchsorted([0.38, 0.66, 0.87], rng.random(n))
        ],
        "tenure": np.where(rng.random(n) < np.clip(0.15 + age / 90, 0, 0.9), "own", "rent"),
        "race": np.array(["white", "black", "hispanic", "asian", "other"])[
            np.searchsorted([0.6, 0.73, 0.91, 0.97], rng.random(n))
        ],
    }
    return people | _people_by_age(age, children, adults, rng)


def _people_by_age(
    age: np.ndarray, children: np.ndarray, adults: np.ndarray, rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """Count the members of each household in each band of age."""
    n, bands = len(age), np.array(_AGE_BANDS)
    counts = np.zeros((len(bands), n), dtype=np.int16)
    everyone = np.arange(n)

    def add(ages: np.ndarray, who: np.ndarray) -> None:
        np.add.at(counts, (np.searchsorted(bands, ages, side="right") - 1, who), 1)

    add(age, everyone)
    for k in (2, 3):  # the other adults are of about the same age, the third a generation apart
        who = everyone[adults >= k]
        add(np.clip(age[who] + rng.normal(-30 * (k == 3), 5, len(who)), 18, 95), who)
    for k in range(1, int(children.max()) + 1):
        who = everyone[children >= k]
        add(rng.integers(0, 18, len(who)), who)
    return {f"people_{low}_up": counts[i] for i, low in enumerate(_AGE_BANDS)}


def _money(
    people: dict[str, np.ndarray], wealth: np.ndarray, rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """Draw incomes, benefits and taxes, each zero for many households and lognormal for the others."""
    n, age = len(wealth), people["age_head"]
    school = np.select(
        [people["education"] == e for e in ("college", "bachelor", "graduate")], [0.1, 0.4, 0.7]
    )

    def some(share: np.ndarray | float, median: np.ndarray | float, spread: float) -> np.ndarray:
        return np.where(rng.random(n) < share, median * rng.lognormal(0, spread, n), 0.0)

    working = np.where(age < 62, 0.88, np.where(age < 70, 0.45, 0.12))
    wages = some(working, 52_000 * np.exp(school + wealth), 0.75)
    business = some(0.12, 14_000 * np.exp(school + wealth), 1.3)
    pensions = some(np.where(age >= 60, 0.45, 0.03), 18_000 * np.exp(school / 2), 0.8)
    capital = some(0.18 + 0.2 * (age > 55), 900 * np.exp(school + 2 * wealth), 1.8)
    security = some(np.where(age >= 65, 0.88, np.where(age >= 62, 0.5, 0.06)), 19_000, 0.35)
    income = wages + business + pensions + capital
    size = people["household_size"]
    poor = income + security < 16_000 + 6_500 * size
    tax = 0.11 * np.maximum(income - 28_000, 0) + 0.12 * np.maximum(income - 110_000, 0)
    amounts = {
        "wages": wages,
        "business_income": business,
        "pensions": pensions,
        "capital_gains": capital,
        "social_security": security,
        "income": income,
        "income_tax": tax * rng.lognormal(0, 0.15, n),
        "property_tax": np.where(people["tenure"] == "own", some(0.95, 2_400 * np.exp(2 * wealth), 0.6), 0.0),
        "snap": some(np.where(poor, 0.65, 0.01), 2_100 * size**0.7, 0.4),
        "ssi": some(np.where(poor, 0.14, 0.004), 7_200, 0.3),
        "unemployment": some(0.05, 5_200, 0.7),
        "eitc": some(
            np.where((wages > 0) & (wages < 52_000), 0.35 + 0.15 * (people["children"] > 0), 0.0), 1_600, 0.7
        ),
        "medicaid": some(np.where(poor, 0.6, 0.08), 5_500 * size**0.8, 0.4),
    }
    rounded = {name: np.round(amount, 2) for name, amount in amounts.items()}
    band = np.searchsorted(np.array(_INCOME_BANDS), rounded["income"], side="right") - 1
    return rounded | {"income_band": band.astype(np.int16)}


def _weights(
    columns: dict[str, np.ndarray], num_districts: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Return the true weights, and the survey's: those know the design, not who did not answer."""
    n, age = len(columns["age_head"]), columns["age_head"]
    drawn = np.exp(
        0.35 * rng.standard_normal(num_districts)[columns["district"]]  # small districts are oversampled
        - 0.5 * (columns["race"] != "white")
        - 0.3 * (columns["snap"] > 0)
        + 0.15 * rng.standard_normal(n)
    )
    weight = drawn * (130_000_000 / drawn.sum())
    silent = np.exp(
        0.10 * rng.standard_normal(num_districts)[columns["district"]]
        + 0.25 * (age < 35)
        - 0.15 * (age >= 65)
        + 0.06 * (columns["income"] > 100_000)
        + 0.20 * (columns["tenure"] == "rent")
        + 0.45 * rng.standard_normal(n)
    )
    truth = weight * silent
    return truth * (weight.sum() * 1.03 / truth.sum()), np.round(weight, 3)


def _families() -> Iterator[Family]:
    """Yield the families of totals, the best known first."""
    yield Family("population", "households", "", "")
    yield Family("population", "people", "household_size", "")
    yield Family("population", "children", "children", "")
    for low in _AGE_BANDS:
        yield Family("age", f"people {low}+", f"people_{low}_up", "")
    money = (
        "wages business_income pensions capital_gains social_security income income_tax property_tax snap ssi"
        " unemployment eitc medicaid"
    )
    for amount in money.split():
        yield Family(amount, "amount", amount, "")
        yield Family(amount, "households", "", f"{amount} > 0")
    for tenure in ("own", "rent"):
        yield Family("tenure", tenure, "", f"tenure == '{tenure}'")
    for size in (1, 2, 3, 4):
        yield Family("size", f"{size} people", "", f"household_size == {size}")
    yield Family("size", "5 or more people", "", "household_size >= 5")
    for i, low in enumerate(_INCOME_BANDS):
        yield Family("income band", f"households from {low}", "", f"income_band == {i}")
    for i, low in enumerate(_INCOME_BANDS[1:], start=1):
        yield Family("income band", f"income from {low}", "income", f"income_band == {i}")
    for race in ("white", "black", "hispanic", "asian", "other"):
        yield Family("race", race, "household_size", f"race == '{race}'")
    for education in ("school", "college", "bachelor", "graduate"):
        yield Family("education", education, "", f"education == '{education}'")
    yield Family("elderly", "heads 65+ who live alone", "", "age_head >= 65 and household_size == 1")
    yield Family("elderly", "heads 65+ who rent", "", "age_head >= 65 and tenure == 'rent'")
    yield Family("families", "households with children", "", "children > 0")
    yield Family("families", "households with children on snap", "", "children > 0 and snap > 0")


def _specs(
    families: tuple[Family, ...], num_states: int, table: pd.DataFrame
) -> Iterator[tuple[str, str, str, str, str]]:
    """Yield name, group, measure, condition and parent of every total: nation, states, districts."""
    areas = table[["state", "district"]].drop_duplicates().sort_values(["state", "district"])
    levels: list[tuple[str, str, str]] = [("nation", "", "")]
    levels += [(s, f"state == '{s}'", "nation") for s in areas.state.unique()]
    levels += [(d, f"district == '{d}'", s) for s, d in areas.itertuples(index=False)]
    for area, condition, above in levels:
        for f in families:
            where = " and ".join(part for part in (condition, f.where) if part)
            kind = f"{f.group}/{f.label}"
            yield f"{area}/{kind}", f.group, f.measure, where, f"{above}/{kind}" if above else ""


def _source_errors(targets: pd.DataFrame, rng: np.random.Generator) -> np.ndarray:
    """Draw one standard normal error per level and family, and return each target's."""
    level = targets.name.str[0].map({"n": "nation", "S": "state", "D": "district"})
    codes, families = (
        targets.groupby([level, "group"], sort=False).ngroup().to_numpy(),
        targets.group.nunique(),
    )
    return np.asarray(rng.standard_normal(3 * families)[codes])
