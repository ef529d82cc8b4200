"""``weights=integer`` and the formats in which weights are written."""

import importlib.util

import pandas as pd
import pytest

from .test_run import _own_folder, exactly, run, tables  # noqa: F401


@pytest.mark.costly
def test_whole_weights_are_written_and_their_price_is_told():
    common = [*tables(), "num_households=null", "method=calibrate", "weights=integer"]
    folder, results = run(*common)
    weights = pd.read_csv(folder / "weights.csv")
    assert weights.weight.dtype.kind == "i"
    told = results["integer_weights"]
    assert told["max_abs_scaled_error_real"] < 1e-9
    assert results["max_abs_scaled_error"] < 1e-9  # counts: whole weights can meet them
    assert 0 < told["largest_change"] < 1
    assert told["left_with_zero"] == 120 - len(weights)
    page = (folder / "report.html").read_text()
    assert "Weights are whole numbers: the largest error over its scale is" in page
    assert "integer_weights" in results
    assert run(*tables())[1]["integer_weights"] is None


@pytest.mark.costly
@pytest.mark.parametrize("suffix", ["csv", "parquet", "dta"])
def test_weights_of_every_format_are_the_same(suffix):
    common = [*tables(), "num_households=null", "method=calibrate"]
    usual, _ = run(*common)
    folder, _ = run(*common, f"weights_format={suffix}")
    if suffix == "dta":
        found = pd.read_stata(folder / "weights.dta")
    else:
        found = (
            exactly(folder / "weights.csv")
            if suffix == "csv"
            else pd.read_parquet(folder / "weights.parquet")
        )
    expected = exactly(usual / "weights.csv")
    assert found.id.tolist() == expected.id.tolist()
    assert found.weight.tolist() == expected.weight.tolist()
    if suffix == "dta" and importlib.util.find_spec("pyreadstat"):
        _, results = run(*common, f"start={folder}")
        assert results["steps"] <= 1


def test_ids_that_stata_would_round_are_texts(tmp_path):
    from sparsereg.table_file import write_table

    table = pd.DataFrame({"id": [2**60 + 1, 5], "small": [2**31, 7], "name": ["ä", ""], "weight": [1.5, 2.5]})
    write_table(tmp_path / "w.dta", table)
    found = pd.read_stata(tmp_path / "w.dta")
    assert found.id.tolist() == [str(2**60 + 1), "5"]
    assert found.small.tolist() == [2**31, 7]
    assert found.name.tolist() == ["ä", ""]
