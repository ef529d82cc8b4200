"""Tables of statistics programs, spreadsheets and databases come in by one door, with labels and all."""

import importlib.util
import sqlite3

import numpy as np
import pandas as pd
import pytest

from sparsereg import extras
from sparsereg.calibration.reading.households import build, target_table
from sparsereg.calibration.reading.labels import labels_of
from sparsereg.calibration.reading.sources import read_years
from sparsereg.calibration.reading.tables import open_table, read_table
from sparsereg.errors import InputError
from sparsereg.settings import plain

from ..command.test_run import _own_folder, exactly, run  # noqa: F401

pyreadstat = pytest.importorskip("pyreadstat") if importlib.util.find_spec("pyreadstat") else None
HOUSEHOLDS = pd.DataFrame(
    {
        "hid": [101, 102, 103, 104, 105, 106],
        "w": [10.0, 20.0, 30.0, 40.0, 50.0, 60.0],
        "region": [1.0, 2.0, 2.0, 1.0, 3.0, 2.0],
        "income": [1.5, 2.5, 99.0, 4.5, 5.5, 6.5],
        "state": ["CA", "NY", "CA", "", "TX", "NY"],
    }
)
REGIONS = {1.0: "North", 2.0: "South", 3.0: "South Sea"}


def needs(module):
    return pytest.mark.skipif(importlib.util.find_spec(module) is None, reason=f"{module} is not installed")


def write(name, table=HOUSEHOLDS):
    """Write the households in a format, income 99 being a missing value where it knows such values."""
    labels = {"region": REGIONS, "income": {99.0: "refused"}} if "region" in table else {}
    if name.endswith(".sav"):
        ranges = {"income": [99]} if "income" in table else {}
        pyreadstat.write_sav(table, name, variable_value_labels=labels, missing_ranges=ranges)
    elif name.endswith(".dta"):
        missing = {"income": ["a"]} if "income" in table else {}
        if "income" in table:
            table = table.assign(income=[v if v != 99 else "a" for v in table.income])
            labels = {"region": REGIONS, "income": {"a": "refused"}}
        pyreadstat.write_dta(table, name, variable_value_labels=labels, missing_user_values=missing)
    elif name.endswith(".xpt"):
        pyreadstat.write_xport(table.rename(columns=str.lower), name, file_format_version=8)
    elif name.endswith(".xlsx"):
        table.to_excel(name, index=False, sheet_name="data")
    elif name.endswith(".duckdb"):
        import duckdb

        with duckdb.connect(name) as connection:
            connection.register("given", table)
            connection.execute("CREATE TABLE data AS SELECT * FROM given")
    elif name.endswith(".sqlite"):
        connection = sqlite3.connect(name)
        table.to_sql("data", connection, index=False)
        connection.close()
    elif name.endswith(".parquet"):
        table.to_parquet(name, index=False)
    else:
        table.to_csv(name, index=False)
    return name


FORMATS = [
    "H.csv", "H.parquet", "H.sqlite", pytest.param("H.sav", marks=needs("pyreadstat")),
    pytest.param("H.dta", marks=needs("pyreadstat")), pytest.param("H.xpt", marks=needs("pyreadstat")),
    pytest.param("H.xlsx", marks=needs("openpyxl")), pytest.param("H.duckdb", marks=needs("duckdb")),
]  # fmt: skip
LABELLED = [pytest.param(name, marks=needs("pyreadstat")) for name in ("H.sav", "H.dta")]


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_brings_the_same_table(name):
    table = read_table(write(name), id="hid")
    assert list(table.columns) == list(HOUSEHOLDS.columns)
    assert table.hid.tolist() == HOUSEHOLDS.hid.tolist()
    assert table.hid.dtype == np.int64
    assert table.w.tolist() == HOUSEHOLDS.w.tolist()
    assert table.state[:3].tolist() == ["CA", "NY", "CA"]
    if not name.endswith((".sqlite", ".duckdb", ".parquet")):  # they know an empty text
        assert table.state.isna().tolist() == [False, False, False, True, False, False]
    expected = HOUSEHOLDS.income.tolist()
    if name in ("H.sav", "H.dta"):
        assert np.isnan(table.income[2])
        table.loc[2, "income"] = 99.0
    assert table.income.tolist() == expected


