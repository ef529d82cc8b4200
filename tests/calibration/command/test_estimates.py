"""Standard errors through the command: equal to R's survey, and wrong designs in one line."""

import json
import shutil
import subprocess
from pathlib import Path

import hydra
import numpy as np
import pandas as pd
import pytest

from sparsereg.commands import calibrate as script
from sparsereg.errors import InputError

CONFIGS = Path(__file__).parents[3] / "configs"
REFERENCE = Path(__file__).parents[1] / "reference"
CLUSTERS = ("psu=dnum", "fpc=fpc")
FEW = "report.variables=[api00,api.stu/enroll]"


def command(*overrides):
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        composed = hydra.compose("calibrate", overrides=list(overrides))
    path = script.run(composed)
    return path.parent, json.loads(path.read_text())


@pytest.fixture
def schools(tmp_path, monkeypatch):
    """R's apiclus1 with replicate weights, and the arguments that calibrate it."""
    monkeypatch.chdir(tmp_path)
    t = pd.read_csv(REFERENCE / "variance_apiclus1.csv.gz")
    t.insert(0, "school", [f"{i:03d}" for i in range(len(t))])
    units = np.unique(t.dnum, return_inverse=True)[1]
    for i in range(15):
        t[f"wt{i + 1}"] = np.where(units == i, 0.0, t.pw * 15 / 14)
    t["other"] = np.where(np.arange(len(t)) < 9, np.nan, 1.0)
    t.to_csv("H.csv", index=False)
    targets = {"name": ["n", "high", "middle", "api99"], "value": [6194, 755, 1018, 3914069]}
    where = ["", "stype == 'H'", "stype == 'M'", ""]
    pd.DataFrame({**targets, "measure": ["", "", "", "api99"], "where": where}).to_csv("T.csv", index=False)
    return (
        "problem=households", "problem.households=H.csv", "problem.targets=T.csv", "problem.weight=pw",
        "problem.id=school", "method=calibrate", "plots=false", "tensorboard=false",
    )  # fmt: skip


@pytest.mark.parametrize(("method", "se"), [("linearized", 3.4418), ("jackknife", 3.9429)])
def test_standard_errors_are_those_of_survey_in_r(schools, method, se):
    folder, results = command(*schools, f"variance={method}", *CLUSTERS, FEW)
    table = pd.read_csv(folder / "standard_errors.csv").set_index(["name", "statistic"])
    assert list(table.columns) == [
        "initial", "initial_se", "estimate", "se", "lower", "upper", "cv", "design_effect",
    ]  # fmt: skip
    assert list(table.index) == [("api00", "total"), ("api00", "mean"), ("api.stu/enroll", "ratio")]
    row = table.loc[("api00", "mean")]
    assert row.se == pytest.approx(se, abs=5e-5)
    assert row.initial_se == pytest.approx({"linearized": 23.542, "jackknife": 26.329}[method], abs=1e-3)
    weights, t = pd.read_csv(folder / "weights.csv").weight, pd.read_csv("H.csv")
    assert row.estimate == pytest.approx(np.average(t.api00, weights=weights))
    assert row.initial == pytest.approx(t.api00.mean())
    assert results["variance"] == method
    assert (folder / "replicates.R").exists() == (method == "jackknife")


@pytest.mark.costly
def test_replicate_weights_are_calibrated_each(schools):
    ways = (
        ("variance=replicates:wt*", "replicates.type=jk1"),
        ("variance=replicates:wt", f"replicates.scale={14 / 15}"),
        ("variance=replicates", f"replicates.columns={[f'wt{i + 1}' for i in range(15)]}".replace("'", "")
         .replace(" ", ""), "replicates.type=jk1"),
    )  # fmt: skip
    found = []
    for way in ways:
        folder, results = command(*schools, *way, FEW)
        found.append(pd.read_csv(folder / "standard_errors.csv"))
        assert (results["replicates"], results["replicates_missed"]) == (15, 0)
    assert found[0].equals(found[1])
    assert found[0].equals(found[2])
    table = pd.read_parquet(folder / "replicate_weights.parquet")
    assert list(table.columns) == ["id", *(f"replicate_{i + 1}" for i in range(15))]
    assert list(table.id) == [f"{i:03d}" for i in range(183)]
    t = pd.read_csv("H.csv")
    assert (table.drop(columns="id").sum() - 6194).abs().max() < 1e-6
    assert (table.drop(columns="id").mul(t.api99, axis=0).sum() - 3914069).abs().max() < 1e-3


