import itertools

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pandas as pd
import pytest

from sparsereg.calibration.reading.columns import Columns
from sparsereg.calibration.reading.conditions import (
    COMPARISONS,
    And,
    Column,
    Compare,
    Constant,
    In,
    Not,
    Or,
    columns_of,
    conjuncts,
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
        ("state != 'CA'", [1, 3, 5]),
        ("not state == 'CA'", [1, 3, 5]),
        ("not not state == 'CA'", [0, 4]),
        ("state is missing", [2]),
        ("not state is missing and age < 65", [0, 5]),
        ("income IS NOT MISSING", [0, 2, 3, 4, 5]),
        ("state != 'CA' or state is missing", [1, 2, 3, 5]),
        ("not (income > 5)", [0, 2, 3]),
        ("not (income > 5 and owner)", [0, 1, 2, 3, 4, 5]),
        ("not (income > 5 or owner)", []),
        ("income > 5 or not income > 5", [0, 2, 3, 4, 5]),
        ("state == 'O\\'Hara'", [5]),
        ('state == "O\'Hara"', [5]),
        ("state == 'nowhere'", []),
        ("state in ('CA', 'TX')", [0, 3, 4]),
        ("state in ['CA', 'TX',]", [0, 3, 4]),
        ("state not in ('CA', 'TX')", [1, 5]),
        ("age >= 65", [1, 3, 4]),
        ("65 <= age", [1, 3, 4]),
        ("18 <= age < 65", [0, 2]),
        ("age in (65, 17.0)", [1, 3, 5]),
        ("income < 0", [2]),
        ("income == -3.0", [2]),
        ("income > 1e5", [4]),
        ("income != 12", [0, 2, 3, 4]),
        ("income > -1_000 and not income > 1", [2, 3]),
        ("income > .5e0 and income < 2.", [0]),
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
        ("age > 1e400", "1e400 at character 7 is beyond all numbers"),
        ("age > 0x1F", "is not a condition: '0x1F' at character 7"),
        ("age > 1.2.3", "is not a condition: '1.2.3'"),
        ("age is 5", "expected 'missing' or 'not missing' at character 8"),
        ("5 is missing", "expected a column before 'is missing'"),
        ("age > " + "7" * 30_000, "the number at character 7 has 30,000 characters, at most 400 are read"),
        ("age > " + "1_" * 30_000 + "x", "the number at character 7"),
        (f"age == 5 '{'x' * 900}'", "expected 'and', 'or' or the end at character 10, there is \"'xxx"),
        (f"{'x' * 900} > 5", "has the unknown column 'xxx"),
        (f"age == '{'x' * 900}'", "xxx... is a text, the column 'age' holds numbers"),
        ("age > 1 or " * 30_000, "330,000 characters; a condition has at most 200,000"),
        ("not (" * 1_000 + "owner", "more than 100 parentheses or 'not' inside each other"),
    ],
)
def test_what_is_not_a_condition_is_refused_with_its_place(where, message):
    with pytest.raises(InputError, match=message) as refused:
        rows(where)
    assert len(str(refused.value)) < 400


@pytest.mark.costly
@pytest.mark.parametrize(
    "where",
    [
        "(" * 99 + "owner" + ")" * 99,
        "not (" * 99 + "owner" + ")" * 99,
        "not " * 40_000 + "owner",
        " or ".join(["age > 5"] * 15_000),
        "age > 5" + " " * 100_000 + "and owner",
        f"age in ({', '.join(map(str, range(30_000)))})",
        f"state == '{'x' * 150_000}' or `{'y' * 20}` is missing or owner".replace("y" * 20, "zip code"),
        "0" + " <= age" * 1 + " <= 1" * 1 + "".join(f" <= {i}" for i in range(2, 10_000)),
    ],
)
def test_long_and_deep_conditions_are_read(where):
    rows(where)


def test_numbers_are_compared_exactly_beyond_double_precision():
    big = 2**53
    columns = Columns(pd.DataFrame({"x": pd.array([big, big + 1, None], dtype="Int64")}), "T.csv")
    everyone = np.arange(3)
    for op, expected in (("==", [1]), ("!=", [0]), ("<", [0]), (">=", [1])):
        found = columns.mask(parse(f"x {op} {big + 1}"), everyone)
        assert everyone[found].tolist() == expected
    assert everyone[columns.mask(parse(f"x in ({big}, 5)"), everyone)].tolist() == [0]


