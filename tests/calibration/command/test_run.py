import copy
import json
import re
from dataclasses import replace
from pathlib import Path

import hydra
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from omegaconf import OmegaConf

from sparsereg.archives import load_torch, save_torch
from sparsereg.calibration.config import CalibrationRun
from sparsereg.calibration.reading.synthetic import synthetic_problem
from sparsereg.calibration.reporting.recorder import Recorder
from sparsereg.calibration.solver.calibration import Calibration, Settings
from sparsereg.calibration.solver.selection import NAMES
from sparsereg.cli import settings_of
from sparsereg.commands import calibrate as script
from sparsereg.errors import InputError
from sparsereg.settings import plain
from sparsereg.temperature import Temperature

CONFIGS = Path(__file__).parents[3] / "configs"
SMALL = (
    "problem.households=300",
    "problem.targets=60",
    "num_households=60",
    "plots=false",
    "tensorboard=false",
)


def exactly(file: Path) -> pd.DataFrame:
    """Read a table to the last bit, which pandas 2 does only when it is told to."""
    how = {"float_precision": "round_trip"} if pd.__version__.startswith("2.") else {}
    return pd.read_csv(file, **how)


def config(*overrides):
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return hydra.compose("calibrate", overrides=list(overrides))


def run(*overrides):
    path = script.run(config(*overrides))
    return path.parent, json.loads(path.read_text())


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def tables(n=120):
    rng = np.random.default_rng(0)
    households = pd.DataFrame(
        {
            "id": [f"h{i}" for i in range(n)],
            "w": rng.random(n) + 1,
            "area": rng.choice(["A", "B"], n),
            "x": rng.random(n),
        }
    )
    where = ["", "area == 'A'", "area == 'B'", "x > 0.5"]
    targets = pd.DataFrame({"name": ["all", "a", "b", "big"], "value": [180.0, 90, 90, 95], "where": where})
    households.to_csv("H.csv", index=False)
    targets.assign(group=["t", "area", "area", "t"]).to_csv("T.csv", index=False)
    return (
        "problem=households", "problem.households=H.csv", "problem.targets=T.csv", "problem.weight=w",
        "problem.id=id",
        "num_households=20", "plots=false", "tensorboard=false",
    )  # fmt: skip


def test_the_configuration_has_the_defaults_of_the_library():
    composed = OmegaConf.to_container(config(), resolve=True)
    assert composed == plain(CalibrationRun())
    beta = Temperature(initial=Settings().temperature, anneal_epochs=1000)
    assert CalibrationRun().solver() == replace(Settings(), device="auto", temperature=beta)


def test_a_run_writes_everything_and_overwrites_nothing():
    folder, results = run(*[s for s in SMALL if "false" not in s])
    assert folder == Path("outputs/calibrate/version_0")
    names = {p.name for p in folder.iterdir()}
    assert names >= {
        "weights.csv", "targets.csv", "groups.csv", "calibration_log.csv", "results.json", "holdout.csv",
        "config.yaml", "plots",
    }  # fmt: skip
    assert any(n.startswith("events.out.tfevents") for n in names)
    assert "checkpoint.pt" not in names
    assert {p.name for p in (folder / "plots").iterdir()} == {
        "errors.png", "targets.png", "weights.png", "progress.png",
    }  # fmt: skip
    assert set(results) >= {
        "households", "kept", "targets", "loss", "mean_are", "median_are", "max_are", "within_10pct", "ess",
        "max_weight", "seconds",
    }  # fmt: skip
    again, _ = run(*SMALL)
    assert again.name == "version_1"


