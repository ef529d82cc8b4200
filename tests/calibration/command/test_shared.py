"""calibrate.py started by torchrun: each process its part of a Parquet file."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import hydra
import numpy as np
import pandas as pd
import pytest

from sparsereg.calibration.command.shared import _check
from sparsereg.calibration.config import CalibrationRun
from sparsereg.calibration.reading.parquet_file import share_of
from sparsereg.cli import settings_of
from sparsereg.errors import InputError

ROOT = Path(__file__).parents[3]


def tables(tmp_path, n=900, groups=7):
    rng = np.random.default_rng(0)
    h = pd.DataFrame({
        "id": [f"h{i:04d}" for i in range(n)], "w": rng.lognormal(3, 0.3, n),
        "state": np.sort(rng.choice(["CA", "TX", "WY"], n)), "income": rng.lognormal(10, 1, n).round(),
        "age": rng.integers(18, 90, n), "unused": 1.0,
    })  # fmt: skip
    h.to_parquet(tmp_path / "H.parquet", row_group_size=-(-n // groups))
    (tmp_path / "H").mkdir()
    for k, rows in enumerate(np.array_split(np.arange(n), 3)):
        h.iloc[rows].to_parquet(tmp_path / "H" / f"part-{k}.parquet")
    wheres = ["", "state == 'CA'", "state == 'WY' and age >= 65", "income > 30000"]
    rows = [
        {"name": f"{m}{i}", "where": w, "measure": m,
         "value": rng.normal(1, 0.03) * (h.w * (h[m] if m else 1))[h.query(w).index if w else h.index].sum()}
        for i, w in enumerate(wheres) for m in ("", "income")
    ]  # fmt: skip
    pd.DataFrame(rows).to_csv(tmp_path / "T.csv", index=False)
    return h


@pytest.mark.parametrize("place", ["H.parquet", "H"])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_shares_are_all_rows_once_and_in_order(tmp_path, place, size):
    h = tables(tmp_path)
    shares = [share_of(tmp_path / place, ["id", "w"], "id", rank, size) for rank in range(size)]
    whole = pd.concat([table for table, _ in shares], ignore_index=True)
    pd.testing.assert_frame_equal(whole, h[["id", "w"]])
    assert [first for _, first in shares] == np.cumsum([0, *(len(t) for t, _ in shares)])[:-1].tolist()
    assert min(len(t) for t, _ in shares) > 0


def test_fewer_parts_than_processes_and_other_files(tmp_path):
    tables(tmp_path)
    with pytest.raises(InputError, match="has 3 row groups for 4 processes"):
        share_of(tmp_path / "H", ["id"], "id", 0, 4)
    with pytest.raises(InputError, match="read a Parquet file or a folder"):
        share_of(tmp_path / "T.csv", ["id"], "id", 0, 2)


def started(tmp_path, *given, processes=2):
    how = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *(how if processes > 1 else []), str(ROOT / "calibrate.py"), "problem=households",
         "problem.targets=T.csv", "problem.weight=w", "problem.id=id", *given],
        cwd=tmp_path, capture_output=True, text=True, timeout=300, env=environment, check=False,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("place", ["H.parquet", "H"])
def test_two_processes_write_the_weights_of_one(tmp_path, place):
    tables(tmp_path)
    more = ("method=calibrate", "distance=raking", "bounds=[0.2,5]")
    done = started(tmp_path, f"problem.households={place}", *more)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("results: ") == 1
    folder = tmp_path / done.stdout.rsplit("results: ")[1].strip()
    parts = sorted((folder.parent / "weights").iterdir())
    assert [p.name for p in parts] == ["part-00000.parquet", "part-00001.parquet"]
    ours = pd.concat([pd.read_parquet(p) for p in parts], ignore_index=True)
    alone = started(tmp_path, "problem.households=H.parquet", *more, "plots=false", processes=1)
    assert alone.returncode == 0, alone.stderr
    theirs_folder = (tmp_path / alone.stdout.rsplit("results: ")[1].strip()).parent
    theirs = pd.read_csv(theirs_folder / "weights.csv")
    assert ours.id.tolist() == theirs.id.tolist()
    np.testing.assert_allclose(ours.weight, theirs.weight, rtol=1e-9)
    targets = [pd.read_csv(f / "targets.csv").set_index("name") for f in (folder.parent, theirs_folder)]
    for column in ("target", "initial", "estimate", "scale", "multiplier"):
        np.testing.assert_allclose(targets[0][column], targets[1][column], rtol=1e-6)
    told, alone_told = (json.loads((f / "results.json").read_text()) for f in (folder.parent, theirs_folder))
    for key in ("households", "kept", "targets", "ess", "max_weight", "bounds_hit", "total_weight"):
        assert told[key] == pytest.approx(alone_told[key], rel=1e-6), key


def weights_of(tmp_path, done):
    """The weights that a run wrote, in one file or in parts, and its folder."""
    assert done.returncode == 0, done.stderr
    folder = (tmp_path / done.stdout.rsplit("results: ")[1].strip()).parent
    parts = sorted((folder / "weights").iterdir()) if (folder / "weights").is_dir() else []
    read = [pd.read_parquet(p) if p.suffix == ".parquet" else pd.read_csv(p) for p in parts]
    return (pd.concat(read, ignore_index=True) if read else pd.read_csv(folder / "weights.csv")), folder


def with_persons(tmp_path):
    """Households in the order of states, persons in any order; totals, ratios, and both of persons."""
    rng = np.random.default_rng(3)
    h = tables(tmp_path).assign(low=rng.uniform(0.2, 0.5, 900), tenant=rng.integers(0, 2, 900))
    h.to_parquet(tmp_path / "H.parquet", row_group_size=150)
    p = h.loc[h.index.repeat(rng.integers(1, 5, 900)), ["id"]].assign(
        years=lambda p: rng.integers(0, 95, len(p)), wage=lambda p: rng.lognormal(7, 1, len(p)).round()
    )
    p = p.sample(frac=1, random_state=0)
    p.to_csv(tmp_path / "P.csv", index=False)
    both = p.merge(h, on="id")
    w, wy = both.w, both.state == "WY"
    rows = [
        ("all", "", "", "", "", "", 1.01 * h.w.sum()),
        ("persons", "", "", "person", "", "", 1.02 * w.sum()),
        ("wages in WY", "wage", "state == 'WY'", "person", "", "", 0.98 * (w * both.wage)[wy].sum()),
        ("income of tenants", "income", "tenant == 1", "", "income", "",
         1.03 * (h.w * h.income * h.tenant).sum() / (h.w * h.income).sum()),
        ("old in WY", "", "years >= 65 and state == 'WY'", "person", "1", "state == 'WY'",
         0.97 * w[wy & (both.years >= 65)].sum() / w[wy].sum()),
    ]  # fmt: skip
    columns = ["name", "measure", "where", "unit", "of", "of_where", "value"]
    pd.DataFrame(rows, columns=columns).to_csv(tmp_path / "T.csv", index=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        ("method=calibrate", "distance=raking", "bounds=[low,3]", "unit_factor=1/size"),
        ("method=all",),
        ("lambda_l0=0.0003", "epochs=100"),
    ],
)
def test_persons_and_ratios_in_two_processes_weigh_as_in_one(tmp_path, more):
    with_persons(tmp_path)
    given = ("problem.households=H.parquet", "problem.persons=P.csv", *more)
    (ours, folder), (theirs, other) = (
        weights_of(tmp_path, started(tmp_path, *given, *more, processes=n))
        for n, more in ((2, ()), (1, ("plots=false",)))
    )
    ours, theirs = (table[table.weight > 0].reset_index(drop=True) for table in (ours, theirs))
    assert ours.id.tolist() == theirs.id.tolist()
    np.testing.assert_allclose(ours.weight, theirs.weight, rtol=1e-9, atol=1e-9 * theirs.weight.max())
    targets = [pd.read_csv(f / "targets.csv").set_index("name") for f in (folder, other)]
    for column in ("target", "initial", "estimate", "scale"):
        np.testing.assert_allclose(targets[0][column], targets[1][column], rtol=1e-9)


@pytest.mark.slow
def test_somebody_in_no_household_of_any_process_is_refused(tmp_path):
    with_persons(tmp_path)
    with (tmp_path / "P.csv").open("a") as file:
        file.write("stranger,30,0\n")
    done = started(tmp_path, "problem.households=H.parquet", "problem.persons=P.csv", "method=calibrate")
    assert done.returncode != 0
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("error:"))
    assert re.search(r"P.csv: 1 of 2,\d+ persons are in no household of H.parquet", line)


@pytest.mark.slow
@pytest.mark.parametrize("hard", [False, True])
def test_the_same_targets_give_way_in_two_processes(tmp_path, hard):
    tables(tmp_path)
    t = pd.read_csv(tmp_path / "T.csv")
    t.loc[t.name == "income2", "value"] *= 40
    if hard:
        t["hard"] = True
    t.to_csv(tmp_path / "T.csv", index=False)
    given = ("problem.households=H.parquet", "method=calibrate", "bounds=[0.5,2]")
    two = started(tmp_path, *given)
    one = started(tmp_path, *given, "plots=false", processes=1)
    if hard:
        said = [next(e for e in r.stderr.splitlines() if e.startswith("error:")) for r in (two, one)]
        assert "hard targets contradict each other, 'income2' for one" in said[0]
        assert said[0].split("they stay")[0] == said[1].split("they stay")[0]
        return
    (ours, folder), (theirs, other) = weights_of(tmp_path, two), weights_of(tmp_path, one)
    np.testing.assert_allclose(ours.weight, theirs.weight, rtol=1e-9)
    told = [json.loads((f / "results.json").read_text()) for f in (folder, other)]
    assert told[0]["gave_way"] == told[1]["gave_way"] == 1


def with_areas(tmp_path):
    """Areas of three states, and who may stand for them: everybody, or whom a crosswalk names."""
    rng = np.random.default_rng(4)
    h, areas = tables(tmp_path), [f"Bezirk {c}" for c in "ÄÖÜßéñ漢"]
    share = rng.dirichlet(np.full(7, 4.0))
    pd.DataFrame({"area": areas, "share": share}).to_csv(tmp_path / "X.csv", index=False)
    chosen = [rng.choice(7, 3, replace=False) for _ in range(900)]
    pd.DataFrame({
        "id": h.id.repeat(3), "area": np.array(areas)[np.concatenate(chosen)], "share": 1 / 3,
    }).to_csv(tmp_path / "Y.csv", index=False)  # fmt: skip
    parents = [f"Land {k % 2}" for k in range(7)]
    pd.DataFrame({"area": areas, "parent": parents}).to_csv(tmp_path / "G.csv", index=False)
    sums = {"": h.w.sum(), "income": (h.w * h.income).sum()}
    rows = [
        (f"{a}/{m}", a, m, s * sums[m] * rng.normal(1, 0.03)) for a, s in zip(areas, share, strict=True)
        for m in sums
    ]  # fmt: skip
    rows += [(f"{g}/n", g, "", share[k::2].sum() * sums[""]) for k, g in enumerate(("Land 0", "Land 1"))]
    rows.append(("nation", "", "income", 1.01 * sums["income"]))
    table = pd.DataFrame(rows, columns=["name", "area", "measure", "value"])
    table.to_csv(tmp_path / "T.csv", index=False)


@pytest.mark.slow
@pytest.mark.parametrize("who", ["X.csv", "Y.csv"])
@pytest.mark.parametrize("mode", ["independent", "joint"])
def test_areas_shared_out_to_two_processes_weigh_as_in_one(tmp_path, who, mode):
    with_areas(tmp_path)
    given = ("problem.households=H.parquet", "method=calibrate", f"area.crosswalk={who}", "area.files=true")
    given = (*given, f"area.mode={mode}", "area.groups=G.csv", "bounds=[0.2,5]")
    ours, folder = weights_of(tmp_path, started(tmp_path, *given))
    theirs, other = weights_of(tmp_path, started(tmp_path, *given, processes=1))
    assert ours[["area", "id"]].equals(theirs[["area", "id"]])
    np.testing.assert_allclose(ours.weight, theirs.weight, rtol=1e-9, atol=1e-9 * theirs.weight.max())
    for name in ("targets", "areas", "levels", "nation", "exhaustion"):
        tables = [pd.read_csv(f / f"{name}.csv") for f in (folder, other)]
        pd.testing.assert_frame_equal(*tables, rtol=1e-7, atol=1e-7)
    files = [sorted(p.name for p in (f / "areas").iterdir()) for f in (folder, other)]
    assert files[0] == files[1]
    assert len(files[0]) == 7


@pytest.mark.slow
def test_gates_in_two_processes_keep_whom_one_process_keeps(tmp_path):
    tables(tmp_path)
    more = ("lambda_l0=0.0003", "epochs=150", "seed=2", "problem.households=H.parquet")
    tables_of = []
    for processes in (2, 1):
        done = started(tmp_path, *more, *(("plots=false",) if processes == 1 else ()), processes=processes)
        assert done.returncode == 0, done.stderr
        folder = (tmp_path / done.stdout.rsplit("results: ")[1].strip()).parent
        told = json.loads((folder / "results.json").read_text())
        parts = sorted((folder / "weights").iterdir()) if processes > 1 else []
        long = (
            pd.concat([pd.read_parquet(p) for p in parts]) if parts else pd.read_csv(folder / "weights.csv")
        )
        tables_of.append(long[long.weight > 0].reset_index(drop=True))
        assert told["method"] == "hard_concrete"
        assert told["kept"] == len(tables_of[-1])
    ours, theirs = tables_of
    assert 20 < len(ours) < 850
    assert ours.id.tolist() == theirs.id.tolist()
    np.testing.assert_allclose(ours.weight, theirs.weight, rtol=1e-9, atol=1e-9 * theirs.weight.max())


def children(pid):
    found = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True, check=False
    )
    return [int(line) for line in found.stdout.split()]


def is_alive(pid):
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def launched(tmp_path, *given):
    """Two processes of torchrun's that know of each other, and their launcher."""
    how = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(ROOT / "calibrate.py")]
    given = ("problem=households", "problem.targets=T.csv", "problem.households=H.parquet", *given)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with (tmp_path / "err").open("w") as err:
        launcher = subprocess.Popen(
            [sys.executable, *how, *given], cwd=tmp_path, env=environment, stdout=err, stderr=err
        )
    while "All distributed processes registered" not in (tmp_path / "err").read_text():
        assert launcher.poll() is None, (tmp_path / "err").read_text()
        time.sleep(0.1)
    return launcher, children(launcher.pid)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="prctl is Linux's")