@pytest.mark.parametrize("name", FORMATS)
def test_parts_of_a_table_are_the_table(name):
    opened = open_table(write(name), id="hid")
    assert opened.names == list(HOUSEHOLDS.columns)
    whole = opened.read(["w", "state", "nobody"])
    parts = list(opened.parts(["w", "state"], rows=4))
    assert [list(part.columns) for part in parts] == [["w", "state"]] * len(parts)
    assert len(parts) == (1 if name in ("H.csv", "H.xlsx", "H.xpt") else 2)
    pd.testing.assert_frame_equal(pd.concat(parts, ignore_index=True), whole, check_dtype=False)


@pytest.mark.parametrize("name", LABELLED)
@pytest.mark.parametrize(
    ("where", "members"),
    [
        ("region == 'North'", [0, 3]),
        ("region == 1", [0, 3]),
        ("region != 'North'", [1, 2, 4, 5]),
        ("'South' == region and w > 25", [2, 5]),
        ("region in ('North', 'South Sea')", [0, 3, 4]),
        ("region not in ('North', 2)", [4]),
        ("not (region == 'South' or region == 'North')", [4]),
        ("income is missing", [2]),
        ("state is missing", [3]),
    ],
)
def test_labels_stand_for_their_codes_in_conditions(name, where, members):
    table = read_table(write(name))
    targets = target_table(pd.DataFrame({"name": ["t"], "value": [1.0], "where": [where]}))
    assert build(table, targets).problem.matrix.indices.tolist() == members


@pytest.mark.parametrize("name", LABELLED)
@pytest.mark.parametrize(
    ("where", "said"),
    [
        ("region == 'Noth'", "compares 'region' with 'Noth', which is no label of it; did you mean 'North'"),
        ("income == 'refused'", "label of a missing value of 'income': write `income is missing`"),
        ("state == 3", "compares unlike things"),
    ],
)
def test_a_label_that_is_none_is_named(name, where, said):
    table = read_table(write(name))
    targets = target_table(pd.DataFrame({"name": ["t"], "value": [1.0], "where": [where]}))
    with pytest.raises(InputError, match=said):
        build(table, targets)


@needs("pyreadstat")
def test_codes_that_share_a_label_and_labels_of_texts():
    table = pd.DataFrame({"size": [1.0, 2.0, 3.0], "kind": ["a", "b", "z"]})
    labels = {"size": {1.0: "few", 2.0: "few", 3.0: "many"}, "kind": {"a": "alpha", "b": "beta"}}
    pyreadstat.write_sav(table, "L.sav", variable_value_labels=labels)
    table = read_table("L.sav")
    assert labels_of(table)["size"].codes == {"few": (1.0, 2.0), "many": (3.0,)}
    where = [
        "size == 'few'",
        "size != 'few'",
        "kind == 'alpha'",
        "kind == 'a'",
        "kind == 'z'",
        "size in ('few')",
    ]
    frame = pd.DataFrame({"name": list("abcdef"), "value": 1.0, "where": where})
    rows = build(table, target_table(frame)).problem.matrix
    members = [rows.indices[a:b].tolist() for a, b in zip(rows.indptr, rows.indptr[1:], strict=False)]
    assert members == [[0, 1], [2], [0], [0], [2], [0, 1]]


def choice(**keys):
    from sparsereg.calibration.config import HouseholdsProblem

    return plain(HouseholdsProblem(**keys))


@pytest.mark.parametrize("persons", FORMATS)
def test_persons_of_every_format_meet_households_of_another(persons):
    write("H.parquet")
    table = pd.DataFrame(
        {"hid": [101, 101, 102, 103, 104, 105, 106, 106], "age": [3.0, 40, 50, 60, 70, 80, 9, 30]}
    )
    name = write(persons.replace("H.", "P."), table)
    pd.DataFrame(
        {
            "name": ["kids", "rich kids"],
            "value": [5, 5],
            "unit": "person",
            "where": ["age < 18", "age < 18 and w > 15"],
        }
    ).to_csv("T.csv", index=False)
    keys = {
        "households": "H.parquet",
        "persons": name,
        "household_id": "hid",
        "targets": "T.csv",
        "weight": "w",
    }
    problem = read_years(choice(**keys))[None].problem
    assert problem.matrix.toarray().tolist() == [[1, 0, 0, 0, 0, 1], [0, 0, 0, 0, 0, 1]]


