import time

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from sparsereg.calibration.reading.households import build, target_matrix, target_table
from sparsereg.calibration.reading.matrix_file import read_matrix
from sparsereg.calibration.reading.tables import read_table
from sparsereg.errors import InputError
from sparsereg.table_file import write_table


def households(n=200, seed=0):
    rng = np.random.default_rng(seed)
    return pd.DataFrame(
        {
            "id": [f"h{i}" for i in range(n)],
            "w": rng.random(n) + 0.5,
            "state": rng.choice(["CA", "NY", "TX", "NA"], n),
            "district": rng.integers(0, 9, n),
            "age": rng.integers(18, 95, n),
            "income": np.round(rng.lognormal(10, 1, n), 2) * (rng.random(n) < 0.8),
            "owner": rng.random(n) < 0.4,
        }
    )


CONDITIONS = {
    "": lambda t: t.age > 0,
    "state == 'CA'": lambda t: t.state == "CA",
    "state == 'NA' and age >= 65": lambda t: (t.state == "NA") & (t.age >= 65),
    "district == 3 and state == 'TX' and owner": lambda t: (t.district == 3) & (t.state == "TX") & t.owner,
    "state == 'TX' and district == 3": lambda t: (t.district == 3) & (t.state == "TX"),
    "state == 'CA' or age < 30": lambda t: (t.state == "CA") | (t.age < 30),
    "state in ('CA', 'NY') and not owner": lambda t: t.state.isin(["CA", "NY"]) & ~t.owner,
    "state == 'CA' and state == 'NY'": lambda t: t.age < 0,
    "district == 4 and age >= 65 and age < 80": lambda t: (t.district == 4) & t.age.between(65, 79),
    "district in (5) and state != 'CA'": lambda t: (t.district == 5) & (t.state != "CA"),
    "not (district == 1 and owner)": lambda t: ~((t.district == 1) & t.owner),
    "state == 'ZZ'": lambda t: t.age < 0,
}


def test_the_matrix_is_what_the_conditions_say():
    table = households()
    specs = [(m, w) for w in CONDITIONS for m in ("", "income", "owner")]
    targets = target_table(
        pd.DataFrame(
            {
                "name": [f"t{i}" for i in range(len(specs))],
                "value": 1.0,
                "measure": [m or None for m, _ in specs],
                "where": [w for _, w in specs],
            }
        )
    )
    matrix, hints = target_matrix(table, targets)
    for i, (measure, where) in enumerate(specs):
        amounts = table[measure].to_numpy(np.float64) if measure else 1.0
        expected = np.where(CONDITIONS[where](table), amounts, 0)
        np.testing.assert_array_equal(matrix[[i]].toarray()[0], expected, err_msg=where)
    assert set(hints) == set(np.flatnonzero(np.diff(matrix.indptr) == 0))
    assert hints[specs.index(("", "state == 'ZZ'"))].startswith("no household has state == 'ZZ'")
    assert hints[specs.index(("owner", "state in ('CA', 'NY') and not owner"))].startswith(
        "owner is 0 for all"
    )
    built = build(table, targets, weight="w", id="id").problem
    assert built.matrix.has_canonical_format
    assert (built.matrix.data != 0).all()
    np.testing.assert_array_equal(built.starting_weights, table.w)
    assert list(built.household_ids) == list(table.id)


@pytest.mark.costly
def test_many_targets_over_many_households_are_built_in_seconds():
    rng = np.random.default_rng(0)
    n, areas = 100_000, 400
    table = pd.DataFrame(
        {
            "area": [f"area {a}" for a in rng.integers(0, areas, n)],
            "band": rng.integers(0, 8, n),
            "age": rng.integers(0, 90, n),
            "income": rng.lognormal(10, 1, n),
        }
    )
    wheres = [f"area == 'area {a}' and band == {b}" for a in range(areas) for b in range(8)]
    wheres += [
        f"age >= {5 * k} and area == 'area {a}' and age < {5 * k + 5}"
        for a in range(areas)
        for k in range(17)
    ]
    targets = target_table(
        pd.DataFrame({"name": range(len(wheres)), "value": 1.0, "measure": "income", "where": wheres})
    )
    start = time.process_time()
    matrix, _ = target_matrix(table, targets)
    assert (
        time.process_time() - start < 10
    )  # about 1 s; a pass over all households per target would take minutes
    assert matrix.nnz == n + (table.age < 85).sum()


