"""Persons in households: counted by hand, equal to R's survey, and mismatches named."""

import json
from pathlib import Path

import hydra
import numpy as np
import pandas as pd
import pytest

from sparsereg.calibration.reading.households import build, target_table
from sparsereg.calibration.reading.levels import in_households
from sparsereg.calibration.reading.missing import Missing
from sparsereg.commands import calibrate as script
from sparsereg.errors import InputError

CONFIGS = Path(__file__).parents[3] / "configs"
REFERENCE = Path(__file__).parents[1] / "reference"


def command(*overrides):
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        composed = hydra.compose("calibrate", overrides=list(overrides))
    path = script.run(composed)
    return path.parent, json.loads(path.read_text())


def households():
    return pd.DataFrame(
        {"hid": ["03", "01", "02"], "w": [10.0, 20, 30], "area": ["N", "S", "N"], "rent": [5.0, 6, 7]}
    )


def persons():
    return pd.DataFrame(
        {
            "hid": ["01", "02", "01", "03", "02", "02"],
            "age": [40, 10, 38, 71, 35, 8],
            "wage": [100.0, 0, 80, 0, 90, 0],
            "sex": ["f", "m", "m", "f", "f", "f"],
        }
    )


def built(rows, p=None, missing=None, **names):
    h, p = households(), persons() if p is None else p
    table = pd.DataFrame(rows).assign(name=[f"t{i}" for i in range(len(rows))], value=1.0)
    found = in_households(p, h, "hid", files=("H.csv", "P.csv"), **names)
    more = {} if missing is None else {"missing": missing}
    units = {} if not names else {"units": found.units}
    return build(h, target_table(table, "T.csv"), "w", "hid", "H.csv", persons=found, **more, **units)


@pytest.mark.parametrize(
    ("row", "wanted"),
    [
        ({"unit": "person"}, [1, 2, 3]),
        ({"unit": "household"}, [1, 1, 1]),
        ({"unit": ""}, [1, 1, 1]),
        ({"unit": "person", "measure": "wage"}, [0, 180, 90]),
        ({"unit": "person", "where": "age < 18"}, [0, 0, 2]),
        ({"unit": "person", "where": "area == 'N' and sex == 'f'"}, [1, 0, 2]),
        ({"unit": "person", "where": "area == 'N' and rent > 6"}, [0, 0, 3]),
        ({"unit": "person", "measure": "rent"}, [5, 12, 21]),
        ({"measure": "rent", "where": "area == 'N'"}, [5, 0, 7]),
        ({"unit": "person", "where": "age < 18 or wage > rent"}, [0, 2, 3]),
    ],
)
def test_persons_add_up_by_household(row, wanted):
    problem = built([{"unit": "", "measure": "", "where": "", **row}]).problem
    assert problem.matrix.toarray()[0].tolist() == wanted


def test_ratios_may_be_of_two_levels():
    rows = [
        {"unit": "person", "measure": "wage", "of": "1", "of_where": "age >= 18", "of_unit": ""},
        {"unit": "", "measure": "rent", "of": "1", "of_where": "", "of_unit": "person"},
    ]
    problem = built(rows).problem
    w = np.array([10.0, 20, 30])
    assert problem.estimates(w).tolist() == pytest.approx([6300 / (10 + 40 + 30), 380 / 140])
    assert problem.denominators.toarray().tolist() == [[1, 2, 1], [1, 2, 3]]


@pytest.mark.parametrize(("unit", "wanted"), [("household", [5, 6, 7]), ("person", [5, 12, 21])])
def test_a_denominator_of_households_under_persons_says_how_often(unit, wanted):
    row = {"unit": "person", "measure": "wage", "of": "rent", "of_unit": unit}
    assert built([row]).problem.denominators.toarray()[0].tolist() == wanted