@pytest.mark.costly
@pytest.mark.parametrize("name", FORMATS)
def test_a_whole_run_reads_households_and_targets_of_every_format(name):
    table = HOUSEHOLDS.assign(income=[1.5, 2.5, 3.5, 4.5, 5.5, 6.5])
    common = ["problem=households", "problem.weight=w", "problem.id=hid", "method=calibrate", "plots=false",
              "num_households=null", "tensorboard=false", "holdout.groups=null"]  # fmt: skip
    targets = pd.DataFrame(
        {"name": ["all", "ca", "sum"], "value": [220.0, 45.0, 1100.0], "measure": ["", "", "income"],
         "where": ["", "state == 'CA'", ""]}
    )  # fmt: skip
    files = [f"problem.households={write(name, table)}"]
    files += [f"problem.targets={write(name.replace('H.', 'T.'), targets)}"]
    folder, results = run(*common, *files)
    table.to_csv("plain.csv", index=False)
    targets.to_csv("plain_t.csv", index=False)
    usual, _ = run(*common, "problem.households=plain.csv", "problem.targets=plain_t.csv")
    assert exactly(folder / "weights.csv").equals(exactly(usual / "weights.csv"))
    assert [row["key"] for row in results["provenance"]["inputs"]] == [
        "problem.households",
        "problem.targets",
    ]


# ---- sheets and tables


@needs("openpyxl")
def test_sheets_are_chosen_by_name(tmp_path):
    with pd.ExcelWriter("T.xlsx") as book:
        HOUSEHOLDS.to_excel(book, sheet_name="one", index=False)
        HOUSEHOLDS.head(2).to_excel(book, sheet_name="two words", index=False)
    assert len(read_table("T.xlsx::two words")) == 2
    with pytest.raises(InputError, match=r"has 2 sheets \(one, two words\): say which one, T.xlsx::one"):
        read_table("T.xlsx")
    with pytest.raises(InputError, match="no sheet 'too words'; did you mean 'two words'"):
        read_table("T.xlsx::too words")


@needs("openpyxl")
def test_targets_in_a_sheet_keep_their_tolerance_in_per_cent():
    import openpyxl

    book = openpyxl.Workbook()
    for line in (
        ["name", "value", "tolerance", "where"],
        ["all", 200, 0.02, None],
        ["ca", 40.5, "1%", "state == 'CA'"],
    ):
        book.active.append(line)
    book.active["C2"].number_format = "0.0%"
    book.save("T.xlsx")
    table = read_table("T.xlsx", ("name", "tolerance", "where"))
    assert target_table(table).tolerances.tolist() == [4.0, 0.405]
    assert target_table(table).wheres == ("", "state == 'CA'")


@needs("openpyxl")
def test_what_is_no_sheet_of_targets_is_refused_with_its_place(tmp_path):
    import openpyxl

    def refuses(said, *lines):
        book = openpyxl.Workbook()
        for line in lines:
            book.active.append(line)
        book.save("bad.xlsx")
        with pytest.raises(InputError, match=said) as error:
            read_table("bad.xlsx")
        assert "\n" not in str(error.value)

    refuses("B2 holds a formula whose result was never saved", ["name", "value"], ["a", "=1+1"])
    refuses("bad.xlsx::Sheet row 3 is empty", ["name", "value"], ["a", 1], [None, None], ["b", 2])
    refuses("column 2 has cells, but no name in the first row", ["name", None], ["a", 1])
    refuses("the column 'name' is there twice", ["name", "name"], ["a", 1])
    refuses("is empty", [None])
    refuses("has a header but no rows", ["name", "value"])
    (tmp_path / "text.xlsx").write_text("name,value\na,1\n")
    with pytest.raises(InputError, match="text.xlsx is not an Excel file, or is damaged"):
        read_table("text.xlsx")
    whole = (tmp_path / "bad.xlsx").read_bytes()
    (tmp_path / "cut.xlsx").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="cut.xlsx is not an Excel file, or is damaged"):
        read_table("cut.xlsx")


