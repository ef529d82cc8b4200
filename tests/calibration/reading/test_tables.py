"""CSV and Parquet files as people bring them: what is read, exactly, and what is refused in one line."""

import datetime
import decimal
import gzip
import os

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sparsereg.calibration.reading import csv_file
from sparsereg.calibration.reading.households import build, initial_weights, target_table
from sparsereg.calibration.reading.tables import open_table, read_table, unique_ids
from sparsereg.errors import InputError


def write(folder, text, name="H.csv"):
    file = folder / name
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return file


@pytest.mark.parametrize(
    ("text", "message"),
    [
        # The header of three columns in front of rows that end with a comma: not a shift, an error.
        ("id,w,age\nh0,29.7,76,\n", "H.csv row 2 has 4 cells, .* names 3 columns: it ends with a separator"),
        ("id,w,age\nh0,29.7,76,5\n", "H.csv row 2 has 4 cells, but the header names 3 columns$"),
        ("id,w,age\nh0,1,2\nh1,1\n", "H.csv row 3 has 2 cells, but the header names 3 columns"),
        ("id,w,age\nh0,1,2\n\nh1,1,3\n", "H.csv row 3 is empty"),
        ("id,w,age\r\nh0,1,2\r\n\r\nh1,1,3\r\n", "H.csv row 3 is empty"),
        ("\nid,w\nh0,1\n", "H.csv row 1 is empty"),
        ('id,w\n"a\nb",1\nh1\n', r"H.csv row 3 \(line 4\) has 1 cells"),
        ('id,w\n"a"b,1\n', "cannot be read as CSV: ',' expected after '\"' in row 2"),
        ('id,w\nh0,1\n"a,1\n', "cannot be read as CSV: unexpected end of data in row 3"),
        ("id,w,id\nh0,1,2\n", "the column 'id' is there twice"),
        ("id, id \nh0,1\n", "the column 'id' is there twice"),
        ("id,,w\nh0,5,1\n", "column 2 has cells, but no name in the header"),
        ("id,w\nh0,1\nh\0,1\n", "is not text, though its name says CSV: a NUL byte in line 3"),
        ("id,w\n" + "h,1\n" * 5_000 + "h\0,1\n", "a NUL byte in line 5002"),
        ("id,w\nh0,1\nä,1\n".encode("latin-1"), r"is not UTF-8 text \(line 3\): say problem.encoding="),
        (
            "id,w\n" + "x" * 200_000 + ",1\n",
            "more than 131,072 characters, or a quotation mark without another, in row 2",
        ),
        (
            "id,w\n" + "x" * 2_000_000 + ",1\n",
            "more than 131,072 characters, or a quotation mark without another, in row 2",
        ),
        ("a;b,c\n1;2,5\n", "a comma and a semicolon separate cells in the header"),
        ("id,w\n", "has a header but no rows"),
        (" \n", "is empty"),
    ],
)
def test_what_is_no_table_is_refused_with_its_row(tmp_path, text, message):
    with pytest.raises(InputError, match=message):
        read_table(write(tmp_path, text))


@pytest.mark.parametrize(
    "text",
    [
        "id,w\n007,1.5\n=a,2\n",
        "id,w\n007,1.5\n=a,2",
        "id,w\r\n007,1.5\r\n=a,2\r\n\r\n",
        "id,w\r007,1.5\r=a,2\r",
        "\ufeffid,w\n007,1.5\n=a,2\n",
        "id;w\n007;1.5\n=a;2\n",
        "id\tw\n007\t1.5\n=a\t2\n",
        "id|w\n007|1.5\n=a|2\n",
        '"id","w"\n"007","1.5"\n"=a","2"\n',
        '"id";w\n007;"1.5"\n=a;2\n',
        "id, w\n007, 1.5\n =a, 2 \n",
        " id ,w\n007,+1.5\n=a,2.\n",
        ",id,w\n0,007,1.5\n1,=a,2\n",
        "id,w,\n007,1.5,\n=a,2,\n",
        "id (a; b),w\n007,1.5\n=a,2\n",
        "id,w\n007,15e-1\n=a,2E0\n",
    ],
)
def test_tables_of_every_country_and_program_are_the_same(tmp_path, text):
    name = "id (a; b)" if "(a; b)" in text else "id"
    for file in (write(tmp_path, text), write(tmp_path, gzip.compress(text.encode()), "H.csv.gz")):
        table = read_table(file, id=name)
        assert list(table.columns) == [name, "w"]
        assert table[name].tolist() == ["007", "=a"]
        assert table.w.tolist() == [1.5, 2.0]
        assert table.w.dtype == np.float64


