"""calibrate.py with a book of targets: rules, a year, several years from one matrix."""

import json

import numpy as np
import pandas as pd
import pytest

from sparsereg.errors import FellShort, InputError
from tests.calibration.command.test_run import run

GIVEN = (
    "problem=households", "problem.households=H.csv", "problem.targets=T.csv", "problem.weight=w",
    "problem.id=id", "num_households=null", "plots=false", "tensorboard=false",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    n = 300
    h = pd.DataFrame({
        "id": [f"h{i}" for i in range(n)], "w": rng.lognormal(3, 0.3, n),
        "state": rng.choice(["CA", "TX"], n), "age": rng.integers(18, 90, n),
    })  # fmt: skip
    h.to_csv("H.csv", index=False)
    wheres = {"all": "", "CA": "state == 'CA'", "TX": "state == 'TX'", "old": "age >= 65"}
    sums = {name: h.query(where).w.sum() if where else h.w.sum() for name, where in wheres.items()}
    t = pd.DataFrame({
        "name": list(wheres), "where": list(wheres.values()), "level": ["nation", "state", "state", "nation"],
        "source": "census", "group": ["a", "b", "b", "c"],
    })  # fmt: skip
    growth = {2025: 1.0, 2026: 1.03, 2027: 1.07, 2028: 1.0701}
    for year, factor in growth.items():
        t[f"value_{year}"] = [sums[name] * factor for name in wheres]
    t.loc[t.name == "old", ["value_2027", "value_2028"]] *= 1.3
    t.to_csv("T.csv", index=False)


@pytest.mark.costly
@pytest.mark.parametrize("method", ["calibrate", "all"])
def test_several_years_are_what_each_is_alone(method):
    folder, results = run(*GIVEN, f"method={method}", "targets.year=[2025,2026,2027]")
    weights = pd.read_csv(folder / "weights.csv")
    assert list(weights) == ["id", "initial_weight", "weight_2025", "weight_2026", "weight_2027"]
    assert set(results["years"]) == {"2025", "2026", "2027"}
    assert results["targets"] == 12
    assert results["max_are"] == max(r["max_are"] for r in results["years"].values())
    targets = pd.read_csv(folder / "targets.csv")
    assert targets.groupby("year").size().tolist() == [4, 4, 4]
    assert targets.level.tolist() == 3 * ["nation", "state", "state", "nation"]
    assert ("multiplier" in targets) == (method == "calibrate")
    for year in (2025, 2026, 2027):
        alone, _ = run(*GIVEN, f"method={method}", f"targets.year={year}")
        theirs = pd.read_csv(alone / "weights.csv")
        np.testing.assert_allclose(weights[f"weight_{year}"], theirs.weight, rtol=1e-6)
        ours = pd.read_csv(folder / str(year) / "weights.csv")
        np.testing.assert_allclose(ours.weight, weights[f"weight_{year}"])
        assert pd.read_csv(alone / "levels.csv").level.tolist() == ["nation", "state"]
        assert (folder / str(year) / "report.html").exists()


@pytest.mark.costly
def test_a_year_starts_at_the_weights_of_the_one_before():
    _, results = run(*GIVEN, "method=calibrate", "distance=raking", "targets.year=[2027,2028]")
    _, cold = run(*GIVEN, "method=calibrate", "distance=raking", "targets.year=2028")
    assert results["years"]["2028"]["steps"] < cold["steps"]


@pytest.mark.costly
def test_a_selection_for_each_year_keeps_its_number():
    folder, results = run(*GIVEN[:5], *GIVEN[6:], "num_households=80", "targets.year=[2025,2026]")
    weights = pd.read_csv(folder / "weights.csv")
    assert [(weights[f"weight_{y}"] > 0).sum() for y in (2025, 2026)] == [80, 80]
    assert results["kept"] == 80


def test_rules_leave_targets_out_of_a_run():
    folder, results = run(
        *GIVEN, "method=calibrate", "targets.year=2026", "targets.exclude=[\"level == 'state'\"]"
    )
    assert pd.read_csv(folder / "targets.csv").name.tolist() == ["all", "old"]
    assert results["targets"] == 2
    assert "source" in pd.read_csv(folder / "targets.csv")


@pytest.mark.costly
def test_a_run_that_falls_short_in_one_year_names_it():
    with pytest.raises(FellShort) as error:
        run(*GIVEN, "method=calibrate", "targets.year=[2025,2027]", "require.ess=299.999", "bounds=[0.5,2]")
    told = json.loads(error.value.results.read_text())
    assert {row["year"] for row in told["required"]} == {"2025", "2027"}
    assert all(line.startswith(("2025: ", "2027: ")) for line in error.value.shortfalls)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("targets.year=2030",), "no column value_2030"),
        (("targets.year=[2025,2025]",), "a year is there twice"),
        (
            ("targets.year=2025", "targets.include=[\"level == 'x'\"]"),
            "none of its 4 targets is active and left",
        ),
        ((), "say which, targets.year=2028"),
        (("targets.year=[2025,2026]", "ckpt_path=nothing.pt", "method=all"), "nothing.pt does not exist"),
    ],
)
def test_wrong_input_leaves_nothing(more, message, tmp_path):
    with pytest.raises(InputError, match=message):
        run(*GIVEN, "method=calibrate", *more)
    assert not (tmp_path / "outputs").exists()


def test_rules_need_a_table():
    with pytest.raises(InputError, match="need problem=households or matrix"):
        run("targets.year=2025")


@pytest.mark.costly
def test_an_interrupted_year_goes_on(monkeypatch):
    from sparsereg.calibration.command import run as script

    wanted = (*GIVEN[:5], *GIVEN[6:], "num_households=80", "targets.year=[2025,2026]", "checkpoint_seconds=0")
    whole, _ = run(*wanted)
    drive, seen = script._drive, []

    def stopped(calibration, recorder, saver, checkpoint):
        seen.append(checkpoint)
        if len(seen) == 2:
            for _ in range(3):
                calibration.step()
            calibration.report(recorder.record)
            saver.save(checkpoint, recorder.totals)
            raise KeyboardInterrupt
        drive(calibration, recorder, saver, checkpoint)

    monkeypatch.setattr(script, "_drive", stopped)
    with pytest.raises(KeyboardInterrupt):
        run(*wanted)
    assert seen[1].parent.name == "2026"
    monkeypatch.setattr(script, "_drive", drive)
    again, _ = run(*wanted, f"ckpt_path={seen[1]}")
    pd.testing.assert_frame_equal(pd.read_csv(whole / "weights.csv"), pd.read_csv(again / "weights.csv"))
