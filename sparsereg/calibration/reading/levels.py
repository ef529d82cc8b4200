"""Two levels: persons in households, pupils in schools, with one weight per household.

What a target counts or sums of persons is added up by household; conditions on persons also see the columns
of their household.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.sparse as sp

from sparsereg.calibration.reading.cells import row
from sparsereg.calibration.reading.labels import labels_of, with_labels
from sparsereg.calibration.reading.tables import unique_ids
from sparsereg.calibration.reading.unknown_column import require_column
from sparsereg.errors import InputError

if TYPE_CHECKING:
    import pandas as pd

    from sparsereg.calibration.reading.tables import Table

UNITS = ("household", "person")
"""What a row of the upper and of the lower table is called, if nothing else is said."""
_NAMED = 5
"""Ids that a message names."""


def plural(unit: str) -> str:
    """Several of a unit, in English.

    Example:
        >>> [plural(unit) for unit in ("household", "company", "business", "survey")]
        ['households', 'companies', 'businesses', 'surveys']
    """
    if unit.endswith("y") and unit[-2:-1] not in "aeiou":
        return f"{unit[:-1]}ies"
    return f"{unit}es" if unit.endswith(("s", "x", "z", "ch", "sh")) else f"{unit}s"


@dataclass(frozen=True, eq=False)
class Persons:
    """The lower of two levels.

    Args:
        table: One row per person.
        file: Where it came from, for messages.
        household: The position of each person's household, shape (persons,).
        num_households: How many there are.
        units: What a row of the upper and of the lower table is called.
        used: Columns with a task of their own: ids.
        rest: Where the other columns are read from, part by part, if they are not in memory.
    """

    table: pd.DataFrame
    file: str
    household: np.ndarray
    num_households: int
    units: tuple[str, str] = UNITS
    used: tuple[str, ...] = ()
    rest: Table | None = None

    @property
    def names(self) -> list[str]:
        """Names of all columns, also of those that are not in memory."""
        return [str(c) for c in self.table.columns] if self.rest is None else self.rest.names

    def frame(self, columns: Collection[str]) -> pd.DataFrame:
        """Return at least these columns of the persons."""
        return self.table if self.rest is None else self.rest.read(columns)

    def parts(self, columns: Collection[str]) -> Iterator[tuple[int, Persons]]:
        """Yield persons with at least these columns, part by part, each with the number of those before."""
        if self.rest is None:
            yield 0, self
            return
        start = 0
        for part in self.rest.parts(columns):
            end = start + len(part)
            yield start, replace(self, table=part, household=self.household[start:end], rest=None)
            start = end

    @property
    def sizes(self) -> np.ndarray:
        """Persons of each household, shape (households,)."""
        return np.bincount(self.household, minlength=self.num_households)

    def by_household(self, matrix: sp.csr_array) -> sp.csr_array:
        """Add up what persons add to totals.

        Args:
            matrix: Targets x persons.

        Returns:
            Targets x households, float64.
        """
        num = len(self.household)
        member = sp.csr_array(
            (np.ones(num), self.household, np.arange(num + 1)), shape=(num, self.num_households)
        )
        return sp.csr_array(matrix.astype(np.float64) @ member)

    def joined(self, households: pd.DataFrame, names: Collection[str]) -> pd.DataFrame:
        """Return the persons with these columns of their households; a column of their own goes first."""
        import pandas as pd

        taken = [c for c in households.columns if c in names and c not in self.table.columns]
        if not taken:
            return self.table
        above = households[taken].iloc[self.household].reset_index(drop=True)
        both = pd.concat([self.table.reset_index(drop=True), above], axis=1)
        from_above = {c: v for c, v in labels_of(households).items() if c in taken}
        return with_labels(both, from_above | labels_of(self.table))


def in_households(
    persons: pd.DataFrame,
    households: pd.DataFrame,
    household_id: str,
    id: str | None = None,
    person_id: str | None = None,
    files: Sequence[str] = ("the household table", "the table of persons"),
    units: tuple[str, str] = UNITS,
    rest: Table | None = None,
) -> Persons:
    """Find the household of each person.

    Args:
        persons: One row per person.
        households: One row per household, ids unique.
        household_id: The column of both tables that says which household it is.
        id: The column of the households, where that is named differently there.
        person_id: A column that names the persons, to be checked.
        files: Where households and persons came from, for messages.
        units: What a row of each is called.
        rest: Where columns of the persons are read from that are not in memory.

    Raises:
        InputError: a column or an id is missing or twice, a person is in no household, or a household has
            nobody; the message names them.
    """
    upper, lower = files
    require_column(persons, household_id, lower, f"it says which {units[0]} a {units[1]} is in")
    key = household_id if household_id in households.columns or id is None else id
    require_column(households, key, upper, f"the ids that {household_id} of {lower} refers to")
    unique_ids(households, key, upper)
    unique_ids(persons, person_id, lower)
    absent = persons[household_id].isna().to_numpy(dtype=bool)
    if absent.any():
        more = f" ({int(absent.sum())} such rows)" if absent.sum() > 1 else ""
        raise InputError(f"{lower}: {household_id} is missing in row {row(int(absent.argmax()))}{more}")
    at = positions(persons[household_id], households[key])
    _refuse_strangers(at, persons[household_id], files, units)
    empty = np.flatnonzero(np.bincount(at, minlength=len(households)) == 0)
    if len(empty):
        raise InputError(
            f"{upper}: {len(empty):,} of {len(households):,} {plural(units[0])} have no {units[1]} in"
            f" {lower}: {key} {_listed(households[key].iloc[empty])}"
        )
    used = tuple(dict.fromkeys(c for c in (household_id, person_id) if c is not None))
    return Persons(persons, lower, at, len(households), units, used, rest)


def members(
    table: Table, columns: Collection[str], household_id: str, households: pd.DataFrame, id: str | None = None
) -> tuple[pd.DataFrame, int]:
    """Read the persons in some of the households, part by part.

    Args:
        table: One row per person of all households.
        columns: What is wanted of them, as far as it is there.
        household_id: The column of both tables that says which household it is.
        households: These.
        id: The column of the households, where that is named differently there.

    Returns:
        These persons, and how many there are in all.

    Raises:
        InputError: a column is missing, or somebody's household.
    """
    import pandas as pd

    key = household_id if household_id in households.columns or id is None else id
    found, number = [], 0
    for part in table.parts({*columns, household_id}):
        require_column(part, household_id, table.place, "it says which household a person is in")
        absent = part[household_id].isna().to_numpy(dtype=bool)
        if absent.any():
            at = row(number + int(absent.argmax()))
            raise InputError(f"{table.place}: {household_id} is missing in row {at}")
        known = key in households.columns
        found.append(part[positions(part[household_id], households[key]) >= 0] if known else part[:0])
        number += len(part)
    return pd.concat(found, ignore_index=True), number


def _refuse_strangers(at: np.ndarray, ids: pd.Series, files: Sequence[str], units: tuple[str, str]) -> None:
    """Refuse persons whose household is not there."""
    lost = np.flatnonzero(at < 0)
    if len(lost):
        raise InputError(
            f"{files[1]}: {len(lost):,} of {len(at):,} {plural(units[1])} are in no {units[0]} of {files[0]}:"
            f" {ids.name} {_listed(ids.iloc[lost])}; the first is in row {row(int(lost[0]))}"
        )


def positions(ids: pd.Series, known: pd.Series) -> np.ndarray:
    """Return where each id is among the known ones, -1 where it is not; as texts where kinds differ.

    Args:
        ids: What is looked for.
        known: Unique ids.
    """
    import pandas as pd

    sides: list[Any] = [ids, known]
    if not all(pd.api.types.is_numeric_dtype(side) for side in sides):
        sides = [side.map(_text) for side in sides]
    return np.asarray(pd.Index(sides[1]).get_indexer(pd.Index(sides[0])))


def _text(value: object) -> str:
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value).strip()


def _listed(ids: pd.Series) -> str:
    different = ids.drop_duplicates()
    more = f" and {len(different) - _NAMED:,} more" if len(different) > _NAMED else ""
    return ", ".join(_text(v) for v in different.iloc[:_NAMED]) + more
