"""Tables come back as they were, and no text in them is a formula."""

import numpy as np
import pandas as pd
import pytest

from sparsereg.table_file import as_it_was, inert, texts_as_they_were, write_table

FORMULAS = ["=1+1", "+A1", "-A1", "@SUM(A1)", "\t=1", "\r=1", "'=1", "''=1", "=cmd|'/C calc'!A0"]
PLAIN = ["", "a", "'", "'a", "-5", "+3.5", "-1e-05", "'-5", "5-3", "NA", "a=b", "-", "--"]


@pytest.mark.parametrize("text", FORMULAS)
def test_no_text_is_a_formula_and_every_text_is_found_again(text):
    assert inert(text) == f"'{text}"
    assert as_it_was(inert(text)) == text


@pytest.mark.parametrize("text", PLAIN)
def test_texts_that_are_no_formula(text):
    assert as_it_was(inert(text)) == text
    if text not in ("-", "--"):
        assert inert(text) == text


def test_tables_keep_numbers_and_mark_texts(tmp_path):
    table = pd.DataFrame({"=id": ["=1", "a", None], "x": [-1.5, np.nan, 2.0], "n": [-1, 2, 3],
                          "c": pd.Categorical(["@a", "b", "b"])})  # fmt: skip
    write_table(tmp_path / "t.csv", table)
    assert (tmp_path / "t.csv").read_text().splitlines() == [
        "'=id,x,n,c", "'=1,-1.5,-1,'@a", "a,,2,b", ",2.0,3,b",
    ]  # fmt: skip
    assert table.columns[0] == "=id"
    again = texts_as_they_were(pd.read_csv(tmp_path / "t.csv"))
    assert again.astype({"c": "category"}).equals(table)