# Conditions against a reference: Kleene's logic, household by household, with None for unknown.

VALUES = {
    "number": [None, -1.5, 0.0, 2.0, 3.0],
    "whole": [None, -1, 0, 2, 9007199254740993],
    "text": [None, "a", "b", "2"],
    "flag": [None, True, False],
}


def atoms():
    numeric, text = st.sampled_from(["number", "whole"]), st.just("text")
    order, equal = st.sampled_from(["<", "<=", ">", ">=", "==", "!="]), st.sampled_from(["==", "!="])
    number = st.sampled_from([-1.5, 0, 2, 2.5, 9007199254740993])
    word = st.sampled_from(["a", "2", "zz"])
    return st.one_of(
        st.tuples(st.just("compare"), numeric, order, st.one_of(number, numeric)),
        st.tuples(st.just("compare"), text, equal, st.one_of(word.map(repr), text)),
        st.tuples(st.just("in"), numeric, st.booleans(), st.lists(number, min_size=1, max_size=3)),
        st.tuples(st.just("in"), text, st.booleans(), st.lists(word, min_size=1, max_size=3)),
        st.tuples(st.just("missing"), st.sampled_from(list(VALUES)), st.booleans()),
        st.tuples(st.just("flag")),
        st.tuples(st.just("constant"), st.booleans()),
    )


def formulas():
    return st.recursive(
        atoms(),
        lambda inner: st.one_of(
            st.tuples(st.just("not"), inner),
            st.tuples(st.sampled_from(["and", "or"]), inner, inner),
        ),
        max_leaves=8,
    )


def written(f):
    match f:
        case ("compare", left, op, right):
            return f"{left} {op} {right}"
        case ("in", column, negated, values):
            return f"{column} {'not in' if negated else 'in'} ({', '.join(map(repr, values))})"
        case ("missing", column, negated):
            return f"{column} is {'not missing' if negated else 'missing'}"
        case ("flag",):
            return "flag"
        case ("constant", value):
            return str(value).lower()
        case ("not", item):
            return f"not ({written(item)})"
        case (word, left, right):
            return f"({written(left)}) {word} ({written(right)})"


def truth(f, row):
    """True, False or None for unknown."""
    match f:
        case ("compare", left, op, right):
            values = [row.get(side, side) for side in (left, right)]
            values[1] = values[1].strip("'") if isinstance(values[1], str) and right not in row else values[1]
            return None if None in values else COMPARISONS[op](*values)
        case ("in", column, negated, values):
            return None if row[column] is None else (row[column] in values) != negated
        case ("missing", column, negated):
            return (row[column] is None) != negated
        case ("flag",):
            return row["flag"]
        case ("constant", value):
            return value
        case ("not", item):
            inside = truth(item, row)
            return None if inside is None else not inside
        case (word, left, right):
            sides = [truth(left, row), truth(right, row)]
            decisive = word == "or"
            return decisive if decisive in sides else None if None in sides else not decisive


ROWS = [dict(zip(VALUES, values, strict=True)) for values in itertools.product(*VALUES.values())]
FRAME = pd.DataFrame(
    {
        "number": pd.Series([r["number"] for r in ROWS], dtype=float),
        "whole": pd.array([r["whole"] for r in ROWS], dtype="Int64"),
        "text": pd.Series([r["text"] for r in ROWS], dtype=object),
        "flag": pd.Series([r["flag"] for r in ROWS], dtype=object),
    }
)


@pytest.mark.costly
@hypothesis.given(formulas())
@hypothesis.settings(max_examples=300, deadline=None, derandomize=True)
def test_conditions_agree_with_three_valued_logic(formula):
    columns = Columns(FRAME, "T.csv")
    condition = parse(written(formula))
    columns.check(condition)
    everyone = np.arange(len(ROWS))
    members = everyone[::2]
    for part in conjuncts(condition):
        members = members[columns.mask(part, members)]
    expected = [i for i in everyone[::2] if truth(formula, ROWS[i]) is True]
    assert members.tolist() == expected