@pytest.mark.costly
def test_the_files_agree_with_each_other_in_float64():
    folder, results = run(*SMALL)
    weights, targets = exactly(folder / "weights.csv"), exactly(folder / "targets.csv")
    problem = synthetic_problem(300, 60)
    full = pd.Series(0.0, index=problem.household_ids)
    full[weights.id] = weights.weight.to_numpy()
    assert results["kept"] == len(weights) == 60
    assert (weights.weight > 0).all()
    np.testing.assert_array_equal(problem.estimates(full.to_numpy()), targets.estimate)
    errors = (targets.estimate - targets.target).abs() / targets.target.abs()
    np.testing.assert_allclose(errors, targets.relative_error.abs(), rtol=1e-12, atol=1e-15)
    assert results["mean_are"] == pytest.approx(errors.mean())
    assert results["max_are"] == pytest.approx(errors.max())
    assert results["ess"] == pytest.approx(weights.weight.sum() ** 2 / (weights.weight**2).sum())
    log = pd.read_csv(folder / "calibration_log.csv")
    last = log[log.epoch == log.epoch.max()]
    np.testing.assert_allclose(last.estimate, targets.estimate)
    assert log.epoch.nunique() > 5


@pytest.mark.parametrize("method", NAMES)
def test_every_method_runs_from_the_command_line_and_is_in_the_help(method):
    everybody = method in ("all", "calibrate")
    number = "null" if everybody else "60"
    _, results = run(
        *SMALL, f"method={method}", f"num_households={number}", "epochs=30", "holdout.groups=null"
    )
    assert results["kept"] > 60 if everybody else results["kept"] == 60
    shown = OmegaConf.to_container(OmegaConf.load(CONFIGS / "calibrate.yaml"))["hydra"]["help"]["template"]
    assert re.search(rf"\b{method}\b", shown.partition("Main keys")[2])


def test_same_seed_same_weights_and_households_from_tables_like_from_the_generator():
    first, _ = run(*SMALL, "problem.tables=survey")
    second, _ = run(
        "problem=households", "problem.households=survey/households.csv",
        "problem.targets=survey/targets.csv",
        "problem.weight=weight", "problem.id=household_id", *SMALL[2:], "weights_format=parquet",
    )  # fmt: skip
    a, b = exactly(first / "weights.csv"), pd.read_parquet(second / "weights.parquet")
    assert a.id.tolist() == b.id.tolist()
    np.testing.assert_array_equal(a.weight, b.weight)
    with pytest.raises(InputError, match="households.csv is there already"):
        run(*SMALL, "problem.tables=survey")


def test_a_matrix_with_weights():
    matrix = np.random.default_rng(0).random((4, 30))
    sp.save_npz("M.npz", sp.csr_array(matrix))
    pd.DataFrame({"name": list("abcd"), "value": matrix.sum(1) * 1.1}).to_csv("T.csv", index=False)
    pd.DataFrame({"id": range(100, 130), "weight": np.ones(30)}).to_csv("W.csv", index=False)
    folder, results = run(
        "problem=matrix", "problem.matrix=M.npz", "problem.targets=T.csv", "problem.weights=W.csv",
        "num_households=10",
        "plots=false", "tensorboard=false",
    )  # fmt: skip
    weights = pd.read_csv(folder / "weights.csv")
    assert results["kept"] == 10
    assert weights.id.between(100, 129).all()
    np.testing.assert_allclose(matrix[:, weights.id - 100] @ weights.weight, matrix.sum(1) * 1.1, rtol=1e-3)


@pytest.mark.costly
def test_bounds_and_total_are_kept():
    _, results = run(*SMALL, "max_weight_ratio=12", "hold_total=true")
    assert results["max_ratio"] <= 12 * (1 + 1e-9)
    assert results["total_weight"] == pytest.approx(results["initial_total_weight"], rel=1e-9)


@pytest.mark.costly
@pytest.mark.parametrize("method", ["pruning", "hard_concrete", "hybrid", "random", "pps"])
def test_every_method_keeps_exactly_the_number(method):
    _, results = run(*SMALL, f"method={method}", "epochs=60", "holdout.groups=null")
    assert (results["kept"], results["method"]) == (60, method)