def test_a_decimal_comma_is_asked_for_and_then_read(tmp_path):
    file = write(tmp_path, "id;w;n\na;1,5;1\nb;1.234,5;2\n")
    with pytest.raises(InputError, match=r"w must be .* '1,5' in row 2 .*say problem.decimal=comma"):
        initial_weights(read_table(file), "w", "H.csv")
    with pytest.raises(InputError, match="one of thousands, which are not separated"):
        initial_weights(read_table(file, decimal="comma"), "w", "H.csv")
    table = read_table(write(tmp_path, "id;w;n\na;1,5;1\nb;-2e-1;2\n"), decimal="comma")
    assert table.w.tolist() == [1.5, -0.2]
    assert table.n.tolist() == [1, 2]


def test_a_point_that_may_be_one_of_thousands_is_refused_where_the_comma_is_the_sign(tmp_path):
    """1.234 would be a thousandth of what a German table means by it; 2.5 can mean nothing else."""
    file = write(tmp_path, "id;w;n;m\na;1.234;1,5;1,5\nb;5.678;2.5;-12.345\nc;9.012;3,5;2,5\n")
    table = read_table(file, decimal="comma")
    with pytest.raises(InputError, match=r"w must be .* '1.234' in row 2 \(3 such rows\); with"):
        initial_weights(table, "w", "H.csv")
    assert initial_weights(table, "n", "H.csv").tolist() == [1.5, 2.5, 3.5]
    with pytest.raises(InputError, match=r"m must be .* '-12.345' in row 3; with problem.decimal=comma this"):
        initial_weights(table, "m", "H.csv")
    targets = target_table(pd.DataFrame({"name": ["t"], "value": [1.0], "measure": ["m"]}), "T.csv")
    with pytest.raises(InputError, match=r"'m' is not numeric: H.csv holds '-12.345' there; .* thousands"):
        build(table, targets, file="H.csv")


NOT_NUMBERS = (
    *(
        "1,234",
        "1 234",
        "1'234",
        "1_000",
        "1e400",
        "0x1F",
        " inf",
        "nan",
        "NaN",
        "NA",
        "-",
        "1.2.3",
        "1e",
        ".",
    ),
    *("12:30", "2020-01-01", "true", "TRUE", "١", "1\u00a0000", "$5", "5%", "--1", "1d5", "Infinity"),
)


@pytest.mark.parametrize("cell", NOT_NUMBERS)
def test_what_is_no_number_is_no_weight_measure_or_target(tmp_path, cell):
    quoted = f'"{cell}"'
    table = read_table(write(tmp_path, f"id,w\na,1\nb,{quoted}\n"))
    with pytest.raises(InputError, match=r"H.csv: w must be a finite number, but it is .* in row 3"):
        initial_weights(table, "w", "H.csv")
    targets = read_table(write(tmp_path, f"name,value\na,1\nb,{quoted}\n"), as_text=("name",))
    with pytest.raises(InputError, match="T.csv: value must be a finite number, but it is .* in row 3"):
        target_table(targets, "T.csv")
    sums = target_table(pd.DataFrame({"name": ["x"], "value": ["1"], "measure": ["w"]}))
    with pytest.raises(InputError, match=r"row 2 \(target 'x'\)"):
        build(table, sums, file="H.csv")
    column = read_table(write(tmp_path, f"id,w\na,{quoted}\nb,{quoted}\n"))  # a whole column of them
    with pytest.raises(InputError, match="w must be a finite number, but it is .* in row 2"):
        initial_weights(column, "w", "H.csv")


@pytest.mark.parametrize(
    "values",
    [
        pd.to_datetime(["2020-01-01", "2021-01-01"]),
        pd.to_timedelta([1, 2]),
        pd.Series([True, False]),
        pd.Series([True, None], dtype="boolean"),
        pd.Series([1.0, True], dtype=object),
        pd.Series([True, False], dtype="category"),
        [datetime.date(2020, 1, 1)] * 2,
        [datetime.time(1, 1)] * 2,
        [1 + 2j, 3],
        [[1], [2]],
        [b"1", b"2"],
        pd.Series([10**400, 1], dtype=object),
        [decimal.Decimal("Infinity"), decimal.Decimal(1)],
    ],
)
def test_times_and_truths_in_a_frame_are_no_weights(values):
    with pytest.raises(InputError, match="w must be a finite number, but it is"):
        initial_weights(pd.DataFrame({"w": values}), "w", "H.parquet")