@pytest.mark.skipif(shutil.which("Rscript") is None, reason="R is not installed")
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_the_script_for_r_finds_the_same_standard_errors(schools, kind):
    folder, _ = command(*schools, "variance=jackknife", *CLUSTERS, FEW, f"replicates.format={kind}")
    code = (
        'source("replicates.R"); h <- read.csv("../../../H.csv", colClasses = c(school = "character"))\n'
        'cat(SE(svymean(~api00, replicate_design(h, id = "school"))))'
    )
    done = subprocess.run(["Rscript", "-e", code], cwd=folder, capture_output=True, text=True, timeout=120)
    if "there is no package" in done.stderr:
        pytest.skip("R has no package survey")
    if "install.packages('nanoparquet')" in done.stderr:
        pytest.skip("R has no package that reads Parquet")
    assert float(done.stdout.split()[-1]) == pytest.approx(3.9428545, abs=1e-6), done.stderr


def test_a_table_of_variables_may_have_conditions_and_ratios(schools):
    pd.DataFrame(
        {
            "name": ["in high schools", "share", "per pupil"],
            "measure": ["api00", "", "api00"],
            "where": ["stype == 'H'", "stype == 'M'", ""],
            "of": ["", "", "enroll"],
        }
    ).to_csv("V.csv", index=False)
    folder, _ = command(*schools, "report.variables=V.csv", "variance=linearized", *CLUSTERS)
    table = pd.read_csv(folder / "standard_errors.csv").set_index(["name", "statistic"])
    t, w = pd.read_csv("H.csv"), pd.read_csv(folder / "weights.csv").weight
    high = t.stype == "H"
    mean = np.average(t.api00[high], weights=w[high])
    assert table.estimate["in high schools", "mean"] == pytest.approx(mean)
    assert table.estimate["share", "mean"] == pytest.approx(1018 / 6194)
    assert table.se["share", "mean"] < 1e-9  # it is a target
    assert table.estimate["per pupil", "ratio"] == pytest.approx((w @ t.api00) / (w @ t.enroll))


def test_without_names_all_columns_of_numbers_are_estimated(schools):
    folder, _ = command(*schools, "variance=bootstrap", *CLUSTERS, "num_replicates=20", "seed=3")
    names = set(pd.read_csv(folder / "standard_errors.csv").name)
    assert {"api99", "api00", "enroll"} <= names
    assert not names & {"pw", "school", "dnum", "fpc", "other", "stype"}


@pytest.mark.costly
def test_variables_are_told_of_chosen_households_too(schools):
    chosen = [s for s in schools if s != "method=calibrate"]
    folder, _ = command(*chosen, "num_households=60", "report.variables=enroll")
    table = pd.read_csv(folder / "variables.csv")
    weights = pd.read_csv(folder / "weights.csv", dtype={"id": str}).set_index("id").weight
    t = pd.read_csv("H.csv", dtype={"school": str}).set_index("school")
    assert table.estimate[0] == pytest.approx((weights * t.enroll).sum())
    assert not (folder / "standard_errors.csv").exists()


def test_only_columns_without_a_target_are_bystanders(schools):
    pd.DataFrame(
        {
            "name": ["api99", "in high schools", "middle", "enroll"],
            "measure": ["api99", "api99", "", "enroll"],
            "where": ["", "stype == 'H'", "stype == 'M'", ""],
        }
    ).to_csv("V.csv", index=False)
    folder, _ = command(*schools, "report.variables=V.csv")
    table = pd.read_csv(folder / "variables.csv").set_index(["name", "statistic"])
    moved = table.relative_change.abs() > 0.02
    assert moved["in high schools", "total"]
    assert moved["enroll", "total"]
    assert table.targeted.groupby("name").all().to_dict() == {
        "api99": True, "in high schools": True, "middle": True, "enroll": False,
    }  # fmt: skip
    page = (folder / "report.html").read_text()
    (note,) = [line for line in page.splitlines() if "figures that nobody targeted moved" in line]
    assert "enroll" in note
    assert "high" not in note