def test_the_matrix_is_that_of_a_join_and_a_sum():
    rng = np.random.default_rng(5)
    h = pd.DataFrame({"hid": rng.permutation(300), "size": rng.integers(1, 6, 300)})
    h["zone"] = rng.choice(list("abc"), 300)
    p = pd.DataFrame({"hid": np.repeat(h.hid, h["size"])}).sample(frac=1, random_state=1)
    p["x"], p["k"] = rng.normal(size=len(p)), rng.integers(0, 4, len(p))
    rows = [
        {"measure": m, "where": f"k == {k} and zone == '{z}'"}
        for m in ("", "x")
        for k in range(4)
        for z in "abc"
    ]
    table = target_table(
        pd.DataFrame(rows).assign(name=[str(i) for i in range(len(rows))], value=1.0, unit="person")
    )
    found = build(h, table, id="hid", persons=in_households(p, h, "hid")).problem.matrix.toarray()
    both = p.merge(h, on="hid")
    for i, r in enumerate(rows):
        k, z = int(r["where"][5]), r["where"][-2]
        part = both[(both.k == k) & (both.zone == z)]
        values = part.x if r["measure"] else pd.Series(1.0, part.index)
        wanted = values.groupby(part.hid).sum().reindex(h.hid, fill_value=0.0)
        assert found[i] == pytest.approx(wanted.to_numpy(), abs=1e-12)


def test_any_two_levels_have_their_names():
    problem = built([{"unit": "pupil"}, {"unit": "school"}], units=("school", "pupil")).problem
    assert problem.matrix.toarray().tolist() == [[1, 2, 3], [1, 1, 1]]


def test_a_household_leaves_with_a_missing_value_of_a_person():
    p = persons()
    p.loc[0, "wage"] = np.nan
    rows = [{"unit": "person", "measure": "wage"}]
    with pytest.raises(InputError, match="P.csv: wage must be a finite number, but it is missing in row 2"):
        built(rows, p)
    assert built(rows, p, Missing("zero")).problem.matrix.toarray().tolist() == [[0, 80, 90]]
    assert built(rows, p, Missing("drop")).problem.starting_weights.tolist() == [10, 0, 30]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"unit": "persn"}, r"row 2 \(target 't0'\): unknown unit 'persn'; did you mean 'person'"),
        ({"unit": "", "where": "age > 3"}, "unknown column 'age': it is a column of P.csv.*unit=person"),
        ({"unit": "", "measure": "wage"}, "unknown column 'wage' as measure: it is a column of P.csv"),
        ({"unit": "person", "where": "agee > 3"}, "unknown column 'agee'; did you mean 'age'"),
        ({"unit": "person", "where": "aera == 'N'"}, "unknown column 'aera'; did you mean 'area'"),
        ({"unit": "person", "where": "age >"}, r"T.csv row 2 \(target 't0'\): where"),
        ({"unit": "person", "measure": "sex"}, "'sex' is not numeric"),
        ({"unit": "person", "of": "1", "of_where": "age > 99"}, "denominator .* is zero: no person fulfils"),
        (
            {"unit": "", "measure": "rent", "of": "wage"},
            "of=wage is a column of P.csv, and the target is of households: say of_unit=person",
        ),
        (
            {"unit": "person", "measure": "wage", "of": "rent"},
            "of=rent is a column of H.csv, and the target is of persons: say of_unit=household to add it once"
            " for each household, or of_unit=person for each person",
        ),
    ],
)
def test_wrong_targets_are_named(row, said):
    with pytest.raises(InputError, match=said):
        built([row])


def test_a_target_that_touches_nobody_says_so_of_persons():
    hints = built([{"unit": "person", "where": "age == 99"}]).hints
    assert hints[0].startswith("no person has age == 99")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda h, p: (h[:2], p), "P.csv: 3 of 6 persons are in no household of H.csv: hid 02; .* row 3"),
        (lambda h, p: (h, p[p.hid != "03"]), "H.csv: 1 of 3 households have no person in P.csv: hid 03"),
        (lambda h, p: (h, p.assign(hid=p.hid.where(p.age > 9))), "P.csv: hid is missing in row 7"),
        (
            lambda h, p: (h, p.rename(columns={"hid": "hhid"})),
            "P.csv has no column 'hid' .*did you mean 'hhid'",
        ),
        (lambda h, p: (h.assign(hid="01"), p), "H.csv: the id 01 is there twice, in rows 2 and 3"),
        (lambda h, p: (h, p.assign(pid=1)), "P.csv: the id 1 is there twice"),
    ],
)
def test_mismatches_are_named(change, said):
    h, p = change(households(), persons())
    with pytest.raises(InputError, match=said):
        in_households(p, h, "hid", person_id="pid" if "pid" in p.columns else None, files=("H.csv", "P.csv"))


