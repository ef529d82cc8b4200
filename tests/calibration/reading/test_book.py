"""A book of targets: which rows count, and what each year asks for."""

import numpy as np
import pandas as pd
import pytest

from sparsereg.calibration.config import Targets
from sparsereg.calibration.reading.book import Book
from sparsereg.calibration.reading.households import target_table
from sparsereg.calibration.reading.sources import read_years
from sparsereg.calibration.reading.tables import read_table
from sparsereg.errors import InputError

BOOK = pd.DataFrame({
    "name": ["all", "CA", "TX", "old", "rich"],
    "value_2025": [100.0, 60.0, 40.0, 20.0, 9.0],
    "value_2026": [110.0, 65.0, 45.0, 22.0, np.nan],
    "level": ["nation", "state", "state", "nation", "nation"],
    "source": ["census", "census", "census", "ssa", "irs"],
    "active": ["true", "yes", "", "TRUE", "false"],
    "parent": ["", "all", "all", "all", ""],
    "vintage": [2024, 2024, 2023, 2024, 2022],
    "where": ["", "state == 'CA'", "state == 'TX'", "age >= 65", "income > 100"],
})  # fmt: skip
LONG = pd.DataFrame({
    "name": ["all", "CA", "all", "CA", "TX"],
    "year": [2025, 2025, 2026, 2026, None],
    "value": [100.0, 60.0, 110.0, 65.0, 40.0],
})  # fmt: skip


def names(book, year=None):
    return book.page(year).table["name"].tolist()


@pytest.mark.parametrize(
    ("rules", "left"),
    [
        ({}, ["all", "CA", "TX", "old"]),
        ({"include": ["level == 'state'"]}, ["CA", "TX"]),
        ({"include": ["level == 'state'", "source == 'ssa'"]}, ["CA", "TX", "old"]),
        ({"exclude": ["vintage < 2024", "source in ('ssa')"]}, ["all", "CA"]),
        (
            {"include": ["source == 'census'"], "exclude": ["level == 'state' and vintage < 2024"]},
            ["all", "CA"],
        ),
        ({"exclude": ["parent is missing"]}, ["CA", "TX", "old"]),
    ],
)
def test_rules_say_which_targets_count(rules, left):
    assert names(Book(BOOK.replace("", None), "T.csv", **rules), 2025) == left


def test_a_year_is_a_column_or_a_cell():
    assert Book(BOOK, "T.csv").page(2026).table["value"].tolist() == [110.0, 65.0, 45.0, 22.0]
    page = Book(LONG, "T.csv").page(2026)
    assert page.table["name"].tolist() == ["all", "CA", "TX"]  # of no year: of any
    assert page.rows.tolist() == [2, 3, 4]


def test_a_column_that_is_no_year_of_the_book_changes_nothing():
    table = pd.DataFrame({"name": ["a", "b"], "value": [1, 2], "year": [2019, 2021], "level": ["x", "y"]})
    assert names(Book(table, "T.csv")) == ["a", "b"]


def test_messages_name_the_row_of_the_file():
    book = Book(BOOK.assign(tolerance=["", "", "", "-1", ""]), "T.csv", include=["level == 'nation'"])
    page = book.page(2025)
    with pytest.raises(InputError, match="tolerance must be >= 0, but it is -1 in row 5"):
        target_table(page.table, "T.csv", rows=page.rows, known=page.known)


def test_parents_that_do_not_count_are_no_unknown_ones():
    page = Book(BOOK, "T.csv", exclude=["name == 'all'"]).page(2025)
    found = target_table(page.table, "T.csv", rows=page.rows, known=page.known)
    assert found.parent.tolist() == [-1, -1, -1]
    assert found.labels["source"] == ("census", "census", "ssa")


