"""calibrate.py started by torchrun: each process its part of a Parquet file."""

import json
import os
import re
import subprocess
import sys
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
        ("area.column=region", "areas"),
    ],
)
def test_what_several_processes_would_leave_out_is_refused(given, name):
    with pytest.raises(InputError, match=f"^{re.escape(name)}.* not known with several processes"):
        _check(settings(given))