def test_processes_end_with_a_torchrun_that_is_killed(tmp_path):
    tables(tmp_path)
    launcher, below = launched(tmp_path, "epochs=1000000", "lambda_l0=0.0003")
    launcher.kill()
    launcher.wait()
    deadline = time.monotonic() + 60
    while any(map(is_alive, below)):
        assert time.monotonic() < deadline, "processes outlive their launcher"
        time.sleep(0.1)
    assert len(below) == 2


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="kill -9")
def test_gates_of_which_one_process_is_killed_begin_anew_with_the_same_bits(tmp_path):
    tables(tmp_path)
    given = ("lambda_l0=0.0003", "seed=5")
    launcher, below = launched(tmp_path, "epochs=1000000", *given)
    time.sleep(5.0)  # epochs go by, and sums are under way
    os.kill(below[1], signal.SIGKILL)
    assert launcher.wait(timeout=120) != 0
    assert not any(map(is_alive, below))
    assert not list(tmp_path.glob("outputs/calibrate/*/weights*"))
    both = []
    for _ in range(2):
        done = started(tmp_path, "problem.households=H.parquet", "epochs=150", *given)
        table, folder = weights_of(tmp_path, done)
        both.append((table, pd.read_csv(folder / "targets.csv")))
    for one, other in zip(*both, strict=True):
        pd.testing.assert_frame_equal(one, other, check_exact=True)
    assert 20 < (both[0][0].weight > 0).sum() < 850