WRONG = {
    "no condition": (BOOK, {"include": ["level = 'state'"]}, 2025, "targets.include.*write == to compare"),
    "an unknown column": (
        BOOK, {"exclude": ["levle == 'state'"]}, 2025,
        "targets.exclude, over the columns of T.csv: .*unknown column 'levle'; did you mean 'level'",
    ),
    "an empty rule": (BOOK, {"include": [" "]}, 2025, "targets.include: a rule is empty"),
    "none left": (
        BOOK, {"include": ["level == 'county'"]}, 2025, "none of its 5 targets is active and left .incl",
    ),
    "none active": (BOOK.assign(active="no"), {}, 2025, "none of its 5 targets is active"),
    "a strange truth": (BOOK.assign(active="maybe"), {}, 2025, "row 2: active must be true, false or empty"),
    "no such year": (
        BOOK, {}, 2031, "targets.year=2031: T.csv has no column value_2031; there are value_2025, value_2026",
    ),
    "a value that is missing": (
        BOOK.assign(active=True), {}, 2026, r"row 6 \(target 'rich'\): there is no value for 2026, val",
    ),
    "a value that is no number": (
        BOOK.assign(value_2025="many"), {}, 2025, "value_2025 must be a finite number, but it is 'm",
    ),
    "a target without the year": (
        LONG.iloc[:3], {}, 2026, r"row 3 \(target 'CA'\): there is no value for 2026, it has 2025 only",
    ),
    "no year said": (BOOK, {}, None, "has value_2025, value_2026 and no column value: say which, targets"),
    "no year said of rows": (LONG, {}, None, "'all' is there for 2025.*2026.*targets.year=2026"),
    "none left of the year": (LONG, {"include": ["year == 2025"]}, 2026, "the rules leave no target of 2026"),
    "no years at all": (LONG.drop(columns="year"), {}, 2026, "has no column value_2026 and no column year"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_books_are_one_line(case):
    table, rules, year, message = WRONG[case]
    with pytest.raises(InputError, match=message) as error:
        Book(table, "T.csv", **rules).page(year)
    assert "\n" not in str(error.value)


def _write(tmp_path, book, form):
    if form == "csv":
        book.to_csv(tmp_path / "T.csv", index=False)
        return "T.csv"
    if form == "parquet":
        book.to_parquet(tmp_path / "T.parquet")
        return "T.parquet"
    if form == "sqlite":
        import contextlib
        import sqlite3

        with contextlib.closing(sqlite3.connect(tmp_path / "T.sqlite")) as base:
            book.to_sql("targets", base, index=False)
            base.commit()
        return "T.sqlite::targets"
    import duckdb

    with duckdb.connect(str(tmp_path / "T.duckdb")) as base:
        base.register("frame", book)
        base.execute("CREATE TABLE targets AS SELECT * FROM frame")
    return "T.duckdb::targets"


@pytest.mark.parametrize("form", ["csv", "parquet", "sqlite", "duckdb"])
def test_every_format_holds_a_book(tmp_path, form):
    for module in {"duckdb": ["duckdb"], "parquet": ["pyarrow"]}.get(form, []):
        pytest.importorskip(module)
    file = _write(tmp_path, BOOK, form)
    book = Book(read_table(tmp_path / file), "T", exclude=["vintage < 2024"])
    assert names(book, 2026) == ["all", "CA", "old"]


def _choice(tmp_path, table):
    rng = np.random.default_rng(0)
    n = 60
    households = pd.DataFrame({
        "id": range(n), "w": rng.lognormal(0, 0.1, n), "state": rng.choice(["CA", "TX"], n),
        "age": rng.integers(18, 90, n), "income": rng.integers(0, 200, n),
    })  # fmt: skip
    households.to_csv(tmp_path / "H.csv", index=False)
    table.to_csv(tmp_path / "T.csv", index=False)
    return {
        "kind": "households", "households": tmp_path / "H.csv", "targets": tmp_path / "T.csv", "weight": "w",
        "id": "id", "persons": None, "household_id": None, "person_id": None,
        "unit_names": ("household", "person"), "decimal": "point", "encoding": None,
    }  # fmt: skip


def test_years_share_one_matrix(tmp_path):
    found = read_years(_choice(tmp_path, BOOK), targets=Targets(year=(2025, 2026)))
    first, second = (found[year].problem for year in (2025, 2026))
    assert np.may_share_memory(first.matrix.data, second.matrix.data)
    assert second.targets.tolist() == [110.0, 65.0, 45.0, 22.0]
    _ = first.matrix_t
    second.adopt(first)
    assert second.matrix_t is first.matrix_t
    assert found[2026].labels["level"] == {"all": "nation", "CA": "state", "TX": "state", "old": "nation"}


def test_years_may_ask_for_different_targets(tmp_path):
    rules = ("year == 2025 and name == 'CA'",)
    table = LONG.assign(where=["", "state == 'CA'"] * 2 + ["state == 'TX'"])
    found = read_years(_choice(tmp_path, table), targets=Targets(year=(2025, 2026), exclude=rules))
    assert found[2025].problem.names == ("all", "TX")
    assert found[2026].problem.names == ("all", "CA", "TX")
    for year, built in found.items():
        alone = read_years(_choice(tmp_path, table), targets=Targets(year=year, exclude=rules))[year].problem
        assert (built.problem.matrix != alone.matrix).nnz == 0
        np.testing.assert_array_equal(built.problem.targets, alone.targets)


def test_a_name_is_one_total_in_all_years(tmp_path):
    table = LONG.assign(where=["", "state == 'CA'", "", "state == 'TX'", "state == 'TX'"])
    with pytest.raises(InputError, match=r"row 5 \(target 'CA'\): it is not the total of .*row 3"):
        read_years(_choice(tmp_path, table), targets=Targets(year=(2025, 2026)))


def test_a_matrix_takes_the_rows_that_count(tmp_path):
    import scipy.sparse as sp

    rows = sp.csr_array(np.arange(1.0, 21.0).reshape(5, 4))
    sp.save_npz(tmp_path / "M.npz", sp.csr_matrix(rows))
    BOOK.drop(columns="where").to_csv(tmp_path / "T.csv", index=False)
    choice = {
        "kind": "matrix", "matrix": tmp_path / "M.npz", "targets": tmp_path / "T.csv", "weights": None,
        "decimal": "point", "encoding": None,
    }  # fmt: skip
    found = read_years(choice, targets=Targets(year=(2025, 2026), include=("level == 'state'",)))
    np.testing.assert_array_equal(found[2026].problem.matrix.toarray(), rows.toarray()[1:3])
    assert found[2025].problem.targets.tolist() == [60.0, 40.0]