@pytest.mark.costly
def test_without_a_number_lambda_decides_and_all_keeps_all():
    _, some = run(*SMALL, "num_households=null", "lambda_l0=0.1", "epochs=200", "holdout.groups=null")
    assert 0 < some["kept"] < 300
    assert some["method"] == "hard_concrete"
    _, everyone = run(*SMALL, "num_households=null", "holdout.groups=null")
    assert (everyone["method"], everyone["kept"]) == ("all", 300)
    assert everyone["missing_households"] == everyone["zero_initial_weights"] == 0
    assert everyone["mean_are"] < some["mean_are"]
    with pytest.raises(InputError, match="shut every household"):
        run(*SMALL, "num_households=null", "lambda_l0=1e6", "epochs=300", "holdout.groups=null")


@pytest.mark.costly
def test_hold_outs():
    folder, results = run(*SMALL, "holdout.folds=3")
    table = pd.read_csv(folder / "holdout.csv")
    assert table.fold.nunique() == results["holdout"]["folds"] == 3
    assert table.targets.sum() == results["holdout"]["targets"] == 60
    assert results["holdout"]["mean_are"] > results["mean_are"]
    _, results = run(*SMALL, "holdout.groups=[age]")
    assert results["holdout"]["groups"] == ["age"]
    _, results = run(*SMALL, "holdout.groups=null")
    assert results["holdout"] is None
    with pytest.raises(InputError, match="contradict each other"):
        run(*SMALL, "holdout.groups=[age]", "holdout.folds=3")


@pytest.mark.costly
def test_multipliers_of_groups_that_are_left_out_do_not_matter():
    run(*SMALL, "+group_multipliers.age=3", "holdout.groups=[age]")
    with pytest.raises(InputError, match="group_multipliers key 'agee' not found"):
        run(*SMALL, "+group_multipliers.agee=3")


def interrupted(after, overrides, monkeypatch):
    """Interrupt a run after so many reports, as Ctrl-C would."""
    record = Recorder.record

    def interrupting(self, epoch, *rest):
        record(self, epoch, *rest)
        if len(self.history) == after:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Recorder, "record", interrupting)
        with pytest.raises(KeyboardInterrupt):
            run(*overrides)


@pytest.mark.parametrize("method", ["pruning", "hard_concrete"])
def test_an_interrupted_run_ends_where_it_would_have_ended(method, monkeypatch):
    overrides = (*SMALL, f"method={method}", "epochs=100", "holdout.groups=null")
    whole, _ = run(*overrides)
    interrupted(5, overrides, monkeypatch)
    cut = Path("outputs/calibrate/version_1")
    assert (cut / "checkpoint.pt").is_file()
    assert not (cut / "weights.csv").exists()
    resumed, _ = run(*overrides, f"ckpt_path={cut}/checkpoint.pt")
    assert resumed.name == "version_2"
    one, two = (pd.read_csv(f / "weights.csv") for f in (whole, resumed))
    pd.testing.assert_frame_equal(one, two)
    logs = [pd.read_csv(f / "calibration_log.csv") for f in (whole, resumed)]
    pd.testing.assert_frame_equal(*logs)
    with pytest.raises(InputError, match="of another problem or of other settings"):
        run(*overrides, "lr=0.1", f"ckpt_path={cut}/checkpoint.pt")
    with pytest.raises(InputError, match="cannot be read as a checkpoint of calibrate.py"):
        run(*overrides, f"ckpt_path={whole}/weights.csv")
    with pytest.raises(InputError, match="does not exist"):
        run(*overrides, f"ckpt_path={whole}/checkpoint.pt")