def test_ids_of_different_kinds_are_compared_as_texts():
    h = pd.DataFrame({"hid": ["1", "2", "x"]})
    p = pd.DataFrame({"hid": ["x", "2", "1", "2"]})
    assert in_households(p, h, "hid").household.tolist() == [2, 1, 0, 1]
    numbers = in_households(pd.DataFrame({"hid": [2.0, 1.0]}), pd.DataFrame({"hid": ["1", "2"]}), "hid")
    assert numbers.household.tolist() == [1, 0]


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    households().assign(key=["a", "b", "c"]).to_csv("H.csv", index=False)
    persons().to_csv("P.csv", index=False)
    targets = {"name": ["n", "children"], "value": [150, 66], "where": ["", "age < 18"], "unit": "person"}
    pd.DataFrame(targets).to_csv("T.csv", index=False)
    return (
        "problem=households", "problem.households=H.csv", "problem.targets=T.csv", "problem.weight=w",
        "method=calibrate", "plots=false", "tensorboard=false",
    )  # fmt: skip


@pytest.mark.costly
@pytest.mark.parametrize("more", [(), ("problem.id=key",), ("problem.id=hid",)])
def test_one_weight_per_household(files, more):
    folder, _ = command(*files, "problem.persons=P.csv", "problem.household_id=hid", *more)
    weights = pd.read_csv(folder / "weights.csv", dtype=str)
    assert list(weights.id) == (["a", "b", "c"] if "problem.id=key" in more else ["03", "01", "02"])
    w = weights.weight.astype(float).to_numpy()
    assert w @ [1, 2, 3] == pytest.approx(150)
    assert w[2] * 2 == pytest.approx(66)


def test_variables_of_persons(files):
    two = ("problem.persons=P.csv", "problem.household_id=hid", "report.variables=[wage,rent,rent/wage]")
    folder, _ = command(*files, *two, "variance=linearized")
    w = pd.read_csv(folder / "weights.csv").weight.to_numpy()
    table = pd.read_csv(folder / "standard_errors.csv").set_index(["name", "statistic"]).estimate
    assert table["wage", "mean"] == pytest.approx(w @ [0, 180, 90] / (w @ [1, 2, 3]))
    assert table["rent", "mean"] == pytest.approx(w @ [5, 6, 7] / w.sum())
    assert table["rent/wage", "ratio"] == pytest.approx(w @ [5, 6, 7] / (w @ [0, 180, 90]))


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ([], r"T.csv row 2 \(target 'n'\): unit 'person' needs problem.persons=P.csv"),
        (["problem.household_id=hid"], "problem.household_id and .* need problem.persons"),
        (["problem.persons=P.csv"], "problem.persons needs problem.household_id=COLUMN"),
        (["problem.persons=P.csv", "problem.household_id=hd"], "P.csv has no column 'hd'"),
        (["problem.persons=Q.csv", "problem.household_id=hid"], "Q.csv does not exist"),
        (["problem.unit_names=[a,a]"], "expected two different names"),
        (["unit_factor=1/size"], "needs problem.persons=P.csv"),
    ],
)
def test_wrong_settings_are_one_line(files, asked, said):
    with pytest.raises(InputError, match=said):
        command(*files, *asked)


def test_equal_to_aggregate_stage_of_survey_in_r(tmp_path, monkeypatch):
    """All of eusilc: 14,827 persons in 6,000 households, raking, ratios between 0.5 and 2."""
    monkeypatch.chdir(tmp_path)
    wanted = pd.read_csv(REFERENCE / "persons_weights.csv.gz")
    wanted[["db030", "db040", "weight"]].to_csv("H.csv", index=False)
    folder, results = command(
        "problem=households", "problem.households=H.csv", f"problem.persons={REFERENCE / 'persons.csv.gz'}",
        f"problem.targets={REFERENCE / 'persons_targets.csv.gz'}", "problem.household_id=db030",
        "problem.person_id=rb030", "problem.weight=weight", "method=calibrate", "distance=raking",
        "bounds=[0.5,2]", "unit_factor=1/size", "plots=false", "tensorboard=false",
        "variance=linearized", "report.variables=[age,child,child/age]",
    )  # fmt: skip
    found = pd.read_csv(folder / "weights.csv")
    assert found.id.tolist() == wanted.db030.tolist()
    assert found.weight.to_numpy() == pytest.approx(wanted.calibrated.to_numpy(), rel=1e-9)
    assert results["max_abs_scaled_error"] < 1e-12
    of_r = pd.read_csv(REFERENCE / "persons_errors.csv.gz")
    ours = pd.read_csv(folder / "standard_errors.csv")
    assert ours[["name", "statistic"]].equals(of_r[["name", "statistic"]])
    assert ours.estimate.to_numpy() == pytest.approx(of_r.estimate.to_numpy(), rel=1e-9)
    assert ours.se.to_numpy() == pytest.approx(of_r.se.to_numpy(), rel=1e-8)