@pytest.mark.costly
@pytest.mark.parametrize(("column", "known"), [("none", True), ("both", False)])
def test_the_largest_cv_with_an_estimate_of_zero(schools, column, known):
    """A zero without an error is no obstacle; one with an error has no share of it to show."""
    t = pd.read_csv("H.csv", dtype={"school": str})
    t["none"], t["both"] = 0.0, 0.0
    t.loc[[0, 1], "both"] = [1.0, -1.0]
    t.loc[1, ["stype", "api99", "dnum"]] = t.loc[0, ["stype", "api99", "dnum"]]
    t.loc[1, "dnum"] = t.dnum[t.dnum != t.dnum[0]].iloc[0]
    t.to_csv("H.csv", index=False)
    _, results = command(*schools, "variance=linearized", "psu=dnum", f"report.variables=[api00,{column}]")
    table = pd.read_csv(Path("outputs/calibrate/version_0/standard_errors.csv")).set_index(
        ["name", "statistic"]
    )
    assert table.estimate[column, "total"] == 0
    assert (table.se[column, "total"] == 0) == known
    assert results["max_cv"] == (pytest.approx(table.cv.loc["api00"].max()) if known else None)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (["variance=jacknife"], "variance=jacknife: expected one of linearized, jackknife"),
        (["variance=linearized", "strata=stype", "psu=dnum"], "psu 637 lies in two strata, 'H' and 'E'"),
        (["variance=jackknife", "strata=dnum"], "H.csv: stratum 413 has a single primary sampling unit"),
        (["variance=linearized", "psu=dnumm"], "has no column 'dnumm' .psu names it.; did you mean 'dnum'"),
        (["variance=linearized", "psu=other"], "psu=other is missing in row 2"),
        (["variance=linearized", "fpc=other"], "other must be a finite number"),
        (["strata=stype"], "strata needs variance=linearized"),
        (["variance=replicates"], "needs variance=replicates:PATTERN or replicates.columns"),
        (["variance=replicates:xy*"], "no column of H.csv fits"),
        (["variance=replicates:wt1"], "wt1 is a column of H.csv and the beginning of wt10: .* such as wt\\*"),
        (["variance=jackknife", "num_replicates=50"], "num_replicates is how many variance=bootstrap draws"),
        (["variance=linearized", "report.variables=[school]"], "'school' is not numeric: H.csv holds texts"),
        (["variance=replicates:wt15*"], "only 'wt15' of H.csv fits"),
        (["variance=replicates:api*"], "they do not fit"),
        (["variance=replicates:wt*", "psu=dnum"], "variance=replicates knows the design"),
        (["variance=replicates", "replicates.columns=[wt1,wt2,wt1]"], "has 'wt1' twice"),
        (["variance=replicates", "replicates.columns=[wt1,stype]"], "stype must be a finite number"),
        (["variance=bootstrap", "replicates.type=brr"], "need variance=replicates:PATTERN"),
        (["variance=linearized", "report.variables=[ap00]"], "no column 'ap00'; did you mean 'api00'"),
        (["variance=linearized", "report.variables=[api00/enrol]"], "column 'enrol'; did you mean 'enroll'"),
        (["variance=linearized", "report.variables=[api00/]"], "two columns, .*'api00/'"),
        (["variance=linearized", "report.variables=[other]"], "finite number, but it is missing"),
    ],
)  # fmt: skip
def test_wrong_designs_are_one_line_and_nothing_is_written(schools, asked, said):
    with pytest.raises(InputError, match=said):
        command(*schools, *asked)
    assert not Path("outputs/calibrate/version_0").exists()


def test_a_selection_has_no_standard_errors(schools):
    chosen = [s for s in schools if s != "method=calibrate"]
    with pytest.raises(InputError, match="variance needs method=calibrate.*no random sample"):
        command(*chosen, "num_households=60", "variance=linearized")
