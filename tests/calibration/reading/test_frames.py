"""Two DataFrames to a problem."""

import pandas as pd
import pytest

from sparsereg.calibration import calibrate, problem_from_frames


@pytest.fixture
def households():
    return pd.DataFrame(
        {"hh": ["a", "b", "c"], "state": ["CA", "CA", "NY"], "people": [1, 2, 4], "w": [10.0] * 3}
    )


@pytest.fixture
def targets():
    return pd.DataFrame(
        {
            "name": ["CA", "people"],
            "value": [22.0, 70.0],
            "measure": [None, "people"],
            "where": ["state == 'CA'", None],
        }
    )


def test_a_problem_has_what_the_tables_say(households, targets):
    problem = problem_from_frames(households, targets, weight="w", id="hh")
    assert problem.matrix.toarray().tolist() == [[1, 1, 0], [1, 2, 4]]
    assert problem.targets.tolist() == [22, 70]
    assert problem.starting_weights.tolist() == [10, 10, 10]
    assert problem.ids.tolist() == ["a", "b", "c"]
    result = calibrate(problem, method="calibrate")
    assert result.estimates == pytest.approx([22, 70])
    assert problem_from_frames(households, targets).starting_weights.tolist() == [1, 1, 1]


def test_wrong_tables_are_named(households, targets):
    with pytest.raises(ValueError, match="weigth"):
        problem_from_frames(households, targets, weight="weigth")
    with pytest.raises(ValueError, match="peple"):
        problem_from_frames(households, targets.assign(measure=[None, "peple"]))
    with pytest.raises(ValueError, match="value"):
        problem_from_frames(households, targets[["name"]])
