"""Standard errors: equal to R's survey, right on average, and refused where they mean nothing."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from sparsereg.calibration import CalibrationProblem, calibrate
from sparsereg.calibration.variance import Design

REFERENCE = Path(__file__).parent / "reference"
WANTED = pd.read_csv(REFERENCE / "variance.csv.gz")
API99 = {"apiclus1": 3914069, "apistrat": 3980000}


def sample(name):
    return pd.read_csv(REFERENCE / f"variance_{name}.csv.gz")


def calibrated(name, distance="linear"):
    t = sample(name)
    rows = np.stack([np.ones(len(t)), t.stype == "H", t.stype == "M", t.api99]).astype(float)
    problem = CalibrationProblem(rows, [6194, 755, 1018, API99[name]], t.pw.to_numpy())
    return t, calibrate(problem, method="calibrate", distance=distance)


def design_of(name, t, method):
    if name == "apiclus1":
        return Design(method, psu=t.dnum.to_numpy(), fpc=t.fpc.to_numpy())
    return Design(method, strata=t.stype.to_numpy(), fpc=t.fpc.to_numpy())


@pytest.mark.costly
@pytest.mark.parametrize(
    ("name", "method", "distance"),
    [
        tuple(row)
        for row in WANTED[WANTED.distance != "none"][["sample", "method", "distance"]]
        .drop_duplicates()
        .to_numpy()
    ],
)
def test_equal_to_survey_of_r(name, method, distance):
    t, result = calibrated(name, distance)
    design = design_of(name, t, method)
    wanted = WANTED[(WANTED["sample"] == name) & (WANTED.method == method) & (WANTED.distance == distance)]
    for statistic, se in zip(wanted.statistic, wanted.se, strict=True):
        kind, _, column = statistic.partition(" ")
        column, _, below = column.partition("/")
        of = t[[below]] if below else None
        found = result.standard_errors(t[[column]], design, kind, of=of)
        assert found.se[0] == pytest.approx(se, rel=1e-8), statistic
        assert found.lower[0] < found.estimate[0] < found.upper[0]


def test_replicate_weights_that_came_with_the_file():
    """The jackknife's own weights, handed over as columns, give what it gives but for its centre."""
    t, result = calibrated("apiclus1")
    units = np.unique(t.dnum, return_inverse=True)[1]
    n = units.max() + 1
    given = t.pw.to_numpy()[:, None] * np.where(units[:, None] == np.arange(n), 0.0, n / (n - 1))
    scale = (n - 1) / n * (1 - n / t.fpc[0])
    own = Design("replicates", replicates=given, scale=scale)
    found = result.standard_errors(t[["api00"]], own, "mean").se[0]
    wanted = result.standard_errors(t[["api00"]], design_of("apiclus1", t, "jackknife"), "mean").se[0]
    assert found == pytest.approx(wanted, rel=2e-2)
    replicates = result.replicates(own)
    rows = result.problem.matrix
    assert np.allclose(rows @ replicates.weights, result.problem.targets[:, None], rtol=1e-10)
    assert result.standard_errors(t[["api00"]], replicates, "mean").se[0] == found


@pytest.mark.costly
def test_bootstrap_is_near_the_linearised_one_and_repeats_itself():
    t, result = calibrated("apistrat")
    design = Design("bootstrap", strata=t.stype.to_numpy(), fpc=t.fpc.to_numpy(), num_replicates=400, seed=3)
    one, two = (result.standard_errors(t[["api00", "enroll"]], design) for _ in range(2))
    linear = result.standard_errors(t[["api00", "enroll"]], design_of("apistrat", t, "linearized"))
    assert one.equals(two)
    assert one.se.to_numpy() == pytest.approx(linear.se.to_numpy(), rel=0.15)


def test_what_is_a_target_is_known_without_error():
    t, result = calibrated("apiclus1")
    found = result.standard_errors(
        {"api99": t.api99, "count": np.ones(len(t))}, design_of("apiclus1", t, "linearized")
    )
    assert (found.se <= 1e-9 * found.estimate).all()


