import logging

import numpy as np
import pandas as pd
import pytest

from sparsereg.calibration.reading.households import build, target_table
from sparsereg.calibration.reading.missing import Missing
from sparsereg.errors import InputError

TABLE = pd.DataFrame({"a": [1.0, np.nan, 3.0, 4.0], "b": [5.0, 6.0, np.nan, 8.0], "w": [1.0, 2, 3, 4]})
TARGETS = target_table(
    pd.DataFrame(
        {
            "name": ["sum a", "sum b", "count", "not large"],
            "value": 1.0,
            "measure": ["a", "b", "", "b"],
            "where": ["", "", "", "not (a > 3)"],
        }
    )
)


def built(**more):
    problem = build(TABLE, TARGETS, "w", file="H.csv", missing=Missing(**more)).problem
    return problem.matrix.toarray().tolist(), problem.starting_weights.tolist()


def test_missing_measures_are_errors_unless_something_else_is_said():
    with pytest.raises(InputError, match=r"H.csv: a must be a finite number, but it is missing in row 3"):
        built()
    with pytest.raises(InputError, match=r"b must be a finite number, but it is missing in row 4"):
        built(by_column={"a": "zero"})


def test_zero_adds_nothing_and_conditions_still_do_not_know():
    rows, weights = built(policy="zero")
    assert rows == [[1, 0, 3, 4], [5, 6, 0, 8], [1, 1, 1, 1], [5, 0, 0, 0]]
    assert weights == [1, 2, 3, 4]


def test_drop_takes_households_out_of_the_survey_and_says_so(caplog):
    with caplog.at_level(logging.WARNING):
        _, weights = built(policy="drop")
    assert weights == [1, 0, 0, 4]
    assert (
        "2 of 4 households are left out for missing values in a (1), b (1); the first is in row 3"
        in caplog.text
    )
    assert built(policy="drop", by_column={"b": "zero"})[1] == [1, 0, 3, 4]


def test_wrong_policies_and_columns_are_named():
    with pytest.raises(InputError, match=r"missing_in.c: no target measures the column 'c'"):
        built(by_column={"c": "zero"})
    with pytest.raises(
        InputError, match=r"missing_in.a=zeor: expected error, zero, drop; did you mean 'zero'"
    ):
        built(by_column={"a": "zeor"})
    with pytest.raises(InputError, match=r"every household has a missing value: a \(4\)"):
        build(TABLE.assign(a=np.nan), TARGETS, file="H.csv", missing=Missing("drop", {"b": "zero"}))