def test_missing_values_count_nowhere():
    table = pd.DataFrame({"g": ["a", None, "b"], "x": [1.0, np.nan, 3.0], "one": 1})
    wheres = ["g == 'a'", "g != 'a'", "x > 0", "x != 1", "g in ('a', 'b')", "g not in ('a')"]
    targets = target_table(pd.DataFrame({"name": wheres, "value": 1, "where": wheres}))
    matrix, _ = target_matrix(table, targets)
    assert matrix.toarray().astype(int).tolist() == [
        [1, 0, 0],
        [0, 0, 1],
        [1, 0, 1],
        [0, 0, 1],
        [1, 0, 1],
        [0, 0, 1],
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"where": "agee > 3"},
            r"T.csv row 3 \(target 'b'\): where has the unknown column 'agee'; did you mean 'age'",
        ),
        ({"where": "age > "}, r"T.csv row 3 \(target 'b'\): where .* is not a condition"),
        ({"where": "state == 3"}, r"row 3 \(target 'b'\): where compares unlike things"),
        ({"measure": "incme"}, "row 3 .* unknown column 'incme' as measure; did you mean 'income'"),
        ({"measure": "state"}, "row 3 .* the measure 'state' is not numeric"),
        ({"value": "many"}, "T.csv: value must be a finite number, but it is 'many' in row 3"),
        ({"value": ""}, "T.csv: value must be a finite number, but it is missing in row 3"),
        ({"value": "1e308"}, "value must be a finite number of at most 1e.100 in size, but it is '1e308' in"),
        ({"value": "inf"}, "T.csv: value must be a finite number, but it is 'inf' in row 3"),
        ({"name": "a"}, "T.csv: the target name 'a' is in rows 2 and 3"),
        ({"name": ""}, "T.csv row 3: the name is empty"),
        ({"weight": "-1"}, "T.csv: weight must be >= 0, but it is -1 in row 3"),
        ({"parent": "c"}, "T.csv row 3: its parent 'c' is not the name of a target"),
    ],
)
def test_a_wrong_target_table_names_the_row(tmp_path, change, message):
    row = {
        "name": "b",
        "value": "5",
        "group": "",
        "weight": "1",
        "measure": "",
        "where": "",
        "parent": "",
    } | change
    lines = [",".join(row), "a,1,,1,,,", ",".join(f'"{v}"' for v in row.values())]
    (tmp_path / "T.csv").write_text("\n".join(lines) + "\n")
    with pytest.raises(InputError, match=message):
        build(households(), target_table(read_table(tmp_path / "T.csv", as_text=True), "T.csv"))


def test_a_misspelt_column_of_targets_is_not_taken_for_a_remark():
    with pytest.raises(InputError, match="has a column 'wehre'; did you mean 'where'"):
        target_table(pd.DataFrame({"name": ["a"], "value": [1], "wehre": ["age > 3"]}), "T.csv")
    with pytest.raises(InputError, match="T.csv has no column 'value'"):
        target_table(pd.DataFrame({"name": ["a"], "vaule": [1]}), "T.csv")
    assert target_table(pd.DataFrame({"name": ["a"], "value": [1], "remark": ["x"]})).names == ("a",)


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("w", [1, 2, np.nan], "H.csv: w must be a finite number, but it is missing in row 4"),
        ("w", [1, 1e308, 1], "H.csv: w must be a finite number of at most 1e.100 in size, but it is 1e.308"),
        ("w", [1, np.inf, 1], "H.csv: w must be a finite number, but it is inf in row 3"),
        ("w", [1, -2, 1], "H.csv: w must be >= 0, but it is -2 in row 3"),
        ("w", [0, 0, 0], "H.csv: w is zero for every household"),
        ("w", ["1", "x", "2"], "H.csv: w must be a finite number, but it is 'x' in row 3"),
        ("id", ["a", "b", "a"], r"H.csv: the id a is there twice, in rows 2 and 4 \(1 repeated\)"),
        ("id", ["a", None, "c"], "H.csv: id is missing in row 3"),
        ("income", [1, np.nan, 3], r"income must be a finite number, but it is missing in row 3"),
        ("income", [1, 1e39, 3], "income has values beyond"),
    ],
)
def test_wrong_households_are_named(column, values, message):
    table = pd.DataFrame({"id": [1, 2, 3], "w": [1.0, 2, 3], "income": [1.0, 2, 3]})
    table[column] = values
    targets = target_table(pd.DataFrame({"name": ["a"], "value": [1], "measure": ["income"]}))
    with pytest.raises(InputError, match=message):
        build(table, targets, weight="w", id="id", file="H.csv")
    with pytest.raises(InputError, match="H.csv has no column 'wieght'"):
        build(table.assign(income=1.0), targets, weight="wieght", file="H.csv")


def test_csv_and_parquet_give_the_same_problem(tmp_path):
    table = households()
    table.to_csv(tmp_path / "H.csv", index=False)
    table.to_parquet(tmp_path / "H.parquet")
    wheres = list(CONDITIONS)
    targets = target_table(pd.DataFrame({"name": wheres or "", "value": 1, "where": wheres}).iloc[1:])
    one, two = (build(read_table(tmp_path / f), targets, "w", "id").problem for f in ("H.csv", "H.parquet"))
    assert (one.matrix != two.matrix).nnz == 0
    assert list(one.household_ids) == list(two.household_ids)
    np.testing.assert_array_equal(one.starting_weights, two.starting_weights)


