"""Large tables are read part by part: the same problem, less memory, the same places in messages."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from sparsereg.calibration.config import HouseholdsProblem
from sparsereg.calibration.reading import csv_file, tables
from sparsereg.calibration.reading.missing import Missing
from sparsereg.calibration.reading.sources import read_years
from sparsereg.calibration.reading.tables import open_table
from sparsereg.errors import InputError
from sparsereg.settings import plain

from ..command.test_run import _own_folder, exactly, run  # noqa: F401
from .test_formats import needs, write

N = 700


@pytest.fixture
def in_parts(monkeypatch):
    """Take every table of more than 100 rows for a large one."""

    def turn(on=True):
        monkeypatch.setattr(tables, "ROWS_AT_ONCE", 100 if on else 2**19)
        monkeypatch.setattr(tables.Table.parts, "__defaults__", (None, 100 if on else 2**19))
        monkeypatch.setattr(csv_file, "LARGE", 1 if on else 2**40)
        monkeypatch.setattr(csv_file, "_BLOCK", 4096 if on else 2**24)

    return turn


def survey():
    rng = np.random.default_rng(4)
    households = pd.DataFrame(
        {
            "hid": np.arange(N) + 5000,
            "name": [f"h'{i:04d}" for i in range(N)],
            "w": rng.random(N) + 1,
            "state": rng.choice(["CA", "NY", "TX"], N),
            "income": np.where(np.arange(N) < 500, np.arange(N) % 7, rng.random(N)),  # whole numbers at first
            "code": np.where(np.arange(N) < 600, "12", "B"),  # numbers at first
            "owner": rng.random(N) < 0.5,
            "late": np.where(np.arange(N) < 450, "", "7"),  # nothing at first
            "unused": rng.random(N),
        }
    )
    persons = pd.DataFrame({"hid": np.repeat(households.hid, 3), "age": rng.integers(0, 90, 3 * N)})
    targets = pd.DataFrame(
        [
            ("all", 1200, "", "", "", "", ""),
            ("income", 2000, "income", "", "", "", ""),
            ("ca", 300, "income", "state == 'CA' and not owner", "", "", ""),
            ("code", 300, "", "code == '12' or code == 'B'", "", "", ""),
            ("late", 300, "late", "late is not missing", "", "", ""),
            ("mean", 3, "income", "owner", "1", "owner", ""),
            ("kids", 900, "", "age < 18", "", "", "person"),
            ("kids in ny", 300, "age", "age < 18 and state == 'NY'", "", "", "person"),
            ("nobody", 0, "", "state == 'AZ'", "", "", ""),
        ],
        columns=["name", "value", "measure", "where", "of", "of_where", "unit"],
    )
    targets.to_csv("T.csv", index=False)
    return households, persons


FILES = ["H.csv", "H.parquet", "H.sqlite", pytest.param("H.dta", marks=needs("pyreadstat")),
         pytest.param("H.duckdb", marks=needs("duckdb"))]  # fmt: skip


def problem_of(households, persons="P.parquet", **keys):
    keys = {"weight": "w", "id": "name", "household_id": "hid", **keys}
    choice = plain(HouseholdsProblem(households=households, persons=persons, targets="T.csv", **keys))
    return read_years(choice, ["income"], Missing("error", {"late": "zero"}))[None]


@pytest.mark.costly
@pytest.mark.parametrize("name", FILES)
def test_a_problem_from_parts_is_the_problem(name, in_parts):
    households, persons = survey()
    if name != "H.csv":
        households["late"] = pd.to_numeric(households.late)
    if name in ("H.dta", "H.sqlite"):  # they know no true and false
        households["owner"] = households.owner.astype(int)
        table = pd.read_csv("T.csv", dtype=str, keep_default_na=False)
        table.where(~table.isin(["owner"]), "owner == 1").replace(
            "not owner", "owner == 0", regex=True
        ).to_csv("T.csv", index=False)
    write(name, households)
    for people in ("P.parquet", "P.csv"):
        write(people, persons)
        in_parts(False)
        whole = problem_of(name, people)
        in_parts(True)
        parts = problem_of(name, people)
        assert whole.source.rest is None
        assert parts.source.rest is not None
        assert set(parts.source.households.columns) < set(whole.source.households.columns) - {"unused"}
        for matrix in ("matrix", "denominators"):
            one, other = (getattr(built.problem, matrix) for built in (whole, parts))
            assert one.dtype == other.dtype
            for array in ("indptr", "indices", "data"):
                np.testing.assert_array_equal(getattr(one, array), getattr(other, array))
        for array in ("starting_weights", "household_ids"):
            assert getattr(whole.problem, array).tolist() == getattr(parts.problem, array).tolist()
        assert whole.columns["income"].tolist() == parts.columns["income"].tolist()
        assert whole.hints == parts.hints
        assert "no household has state == 'AZ'; there are CA, NY, TX" in whole.hints[8]


def test_places_of_mistakes_are_those_in_the_file(in_parts):
    households, persons = survey()
    in_parts()
    write("P.parquet", persons)
    households["late"] = pd.to_numeric(households.late)
    broken = households.assign(income=households.income.where(np.arange(N) != 650))
    write("B.parquet", broken)
    choice = {"household_id": "hid", "id": "name", "weight": "w"}
    table = plain(HouseholdsProblem(households="B.parquet", persons="P.parquet", targets="T.csv", **choice))
    with pytest.raises(InputError, match=r"target 'income'.*income must be a .* missing in row 652"):
        read_years(table, (), Missing("error", {"late": "zero"}))
    write("B.parquet", households.assign(w=households.w.where(np.arange(N) != 651, -1)))
    with pytest.raises(InputError, match="w must be >= 0, but it is -1 in row 653"):
        read_years(table, (), Missing("error", {"late": "zero"}))
    pd.DataFrame({"name": ["t"], "value": [1], "where": ["state == 'CA'"]}).to_csv("T.csv", index=False)
    with pytest.raises(InputError, match="B.parquet has no column 'ww' .*did you mean 'w'"):
        read_years({**table, "weight": "ww"})
    pd.DataFrame({"name": ["t"], "value": [1], "where": ["stat == 'CA'"]}).to_csv("T.csv", index=False)
    with pytest.raises(InputError, match="unknown column 'stat'; did you mean 'state'"):
        read_years(table)


TROUBLE = {
    "short": ("a,b\n" + "1,2\n" * 3000 + "1\n" + "1,2\n" * 9, "row 3002 has 1 cells"),
    "quoted short": ('a,b\n"x",2\n' + "1,2\n" * 3000 + "1\n", "row 3003 has 1 cells"),
    "empty": ("a,b\n" + "1,2\n" * 3000 + "\n1,2\n", "row 3002 is empty"),
    "nul": ("a,b\n" + "1,2\n" * 3000 + "1,\0\n", "a NUL byte in line 3002"),
    "latin": (
        ("a,b\n" + "1,2\n" * 3000).encode() + b"\xe9,2\n",
        "is not UTF-8 text .*problem.encoding=cp1252",
    ),
    "header": ("a,b\n", "has a header but no rows"),
    "twice": ("a,a\n1,2\n", "the column 'a' is there twice"),
}


@pytest.mark.parametrize(("text", "said"), TROUBLE.values(), ids=TROUBLE)
def test_large_csv_files_that_are_none_are_refused_with_the_place(tmp_path, in_parts, text, said):
    (tmp_path / "H.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    in_parts()
    with pytest.raises(InputError, match=said) as error:
        list(open_table("H.csv").parts())
    assert "\n" not in str(error.value)


GOOD = {
    "plain": ("a,b,c\n", "{i},{x},t{i}\n", "utf-8", {}),
    "blank lines behind": ("a,b,c\n", "{i},{x},t{i}\n", "utf-8", {"end": "\n\n"}),
    "windows": ("\ufeffa;b;c\r\n", "{i};{x};t{i}\r\n", "utf-8", {}),
    "hint": ("sep=;\na;b;c\n", "{i};{x};t{i}\n", "utf-8", {}),
    "quotes": ("a,b,c\n", '{i},{x},"t{i}"\n', "utf-8", {}),
    "utf-16": ("\ufeffa\tb\tc\n", "{i}\t{x}\tt{i}\n", "utf-16-le", {}),
    "umlauts": ("a,b,c\n", "{i},{x},tä{i}\n", "cp1252", {"encoding": "cp1252"}),
}


@pytest.mark.parametrize(("header", "line", "encoding", "how"), GOOD.values(), ids=GOOD)
def test_large_csv_files_of_every_kind_are_read_alike(tmp_path, in_parts, header, line, encoding, how):
    how = dict(how)
    rng = np.random.default_rng(0)
    text = (
        header
        + "".join(line.format(i=i, x=repr(float(rng.normal()))) for i in range(900))
        + how.pop("end", "")
    )
    (tmp_path / "H.csv").write_bytes(text.encode(encoding))
    in_parts(False)
    whole = open_table("H.csv", **how).read()
    in_parts(True)
    parts = list(open_table("H.csv", **how).parts())
    assert len(parts) > 2
    pd.testing.assert_frame_equal(pd.concat(parts, ignore_index=True), whole)
    assert len(whole) == 900
    assert whole.a.tolist() == list(range(900))


@pytest.mark.costly
def test_a_run_in_parts_ends_with_the_same_weights(in_parts):
    households, _ = survey()
    write("H.parquet", households)
    targets = pd.read_csv("T.csv", dtype=str, keep_default_na=False)
    targets = targets[(targets.unit == "") & (targets.name != "late")].drop(columns="unit")
    targets.to_csv("T.csv", index=False)
    common = ["problem=households", "problem.households=H.parquet", "problem.targets=T.csv",
              "problem.weight=w",
              "problem.id=hid", "num_households=null", "method=calibrate", "plots=false", "tensorboard=false",
              "report.variables=[income,unused]", "variance=linearized", "strata=state",
              "untouchable=keep"]  # fmt: skip
    in_parts(False)
    whole, _ = run(*common)
    in_parts(True)
    parts, _ = run(*common)
    for name in ("weights.csv", "targets.csv", "standard_errors.csv"):
        pd.testing.assert_frame_equal(exactly(whole / name), exactly(parts / name))


BIG = """
import json, resource, sys, time
from pathlib import Path
sys.argv = ["calibrate.py"]
from sparsereg.calibration.config import HouseholdsProblem
from sparsereg.calibration.reading.sources import read_years
from sparsereg.settings import plain
import pandas, pyarrow.parquet, pyarrow.csv, scipy.sparse  # what reading needs
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
start = time.perf_counter()
choice = HouseholdsProblem(households="H.{suffix}", targets="T.csv", weight="w", id="hid")
problem = read_years(plain(choice))[None].problem
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
m = problem.matrix
matrix = m.data.nbytes + m.indices.nbytes + m.indptr.nbytes
told = {{"before": before, "peak": peak, "matrix": matrix, "nonzeros": m.nnz, "households": m.shape[1]}}
print(json.dumps({{**told, "seconds": time.perf_counter() - start}}))
"""


def write_large(households: int, columns: int, suffix: str) -> int:
    """Write a wide table block by block and a table of targets; return the bytes of the table in memory."""
    import pyarrow as pa
    import pyarrow.csv
    import pyarrow.parquet as pq

    rng, block, writer, size = np.random.default_rng(0), 100_000, None, 0
    for start in range(0, households, block):
        n = min(block, households - start)
        table = {"hid": np.arange(start, start + n), "w": rng.random(n) + 1, "state": rng.integers(0, 50, n)}
        table |= {"age": rng.integers(0, 90, n)} | {
            f"x{i}": np.round(rng.random(n), 3) for i in range(columns)
        }
        part = pa.table(table)
        size += part.nbytes
        if writer is None:
            new = pq.ParquetWriter if suffix == "parquet" else pa.csv.CSVWriter
            writer = new(f"H.{suffix}", part.schema)
        writer.write_table(part)
    writer.close()
    rows = [(f"s{i}", 1.5 * households / 50, "", f"state == {i}") for i in range(50)]
    rows += [(f"x{i}", households * 0.75, f"x{i}", "age >= 85") for i in range(4)]
    pd.DataFrame(rows, columns=["name", "value", "measure", "where"]).to_csv("T.csv", index=False)
    return size


def measured(suffix: str) -> dict:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", BIG.format(suffix=suffix)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="peaks are measured in kilobytes on Linux")
@pytest.mark.parametrize(
    ("households", "columns", "suffix"), [(3_000_000, 80, "parquet"), (700_000, 80, "csv")]
)
def test_the_peak_stays_far_below_the_table(households, columns, suffix):
    table = write_large(households, columns, suffix)
    found = measured(suffix)
    print(json.dumps({"table": table, "file": Path(f"H.{suffix}").stat().st_size, **found}))
    assert found["households"] == households
    assert found["peak"] - found["before"] < 0.4 * table
    if suffix == "parquet":
        assert found["peak"] < table


@pytest.mark.costly
@pytest.mark.skipif(sys.platform != "linux", reason="what a process has open stands in /proc on Linux")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_run_that_is_killed_while_it_reads_leaves_nothing(tmp_path, number):
    write_large(400_000, 12, "csv")
    root = Path(__file__).parents[3]
    command = [sys.executable, str(root / "calibrate.py"), "problem=households", "problem.households=H.csv",
               "problem.targets=T.csv", "problem.weight=w", "method=calibrate",
               "num_households=null"]  # fmt: skip
    before = {p.name for p in tmp_path.iterdir()}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        while process.poll() is None:
            with contextlib.suppress(OSError):  # a file that was closed meanwhile
                if any(os.readlink(p).endswith("/H.csv") for p in Path(f"/proc/{process.pid}/fd").iterdir()):
                    break
        process.send_signal(number)
        process.communicate()
    finally:
        process.kill()
    assert process.returncode in ({143} if number == signal.SIGTERM else {-signal.SIGKILL})
    assert {p.name for p in tmp_path.iterdir()} == before
