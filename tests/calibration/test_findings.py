import numpy as np
import pandas as pd
import pytest
from scipy.optimize import linprog

from sparsereg.calibration.findings import check, reachable, summary
from sparsereg.calibration.problem import CalibrationProblem
from sparsereg.calibration.reading.households import build, target_table
from sparsereg.calibration.reading.synthetic import synthetic_problem


def kinds(findings):
    return {(f.kind, f.target) for f in findings}


def test_each_kind_is_found_and_named():
    matrix = np.array(
        [
            [1, 1, 1, 1, 1],
            [0, 0, 0, 0, 0],
            [1, 1, 1, 1, 1],
            [1, 1, 1, 1, 1],
            [2, 0, 3, 0, 0],
            [0, 0, 0, 9, 0],
            [0, 1, 0, 1, 0],
            [-1, 0, 2, 0, 0],
        ],
        dtype=float,
    )
    targets = [10, 5, 10, 12, -40, 3, 0, -7]
    names = ["all", "nobody", "again", "other", "negative", "tiny", "nothing", "mixed"]
    problem = CalibrationProblem(matrix, targets, np.full(5, 2.0), target_names=names)
    findings = check(problem, hints={1: "no household has state == 'ZZ'"})
    assert kinds(findings) == {
        ("untouchable", 1),
        ("duplicate", 2),
        ("contradictory", 3),
        ("out of reach", 4),
        ("tiny", 5),
        ("zero", 6),
    }
    lines = "\n".join(summary(findings))
    assert (
        "1 untouchable: no household touches them: nobody (no household has state == 'ZZ'; target 5)" in lines
    )
    assert "other (12, while all is 10)" in lines
    assert "negative (target -40, reachable 0 to inf)" in lines


def test_the_range_is_what_linear_programming_finds():
    rng = np.random.default_rng(0)
    matrix = rng.normal(size=(6, 8)) * (rng.random((6, 8)) < 0.6)
    weights = rng.random(8) + 0.1
    problem = CalibrationProblem(matrix, np.ones(6), weights)
    exact = problem.matrix.toarray().astype(float)
    low, high = reachable(problem, max_weight_ratio=2.5)
    for i in range(6):
        for sign, bound in ((1, low), (-1, high)):
            best = linprog(sign * exact[i], bounds=[(0, 2.5 * w) for w in weights]).fun
            assert bound[i] == pytest.approx(sign * best, abs=1e-6)
    low, high = reachable(problem, hold_total=True)
    for i in range(6):
        for sign, bound in ((1, low), (-1, high)):
            best = linprog(sign * exact[i], A_eq=[np.ones(8)], b_eq=[weights.sum()]).fun
            assert bound[i] == pytest.approx(sign * best, abs=1e-6)


def test_few_households_reach_less():
    problem = CalibrationProblem(np.array([[1.0, 2, 3, -4]]), [1], np.ones(4))
    assert [float(v[0]) for v in reachable(problem, 2, 1.0)] == [-4, 5]
    assert [float(v[0]) for v in reachable(problem, 1, 1.0)] == [-4, 3]
    assert [float(v[0]) for v in reachable(problem, None, 2.0)] == [-8, 12]
    assert (
        check(CalibrationProblem(np.array([[1.0, 2, 3]]), [5.5], np.ones(3)), 2, 1.0)[0].kind
        == "out of reach"
    )


def test_nested_targets_that_exceed_or_do_not_add_up():
    matrix = np.array([[1, 1, 1], [1, 1, 0], [0, 0, 1], [1, 0, 0]], dtype=float)
    parent = [-1, 0, 0, 1]
    problem = CalibrationProblem(matrix, [10, 8, 4, 9], np.full(3, 3.0), parent=parent)
    assert kinds(check(problem)) == {("out of reach", 3), ("disagreeing levels", 0)}
    assert not check(CalibrationProblem(matrix, [10, 7, 3, 4], np.full(3, 3.0), parent=parent))


def crossed(n=600, seed=0):
    """A survey with ages, sizes, regions and incomes, and the sums that a population of it has."""
    rng = np.random.default_rng(seed)
    return pd.DataFrame(
        {
            "age": rng.integers(0, 5, n),
            "size": rng.integers(1, 5, n),
            "region": rng.choice(["n", "s"], n),
            "income": np.round(rng.lognormal(9, 1, n), 2),
            "w": rng.random(n) + 0.5,
        }
    )


def margins(table, splits, off=None):
    """Targets of splits (column, measure, where), with sums that fit the table but for one split's factor."""
    rows = []
    for k, (column, measure, where) in enumerate(splits):
        inside = table.query(where) if where else table
        for value, part in inside.groupby(column):
            condition = f"{column} == {value!r}" + (f" and {where}" if where else "")
            total = (part.w * (part[measure] if measure else 1)).sum()
            factor = 1.023 if off == k else 1.0
            rows.append((f"{column}{value}/{measure}/{where}", total * factor, column, measure, condition))
    return pd.DataFrame(rows, columns=["name", "value", "group", "measure", "where"])


SPLITS = [("age", "", ""), ("size", "", ""), ("age", "income", ""), ("region", "income", "")]


@pytest.mark.parametrize("groups", [True, False])
@pytest.mark.parametrize("off", [None, 0, 1, 2, 3])
def test_margins_that_do_not_add_up_are_found_between_groups(off, groups):
    table = crossed()
    targets = margins(table, SPLITS, off)
    if groups:
        targets["group"] = targets.group + targets.measure
    else:
        targets = targets.drop(columns="group")
    problem = build(table, target_table(targets), "w").problem
    found = [f for f in check(problem) if f.kind.startswith("disagreeing")]
    assert len(found) == (off is not None)
    if off is None:
        return
    pair = {0, 1} if off < 2 else {2, 3}
    sums = {k: targets.value[[SPLITS[k][0] in n and f"/{SPLITS[k][1]}/" in n for n in targets.name]].sum()
            for k in pair}  # fmt: skip
    for k in pair:
        assert (SPLITS[k][0] + SPLITS[k][1]) in found[0].detail or not groups
        assert f"{sums[k]:,.6g}" in found[0].detail or f"{sums[k]:,.0f}" in found[0].detail
    assert "2.3" in found[0].detail or "2.2" in found[0].detail


def test_margins_are_found_per_parent_and_group():
    table = crossed()
    whole = pd.DataFrame({"name": ["north"], "value": [table.w[table.region == "n"].sum()],
                          "group": "region", "measure": "", "where": "region == 'n'"})  # fmt: skip
    parts = margins(table, [("age", "", "region == 'n'"), ("size", "", "region == 'n'")], off=1)
    targets = pd.concat([whole, parts]).assign(parent=["", *["north"] * len(parts)])
    found = check(build(table, target_table(targets), "w").problem)
    assert [(f.kind, f.name) for f in found] == [("disagreeing levels", "north")]
    assert "its 4 parts (group 'size' of 'north') add up to" in found[0].detail
    assert "+2.30%" in found[0].detail


def test_sums_that_only_nearly_cover_the_same_are_no_margins():
    table = crossed(5000)
    targets = margins(table, [("age", "", ""), ("size", "", "")], off=1)
    targets.loc[0, "where"] += " and income > 1500"  # without a few households
    assert not [f for f in check(build(table, target_table(targets), "w").problem) if "disag" in f.kind]


def test_a_consistent_survey_has_nothing_out_of_reach():
    problem = synthetic_problem(500, 150, disagreement=0.0)
    assert {f.kind for f in check(problem)} <= {"tiny"}
    assert {f.kind for f in check(problem, max_weight_ratio=1e-3)} >= {"out of reach"}
