import itertools

import numpy as np
import pandas as pd
import pytest

from sparsereg.calibration.reading.columns import Columns
from sparsereg.calibration.reading.conditions import (
    And,
    Column,
    Compare,
    Constant,
    In,
    Not,
    Or,
    columns_of,
    parse,
)
from sparsereg.errors import InputError


def table():
    return pd.DataFrame(
        {
            "state": ["CA", "NY", None, "TX", "CA", "O'Hara"],
            "age": [20, 65, 40, 65, 80, 17],
            "income": [1.5, np.nan, -3.0, 0.0, 1e6, 12.0],
            "owner": [True, False, True, True, False, False],
            "maybe": [True, None, False, True, None, False],
            "zip code": [1, 2, 3, 4, 5, 6],
        }
    )


def rows(where):
    columns = Columns(table(), "T.csv")
    condition = parse(where)
    columns.check(condition)
    everyone = np.arange(6)
    by_mask = everyone[columns.mask(condition, everyone)]
    columns.count_uses([condition, condition])  # the cached path must agree, also on a part of the rows
    some = np.array([1, 3, 4])
    assert set(some[columns.mask(condition, some)]) == set(by_mask) & set(some)
    return by_mask.tolist()


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("", [0, 1, 2, 3, 4, 5]),
        ("   ", [0, 1, 2, 3, 4, 5]),
        ("state == 'CA'", [0, 4]),
        ('state=="CA"', [0, 4]),
        ("'CA' == state", [0, 4]),
        ("state != 'CA'", [1, 2, 3, 5]),
        ("not state == 'CA'", [1, 2, 3, 5]),
        ("state == 'O\\'Hara'", [5]),
        ('state == "O\'Hara"', [5]),
        ("state == 'nowhere'", []),
        ("state in ('CA', 'TX')", [0, 3, 4]),
        ("state in ['CA', 'TX',]", [0, 3, 4]),
        ("state not in ('CA', 'TX')", [1, 2, 5]),
        ("age >= 65", [1, 3, 4]),
        ("65 <= age", [1, 3, 4]),
        ("18 <= age < 65", [0, 2]),
        ("age in (65, 17.0)", [1, 3, 5]),
        ("income < 0", [2]),
        ("income == -3.0", [2]),
        ("income > 1e5", [4]),
        ("income != 12", [0, 1, 2, 3, 4]),
        ("income > -1_000 and not income > 1", [2, 3]),
        ("owner", [0, 2, 3]),
        ("not owner", [1, 4, 5]),
        ("owner == true", [0, 2, 3]),
        ("owner == False", [1, 4, 5]),
        ("owner == 1", [0, 2, 3]),
        ("maybe", [0, 3]),
        ("not maybe", [2, 5]),
        ("not not maybe", [0, 3]),
        ("true", [0, 1, 2, 3, 4, 5]),
        ("false", []),
        ("age > income", [0, 2, 3, 5]),
        ("state == state", [0, 1, 3, 4, 5]),
        ("`zip code` <= 2", [0, 1]),
        ("state == 'CA' and age >= 65", [4]),
        ("state == 'CA' and age >= 65 or owner", [0, 2, 3, 4]),
        ("state == 'CA' and (age >= 65 or owner)", [0, 4]),
        ("(state == 'CA') & ((age >= 65) | owner)", [0, 4]),
        ("~(state == 'CA') && !owner", [1, 5]),
        ("STATE_ or owner".replace("STATE_", "owner"), [0, 2, 3]),
        ("owner AND NOT age > 30", [0]),
        ("age <> 65", [0, 2, 4, 5]),
    ],
)
def test_conditions_hold_for_exactly_these_rows(where, expected):
    assert rows(where) == expected


def test_the_tree_is_the_condition():
    age, state = Column("age"), Column("state")
    assert parse("age > 5") == Compare(age, ">", Constant(5, "number"))
    assert parse("a and b and not c") == And((Column("a"), Column("b"), Not(Column("c"))))
    assert parse("a or b and c") == Or((Column("a"), And((Column("b"), Column("c")))))
    assert parse("state in ('x')") == In(state, (Constant("x", "text"),))
    assert list(columns_of(parse("a == 1 and (b < c or not d in (1, 2))"))) == ["a", "b", "c", "d"]


def test_conditions_agree_with_python_on_all_short_boolean_formulas():
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({n: rng.random(32) < 0.5 for n in "abc"})
    columns = Columns(frame, "T.csv")
    rows = [dict(zip("abc", r, strict=True)) for r in frame.to_numpy().tolist()]
    for shape in ("{0} {3} {1} {4} {2}", "not {0} {3} ({1} {4} not {2})", "({0} {3} {1}) {4} {2}"):
        for names in itertools.permutations("abc"):
            for words in itertools.product(("and", "or"), repeat=2):
                text = shape.format(*names, *words)
                mine = columns.mask(parse(text), np.arange(32))
                assert mine.tolist() == [eval(text, {}, r) for r in rows], text  # a text of this test


@pytest.mark.parametrize(
    ("where", "message"),
    [
        (
            "age >",
            "expected a column, a number or a quoted text at character 6, the condition ends",
        ),
        ("age = 5", "write == to compare, not ="),
        ("age == 5 5", "expected 'and', 'or' or the end at character 10, there is '5'"),
        ("state == 'CA", "a text without its closing quote at character 10"),
        ("(age > 5", r"expected '\)'"),
        ("age in ()", "the list after 'in' is empty"),
        ("age in (owner)", "expected a number or a quoted text"),
        ("5 in (5)", "expected a column before 'in'"),
        ("age not 5", "expected 'in'"),
        ("5", "expected a comparison"),
        ("age > -owner", "expected a number"),
        ("__import__('os').system('true')", "is not a condition"),
        ("age.real > 5", "is not a condition"),
        ("age > 5; owner", "is not a condition: ';'"),
        ("age > 5 and @x", "is not a condition: '@'"),
        ("lambda: 1", "is not a condition"),
        ("(" * 200 + "owner" + ")" * 200, "more than 100 parentheses"),
        ("agee > 5", "has the unknown column 'agee'; did you mean 'age'"),
        ("Age > 5", "did you mean 'age'"),
        ("state == 5", "the column 'state' holds texts, 5 is a number: put the value in quotes"),
        ("age == '5'", "'5' is a text, the column 'age' holds numbers: write the number without quotes"),
        ("age in ('5', '6')", "write the number without quotes"),
        ("state < 'CA'", "compares text with <"),
        ("state == age", "compares unlike things"),
        ("age", "uses 'age' alone, but it holds numbers"),
        ("state == true", "compares unlike things"),
    ],
)
def test_what_is_not_a_condition_is_refused_with_its_place(where, message):
    with pytest.raises(InputError, match=message):
        rows(where)
