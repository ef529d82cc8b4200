"""Wrong input of a calibration: one clear line each: what, where, what to do; nothing is written."""

import sqlite3
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from sparsereg import extras
from sparsereg.errors import InputError

from .test_run import _own_folder, run  # noqa: F401

BASE = (
    "problem=households", "problem.households=H.csv", "problem.targets=T.csv", "problem.weight=w",
    "problem.id=hid", "num_households=null", "method=calibrate", "plots=false", "tensorboard=false",
)  # fmt: skip


def survey():
    rng = np.random.default_rng(0)
    table = pd.DataFrame(
        {
            "hid": np.arange(1, 41),
            "w": np.round(rng.random(40) + 1, 3),
            "area": np.where(np.arange(40) < 20, "N", "S"),
            "stratum": np.repeat([1, 2], 20),
            "psu": np.repeat(np.arange(10), 4),
            "rep1": 1.0,
            "rep2": 1.5,
            "x": np.round(rng.random(40), 3),
        }
    )
    targets = pd.DataFrame({"name": ["all", "n"], "value": [62.0, 31.0], "where": ["", "area == 'N'"]})
    persons = pd.DataFrame({"hid": np.repeat(np.arange(1, 41), 2), "age": 30})
    return table, targets, persons


def write(table, targets, persons=None, **how):
    table.to_csv("H.csv", index=False, **how)
    targets.to_csv("T.csv", index=False)
    if persons is not None:
        persons.to_csv("P.csv", index=False)


def refuses(said, *overrides):
    with pytest.raises((InputError, ValueError), match=said) as error:
        run(*BASE, *overrides)
    assert "\n" not in str(error.value)
    assert not Path("outputs").exists()


@pytest.mark.parametrize(
    ("bounds", "said"),
    [
        (
            "bounds=[1.1,2]",
            r"bounds are of weight over initial weight and must lie on either side of 1: got \[1.1, 2",
        ),
        ("bounds=[0.2,0.9]", r"must lie on either side of 1: got \[0.2, 0.9\]"),
        ("bounds=[3,0.5]", r"bounds=\[3, 0.5\]: expected the smaller one first"),
        ("weight_bounds=[9,2]", r"weight_bounds=\[9, 2\]: expected the smaller one first"),
    ],
)
def test_bounds_that_exclude_1_or_cross(bounds, said):
    write(*survey())
    refuses(said, bounds)


@pytest.mark.parametrize("distance", ["raking", "linear"])
def test_negative_initial_weights(distance):
    table, targets, _ = survey()
    write(table.assign(w=table.w.where(table.hid != 7, -0.5)), targets)
    refuses("H.csv: w must be >= 0, but it is -0.5 in row 8", f"distance={distance}")


def test_a_denominator_of_zero():
    table, targets, _ = survey()
    ratio = pd.DataFrame({"name": ["share"], "value": [0.5], "of": ["1"], "of_where": ["area == 'W'"]})
    write(table, pd.concat([targets, ratio]))
    refuses(
        r"T.csv row 4 \(target 'share'\): its denominator \(of, of_where\) is zero: no household has area"
    )


def test_persons_without_household_and_households_without_persons():
    table, targets, persons = survey()
    two = ("problem.persons=P.csv", "problem.household_id=hid")
    write(table, targets, persons.replace({"hid": {3: 903, 5: 905}}))
    refuses("P.csv: 4 of 80 persons are in no household of H.csv: hid 903, 905; the first is in row 6", *two)
    write(table, targets, persons[~persons.hid.isin([4, 9])])
    refuses("H.csv: 2 of 40 households have no person in P.csv: hid 4, 9", *two)


def test_designs_that_are_none():
    table, targets, _ = survey()
    design = ("variance=linearized", "report.variables=[x]", "strata=stratum", "psu=psu")
    write(table.assign(psu=table.psu.replace(9, 0)), targets)
    refuses("H.csv: .*0.*strat", *design)  # unit 0 is in two strata
    write(table.assign(psu=np.where(table.stratum == 2, 5, table.psu)), targets)
    refuses("H.csv: .*stratum.*2", *design)  # stratum 2 has one unit


