"""calibrate.py with areas: the files that come out, and one line for each wrong input."""

import json

import numpy as np
import pandas as pd
import pytest

from sparsereg.calibration.command import areas
from sparsereg.errors import FellShort, InputError
from tests.calibration.command.test_run import run

AREAS = ("D1", "D2", "03")


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write(households=None, targets=None, crosswalk=None):
    rng = np.random.default_rng(0)
    n = 240
    h = pd.DataFrame({
        "id": [f"h{i:03d}" for i in range(n)],
        "w": rng.lognormal(3, 0.3, n),
        "district": rng.choice(AREAS, n),
        "income": rng.lognormal(10, 1, n).round(),
        "age": rng.integers(18, 90, n),
    })  # fmt: skip
    rows = []
    for area in AREAS:
        here = h.district == area
        sums = {
            "": h.w[here].sum(), "income": (h.w * h.income)[here].sum(),
            "old": h.w[here & (h.age >= 65)].sum(),
        }  # fmt: skip
        for what, value in sums.items():
            measure, where = ("", "age >= 65") if what == "old" else (what, "")
            row = {"name": f"{area}/{what}", "area": area, "measure": measure, "where": where}
            rows.append(row | {"value": value * rng.lognormal(0, 0.05)})
    rows.append({"name": "nation", "area": "", "measure": "", "where": "", "value": 1.02 * h.w.sum()})
    t = pd.DataFrame(rows)
    (households or (lambda x: x))(h).to_csv("H.csv", index=False)
    (targets or (lambda x: x))(t).to_csv("T.csv", index=False)
    if crosswalk is not None:
        crosswalk.to_csv("X.csv", index=False)
    return h, t


GIVEN = (
    "num_households=null", "method=calibrate", "problem=households", "problem.households=H.csv",
    "problem.targets=T.csv", "problem.weight=w", "problem.id=id",
)  # fmt: skip
SHARES = pd.DataFrame({"area": AREAS, "share": [0.5, 0.3, 0.2]})


@pytest.mark.parametrize("who", ["area.column=district", "area.clones=2", "area.crosswalk=X.csv"])
@pytest.mark.parametrize("form", ["csv", "parquet"])
def test_the_long_table_meets_the_targets_of_every_area(who, form):
    households, targets = write(crosswalk=SHARES)
    folder, results = run(*GIVEN, who, f"weights_format={form}", "area.files=true")
    long = pd.read_csv(folder / "weights.csv", dtype={"area": str}) if form == "csv" else pd.read_parquet(
        folder / "weights.parquet"
    )  # fmt: skip
    assert not long.duplicated(["area", "id"]).any()
    both = long.merge(households, on="id")
    for row in targets[targets.area != ""].itertuples():
        here = both[both.area == row.area]
        some = here[here.age >= 65] if row.where else here
        value = (some.weight * (some[row.measure] if row.measure else 1.0)).sum()
        assert value == pytest.approx(row.value, rel=1e-9)
    assert results["gave_way"] == 0
    assert (results["areas"], results["targets"]) == (3, 9)
    own = folder / "areas" / f"03.{form}"
    part = pd.read_csv(own, dtype={"area": str}) if form == "csv" else pd.read_parquet(own)
    pd.testing.assert_frame_equal(part, long[long.area == "03"].reset_index(drop=True))


def test_tables_of_areas_households_and_the_nation_agree_with_the_weights():
    households, _ = write(crosswalk=SHARES)
    folder, results = run(*GIVEN, "area.crosswalk=X.csv", "distance=raking")
    long = pd.read_csv(folder / "weights.csv", dtype={"area": str})
    by_area = long.groupby("area").weight
    table = pd.read_csv(folder / "areas.csv", dtype={"area": str}).set_index("area")
    np.testing.assert_allclose(table.weight, by_area.sum()[table.index])
    np.testing.assert_allclose(
        table.ess, (by_area.sum() ** 2 / by_area.apply(lambda w: (w**2).sum()))[table.index]
    )
    np.testing.assert_allclose(table.largest_share, (by_area.max() / by_area.sum())[table.index])
    used = pd.read_csv(folder / "exhaustion.csv").set_index("id")
    sums = long.groupby("id").weight.sum()
    np.testing.assert_allclose(used.sum_of_areas, sums[used.index])
    np.testing.assert_allclose(used.exhaustion, sums[used.index] / households.set_index("id").w[used.index])
    nation = pd.read_csv(folder / "nation.csv").set_index("measure")
    assert nation.loc["households", "sum_of_areas"] == pytest.approx(long.weight.sum())
    assert results["total_weight"] == pytest.approx(long.weight.sum())
    read = json.loads((folder / "results.json").read_text())["provenance"]["inputs"]
    assert "area.crosswalk" in [file["key"] for file in read]


