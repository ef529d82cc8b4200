import json
import subprocess
import sys
from pathlib import Path

import pytest

from sparsereg.commands.calibrate import spelt_out

SCRIPT = Path(__file__).parents[3] / "calibrate.py"


def script(folder, *arguments):
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], cwd=folder, capture_output=True, text=True, timeout=300
    )
    return done.returncode, done.stdout.splitlines(), done.stderr.splitlines()


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("temperature=0.5", "temperature.initial=0.5"),
        ("temperature=.5,.7", "temperature.initial=.5,.7"),
        ("temperature=-1", "temperature.initial=-1"),
        ("temperature=exponential", "temperature=exponential"),
        ("temperature.final=0.1", "temperature.final=0.1"),
        ("lr=0.5", "lr=0.5"),
    ],
)
def test_a_number_as_temperature_is_spelt_out(given, meant):
    assert spelt_out(given) == meant


@pytest.mark.costly
@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["num_housholds=3"], "error: unknown key 'num_housholds': did you mean 'num_households'?"),
        (["problem=matrx"], "error: unknown choice problem=matrx: did you mean 'matrix'?"),
        (["num_households=30000"], "error: num_households=30000: there are only 20,000 households"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(tmp_path, arguments, line):
    code, out, err = script(tmp_path, *arguments)
    assert (code, out) == (2, [])
    assert len(err) == 1
    assert err[0].startswith(line)
    assert not list(tmp_path.glob("outputs/calibrate/version_*"))


@pytest.mark.slow
def test_a_run_ends_with_the_path_of_its_results(tmp_path):
    code, out, err = script(
        tmp_path, "problem.households=400", "problem.targets=80", "num_households=80", "temperature=0.5"
    )
    assert code == 0, err
    assert out[-1] == "results: outputs/calibrate/version_0/results.json"
    results = json.loads((tmp_path / "outputs/calibrate/version_0/results.json").read_text())
    assert results["kept"] == 80


@pytest.mark.slow
def test_a_sweep_ends_with_a_table_and_a_plot(tmp_path):
    small = [
        "problem.households=400",
        "problem.targets=80",
        "plots=false",
        "tensorboard=false",
        "holdout.groups=null",
    ]
    code, out, err = script(tmp_path, "-m", "num_households=20,40,500", *small)
    assert code == 2  # 500 of 400 cannot be kept; the others are done
    folder = next(tmp_path.glob("outputs/calibrate/multirun/*"))
    table = (folder / "sweep.csv").read_text().splitlines()
    assert len(table) == 4
    assert (folder / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert any("there are only 400 households" in line for line in err)
    code, out, err = script(tmp_path, "-m", "num_households=20,40", *small)
    assert code == 0
    assert sum("finished before" in line for line in out) == 2


def test_a_method_that_keeps_everybody_takes_no_number():
    from sparsereg.commands.calibrate import choices

    assert choices(["method=calibrate"]) == ["num_households=null"]
    assert choices(["method=all", "seed=1"]) == ["num_households=null"]
    assert choices(["method=pruning"]) == []