@pytest.mark.costly
@pytest.mark.parametrize("method", ["pruning", "hard_concrete"])
def test_a_checkpoint_that_holds_something_else_is_refused(method, monkeypatch):
    overrides = (*SMALL, f"method={method}", "epochs=100", "holdout.groups=null")
    interrupted(5, overrides, monkeypatch)
    path = Path("outputs/calibrate/version_0/checkpoint.pt")
    good = load_torch(path)

    def changed(*keys, value):
        content = copy.deepcopy(good)
        place = content
        for key in keys[:-1]:
            place = place[key]
        if value is None:
            del place[keys[-1]]
        else:
            place[keys[-1]] = value
        return content

    inner = ("calibration", "selection") if method == "pruning" else ("calibration", "selection", "solver")
    tensor = "kept" if method == "pruning" else "often"
    evil = [
        changed("calibration", "selection", "done", value=None),
        changed("calibration", "selection", "done", value="yes"),
        changed(*inner, "epoch", value=-1),
        changed(*inner, "epoch", value=2**70),
        changed(*inner, "epoch", value=float("inf")),
        changed(*inner, tensor, value=torch.tensor([0, 10**6])),
        changed(*inner, tensor, value=[1, 2]),
        changed("calibration", "history", value=[5]),
        changed("calibration", "method", value=7),
        changed("moments", value=[(0, 1.0, torch.zeros(3))]),
        changed("moments", value=[(0, 1.0)]),
    ]
    for content in evil:
        save_torch(path, content)
        with pytest.raises(InputError, match=r"ckpt_path=.* is no checkpoint that can be continued"):
            run(*overrides, f"ckpt_path={path}")


@pytest.mark.costly
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["num_households=301"], "num_households=301: there are only 300 households"),
        (["num_households=0"], "num_households=0: expected an integer >= 1"),
        (["num_households=2.5"], "num_households=2.5"),
        (["method=prunning"], "did you mean 'pruning'"),
        (["loss=relativ"], "did you mean 'relative'"),
        (["num_households=null", "method=pruning"], "needs num_households"),
        (["method=all"], "leave num_households out"),
        (["num_households=null", "lambda_l0=0"], "nothing decides how many"),
        (["max_weight_ratio=0"], "max_weight_ratio=0: expected a number > 0"),
        (["max_weight_ratio=2", "refit=false"], "max_weight_ratio is kept by the refit"),
        (["max_weight_ratio=2", "hold_total=true"], "lets the 60 kept households weigh"),
        (["epochs=0"], "epochs=0: expected"),
        (["lr=nan"], "lr=nan: expected"),
        (["device=cuda:99"], "this machine has"),
        (["device=gpu"], "expected one of auto, cpu, cuda"),
        (["problem.targets=3000"], "targets must be at most"),
        (["problem.kind=matrx"], "did you mean 'matrix'"),
        (["holdout.groups=[nothing]"], "no target has the group 'nothing'"),
        (["problem=matrix"], "problem=matrix needs problem.matrix=FILE"),
    ],
)
def test_wrong_settings_are_named_and_nothing_is_written(overrides, message):
    with pytest.raises(InputError, match=message):
        run(*SMALL, *overrides) if "problem=matrix" not in overrides else run(*overrides)
    assert not list(Path().glob("outputs/**/weights.csv"))


@pytest.mark.costly
def test_targets_that_nobody_touches(caplog):
    overrides = tables()
    targets = pd.read_csv("T.csv", keep_default_na=False)
    targets.loc[1, "where"] = "area == 'C'"
    targets.to_csv("T.csv", index=False)
    with pytest.raises(
        InputError, match=r"no household touches 1 of 4 targets: a \(no household has area == 'C'"
    ):
        run(*overrides)
    folder, results = run(*overrides, "untouchable=drop")
    assert results["dropped_targets"] == 1
    assert pd.read_csv(folder / "targets.csv").name.tolist() == ["all", "b", "big"]
    folder, results = run(*overrides, "untouchable=keep")
    assert results["findings"]["untouchable"] == 1
    assert pd.read_csv(folder / "findings.csv").name[0] == "a"
    targets.loc[1, "value"] = 0  # nothing is to be reached, and nothing is reached
    targets.to_csv("T.csv", index=False)
    _, results = run(*overrides)
    assert results["zero_targets"] == 1


@pytest.mark.costly
@pytest.mark.parametrize("loss", ["relative", "mse", "mape", "capped"])
@pytest.mark.parametrize("value", [0, -50])
def test_targets_of_zero_and_below_never_give_nan(loss, value):
    overrides = tables()
    targets = pd.read_csv("T.csv", keep_default_na=False)
    targets.loc[3, "value"] = value
    targets.to_csv("T.csv", index=False)
    folder, results = run(*overrides, f"loss={loss}", "holdout.groups=null")
    assert np.isfinite([results[k] for k in ("loss", "mean_are", "median_are", "max_are", "ess")]).all()
    assert np.isfinite(pd.read_csv(folder / "weights.csv").weight).all()