def test_targets_that_do_not_add_up_are_named_and_reconciled(caplog):
    write()
    with caplog.at_level("WARNING"):
        folder, _ = run(*GIVEN, "area.column=district", "area.reconcile=proportional")
    assert "the targets for households of the parts of the nation add up to" in caplog.text
    nation = pd.read_csv(folder / "nation.csv").set_index("measure")
    assert nation.loc["households", "relative_error"] == pytest.approx(0.0, abs=1e-9)


def test_a_total_that_no_area_asks_for_has_no_sum_of_their_targets():
    young = {"name": "young", "area": "", "measure": "income", "where": "age < 30", "value": 1e6}
    write(targets=lambda t: pd.concat([t, pd.DataFrame([young])]))
    folder, _ = run(*GIVEN, "area.column=district")
    nation = pd.read_csv(folder / "nation.csv")
    assert nation.target[nation.targets_of_areas.isna()].tolist() == [1e6]


def test_an_area_without_targets_keeps_its_share():
    households, _ = write(crosswalk=SHARES, targets=lambda t: t[t.area.isin([AREAS[0], ""])])
    folder, _ = run(*GIVEN, "area.crosswalk=X.csv", "distance=raking")
    long = pd.read_csv(folder / "weights.csv", dtype={"area": str})
    for area, share in SHARES.iloc[1:].itertuples(index=False):
        np.testing.assert_allclose(long.weight[long.area == area], share * households.w)


def test_what_is_required_of_the_areas():
    write()
    with pytest.raises(FellShort, match=r"ess is .*; require.ess=1000"):
        run(*GIVEN, "area.column=district", "require.ess=1000")


def _set(column, value, rows=slice(0, 1)):
    def changed(table):
        table = table.copy()
        table[column] = table[column].astype(object)
        table.iloc[rows, table.columns.get_loc(column)] = value
        return table

    return changed


HOME, WALK = "area.column=district", "area.crosswalk=X.csv"
IDS = [f"h{i:03d}" for i in range(240)]


def walk(ids, areas="D1", share=1.0):
    return {"crosswalk": pd.DataFrame({"id": ids, "area": areas, "share": share})}


WRONG = {
    "an area without households": (
        {"targets": _set("area", "D9")}, HOME, "T.csv row 2 .*no household of H.csv has district == 'D9'",
    ),
    "no area at all": ({"targets": _set("area", "", slice(None))}, HOME, "no target has an area"),
    "no such column": ({}, "area.column=distrct", "no column 'distrct'.*did you mean 'district'"),
    "a home that is missing": ({"households": _set("district", None)}, HOME, "missing for household h000"),
    "a weight of a target": (
        {"targets": lambda t: t.assign(weight=1)}, HOME, "leave the column 'weight' empty",
    ),
    "too many clones": ({}, "area.clones=4", "clones=4: clones must be from 1 to the number of areas, 3"),
    "shares of areas": ({"crosswalk": SHARES.assign(share=0.3)}, WALK, "shares must add up to 1, got 0.9"),
    "an area twice": ({"crosswalk": pd.concat([SHARES, SHARES])}, WALK, "'D1' is there twice"),
    "a share of nothing": (
        {"crosswalk": SHARES.assign(share=[0.5, 0.5, 0.0])}, WALK, "in \\(0, 1\\], got 0 in row 4",
    ),
    "an unknown household": (walk(["h999"]), WALK, "id h999 in row 2 is not in H.csv"),
    "a household left out": (walk(IDS[:-1]), WALK, "of h239 it is not there"),
    "a pair twice": (
        walk(["h000", "h000"], share=0.5), WALK, "'D1', id h000 is there twice, the second in row 3",
    ),
    "shares of a household": (
        walk(IDS, share=0.9), WALK, "of h000 they add up to 0.9 \\(240 such households\\)",
    ),
    "an area of weight 0": (
        {"households": lambda h: h.assign(w=h.w.where(h.district != "D2", 0.0))}, HOME,
        r"T.csv row 5 \(target 'D2/'\): all \d+ households of H.csv with district == 'D2' have the weight 0",
    ),
    "the same total twice": (
        {"targets": lambda t: pd.concat([t, t.iloc[:1].assign(name="again")])}, HOME,
        "'D1/' and 'again' ask for the same",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_one_line_and_leaves_nothing(case, tmp_path):
    change, who, message = WRONG[case]
    write(**change)
    with pytest.raises(InputError, match=message) as error:
        run(*GIVEN, who)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "outputs").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("area.column=district", "area.clones=2"), "area.column and area.clones contradict each other"),
        (("area.column=district", "method=all"), "need method=calibrate"),
        (("area.files=true",), "area.files and area.reconcile need"),
        (("area.mode=joint",), "so do area.mode and area.groups"),
        (("area.column=district", "area.mode=prune"), "area.mode=prune and area.keep=K need each other"),
        (("area.column=district", "area.price=3"), "area.price needs area.mode=joint or prune"),
        (("area.column=district", "area.mode=joint", "area.most=3"), "area.most needs area.mode=prune"),
        (("area.column=district", "area.keep=7"), "area.mode=prune and area.keep=K need each other"),
        (
            ("area.column=district", "area.mode=prune", "area.keep=7", "bounds=[0.5,2]"),
            "bounds are for areas that keep everybody",
        ),
        (("area.column=district", "variance=linearized"), "variance is not known where areas"),
        (("area.column=district", "+group_multipliers.a=2"), "group_multipliers is not known where areas"),
        (("area.column=district", "bounds=[low,high]"), "bounds that are numbers"),
        (("area.column=district", "weights_format=dta"), "csv or parquet"),
    ],
)
def test_settings_that_contradict_each_other(more, message):
    write()
    with pytest.raises(InputError, match=message):
        run(*GIVEN, *more)