@pytest.mark.costly
@pytest.mark.parametrize("distance", ["raking", "linear"])
def test_equal_to_aggregate_stage_where_bounds_bind(tmp_path, monkeypatch, distance):
    """The same with ratios between 0.85 and 1.2: a fifth of the households end at a bound, the same ones."""
    monkeypatch.chdir(tmp_path)
    wanted = pd.read_csv(REFERENCE / "persons_weights.csv.gz")
    wanted[["db030", "db040", "weight"]].to_csv("H.csv", index=False)
    folder, results = command(
        "problem=households", "problem.households=H.csv", f"problem.persons={REFERENCE / 'persons.csv.gz'}",
        f"problem.targets={REFERENCE / 'persons_targets.csv.gz'}", "problem.household_id=db030",
        "problem.person_id=rb030", "problem.weight=weight", "method=calibrate", f"distance={distance}",
        "bounds=[0.85,1.2]", "unit_factor=1/size", "plots=false", "tensorboard=false",
    )  # fmt: skip
    found, of_r = pd.read_csv(folder / "weights.csv").weight, wanted[f"{distance}_narrow"]
    assert found.to_numpy() == pytest.approx(of_r.to_numpy(), rel=1e-8)
    ratio = of_r / wanted.weight
    at_bound = int(((ratio < 0.85 * (1 + 1e-9)) | (ratio > 1.2 * (1 - 1e-9))).sum())
    assert results["bounds_hit"] == at_bound > 1200
    assert results["max_abs_scaled_error"] < 1e-12


def test_persons_of_domains_are_kept_within_bounds(tmp_path, monkeypatch):
    """Whole weights of households, counts of persons by land, sex and age, ratios between 0.7 and 1.4."""
    monkeypatch.chdir(tmp_path)
    rng, num = np.random.default_rng(3), 3000
    households = pd.DataFrame(
        {"hid": np.arange(num), "land": rng.choice(["A", "B", "C"], num), "w": 1 + rng.lognormal(3, 0.4, num)}
    )
    sizes = rng.integers(1, 6, num)
    people = int(sizes.sum())
    persons = pd.DataFrame(
        {
            "hid": np.repeat(households.hid, sizes),
            "age": rng.integers(0, 90, people),
            "sex": rng.integers(0, 2, people),
        }
    )
    rows = []
    for land in "ABC":
        for where in ("sex == 0", "sex == 1", "age >= 65"):
            there = persons.merge(households).query(f"land == '{land}' and {where}")
            rows.append(
                [f"{land} {where}", round(1.04 * there.w.sum()), f"land == '{land}' and {where}", "person"]
            )
    targets = pd.DataFrame(rows, columns=["name", "value", "where", "unit"])
    for name, table in (("H", households), ("P", persons), ("T", targets)):
        table.to_csv(f"{name}.csv", index=False)
    folder, results = command(
        "problem=households", "problem.households=H.csv", "problem.persons=P.csv", "problem.targets=T.csv",
        "problem.household_id=hid", "problem.weight=w", "method=calibrate", "distance=raking",
        "bounds=[0.7,1.4]", "weights=integer", "plots=false", "tensorboard=false",
    )  # fmt: skip
    found = pd.read_csv(folder / "weights.csv")
    assert found.weight.dtype.kind == "i"
    assert found.weight.between(0.7 * households.w, 1.4 * households.w).all()
    by_person = persons.merge(households).merge(found.rename(columns={"id": "hid"}), on="hid")
    reached = [by_person.query(where).weight.sum() for where in targets["where"]]
    assert np.abs(reached - targets.value).max() <= 2  # of about 20,000 each
    assert results["gave_way"] == 0