@pytest.mark.parametrize(
    "ids",
    [
        ["007", "7"],
        ["1", "2"],
        ["1.0", "1"],
        ["-1", "+1"],
        ["@x", "=1+1"],
        ["1e5", "x"],
        ["9" * 30, "9" * 31],
        ["0x1F", "31"],
        ["-0", "0"],
        ["True", "true"],
        ["NA", "nan"],
    ],
)
def test_ids_come_back_as_they_are_written(tmp_path, ids):
    text = "".join(f"{i},{k + 1}\n" for k, i in enumerate(ids))
    found = unique_ids(read_table(write(tmp_path, "id,w\n" + text), id="id"), "id", "H.csv")
    assert [str(i) for i in found] == ids


def test_numbers_are_read_to_the_last_digit(tmp_path):
    rng = np.random.default_rng(0)
    values = rng.lognormal(0, 30, 20_000) * rng.choice([-1, 1], 20_000)
    whole = rng.integers(2**53, 2**62, 20_000)
    text = "x,n,m\n" + "".join(f"{float(v)!r},{n},{n}\n" for v, n in zip(values, whole, strict=True))
    table = read_table(write(tmp_path, text + "0.1,5,\n"))
    assert table.x.tolist() == [*values, 0.1]
    assert table.n.tolist() == [*whole, 5]
    assert [int(v) for v in table.m[:-1]] == whole.tolist()
    assert pd.isna(table.m.iloc[-1])


def test_both_ways_of_reading_agree(tmp_path):
    rng = np.random.default_rng(0)
    cells = np.array(["1", "2.5", "", " x", "y ", "true", "007", "-3e2", "ä", "  ", "a b"])
    rows = [",".join(rng.choice(cells, 4)) for _ in range(40_000)]
    text = "a,b,c,d\n" + "\n".join(rows) + "\n"
    one = read_table(write(tmp_path, text), id="d")
    two = read_table(write(tmp_path, text.replace("a,b,c,d", 'a,b,c,"d"')), id="d")
    pd.testing.assert_frame_equal(one, two)


def test_parquet_keeps_what_it_holds(tmp_path):
    big = 2**53 + 1
    table = pa.table(
        {
            "id": pa.array(["007", "=x", "c"]).dictionary_encode(),
            "big": pa.array([big, None, big + 1]),
            "huge": pa.array([2**63 + 1, 5, None], pa.uint64()),
            "w": pa.array([decimal.Decimal("1.25"), decimal.Decimal("2.50"), decimal.Decimal("3.00")]),
            "state": pa.array(["CA", None, "NY"]).dictionary_encode(),
            "code": pa.array([6, None, 36], pa.int8()).dictionary_encode(),
            "day": pa.array([datetime.date(2020, 1, 1), None, datetime.date(2021, 1, 1)]),
            "at": pa.array([datetime.datetime(2020, 1, 1, 12), None, datetime.datetime(2021, 1, 1)]),
            "list": pa.array([[1], [2], []]),
            "struct": pa.array([{"a": 1}, None, {"a": 2}]),
            "maybe": pa.array([True, None, False]),
        }
    )
    pq.write_table(table, tmp_path / "H.parquet")
    frame = read_table(tmp_path / "H.parquet", id="id")
    wheres = {
        f"big == {big}": [1, 0, 0],
        f"big != {big}": [0, 0, 1],
        f"huge == {2**63 + 1}": [1, 0, 0],
        "huge <= 5": [0, 1, 0],
        "w > 1.25": [0, 1, 1],
        "state == 'CA'": [1, 0, 0],
        "state is missing": [0, 1, 0],
        "code == 36": [0, 0, 1],
        "day == '2020-01-01'": [1, 0, 0],
        "at != '2020-01-01 12:00:00'": [0, 0, 1],
        "not maybe": [0, 0, 1],
    }
    targets = pd.DataFrame({"name": list(wheres), "value": 1, "where": list(wheres)})
    problem = build(frame, target_table(targets), "w", "id").problem
    assert problem.matrix.toarray().tolist() == list(wheres.values())
    assert problem.starting_weights.tolist() == [1.25, 2.5, 3.0]
    assert list(problem.household_ids) == ["007", "=x", "c"]
    for where in ("list == 1", "struct == 'a'"):
        with pytest.raises(InputError, match="holds neither numbers nor texts"):
            build(frame, target_table(pd.DataFrame({"name": ["x"], "value": [1], "where": [where]})))
    for measure in ("day", "at", "list", "state"):
        with pytest.raises(InputError, match="not numeric|holds neither"):
            build(frame, target_table(pd.DataFrame({"name": ["x"], "value": [1], "measure": [measure]})))
        with pytest.raises(InputError, match="must be a finite number"):
            initial_weights(frame, measure, "H.parquet")


