import numpy as np
import pytest
from scipy.optimize import linprog

from sparsereg.calibration.findings import check, reachable, summary
from sparsereg.calibration.problem import CalibrationProblem
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


def test_a_consistent_survey_has_nothing_out_of_reach():
    problem = synthetic_problem(500, 150, disagreement=0.0)
    assert {f.kind for f in check(problem)} <= {"tiny"}
    assert {f.kind for f in check(problem, max_weight_ratio=1e-3)} >= {"out of reach"}