@pytest.mark.costly
def test_intervals_cover_as_often_as_they_say():
    """Samples of a made-up population whose truth is known: 95 % intervals of totals and means."""
    generator = np.random.default_rng(0)
    size, drawn, trials = 4000, 150, 300
    x = generator.gamma(2.0, 10.0, size)
    group = generator.integers(0, 3, size)
    y = 5 + 2 * x + 10 * group + generator.normal(0, 15, size)
    known = np.stack([np.ones(size), group == 1, group == 2, x]).astype(float)
    covered = {"total": 0, "mean": 0}
    for _ in range(trials):
        chosen = generator.choice(size, drawn, replace=False)
        problem = CalibrationProblem(known[:, chosen], known.sum(1), np.full(drawn, size / drawn))
        result = calibrate(problem, method="calibrate")
        design = Design(fpc=np.full(drawn, size))
        for statistic, truth in (("total", y.sum()), ("mean", y.mean())):
            found = result.standard_errors(y[chosen], design, statistic)
            covered[statistic] += found.lower[0] <= truth <= found.upper[0]
    for times in covered.values():  # three standard errors of a share of 0.95
        assert abs(times / trials - 0.95) < 3 * np.sqrt(0.95 * 0.05 / trials)


@pytest.mark.costly
@pytest.mark.parametrize("method", ["linearized", "jackknife", "bootstrap"])
def test_households_of_weight_zero_are_not_in_the_sample(method):
    t, result = calibrated("apiclus1")
    more = pd.concat([t, t.iloc[:30].assign(pw=0.0, dnum=999)], ignore_index=True)
    more.loc[len(t) + 5 :, "dnum"] = 1000
    rows = np.stack([np.ones(len(more)), more.stype == "H", more.stype == "M", more.api99]).astype(float)
    problem = CalibrationProblem(rows, [6194, 755, 1018, API99["apiclus1"]], more.pw.to_numpy())
    with_them = calibrate(problem, method="calibrate")
    one = result.standard_errors(t[["api00"]], design_of("apiclus1", t, method), "mean")
    two = with_them.standard_errors(more[["api00"]], design_of("apiclus1", more, method), "mean")
    pd.testing.assert_frame_equal(one, two, rtol=1e-9)


def test_more_replicates_than_fit_into_memory_are_refused(monkeypatch):
    monkeypatch.setattr("sparsereg.calibration.variance.MOST_CELLS", 1000)
    t, result = calibrated("apistrat")
    with pytest.raises(ValueError, match="200 replicates of 200 households are more than fit into memory"):
        result.replicates(Design("jackknife"))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"strata": [0, 0, 1, 1], "psu": [1, 2, 2, 3]}, "psu 2 lies in two strata, 0 and 1"),
        ({"strata": ["a", "a", "a", "b"]}, "stratum 'b' has a single primary sampling unit"),
        ({"psu": [1, 1, 1, 1]}, "the sample has a single primary sampling unit"),
        ({"fpc": [3.0, 3, 3, 3]}, "4 primary sampling units in the sample, but 3 in the population"),
        ({"fpc": [9.0, 9, 8, 9]}, "fpc must be one positive number per stratum"),
        ({"strata": [0, 0, 1]}, "strata must have one label per household, 4"),
        ({"strata": ["a", None, "a", "a"]}, "strata is missing for household 1"),
        ({"strata": pd.array(["a", pd.NA, "a", "a"])}, "strata is missing for household 1"),
        ({"method": "brr"}, "variance must be one of linearized"),
        ({"method": "replicates"}, "replicate weights belong to"),
        ({"method": "replicates", "replicates": np.ones((3, 2))}, "must have 4 rows"),
        ({"method": "replicates", "replicates": -np.ones((4, 2))}, "finite numbers >= 0"),
        ({"method": "bootstrap", "num_replicates": 1}, "num_replicates must be an integer >= 2"),
    ],
)
def test_wrong_designs_are_named(settings, said):
    problem = CalibrationProblem(np.ones((1, 4)), [8.0])
    result = calibrate(problem, method="calibrate")
    with pytest.raises(ValueError, match=said):
        result.standard_errors([1.0, 2, 3, 4], Design(**settings))


def test_wrong_columns_and_methods_are_named():
    problem = CalibrationProblem(np.ones((1, 4)), [8.0])
    result = calibrate(problem, method="calibrate")
    for columns, said in (
        ([1.0, 2], "one number per household, 4"),
        ([1.0, np.nan, 2, 3], "must be finite, got nan for household 1"),
        (["a", "b", "c", "d"], "must be numbers"),
        ({}, "at least one column"),
    ):
        with pytest.raises(ValueError, match=said):
            result.standard_errors(columns)
    with pytest.raises(ValueError, match="statistic must be one of"):
        result.standard_errors([1.0, 2, 3, 4], statistic="median")
    with pytest.raises(ValueError, match="a denominator belongs to"):
        result.standard_errors([1.0, 2, 3, 4], statistic="ratio")
    chosen = calibrate(problem, num_households=2)
    with pytest.raises(ValueError, match="chosen for their fit are no random sample"):
        chosen.standard_errors([1.0, 2, 3, 4])