def test_a_folder_of_a_parquet_file_adds_no_column(tmp_path):
    folder = tmp_path / "year=2020"
    folder.mkdir()
    pq.write_table(pa.table({"w": [1.0]}), folder / "H.parquet")
    assert list(read_table(folder / "H.parquet").columns) == ["w"]


def test_a_damaged_parquet_file_is_refused(tmp_path):
    file = tmp_path / "H.parquet"
    pq.write_table(pa.table({"w": np.arange(1000.0)}), file)
    whole = file.read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:-8], whole[:4] + bytes(200) + whole[204:]):
        file.write_bytes(damaged)
        with pytest.raises(InputError, match="cannot be read as Parquet"):
            read_table(file)


def test_a_packed_file_that_is_a_bomb_is_refused_before_it_fills_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(csv_file, "_UNPACKED", 1 << 20)
    row = b"h,1,2\n"
    bomb = tmp_path / "H.csv.gz"
    bomb.write_bytes(gzip.compress(b"id,w,age\n" + row * 600_000))  # 3.6 MB, shrunk more than 200 times
    assert bomb.stat().st_size * csv_file._EXPANSION < 6 * 600_000
    for large in (1 << 40, 1):  # read whole, and in parts
        monkeypatch.setattr(csv_file, "LARGE", large)
        with pytest.raises(InputError, match=r"unpacks to more than 1 MiB, over 200 times its size"):
            list(open_table(bomb).parts(rows=1000))
    few = tmp_path / "few.csv.gz"
    few.write_bytes(gzip.compress(b"id,w,age\n" + row * 1000))
    assert len(read_table(few)) == 1000


def test_rows_of_parquet_that_this_machine_cannot_hold_are_refused(tmp_path, monkeypatch):
    file = tmp_path / "H.parquet"
    pq.write_table(pa.table({"w": np.ones(200_000), "x": np.ones(200_000)}), file)
    assert file.stat().st_size < 20_000
    assert len(read_table(file)) == 200_000
    monkeypatch.setattr(os, "sysconf", lambda name: 1000)  # a machine of 1 MB
    said = "200,000 rows of 2 columns need at least 0.0 GiB of memory, this machine has 0.0 GiB"
    with pytest.raises(InputError, match=f"H.parquet: {said}"):
        read_table(file)
    assert len(next(open_table(file).parts(rows=100))) == 100  # part by part it fits


def test_many_columns_are_read_and_a_name_twice_is_found(tmp_path):
    names = [f"c{i}" for i in range(30_000)]
    file = tmp_path / "wide.csv"
    file.write_text(",".join([*names, "c7"]) + "\n" + ",".join(["1"] * 30_001) + "\n")
    with pytest.raises(InputError, match="the column 'c7' is there twice"):
        read_table(file)


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize(
    ("text", "quick"),
    [
        ('"id","the, name",x\n1,a,2.5\n2,b,3\n', True),
        ('"id","the, name",x\r\n1,a,2.5\r\n2,b,3\r\n', True),
        ('id,"the\nname",x\n1,a,2.5\n2,b,3\n', False),
        ('"id","the, name",x\n1,"a",2.5\n2,b,3\n', False),
        ('"id,the name,x\n1,a,2.5\n', None),
    ],
)
def test_names_in_quotes_do_not_make_reading_slow(tmp_path, monkeypatch, text, quick, large):
    """R and pyarrow write names in quotes, and cells without: PyArrow reads those all the same."""
    file = tmp_path / "H.csv"
    file.write_bytes(text.encode())
    monkeypatch.setattr(csv_file, "LARGE", 1 if large else 2**40)
    slow = []
    real = csv_file._rows
    monkeypatch.setattr(csv_file, "_rows", lambda *given: slow.append(1) or real(*given))
    if quick is None:
        with pytest.raises(InputError, match="H.csv cannot be read as CSV: .* row 1"):
            read_table(file)
        return
    table = read_table(file)
    assert bool(slow) is not quick
    assert table.columns[1] == ("the\nname" if "the\n" in text else "the, name")
    assert table.iloc[:, 1].tolist() == ["a", "b"]
    assert table.x.tolist() == [2.5, 3.0]
