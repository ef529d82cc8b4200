"""Two runs of a calibration side by side: which targets moved, which households came and went."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsereg.calibration.config import WEIGHT_FORMATS
from sparsereg.calibration.reading.tables import read_table
from sparsereg.calibration.reading.unknown_column import require_column
from sparsereg.errors import InputError
from sparsereg.table_file import texts_as_they_were

if TYPE_CHECKING:
    import pandas as pd

MOVED = 1e-3
"""A target moved if value or estimate differ by more than this share of the larger one."""


@dataclass(frozen=True, eq=False)
class Comparison:
    """What is different between two runs.

    Args:
        targets: Of both, by name: value and estimate in each, change (relative, of the estimate), and what
            became of it: stayed, moved, came or went.
        households: Kept by either, by id: weights in each and what became of it: stayed, came or went.
    """

    targets: pd.DataFrame
    households: pd.DataFrame

    def counts(self) -> dict[str, int]:
        """Return how many targets and households stayed, moved, came and went."""
        parts = {"targets": self.targets, "households": self.households}
        found = {
            f"{noun}_{fate}": int((table.fate == fate).sum())
            for noun, table in parts.items()
            for fate in ("stayed", "moved", "came", "went")
        }
        return {key: n for key, n in found.items() if key != "households_moved"}

    def lines(self, most: int = 3) -> list[str]:
        """Return it in a few lines.

        Args:
            most: How many targets are named.
        """
        n = self.counts()
        moved = self.targets[self.targets.fate == "moved"]
        named = ", ".join(f"{row.name_} ({row.change:+.2%})" for row in _renamed(moved.head(most)))
        return [
            f"targets      {n['targets_moved']:,} moved, {n['targets_stayed']:,} stayed,"
            f" {n['targets_came']:,} came, {n['targets_went']:,} went",
            *([f"moved most   {named}"] if named else []),
            f"households   {n['households_stayed']:,} stayed, {n['households_came']:,} came,"
            f" {n['households_went']:,} went",
        ]


def compare_runs(first: Path, second: Path) -> Comparison:
    """Compare two runs of calibrate.py.

    Args:
        first: The folder of a run.
        second: Of another.

    Raises:
        InputError: One is no folder of a run that has finished.
    """
    targets = _joined(_table(first, "targets", "name"), _table(second, "targets", "name"), "name")
    columns = ["target", "estimate"]
    change = (targets.estimate_2 - targets.estimate_1) / targets.estimate_1.abs().where(
        targets.estimate_1 != 0
    )
    apart = [
        (targets[f"{c}_2"] - targets[f"{c}_1"]).abs()
        > MOVED * targets[[f"{c}_1", f"{c}_2"]].abs().max(axis=1)
        for c in columns
    ]
    moved = (targets.fate == "stayed") & (apart[0] | apart[1])
    kept = [f"{c}_{run}" for c in columns for run in (1, 2)]
    targets = targets[["name", *kept]].assign(change=change, fate=targets.fate.where(~moved, "moved"))
    targets = targets.loc[change.abs().sort_values(ascending=False, kind="stable").index]
    households = _joined(_table(first, "weights", "id"), _table(second, "weights", "id"), "id")
    return Comparison(targets, households[["id", "weight_1", "weight_2", "fate"]])


def _joined(one: pd.DataFrame, two: pd.DataFrame, key: str) -> pd.DataFrame:
    both = one.merge(two, on=key, how="outer", suffixes=("_1", "_2"), indicator="fate", sort=False)
    fates = {"both": "stayed", "left_only": "went", "right_only": "came"}
    return both.assign(fate=both.fate.astype(str).map(fates))


def _table(run: Path, name: str, key: str) -> pd.DataFrame:
    """Return a table that a run wrote, its key as text."""
    files = [run / f"{name}.{suffix}" for suffix in WEIGHT_FORMATS]
    file = next((f for f in files if f.is_file()), None)
    if file is None:
        raise InputError(f"{run} has no {files[0].name}: give the folders of two runs that have finished")
    table = read_table(file, as_text=("name", "group"), id=key)
    for column in (key, *(("target", "estimate") if name == "targets" else ("weight",))):
        require_column(table, column, file, "a run writes it")
    table = texts_as_they_were(table) if file.suffix == ".csv" else table
    return table.assign(**{key: table[key].astype(str)})


def _renamed(table: pd.DataFrame) -> list[Any]:
    return list(table.rename(columns={"name": "name_"}).itertuples(index=False))