def test_tables_of_sqlite_are_chosen_and_views_are_no_tables(tmp_path):
    connection = sqlite3.connect("D.db")
    HOUSEHOLDS.to_sql("households", connection, index=False)
    HOUSEHOLDS.head(2).to_sql('odd "name"', connection, index=False)
    connection.execute("CREATE VIEW seen AS SELECT * FROM households")
    connection.execute("CREATE TABLE mixed (a)")
    connection.executemany("INSERT INTO mixed VALUES (?)", [(1,), (2.5,), ("x",), (None,)])
    connection.commit()
    connection.close()
    assert len(read_table("D.db::households")) == 6
    assert len(read_table('D.db::odd "name"')) == 2
    assert read_table("D.db::mixed").a.dropna().tolist() == ["1", "2.5", "x"]
    assert [part.a.dropna().tolist() for part in open_table("D.db::mixed").parts(rows=2)] == [
        ["1", "2.5"],
        ["x"],
    ]
    with pytest.raises(InputError, match="seen is a view, and no code from a file is run"):
        read_table("D.db::seen")
    with pytest.raises(
        InputError, match=r"D.db has 3 tables \(households, odd .*\): say which one, D.db::hous"
    ):
        read_table("D.db")
    with pytest.raises(InputError, match="no table 'household'; did you mean 'households'"):
        read_table("D.db::household")
    (tmp_path / "text.db").write_text("name,value\na,1\n")
    with pytest.raises(InputError, match="neither a DuckDB nor an SQLite database"):
        read_table("text.db")
    whole = (tmp_path / "D.db").read_bytes()
    (tmp_path / "cut.db").write_bytes(whole[:5000])
    with pytest.raises(InputError, match=r"cut.db (cannot be read|has no table|has 0 tables)") as error:
        read_table("cut.db::households")
    assert "\n" not in str(error.value)


@needs("duckdb")
def test_tables_of_duckdb_keep_their_kinds_and_nothing_is_run(tmp_path):
    import duckdb

    (tmp_path / "secret.csv").write_text("a\n1\n")
    with duckdb.connect("D.duckdb") as connection:
        connection.execute("CREATE SCHEMA survey")
        connection.execute(
            "CREATE TABLE survey.h AS SELECT 9007199254740993::BIGINT AS id, 2.50::DECIMAL(10,2) AS d,"
            " true AS b, 'x' AS t, NULL::INTEGER AS n, DATE '2024-05-06' AS day"
        )
        connection.execute(f"CREATE VIEW seen AS SELECT * FROM read_csv('{tmp_path}/secret.csv')")
    table = read_table("D.duckdb")
    assert table.iloc[0].tolist()[:4] == [9007199254740993, 2.5, True, "x"]
    assert str(table.day[0]).startswith("2024-05-06")
    assert table.n.isna().all()
    assert len(read_table("D.duckdb::survey.h")) == 1
    with pytest.raises(InputError, match="seen is a view, and no code from a file is run"):
        read_table("D.duckdb::seen")
    whole = (tmp_path / "D.duckdb").read_bytes()
    (tmp_path / "cut.duckdb").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="cut.duckdb cannot be read") as error:
        read_table("cut.duckdb")
    assert "\n" not in str(error.value)


def test_a_file_of_one_table_has_no_tables_within():
    write("H.csv")
    with pytest.raises(InputError, match="H.csv::t: a file of this format holds one table: leave ::t out"):
        read_table("H.csv::t")
    with pytest.raises(InputError, match="H.cvs does not exist; did you mean 'H.csv'"):
        read_table("H.cvs::t")


@pytest.mark.parametrize(
    ("name", "module"),
    [("H.sav", "pyreadstat"), ("H.sas7bdat", "pyreadstat"), ("H.xlsx", "openpyxl"), ("H.duckdb", "duckdb")],
)
def test_what_is_not_installed_is_named_in_one_line(tmp_path, monkeypatch, name, module):
    (tmp_path / name).write_bytes(b"12345678DUCK")
    monkeypatch.setattr(extras, "find_spec", lambda found: None if found == module else True)
    said = f"{name}: {module} is not installed, which this needs: pip install 'sparsereg.formats.'"
    with pytest.raises(InputError, match=said):
        read_table(name)


@needs("pyreadstat")
@pytest.mark.parametrize("name", ["H.sav", "H.dta", "H.sas7bdat", "H.por", "H.xpt"])
def test_a_damaged_file_of_a_statistics_program_is_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b"\x7fELF nothing of that kind" * 20)
    with pytest.raises(InputError, match="cannot be read as a file of (SPSS|Stata|SAS)") as error:
        read_table(name)
    assert "\n" not in str(error.value)
    if name in ("H.sav", "H.dta"):
        whole = (tmp_path / write(f"good{name[1:]}")).read_bytes()
        (tmp_path / name).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(InputError, match="cannot be read as a file of"):
            read_table(name)