@pytest.mark.parametrize(
    ("rows", "weights", "message"),
    [
        (5, 30, "M.npz has 4 rows .* but T.csv has 5 targets"),
        (30, 30, "is it transposed"),
        (4, 29, "W.csv has 29 weights, but M.npz has 30 columns"),
    ],
)
def test_lengths_that_do_not_fit(rows, weights, message):
    sp.save_npz("M.npz", sp.csr_array(np.ones((4, 30))))
    pd.DataFrame({"name": range(rows), "value": 1.0}).to_csv("T.csv", index=False)
    pd.DataFrame({"weight": np.ones(weights)}).to_csv("W.csv", index=False)
    with pytest.raises(InputError, match=message):
        run("problem=matrix", "problem.matrix=M.npz", "problem.targets=T.csv", "problem.weights=W.csv")


def test_a_temperature_schedule_reaches_the_gates():
    given = ("temperature=exponential", "temperature.final=0.1", "temperature.anneal_epochs=50")
    made = settings_of(CalibrationRun, config(*given)).solver()
    assert made.temperature_at(0) == pytest.approx(0.65)
    assert made.temperature_at(50) == pytest.approx(0.1)
    assert settings_of(CalibrationRun, config()).solver().temperature_at(500) == 0.65


def test_state_of_another_method_is_refused():
    problem = synthetic_problem(200, 30)
    state = Calibration(problem, 20, Settings(method="hard_concrete")).state_dict()
    with pytest.raises(ValueError, match="the state is of method='hard_concrete'"):
        Calibration(problem, 20, Settings(method="pruning")).load_state_dict(state)


def exact_survey(targets, **columns):
    """A survey of 200 persons in two regions, written as files."""
    rng = np.random.default_rng(0)
    households = pd.DataFrame({
        "id": [f"h{i}" for i in range(200)], "w": rng.uniform(5, 15, 200), "area": np.arange(200) % 2,
        "income": rng.lognormal(size=200), "size": rng.integers(1, 6, 200), "low": 0.5, "high": 2.0,
    })  # fmt: skip
    households.assign(**columns).to_csv("H.csv", index=False)
    pd.DataFrame(targets).to_csv("T.csv", index=False)
    return (
        "problem=households", "problem.households=H.csv", "problem.targets=T.csv", "problem.weight=w",
        "problem.id=id", "method=calibrate", "num_households=null", "plots=false", "tensorboard=false",
    )  # fmt: skip


EXACT = {
    "name": ["all", "a", "income", "mean"],
    "value": [2100.0, 1000.0, 3500.0, 2.0],
    "measure": ["", "", "income", "size"],
    "where": ["", "area == 0", "", "area == 1"],
    "of": ["", "", "", "1"],
    "of_where": ["", "", "", "area == 1"],
}


def test_an_exact_calibration_by_files():
    given = exact_survey({**EXACT, "value": [2100.0, 1000.0, 3500.0, 3.0]})
    folder, results = run(*given, "distance=raking", "bounds=[low,high]", "unit_factor=size")
    targets, weights = pd.read_csv(folder / "targets.csv"), pd.read_csv(folder / "weights.csv")
    np.testing.assert_allclose(targets.estimate, targets.target, rtol=1e-11)
    ratio = weights.weight / weights.initial_weight
    assert ratio.between(0.5 - 1e-9, 2 + 1e-9).all()
    assert results["max_abs_scaled_error"] < 1e-12
    assert results["kkt_violation"] == results["optimality"] < 1e-12
    assert results["gave_way"] == 0
    assert results["certificate"] is None
    assert results["bounds_hit"] == 0
    households = pd.read_csv("H.csv")
    rows = [
        np.ones(200),
        households.area == 0,
        households.income,
        (households.area == 1) * (households["size"] - 3),
    ]
    u = households["size"] * (targets.multiplier.to_numpy() @ np.array(rows, dtype=float))
    np.testing.assert_allclose(ratio, np.clip(np.exp(u), 0.5, 2), rtol=1e-9)


