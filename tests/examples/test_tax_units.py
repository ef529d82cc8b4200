"""The file of tax units is built from the package taxcalc, if there is one."""

import importlib.util
import sys

import pandas as pd
import pytest

from examples import tax_units


def test_without_taxcalc_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "taxcalc", None)
    with pytest.raises(SystemExit, match="pip install taxcalc paramtools behresp bokeh"):
        tax_units.build(tmp_path)


def test_a_step_without_its_table_says_how_to_make_it(tmp_path):
    with pytest.raises(SystemExit, match="--step build makes it"):
        tax_units.calibrate(tmp_path, "whole")


def test_targets_that_ship_name_columns_that_are_built():
    targets = pd.read_csv(tax_units.TARGETS)
    assert len(targets) == 1_173
    assert set(targets.measure.dropna()) <= set(tax_units.COLUMNS.values())


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("taxcalc") is None, reason="taxcalc is not installed")
@pytest.mark.filterwarnings("ignore")
def test_the_table_is_that_of_the_package(tmp_path):
    tax_units.build(tmp_path)
    units = pd.read_csv(tmp_path / "tax_units.csv.gz")
    assert len(units) == 280_005
    assert list(units) == list(tax_units.COLUMNS.values())
    assert (tmp_path / tax_units.TARGETS.name).is_file()