@pytest.mark.slow
def test_more_targets_than_are_factored_are_met_in_two_processes_as_in_one(tmp_path):
    rng = np.random.default_rng(8)
    n, areas = 21_000, 700
    h = pd.DataFrame({
        "id": np.arange(n), "w": rng.lognormal(3, 0.3, n), "area": np.repeat(np.arange(areas), n // areas),
        "income": rng.lognormal(10, 1, n).round(), "age": rng.integers(18, 90, n),
        "rooms": rng.integers(1, 9, n),
    })  # fmt: skip
    h.to_parquet(tmp_path / "H.parquet", row_group_size=3000)
    true = h.w * rng.lognormal(0, 0.15, n)
    ages, rows = {"young": "age < 40", "old": "age >= 65", "": "age >= 0"}, []
    for measure in ("", "income", "rooms"):
        size = true * (h[measure] if measure else 1.0)
        for name, condition in ages.items():
            sums = size.where(h.eval(condition), 0.0).groupby(h.area).sum()
            rows += [
                (f"{measure} {name} {a}", measure, f"area == {a} and {condition}", v) for a, v in sums.items()
            ]
    table = pd.DataFrame(rows, columns=["name", "measure", "where", "value"])
    table[table.value > 0].to_csv(tmp_path / "T.csv", index=False)
    given = ("problem.households=H.parquet", "method=calibrate", "distance=raking")
    ours, folder = weights_of(tmp_path, started(tmp_path, *given))
    theirs, _ = weights_of(tmp_path, started(tmp_path, *given, "plots=false", processes=1))
    told = json.loads((folder / "results.json").read_text())
    assert told["targets"] > 5_000
    assert told["max_are"] < 1e-8
    np.testing.assert_allclose(ours.weight, theirs.weight, rtol=1e-6)


@pytest.mark.slow
def test_two_processes_keep_the_number_that_is_wanted(tmp_path):
    h = tables(tmp_path)
    done = started(tmp_path, "num_households=80", "problem.households=H.parquet")
    assert done.returncode == 0, done.stderr
    folder = (tmp_path / done.stdout.rsplit("results: ")[1].strip()).parent
    told = json.loads((folder / "results.json").read_text())
    weights = pd.concat([pd.read_parquet(p) for p in sorted((folder / "weights").iterdir())])
    kept = weights[weights.weight > 0]
    assert told["kept"] == len(kept) == 80
    assert told["method"] == "pruning"
    assert told["mean_are"] < 0.01
    assert kept.weight.sum() == pytest.approx(told["total_weight"])
    assert set(kept.id) <= set(h.id)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("method=calibrate", "targets.year=2031"), "has no column value_2031"),
        (
            ("num_households=5", "method=pps"),
            "several processes need problem=households and method=calibrate",
        ),
        (("num_households=5", "lambda_l0=1", "method=hard_concrete"), "num_households with method=hard_c"),
        (("method=calibrate", "normalize_groups=true"), "normalize_groups is not known with several"),
    ],
)
def test_wrong_input_is_one_line_of_one_process(tmp_path, given, message):
    tables(tmp_path)
    done = started(tmp_path, "problem.households=H.parquet", *given)
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    assert message in lines[0]
    assert not (tmp_path / "outputs").exists()


def settings(*given):
    households = ("problem=households", "problem.households=H.parquet", "problem.targets=T.csv")
    with hydra.initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        composed = hydra.compose("calibrate", [*households, "method=calibrate", *given])
    return settings_of(CalibrationRun, composed)


def test_what_several_processes_know_is_taken():
    _check(settings("distance=raking", "bounds=[0.2,5]", "targets.year=2026", "require.max_error=0.1"))


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("normalize_groups=true", "normalize_groups"),
        ("+group_multipliers.a=2", "group_multipliers"),
        ("untouchable=drop", "untouchable"),
        ("holdout.folds=2", "holdout.folds"),
        ("report.variables=[w]", "report.variables"),
        ("weights_format=dta", "weights_format=dta"),
        ("targets.year=[2025,2026]", "a list of years"),
    ],
)
def test_what_several_processes_would_leave_out_is_refused(given, name):
    with pytest.raises(InputError, match=f"^{re.escape(name)}.* not known with several processes"):
        _check(settings(given))