def test_replicate_columns_that_do_not_fit():
    write(*survey())
    common = ("report.variables=[x]",)
    refuses("variance=replicates:wt.: no column of H.csv fits", "variance=replicates:wt*", *common)
    table, targets, _ = survey()
    write(table.assign(rep2=9.0, rep1=9.0), targets)
    refuses(
        "the replicate weights rep1 to rep2 add up to 360 each, .*: they do not fit",
        "variance=replicates:rep",
        *common,
    )
    write(table.assign(rep2=-1.0), targets)
    refuses(
        "the replicate weight rep2 must be >= 0, but it is -1 in row 2", "variance=replicates:rep", *common
    )


def test_hard_targets_that_contradict_each_other_are_named_with_a_proof():
    table, targets, _ = survey()
    more = pd.DataFrame({"name": ["s"], "value": [40.0], "where": ["area == 'S'"], "hard": ["true"]})
    write(table, pd.concat([targets.assign(hard="true"), more]))
    refuses(
        "hard targets contradict each other, .*: no weights within the bounds meet all, n, s together"
        r" \(a linear programme proves it: .*\); widen the bounds, give some a tolerance"
    )


def test_a_file_of_spss_without_pyreadstat(monkeypatch):
    write(*survey())
    Path("H.sav").write_bytes(b"$FL2")
    monkeypatch.setattr(extras, "find_spec", lambda module: None)
    said = "H.sav: pyreadstat is not installed, which this needs: pip install 'sparsereg.formats.'"
    refuses(said, "problem.households=H.sav")


def test_a_decimal_comma_is_read_as_text():
    table, targets, _ = survey()
    write(table, targets, sep=";", decimal=",")
    refuses(
        "H.csv: w must be a finite number, but it is '1,.*' in row 2 .*say problem.decimal=comma",
        "num_households=null",
    )
    run(*BASE, "problem.decimal=comma")


# ---- what nobody asked for


def test_values_that_statistics_programs_write_for_missing_ones():
    table, targets, _ = survey()
    sums = pd.DataFrame({"name": ["x"], "value": [30.0], "measure": ["x"]})
    write(table.assign(x=table.x.astype(str).where(table.hid != 5, ".")), pd.concat([targets, sums]))
    refuses("the measure 'x' is not numeric: H.csv holds '.' there; a missing value is an empty cell")


def test_an_encoding_that_is_none_and_one_that_is_missing():
    table, targets, _ = survey()
    write(table.assign(area=table.area.replace("S", "Süd")), targets, encoding="cp1252")
    refuses(r"H.csv is not UTF-8 text \(line 22\): say problem.encoding=cp1252")
    refuses("problem.encoding=cp125: no such encoding; there are utf-8, cp1252", "problem.encoding=cp125")
    run(*BASE, "problem.encoding=cp1252")


def test_a_database_with_several_tables_and_one_that_is_text():
    table, targets, _ = survey()
    write(table, targets)
    connection = sqlite3.connect("D.sqlite")
    for name in ("a", "b"):
        table.to_sql(name, connection, index=False)
    connection.close()
    refuses(r"D.sqlite has 2 tables \(a, b\): say which one, D.sqlite::a", "problem.households=D.sqlite")
    refuses("D.sqlite has no table 'c'", "problem.households=D.sqlite::c")
    run(*BASE, "problem.households=D.sqlite::b")


def test_whole_weights_within_bounds_that_hold_none():
    table, targets, _ = survey()
    write(table.assign(w=1.55), targets)
    said = "weights=integer: no whole number lies within the bounds of 40 households: those of 1 are 1.3"
    refuses(said, "weights=integer", "bounds=[0.85,1.2]")


def test_formats_that_are_not_read_say_what_to_do():
    write(*survey())
    Path("H.xls").write_bytes(b"\xd0\xcf\x11\xe0")
    refuses(
        "H.xls: a table is not read from such a file: save it as .xlsx or CSV", "problem.households=H.xls"
    )