GROUPS = pd.DataFrame({"area": [*AREAS, "N"], "parent": ["N", "N", "S", ""]})


def with_levels(t):
    """Targets of two groups and of the nation, 2 and 3 % off what their areas add up to."""
    rows = []
    for what in ("", "income", "old"):
        own = t[t.name.isin([f"{a}/{what}" for a in AREAS])].set_index("area")
        sums = {"N": own.value["D1"] + own.value["D2"], "S": own.value["03"], "": own.value.sum()}
        first = own.iloc[0]
        rows += [
            {"name": f"{k or 'all'}/{what}", "area": k, "measure": first.measure, "where": first["where"],
             "value": (1.02 if k else 1.03) * v}
            for k, v in sums.items()
        ]  # fmt: skip
    return pd.concat([t[t.name != "nation"], pd.DataFrame(rows)], ignore_index=True)


@pytest.mark.costly
def test_all_levels_at_once(caplog):
    GROUPS.to_csv("G.csv", index=False)
    households, targets = write(targets=with_levels)
    with caplog.at_level("WARNING"):
        folder, results = run(*GIVEN, "area.column=district", "area.groups=G.csv", "area.mode=joint")
    assert "parts of N add up to" in caplog.text
    assert "parts of the nation add up to" in caplog.text
    assert "and 4 more such totals" in caplog.text
    found = pd.read_csv(folder / "targets.csv", dtype={"area": str}).set_index("name")
    both = pd.read_csv(folder / "weights.csv", dtype={"area": str}).merge(households, on="id")
    parents = GROUPS.set_index("area").parent
    for row in with_levels(targets).itertuples():
        here = both[(both.area == row.area) | (both.area.map(parents) == row.area) | (row.area == "")]
        some = here[here.age >= 65] if row.where else here
        value = (some.weight * (some[row.measure] if row.measure else 1.0)).sum()
        assert found.estimate[row.name] == pytest.approx(value, rel=1e-9)
        assert value == pytest.approx(row.value, rel=0.03)
    levels = pd.read_csv(folder / "levels.csv").set_index("level")
    assert levels.targets.to_dict() == {"area": 9, "group": 6, "nation": 3}
    assert results["targets"] == 18
    assert results["mode"] == "joint"
    told = pd.read_csv(folder / "disagreements.csv")
    assert len(told) == 9
    assert "area.groups" in [f["key"] for f in results["provenance"]["inputs"]]


@pytest.mark.parametrize("how", ["proportional", "standard_errors"])
def test_levels_that_were_reconciled_are_all_met(how):
    GROUPS.to_csv("G.csv", index=False)
    write(targets=lambda t: with_levels(t).assign(standard_error=lambda x: 0.01 * x.value))
    more = ("area.column=district", "area.groups=G.csv", "area.mode=joint", f"area.reconcile={how}")
    folder, results = run(*GIVEN, *more, "area.price=1e6", "weights_format=parquet")
    assert results["max_are"] < 1e-5
    told = pd.read_csv(folder / "disagreements.csv")
    np.testing.assert_allclose(told.reconciled_target, told.reconciled_sum, rtol=1e-9)
    nation = told[told.area.isna()]
    assert (nation.target == nation.reconciled_target).all() == (how == "proportional")


@pytest.mark.costly
def test_exactly_so_many_pairs_are_kept():
    households, _ = write(targets=with_levels, crosswalk=SHARES)
    GROUPS.to_csv("G.csv", index=False)
    more = ("area.crosswalk=X.csv", "area.groups=G.csv", "area.mode=prune", "area.keep=90", "area.most=2")
    folder, results = run(*GIVEN, *more, "area.files=true")
    long = pd.read_csv(folder / "weights.csv", dtype={"area": str})
    assert len(long) == results["pairs"] == 90
    assert long.groupby("id").size().max() <= 2
    assert results["most_areas"] <= 2
    assert not long.duplicated(["area", "id"]).any()
    areas = pd.read_csv(folder / "areas.csv", dtype={"area": str}).set_index("area")
    np.testing.assert_array_equal(areas.unique_sources, long.groupby("area").size()[areas.index])
    assert results["mean_are"] < 0.05