def test_targets_that_cannot_be_met_are_findings_with_a_price():
    impossible = {**EXACT, "value": [2100.0, 3000.0, 3500.0, 3.0]}  # more in one area than in all
    folder, results = run(*exact_survey(impossible), "holdout.groups=null")
    assert results["gave_way"] == 1
    assert results["certificate"][0]["feasible"] is False
    assert set(results["certificate"][0]["targets"]) >= {"all", "a"}
    findings = pd.read_csv(folder / "findings.csv").set_index("kind").loc["gave way"]
    assert "contradicts" in findings.detail
    assert "multiplier" in findings.detail
    with pytest.raises(InputError, match="hard targets contradict each other"):
        run(*exact_survey({**impossible, "hard": "true"}), "holdout.groups=null")
    assert len(list(Path("outputs/calibrate").iterdir())) == 1


@pytest.mark.parametrize(
    ("columns", "more", "message"),
    [
        ({}, ["bounds=[2,0.5]"], r"bounds=\[2, 0.5\]: expected the smaller one first"),
        ({}, ["bounds=[1.5,2]"], "bounds are of weight over initial weight .* either side of 1"),
        ({}, ["bounds=[lo,2]"], "H.csv has no column 'lo' .*did you mean 'low'"),
        ({}, ["bounds=2"], "bounds=2: expected a list of 2 items"),
        ({}, ["unit_factor=siz"], "did you mean 'size'"),
        ({"low": 0.0}, ["unit_factor=low"], "unit_factor must be > 0, got 0 for household 0"),
        ({}, ["distance=logit"], r"distance=logit needs bounds"),
        ({}, ["distance=rake"], "distance=rake: expected one of linear, logit, raking"),
        ({"w": -1.0}, ["distance=raking"], "w must be >= 0, but it is -1 in row 2"),
        ({}, ["num_households=5"], "keeps everybody"),
        ({"area": 0}, [], "its denominator .* is zero"),
    ],
)
def test_wrong_settings_of_an_exact_calibration(columns, more, message):
    given = exact_survey(EXACT, **columns)
    with pytest.raises(InputError, match=message):
        run(*given, *more)
    assert not Path("outputs").exists()


def test_a_european_file_with_missing_values(tmp_path):
    rows = [f"{i:03d};{1 + i % 3},5;{'' if i == 7 else i * 10}" for i in range(40)]
    (tmp_path / "H.csv").write_text("\n".join(["id;w;income", *rows, ""]), encoding="utf-8")
    (tmp_path / "T.csv").write_text("name;value;measure;where\nall;120,5;;\nincome;20000,25;income;\n")
    files = [f"problem.households={tmp_path / 'H.csv'}", f"problem.targets={tmp_path / 'T.csv'}"]
    choice = [
        "problem=households", *files,
        "problem.weight=w", "problem.id=id", "plots=false", "tensorboard=false",
    ]  # fmt: skip
    with pytest.raises(InputError, match=r"value must be a finite number, .* say problem.decimal=comma"):
        run(*choice)
    with pytest.raises(InputError, match="income must be a finite number, but it is missing in row 9"):
        run(*choice, "problem.decimal=comma")
    folder, results = run(*choice, "problem.decimal=comma", "missing=drop")
    assert (results["kept"], results["zero_initial_weights"], results["method"]) == (39, 1, "all")
    weights = pd.read_csv(folder / "weights.csv", dtype={"id": str})
    assert weights.id.tolist() == [f"{i:03d}" for i in range(40) if i != 7]
    assert weights.initial_weight.iloc[:2].tolist() == [1.5, 2.5]
    with pytest.raises(InputError, match="missing needs problem=households"):
        run("missing=zero")