def test_files_that_are_not_what_their_name_says(tmp_path):
    def refuses(name, message, read=read_table):
        with pytest.raises(InputError, match=message):
            read(tmp_path / name)

    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "blank.csv").write_text("\n\n")
    (tmp_path / "header.csv").write_text("a,b\n")
    (tmp_path / "twice.csv").write_text("a, a\n1,2\n")
    (tmp_path / "ragged.csv").write_text("a,b\n1,2\n1,2,3,4\n")
    (tmp_path / "latin.csv").write_bytes("a,b\né,2\n".encode("latin-1"))
    (tmp_path / "text.parquet").write_text("a,b\n1,2\n")
    (tmp_path / "cut.parquet").write_bytes(b"PAR1 and then nothing")
    (tmp_path / "zip.csv").write_bytes(b"PK\x03\x04rest")
    (tmp_path / "table.xyz").write_bytes(b"PK\x03\x04rest")
    (tmp_path / "text.npz").write_text("hello")
    pd.DataFrame({"a": [1]}).to_parquet(tmp_path / "parquet.csv")
    np.savez(tmp_path / "arrays.npz", x=np.ones(3))
    np.savez(tmp_path / "objects.npz", format=np.array([{}], dtype=object))
    sp.save_npz(tmp_path / "good.npz", sp.csr_array(np.eye(3)))
    refuses("empty.csv", "is empty")
    refuses("blank.csv", "is empty")
    refuses("header.csv", "has a header but no rows")
    refuses("twice.csv", "the column 'a' is there twice")
    refuses("ragged.csv", "row 3 has 4 cells, but the header names 2 columns")
    refuses("latin.csv", "is not UTF-8")
    refuses("text.parquet", "is not a Parquet file")
    refuses("cut.parquet", "cannot be read as Parquet")
    refuses("zip.csv", "is a zip or Excel file")
    refuses("parquet.csv", "is a Parquet file, though its name says CSV")
    refuses("table.xyz", "a table is not read from such a file: expected one of .csv, ")
    refuses("hedaer.csv", "does not exist; did you mean 'header.csv'")
    refuses(".", "is a folder")
    refuses("text.npz", "is not an .npz file", read_matrix)
    refuses("arrays.npz", "holds the arrays x, not a sparse matrix", read_matrix)
    refuses("objects.npz", "cannot be read as a sparse matrix", read_matrix)
    assert read_matrix(tmp_path / "good.npz").toarray().tolist() == np.eye(3).tolist()


def test_texts_that_a_spreadsheet_would_run_are_read_as_they_were(tmp_path):
    ids = ["=1+1", "-A1", "-5", "'=x", "plain"]
    write_table(tmp_path / "t.csv", pd.DataFrame({"id": ids, "w": [-1.0, 2, 3, 4, 5]}))
    assert "'=1+1,-1.0" in (tmp_path / "t.csv").read_text()
    table = read_table(tmp_path / "t.csv")
    assert table["id"].tolist() == ids
    assert table["w"].tolist() == [-1, 2, 3, 4, 5]


def ratio_targets(**columns):
    table = {
        "name": ["all", "mean", "share"],
        "value": ["10", "2.5", "0.4"],
        "measure": ["", "income", "owner"],
        "where": ["", "state == 'CA'", ""],
        "of": ["", "1", ""],
        "of_where": ["", "state == 'CA'", "state in ('CA', 'NY')"],
    }
    return target_table(pd.DataFrame({**table, **columns}), "T.csv")


def test_a_target_with_a_denominator_is_a_ratio():
    table = households()
    problem = build(table, ratio_targets(), weight="w", id="id").problem
    w, state = table.w.to_numpy(), table.state.to_numpy()
    ca, both = state == "CA", np.isin(state, ["CA", "NY"])
    income, owner = table.income.to_numpy(), table.owner.to_numpy()
    expected = [w.sum(), (w * income)[ca].sum() / w[ca].sum(), (w * owner).sum() / w[both].sum()]
    np.testing.assert_allclose(problem.estimates(w), expected)
    assert problem.is_ratio.tolist() == [False, True, True]
    assert ratio_targets().hard is None


def test_scales_tolerances_and_hard_targets_are_read():
    read = ratio_targets(scale=["", "3", "0"], tolerance=["5%", "0.1", ""], hard=["yes", "", "false"])
    assert read.scales.tolist() == [0, 3, 0]
    assert read.tolerances.tolist() == [0.5, 0.1, 0]
    assert read.hard.tolist() == [True, True, False]
    priced = ratio_targets(weight=["", "2", "1"], hard=["", "", "true"])
    assert priced.hard.tolist() == [True, False, True]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"of_where": ["", "state == 'XX'", ""]}, "T.csv row 3 .target 'mean'.: its denominator .* is zero"),
        ({"tolerance": ["-1", "", ""]}, "T.csv: tolerance must be >= 0, but it is -1 in row 2"),
        ({"tolerance": ["", "1 %x", ""]}, "tolerance must be a finite number"),
        ({"tolerance": ["1%", "", ""], "value": ["0", "1", "1"]}, "tolerance is 1% of a value of 0"),
        ({"scale": ["", "-3", ""]}, "T.csv: scale must be >= 0"),
        ({"hard": ["", "maybe", ""]}, "T.csv row 3: hard must be true, false or empty, got 'maybe'"),
    ],
)
def test_wrong_ratios_and_bands_are_named(columns, message):
    with pytest.raises(InputError, match=message):
        build(households(), ratio_targets(**columns), weight="w")