WRONG_LEVELS = {
    "an unknown parent": ({"targets": _set("area", "M")}, GROUPS, "T.csv row 2 .*no household of H.csv has"),
    "an area without a group": ({}, GROUPS.iloc[1:], "G.csv: the area 'D1' has no row; there are D2, 03, N"),
    "an area twice": ({}, pd.concat([GROUPS, GROUPS]), "G.csv: the area 'D1' is there twice, in rows 2, 6"),
    "an area as a parent": ({}, GROUPS.assign(parent="D1"), "'D1' is an area, and cannot be the parent"),
    "a group of nothing": (
        {}, GROUPS.assign(area=[*AREAS, "Nn"]), "G.csv: 'Nn' is neither an area nor the parent of one",
    ),
    "a circle": (
        {}, pd.concat([GROUPS[GROUPS.area != "N"], pd.DataFrame({"area": ["N", "S"], "parent": ["S", "N"]})]),
        "groups go round in a circle: '[NS]' is a part of itself",
    ),
    "no such column": ({}, GROUPS.rename(columns={"parent": "up"}), "G.csv has no column 'parent'"),
    "a negative standard error": (
        {"targets": lambda t: t.assign(standard_error=-1.0)}, GROUPS, "standard_error must be >= 0, but it",
    ),
    "a tolerance": ({"targets": lambda t: t.assign(tolerance="2%")}, GROUPS, "leave the column 'tolerance'"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG_LEVELS)
def test_wrong_levels_are_one_line_and_leave_nothing(case, tmp_path):
    change, groups, message = WRONG_LEVELS[case]
    write(**change)
    groups.to_csv("G.csv", index=False)
    with pytest.raises(InputError, match=message) as error:
        run(*GIVEN, HOME, "area.groups=G.csv", "area.mode=joint")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "outputs").exists()


def test_more_pairs_than_there_are_leave_nothing(tmp_path):
    write()
    with pytest.raises(InputError, match="keep=2: 3 areas have targets, and each needs a household"):
        run(*GIVEN, HOME, "area.mode=prune", "area.keep=2")
    with pytest.raises(InputError, match="keep=241: there are 240 pairs"):
        run(*GIVEN, HOME, "area.mode=prune", "area.keep=241")
    with pytest.raises(InputError, match="targets have no standard errors"):
        run(*GIVEN, HOME, "area.reconcile=standard_errors")
    assert not (tmp_path / "outputs").exists()


def test_a_book_of_areas_takes_a_year_and_rules(tmp_path):
    write(targets=lambda t: t.rename(columns={"value": "value_2026"}).assign(level="district"))
    _, results = run(*GIVEN, HOME, "targets.year=2026", "targets.exclude=[\"name == 'D1/old'\"]")
    assert results["targets"] == 8
    with pytest.raises(InputError, match="a list of years as targets.year is not known where areas"):
        run(*GIVEN, HOME, "targets.year=[2026,2027]")


def test_names_of_files_differ_whatever_areas_are_called():
    names = areas._names(("a/b", "a b", "A_b", "c", "ü"))
    assert len({name.lower() for name in names}) == 5
    assert {"c", "ü"} <= set(names)
    assert max(len(name.encode()) for name in areas._names(("漢" * 90, "漢" * 91))) < 200


@pytest.mark.parametrize("mode", ["independent", "joint"])
def test_bounds_that_are_wrong_leave_no_folder(tmp_path, mode):
    write()
    with pytest.raises(InputError, match="must lie on either side of 1"):
        run(*GIVEN, HOME, f"area.mode={mode}", "bounds=[1.2,2]")
    assert not list((tmp_path / "outputs").rglob("version_*"))


def test_areas_may_call_their_totals_the_same(tmp_path):
    write(targets=lambda t: t.assign(name=t.name.str.split("/").str[-1].replace("", "households")))
    folder, results = run(*GIVEN, HOME)
    assert results["targets"] == 9
    targets = pd.read_csv(folder / "targets.csv", dtype={"area": str})
    np.testing.assert_allclose(targets.estimate[:9], targets.target[:9], rtol=1e-9)
    assert not targets.duplicated(["area", "name"]).any()
    write(targets=lambda t: t.assign(name="total"))
    with pytest.raises(InputError, match="target name 'total' of the area 'D1' is in rows 2 and 3"):
        run(*GIVEN, HOME)
